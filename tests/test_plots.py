"""benchmarks/plot.py and video.py: each figure from tiny runs, the field's protocol, one clear line on bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.envs.classic_control import PendulumEnv

import sac_pave_continuous as sac
import td3_pave_continuous as td3

plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmarks/requirements.txt")

from benchmarks import evaluate, plot  # noqa: E402

COMMANDS = ("field", "actions", "curves", "robustness", "tradeoff")
BASE = {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs, by name; `other` is on another env and was never evaluated."""
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 300, "learning_starts": 100, "batch_size": 32}
    settings |= {"buffer_size": 1000, "eval_interval": 100, "eval_episodes": 1, "compile": False}
    settings["output_dir"] = str(tmp_path_factory.mktemp("runs"))
    other = {"env_id": "MountainCarContinuous-v0", "total_timesteps": 200, "eval_episodes": 0}
    folders = {
        "base": sac.train(sac.Args(**settings | BASE)),
        "base_2": sac.train(sac.Args(**settings | BASE | {"seed": 2})),
        "pave": sac.train(sac.Args(**settings)),
        "td3": td3.train(td3.Args(**settings | BASE)),
        "other": sac.train(sac.Args(**settings | BASE | other)),
    }
    evaluate.main(evaluate.Args(runs=tuple(folders[name] for name in ("base", "base_2", "pave", "td3")), episodes=1))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def figures(monkeypatch):
    """The figures that the commands would have saved."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, output: kept.append(figure))
    yield kept
    plt.close("all")


def read(run: str, name: str) -> dict:
    return json.loads((Path(run) / name).read_text())


def fails(program, arguments, capsys) -> str:
    """The one line with which program.main(arguments) ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# -------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_draws(command, runs, tmp_path):
    output = tmp_path / "figure.png"
    plot.main([command, runs["base"], runs["pave"], "--output", str(output)])
    picture = plt.imread(output)
    assert picture.shape[1] in (1800, 1206)  # 900 px in a README, at twice the resolution
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


