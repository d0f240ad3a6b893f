"""Each recipe's critic loss is the block's, on the real libraries; a few updates of each run."""

import csv
import inspect
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.nn import functional as F

import sac_pave_continuous as script
from benchmarks.check_critic import check_critic
from benchmarks.measure import measure
from benchmarks.recipes import ensemble, plain, sb3, sb3_results, sb3_try

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


SB3 = {"sac": (SAC, sb3.PaveSAC), "td3": (TD3, sb3.PaveTD3)}
both_algorithms = pytest.mark.parametrize(("plain_sb3", "pave_sb3"), SB3.values(), ids=SB3)


def trained_sb3(algorithm, activation_fn=nn.ReLU, **settings):
    settings |= {"policy_kwargs": {"activation_fn": activation_fn, "net_arch": [32, 32]}, "batch_size": 16, "seed": 3}
    return algorithm("MlpPolicy", "Pendulum-v1", learning_starts=20, device="cpu", **settings).learn(24)


def load_sb3(algorithm, path, **settings):
    """With lambdas, unless others are given, and on an env"""
    settings = {"lambdas": LAMBDAS, "gather_steps": 10} | settings
    return algorithm.load(path, env=gym.make("Pendulum-v1"), device="cpu", **settings)


@pytest.fixture
def plain_zip(tmp_path):
    """Trains a plain agent and saves it: the .zip"""

    def trained_zip(algorithm, **settings):
        model = trained_sb3(algorithm, **settings)
        model.save(tmp_path / "plain.zip")
        model.save_replay_buffer(tmp_path / "plain.pkl")
        return tmp_path / "plain.zip"

    return trained_zip


@both_algorithms
def test_sb3_without_lambdas_is_the_algorithm_itself(plain_sb3, pave_sb3):
    ours = trained_sb3(pave_sb3, lambdas=(0.0, 0.0, 0.0))
    assert torch.equal(weights(trained_sb3(plain_sb3).policy), weights(ours.policy))


@both_algorithms
def test_sb3_loaded_adds_the_blocks_gradient_once_an_update_on_the_same_batch(
    plain_sb3, pave_sb3, plain_zip, monkeypatch
):
    path = plain_zip(plain_sb3)
    model = load_sb3(pave_sb3, path, sigma=1.0, delta=0.5, pave_batch_size=12)
    model.load_replay_buffer(path.with_suffix(".pkl"))
    add, updates, updates_before_step = model.add_pave_gradients, [], []
    batches = [model.replay_buffer.sample(16) for _ in range(5)]

    def watched_add(s, a, next_s):
        updates.append((s, a, next_s))
        before = [p.grad.clone() for p in model.critic.parameters()]
        twins = (lambda s, a, i=i: model.critic(s, a)[i].squeeze(1) for i in range(2))
        rows = s[:12], a[:12], next_s[:12]
        terms = sum(three_terms(q, *rows, sigma=1.0, delta=0.5) for q in twins)
        expected = gradients(terms, model.critic.parameters())
        assert [gradient.any().item() for gradient in expected] == 2 * [True, True, True, True, True, False]  # not ReLU
        torch.manual_seed(1)
        add(s, a, next_s)
        added = [p.grad - old for p, old in zip(model.critic.parameters(), before, strict=True)]
        torch.testing.assert_close(added, list(expected), rtol=1e-3, atol=1e-4)
        assert all(old.any() for old in before)  # TD's gradient is there as well

    monkeypatch.setattr(model.replay_buffer, "sample", Mock(side_effect=batches))
    monkeypatch.setattr(model, "add_pave_gradients", watched_add)
    model.critic.optimizer.register_step_pre_hook(lambda *_: updates_before_step.append(len(updates)))
    model.learn(5, reset_num_timesteps=False)
    assert updates_before_step == [1, 2, 3, 4, 5]
    sampled = [(batch.observations, batch.actions, batch.next_observations) for batch in batches]
    torch.testing.assert_close(updates, sampled, rtol=0, atol=0)
    assert max(actions.abs().max() for _, actions, _ in updates) <= 1  # Pendulum's own are within 2


