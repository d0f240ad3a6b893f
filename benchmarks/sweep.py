"""A grid of trainings, script x method x env x seed, that goes on where it was stopped.

    python benchmarks/sweep.py --preset paper-td3 --envs Pendulum-v1 --methods base pave caps --jobs 2
    python benchmarks/sweep.py --preset paper-sac --methods ablation --flags "--pave-batch-size 64" --dry-run
    python benchmarks/sweep.py --grid benchmarks/results.toml --only "HalfCheetah|ablation"

Every run is a command that you can copy (--dry-run shows them) and has a folder, its cell: <output-dir>/
<env>__<sac|td3>__<method>__<seed>/ with the script's run folder, log.txt and, once finished, cell.json. A finished
cell is skipped, a killed one resumed from its checkpoint, also towards more --steps; one that was trained with other
settings fails. A failure doesn't stop the rest. Ctrl-C or SIGTERM lets the trainings save their checkpoints; the same
command goes on. Exit code: 1 if a cell failed, 2 for bad input, 130 if stopped.

Methods:
    base          plain SAC / TD3, all lambdas 0
    pave          the lambdas that the script takes for the env, or those in --flags
    untuned       0.1, 0.1, 0.01, where the paper's search starts
    auto          --autotune-curv: 0.1, 0.0005, and lambda_curv finds itself
    caps          benchmarks/caps.py, the policy-side rival
    ablation-ijk  i, j, k = 1 keeps pave's lambda of MPR, VFC, Curv, 0 drops it; `ablation` is all eight

Presets, the paper's settings as far as flags go:
    paper-td3     learning rates 1e-3, batch 256, gamma .99, learning starts at 10,000, exploration noise .1, policy
                  delay 2, buffer 1e6; on Pendulum and LunarLander gamma .98 and buffer 2e5.
                  Not matched: hidden layers of 256-256 instead of 400-300
    paper-sac     learning rates 1e-3, batch 100, gamma .99, learning starts at 10,000, alpha 0.2 fixed, buffer 1e6.
                  Not matched: one update after each step instead of 50 after every 50

--grid FILE.toml holds several grids, as [[grid]] tables with the keys scripts, preset, envs, methods, seeds, steps and
flags; what a table lacks is taken from the command line.

Cluster: start Ray on its nodes, then --backend ray --address auto on one of them; the same code, through joblib. The
repository, Python and --output-dir must be on a file system that all nodes share. Ray's pool deals cells to its workers
in turn, so one may wait behind a longer one.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from joblib import Parallel, delayed, register_parallel_backend
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks import caps
from benchmarks.evaluate import SCRIPTS, UserError, load_run, user_errors

ROOT = Path(__file__).resolve().parents[1]
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
FREE = ("output_dir", "resume", "total_timesteps", "eval_interval", "checkpoint_interval", "cuda", "torch_", "compile")
PAVE_ONLY = ("mpr_", "curv_", "pave_", "target_concavity")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Grid:
    scripts: tuple[Literal["sac", "td3"], ...] = ()
    """default: the preset's own, or both"""
    preset: Literal["paper-td3", "paper-sac"] | None = None
    """settings to start from; None: the script's defaults"""
    envs: tuple[str, ...] = ("Pendulum-v1",)
    """Gymnasium ids"""
    methods: tuple[str, ...] = ("base", "pave")
    """see above"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """one run of each method for each"""
    steps: int | None = None
    """env steps a run; None: the paper's (Pendulum 100,000, LunarLander and Reacher 500,000, others 1,000,000)"""
    flags: str = ""
    """flags for every run, in one string"""


