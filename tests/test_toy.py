"""benchmarks/toy.py: its numbers on critics with known ones, its fit against a plain loop, one line on bad input."""

import math

import pytest
import torch
from helper_programs import fails, run_program

from benchmarks import toy
from sac_pave_continuous import pave_losses, rademacher_like

SMALL = {"samples": 20, "updates": 5}


def test_the_numbers_of_a_concave_quadratic_are_its_closed_forms():
    """Q = -(2 + s) (a - s/2)^2: at g(s) = s/2, d2Q/dsda = 2 + s and d2Q/da2 = -2 (2 + s)."""
    found = toy.measure(lambda s, a: (-(2 + s) * (a - s / 2).square()).squeeze(1))
    s = toy.STATES.squeeze(1)
    distance = (s / 2 - 0.7 * (3 * s).sin()).abs().mean().item()
    assert found == pytest.approx(
        {"M": 3, "mu": 2, "bound": 1.5, "slope": 0.5, "variation": 1, "distance": distance, "concave": 1}
    )


def test_states_with_the_greedy_action_at_a_limit_do_not_count_for_the_bound():
    """Q = -(a - 2 s)^2 w(s): beyond |s| = 1/2 g is at a limit; there w, and with it M and 1 / mu, would be larger."""
    found = toy.measure(lambda s, a: (-(a - 2 * s).square() * torch.where(s.abs() < 0.5, 1.0, 9.0)).squeeze(1))
    assert (found["M"], found["mu"]) == pytest.approx((4, 2))
    assert (found["slope"], found["variation"]) == pytest.approx((2, 2))
    nowhere = toy.measure(lambda s, a: a.squeeze(1) ** 3 + 3 * a.squeeze(1))
    assert math.isnan(nowhere["M"]) and math.isnan(nowhere["bound"]) and nowhere["slope"] == nowhere["variation"] == 0


def test_a_jump_between_two_peaks_is_an_infinite_slope_beside_a_finite_bound():
    """Q = -(a^2 - 1/4)^2 + s a / 10: near -1/2 for s < 0, near 1/2 for s > 0; concave where a^2 > 1/12."""
    found = toy.measure(lambda s, a: (-(a.square() - 0.25).square() + 0.1 * s * a).squeeze(1))
    assert found["slope"] == math.inf and found["bound"] < 0.1
    assert found["variation"] == pytest.approx(1, abs=0.15)
    assert found["concave"] == pytest.approx(1 - 1 / math.sqrt(12), abs=0.04)


def test_greedy_actions_are_exact_between_the_candidates():
    actions = toy.greedy_actions(lambda s, a: -(a - 0.7 * torch.sin(3 * s)).square().squeeze(1))
    torch.testing.assert_close(actions, toy.best_action(toy.STATES))
    assert (toy.best_action(toy.STATES) - toy.ACTIONS).abs().min(dim=1).values.max() > 0.01


def test_what_the_labels_say_of_the_best_action():
    changes = toy.best_action(toy.STATES).diff(dim=0).abs()
    steepest, variation = (changes / toy.STATES.diff(dim=0)).max(), changes.sum()
    assert (
        f"steepest slope (a*: {steepest:.1f})" in toy.LABELS and f"total variation (a*: {variation:.1f})" in toy.LABELS
    )


def test_the_fit_is_that_of_a_plain_loop():
    lambdas, args = (300.0, 3.0, 0.7), toy.Args(seeds=(101,), state_step=0.3, **SMALL)
    [[fitted]] = toy.fit([lambdas], args)
    torch.manual_seed(101)
    critic = toy.Critic()
    states, actions, returns, next_states = toy.collect(args)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(args.updates):
        noise, probe = 0.01 * torch.randn_like(states), rademacher_like(actions)
        pave = pave_losses(critic, states, actions, next_states, noise, probe, 1.0)
        loss = (pave.q_values - returns).square().mean() + 300 * pave.mpr + 3 * pave.vfc + 0.7 * pave.curvature
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(fitted.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-3, atol=1e-5)


def test_critics_fitted_together_are_those_fitted_alone():
    """Without MPR nothing is random after the start: v^T H v is the same for v = 1 and -1."""
    variants, seeds = [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], (101, 102)
    together = toy.fit(variants, toy.Args(seeds=seeds, **SMALL))
    for i, variant in enumerate(variants):
        for j, seed in enumerate(seeds):
            [[alone]] = toy.fit([variant], toy.Args(seeds=(seed,), **SMALL))
            for mine, theirs in zip(together[i][j].parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_it_draws_a_picture_as_wide_as_the_readme(tmp_path, capsys):
    output = tmp_path / "toy.png"
    run_program("benchmarks.toy", "--samples", 20, "--updates", 2, "--seeds", 101, 102, "--output", output)
    assert toy.plt.imread(output).shape[1] == 900
    rows = capsys.readouterr().out.splitlines()
    assert sum(line.lstrip().startswith("with PAVE") for line in rows) == 2


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--noise", -1), "--noise is -1.0; it must be from 0"),
        (("--lambda-curv", "nan"), "--lambda-curv is nan"),
        (("--mpr-sigma", 0), "--mpr-sigma is 0.0"),
        (("--samples", 0), "--samples is 0"),
        (("--seeds", 1, 1), "--seeds is (1, 1)"),
        (("--seeds", -1), "--seeds is (-1,)"),
        (("--seeds",), "--seeds is ()"),
        (("--output", "toy.jpg"), "--output is toy.jpg"),
        (("--output", "no_such_folder/toy.png"), "no_such_folder"),
        (("--noise", 1e30), "lower the lambdas or the noise"),
    ],
)
def test_bad_input_is_one_line(flags, cause):
    assert cause in fails("benchmarks.toy", "--samples", 20, "--updates", 2, "--seeds", 101, *flags)
