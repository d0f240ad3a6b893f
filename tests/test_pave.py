"""The PAVE block: derivatives against an independent formulation, closed forms, torch.compile, and its portability."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

STATES, ACTIONS, ROWS = 5, 3, 16


class LayerNormCritic(nn.Module):
    def __init__(self, states, actions):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(states + actions, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1)).squeeze(1)


def inputs(script, actions=ACTIONS, seed=0):
    torch.manual_seed(seed)
    a = torch.rand(ROWS, actions) * 2 - 1
    return (
        torch.randn(ROWS, STATES),
        a,
        torch.randn(ROWS, STATES),
        0.01 * torch.randn(ROWS, STATES),
        script.rademacher_like(a),
    )


def double_backward_losses(q, s, a, next_s, noise, v, delta):
    """The three losses the textbook way: torch.autograd.grad with create_graph, one state at a time."""

    def field(states):
        leaf = a.clone().requires_grad_()
        value = q(states, leaf)
        return torch.autograd.grad(value.sum(), leaf, create_graph=True)[0], leaf, value

    gradient, leaf, value = field(s)
    hvp = torch.autograd.grad((gradient * v).sum(), leaf, create_graph=True)[0]
    mpr = torch.mean((field(s + noise)[0] - gradient) ** 2)
    vfc = torch.mean((field(next_s)[0] - gradient) ** 2)
    trace = (v * hvp).sum(1)
    return mpr, vfc, torch.clamp(trace + delta, min=0).mean(), trace, gradient, value


def parameter_gradients(q, value):
    return torch.autograd.grad(value.sum(), q.parameters(), retain_graph=True, allow_unused=True)


def assert_close(left, right, tolerance):
    for x, y in zip(left, right, strict=True):
        if x is None or y is None:  # autograd says None or zeros for a bias that a second derivative doesn't see
            assert all(z is None or not z.any() for z in (x, y))
        else:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("actions", [ACTIONS, 11])
@pytest.mark.parametrize("critic", ["mlp", "layer norm"])
def test_losses_and_their_parameter_gradients_equal_double_backward(script, float64, critic, actions):
    torch.manual_seed(1)
    q = (script.QNetwork if critic == "mlp" else LayerNormCritic)(STATES, actions)
    batch = inputs(script, actions)
    ours = script.pave_losses(q, *batch, 1.0)
    reference = double_backward_losses(q, *batch, 1.0)
    assert ours._fields == ("mpr", "vfc", "curvature", "trace", "gradient", "q_values")
    assert ours.q_values.shape == (ROWS,)
    assert all(term > 0 for term in ours[:3])
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert_close(parameter_gradients(q, mine), parameter_gradients(q, theirs), 1e-10)


def test_trace_estimate_equals_the_full_hessian(script, float64):
    q = script.QNetwork(STATES, ACTIONS)
    s, a, _, _, v = inputs(script)
    estimate = script.hutchinson_trace(q, s, a, v)[0]
    for i in range(ROWS):
        hessian = torch.autograd.functional.hessian(lambda x, i=i: q(s[i : i + 1], x[None])[0], a[i])
        torch.testing.assert_close(estimate[i], v[i] @ hessian @ v[i], rtol=1e-10, atol=1e-12)


class Quadratic(nn.Module):
    """Q = 1/2 a^T H a + a^T C s: its action gradient is H a + C s, its mixed partial C."""

    def __init__(self, diagonal=False):
        super().__init__()
        torch.manual_seed(2)
        h = torch.randn(ACTIONS, ACTIONS)
        self.H = nn.Parameter(torch.diag(h.diagonal()) if diagonal else h + h.T)
        self.C = nn.Parameter(torch.randn(ACTIONS, STATES))

    def forward(self, s, a):
        return 0.5 * ((a @ self.H) * a).sum(1) + (a * (s @ self.C.T)).sum(1)


def test_vfc_and_curvature_on_a_quadratic_critic(script, float64):
    q = Quadratic()
    s, a, next_s, noise, v = inputs(script)
    losses = script.pave_losses(q, s, a, next_s, noise, v, 1.0)
    turn = (next_s - s) @ q.C.T
    torch.testing.assert_close(losses.vfc, turn.square().sum(1).mean() / ACTIONS)
    torch.testing.assert_close(losses.mpr, (noise @ q.C.T).square().sum(1).mean() / ACTIONS)
    quadratic_form = torch.einsum("bi,ij,bj->b", v, q.H, v)
    torch.testing.assert_close(script.hutchinson_trace(q, s, a, v)[0], quadratic_form)
    torch.testing.assert_close(losses.curvature, (quadratic_form + 1.0).clamp(min=0).mean())
    torch.testing.assert_close(losses.q_values, q(s, a))


def test_mpr_expects_sigma_squared_frobenius_norm_over_actions(script, float64):
    q, sigma, rows = Quadratic(), 0.01, 200_000
    s, a = torch.randn(rows, STATES), torch.rand(rows, ACTIONS)
    losses = script.pave_losses(q, s, a, s, sigma * torch.randn_like(s), script.rademacher_like(a), 1.0)
    expected = sigma**2 * q.C.square().sum() / ACTIONS
    torch.testing.assert_close(losses.mpr, expected, rtol=0.02, atol=0)
    assert losses.vfc == 0


def test_mean_over_all_probes_is_the_trace_and_a_diagonal_needs_one(script, float64):
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=ACTIONS)))
    s, a = torch.randn(len(probes), STATES), torch.randn(len(probes), ACTIONS)
    q = Quadratic()
    torch.testing.assert_close(script.hutchinson_trace(q, s, a, probes)[0].mean(), q.H.trace())
    q = Quadratic(diagonal=True)
    torch.testing.assert_close(script.hutchinson_trace(q, s, a, probes)[0], q.H.trace().expand(len(probes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probe_is_plus_minus_one_in_the_dtype_of_the_actions(script, dtype):
    probe = script.rademacher_like(torch.rand(4000, 2, dtype=dtype))
    assert probe.dtype == dtype
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert abs(probe.mean()) < 0.05


def test_losses_leave_rng_and_parameters_alone(script):
    q, batch = script.QNetwork(STATES, ACTIONS), inputs(script)
    rng, weights = torch.get_rng_state(), [p.clone() for p in q.parameters()]
    script.pave_losses(q, *batch, 1.0)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(q.parameters(), weights, strict=True))


def test_a_critic_of_the_wrong_shape_is_named(script):
    q = script.QNetwork(STATES, ACTIONS)
    with pytest.raises(ValueError, match=r"q must return shape \(16,\)"):
        script.pave_losses(lambda s, a: q(s, a)[:, None], *inputs(script), 1.0)


@pytest.mark.parametrize("critic", ["mlp", "layer norm"])
def test_compiled_equals_eager(script, float64, critic):
    torch.manual_seed(3)
    q = (script.QNetwork if critic == "mlp" else LayerNormCritic)(STATES, ACTIONS)
    batch = inputs(script)

    def loss(*batch):
        mpr, vfc, curvature, *_, q_values = script.pave_losses(q, *batch, 1.0)
        return 2.0 * mpr + 3.0 * vfc + 0.5 * curvature + q_values.square().mean()

    eager, compiled = loss(*batch), torch.compile(loss)(*batch)
    torch.testing.assert_close(eager, compiled, rtol=1e-10, atol=1e-12)
    assert_close(parameter_gradients(q, eager), parameter_gradients(q, compiled), 1e-9)


def test_block_pastes_with_import_torch_alone(script):
    text = (ROOT / f"{script.__name__}.py").read_text()
    block = text.split("PAVE: paste from here to the next dashed line\n")[1].split("\n# -----")[0]
    namespace = {"torch": torch}
    exec(block, namespace)
    q, batch = script.QNetwork(STATES, ACTIONS), inputs(script)
    pasted, ours = namespace["pave_losses"](q, *batch, 1.0), script.pave_losses(q, *batch, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(pasted, ours, strict=True))
    assert namespace["smoothness"]([0.0, 1.0, 0.0]) == script.smoothness([0.0, 1.0, 0.0])


def test_smoothness_of_a_sine_is_its_amplitude_times_its_frequency(script):
    steps, cycles = 200, 30
    sine = 0.7 * np.sin(2 * np.pi * cycles * np.arange(steps) / steps)
    # |FFT| is T/2 * amplitude at the sine's own frequency, and 2/T times that, times the frequency, is left
    assert script.smoothness(sine) == pytest.approx(0.7 * cycles / steps)
    assert script.smoothness(np.stack([sine, np.ones(steps)], 1)) == pytest.approx(0.7 * cycles / steps / 2)
    assert script.smoothness(sine, fs=50.0) == pytest.approx(0.7 * cycles / steps)
    assert script.smoothness(torch.tensor(sine)) == script.smoothness(sine.tolist())


def test_smoothness_by_the_sum_it_is_defined_as(script):
    actions = np.random.default_rng(0).normal(size=(31, 2))
    total = 0.0
    for dimension in actions.T:
        for k in range(15):
            transform = sum(x * np.exp(-2j * math.pi * k * t / 31) for t, x in enumerate(dimension))
            total += 2 / 31 * (k / 31) * abs(transform) / 2
    assert script.smoothness(actions) == pytest.approx(total, rel=1e-12)


def test_smoothness_leaves_out_what_alternates_from_step_to_step(script):
    assert script.smoothness(np.cos(np.pi * np.arange(200))) == pytest.approx(0.0, abs=1e-12)  # k = T/2 is not < T/2


@pytest.mark.parametrize("actions", [[], [1.0], [[0.3, 0.2]]])
def test_smoothness_of_less_than_two_steps_is_zero(script, actions):
    assert script.smoothness(np.array(actions)) == 0.0
