"""benchmarks/population.py: each member is the run that the script makes alone; no member touches another."""

import contextlib
import json
import os
import shutil
import signal
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, SMALL
from helper_programs import fails, run_program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_agent import needs_cuda

from benchmarks import common, population

CPU = torch.device("cpu")
KINDS = {
    "plain": {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0},
    "fixed": {"lambda_mpr": 2.0, "lambda_vfc": 0.5, "lambda_curv": 1.0, "pave_batch_size": 8},
    "auto": {"autotune_curv": True},
}
MODULE = "benchmarks.population"


@pytest.fixture
def settings(script, tmp_path):
    """Make settings of n members with seeds 101, 102, ..., whose lambda_mpr differ, too."""

    def make(n, **changes):
        args = script.Args(**SMALL | {"batch_size": 12, "output_dir": str(tmp_path)} | changes)
        members = [script.validate(replace(args, seed=101 + i)) for i in range(n)]
        return [replace(args, lambda_mpr=args.lambda_mpr * (1 + i)) for i, args in enumerate(members)]

    return make


@pytest.fixture
def make_population(script):
    """Populations that are closed at the end."""
    made = []

    def make(*arguments, **named):
        made.append(population.Population(script, *arguments, CPU, **named))
        return made[-1]

    yield make
    for each in made:
        each.close()


def filled(made, size=200):
    """With transitions of its own in the replay of each member, the same for a member of the same seed."""
    for rows, args in zip(made.rows, made.settings, strict=True):
        rows[:size] = torch.randn(size, rows.shape[1], generator=torch.Generator().manual_seed(args.seed))
        rows[:, -1] = rows[:, -1] > 0.5
    made.size = made.position = size
    return made


def learn(made, updates):
    """Its metrics after each update."""
    logged = []
    for step in range(1, updates + 1):
        made.learn(step % made.args.policy_frequency == 0)
        logged.append({name: value.clone() for name, value in made.metrics.items()})
    return logged


def assert_same_member(made, i, agent, optimizers, **tolerance):
    own, _ = made.member(i)
    torch.testing.assert_close(own.state_dict(), agent.state_dict(), **tolerance)
    for name, optimizer in own.optimizers.items():
        torch.testing.assert_close(optimizer.state_dict()["state"], optimizers[name].state_dict()["state"], **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_each_members_updates_are_those_of_the_scripts_agent(script, float64, settings, make_population, kind):
    """The same losses, weights, optimizers and draws as Agent.update, for all three kinds of update."""
    members = settings(3, **KINDS[kind])
    made = filled(make_population(members))
    logged = learn(made, 4)
    for i, args in enumerate(members):
        alone = filled(make_population([args]))  # for its initial weights, rows and generator
        agent, buffer = alone.member(0)
        with torch.random.fork_rng():
            torch.set_rng_state(alone.generators[0].get_state())
            for step in range(1, 5):
                metrics = script.Agent.update(agent, buffer.sample(12), step % args.policy_frequency == 0)
                for name, value in metrics.items():
                    torch.testing.assert_close(logged[step - 1][name][i], value, rtol=1e-9, atol=1e-9)
            assert torch.equal(torch.get_rng_state(), made.generators[i].get_state())
        assert_same_member(made, i, agent, agent.optimizers, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("script", ["sac_pave_continuous"], indirect=True)
def test_after_200_updates_a_member_is_still_what_it_is_alone(float64, settings, make_population):
    members = settings(2, **KINDS["fixed"])
    made, alone = filled(make_population(members)), filled(make_population(members[1:]))
    for each in (made, alone):
        learn(each, 200)
    own, _ = alone.member(0)
    assert_same_member(made, 1, own, own.optimizers, rtol=1e-7, atol=1e-8)
    other, _ = made.member(0)
    assert (other.actor.net[0].weight - own.actor.net[0].weight).abs().max() > 1e-3


def flags(tmp_path, *more, **changes):
    """Of a small population below tmp_path."""
    small = SMALL | {"batch_size": 12, "output_dir": tmp_path / "population"} | changes
    small.pop("compile")
    words = [word for name, value in small.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [*words, "--no-compile", *more]


def folder_of(tmp_path, seed):
    (found,) = (tmp_path / "population").glob(f"*__{seed}/*")
    return found


def curves_of(folder):
    curves = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in curves.Scalars(tag)] for tag in curves.Tags()["scalars"]}


def test_a_member_leaves_what_the_script_leaves_and_in_it_the_same_training(script, tmp_path):
    """More than 200 updates with its own draws, envs and episodes, beside a neighbour."""
    lists = ["--seeds", 101, 102, "--lambda-mpr", 0.7, "--lambda-curv", 0.5]
    run_program(MODULE, script.SCRIPT, *flags(tmp_path, *lists, learning_starts=95))
    args = {"seed": 102, "lambda_mpr": 0.7, "lambda_curv": 0.5, "batch_size": 12, "learning_starts": 95}
    alone = script.train(script.Args(**SMALL | args | {"output_dir": str(tmp_path / "alone")}))
    member = folder_of(tmp_path, 102)
    files = [{path.name for path in folder.iterdir() if "tfevents" not in path.name} for folder in (alone, member)]
    assert files[0] == files[1]
    own, expected = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (member, alone))
    for name in ("agent", "optimizers", "buffer_rows", "buffer_position", "torch_rng", "step", "origin"):
        torch.testing.assert_close(own[name], expected[name], rtol=1e-2, atol=1e-3)
    own, expected = (json.loads((folder / "summary.json").read_text()) for folder in (member, alone))
    assert own.keys() == expected.keys()
    for name in own.keys() - {"output_dir", "steps_per_second"}:
        is_number = isinstance(own[name], float)
        assert own[name] == (pytest.approx(expected[name], rel=1e-3, abs=1e-4) if is_number else expected[name]), name
    own, expected = curves_of(member), curves_of(alone)
    assert own.keys() == expected.keys()
    for tag in own.keys() - {"charts/SPS"}:
        np.testing.assert_allclose(own[tag], expected[tag], rtol=1e-2, atol=1e-3)
    assert common.load_run(member).step == 300


