"""benchmarks/throughput.py: what is timed is the agent's own work, sides take turns, one line on bad input."""

import csv
import itertools
import json
import sys

import pytest
import torch

pytest.importorskip("pandas", reason="needs benchmarks/requirements.txt")

from benchmarks import common, throughput


@pytest.fixture(autouse=True)
def torch_settings(monkeypatch):
    """prepare() sets torch up for the whole process: put it back."""
    threads, limit = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._dynamo.config.recompile_limit = limit


def tiny(tmp_path, **changes):
    settings = {"env_id": "Pendulum-v1", "rounds": 2, "seconds": 0.01, "output_dir": tmp_path, "compile": False}
    return throughput.Args(**settings | changes)


@pytest.mark.parametrize("side", throughput.SIDES)
def test_a_side_does_the_agents_own_updates_and_steps(script, side, tmp_path, monkeypatch):
    calls = {"update": [], "explore": 0, "add": 0, "rows": set()}
    update, explore, add = script.Agent.update, script.Agent.explore, script.ReplayBuffer.add

    def counted_update(agent, batch, update_actor):
        calls["update"].append(update_actor)
        calls["rows"].add(agent.pave_rows)
        return update(agent, batch, update_actor)

    monkeypatch.setattr(script.Agent, "update", counted_update)
    monkeypatch.setattr(script.Agent, "explore", lambda *a: calls.update(explore=calls["explore"] + 1) or explore(*a))
    monkeypatch.setattr(script.ReplayBuffer, "add", lambda *a: calls.update(add=calls["add"] + 1) or add(*a))
    monkeypatch.setattr(throughput, "FILL", 210)  # past the end of an episode
    does = throughput.our_side(script, throughput.SIDES[side], tiny(tmp_path))
    assert (calls["update"], calls["explore"], calls["add"]) == ([], 0, 210)
    does["updates/s"](4)
    assert len(calls["update"]) == 4 and calls["add"] == 210
    assert sum(calls["update"]) == 4 // script.Args().policy_frequency
    does["env steps/s"](3)
    assert (len(calls["update"]), calls["explore"], calls["add"]) == (7, 3, 213)
    assert calls["rows"] == {{"λ=0": 0, "64 rows": 64, "PAVE": 256}[side]}


def test_sides_take_turns():
    order = []
    turns = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    assert throughput.alternate(turns, 4) == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert "".join(order) == "abcbcacababc"


def test_a_rate_is_per_second_and_a_turn_is_even(tmp_path, monkeypatch):
    done, clock = [], itertools.count()
    assert throughput.rate(lambda n: torch.linalg.matrix_norm(torch.randn(300, 300)), 7) > 7
    monkeypatch.setattr(throughput, "rate", lambda function, n: function(n) or float(next(clock)) + 101.0)
    samples = throughput.measure({"a": done.append}, tiny(tmp_path, seconds=1), "")
    assert done == [20, 10, 100, 100] and samples == {"a": [102.0, 103.0]}  # warm-up, its length, two even turns


def test_values_are_medians_and_ratios_are_taken_within_a_round():
    plain, pave = throughput.rows("sac", "updates/s", {"λ=0": [4.0, 2.0, 1.0], "PAVE": [1.0, 1.0, 1.0]})
    assert (plain["median"], plain["min"], plain["max"], plain["/ λ=0"]) == (2, 1, 4, 1)
    assert pave["/ λ=0"] == 0.5  # the median of 1/4, 1/2 and 1
    assert throughput.rows("", "x", {"reference matmuls": [3.0]})[0]["/ λ=0"] is None


@pytest.mark.parametrize("device, sb3", [("cpu", False), ("cuda", True)])
def test_the_table_and_its_files(tmp_path, monkeypatch, capsys, device, sb3):
    for name in ("our_side", "sb3_side"):
        monkeypatch.setattr(throughput, name, lambda *_: {"updates/s": None, "env steps/s": None})
    monkeypatch.setattr(throughput, "measure", lambda functions, *_: {side: [2.0, 1.0] for side in functions})
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: sb3 or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    throughput.main(tiny(tmp_path, device=device))
    printed = capsys.readouterr().out
    with open(tmp_path / "throughput.csv") as file:
        lines = list(csv.DictReader(file))
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert len(lines) == len(content["rows"]) == (2 * 2 * (3 + sb3) + (device == "cpu"))
    assert {"threads", "command", "torch", "machine"} <= content["machine"].keys()
    assert ("42 reference matmuls/s" in printed) == (device == "cpu") and ("SB3" in printed) == sb3
    assert "floor" not in printed.lower()


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"rounds": 0}, "--rounds is 0; it must be at least 1"),
        ({"threads": -1}, "--threads is -1; it must be at least 1"),
        ({"seconds": 0.0}, "--seconds is 0.0"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"env_id": "NoSuchEnv-v0"}, "NoSuchEnv"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, changes, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended, common.user_errors():
        throughput.main(tiny(tmp_path, **changes))
    message = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and line in message and len(message.splitlines()) == 1


def test_stable_baselines3_is_measured_with_our_sizes(script, tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(throughput, "FILL", 300)
    does = throughput.sb3_side(script, tiny(tmp_path))
    model = does["updates/s"].func.__self__
    before = model._n_updates, model.num_timesteps
    does["updates/s"](3)
    does["env steps/s"](5)
    assert (model._n_updates - before[0], model.num_timesteps - before[1]) == (8, 5)
    assert model.batch_size == 256 and sys.modules["stable_baselines3"]
