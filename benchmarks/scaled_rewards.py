"""Pendulum-v1 with its rewards multiplied by 0.1 and by 10, to see which settings depend on the reward's scale.

    python td3_pave_continuous.py --env-id benchmarks.scaled_rewards:Pendulum-x10-v1

Returns are of the scaled rewards. The paper's lambdas and settings for Pendulum are not looked up: give them as flags.
"""

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

for name, factor in {"x0.1": 0.1, "x10": 10.0}.items():

    def make(factor=factor, **options) -> gym.Env:
        """Pendulum-v1 without its time limit, rewards times `factor`."""
        return gym.wrappers.TransformReward(PendulumEnv(**options), lambda reward: factor * reward)

    gym.register(f"Pendulum-{name}-v1", make, max_episode_steps=200)