@pytest.mark.parametrize("extension, start", [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_extension_chooses_the_format(extension, start, runs, tmp_path):
    output = tmp_path / f"figure.{extension}"
    plot.main(["tradeoff", runs["base"], runs["pave"], "--labels", "one", "two", "--output", str(output)])
    assert output.read_bytes().startswith(start)


def test_labels_group_the_seeds(runs, figures):
    plot.main(["curves", runs["base"], runs["pave"], runs["base_2"]])
    plot.main(["robustness", runs["base"], runs["pave"], runs["base_2"], "--labels", "a", "b", "a"])
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    assert legends == [["SAC (2 seeds)", "SAC + PAVE (1 seed)"], ["a (2 seeds)", "b (1 seed)"]]


def test_curves_are_the_mean_over_seeds_at_common_steps(runs, figures):
    plot.main(["curves", runs["base"], runs["base_2"]])
    (line,) = figures[0].axes[0].lines
    assert line.get_xdata().tolist() == [100, 200, 300]
    final = [read(runs[name], "summary.json")["return_mean"] for name in ("base", "base_2")]
    assert line.get_ydata()[-1] == pytest.approx(np.mean(final), rel=1e-5)


def test_curves_of_any_tag(runs, figures):
    plot.main(["curves", runs["base"], "--tags", "charts/episodic_length", "eval/smoothness", "eval/oscillation"])
    assert [axis.get_ylabel() for axis in figures[0].axes] == [
        "charts/episodic_length",
        plot.SMOOTHNESS,
        plot.OSCILLATION,
    ]
    assert figures[0].axes[0].lines[0].get_ydata().tolist() == [200]
    with pytest.raises(SystemExit, match="2"):
        plot.main(["curves", runs["base"], "--tags", "losses/lambda_curv"])


def test_curves_of_a_tag_may_mix_envs(runs, figures):
    """As for one env in two scales of its rewards."""
    plot.main(["curves", runs["base"], runs["other"], "--tags", "losses/qf_loss", "--labels", "one", "two"])
    assert len(figures[0].axes[0].lines) == 2
    assert figures[0].get_suptitle() == "Pendulum-v1, MountainCarContinuous-v0: training"


def test_robustness_starts_without_noise(runs, figures):
    plot.main(["robustness", runs["td3"]])
    values = read(runs["td3"], "evaluation.json")
    for axis, key in zip(figures[0].axes, ("return_mean", "smoothness_mean"), strict=True):
        assert axis.lines[0].get_xdata() == pytest.approx([0, 0.01, 0.025, 0.05, 0.1])
        assert axis.lines[0].get_ydata()[[0, -1]] == pytest.approx([values[key], values["robustness"]["0.1"][key]])


def test_spectrum_of_a_sine():
    steps = np.arange(200)
    frequencies, amplitudes = plot.spectrum(np.stack([np.sin(2 * np.pi * 0.1 * steps), 0 * steps + 3.0], axis=1))
    assert frequencies[amplitudes.argmax()] == pytest.approx(0.1)
    assert amplitudes.max() == pytest.approx(0.5)  # mean of 1 and of a constant's 0
    assert np.delete(amplitudes, amplitudes.argmax()) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------- field


def test_dominant_pair_is_the_largest_mixed_derivative(float64):
    def critic(s, a):
        return s[:, 0] * a[:, 0] - 5 * s[:, 2] * a[:, 1] + 100 * s[:, 1] ** 2 + 100 * a[:, 0] ** 2

    assert plot.dominant_pair(critic, torch.zeros(3), torch.zeros(2)) == (2, 1)


def test_field_sweeps_the_pair_around_the_point(float64):
    point = torch.tensor([7.0, 0.5, 7.0]), torch.tensor([7.0, -0.25])
    surface = plot.field_surface(lambda s, a: s[:, 1] ** 2 * a[:, 1], *point, (1, 1))
    assert surface.shape == (50, 50)
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-0.5, 1.5, 50)), (50, 50)))
    surface = plot.field_surface(lambda s, a: s[:, 1] * a[:, 1] ** 2, *point, (1, 1))
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-1.75, 1.25, 50)), (50, 50)).T)
    assert point[0].tolist() == [7.0, 0.5, 7.0]  # untouched


def test_field_height_is_the_norm_of_the_full_matrix(float64):
    surface = plot.field_surface(
        lambda s, a: 3 * s[:, 0] * a[:, 0] + 4 * s[:, 1] * a[:, 0], torch.zeros(2), torch.zeros(1), (1, 0)
    )
    assert surface == pytest.approx(np.full((50, 50), 5.0))


def test_field_panels_share_the_first_runs_pair_and_scale(runs, figures, monkeypatch):
    drawn = []

    def surface(critic, observation, action, pair):
        drawn.append((plot.dominant_pair(critic, observation, action), pair))
        return np.arange(2500.0).reshape(50, 50) * len(drawn)

    monkeypatch.setattr(plot, "field_surface", surface)
    plot.main(["field", runs["td3"], runs["base"], runs["pave"]])
    assert [pair for _, pair in drawn] == [drawn[0][0]] * 3
    panels = [axis for axis in figures[0].axes if axis.name == "3d"]
    assert len(panels) == 3
    for panel in panels:
        assert panel.get_zlim()[0] == 0 and panel.get_zlim() == panels[0].get_zlim()
        assert panel.get_zlim()[1] >= 3 * 2499
        norm = panel.collections[0].norm
        assert (norm.vmin, norm.vmax) == (0, pytest.approx(np.quantile(np.arange(2500), 0.99)))


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_runs(command, runs, tmp_path, capsys):
    assert "at least one run" in fails(plot, [command], capsys)
    assert "not a run folder" in fails(plot, [command, tmp_path], capsys)
    assert "different envs" in fails(plot, [command, runs["base"], runs["other"]], capsys)
    assert "2 --labels for 1 run" in fails(plot, [command, runs["base"], "--labels", "a", "b"], capsys)
    broken = shutil.copytree(runs["base"], tmp_path / "broken")
    os.truncate(broken / "checkpoint.pt", 1000)
    assert "checkpoint.pt" in fails(plot, [command, broken], capsys)


