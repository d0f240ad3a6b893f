"""Pendulum-v1 with a sparse reward: 1 a step while the pole is within 18 degrees of upright (cos > 0.95), else 0.

    python td3_pave_continuous.py --env-id benchmarks.sparse_rewards:Pendulum-sparse-v1

The paper's lambdas and settings for Pendulum are not looked up: give them as flags.
"""

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


class SparsePendulum(PendulumEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(observation[0] > 0.95), *rest


gym.register("Pendulum-sparse-v1", SparsePendulum, max_episode_steps=200)