@both_algorithms
def test_sb3_exchanges_the_critics_relu_and_nothing_else(plain_sb3, pave_sb3, plain_zip, batch):
    s, a, *_ = batch
    path = plain_zip(plain_sb3)
    plain_model, model = plain_sb3.load(path, device="cpu"), load_sb3(pave_sb3, path)
    torch.testing.assert_close(model.policy.state_dict(), plain_model.policy.state_dict(), rtol=0, atol=0)
    actions, old_actions = (m.predict(s.numpy(), deterministic=True)[0] for m in (model, plain_model))
    np.testing.assert_array_equal(actions, old_actions)
    for critics, old_critics in ((model.critic, plain_model.critic), (model.critic_target, plain_model.critic_target)):
        for net, old_net in zip(critics.q_networks, old_critics.q_networks, strict=True):
            first, second, last = (layer for layer in old_net if isinstance(layer, nn.Linear))
            smooth = sb3.SMOOTH_RELU()
            expected = last(smooth(second(smooth(first(torch.cat([s, a], 1))))))
            torch.testing.assert_close(net(torch.cat([s, a], 1)), expected)
    vhv = script.pave_losses(lambda s, a: model.critic(s, a)[0].squeeze(1), s, a, s, 0 * s, torch.ones_like(a), 0.0).vhv
    assert vhv.all()


def test_sb3_leaves_a_smooth_activation_alone(plain_zip):
    model = load_sb3(sb3.PaveSAC, plain_zip(SAC, activation_fn=nn.Tanh))
    assert model.policy_class is SAC.policy_aliases["MlpPolicy"]
    assert any(isinstance(layer, nn.Tanh) for layer in model.critic.modules())


LOAD_ELSEWHERE = """
import sys
import gymnasium as gym
import torch
from stable_baselines3 import SAC, TD3

for algorithm, path in ((SAC, "sac.zip"), (TD3, "td3.zip")):
    expected = torch.load(path + ".pt", weights_only=False)
    s, a = expected.pop("s"), expected.pop("a")
    model = algorithm.load(path, env=gym.make("Pendulum-v1"), device="cpu")
    for _ in range(2):
        actions = torch.as_tensor(model.predict(s.numpy(), deterministic=True)[0])
        now = {"q": model.critic(s, a), "target": model.critic_target(s, a), "actions": actions}
        torch.testing.assert_close(now, expected, rtol=0, atol=1e-6)
        model.save("again.zip")
        model = algorithm.load("again.zip", env=model.get_env(), device="cpu")
    model.learn(2, reset_num_timesteps=False)
assert not [name for name in sys.modules if name.startswith(("benchmarks", "sac_pave"))]
"""


def test_plain_sb3_loads_a_finished_zip_with_the_same_actions_and_q_values_without_our_files(
    plain_zip, tmp_path, batch
):
    s, a, *_ = batch
    for name, (plain_sb3, pave_sb3) in SB3.items():
        path = plain_zip(plain_sb3)
        model = load_sb3(pave_sb3, path, lambdas={"sac": "auto", "td3": LAMBDAS}[name])
        model.load_replay_buffer(path.with_suffix(".pkl"))
        model.learn(3, reset_num_timesteps=False)
        assert not torch.equal(weights(model.policy), weights(plain_sb3.load(path, device="cpu").policy))
        model.save(tmp_path / f"{name}.zip")
        actions = torch.as_tensor(model.predict(s.numpy(), deterministic=True)[0])
        expected = {"q": model.critic(s, a), "target": model.critic_target(s, a), "actions": actions}
        torch.save(expected | {"s": s, "a": a}, tmp_path / f"{name}.zip.pt")
        # another version of Python can't read the class within the .zip, and is given it
        given = {"policy_class": sb3.with_smooth_critics(plain_sb3.policy_aliases["MlpPolicy"], sb3.SMOOTH_RELU)}
        elsewhere = plain_sb3.load(tmp_path / f"{name}.zip", device="cpu", custom_objects=given)
        torch.testing.assert_close(elsewhere.critic(s, a), expected["q"], rtol=0, atol=0)
        # finished once more: the activation of the first time stays
        again = load_sb3(pave_sb3, tmp_path / f"{name}.zip", critic_activation_fn=nn.SiLU)
        torch.testing.assert_close(again.critic(s, a), expected["q"], rtol=0, atol=0)
        assert again.policy_class.critic_activation_fn.keywords == {"beta": 10}
    command = [sys.executable, "-W", "ignore", "-c", LOAD_ELSEWHERE]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


