"""SAC + PAVE with a critic as of today: N members at once by torch.func.vmap, normalised, with a distributional head.
PAVE gets one member's expectation, one value a row; vmap makes that all members'. Copy q_and_logits and critic_loss.

    python -m benchmarks.recipes.ensemble    # --lambdas 0 0 0: the same agent without PAVE
"""

import json

import torch
import tyro
from torch import nn, optim
from torch.func import functional_call, stack_module_state, vmap

from sac_pave_continuous import Actor, ReplayBuffer, evaluate, make_env, pave_losses, rademacher_like

MEMBERS, ATOMS, LOWEST, SPACING = 3, 56, -1000.0, 20.0  # atom k is the return LOWEST + SPACING k
# the paper's for SAC on Pendulum, but Q counts atoms: Curv is linear in it, MPR and VFC are squares as a TD loss is
LAMBDAS, DELTA = (0.1, 0.005, 0.5 / SPACING), 1 / SPACING


def member(h: int = 64) -> nn.Module:
    """(B, 4) -> logits (B, ATOMS). GroupNorm(1, H) is the function of LayerNorm(H), with the right third derivative."""
    layers = nn.Linear(4, h), nn.GroupNorm(1, h), nn.SiLU(), nn.Linear(h, h), nn.GroupNorm(1, h), nn.SiLU()
    return nn.Sequential(*layers, nn.Linear(h, ATOMS))


def q_and_logits(weights, s, a, template=member()):  # noqa: B008  its own weights are not used
    """Of one member: the expectation (B,), in atoms, and the logits (B, ATOMS)."""
    logits = functional_call(template, weights, torch.cat([s, a], 1))
    return logits.softmax(-1) @ torch.arange(ATOMS, dtype=s.dtype), logits


@torch.compile  # optional: faster after a minute; it goes on the loss, not on the critic
def critic_loss(members, s, a, next_s, target, lambdas):
    """Sum over the members of TD and the three terms. members: stacked weights; target: (B,), in atoms."""
    two_hot = (1 - (target.clamp(0, ATOMS - 1)[:, None] - torch.arange(ATOMS)).abs()).clamp(min=0)
    noise, probe = 0.01 * torch.randn_like(s), rademacher_like(a)

    def member_loss(weights):
        pave = pave_losses(lambda s, a: q_and_logits(weights, s, a)[0], s, a, next_s, noise, probe, DELTA)
        td = -(two_hot * q_and_logits(weights, s, a)[1].log_softmax(-1)).sum(-1).mean()  # a forward of its own
        return td + lambdas @ torch.stack(pave[:3])

    return vmap(member_loss)(members).sum()


def train(lambdas: tuple[float, float, float] = LAMBDAS, seed: int = 1, total_timesteps: int = 20_000) -> nn.Module:
    torch.manual_seed(seed)
    env, actor, buffer = make_env("Pendulum-v1"), Actor(3, 1), ReplayBuffer(total_timesteps, 3, 1, torch.device("cpu"))
    members, _ = stack_module_state([member() for _ in range(MEMBERS)])  # name: (MEMBERS, ...)
    targets = {name: weight.detach().clone() for name, weight in members.items()}
    q_optimizer, actor_optimizer = optim.Adam(members.values(), lr=1e-3), optim.Adam(actor.parameters(), lr=3e-4)
    all_members, (obs, _) = vmap(q_and_logits, in_dims=(0, None, None)), env.reset(seed=seed)
    for step in range(total_timesteps):
        with torch.no_grad():
            action = actor.sample(torch.as_tensor(obs)[None], torch.randn(1, 1))[0][0].numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, next_obs, action, reward, terminated)
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step < 1000:
            continue
        s, next_s, a, r, done = buffer.sample(128)
        with torch.no_grad():
            next_a, log_prob = actor.sample(next_s, torch.randn_like(a))
            next_q = LOWEST + SPACING * all_members(targets, next_s, next_a)[0].amin(0) - 0.2 * log_prob
        target = (r + 0.99 * (1 - done) * next_q - LOWEST) / SPACING
        q_optimizer.zero_grad()
        critic_loss(members, s, a, next_s, target, torch.tensor(lambdas)).backward()
        q_optimizer.step()
        new_a, log_prob = actor.sample(s, torch.randn_like(a))
        actor_optimizer.zero_grad()
        (0.2 * log_prob - SPACING * all_members(members, s, new_a)[0].mean(0)).mean().backward()  # untouched
        actor_optimizer.step()
        for name, weight in targets.items():
            weight.lerp_(members[name].detach(), 0.005)
    return actor


if __name__ == "__main__":
    print(json.dumps(evaluate(tyro.cli(train), make_env("Pendulum-v1"), episodes=10)))
