"""benchmarks/sweep.py and caps.py: what is run, what is not run again, and what happens when something goes wrong."""

import csv
import fcntl
import importlib.metadata
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

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

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.actor.parameters())])

    torch.manual_seed(1)
    loss, _ = agent.actor_loss(batch, *noise)
    torch.manual_seed(1)
    here, there = agent.actor(batch[0]), agent.actor(batch[1])
    beside, terms = agent.actor(batch[0] + 0.2 * torch.randn(8, 3)), 0.0
    for i in range(8):
        for j in range(2):
            terms += 0.5 * (here[i, j] - there[i, j]) ** 2 / 16 + 5 * 0.5 * (here[i, j] - beside[i, j]) ** 2 / 16
    expected = script.Agent.actor_loss(agent, batch, *noise)[0] + terms
    assert terms > 0 and torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradient(loss), gradient(expected), atol=1e-6)


def weights(run_dir: Path) -> torch.Tensor:
    agent = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    return torch.cat([value.flatten() for value in agent.values()])


def test_caps_trains_resumes_and_without_weights_is_the_plain_algorithm(script, small_args, monkeypatch):
    settings, agent_class = caps.with_caps(script)
    plain = replace(
        small_args(eval_episodes=0, learning_starts=195, total_timesteps=210), **dict.fromkeys(script.LAMBDAS, 0.0)
    )

    def train(**changes):
        return script.train(caps.validate(settings(**vars(plain) | changes)), agent_class)

    base, whole = script.train(plain), train()
    assert torch.equal(weights(train(**dict.fromkeys(CAPS, 0.0))), weights(base))
    assert not torch.equal(weights(whole), weights(base))
    run = load_run(whole)  # recognised by its own files
    assert run.method == "caps" and {name: vars(run.args)[name] for name in CAPS} == CAPS
    part = train(total_timesteps=200, caps_spatial=3.0)
    saved = str(part / "checkpoint.pt")
    monkeypatch.setattr(sys, "argv", ["caps", script.SCRIPT, "--resume", saved, "--total-timesteps", "210"])
    caps.main()
    assert load_run(part).args.caps_spatial == 3.0
    assert torch.equal(weights(part), weights(train(caps_spatial=3.0)))
    monkeypatch.setattr(sys, "argv", ["caps", script.SCRIPT, "--resume", str(base / "checkpoint.pt")])
    with pytest.raises(USER_ERRORS, match="no CAPS run"):
        caps.main()


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
    assert len(grid) == 2 * 2 * 2 * 9
    assert "a_module-Robot-v0__sac__ablation-101__2" in grid
    assert grid["a_module-Robot-v0__td3__base__1"].about["steps"] == 1_000_000

    methods = ("base", "pave", "ablation-101", "untuned", "auto", "caps")
    paper = cells(preset="paper-td3", methods=methods, flags="--tau 0.1")
    assert len(paper) == 6 * 5
    assert {cell.settings["method"] for cell in paper.values()} == set(methods)  # as the runs will call themselves
    cell = paper["Pendulum-v1__td3__ablation-101__3"]
    assert [cell.settings[name] for name in td3.LAMBDAS] == [2.0, 0.0, 2.0]
    expected = {
        "env_id": "Pendulum-v1",
        "seed": 3,
        "gamma": 0.98,
        "buffer_size": 200_000,
        "batch_size": 256,
        "tau": 0.1,
    }
    assert expected.items() <= cell.settings.items() and cell.about["steps"] == 100_000
    assert [paper["Pendulum-v1__td3__untuned__1"].settings[name] for name in td3.LAMBDAS] == [0.1, 0.1, 0.01]
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
    grid = [
        cell.settings | {"steps": cell.about["steps"]} for cell in cells(grid=ROOT / "benchmarks/results.toml").values()
    ]
    with open(ROOT / "benchmarks/results/report/runs.csv", newline="") as file:
        for row in csv.DictReader(file):
            flags = shlex.split(row["command"].partition("_pave_continuous")[2].removeprefix(".py"))
            settings = sweep.settings_given(row["algorithm"], row["method"], flags)
            assert settings | {"steps": int(row["steps"])} in grid, row["command"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("cap",)}, "there are ablation, base"),
        ({"preset": "paper-td3", "scripts": ("sac",)}, "for --scripts td3 only"),
        ({"flags": "--seed 3"}, "--flags has --seed"),
        ({"flags": "--no-such-flag 3"}, "no-such-flag"),
        ({"flags": "--gamma 3"}, "gamma is 3"),
        ({"seeds": ()}, "empty"),
        ({"only": "Walker"}, "leaves none of 20 cells, such as Pendulum-v1__sac__base__1"),
        ({"only": "("}, "--only . is no regular expression"),
        ({"grid": "[[grid]]\nseeds = ['x']"}, "seeds"),
        ({"grid": "grid = 3"}, "no TOML file"),
        ({"grid": "[[grid]]\n[[grid]]\nflags = '--tau 0.1'"}, "two grids want"),
    ],
)
def test_bad_grids_are_refused_in_one_line(changes, message, tmp_path):
    if "grid" in changes:
        (tmp_path / "grid.toml").write_text(changes["grid"])
        changes = {"grid": tmp_path / "grid.toml"}
    with pytest.raises(USER_ERRORS, match=message) as error:
        cells(**changes)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- cells on the disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep's folder with one cell, trained and evaluated by the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep.main(arguments(folder))
    return folder


