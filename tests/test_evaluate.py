"""benchmarks/evaluate.py: each definition against a slow, obvious version, and against critics that are known."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sac_pave_continuous
import td3_pave_continuous
from benchmarks import evaluate
from benchmarks.evaluate import Episode, geometry, load_run, rollout

ROOT = Path(__file__).resolve().parents[1]
BEHAVIOUR = ["return_mean", "return_std", "smoothness_mean", "smoothness_std", "oscillation"]
CRITIC = ["m_sup", "m_mean", "mu_inf", "mu_defined_share", "trace_abs_inf", "neg_def", "cosine_mean", "flip_rate"]
KEYS = [*BEHAVIOUR, *CRITIC, "actor_jacobian_sup", "bound_sup", "bound_holds_share", "robustness"]


@pytest.fixture(scope="module", params=[sac_pave_continuous, td3_pave_continuous], ids=["sac", "td3"])
def run_dir(request, tmp_path_factory) -> Path:
    """The folder of a run of a few updates on Pendulum."""
    script = request.param
    settings = {"total_timesteps": 110, "learning_starts": 100, "batch_size": 16, "compile": False, "eval_episodes": 0}
    output_dir = str(tmp_path_factory.mktemp("runs"))
    return script.train(script.Args(env_id="Pendulum-v1", output_dir=output_dir, **settings))


@pytest.fixture(scope="module")
def run(run_dir) -> evaluate.Run:
    return load_run(run_dir)


def random_episodes(lengths, observation_dim=3, action_dim=2) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        Episode(
            rng.normal(size=(steps, observation_dim)).astype(np.float32),
            rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
            np.zeros((steps, action_dim)),
            np.zeros(steps),
        )
        for steps in lengths
    ]


# ---------------------------------------------------------------------------------------------------------- runs


def test_load_run_restores_the_trained_networks(run_dir, run):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    env = run.script.make_env("Pendulum-v1")
    agent = run.script.Agent(*env.observation_space.shape, *env.action_space.shape, run.args, torch.device("cpu"))
    agent.load_state_dict(checkpoint["agent"])
    observations, actions = torch.randn(5, 3), torch.rand(5, 1)
    assert torch.equal(run.actor(observations), agent.actor(observations))
    expected = agent.critics[0].double()(observations.double(), actions.double())
    assert torch.equal(run.critic(observations.double(), actions.double()), expected)
    assert (run.step, run.args.env_id, run.path) == (110, "Pendulum-v1", run_dir)
    assert run.label == {"sac": "SAC + PAVE", "td3": "TD3 + PAVE"}[run.script.SCRIPT[:3]]


def test_rollout_is_the_scripts_own_evaluation(run):
    env = run.script.make_env("Pendulum-v1")
    result = rollout(run, env, episodes=2)
    assert result.metrics == run.script.evaluate(run.actor, env, 2)
    returns = [episode.rewards.sum() for episode in result.episodes]
    assert np.mean(returns) == pytest.approx(result.metrics["return_mean"])
    sm = [run.script.smoothness(episode.env_actions) for episode in result.episodes]
    assert np.mean(sm) == pytest.approx(result.metrics["smoothness_mean"])
    for i, episode in enumerate(result.episodes):
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert episode.observations.shape == (200, 3) and episode.actions.shape == (200, 1)
        assert np.array_equal(episode.observations[0], env.reset(seed=10_000 + i)[0])
        assert np.allclose(episode.env_actions, 2 * episode.actions)  # Pendulum's torque: -2 to 2
        with torch.no_grad():
            assert np.allclose(run.actor(torch.from_numpy(episode.observations)), episode.actions, atol=1e-6)


def test_rollout_noise_blurs_only_what_the_policy_sees(run):
    env = run.script.make_env("Pendulum-v1")
    noise = np.array([0.1, 0.0, 0.5])
    episode = rollout(run, env, 1, noise).episodes[0]
    assert np.array_equal(episode.actions, rollout(run, env, 1, noise).episodes[0].actions)  # seeded
    rng = np.random.default_rng(10_000)
    observation, _ = env.reset(seed=10_000)
    for true, action in zip(episode.observations, episode.actions, strict=True):
        assert np.array_equal(true, observation)
        seen = observation + np.array([rng.uniform(-1, 1) * k for k in noise])
        with torch.no_grad():
            assert np.array_equal(run.actor(torch.as_tensor(seen, dtype=torch.float32)[None])[0].numpy(), action)
        observation = env.step(action)[0]


# ------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("rows", [1, evaluate.CHUNK + 3])
def test_hessians_and_jacobians_are_those_of_autograd(rows):
    torch.manual_seed(0)
    critic, actor = sac_pave_continuous.QNetwork(3, 2).double(), sac_pave_continuous.Actor(3, 2).double()
    observations, actions = torch.randn(rows, 3).double(), torch.rand(rows, 2).double() * 2 - 1
    mixed = evaluate.mixed_hessians(critic, observations, actions)
    hessians = evaluate.action_hessians(critic, observations, actions)
    jacobians = evaluate.actor_jacobians(actor, observations)
    norms = evaluate.spectral_norms(mixed)
    for i in {0, rows - 1}:
        slow = torch.autograd.functional.hessian(
            lambda s, a: critic(s[None], a[None])[0], (observations[i], actions[i])
        )
        assert torch.allclose(mixed[i], slow[1][0], atol=1e-12)
        assert torch.allclose(hessians[i], slow[1][1], atol=1e-12)
        jacobian = torch.autograd.functional.jacobian(lambda s: actor(s[None])[0], observations[i])
        assert torch.allclose(jacobians[i], jacobian, atol=1e-12)
        assert norms[i].item() == pytest.approx(np.linalg.svd(slow[1][0].detach().numpy())[1][0])


def test_geometry_against_loops():
    torch.manual_seed(0)
    trained, actor = sac_pave_continuous.QNetwork(3, 2).double(), sac_pave_continuous.Actor(3, 2).double()

    def critic(observations, actions):  # concave at some of the states only
        return 100 * trained(observations, actions) + (observations[:, :1] * actions.square()).sum(-1)

    episodes = random_episodes([20, 1, 15])
    mixed, largest, traces, slopes, cosines = [], [], [], [], []
    for episode in episodes:
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
            if last is not None:
                cosines.append(gradient @ last / np.linalg.norm(gradient) / np.linalg.norm(last))
            last = gradient
    concave = [i for i in range(36) if largest[i] < 0]
    assert 0 < len(concave) < 36 and min(cosines) < 0 < max(cosines)  # so that both sides of each share are there
    mu = min(-largest[i] for i in concave)
    expected = {
        "m_sup": max(mixed),
        "m_mean": sum(mixed) / 36,
        "mu_inf": mu,
        "mu_defined_share": len(concave) / 36,
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
    episodes = random_episodes([30])
    result = geometry(*quadratic(curvature, gain, gain), episodes)
    assert result["m_sup"] == pytest.approx(m) and result["m_mean"] == pytest.approx(m)
    assert result["mu_inf"] == pytest.approx(mu) and result["trace_abs_inf"] == pytest.approx(5)
    assert result["neg_def"] == result["mu_defined_share"] == result["bound_holds_share"] == 1
    assert result["actor_jacobian_sup"] == pytest.approx(np.linalg.norm(gain.numpy(), 2))
    assert result["bound_sup"] == pytest.approx(m / mu)
    assert result["actor_jacobian_sup"] <= result["bound_sup"]
    steep = geometry(*quadratic(curvature, gain, 1.01 * gain * m / mu / np.linalg.norm(gain.numpy(), 2)), episodes)
    assert steep["bound_holds_share"] == 0


def test_geometry_where_nothing_is_negative_definite():
    saddle = torch.diag(torch.tensor([1.0, -1.0])).double()
    gain = torch.ones(2, 3).double()
    result = geometry(*quadratic(saddle, gain, gain), random_episodes([5]))
    assert result["neg_def"] == 0 and result["trace_abs_inf"] == 0
    assert all(math.isnan(result[key]) for key in ("mu_inf", "bound_sup", "bound_holds_share"))


# ----------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_has_the_agreed_keys_and_null_for_the_undefined(run):
    convex = run._replace(critic=lambda observations, actions: actions.square().sum(-1) + 0 * observations.sum(-1))
    result = evaluate.evaluate_run(convex, episodes=1)
    assert list(result) == KEYS and list(result["robustness"]) == ["0.01", "0.025", "0.05", "0.1"]
    assert all(set(level) == {"return_mean", "smoothness_mean"} for level in result["robustness"].values())
    assert result["mu_inf"] is result["bound_sup"] is result["bound_holds_share"] is None
    assert "NaN" not in json.dumps(result)


def test_robustness_noise_is_in_standard_deviations(run):
    env = run.script.make_env("Pendulum-v1")
    visited = rollout(run, env, 1).episodes[0].observations
    deviation = [math.sqrt(np.mean((column - column.mean()) ** 2)) for column in visited.astype(np.float64).T]
    expected = rollout(run, env, 1, 0.1 * np.array(deviation)).metrics["return_mean"]
    assert evaluate.evaluate_run(run, 1)["robustness"]["0.1"]["return_mean"] == pytest.approx(expected)


def test_main_writes_json_csv_and_a_table(run_dir, tmp_path, capsys):
    copies = [shutil.copytree(run_dir, tmp_path / name) for name in "ab"]
    calls = []
    evaluate.main(evaluate.Args(runs=tuple(copies), episodes=1, csv=tmp_path / "all.csv"))
    result = json.loads((copies[0] / "evaluation.json").read_text())
    assert list(result) == KEYS
    row = dict(zip(*(line.split(",") for line in (copies[0] / "evaluation.csv").read_text().splitlines()), strict=True))
    assert float(row["m_sup"]) == result["m_sup"] and row["run"] == "a" and row["env_id"] == "Pendulum-v1"
    assert float(row["return_mean@0.05"]) == result["robustness"]["0.05"]["return_mean"]
    assert [line.split(",")[0] for line in (tmp_path / "all.csv").read_text().splitlines()] == ["run", "a", "b"]
    assert f"{result['m_mean']:.4g}" in capsys.readouterr().out
    evaluate.evaluate_run(load_run(run_dir), 1, lambda: calls.append(1))
    assert len(calls) == 6  # the progress bar's total


# ------------------------------------------------------------------------------------------------------ bad input


def test_load_run_says_what_is_wrong(run_dir, tmp_path):
    def error_of(name, content=None):
        (tmp_path / name).mkdir()
        if content is not None:
            torch.save(content, tmp_path / name / "checkpoint.pt")
        with pytest.raises(evaluate.UserError) as error:
            load_run(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert "not a run folder" in error_of("empty")
    assert "written by neither" in error_of("foreign", {"script": "ppo"})
    assert "written by neither" in error_of("tensor", torch.zeros(1))
    assert "another version" in error_of("args", checkpoint | {"args": checkpoint["args"] | {"flag": 1}})
    assert "another version" in error_of("weights", checkpoint | {"agent": {}})


def test_bad_input_is_one_line_and_exit_code_2(run_dir, tmp_path, capsys):
    truncated = shutil.copytree(run_dir, tmp_path / "truncated")
    content = (truncated / "checkpoint.pt").read_bytes()
    (truncated / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    cases = {
        "not a run folder": {"runs": (run_dir, tmp_path / "missing")},
        "cannot read": {"runs": (truncated,)},
        "--episodes is 0": {"runs": (run_dir,), "episodes": 0},
        "at least one run folder": {"runs": ()},
        "No such file": {"runs": (run_dir,), "episodes": 1, "csv": tmp_path / "missing" / "all.csv"},
    }
    for message, settings in cases.items():
        with pytest.raises(SystemExit) as stop, evaluate.user_errors():
            evaluate.main(evaluate.Args(**settings))
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.count("\n") == 1 and errors.startswith("error: ") and message in errors


def test_the_command_line_ends_with_exit_code_2(tmp_path):
    command = [sys.executable, "benchmarks/evaluate.py", str(tmp_path), "--episodes", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path} is not a run folder: it has no checkpoint.pt\n"
