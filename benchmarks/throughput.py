"""What PAVE costs: env steps a second of both scripts, in one run in which the sides take turns.

    python -m benchmarks.throughput                     some 4 minutes on 2 cores, most of them compiling
    python -m benchmarks.throughput --env-id Hopper-v5

Sides, with the script's own settings otherwise:
    λ=0       all lambdas 0: no PAVE code runs
    64 rows   --pave-batch-size 64
    PAVE      the default: every row of the minibatch
    SB3       with --sb3, Stable-Baselines3's plain agent, its networks of the same size

A step is what train() does: explore, update, env.step, buffer.add; no logging, no evaluation. A value is the median
over the rounds, with min and max; a ratio is the median over the rounds of value / value of λ=0. Prints the table;
writes it as throughput.csv, and the machine and commit as throughput.json.

    python -m benchmarks.throughput --population 1 4     N agents at once (benchmarks.population)

against N single runs one after another, in agent-steps a second: the sides are λ=0 and PAVE, each in both ways.
"""

import contextlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import pandas as pd
import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks.common import SCRIPTS, machine, require, user_errors
from benchmarks.population import Population

SIDES = {  # settings beside the script's defaults
    "λ=0": {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0},
    "64 rows": {"pave_batch_size": 64},
    "PAVE": {},
}
FILL = 1000  # transitions in the buffer before anything is measured


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # whose sizes and steps are measured
    rounds: int = 5  # turns of each side
    seconds: float = 2.0  # about how long a turn takes
    output_dir: Path = Path("runs/throughput")  # where the results are written
    cuda: bool = True  # use a CUDA device if there is one
    compile: bool = True  # torch.compile the scripts' losses, as they do by default
    sb3: bool = False  # measure Stable-Baselines3, too: pip install stable-baselines3
    population: tuple[int, ...] = ()  # measure so many agents at once against as many single runs, instead


def stepper(script, settings: dict, args: Args) -> Callable[[int], None]:
    """A function that does n steps of training, with an agent of the script."""
    settings = {"env_id": args.env_id, "compile": args.compile, "buffer_size": 100_000} | settings
    settings = script.validate(script.Args(**settings))
    env, device = script.make_env(args.env_id), torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(settings.seed)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    agent, buffer = script.Agent(*sizes, settings, device), script.ReplayBuffer(settings.buffer_size, *sizes, device)
    update = script.CudaGraphUpdate(agent.update) if device.type == "cuda" else agent.update
    updates, (observation, _) = itertools.count(1), env.reset(seed=settings.seed)

    def steps(n: int, learn: bool = True) -> None:
        nonlocal observation
        for _ in range(n):
            action = agent.explore(observation)
            if learn:
                update_actor = next(updates) % settings.policy_frequency == 0
                update(buffer.sample(settings.batch_size), update_actor)
            next_observation, reward, terminated, truncated, _ = env.step(action)
            buffer.add(observation, next_observation, action, reward, terminated)
            observation = env.reset()[0] if terminated or truncated else next_observation

    steps(FILL, learn=False)
    return steps


def sb3_stepper(name: str, args: Args) -> Callable[[int], None]:
    """The same with the plain agent of Stable-Baselines3: its defaults (an update a step), but networks of our size."""
    import stable_baselines3

    settings = {"learning_starts": 0, "buffer_size": 100_000, "policy_kwargs": {"net_arch": [256, 256]}, "seed": 1}
    agent = getattr(stable_baselines3, name)
    model = agent("MlpPolicy", gym.make(args.env_id), device="cuda" if args.cuda else "cpu", **settings)
    return lambda n: model.learn(n, log_interval=10**9, reset_num_timesteps=False)


def population_stepper(script, settings: dict, args: Args, count: int) -> tuple[Callable[[int], None], Population]:
    """A function that does n steps of `count` agents at once; and the population, to be closed."""
    settings = {"env_id": args.env_id, "compile": args.compile, "buffer_size": 100_000} | settings
    members = [script.Args(**settings, seed=1 + i, learning_starts=FILL) for i in range(count)]
    device = torch.device("cuda" if args.cuda else "cpu")
    population = Population(script, [script.validate(member) for member in members], device)

    def steps(n: int) -> None:
        for _ in range(n):
            population.begin_step()
            population.end_step()

    steps(FILL)
    return steps, population


def compare_population(script, args: Args) -> pd.DataFrame:
    """A line for each number of agents and side; the ratio is taken within each round."""
    lines = []
    for count, side in itertools.product(args.population, ("λ=0", "PAVE")):
        single = stepper(script, SIDES[side], args)
        steps, population = population_stepper(script, SIDES[side], args, count)
        with contextlib.closing(population):
            ways = {"one after another": lambda n: single(n * count), "at once": steps}  # noqa: B023  called here
            rates = pd.DataFrame(measure(ways, args, f"{script.SCRIPT}, {count} agents"))
        ratio = (rates["at once"] / rates["one after another"]).median()
        line = {"side": side, "agents": count} | (count * rates.median()).to_dict()
        lines.append(line | {"ratio": ratio})
    return pd.DataFrame(lines)


def rate(steps: Callable[[int], None], n: int) -> float:
    """Steps a second over n of them; the Timer waits for a GPU."""
    timer = Timer("steps(n)", globals={"steps": steps, "n": n}, num_threads=torch.get_num_threads())
    return n / timer.timeit(1).mean


def measure(sides: dict[str, Callable[[int], None]], args: Args, title: str) -> dict[str, list[float]]:
    """The rates of each side, one per round, after a warm-up that compiles. Each round another side is first."""
    turns, samples = {}, {name: [] for name in sides}
    for name, steps in sides.items():
        steps(20)  # both of TD3's updates, and on CUDA the recording of the graphs
        turns[name] = 2 * max(1, round(args.seconds * rate(steps, 10) / 2))  # even: TD3's actor has every second update
    names = list(sides)
    for i in tqdm(range(args.rounds), desc=title, unit="round", disable=None, leave=False):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(rate(sides[name], turns[name]))
    return samples


def summary(samples: dict[str, list[float]]) -> pd.DataFrame:
    """A line for each side; its ratio is taken within each round."""
    rates = pd.DataFrame(samples)
    ratio = rates.div(rates["λ=0"], axis=0).median()
    return pd.DataFrame({"steps/s": rates.median(), "min": rates.min(), "max": rates.max(), "/ λ=0": ratio})


def main(args: Args) -> None:
    require(args.rounds > 0 and args.seconds > 0, "--rounds and --seconds must be more than 0")
    require(all(count > 0 for count in args.population), "--population: numbers of agents, at least 1 each")
    require(not args.sb3 or find_spec("stable_baselines3"), "--sb3 needs: pip install stable-baselines3")
    args.cuda = args.cuda and torch.cuda.is_available()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # this and the next three lines: as train() does
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_multithreading_enabled(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = {}
    for name, script in SCRIPTS.items():
        if args.population:
            found[name] = compare_population(script, args)
            continue
        sides = {side: stepper(script, settings, args) for side, settings in SIDES.items()}
        if args.sb3:
            sides["SB3"] = sb3_stepper(name.partition("_")[0].upper(), args)
        found[name] = summary(measure(sides, args, name))
    if args.population:
        table = pd.concat(found, names=["script"]).reset_index(level=0)
    else:
        table = pd.concat(found, names=["script", "side"]).reset_index()
    print(table.to_markdown(index=False, floatfmt=".4g"))
    table.to_csv(args.output_dir / "throughput.csv", index=False, float_format="%.6g")
    about = machine() | {"threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}
    (args.output_dir / "throughput.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