def test_sb3_without_its_replay_buffer_gathers_before_the_first_update(plain_zip):
    model = load_sb3(sb3.PaveSAC, plain_zip(SAC))
    start = weights(model.policy)
    with pytest.warns(UserWarning, match="before the replay buffer has 10 transitions"):
        model.learn(9, reset_num_timesteps=False)
    assert torch.equal(weights(model.policy), start)
    model.learn(1, reset_num_timesteps=False)
    assert not torch.equal(weights(model.policy), start)


def test_the_marked_part_of_sb3_runs_below_the_pave_block_with_its_imports_alone(plain_zip):
    imports = "import warnings\nfrom functools import partial\nimport torch\n"
    imports += "from stable_baselines3 import SAC, TD3\nfrom torch import nn\n"
    imports += "from stable_baselines3.common.preprocessing import get_action_dim\n"
    block = inspect.getsource(script).split("PAVE: paste from here to the next dashed line\n")[1].split("\n# -----")[0]
    _, marked = inspect.getsource(sb3).split("# copy from here")[1].split("# to here")[0].split("\n", 1)
    pasted = {"__name__": "pasted"}
    exec(imports + block + marked, pasted)
    for plain_sb3, pave_sb3, lambdas in ((SAC, pasted["PaveSAC"], LAMBDAS), (TD3, pasted["PaveTD3"], "auto")):
        path = plain_zip(plain_sb3)
        if lambdas == "auto":
            pasted["LAMBDA_CURV_BOUNDS"] = script.LAMBDA_CURV_BOUNDS
            exec(inspect.getsource(script.CurvAutotuner), pasted)
        model = load_sb3(pave_sb3, path, lambdas=lambdas)
        model.load_replay_buffer(path.with_suffix(".pkl"))
        model.learn(1, reset_num_timesteps=False)
        assert not torch.equal(weights(model.policy), weights(load_sb3(pave_sb3, path).policy))


