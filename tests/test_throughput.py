"""benchmarks/throughput.py: what is timed is the agent's own work, sides take turns, one line on bad input."""

import itertools
import json

import pytest
import torch

pytest.importorskip("pandas", reason="needs benchmarks/requirements.txt")

import pandas as pd

from benchmarks import common, throughput


@pytest.fixture(autouse=True)
def torch_settings():
    """prepare() sets torch up for the whole process: put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


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
    does = throughput.side(script, throughput.SIDES[side], tiny(tmp_path))
    assert (calls["update"], calls["explore"], calls["add"]) == ([], 0, 210)
    does["updates/s"](4)
    assert len(calls["update"]) == 4 and calls["add"] == 210
    assert sum(calls["update"]) == 4 // script.Args().policy_frequency
    does["env steps/s"](3)
    assert (len(calls["update"]), calls["explore"], calls["add"]) == (7, 3, 213)
    assert calls["rows"] == {{"λ=0": 0, "64 rows": 64, "PAVE": 256}[side]}


def test_sides_take_even_turns_after_a_warm_up(tmp_path, monkeypatch):
    done, clock = [], itertools.count(101.0)
    assert throughput.rate(lambda n: torch.linalg.matrix_norm(torch.randn(300, 300)), 7) > 7
    monkeypatch.setattr(throughput, "rate", lambda function, n: function(n) or next(clock))
    functions = {name: lambda n, name=name: done.append((name, n)) for name in "ab"}
    samples = throughput.measure(functions, tiny(tmp_path, seconds=1), "")
    assert done[:4] == [("a", 20), ("a", 10), ("b", 20), ("b", 10)]  # the warm-up, then how long a turn has to be
    assert done[4:] == [("a", 100), ("b", 102), ("b", 102), ("a", 100)] and samples == {
        "a": [103, 106],
        "b": [104, 105],
    }


def test_values_are_medians_and_ratios_are_taken_within_a_round():
    plain, pave = throughput.rows("sac", "updates/s", {"λ=0": [4.0, 2.0, 1.0], "PAVE": [4.0, 1.0, 1.0]})
    assert (plain["median"], plain["min"], plain["max"], plain["/ λ=0"]) == (2, 1, 4, 1)
    assert (pave["median"], pave["/ λ=0"]) == (1, 1)  # the median of 1, 1/2 and 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_and_its_files(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setattr(throughput, "side", lambda *_: {"updates/s": None, "env steps/s": None})
    monkeypatch.setattr(throughput, "measure", lambda functions, *_: {name: [2.0, 1.0] for name in functions})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    throughput.main(tiny(tmp_path, device=device))
    content = json.loads((tmp_path / "throughput.json").read_text())
    assert len(pd.read_csv(tmp_path / "throughput.csv")) == len(content["rows"]) == 2 * (2 * 3 + (device == "cpu"))
    assert {"threads", "command", "torch", "machine"} <= content["machine"].keys()
    printed = capsys.readouterr().out
    assert ("matrix products alone" in printed) == (device == "cpu") and "floor" not in printed


def test_matrix_products_are_those_of_n_updates(script, monkeypatch):
    shapes = []
    monkeypatch.setattr(torch, "matmul", lambda x, weight: shapes.append((x.shape, weight.shape)) or x)
    throughput.matrix_products(script)(2)
    assert set(shapes) == {((256, 256), (256, 256))}
    assert len(shapes) == 2 * {"sac_pave_continuous": 52, "td3_pave_continuous": 47.5}[script.SCRIPT]


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
