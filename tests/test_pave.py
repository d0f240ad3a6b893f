"""The PAVE block: its derivatives against two references, closed forms, torch.compile, and what it refuses.

On the SAC script: test_text.py holds the block to be the same text in both. Autograd may be wrong itself in a third
derivative, so that one reference are central differences of a term's value: nothing in them is a gradient in the
parameters.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import sac_pave_continuous as script

STATES, ACTIONS, ROWS = 5, 3, 16
TERMS = ("mpr", "vfc", "curvature")


class NormCritic(nn.Module):
    """The normalised critics of today: GroupNorm(1, H) is the same function as LayerNorm(H)."""

    def __init__(self, norm=nn.GroupNorm, size=(1, 32)):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(STATES + ACTIONS, 32), norm(*size), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1)).squeeze(1)


class Quadratic(nn.Module):
    """Q = 1/2 a^T H a + a^T C s: its action gradient is H a + C s, its mixed partial C."""

    def __init__(self, diagonal=False):
        super().__init__()
        h = torch.randn(ACTIONS, ACTIONS)
        self.H = nn.Parameter(torch.diag(h.diagonal()) if diagonal else h + h.T)
        self.C = nn.Parameter(torch.randn(ACTIONS, STATES))

    def forward(self, s, a):
        return 0.5 * ((a @ self.H) * a).sum(1) + (a * (s @ self.C.T)).sum(1)


CRITICS = {"mlp": lambda: script.QNetwork(STATES, ACTIONS), "group norm": NormCritic, "quadratic": Quadratic}


@pytest.fixture(params=CRITICS)
def q(request, float64):
    torch.manual_seed(1)
    return CRITICS[request.param]()


def inputs(seed=0):
    """s, a, s', noise, probe"""
    torch.manual_seed(seed)
    s, next_s, noise = torch.randn(3, ROWS, STATES).unbind()
    a = torch.rand(ROWS, ACTIONS) * 2 - 1
    return s, a, next_s, 0.01 * noise, script.rademacher_like(a)


def double_backward(q, s, a, next_s, noise, v, delta):
    """The block's outputs the textbook way: torch.autograd.grad with create_graph, one state at a time."""

    def field(states):
        leaf = a.clone().requires_grad_()
        value = q(states, leaf)
        return torch.autograd.grad(value.sum(), leaf, create_graph=True)[0], leaf, value

    gradient, leaf, value = field(s)
    vhv = (v * torch.autograd.grad((gradient * v).sum(), leaf, create_graph=True)[0]).sum(1)
    mpr = torch.mean((field(s + noise)[0] - gradient) ** 2)
    vfc = torch.mean((field(next_s)[0] - gradient) ** 2)
    return mpr, vfc, torch.clamp(vhv + delta, min=0).mean(), vhv, gradient, value


def parameter_gradient(q, value):
    """One vector; 0 for a bias that a second derivative doesn't see."""
    parameters, unused = list(q.parameters()), {"allow_unused": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), parameters, retain_graph=True, **unused)])


def central_difference(q, value, direction, step=1e-5):
    """(value(w + h d) - value(w - h d)) / 2h, w the parameters of q, d the direction."""
    start, ends = nn.utils.parameters_to_vector(q.parameters()).detach(), []
    for side in (step, -step):
        nn.utils.vector_to_parameters(start + side * direction, q.parameters())
        ends.append(value().detach())
    nn.utils.vector_to_parameters(start, q.parameters())
    return (ends[0] - ends[1]) / (2 * step)


def off_from_central_differences(q, term, delta):
    """By how much the term's parameter gradient is off along a direction, relative to the gradient's norm."""
    batch = inputs()

    def value():
        return getattr(script.pave_losses(q, *batch, delta), term)

    gradient = parameter_gradient(q, value())
    direction = torch.randn_like(gradient)
    return (central_difference(q, value, direction) - gradient @ direction).abs() / gradient.norm()


