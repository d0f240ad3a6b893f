"""benchmarks/sweep.py and caps.py: what is run, what is not run again, and what happens when something goes wrong."""

import csv
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helper_programs import errors_of
from helper_runs import BASE, make_run
from torch.nn.utils import parameters_to_vector

import sac_pave_continuous as sac
import td3_pave_continuous as td3
from benchmarks import caps, evaluate, report, sweep
from benchmarks.common import USER_ERRORS, load_run, method_of, read_json

# ---------------------------------------------------------------------------------------------------------- CAPS


def test_caps_adds_its_two_terms_to_the_actor_loss():
    settings, agent_class = caps.with_caps(sac)
    torch.manual_seed(0)
    agent = agent_class(3, 2, caps.validate(settings(env_id="Pendulum-v1", compile=False)), torch.device("cpu"))
    s, next_s, a, noise = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8, 2) * 2 - 1, torch.randn(8, 2)
    batch, near = sac.Batch(s, next_s, a, torch.randn(8), torch.zeros(8)), 0.2 * torch.randn(8, 3)
    agent.caps_noise = near
    loss, _ = agent.actor_loss(batch, noise)
    here, there, beside = agent.actor(s), agent.actor(next_s), agent.actor(s + near)
    terms = 0.5 * ((here - there) ** 2).sum() / 16 + 5 * 0.5 * ((here - beside) ** 2).sum() / 16
    losses = loss, sac.Agent.actor_loss(agent, batch, noise)[0] + terms
    gradients = [parameters_to_vector(torch.autograd.grad(loss, agent.actor.parameters())) for loss in losses]
    assert terms > 0 and torch.allclose(*gradients, atol=1e-6)


def test_caps_trains_resumes_and_without_weights_is_the_plain_algorithm(script, small_args, monkeypatch):
    plain = small_args(eval_episodes=0, learning_starts=195, total_timesteps=210, **BASE)
    settings, agent_class = caps.with_caps(script)

    def train(**changes):
        return script.train(caps.validate(settings(**vars(plain) | changes)), agent_class)

    def resume(run):
        flags = ["--resume", str(run / "checkpoint.pt"), "--total-timesteps", "210"]
        monkeypatch.setattr(sys, "argv", ["caps", script.SCRIPT, *flags])
        caps.main()

    def same(*runs):
        first, second = (torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in runs)
        return all(torch.equal(value, second[name]) for name, value in first.items())

    base, whole, part = script.train(plain), train(caps_spatial=3.0), train(caps_spatial=3.0, total_timesteps=200)
    (part / "summary.json").unlink()  # as if it had been stopped
    assert same(train(caps_temporal=0.0, caps_spatial=0.0), base) and not same(whole, base)
    resume(part)
    run = load_run(part)  # recognised by its own files
    assert same(part, whole) and (run.method, run.args.caps_temporal, run.args.caps_spatial) == ("caps", 1.0, 3.0)
    with pytest.raises(USER_ERRORS, match="no CAPS run"):
        resume(base)


