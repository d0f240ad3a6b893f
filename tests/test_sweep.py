"""benchmarks/sweep.py and caps.py: what is run, what is not run again, and what happens when something goes wrong."""

import csv
import fcntl
import importlib.metadata
import json
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch.nn.utils import parameters_to_vector

import td3_pave_continuous as td3
from benchmarks import caps, evaluate, report, sweep
from benchmarks.common import USER_ERRORS, load_run

SMALL = "--no-compile --learning-starts 50 --batch-size 16 --eval-episodes 1 --buffer-size 1000"
CAPS = {"caps_temporal": 1.0, "caps_spatial": 5.0, "caps_sigma": 0.2}


# ---------------------------------------------------------------------------------------------------------- CAPS


def test_caps_adds_its_two_terms_to_the_actor_loss(script):
    settings, agent_class = caps.with_caps(script)
    torch.manual_seed(0)
    agent = agent_class(3, 2, caps.validate(settings(env_id="Pendulum-v1", compile=False)), torch.device("cpu"))
    batch = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8, 2) * 2 - 1, torch.randn(8), torch.zeros(8)
    noise = (torch.randn(8, 2),) if script.SCRIPT.startswith("sac") else ()
    torch.manual_seed(1)
    losses = [agent.actor_loss(batch, *noise)[0]]
    torch.manual_seed(1)
    here, there, beside = (agent.actor(s) for s in (*batch[:2], batch[0] + 0.2 * torch.randn(8, 3)))
    terms = 0.5 * ((here - there) ** 2).sum() / 16 + 5 * 0.5 * ((here - beside) ** 2).sum() / 16
    losses.append(script.Agent.actor_loss(agent, batch, *noise)[0] + terms)
    assert terms > 0 and torch.allclose(*losses, atol=1e-6)
    gradients = [parameters_to_vector(torch.autograd.grad(loss, agent.actor.parameters())) for loss in losses]
    assert torch.allclose(*gradients, atol=1e-6)


def test_caps_trains_resumes_and_without_weights_is_the_plain_algorithm(script, small_args, monkeypatch):
    settings, agent_class = caps.with_caps(script)
    plain = small_args(eval_episodes=0, learning_starts=195, total_timesteps=210)
    plain = replace(plain, **dict.fromkeys(script.LAMBDAS, 0.0))

    def train(**changes):
        return script.train(caps.validate(settings(**vars(plain) | changes)), agent_class)

    def same(*runs):
        agents = [torch.load(run / "checkpoint.pt", weights_only=True)["agent"] for run in runs]
        return all(torch.equal(value, agents[1][name]) for name, value in agents[0].items())

    def resume(run, *flags):
        monkeypatch.setattr(sys, "argv", ["caps", script.SCRIPT, "--resume", str(run / "checkpoint.pt"), *flags])
        caps.main()

    base, whole = script.train(plain), train()
    assert same(train(**dict.fromkeys(CAPS, 0.0)), base) and not same(whole, base)
    run = load_run(whole)  # recognised by its own files
    assert run.method == "caps" and {name: vars(run.args)[name] for name in CAPS} == CAPS
    part = train(total_timesteps=200, caps_spatial=3.0)
    resume(part, "--total-timesteps", "210")
    assert load_run(part).args.caps_spatial == 3.0 and same(part, train(caps_spatial=3.0))
    with pytest.raises(USER_ERRORS, match="no CAPS run"):
        resume(base)


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


