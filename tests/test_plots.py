"""benchmarks/plot.py and video.py: groups, seeds, the field, videos from one start, one line on bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import sac_pave_continuous as sac
import td3_pave_continuous as td3

plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmarks/requirements.txt")

from benchmarks import plot  # noqa: E402

COMMANDS = ("field", "actions", "curves", "tradeoff", "noise")
BASE = {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}
LEVELS = (0.01, 0.025, 0.05, 0.1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs, by name; `other` is on another env, and was never evaluated."""
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 300, "learning_starts": 100, "batch_size": 32}
    settings |= {"buffer_size": 1000, "eval_interval": 100, "eval_episodes": 1, "compile": False}
    settings["output_dir"] = str(tmp_path_factory.mktemp("runs"))
    untuned = dict(zip(sac.LAMBDAS, sac.UNTUNED_LAMBDAS, strict=True))
    folders = {
        "base": sac.train(sac.Args(**settings | BASE)),
        "base_2": sac.train(sac.Args(**settings | BASE | {"seed": 2})),
        "base_slow": sac.train(sac.Args(**settings | BASE | {"seed": 3, "q_lr": 1e-4})),
        "pave": sac.train(sac.Args(**settings)),
        "untuned": sac.train(sac.Args(**settings | untuned)),
        "auto": sac.train(sac.Args(**settings | {"autotune_curv": True})),
        "td3": td3.train(td3.Args(**settings | BASE)),
    }
    for i, folder in enumerate(folders.values()):
        noise = {str(k): {"return_mean": -100.0 - i - k, "smoothness_mean": 0.1 + k} for k in LEVELS}
        values = {"return_mean": -100.0 - i, "smoothness_mean": 0.1, "length_mean": 200.0, "robustness": noise}
        (folder / "evaluation.json").write_text(json.dumps(values))
    other = {"env_id": "MountainCarContinuous-v0", "total_timesteps": 200, "eval_episodes": 0}
    folders["other"] = sac.train(sac.Args(**settings | BASE | other))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def figures(monkeypatch):
    """The figures that the commands would have saved."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, output: kept.append(figure))
    yield kept
    plt.close("all")


def fails(program, arguments, capsys) -> str:
    """The one line with which program.main(arguments) ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# --------------------------------------------------------------------------------------------- figures and groups


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_draws(command, runs, tmp_path):
    output = tmp_path / "figure.png"
    plot.main([command, runs["base"], runs["pave"], "--output", str(output)])
    picture = plt.imread(output)
    assert picture.shape[1] in (1800, 1206)  # 900 px in a README, at twice the resolution
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_groups_are_by_method_and_algorithm_never_by_folder(runs, tmp_path):
    """All folders renamed to one name: the runs themselves say what they are."""
    names = ("base", "base_2", "pave", "untuned", "auto", "td3")
    paths = [Path(shutil.copytree(runs[name], tmp_path / str(i) / "pave")) for i, name in enumerate(names)]
    groups = {label: len(seeds) for label, seeds in plot.group(plot.open_runs(paths)).items()}
    assert groups == {"SAC base": 2, "SAC pave": 1, "SAC untuned": 1, "SAC auto": 1, "TD3 base": 1}


def test_different_settings_are_no_seeds_of_one_group(runs, figures, capsys):
    both = [runs["base"], runs["base_slow"]]
    assert "differ in q_lr" in fails(plot, ["curves", *both], capsys)
    plot.main(["curves", *both, "--labels", "a", "a"])  # the user's own grouping holds, and is told
    assert "warning: the runs of a differ in q_lr" in capsys.readouterr().err
    plot.main(["curves", *both, "--labels", "a", "b"])
    assert capsys.readouterr().err == ""


def test_seeds_are_thin_lines_and_their_median_below_ten(runs, figures):
    plot.main(["curves", runs["base"], runs["base_2"]])
    axis = figures[0].axes[0]
    values = [[json.loads((Path(runs[n]) / "summary.json").read_text())["return_mean"]] for n in ("base", "base_2")]
    assert axis.lines[0].get_xdata().tolist() == [100, 200, 300] and len(axis.lines) == 3 and not axis.collections
    assert axis.lines[0].get_ydata()[-1] == pytest.approx(np.median(values), rel=1e-5)
    assert [line.get_ydata()[-1] for line in axis.lines[1:]] == pytest.approx(np.ravel(values), rel=1e-5)
    assert [a.get_ylabel().split()[0] for a in figures[0].axes] == ["return", "sm", "steps"]  # the length beside sm
    seeds = np.arange(33.0).reshape(11, 3)
    plot.draw_seeds(axis := plt.figure().gca(), [0, 1, 2], seeds, {"color": "k"}, "many")
    assert len(axis.lines) == 1 and len(axis.collections) == 1
    assert axis.lines[0].get_ydata().tolist() == [15, 16, 17]