def test_compiled_caps_draws_the_same_noise_as_eager():
    settings, agent_class = caps.with_caps(td3)
    states = []
    for compile in (False, True):
        torch.manual_seed(0)
        args = caps.validate(settings(env_id="Pendulum-v1", compile=compile, batch_size=8))
        agent = agent_class(3, 2, args, torch.device("cpu"))
        for step in range(4):
            torch.manual_seed(step)
            batch = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8, 2), torch.randn(8), torch.zeros(8)
            agent.update(batch, step % 2 == 1)
        states.append(agent.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_caps_settings():
    settings, _ = caps.with_caps(td3)
    hopper = caps.validate(settings(env_id="Hopper-v5", caps_spatial=0.0))
    assert (hopper.caps_temporal, hopper.caps_spatial, hopper.caps_sigma) == (0.1, 0.0, 0.2)
    for changes, message in (({"caps_sigma": -1.0}, "caps-sigma"), ({"lambda_curv": 1.0}, "lambda")):
        with pytest.raises(USER_ERRORS, match=message):
            caps.validate(settings(**changes))


# ------------------------------------------------------------------------------------------------------ the grid


def cells(**changes) -> dict[str, sweep.Cell]:
    return {cell.folder.name: cell for cell in sweep.make_cells(sweep.Args(**changes))}


def test_grid(tmp_path):
    grid = cells(envs=("Pendulum-v1", "a_module:Robot-v0"), methods=("base", "ablation"), seeds=(1, 2))
    assert len(grid) == 2 * 2 * 2 * 9 and "a_module-Robot-v0__sac__ablation-101__2__1000000" in grid
    steps = [cell.about["steps"] for cell in grid.values()]
    assert (steps[0], steps[-1]) == (100_000, 1_000_000)
    methods = ("base", "pave", "ablation-100", "untuned", "auto", "caps", "filter", "penalty", "filter+pave")
    paper = cells(preset="paper-td3", methods=methods, seeds=(3,))
    assert [method_of(td3, cell.settings) for cell in paper.values()] == [*methods]  # as the runs call themselves
    command = paper["Pendulum-v1__td3__caps__3__100000"].about["command"]
    assert command.startswith("python -m benchmarks.caps td3_pave_continuous --env-id Pendulum-v1 --seed 3 ")
    filtered = paper["Pendulum-v1__td3__filter+pave__3__100000"].settings
    assert [filtered[name] for name in td3.LAMBDAS] == [2, 0.005, 2] and filtered[
        "env_id"
    ] == "benchmarks.envs:filter/Pendulum-v1"
    (own,) = cells(envs=("a_module:Robot-v0",), methods=("penalty",), seeds=(1,), scripts=("sac",)).values()
    assert own.settings["env_id"] == "a_module:penalty/Robot-v0" and own.about["env_id"] == "a_module:Robot-v0"

    file = tmp_path / "grid.toml"
    file.write_text('[[grid]]\npreset = "paper-td3"\nseeds = [7]\n[[grid]]\nenvs = ["Hopper-v5"]\nscripts = ["sac"]\n')
    both = cells(grid=file, methods=("pave",), seeds=(1,), flags="--tau 0.1")
    assert list(both) == ["Pendulum-v1__td3__pave__7__100000", "Hopper-v5__sac__pave__1__1000000"]
    assert {cell.settings["tau"] for cell in both.values()} == {0.1}
    assert list(cells(grid=file, only="Hopper.*__5__", methods=("pave",))) == ["Hopper-v5__sac__pave__5__1000000"]
    file.write_text('[[grid]]\nseeds = [1]\n[[grid]]\nseeds = [1]\nname = "own"\nflags = "--tau 0.1"\n')
    named = cells(grid=file, scripts=("td3",), methods=("base",))  # side by side, with different settings
    assert list(named) == ["Pendulum-v1__td3__base__1__100000", "Pendulum-v1__td3__base__1__100000__own"]


def test_every_reported_run_is_one_of_results_toml():
    """With the same settings: who trains that grid gets these runs; warm starts, and what stands beside them, are in
    finish.toml."""

    def training(cell_settings, script):
        return {name: value for name, value in cell_settings.items() if name not in script.FREE_SETTINGS}

    grid = [training(cell.settings, cell.script) for cell in cells(grid=ROOT / "benchmarks/results.toml").values()]
    finishes = tomllib.loads((ROOT / "benchmarks/finish.toml").read_text())["grid"]
    for table in finishes:
        if "warm_start" not in table:
            (algorithm,), (env_id,), steps = table["scripts"], table["envs"], str(table["steps"])
            for method, seed in itertools.product(table["methods"], table["seeds"]):
                flags = ["--env-id", env_id, "--seed", str(seed), "--total-timesteps", steps, *table["flags"].split()]
                settings = sweep.settings_given(algorithm, method, flags)
                grid.append(training(settings, sweep.ALGORITHMS[algorithm]))
    for row in csv.DictReader((ROOT / "benchmarks/results/report/runs.csv").open(newline="")):
        if row["origin"]:  # a warm start: its settings are its source's, but for these
            assert "--warm-start" in row["command"]
            steps, method = int(row["steps"]), row["method"].rpartition("-then-")[2]
            finish = {"scripts": [row["algorithm"]], "envs": [row["env_id"]], "steps": steps}
            tables = [table for table in finishes if finish.items() <= table.items()]
            assert any(method in table["methods"] and int(row["seed"]) in table["seeds"] for table in tables)
            continue
        command = re.sub("benchmarks.(scaled|sparse)_rewards:", "benchmarks.envs:", row["command"])  # as they once were
        flags = shlex.split(command.partition("_pave_continuous")[2].removeprefix(".py"))
        settings = sweep.settings_given(row["algorithm"], row["method"], flags)
        assert training(settings, sweep.ALGORITHMS[row["algorithm"]]) in grid, row["command"]


BAD_INPUT = {
    "--flags='--seed 3'": "--flags has --seed", "--flags='--no-such-flag 3'": "no-such-flag",
    "--flags='--gamma 3'": "gamma is 3", "--seeds": "no cell is left of 0", "--jobs -1": "--jobs",
    "--only (": "--only ( is no regular expression", "--address auto": "pip install ray",
    "[[grid]]\nseeds = ['x']": "seeds", "grid = 3": "no TOML file",
    "[[grid]]\n[[grid]]\nflags = '--tau 0.1'": "two grids want",
    "--warm-start x": "--warm-start needs --steps", "--warm-start x --steps 9 --methods filter": "another env",
    "--warm-start x --steps 9 --preset paper-td3": "no --preset",
    "--warm-start x --steps 9 --flags='--learning-starts 9'": "no --learning-starts",
    "--warm-start x --steps 9": "must find one finished run of sac, Pendulum-v1, seed 1; it finds none",
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT.items())
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch):
    """Or tyro's box, where it takes no such flag or value."""
    (tmp_path / "grid.toml").write_text(flags)
    words = shlex.split(flags) if flags.startswith("--") else ["--grid", "grid.toml"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    error = errors_of("benchmarks.sweep", *words)
    one_line = error.startswith("error: ") and error.count("\n") == 1
    assert message in error and (one_line or "For full helptext" in error)


# --------------------------------------------------------------------------------------------- cells on the disk


def arguments(folder, flags="", **changes):
    flags = f"--no-compile --learning-starts 50 --batch-size 8 --eval-episodes 1 --buffer-size 1000 {flags}"
    settings = {"scripts": ("td3",), "methods": ("base",), "seeds": (1,), "jobs": 2, "steps": 300} | changes
    return sweep.Args(output_dir=folder, flags=flags, **settings)


def played(cell: sweep.Cell, code: str) -> sweep.Cell:
    """The cell with Python code in place of the training."""
    return cell._replace(about=cell.about | {"command": shlex.join(["python", "-c", code])})


def rewrite(file, **changes):
    """Change what a JSON file says."""
    file.write_text(json.dumps(read_json(file) | changes))


def rewrite_checkpoint(run, **changes):
    torch.save(torch.load(run / "checkpoint.pt", weights_only=True) | changes, run / "checkpoint.pt")


def untrained(folder, method, **settings):
    """A run of arguments(folder), not trained, but it says that it is finished and evaluated."""
    made = make_run(folder / f"Pendulum-v1__td3__{method}__1__300", td3, learning_starts=50, **settings)
    rewrite(made / "evaluation.json", **evaluate.about(300, 10))
    return made.rename(f"{made}__1000")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


def outcome(capsys, *parts, **changes):
    """What the sweep says of its only cell, which it gets done."""
    capsys.readouterr()
    sweep.main(arguments(*parts, **changes))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1/1 done ") and lines[1:] == ["1 of 1 runs are finished"]
    assert not list(parts[0].glob(".stop*"))
    return lines[0].partition("  ")[2]


@pytest.fixture
def run(tmp_path):
    return untrained(tmp_path, "base", **BASE)


def test_what_is_left_to_do_for_a_cell(run, tmp_path, capsys):
    def look(flags="", folder=tmp_path, **changes):
        """Step and folder of the run to go on with, and whether it is finished; or what is wrong."""
        try:
            return sweep.inspect(sweep.make_cells(arguments(folder, flags, **changes))[0])
        except USER_ERRORS as error:
            return str(error)

    nothing, finished = (0, None, False), (300, run, True)
    assert look(folder=tmp_path / "nowhere") == nothing and look() == finished
    assert look(steps=400) == nothing == look(steps=50)  # other cells
    assert look("--checkpoint-interval 7 --no-cuda --eval-interval 7") == finished  # these are no matter
    assert "gamma 0.99 instead of 0.5" in look("--gamma 0.5")
    rewrite(run / "summary.json", a_flag_since_removed=3)
    assert look() == finished
    for flags, words in (("", "step 300 of 300\n    python td3_pave"), ("--gamma 0.5", "was trained with gamma 0.99")):
        sweep.main(arguments(tmp_path, flags, dry_run=True))
        assert f"Pendulum-v1__td3__base__1__300: {words}" in capsys.readouterr().out

    summary = (run / "summary.json").rename(tmp_path / "summary.json")
    assert look() == (300, run, False)  # killed before the summary
    assert "gamma" in look("--gamma 0.5")
    newer = shutil.copytree(run, run.with_name(f"{run.name}9"))
    rewrite_checkpoint(newer, step=200)
    assert look() == (300, run, False)  # the furthest
    rewrite_checkpoint(newer, origin={"run": "R", "step": 70, "args": vars(td3.Args()), "origin": None})
    assert "a start from step 70 of R instead of a start from scratch" in look()
    (newer / "checkpoint.pt").write_bytes(b"half")
    assert look() == (300, run, False)
    summary.rename(newer / "summary.json")
    assert look() == (300, newer, True)  # finished: it needs no checkpoint, which people delete
    (newer / "summary.json").unlink()
    (run / "checkpoint.pt").unlink()
    assert look() == nothing

    auto = untrained(tmp_path, "auto", autotune_curv=True)
    assert look(methods=("auto",)) == (300, auto, True)


def test_a_look_reads_no_replay(run, tmp_path, monkeypatch):
    """Of a checkpoint of gigabytes: torch maps the file, and nobody touches the pages."""
    (run / "summary.json").unlink()
    load, asked = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *parts, **options: asked.append(options["mmap"]) or load(*parts, **options)
    )
    sweep.main(arguments(tmp_path, dry_run=True))
    assert asked == [True]


