"""A grid of trainings, script x method x env x seed, that goes on where it was stopped.

    python -m benchmarks.sweep --preset paper-td3 --envs Pendulum-v1 --methods base pave caps --jobs 2
    python -m benchmarks.sweep --preset paper-sac --methods ablation --flags="--pave-batch-size 64" --dry-run
    python -m benchmarks.sweep --grid benchmarks/results.toml --only "HalfCheetah|ablation"

Every run is a command that you can copy (--dry-run shows them). Its cell is the folder <output-dir>/
<env>__<sac|td3>__<method>__<seed>/, with the script's run folder, log.txt and cell.json. A finished run is evaluated
(benchmarks.evaluate), a killed one resumed, also towards more --steps. Nothing is removed: what can't be resumed gets a
new run folder beside it. A cell that was trained with other settings fails; a failure doesn't stop the rest. Ctrl-C or
SIGTERM lets the trainings save; the same command goes on. Exit code: 1 if a cell failed, 2 for bad input, 130 stopped.

Methods:
    base          plain SAC / TD3, all lambdas 0
    pave          the lambdas that the script takes for the env, or those in --flags
    untuned       0.1, 0.1, 0.01, where the paper's search starts
    auto          --autotune-curv: 0.1, 0.0005, and lambda_curv finds itself
    caps          benchmarks.caps, the policy-side rival
    ablation-ijk  i, j, k = 1 keeps pave's lambda of MPR, VFC, Curv, 0 drops it; `ablation` is all eight
The other tools name a run by its settings: ablation-111 is pave to them, 000 base; pave is untuned on an env without
tuned lambdas, and own with lambdas in --flags.

Presets, the paper's settings as far as flags go:
    paper-td3     not matched: hidden layers of 256-256 instead of 400-300
    paper-sac     not matched: one update after each step instead of 50 after every 50

--grid FILE.toml holds several grids, as [[grid]] tables with the keys scripts, preset, envs, methods, seeds, steps,
flags, name and episodes; what a table lacks is taken from the command line.

On a cluster, start Ray on the nodes, then the sweep with --address auto on one of them. The repository, Python and
--output-dir must be on a file system that all nodes share.
"""

import concurrent.futures
import contextlib
import fcntl
import io
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from benchmarks import caps, common, evaluate
from benchmarks.common import ROOT, SCRIPTS, UserError, read_json, require

ALGORITHMS = {name.partition("_")[0]: script for name, script in SCRIPTS.items()}  # "sac" and "td3"
ABLATION = tuple(f"ablation-{mask:03b}" for mask in range(8))
METHODS = ("base", "pave", "untuned", "auto", "caps", *ABLATION)
STEPS = {"Pendulum": 100_000, "LunarLanderContinuous": 500_000, "Reacher": 500_000}  # the paper's; else a million
PRESETS = {
    "paper-td3": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 256 --gamma {gamma} --learning-starts 10000 "
    "--exploration-noise 0.1 --policy-frequency 2 --buffer-size {buffer_size}",
    "paper-sac": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 100 --gamma 0.99 --learning-starts 10000 --no-autotune "
    "--alpha 0.2 --buffer-size 1000000",
}
SHORT_ENVS = ("Pendulum", "LunarLanderContinuous")  # where the paper's TD3 differs
CELL_FLAGS = {"--env-id", "--seed", "--total-timesteps", "--output-dir", "--resume", "--autotune-curv"}
# Settings that a finished training may have otherwise than asked; the second ones where no PAVE code runs.
FREE = ("output_dir", "resume", "total_timesteps", "eval_", "checkpoint_interval", "cuda", "torch_", "compile")
PAVE_ONLY = ("mpr_", "curv_", "pave_", "target_concavity")


@dataclass
class Grid:
    scripts: tuple[Literal["sac", "td3"], ...] = ()  # default: the preset's own, or both
    preset: Literal["paper-td3", "paper-sac"] | None = None  # settings to start from; None: the script's defaults
    envs: tuple[str, ...] = ("Pendulum-v1",)  # Gymnasium ids
    methods: tuple[str, ...] = ("base", "pave")  # see above
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run of each method for each
    steps: int | None = None  # env steps a run; None: the paper's, or 1,000,000
    flags: str = ""  # flags for every run, in one string
    name: str = ""  # ends the cells' names, so that other flags for the same envs and methods can stand beside them
    episodes: int = 10  # of the evaluation of a finished run


