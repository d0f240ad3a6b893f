"""Is a trained agent smooth and robust, and what does its critic look like? For the run folders of either script.

    python -m benchmarks.evaluate runs/HalfCheetah-v5__sac_pave_continuous__1__* --episodes 10

prints one table and writes evaluation.json into each run folder; what is there already, from the same code, step and
number of episodes, is kept. What the numbers are:

    return, smoothness,     the script's own evaluate(): deterministic policy, fixed starts, env action units.
    oscillation, length     smoothness (sm) grows with the length: compare it at equal lengths only
    saturation              share of action entries within 1 % of a limit: beyond +-0.98 in [-1, 1]
    saturation_outward      share of states where a component of grad_a Q1 points outwards at such a limit:
                            no maximum of Q inside the action box, which the theorem presumes
    m_sup, m_mean           ||d2Q/dsda||_2, largest and mean: how fast the action gradient turns with s
    neg_def                 share of concave states: d2Q/da2 is negative definite, as at a strict maximum
    mu_inf                  smallest |lambda_max(d2Q/da2)| over the concave states
    cosine_mean, flip_rate  cosine of grad_a Q1 at consecutive steps of an episode: mean, and share below 0
    actor_jacobian_sup      largest ||dpi/ds||_2 of the actor itself
    bound_sup               M/mu = m_sup / mu_inf, the theorem's bound on the greedy policy's slope
    bound_holds_share       share of the concave states where ||dpi/ds||_2 <= ||d2Q/dsda||_2 / |lambda_max(d2Q/da2)|
    robustness              return, smoothness and length where the policy sees each observation with uniform noise of
                            +-level standard deviations of what a uniformly random policy visits, the same for every
                            run of an env; the env steps from the true state
    random_return           mean return of that random policy, from the same starts

Geometry is exact (no finite difference, no probe), in float64, of the first critic Q1 at every visited (s, pi(s)), with
actions in [-1, 1] and raw observations, as both networks see them. What is defined nowhere is null.

How far to trust the bound: the theorem is about the greedy policy where its maximum is interior. The trained actor only
approximates that policy, and at a saturated action the bound holds for free (dpi/ds is nearly 0): bound_holds_share
neither proves nor refutes it. One state at the edge of concavity makes mu_inf tiny and bound_sup huge.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from torch.linalg import matrix_norm
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common import Episode, Run, evaluation_env, load_run, read_json, require, rollout, user_errors
from sac_pave_continuous import EVALUATION_SEED, action_gradient

VERSION = 2  # of what evaluation.json holds: raise it with every change to how a number is computed
NOISE_LEVELS = (0.01, 0.025, 0.05, 0.1)  # the paper's, in standard deviations of each observation dimension
LIMIT = 0.98  # of actions in [-1, 1]: 1 % of their range from its end
CHUNK = 250  # rows of a Hessian at a time: bounds the memory, and is faster than 1,000 rows (cache)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders of either script
    episodes: int = 10  # episodes without noise, and again at each noise level
    csv: Path | None = None  # also write all runs into this one CSV


def critic_hessians(critic, observations, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact d2Q/dsda (B, d_a, d_s) and d2Q/da2 (B, d_a, d_a) at (B, d_s), (B, d_a); critic as in action_gradient.

    The Jacobian of grad_a Q in (s, a) takes d_a reverse passes for both; a forward one would take d_s.
    """
    jacobians = torch.func.jacrev(lambda s, a: action_gradient(critic, s[None], a[None])[0][0], argnums=(0, 1))
    return torch.func.vmap(jacobians, chunk_size=CHUNK)(observations, actions)