def test_a_sweep_trains_evaluates_and_removes_nothing_and_the_report_has_it(run, tmp_path, capsys):
    (run / "checkpoint.pt").unlink()
    (run / "summary.json").unlink()  # as of a run that diverged before its first checkpoint
    before = files(tmp_path)
    assert re.fullmatch("300 steps in .* s, evaluated", outcome(capsys, tmp_path, episodes=1))
    assert before.items() <= files(tmp_path).items()
    (new,) = {path.parent for path in run.parent.glob("*/summary.json")}
    evaluation, about = read_json(new / "evaluation.json"), read_json(run.parent / "cell.json")
    assert evaluate.about(300, 1).items() <= evaluation.items()
    cell = {"algorithm": "td3", "method": "base", "env_id": "Pendulum-v1", "seed": 1, "steps": 300}
    assert cell.items() <= about.items() and "--seed 1" in about["command"]
    (stretch,) = about["stretches"]
    assert {"from": 0, "to": 300, "torch": torch.__version__}.items() <= stretch.items() and "cores" in stretch[
        "machine"
    ]
    assert stretch["wall_seconds"] == about["wall_seconds"] > 0
    report.main(report.Args((tmp_path,), tmp_path / "report"))
    (row,) = [row for row in csv.DictReader((tmp_path / "report/runs.csv").open()) if not row["missing"]]
    assert {name: row[name] for name in cell} == {name: str(value) for name, value in cell.items()}
    assert float(row["return_mean"]) == pytest.approx(evaluation["return_mean"], rel=1e-5)
    assert float(row["wall_seconds"]) > 0 and row["torch"] == torch.__version__

    rewrite(new / "evaluation.json", **evaluate.about(300, 30))  # the user's own number of episodes
    (new / "checkpoint.pt").unlink()  # it holds the replay buffer, so people do
    before = files(tmp_path)
    assert outcome(capsys, tmp_path) == "already finished" and files(tmp_path) == before
    (new / "evaluation.json").unlink()
    assert outcome(capsys, tmp_path) == "already finished, but not evaluated: there is no checkpoint.pt"


