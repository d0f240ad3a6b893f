"""What PAVE costs: updates/s and env steps/s of both scripts, in one run in which the sides take turns.

    python -m benchmarks.throughput                     some 5 minutes on 2 cores, most of them compiling
    python -m benchmarks.throughput --device cuda --env-id Hopper-v5

Sides, with the script's own settings otherwise:
    λ=0                     all lambdas 0: no PAVE code runs
    64 rows                 --pave-batch-size 64
    PAVE                    the default: every row of the minibatch
    matrix products alone   on a CPU: the time of the update's matrix products alone, the (256, 256) @ (256, 256) that
                            an update with PAVE can't do without, eager, one after the other. On CUDA so small ones
                            measure nothing but launches

Measures:
    updates/s     Agent.update: minibatch, critics, actor, targets
    env steps/s   what train() does each step: explore, update, env.step, buffer.add; no logging, no evaluation

A value is the median over the rounds, with min and max; a ratio is the median over the rounds of value / value of λ=0.
Prints the table; writes throughput.csv and throughput.json (also the machine and commit).
"""

import functools
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import pandas as pd
import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

from benchmarks.common import SCRIPTS, UserError, machine, user_errors

SIDES = {  # settings beside the script's defaults
    "λ=0": {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0},
    "64 rows": {"pave_batch_size": 64},
    "PAVE": {},
}
# Products of an update. Critics: 7 forward (3 points, their action gradients, 1 tangent), twice that backward, times 2.
# TD target: 3. SAC's actor loss: 3 forward, 4 backward; TD3's 2 and 3, after every second update.
PRODUCTS = {"sac_pave_continuous": 42 + 3 + 7, "td3_pave_continuous": 42 + 3 + 2.5}
FILL = 1000  # random transitions in the buffer before anything is measured


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """whose sizes and steps are measured"""
    rounds: int = 5
    """turns of each side"""
    seconds: float = 2.0
    """about how long a turn takes"""
    output_dir: Path = Path("runs/throughput")
    """where the results are written"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    threads: int | None = None
    """CPU threads; None: torch's own choice"""
    compile: bool = True
    """torch.compile the scripts' losses, as they do by default"""


def prepare(args: Args) -> None:
    """Set torch up as train() does; UserError where the settings can't work."""
    for name, value in {"rounds": args.rounds, "threads": args.threads or 1, "seconds": args.seconds}.items():
        if value < (least := 0.001 if name == "seconds" else 1):
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


# ---------------------------------------------------------------------------------------------------------- sides


def repeat(function: Callable[[], None], times: int) -> None:
    for _ in range(times):
        function()


def side(script, settings: dict, args: Args) -> dict[str, Callable[[int], None]]:
    """unit -> a function that does n of it, with an agent of the script."""
    settings = {"env_id": args.env_id, "compile": args.compile, "buffer_size": 100_000} | settings
    settings, device = script.validate(script.Args(**settings)), torch.device(args.device)
    env = script.make_env(args.env_id)
    torch.manual_seed(settings.seed)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    agent, buffer = script.Agent(*sizes, settings, device), script.ReplayBuffer(settings.buffer_size, *sizes, device)
    counter, over, observation = itertools.count(1), True, None

    def update():
        agent.update(buffer.sample(settings.batch_size), next(counter) % settings.policy_frequency == 0)

    def step(explore=agent.explore, update=update):
        nonlocal over, observation
        if over:
            observation, _ = env.reset(seed=next(counter))
        action = explore(observation)
        update()
        following, reward, terminated, truncated, _ = env.step(action)
        buffer.add(observation, following, action, reward, terminated)
        observation, over = following, terminated or truncated

    repeat(lambda: step(lambda _: 2 * torch.rand(sizes[1]).numpy() - 1, lambda: None), FILL)
    return {"updates/s": functools.partial(repeat, update), "env steps/s": functools.partial(repeat, step)}


def matrix_products(script) -> Callable[[int], None]:
    """A function that does the matrix products of n updates."""
    weight = torch.nn.init.orthogonal_(torch.empty(256, 256))  # so that x stays in range
    x = torch.randn(script.Args().batch_size, 256)
    return lambda n: functools.reduce(torch.matmul, itertools.repeat(weight, round(n * PRODUCTS[script.SCRIPT])), x)


# -------------------------------------------------------------------------------------------------------- measuring


def rate(function: Callable[[int], None], n: int) -> float:
    """n a second; the Timer waits for a GPU."""
    timer = Timer("function(n)", globals={"function": function, "n": n}, num_threads=torch.get_num_threads())
    return n / timer.timeit(1).mean


def measure(functions: dict[str, Callable[[int], None]], args: Args, title: str) -> dict[str, list[float]]:
    """The rates of each side, one per round, after a warm-up that compiles. Each round another side is first."""
    turns, samples = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function(20)  # both of TD3's updates, and on CUDA the recording of the graphs
        n = 2 * max(1, round(args.seconds * rate(function, 10) / 2))  # even: TD3's actor has every second update
        turns[name] = functools.partial(rate, function, n)
    names = list(functions)
    for i in tqdm(range(args.rounds), desc=title, unit="round", disable=None, leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(turns[name]())
    return samples


def rows(script: str, unit: str, samples: dict[str, list[float]]) -> list[dict]:
    """A line of the table for each side; its ratio is taken within each round."""
    found = []
    for name, values in samples.items():
        line = {"script": script, "measure": unit, "side": name, "median": median(values)}
        ratio = median(map(float.__truediv__, values, samples["λ=0"]))
        found.append(line | {"min": min(values), "max": max(values), "/ λ=0": ratio})
    return found


def main(args: Args) -> None:
    prepare(args)
    found = []
    for name, script in SCRIPTS.items():
        sides = {label: side(script, settings, args) for label, settings in SIDES.items()}
        for unit in ("updates/s", "env steps/s"):
            functions = {label: does[unit] for label, does in sides.items()}
            if unit == "updates/s" and args.device == "cpu":
                functions["matrix products alone"] = matrix_products(script)
            found += rows(name, unit, measure(functions, args, f"{name}: {unit}"))
    table = pd.DataFrame(found)
    print(table.to_markdown(index=False, floatfmt=".4g"))
    table.to_csv(args.output_dir / "throughput.csv", index=False, float_format="%.6g")
    about = machine() | {"threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}
    (args.output_dir / "throughput.json").write_text(json.dumps({"machine": about, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
