"""PAVE in a plain twin-critic loop (TD3 without its frills), to read or to paste from; the lines marked PAVE are all.

python -m benchmarks.recipes.plain    # --lambdas 0 0 0: the same agent without PAVE
"""

import copy
import json
import random

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn, optim

# PAVE 1: paste the block of sac_pave_continuous.py here instead
from sac_pave_continuous import evaluate, make_env, pave_losses, rademacher_like

LAMBDAS = 2.0, 0.005, 2.0  # MPR, VFC, Curv: the paper's for TD3 on Pendulum; elsewhere start from 0.1, 0.1, 0.01


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1)).squeeze(1)  # (B,), and SiLU: a ReLU critic has no curvature


@torch.compile  # optional: faster after a minute; it goes on the loss, not on the critic
def critic_loss(critics, s, a, next_s, target, lambdas):
    """Sum over the critics of TD and the three terms. target: (B,), a (B, 1) would broadcast to (B, B)."""
    noise, probe = 0.01 * torch.randn_like(s), rademacher_like(a)  # PAVE 2: epsilon and v
    loss = 0.0
    for q in critics:
        pave = pave_losses(q, s, a, next_s, noise, probe, delta=1.0)  # PAVE 3: instead of q(s, a)
        loss += nn.functional.mse_loss(pave.q_values, target)
        loss += lambdas[0] * pave.mpr + lambdas[1] * pave.vfc + lambdas[2] * pave.curvature  # PAVE 4: the three terms
    return loss


def train(lambdas: tuple[float, float, float] = LAMBDAS, seed: int = 1, total_timesteps: int = 20_000) -> nn.Module:
    random.seed(seed)
    torch.manual_seed(seed)
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))  # critics see [-1, 1]
    actor = nn.Sequential(nn.Linear(3, 256), nn.SiLU(), nn.Linear(256, 1), nn.Tanh())
    critics = nn.ModuleList([Critic(), Critic()])
    actor_target, critic_targets = copy.deepcopy(actor), copy.deepcopy(critics)
    q_optimizer, actor_optimizer = optim.Adam(critics.parameters(), lr=1e-3), optim.Adam(actor.parameters(), lr=1e-3)
    replay, (obs, _) = [], env.reset(seed=seed)
    for _ in range(total_timesteps):
        with torch.no_grad():
            action = (actor(torch.as_tensor(obs)) + 0.1 * torch.randn(1)).clamp(-1, 1).numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.append((obs, action, float(reward), next_obs, float(terminated)))
        obs = env.reset()[0] if terminated or truncated else next_obs
        if len(replay) < 256:
            continue
        batch = zip(*random.choices(replay, k=64), strict=True)
        s, a, r, next_s, done = (torch.as_tensor(np.array(x)).float() for x in batch)
        with torch.no_grad():
            next_q = torch.min(*(q(next_s, actor_target(next_s)) for q in critic_targets))
        q_loss = critic_loss(critics, s, a, next_s, r + 0.98 * (1 - done) * next_q, lambdas)
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()

        actor_loss = -critics[0](s, actor(s)).mean()  # untouched
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        for target_net, net in ((actor_target, actor), (critic_targets, critics)):
            for old, new in zip(target_net.parameters(), net.parameters(), strict=True):
                old.data.lerp_(new.data, 0.005)
    return actor


if __name__ == "__main__":
    print(json.dumps(evaluate(tyro.cli(train), make_env("Pendulum-v1"), episodes=10)))
