"""The PAVE block: its outputs and their gradients against double backward and closed forms, and what it refuses.

On the SAC script: test_text.py holds the block to be the same text in both, and runs it pasted below `import torch`.
test_check_critic.py holds its gradients to central differences, which see where torch's own derivatives are wrong, and
compiles it, as test_agent.py does.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

import sac_pave_continuous as script

STATES, ACTIONS, ROWS = 5, 3, 16


class Quadratic(nn.Module):
    """Q = 1/2 a^T H a + a^T C s"""

    def __init__(self):
        super().__init__()
        self.H, self.C = nn.Parameter(torch.randn(ACTIONS, ACTIONS)), nn.Parameter(torch.randn(ACTIONS, STATES))

    def forward(self, s, a):
        return 0.5 * ((a @ self.H) * a).sum(1) + (a * (s @ self.C.T)).sum(1)


def closed_forms(q, s, a, next_s, noise, v, delta):
    """The block's outputs for a Quadratic: its mixed partial is C, whatever the action."""
    hessian = (q.H + q.H.T) / 2
    mpr, vfc = ((states @ q.C.T).square().mean() for states in (noise, next_s - s))
    vhv = torch.einsum("bi,ij,bj->b", v, hessian, v)
    assert 0 < (vhv < -delta).sum() < ROWS  # both sides of Curv's kink
    return mpr, vfc, (vhv + delta).clamp(min=0).mean(), vhv, a @ hessian + s @ q.C.T, q(s, a)


def double_backward(q, s, a, next_s, noise, v, delta):
    """The block's outputs the textbook way: torch.autograd.grad with create_graph, one state at a time."""
    a = a.clone().requires_grad_()

    def field(states):
        return torch.autograd.grad(q(states, a).sum(), a, create_graph=True)[0]

    gradient = field(s)
    vhv = (v * torch.autograd.grad((gradient * v).sum(), a, create_graph=True)[0]).sum(1)
    mpr, vfc = (torch.mean((field(states) - gradient) ** 2) for states in (s + noise, next_s))
    return mpr, vfc, torch.clamp(vhv + delta, min=0).mean(), vhv, gradient, q(s, a)


def inputs():
    """s, a, s', noise, probe"""
    torch.manual_seed(0)
    s, next_s, noise = torch.randn(3, ROWS, STATES).unbind()
    a = torch.rand(ROWS, ACTIONS) * 2 - 1
    return s, a, next_s, 0.01 * noise, script.rademacher_like(a)


def mlp():
    return script.QNetwork(STATES, ACTIONS)


@pytest.mark.parametrize(("critic", "reference"), [(mlp, double_backward), (Quadratic, closed_forms)])
def test_every_output_and_its_parameter_gradient_equal_a_reference(float64, critic, reference):
    torch.manual_seed(1)
    q, batch = critic(), inputs()

    def parameter_gradient(value):
        each = torch.autograd.grad(value.sum(), list(q.parameters()), materialize_grads=True, retain_graph=True)
        return nn.utils.parameters_to_vector(each)

    ours = script.pave_losses(q, *batch, 1.0)
    assert ours._fields == ("mpr", "vfc", "curvature", "vhv", "gradient", "q_values")
    for mine, theirs in zip(ours, reference(q, *batch, 1.0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(*map(parameter_gradient, (mine, theirs)), rtol=1e-9, atol=1e-12)


def test_probe_is_plus_minus_one_each_entry_on_its_own():
    torch.manual_seed(0)
    probe = script.rademacher_like(torch.rand(4000, 3, dtype=torch.float64))
    assert probe.dtype == torch.float64
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert (probe.T @ probe / 4000 - torch.eye(3)).abs().max() < 0.06
    assert probe.mean(0).abs().max() < 0.06


@pytest.mark.parametrize("shape", [(ROWS, 1), (2, ROWS), (ROWS, 2), ()])
def test_a_wrong_shape_gets_the_advice_that_helps(shape):
    with pytest.raises(ValueError, match=re.escape(f"q must be one critic and return ({ROWS},), not {shape}: squeeze")):
        script.pave_losses(lambda s, a: a.sum().expand(shape), *inputs(), 1.0)


def test_autocast_is_refused_and_its_advice_helps():
    q, batch = mlp(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="enabled=False"):
            script.pave_losses(q, *batch, 1.0)
        with torch.autocast("cpu", enabled=False):
            inside = script.pave_losses(q, *batch, 1.0)
    torch.testing.assert_close(inside, script.pave_losses(q, *batch, 1.0), rtol=0, atol=0)


@pytest.mark.parametrize(("steps", "fs"), [(30, 1.0), (31, 50.0)])
def test_smoothness_by_the_sum_it_is_defined_as(steps, fs):
    actions, expected = np.random.default_rng(0).normal(size=(steps, 2)), 0.0
    for k in range(steps // 2):  # without the highest frequency
        transform = np.exp(-2j * np.pi * k * np.arange(steps) / steps) @ actions  # (d_a,)
        expected += 2 / (steps * fs) * (k * fs / steps) * np.abs(transform).mean()
    assert script.smoothness(actions, fs) == pytest.approx(expected, rel=1e-12)
    assert script.smoothness(actions[:1]) == 0.0
    assert script.smoothness(actions[:, 0]) == pytest.approx(script.smoothness(actions[:, :1]))