def test_a_stopped_population_goes_on_by_the_same_command_or_a_member_by_the_script(tmp_path, monkeypatch, capsys):
    command = ["td3_pave_continuous", *flags(tmp_path, total_timesteps=160, learning_starts=140, eval_episodes=0)]
    command += ["--seeds", 101, 102]
    end_step = population.Runs.end_step

    def stopping(runs):
        end_step(runs)
        if runs.population.step == 150:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patches, pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        patches.setattr(population.Runs, "end_step", stopping)
        patches.setattr("runpy.run_module", lambda *_, **__: population.main(*population.parse_args()))
        run_program(MODULE, *command)
    assert "stopped at step 150; the same command goes on" in capsys.readouterr().out
    member = folder_of(tmp_path, 102)
    assert not (member / "summary.json").exists()
    copied = shutil.copytree(member, tmp_path / "copied")
    run_program(MODULE, *command)
    script = common.SCRIPTS["td3_pave_continuous"]
    checkpoint = str(copied / "checkpoint.pt")
    args = script.load_checkpoint(checkpoint)["args"]
    script.train(replace(args, resume=checkpoint, total_timesteps=160))
    own, expected = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (member, copied))
    for name in ("agent", "optimizers", "buffer_rows", "torch_rng", "step"):
        torch.testing.assert_close(own[name], expected[name], rtol=1e-3, atol=1e-4)
    assert json.loads((member / "summary.json").read_text())["steps"] == own["step"] == 160
    run_program(MODULE, *command)  # nothing is left to do
    assert capsys.readouterr().out.count("finished before") == 2
    assert "--batch-size" in fails(MODULE, *command, "--batch-size", 11).replace("batch_size", "--batch-size")