@both_algorithms
def test_sb3_auto_is_the_scripts_autotuner_and_goes_on_from_its_zip(plain_sb3, pave_sb3, plain_zip, tmp_path):
    path = plain_zip(plain_sb3)
    model = load_sb3(pave_sb3, path, lambdas="auto")
    assert sb3.AUTO_LAMBDAS == script.AUTOTUNE_LAMBDAS and model.lambda_curv == script.AUTOTUNE_LAMBDAS[2]
    model.load_replay_buffer(path.with_suffix(".pkl"))
    model.lambda_curv.fill_(0.5)
    model.gradient_scale.fill_(0.03)
    torch.manual_seed(0)
    s, a, next_s = 9 * torch.randn(16, 3), 2 * torch.rand(16, 1) - 1, torch.randn(16, 3)
    twins = [lambda s, a, i=i: model.critic(s, a)[i].squeeze(1) for i in range(2)]
    torch.manual_seed(1)
    noise, probe = 0.01 * torch.randn_like(s), script.rademacher_like(a)
    losses = [script.pave_losses(q, s, a, next_s, noise, probe, 0.015) for q in twins]  # the margin is 1/2 * 0.03
    loss = sum(0.1 * pave.mpr + 0.0005 * pave.vfc + 0.5 * 0.03 * pave.curvature for pave in losses)
    expected = gradients(loss, model.critic.parameters())
    metrics = [script.pave_metrics(pave, 0.5, 0.015) for pave in losses]
    names = ("geometry/margin_fraction", "geometry/action_gradient")
    metrics = {name: (metrics[0][name] + metrics[1][name]).detach() / 2 for name in names}
    assert 0 < metrics[names[0]] < 1 and metrics[names[0]] != 0.5
    lambda_curv, gradient_scale = torch.tensor(0.5), torch.tensor(0.03)
    script.CurvAutotuner(0.95, 1).step(lambda_curv, gradient_scale, metrics)

    for parameter in model.critic.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(1)
    model.set_logger(configure(None, []))
    model.add_pave_gradients(s, a, next_s)
    torch.testing.assert_close([p.grad for p in model.critic.parameters()], list(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((model.lambda_curv, model.gradient_scale), (lambda_curv, gradient_scale))
    model.save(tmp_path / "auto.zip")
    again = pave_sb3.load(tmp_path / "auto.zip", env=gym.make("Pendulum-v1"), device="cpu")
    assert again.lambdas == "auto" and (again.lambda_curv, again.gradient_scale) == (lambda_curv, gradient_scale)
    again.load_replay_buffer(path.with_suffix(".pkl"))
    again.learn(2, reset_num_timesteps=False)
    assert again.gradient_scale != gradient_scale
    load_sb3(pave_sb3, tmp_path / "auto.zip").save(tmp_path / "fixed.zip")  # what auto had found is gone with it
    assert load_sb3(pave_sb3, tmp_path / "fixed.zip", lambdas="auto").gradient_scale == 0


def test_sb3_refuses_what_pave_would_be_wrong_for(plain_zip):
    path = plain_zip(TD3)
    with pytest.raises(ValueError, match="PaveSAC needs a SACPolicy"):
        load_sb3(sb3.PaveSAC, path)
    for settings, words in (
        ({"lambdas": (1.0, 1.0)}, "none negative"),
        ({"lambdas": (1.0, -1.0, 0.0)}, "none negative"),
        ({"lambdas": "off"}, "not off"),
        ({"n_steps": 3}, "n_steps=1, not 3"),
    ):
        with pytest.raises(ValueError, match=words):
            load_sb3(sb3.PaveTD3, path, **settings)
    image = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    env = gym.wrappers.TransformObservation(gym.make("Pendulum-v1"), lambda _: image.sample(), image)
    with pytest.raises(ValueError, match="vector observations"):
        sb3.PaveSAC("CnnPolicy", env, device="cpu", buffer_size=100)


def test_sb3_results_writes_a_row_for_each_agent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sb3_results, "FOLDER", tmp_path)
    monkeypatch.setattr(sb3_try, "measure", partial(measure, episodes=1))
    monkeypatch.setattr(sb3_results, "CANDIDATES", {"ReLU": nn.ReLU, sb3_results.FITTED: nn.SiLU})
    monkeypatch.setattr(sb3_results, "fit", partial(sb3_results.fit, updates=3))
    settings = {"seed": 101, "output": tmp_path / "sb3.csv"}
    for wrong, words in (
        ({"arm": "tuned"}, "--arm is one of finished without PAVE, "),
        ({}, "run the command `train` first"),
        ({"steps": 0}, "--steps must be above 0"),
        ({"activation": "ReLu"}, "--activation is one of ReLU, not ReLu"),
        ({"env_id": "CartPole-v1"}, "needs a float Box"),
    ):
        with pytest.raises(script.UserError, match=words):
            sb3_results.main(sb3_results.Args("finish", **settings | wrong))
    sb3_results.main(sb3_results.Args("train", steps=110, **settings))
    sb3_results.main(sb3_results.Args("finish", steps=2, **settings))
    with open(tmp_path / "sb3.csv") as file:
        agents = [row["agent"] for row in csv.DictReader(file)]
    finished = ["finished without PAVE", "finished with PAVE", "finished untuned", "finished auto"]
    assert agents == ["plain, sampled", "plain", "plain, filtered", *finished]
    sb3_results.main(sb3_results.Args("exchange", seed=101, output=tmp_path / "exchange.csv"))
    assert "SiLU, fitted" in (tmp_path / "exchange.csv").read_text()


def test_sb3_try_tells_what_each_way_of_going_on_gives_and_only_reads_the_agent(
    plain_zip, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sb3_try, "measure", partial(measure, episodes=1))
    agent = plain_zip(TD3)
    before = agent.read_bytes()
    settings = {"buffer": agent.with_suffix(".pkl"), "algorithm": "td3", "steps": 2, "output": tmp_path / "out"}
    sb3_try.main(sb3_try.Args(agent, "Pendulum-v1", seeds=(1, 2), **settings))
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    ways = ["finished without PAVE", "finished with PAVE", "finished untuned", "finished auto"]
    assert [*table["agent"]] == ["as it is", "as it is, filtered", *ways, *ways]
    assert [*table["seed"]] == ["-", "-", *4 * ["1"], *4 * ["2"]] and agent.read_bytes() == before
    assert (table["return"][2:] != table["return"][0]).all()  # each has learned, also from a small replay buffer
    direct = measure(lambda s: TD3.load(agent).predict(s, deterministic=True)[0], gym.make("Pendulum-v1"), 1)
    assert table["return"][0] == pytest.approx(direct["return"], rel=1e-4)
    assert {path.name for path in (tmp_path / "out").glob("*.zip")} == {
        f"{way.replace(' ', '_')}_{seed}.zip" for way in ways for seed in (1, 2)
    }
    assert "finished auto" in capsys.readouterr().out
    for wrong, words in (
        ({"algorithm": "sac"}, "cannot go on from"),
        ({"buffer": tmp_path / "none.pkl"}, "there is no"),
        ({"steps": 0}, "--steps must be above 0"),
        ({"seeds": ()}, "at least one of --seeds"),
        ({"seeds": (1, -1)}, "--seeds is"),
        ({"vec_normalize": agent}, "cannot go on from"),
        ({"env_id": "CartPole-v1"}, "needs a float Box"),
        ({"output": tmp_path / "out"}, "has files already"),
    ):
        settings["output"] = tmp_path / "other"
        with pytest.raises(script.UserError, match=words):
            sb3_try.main(sb3_try.Args(**{"agent": agent, "env_id": "Pendulum-v1"} | settings | wrong))


def test_sb3_try_normalises_as_the_agents_training_did_and_gathers_what_was_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(sb3_try, "measure", partial(measure, episodes=1))
    monkeypatch.setattr(sb3_try, "GATHERED", 20)
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = SAC("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, seed=3, device="cpu", batch_size=16).learn(110)
    model.save(tmp_path / "plain.zip")
    env.save(str(tmp_path / "statistics.pkl"))

    def policy(observation):
        return model.predict(env.normalize_obs(observation), deterministic=True)[0]

    expected = measure(policy, gym.make("Pendulum-v1"), 1)
    settings = {"vec_normalize": tmp_path / "statistics.pkl", "steps": 1, "seeds": (1,), "output": tmp_path / "out"}
    sb3_try.main(sb3_try.Args(tmp_path / "plain.zip", "Pendulum-v1", **settings))
    assert (tmp_path / "out" / "finished_auto_1.pkl").read_bytes() != (tmp_path / "statistics.pkl").read_bytes()
    again = SAC.load(tmp_path / "plain.zip", device="cpu")
    again.load_replay_buffer(tmp_path / "out" / "gathered.pkl")
    assert again.replay_buffer.size() == 20
    row = pd.read_csv(tmp_path / "out" / "table.csv").iloc[0]
    assert [row["return"], row["sm"]] == pytest.approx([expected["return"], expected["sm"]], rel=1e-4)
