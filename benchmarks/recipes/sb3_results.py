"""The numbers of results/sb3.csv: a plain Stable-Baselines3 agent trained, and finished without and with PAVE.

    python -m benchmarks.recipes.sb3_results train --env-id Pendulum-v1 --steps 10000 --seed 1  # then 2, 3
    python -m benchmarks.recipes.sb3_results finish --env-id Pendulum-v1 --steps 5000 --seed 1
    python -m benchmarks.recipes.sb3_results exchange --seed 101  # results/sb3_exchange.csv: which smooth activation?

`train` is SB3 with its defaults and keeps the agent and its replay buffer in runs/sb3/; the others begin from these.
Each prints its rows as it goes and adds them to the CSV of --output.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import tyro
from stable_baselines3.common.logger import configure
from torch import nn
from torch.nn import functional as F

from benchmarks.common import require, user_errors
from benchmarks.envs import FILTER_BETA
from benchmarks.recipes.sb3 import Pave
from benchmarks.recipes.sb3_try import ALGORITHMS, arms, measured
from sac_pave_continuous import UNTUNED_LAMBDAS, env_name, make_env

FITTED = "SiLU, fitted"  # fresh critics instead of the old weights
CANDIDATES = {
    "ReLU": nn.ReLU,
    "Softplus(3)": partial(nn.Softplus, beta=3),
    "Softplus(10)": partial(nn.Softplus, beta=10),
    "Softplus(30)": partial(nn.Softplus, beta=30),
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    FITTED: nn.SiLU,
}
FOLDER = Path("runs/sb3")


def stem(algorithm: str, env_id: str, seed: int) -> Path:
    return FOLDER / f"{env_name(env_id)}__{algorithm}__{seed}"


def add_row(output: Path, row: dict) -> None:
    """To the end of a CSV, whose header is the first row's keys."""
    new = not output.exists()
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_plain(cls, args, **settings):
    """The agent that `train` has kept, as a model of `cls`, with its replay buffer. UserError where there is none."""
    path = stem(args.algorithm, args.env_id, args.seed)
    require(path.with_suffix(".zip").exists(), f"{path}.zip is missing: run the command `train` first, with this seed")
    model = cls.load(path, env=gym.make(args.env_id), device="cpu", **settings)
    model.load_replay_buffer(path.with_suffix(".pkl"))
    return model


def train(args) -> Iterator[dict]:
    """Plain SB3 with its defaults, the agent that a user has: its sampled actions, its means, and these filtered."""
    plain, _, _ = ALGORITHMS[args.algorithm]
    model = plain("MlpPolicy", gym.make(args.env_id), seed=args.seed, device="cpu").learn(args.steps)
    path = stem(args.algorithm, args.env_id, args.seed)
    model.save(path)
    model.save_replay_buffer(path.with_suffix(".pkl"))
    yield {"agent": "plain, sampled"} | measured(model, args.env_id, deterministic=False)
    yield {"agent": "plain"} | measured(model, args.env_id)
    yield {"agent": "plain, filtered"} | measured(model, args.env_id, beta=FILTER_BETA)


def finish(args) -> Iterator[dict]:
    """`steps` more from the same agent: plain SB3 goes on, and with PAVE: tuned (if the env is), untuned, auto."""
    ways = arms(args.algorithm, args.env_id)
    require(args.arm in ("", *ways), f"--arm is one of {', '.join(ways)}, not {args.arm}")
    for agent, (cls, settings) in ways.items():
        if args.arm in ("", agent):
            name = agent
            if args.activation and issubclass(cls, Pave):
                name = f"{agent}, {args.activation}"
                settings = settings | {"critic_activation_fn": CANDIDATES[args.activation]}
            model = read_plain(cls, args, **settings)
            model.learn(args.steps, reset_num_timesteps=False)
            yield {"agent": name} | measured(model, args.env_id)


def exchange(args) -> Iterator[dict]:
    """What the exchange of ReLU in a SAC's or TD3's critics does to Q, and to the TD error, then and 300 updates later.

    delta_q: root mean square of Q's change at 2,048 replayed (s, a); q_std: Q's standard deviation there. td_first,
    td_later: SB3's critic loss, mean over updates 1 to 10 and 291 to 300, the actor learning as always.
    """
    plain, pave, lambdas = ALGORITHMS[args.algorithm]
    settings = {"lambdas": lambdas.get(env_name(args.env_id), UNTUNED_LAMBDAS)}
    before = read_plain(plain, args)
    batch = before.replay_buffer.sample(2048)
    for name, activation_fn in CANDIDATES.items():
        model = read_plain(pave, args, critic_activation_fn=activation_fn, gather_steps=0, **settings)
        if name == FITTED:
            fit(model, before)
        with torch.no_grad():
            old = torch.cat(before.critic(batch.observations, batch.actions), 1)
            change = torch.cat(model.critic(batch.observations, batch.actions), 1) - old
        model.set_logger(configure(None, []))
        losses = []
        for _ in range(30):
            model.train(gradient_steps=10, batch_size=model.batch_size)
            losses.append(model.logger.name_to_value["train/critic_loss"])
        row = {"delta_q": change.square().mean().sqrt().item(), "q_std": old.std().item()}
        row |= {"td_first": losses[0], "td_later": losses[-1]}
        yield {"agent": name} | {key: float(f"{value:.4g}") for key, value in row.items()}


def fit(model, teacher, updates: int = 2000) -> None:
    """Fresh critics, fitted to the teacher's Q at replayed actions and at those of its policy."""
    for layer in model.critic.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3)
    for _ in range(updates):
        batch = teacher.replay_buffer.sample(model.batch_size)
        with torch.no_grad():
            actions = torch.cat([batch.actions, teacher.actor(batch.observations)])
            observations = batch.observations.repeat(2, 1)
            targets = torch.cat(teacher.critic(observations, actions), 1)
        loss = F.mse_loss(torch.cat(model.critic(observations, actions), 1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.critic_target.load_state_dict(model.critic.state_dict())


COMMANDS = {command.__name__: command for command in (train, finish, exchange)}


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["train", "finish", "exchange"]]
    """train a plain agent; finish it without and with PAVE; or compare smooth activations"""
    env_id: str = "Pendulum-v1"
    algorithm: Literal["sac", "td3"] = "sac"
    seed: int = 1
    steps: int = 10_000
    """of `train`, or more steps of `finish`"""
    activation: str = ""
    """of `finish`: one of CANDIDATES in place of the recipe's own"""
    arm: str = ""
    """of `finish`: one of its arms, such as "finished with PAVE"; default: each"""
    output: Path = FOLDER / "sb3.csv"
    """a CSV that gets the rows"""


def main(args: Args) -> None:
    make_env(args.env_id).close()  # UserError if there is none, or none with continuous actions and vectors observed
    require(args.steps > 0, f"--steps must be above 0, not {args.steps}")
    names = [name for name in CANDIDATES if name != FITTED]
    require(args.activation in ("", *names), f"--activation is one of {', '.join(names)}, not {args.activation}")
    settings = {"env": args.env_id, "algorithm": args.algorithm, "seed": args.seed, "steps": args.steps}
    for row in COMMANDS[args.command](args):
        print(*(settings | row).values(), flush=True)
        add_row(args.output, settings | row)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