def test_curves_of_any_tag_may_mix_envs(runs, figures, capsys):
    plot.main(["curves", runs["base"], runs["other"], "--tags", "losses/qf_loss", "--labels", "one", "two"])
    assert len(figures[0].axes[0].lines) == 2
    assert figures[0].get_suptitle() == "Pendulum-v1, MountainCarContinuous-v0: training"
    assert "losses/lambda_curv" in fails(plot, ["curves", runs["base"], "--tags", "losses/lambda_curv"], capsys)


def test_tradeoff_and_noise_show_every_seed(runs, figures):
    plot.main(["tradeoff", runs["base"], runs["base_2"], runs["pave"]])
    dots, median = figures[0].axes[0].collections[:2]
    assert dots.get_offsets().tolist() == [[0.1, -100], [0.1, -101]] and median.get_offsets().tolist() == [
        [0.1, -100.5]
    ]
    assert figures[0].axes[0].get_legend().get_texts()[0].get_text() == "SAC base, 200 steps"
    plot.main(["noise", runs["base"], runs["base_2"]])
    line = figures[1].axes[0].lines[0]
    assert line.get_xdata() == pytest.approx([0, *LEVELS])
    assert line.get_ydata() == pytest.approx([-100.5 - k for k in (0, *LEVELS)])


def test_a_method_keeps_its_colour():
    both, one = plot.looks(["base", "auto"]), plot.looks(["auto"])
    assert both["auto"] == one["auto"] == plot.looks(["SAC auto"])["SAC auto"] != both["base"]
    assert len({look["color"] for look in plot.looks(["SAC base", "TD3 base"]).values()}) == 2
    assert plot.noise_figure(pd.DataFrame({"algorithm": ["sac"], "method": ["base"]}), "") is None


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


def test_field_sweeps_the_pair_and_shows_the_norm_of_the_full_matrix(float64):
    point = torch.tensor([7.0, 0.5, 7.0]), torch.tensor([7.0, -0.25])
    surface = plot.field_surface(lambda s, a: s[:, 1] ** 2 * a[:, 1], *point, (1, 1))
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-0.5, 1.5, 50)), (50, 50)))
    surface = plot.field_surface(lambda s, a: s[:, 1] * a[:, 1] ** 2, *point, (1, 1))
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-1.75, 1.25, 50)), (50, 50)).T)
    surface = plot.field_surface(lambda s, a: 3 * s[:, 0] * a[:, 0] + 4 * s[:, 1] * a[:, 0], *point, (1, 0))
    assert surface == pytest.approx(np.full((50, 50), 5.0)) and point[0].tolist() == [7.0, 0.5, 7.0]


def test_field_panels_share_the_first_runs_pair_and_scale(runs, figures, monkeypatch):
    drawn = []

    def surface(critic, observation, action, pair):
        drawn.append((plot.dominant_pair(critic, observation, action), pair))
        return np.arange(2500.0).reshape(50, 50) * len(drawn)

    monkeypatch.setattr(plot, "field_surface", surface)
    plot.main(["field", runs["td3"], runs["base"], runs["pave"]])
    assert [pair for _, pair in drawn] == [drawn[0][0]] * 3
    panels = [axis for axis in figures[0].axes if axis.name == "3d"]
    for panel in panels:
        assert panel.get_zlim() == panels[0].get_zlim() and panel.get_zlim()[1] >= 3 * 2499
        norm = panel.collections[0].norm
        assert (norm.vmin, norm.vmax) == (0, pytest.approx(np.quantile(np.arange(2500), 0.99)))


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_runs_and_settings(runs, tmp_path, capsys):
    run = runs["base"]
    for command in COMMANDS:
        assert "at least one run" in fails(plot, [command], capsys)
        assert "different envs" in fails(plot, [command, run, runs["other"]], capsys)
    assert "2 --labels for 1 run" in fails(plot, ["field", run, "--labels", "a", "b"], capsys)
    assert "figure.xyz" in fails(plot, ["tradeoff", run, "--output", tmp_path / "figure.xyz"], capsys)
    assert "nowhere" in fails(plot, ["tradeoff", run, "--output", tmp_path / "nowhere" / "figure.png"], capsys)
    assert "--episode" in fails(plot, ["field", run, "--episode", "-1"], capsys)
    assert "--dimension" in fails(plot, ["actions", run, "--dimension", "1"], capsys)
    assert "--steps" in fails(plot, ["actions", run, "--steps", "0"], capsys)
    assert "8 lines" in fails(plot, ["tradeoff", *[run] * 8, "--labels", *"abcdefgh"], capsys)
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    for content in ('{"return_mean": 1', "{}", "[]"):
        (broken / "evaluation.json").write_text(content)
        assert "evaluate.py" in fails(plot, ["noise", broken], capsys)
    for file in broken.glob("events*"):
        os.truncate(file, 50)
    assert "eval/return" in fails(plot, ["curves", broken], capsys)


