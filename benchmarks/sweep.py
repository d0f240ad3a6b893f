"""A grid of trainings, script x method x env x seed, that goes on where it was stopped.

    python -m benchmarks.sweep --preset paper-td3 --methods ablation --flags="--pave-batch-size 64" --jobs 2
    python -m benchmarks.sweep --grid benchmarks/results.toml --only "HalfCheetah|caps" --dry-run
    python -m benchmarks.sweep --warm-start "runs/sweep/Pendulum-v1__td3__base__*" --scripts td3 --steps 10000 \\
        --methods base pave auto

A cell is the folder <output-dir>/<env>__<sac|td3>__<method>__<seed>__<steps>/, with the script's run folder, log.txt
and cell.json, which says of each stretch of the training from which step to which it went, where and by which commit.
A finished run is evaluated (benchmarks.evaluate) and never written to again: more --steps make another cell. A stopped
run goes on. Nothing is removed: what can't go on gets a new run folder beside it. A cell that was trained with other
settings fails; a failure doesn't stop the rest. Ctrl-C or SIGTERM lets the trainings save; the same command goes on.
Exit code: 1 if a cell failed, 2 for bad input, 130 stopped.

Methods, each run's own choice of lambdas:
    base          plain SAC / TD3, all 0
    pave          those that the script takes for the env, or those in --flags
    untuned       0.1, 0.1, 0.01, where the paper's search starts
    auto          --autotune-curv: 0.1, 0.0005, and lambda_curv finds itself
    caps          all 0: benchmarks.caps, the policy-side rival
    filter        all 0: the actions are low-pass filtered, benchmarks.envs:filter/<env>
    penalty       all 0: the reward punishes a change of the action, benchmarks.envs:penalty/<env>
    filter+pave   both
    ablation-ijk  i, j, k = 1 keeps pave's lambda of MPR, VFC, Curv, 0 drops it; `ablation` is all eight

The other tools name a run by its settings: ablation-111 is pave to them, 000 base; pave is untuned on an env without
tuned lambdas, and own with lambdas in --flags.

--warm-start: each run begins with the agent and the replay of a finished run of its own script, env and seed, the one
that the pattern finds, for --steps more. Settings are the source's, but for the method's and those in --flags. Such
cells are named then-base, then-pave, ...; then-base is the control, which just goes on.

Presets are the paper's settings as far as flags go. Not matched: for paper-td3, hidden layers of 400-300 (256-256
here); for paper-sac, 50 updates after every 50 steps (one after each here).
"""

import fcntl
import glob
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from benchmarks import caps, common, evaluate
from benchmarks.common import ROOT, SCRIPTS, UserError, read_json, require

ALGORITHMS = {name.partition("_")[0]: script for name, script in SCRIPTS.items()}  # "sac" and "td3"
ABLATION = {f"ablation-{mask:03b}": f"{mask:03b}" for mask in range(8)}
KEPT = {"base": "000", "caps": "000", "pave": "111", "auto": "111"} | ABLATION  # 0: that lambda is switched off
KEPT |= {"filter": "000", "penalty": "000", "filter+pave": "111"}
WRAPPED = {"filter": "filter", "penalty": "penalty", "filter+pave": "filter"}  # methods whose env is one of envs.py's
STEPS = {"Pendulum": 100_000, "LunarLanderContinuous": 500_000, "Reacher": 500_000}  # the paper's; else a million
PRESETS = {
    "paper-td3": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 256 --gamma {gamma} --learning-starts 10000 "
    "--exploration-noise 0.1 --policy-frequency 2 --buffer-size {buffer_size}",
    "paper-sac": "--policy-lr 1e-3 --q-lr 1e-3 --batch-size 100 --gamma 0.99 --learning-starts 10000 --no-autotune "
    "--alpha 0.2 --buffer-size 1000000",
}
SHORT_ENVS = ("Pendulum", "LunarLanderContinuous")  # where the paper's TD3 differs
CELL_FLAGS = {"--env-id", "--seed", "--total-timesteps", "--output-dir", "--resume", "--warm-start", "--autotune-curv"}