def test_every_value_and_its_parameter_gradient_equal_double_backward(q):
    batch = inputs()
    ours = script.pave_losses(q, *batch, 1.0)
    assert ours._fields == (*TERMS, "vhv", "gradient", "q_values")
    assert ours.q_values.shape == ours.vhv.shape == (ROWS,)
    assert all(term > 0 for term in ours[:3])
    for mine, theirs in zip(ours, double_backward(q, *batch, 1.0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        gradients = parameter_gradient(q, mine), parameter_gradient(q, theirs)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_parameter_gradient_equals_central_differences(q, term):
    assert off_from_central_differences(q, term, delta=100.0) < 1e-6  # delta: away from Curv's kink


def test_layer_norm_is_the_known_exception(float64):
    """Its third derivative is wrong in torch, in double backward as well; test_check_critic tells when that changes."""
    torch.manual_seed(1)
    layer_norm, group_norm = NormCritic(nn.LayerNorm, (32,)), NormCritic()
    group_norm.load_state_dict(layer_norm.state_dict())
    ours = [script.pave_losses(q, *inputs(), 1.0) for q in (layer_norm, group_norm)]
    for left, right in zip(*ours, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)  # every value is right
    assert all(off_from_central_differences(layer_norm, term, 100.0) < 1e-6 for term in ("mpr", "vfc"))
    assert off_from_central_differences(layer_norm, "curvature", 100.0) > 0.01


def test_vhv_and_gradient_equal_the_full_hessian_and_central_differences_in_the_action(q):
    s, a, _, _, v = inputs()
    vhv, gradient, _ = script.hutchinson_trace(q, s, a, v)
    for i in range(ROWS):
        hessian = torch.autograd.functional.hessian(lambda x, i=i: q(s[i : i + 1], x[None])[0], a[i])
        torch.testing.assert_close(vhv[i], v[i] @ hessian @ v[i], rtol=1e-9, atol=1e-12)
    up, here, down = (q(s, a + step * v) for step in (1e-3, 0, -1e-3))
    torch.testing.assert_close((up - down) / 2e-3, (gradient * v).sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((up - 2 * here + down) / 1e-6, vhv, rtol=1e-4, atol=1e-6)


def test_closed_forms_on_a_quadratic_critic(float64):
    torch.manual_seed(2)
    q, (s, a, next_s, noise, v) = Quadratic(), inputs()
    losses = script.pave_losses(q, s, a, next_s, noise, v, 1.0)
    vhv = torch.einsum("bi,ij,bj->b", v, q.H, v)
    expected = {
        "mpr": (noise @ q.C.T).square().sum(1).mean() / ACTIONS,
        "vfc": ((next_s - s) @ q.C.T).square().sum(1).mean() / ACTIONS,
        "curvature": (vhv + 1.0).clamp(min=0).mean(),
        "vhv": vhv,
        "gradient": a @ q.H + s @ q.C.T,
        "q_values": q(s, a),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(losses, name), value)


def test_mpr_tends_to_sigma_squared_frobenius_norm_over_the_actions(float64):
    torch.manual_seed(2)
    q, sigma, rows = Quadratic(), 0.01, 200_000
    s, a = torch.randn(rows, STATES), torch.rand(rows, ACTIONS)
    losses = script.pave_losses(q, s, a, s, sigma * torch.randn_like(s), script.rademacher_like(a), 1.0)
    torch.testing.assert_close(losses.mpr, sigma**2 * q.C.square().sum() / ACTIONS, rtol=0.02, atol=0)
    assert losses.vfc == 0


def test_curvature_is_zero_and_pulls_no_more_below_the_margin(float64):
    q = Quadratic()
    q.H.data = -torch.eye(ACTIONS)  # v^T H v is -3
    for delta, expected in ((2.9, 0.0), (3.5, 0.5)):
        curvature = script.pave_losses(q, *inputs(), delta).curvature
        assert curvature.item() == pytest.approx(expected)
        assert bool(parameter_gradient(q, curvature).any()) == bool(expected)


def test_mean_over_all_probes_is_the_trace_and_a_diagonal_needs_one(float64):
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=ACTIONS)))
    s, a = torch.randn(len(probes), STATES), torch.randn(len(probes), ACTIONS)
    full, diagonal = Quadratic(), Quadratic(diagonal=True)
    torch.testing.assert_close(script.hutchinson_trace(full, s, a, probes)[0].mean(), full.H.trace())
    estimates = script.hutchinson_trace(diagonal, s, a, probes)[0]
    torch.testing.assert_close(estimates, diagonal.H.trace().expand(len(probes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probe_is_plus_minus_one_each_entry_on_its_own(dtype):
    torch.manual_seed(0)
    probe = script.rademacher_like(torch.rand(4000, 3, dtype=dtype))
    assert probe.dtype == dtype
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert (probe.T @ probe / 4000 - torch.eye(3)).abs().max() < 0.06
    assert probe.mean(0).abs().max() < 0.06


@pytest.mark.parametrize("critic", ["mlp", "group norm"])
def test_compiled_parameter_gradients_equal_eager_ones_in_float64(float64, critic):
    torch.manual_seed(3)
    q, batch = CRITICS[critic](), inputs()

    def backward(*batch):  # as the scripts compile it: loss and backward in one piece
        pave = script.pave_losses(q, *batch, 1.0)
        (2.0 * pave.mpr + 3.0 * pave.vfc + 0.5 * pave.curvature + pave.q_values.square().mean()).backward()
        return pave.mpr.detach(), pave.vfc.detach(), pave.curvature.detach(), pave.vhv.detach()

    def run(function):
        q.zero_grad()
        return function(*batch), [p.grad.clone() for p in q.parameters()]

    eager = run(backward)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = run(torch.compile(backward, fullgraph=True))
    for left, right in zip(eager, compiled, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_losses_leave_generators_and_parameters_alone():
    q, batch = script.QNetwork(STATES, ACTIONS), inputs()
    rng, weights = torch.get_rng_state(), [p.clone() for p in q.parameters()]
    script.pave_losses(q, *batch, 1.0)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(q.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    ("reshape", "advice"),
    [
        (lambda q: q[:, None], r"\(16,\), not \(16, 1\): pass q\(s, a\)\.squeeze\(-1\)"),
        (lambda q: torch.stack([q, q]), r"\(16,\), not \(2, 16\): pass one critic at a time"),
        (lambda q: torch.stack([q, q], 1), r"\(16,\), not \(16, 2\): pass one critic at a time"),
        (lambda q: q.mean(), r"\(16,\), not \(\): pass one critic at a time, one value a row"),
    ],
    ids=["(B, 1)", "(N, B)", "(B, N)", "()"],
)
def test_a_wrong_shape_gets_the_advice_that_helps(reshape, advice):
    q = script.QNetwork(STATES, ACTIONS)
    with pytest.raises(ValueError, match=advice):
        script.pave_losses(lambda s, a: reshape(q(s, a)), *inputs(), 1.0)


def test_autocast_is_refused_and_its_advice_helps():
    q, batch = script.QNetwork(STATES, ACTIONS), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="enabled=False"):
            script.pave_losses(q, *batch, 1.0)
        with torch.autocast("cpu", enabled=False):
            inside = script.pave_losses(q, *batch, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(inside, script.pave_losses(q, *batch, 1.0), strict=True))


def test_block_runs_when_pasted_below_import_torch_alone():
    text = (ROOT / "sac_pave_continuous.py").read_text()
    block = text.split("PAVE: paste from here to the next dashed line\n")[1].split("\n# -----")[0]
    namespace = {}
    exec("import torch\n" + block, namespace)
    q, batch = script.QNetwork(STATES, ACTIONS), inputs()
    pasted, ours = namespace["pave_losses"](q, *batch, 1.0), script.pave_losses(q, *batch, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(pasted, ours, strict=True))
    assert set(namespace["rademacher_like"](batch[1]).unique().tolist()) == {-1.0, 1.0}


def test_smoothness_by_the_sum_it_is_defined_as():
    actions, total = np.random.default_rng(0).normal(size=(31, 2)), 0.0
    for dimension in actions.T:
        for k in range(15):
            transform = sum(x * np.exp(-2j * math.pi * k * t / 31) for t, x in enumerate(dimension))
            total += 2 / 31 * (k / 31) * abs(transform) / 2
    assert script.smoothness(actions) == pytest.approx(total, rel=1e-12)


def test_smoothness_of_a_sine_is_its_amplitude_times_its_frequency():
    steps, cycles = 200, 30
    sine = 0.7 * np.sin(2 * np.pi * cycles * np.arange(steps) / steps)
    # |FFT| is T/2 * amplitude at the sine's own frequency, and 2/T times that, times the frequency, is left
    assert script.smoothness(sine) == pytest.approx(0.7 * cycles / steps)
    assert script.smoothness(np.stack([sine, np.ones(steps)], 1)) == pytest.approx(0.7 * cycles / steps / 2)
    assert script.smoothness(sine, fs=50.0) == pytest.approx(0.7 * cycles / steps)
    assert script.smoothness(np.cos(np.pi * np.arange(steps))) == pytest.approx(0.0, abs=1e-12)  # k = T/2 is left out


@pytest.mark.parametrize("actions", [[], [1.0], [[0.3, 0.2]]])
def test_smoothness_of_less_than_two_steps_is_zero(actions):
    assert script.smoothness(np.array(actions)) == 0.0
