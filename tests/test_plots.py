"""benchmarks/plot.py and video.py: groups, seeds, the field, videos from one start, one line on bad input."""

import dataclasses
import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from helper_programs import fails, run_program
from helper_runs import BASE, make_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import sac_pave_continuous as sac
import td3_pave_continuous as td3
from benchmarks import plot
from benchmarks.common import load_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by name; their folders' names tell nothing."""
    settings = {
        "base": BASE, "base_2": BASE | {"seed": 2, "returns": (0.0, 0.0, -101.0)}, "pave": {},
        "base_slow": BASE | {"q_lr": 1e-4}, "other": BASE | {"env_id": "MountainCarContinuous-v0"},
    }  # fmt: skip
    root = tmp_path_factory.mktemp("runs")
    runs = {name: make_run(root / str(i), sac, **values) for i, (name, values) in enumerate(settings.items())}
    return runs | {"td3": make_run(root / "td3", td3, **BASE)}


@pytest.fixture
def figures(monkeypatch):
    """The figures that the commands would have saved."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, output: kept.append(figure))
    yield kept
    plot.plt.close("all")


@pytest.mark.parametrize("command", ["field", "actions", "curves"])
def test_each_command_draws(command, runs, tmp_path):
    run_program("benchmarks.plot", command, runs["base"], runs["pave"], "--output", tmp_path / "figure.png")
    picture = plot.plt.imread(tmp_path / "figure.png")
    assert picture.shape[1] == 900 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_groups_are_by_method_and_algorithm_and_have_one_setting_and_one_colour(runs, figures):
    labels = [label for label, _ in plot.open_runs([runs[name] for name in ("base", "base_2", "pave", "td3")])]
    assert labels == ["SAC base", "SAC base", "SAC pave", "TD3 base"]
    assert plot.colours_of(["auto"])["auto"] == plot.colours_of(["SAC base", "SAC auto"])["SAC auto"]
    assert plot.colours_of(["base-then-base", "base-then-auto"])["base-then-auto"] == plot.COLOURS["auto"]
    assert len(set(plot.colours_of(["SAC base", "TD3 base"]).values())) == 2
    assert len({str(colour) for colour in plot.colours_of("abcdefghijkl").values()}) == 12
    run = load_run(runs["base"])
    assert plot.settings_of(run) != plot.settings_of(dataclasses.replace(run, step=200))
    both = ("curves", runs["base"], runs["base_slow"])
    assert "SAC base differ in q_lr" in fails("benchmarks.plot", *both)
    assert "runs of a differ in q_lr" in fails("benchmarks.plot", *both, "--labels", "a", "a")
    plot.curves(both[1:], ("a", "b"))
    assert len(figures[0].axes[0].lines) == 2


def test_ten_seeds_are_a_band_around_the_median_and_nine_are_lines():
    values = np.arange(10.0)[:, None] * [1, 2]
    figure, (few, many) = plot.plt.subplots(1, 2)
    plot.draw_seeds(few, [0, 1], values[:9], "k", "x")
    plot.draw_seeds(many, [0, 1], values, "k", "x")
    assert len(few.lines) == 10 and not few.collections
    assert len(many.lines) == 1 and many.lines[0].get_ydata().tolist() == [4.5, 9]
    edges = many.collections[0].get_paths()[0].vertices
    assert [edges[:, 1].min(), edges[:, 1].max()] == [2.25, 13.5]  # the quarters at x = 0 and 1
    plot.plt.close(figure)


def test_figures_show_every_seed_and_their_median(runs, figures):
    plot.curves((runs["base"], runs["base_2"]))
    curves = figures[0].axes[0]
    assert [[*line.get_ydata()] for line in curves.lines] == [[-150, -100, -100.5], [-300, -200, -100], [0, 0, -101]]
    assert list(curves.lines[0].get_xdata()) == [100, 200, 300] and not curves.collections
    assert [a.get_ylabel().split()[0] for a in figures[0].axes] == ["return", "sm", "steps"]  # the length beside sm
    values = np.array([1.0, 2.0, 9.0])
    rows = {f"{name}@{k}": values + k for name in ("return_mean", "smoothness_mean") for k in (0.1, 0.05)}
    rows |= {"return_mean": values, "smoothness_mean": -values, "oscillation": 0.1, "length_mean": 200.0}
    rows = pd.DataFrame(rows | {"algorithm": "sac", "line": "base"})
    beside, dots = plot.tradeoff_figure(rows, "").axes
    assert [axis.get_xlabel().partition(" ")[0] for axis in (beside, dots)] == ["oscillation", "sm"]
    assert dots.collections[0].get_offsets().tolist() == [[-1, 1], [-2, 2], [-9, 9]]
    assert np.ravel(dots.lines[0].get_data()).tolist() == [-2, 2]
    assert beside.get_legend().get_texts()[0].get_text() == "base (200 steps)"
    middle, *seeds = (line.get_xydata() for line in plot.noise_figure(rows, "").axes[0].lines)
    assert middle == pytest.approx(np.array([[0, 2], [0.05, 2.05], [0.1, 2.1]])) and len(seeds) == 3


def test_the_figure_of_all_tasks_has_a_lane_for_each_line_and_hollow_dots():
    lines = [("A, SAC", 1, "base", "base", 2.0, False), ("A, SAC", 1, "base", "base", 0.5, True)]
    lines += [("A, SAC", 1, "pave (q_lr 1)", "pave", 0.25, False), ("A, SAC", 1, "pave", "pave", 0.2, False)]
    lines += [("B, TD3", 3, "base", "base", 1.0, False), ("B, TD3", 3, "auto", "auto", 0.05, True)]
    dots = pd.DataFrame(lines, columns=["task", "action_dim", "line", "method", "ratio", "worse"])
    figure = plot.effect_figure(dots)
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["A, SAC", "B, TD3"]
    lanes = [lane for lane in axis.collections if len(lane.get_offsets())]
    assert [lane.get_offsets()[:, 0].tolist() for lane in lanes] == [[2.0, 0.5], [0.25], [0.2], [1.0], [0.05]]
    assert [lane.get_facecolors()[:, 3].tolist() for lane in lanes] == [[1, 0], [1], [1], [1], [0]]
    heights = [lane.get_offsets()[0, 1] for lane in lanes]
    assert heights == sorted(set(heights)) and axis.yaxis_inverted() and axis.get_xscale() == "log"
    colours = [to_hex(lane.get_edgecolors()[0]).upper() for lane in lanes]
    assert colours == [plot.COLOURS[method] for method in ("base", "pave", "pave", "base", "auto")]
    assert [text.get_text() for text in axis.texts][:2] == ["1 action dimension", "3 action dimensions"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:3] == ["plain", "PAVE, tuned λ", "PAVE, auto"] and "hollow" in words[3]
    plot.plt.close(figure)


def test_spectrum_of_a_sine():
    steps = np.arange(200)
    frequencies, amplitudes = plot.spectrum(np.stack([np.sin(2 * np.pi * 0.1 * steps), 0 * steps + 3.0], axis=1))
    assert frequencies[amplitudes.argmax()] == pytest.approx(0.1)
    assert amplitudes.max() == pytest.approx(0.5)  # mean of 1 and of a constant's 0
    assert np.delete(amplitudes, amplitudes.argmax()) == pytest.approx(0, abs=1e-12)


def test_play_is_evaluates_episode(runs):
    run = load_run(runs["base"])
    with run.script.make_env("Pendulum-v1") as env:
        expected = run.script.evaluate(run.actor, env, 2)
    returns = [plot.play(run, episode).rewards.sum() for episode in (0, 1)]
    assert (np.mean(returns), np.std(returns)) == pytest.approx((expected["return_mean"], expected["return_std"]))


def test_field_sweeps_the_dominant_pair_and_shows_the_norm_of_the_full_matrix(float64):
    def critic(s, a):
        return s[:, 0] * a[:, 0] - 5 * s[:, 2] * a[:, 1] + 100 * s[:, 1] ** 2 + 100 * a[:, 0] ** 2

    assert plot.dominant_pair(critic, torch.zeros(3), torch.zeros(2)) == (2, 1)
    point = torch.tensor([7.0, 0.5, 7.0]), torch.tensor([7.0, -0.25])
    surface = plot.field_surface(lambda s, a: s[:, 1] ** 2 * a[:, 1], *point, (1, 1))
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-0.5, 1.5, 50)), (50, 50)))
    surface = plot.field_surface(lambda s, a: s[:, 1] * a[:, 1] ** 2, *point, (1, 1))
    assert surface == pytest.approx(np.broadcast_to(2 * np.abs(np.linspace(-1.75, 1.25, 50)), (50, 50)).T)
    surface = plot.field_surface(lambda s, a: (3 * s[:, 0] + 4 * s[:, 1]) * a[:, 0] + s[:, 2] * a[:, 1], *point, (1, 0))
    assert surface == pytest.approx(np.full((50, 50), 5.0)) and point[0].tolist() == [7.0, 0.5, 7.0]


def test_field_panels_share_the_first_runs_pair_and_scale(runs, figures, monkeypatch):
    drawn = []

    def surface(critic, observation, action, pair):
        drawn.append((plot.dominant_pair(critic, observation, action), pair))
        return np.arange(2500.0).reshape(50, 50) * len(drawn)

    monkeypatch.setattr(plot, "field_surface", surface)
    plot.field((runs["td3"], runs["base"], runs["pave"]))
    assert [pair for _, pair in drawn] == [drawn[0][0]] * 3
    panels = [axis for axis in figures[0].axes if axis.name == "3d"]
    for panel in panels:
        assert panel.get_zlim() == panels[0].get_zlim() and panel.get_zlim()[1] >= 3 * 2499
        assert panel.collections[0].norm.vmax == pytest.approx(np.quantile(np.arange(2500), 0.99))


def test_bad_runs_and_settings(runs, tmp_path):
    run = runs["base"]
    for words, arguments in {
        "at least one run": ("field",), "different envs": ("actions", run, runs["other"]),
        "2 --labels for 1 run": ("field", run, "--labels", "a", "b"), "--steps is 0": ("actions", run, "--steps", "0"),
        "--episode is -1": ("field", run, "--episode", "-1"), "--dimension is 1": ("actions", run, "--dimension", "1"),
        "it has eval/length": ("curves", run, "--tags", "losses/lambda_curv"),
        "figure.xyz": ("curves", run, "--output", tmp_path / "figure.xyz"),
        "nowhere": ("curves", run, "--output", tmp_path / "nowhere" / "figure.png"),
    }.items():  # fmt: skip
        assert words in fails("benchmarks.plot", *arguments)
    killed = make_run(tmp_path, sac)
    for file in killed.glob("events*"):
        file.write_bytes(file.read_bytes()[:50])
    assert "has no eval/return" in fails("benchmarks.plot", "curves", killed)


@pytest.fixture
def video():
    for module in ("pygame", "imageio", "imageio_ffmpeg"):
        pytest.importorskip(module, reason=f"rendering needs {module}, see benchmarks/requirements.txt")
    return importlib.import_module("benchmarks.video")


@pytest.mark.parametrize(("name", "magic"), [("video.mp4", b"ftyp"), ("video.gif", b"GIF89a")])
def test_a_video_keeps_the_envs_speed(video, runs, tmp_path, name, magic):
    output = tmp_path / name
    options = ("--steps", "30", "--fps", "10", "--dpi", "51", "--output", output)
    run_program("benchmarks.video", runs["base"], runs["pave"], *options)
    pictures, about = video.iio.imread(output), video.iio.immeta(output)
    assert magic in output.read_bytes()[:16] and (pictures[0] != pictures[-1]).any()
    assert pictures.shape[0] == 10 and pictures.shape[2] in (458, 459)  # even for MP4
    assert about["fps"] == 10 if name == "video.mp4" else about["duration"] == 100  # every third of the env's 30


def test_a_film_is_of_a_whole_episode_from_one_start(video, runs):
    films = [video.record(load_run(runs[name]), 1, 4, 30) for name in ("base", "base_2")]
    (one, first, stride, rate), (other, second, *_) = films
    assert np.array_equal(first[0], second[0]) and not np.array_equal(first[3], second[3])
    assert np.array_equal(one.observations[0], other.observations[0])
    assert np.array_equal(one.actions, plot.play(load_run(runs["base"]), 1).actions)
    assert (len(one.rewards), len(first), stride, rate) == (200, 4, 1, 30)  # the caption is of the whole episode
    _, third, stride, rate = video.record(load_run(runs["base"]), 1, 4, 10)
    assert (len(third), stride, rate) == (2, 3, 10) and np.array_equal(third[1], first[3])
    assert not np.array_equal(video.record(load_run(runs["base"]), 0, 1, 30)[1][0], first[0])


def test_the_trace_below_is_that_of_the_steps_so_far(video, runs, monkeypatch):
    captions, traced, ramp = set(), [], np.linspace(-1, 1, 11)[:, None]

    def draw(canvas, draw=FigureCanvasAgg.draw):
        captions.add(canvas.figure.axes[0].texts[0].get_text())
        traced.append([axis.lines[1].get_ydata().tolist() for axis in canvas.figure.axes[2:]])
        draw(canvas)

    monkeypatch.setattr(FigureCanvasAgg, "draw", draw)
    long, short = (plot.Episode(None, None, ramp[:n], np.ones(n)) for n in (11, 3))
    frames = [np.full((100, 100, 3), 50 * i, np.uint8) for i in range(5)]
    films = [(long, frames, 2, 15), (short, frames[3:], 2, 15)]  # every second of the first nine steps
    pictures = video.draw(plot.open_runs([runs["base"], runs["pave"]]), films, 0, 9, 50)
    height, width = pictures[0].shape[:2]
    shown = [[int(picture[height * 2 // 5, width * x // 4, 0]) for x in (1, 3)] for picture in pictures]
    assert shown == [[0, 150], [50, 200], [100, 200], [150, 200], [200, 200]]  # one that ended stays
    so_far = [(1, 1), (3, 3), (5, 3), (7, 3), (9, 3)]
    assert traced == [[ramp[:base, 0].tolist(), ramp[:pave, 0].tolist()] for base, pave in so_far]
    assert captions == {f"return 11, oscillation {np.diff(ramp, axis=0).mean():.3f}, 11 steps"}  # of the whole episode


def test_video_bad_settings(video, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {".gif or .mp4": ("--output", "video.avi"), "nowhere": ("--output", "nowhere/video.gif")}
    cases |= {"--steps": ("--steps", 0), "--fps": ("--fps", 0), "--dimension": ("--dimension", 1)}
    for words, arguments in cases.items():
        assert words in fails("benchmarks.video", runs["base"], *arguments)
    monkeypatch.delattr("gymnasium.envs.classic_control.PendulumEnv.render")  # as where a backend is missing
    assert "libegl1" in fails("benchmarks.video", runs["base"])
