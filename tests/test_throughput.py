"""benchmarks/throughput.py: what is timed is the agent's own work, sides take turns."""

import itertools
import json
from unittest.mock import patch

import pandas as pd
import pytest
import stable_baselines3
import torch

from benchmarks import common, throughput
from benchmarks.population import Population


def tiny(tmp_path, **changes):
    settings = {"env_id": "Pendulum-v1", "rounds": 2, "seconds": 0.01, "output_dir": tmp_path, "compile": False}
    return throughput.Args(**settings | {"cuda": False} | changes)


@pytest.mark.parametrize(("side", "rows"), [("λ=0", 0), ("64 rows", 64), ("PAVE", 256)])
def test_a_step_is_the_agents_own(script, side, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "FILL", 210)  # past the end of an episode
    agent, buffer = script.Agent, script.ReplayBuffer
    with (
        patch.object(agent, "update", autospec=True, side_effect=agent.update) as update,
        patch.object(agent, "explore", autospec=True, side_effect=agent.explore) as explore,
        patch.object(buffer, "add", autospec=True, side_effect=buffer.add) as add,
    ):
        steps = throughput.stepper(script, throughput.SIDES[side], tiny(tmp_path))
        assert (update.call_count, add.call_count) == (0, 210)
        steps(6)
        assert (update.call_count, explore.call_count, add.call_count) == (6, 216, 216)
    (_, _, reached, *_), (_, observed, *_) = (call.args for call in add.mock_calls[199:201])
    assert (reached != observed).any()  # a new episode
    trained, _, _ = update.call_args.args
    assert trained.pave_rows == rows
    assert sum(call.args[2] for call in update.mock_calls) == 6 // script.Args().policy_frequency  # of the actor


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_a_step_of_stable_baselines3_is_one_with_an_update(name, tmp_path):
    agent = getattr(stable_baselines3, name)
    with patch.object(agent, "train", autospec=True, side_effect=agent.train) as updates:
        throughput.sb3_stepper(name, tiny(tmp_path))(6)
    assert [call.kwargs for call in updates.mock_calls] == [{"batch_size": 256, "gradient_steps": 1}] * 6


def test_sides_take_even_turns_after_a_warm_up(tmp_path, monkeypatch):
    done, clock = [], itertools.count(101.0)
    assert throughput.rate(lambda n: torch.linalg.matrix_norm(torch.randn(300, 300)), 7) > 7
    monkeypatch.setattr(throughput, "rate", lambda steps, n: steps(n) or next(clock))
    sides = {name: lambda n, name=name: done.append((name, n)) for name in "ab"}
    samples = throughput.measure(sides, tiny(tmp_path, seconds=1), "")
    assert done[:4] == [("a", 20), ("a", 10), ("b", 20), ("b", 10)]  # the warm-up, then how long a turn has to be
    assert done[4:] == [("a", 100), ("b", 102), ("b", 102), ("a", 100)]
    assert samples == {"a": [103, 106], "b": [104, 105]}


def test_the_table_and_its_files_are_medians_and_ratios_within_a_round(tmp_path, monkeypatch, capsys):
    rates = {"PAVE": [4.0, 1.0, 1.0], "λ=0": [4.0, 2.0, 1.0]}
    monkeypatch.setattr(throughput, "stepper", lambda *_: None)
    monkeypatch.setattr(throughput, "measure", lambda sides, *_: {side: rates.get(side, [9.0] * 3) for side in sides})
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    throughput.main(tiny(tmp_path, sb3=True))
    table = pd.read_csv(tmp_path / "throughput.csv", index_col=["script", "side"]).loc["td3_pave_continuous"]
    assert table.index.tolist() == ["λ=0", "64 rows", "PAVE", "SB3"]
    assert table.loc["λ=0"].tolist() == [2, 1, 4, 1]
    assert table.loc["PAVE"].tolist() == [1, 1, 4, 1]  # the last is the median of 1, 1/2 and 1
    assert {"threads", "command", "torch", "machine"} <= json.loads((tmp_path / "throughput.json").read_text()).keys()
    assert "sac_pave_continuous | 64 rows" in capsys.readouterr().out


def test_a_population_is_measured_against_as_many_single_runs(tmp_path, monkeypatch):
    """In agent-steps a second: a turn of n steps does n of each agent, in both ways."""
    monkeypatch.setattr(throughput, "FILL", 12)
    monkeypatch.setattr(throughput, "SCRIPTS", {"sac_pave_continuous": common.SCRIPTS["sac_pave_continuous"]})
    done, single = [], throughput.stepper

    def counting(script, settings, args):
        steps = single(script, settings, args)
        return lambda n: done.append(n) or steps(n)

    def two_turns(ways, args, title):
        for steps in ways.values():
            steps(2)
        return {"one after another": [1.0, 4.0, 2.0], "at once": [2.0, 2.0, 2.0]}

    monkeypatch.setattr(throughput, "stepper", counting)
    monkeypatch.setattr(throughput, "measure", two_turns)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    learn = Population.learn
    with patch.object(Population, "learn", autospec=True, side_effect=learn) as updates:
        throughput.main(tiny(tmp_path, population=(3,)))
    assert done == [6, 6]  # λ=0 and PAVE
    assert [len(call.args[0].settings) for call in updates.mock_calls] == [3] * 4
    table = pd.read_csv(tmp_path / "throughput.csv")
    assert table["side"].tolist() == ["λ=0", "PAVE"] and table["agents"].tolist() == [3, 3]
    assert table.loc[0, ["one after another", "at once", "ratio"]].tolist() == [6.0, 6.0, 1.0]


def test_bad_settings_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "find_spec", lambda name: None)
    bad = [({"rounds": 0}, "--rounds and --seconds"), ({"sb3": True}, "pip install stable-baselines3")]
    for changes, words in [*bad, ({"population": (0,)}, "numbers of agents")]:
        with pytest.raises(common.UserError, match=words):
            throughput.main(tiny(tmp_path, **changes))