@dataclass
class Args:
    scripts: tuple[Literal["sac", "td3"], ...] = ()  # default: the preset's own, or both
    preset: Literal["paper-td3", "paper-sac"] | None = None  # settings to start from; None: the script's defaults
    envs: tuple[str, ...] = ("Pendulum-v1",)  # Gymnasium ids
    methods: tuple[Literal["ablation", "untuned", *KEPT], ...] = ("base", "pave")  # see above
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run of each method for each
    steps: int | None = None  # env steps a run, after a warm start more; None: the paper's, or 1,000,000
    warm_start: str = ""  # glob of finished cells or run folders to begin from, one for each script, env and seed
    flags: str = ""  # flags for every run, in one string
    episodes: int = 10  # of the evaluation of a finished run
    name: str = ""  # ends the cells' names, so that other flags for the same envs and methods can stand beside them
    grid: Path | None = None  # TOML file of [[grid]] tables of these flags; what one lacks is as on the command line
    only: str = ""  # regular expression: only the cells whose folder's name it is found in
    output_dir: Path = Path("runs/sweep")  # where the cells are
    jobs: int | None = None  # runs at a time on this machine; GPUs take turns. None: one a GPU, or else one a CPU core
    address: str | None = None  # Ray cluster to run on, see benchmarks/README.md; auto: this machine's
    cpus_per_run: int = 1  # CPU threads of a run, and the cores that Ray reserves for it
    gpus_per_run: float = 0.0  # that Ray reserves for a run; 0.5: two share one
    dry_run: bool = False  # show how far each cell is, and its command, to copy; train nothing


class Source(NamedTuple):
    """A finished run that others begin from."""

    path: Path  # its checkpoint.pt
    script: str
    origin: dict  # what they tell of it, see the scripts' origin_of

    @property
    def args(self) -> dict:
        return self.origin["args"]


class Cell(NamedTuple):
    folder: Path
    about: dict  # what cell.json says of it: algorithm, method, env_id, seed, steps, command
    flags: list[str]  # of the training
    settings: dict  # what a training must have been given to be this cell's
    episodes: int  # of its evaluation
    warm_start: str  # pattern that finds its source; "": it begins from scratch
    source: Source | None = None  # where it begins, once that is found

    @property
    def script(self):
        return ALGORITHMS[self.about["algorithm"]]


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


def settings_given(algorithm: str, method: str, flags: list[str], source: Source | None = None) -> dict:
    """All settings of a training with these flags, which change those of the script or, after a warm start, the source.

    UserError where the script refuses them.
    """
    script, is_caps = ALGORITHMS[algorithm], method.endswith("caps")
    kind = caps.with_caps(script)[0] if is_caps else script.Args
    default = kind()
    if source:
        unknown = source.args.keys() - asdict(default)
        require(not unknown, f"{method} can't begin from {source.path}, which has {', '.join(sorted(unknown))}")
        lambdas = dict.fromkeys(script.LAMBDAS)  # looked up, as for a new run
        default = replace(default, **source.args | lambdas | {"warm_start": str(source.path), "resume": None})
    args = tyro.cli(kind, args=flags, default=default, prog=script.SCRIPT)
    return asdict(script.validate(caps.validate(args) if is_caps else args))


def wrapped(env_id: str, namespace: str) -> str:
    """filter/ENV of envs.py; where an env has a module, that module has registered it."""
    module, _, name = env_id.rpartition(":")
    return f"{module or 'benchmarks.envs'}:{namespace}/{name}"


def make_cell(grid: Args, algorithm: str, method: str, env_id: str, seed: int) -> Cell:
    script = ALGORITHMS[algorithm]
    env = script.env_name(env_id)
    gamma, buffer_size = (0.98, 200_000) if env in SHORT_ENVS else (0.99, 1_000_000)
    preset = PRESETS.get(grid.preset, "").format(gamma=gamma, buffer_size=buffer_size)
    steps = STEPS.get(env, 1_000_000) if grid.steps is None else grid.steps
    trained_in = wrapped(env_id, WRAPPED[method]) if method in WRAPPED else env_id
    flags = ["--env-id", trained_in, "--seed", str(seed), "--total-timesteps", str(steps)]
    flags += shlex.split(f"{preset} {grid.flags}")
    if method == "auto":
        flags.append("--autotune-curv")
    elif grid.warm_start:
        flags.append("--no-autotune-curv")  # whatever the source did
    for i, name in enumerate(script.LAMBDAS):
        if method == "untuned":
            flags += [f"--{name.replace('_', '-')}", str(script.UNTUNED_LAMBDAS[i])]
        elif KEPT[method][i] == "0":
            flags += [f"--{name.replace('_', '-')}", "0"]
    program = ["-m", "benchmarks.caps", script.SCRIPT] if method == "caps" else [f"{script.SCRIPT}.py"]
    method = "then-" * bool(grid.warm_start) + method
    name = f"{env_id}__{algorithm}__{method}__{seed}__{steps}" + f"__{grid.name}" * bool(grid.name)
    folder = grid.output_dir.resolve() / re.sub(r"[^A-Za-z0-9_.+-]", "-", name)
    command = shlex.join(["python", *program, *flags, "--output-dir", str(folder)])
    about = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": steps}
    about["command"] = command
    return Cell(folder, about, flags, settings_given(algorithm, method, flags), grid.episodes, grid.warm_start)


