"""A grid of trainings, script x method x env x seed, that goes on where it was stopped.

    python -m benchmarks.sweep --preset paper-td3 --methods ablation --flags="--pave-batch-size 64" --jobs 2
    python -m benchmarks.sweep --grid benchmarks/results.toml --only "HalfCheetah|caps" --dry-run

A run's cell is the folder <output-dir>/<env>__<sac|td3>__<method>__<seed>/, with the script's run folder, log.txt and
cell.json. A finished run is evaluated (benchmarks.evaluate), a killed one resumed, also towards more --steps. Nothing
is removed: what can't be resumed gets a new run folder beside it. A cell that was trained with other settings fails; a
failure doesn't stop the rest. Ctrl-C or SIGTERM lets the trainings save; the same command goes on. Exit code: 1 if a
cell failed, 2 for bad input, 130 stopped.

Methods, each run's own choice of lambdas:
    base          plain SAC / TD3, all 0
    pave          those that the script takes for the env, or those in --flags
    untuned       0.1, 0.1, 0.01, where the paper's search starts
    auto          --autotune-curv: 0.1, 0.0005, and lambda_curv finds itself
    caps          all 0: benchmarks.caps, the policy-side rival
    ablation-ijk  i, j, k = 1 keeps pave's lambda of MPR, VFC, Curv, 0 drops it; `ablation` is all eight

The other tools name a run by its settings: ablation-111 is pave to them, 000 base; pave is untuned on an env without
tuned lambdas, and own with lambdas in --flags.

Presets are the paper's settings as far as flags go. Not matched: for paper-td3, hidden layers of 400-300 (256-256
here); for paper-sac, 50 updates after every 50 steps (one after each here).
"""

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from benchmarks import caps, common, evaluate
from benchmarks.common import FREE, ROOT, SCRIPTS, UserError, read_json, require

ALGORITHMS = {name.partition("_")[0]: script for name, script in SCRIPTS.items()}  # "sac" and "td3"
ABLATION = {f"ablation-{mask:03b}": f"{mask:03b}" for mask in range(8)}
KEPT = {"base": "000", "caps": "000", "pave": "111", "auto": "111"} | ABLATION  # 0: that lambda is switched off
STEPS = {"Pendulum": 100_000, "LunarLanderContinuous": 500_000, "Reacher": 500_000}  # the paper's; else a million
PRESETS = {
    "paper-td3": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 256 --gamma {gamma} --learning-starts 10000 "
    "--exploration-noise 0.1 --policy-frequency 2 --buffer-size {buffer_size}",
    "paper-sac": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 100 --gamma 0.99 --learning-starts 10000 --no-autotune "
    "--alpha 0.2 --buffer-size 1000000",
}
SHORT_ENVS = ("Pendulum", "LunarLanderContinuous")  # where the paper's TD3 differs
CELL_FLAGS = {"--env-id", "--seed", "--total-timesteps", "--output-dir", "--resume", "--autotune-curv"}


@dataclass
class Args:
    scripts: tuple[Literal["sac", "td3"], ...] = ()  # default: the preset's own, or both
    preset: Literal["paper-td3", "paper-sac"] | None = None  # settings to start from; None: the script's defaults
    envs: tuple[str, ...] = ("Pendulum-v1",)  # Gymnasium ids
    methods: tuple[Literal["ablation", "untuned", *KEPT], ...] = ("base", "pave")  # see above
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run of each method for each
    steps: int | None = None  # env steps a run; None: the paper's, or 1,000,000
    flags: str = ""  # flags for every run, in one string
    name: str = ""  # ends the cells' names, so that other flags for the same envs and methods can stand beside them
    grid: Path | None = None  # TOML file of [[grid]] tables of these flags; what one lacks is as on the command line
    only: str = ""  # regular expression: only the cells whose folder's name it is found in
    output_dir: Path = Path("runs/sweep")  # where the cells are
    jobs: int | None = None  # runs at a time on this machine; GPUs take turns. None: one a GPU, or else one a CPU core
    address: str | None = None  # Ray cluster to run on, see benchmarks/README.md; auto: this machine's
    cpus_per_run: int = 1  # CPU threads of a run, and the cores that Ray reserves for it
    gpus_per_run: float = 0.0  # that Ray reserves for a run; 0.5: two share one
    dry_run: bool = False  # show how far each cell is, and its command, to copy; train nothing


class Cell(NamedTuple):
    folder: Path
    about: dict  # what cell.json says of it: algorithm, method, env_id, seed, steps, command
    settings: dict  # what a training must have been given to be this cell's


# ------------------------------------------------------------------------------------------------------- the grid


def read_grids(args: Args) -> list[Args]:
    """The tables of --grid, each over what the command line says; or that alone."""
    if not args.grid:
        return [args]
    grids = []
    try:
        for table in tomllib.loads(args.grid.read_text())["grid"]:
            flags = []
            for name, value in table.items():
                flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
            grids.append(tyro.cli(Args, args=flags, default=args))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--grid {args.grid} is no TOML file with [[grid]] tables ({error!r})") from error
    return grids