def arguments(folder, method="base", steps=210, flags="", **changes):
    small = {"scripts": ("td3",), "methods": (method,), "seeds": (1,), "output_dir": folder, "episodes": 1, "jobs": 2}
    return sweep.Args(**small | {"steps": steps, "flags": f"{SMALL} {flags}"} | changes)


def look(folder, **changes) -> sweep.State:
    return sweep.inspect(sweep.make_cells(arguments(folder, **changes))[0])


def test_what_is_left_to_do_for_a_cell(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "sweep")
    (run,) = folder.glob("*/*/")
    cell, old = run.parent, json.loads((run / "summary.json").read_text())
    assert look(tmp_path / "nowhere").kind == "new"
    assert look(folder) == ("finished", run, 210, "")
    # nothing of PAVE runs in it, and how often it was saved, or where, is no matter
    assert look(folder, flags="--pave-batch-size 4 --checkpoint-interval 7 --no-cuda").kind == "finished"
    other = look(folder, flags="--gamma 0.5")
    assert (other.kind, "gamma 0.99 instead of 0.5" in other.problem) == ("problem", True)
    assert "for 210 steps" in look(folder, steps=50).problem
    assert look(folder, steps=300) == ("resume", run, 210, "")
    (run / "caps.json").write_text(json.dumps(CAPS))
    assert "method caps instead of base" in look(folder).problem
    (run / "caps.json").unlink()
    (run / "summary.json").write_text(json.dumps(old | {"a_flag_since_removed": 3}))
    assert look(folder).kind == "finished"

    (run / "summary.json").unlink()
    assert look(folder).kind == "new"  # stopped in its last step, before the summary
    assert look(folder, steps=300).kind == "resume"
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["optimizers"]  # an older version kept them elsewhere: it can't be resumed
    torch.save(saved, run / "checkpoint.pt")
    assert look(folder, steps=300).kind == "new"
    (run / "checkpoint.pt").write_text("half")
    assert look(folder, steps=300).kind == "new"
    (run / "summary.json").write_text(json.dumps(old))
    (run / "checkpoint.pt").unlink()
    assert look(folder) == ("finished", run, 210, "")  # it is the summary that says so
    assert "gamma" in look(folder, flags="--gamma 0.5").problem
    assert look(folder, steps=300).kind == "new"
    newer = shutil.copytree(run, cell / f"{run.name}9")
    (newer / "summary.json").unlink()
    assert look(folder) == ("finished", run, 210, "")  # the newest that is finished


def test_a_sweep_removes_nothing(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "sweep")
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