def test_a_killed_training_goes_on_and_cell_json_tells_its_stretches(run, tmp_path, capsys):
    """After its last checkpoint and before its summary, and its sweep, too."""
    (run / "summary.json").unlink()
    (run / "evaluation.json").unlink()
    first = {"from": 0, "to": None, "wall_seconds": None, "machine": "another", "torch": "2.0", "commit": "c"}
    (run.parent / "cell.json").write_text(json.dumps({"stretches": [first]}))
    assert re.fullmatch("0 steps in .* s, evaluated", outcome(capsys, tmp_path, episodes=1))
    about = read_json(run.parent / "cell.json")
    assert about["stretches"][0] == first | {"to": 300} and about["wall_seconds"] is None  # nobody knows how long
    assert [about["stretches"][1][name] for name in ("from", "to", "torch")] == [300, 300, torch.__version__]
    assert read_json(run / "summary.json")["steps"] == 300 and len(list(run.parent.glob("*__*__*__*/"))) == 1


def test_a_stopped_training_tells_how_far_it_came(run, tmp_path, monkeypatch):
    """And one that begins anew, having no checkpoint, has a list of its own."""
    (run / "summary.json").unlink()
    (cell,) = sweep.make_cells(arguments(tmp_path))
    checkpoint = run / "checkpoint.pt"
    rewrite_checkpoint(run, step=120)
    code = (
        f"import torch; c = {str(checkpoint)!r}; torch.save(torch.load(c) | {{'step': 180}}, c); raise SystemExit(143)"
    )
    monkeypatch.setattr(sweep, "resume_command", lambda cell, run: shlex.split(played(cell, code).about["command"]))
    assert sweep.run_cell(cell, 1, tmp_path / "stop")[0] == "failed"
    (stretch,) = read_json(run.parent / "cell.json")["stretches"]
    assert (stretch["from"], stretch["to"]) == (120, 180) and stretch["wall_seconds"] > 0
    checkpoint.unlink()
    sweep.run_cell(played(cell, "raise SystemExit(1)"), 1, tmp_path / "stop")
    (stretch,) = read_json(run.parent / "cell.json")["stretches"]
    assert (stretch["from"], stretch["to"]) == (0, 0)