def settings_given(algorithm: str, method: str, flags: list[str]) -> dict:
    """What the flags give a training, without what makes no other training of it."""
    script = ALGORITHMS[algorithm]
    kind = caps.with_caps(script)[0] if method == "caps" else script.Args
    args = tyro.cli(kind, args=flags, prog=script.SCRIPT)
    args = script.validate(caps.validate(args) if method == "caps" else args)
    free = (*FREE, "lambda_curv") if args.autotune_curv else FREE  # a summary has the one that it found
    return {name: value for name, value in asdict(args).items() if not name.startswith(free)}


def make_cell(grid: Args, algorithm: str, method: str, env_id: str, seed: int) -> Cell:
    script, env = ALGORITHMS[algorithm], re.sub(r"-v\d+$", "", env_id)
    gamma, buffer_size = (0.98, 200_000) if env in SHORT_ENVS else (0.99, 1_000_000)
    preset = PRESETS.get(grid.preset, "").format(gamma=gamma, buffer_size=buffer_size)
    steps = STEPS.get(env, 1_000_000) if grid.steps is None else grid.steps
    flags = shlex.split(f"--env-id {shlex.quote(env_id)} --seed {seed} --total-timesteps {steps} {preset} {grid.flags}")
    if method == "auto":
        flags.append("--autotune-curv")
    for i, name in enumerate(script.LAMBDAS):
        if method == "untuned":
            flags += [f"--{name.replace('_', '-')}", str(script.UNTUNED_LAMBDAS[i])]
        elif KEPT[method][i] == "0":
            flags += [f"--{name.replace('_', '-')}", "0"]
    program = ["-m", "benchmarks.caps", script.SCRIPT] if method == "caps" else [f"{script.SCRIPT}.py"]
    name = f"{env_id}__{algorithm}__{method}__{seed}" + f"__{grid.name}" * bool(grid.name)
    folder = grid.output_dir.resolve() / re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    command = shlex.join(["python", *program, *flags, "--output-dir", str(folder)])
    about = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": steps}
    return Cell(folder, about | {"command": command}, settings_given(algorithm, method, flags))


def make_cells(args: Args) -> list[Cell]:
    """Every cell of the grids, once; UserError where they make no sense."""
    cells = {}
    for grid in read_grids(args):
        algorithms = grid.scripts or ([grid.preset.removeprefix("paper-")] if grid.preset else ALGORITHMS)
        taken = CELL_FLAGS & {word.partition("=")[0].replace("_", "-") for word in shlex.split(grid.flags)}
        require(not taken, f"--flags has {', '.join(sorted(taken))}: the sweep sets that itself")
        methods = [name for method in grid.methods for name in (ABLATION if method == "ablation" else (method,))]
        for env_id, seed, algorithm, method in itertools.product(grid.envs, grid.seeds, algorithms, methods):
            cell = make_cell(grid, algorithm, method, env_id, seed)
            same = cells.setdefault(cell.folder.name, cell).about == cell.about
            require(same, f"two grids want {cell.folder.name} with different flags: give one of them a name")
    try:
        chosen = [cell for name, cell in cells.items() if re.search(args.only, name)]
    except re.error as error:
        raise UserError(f"--only {args.only} is no regular expression ({error})") from error
    require(len(chosen) > 0, f"no cell is left of {len(cells)}: give envs, methods and seeds, and an --only that fits")
    return chosen


# ------------------------------------------------------------------------------------------------------- one cell


def inspect(cell: Cell) -> tuple[int, Path | None]:
    """Step and folder of the cell's run that came furthest; 0 and None where there is none to go on with.

    UserError where a run was trained otherwise than the cell asks.
    """
    script, steps = ALGORITHMS[cell.about["algorithm"]], cell.about["steps"]
    kind, _ = caps.with_caps(script)  # its settings fit every method
    furthest = 0, None
    for run in sorted(cell.folder.glob("*__*__*__*/"), reverse=True):  # the newest first: names end in the time
        trained = read_json(run / "summary.json")
        step = trained.get("steps", 0)
        if step < steps:  # what is finished needs no checkpoint, which people delete: it has the replay buffer
            try:
                saved = script.load_checkpoint(str(run / "checkpoint.pt"), kind)
            except common.USER_ERRORS:
                continue
            if "optimizers" not in saved or saved["step"] == steps:
                continue  # of an older version of the script, or killed in its last step, before the summary
            trained, step = asdict(saved["args"]), saved["step"]
        trained = vars(script.Args()) | trained | read_json(run / "caps.json") | {"total_timesteps": max(step, steps)}
        other = [f"{k} {trained.get(k)} instead of {v}" for k, v in cell.settings.items() if trained.get(k) != v]
        require(not other, f"was trained with {', '.join(other)}: ask for that, or give the grid another --name")
        if step > furthest[0]:
            furthest = step, run
    return furthest


