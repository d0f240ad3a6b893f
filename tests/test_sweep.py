"""benchmarks/sweep.py and caps.py: what is run, what is not run again, and what happens when something goes wrong."""

import csv
import importlib.metadata
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT

from benchmarks import caps, sweep
from benchmarks.evaluate import UserError, load_run

SMALL = "--no-compile --learning-starts 50 --batch-size 16 --eval-episodes 1 --buffer-size 1000"
CAPS = {"caps_temporal": 1.0, "caps_spatial": 5.0, "caps_sigma": 0.2}


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores, small networks wait longer for a second thread than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)["agent"]


def same_weights(left, right) -> bool:
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------------------------------------------------- CAPS


def agent_and_batch(script, caps_settings, monkeypatch):
    """The agent that caps.train makes, caught at the start of its training, and a batch for it."""
    caught = []

    def catch(args):
        caught.append(script.Agent(3, 2, args, torch.device("cpu")))

    monkeypatch.setattr(script, "train", catch)
    torch.manual_seed(0)
    caps.train(script, script.Args(compile=False), caps_settings)
    batch = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8, 2) * 2 - 1, torch.randn(8), torch.zeros(8)
    return caught[0], batch


def test_caps_adds_its_two_terms_to_the_actor_loss(script, monkeypatch):
    agent, batch = agent_and_batch(script, CAPS, monkeypatch)
    agent.actor.requires_grad_()
    noise = (torch.randn(8, 2),) if script.SCRIPT.startswith("sac") else ()
    assert not any(getattr(agent.args, name) for name in script.LAMBDAS)

    def loss_and_gradient(loss):
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.actor.parameters())])

    torch.manual_seed(1)
    loss, gradient = loss_and_gradient(agent.actor_loss(batch, *noise)[0])
    torch.manual_seed(1)
    near = batch[0] + 0.2 * torch.randn(8, 3)
    here, there, beside = (agent.actor(states) for states in (batch[0], batch[1], near))
    terms = 0.0
    for i in range(8):
        for j in range(2):
            terms += (
                1.0 * 0.5 * (here[i, j] - there[i, j]) ** 2 / 16 + 5.0 * 0.5 * (here[i, j] - beside[i, j]) ** 2 / 16
            )
    plain, _ = script.Agent.actor_loss(agent, batch, *noise)
    expected, expected_gradient = loss_and_gradient(plain + terms)
    assert terms > 0
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)

    traced = torch.compile(agent.actor_loss, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    assert torch.allclose(loss_and_gradient(traced(batch, *noise)[0])[1], gradient, atol=1e-6)


def test_caps_trains_resumes_and_without_weights_is_the_plain_algorithm(script, small_args):
    args = small_args(eval_episodes=0, learning_starts=195, total_timesteps=210)
    none, zero = dict.fromkeys(script.LAMBDAS, 0.0), dict.fromkeys(CAPS, 0.0)
    plain = script.train(replace(args, **none))
    assert same_weights(plain, caps.train(script, args, zero))
    whole = caps.train(script, args, CAPS)
    assert not same_weights(plain, whole)
    assert json.loads((whole / "caps.json").read_text()) == CAPS
    assert load_run(whole).label in ("SAC", "TD3")
    part = caps.train(script, replace(args, total_timesteps=200), CAPS)
    caps.train(script, replace(args, resume=str(part / "checkpoint.pt")), CAPS)
    assert same_weights(part, whole)
    with pytest.raises(UserError, match="lambda"):
        caps.train(script, replace(args, lambda_curv=1.0), CAPS)


def test_caps_settings():
    args = caps.Args("sac_pave_continuous")
    assert caps.settings(args, "Pendulum-v1") == CAPS
    assert caps.settings(args, "Hopper-v5") == {"caps_temporal": 0.1, "caps_spatial": 0.5, "caps_sigma": 0.2}
    own = replace(args, caps_spatial=0.0)
    assert caps.settings(own, "Hopper-v5", CAPS) == {"caps_temporal": 1.0, "caps_spatial": 0.0, "caps_sigma": 0.2}
    with pytest.raises(UserError, match="caps-sigma"):
        caps.settings(replace(args, caps_sigma=-1.0), "Hopper-v5")


# ------------------------------------------------------------------------------------------------------ the grid


def cells(**changes):
    return {cell.folder.name: cell for cell in sweep.make_cells(sweep.Args(**changes))}


def script_args(cell):
    script = next(script for script in sweep.SCRIPTS.values() if f"{script.SCRIPT}.py" == cell.command[0])
    return tyro.cli(script.Args, args=cell.command[1:])


def test_grid_and_presets(tmp_path):
    grid = cells(envs=("Pendulum-v1", "a_module:Robot-v0"), methods=("base", "ablation"), seeds=(1, 2))
    assert len(grid) == 2 * 2 * 2 * 9
    assert "a_module-Robot-v0__sac__ablation-101__2" in grid
    assert grid["a_module-Robot-v0__td3__base__1"].about["steps"] == 1_000_000

    td3 = cells(
        preset="paper-td3", methods=("base", "pave", "ablation-101", "untuned", "auto", "caps"), flags="--tau 0.1"
    )
    assert len(td3) == 6 * 5
    cell = td3["Pendulum-v1__td3__ablation-101__3"]
    args = script_args(cell)
    assert (args.lambda_mpr, args.lambda_vfc, args.lambda_curv) == (2.0, 0.0, 2.0)
    assert (args.env_id, args.seed, args.total_timesteps) == ("Pendulum-v1", 3, 100_000)
    assert (args.gamma, args.buffer_size, args.batch_size, args.tau) == (0.98, 200_000, 256, 0.1)
    assert cell.about["preset"] == "paper-td3"
    assert script_args(td3["Pendulum-v1__td3__pave__1"]).lambda_mpr is None
    assert script_args(td3["Pendulum-v1__td3__untuned__1"]).lambda_curv == 0.01
    auto = script_args(td3["Pendulum-v1__td3__auto__1"])
    assert (auto.autotune_curv, auto.lambda_curv, args.autotune_curv) == (True, None, False)
    command = shlex.split(td3["Pendulum-v1__td3__caps__1"].about["command"])
    assert command[:3] == ["python", "benchmarks/caps.py", "td3_pave_continuous"]
    assert command[-2:] == ["--output-dir", "runs/sweep/Pendulum-v1__td3__caps__1"]
    args = script_args(cells(preset="paper-sac", envs=("Hopper-v5",))["Hopper-v5__sac__base__1"])
    assert (args.autotune, args.alpha, args.batch_size, args.policy_lr, args.gamma) == (False, 0.2, 100, 1e-3, 0.99)

    file = tmp_path / "grid.toml"
    file.write_text('[[grid]]\npreset = "paper-td3"\nseeds = [7]\n[[grid]]\nenvs = ["Hopper-v5"]\nscripts = ["sac"]\n')
    both = cells(grid=file, methods=("pave",), seeds=(1,), flags="--no-compile")
    assert list(both) == ["Pendulum-v1__td3__pave__7", "Hopper-v5__sac__pave__1"]
    assert all("--no-compile" in cell.command for cell in both.values())
    assert list(cells(grid=file, only="Hopper.*__5$", methods=("pave",))) == ["Hopper-v5__sac__pave__5"]


def test_every_reported_run_is_one_of_results_toml():
    """With the same flags: who trains that grid gets these runs."""
    planned = cells(grid=ROOT / "benchmarks/results.toml").values()
    grid = {cell.about["command"].partition(" --output-dir")[0] for cell in planned}
    with open(ROOT / "benchmarks/results/report/runs.csv", newline="") as file:
        reported = {row["command"].partition(" --output-dir")[0] for row in csv.DictReader(file)}
    assert reported and reported <= grid


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
    with pytest.raises(Exception, match=message) as error:
        cells(**changes)
    assert type(error.value).__name__ == "UserError"
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- cells on the disk


def test_what_is_left_to_do_for_a_cell(tmp_path, capsys):
    script = importlib.import_module("td3_pave_continuous")

    def cell(method="base", steps=60, flags="", **changes):
        options = {"scripts": ("td3",), "methods": (method,), "seeds": (1,), "output_dir": tmp_path} | changes
        return sweep.make_cells(sweep.Args(steps=steps, flags=f"{SMALL} {flags}", **options))[0]

    base = cell()
    assert sweep.inspect(base).kind == "new"
    run_dir = script.train(replace(script_args(base), output_dir=str(base.folder)))
    assert sweep.inspect(base).kind == "finished"
    # nothing of PAVE runs in it, and how often it was saved, or where, is no matter
    assert sweep.inspect(cell(flags="--pave-batch-size 4 --checkpoint-interval 7 --no-cuda")).kind == "finished"
    other = sweep.inspect(cell(flags="--gamma 0.5"))
    assert (other.kind, "gamma 0.99 instead of 0.5" in other.problem) == ("problem", True)
    longer = sweep.inspect(cell(steps=100))
    assert (longer.kind, longer.step, longer.checkpoint) == ("resume", 60, run_dir / "checkpoint.pt")
    assert "for 60 steps" in sweep.inspect(cell(steps=50)).problem

    sweep.main(sweep.Args(("td3",), methods=("base",), seeds=(1,), steps=60, flags=SMALL, output_dir=tmp_path))
    assert "skipped  Pendulum-v1__td3__base__1" in capsys.readouterr().out
    adopted = json.loads((base.folder / "cell.json").read_text())
    assert adopted["wall_seconds"] is None and adopted["steps_per_second"] > 0

    (run_dir / "summary.json").unlink()
    assert "last step" in sweep.inspect(base).problem
    (run_dir / "caps.json").write_text(json.dumps(CAPS))
    assert "caps_temporal 1.0 instead of None" in sweep.inspect(base).problem
    (run_dir / "checkpoint.pt").write_text("cut")
    assert sweep.inspect(base).kind == "problem"
    (run_dir / "checkpoint.pt").unlink()
    assert sweep.inspect(base).kind == "new"


# ---------------------------------------------------------------------------------------------- sweeps, as a user


def command(folder, *flags):
    small = ["--flags", SMALL, "--output-dir", str(folder), "--scripts", "td3", "--seeds", "1"]
    return [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), *small, *flags]


