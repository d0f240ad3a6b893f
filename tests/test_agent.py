"""The networks, the replay buffer and one update, each against its definition written out here.

What is the same text in both scripts (test_text.py; the critic's loss but for TD's half) is tested on SAC.
"""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F

import sac_pave_continuous as sac

STATES, ACTIONS, ROWS = 4, 2, 24
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_agent(script, action_dim=ACTIONS, device=CPU, **changes):
    settings = {"batch_size": ROWS, "compile": False, "lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}
    torch.manual_seed(0)
    return script.Agent(STATES, action_dim, script.validate(script.Args(**(settings | changes))), device)


def make_batch(seed=1, action_dim=ACTIONS):
    torch.manual_seed(seed)
    s, next_s, a = torch.randn(ROWS, STATES), torch.randn(ROWS, STATES), torch.rand(ROWS, action_dim) * 2 - 1
    return s, next_s, a, torch.randn(ROWS), (torch.rand(ROWS) < 0.3).float()


def sac_losses(agent, batch, update_actor):
    """SAC (Haarnoja et al. 2018) with twin critics and a tuned alpha: each loss is of what the last step left."""
    (s, next_s, a, r, d), args = batch, agent.args
    (q1, q2), (t1, t2) = agent.critics, agent.critic_targets
    with torch.no_grad():
        next_a, log_prob = agent.actor.sample(next_s, torch.randn(ROWS, ACTIONS))
        next_q = torch.min(t1(next_s, next_a), t2(next_s, next_a)) - agent.log_alpha.exp() * log_prob
        y = r + args.gamma * (1 - d) * next_q
    yield "critics", 0.5 * F.mse_loss(q1(s, a), y) + 0.5 * F.mse_loss(q2(s, a), y)
    if update_actor:
        new_a, log_prob = agent.actor.sample(s, torch.randn(ROWS, ACTIONS))
        alpha = agent.log_alpha.exp().item()
        yield "actor", (alpha * log_prob - torch.min(q1(s, new_a), q2(s, new_a))).mean()
        yield "alpha", -agent.log_alpha * (log_prob.detach() - ACTIONS).mean()


def td3_losses(agent, batch, update_actor):
    """TD3 (Fujimoto et al. 2018)"""
    (s, next_s, a, r, d), args = batch, agent.args
    (q1, q2), (t1, t2) = agent.critics, agent.critic_targets
    with torch.no_grad():
        noise = (torch.randn(ROWS, ACTIONS) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_a = (agent.actor_target(next_s) + noise).clamp(-1, 1)
        y = r + args.gamma * (1 - d) * torch.min(t1(next_s, next_a), t2(next_s, next_a))
    yield "critics", F.mse_loss(q1(s, a), y) + F.mse_loss(q2(s, a), y)
    if update_actor:
        yield "actor", -q1(s, agent.actor(s)).mean()


def test_with_all_lambdas_zero_it_is_the_plain_algorithm(script, float64, monkeypatch):
    for function in ("pave_losses", "hutchinson_trace", "action_gradient"):
        monkeypatch.setattr(script, function, None)  # calling it would raise
    agent, batch = make_agent(script, policy_frequency=2), make_batch()
    for name, network in agent.named_children():
        if name.startswith("actor"):
            network.net[-1].weight.data *= 20  # actions near the limits, where TD3 clips them
    args, reference, is_sac = agent.args, copy.deepcopy(agent), script is sac
    optimizers = {"critics": torch.optim.Adam(reference.critics.parameters(), lr=args.q_lr)}
    optimizers["actor"] = torch.optim.Adam(reference.actor.parameters(), lr=args.policy_lr)
    followed = [(reference.critic_targets, reference.critics)]
    if is_sac:
        optimizers["alpha"] = torch.optim.Adam([reference.log_alpha], lr=args.q_lr)
    else:
        followed.append((reference.actor_target, reference.actor))
    for step, update_actor in enumerate((True, False, True)):  # Adam's constants don't show in a first update
        torch.manual_seed(step)
        metrics = agent.update(batch, update_actor)
        torch.manual_seed(step)
        for name, loss in (sac_losses if is_sac else td3_losses)(reference, batch, update_actor):
            loss.backward()
            optimizers[name].step()
            reference.zero_grad()
        for targets, networks in followed if is_sac or update_actor else ():  # TD3's targets move with its actor
            for target, source in zip(targets.parameters(), networks.parameters(), strict=True):
                target.data = (1 - args.tau) * target.data + args.tau * source.data
        assert ("losses/actor_loss" in metrics) == update_actor
    torch.testing.assert_close(agent.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-10)
    assert not {"losses/mpr", "geometry/vhv"} & metrics.keys()


WEIGHTS = {"lambda_mpr": 2.0, "lambda_vfc": 3.0, "lambda_curv": 0.5, "curv_delta": 0.01}


@pytest.mark.parametrize(("rows", "scale"), [(ROWS, None), (8, None), (ROWS, 0.3)])
def test_pave_adds_its_weighted_terms_of_both_critics_at_the_first_rows(float64, rows, scale):
    """With --autotune-curv, Curv's weight and margin are in units of the action gradient, here 0.3."""
    agent = make_agent(sac, 3, **WEIGHTS, pave_batch_size=rows, autotune_curv=scale is not None)
    plain, batch, weight, margin = make_agent(sac, 3), make_batch(action_dim=3), 0.5, 0.01
    if scale:
        agent.gradient_scale.fill_(scale)
        weight, margin = 0.5 * scale, 0.01 * 3 / 2 * scale
    batch = sac.Batch(*batch)
    s, next_s, a = (part[:rows] for part in batch[:3])
    target_noise, noise, probe = torch.randn(ROWS, 3), 0.01 * torch.randn(rows, STATES), sac.rademacher_like(a)
    loss, metrics = agent.critic_loss(batch, target_noise, noise, probe)
    plain_loss, expected = plain.critic_loss(batch, target_noise, None, None)
    terms = [sac.pave_losses(q, s, a, next_s, noise, probe, margin) for q in agent.critics]
    added = sum(2.0 * t.mpr + 3.0 * t.vfc + weight * t.curvature for t in terms)
    torch.testing.assert_close(loss, plain_loss + added)
    vhv = torch.cat([t.vhv for t in terms])
    assert 0 < (vhv < -margin).sum() < (vhv < 0).sum() < len(vhv)
    expected |= {"losses/mpr": (terms[0].mpr + terms[1].mpr) / 2, "geometry/vhv": vhv.mean()}
    expected["geometry/negative_fraction"] = (vhv < 0).float().mean()
    if scale:
        gradients = [t.gradient.square().mean().sqrt() for t in terms]
        expected |= {"losses/lambda_curv": torch.tensor(weight), "geometry/action_gradient": sum(gradients) / 2}
        expected["geometry/margin_fraction"] = (vhv < -margin).float().mean()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value)
    assert agent.update(batch, True).keys() > metrics.keys()  # it draws noise for as many rows


def test_lambda_curv_rises_while_too_few_samples_are_concave_and_stays_in_its_bounds(script):
    agent = make_agent(script, autotune_curv=True, lambda_curv=0.01, target_concavity=0.75)

    def after(margin_fraction, start=0.01):
        metrics = {"geometry/action_gradient": 2.0, "geometry/margin_fraction": margin_fraction}
        agent.add_gradients = lambda *_: {name: torch.tensor(value) for name, value in metrics.items()}
        agent.lambda_curv.fill_(start)
        agent.update(make_batch(), False)
        return agent.lambda_curv.item()

    assert after(0.75) == pytest.approx(0.01)  # met
    assert after(1.0) < 0.01 < after(0.5) < after(0.0)
    assert after(0.0, start=99.9) == pytest.approx(100)  # a target that can't be met
    assert after(1.0, start=1.0001e-4) == pytest.approx(1e-4)
    assert agent.gradient_scale.item() == pytest.approx(2.0 * (1 - 0.995**6), rel=1e-4)  # a running mean


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("script", "autotune_curv"), [(SCRIPTS[0], True), (SCRIPTS[1], False)], indirect=["script"])
def test_fast_updates_compute_what_eager_ones_do(script, float64, autotune_curv, device):
    """Compiled, on a GPU replayed as a graph, too: the same parameters, and metrics that can be read."""
    settings = {"lambda_mpr": 1e6, "lambda_vfc": 1e3, "lambda_curv": 1.0}  # so that every term weighs in the gradient
    settings |= {"autotune_curv": autotune_curv, "device": torch.device(device)}
    eager, fast = make_agent(script, **settings), make_agent(script, compile=True, **settings)
    logged = []
    fast_update = fast.update if device == "cpu" else script.CudaGraphUpdate(fast.update)
    for agent, update in ((eager, eager.update), (fast, fast_update)):
        for step in range(6):
            if step == 4:
                agent.lambda_mpr.mul_(0.5)  # neither compiled code nor a recorded graph may hold the old weight
            batch = [tensor.to(device) for tensor in make_batch(seed=step)]
            logged.append(torch.stack(list(update(batch, step % 2 == 0).values())))
    torch.testing.assert_close(fast.state_dict(), eager.state_dict(), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(logged[6:], logged[:6], rtol=1e-7, atol=1e-8)


def test_a_graphed_update_is_an_update_on_each_new_batch(monkeypatch):
    """With a stand-in for CUDA's graphs: a recording computes nothing, a replay does what was recorded."""
    plain, graphed = make_agent(sac), make_agent(sac)
    update = sac.CudaGraphUpdate(graphed.update)

    class Graph:
        def replay(self):
            self.metrics.update(graphed.update(*self.inputs))

    def recording(graph):
        def record(*inputs):
            graph.inputs, graph.metrics = inputs, {}
            return graph.metrics

        return patch.object(update, "update", record)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for step in range(6):
        both = [call(make_batch(seed=step), step % 2 == 0) for call in (plain.update, update)]
        torch.testing.assert_close(*both)
    torch.testing.assert_close(plain.state_dict(), graphed.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("failing", ["critic_loss", "actor_loss"])
def test_where_compiling_fails_it_warns_once_and_goes_on_eagerly(script, failing, monkeypatch, capsys):
    """At once (no C++ compiler) or later (Ctrl-C), even after the gradients are there (TORCH_COMPILE_DISABLE=1)."""

    def broken_compile(function, **options):
        def call(loss_function, parameters, *inputs):
            metrics = function(loss_function, parameters, *inputs)
            if loss_function.__name__ == failing:
                raise RuntimeError("no C++ compiler")
            return metrics

        return call

    monkeypatch.setattr(torch, "compile", broken_compile)
    agents = [make_agent(script, compile=compile) for compile in (True, False)]
    for agent in agents:
        for seed in range(2):
            torch.manual_seed(seed)
            agent.update(make_batch(), True)
    torch.testing.assert_close(*(agent.state_dict() for agent in agents), rtol=0, atol=0)
    warning = "without torch.compile, it fails here (RuntimeError('no C++ compiler'))"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_torch_without_the_private_switch_trains_eagerly(script, monkeypatch, capsys):
    """torch._dynamo.config refuses names that it does not have, as a later torch may do with ours."""

    class Config:
        __slots__ = ()

    monkeypatch.setattr(torch._dynamo, "config", Config())
    agents = [make_agent(script, compile=compile) for compile in (True, False)]
    for agent in agents:
        torch.manual_seed(0)
        agent.update(make_batch(), True)
    torch.testing.assert_close(*(agent.state_dict() for agent in agents), rtol=0, atol=0)
    assert "going on without torch.compile" in capsys.readouterr().err


def test_sac_log_prob_equals_torch_distributions(float64):
    actor, s, noise = sac.Actor(STATES, ACTIONS), torch.randn(ROWS, STATES), torch.randn(ROWS, ACTIONS)
    actions, log_prob = actor.sample(s, noise)
    mean, log_std = actor.net(s).chunk(2, -1)
    distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, distribution.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(actor(s), torch.tanh(mean))
    _, log_prob = actor.sample(s, torch.full((ROWS, ACTIONS), 50.0))  # tanh is 1.0 there
    assert log_prob.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_exploration_scatters_inside_the_bounds(script, scale):
    agent = make_agent(script)
    actions = np.array([agent.explore(np.full(STATES, scale)) for _ in range(50)])
    assert actions.shape == (50, ACTIONS) and np.abs(actions).max() <= 1
    if scale == 0:  # TD3 adds 0.1; SAC's standard deviation starts near 1, before tanh
        assert (0.4 if script is sac else 0.07) < actions.std(axis=0).mean() < 0.8


def test_buffer_wraps_around_and_keeps_the_newest():
    buffer = sac.ReplayBuffer(5, 2, 1, CPU)
    for i in range(8):
        if i == 2:
            assert set(buffer.sample(50)[0].flatten().tolist()) == {0, 1}  # not what was never written
        buffer.add(np.full(2, i), np.full(2, i + 0.5), np.full(1, -i), reward=10.0 * i, terminated=i == 7)
    assert (buffer.size, buffer.position) == (5, 3)
    s, next_s, a, r, d = buffer.sample(400)
    assert set(s[:, 0].tolist()) == {3, 4, 5, 6, 7}
    assert (s.shape, next_s.shape, a.shape, r.shape, d.shape) == ((400, 2), (400, 2), (400, 1), (400,), (400,))
    assert torch.equal(next_s, s + 0.5)
    assert torch.equal(a, -s[:, :1])
    assert torch.equal(r, 10 * s[:, 0])
    assert torch.equal(d, (s[:, 0] == 7).float())


def test_a_buffer_larger_than_the_memory_is_refused_with_its_size(monkeypatch):
    with pytest.raises(sac.UserError, match=r"no memory for a replay buffer of 280,000\.0 GB: lower --buffer-size"):
        sac.ReplayBuffer(10**13, 2, 1, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 10**9))  # free, total
    with pytest.raises(sac.UserError, match="lower --buffer-size"):
        sac.ReplayBuffer(1000, 2, 1, torch.device("cuda"))
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert len(sac.ReplayBuffer(10, 2, 1, CPU).rows) == 10