def run_cell(cell: Cell, threads: int, stop: Path, gpu: str | None = None) -> tuple[str, str]:
    """Train and evaluate a cell, each in a process of its own; returns what became of it and a line about it.

    Once the file `stop` is there, the training gets a SIGTERM, upon which it saves its checkpoint and ends.
    """

    def execute(*words) -> None:
        command = [sys.executable, *map(str, words)]
        print("$", shlex.join(command), file=log, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        # a session of its own: a terminal's Ctrl-C must not add to our signal, for a second one ends a training at once
        options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        while process.poll() is None and not stop.exists():
            time.sleep(0.5)
        process.terminate()  # of no effect where it has ended
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)

    if stop.exists():
        return "stopped", ""
    cell.folder.mkdir(parents=True, exist_ok=True)
    log_path, steps = cell.folder / "log.txt", cell.about["steps"]
    with open(log_path, "a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training holds it too, even if the sweep is killed
            step, run = inspect(cell)
            told = "already finished"
            if step < steps:
                resume = ["--resume", run / "checkpoint.pt"] if run else []
                about = cell.about | {"resumed_from": step, "wall_seconds": None} | common.machine()
                (cell.folder / "cell.json").write_text(json.dumps(about, indent=2) + "\n")
                began = time.time()
                execute(*shlex.split(cell.about["command"])[1:], *resume)
                seconds = round(time.time() - began, 1)
                about["wall_seconds"] = None if run else seconds  # of a resumed run this is but a part
                (cell.folder / "cell.json").write_text(json.dumps(about, indent=2) + "\n")
                told = f"{steps - step:,} steps in {seconds:,.0f} s"
                _, run = inspect(cell)
            evaluation = read_json(run / "evaluation.json")
            if (evaluation.get("version"), evaluation.get("step")) == (evaluate.VERSION, steps):
                return "done", told
            if not (run / "checkpoint.pt").is_file():
                return "done", f"{told}, but not evaluated: there is no checkpoint.pt"
            execute("-m", "benchmarks.evaluate", run)
            return "done", f"{told}, evaluated"
        except BlockingIOError:
            return "failed", f"another process is training it ({log_path})"
        except common.USER_ERRORS as error:
            return "failed", str(error)
        except subprocess.CalledProcessError as error:
            if stop.exists():
                return "stopped", ""
            last_line = log_path.read_text(errors="replace").rstrip().rpartition("\n")[2]
            return "failed", f"exit code {error.returncode}: {last_line} ({log_path})"


# ----------------------------------------------------------------------------------------------------- the sweep


def start_local(args: Args, cells: list[Cell], stop: Path) -> dict[Future, str]:
    """Future of each run -> its cell's name. A thread for each run at a time: it only waits for the run's process."""
    count, thread = torch.cuda.device_count(), threading.local()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    turns = itertools.cycle(gpus if count > 1 else [None])
    jobs = args.jobs or count or os.cpu_count()
    pool = ThreadPoolExecutor(jobs, initializer=lambda: setattr(thread, "gpu", next(turns)))

    def run(cell: Cell):
        return run_cell(cell, args.cpus_per_run, stop, thread.gpu)

    return {pool.submit(run, cell): cell.folder.name for cell in cells}


def start_ray(args: Args, cells: list[Cell], stop: Path) -> dict[Future, str]:
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
    require(min(args.jobs or 1, args.cpus_per_run) > 0, "--jobs and --cpus-per-run must be at least 1")
    cells = make_cells(args)
    if args.dry_run:
        for cell in cells:
            try:
                told = f"step {inspect(cell)[0]:,} of {cell.about['steps']:,}"
            except common.USER_ERRORS as error:
                told = str(error)
            print(f"{cell.folder.name}: {told}\n    {cell.about['command']}")
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stop = args.output_dir.resolve() / f".stop-{time.time_ns()}"  # all runs, on all nodes, look at it
    signals = signal.SIGINT, signal.SIGTERM

    def request_stop(_signum, _frame):
        stop.touch()
        for signum in signals:
            signal.signal(signum, signal.SIG_DFL)  # a second one ends the sweep at once; the trainings still save
        print("stopping: checkpoints are being saved", file=sys.stderr, flush=True)

    futures, outcomes = (start_ray if args.address else start_local)(args, cells, stop), {}
    for signum in signals:  # after Ray, which sets handlers, too
        signal.signal(signum, request_stop)
    for future in as_completed(futures):
        name = futures[future]
        try:
            outcomes[name], told = future.result()
        except Exception as error:  # whatever it is, the other cells go on
            outcomes[name], told = "failed", " ".join(repr(error).split())
        print(f"{len(outcomes)}/{len(cells)} {outcomes[name]} {name}  {told}", flush=True)
    stop.unlink(missing_ok=True)
    finished = sum(outcome == "done" for outcome in outcomes.values())
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
