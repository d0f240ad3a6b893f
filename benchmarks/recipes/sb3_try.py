"""Does PAVE help a Stable-Baselines3 agent that you have? One command, one table.

    python -m benchmarks.recipes.sb3_try plain.zip --env-id my_machine:Machine-v0 --buffer plain_buffer.pkl

The agent is measured as it is, and with a low-pass filter behind it. Then it goes on for --steps steps in several ways,
each with every seed: without PAVE (plain SB3), with PAVE untuned, with PAVE auto, and with the paper's weights where it
has some for the env. A line of the table is an agent, its actions the policy's means: return, sm and oscillation
(benchmarks.measure), mean over ten episodes. What you gave is only read; each finished agent is a .zip in --output (and
a .pkl, if there are statistics of VecNormalize).
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import pandas as pd
import torch
import tyro
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from benchmarks.common import UserError, require, user_errors
from benchmarks.envs import FILTER_BETA
from benchmarks.measure import LowPass, measure
from benchmarks.recipes.sb3 import PaveSAC, PaveTD3
from sac_pave_continuous import TUNED_LAMBDAS as SAC_LAMBDAS
from sac_pave_continuous import UNTUNED_LAMBDAS, env_name, make_env
from td3_pave_continuous import TUNED_LAMBDAS as TD3_LAMBDAS

ALGORITHMS = {"sac": (SAC, PaveSAC, SAC_LAMBDAS), "td3": (TD3, PaveTD3, TD3_LAMBDAS)}
GATHERED = 5_000  # steps that replace a replay buffer which was not saved


def arms(algorithm: str, env_id: str) -> dict[str, tuple]:
    """The ways to go on with an agent and its replay buffer: name -> the class that loads it, and its settings."""
    plain, pave, tuned = ALGORITHMS[algorithm]
    lambdas = tuned.get(env_name(env_id), UNTUNED_LAMBDAS)
    weights = {"finished with PAVE": lambdas, "finished untuned": UNTUNED_LAMBDAS, "finished auto": "auto"}
    if lambdas == UNTUNED_LAMBDAS:
        del weights["finished untuned"]
    ways = {"finished without PAVE": (plain, {})}
    for name, chosen in weights.items():
        ways[name] = pave, {"lambdas": chosen, "gather_steps": 0}  # all ways update from their first step on
    return ways


def measured(model, env_id: str, deterministic: bool = True, beta: float = 0, normalise=None) -> dict[str, float]:
    """measure() of the model's predict, with a low-pass filter behind it where beta is above 0; five digits.

    normalise: what VecNormalize does to an observation, if the model was trained with it
    """
    torch.manual_seed(0)  # of the sampled actions

    def policy(observation):
        return model.predict(normalise(observation) if normalise else observation, deterministic=deterministic)[0]

    metrics = measure(LowPass(policy, beta), gym.make(env_id))
    return {name: float(f"{value:.5g}") for name, value in metrics.items()}


@dataclass
class Args:
    agent: tyro.conf.Positional[Path]
    """the .zip that SB3's save() wrote"""
    env_id: str
    """the env that it was trained in; my_module:MyEnv-v0 imports my_module"""
    buffer: Path | None = None
    """what save_replay_buffer() wrote; without it the agent first acts for 5,000 steps, and all begin with these"""
    vec_normalize: Path | None = None
    """what VecNormalize's save() wrote, if the agent was trained with it"""
    algorithm: Literal["sac", "td3"] = "sac"
    steps: int = 5_000
    """so many steps more, in each way"""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (1, 2, 3)
    """of what goes on from the same agent: believe a difference only if the seeds' ranges don't overlap"""
    output: Path = Path("runs/sb3_try")
    """a new or empty folder for the finished agents and table.csv"""


def read(cls, args: Args, seed: int, **settings):
    """A copy of the agent, ready to go on; UserError where that can't be."""
    env = DummyVecEnv([lambda: gym.make(args.env_id)])
    try:
        if args.vec_normalize:
            env = VecNormalize.load(str(args.vec_normalize), env)
        model = cls.load(args.agent, env=env, device="cpu", **settings)
        if args.buffer:
            model.load_replay_buffer(args.buffer)
    except Exception as error:  # SB3 and pickle raise whatever they like
        raise UserError(f"cannot go on from {args.agent}: {' '.join(str(error).split())[:300]}") from error
    model.set_random_seed(seed)
    return model


def gather(args: Args) -> Path:
    """The file of a replay buffer of GATHERED steps by the agent as it is."""
    _, pave, _ = ALGORITHMS[args.algorithm]
    model = read(pave, args, args.seeds[0], gather_steps=GATHERED + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no update yet, as is wanted here
        model.learn(GATHERED, reset_num_timesteps=False)
    path = args.output / "gathered.pkl"
    model.save_replay_buffer(path)
    return path


def main(args: Args) -> None:
    make_env(args.env_id).close()  # UserError if there is none, or none with continuous actions and vectors observed
    for path in filter(None, (args.agent, args.buffer, args.vec_normalize)):
        require(path.exists(), f"there is no {path}")
    require(args.steps > 0, f"--steps must be above 0, not {args.steps}")
    require(len(args.seeds) > 0, "give at least one of --seeds")
    require(all(0 <= seed < 2**32 for seed in args.seeds), f"--seeds is {args.seeds}; each from 0 to below 2^32")
    args.output.mkdir(parents=True, exist_ok=True)
    require(not any(args.output.iterdir()), f"{args.output} has files already: give another folder by --output")
    rows = []

    def tell(agent: str, seed, model, **how) -> None:
        statistics = model.get_vec_normalize_env()
        normalise = statistics.normalize_obs if statistics else None
        rows.append({"agent": agent, "seed": seed} | measured(model, args.env_id, normalise=normalise, **how))
        print(*rows[-1].values(), flush=True)
        pd.DataFrame(rows).to_csv(args.output / "table.csv", index=False)  # at once: Ctrl-C loses no line

    plain, _, _ = ALGORITHMS[args.algorithm]
    model = read(plain, args, args.seeds[0])
    tell("as it is", "-", model)
    tell("as it is, filtered", "-", model, beta=FILTER_BETA)
    if args.buffer is None:
        args = replace(args, buffer=gather(args))
    for seed in args.seeds:
        for agent, (cls, settings) in arms(args.algorithm, args.env_id).items():
            model = read(cls, args, seed, **settings)
            model.learn(args.steps, reset_num_timesteps=False)
            stem = args.output / f"{agent.replace(' ', '_')}_{seed}"
            model.save(stem.with_suffix(".zip"))
            if statistics := model.get_vec_normalize_env():  # they have moved on with the training
                statistics.save(str(stem.with_suffix(".pkl")))
            tell(agent, seed, model)
    print(pd.DataFrame(rows).sort_values("agent", kind="stable").to_string(index=False))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