def test_a_member_that_diverges_touches_no_other_and_is_left_out(tmp_path, capsys):
    changes = {"total_timesteps": 110, "eval_interval": 105, "lambda_curv": 0.5}
    lists = ["--seeds", 101, 102, "--lambda-mpr", 0.7, 1e38]
    command = ["td3_pave_continuous", *flags(tmp_path, *lists, **changes)]
    for told in ("is left out, step", "lost before, step"):
        with pytest.raises(SystemExit, match=r"^1$"):
            run_program(MODULE, *command)
        output = "".join(capsys.readouterr())
        assert output.count(told) == 2 and "2 of 4 members are finished" in output
    lost = [path.parent for path in (tmp_path / "population").rglob("lost.json")]
    finished = [path.parent for path in (tmp_path / "population").rglob("summary.json")]
    assert all("1e+38" in str(path) for path in lost) and len(lost) == len(finished) == 2
    assert not set(lost) & set(finished)
    assert not any((path / "checkpoint.pt").exists() for path in lost)


def test_nan_weights_of_a_member_change_nothing_for_the_others(settings, make_population):
    members = settings(2, learning_starts=14, **KINDS["fixed"])
    made, alone = make_population(members), make_population(members[1:])
    for each in (made, alone):
        for step in range(24):
            if step == 18 and each is made:
                for name in ("actor.net.0.weight", "critics.0.net.0.weight"):
                    made.tensors[name][0] = torch.nan
            each.begin_step()
            each.end_step()
    assert list(made.lost) == [0] and made.alive() == [1] and "diverged" in made.lost[0]
    assert made.evaluate()[0] is None
    own, buffer = alone.member(0)
    assert_same_member(made, 1, own, own.optimizers, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(made.rows[1][:24], buffer.rows[:24], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", ["td3_pave_continuous"], indirect=True)
def test_each_step_is_one_transition_and_none_crosses_two_episodes(settings, make_population):
    """The env's observation is (position, step, episode); its even episodes terminate, its odd ones are truncated."""
    made = make_population(settings(2, env_id="odd_envs:ActionSingle-v0", learning_starts=100))
    for _ in range(45):
        made.begin_step()
        made.end_step()
    for i in range(2):
        _, buffer = made.member(i)
        assert (buffer.size, buffer.position) == (45, 45)
        observations, next_observations, _, _, terminations = buffer.rows[:45].split(buffer.widths, dim=1)
        count = torch.arange(45)
        assert torch.equal(observations[:, 1], (count % 10).float())
        assert torch.equal(next_observations[:, 1], (count % 10 + 1).float())
        assert torch.equal(observations[:, 2], next_observations[:, 2])
        assert torch.equal(observations[:, 2], (count // 10).float())
        assert torch.equal(terminations[:, 0], ((count % 10 == 9) & (count // 10 % 2 == 0)).float())
    starts = made.rows[:, :45:10, 0]
    assert len(starts.unique()) == starts.numel()  # each episode of each member has its own seed


@pytest.mark.parametrize("script", ["td3_pave_continuous"], indirect=True)
def test_an_env_that_fails_loses_its_member_not_the_launch(settings, make_population):
    made = make_population(settings(2, env_id="odd_envs:NanObservation-v0", learning_starts=100))
    for _ in range(50):
        if made.step == 40:
            made.lose(0, "for another reason")  # its env stands still before it would fail
        made.begin_step()
        made.end_step()
    assert made.alive() == [] and "another" in made.lost[0]
    assert made.envs.get_attr("failed") == (False, True)
    assert "step 44: the env failed" in made.lost[1] and "NaN or infinite observation" in made.lost[1]


@pytest.mark.parametrize("script", ["td3_pave_continuous"], indirect=True)
def test_a_lambda_of_zero_lets_no_infinite_term_through(script, settings, make_population, monkeypatch):
    """Where its lambda is 0, a term changes nothing, be it infinite, its gradient too; where it is not, all is lost."""
    pave_losses, results = script.pave_losses, []

    def infinite(*inputs):
        pave = pave_losses(*inputs)
        return pave._replace(mpr=torch.inf * pave.mpr)

    for function, weight in ((pave_losses, 0.0), (infinite, 0.0), (infinite, 1.0)):
        monkeypatch.setattr(script, "pave_losses", function)
        members = [replace(args, lambda_mpr=weight) for args in settings(2, **KINDS["fixed"])]
        made = filled(make_population(members))
        learn(made, 2)
        results.append(made.tensors)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[2]["critics.0.net.0.weight"].isnan().all()


@pytest.mark.parametrize("script", ["sac_pave_continuous"], indirect=True)
def test_a_graphed_update_is_an_update_with_each_new_noise(script, settings, make_population, monkeypatch):
    """With a stand-in for CUDA's graphs: a recording computes nothing, a replay does what was recorded."""
    plain, graphed = (filled(make_population(settings(2, **KINDS["auto"]))) for _ in range(2))
    fast_update = graphed.fast_update = script.CudaGraphUpdate(graphed.update)

    class Graph:
        def replay(self):
            self.metrics.update(graphed.update(*self.inputs))

    def recording(graph):
        def record(*inputs):
            graph.inputs, graph.metrics = inputs, {}
            return graph.metrics

        return patch.object(fast_update, "update", record)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for each in (plain, graphed):
        for step in range(6):
            each.learn(step % 2 == 0)
    torch.testing.assert_close(plain.tensors, graphed.tensors, rtol=0, atol=0)
    torch.testing.assert_close(plain.metrics, graphed.metrics, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("script", "kind"), [(SCRIPTS[0], "auto"), (SCRIPTS[1], "fixed")], indirect=["script"])
def test_a_compiled_population_computes_what_an_eager_one_does(script, settings, kind, device):
    """On a GPU replayed as a graph, too."""
    tensors = []
    for fast in (False, True):
        members = settings(2, compile=fast, cudagraphs=fast, **KINDS[kind])
        with contextlib.closing(population.Population(script, members, torch.device(device))) as made:
            learn(filled(made), 5)
            assert not fast or made.gradients.compiled
            tensors.append(made.tensors)
    torch.testing.assert_close(*tensors, rtol=1e-3, atol=1e-5)


def test_the_three_kinds_train_in_one_launch(tmp_path, capsys):
    """By a TOML file; members that two tables name are one."""
    members = tmp_path / "members.toml"
    members.write_text("""
        [[population]]
        lambda-mpr = [0]
        lambda-vfc = [0]
        lambda-curv = [0, 0.5]
        [[population]]
        seeds = [102]
        [[population]]
        autotune-curv = [true]
    """)
    changes = {"total_timesteps": 12, "learning_starts": 10, "eval_episodes": 0}
    lists = ["--seeds", 101, 102, "--members", members]
    run_program(MODULE, "sac_pave_continuous", *flags(tmp_path, *lists, **changes))
    output = capsys.readouterr().out
    assert "2 + 2 + 1 + 2 members" in output and "7 of 7 members are finished" in output
    runs = [common.load_run(path.parent) for path in (tmp_path / "population").rglob("summary.json")]
    assert sorted((run.method, run.args.seed) for run in runs) == sorted(
        [(method, seed) for method in ("base", "ablation-001", "auto") for seed in (101, 102)] + [("pave", 102)]
    )
    (auto,) = (run.path for run in runs if (run.method, run.args.seed) == ("auto", 101))
    assert "curv_weight_found" in json.loads((auto / "summary.json").read_text())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", 3], "give --seeds, not --seed"),
        (["--resume", "checkpoint.pt"], "the same command goes on with it"),
        (["--lambda-mpr", -1], "--lambda-mpr is -1.0; it must be from 0"),
        (["--autotune-curv", True, "--lambda-curv", 0], "--lambda-curv is 0.0; it must be from"),
        (["--env-id", "NoSuchEnv-v0"], "cannot make --env-id NoSuchEnv-v0"),
        (["--env-id", "odd_envs:Discrete-v0"], "has the action space"),
        (["--members", "missing.toml"], "missing.toml"),
        (["--members", __file__], "is no TOML file with [[population]] tables"),
    ],
)
def test_bad_input_is_one_line(words, told, tmp_path):
    assert told in fails(MODULE, "td3_pave_continuous", *flags(tmp_path), *words)
