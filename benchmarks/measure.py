"""Return, sm and oscillation of any policy f(observation) -> action in any Gymnasium env, both as the env has them."""

import gymnasium as gym
import numpy as np

from sac_pave_continuous import EVALUATION_SEED, seed_episode, smoothness


def measure(policy, env: gym.Env, episodes: int = 10) -> dict[str, float]:
    """Means over episodes, whose starts are those of the scripts' evaluations.

    policy: observation -> action, in the env's own units, as `env.step` takes it
    Returns "return"; "sm" (smoothness of the scripts, lower is smoother; it grows with the episode's length);
    "oscillation", mean |a_t+1 - a_t| over steps and action dimensions; "length". Actions count
    as clipped to the env's bounds, since no robot gets more.
    """
    totals = []
    for episode in range(episodes):
        observation = seed_episode(env, EVALUATION_SEED + episode)
        rewards, actions, over = [], [], False
        while not over:
            action = policy(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            rewards.append(reward)
            actions.append(np.ravel(np.clip(action, env.action_space.low, env.action_space.high)))
        oscillation = np.abs(np.diff(actions, axis=0)).mean() if len(actions) > 1 else 0.0
        totals.append((sum(rewards), smoothness(np.array(actions)), oscillation, len(rewards)))
    means = map(float, np.mean(totals, axis=0))
    return dict(zip(("return", "sm", "oscillation", "length"), means, strict=True))
