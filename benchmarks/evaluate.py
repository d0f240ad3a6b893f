"""Is a trained agent smooth and robust, and what does its critic look like? For the run folders of either script.

    python benchmarks/evaluate.py runs/HalfCheetah-v5__sac_pave_continuous__1__* --episodes 10

prints one table and writes evaluation.json and evaluation.csv into each run folder. What the numbers are:

    return, smoothness, oscillation   the script's own evaluate(): deterministic policy, fixed starts, env action units
    m_sup, m_mean                     ||d2Q/dsda||_2, largest and mean: how fast the action gradient turns with s
    neg_def                           share of states where d2Q/da2 is negative definite, as at a strict maximum
    mu_inf                            smallest |lambda_max(d2Q/da2)| over those states
    mu_defined_share                  the share of states that mu_inf is taken over, so the same number as neg_def
    trace_abs_inf                     smallest |tr d2Q/da2| over all states: what the paper's release reports for mu; it
                                      needs no negative definiteness, and bounds nothing
    cosine_mean, flip_rate            cosine of grad_a Q1 at consecutive steps of an episode: mean, and share below 0
    actor_jacobian_sup                largest ||dpi/ds||_2 of the actor itself
    bound_sup                         M/mu = m_sup / mu_inf, the theorem's bound on the greedy policy's slope
    bound_holds_share                 share of the negative definite states where
                                      ||dpi/ds||_2 <= ||d2Q/dsda||_2 / |lambda_max(d2Q/da2)|
    robustness                        return and smoothness where the policy sees each observation with uniform noise of
                                      +-level standard deviations; the env steps from the true state

Geometry is exact (no finite difference, no probe), in float64, of the first critic Q1 at every visited (s, pi(s)), with
actions in [-1, 1] and raw observations, as both networks see them. What is defined nowhere is null.

How far to trust the bound: the theorem is about the greedy policy where its maximum is interior. The trained actor only
approximates that policy, and a saturated action is no interior maximum (its dpi/ds is nearly 0, so the bound holds
there for free): bound_holds_share is a measurement, neither proof nor refutation. mu_inf is an infimum: one state at
the edge of concavity makes it tiny and bound_sup huge.
"""

import contextlib
import copy
import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the two scripts are files in the root, not a package

import sac_pave_continuous
import td3_pave_continuous
from sac_pave_continuous import UserError

SCRIPTS = {script.SCRIPT: script for script in (sac_pave_continuous, td3_pave_continuous)}
USER_ERRORS = (*(script.UserError for script in SCRIPTS.values()), OSError)  # OSError: a folder not writable, say
NOISE_LEVELS = (0.01, 0.025, 0.05, 0.1)  # the paper's, in standard deviations of each observation dimension
CHUNK = 250  # rows of a Hessian at a time: bounds the memory, and is faster than 1,000 rows (cache)


