"""SAC + PAVE with a critic as of today: N members at once by torch.func.vmap, normalised, with a distributional head.

    python -m benchmarks.recipes.ensemble
    python -m benchmarks.recipes.ensemble --lambdas 0 0 0    # the same agent without PAVE

PAVE wants one value a row: it is given one member's expectation, and vmap makes that all members'. The TD target is
the least of two members drawn at random (REDQ), spread over its two nearest atoms.
"""

import json

import torch
import tyro
from torch import nn, optim
from torch.func import functional_call, stack_module_state, vmap

from sac_pave_continuous import Actor, ReplayBuffer, evaluate, make_env, pave_losses, rademacher_like

MEMBERS, ATOMS, LOWEST, SPACING = 3, 56, -1000.0, 20.0  # atom k is the return LOWEST + SPACING k
# The paper's 0.1, 0.005, 0.5 and delta 1 for SAC on Pendulum. Q counts atoms, so that cross-entropy is near half a
# squared error: squares keep their lambda, and what is linear in Q divides its own by SPACING
LAMBDAS, DELTA = (0.1, 0.005, 0.5 / SPACING), 1 / SPACING


class Critic(nn.Module):
    """A member: logits (B, ATOMS). nn.GroupNorm(1, H) for nn.LayerNorm(H): the same function, with right gradients."""

    def __init__(self, inputs: int, hidden: int = 64):
        super().__init__()
        layers = (nn.Linear(inputs, hidden), nn.GroupNorm(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.net = nn.Sequential(*layers, nn.GroupNorm(1, hidden), nn.SiLU(), nn.Linear(hidden, ATOMS))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1))


template = Critic(4)  # of the weights only the shapes are used


def q_value(weights, s, a):
    """One member's expectation (B,), in atoms."""
    return functional_call(template, weights, (s, a)).softmax(1) @ torch.arange(ATOMS, dtype=s.dtype)


@torch.compile  # optional: faster after a minute; it goes on the loss, not on the critic
def critic_loss(members, s, a, next_s, target, lambdas):
    """Sum over the members of cross-entropy and the three terms. members: stacked weights; target: (B,), in atoms."""
    two_hot = (1 - (target.clamp(0, ATOMS - 1)[:, None] - torch.arange(ATOMS)).abs()).clamp(min=0)
    noise, probe = 0.01 * torch.randn_like(s), rademacher_like(a)

    def member_loss(weights):
        pave = pave_losses(lambda s, a: q_value(weights, s, a), s, a, next_s, noise, probe, DELTA)
        logits = functional_call(template, weights, (s, a))
        td = -(two_hot * logits.log_softmax(1)).sum(1).mean()  # a scalar head: (pave.q_values - target) ** 2, no logits
        return td + lambdas @ torch.stack(pave[:3])

    return vmap(member_loss)(members).sum()


def train(lambdas: tuple[float, float, float] = LAMBDAS, seed: int = 1, total_timesteps: int = 20_000) -> nn.Module:
    torch.manual_seed(seed)
    env, actor, buffer = make_env("Pendulum-v1"), Actor(3, 1), ReplayBuffer(total_timesteps, 3, 1, torch.device("cpu"))
    members, _ = stack_module_state([Critic(4) for _ in range(MEMBERS)])  # name: (MEMBERS, ...)
    targets = {name: weight.detach().clone() for name, weight in members.items()}
    q_optimizer, actor_optimizer = optim.Adam(members.values(), lr=1e-3), optim.Adam(actor.parameters(), lr=3e-4)
    q_values = vmap(q_value, in_dims=(0, None, None))  # (MEMBERS, B)
    over = True
    for step in range(total_timesteps):
        observation = env.reset(seed=seed + step)[0] if over else observation
        with torch.no_grad():
            action = actor.sample(torch.as_tensor(observation)[None], torch.randn(1, 1))[0][0].numpy()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        buffer.add(observation, next_observation, action, reward, terminated)
        observation, over = next_observation, terminated or truncated
        if step < 1000:
            continue

        s, next_s, a, r, done = buffer.sample(128)
        with torch.no_grad():
            next_a, log_prob = actor.sample(next_s, torch.randn_like(a))
            next_q = q_values(targets, next_s, next_a)[torch.randperm(MEMBERS)[:2]].amin(0) * SPACING + LOWEST
            target = (r + 0.99 * (1 - done) * (next_q - 0.2 * log_prob) - LOWEST) / SPACING
        q_optimizer.zero_grad()
        critic_loss(members, s, a, next_s, target, torch.tensor(lambdas)).backward()
        q_optimizer.step()

        new_a, log_prob = actor.sample(s, torch.randn_like(a))
        actor_optimizer.zero_grad()
        (0.2 * log_prob - SPACING * q_values(members, s, new_a).mean(0)).mean().backward()  # untouched
        actor_optimizer.step()
        for name, weight in targets.items():
            weight.lerp_(members[name].detach(), 0.005)
    return actor


if __name__ == "__main__":
    print(json.dumps(evaluate(tyro.cli(train, description=__doc__), make_env("Pendulum-v1"), episodes=10)))
