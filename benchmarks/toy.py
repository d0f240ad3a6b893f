"""PAVE in twenty seconds: one state, one action, no reinforcement learning. Read it after the scripts' PAVE block.

    python -m benchmarks.toy                      # writes toy.png and prints the numbers
    python -m benchmarks.toy --noise 0.1          # little noise: there PAVE flattens the policy more than it helps

The best action in state s is known: a*(s) = 0.7 sin 3s. Action a returns -(a - a*(s))^2, plus noise. A critic Q is
fitted to 100 such returns, as in RL to noisy targets. An actor would learn its greedy action, g(s) = argmax_a Q(s, a).
Five critics are fitted to the same data: without PAVE, with one of its three losses left out, with all three.

The numbers, in float64, with g(s) at 801 states s:

    M           the largest |d2Q/dsda| at (s, g(s)): how fast the action gradient turns with the state
    mu          the smallest |d2Q/da2| at (s, g(s)): how sharp the maximum is
    bound       M / mu, the most that the slope of g can be, says the theorem
    slope       the largest |g(s + h) - g(s)| / h, h = 0.0025 the distance of neighbouring states
    variation   the sum of all |g(s + h) - g(s)|
    distance    the mean of |g(s) - a*(s)|
    concave     the share of all (s, a), on a coarser grid, where d2Q/da2 is below zero

Where the theorem fails. It follows one maximum that moves with s; it knows nothing of a jump from one maximum of Q to
another. A slope above the bound is such a jump, and is shown as infinite, for its finite value would only tell h. (A
jump smaller than h times the bound isn't seen.) Where Q is concave in a everywhere there is no second maximum to jump
to. That is what Curv brings here, more than a large mu: the false peaks of a critic without PAVE are sharp, too. Nor
does the theorem hold where g is at a limit, -1 or 1: dQ/da need not be zero there. M and mu leave such states out.

How the lambdas were chosen: to be seen, from a handful tried on seeds 101 to 104. The default seeds had no part in
that. With one state and one action MPR and VFC shrink the same number, so that leaving one out only weakens the pull.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro
from matplotlib import pyplot as plt
from torch import nn
from torch.func import functional_call, stack_module_state

from benchmarks.common import require, user_errors
from benchmarks.evaluate import critic_hessians
from benchmarks.plot import COLOURS, STYLE, WIDTH, save
from sac_pave_continuous import hutchinson_trace, pave_losses, rademacher_like, require_range

STATES = torch.linspace(-1, 1, 801, dtype=torch.float64)[:, None]  # (S, 1), where the greedy action is looked at
ACTIONS = torch.linspace(-1, 1, 51, dtype=torch.float64)  # (A,), the candidates for it


@dataclass
class Args:
    noise: float = 0.5  # standard deviation of the noise on the returns
    samples: int = 100  # what a critic is fitted to: so many s, a, return and s'
    updates: int = 500  # of each critic
    lambda_mpr: float = 10.0  # weight of MPR
    lambda_vfc: float = 1.0  # weight of VFC
    lambda_curv: float = 1.0  # weight of Curv
    mpr_sigma: float = 0.01  # standard deviation of MPR's noise on the state
    curv_delta: float = 1.0  # margin of Curv; without noise d2Q/da2 is -2
    state_step: float = 0.05  # standard deviation of s' - s
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of data and first weights; the first one's Q is drawn
    output: Path = Path("toy.png")  # .png, .svg or .pdf


# ---------------------------------------------------------------------------------------------------------- the critics


class Critic(nn.Module):
    """Q(s, a): (B, 1), (B, 1) -> (B,). As the scripts' QNetwork, but smaller."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, states, actions):
        return self.net(torch.cat([states, actions], dim=-1)).squeeze(-1)


def best_action(states):
    """a*(s), which the critics have to find: (S, 1) -> (S, 1)."""
    return 0.7 * torch.sin(3 * states)


def collect(args: Args):
    """What a replay buffer would hold: s (B, 1), a (B, 1) in [-1, 1], the noisy return (B,), s' (B, 1)."""
    states = 2 * torch.rand(args.samples, 1) - 1
    actions = 2 * torch.rand(args.samples, 1) - 1
    returns = -(actions - best_action(states)).square().squeeze(1) + args.noise * torch.randn(args.samples)
    next_states = states + args.state_step * torch.randn_like(states)
    return states, actions, returns, next_states


