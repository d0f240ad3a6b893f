"""What the tools here share: runs of both scripts read, named and played, the machine's name, errors of one line."""

import contextlib
import hashlib
import json
import os
import platform
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
WRAPPERS = ("filter", "penalty")  # namespaces of env ids: the rivals of PAVE that are wrappers around an env
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
    action_dim: int
    origin: dict | None  # of a warm-started run: its source's "run", "step", "args" and "origin"

    @property
    def identity(self) -> str:
        return identity(self.script, vars(self.args), self.origin)


def read_json(path: Path) -> dict:
    """{} where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


# ----------------------------------------------------------------------------------------- what a run is, and its names


def settings_of(script: ModuleType, args: dict) -> dict:
    """What makes another training, where it differs from the script's default; without seed and number of steps.

    So a flag that came later changes nothing while it is at its default; one that is gone by now stays.
    """
    defaults, settings = vars(script.Args()), {}
    for name, value in sorted(args.items()):
        free = name in script.FREE_SETTINGS or name in ("seed", "total_timesteps")
        if not free and value != defaults.get(name):
            whole = isinstance(value, float) and value.is_integer()
            settings[name] = int(value) if whole else value  # 2.0 and 2 are one setting
    return settings


def identity(script: ModuleType, args: dict, origin: dict | None) -> str:
    """What a training is, in 12 hex digits: its settings and where it began; all seeds of one thing have the same.

    args: the training's settings by name. origin: None from scratch; of a warm-started run its source's "args", "step"
    and "origin": a source is what it was itself, not a path.
    """
    about = {"script": script.SCRIPT, "settings": settings_of(script, args), "origin": None}
    if origin:
        about["origin"] = [identity(script, origin["args"], origin.get("origin")), origin["step"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def unwrap(env_id: str) -> tuple[str, str]:
    """The namespace, filter or penalty, and the env inside: benchmarks.envs:filter/Pendulum-v1 is Pendulum-v1 filtered.

    "" and the id itself for any other.
    """
    module, _, name = env_id.rpartition(":")
    namespace, _, inner = name.rpartition("/")
    if namespace not in WRAPPERS:
        return "", env_id
    return namespace, inner if module in ("", "benchmarks.envs") else f"{module}:{inner}"


def method_of(script: ModuleType, args: dict, origin: dict | None = None) -> str:
    """A training's name: base, pave, untuned (also what an env without tuned lambdas takes), auto, caps, ablation-ijk,
    own; in a wrapped env filter, penalty, filter+pave, ...; after a warm start base-then-pave, ...

    args: its settings, each that the script knows; origin: as of `identity`.
    """
    if origin:
        source = method_of(script, vars(script.Args()) | origin["args"], origin.get("origin"))
        return f"{source}-then-{method_of(script, args)}"
    method, (wrapper, _) = critic_method(script, args), unwrap(args["env_id"])
    if wrapper:
        return wrapper if method == "base" else f"{wrapper}+{method}"
    return method


def critic_method(script: ModuleType, args: dict) -> str:
    """What is done to the critic (or, by CAPS, to the actor): see method_of."""
    if args.get("caps_temporal") is not None:
        return "caps"
    if args["autotune_curv"]:
        return "auto"
    lambdas = tuple(args[name] for name in script.LAMBDAS)
    tuned = script.TUNED_LAMBDAS.get(script.env_name(args["env_id"]))
    names = {(0, 0, 0): "base", script.UNTUNED_LAMBDAS: "untuned", tuned: "pave"}
    if lambdas in names:
        return names[lambdas]
    whole = tuned or script.UNTUNED_LAMBDAS
    switched = all(value in (0, full) for value, full in zip(lambdas, whole, strict=True))
    return "ablation-" + "".join(str(int(value > 0)) for value in lambdas) if switched else "own"


def origin_text(script: ModuleType, origin: dict | None) -> str:
    """Where a run began, for readers: "base seed 1 at 25,000"; a chain is joined by "then"; "" from scratch."""
    if not origin:
        return ""
    source = vars(script.Args()) | origin["args"]
    told = f"{method_of(script, source)} seed {source['seed']} at {origin['step']:,}"
    before = origin_text(script, origin.get("origin"))
    return f"{before}, then {told}" if before else told


# ---------------------------------------------------------------------------------------------------- reading, playing


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
        observation_dim = weights["actor.net.0.weight"].shape[1]
        action_dim = outputs // 2 if algorithm == "sac" else outputs  # SAC's: mean and standard deviation
        actor = with_weights(script.Actor(observation_dim, action_dim), weights, "actor.")
        critic = None
        if need_critic:
            critic = with_weights(script.QNetwork(observation_dim, action_dim), weights, "critics.0.").double()
        args, origin = vars(script.Args()) | saved["args"], saved.get("origin")
        method = method_of(script, args, origin)
    except Exception as error:
        cause = " ".join(repr(error).split())[:200]
        raise UserError(f"cannot read {file}: damaged, or not of {' or '.join(SCRIPTS)} ({cause})") from error
    settings = SimpleNamespace(**args)
    return Run(path, algorithm, method, script, settings, actor, critic, saved["step"], action_dim, origin)


def with_weights(network: torch.nn.Module, weights: dict, prefix: str) -> torch.nn.Module:
    """The network with those of the weights whose names begin with the prefix."""
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return network.requires_grad_(False)


class Episode(NamedTuple):
    """What truly happened in one episode of T steps."""

    observations: np.ndarray  # (T, d_s) float32, raw, without noise; without the last one, never acted on
    actions: np.ndarray  # (T, d_a) float32, in [-1, 1]: the policy's
    env_actions: np.ndarray  # (T, d_a), in the env's own units: what the robot got, behind a filter, say
    rewards: np.ndarray  # (T,)


class Recorder(gym.Wrapper):
    """Keeps each step of `env` (of script.make_env); shows observations with uniform noise +-`noise`, () or (d_s,)."""

    def __init__(self, env: gym.Env, noise):
        super().__init__(env)
        self.noise, self.episodes = noise, []

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
        sent_action = np.ravel(self.env.get_wrapper_attr("sent_action"))
        self.episodes[-1].append((seen, action, sent_action, reward))
        return self.noisy(), reward, *rest


def evaluation_env(run: Run) -> gym.Env:
    """The env in which a run is evaluated: its own, or the one that this names (a penalty's, without the penalty)."""
    with run.script.make_env(run.args.env_id) as env:
        return run.script.make_evaluation_env(run.args.env_id, env)


def rollout(run: Run, env: gym.Env, episodes: int, noise=0.0) -> tuple[list[Episode], dict[str, float]]:
    """Episodes of the deterministic policy and their metrics, both by script.evaluate: same starts, same measures."""
    recorder = Recorder(env, noise)
    metrics = run.script.evaluate(run.actor, recorder, episodes)
    return [Episode(*map(np.array, zip(*steps, strict=True))) for steps in recorder.episodes], metrics


def machine() -> dict[str, str | None]:
    """What a measurement made here and now depends on: machine, torch, commit, preload (a library, README.md here)."""

    def told(command: str) -> str:  # "" where it isn't installed: that error is the shell's
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    model = told("grep -m 1 'model name' /proc/cpuinfo").partition(": ")[2]
    gpus = told("nvidia-smi --query-gpu=name --format=csv,noheader").splitlines()
    parts = [model or platform.machine(), f"{os.cpu_count()} cores", *gpus[:1]]
    commit = told("git describe --always --dirty --abbrev=40 --exclude='*'")
    about = {"machine": ", ".join(parts), "torch": torch.__version__, "commit": commit or None}
    return about | {"preload": os.environ.get("LD_PRELOAD")}