def test_a_warm_start_begins_from_the_agent_of_its_own_seed(tmp_path, capsys):
    """Whatever lambdas the source had, in a run of its own that a second call leaves alone; it can be resumed."""
    tiny = {"total_timesteps": 60, "learning_starts": 50, "batch_size": 8, "buffer_size": 100, "eval_episodes": 0}
    tiny |= {"env_id": "Pendulum-v1", "gamma": 0.9, "autotune_curv": True, "compile": False}
    sources = {}
    for seed in (1, 2):
        cell = tmp_path / f"Pendulum-v1__td3__auto__{seed}__60"
        sources[seed] = td3.train(td3.Args(**tiny, seed=seed, output_dir=str(cell)))
        (cell / "Pendulum-v1__td3_pave_continuous__1__0").mkdir()  # one that came to nothing
    before, pattern = files(tmp_path), f"{tmp_path}/*auto*"
    args = sweep.Args(("td3",), seeds=(1, 2), methods=("base", "pave", "auto", "caps"), steps=30, warm_start=pattern)
    args.output_dir, args.jobs = tmp_path / "finish", 1
    made = {cell.folder.name: cell for cell in sweep.make_cells(args)}
    lambdas = {"base": (0, 0, 0), "pave": (2, 0.005, 2), "auto": (0.1, 0.0005, 0.01), "caps": (0, 0, 0)}
    for seed, method in itertools.product(sources, lambdas):
        cell = made[f"Pendulum-v1__td3__then-{method}__{seed}__30"]
        assert tuple(cell.settings[name] for name in td3.LAMBDAS) == lambdas[method]
        assert cell.settings["gamma"] == 0.9 and cell.settings["autotune_curv"] == (method == "auto")
        assert f"--warm-start {sources[seed]}/checkpoint.pt" in cell.about["command"]

    args.only, args.episodes = "then-caps__2", 1
    sweep.main(args)
    assert "1 of 1 runs are finished" in capsys.readouterr().out and before.items() <= files(tmp_path).items()
    (folder,) = (args.output_dir / "Pendulum-v1__td3__then-caps__2__30").glob("*__*__*__*/")
    summary = read_json(folder / "summary.json")
    assert (summary["steps"], summary["seed"], summary["caps_temporal"]) == (30, 2, 1.0)
    assert (summary["origin"]["run"], summary["origin"]["step"]) == (sources[2].name, 60)
    (folder / "summary.json").unlink()  # as if it had been killed just before
    sweep.main(args)
    resumed = read_json(folder / "summary.json")
    assert resumed == summary | {"resume": str(folder / "checkpoint.pt"), "steps_per_second": 0.0}
    before = files(args.output_dir)
    sweep.main(args)
    assert "1/1 done Pendulum-v1__td3__then-caps__2__30  already finished" in capsys.readouterr().out
    assert files(args.output_dir) == before

    shutil.copytree(sources[2], f"{sources[2]}9")
    with pytest.raises(USER_ERRORS, match=f"one finished run of td3, Pendulum-v1, seed 2; it finds {sources[2]}, .*9$"):
        sweep.make_cells(args)
    shutil.rmtree(sources[2])  # what is left has the same settings and step: it is the same source
    assert sweep.inspect(sweep.make_cells(args)[0]).finished
    rewrite_checkpoint(Path(f"{sources[2]}9"), step=50)
    with pytest.raises(USER_ERRORS, match=rf"step 60 of {sources[2].name} instead of a start from step 50 of .*9:"):
        sweep.inspect(sweep.make_cells(args)[0])