def fit(lambdas: list[tuple[float, float, float]], args: Args) -> list[list[Critic]]:
    """For each of the lambdas (MPR, VFC, Curv) the fitted critics, one a seed.

    All N critics are fitted at once: their parameters are stacked along a first dimension, over which vmap runs.
    """
    critics, data, weights = [], [], []
    for variant in lambdas:
        for seed in args.seeds:
            torch.manual_seed(seed)  # the same data and the same first weights for each variant
            critics.append(Critic())
            data.append(collect(args))
            weights.append(torch.tensor(variant))
    states, actions, returns, next_states = (torch.stack(column) for column in zip(*data, strict=True))  # (N, B, ...)
    weights = torch.stack(weights)  # (N, 3)
    parameters, _ = stack_module_state(critics)  # each (N, ...)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)

    def loss_of_one(parameters, weights, states, actions, returns, next_states, state_noise, probe):
        """What the scripts' critics minimise, with known returns in place of the TD target."""

        def q(s, a):
            return functional_call(critics[0], parameters, (s, a))

        pave = pave_losses(q, states, actions, next_states, state_noise, probe, args.curv_delta)
        squared_error = (pave.q_values - returns).square().mean()
        return squared_error + weights[0] * pave.mpr + weights[1] * pave.vfc + weights[2] * pave.curvature

    losses_of_all = torch.vmap(loss_of_one)
    for _ in range(args.updates):
        state_noise = args.mpr_sigma * torch.randn_like(states)
        probe = rademacher_like(actions)
        losses = losses_of_all(parameters, weights, states, actions, returns, next_states, state_noise, probe)  # (N,)
        optimizer.zero_grad()
        losses.sum().backward()  # no critic's loss depends on another's parameters
        optimizer.step()

    require(losses.isfinite().all().item(), "the fit diverged: lower the lambdas or the noise")
    for i, critic in enumerate(critics):
        critic.load_state_dict({name: value[i] for name, value in parameters.items()})
        critic.double().requires_grad_(False)
    n = len(args.seeds)
    return [critics[i : i + n] for i in range(0, len(critics), n)]


# ---------------------------------------------------------------------------------------------------------- the numbers


def q_surface(critic):
    """Q at each of STATES and ACTIONS: (S, A)."""
    states, actions = torch.cartesian_prod(STATES.squeeze(1), ACTIONS).split(1, dim=1)  # (S A, 1) each
    return critic(states, actions).reshape(len(STATES), len(ACTIONS))


def curvature_and_gradient(critic, states, actions):
    """d2Q/da2 and dQ/da, (B, 1) each: with one action dimension, v^T H v at v = 1 is d2Q/da2 itself."""
    curvature, gradient, _ = hutchinson_trace(critic, states, actions, torch.ones_like(actions))
    return curvature[:, None], gradient


def greedy_actions(critic):
    """g(s) at STATES, (S, 1): the best of ACTIONS, then Newton's steps, within a cell, to where dQ/da is zero."""
    best = ACTIONS[q_surface(critic).argmax(dim=1)][:, None]
    cell = ACTIONS[1] - ACTIONS[0]
    actions = best
    for _ in range(10):
        curvature, gradient = curvature_and_gradient(critic, STATES, actions)
        newton = torch.where(curvature < 0, actions - gradient / curvature, actions)
        actions = newton.clamp(best - cell, best + cell).clamp(-1, 1)
    return actions


