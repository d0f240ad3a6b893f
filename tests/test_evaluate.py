"""benchmarks/common.py and evaluate.py: each definition against a slow, obvious version, and known critics."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import sac_pave_continuous as sac
import td3_pave_continuous as td3
from benchmarks import common, evaluate
from benchmarks.common import Episode, load_run, rollout
from benchmarks.evaluate import geometry


@pytest.fixture(scope="module", params=[sac, td3], ids=["sac", "td3"])
def run_dir(request, tmp_path_factory):
    """The folder of a run of a few updates on Pendulum."""
    settings = {"total_timesteps": 105, "learning_starts": 100, "batch_size": 16, "compile": False, "eval_episodes": 0}
    output_dir = str(tmp_path_factory.mktemp("runs"))
    return request.param.train(request.param.Args(env_id="Pendulum-v1", output_dir=output_dir, **settings))


@pytest.fixture
def copy(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- runs


def test_load_run_restores_the_trained_networks(run_dir, copy):
    run, saved = load_run(run_dir), torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = run.script.Agent(3, 1, run.script.Args(**saved["args"]), torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    observations, actions = torch.randn(5, 3), torch.rand(5, 1)
    assert torch.equal(run.actor(observations), agent.actor(observations))
    expected = agent.critics[0].double()(observations.double(), actions.double())
    assert torch.equal(run.critic(observations.double(), actions.double()), expected)
    assert (run.step, run.args.env_id, run.path, run.method) == (105, "Pendulum-v1", run_dir, "pave")
    assert run.algorithm == run.script.SCRIPT[:3].rstrip("_")

    (copy / "checkpoint.pt").unlink()
    without = load_run(copy, need_critic=False)
    assert torch.equal(without.actor(observations), run.actor(observations)) and without.critic is None


def rewrite(run_dir, **args):
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    torch.save(
        saved | {"args": {k: v for k, v in (saved["args"] | args).items() if v != "gone"}}, run_dir / "checkpoint.pt"
    )


def test_runs_of_other_versions_are_read(copy):
    rewrite(copy, a_flag_since_removed=3, pave_batch_size="gone")
    args = load_run(copy).args
    assert (args.a_flag_since_removed, args.pave_batch_size, args.batch_size) == (3, None, 16)
    (copy / "caps.json").write_text('{"caps_temporal": 1.0}')
    assert (load_run(copy).method, load_run(copy).args.caps_temporal) == ("caps", 1.0)


@pytest.mark.parametrize(
    ("script", "settings", "method"),
    [
        (sac, {}, "pave"),
        (sac, {"env_id": "Swimmer-v5"}, "untuned"),  # an env without tuned lambdas
        (td3, {"env_id": "Walker2d-v5"}, "pave"),  # whose tuned ones are the untuned
        (td3, {"lambda_mpr": 0.1, "lambda_vfc": 0.1, "lambda_curv": 0.01}, "untuned"),
        (sac, {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}, "base"),
        (td3, {"lambda_vfc": 0.0}, "ablation-101"),
        (td3, {"lambda_vfc": 0.1}, "own"),
        (sac, {"autotune_curv": True}, "auto"),
    ],
)
def test_a_method_is_named_by_the_settings(script, settings, method):
    args = script.validate(script.Args(**{"env_id": "Pendulum-v1"} | settings))
    assert common.method_of(script, vars(args)) == method
    assert common.method_of(script, vars(args) | {"caps_temporal": 0.0}) == "caps"


def test_rollout_is_the_scripts_own_evaluation(run_dir):
    run = load_run(run_dir)
    with run.script.make_env("Pendulum-v1") as env:
        episodes, metrics = rollout(run, env, episodes=2)
        assert metrics == run.script.evaluate(run.actor, env, 2)
        starts = [env.reset(seed=10_000 + i)[0] for i in range(2)]
    assert np.mean([episode.rewards.sum() for episode in episodes]) == pytest.approx(metrics["return_mean"])
    for start, episode in zip(starts, episodes, strict=True):
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert episode.observations.shape == (200, 3) and episode.actions.shape == (200, 1)
        assert np.array_equal(episode.observations[0], start)
        assert np.allclose(episode.env_actions, 2 * episode.actions)  # Pendulum's torque: -2 to 2
        assert np.allclose(run.actor(torch.from_numpy(episode.observations)), episode.actions, atol=1e-6)


def test_noise_blurs_only_what_the_policy_sees_and_comes_from_a_stream_of_its_own(run_dir):
    run, noise = load_run(run_dir), np.array([0.1, 0.0, 0.5])
    with run.script.make_env("Pendulum-v1") as env:
        episode = rollout(run, env, 1, noise)[0][0]
        rng, (observation, _) = np.random.default_rng([10_000, 1]), env.reset(seed=10_000)
        for true, action in zip(episode.observations, episode.actions, strict=True):
            assert np.array_equal(true, observation)
            seen = np.float32(observation + np.array([rng.uniform(-1, 1) * k for k in noise]))
            assert np.array_equal(run.actor(torch.from_numpy(seen)[None])[0].numpy(), action)
            observation = env.step(action)[0]


# ------------------------------------------------------------------------------------------------------ geometry


def random_episodes(lengths, observation_dim=3, action_dim=2) -> list[Episode]:
    rng, d_s, d_a = np.random.default_rng(0), observation_dim, action_dim
    parts = [
        (rng.normal(size=(n, d_s)), rng.uniform(-1, 1, (n, d_a)), np.zeros((n, d_a)), np.zeros(n)) for n in lengths
    ]
    return [Episode(*(part.astype(np.float32) for part in episode)) for episode in parts]


def test_geometry_against_loops(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 7)  # several chunks an episode
    monkeypatch.setattr(evaluate, "LIMIT", 0.7)  # random actions are seldom beyond 0.98
    torch.manual_seed(0)
    trained, actor = sac.QNetwork(3, 2).double(), sac.Actor(3, 2).double()

    def critic(observations, actions):  # concave at some of the states only
        return 100 * trained(observations, actions) + (observations[:, :1] * actions.square()).sum(-1)

    mixed, largest, traces, slopes, cosines, outward = [], [], [], [], [], []
    for episode in (episodes := random_episodes([20, 1, 15])):
        last = None
        for observation, action in zip(episode.observations, episode.actions, strict=True):
            s, a = torch.from_numpy(observation).double(), torch.from_numpy(action).double()
            hessian = torch.autograd.functional.hessian(lambda s, a: critic(s[None], a[None])[0], (s, a))
            mixed.append(np.linalg.norm(hessian[1][0].detach().numpy(), 2))
            largest.append(np.linalg.eigvalsh(hessian[1][1].detach().numpy())[-1])
            traces.append(np.trace(hessian[1][1].detach().numpy()))
            slope = torch.autograd.functional.jacobian(lambda s: actor(s[None])[0], s)
            slopes.append(np.linalg.norm(slope.numpy(), 2))
            gradient = torch.autograd.functional.jacobian(lambda a, s=s: critic(s[None], a[None])[0], a).numpy()
            outward.append(
                any((x > 0.7 and g > 0) or (x < -0.7 and g < 0) for x, g in zip(action, gradient, strict=True))
            )
            if last is not None:
                cosines.append(gradient @ last / np.linalg.norm(gradient) / np.linalg.norm(last))
            last = gradient
    concave = [i for i in range(36) if largest[i] < 0]
    assert 0 < len(concave) < 36 and min(cosines) < 0 < max(cosines) and 0 < sum(outward) < 36
    mu = min(-largest[i] for i in concave)
    expected = {
        "saturation_outward": sum(outward) / 36,
        "m_sup": max(mixed),
        "m_mean": sum(mixed) / 36,
        "mu_inf": mu,
        "trace_abs_inf": min(map(abs, traces)),
        "neg_def": len(concave) / 36,
        "cosine_mean": sum(cosines) / (19 + 14),
        "flip_rate": sum(cosine < 0 for cosine in cosines) / (19 + 14),
        "actor_jacobian_sup": max(slopes),
        "bound_sup": max(mixed) / mu,
        "bound_holds_share": sum(slopes[i] <= mixed[i] / -largest[i] for i in concave) / len(concave),
    }
    assert geometry(actor, critic, episodes) == pytest.approx(expected, rel=1e-9)


def quadratic(curvature, gain, actor_gain):
    """Q = -(a - Ks)^T A (a - Ks) / 2: d2Q/da2 = -A, d2Q/dsda = AK, greedy policy Ks; and an actor."""

    def critic(observations, actions):
        difference = actions - observations @ gain.T
        return -((difference @ curvature) * difference).sum(-1) / 2

    return (lambda observations: observations @ actor_gain.T), critic


def test_geometry_of_a_quadratic_critic():
    curvature = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    gain = torch.tensor([[0.5, 0.0, -1.0], [2.0, 0.3, 0.0]]).double()
    mu, m = (5 - math.sqrt(5)) / 2, np.linalg.norm((curvature @ gain).numpy(), 2)
    result = geometry(*quadratic(curvature, gain, gain), random_episodes([30]))
    assert (result["m_sup"], result["m_mean"]) == pytest.approx((m, m))
    assert (result["mu_inf"], result["trace_abs_inf"], result["bound_sup"]) == pytest.approx((mu, 5, m / mu))
    assert result["neg_def"] == result["bound_holds_share"] == 1
    assert result["actor_jacobian_sup"] == pytest.approx(np.linalg.norm(gain.numpy(), 2))
    steep = 1.01 * gain * m / mu / np.linalg.norm(gain.numpy(), 2)
    assert geometry(*quadratic(curvature, gain, steep), random_episodes([30]))["bound_holds_share"] == 0

    saddle = geometry(*quadratic(torch.diag(torch.tensor([1.0, -1.0])).double(), gain, gain), random_episodes([5]))
    assert saddle["neg_def"] == 0 and saddle["trace_abs_inf"] == 0
    assert all(math.isnan(saddle[key]) for key in ("mu_inf", "bound_sup", "bound_holds_share"))


# ----------------------------------------------------------------------------------------------------- evaluation


def test_the_noise_is_the_same_for_every_run_of_an_env(run_dir, monkeypatch):
    run, levels = load_run(run_dir), []
    monkeypatch.setattr(evaluate, "rollout", lambda *args: levels.append(args[3]) or rollout(*args))
    result = evaluate.evaluate_run(run, 1)
    other = evaluate.evaluate_run(replace(run, actor=run.script.Actor(3, 1)), 1)
    with run.script.make_env("Pendulum-v1") as env:
        env.action_space.seed(0)
        seen = []
        for seed in range(10_000, 10_010):
            observation, _ = env.reset(seed=seed)
            for _ in range(200):
                seen.append(observation)
                observation = env.step(env.action_space.sample())[0]
    deviation = np.std(np.float64(seen), axis=0)
    assert result["noise_std"] == other["noise_std"] == pytest.approx(deviation.tolist())
    assert np.allclose(levels[:5], np.multiply.outer([0, 0.01, 0.025, 0.05, 0.1], deviation))


def test_evaluation_of_known_agents(run_dir):
    run = load_run(run_dir)
    run.actor = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Tanh())
    torch.nn.init.zeros_(run.actor[0].weight)
    torch.nn.init.constant_(run.actor[0].bias, 9.0)  # always at the limit
    run.critic = lambda observations, actions: (actions.square() + actions).sum(-1) + 0 * observations.sum(-1)  # convex
    result = evaluate.evaluate_run(run, 1)
    assert result["saturation"] == result["saturation_outward"] == 1 and result["length_mean"] == 200
    assert result["mu_inf"] is result["bound_sup"] is result["bound_holds_share"] is None
    assert "NaN" not in json.dumps(result)
    assert all(set(row) == {"return_mean", "smoothness_mean", "length_mean"} for row in result["robustness"].values())
    torch.nn.init.constant_(run.actor[0].bias, -2.2)  # tanh: -0.976
    inside = evaluate.evaluate_run(run, 1)
    assert inside["saturation"] == inside["saturation_outward"] == 0


def test_what_is_up_to_date_is_kept(copy, tmp_path, capsys):
    def evaluated(**settings):
        evaluate.main(evaluate.Args(runs=(copy,), episodes=1, **settings))
        return json.loads((copy / "evaluation.json").read_text())

    first = evaluated(csv=tmp_path / "all.csv")
    row = dict(zip(*(line.split(",") for line in (tmp_path / "all.csv").read_text().splitlines()), strict=True))
    assert float(row["return_mean@0.05"]) == first["robustness"]["0.05"]["return_mean"]
    assert (row["algorithm"], row["method"], row["seed"]) == (load_run(copy).algorithm, "pave", "1")
    assert f"{first['m_mean']:.4g}" in capsys.readouterr().out

    for stale in ({"version": 1}, {"step": 7}, {"episodes": 2}):  # what made it is not what is asked
        (copy / "evaluation.json").write_text(json.dumps(first | {"m_mean": -1.0} | stale))
        assert evaluated() == first
    own = evaluated(noise_reference=copy)
    assert own["noise_std"] != first["noise_std"]
    (tmp_path / "other.json").write_text(json.dumps({"noise_std": [1.0, 2.0, 3.0]}))
    assert evaluated(noise_reference=tmp_path / "other.json")["noise_std"] == [1.0, 2.0, 3.0]

    (copy / "evaluation.json").write_text(json.dumps(first | {"m_mean": -1.0}))
    (copy / "checkpoint.pt").unlink()
    assert evaluated()["m_mean"] == -1.0
    with pytest.raises(common.UserError, match=r"actor\.pt alone has no critic"):
        evaluate.main(evaluate.Args(runs=(copy,), episodes=2))


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_and_exit_code_2(copy, tmp_path, capsys):
    broken = {
        "foreign": {"script": "ppo"},
        "tensor": torch.zeros(1),
        "weights": {"script": sac.SCRIPT, "args": {}, "agent": {}},
    }
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "checkpoint.pt")
    content = (copy / "checkpoint.pt").read_bytes()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/checkpoint.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.json").write_text('{"noise_std": [1.0]}')
    cases = [({"runs": (tmp_path / name,)}, "cannot read") for name in (*broken, "half")]
    cases += [({"runs": (copy, tmp_path / "missing")}, "not a run folder"), ({"runs": ()}, "at least one run folder")]
    cases += [({"runs": (copy,), "episodes": 0}, "--episodes is 0")]
    cases += [({"runs": (copy,), "noise_reference": tmp_path / "no.json"}, "of another env")]
    cases += [({"runs": (copy,), "noise_reference": tmp_path / "half/checkpoint.pt"}, "--noise-reference")]
    for settings, message in cases:
        with pytest.raises(SystemExit) as stop, common.user_errors():
            evaluate.main(evaluate.Args(**settings))
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.count("\n") == 1 and errors.startswith("error: ") and message in errors, errors


def test_the_command_line_ends_with_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "benchmarks.evaluate", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path} is not a run folder: it has no checkpoint.pt\n"