def test_missing_or_damaged_results(runs, tmp_path, capsys):
    assert "eval/return" in fails(plot, ["curves", runs["other"]], capsys)
    assert "evaluate.py" in fails(plot, ["robustness", runs["other"]], capsys)
    broken = shutil.copytree(runs["base"], tmp_path / "broken")
    for content in ('{"return_mean": 1', "{}", "[]"):
        (broken / "evaluation.json").write_text(content)
        for command in ("robustness", "tradeoff"):
            assert "evaluat" in fails(plot, [command, broken], capsys)
    (broken / "evaluation.json").unlink()
    plot.main(["tradeoff", str(broken), "--output", str(tmp_path / "figure.png")])  # from summary.json
    for file in broken.glob("events*"):
        os.truncate(file, 50)
    assert "eval/return" in fails(plot, ["curves", broken], capsys)


def test_bad_settings(runs, tmp_path, capsys):
    run = runs["base"]
    assert "figure.xyz" in fails(plot, ["tradeoff", run, "--output", tmp_path / "figure.xyz"], capsys)
    assert "nowhere" in fails(plot, ["tradeoff", run, "--output", tmp_path / "nowhere" / "figure.png"], capsys)
    assert "--episode" in fails(plot, ["field", run, "--episode", "-1"], capsys)
    assert "--dimension" in fails(plot, ["actions", run, "--dimension", "1"], capsys)
    assert "--steps" in fails(plot, ["actions", run, "--steps", "0"], capsys)
    assert "8 lines" in fails(plot, ["tradeoff", *[run] * 8, "--labels", *"abcdefgh"], capsys)


def test_the_program_ends_with_one_line(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "plot.py", "field", tmp_path]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and "not a run folder" in process.stderr and "Traceback" not in process.stderr


# ---------------------------------------------------------------------------------------------------------- video


@pytest.fixture
def video(monkeypatch):
    for module in ("pygame", "imageio_ffmpeg"):
        pytest.importorskip(module, reason=f"rendering needs {module}, see benchmarks/requirements.txt")
    from benchmarks import video

    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))  # Pendulum needs no probing
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return video


@pytest.mark.parametrize("extension, marks", [("mp4", b"ftyp"), ("gif", b"GIF89a")])
def test_video(video, extension, marks, runs, tmp_path):
    output = tmp_path / f"video.{extension}"
    video.main([runs["base"], runs["pave"], "--steps", "3", "--output", str(output)])
    assert marks in output.read_bytes()[:16] and output.stat().st_size > 5000


def test_video_keeps_a_picture_per_step(video, runs):
    episode, frames, fps = video.record(evaluate.load_run(runs["base"]), episode=1, steps=7)
    assert len(frames) == 7 and len(episode.actions) == 200 and fps == 30
    assert frames[0].shape == (500, 500, 3) and (frames[0] != frames[6]).any()


def test_video_names_the_missing_package(video, runs, monkeypatch, tmp_path, capsys):
    def render(self):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(PendulumEnv, "render", render)
    assert "libegl1" in fails(video, [runs["base"], "--output", tmp_path / "video.gif"], capsys)


def test_video_bad_settings(video, runs, tmp_path, capsys):
    run = runs["base"]
    assert ".mp4 or .gif" in fails(video, [run, "--output", tmp_path / "video.avi"], capsys)
    assert "nowhere" in fails(video, [run, "--output", tmp_path / "nowhere" / "video.gif"], capsys)
    assert "--steps" in fails(video, [run, "--steps", "0"], capsys)
    assert "different envs" in fails(video, [run, runs["other"]], capsys)


@pytest.mark.parametrize("works, chosen", [({"egl", "osmesa"}, "egl"), ({"osmesa"}, "osmesa"), (set(), "egl")])
def test_rendering_backend_is_the_first_that_works(video, works, chosen, monkeypatch):
    def run(command, env, **_):
        return subprocess.CompletedProcess(command, env["MUJOCO_GL"] not in works)

    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", run)
    video.set_up_rendering()
    assert os.environ.get("MUJOCO_GL") == chosen
