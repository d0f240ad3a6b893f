"""Each recipe's critic loss is the block's, on the real libraries; a few updates of each run."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from stable_baselines3 import SAC
from torch import nn
from torch.nn import functional as F

import sac_pave_continuous as script
from benchmarks.check_critic import check_critic
from benchmarks.recipes import ensemble, plain, sb3

LAMBDAS = 2.0, 3.0, 0.5


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def batch():
    """s, a, s' and targets of Pendulum's shapes"""
    torch.manual_seed(0)
    return torch.randn(8, 3), 2 * torch.rand(8, 1) - 1, torch.randn(8, 3), 20 * torch.rand(8)


def three_terms(q, s, a, next_s, sigma=0.01, delta=1.0):
    """The block's, weighed; noise and probe are drawn from the seed that a recipe's loss is called with."""
    torch.manual_seed(1)
    noise, probe = sigma * torch.randn_like(s), script.rademacher_like(a)
    pave = script.pave_losses(q, s, a, next_s, noise, probe, delta)
    return LAMBDAS[0] * pave.mpr + LAMBDAS[1] * pave.vfc + LAMBDAS[2] * pave.curvature


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)


def weights(network):
    return nn.utils.parameters_to_vector(network.parameters())


def test_plain_loss_is_td_and_the_blocks_terms_summed_over_the_twins(batch):
    (s, a, next_s, target), critics = batch, nn.ModuleList([plain.Critic(), plain.Critic()])
    torch.manual_seed(1)
    ours = plain.critic_loss(critics, s, a, next_s, target, LAMBDAS)
    theirs = sum(F.mse_loss(q(s, a), target) + three_terms(q, s, a, next_s) for q in critics)
    torch.testing.assert_close(*(gradients(loss, critics.parameters()) for loss in (ours, theirs)))


def test_ensemble_loss_is_the_sum_of_each_members_own(float64, batch):
    (s, a, next_s, target), members = batch, [ensemble.member() for _ in range(ensemble.MEMBERS)]
    stacked, _ = torch.func.stack_module_state(members)
    torch.manual_seed(1)
    loss = ensemble.critic_loss(stacked, s, a, next_s, target, torch.tensor(LAMBDAS))
    ours = gradients(loss, stacked.values())
    low = target.long()[:, None]  # the atom below the target; the one above has the rest of the weight
    share = target[:, None] - low

    def q(member, s, a):
        return (member(torch.cat([s, a], 1)).softmax(1) * torch.arange(ensemble.ATOMS)).sum(1)

    for i, member in enumerate(members):
        logs = member(torch.cat([s, a], 1)).log_softmax(1)
        td = -((1 - share) * logs.gather(1, low) + share * logs.gather(1, low + 1)).mean()
        theirs = td + three_terms(partial(q, member), s, a, next_s, delta=ensemble.DELTA)
        expected = gradients(theirs, member.parameters())
        torch.testing.assert_close([stack[i] for stack in ours], list(expected), rtol=1e-8, atol=1e-10)
    assert check_critic(members[0], s, a, q, compile=False)


@pytest.mark.parametrize(("recipe", "first_update"), [(plain, 256), (ensemble, 1000), (sb3, 101)])
def test_a_few_updates_train_a_finite_policy_within_the_actions(recipe, first_update):
    settings = {"seed": 2, "total_timesteps": first_update + 3}
    actors = [recipe.train(lambdas, **settings) for lambdas in (LAMBDAS, LAMBDAS, (0.0, 0.0, 0.0))]
    ours, same, without = map(weights, actors)
    assert ours.isfinite().all()
    assert torch.equal(ours, same)  # the seed decides
    assert not torch.equal(ours, without)  # and the terms reach the actor through the critics
    assert actors[0](torch.randn(5, 3)).abs().max() <= 1


def trained_sb3(algorithm=sb3.PaveSAC, **settings):
    settings |= {"policy_kwargs": {"activation_fn": nn.SiLU, "net_arch": [32, 32]}, "batch_size": 16, "seed": 3}
    return algorithm("MlpPolicy", "Pendulum-v1", learning_starts=20, device="cpu", **settings).learn(24)


def test_sb3_without_lambdas_is_sac_itself():
    assert torch.equal(weights(trained_sb3(SAC).policy), weights(trained_sb3(lambdas=(0.0, 0.0, 0.0)).policy))


def test_sb3_loaded_adds_the_blocks_gradient_once_an_update_on_the_same_batch(tmp_path, monkeypatch):
    saved = trained_sb3(lambdas=LAMBDAS, sigma=1.0, delta=0.5)
    saved.save(tmp_path / "model")
    model = sb3.PaveSAC.load(tmp_path / "model", env=saved.get_env(), device="cpu")
    torch.testing.assert_close(model.policy.state_dict(), saved.policy.state_dict(), rtol=0, atol=0)
    add, updates, updates_before_step = model.add_pave_gradients, [], []
    batches = [saved.replay_buffer.sample(16) for _ in range(5)]

    def watched_add(s, a, next_s):
        updates.append((s, a, next_s))
        before = [p.grad.clone() for p in model.critic.parameters()]
        twins = (lambda s, a, i=i: model.critic(s, a)[i].squeeze(1) for i in range(2))
        terms = sum(three_terms(q, s, a, next_s, sigma=1.0, delta=0.5) for q in twins)
        expected = gradients(terms, model.critic.parameters())
        torch.manual_seed(1)
        add(s, a, next_s)
        added = [p.grad - old for p, old in zip(model.critic.parameters(), before, strict=True)]
        torch.testing.assert_close(added, list(expected), rtol=1e-3, atol=1e-5)
        assert all(old.any() for old in before)  # TD's gradient is there as well

    monkeypatch.setattr(model.replay_buffer, "sample", Mock(side_effect=batches))
    monkeypatch.setattr(model, "add_pave_gradients", watched_add)
    model.critic.optimizer.register_step_pre_hook(lambda *_: updates_before_step.append(len(updates)))
    model.learn(5, reset_num_timesteps=False)
    assert updates_before_step == [1, 2, 3, 4, 5]
    sampled = [(batch.observations, batch.actions, batch.next_observations) for batch in batches]
    torch.testing.assert_close(updates, sampled, rtol=0, atol=0)
    assert max(actions.abs().max() for _, actions, _ in updates) <= 1  # Pendulum's own are within 2