@contextlib.contextmanager
def user_errors():
    """End the program with one line and exit code 2 on what the user can mend: for every command in benchmarks/."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Run(NamedTuple):
    """A trained agent on the CPU, without gradients."""

    path: Path
    label: str  # "SAC" or "SAC + PAVE"
    script: ModuleType  # sac_pave_continuous or td3_pave_continuous
    args: object  # script.Args of the training
    actor: torch.nn.Module  # script.Actor, float32 as trained
    critic: torch.nn.Module  # script.QNetwork Q1, float64: it is only differentiated
    step: int  # env steps of training


def load_run(path: str | Path) -> Run:
    """Read the folder of a run; UserError where it has no checkpoint.pt that either script wrote."""
    path = Path(path)
    file = path / "checkpoint.pt"
    if not file.is_file():
        raise UserError(f"{path} is not a run folder: it has no checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # mmap: leave the buffer unread
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {file}: it is truncated or no checkpoint ({cause})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("script") not in SCRIPTS:
        raise UserError(f"{file} was written by neither of {', '.join(SCRIPTS)}")
    script = SCRIPTS[checkpoint["script"]]
    try:
        args, weights = script.Args(**checkpoint["args"]), checkpoint["agent"]
        observation_dim = weights["actor.net.0.weight"].shape[1]
        action_dim = weights["critics.0.net.0.weight"].shape[1] - observation_dim
        actor, critic = script.Actor(observation_dim, action_dim), script.QNetwork(observation_dim, action_dim)
        for prefix, network in {"actor.": actor, "critics.0.": critic}.items():
            network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            network.requires_grad_(False)
    except (KeyError, TypeError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is of another version of {script.SCRIPT}.py ({cause})") from error
    pave = any(getattr(args, name) for name in script.LAMBDAS)
    label = script.SCRIPT.partition("_")[0].upper() + (" + PAVE" if pave else "")
    return Run(path, label, script, args, actor, critic.double(), checkpoint["step"])


# ------------------------------------------------------------------------------------------------------- episodes


class Episode(NamedTuple):
    """What truly happened in one episode of T steps."""

    observations: np.ndarray  # (T, d_s) float32, raw, without noise; without the last one, never acted on
    actions: np.ndarray  # (T, d_a) float32, in [-1, 1]
    env_actions: np.ndarray  # (T, d_a), in the env's own units
    rewards: np.ndarray  # (T,)


class Rollout(NamedTuple):
    episodes: list[Episode]
    metrics: dict[str, float]  # what script.evaluate returns


class Recorder(gym.Wrapper):
    """Keeps every step of `env` (from script.make_env), and shows observations with uniform noise of +-`noise`."""

    def __init__(self, env: gym.Env, noise, progress: Callable):
        super().__init__(env)
        self.noise, self.progress, self.episodes = noise, progress, []

    def noisy(self):
        return self.observation + self.rng.uniform(-1, 1, self.observation.shape) * self.noise

    def reset(self, *, seed=None, options=None):
        self.observation, info = self.env.reset(seed=seed, options=options)
        self.rng = np.random.default_rng(seed)  # the same draws at every noise level
        self.episodes.append([])
        return self.noisy(), info

    def step(self, action):
        seen = np.array(self.observation, dtype=np.float32)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.episodes[-1].append((seen, action, self.action(action), float(reward)))
        if terminated or truncated:
            self.progress()
        return self.noisy(), reward, terminated, truncated, info

    def action(self, action):
        return self.env.get_wrapper_attr("action")(action)


def rollout(run: Run, env: gym.Env, episodes: int, noise=0.0, progress: Callable = lambda: None) -> Rollout:
    """Episodes of the deterministic policy, played by the script's own evaluate(): same starts, same metrics.

    noise: half-width of the uniform noise on what the policy sees, a number or (d_s,), in the observation's own units
    progress: called after each episode
    """
    recorder = Recorder(env, noise, progress)
    metrics = run.script.evaluate(run.actor, recorder, episodes)
    columns = [zip(*steps, strict=True) for steps in recorder.episodes]
    return Rollout([Episode(*map(np.array, episode)) for episode in columns], metrics)


# ------------------------------------------------------------------------------------------------------- geometry


def critic_hessians(critic, observations, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact d2Q/dsda (B, d_a, d_s) and d2Q/da2 (B, d_a, d_a) at (B, d_s), (B, d_a); critic as in action_gradient.

    The Jacobian of grad_a Q in (s, a) takes d_a reverse passes for both; a forward one would take d_s.
    """

    def gradient(observation, action):
        return sac_pave_continuous.action_gradient(critic, observation[None], action[None])[0][0]

    jacobians = torch.func.jacrev(gradient, argnums=(0, 1))
    return torch.func.vmap(jacobians, chunk_size=CHUNK)(observations, actions)


def mixed_hessians(critic, observations, actions) -> torch.Tensor:
    """Exact d2Q/dsda (B, d_a, d_s)."""
    return critic_hessians(critic, observations, actions)[0]


def action_hessians(critic, observations, actions) -> torch.Tensor:
    """Exact d2Q/da2 (B, d_a, d_a)."""
    return critic_hessians(critic, observations, actions)[1]


def actor_jacobians(actor, observations) -> torch.Tensor:
    """Exact dpi/ds (B, d_a, d_s) of the deterministic policy, actions in [-1, 1], at (B, d_s)."""
    jacobian = torch.func.jacrev(lambda observation: actor(observation[None])[0])
    return torch.func.vmap(jacobian, chunk_size=CHUNK)(observations)


def spectral_norms(matrices) -> torch.Tensor:
    """Largest singular value: (B, m, n) -> (B,)."""
    return torch.linalg.matrix_norm(matrices, ord=2)


