"""Envs to compare PAVE in: what people do against chatter without it, and Pendulum-v1 with other rewards.

    python td3_pave_continuous.py --env-id benchmarks.envs:filter/Pendulum-v1

    filter/ENV      a low-pass filter between policy and env, in training, too
    penalty/ENV     a penalty on the change of the action in the reward; evaluated in remember/ENV
    remember/ENV    ENV with the last action among the observations, and nothing else
    Pendulum-x0.1-v1, Pendulum-x10-v1    Pendulum-v1 with its rewards multiplied by 0.1 and by 10
    Pendulum-sparse-v1    Pendulum-v1 with a reward of 1 a step while the pole is within 18 degrees of upright, else 0

ENV is any env with bounded actions that Gymnasium itself has. An env of your own gets the first three from its module,
by `benchmarks.envs.add_rivals("MyRobot-v0")`; they are then my_module:filter/MyRobot-v0 and so on. For these three the
scripts look up ENV's own lambdas, for the others the untuned ones. The strength of filter and penalty was chosen once
for all envs, on seeds that are not reported (NOTES.md, 2026-11-28).
"""

import functools

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv

FILTER_BETA = 0.5  # the share of its last output that the filter keeps at each step
PENALTY = 1.0  # weight of the penalty, in units of the env's own reward: see mean_reward


class LastAction(gym.Wrapper):
    """An env whose observation ends in the last action that was sent to it, scaled to [-1, 1]; after a reset it is 0.

    Without it the next state of a filtered env, and the reward of a penalised one, would not follow from state and
    action alone.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        low, high = np.float64(env.action_space.low), np.float64(env.action_space.high)
        self.middle, self.half_range = (high + low) / 2, (high - low) / 2
        size = gym.spaces.flatdim(env.observation_space) + self.middle.size
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,))
        self.sent_action = self.middle

    def normalised(self, action: np.ndarray) -> np.ndarray:
        """From the env's units to [-1, 1]; an action that can't move is 0."""
        return (action - self.middle) / np.where(self.half_range > 0, self.half_range, 1)

    def observe(self, observation) -> np.ndarray:
        observation = gym.spaces.flatten(self.env.observation_space, observation)
        return np.concatenate([observation, self.normalised(self.sent_action).ravel()], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.sent_action = self.middle
        return self.observe(observation), info

    def step(self, action: np.ndarray):
        self.sent_action = action
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self.observe(observation), reward, terminated, truncated, info


class Filter(LastAction):
    """A first-order low-pass filter: sent_t = beta sent_t-1 + (1 - beta) action_t, from the middle of the range on."""

    def __init__(self, env: gym.Env, beta: float):
        super().__init__(env)
        self.beta = beta

    def step(self, action: np.ndarray):
        sent = self.beta * self.sent_action + (1 - self.beta) * action
        return super().step(sent.astype(self.env.action_space.dtype))


class Penalty(LastAction):
    """The reward minus weight * |action_t - action_t-1|^2, a sum over the dimensions, actions in [-1, 1]."""

    def __init__(self, env: gym.Env, weight: float, evaluation_id: str):
        super().__init__(env)
        self.weight, self.evaluation_id = weight, evaluation_id

    def step(self, action: np.ndarray):
        change = self.normalised(action) - self.normalised(self.sent_action)
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward - self.weight * np.square(change).sum(), terminated, truncated, info


@functools.cache
def mean_reward(env_id: str) -> float:
    """The mean |reward| of a step over 1,000 steps of uniformly random actions, always the same ones."""
    rewards, over = [], True
    with gym.make(env_id) as env:
        env.action_space.seed(0)
        for step in range(1000):
            if over:
                env.reset(seed=step)
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            over = terminated or truncated
            rewards.append(abs(reward))
    return float(np.mean(rewards))


def make_filter(env_id: str, **options) -> gym.Env:
    return Filter(gym.make(env_id, **options), FILTER_BETA)


def make_penalty(env_id: str, **options) -> gym.Env:
    weight = PENALTY * mean_reward(env_id)
    return Penalty(gym.make(env_id, **options), weight, f"benchmarks.envs:remember/{env_id}")


def make_remember(env_id: str, **options) -> gym.Env:
    return LastAction(gym.make(env_id, **options))


def make_scaled_pendulum(factor: float, **options) -> gym.Env:
    return gym.wrappers.TransformReward(PendulumEnv(**options), lambda reward: factor * reward)


class SparsePendulum(PendulumEnv):
    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(observation[0] > 0.95), terminated, truncated, info  # cos(18 degrees) is 0.95


def add_rivals(env_id: str) -> None:
    """Register filter/, penalty/ and remember/ of a registered env."""
    for namespace, make in (("filter", make_filter), ("penalty", make_penalty), ("remember", make_remember)):
        entry_point = functools.partial(make, env_id)
        # the inner env's checks are enough, and its own time limit ends the episode at the same step
        options = {"max_episode_steps": gym.spec(env_id).max_episode_steps, "disable_env_checker": True}
        gym.register(f"{namespace}/{env_id}", entry_point, **options)


for name, factor in {"x0.1": 0.1, "x10": 10.0}.items():
    entry_point = functools.partial(make_scaled_pendulum, factor)
    gym.register(f"Pendulum-{name}-v1", entry_point, max_episode_steps=200)
gym.register("Pendulum-sparse-v1", SparsePendulum, max_episode_steps=200)
for spec in list(gym.registry.values()):
    if spec.namespace is None:
        add_rivals(spec.id)
