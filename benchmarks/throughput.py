"""What PAVE costs: plain SAC / TD3, PAVE and a naive PAVE, measured in one run in which the sides take turns.

    python benchmarks/throughput.py                      all: some 12 minutes on 2 cores, half of them compiling
    python benchmarks/throughput.py --peers --cold       also Stable-Baselines3, and starts with an empty compile cache
    python benchmarks/throughput.py --sections loss --threads 1

Sides:
    λ=0        the script with all lambdas 0: no PAVE code runs
    PAVE       the script's defaults
    PAVE-64    --pave-batch-size 64
    naive      the script, eager, with the three losses as one would first write them (naive_pave_losses below)
    SB3        Stable-Baselines3's plain SAC / TD3 (--peers): its defaults (ReLU), our batch, widths and learning rate

Sections, with the sizes of HalfCheetah-v5 (17 observations, 6 actions), batch 256 and hidden layers of 256:
    update     one Agent.update: minibatch, critics, actor, targets
    training   the real train(), env and all: each side a process of its own, which moves only in its turns; and start:
               seconds from starting that process until critics and actor have been updated, compiling included
    loss       the critic loss, forward and backward, over the floor: the 2 x 21 (batch, 256) @ (256, 256) matmuls that
               the twins' PAVE losses can't do without. (The TD target takes 3 more; the floor leaves them out.)
    scaling    one SAC update against hidden width, batch size and action dimension; scaling.png

A value is the median over the rounds, with min and max; a ratio is the median over the rounds of value / value of the
side `ratio_to`. Prints the tables; writes throughput.csv, throughput.json (also the machine and commit), scaling.png.
"""

import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Literal
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import SCRIPTS, UserError, user_errors

ROOT = Path(__file__).resolve().parents[1]
SIDES = {  # settings beside the script's defaults
    "λ=0": {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0},
    "PAVE": {},
    "PAVE-64": {"pave_batch_size": 64},
    "naive": {"compile": False, "cudagraphs": False},
}
SCALING = {"hidden": (64, 128, 256, 512, 1024), "batch": (64, 256, 1024, 4096), "action_dim": (1, 6, 17, 64)}
DEFAULT_SIZES = {"hidden": 256, "batch": 256, "action_dim": 6}
FLOOR_UNITS = 42  # a critic: 7 forward (3 points, their action gradients, 1 tangent), twice that backward; two critics
LEARNING_STARTS, WARM_UP = 500, 60  # a training's random steps, then its updates before the first turn

Row = namedtuple("Row", "section script side parameter value unit ratio_to ratio min max")  # a line of the CSV


@dataclass
class Settings:
    """Flags that schemes.py has, too."""

    rounds: int = 5
    """turns of each side"""
    output_dir: Path = Path("runs/throughput")
    """where the results are written"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    threads: int | None = None
    """CPU threads; None: torch's own choice"""
    quick: bool = False
    """short turns and few sizes: to see that it works, not to measure"""


@dataclass
class Args(Settings):
    sections: tuple[Literal["update", "training", "loss", "scaling"], ...] = ("update", "training", "loss", "scaling")
    """what to measure"""
    peers: bool = False
    """also train with stable-baselines3"""
    cold: bool = False
    """also start PAVE from an empty compile cache, and again from what that left"""


def naive_pave_losses(q, observations, actions, next_observations, state_noise, probe, delta):
    """pave_losses with each term on its own by torch.autograd.grad: what the scripts' is measured against."""

    def action_gradient(observations):
        a = actions.detach().requires_grad_()
        return torch.autograd.grad(q(observations, a).sum(), a, create_graph=True)[0], a

    def change(other_observations):
        return (action_gradient(other_observations)[0] - action_gradient(observations)[0]).square().mean()

    gradient, a = action_gradient(observations)
    hessian_times_probe = torch.autograd.grad((gradient * probe).sum(), a, create_graph=True)[0]
    trace = (hessian_times_probe * probe).sum(-1)
    return SCRIPTS["sac_pave_continuous"].PaveLosses(
        mpr=change(observations + state_noise),
        vfc=change(next_observations),
        curvature=torch.relu(trace + delta).mean(),
        trace=trace,
        gradient=gradient,
        q_values=q(observations, actions),
    )