@dataclass
class Args(Grid):
    grid: Path | None = None  # TOML file with several grids
    only: str = ""  # regular expression: only the cells whose folder's name it is found in
    output_dir: Path = Path("runs/sweep")  # where the cells are
    jobs: int | None = None  # runs at a time on this machine; GPUs take turns. None: one a GPU, or else one a CPU core
    address: str | None = None  # Ray cluster to run on; auto: this machine's
    cpus_per_run: int = 1  # CPU threads of a run, and the cores that Ray reserves for it
    gpus_per_run: float = 0.0  # that Ray reserves for a run; 0.5: two share one
    dry_run: bool = False  # show each cell's state and command, train nothing


class Cell(NamedTuple):
    folder: Path
    about: dict  # what cell.json says of it: algorithm, method, env_id, seed, steps, command
    words: list[str]  # of the command: those after python, without --output-dir and --resume
    settings: dict  # what a training must have been given to be this cell's
    episodes: int


class State(NamedTuple):
    """Of a cell, or of one run in it, on the disk."""

    kind: Literal["finished", "resume", "problem", "new"]
    run: Path | None = None
    step: int = 0
    problem: str = ""


# ------------------------------------------------------------------------------------------------------- the grid


def parse(kind, flags: list[str], **options):
    """tyro.cli(kind, args=flags), with a UserError of one line instead of a box on the terminal."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            return tyro.cli(kind, args=flags, **options)
    except SystemExit as error:
        cause = " ".join(line.strip("│ ") for line in errors.getvalue().splitlines()[1:2])
        raise UserError(f"cannot use the flags {shlex.join(flags)}: {cause}") from error


def read_grids(args: Args) -> list[Grid]:
    """The tables of --grid, or the one grid of the command line."""
    own = Grid(**{field.name: getattr(args, field.name) for field in fields(Grid)})
    if not args.grid:
        return [own]
    grids = []
    try:
        for table in tomllib.loads(args.grid.read_text())["grid"]:
            words = [[f"--{k}", *map(str, v)] if isinstance(v, list) else [f"--{k}={v}"] for k, v in table.items()]
            grids.append(parse(Grid, list(itertools.chain(*words)), default=own))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--grid {args.grid} is no TOML file with [[grid]] tables ({error!r})") from error
    return grids


def args_class(algorithm: str, method: str) -> type:
    script = ALGORITHMS[algorithm]
    return caps.with_caps(script)[0] if method == "caps" else script.Args


def settings_given(algorithm: str, method: str, flags: list[str]) -> dict:
    """What the flags give a training, without what makes no other training of it; UserError where they don't fit."""
    script, args = ALGORITHMS[algorithm], parse(args_class(algorithm, method), flags)
    args = script.validate(caps.validate(args) if method == "caps" else args)
    free = FREE if any(getattr(args, name) for name in script.LAMBDAS) else FREE + PAVE_ONLY
    free += ("lambda_curv",) if args.autotune_curv else ()  # a summary has the one that it found
    settings = {name: value for name, value in asdict(args).items() if not name.startswith(free)}
    return settings | {"method": common.method_of(script, vars(args))}


def make_cell(grid: Grid, algorithm: str, method: str, env_id: str, seed: int, output_dir: Path) -> Cell:
    """One cell of the grid; UserError where its script would not take the flags."""
    script, env = ALGORITHMS[algorithm], re.sub(r"-v\d+$", "", env_id)
    gamma, buffer_size = (0.98, 200_000) if env in SHORT_ENVS else (0.99, 1_000_000)
    preset = PRESETS.get(grid.preset, "").format(gamma=gamma, buffer_size=buffer_size)
    steps = STEPS.get(env, 1_000_000) if grid.steps is None else grid.steps
    flags = shlex.split(f"--env-id {shlex.quote(env_id)} --seed {seed} --total-timesteps {steps} {preset} {grid.flags}")
    if method == "auto":
        flags.append("--autotune-curv")
    elif method != "pave":
        lambdas = script.UNTUNED_LAMBDAS if method == "untuned" else (0.0, 0.0, 0.0)
        if method in ABLATION:
            pave = script.validate(parse(script.Args, flags))
            lambdas = [getattr(pave, name) * int(on) for name, on in zip(script.LAMBDAS, method[-3:], strict=True)]
        for name, value in zip(script.LAMBDAS, lambdas, strict=True):
            flags += [f"--{name.replace('_', '-')}", f"{value:g}"]
    words = (["-m", "benchmarks.caps", script.SCRIPT] if method == "caps" else [f"{script.SCRIPT}.py"]) + flags
    name = f"{env_id}__{algorithm}__{method}__{seed}" + f"__{grid.name}" * bool(grid.name)
    folder = output_dir / re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    about = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": steps}
    about["command"] = shlex.join(["python", *words, "--output-dir", str(folder)])
    return Cell(folder.resolve(), about, words, settings_given(algorithm, method, flags), grid.episodes)


