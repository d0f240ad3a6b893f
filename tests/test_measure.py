"""benchmarks/measure.py: what it gives is the scripts' own evaluation, with and without a filter behind the policy."""

import itertools
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from helper_runs import make_run

import sac_pave_continuous as script
from benchmarks import measure as tool
from benchmarks.common import evaluation_env, load_run
from benchmarks.measure import LowPass, measure

METRICS = ("return_mean", "smoothness_mean", "oscillation", "length_mean")


class Signs:
    """A policy that alternates between 1 and -1, from 1 on in every episode."""

    def reset(self):
        self.action = -1.0

    def __call__(self, _):
        self.action = -self.action
        return np.array([self.action])


def test_measure_is_evaluate_for_any_policy():
    torch.manual_seed(0)
    env = gym.make("Pendulum-v1")
    actor = script.Actor(3, 1)
    theirs = script.evaluate(actor, script.make_env("Pendulum-v1"), 2)

    def policy(observation):
        return 2 * actor(torch.as_tensor(observation)[None])[0].detach().numpy()

    ours = measure(policy, env, 2)
    np.testing.assert_allclose(list(ours.values()), [theirs[name] for name in METRICS], rtol=1e-5)


def test_measure_counts_what_the_env_can_get():
    signs = itertools.cycle([3.0, -3.0])  # Pendulum's limits are -2 and 2
    assert measure(lambda _: np.array([next(signs)]), gym.make("Pendulum-v1"), 1)["oscillation"] == pytest.approx(4)


def test_a_policy_with_a_reset_begins_anew_with_each_episode():
    env = gym.make("Pendulum-v1", max_episode_steps=3)
    assert measure(Signs(), env, 2)["oscillation"] == pytest.approx(2)
    assert measure(LowPass(Signs(), 0.5), env, 2)["oscillation"] == pytest.approx((1 + 0.5) / 2)  # 1, 0, 0.5 both times


def test_the_filter_sends_the_first_action_and_then_the_mean_of_its_last_and_the_new_one():
    filtered = LowPass(Signs(), 0.75)
    filtered.reset()
    assert [filtered(None).item() for _ in range(3)] == [1, 0.5, 0.625]


@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", *(f"benchmarks.envs:{w}/Pendulum-v1" for w in ("filter", "penalty"))]
)
def test_a_run_without_filter_is_measured_as_in_its_evaluation(env_id, tmp_path, capsys):
    folder = make_run(tmp_path, script, env_id=env_id)
    run = load_run(folder, need_critic=False)
    with evaluation_env(run) as env:
        theirs = script.evaluate(run.actor, env, 2)
    tool.main(tool.Args((folder,), (0.0, 0.5), 2, tmp_path / "table.csv"))
    plain, filtered = pd.read_csv(tmp_path / "table.csv").to_dict("records")
    ours = [plain[name] for name in ("return", "sm", "oscillation", "length")]
    np.testing.assert_allclose(ours, [theirs[name] for name in METRICS], rtol=1e-4)
    assert filtered["oscillation"] < plain["oscillation"]
    assert capsys.readouterr().out.count("Pendulum-v1") == 2


def test_a_policy_may_use_one_array_for_all_actions_and_a_training_draws_on_as_without():
    buffer = np.zeros(1)
    actions = iter([1.0, 0.0, 0.0])

    def policy(_):
        buffer[:] = next(actions)
        return buffer

    filtered = LowPass(policy, 0.5)
    assert [filtered(None).item() for _ in range(3)] == [1, 0.5, 0.25]
    np.random.seed(3)
    drawn = np.random.rand()
    np.random.seed(3)
    measure(Signs(), gym.make("Pendulum-v1", max_episode_steps=3), 1)
    assert np.random.rand() == drawn


def test_what_is_imported_from_it_needs_the_core_packages_alone():
    hidden = "import sys; sys.modules |= dict.fromkeys(('pandas', 'scipy', 'matplotlib', 'stable_baselines3'))"
    subprocess.run([sys.executable, "-c", f"{hidden}; from benchmarks.measure import measure"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"filter": (1.0,)}, "--filter is"),
        ({"filter": ()}, "--filter is"),
        ({"episodes": 0}, "--episodes is"),
        ({"runs": ()}, "at least one run"),
    ],
)
def test_bad_input(wrong, words, tmp_path):
    with pytest.raises(script.UserError, match=words):
        tool.main(tool.Args(**{"runs": (tmp_path,)} | wrong))