@pytest.mark.parametrize("start", [["benchmarks/plot.py"], ["-m", "benchmarks.plot"]])
def test_the_program_ends_with_one_line(start, tmp_path):
    process = subprocess.run([sys.executable, *start, "field", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr and str(tmp_path) in process.stderr


# ---------------------------------------------------------------------------------------------------------- video


@pytest.fixture
def video():
    for module in ("pygame", "imageio", "imageio_ffmpeg"):
        pytest.importorskip(module, reason=f"rendering needs {module}, see benchmarks/requirements.txt")
    from benchmarks import video

    return video


@pytest.mark.parametrize("extension, marks", [("mp4", b"ftyp"), ("gif", b"GIF89a")])
def test_video(video, extension, marks, runs, tmp_path):
    output = tmp_path / f"video.{extension}"
    video.main([runs["base"], runs["pave"], "--steps", "30", "--width", "300", "--output", str(output)])
    assert marks in output.read_bytes()[:16]
    pictures = video.iio.imread(output)
    assert pictures.shape[0] == 20 and pictures.shape[2] == 300  # a second of the env's 30 fps, at 20 fps
    assert (pictures[0] != pictures[-1]).any()


def test_both_films_have_one_start_and_it_is_evaluates(video, runs, monkeypatch):
    from benchmarks.common import load_run

    films = [video.record(load_run(runs[name]), episode=1, steps=4) for name in ("base", "pave")]
    first = plot.play(load_run(runs["base"]), 1)
    assert films[0].start.tolist() == films[1].start.tolist() == first.observations[0].tolist()
    assert np.array_equal(*(np.asarray(film.frames[0]) for film in films))
    assert not np.array_equal(*(np.asarray(film.frames[3]) for film in films))
    assert films[0].env_actions == pytest.approx(first.env_actions[:4]) and len(films[0].frames) == 4
    assert films[0].fps == 30 and films[0].rewards == pytest.approx(first.rewards[:4])


def test_the_trace_below_is_that_of_the_steps_so_far(video):
    frame = video.Image.new("RGB", (100, 100), "white")
    film = video.Film([frame] * 11, np.linspace(-1, 1, 11)[:, None], [0.0] * 11, np.zeros(1), 30)
    short = film._replace(frames=[frame] * 3, env_actions=film.env_actions[:3])
    reach = []
    for step in (2, 10):
        picture = video.compose({"a": film, "b": short}, step, 400, 0, (-1.0, 1.0))
        marks = [np.argwhere((half[-48:] != 255).any(-1)) for half in np.hsplit(np.asarray(picture), 2)]
        reach.append([part[:, 1].max() for part in marks])
        assert marks[0][:, 0].max() > 38  # begins low: -1
    assert reach[0][0] == reach[0][1] == reach[1][1] < 60 and reach[1][0] > 190  # one that ended stays as it is


def test_a_gif_gets_narrower_until_it_fits(video, runs, tmp_path, capsys):
    output = tmp_path / "video.gif"
    arguments = [runs["base"], "--steps", "12", "--width", "400", "--output", str(output), "--megabytes"]
    video.main([*arguments, "0.01"])
    assert output.stat().st_size <= 10_000 and 100 < video.iio.imread(output).shape[2] < 400
    assert "lower --steps" in fails(video, [*arguments, "0.0001"], capsys)


def test_video_bad_settings(video, runs, tmp_path, capsys, monkeypatch):
    run = runs["base"]
    assert ".mp4 or .gif" in fails(video, [run, "--output", tmp_path / "video.avi"], capsys)
    assert "nowhere" in fails(video, [run, "--output", tmp_path / "nowhere" / "video.gif"], capsys)
    for name, value in (("steps", 0), ("fps", 0), ("width", 10), ("colours", 1), ("episode", -1)):
        assert f"--{name}" in fails(video, [run, f"--{name}", value], capsys)
    assert "different envs" in fails(video, [run, runs["other"]], capsys)

    def render(self):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.render", render)
    assert "libegl1" in fails(video, [run, "--output", tmp_path / "video.gif"], capsys)