def naive_descend(agent, part, loss, *inputs):
    """Agent.descend with loss.backward() and torch.optim.Adam."""
    parameters = [parameter for name, parameter in agent.named_parameters() if name.split(".")[0] == part]
    if part not in (optimizers := agent.__dict__.setdefault("naive_optimizers", {})):
        optimizers[part] = torch.optim.Adam(parameters, lr=agent.optimizers[part].lr)
    for parameter in parameters:
        parameter.requires_grad_(True)
    value, more = loss(*inputs)
    optimizers[part].zero_grad()
    value.backward()
    optimizers[part].step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return value.detach(), torch.utils._pytree.tree_map(torch.Tensor.detach, more)


@functools.cache
def script_of(name: str, side: str):
    """The script; for the side "naive", a copy of the module in which pave_losses is naive_pave_losses."""
    if side != "naive":
        return SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(f"naive_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.pave_losses, module.Agent.descend = naive_pave_losses, naive_descend
    return module


# ------------------------------------------------------------------------------------------------ measure and report


def prepare(args: Settings) -> None:
    """Set torch up as train() does; UserError where the settings can't work."""
    for name, value in {"rounds": args.rounds, "threads": args.threads or 1}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the trainings'
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.config.automatic_dynamic_shapes = False  # else the second size gets slower code that fits any size
    torch._dynamo.config.recompile_limit = 64  # beyond it a further size would run in eager mode


def alternate(sides: dict[str, Callable[[], float]], rounds: int, title="") -> dict[str, list[float]]:
    """Each side's turns, `rounds` of them; in a round every side has one, and each round another side is first."""
    samples = {name: [] for name in sides}
    with tqdm(total=rounds * len(sides), desc=title, unit="turn", disable=None, leave=False) as bar:
        for i in range(rounds):
            first = i % len(sides)
            for name in (*list(sides)[first:], *list(sides)[:first]):
                samples[name].append(sides[name]())
                bar.update()
    return samples


def milliseconds(functions: dict[str, Callable[[], object]], args: Settings, title: str) -> dict[str, list[float]]:
    """How long a call of each takes: the mean over the calls of a turn, for each round. Compiles them all first."""

    def clock(function, calls):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    turns = {}
    for name, function in tqdm(functions.items(), f"{title}: compiling", unit="side", disable=None, leave=False):
        clock(function, 10 if args.device == "cuda" else 2)  # on CUDA, graphs are recorded after some calls
        pairs = max(1, round((20 if args.quick else 100) / clock(function, 2)))  # pairs: TD3's actor has every second
        turns[name] = functools.partial(clock, function, 2 * pairs)
    return alternate(turns, args.rounds, title)


def rows(section: str, script: str, samples: dict[str, list[float]], unit: str, ratio_to=(), parameter="") -> list[Row]:
    """A Row for each side and each of the sides in `ratio_to` that there is."""
    found, bases = [], [base for base in ratio_to if base in samples] or [""]
    for (side, values), base in itertools.product(samples.items(), bases):
        ratio = median(map(float.__truediv__, values, samples[base])) if base else None
        found.append(Row(section, script, side, parameter, median(values), unit, base, ratio, min(values), max(values)))
    return found


def table(found: list[Row]) -> str:
    """The rows in Markdown, a table for each section and unit."""
    tables = {}  # {(section, unit): {(script, side, parameter): {ratio_to: row}}}
    for row in found:
        tables.setdefault((row.section, row.unit), {}).setdefault(row[1:4], {})[row.ratio_to] = row
    texts = []
    for (section, unit), groups in tables.items():
        bases = dict.fromkeys(base for group in groups.values() for base in group if base)
        lines = [[section, "side", "", unit, "min to max", *(f"/ {base}" for base in bases)]]
        for (script, side, parameter), group in groups.items():
            row = next(iter(group.values()))
            value, low, high = ("-" if x is None else f"{x:.4g}" for x in (row.value, row.min, row.max))
            ratios = [f"{group[base].ratio:.2f}" if base in group else "" for base in bases]
            lines.append([script.partition("_")[0].upper(), side, parameter, value, f"{low} to {high}", *ratios])
        if not any(line[2] for line in lines):
            lines = [line[:2] + line[3:] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        texts.append("\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines))
    return "\n\n".join(texts)


def machine() -> dict:
    """What the numbers depend on."""
    from benchmarks.sweep import circumstances  # here: a training starts without it

    date, command = datetime.now(UTC).isoformat(timespec="seconds"), shlex.join(["python", *sys.argv])
    return circumstances() | {"threads": torch.get_num_threads(), "date": date, "command": command}


def write(path: Path, found: list[Row]) -> None:
    """The rows as path.csv, and with machine() as path.json."""
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *found])
    content = {"machine": machine(), "rows": [row._asdict() for row in found]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------ update, loss and scaling


def make_agent(script, settings: dict, args: Settings, hidden=256, action_dim=6):
    """An Agent with hidden layers of this width, and a replay buffer of noise."""
    torch.manual_seed(1)
    sizes, device, rng = (17, action_dim), torch.device(args.device), np.random.default_rng(1)
    with mock.patch.object(script, "mlp", functools.partial(script.mlp, hidden=hidden)):
        agent = script.Agent(*sizes, script.validate(script.Args(**settings)), device)
    buffer = script.ReplayBuffer(1000, *sizes, device)
    for _ in range(1000):
        state, next_state, action = map(rng.standard_normal, (sizes[0], *sizes))
        buffer.add(state, next_state, np.tanh(action), rng.standard_normal(), False)
    return agent, buffer


def update(script, settings: dict, args: Settings, **sizes) -> Callable[[], object]:
    """A function that updates such an agent as train() does, the actor as often as there."""
    agent, buffer = make_agent(script, settings, args, **sizes)
    steps, rows_in_batch = itertools.count(1), agent.args.batch_size

    def one_update(update_actor):
        return agent.update(buffer.sample(rows_in_batch), update_actor)

    if args.device == "cuda" and agent.args.cudagraphs:
        one_update = script.cuda_graphs(one_update)
    return lambda: one_update(next(steps) % agent.args.policy_frequency == 0)


def critic_loss(script, settings: dict, args: Settings) -> Callable[[], object]:
    """A function that takes such an agent's critic loss forward and backward."""
    agent, buffer = make_agent(script, settings, args)
    batch = buffer.sample(agent.args.batch_size)
    inputs = agent.critic_loss, batch, *agent.critic_noise(batch)
    if script.pave_losses is naive_pave_losses:
        parameters = list(agent.critics.requires_grad_(True).parameters())
        return lambda: torch.autograd.grad(agent.critic_loss(*inputs[1:])[0], parameters)
    gradients = script.compile_or_eager(agent.gradients) if agent.args.compile else agent.gradients
    return lambda: gradients("critics", *inputs)


def floor(args: Settings) -> Callable[[], object]:
    """A function that does the floor's matmuls, each on what the former gave, and nothing else."""
    weight = torch.nn.init.orthogonal_(torch.empty(256, 256, device=args.device))  # the products stay in range
    x = torch.randn(256, 256, device=args.device)
    return lambda: functools.reduce(torch.matmul, [weight] * FLOOR_UNITS, x)


def update_section(args: Args) -> list[Row]:
    found = []
    for name in SCRIPTS:
        sides = {side: update(script_of(name, side), settings, args) for side, settings in SIDES.items()}
        samples = milliseconds(sides, args, f"{name}: updates")
        found += rows("update", name, samples, "ms/update", ("λ=0", "naive"))
        rates = {side: [1e3 / value for value in values] for side, values in samples.items()}
        found += rows("update", name, rates, "updates/s", ("λ=0", "naive"))
    return found


def loss_section(args: Args) -> list[Row]:
    found = []
    for name in SCRIPTS:
        settings = SIDES | {"PAVE, eager": {"compile": False}}
        del settings["PAVE-64"]  # the floor is that of the whole batch
        sides = {side: critic_loss(script_of(name, side), settings[side], args) for side in settings}
        samples = milliseconds({"floor": floor(args)} | sides, args, f"{name}: losses")
        found += rows("loss", name, samples, "ms", ("floor",))
        rates = [FLOOR_UNITS * 2 * 256**3 / (1e6 * value) for value in samples["floor"]]
        found += rows("loss", name, {"floor": rates}, "GFLOP/s")
    return found


def scaling_section(args: Args) -> list[Row]:
    name, found = "sac_pave_continuous", []

    @functools.cache  # the default sizes are on all three axes
    def measure(batch, **sizes):
        torch._dynamo.reset()  # drops what was compiled for other sizes
        settings = {side: SIDES[side] | {"batch_size": batch} for side in ("λ=0", "PAVE", "PAVE-64")}
        sides = {side: update(SCRIPTS[name], settings[side], args, **sizes) for side in settings}
        return milliseconds(sides, args, f"scaling, batch {batch}, " + ", ".join(f"{k} {v}" for k, v in sizes.items()))

    for parameter, values in SCALING.items():
        for value in values[1:3] if args.quick else values:
            samples = measure(**DEFAULT_SIZES | {parameter: value})
            found += rows("scaling", name, samples, "ms/update", ("λ=0",), f"{parameter}={value}")
    draw(found, args.output_dir / "scaling.png")
    return found


def draw(found: list[Row], output: Path) -> None:
    """The scaling rows, a panel for each parameter."""
    from benchmarks.plot import COLOURS, MARKERS, STYLE, WIDTH, plt  # here: a training starts without matplotlib

    labels = {"hidden": "hidden width", "batch": "batch size", "action_dim": "action dimension"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(labels), figsize=(WIDTH, 3.2), sharey=True)
        for ax, (parameter, label) in zip(axes, labels.items(), strict=True):
            panel = [row for row in found if row.parameter.startswith(f"{parameter}=")]
            for side, colour, marker in zip(dict.fromkeys(row.side for row in panel), COLOURS, MARKERS, strict=False):
                line = [row for row in panel if row.side == side]
                x = [int(row.parameter.partition("=")[2]) for row in line]
                ax.plot(x, [row.value for row in line], color=colour, marker=marker, label=side)
                ax.fill_between(x, [row.min for row in line], [row.max for row in line], color=colour, alpha=0.2)
                for position, row in zip(x, line if side == "PAVE" else (), strict=False):
                    ax.annotate(
                        f"{row.ratio:.1f}", (position, row.value), (0, 7), textcoords="offset points", ha="center"
                    )
            ax.set(xscale="log", yscale="log", xlabel=label, xticks=x, xticklabels=x)
            ax.minorticks_off()
            ax.margins(x=0.12, y=0.15)
        axes[0].set_ylabel("ms per SAC update")
        axes[-1].legend(title="numbers: PAVE / λ=0")
        figure.savefig(output, dpi=200)
        plt.close(figure)


# --------------------------------------------------------------------------------------------------------- trainings


class Turns(gym.Wrapper):
    """An env that halts after each turn: sends the turn's seconds, then waits for the number of steps of the next."""

    def __init__(self, env: gym.Env, connection):
        super().__init__(env)
        self.connection, self.steps, self.left = connection, 0, LEARNING_STARTS + WARM_UP  # the warm-up is a turn
        self.began = time.perf_counter()

    def send(self, clock: Callable[[], float], began=0.0):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.connection.send(clock() - began)

    def step(self, action):
        if self.steps == LEARNING_STARTS + 3:  # two updates are done, TD3's first one of the actor among them
            self.send(time.time)
        if self.left == 0:
            self.send(time.perf_counter, self.began)
            self.left = self.connection.recv()  # EOFError: no more turns
            self.began = time.perf_counter()
        self.steps, self.left = self.steps + 1, self.left - 1
        return self.env.step(action)


def train_in_turns(connection, name: str, side: str, settings: dict) -> None:
    """What a side's process does: the script's own train(), or Stable-Baselines3's, until no more turns come."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  without its progress bar
    script = script_of(name, side)
    args, make_env = script.Args(**settings), script.make_env
    script.make_env = lambda env_id: Turns(make_env(env_id), connection)
    with contextlib.suppress(EOFError):
        if side != "SB3":
            script.train(args)
        import stable_baselines3

        algorithm = getattr(stable_baselines3, name.partition("_")[0].upper())
        settings = {"batch_size": args.batch_size, "learning_starts": args.learning_starts, "learning_rate": args.q_lr}
        settings |= {"train_freq": 1, "gradient_steps": 1, "policy_kwargs": {"net_arch": [256, 256]}}
        env, device = script.make_env(args.env_id), "cuda" if args.cuda else "cpu"
        algorithm("MlpPolicy", env, device=device, **settings).learn(args.total_timesteps)


@contextlib.contextmanager
def training(name: str, side: str, settings: dict):
    """Start a side's process: the seconds until its first updates are done, and a function, steps -> steps/s."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    settings = {"total_timesteps": 10**9, "learning_starts": LEARNING_STARTS, "eval_episodes": 0} | settings
    process = context.Process(target=train_in_turns, args=(other, name, side, settings), daemon=True)
    began = time.time()
    process.start()
    other.close()  # now the process is the only one who can end the connection

    def receive():
        try:
            return connection.recv()
        except EOFError:
            raise UserError(f"the training of {name}, side {side}, ended; its own message is above") from None

    def turn(steps):
        connection.send(steps)
        return steps / receive()

    try:
        seconds = receive() - began
        receive()  # the warm-up's turn
        yield seconds, turn
    finally:
        connection.close()
        process.join(30)
        process.kill()


def training_section(args: Args) -> list[Row]:
    found, sides = [], SIDES | ({"SB3": {}} if args.peers else {})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        common = {"output_dir": folder, "checkpoint_interval": 10**9, "cuda": args.device == "cuda"}
        for name in SCRIPTS:
            turns = {}
            with contextlib.ExitStack() as stack:
                for side in tqdm(sides, f"{name}: starting trainings", unit="side", disable=None, leave=False):
                    seconds, turn = stack.enter_context(training(name, side, common | sides[side]))
                    found += rows("start", name, {side: [seconds]}, "s", parameter="cache as it was")
                    turns[side] = functools.partial(turn, 20 if args.quick else 100)
                samples = alternate(turns, args.rounds, f"{name}: trainings")
            found += rows("training", name, samples, "steps/s", ("λ=0", "naive", "SB3"))
            for side, state in itertools.product(("PAVE", "PAVE-64") if args.cold else (), ("cold", "warm")):
                cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{name}_{side}"}
                with mock.patch.dict(os.environ, cache), training(name, side, common | sides[side]) as (seconds, _):
                    found += rows("start", name, {side: [seconds]}, "s", parameter=f"{state} cache")
    return found


SECTIONS = {"update": update_section, "training": training_section, "loss": loss_section, "scaling": scaling_section}


def main(args: Args) -> None:
    if args.peers and importlib.util.find_spec("stable_baselines3") is None:
        raise UserError("--peers needs stable-baselines3: pip install stable-baselines3")
    prepare(args)
    found = []
    for section in args.sections:
        new = SECTIONS[section](args)
        print(table(new), end="\n\n", flush=True)
        found += new
        write(args.output_dir / "throughput", found)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
