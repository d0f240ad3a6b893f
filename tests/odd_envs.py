"""Environments that a run must refuse, stop at or get right; `--env-id odd_envs:NAME` imports this module."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Odd(gym.Env):
    """A point that drifts with the action, in 10-step episodes; the observation is (position, step, episode)."""

    def __init__(
        self,
        observation_space=None,
        action_space=None,
        bad_step=None,
        bad_reward=0.0,
        bad_observation=0.0,
        aliased=False,
    ):
        self.observation_space = observation_space or Box(-np.inf, np.inf, (3,))
        self.action_space = action_space or Box(-1, 1, (1,))
        self.bad_step, self.bad_reward, self.bad_observation = bad_step, bad_reward, bad_observation
        self.total, self.episode = 0, -1
        self.aliased = np.zeros(3) if aliased else None

    def observe(self):
        if self.aliased is None:
            return np.array([self.position, self.steps, self.episode], dtype=np.float32)
        self.aliased[:] = self.position, self.steps, self.episode
        return self.aliased

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps, self.episode = self.np_random.normal(), 0, self.episode + 1
        observation = self.observe()
        if self.bad_step == 0:
            observation[0] += self.bad_observation
        return observation, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.total += 1
        self.position += float(action[0])
        observation, reward = self.observe(), -abs(self.position)
        if self.total == self.bad_step:
            observation[0] += self.bad_observation
            reward += self.bad_reward
        # even episodes end in a termination, odd ones in a truncation
        over = self.steps == 10
        return observation, reward, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}


def register(name, **kwargs):
    gym.register(f"{name}-v0", entry_point=lambda **k: Odd(**k), kwargs=kwargs, disable_env_checker=True)


register("Fine")
register("Discrete", action_space=Discrete(3))
register("Integer", action_space=Box(0, 10, (1,), np.int32))
register("Locked", action_space=Box(np.array([-1, 0.5], np.float32), np.array([1, 0.5], np.float32)))
register("Aliased", aliased=True)
register("Unbounded", action_space=Box(-np.inf, np.inf, (1,)))
register("MatrixAction", action_space=Box(-1, 1, (2, 2)))
register("Dict", observation_space=Dict({"joints": Box(-1, 1, (2,))}))
register("Image", observation_space=Box(0, 255, (32, 32, 3), np.uint8))
register("NanReset", bad_step=0, bad_observation=np.nan)
register("NanObservation", bad_step=45, bad_observation=np.nan)
register("InfReward", bad_step=45, bad_reward=np.inf)
register("HugeReward", bad_step=45, bad_reward=1e30)
register("Asymmetric", action_space=Box(np.array([0.0], np.float32), np.array([4.0], np.float32)))
gym.register("NoSimulator-v0", entry_point="a_simulator_that_is_not_installed.envs:Robot")
