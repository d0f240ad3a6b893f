"""What the tools here share: runs of both scripts read and played, the machine's name, errors of one line."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch

import sac_pave_continuous
import td3_pave_continuous
from sac_pave_continuous import UserError, require

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {script.SCRIPT: script for script in (sac_pave_continuous, td3_pave_continuous)}
# Settings, by how they begin, in which trainings of the same thing may differ
FREE = ("output_dir", "resume", "eval_", "checkpoint_interval", "cuda", "torch_", "compile")
USER_ERRORS = (UserError, td3_pave_continuous.UserError, OSError)  # OSError: a folder not writable, say


@contextlib.contextmanager
def user_errors():
    """End the program with one line and exit code 2 on what the user can mend: for every command in benchmarks/."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Run:
    """A trained agent on the CPU, without gradients."""

    path: Path
    algorithm: str  # "sac" or "td3"
    method: str  # see method_of
    script: ModuleType
    args: SimpleNamespace  # the training's settings; what an older version of the script didn't have is at its default
    actor: torch.nn.Module  # script.Actor, float32 as trained
    critic: torch.nn.Module | None  # script.QNetwork Q1, float64, since it is only differentiated
    step: int  # env steps of training


def read_json(path: Path) -> dict:
    """{} where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def method_of(script: ModuleType, args: dict) -> str:
    """base, pave, untuned (also what an env without tuned lambdas takes), auto, caps, ablation-ijk or own."""
    if "caps_temporal" in args or args["autotune_curv"]:
        return "caps" if "caps_temporal" in args else "auto"
    lambdas, env = tuple(args[name] for name in script.LAMBDAS), re.sub(r"-v\d+$", "", args["env_id"])
    tuned = script.TUNED_LAMBDAS.get(env)
    names = {(0, 0, 0): "base", script.UNTUNED_LAMBDAS: "untuned", tuned: "pave"}
    ablated = all(value in (0, whole) for value, whole in zip(lambdas, tuned or script.UNTUNED_LAMBDAS, strict=True))
    return names.get(lambdas, "ablation-" + "".join(str(int(value > 0)) for value in lambdas) if ablated else "own")


def load_run(path: Path, need_critic: bool = True) -> Run:
    """Read a run's folder: checkpoint.pt or, unless need_critic, actor.pt, which has none. UserError where it can't."""
    files = [path / "checkpoint.pt"] if need_critic else [path / "checkpoint.pt", path / "actor.pt"]
    file = next(filter(Path.is_file, files), None)
    require(file, f"{path} is not a run folder, or lacks its {' and '.join(file.name for file in files)}")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # mmap: leave the buffer unread
        script = SCRIPTS[saved["script"]]
        weights = saved.get("agent") or {f"actor.{name}": value for name, value in saved["actor"].items()}
        algorithm, outputs = script.SCRIPT.partition("_")[0], len(weights["actor.net.4.bias"])
        sizes = weights["actor.net.0.weight"].shape[1], outputs // 2 if algorithm == "sac" else outputs  # mean, std
        actor = with_weights(script.Actor(*sizes), weights, "actor.")
        critic = with_weights(script.QNetwork(*sizes), weights, "critics.0.").double() if need_critic else None
        args = vars(script.Args()) | saved["args"] | read_json(path / "caps.json")  # where CAPS once kept its weights
        method = method_of(script, args)
    except Exception as error:
        cause = " ".join(repr(error).split())[:200]
        raise UserError(f"cannot read {file}: damaged, or not of {' or '.join(SCRIPTS)} ({cause})") from error
    return Run(path, algorithm, method, script, SimpleNamespace(**args), actor, critic, saved["step"])


def with_weights(network: torch.nn.Module, weights: dict, prefix: str) -> torch.nn.Module:
    """The network with those of the weights whose names begin with the prefix."""
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return network.requires_grad_(False)


class Episode(NamedTuple):
    """What truly happened in one episode of T steps."""

    observations: np.ndarray  # (T, d_s) float32, raw, without noise; without the last one, never acted on
    actions: np.ndarray  # (T, d_a) float32, in [-1, 1]
    env_actions: np.ndarray  # (T, d_a), in the env's own units
    rewards: np.ndarray  # (T,)


class Recorder(gym.Wrapper):
    """Keeps each step of `env` (of script.make_env); shows observations with uniform noise +-`noise`, () or (d_s,)."""

    def __init__(self, env: gym.Env, noise):
        super().__init__(env)
        self.noise, self.episodes, self.action = noise, [], env.action

    def noisy(self):
        return np.float32(self.observation + self.rng.uniform(-1, 1, self.observation.shape) * self.noise)

    def reset(self, *, seed=None, options=None):
        self.observation, info = self.env.reset(seed=seed, options=options)
        # the same draws for each policy and level; default_rng(seed) would repeat the env's own draws of the start
        self.rng = np.random.default_rng([seed, 1])
        self.episodes.append([])
        return self.noisy(), info

    def step(self, action):
        seen = self.observation
        self.observation, reward, *rest = self.env.step(action)
        self.episodes[-1].append((seen, action, self.action(action).ravel(), reward))
        return self.noisy(), reward, *rest


def rollout(run: Run, env: gym.Env, episodes: int, noise=0.0) -> tuple[list[Episode], dict[str, float]]:
    """Episodes of the deterministic policy and their metrics, both by script.evaluate: same starts, same measures."""
    recorder = Recorder(env, noise)
    metrics = run.script.evaluate(run.actor, recorder, episodes)
    return [Episode(*map(np.array, zip(*steps, strict=True))) for steps in recorder.episodes], metrics


def machine() -> dict[str, str | None]:
    """What a measurement made here and now depends on: machine, torch, commit."""

    def told(command: str) -> str:  # "" where it isn't installed: that error is the shell's
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    model = told("grep -m 1 'model name' /proc/cpuinfo").partition(": ")[2]
    parts = [model or platform.machine(), f"{os.cpu_count()} cores"]
    parts += told("nvidia-smi --query-gpu=name --format=csv,noheader").splitlines()[:1]
    parts += [f"LD_PRELOAD={os.environ['LD_PRELOAD']}"] if "LD_PRELOAD" in os.environ else []  # see README.md here
    commit = told("git describe --always --dirty --abbrev=40 --exclude='*'")
    return {"machine": ", ".join(parts), "torch": torch.__version__, "commit": commit or None}
