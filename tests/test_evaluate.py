"""benchmarks/common.py and evaluate.py: each definition against a slow, obvious version, and known critics."""

import itertools
import json
import re
from dataclasses import replace
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from helper_programs import fails
from helper_runs import BASE, make_run
from torch.autograd.functional import hessian, jacobian

import sac_pave_continuous as sac
import td3_pave_continuous as td3
from benchmarks import common, evaluate
from benchmarks.common import Episode, load_run, rollout
from benchmarks.envs import FILTER_BETA


@pytest.fixture
def script():
    return sac


@pytest.fixture
def run_dir(script, small_args):
    """The folder of a run of a few updates."""
    return script.train(small_args(total_timesteps=105, batch_size=16, eval_episodes=0))


@pytest.mark.parametrize("script", [sac, td3])
def test_load_run_restores_the_trained_networks_also_of_other_versions(script, run_dir):
    run, saved = load_run(run_dir), torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = script.Agent(3, 1, script.Args(**saved["args"]), torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    observations, actions = torch.randn(5, 3), torch.rand(5, 1).double()
    assert torch.equal(run.actor(observations), agent.actor(observations))
    expected = agent.critics[0].double()(observations.double(), actions)
    assert torch.equal(run.critic(observations.double(), actions), expected)
    told = (run.script, run.algorithm, run.method, run.args.env_id, run.step, run.path)
    assert told == (script, script.SCRIPT[:3].rstrip("_"), "pave", "Pendulum-v1", 105, run_dir)
    del saved["args"]["pave_batch_size"], saved["origin"]
    saved["args"]["a_flag_since_removed"] = 3
    torch.save(saved, run_dir / "checkpoint.pt")
    old = load_run(run_dir)
    assert (old.args.a_flag_since_removed, old.args.pave_batch_size, old.args.batch_size) == (3, None, 16)
    assert (old.origin, old.action_dim) == (None, 1)
    (run_dir / "checkpoint.pt").unlink()
    assert torch.equal(load_run(run_dir, need_critic=False).actor(observations), run.actor(observations))


METHODS = (
    (sac, {}, "pave"), (sac, {"autotune_curv": True}, "auto"),
    (sac, {"env_id": "Swimmer-v5"}, "untuned"),  # an env without tuned lambdas
    (td3, {"env_id": "Walker2d-v5"}, "pave"),  # whose tuned ones are the untuned
    (td3, {"lambda_mpr": 0.1, "lambda_vfc": 0.1, "lambda_curv": 0.01}, "untuned"),
    (sac, BASE, "base"), (td3, {"lambda_vfc": 0.0}, "ablation-101"), (td3, {"lambda_vfc": 0.1}, "own"),
)  # fmt: skip


@pytest.mark.parametrize(("script", "settings", "method"), METHODS)
def test_a_method_is_named_by_the_settings(script, settings, method):
    args = script.validate(script.Args(**{"env_id": "Pendulum-v1"} | settings))
    assert common.method_of(script, vars(args)) == method
    assert common.method_of(script, vars(args) | {"caps_temporal": 0.0}) == "caps"
    assert (
        common.method_of(script, vars(args) | {"caps_temporal": None}) == method
    )  # CAPS's source, as its origin tells


def of(script, env_id="Pendulum-v1", **settings) -> dict:
    """The settings of a training by name, as a run keeps them."""
    return vars(script.validate(script.Args(env_id=env_id, **settings)))


def test_a_wrapped_env_and_a_warm_start_are_in_the_methods_name():
    base, pave = of(td3, **BASE), of(td3)
    filtered = pave | {"env_id": "benchmarks.envs:filter/Pendulum-v1"}
    assert common.unwrap(filtered["env_id"]) == ("filter", "Pendulum-v1")
    assert common.unwrap("mine:penalty/Robot-v1") == ("penalty", "mine:Robot-v1")
    assert common.unwrap("mine:Filter-v1") == ("", "mine:Filter-v1") and common.unwrap("x/A-v0") == ("", "x/A-v0")
    assert common.method_of(td3, filtered) == "filter+pave"
    assert common.method_of(td3, base | {"env_id": "benchmarks.envs:penalty/Pendulum-v1"}) == "penalty"
    origin = {"run": "any", "step": 25_000, "args": base, "origin": None}
    assert common.method_of(td3, pave, origin) == "base-then-pave"
    assert common.method_of(td3, base, origin) == "base-then-base"
    assert common.origin_text(td3, origin) == "base seed 1 at 25,000"
    twice = {"run": "any", "step": 7, "args": pave, "origin": origin}
    assert common.method_of(td3, base, twice) == "base-then-pave-then-base"
    assert common.origin_text(td3, twice) == "base seed 1 at 25,000, then pave seed 1 at 7"


def test_an_identity_is_the_settings_and_the_start_and_nothing_else():
    args, origin = of(sac), {"run": "a", "step": 100, "args": of(sac, **BASE), "origin": None}

    def identity(start=None, **changes):
        return common.identity(sac, args | changes, start)

    own = identity()
    assert re.fullmatch("[0-9a-f]{12}", own) and own == identity(mpr_sigma=0.01)
    free = {"output_dir": "x", "resume": "y", "warm_start": "z", "eval_episodes": 3, "compile": False, "cuda": False}
    assert own == identity(**free, seed=9, total_timesteps=7)  # seed and steps stand beside it in the report's key
    assert own == common.identity(sac, {k: v for k, v in args.items() if k != "pave_batch_size"}, None)  # it came later
    assert identity(batch_size=100) == identity(batch_size=100.0)
    others = [identity(q_lr=1e-4), identity(lambda_curv=1.0), identity(gone=3), identity(caps_temporal=0.1)]
    others += [identity(origin), identity(origin | {"step": 101}), identity(origin | {"args": args})]
    others += [identity(origin | {"origin": origin}), common.identity(td3, of(td3), None)]
    assert len({own, *others}) == 1 + len(others)
    assert common.identity(sac, {"gamma": 0.5}, None) != common.identity(td3, {"gamma": 0.5}, None)
    elsewhere = origin | {"run": "b", "args": origin["args"] | {"output_dir": "far", "seed": 2}}
    assert identity(origin) == identity(elsewhere)  # a source is what it was, not its path; seeds are of one thing
    assert common.settings_of(sac, args | {"gone": 3.0}) == {
        "env_id": "Pendulum-v1", "gone": 3, "lambda_curv": 0.5, "lambda_mpr": 0.1, "lambda_vfc": 0.005
    }  # fmt: skip


def test_rollout_is_the_scripts_evaluation_and_noise_blurs_only_what_the_policy_sees(run_dir):
    run, noise = load_run(run_dir), np.array([0.1, 0.0, 0.5])
    with run.script.make_env("Pendulum-v1") as env:
        assert rollout(run, env, 2)[1] == run.script.evaluate(run.actor, env, 2)
        episodes, metrics = rollout(run, env, 2, noise)
        assert np.mean([episode.rewards.sum() for episode in episodes]) == pytest.approx(metrics["return_mean"])
        for seed, episode in enumerate(episodes, sac.EVALUATION_SEED):
            assert episode.observations.dtype == episode.actions.dtype == np.float32 and len(episode.actions) == 200
            assert np.allclose(episode.env_actions, 2 * episode.actions)  # Pendulum's torque: -2 to 2
            rng, (observation, _) = np.random.default_rng([seed, 1]), env.reset(seed=seed)  # not the env's own stream
            for true, action in zip(episode.observations, episode.actions, strict=True):
                assert np.array_equal(true, observation)
                seen = np.float32(observation + rng.uniform(-1, 1, 3) * noise)
                assert np.array_equal(run.actor(torch.from_numpy(seen)[None])[0].numpy(), action)
                observation = env.step(action)[0]


def test_a_filtered_run_is_measured_on_what_the_env_got_and_a_penalised_one_without_the_penalty(tmp_path):
    run = load_run(make_run(tmp_path / "1", sac, env_id="benchmarks.envs:filter/Pendulum-v1"))
    with common.evaluation_env(run) as env:
        (episode,), metrics = rollout(run, env, 1)
    sent = 0.0
    for action, got in zip(episode.actions[:, 0], episode.env_actions[:, 0], strict=True):
        sent = FILTER_BETA * sent + (1 - FILTER_BETA) * 2 * action
        assert got == pytest.approx(sent, abs=1e-5)
    assert metrics["oscillation"] == pytest.approx(np.abs(np.diff(episode.env_actions, axis=0)).mean())
    assert episode.env_actions.std() < 2 * episode.actions.std()
    run = load_run(make_run(tmp_path / "2", sac, env_id="benchmarks.envs:penalty/Pendulum-v1"))
    with common.evaluation_env(run) as env, gym.make("Pendulum-v1") as plain:
        (episode,), _ = rollout(run, env, 1)
        plain.reset(seed=sac.EVALUATION_SEED)
        rewards = [plain.step(action)[1] for action in episode.env_actions]
    assert episode.rewards == pytest.approx(np.array(rewards), abs=1e-4)


def test_the_machine_is_named_with_its_gpu_preload_and_commit(monkeypatch):
    told = {"grep": "model name\t: A CPU\n", "nvidia-smi": "A GPU\nA GPU\n", "git": "abc\n"}
    run = Mock(side_effect=lambda command, **_: Mock(stdout=told[command.split()[0]]))
    monkeypatch.setattr(common.subprocess, "run", run)
    monkeypatch.setenv("LD_PRELOAD", "x.so")
    name = f"A CPU, {common.os.cpu_count()} cores, A GPU"
    about = {"machine": name, "torch": torch.__version__, "commit": "abc", "preload": "x.so"}
    assert common.machine() == about


def test_geometry_against_loops(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 7)  # several chunks an episode
    monkeypatch.setattr(evaluate, "LIMIT", 0.7)  # random actions are seldom beyond 0.98
    torch.manual_seed(0)
    trained, actor, rng = sac.QNetwork(3, 3).double(), sac.Actor(3, 3).double(), np.random.default_rng(0)
    episodes = [
        Episode(np.float32(rng.normal(size=(n, 3))), np.float32(rng.uniform(-1, 1, (n, 3))), None, None)
        for n in (20, 1, 15)
    ]

    def critic(observations, actions):  # concave at some of the states only
        return 50 * trained(observations, actions) + (observations[:, :1] * actions.square()).sum(-1)

    actor.net[0].weight.data *= 20  # too steep for the bound at some of them
    states, cosines = [], []
    for episode in episodes:
        gradients = []
        for s, a in zip(*(torch.from_numpy(part).double() for part in episode[:2]), strict=True):
            both = hessian(lambda s, a: critic(s[None], a[None])[0], (s, a))[1]
            slope = jacobian(lambda s: actor(s[None])[0], s)
            gradients.append(jacobian(lambda a, s=s: critic(s[None], a[None])[0], a).numpy())
            outward = any(abs(x) > 0.7 and x * g > 0 for x, g in zip(a.tolist(), gradients[-1], strict=True))
            mixed, slope = (np.linalg.norm(matrix.numpy(), 2) for matrix in (both[0], slope))
            states.append((mixed, *np.linalg.eigvalsh(both[1].numpy()), slope, outward))
        for x, y in itertools.pairwise(gradients):
            cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    mixed, _, _, largest, slopes, outward = np.array(states).T
    concave, holds = largest < 0, (slopes <= mixed / -largest)[largest < 0]
    for share in (concave, holds, outward, np.array(cosines) < 0):
        assert 0 < sum(share) < len(share)
    expected = {
        "saturation_outward": np.mean(outward), "m_sup": max(mixed), "m_mean": np.mean(mixed),
        "mu_inf": min(-largest[concave]), "neg_def": np.mean(concave), "cosine_mean": np.mean(cosines),
        "flip_rate": np.mean(np.array(cosines) < 0), "actor_jacobian_sup": max(slopes),
        "bound_sup": max(mixed) / min(-largest[concave]), "bound_holds_share": np.mean(holds),
    }  # fmt: skip
    assert len(cosines) == 19 + 14  # none across two episodes
    assert evaluate.geometry(actor, critic, episodes) == pytest.approx(expected, rel=1e-9)


def test_evaluation_of_known_agents_under_the_same_noise(run_dir, monkeypatch):
    levels, visited, rewards = [], [], []
    monkeypatch.setattr(evaluate, "rollout", lambda *args: levels.append(args[3]) or rollout(*args))
    actor = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Tanh()).requires_grad_(False)
    actor[0].weight[:], actor[0].bias[:] = 0, 9  # always at the limit
    run = replace(load_run(run_dir), actor=actor)
    run.critic = lambda observations, actions: (actions.square() + actions).sum(-1) + 0 * observations.sum(-1)  # convex
    result = evaluate.evaluate_run(run, 1)
    assert result["saturation"] == result["saturation_outward"] == 1
    assert result["mu_inf"] is result["bound_sup"] is result["bound_holds_share"] is None and result["neg_def"] == 0
    assert all(set(row) == {"return_mean", "smoothness_mean", "length_mean"} for row in result["robustness"].values())
    actor[0].bias[:] = -2.2  # tanh: -0.976
    assert evaluate.evaluate_run(run, 1)["saturation"] == 0
    with run.script.make_env("Pendulum-v1") as env:
        env.action_space.seed(0)
        for seed in range(sac.EVALUATION_SEED, sac.EVALUATION_SEED + 10):
            steps = [env.reset(seed=seed), *(env.step(env.action_space.sample()) for _ in range(200))]
            visited += [step[0] for step in steps[:-1]]  # the last one is never acted on
            rewards += [step[1] for step in steps[1:]]
    deviations = np.std(np.float64(visited), axis=0)
    assert result["noise_std"] == pytest.approx(deviations.tolist())
    assert result["random_return"] == pytest.approx(sum(rewards) / 10)
    assert np.allclose(levels, np.multiply.outer([0, 0.01, 0.025, 0.05, 0.1] * 2, deviations))