@dataclass
class Args(Grid):
    grid: Path | None = None
    """TOML file with several grids"""
    only: str = ""
    """regular expression: only the cells whose folder's name it is found in"""
    output_dir: Path = Path("runs/sweep")
    """where the cells are"""
    jobs: int = -1
    """runs at a time; -1: one a CPU core (with Ray, of the whole cluster)"""
    threads: int = 1
    """OMP_NUM_THREADS of each run"""
    backend: Literal["loky", "ray"] = "loky"
    """what joblib starts the runs with: processes on this machine, or Ray"""
    address: str | None = None
    """Ray cluster to join, auto for this machine's; None: a Ray of the sweep's own"""
    dry_run: bool = False
    """show each cell's state and command, train nothing"""


class Cell(NamedTuple):
    folder: Path
    about: dict  # what cell.json says of it before it has run
    command: list[str]  # a file of the repository and its flags, without --output-dir and --resume
    settings: dict  # what a training must have been given to be this cell's


class State(NamedTuple):
    """Of a cell on the disk."""

    kind: Literal["finished", "resume", "new", "problem"]
    step: int = 0
    checkpoint: Path | None = None
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
    file, script_flags, settings = [f"{script.SCRIPT}.py"], flags, {"script": script.SCRIPT}
    if method == "caps":
        file = ["benchmarks/caps.py", script.SCRIPT]
        caps_args, script_flags = parse(caps.Args, [script.SCRIPT, *flags], return_unknown_args=True)
        settings |= caps.settings(caps_args, env_id)
    args = script.validate(parse(script.Args, script_flags))
    free = FREE if any(getattr(args, name) for name in script.LAMBDAS) else FREE + PAVE_ONLY
    settings |= {name: value for name, value in asdict(args).items() if not name.startswith(free)}
    folder = output_dir / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', env_id)}__{algorithm}__{method}__{seed}"
    about = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": steps}
    about |= {"preset": grid.preset, "command": shlex.join(["python", *file, *flags, "--output-dir", str(folder)])}
    return Cell(folder.resolve(), about, file + flags, settings)


def make_cells(args: Args) -> list[Cell]:
    """Every cell of the grids, once; UserError where they make no sense."""
    cells = {}
    try:
        only = re.compile(args.only)
    except re.error as error:
        raise UserError(f"--only {args.only} is no regular expression ({error})") from error
    for grid in read_grids(args):
        algorithms = (grid.preset.removeprefix("paper-"),) if grid.preset else grid.scripts or ("sac", "td3")
        if set(grid.scripts) - set(algorithms):
            raise UserError(f"--preset {grid.preset} is for --scripts {algorithms[0]} only")
        if taken := CELL_FLAGS & {word.partition("=")[0].replace("_", "-") for word in shlex.split(grid.flags)}:
            raise UserError(f"--flags has {', '.join(sorted(taken))}: the sweep sets that itself")
        methods = [name for method in grid.methods for name in (ABLATION if method == "ablation" else (method,))]
        if unknown := set(methods) - set(METHODS):
            raise UserError(f"--methods has {', '.join(unknown)}; there are ablation, {', '.join(METHODS)}")
        for env_id, seed, algorithm, method in itertools.product(grid.envs, grid.seeds, algorithms, methods):
            cell = make_cell(grid, algorithm, method, env_id, seed, args.output_dir)
            if cells.setdefault(cell.folder, cell).command != cell.command:
                raise UserError(f"two grids want {cell.folder.name} with different flags: use two --output-dir")
    if not cells:
        raise UserError("the grid is empty: give envs, methods and seeds")
    chosen = [cell for cell in cells.values() if only.search(cell.folder.name)]
    if not chosen:
        raise UserError(f"--only {args.only} leaves none of {len(cells)} cells, such as {next(iter(cells)).name}")
    return chosen


# --------------------------------------------------------------------------------------------- cells on the disk