def find_sources(pattern: str) -> list[Source]:
    """The finished runs in what the glob finds, cells or run folders."""
    sources = []
    for found in sorted(map(Path, glob.glob(pattern))):
        for path in sorted({*found.glob("checkpoint.pt"), *found.glob("*__*__*__*/checkpoint.pt")}):
            if (path.parent / "summary.json").is_file():
                saved = read_checkpoint(path)
                require(saved is not None, f"--warm-start: {path} is damaged, or of an older version")
                origin = {"run": path.resolve().parent.name, "step": saved["step"], "args": saved["args"]}
                sources.append(Source(path.resolve(), saved["script"], origin | {"origin": saved["origin"]}))
    return sources


def begin_from(cell: Cell, sources: list[Source]) -> Cell:
    """The cell, with its source; UserError where there is none, or more than one."""
    about, wanted = cell.about, [cell.script.SCRIPT, cell.about["env_id"], cell.about["seed"]]
    fitting = [source for source in sources if [source.script, source.args["env_id"], source.args["seed"]] == wanted]
    folders = ", ".join(str(source.path.parent) for source in fitting) or "none"
    wanted = f"one finished run of {about['algorithm']}, {about['env_id']}, seed {about['seed']}"
    require(len(fitting) == 1, f"--warm-start {cell.warm_start} must find {wanted}; it finds {folders}")
    (source,) = fitting
    command = f"{about['command']} {shlex.join(['--warm-start', str(source.path)])}"
    settings = settings_given(about["algorithm"], about["method"], cell.flags, source)
    return cell._replace(about=about | {"command": command}, settings=settings, source=source)


def make_cells(args: Args) -> list[Cell]:
    """Every cell of the grids, once; UserError where they make no sense."""
    cells = {}
    for grid in read_grids(args):
        algorithms = grid.scripts or ([grid.preset.removeprefix("paper-")] if grid.preset else ALGORITHMS)
        flags = {word.partition("=")[0].replace("_", "-") for word in shlex.split(grid.flags)}
        taken = CELL_FLAGS & flags
        require(not taken, f"--flags has {', '.join(sorted(taken))}: the sweep sets that itself")
        methods = [name for method in grid.methods for name in (ABLATION if method == "ablation" else (method,))]
        if grid.warm_start:
            require(grid.steps is not None, "--warm-start needs --steps: how many more")
            own = not grid.preset and "--learning-starts" not in flags
            require(own, "--warm-start: no --preset and no --learning-starts, settings are the source's")
            other = WRAPPED.keys() & methods
            require(not other, f"--warm-start: {', '.join(other)} need another env than the source's")
        for env_id, seed, algorithm, method in itertools.product(grid.envs, grid.seeds, algorithms, methods):
            cell = make_cell(grid, algorithm, method, env_id, seed)
            same = cells.setdefault(cell.folder.name, cell) == cell
            require(same, f"two grids want {cell.folder.name} with different flags: give one of them a name")
    try:
        chosen = [cell for name, cell in cells.items() if re.search(args.only, name)]
    except re.error as error:
        raise UserError(f"--only {args.only} is no regular expression ({error})") from error
    require(len(chosen) > 0, f"no cell is left of {len(cells)}: give envs, methods and seeds, and an --only that fits")
    sources = {pattern: find_sources(pattern) for pattern in {cell.warm_start for cell in chosen} - {""}}
    return [begin_from(cell, sources[cell.warm_start]) if cell.warm_start else cell for cell in chosen]


# ------------------------------------------------------------------------------------------------------- one cell


class State(NamedTuple):
    """How far a cell is."""

    step: int = 0  # that is saved
    run: Path | None = None  # the run to go on with
    finished: bool = False  # it has its summary