def test_what_is_up_to_date_is_kept(run_dir, tmp_path, capsys):
    file = run_dir / "evaluation.json"

    def evaluated(**settings):
        evaluate.main(evaluate.Args(runs=(run_dir,), episodes=1, **settings))
        return json.loads(file.read_text())

    first = evaluated(csv=tmp_path / "all.csv")
    assert (first["step"], first["episodes"]) == (105, 1)
    row = pd.read_csv(tmp_path / "all.csv").loc[0, ["algorithm", "method", "seed", "return_mean@0.05"]]
    assert row.tolist() == ["sac", "pave", 1, pytest.approx(first["robustness"]["0.05"]["return_mean"])]
    assert f"{first['m_mean']:.4g}" in capsys.readouterr().out
    for stale in ({"version": 1}, {"step": 7}, {"episodes": 2}):  # what made it is not what is asked
        file.write_text(json.dumps(first | {"m_mean": -1.0} | stale))
        assert evaluated() == first
    file.write_text('{"m_mean": ')  # half written
    assert evaluated() == first
    file.write_text(json.dumps(first | {"m_mean": -1.0}))  # up to date: no checkpoint is needed
    (run_dir / "checkpoint.pt").unlink()
    assert evaluated()["m_mean"] == -1.0


@pytest.mark.filterwarnings("ignore:Using a non-tuple")  # as a tensor is asked for its "script"
def test_bad_input_is_one_line_and_exit_code_2(run_dir, tmp_path, monkeypatch):
    broken = {"foreign": {"script": "ppo"}, "tensor": torch.zeros(1), "half": {}}
    broken["weights"] = {"script": sac.SCRIPT, "args": {}, "agent": {}}
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "checkpoint.pt")
    (tmp_path / "half/checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes()[:20_000])
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot/actor.pt").write_bytes((run_dir / "actor.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    for message, arguments in {
        **{f"cannot read {name}/": [name] for name in broken},
        "missing is not a run folder, or lacks its checkpoint.pt and actor.pt\n": [run_dir, "missing"],
        "robot is not a run folder, or lacks its checkpoint.pt\n": ["robot"],
        "at least one run folder": [],
        "--episodes is 0": [run_dir, "--episodes", 0],
    }.items():
        assert message in fails("benchmarks.evaluate", *arguments)