def newest(folder: Path, name: str) -> Path | None:
    """The file `name` of the newest run folder in a cell that has one; a run folder's name ends in its time."""
    return max(folder.glob(f"*/{name}"), key=lambda path: path.parent.name.rpartition("__")[2], default=None)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def inspect(cell: Cell) -> State:
    """What is left to do for a cell; a training with other settings is a problem."""
    checkpoint, asked, steps = newest(cell.folder, "checkpoint.pt"), cell.settings, cell.about["steps"]
    if not checkpoint:
        return State("new")
    try:
        run = load_run(checkpoint.parent)
    except UserError as error:
        return State("problem", problem=f"{error}; remove {checkpoint.parent} to train it anew")
    of_caps = read_json(run.path / "caps.json")
    trained = {"script": run.script.SCRIPT} | asdict(run.args) | of_caps
    other = [
        f"{k} {trained.get(k)} instead of {asked.get(k)}" for k in asked | of_caps if trained.get(k) != asked.get(k)
    ]
    problem = ""
    if other:
        problem = f"was trained with {', '.join(other)}: ask for that, or use another --output-dir"
    elif run.step > steps:
        problem = f"was trained for {run.step:,} steps: ask for as many, or use another --output-dir"
    elif run.step == steps != read_json(run.path / "summary.json").get("steps"):
        problem = f"was stopped in its last step, before the summary: ask for more --steps, or remove {run.path}"
    return State("problem" if problem else "finished" if run.step == steps else "resume", run.step, checkpoint, problem)


def write_cell(cell: Cell, **seen) -> None:
    """cell.json: about, steps_per_second by the script, and what the sweep has seen of the run, else null."""
    speed = read_json(newest(cell.folder, "summary.json"))["steps_per_second"]
    unseen = dict.fromkeys(("wall_seconds", "resumed_from", "machine", "torch", "commit"))
    content = cell.about | {"steps_per_second": speed} | unseen | seen
    (cell.folder / "cell.json").write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------- one run


def output(*command) -> str:
    """What a command prints; nothing where it isn't installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def circumstances() -> dict:
    """machine, torch and commit of a run that starts now on this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    gpu = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[:1]
    preload = [f"LD_PRELOAD={os.environ['LD_PRELOAD']}"] if "LD_PRELOAD" in os.environ else []  # see README.md here
    machine = ", ".join([model[1] if model else platform.machine(), f"{os.cpu_count()} cores", *gpu, *preload])
    commit = output("git", "-C", ROOT, "rev-parse", "HEAD")
    commit += "-dirty" if output("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no") else ""
    return {"machine": machine, "torch": importlib.metadata.version("torch"), "commit": commit or None}


def run_cell(cell: Cell, state: State, threads: int, running: Path, sweep_pid: int) -> tuple[str, str, str]:
    """Train a cell, in a worker process; returns its name, what became of it and a line about it.

    Once the file `running` is gone, the training gets a SIGTERM, upon which it saves its checkpoint and ends.
    """
    if os.getpid() != sweep_pid:  # a terminal's Ctrl-C reaches the workers too; they have to wait for the training
        for signum in STOP_SIGNALS:
            signal.signal(signum, lambda *_: None)  # unlike SIG_IGN, a training doesn't inherit it
    name, log_path = cell.folder.name, cell.folder / "log.txt"
    if not running.exists():
        return name, "stopped", ""
    command = [sys.executable, str(ROOT / cell.command[0]), *cell.command[1:], "--output-dir", str(cell.folder)]
    command += ["--resume", str(state.checkpoint)] if state.checkpoint else []
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with open(log_path, "a") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the training holds it too, even if the sweep is killed
            for run in cell.folder.glob("*__*__*__*/"):
                if not (run / "checkpoint.pt").is_file():
                    shutil.rmtree(run)
            print("$", shlex.join(command), file=log, flush=True)
            seen, began = circumstances(), time.time()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # a second signal would kill it: the terminal's must not add to ours
            )
            while process.poll() is None and running.exists():
                time.sleep(0.5)
            if process.poll() is None:
                process.terminate()
            code, seconds = process.wait(), round(time.time() - began, 1)
        if code == 0:
            wall_seconds = None if state.step else seconds  # of a resumed run this is but a part
            write_cell(cell, wall_seconds=wall_seconds, resumed_from=state.step, **seen)
            return name, "done", f"{cell.about['steps'] - state.step:,} steps in {seconds:,.0f} s"
        if not running.exists():
            return name, "stopped", ""
        last = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-1]
        return name, "failed", f"exit code {code}: {last} ({log_path})"
    except BlockingIOError:
        return name, "failed", f"another process is training it ({log_path})"
    except OSError as error:
        return name, "failed", str(error)


