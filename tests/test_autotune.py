"""--autotune-curv: lambda_curv finds itself, in units that the reward's scale drops out of."""

import json
import math

import gymnasium as gym
import pytest
import torch

from tests.test_agent import ROWS, STATES, make_agent, make_batch


def tuned_agent(script, **changes):
    start = {"autotune_curv": True, "lambda_mpr": 0.1, "lambda_vfc": 0.2, "lambda_curv": 0.01, "curv_delta": 0.5}
    return make_agent(script, **(start | changes))


def noises(script, batch):
    torch.manual_seed(3)
    return torch.randn_like(batch[2]), 0.01 * torch.randn(ROWS, STATES), script.rademacher_like(batch[2])


def test_weight_and_margin_are_in_units_of_the_action_gradient(script, float64):
    agent, fixed, batch = tuned_agent(script, action_dim=3), make_agent(script, action_dim=3), make_batch(action_dim=3)
    agent.gradient_scale.fill_(0.3)
    s, next_s, a, _, _ = batch
    target_noise, noise, probe = noises(script, batch)
    scale = 3 / 2 * 0.3
    terms = [script.pave_losses(q, s, a, next_s, noise, probe, 0.5 * scale) for q in agent.critics]
    added = sum(0.1 * t.mpr + 0.2 * t.vfc + 0.01 * 0.3 * t.curvature for t in terms)
    loss, metrics = agent.critic_loss(batch, target_noise, noise, probe)
    torch.testing.assert_close(loss, fixed.critic_loss(batch, target_noise, None, None)[0] + added)
    vhv = torch.cat([t.vhv for t in terms])
    assert metrics["losses/lambda_curv"].item() == pytest.approx(0.01 * 0.3)
    assert metrics["geometry/margin_fraction"].item() == pytest.approx((vhv < -0.5 * scale).double().mean().item())
    gradients = [script.action_gradient(q, s, a)[0] for q in agent.critics]
    root_mean_squares = [gradient.square().mean().sqrt().item() for gradient in gradients]
    assert metrics["geometry/action_gradient"].item() == pytest.approx(sum(root_mean_squares) / 2)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_reward_scale_multiplies_the_loss_and_drops_out_of_the_tuning(script, float64, scale):
    """Rewards and Q (its last layer; SAC's alpha too) times c: every term of the loss times c^2."""
    one, other, batch = tuned_agent(script), tuned_agent(script), make_batch()
    for critic in (*other.critics, *other.critic_targets):
        critic.net[-1].weight.data.mul_(scale)
        critic.net[-1].bias.data.mul_(scale)
    if hasattr(one, "log_alpha"):
        other.log_alpha.data.add_(math.log(scale))
    s, next_s, a, rewards, ends = batch
    one.gradient_scale.fill_(0.1)
    other.gradient_scale.fill_(0.1 * scale)
    loss, metrics = one.critic_loss(batch, *noises(script, batch))
    scaled_loss, scaled_metrics = other.critic_loss((s, next_s, a, scale * rewards, ends), *noises(script, batch))
    torch.testing.assert_close(scaled_loss, scale**2 * loss)
    torch.testing.assert_close(scaled_metrics["geometry/margin_fraction"], metrics["geometry/margin_fraction"])
    gradients = (m["geometry/action_gradient"] for m in (scaled_metrics, metrics))
    torch.testing.assert_close(next(gradients), scale * next(gradients))


def test_lambda_rises_while_too_few_samples_are_concave_and_stays_in_its_bounds(script):
    agent, batch = tuned_agent(script, target_concavity=0.75), make_batch()

    def after(margin_fraction, updates):
        metrics = {"geometry/action_gradient": 2.0, "geometry/margin_fraction": margin_fraction}
        agent.backward = lambda *_: {name: torch.tensor(value) for name, value in metrics.items()}
        for _ in range(updates):
            agent.update(batch, False)
        return agent.lambda_curv.item()

    assert after(0.75, 3) == pytest.approx(0.01)  # met
    assert 0.01 < after(0.5, 1) < after(0.0, 1)
    assert after(0.0, 5000) == pytest.approx(100)  # a target that can't be met
    assert agent.gradient_scale.item() == pytest.approx(2.0, rel=1e-4)
    assert after(1.0, 20_000) == pytest.approx(1e-4)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Unheard-v0"])
