"""Environments that a run must refuse, stop at or get right; `--env-id odd_envs:NAME` imports this module."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple


class Odd(gym.Env):
    """A point that drifts with the action, in 10-step episodes; the observation is (position, step, episode)."""

    def __init__(self, observe=None, observation_space=None, action_space=None, reward=None, bad_step=None, bad=np.nan):
        self.observation_space = observation_space or Box(-np.inf, np.inf, (3,))
        self.action_space = action_space or Box(-1, 1, (1,))
        self.observe, self.reward = observe or np.float32, reward or float
        self.bad_step, self.bad, self.total, self.episode = bad_step, bad, 0, -1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        start = self.np_random.normal() + np.random.normal()  # some envs draw from numpy's own generator
        self.position, self.steps, self.episode = start, 0, self.episode + 1
        return self.observe([self.position, self.steps, self.episode]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.total += 1
        self.position += float(np.sum(action))
        position = self.bad if self.total == self.bad_step else self.position
        over, even = self.steps == 10, self.episode % 2 == 0  # even episodes terminate, odd ones are truncated
        reward = self.reward(-abs(position))
        return self.observe([position, self.steps, self.episode]), reward, over and even, over and not even, {}


class Endless(Odd):
    """No episode of it ever ends by itself."""

    def step(self, action):
        return *super().step(action)[:2], False, False, {}


def register(name, entry_point=Odd, steps=1000, **kwargs):
    gym.register(f"{name}-v0", entry_point, max_episode_steps=steps, kwargs=kwargs, disable_env_checker=True)


def in_place(values, array=np.zeros(3, np.float32)):  # noqa: B008  one array for all observations, as some envs have
    array[:] = values
    return array


inf, real = np.inf, Box(-np.inf, np.inf, (2,))
register("Fine")
register("Aliased", observe=in_place)
register("Endless", Endless, steps=None)

OBSERVATIONS = {
    "Dict": (
        Dict({"joints": real, "near": Discrete(2), "desired_goal": Box(-inf, inf, (1,), np.float64)}),
        lambda v: {"joints": np.float32(v[:2]), "near": 1, "desired_goal": np.ones(1)},
    ),
    "Tuple": (Tuple([real, Box(0, 99, (1,), np.int64)]), lambda v: (np.float32(v[:2]), np.array([v[1]]))),
    "Row": (Box(-inf, inf, (1, 3)), lambda v: np.float32([v])),
    "Bits": (MultiBinary(3), lambda v: np.int8([v[0] > 0, v[1] > 5, 1])),
    "Integers": (Box(-99, 99, (3,), np.int32), np.int32),
    "Scalar": (Box(-inf, inf, ()), lambda v: np.float32(v[0])),
}
for name, (space, observe) in OBSERVATIONS.items():
    register(name, observe=observe, observation_space=space)

ACTIONS = {
    "ActionMatrix": Box(-1, 1, (2, 2)),
    "ActionScalar": Box(-1, 1, ()),
    "ActionHalf": Box(-0.1, 0.3, (2,), np.float16),
    "ActionDouble": Box(-0.1, 0.3, (2,), np.float64),
    "ActionLocked": Box(np.float32([-1, 0.5]), np.float32([1, 0.5])),
    "Asymmetric": Box(np.float32([0]), np.float32([4])),
}
for name, space in ACTIONS.items():
    register(name, action_space=space)

register("RewardArray", reward=lambda r: np.array([r]))
register("RewardScalarArray", reward=lambda r: np.array(r))
register("Discrete", action_space=Discrete(3))
register("Integer", action_space=Box(0, 10, (1,), np.int32))
register("Unbounded", action_space=Box(-inf, inf, (1,)))
register("Image", observation_space=Box(0, 255, (32, 32, 3), np.uint8))
register("ImageDict", observation_space=Dict({"camera": Box(0, 255, (32, 32, 3), np.uint8), "joints": real}))
register("NanObservation", bad_step=45)
register("InfReward", bad_step=45, reward=lambda r: inf if np.isnan(r) else r, observe=np.nan_to_num)
register("RewardVector", bad_step=45, reward=lambda r: [r, r] if np.isnan(r) else r, observe=np.nan_to_num)
register("HugeReward", bad_step=45, bad=1e30)
gym.register("NoSimulator-v0", entry_point="a_simulator_that_is_not_installed.envs:Robot")
