"""The networks, the replay buffer and one update, each against its definition written out here."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

STATES, ACTIONS, ROWS = 4, 2, 24
CPU = torch.device("cpu")


def make_agent(script, action_dim=ACTIONS, **changes):
    settings = {"batch_size": ROWS, "compile": False, "lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}
    torch.manual_seed(0)
    return script.Agent(STATES, action_dim, script.validate(script.Args(**(settings | changes))), CPU)


def make_batch(seed=1, action_dim=ACTIONS):
    torch.manual_seed(seed)
    s, next_s, a = torch.randn(ROWS, STATES), torch.randn(ROWS, STATES), torch.rand(ROWS, action_dim) * 2 - 1
    return s, next_s, a, torch.randn(ROWS), (torch.rand(ROWS) < 0.3).float()


def plain_sac_update(agent, batch, q_optimizer, actor_optimizer, alpha_optimizer):
    """SAC (Haarnoja et al. 2018) with twin critics and a tuned alpha, without a line of the script's update."""
    s, next_s, a, r, d = batch
    args, (q1, q2), (t1, t2) = agent.args, agent.critics, agent.critic_targets
    alpha = agent.log_alpha.exp().item()
    with torch.no_grad():
        next_a, log_prob = agent.actor.sample(next_s, torch.randn(ROWS, ACTIONS))
        y = r + args.gamma * (1 - d) * (torch.min(t1(next_s, next_a), t2(next_s, next_a)) - alpha * log_prob)
    (0.5 * F.mse_loss(q1(s, a), y) + 0.5 * F.mse_loss(q2(s, a), y)).backward()
    q_optimizer.step()
    agent.zero_grad()
    new_a, log_prob = agent.actor.sample(s, torch.randn(ROWS, ACTIONS))
    (alpha * log_prob - torch.min(q1(s, new_a), q2(s, new_a))).mean().backward()
    actor_optimizer.step()
    agent.zero_grad()
    (-agent.log_alpha * (log_prob.detach() - ACTIONS).mean()).backward()
    alpha_optimizer.step()
    agent.zero_grad()
    move_targets(agent.critic_targets, agent.critics, args.tau)


