"""benchmarks/envs.py: what a filtered or punished env does, and what it tells the scripts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from odd_envs import REAL, Odd

from benchmarks import envs
from sac_pave_continuous import seed_episode

WRAPPED = [f"benchmarks.envs:{namespace}/Pendulum-v1" for namespace in ("filter", "penalty", "remember")]


def play(env, actions, seed=1):
    """The observations, from the reset on, the rewards, and how the last step ended."""
    observations, rewards = [seed_episode(env, seed)], []
    for action in actions:
        observation, reward, *ends, _ = env.step(np.float32(action))
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards), ends


@pytest.mark.parametrize("env_id", WRAPPED)
def test_the_lambdas_and_the_time_limit_are_the_inner_envs(script, env_id):
    found, plain = (script.validate(script.Args(env_id=name)) for name in (env_id, "Pendulum-v1"))
    assert [getattr(found, name) for name in script.LAMBDAS] == [getattr(plain, name) for name in script.LAMBDAS]
    env = script.make_env(env_id)
    *_, ends = play(env, np.zeros((199, 1)))
    assert ends == [False, False] and env.step(np.zeros(1))[2:4] == (False, True) and env.spec.max_episode_steps == 200


def test_the_filter_sends_the_mean_of_its_last_action_and_the_new_one_and_tells_both(script):
    plain = script.make_env("Pendulum-v1")
    env = script.ContinuousEnv(envs.Filter(gym.make("Pendulum-v1"), beta=0.75))
    observations, rewards, _ = play(env, [[1], [1], [-1]])
    filtered = np.array([0.25, 0.4375, 0.078125])  # 0.75 of the last and 0.25 of the new, from 0 on
    same, same_rewards, _ = play(plain, filtered[:, None])
    assert observations[:, -1] == pytest.approx([0, *filtered]) and env.sent_action == pytest.approx(2 * filtered[2])
    assert observations[:, :-1] == pytest.approx(same) and rewards == pytest.approx(same_rewards)
    assert play(env, [[0.5]])[0][1, -1] == pytest.approx(0.125)  # an episode knows nothing of the one before


class Alternate(torch.nn.Module):
    """A policy that goes from limit to limit."""

    def __init__(self):
        super().__init__()
        self.sign = torch.nn.Parameter(torch.ones(1, 1))

    def forward(self, _observations):
        self.sign.neg_()
        return self.sign.clone()


def test_smoothness_is_measured_on_what_the_filter_sends(script):
    plain, filtered = (script.evaluate(Alternate(), script.make_env(name), 1) for name in ("Pendulum-v1", WRAPPED[0]))
    assert plain["oscillation"] == pytest.approx(4)
    assert filtered["oscillation"] == pytest.approx(4 * (1 - envs.FILTER_BETA) / (1 + envs.FILTER_BETA), rel=0.02)


def test_the_penalty_is_in_the_training_and_not_in_the_evaluation(script):
    env = script.make_env(WRAPPED[1])
    evaluation = script.make_evaluation_env(WRAPPED[1], env)
    actions = np.array([[0.5], [-1], [-1]])
    observations, rewards, _ = play(env, actions)
    plain, plain_rewards, _ = play(script.make_env("Pendulum-v1"), actions)
    evaluated, evaluated_rewards, _ = play(evaluation, actions)
    weight = envs.PENALTY * envs.mean_reward("Pendulum-v1")
    assert plain_rewards - rewards == pytest.approx(weight * np.array([0.25, 2.25, 0]), rel=1e-5)
    assert (evaluated_rewards == plain_rewards).all() and (evaluated == observations).all()
    assert (observations[:, :-1] == plain).all() and observations[:, -1] == pytest.approx([0, 0.5, -1, -1])
    for other in (WRAPPED[0], WRAPPED[2]):
        assert script.make_evaluation_env(other, script.make_env(other)).spec.id == other.partition(":")[2]


def test_the_penalty_sums_over_the_dimensions_in_units_of_the_range(script):
    space = gym.spaces.Box(np.float32([0, -1]), np.float32([4, 1]))
    name = f"Two-{script.SCRIPT}-v0"
    gym.register(name, lambda: Odd(action_space=space), max_episode_steps=9)
    envs.add_rivals(name)
    punished, plain = script.make_env(f"penalty/{name}"), script.make_env(name)
    (_, rewards, _), (_, plain_rewards, _) = (play(env, [[1, 0], [0.5, -1]]) for env in (punished, plain))
    weight = envs.PENALTY * envs.mean_reward(name)
    assert plain_rewards - rewards == pytest.approx(weight * np.array([1, 1.25]), rel=1e-4)


@pytest.mark.parametrize("env_id", REAL)
def test_any_env_of_a_users_module_may_be_wrapped(script, env_id):
    module, _, name = env_id.partition(":")
    if f"filter/{name}" not in gym.registry:  # of another test
        envs.add_rivals(name)
    plain = script.make_env(env_id)
    for namespace in ("filter", "penalty"):
        env = script.make_env(f"{module}:{namespace}/{name}")
        actions = plain.action_space.shape[0]
        assert env.observation_space.shape[0] == plain.observation_space.shape[0] + actions
        play(env, [np.ones(actions), -np.ones(actions), np.zeros(actions)])


@pytest.mark.parametrize(("name", "factor"), [("x0.1", 0.1), ("x10", 10.0)])
def test_the_scaled_envs_are_pendulum_but_for_the_rewards(name, factor):
    plain, scaled = gym.make("Pendulum-v1"), gym.make(f"benchmarks.envs:Pendulum-{name}-v1")
    actions = np.random.default_rng(1).uniform(-2, 2, (200, 1))
    observations, rewards, ends = play(plain, actions)
    same, scaled_rewards, same_ends = play(scaled, actions)
    assert (observations == same).all() and scaled_rewards == pytest.approx(factor * rewards)
    assert ends == same_ends == [False, True]


@pytest.mark.parametrize(("angle", "reward"), [(0.2, 1), (-0.2, 1), (0.5, 0), (3, 0)])
def test_the_sparse_env_rewards_the_top_alone(angle, reward):
    env = gym.make("benchmarks.envs:Pendulum-sparse-v1")
    env.reset()
    env.unwrapped.state = np.array([angle, 0])
    assert env.step(np.zeros(1, np.float32))[1] == reward