def make_cells(args: Args) -> list[Cell]:
    """Every cell of the grids, once; UserError where they make no sense."""
    cells = {}
    for grid in read_grids(args):
        own = (grid.preset.removeprefix("paper-"),) if grid.preset else tuple(ALGORITHMS)
        algorithms = grid.scripts or own
        require(set(algorithms) <= set(own), f"--preset {grid.preset} is for --scripts {own[0]} only")
        taken = CELL_FLAGS & {word.partition("=")[0].replace("_", "-") for word in shlex.split(grid.flags)}
        require(not taken, f"--flags has {', '.join(sorted(taken))}: the sweep sets that itself")
        methods = [name for method in grid.methods for name in (ABLATION if method == "ablation" else (method,))]
        unknown = ", ".join(set(methods) - set(METHODS))
        require(not unknown, f"--methods has {unknown}; there are ablation, {', '.join(METHODS)}")
        for env_id, seed, algorithm, method in itertools.product(grid.envs, grid.seeds, algorithms, methods):
            cell = make_cell(grid, algorithm, method, env_id, seed, args.output_dir)
            same = cells.setdefault(cell.folder.name, cell).words == cell.words
            require(same, f"two grids want {cell.folder.name} with different flags: give one of them a name")
    require(len(cells) > 0, "the grid is empty: give envs, methods and seeds")
    try:
        chosen = [cell for name, cell in cells.items() if re.search(args.only, name)]
    except re.error as error:
        raise UserError(f"--only {args.only} is no regular expression ({error})") from error
    require(len(chosen) > 0, f"--only {args.only} leaves none of {len(cells)} cells, such as {next(iter(cells))}")
    return chosen


# --------------------------------------------------------------------------------------------- cells on the disk


def inspect_run(cell: Cell, run: Path) -> State:
    """Whether a run is what the cell asks for; "new" where nothing can be made of it."""
    algorithm, method, steps = (cell.about[name] for name in ("algorithm", "method", "steps"))
    script, checkpoint, summary = ALGORITHMS[algorithm], run / "checkpoint.pt", read_json(run / "summary.json")
    trained, step = summary, summary.get("steps", 0)
    if step < steps:  # finished or not is decided without the checkpoint, which people delete: it has the replay buffer
        try:
            saved = script.load_checkpoint(str(checkpoint), args_class(algorithm, method))
        except common.USER_ERRORS:
            return State("new")
        if "optimizers" not in saved:  # of an older version of the script
            return State("new")
        trained, step = asdict(saved["args"]), saved["step"]
    trained = common.settings_of(script, trained, run)
    trained["method"] = common.method_of(script, trained)
    other = [f"{k} {trained.get(k)} instead of {v}" for k, v in cell.settings.items() if trained.get(k) != v]
    if other or step > steps:
        how = f"with {', '.join(other)}" if other else f"for {step:,} steps"
        return State("problem", run, step, f"was trained {how}: ask for that, or give the grid another --name")
    if step == steps:
        return State("finished", run, step) if summary else State("new")  # stopped in its last step
    return State("resume", run, step)


def inspect(cell: Cell) -> State:
    """What is left to do for a cell."""
    runs = sorted(cell.folder.glob("*__*__*__*/"), key=lambda run: run.name.rpartition("__")[2], reverse=True)
    states = [inspect_run(cell, run) for run in runs]  # the newest first: names end in the time
    order = ("finished", "resume", "problem", "new")
    return min(states, key=lambda state: order.index(state.kind), default=State("new"))


# ------------------------------------------------------------------------------------------------------- one run