def geometry(actor, critic, episodes: list[Episode], progress: Callable = lambda: None) -> dict[str, float]:
    """The metrics of the critic and the theorem (see the top of this file), NaN where undefined.

    actor, critic: float64 callables (B, d_s) -> (B, d_a) and (B, d_s), (B, d_a) -> (B,)
    progress: called after each episode
    """
    mixed, largest, trace, jacobian, cosine = [], [], [], [], []
    for episode in episodes:
        observations, actions = (torch.from_numpy(part).double() for part in episode[:2])
        mixed_hessian, action_hessian = critic_hessians(critic, observations, actions)
        mixed.append(spectral_norms(mixed_hessian))
        largest.append(torch.linalg.eigvalsh(action_hessian)[:, -1])
        trace.append(action_hessian.diagonal(dim1=1, dim2=2).sum(-1))
        jacobian.append(spectral_norms(actor_jacobians(actor, observations)))
        gradient = sac_pave_continuous.action_gradient(critic, observations, actions)[0]
        cosine.append(F.cosine_similarity(gradient[:-1], gradient[1:], dim=1))  # never across two episodes
        progress()
    mixed, largest, trace, jacobian, cosine = map(torch.cat, (mixed, largest, trace, jacobian, cosine))
    concave = largest < 0
    mu = -largest[concave]
    mu_inf = mu.min() if len(mu) else torch.tensor(math.nan)
    values = {
        "m_sup": mixed.max(),
        "m_mean": mixed.mean(),
        "mu_inf": mu_inf,
        "mu_defined_share": concave.double().mean(),
        "trace_abs_inf": trace.abs().min(),
        "neg_def": concave.double().mean(),
        "cosine_mean": cosine.mean(),
        "flip_rate": (cosine < 0).double().mean(),
        "actor_jacobian_sup": jacobian.max(),
        "bound_sup": mixed.max() / mu_inf,
        "bound_holds_share": (jacobian[concave] <= mixed[concave] / mu).double().mean(),
    }
    return {name: value.item() for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------- evaluation


def evaluate_run(run: Run, episodes: int = 10, progress: Callable = lambda: None) -> dict:
    """What evaluation.json holds; `progress` is called 6 times an episode. UserError where there is no episode."""
    if episodes < 1:
        raise UserError(f"--episodes is {episodes}; it must be at least 1")
    with run.script.make_env(run.args.env_id) as env:
        visited = rollout(run, env, episodes, progress=progress)
        deviation = np.concatenate([episode.observations for episode in visited.episodes]).std(axis=0, dtype=np.float64)
        robustness = {
            str(level): rollout(run, env, episodes, level * deviation, progress).metrics for level in NOISE_LEVELS
        }
    actor = copy.deepcopy(run.actor).double()
    behaviour = ("return_mean", "return_std", "smoothness_mean", "smoothness_std", "oscillation")
    values = {key: visited.metrics[key] for key in behaviour} | geometry(actor, run.critic, visited.episodes, progress)
    return {key: value if math.isfinite(value) else None for key, value in values.items()} | {
        "robustness": {
            level: {key: metrics[key] for key in ("return_mean", "smoothness_mean")}
            for level, metrics in robustness.items()
        }
    }


def flat(evaluation: dict) -> dict[str, float]:
    """The evaluation as one row: robustness becomes the columns return_mean@0.01, smoothness_mean@0.01 and so on."""
    row = {key: value for key, value in evaluation.items() if key != "robustness"}
    for level, metrics in evaluation["robustness"].items():
        row |= {f"{key}@{level}": value for key, value in metrics.items()}
    return row


def write_csv(path: Path, runs: list[Run], evaluations: list[dict]) -> None:
    """One row a run."""
    rows = []
    for run, evaluation in zip(runs, evaluations, strict=True):
        about = {"run": run.path.resolve().name, "label": run.label, "env_id": run.args.env_id}
        rows.append(about | {"seed": run.args.seed, "step": run.step} | flat(evaluation))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def table(runs: list[Run], evaluations: list[dict]) -> str:
    """The evaluations side by side, one column a run."""
    rows = [["", *(run.label for run in runs)], ["env", *(run.args.env_id for run in runs)]]
    rows += [["seed", *(str(run.args.seed) for run in runs)], ["step", *(f"{run.step:,}" for run in runs)]]
    columns = [flat(evaluation) for evaluation in evaluations]
    for key in columns[0]:
        rows.append([key, *("-" if column[key] is None else f"{column[key]:.4g}" for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of sac_pave_continuous.py or td3_pave_continuous.py"""
    episodes: int = 10
    """episodes without noise, and again at each noise level"""
    csv: Path | None = None
    """also write all runs into this one CSV"""


def main(args: Args) -> None:
    if not args.runs:
        raise UserError("give at least one run folder")
    runs, evaluations = [load_run(path) for path in args.runs], []
    with tqdm(total=6 * args.episodes * len(runs), unit="episode", disable=None, leave=False) as bar:
        for run in runs:
            bar.set_description(run.path.name)
            evaluations.append(evaluate_run(run, args.episodes, bar.update))
            (run.path / "evaluation.json").write_text(json.dumps(evaluations[-1], indent=2, allow_nan=False) + "\n")
            write_csv(run.path / "evaluation.csv", [run], evaluations[-1:])
    print(table(runs, evaluations))
    if args.csv:
        write_csv(args.csv, runs, evaluations)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