def measure(critic) -> dict[str, float]:
    """The numbers that the top of this file explains. M, mu and bound are NaN where g is at a limit in all states."""
    actions = greedy_actions(critic)
    mixed, curvature = critic_hessians(critic, STATES, actions)  # (S, 1, 1) each
    inside = actions.squeeze(1).abs() < 1
    M, mu = math.nan, math.nan
    if inside.any():
        M, mu = mixed[inside].abs().max().item(), curvature[inside].abs().min().item()
    bound = M / mu if mu != 0 else math.inf
    changes = actions.diff(dim=0).abs()
    slope = (changes / STATES.diff(dim=0)).max().item()
    if slope > 1.001 * bound:  # 1.001: a finite difference is not quite a derivative
        slope = math.inf
    grid = torch.cartesian_prod(STATES[::20].squeeze(1), ACTIONS[::2])
    curvature_everywhere, _ = curvature_and_gradient(critic, *grid.split(1, dim=1))
    return {
        "M": M, "mu": mu, "bound": bound, "slope": slope, "variation": changes.sum().item(),
        "distance": (actions - best_action(STATES)).abs().mean().item(),
        "concave": (curvature_everywhere < 0).double().mean().item(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the picture

LABELS = (
    r"$M$: how fast $\nabla_aQ$ turns", r"$\mu$: how sharp the peak is", r"$M/\mu$: bound on the slope",
    "steepest slope (a*: 2.1)", "data sets with a jump", "total variation (a*: 2.6)", "mean distance from a*",
    "Q concave in a",
)  # fmt: skip


def texts(rows: pd.DataFrame) -> list[str]:
    """One variant's numbers, one for each of LABELS: medians over its rows, which are the seeds."""
    median = rows.drop(columns="critic").median()
    jumps = rows["slope"].eq(math.inf).sum()
    slope = "∞" if median["slope"] == math.inf else f"{median['slope']:.1f}"
    return [
        f"{median['M']:.1f}", f"{median['mu']:.1f}", f"{median['bound']:.1f}", slope, f"{jumps} of {len(rows)}",
        f"{median['variation']:.1f}", f"{median['distance']:.2f}", f"{median['concave']:.0%}",
    ]  # fmt: skip


def draw(critics: dict[str, list[Critic]], table: pd.DataFrame) -> plt.Figure:
    """A column a variant: Q and g of the first seed, g of all seeds, the numbers."""
    grid = {"width_ratios": (1.6, *[1] * len(critics)), "height_ratios": (1.5, 1.5, 1.4)}
    figure, axes = plt.subplots(3, 1 + len(critics), figsize=(WIDTH, 5.8), gridspec_kw=grid)
    for axis in (*axes[:, 0], *axes[2]):
        axis.axis("off")
    seeds = table["seed"].nunique()
    axes[0, 0].text(0, 0.5, "$Q(s, a)$, the return that\nthe critic expects:\nbright is good", va="center")
    axes[1, 0].text(0, 0.5, f"greedy actions, one line\neach of {seeds} data sets;\nbelow: their medians", va="center")
    heights = [1 - (i + 0.5) / len(LABELS) for i in range(len(LABELS))]
    for height, label in zip(heights, LABELS, strict=True):
        axes[2, 0].text(0, height, label, va="center")

    look = {"extent": (-1, 1, -1, 1), "origin": "lower", "aspect": "auto", "vmin": -2.5, "vmax": 0.5, "cmap": "Greys_r"}
    states, truth = STATES.numpy(), best_action(STATES).numpy()
    for (surface, lines, numbers), (name, fitted) in zip(axes.T[1:], critics.items(), strict=True):
        surface.set_title(name, fontweight="bold")
        surface.imshow(q_surface(fitted[0]).T.numpy(), **look)  # (A, S): a row is an action
        policies = [greedy_actions(critic).numpy() for critic in fitted]
        surface.plot(states, policies[0], color=COLOURS["base"], linewidth=2, label="greedy action")
        for policy in policies:
            lines.plot(states, policy, color=COLOURS["base"], linewidth=1, alpha=0.7)
        for axis in (surface, lines):
            axis.plot(states, truth, "--", color="black", linewidth=1.2, label="truly best action a*")
            axis.set(xlim=(-1, 1), ylim=(-1.04, 1.04), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
            axis.tick_params(labelleft=axis in axes[:, 1], labelbottom=axis is lines)
            axis.grid(False)
        lines.set_xlabel("state s", labelpad=0)
        for height, text in zip(heights, texts(table[table["critic"] == name]), strict=True):
            numbers.text(0.5, height, text, ha="center", va="center", color=COLOURS["base"] if text == "∞" else "black")
    for axis in axes[:2, 1]:
        axis.set_ylabel("action a", labelpad=0)
    figure.suptitle("What PAVE does to a critic that is fitted to noisy returns", x=0.01, ha="left")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def main(args: Args) -> None:
    require_range(args, 0, math.inf, "noise", "lambda_mpr", "lambda_vfc", "lambda_curv", "curv_delta", "state_step")
    require_range(args, 1e-12, math.inf, "mpr_sigma")
    require_range(args, 1, math.inf, "samples", "updates")
    distinct = len(set(args.seeds)) == len(args.seeds) > 0
    require(distinct and min(args.seeds) >= 0, f"--seeds is {args.seeds}: give each once, none below 0")
    torch.set_num_threads(1)  # small networks: a second thread would only wait
    mpr, vfc, curv = args.lambda_mpr, args.lambda_vfc, args.lambda_curv
    variants = {
        "without PAVE": (0.0, 0.0, 0.0), "without Curv": (mpr, vfc, 0.0), "without MPR": (0.0, vfc, curv),
        "without VFC": (mpr, 0.0, curv), "with PAVE": (mpr, vfc, curv),
    }  # fmt: skip
    critics = dict(zip(variants, fit(list(variants.values()), args), strict=True))
    rows = []
    for name, fitted in critics.items():
        for seed, critic in zip(args.seeds, fitted, strict=True):
            rows.append({"critic": name, "seed": seed} | measure(critic))
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False))
    save(draw(critics, table), args.output)


if __name__ == "__main__":
    with user_errors(), plt.rc_context(STYLE):
        main(tyro.cli(Args, description=__doc__))