def test_a_cell_that_another_sweep_trains_is_not_looked_at(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.setattr(sweep, "inspect", None)
    (log,) = folder.glob("*/log.txt")
    with open(log, "a") as held, pytest.raises(SystemExit, match="1"):
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep.main(arguments(folder))
    assert "another process is training it" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- sweeps, as a user


def test_a_sweep_evaluates_what_it_trains(finished):
    (run,) = finished.glob("*/*/")
    assert load_run(run).method == "base"
    assert evaluate.about(210, 1).items() <= json.loads((run / "evaluation.json").read_text()).items()
    about = json.loads((run.parent / "cell.json").read_text())
    assert (about["algorithm"], about["method"], about["env_id"], about["seed"]) == ("td3", "base", "Pendulum-v1", 1)
    assert (about["steps"], about["resumed_from"], about["torch"]) == (210, 0, importlib.metadata.version("torch"))
    assert about["wall_seconds"] > 0 and "cores" in about["machine"] and "--seed 1" in about["command"]
    assert not list(finished.glob(".stop*"))


def test_the_report_has_what_the_sweep_left(finished, tmp_path):
    report.main(report.Args((finished,), tmp_path))
    (row,) = csv.DictReader((tmp_path / "runs.csv").open())
    (run,) = finished.glob("*/*/")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (row["env_id"], row["algorithm"], row["method"], row["steps"]) == ("Pendulum-v1", "td3", "base", "210")
    assert float(row["return_mean"]) == pytest.approx(evaluation["return_mean"], rel=1e-5)
    assert float(row["wall_seconds"]) > 0 and not row["missing"]
    assert "TD3 base" in (tmp_path / "report.md").read_text()


def test_one_failure_does_not_stop_the_rest(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "sweep")
    inspect = sweep.inspect

    def fail(cell):
        if cell.about["seed"] == 2:
            raise KeyError("whatever it is")
        return inspect(cell)

    monkeypatch.setattr(sweep, "inspect", fail)
    with pytest.raises(SystemExit, match="1"):
        sweep.main(arguments(folder, envs=("NoSuch-v0", "Pendulum-v1"), seeds=(1, 2), jobs=1))
    out = capsys.readouterr().out
    (failed,) = [line for line in out.splitlines() if "NoSuch-v0__td3__base__1  exit code" in line]
    assert "failed" in failed and "cannot make --env-id" in failed and "log.txt" in failed
    assert "failed Pendulum-v1__td3__base__2  KeyError('whatever it is')" in out
    assert "skipped Pendulum-v1__td3__base__1" in out
    assert out.splitlines()[-1].startswith("1 of 4 runs are finished; these failed: ")


def test_several_gpus_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    lines = run_python(sweep.start_local, tmp_path, arguments(tmp_path, seeds=(1, 2), jobs=None))
    assert sorted(lines) == ["3 1 True", "5 1 True"]


def run_python(start, folder, args) -> list[str]:
    """GPU, threads and "a session of its own" of each cell's process, told by Python in place of a training."""
    code = """import os, time; time.sleep(1)  # so that the other one starts beside it
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid())"""
    told = [cell._replace(words=["-c", code]) for cell in sweep.make_cells(args)]
    for future in start(args, told, folder / ".stop"):
        assert future.exception()  # it leaves no run to evaluate
    return [log.read_text().splitlines()[-1] for log in folder.glob("*/log.txt")]


def command(folder, *flags):
    small = [f"--flags={SMALL} --learning-starts 9000000 --eval-interval 400", "--output-dir", str(folder)]
    grid = ["--scripts", "td3", "--seeds", "1", "--methods", "base", "pave", "--jobs", "2", "--steps", "9000000"]
    return [sys.executable, "-m", "benchmarks.sweep", *grid, *small, *flags]


def check_that_it_stops_and_goes_on(folder, *flags):
    """The signal reaches the sweep alone, and through it the trainings."""
    logs = [folder / f"Pendulum-v1__td3__{method}__1/log.txt" for method in ("base", "pave")]
    seen = [0, 0]
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            command(folder, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not all(
            log.is_file() and log.read_text().count("steps/s") > n for log, n in zip(logs, seen, strict=True)
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signum)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 130, errors
        assert out.startswith("stopping") and out.endswith(
            "0 of 2 runs are finished\nstopped; the same command goes on\n"
        )
        assert "Traceback" not in errors
        seen = [log.read_text().count("steps/s") for log in logs]
    for log in logs:
        assert log.read_text().count("stopped at step") == 2 and log.read_text().count("--resume") == 3
        assert len(list(log.parent.glob("*/checkpoint.pt"))) == 1  # the second training went on with the first


def test_stopped_it_saves_and_goes_on(tmp_path):
    check_that_it_stops_and_goes_on(tmp_path)


@pytest.fixture
def two_nodes():
    """The address of a Ray cluster on this machine: a node without a GPU, and one that says that it has one."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2, num_gpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def test_on_a_ray_cluster(tmp_path, two_nodes):
    half = arguments(tmp_path, seeds=(1, 2), address=two_nodes, gpus_per_run=0.5, cpus_per_run=2)
    assert run_python(sweep.start_ray, tmp_path, half) == ["0 2 True"] * 2
    check_that_it_stops_and_goes_on(tmp_path / "stopped", "--address", two_nodes)


def test_without_ray_or_its_cluster_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(USER_ERRORS, match="pip install ray") as error:
        sweep.main(arguments(tmp_path, address="auto"))
    assert "\n" not in str(error.value)