# ----------------------------------------------------------------------------------------------------- the sweep


def join_ray(address: str | None) -> None:
    """Make Ray a backend of joblib; UserError where that can't be."""
    try:
        import ray
        from ray.util.joblib.ray_backend import RayBackend

        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ImportError, ConnectionError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"cannot use --backend ray --address {address} ({cause}): pip install ray, ray start"
        ) from error

    class Backend(RayBackend):
        supports_return_generator = True  # what joblib denies to pools, since a generator may be left half read

    register_parallel_backend("ray", Backend)


def main(args: Args) -> None:
    if args.jobs == 0 or args.threads < 1:
        raise UserError("--jobs must not be 0, and --threads at least 1")
    cells = make_cells(args)
    states = [inspect(cell) for cell in cells]
    if args.dry_run:
        for cell, state in zip(cells, states, strict=True):
            print(f"{cell.folder.name}: {state.kind}, {state.problem or f'step {state.step:,}'}")
            print(f"    {cell.about['command']}")
        return
    if args.backend == "ray":
        join_ray(args.address)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    running = args.output_dir.resolve() / f".running-{platform.node()}-{os.getpid()}"  # removed to stop all trainings
    outcomes, tasks = {}, []

    def ended(name: str, outcome: str, detail: str) -> None:
        outcomes[name] = outcome
        if outcome != "stopped":
            tqdm.write(f"{outcome:8} {name}  {detail}")

    for cell, state in zip(cells, states, strict=True):
        if state.kind in ("new", "resume"):
            tasks.append(delayed(run_cell)(cell, state, args.threads, running, os.getpid()))
        elif state.kind == "finished":
            if read_json(cell.folder / "cell.json").get("steps") != state.step:
                write_cell(cell)  # a sweep was killed before it could, or there was none
            ended(cell.folder.name, "skipped", "already finished")
        else:
            ended(cell.folder.name, "failed", state.problem)

    bar = tqdm(total=len(cells), initial=len(outcomes), unit="run", disable=None)

    def stop(signum, _frame):
        running.unlink(missing_ok=True)
        bar.set_description("stopping, checkpoints are being saved")
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the sweep at once; the trainings still save

    # Loky's workers inherit this, else a terminal's Ctrl-C would end them at their start; then run_cell takes over.
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in STOP_SIGNALS}
    running.touch()
    try:
        # as many tasks handed out as there are workers: the others can still be called off
        options = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "n_jobs"}
        results = Parallel(args.jobs, backend=args.backend, **options)(task for task in tasks if running.exists())
        for signum in STOP_SIGNALS:
            signal.signal(signum, stop)
        for result in results:
            ended(*result)
            bar.update()
    finally:
        running.unlink(missing_ok=True)
        bar.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    words = [outcomes.get(cell.folder.name, "stopped") for cell in cells]
    finished = sum(word in ("done", "skipped") for word in words)
    if "stopped" in words:
        print(f"stopped, {finished} of {len(cells)} runs are finished; the same command goes on")
        sys.exit(130)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    print(f"{finished} of {len(cells)} runs are finished" + (f"; these failed: {', '.join(failed)}" if failed else ""))
    if failed:
        sys.exit(1)


def command_line() -> Args:
    """The flags. tyro would take what follows --flags for a flag: `--flags "--x 1"` becomes `--flags="--x 1"`."""
    words = sys.argv[1:]
    while "--flags" in words[:-1]:
        at = words.index("--flags")
        words[at : at + 2] = [f"--flags={words[at + 1]}"]
    return tyro.cli(Args, description=__doc__, args=words)


if __name__ == "__main__":
    with user_errors():
        main(command_line())