def test_its_lambdas_are_the_same_on_every_env(script, env_id):
    args = script.validate(script.Args(env_id=env_id, autotune_curv=True))
    assert (args.lambda_mpr, args.lambda_vfc, args.lambda_curv) == (0.1, 0.0005, 0.01)
    assert script.validate(script.Args(env_id=env_id, autotune_curv=True, lambda_vfc=0.3)).lambda_vfc == 0.3
    assert tuned_agent(script, lambda_mpr=0.0, lambda_vfc=0.0).pave_rows == ROWS


def test_the_summary_tells_the_lambda_found(script, small_args):
    run_dir = script.train(small_args(autotune_curv=True, eval_episodes=0, total_timesteps=120))
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    found = json.loads((run_dir / "summary.json").read_text())["lambda_curv"]
    assert found == pytest.approx((saved["lambda_curv"] * saved["gradient_scale"]).item())


def test_a_resumed_run_goes_on_from_its_own_lambda_or_from_a_new_one(script, small_args):
    args = {"autotune_curv": True, "eval_episodes": 0}
    path = script.train(small_args(total_timesteps=120, **args)) / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["agent"]["lambda_curv"].fill_(0.3)  # as a longer training would leave it
    torch.save(checkpoint, path)
    for steps, changes, start in ((121, {}, 0.3), (122, {"lambda_curv": 5.0}, 5.0)):
        script.train(small_args(total_timesteps=steps, resume=str(path), **args, **changes))
        after = torch.load(path, weights_only=True)["agent"]["lambda_curv"].item()
        assert after == pytest.approx(start, rel=0.006)  # an update at most
    with pytest.raises(script.UserError, match="an --autotune flag differs"):
        script.train(small_args(total_timesteps=130, resume=str(path), autotune_curv=False))


def test_without_it_there_is_no_trace_of_it(script):
    agent = make_agent(script, lambda_curv=1.0)
    assert not [name for name in agent.state_dict() if "lambda" in name or "scale" in name]
    assert not {"losses/lambda_curv", "geometry/margin_fraction"} & agent.update(make_batch(), True).keys()


def test_the_margin_asks_for_a_top_no_farther_away_than_the_box_is_wide(script, float64):
    """Q = -h/2 |a - top|^2, whose every sample is `away` from the top in each dimension: h drops out."""

    def margin_fraction(h, away):
        agent = tuned_agent(script, action_dim=3, curv_delta=1.0)
        batch = make_batch(action_dim=3)
        top = batch[2] - away
        for critic in agent.critics:
            critic.forward = lambda s, a: -0.5 * h * (a - top.repeat(len(a) // ROWS, 1)).square().sum(1)
        for _ in range(2):
            metrics = agent.critic_loss(batch, *noises(script, batch))[1]
            agent.gradient_scale.copy_(metrics["geometry/action_gradient"])
        return metrics["geometry/margin_fraction"].item()

    assert [margin_fraction(h, away=1.9) for h in (0.01, 1.0, 100.0)] == [1, 1, 1]
    assert [margin_fraction(h, away=2.1) for h in (0.01, 1.0, 100.0)] == [0, 0, 0]


@pytest.mark.parametrize("name, factor", [("x0.1", 0.1), ("x10", 10.0)])
def test_the_scaled_envs_are_pendulum_but_for_the_rewards(name, factor):
    plain, scaled = gym.make("Pendulum-v1"), gym.make(f"benchmarks.scaled_rewards:Pendulum-{name}-v1")
    assert (plain.reset(seed=1)[0] == scaled.reset(seed=1)[0]).all()
    plain.action_space.seed(1)
    truncated = False
    while not truncated:
        action = plain.action_space.sample()
        observation, reward, _, truncated, _ = plain.step(action)
        scaled_observation, scaled_reward, _, scaled_truncated, _ = scaled.step(action)
        assert (observation == scaled_observation).all() and truncated == scaled_truncated
        assert scaled_reward == pytest.approx(factor * reward)
