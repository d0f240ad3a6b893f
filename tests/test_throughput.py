"""benchmarks/throughput.py and schemes.py: all sides compute the same, they take turns, one line on bad input."""

import csv
import functools
import importlib.util
import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs benchmarks/requirements.txt")

from benchmarks import evaluate, schemes, throughput

TINY = {"env_id": "Pendulum-v1", "batch_size": 8, "buffer_size": 2000, "compile": False}


@pytest.fixture(autouse=True)
def torch_settings(monkeypatch):
    """prepare() sets torch up for the whole process: put it back. One thread: the machine may have other work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads, dynamic = torch.get_num_threads(), torch._dynamo.config.automatic_dynamic_shapes
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._dynamo.config.automatic_dynamic_shapes = dynamic


def test_the_naive_reference_computes_what_the_script_does(script, float64):
    results = []
    for module in (script, throughput.script_of(script.SCRIPT, "naive")):
        agent, buffer = throughput.make_agent(module, TINY | {"pave_batch_size": 6}, throughput.Args())
        torch.manual_seed(2)
        batch = [part.double() for part in buffer.sample(8)]
        state_noise, probe = 0.1 * torch.randn(6, 17), module.rademacher_like(batch[2][:6])
        agent.critics.requires_grad_(module is not script)  # the naive one goes through torch.autograd
        inputs = batch, torch.randn(8, 6), state_noise, probe
        if module is script:
            gradients, (loss, metrics) = agent.gradients("critics", agent.critic_loss, *inputs)
            gradients = gradients.values()
        else:
            loss, metrics = agent.critic_loss(*inputs)
            gradients = torch.autograd.grad(loss, agent.critics.parameters())
        results.append([loss.detach(), *(value.detach() for value in metrics.values()), *gradients])
    assert module is not script and module.pave_losses is throughput.naive_pave_losses
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["PAVE", "naive"])
def test_a_timed_update_is_one_of_the_agent(script, side, monkeypatch):
    agents, make_agent = [], throughput.make_agent
    monkeypatch.setattr(throughput, "make_agent", lambda *a, **k: agents.append(made := make_agent(*a, **k)) or made)
    update = throughput.update(
        throughput.script_of(script.SCRIPT, side), TINY, throughput.Args(), hidden=32, action_dim=2
    )
    ((agent, _),) = agents
    assert agent.critics[0].net[2].weight.shape == (32, 32) and agent.critics[0].net[0].in_features == 17 + 2
    parts = {name: value for name, value in agent.named_parameters() if not name.startswith("optimizers.")}
    before = [parameter.clone() for parameter in parts.values()]
    update(), update()  # TD3's actor has the second one
    assert not any(map(torch.equal, before, parts.values()))


def test_naive_updates_reach_the_parameters_of_the_scripts(script):
    agents = []
    for side in ("PAVE", "naive"):
        module = throughput.script_of(script.SCRIPT, side)
        agent, buffer = throughput.make_agent(module, TINY, throughput.Args())
        torch.manual_seed(3)
        for step in range(4):
            agent.update(buffer.sample(8), step % 2 == 0)
        agents.append(agent)
    for part in ("critics", "actor", "critic_targets"):
        for x, y in zip(*(getattr(agent, part).parameters() for agent in agents), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_every_scheme_has_the_gradients_of_the_scripts(scheme, stacked):
    sizes = {"batch": 8, "sizes": (3, 2)}
    reference = schemes.step(*schemes.twin_loss(schemes.pave_losses, False, torch.float64, **sizes))
    gradients = schemes.step(*schemes.twin_loss(schemes.SCHEMES[scheme], stacked, torch.float64, **sizes))
    assert schemes.error(gradients, reference) < 1e-12


def test_schemes_that_torch_cannot_run_or_that_are_wrong_are_left_out(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("no such derivative\nand a long trace")

    def wrong(q, *rest):
        return schemes.pave_losses(q, *rest)._replace(mpr=torch.zeros(()))

    eager = schemes.pave_losses
    monkeypatch.setattr(schemes, "SCHEMES", {"reverse over reverse": eager, "broken": broken, "wrong": wrong})
    monkeypatch.setattr(schemes, "twin_loss", functools.partial(schemes.twin_loss, batch=8, sizes=(3, 2)))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(schemes, "milliseconds", lambda sides, *_: {side: [1.0, 3.0, 2.0] for side in sides})
    schemes.main(throughput.Settings(output_dir=tmp_path))
    printed = capsys.readouterr().out
    assert "no such derivative" in printed and "long trace" not in printed and "gradients are off" in printed
    timed = [row["side"] for row in json.loads((tmp_path / "schemes.json").read_text())["rows"] if row["value"] == 2]
    assert set(timed) == {"floor", *(f"reverse over reverse, {how}" for how in (
        "two calls, eager", "two calls, compiled", "stacked, eager", "stacked, compiled"))}  # fmt: skip


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    samples = throughput.alternate(sides, 4)
    assert "".join(order) == "abcbcacababc"
    assert samples == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_training_moves_in_its_turns_only(monkeypatch, tmp_path):
    settings = TINY | {"output_dir": str(tmp_path), "cuda": False}
    with throughput.training("td3_pave_continuous", "naive", settings) as (seconds, turn):
        assert seconds > 0
        assert all(0 < turn(steps) < 1e5 for steps in (1, 7, 20))
    (run,) = tmp_path.iterdir()  # train() itself ran, up to the point where no more turns came
    assert "td3_pave_continuous" in run.name


def test_a_training_that_fails_is_one_line(tmp_path):
    settings = TINY | {"output_dir": str(tmp_path), "env_id": "NoSuchEnv-v0"}
    with (
        pytest.raises(evaluate.UserError, match=r"td3_pave_continuous, side PAVE, ended"),
        throughput.training("td3_pave_continuous", "PAVE", settings),
    ):
        pass


def test_values_are_medians_and_ratios_are_taken_within_a_round():
    samples = {"base": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}
    base, other = throughput.rows("update", "sac_pave_continuous", samples, "ms", ("base", "absent"))
    assert (base.value, base.min, base.max, base.ratio) == (2, 1, 4, 1)
    assert (other.value, other.ratio, other.ratio_to) == (4, 2, "base")
    assert throughput.rows("start", "", samples, "s")[0][-4:] == ("", None, 1, 4)


@pytest.mark.parametrize("peers", [False, True])
def test_every_section_prints_and_writes_its_numbers(monkeypatch, tmp_path, capsys, peers):
    for name in ("update", "critic_loss", "floor"):
        monkeypatch.setattr(throughput, name, lambda *_, **__: None)
    monkeypatch.setattr(throughput, "milliseconds", lambda sides, *_: {side: [2.0, 1.0] for side in sides})
    monkeypatch.setattr(throughput, "training", FakeTraining)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    throughput.main(throughput.Args(output_dir=tmp_path, rounds=2, cold=True, peers=peers))
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert {"machine", "threads", "torch", "date", "commit", "command"} <= content["machine"].keys()
    with open(tmp_path / "throughput.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["rows"])
    assert {line["section"] for line in lines} == {"update", "start", "training", "loss", "scaling"}
    sides = {line["side"] for line in lines if line["section"] == "training"}
    assert sides == {"λ=0", "PAVE", "PAVE-64", "naive"} | ({"SB3"} if peers else set())
    points = {line["parameter"] for line in lines if line["section"] == "scaling"}
    assert {"hidden=1024", "batch=4096", "action_dim=64"} < points and len(points) == 13
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| TD3 " in printed and "/ naive" in printed and ("/ SB3" in printed) == peers


class FakeTraining:
    """In place of throughput.training: every turn is as fast."""

    def __init__(self, name, side, settings):
        throughput.SCRIPTS[name].validate(throughput.SCRIPTS[name].Args(**settings))

    def __enter__(self):
        return 9.0, lambda steps: float(steps)

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rounds": 0}, "--rounds is 0; it must be at least 1"),
        ({"threads": -1}, "--threads is -1; it must be at least 1"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"peers": True}, "pip install stable-baselines3"),
        ({"output_dir": "file/results"}, "file"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, changes, line):
    (tmp_path / "file").touch()
    if "output_dir" in changes:
        changes = {"output_dir": tmp_path / changes["output_dir"]}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended, evaluate.user_errors():
        throughput.main(throughput.Args(**{"output_dir": tmp_path} | changes))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and line in message and len(message.splitlines()) == 1
