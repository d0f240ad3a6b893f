"""Environments that a run must refuse, stop at or get right; `--env-id odd_envs:NAME` imports this module."""

import random
from functools import partial

import gymnasium as gym
import numpy as np
import torch
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


class Unstable(Odd):
    """Its simulator raises: in the step `in_step` of all, or at the reset `in_reset`."""

    def __init__(self, in_step=None, in_reset=None):
        super().__init__()
        self.in_step, self.in_reset = in_step, in_reset

    def reset(self, seed=None, options=None):
        if self.episode + 1 == self.in_reset:
            raise RuntimeError("the simulator is unstable")
        return super().reset(seed)

    def step(self, action):
        if self.total + 1 == self.in_step:
            raise RuntimeError("the simulator is unstable")
        return super().step(action)


class GlobalNoise(Odd):
    """Each step draws from the global generators of numpy, Python and torch."""

    def step(self, action):
        noise = np.random.normal() + random.gauss(0, 1) + torch.randn(()).item()
        return super().step(np.clip(action + 0.1 * noise, -1, 1).astype(np.float32))


class TellsEpisodes(Odd):
    """As a monitor of its own would."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"episode": {"r": 1e6, "l": 7}}


class OnlyOne(Odd):
    """A serial port: there can't be two."""

    made = 0

    def __init__(self):
        super().__init__()
        if OnlyOne.made:
            raise RuntimeError("the port is in use")
        OnlyOne.made += 1


class OldReset(Odd):
    def reset(self):
        return super().reset()[0]


class OldStep(Odd):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class OldObservation(Odd):
    def reset(self, seed=None, options=None):
        return super().reset(seed)[0]


class OldGym:
    """Not even Gymnasium's class."""

    observation_space, action_space, metadata = Box(-1, 1, (3,)), Box(-1, 1, (1,)), {}


def register(name, *parts, steps=1000, **named):
    """Odd(*parts, **named) as an env; returns its --env-id."""
    gym.register(f"{name}-v0", partial(Odd, *parts, **named), max_episode_steps=steps, disable_env_checker=True)
    return f"odd_envs:{name}-v0"


def in_place(values, array=np.zeros(3, np.float32)):  # noqa: B008  one array for all observations, as some envs have
    array[:] = values
    return array


def in_parts(values):
    return {"joints": np.float32(values[:2]), "near": 1, "desired_goal": np.ones(1)}


inf, real, goal = np.inf, Box(-np.inf, np.inf, (2,)), Box(-np.inf, np.inf, (1,), np.float64)
joints = np.random.default_rng(0).uniform(0.1, 9, 100)  # bounds, so many that a careless rescaling oversteps one
REAL = [  # what people really have
    register("Dict", in_parts, Dict({"joints": real, "near": Discrete(2), "desired_goal": goal})),
    register("Tuple", lambda v: (np.float32(v[:2]), np.array([v[1]])), Tuple([real, Box(0, 99, (1,), np.int64)])),
    register("Row", lambda v: np.float32([v]), Box(-inf, inf, (1, 3))),
    register("Bits", lambda v: np.int8([v[0] > 0, v[1] > 5, 1]), MultiBinary(3)),
    register("Integers", np.int32, Box(-99, 99, (3,), np.int32)),
    register("Scalar", lambda v: np.float32(v[0]), Box(-inf, inf, ())),
    register("ActionMatrix", action_space=Box(-1, 1, (2, 2))),
    register("ActionScalar", action_space=Box(-1, 1, ())),
    register("ActionHalf", action_space=Box(np.float16(-joints / 3), np.float16(joints), dtype=np.float16)),
    register("ActionSingle", action_space=Box(np.float32(-joints / 3), np.float32(joints))),
    register("ActionDouble", action_space=Box(-joints / 3, joints, dtype=np.float64)),
    register("ActionLocked", action_space=Box(np.float32([-1, 0.5]), np.float32([1, 0.5]))),
    register("Asymmetric", action_space=Box(np.float32([0]), np.float32([4]))),
    register("RewardArray", reward=lambda r: np.array([r])),
    register("RewardScalarArray", reward=lambda r: np.array(r)),
]
register("Aliased", in_place)
register("NoTimeLimit", steps=None)
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
for kind, options in {
    "UnstableStep": {"entry_point": partial(Unstable, in_step=45)},
    "UnstableReset": {"entry_point": partial(Unstable, in_reset=4)},
    "UnstableStart": {"entry_point": partial(Unstable, in_reset=0)},
    "GlobalNoise": {"entry_point": GlobalNoise},
    "TellsEpisodes": {"entry_point": TellsEpisodes},
    "Monitored": {"entry_point": lambda: gym.wrappers.RecordEpisodeStatistics(Odd())},
    "OnlyOne": {"entry_point": OnlyOne},
    "Normalised": {"entry_point": lambda: gym.wrappers.NormalizeObservation(Odd())},
    "NormalisedReward": {"entry_point": lambda: gym.wrappers.NormalizeReward(Odd())},
    "OldReset": {"entry_point": OldReset},
    "OldStep": {"entry_point": OldStep},
    "OldObservation": {"entry_point": OldObservation},
    "OldGym": {"entry_point": OldGym},
}.items():
    gym.register(f"{kind}-v0", max_episode_steps=1000, disable_env_checker=True, **options)