def test_one_failure_does_not_stop_the_rest(run, tmp_path, monkeypatch, capsys):
    """A training that fails, a look that does, and a cell that another sweep trains, which isn't even looked at."""
    finished, fails, *others = sweep.make_cells(arguments(tmp_path, seeds=(1, 2, 3, 4)))
    others = [cell._replace(about={"steps": 300}) for cell in others]  # a look at them is a KeyError
    cells = [played(fails, "raise SystemExit('the cause')"), *others, finished]
    monkeypatch.setattr(sweep, "make_cells", lambda args: cells)
    others[1].folder.mkdir()
    with open(others[1].folder / "log.txt", "a") as log, pytest.raises(SystemExit, match="1"):
        fcntl.flock(log, fcntl.LOCK_EX)
        sweep.main(arguments(tmp_path, jobs=1))
    name, out = "Pendulum-v1__td3__base__", capsys.readouterr().out.splitlines()
    assert out[0] == f"1/4 failed {name}2__300  exit code 1: the cause ({fails.folder}/log.txt)"
    assert out[1] == f"2/4 failed {name}3__300  KeyError('command')"
    assert out[2].startswith(f"3/4 failed {name}4__300  another process is training it")
    assert out[3] == f"4/4 done {name}1__300  already finished"
    assert out[4:] == [f"1 of 4 runs are finished; these failed: {name}2__300, {name}3__300, {name}4__300"]


# ----------------------------------------------------------------------------------------------- GPUs, stops, Ray


@pytest.fixture
def address(request):
    """None, or that of a Ray cluster of one node on this machine, which says that it has a GPU."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    if request.param:
        ray = pytest.importorskip("ray", reason="tests/requirements.txt has no Ray for this Python")
        from ray.cluster_utils import Cluster

        cluster = Cluster(True, head_node_args={"num_cpus": 4, "num_gpus": 1, "include_dashboard": False})
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()
    else:
        yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


RUNS = [(None, signal.SIGTERM, "35"), (None, signal.SIGINT, "35"), ("ray", signal.SIGTERM, "00")]


@pytest.mark.parametrize(("address", "signum", "gpus"), RUNS, indirect=["address"])
def test_runs_have_their_gpus_and_save_when_stopped(address, signum, gpus, tmp_path, monkeypatch, capfd):
    """Two GPUs here, halves of one on Ray; the third run doesn't begin. Python tells it in place of the trainings."""
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
print("GPU", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid(), flush=True)
time.sleep(60)"""
    args = arguments(tmp_path, seeds=(1, 2, 3), jobs=None, address=address, cpus_per_run=2, gpus_per_run=0.5)
    cells = [played(cell, code) for cell in sweep.make_cells(args)]
    monkeypatch.setattr(sweep, "make_cells", lambda args: cells)

    def lines(begin) -> list[str]:
        logs = [log.read_text().splitlines() for log in tmp_path.glob("*/log.txt")]
        return sorted(line for log in logs for line in log if line.startswith(begin))

    def send():
        while len(lines("GPU")) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit, match="130"):
        sweep.main(args)
    assert lines("GPU") == [f"GPU {gpu} 2 True" for gpu in gpus] and lines("saved") == ["saved"] * 2
    out, errors = capfd.readouterr()
    assert "stopping" in errors and out.endswith("0 of 3 runs are finished\nstopped; the same command goes on\n")
    assert not list(tmp_path.glob(".stop*"))