def geometry(actor, critic, episodes: list[Episode]) -> dict[str, float]:
    """The metrics of the critic and the theorem (see the top of this file), NaN where undefined.

    actor, critic: float64 callables (B, d_s) -> (B, d_a) and (B, d_s), (B, d_a) -> (B,)
    """
    actor_jacobians = torch.func.vmap(torch.func.jacrev(lambda s: actor(s[None])[0]), chunk_size=CHUNK)
    columns = []
    for episode in episodes:
        observations, actions = (torch.from_numpy(part).double() for part in episode[:2])
        mixed, hessians = critic_hessians(critic, observations, actions)
        gradients = action_gradient(critic, observations, actions)[0]
        cosines = F.cosine_similarity(gradients[:-1], gradients[1:], dim=1)  # never across two episodes
        outward = ((actions.abs() > LIMIT) & (gradients * actions > 0)).any(dim=1)
        largest = torch.linalg.eigvalsh(hessians)[:, -1]
        slopes = matrix_norm(actor_jacobians(observations), ord=2)
        columns.append((matrix_norm(mixed, ord=2), largest, slopes, outward.double(), cosines))
    mixed, largest, slopes, outward, cosines = (torch.cat(parts) for parts in zip(*columns, strict=True))
    concave = largest < 0
    mu = -largest[concave]
    mu_inf = mu.min() if len(mu) else torch.tensor(math.nan)
    values = {
        "saturation_outward": outward.mean(),
        "m_sup": mixed.max(),
        "m_mean": mixed.mean(),
        "mu_inf": mu_inf,
        "neg_def": concave.double().mean(),
        "cosine_mean": cosines.mean(),
        "flip_rate": (cosines < 0).double().mean(),
        "actor_jacobian_sup": slopes.max(),
        "bound_sup": mixed.max() / mu_inf,
        "bound_holds_share": (slopes[concave] <= mixed[concave] / mu).double().mean(),
    }
    return {name: value.item() for name, value in values.items()}


def random_policy(env: gym.Env) -> tuple[np.ndarray, float]:
    """Standard deviations (d_s,) of what a uniformly random policy visits, and its mean return, over ten episodes.

    The starts are those of evaluate(), and the actions are the same at every call.
    """
    env.action_space.seed(0)
    observations, returns = [], []
    for episode in range(10):
        observation, total, over = env.reset(seed=EVALUATION_SEED + episode)[0], 0.0, False
        while not over:
            observations.append(observation)
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += reward
            over = terminated or truncated
        returns.append(total)
    return np.std(observations, axis=0, dtype=np.float64), float(np.mean(returns))


def about(step: int, episodes: int) -> dict:
    """What an evaluation of a run hangs on: one that says the same of itself is up to date."""
    return {"version": VERSION, "step": step, "episodes": episodes, "noise_reference": "uniformly random policy"}


def evaluate_run(run: Run, episodes: int = 10) -> dict:
    """What evaluation.json holds."""
    with evaluation_env(run) as env:
        deviations, random_return = random_policy(env)
        played = {}
        for level in tqdm((0, *NOISE_LEVELS), desc=run.path.name, unit="level", disable=None, leave=False):
            played[level] = rollout(run, env, episodes, level * deviations)
    visited, metrics = played.pop(0)
    saturated = np.abs(np.concatenate([episode.actions for episode in visited])) > LIMIT
    values = metrics | {"saturation": saturated.mean(), "random_return": random_return}
    values |= geometry(copy.deepcopy(run.actor).double(), run.critic, visited)
    values = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    kept = ("return_mean", "smoothness_mean", "length_mean")
    robustness = {str(level): {name: metrics[name] for name in kept} for level, (_, metrics) in played.items()}
    return about(run.step, episodes) | values | {"noise_std": deviations.tolist(), "robustness": robustness}


def flat(evaluation: dict) -> dict[str, float]:
    """The evaluation as one row: robustness becomes the columns return_mean@0.01, smoothness_mean@0.01 and so on."""
    row = {key: value for key, value in evaluation.items() if key not in ("robustness", "noise_std")}
    for level, metrics in evaluation["robustness"].items():
        row |= {f"{key}@{level}": value for key, value in metrics.items()}
    return row


def main(args: Args) -> None:
    require(len(args.runs) > 0, "give at least one run folder")
    require(args.episodes > 0, f"--episodes is {args.episodes}; it must be at least 1")
    rows = []
    for run in [load_run(path, need_critic=False) for path in args.runs]:
        evaluation = read_json(run.path / "evaluation.json")
        if not about(run.step, args.episodes).items() <= evaluation.items():
            evaluation = evaluate_run(load_run(run.path), args.episodes)
            (run.path / "evaluation.json").write_text(json.dumps(evaluation, indent=2, allow_nan=False) + "\n")
        name = {"run": run.path.resolve().name, "algorithm": run.algorithm, "method": run.method}
        rows.append(name | {"env_id": run.args.env_id, "seed": run.args.seed} | flat(evaluation))
    table = pd.DataFrame(rows)
    if args.csv:
        table.to_csv(args.csv, index=False)
    print(table.drop(columns="run").T.to_string(header=False, float_format="{:.4g}".format, na_rep="-"))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