def test_grid_and_presets(tmp_path):
    grid = cells(envs=("Pendulum-v1", "a_module:Robot-v0"), methods=("base", "ablation"), seeds=(1, 2))
    assert len(grid) == 2 * 2 * 2 * 9 and "a_module-Robot-v0__sac__ablation-101__2" in grid
    assert grid["a_module-Robot-v0__td3__base__1"].about["steps"] == 1_000_000

    methods = ("base", "pave", "ablation-101", "untuned", "auto", "caps")
    paper = cells(preset="paper-td3", methods=methods, flags="--tau 0.1")
    assert len(paper) == 6 * 5
    assert {cell.settings["method"] for cell in paper.values()} == set(methods)  # as the runs will call themselves
    cell, untuned = paper["Pendulum-v1__td3__ablation-101__3"], paper["Pendulum-v1__td3__untuned__1"]
    expected = {"env_id": "Pendulum-v1", "seed": 3, "gamma": 0.98, "buffer_size": 200_000, "batch_size": 256}
    expected |= {"tau": 0.1, "lambda_mpr": 2.0, "lambda_vfc": 0.0, "lambda_curv": 2.0}
    assert expected.items() <= cell.settings.items() and cell.about["steps"] == 100_000
    assert [untuned.settings[name] for name in td3.LAMBDAS] == [0.1, 0.1, 0.01]
    command = shlex.split(paper["Pendulum-v1__td3__caps__1"].about["command"])
    assert command[:4] == ["python", "-m", "benchmarks.caps", "td3_pave_continuous"]
    assert command[-2:] == ["--output-dir", "runs/sweep/Pendulum-v1__td3__caps__1"]
    hopper = cells(preset="paper-sac", envs=("Hopper-v5",))["Hopper-v5__sac__base__1"].settings
    expected = {"autotune": False, "alpha": 0.2, "batch_size": 100, "policy_lr": 1e-3, "gamma": 0.99}
    assert expected.items() <= hopper.items()

    file = tmp_path / "grid.toml"
    file.write_text('[[grid]]\npreset = "paper-td3"\nseeds = [7]\n[[grid]]\nenvs = ["Hopper-v5"]\nscripts = ["sac"]\n')
    both = cells(grid=file, methods=("pave",), seeds=(1,), flags="--no-compile")
    assert list(both) == ["Pendulum-v1__td3__pave__7", "Hopper-v5__sac__pave__1"]
    assert all("--no-compile" in cell.words for cell in both.values())
    assert list(cells(grid=file, only="Hopper.*__5$", methods=("pave",))) == ["Hopper-v5__sac__pave__5"]
    file.write_text('[[grid]]\nseeds = [1]\n[[grid]]\nseeds = [1]\nname = "own"\nflags = "--tau 0.1"\n')
    named = cells(grid=file, scripts=("td3",), methods=("base",))  # side by side, with different settings
    assert list(named) == ["Pendulum-v1__td3__base__1", "Pendulum-v1__td3__base__1__own"]