def read_checkpoint(path: Path) -> dict | None:
    """A checkpoint.pt without its replay, of which mmap reads nothing; None where there is none, or half of one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: saved.get(name) for name in ("script", "args", "step", "origin")}
    except Exception:
        return None


def inspect(cell: Cell) -> State:
    """The cell's run that came furthest; UserError where one was trained otherwise than the cell asks."""
    furthest = State()
    for run in sorted(cell.folder.glob("*__*__*__*/"), reverse=True):  # the newest first: names end in the time
        summary = read_json(run / "summary.json")
        if summary:  # a finished run needs no checkpoint, which people delete: it has the replay buffer
            names = {field.name for field in fields(caps.with_caps(cell.script)[0])}
            args = {name: value for name, value in summary.items() if name in names}
            state = State(summary["steps"], run, True)
            origin = summary.get("origin")
        else:
            saved = read_checkpoint(run / "checkpoint.pt")
            if not saved:
                continue
            args, origin, state = saved["args"], saved["origin"], State(saved["step"], run)
        check_settings(cell, args, origin)
        furthest = max(furthest, state, key=lambda state: (state.finished, state.step))
    return furthest


def check_settings(cell: Cell, args: dict, origin: dict | None) -> None:
    """UserError where a run with these settings and this origin is none of the cell's."""
    script, other = cell.script, []
    for name in sorted({*cell.settings, *args} - script.FREE_SETTINGS):
        default = getattr(script.Args(), name, None)  # of a flag that one of them does not have
        trained, wanted = args.get(name, default), cell.settings.get(name, default)
        if trained != wanted:
            other.append(f"{name} {trained} instead of {wanted}")
    source = cell.source.origin if cell.source else None
    if common.identity(script, args, origin) != common.identity(script, args, source):
        began = [f"step {found['step']:,} of {found['run']}" if found else "scratch" for found in (origin, source)]
        other.append(" instead of ".join(f"a start from {start}" for start in began))
    require(not other, f"was trained with {', '.join(other)}: ask for that, or give the grid another --name")


def resume_command(cell: Cell, run: Path) -> list[str]:
    """The cell's command, but to go on with the run, which knows where it began."""
    words = shlex.split(cell.about["command"])
    if cell.source:
        place = words.index("--warm-start")
        del words[place : place + 2]
    return [*words, "--resume", str(run / "checkpoint.pt")]


def open_stretch(cell: Cell, state: State) -> None:
    """Note in cell.json that a training begins here and now; a run that begins anew has a list of its own."""
    stretches = read_json(cell.folder / "cell.json").get("stretches", []) if state.run else []
    stretches.append({"from": state.step, "to": None, "wall_seconds": None} | common.machine())
    write_cell(cell, stretches)


def close_stretch(cell: Cell, state: State, seconds: float | None = None) -> None:
    """Note how far the last stretch came, and in which time, unless that is noted already."""
    stretches = read_json(cell.folder / "cell.json").get("stretches", [])
    if stretches and stretches[-1]["to"] is None:
        stretches[-1] |= {"to": state.step, "wall_seconds": seconds and round(seconds, 1)}
        write_cell(cell, stretches)


def write_cell(cell: Cell, stretches: list[dict]) -> None:
    """cell.json; its wall_seconds are those of the whole training, None where a stretch was killed."""
    seconds = [stretch["wall_seconds"] for stretch in stretches]
    total = None if None in seconds else round(sum(seconds), 1)
    about = cell.about | {"wall_seconds": total, "stretches": stretches}
    partial = cell.folder / "cell.json.partial"
    partial.write_text(json.dumps(about, indent=2) + "\n")
    partial.replace(cell.folder / "cell.json")  # whole, also if the sweep is killed here


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
            state, told = inspect(cell), "already finished"
            close_stretch(cell, state)  # of a sweep that was killed
            if not state.finished:
                command = resume_command(cell, state.run) if state.run else shlex.split(cell.about["command"])
                open_stretch(cell, state)
                began = time.time()
                try:
                    execute(*command[1:])
                finally:
                    seconds = time.time() - began
                    state, begun = inspect(cell), state.step
                    close_stretch(cell, state, seconds)
                require(state.finished, f"no finished run came of it ({log_path})")
                told = f"{steps - begun:,} steps in {seconds:,.0f} s"
            evaluation = read_json(state.run / "evaluation.json")
            if (evaluation.get("version"), evaluation.get("step")) == (evaluate.VERSION, steps):
                return "done", told
            if not (state.run / "checkpoint.pt").is_file():
                return "done", f"{told}, but not evaluated: there is no checkpoint.pt"
            execute("-m", "benchmarks.evaluate", state.run, "--episodes", cell.episodes)
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
                told = f"step {inspect(cell).step:,} of {cell.about['steps']:,}"
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
