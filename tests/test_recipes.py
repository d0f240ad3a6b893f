"""Each recipe's critic loss is the block's, on the real libraries; a few updates of each run; no recipe is long."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from stable_baselines3 import SAC
from torch import nn
from torch.nn import functional as F

import sac_pave_continuous as script
from benchmarks.check_critic import check_critic
from benchmarks.recipes import ensemble, plain, sb3, table

LAMBDAS = 2.0, 3.0, 0.5
RECIPES = {"plain": plain, "sb3": sb3, "ensemble": ensemble}


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def batch():
    """s, a, s' and targets of Pendulum's shapes"""
    torch.manual_seed(0)
    return torch.randn(8, 3), 2 * torch.rand(8, 1) - 1, torch.randn(8, 3), 20 * torch.rand(8)


def three_terms(q, s, a, next_s, delta=1.0):
    """The block's, weighed; noise and probe are drawn from the seed that a recipe's loss is called with."""
    torch.manual_seed(1)
    noise, probe = 0.01 * torch.randn_like(s), script.rademacher_like(a)
    pave = script.pave_losses(q, s, a, next_s, noise, probe, delta)
    return LAMBDAS[0] * pave.mpr + LAMBDAS[1] * pave.vfc + LAMBDAS[2] * pave.curvature


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short(recipe):
    lines = (ROOT / "benchmarks" / "recipes" / f"{recipe}.py").read_text().splitlines()
    assert len(lines) <= 80


def test_plain_loss_is_td_and_the_blocks_terms_summed_over_the_twins():
    (s, a, next_s, target), critics = batch(), nn.ModuleList([plain.Critic(), plain.Critic()])
    torch.manual_seed(1)
    ours = plain.critic_loss(critics, s, a, next_s, target, LAMBDAS)
    theirs = sum(F.mse_loss(q(s, a), target) + three_terms(q, s, a, next_s) for q in critics)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(gradients(loss, critics.parameters()) for loss in (ours, theirs)))


def test_ensemble_loss_is_the_sum_of_each_members_own(float64):
    (s, a, next_s, target), members = batch(), [ensemble.member() for _ in range(ensemble.MEMBERS)]
    stacked, _ = torch.func.stack_module_state(members)
    torch.manual_seed(1)
    ours = ensemble.critic_loss(stacked, s, a, next_s, target, torch.tensor(LAMBDAS))
    ours_by_member = zip(*(stack.unbind() for stack in gradients(ours, stacked.values())), strict=True)
    atoms = torch.arange(ensemble.ATOMS)
    theirs = []
    for member, ours_of_member in zip(members, ours_by_member, strict=True):

        def q(s, a, member=member):
            return (member(torch.cat([s, a], 1)).softmax(1) * atoms).sum(1)

        low = target.long()[:, None]  # the atom below the target; the one above has the rest of the weight
        probabilities = member(torch.cat([s, a], 1)).log_softmax(1)
        share = target[:, None] - low
        td = -((1 - share) * probabilities.gather(1, low) + share * probabilities.gather(1, low + 1)).mean()
        theirs.append(td + three_terms(q, s, a, next_s, ensemble.DELTA))
        torch.testing.assert_close(ours_of_member, gradients(theirs[-1], member.parameters()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours, sum(theirs))


def test_check_critic_passes_the_ensembles_member_and_stable_baselines(capsys):
    s, a, _, _ = batch()
    expectation = lambda member, s, a: member(torch.cat([s, a], 1)).softmax(1) @ torch.arange(ensemble.ATOMS).double()  # noqa: E731
    assert check_critic(ensemble.member(), s, a, expectation, compile=False), capsys.readouterr().out
    net = make_sb3().critic.q_networks[0]
    assert check_critic(net, s, a, lambda net, s, a: net(torch.cat([s, a], 1)).squeeze(1), compile=False)


@pytest.mark.parametrize("recipe", [plain, ensemble])
def test_a_few_updates_train_a_finite_policy_within_the_actions(recipe):
    first = {plain: 256, ensemble: 1000}[recipe]  # the step of the first update
    actors = [
        recipe.train(lambdas, seed=2, total_timesteps=first + 3) for lambdas in (LAMBDAS, LAMBDAS, (0.0, 0.0, 0.0))
    ]
    weights = [nn.utils.parameters_to_vector(actor.parameters()) for actor in actors]
    assert weights[0].isfinite().all()
    assert torch.equal(weights[0], weights[1])  # the seed decides
    assert not torch.equal(weights[0], weights[2])  # and the terms reach the actor through the critics
    assert actors[0](torch.randn(5, 3)).abs().max() <= 1


def make_sb3(algorithm=sb3.PaveSAC, **settings):
    policy = {"activation_fn": nn.SiLU, "net_arch": [32, 32]}
    return algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=policy, batch_size=16, seed=3, device="cpu", **settings)


def watch(model):
    """Record what each of the model's updates samples, and the critics' gradient before and after PAVE."""
    record, sample, add = (
        SimpleNamespace(batches=[], inputs=[], before=[], after=[]),
        model.replay_buffer.sample,
        model.add_pave_gradients,
    )

    def watched_sample(*arguments, **keywords):
        record.batches.append(sample(*arguments, **keywords))
        return record.batches[-1]

    def watched_add(s, a, next_s):
        record.inputs.append((s, a, next_s))
        record.before.append([p.grad.clone() for p in model.critic.parameters()])
        torch.manual_seed(1)
        record.weights = [p.detach().clone() for p in model.critic.parameters()]
        add(s, a, next_s)
        record.after.append([p.grad.clone() for p in model.critic.parameters()])

    model.replay_buffer.sample, model.add_pave_gradients = watched_sample, watched_add
    return record


def test_sb3_adds_the_blocks_gradient_once_an_update_on_the_same_batch():
    model = make_sb3(lambdas=LAMBDAS, learning_starts=20)
    record = watch(model)
    model.learn(24)
    assert len(record.batches) == len(record.inputs) == 4
    for sampled, inputs in zip(record.batches, record.inputs, strict=True):
        for ours, theirs in zip(
            inputs, (sampled.observations, sampled.actions, sampled.next_observations), strict=True
        ):
            assert torch.equal(ours, theirs)
        assert sampled.actions.abs().max() <= 1  # and Pendulum's own are within 2
    for p, weight in zip(model.critic.parameters(), record.weights, strict=True):
        p.data.copy_(weight)  # as before the last step
    twins = (lambda s, a, i=i: model.critic(s, a)[i].squeeze(1) for i in range(2))
    expected = gradients(sum(three_terms(q, *record.inputs[-1]) for q in twins), model.critic.parameters())
    added = [after - before for after, before in zip(record.after[-1], record.before[-1], strict=True)]
    torch.testing.assert_close(added, list(expected), rtol=1e-3, atol=1e-5)
    assert all(before.any() for before in record.before[-1])  # TD's gradient is there as well


def test_sb3_without_lambdas_is_sac_itself_and_with_them_is_not():
    weights = []
    for algorithm, settings in ((SAC, {}), (sb3.PaveSAC, {"lambdas": (0.0, 0.0, 0.0)}), (sb3.PaveSAC, {})):
        model = make_sb3(algorithm, learning_starts=20, **settings).learn(24)
        weights.append(nn.utils.parameters_to_vector(model.critic.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sb3_saves_loads_and_goes_on_with_pave(tmp_path):
    model = make_sb3(lambdas=LAMBDAS, sigma=0.02, delta=0.5, learning_starts=20).learn(24)
    model.save(tmp_path / "model")
    loaded = sb3.PaveSAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert (tuple(loaded.lambdas), loaded.sigma, loaded.delta) == (LAMBDAS, 0.02, 0.5)
    for ours, theirs in ((loaded.policy, model.policy), (loaded.critic.optimizer, model.critic.optimizer)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    record = watch(loaded)
    loaded.learn(23, reset_num_timesteps=False)
    assert len(record.inputs) == len(record.batches) > 0


def test_the_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, **_):
        commands.append(command)
        if len(commands) == 3:
            raise KeyboardInterrupt
        evaluation = {"return_mean": -100.0 - len(commands), "smoothness_mean": 0.12345, "oscillation": 0.5}
        return SimpleNamespace(stdout=json.dumps(evaluation))

    monkeypatch.setattr(table, "RESULTS", tmp_path / "recipes.csv")
    monkeypatch.setattr(table.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        table.main()
    table.main()
    assert len(commands) == 3 * 3 * 2 + 1
    assert commands.pop(2) == commands[2]  # the one that was stopped, and no other, is run again
    assert len(set(map(tuple, commands))) == 3 * 3 * 2
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[2] == "| `plain.py` | without | -101.0, -108.0, -114.0 | 0.1235, 0.1235, 0.1235 | 0.500, 0.500, 0.500 |"
    )
    assert len(lines) == 2 + 6