def test_every_reported_run_is_one_of_results_toml():
    """With the same settings: who trains that grid gets these runs."""
    grid = cells(grid=ROOT / "benchmarks/results.toml").values()
    grid = [cell.settings | {"steps": cell.about["steps"]} for cell in grid]
    for row in csv.DictReader((ROOT / "benchmarks/results/report/runs.csv").open(newline="")):
        flags = shlex.split(row["command"].partition("_pave_continuous")[2].removeprefix(".py"))
        settings = sweep.settings_given(row["algorithm"], row["method"], flags)
        assert settings | {"steps": int(row["steps"])} in grid, row["command"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods cap", "there are ablation, base"),
        ("--preset paper-td3 --scripts sac", "for --scripts td3 only"),
        ("--flags='--seed 3'", "--flags has --seed"),
        ("--flags='--no-such-flag 3'", "no-such-flag"),
        ("--flags='--gamma 3'", "gamma is 3"),
        ("--seeds", "empty"),
        ("--only Walker", "leaves none of 20 cells, such as Pendulum-v1__sac__base__1"),
        ("--only (", "--only ( is no regular expression"),
        ("--jobs 0", "--jobs is 0"),
        ("--address auto", "pip install ray"),
        ("[[grid]]\nseeds = ['x']", "seeds"),
        ("grid = 3", "no TOML file"),
        ("[[grid]]\n[[grid]]\nflags = '--tau 0.1'", "two grids want"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.toml").write_text(flags)
    words = shlex.split(flags) if flags.startswith("--") else ["--grid", "grid.toml"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("benchmarks.sweep", run_name="__main__", alter_sys=True)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------- cells on the disk


def arguments(folder, method="base", steps=210, flags="", **changes):
    small = {"scripts": ("td3",), "methods": (method,), "seeds": (1,), "output_dir": folder, "episodes": 1, "jobs": 2}
    return sweep.Args(**small | {"steps": steps, "flags": f"{SMALL} {flags}"} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep's folder with one cell, trained and evaluated by the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep.main(arguments(folder))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(finished, tmp_path / "sweep")


def test_a_sweep_evaluates_what_it_trains_and_the_report_has_it(finished, tmp_path):
    (run,) = finished.glob("*/*/")
    evaluation, about = (json.loads(file.read_text()) for file in (run / "evaluation.json", run.parent / "cell.json"))
    assert evaluate.about(210, 1).items() <= evaluation.items()
    cell = {"algorithm": "td3", "method": "base", "env_id": "Pendulum-v1", "seed": 1, "steps": 210}
    assert (cell | {"resumed_from": 0, "torch": importlib.metadata.version("torch")}).items() <= about.items()
    assert about["wall_seconds"] > 0 and "cores" in about["machine"] and "--seed 1" in about["command"]
    assert not list(finished.glob(".stop*"))
    report.main(report.Args((finished,), tmp_path))
    (row,) = csv.DictReader((tmp_path / "runs.csv").open())
    assert {name: row[name] for name in cell} == {name: str(value) for name, value in cell.items()}
    assert float(row["return_mean"]) == pytest.approx(evaluation["return_mean"], rel=1e-5)
    assert float(row["wall_seconds"]) > 0 and not row["missing"]
    assert "TD3 base" in (tmp_path / "report.md").read_text()


def test_what_is_left_to_do_for_a_cell(folder, tmp_path):
    def look(folder=folder, **changes) -> sweep.State:
        return sweep.inspect(sweep.make_cells(arguments(folder, **changes))[0])

    (run,) = folder.glob("*/*/")
    old, saved = json.loads((run / "summary.json").read_text()), torch.load(run / "checkpoint.pt", weights_only=True)
    assert look(tmp_path / "nowhere").kind == "new"
    assert look() == ("finished", run, 210, "")
    # nothing of PAVE runs in it, and how often it was saved, or where, is no matter
    assert look(flags="--pave-batch-size 4 --checkpoint-interval 7 --no-cuda").kind == "finished"
    other = look(flags="--gamma 0.5")
    assert (other.kind, "gamma 0.99 instead of 0.5" in other.problem) == ("problem", True)
    assert "for 210 steps" in look(steps=50).problem
    assert look(steps=300) == ("resume", run, 210, "")
    (run / "caps.json").write_text(json.dumps(CAPS))
    assert "method caps instead of base" in look().problem
    (run / "caps.json").unlink()
    (run / "summary.json").write_text(json.dumps(old | {"a_flag_since_removed": 3}))
    assert look().kind == "finished"

    (run / "summary.json").unlink()
    assert look().kind == "new"  # stopped in its last step, before the summary
    assert look(steps=300).kind == "resume"
    del saved["optimizers"]  # an older version kept them elsewhere: it can't be resumed
    torch.save(saved, run / "checkpoint.pt")
    assert look(steps=300).kind == "new"
    (run / "checkpoint.pt").write_text("half")
    assert look(steps=300).kind == "new"
    (run / "summary.json").write_text(json.dumps(old))
    (run / "checkpoint.pt").unlink()
    assert look() == ("finished", run, 210, "")  # it is the summary that says so
    assert "gamma" in look(flags="--gamma 0.5").problem and look(steps=300).kind == "new"
    newer = shutil.copytree(run, run.with_name(f"{run.name}9"))
    (newer / "summary.json").unlink()
    assert look() == ("finished", run, 210, "")  # the newest that is finished


def test_a_sweep_removes_nothing(folder, capsys):
    (run,) = folder.glob("*/*/")
    (run / "checkpoint.pt").unlink()  # it holds the replay buffer, so people do
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sweep.main(arguments(folder))
    assert "skipped Pendulum-v1__td3__base__1  already finished\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    sweep.main(arguments(folder, episodes=2))
    assert "not evaluated: there is no checkpoint.pt" in capsys.readouterr().out
    (run / "summary.json").unlink()  # as of a run that diverged before its first checkpoint
    sweep.main(arguments(folder))
    assert "done Pendulum-v1__td3__base__1  210 steps" in capsys.readouterr().out
    kept = {path for path in before if path.name not in ("summary.json", "log.txt", "cell.json")}
    assert all(path.read_bytes() == before[path] for path in kept)
    assert len(list(folder.glob("*/*/evaluation.json"))) == 2


def test_one_failure_does_not_stop_the_rest(folder, monkeypatch, capsys):
    """A cell that can't train, one that raises, one that another sweep trains, which isn't even looked at."""
    held = folder / "Pendulum-v1__td3__base__3/log.txt"
    held.parent.mkdir()

    def inspect(cell, inspect=sweep.inspect):
        if cell.about["seed"] == 1:
            return inspect(cell)
        raise KeyError(f"looked at {cell.folder.name}")

    monkeypatch.setattr(sweep, "inspect", inspect)
    with open(held, "a") as log, pytest.raises(SystemExit, match="1"):
        fcntl.flock(log, fcntl.LOCK_EX)
        both = arguments(folder, envs=("NoSuch-v0", "Pendulum-v1"), seeds=(1, 2, 3), jobs=1, only="Pend|1$")
        sweep.main(both)
    out = capsys.readouterr().out
    (failed,) = [line for line in out.splitlines() if "NoSuch-v0__td3__base__1  exit code" in line]
    assert "failed" in failed and "cannot make --env-id" in failed and "log.txt" in failed
    assert "failed Pendulum-v1__td3__base__2  KeyError('looked at Pendulum-v1__td3__base__2')" in out
    assert "failed Pendulum-v1__td3__base__3  another process is training it" in out
    assert "skipped Pendulum-v1__td3__base__1" in out
    assert out.splitlines()[-1].startswith("1 of 4 runs are finished; these failed: ")


# ----------------------------------------------------------------------------------------------- GPUs, stops, Ray


def run_python(start, folder, **changes) -> list[str]:
    """GPU, threads and "a session of its own" of two cells' processes, told by Python in place of a training."""
    code = """import os, time; time.sleep(1)  # so that the other one starts beside it
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid())"""
    args = arguments(folder, seeds=(1, 2), jobs=None, **changes)
    told = [cell._replace(words=["-c", code]) for cell in sweep.make_cells(args)]
    for future in start(args, told, folder / ".stop"):
        assert future.exception()  # it leaves no run to evaluate
    return sorted(log.read_text().splitlines()[-1] for log in folder.glob("*/log.txt"))


def test_several_gpus_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert run_python(sweep.start_local, tmp_path) == ["3 1 True", "5 1 True"]


@pytest.fixture
def address(request):
    """None, or that of a Ray cluster on this machine: a node without a GPU, and one that says that it has one."""
    if not request.param:
        yield
        return
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2, num_gpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.parametrize("address", [None, "ray"], indirect=True)
def test_stopped_it_saves_and_goes_on(address, tmp_path):
    """The signal reaches the sweep alone, and through it the trainings; first, a Ray task gets its half of a GPU."""
    if address:
        half = {"address": address, "gpus_per_run": 0.5, "cpus_per_run": 2}
        assert run_python(sweep.start_ray, tmp_path / "half", **half) == ["0 2 True"] * 2
    command = [sys.executable, "-m", "benchmarks.sweep", "--scripts", "td3", "--seeds", "1", "--steps", "9000000"]
    command += ["--jobs", "2", "--output-dir", str(tmp_path), *(["--address", address] if address else [])]
    command += [f"--flags={SMALL} --learning-starts 9000000 --eval-interval 400"]
    logs = [tmp_path / f"Pendulum-v1__td3__{method}__1/log.txt" for method in ("base", "pave")]

    def lines(text) -> list[int]:
        return [log.read_text().count(text) if log.is_file() else 0 for log in logs]

    for signum in (signal.SIGTERM, signal.SIGINT):
        seen, pipes = lines("steps/s"), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, **pipes)
        while not all(now > n for now, n in zip(lines("steps/s"), seen, strict=True)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signum)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert out.startswith("stopping")
        assert out.endswith("0 of 2 runs are finished\nstopped; the same command goes on\n")
    assert lines("stopped at step") == [2, 2] and lines("--resume") == [3, 3]
    assert len(list(tmp_path.glob("*/*/checkpoint.pt"))) == 2  # the second training went on with the first