def run_cell(cell: Cell, threads: int, stop: Path, gpu: str | None = None) -> tuple[str, str]:
    """Train and evaluate a cell, each in a process of its own; returns what became of it and a line about it.

    Once the file `stop` is there, the training gets a SIGTERM, upon which it saves its checkpoint and ends.
    """

    def execute(*words) -> int:
        command = [sys.executable, *map(str, words)]
        print("$", shlex.join(command), file=log, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        # a session of its own: a terminal's Ctrl-C must not add to our signal, for a second one ends a training at once
        options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        while process.poll() is None and not stop.exists():
            time.sleep(0.5)
        if process.poll() is None:
            process.terminate()
        return process.wait()

    def ended(code: int) -> tuple[str, str]:
        if stop.exists():
            return "stopped", ""
        lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
        return "failed", f"exit code {code}: {lines[-1]} ({log_path})"

    if stop.exists():
        return "stopped", ""
    cell.folder.mkdir(parents=True, exist_ok=True)
    log_path, steps = cell.folder / "log.txt", cell.about["steps"]
    with open(log_path, "a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training holds it too, even if the sweep is killed
        except BlockingIOError:
            return "failed", f"another process is training it ({log_path})"
        state, outcome = inspect(cell), ("skipped", "already finished")
        if state.kind == "problem":
            return "failed", state.problem
        if state.kind != "finished":
            resume = ["--resume", state.run / "checkpoint.pt"] if state.run else []
            about = cell.about | {"resumed_from": state.step, "wall_seconds": None} | common.machine()
            (cell.folder / "cell.json").write_text(json.dumps(about, indent=2) + "\n")
            began = time.time()
            if code := execute(*cell.words, "--output-dir", cell.folder, *resume):
                return ended(code)
            seconds = round(time.time() - began, 1)
            about["wall_seconds"] = None if state.step else seconds  # of a resumed run this is but a part
            (cell.folder / "cell.json").write_text(json.dumps(about, indent=2) + "\n")
            outcome = "done", f"{steps - state.step:,} steps in {seconds:,.0f} s"
            state = inspect(cell)
        if evaluate.about(steps, cell.episodes).items() <= evaluate.read_evaluation(state.run).items():
            return outcome
        if not (state.run / "checkpoint.pt").is_file():
            return outcome[0], f"{outcome[1]}, but not evaluated: there is no checkpoint.pt"
        if code := execute("-m", "benchmarks.evaluate", state.run, "--episodes", cell.episodes):
            return ended(code)
        return "done", outcome[1] + ", evaluated"


# ----------------------------------------------------------------------------------------------------- the sweep


def start_local(args: Args, cells: list[Cell], stop: Path) -> dict[concurrent.futures.Future, str]:
    """Future of each run -> its cell's name. A thread for each run at a time: it only waits for the run's process."""
    count, thread = torch.cuda.device_count(), threading.local()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    turns = itertools.cycle(gpus if count > 1 else [None])
    jobs = args.jobs or count or os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(jobs, initializer=lambda: setattr(thread, "gpu", next(turns)))

    def run(cell: Cell):
        return run_cell(cell, args.cpus_per_run, stop, thread.gpu)

    return {pool.submit(run, cell): cell.folder.name for cell in cells}


def start_ray(args: Args, cells: list[Cell], stop: Path) -> dict[concurrent.futures.Future, str]:
    """As start_local, with a Ray task for each run; UserError where there is no Ray or no cluster."""
    try:
        import ray

        path = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # the workers import benchmarks
        ray.init(args.address, runtime_env=path, log_to_driver=False, logging_level="ERROR")
    except (ImportError, ConnectionError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"cannot use --address {args.address} ({cause}): pip install ray, ray start") from error
    if ray.cluster_resources().get("GPU", 0) < args.gpus_per_run:
        print("warning: the cluster has fewer GPUs than --gpus-per-run; the runs wait for more", flush=True)
    task = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run)(run_cell)
    return {task.remote(cell, args.cpus_per_run, stop).future(): cell.folder.name for cell in cells}


def main(args: Args) -> None:
    for name in ("jobs", "cpus_per_run", "episodes"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    cells = make_cells(args)
    if args.dry_run:
        for cell in cells:
            state = inspect(cell)
            print(f"{cell.folder.name}: {state.kind}, {state.problem or f'step {state.step:,}'}")
            print(f"    {cell.about['command']}")
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stop = args.output_dir.resolve() / f".stop-{platform.node()}-{os.getpid()}"  # all runs, on all nodes, look at it
    stop.unlink(missing_ok=True)
    futures, outcomes = (start_ray if args.address else start_local)(args, cells, stop), {}
    for signum in (signal.SIGINT, signal.SIGTERM):  # also in the background; Ray sets handlers, too
        signal.signal(signum, signal.default_int_handler)

    def wait():
        pending = [future for future, name in futures.items() if name not in outcomes]
        for future in concurrent.futures.as_completed(pending):
            name = futures[future]
            try:
                outcomes[name], detail = future.result()
            except Exception as error:  # whatever it is, the other cells go on
                outcomes[name], detail = "failed", " ".join(repr(error).split())
            print(f"{len(outcomes)}/{len(cells)} {outcomes[name]} {name}  {detail}", flush=True)

    try:
        wait()
    except KeyboardInterrupt:
        stop.touch()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)  # a second one ends the sweep at once; the trainings still save
        print("stopping: checkpoints are being saved", flush=True)
        wait()
        stop.unlink()
    finished = sum(outcome in ("done", "skipped") for outcome in outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    print(f"{finished} of {len(cells)} runs are finished" + (f"; these failed: {', '.join(failed)}" if failed else ""))
    if "stopped" in outcomes.values():
        print("stopped; the same command goes on")
        sys.exit(130)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args, description=__doc__))