def plain_td3_update(agent, batch, q_optimizer, actor_optimizer):
    """TD3 (Fujimoto et al. 2018), a step on which the delayed actor moves too."""
    s, next_s, a, r, d = batch
    args, (q1, q2), (t1, t2) = agent.args, agent.critics, agent.critic_targets
    with torch.no_grad():
        noise = (torch.randn(ROWS, ACTIONS) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_a = (agent.actor_target(next_s) + noise).clamp(-1, 1)
        y = r + args.gamma * (1 - d) * torch.min(t1(next_s, next_a), t2(next_s, next_a))
    (F.mse_loss(q1(s, a), y) + F.mse_loss(q2(s, a), y)).backward()
    q_optimizer.step()
    agent.zero_grad()
    (-q1(s, agent.actor(s)).mean()).backward()
    actor_optimizer.step()
    agent.zero_grad()
    move_targets(agent.critic_targets, agent.critics, args.tau)
    move_targets(agent.actor_target, agent.actor, args.tau)


def move_targets(targets, online, tau):
    for target, source in zip(targets.parameters(), online.parameters(), strict=True):
        target.data = (1 - tau) * target.data + tau * source.data


def test_with_all_lambdas_zero_it_is_the_plain_algorithm(script, float64, monkeypatch):
    for function in ("pave_losses", "hutchinson_trace", "action_gradient"):
        monkeypatch.setattr(script, function, None)  # calling it would raise
    agent, batch = make_agent(script), make_batch()
    args, reference, sac = agent.args, copy.deepcopy(agent), script.SCRIPT.startswith("sac")
    groups = [(reference.critics.parameters(), args.q_lr), (reference.actor.parameters(), args.policy_lr)]
    groups += [([reference.log_alpha], args.q_lr)] if sac else []
    optimizers = [torch.optim.Adam(parameters, lr=rate) for parameters, rate in groups]
    for update in range(3):  # Adam's constants don't show in the first
        torch.manual_seed(update)
        metrics = agent.update(batch, update_actor=True)
        torch.manual_seed(update)
        (plain_sac_update if sac else plain_td3_update)(reference, batch, *optimizers)
    for (name, ours), (_, plain) in zip(agent.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert not {"losses/mpr", "geometry/vhv"} & metrics.keys()


def test_pave_adds_its_weighted_terms_of_both_critics(script, float64):
    weights = {"lambda_mpr": 2.0, "lambda_vfc": 3.0, "lambda_curv": 0.5}
    agent, plain, batch = make_agent(script, **weights), make_agent(script), make_batch()
    s, next_s, a, _, _ = batch
    target_noise, noise, probe = torch.randn(ROWS, ACTIONS), 0.01 * torch.randn(ROWS, STATES), script.rademacher_like(a)
    loss, metrics = agent.critic_loss(batch, target_noise, noise, probe)
    plain_loss, plain_metrics = plain.critic_loss(batch, target_noise, None, None)
    terms = [script.pave_losses(q, s, a, next_s, noise, probe, 1.0) for q in agent.critics]
    added = sum(2.0 * t.mpr + 3.0 * t.vfc + 0.5 * t.curvature for t in terms)
    torch.testing.assert_close(loss, plain_loss + added)
    torch.testing.assert_close(metrics["losses/qf_loss"], plain_metrics["losses/qf_loss"])
    torch.testing.assert_close(metrics["losses/mpr"], (terms[0].mpr + terms[1].mpr) / 2)
    vhv = torch.cat([t.vhv for t in terms])
    assert 0 < (vhv < 0).sum() < len(vhv)
    torch.testing.assert_close(metrics["geometry/vhv"], vhv.mean())
    assert metrics["geometry/concave_fraction"].item() == pytest.approx((vhv < 0).double().mean().item())


def test_pave_batch_size_takes_the_first_rows_and_leaves_the_td_loss_whole(script, float64):
    agent, batch = make_agent(script, lambda_mpr=1.0, pave_batch_size=8), make_batch()
    s, next_s, a, _, _ = batch
    target_noise, noise, probe = torch.randn(ROWS, ACTIONS), torch.randn(8, STATES), script.rademacher_like(a[:8])
    loss, metrics = agent.critic_loss(batch, target_noise, noise, probe)
    plain_loss, plain_metrics = make_agent(script).critic_loss(batch, target_noise, None, None)
    added = sum(script.pave_losses(q, s[:8], a[:8], next_s[:8], noise, probe, 1.0).mpr for q in agent.critics)
    torch.testing.assert_close(loss, plain_loss + added)
    torch.testing.assert_close(metrics["losses/q_values"], plain_metrics["losses/q_values"])
    share = agent.update(batch, True)["geometry/concave_fraction"].item()
    assert 0 <= share <= 1 and (16 * share).is_integer()  # of 8 rows and two critics


@pytest.mark.parametrize("autotune_curv", [False, True])
def test_compiled_updates_reach_the_parameters_of_eager_ones(script, float64, autotune_curv):
    weights = {"lambda_mpr": 1e6, "lambda_vfc": 1e3, "lambda_curv": 1.0}  # so that every term weighs in the gradient
    weights["autotune_curv"] = autotune_curv
    eager, compiled = make_agent(script, **weights), make_agent(script, compile=True, **weights)
    for agent in (eager, compiled):
        torch.manual_seed(4)
        for step in range(6):
            agent.update(make_batch(seed=step), step % 2 == 0)
    for (name, ours), theirs in zip(compiled.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_without_a_compiler_it_warns_and_runs_eagerly(script, monkeypatch, capsys):
    def broken_compile(function, **options):
        def call(*inputs):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken_compile)
    make_agent(script, compile=True).update(make_batch(), True)
    assert (
        "going on without torch.compile, which fails here (RuntimeError('no C++ compiler'))" in capsys.readouterr().err
    )


def test_only_a_termination_cuts_the_target(script, float64):
    agent = make_agent(script)
    s = torch.randn(2, STATES)
    s[1] = s[0]
    rewards, noise = torch.tensor([1.5, 1.5]), torch.zeros(2, ACTIONS)
    cut, bootstrapped = agent.td_target(s, rewards, torch.tensor([1.0, 0.0]), noise)
    assert cut == 1.5
    assert bootstrapped != 1.5


def test_sac_log_prob_equals_torch_distributions(float64):
    from torch.distributions import Normal, TanhTransform, TransformedDistribution

    import sac_pave_continuous as script

    actor, s, noise = script.Actor(STATES, ACTIONS), torch.randn(ROWS, STATES), torch.randn(ROWS, ACTIONS)
    actions, log_prob = actor.sample(s, noise)
    mean, log_std = actor.net(s).chunk(2, -1)
    distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, distribution.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(actor(s), torch.tanh(mean))
    _, log_prob = actor.sample(s, torch.full((ROWS, ACTIONS), 50.0))  # tanh is 1.0 there
    assert log_prob.isfinite().all()


def test_fixed_alpha_stays_fixed():
    import sac_pave_continuous as script

    agent = make_agent(script, autotune=False, alpha=0.3)
    metrics = agent.update(make_batch(), True)
    assert math.isclose(metrics["losses/alpha"].item(), 0.3, rel_tol=1e-6)


def test_td3_moves_its_actor_and_targets_only_when_told():
    import td3_pave_continuous as script

    agent = make_agent(script)
    before = copy.deepcopy(agent.state_dict())
    metrics = agent.update(make_batch(), update_actor=False)
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"critics"}
    assert "losses/actor_loss" not in metrics
    agent.update(make_batch(), update_actor=True)
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"critics", "critic_targets", "actor", "actor_target"}


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_exploration_scatters_inside_the_bounds(script, scale):
    agent = make_agent(script)
    actions = np.array([agent.explore(np.full(STATES, scale)) for _ in range(50)])
    assert actions.shape == (50, ACTIONS) and np.abs(actions).max() <= 1
    if scale == 0:  # TD3 adds 0.1; SAC's standard deviation starts near 1, before tanh
        assert (0.4 if script.SCRIPT.startswith("sac") else 0.07) < actions.std(axis=0).mean() < 0.8