def check_a_sweep_with_a_failure(folder, *flags):
    """One cell is trained, and one fails."""
    grid = ["--envs", "NoSuch-v0", "Pendulum-v1", "--methods", "caps", "--steps", "60", *flags]
    result = subprocess.run(command(folder, *grid), capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    (failed,) = [line for line in result.stdout.splitlines() if line.startswith("failed ")]
    assert "NoSuch-v0__td3__caps__1" in failed and "cannot make --env-id" in failed and "log.txt" in failed
    assert result.stdout.splitlines()[-1] == "1 of 2 runs are finished; these failed: NoSuch-v0__td3__caps__1"
    cell = folder / "Pendulum-v1__td3__caps__1"
    about = json.loads((cell / "cell.json").read_text())
    assert (about["algorithm"], about["method"], about["env_id"], about["seed"]) == ("td3", "caps", "Pendulum-v1", 1)
    assert (about["steps"], about["resumed_from"], about["torch"]) == (60, 0, importlib.metadata.version("torch"))
    assert about["wall_seconds"] > 0 and about["steps_per_second"] > 0 and "cores" in about["machine"]
    (caps_json,) = cell.glob("*/caps.json")
    assert load_run(caps_json.parent).step == 60
    assert not list(folder.glob(".running*"))


def test_one_failure_does_not_stop_the_rest(tmp_path):
    check_a_sweep_with_a_failure(tmp_path, "--jobs", "2")


def test_stopped_by_sigterm_it_saves_and_goes_on(tmp_path, capsys):
    """The signal reaches the sweep alone, and through its workers the trainings."""
    settings = f"{SMALL} --learning-starts 9000000 --eval-interval 400"
    words = command(tmp_path, "--jobs", "2", "--steps", "9000000", "--flags", settings)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cells = [tmp_path / f"Pendulum-v1__td3__{method}__1" for method in ("base", "pave")]
    while not all((cell / "log.txt").is_file() and "steps/s" in (cell / "log.txt").read_text() for cell in cells):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert out == "stopped, 0 of 2 runs are finished; the same command goes on\n"
    assert "Traceback" not in errors
    runs = [load_run(next(cell.glob("*/checkpoint.pt")).parent) for cell in cells]
    assert all("stopped at step" in (cell / "log.txt").read_text() for cell in cells)

    cell, run = cells[0], runs[0]
    more = {"methods": ("base",), "seeds": (1,), "steps": run.step + 20, "flags": settings, "output_dir": tmp_path}
    sweep.main(sweep.Args(("td3",), jobs=1, **more))
    assert "done     Pendulum-v1__td3__base__1  20 steps" in capsys.readouterr().out
    assert load_run(run.path).step == run.step + 20
    about = json.loads((cell / "cell.json").read_text())
    assert (about["resumed_from"], about["wall_seconds"]) == (run.step, None)


def test_the_same_on_a_ray_cluster_of_two_nodes(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        check_a_sweep_with_a_failure(tmp_path, "--backend", "ray", "--address", cluster.address)
    finally:
        cluster.shutdown()
