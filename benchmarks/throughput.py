"""What PAVE costs: updates/s and env steps/s of both scripts, in one run in which the sides take turns.

    python benchmarks/throughput.py                     some 6 minutes on 2 cores, most of them compiling
    python benchmarks/throughput.py --device cuda --env-id Hopper-v5

Sides, all with the script's own settings otherwise:
    λ=0        all lambdas 0: no PAVE code runs
    64 rows    --pave-batch-size 64
    PAVE       the default: every row of the minibatch
    SB3        Stable-Baselines3's plain agent (ReLU) with our batch, widths and rates, if it is installed

Measures:
    updates/s            Agent.update: minibatch, critics, actor, targets
    env steps/s          what train() does each step: explore, update, env.step, buffer.add; no logging, no evaluation
    reference matmuls/s  on a CPU: 42 (batch, 256) @ (256, 256), eager, one after the other. That is the arithmetic of
                         the twins' PAVE losses, a yardstick for the machine and no floor: compiled code can beat it

A value is the median over the rounds, with min and max; a ratio is the median over the rounds of value / value of λ=0.
Prints the table; writes throughput.csv and throughput.json (also the machine and commit).
"""

import functools
import importlib.util
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

if __package__ in (None, ""):  # as a plain path, Python has benchmarks/ on its path but not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import SCRIPTS, UserError, machine, user_errors

SIDES = {  # settings beside the script's defaults
    "λ=0": {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0},
    "64 rows": {"pave_batch_size": 64},
    "PAVE": {},
}
REFERENCE = 42  # a critic: 7 forward (3 points, their action gradients, 1 tangent), twice that backward; two critics
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
    for name, value in {"rounds": args.rounds, "threads": args.threads or 1}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if not args.seconds > 0:
        raise UserError(f"--seconds is {args.seconds}; it must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.config.recompile_limit = 64  # the sides share their code: beyond it the last would run in eager mode


# ---------------------------------------------------------------------------------------------------------- sides


def our_side(script, settings: dict, args: Args) -> dict[str, Callable[[int], None]]:
    """unit -> a function that does n of it, with an agent of the script."""
    settings = settings | {"env_id": args.env_id, "compile": args.compile, "buffer_size": 100_000}
    settings, device, env = (
        script.validate(script.Args(**settings)),
        torch.device(args.device),
        script.make_env(args.env_id),
    )
    torch.manual_seed(settings.seed)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    agent = script.Agent(*sizes, settings, device)
    buffer = script.ReplayBuffer(settings.buffer_size, *sizes, device)
    counter, state = itertools.count(1), {"over": True}

    def update():
        agent.update(buffer.sample(settings.batch_size), next(counter) % settings.policy_frequency == 0)

    def step(random=False):
        if state["over"]:
            state["observation"], _ = env.reset(seed=next(counter))
        action = 2 * torch.rand(sizes[1]).numpy() - 1 if random else agent.explore(state["observation"])
        if not random:
            update()
        observation, reward, terminated, truncated, _ = env.step(action)
        buffer.add(state["observation"], observation, action, reward, terminated)
        state.update(observation=observation, over=terminated or truncated)

    repeat(functools.partial(step, random=True), FILL)
    return {"updates/s": functools.partial(repeat, update), "env steps/s": functools.partial(repeat, step)}


def repeat(function: Callable[[], None], times: int) -> None:
    for _ in range(times):
        function()


def sb3_side(script, args: Args) -> dict[str, Callable[[int], None]]:
    """The same of Stable-Baselines3's plain agent."""
    import stable_baselines3  # here: optional

    ours, name = script.Args(), script.SCRIPT.partition("_")[0].upper()
    settings = {"batch_size": ours.batch_size, "learning_rate": ours.q_lr, "learning_starts": FILL, "train_freq": 1}
    settings |= {"gradient_steps": 1, "buffer_size": 100_000, "policy_kwargs": {"net_arch": [256, 256]}}
    model = getattr(stable_baselines3, name)("MlpPolicy", args.env_id, device=args.device, seed=1, **settings)
    model.learn(FILL)

    def steps(n):
        model.learn(n, reset_num_timesteps=False)

    return {"updates/s": functools.partial(model.train, batch_size=ours.batch_size), "env steps/s": steps}


def reference_matmuls(n: int) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(256, 256))  # the products stay in range
    x = torch.randn(256, 256)
    repeat(lambda: functools.reduce(torch.matmul, [weight] * REFERENCE, x), n)


# -------------------------------------------------------------------------------------------------------- measuring


def alternate(turns: dict[str, Callable[[], float]], rounds: int, title="") -> dict[str, list[float]]:
    """Each side's turns, `rounds` of them; in a round every side has one, and each round another side is first."""
    samples = {name: [] for name in turns}
    with tqdm(total=rounds * len(turns), desc=title, unit="turn", disable=None, leave=False) as bar:
        for i in range(rounds):
            first = i % len(turns)
            for name in (*list(turns)[first:], *list(turns)[:first]):
                samples[name].append(turns[name]())
                bar.update()
    return samples


def rate(function: Callable[[int], None], n: int) -> float:
    """n a second; the Timer waits for a GPU."""
    timer = Timer("function(n)", globals={"function": function, "n": n}, num_threads=torch.get_num_threads())
    return n / timer.timeit(1).mean


def measure(functions: dict[str, Callable[[int], None]], args: Args, title: str) -> dict[str, list[float]]:
    """The rates of each side, one per round, after a warm-up that compiles."""
    turns = {}
    for name, function in functions.items():
        function(20)  # both of TD3's updates, and on CUDA the recording of the graphs
        n = 2 * max(1, round(args.seconds * rate(function, 10) / 2))  # even: TD3's actor has every second update
        turns[name] = functools.partial(rate, function, n)
    return alternate(turns, args.rounds, title)


def rows(script: str, unit: str, samples: dict[str, list[float]]) -> list[dict]:
    """A line of the table for each side; its ratio is taken within each round."""
    found, base = [], samples.get("λ=0")
    for side, values in samples.items():
        line = {"script": script, "measure": unit, "side": side, "median": median(values), "min": min(values)}
        ratio = median(map(float.__truediv__, values, base)) if base else None
        found.append(line | {"max": max(values), "/ λ=0": ratio})
    return found


def main(args: Args) -> None:
    prepare(args)
    found = []
    if args.device == "cpu":  # on CUDA so small matmuls measure launches
        samples = measure({"reference matmuls": reference_matmuls}, args, "reference matmuls")
        found += rows("", f"{REFERENCE} reference matmuls/s", samples)
    has_sb3 = importlib.util.find_spec("stable_baselines3") is not None
    for script in SCRIPTS.values():
        sides = {name: our_side(script, settings, args) for name, settings in SIDES.items()}
        sides |= {"SB3": sb3_side(script, args)} if has_sb3 else {}
        for unit in ("updates/s", "env steps/s"):
            functions = {side: does[unit] for side, does in sides.items()}
            found += rows(script.SCRIPT, unit, measure(functions, args, f"{script.SCRIPT}: {unit}"))
    table = pd.DataFrame(found)
    print(table.to_markdown(index=False, floatfmt=".4g"))
    table.to_csv(args.output_dir / "throughput.csv", index=False, float_format="%.6g")
    about = machine() | {"threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}
    (args.output_dir / "throughput.json").write_text(json.dumps({"machine": about, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
