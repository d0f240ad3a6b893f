"""Return, sm and oscillation of any policy f(observation) -> action in any Gymnasium env, both as the env has them.

Also with a low-pass filter put behind the finished policy, which costs no training. For run folders of the scripts:

    python -m benchmarks.measure runs/Pendulum-v1__td3_pave_continuous__* --filter 0 0.5 0.8
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from benchmarks.common import Run, evaluation_env, load_run, require, user_errors
from sac_pave_continuous import EVALUATION_SEED, seed_episode, separate_random_streams, smoothness


class LowPass:
    """A policy with a first-order low-pass filter behind it: sent_t = beta sent_t-1 + (1 - beta) action_t.

    The first action of an episode is sent as it is. The policy doesn't know of the filter: it was trained without.
    (The rival `filter` of envs.py is in the training, too, and begins at the middle of the action's range.)
    """

    def __init__(self, policy, beta: float):
        self.policy, self.beta, self.sent = policy, beta, None

    def reset(self) -> None:
        self.sent = None
        if hasattr(self.policy, "reset"):
            self.policy.reset()

    def __call__(self, observation) -> np.ndarray:
        action = np.array(self.policy(observation))  # a copy: a policy may use one array for all its actions
        self.sent = action if self.sent is None else self.beta * self.sent + (1 - self.beta) * action
        return self.sent


@separate_random_streams()  # so that a training which calls this draws on as without
def measure(policy, env: gym.Env, episodes: int = 10) -> dict[str, float]:
    """Means over episodes, whose starts are those of the scripts' evaluations.

    policy: observation -> action, in the env's own units, as `env.step` takes it; its reset(), if it has one, begins
        an episode
    Returns "return"; "sm" (smoothness of the scripts, lower is smoother; it grows with the episode's length);
    "oscillation", mean |a_t+1 - a_t| over steps and action dimensions; "length". An action is what the robot gets: that
    which a wrapper sends (its attribute `sent_action`, of a filter, say), and clipped to the env's bounds.
    """
    totals = []
    for episode in range(episodes):
        observation = seed_episode(env, EVALUATION_SEED + episode)
        if hasattr(policy, "reset"):
            policy.reset()
        rewards, actions, over = [], [], False
        while not over:
            action = policy(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            rewards.append(reward)
            if env.has_wrapper_attr("sent_action"):
                action = env.get_wrapper_attr("sent_action")
            actions.append(np.ravel(np.clip(action, env.action_space.low, env.action_space.high)))
        oscillation = np.abs(np.diff(actions, axis=0)).mean() if len(actions) > 1 else 0.0
        totals.append((sum(rewards), smoothness(np.array(actions)), oscillation, len(rewards)))
    means = map(float, np.mean(totals, axis=0))
    return dict(zip(("return", "sm", "oscillation", "length"), means, strict=True))


def measure_run(run: Run, beta: float, episodes: int) -> dict[str, float]:
    """`measure` of a run's deterministic policy with a LowPass behind it; a beta of 0 adds no filter."""
    with evaluation_env(run) as env:  # as the agent sees it: flat observations, actions in [-1, 1]

        def policy(observation):
            return env.action(run.actor(torch.as_tensor(env.observe(observation))[None])[0].numpy())

        return measure(LowPass(policy, beta), env.env, episodes)


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders of either script
    filter: tuple[float, ...] = (0.0,)  # beta, the share of its last output that the added filter keeps; 0: none
    episodes: int = 10
    csv: Path | None = None  # also write the table into this CSV


def main(args: Args) -> None:
    import pandas as pd  # only here: what is imported from this file needs the core packages alone

    require(len(args.runs) > 0, "give at least one run folder")
    require(args.episodes > 0, f"--episodes is {args.episodes}; it must be at least 1")
    possible = len(args.filter) > 0 and all(0 <= beta < 1 for beta in args.filter)
    require(possible, f"--filter is {args.filter}; each must be from 0 to below 1")
    rows = []
    for run in [load_run(path, need_critic=False) for path in args.runs]:
        about = {"env_id": run.args.env_id, "algorithm": run.algorithm, "method": run.method, "seed": run.args.seed}
        for beta in args.filter:
            rows.append(about | {"steps": run.step, "filter": beta} | measure_run(run, beta, args.episodes))
    table = pd.DataFrame(rows)
    if args.csv:
        table.to_csv(args.csv, index=False, float_format="%.5g")
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