def test_an_actor_update_leaves_no_gradient_behind(script):
    agent = make_agent(script, lambda_mpr=1.0)
    agent.update(make_batch(), True)
    assert all(parameter.grad is None for parameter in agent.parameters())
    assert all(parameter.requires_grad for parameter in agent.critics.parameters())


def test_buffer_wraps_around_and_keeps_the_newest(script):
    buffer = script.ReplayBuffer(5, 2, 1, CPU)
    for i in range(8):
        buffer.add(np.full(2, i), np.full(2, i + 0.5), np.full(1, -i), reward=10.0 * i, terminated=i == 7)
    assert (buffer.size, buffer.position) == (5, 3)
    s, next_s, a, r, d = buffer.sample(400)
    assert set(s[:, 0].tolist()) == {3, 4, 5, 6, 7}
    assert (s.shape, next_s.shape, a.shape, r.shape, d.shape) == ((400, 2), (400, 2), (400, 1), (400,), (400,))
    assert torch.equal(next_s, s + 0.5)
    assert torch.equal(a, -s[:, :1])
    assert torch.equal(r, 10 * s[:, 0])
    assert torch.equal(d, (s[:, 0] == 7).float())


def test_half_full_buffer_gives_only_what_was_added(script):
    buffer = script.ReplayBuffer(1000, 2, 1, CPU)
    buffer.add(np.ones(2), np.ones(2), np.ones(1), 1.0, False)
    assert all((part == 1).all() for part in buffer.sample(50)[:4])
    assert not buffer.sample(50)[4].any()


def test_a_buffer_larger_than_the_memory_is_refused_with_its_size(script, monkeypatch):
    with pytest.raises(script.UserError, match=r"no memory for a replay buffer of 280,000\.0 GB: lower --buffer-size"):
        script.ReplayBuffer(10**13, 2, 1, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 10**9))  # free, total
    with pytest.raises(script.UserError, match="lower --buffer-size"):
        script.ReplayBuffer(1000, 2, 1, torch.device("cuda"))
