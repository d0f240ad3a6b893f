"""Figures of trained runs at README width: PNG, SVG or PDF by the extension of --output.

    python benchmarks/plot.py field BASE PAVE           the Q-gradient field ||d2Q/dsda||_2, a surface per run
    python benchmarks/plot.py actions BASE PAVE         an episode's actions and their spectrum
    python benchmarks/plot.py curves RUN RUN ...        return, sm and episode length over training (TensorBoard files)
    python benchmarks/plot.py tradeoff RUN RUN ...      return against sm, a dot per seed (evaluation.json)
    python benchmarks/plot.py noise RUN RUN ...         return and sm under observation noise (evaluation.json)

Runs of one algorithm and method, as the runs themselves say, are the seeds of a group; --labels makes other groups.
Fewer than ten seeds are shown as they are, thin lines or dots, with their median. The first run sets axes and scale.
"""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

if __package__ in (None, ""):  # as a plain path, Python has benchmarks/ on its path but not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Run, UserError, load_run, user_errors
from benchmarks.evaluate import flat, mixed_hessians, rollout, spectral_norms

METHODS = ("base", "pave", "untuned", "caps", "auto")  # then the ablation's, then what --labels says
COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000")  # Okabe-Ito: colour-blind safe
MARKERS = "osD^vPX"
WIDTH = 9.0  # inches: shown 900 px wide, 10 pt is 14 px
ENOUGH = 10  # seeds from which on an interval says more than the seeds themselves
STATE_SWEEP, ACTION_SWEEP, GRID = 1.0, 1.5, 50  # the paper's half-widths (observation, normalised action) and points
AXES = {
    "return_mean": "return per episode\n(higher is better)",
    "smoothness_mean": "sm in env action units\n(lower is smoother)",
    "oscillation": "oscillation in env action units\n(lower is smoother)",
    "length_mean": "steps per episode",
}
TAGS = {f"eval/{name.removesuffix('_mean')}": text for name, text in AXES.items()}
# settings that do not make another training of a run
FREE = {"seed", "output_dir", "resume", "eval_interval", "eval_episodes", "checkpoint_interval"}
FREE |= {"cuda", "compile", "cudagraphs", "torch_deterministic"}
STYLE = {
    "axes.axisbelow": True, "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlesize": 11, "figure.constrained_layout.use": True, "font.size": 10, "grid.color": "#e4e4e4",
    "legend.frameon": False, "svg.fonttype": "none",
}  # fmt: skip

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help="run folders")]
Labels = Annotated[tuple[str, ...], tyro.conf.arg(help="one per run, seeds share one; default: algorithm and method")]
Output = Annotated[Path, tyro.conf.arg(help=".png, .svg or .pdf")]
EpisodeNumber = Annotated[int, tyro.conf.arg(help="which of the evaluation's episodes, from 0")]
Dimension = Annotated[int | None, tyro.conf.arg(help="action to trace; default: what changes most in the first run")]
Tags = Annotated[tuple[str, ...], tyro.conf.arg(help="TensorBoard curves, a panel each, such as losses/lambda_curv")]


# ---------------------------------------------------------------------------------------------------------- runs


def open_runs(paths: Paths, labels: Labels = (), one_env: bool = True) -> list[tuple[str, Run]]:
    """(label, run) each; UserError where they can't share a figure. one_env: refuse runs on different envs."""
    if not paths:
        raise UserError("give at least one run folder")
    if labels and len(labels) != len(paths):
        raise UserError(f"{len(labels)} --labels for {len(paths)} runs: give one label per run, in the same order")
    runs = [load_run(path) for path in paths]
    if one_env and len(envs := sorted({run.args.env_id for run in runs})) > 1:
        raise UserError(f"the runs are on different envs ({', '.join(envs)}): plot one env at a time")
    names = labels or [f"{run.algorithm.upper()} {run.method}" for run in runs]
    shown = list(zip(names, runs, strict=True))
    for label, seeds in group(shown).items():
        settings = [vars(run.args) | {"steps trained": run.step} for run in seeds]
        settings = [{k: v for k, v in each.items() if k not in FREE} for each in settings]
        if differing := sorted({k for each in settings for k in each if each[k] != settings[0].get(k)}):
            message = f"the runs of {label} differ in {', '.join(differing)}"
            if not labels:
                raise UserError(f"{message}: they are no seeds of one group, give --labels")
            print(f"warning: {message}", file=sys.stderr)
    return shown


def group(shown: list[tuple[str, Run]]) -> dict[str, list[Run]]:
    """Label -> its runs, in the order in which labels first appear."""
    return {label: [run for other, run in shown if other == label] for label, _ in shown}


def distinct(shown: list[tuple[str, Run]]) -> list[tuple[str, Run]]:
    """With the seed added to a label that several runs share: for figures that show each run on its own."""
    groups = group(shown)
    return [(f"{label}, seed {run.args.seed}" if len(groups[label]) > 1 else label, run) for label, run in shown]


def looks(labels) -> dict[str, dict]:
    """Colour and marker of each label: a method always has its own, whatever else is in the figure."""
    labels = list(dict.fromkeys(labels))
    if len(labels) > len(COLOURS):
        raise UserError(f"{len(labels)} lines in one figure, {len(COLOURS)} colours: plot fewer, or label seeds alike")
    own = [METHODS.index(name) if name in METHODS else -1 for name in (label.rpartition(" ")[2] for label in labels)]
    if len(set(own)) < len(own) or -1 in own:  # SAC and TD3 in one panel, or labels of the user's: simply in order
        own = range(len(labels))
    return {name: {"color": COLOURS[i], "marker": MARKERS[i]} for name, i in zip(labels, own, strict=True)}


def table_of(shown: list[tuple[str, Run]]) -> pd.DataFrame:
    """The runs' evaluations, a row each, in the columns of report.py's runs.csv; the label is the method."""
    rows = []
    for label, run in shown:
        path = run.path / "evaluation.json"
        try:
            row = flat(json.loads(path.read_text()))
            row = {"method": label, "algorithm": "", "return_mean": row["return_mean"]} | row
            rows.append(row | {"smoothness_mean": row["smoothness_mean"]})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is missing or damaged: run python benchmarks/evaluate.py {run.path}") from error
    return pd.DataFrame(rows)


def save(figure, output: Path) -> None:
    """Write the figure; UserError for an extension that matplotlib doesn't know, or a folder that isn't there."""
    try:
        figure.savefig(output, dpi=200, metadata={"Software": None} if output.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --output {output}: {error}") from error
    finally:
        plt.close(figure)
    print(f"wrote {output}")


# ----------------------------------------------------------------------------------- what report.py draws as well


def draw_seeds(axis, x, values: np.ndarray, look: dict, label: str) -> None:
    """values (seeds, len(x)): their median, and below ENOUGH seeds each as a thin line, else the middle half."""
    few, style = len(values) < ENOUGH, {"color": look["color"], "linewidth": 0.8, "alpha": 0.35}
    axis.plot(x, np.median(values, axis=0), color=look["color"], label=label, marker="." if len(x) < 50 else None)
    if few and len(values) > 1:
        axis.plot(x, values.T, **style)
    elif not few:
        axis.fill_between(x, *np.quantile(values, (0.25, 0.75), axis=0), color=look["color"], alpha=0.2, linewidth=0)


def panels(rows: pd.DataFrame, title: str, draws) -> plt.Figure:
    """A line of panels per algorithm: draw(axis, name, seeds, look) for each method, each of (draw, x, y) a panel."""
    algorithms = sorted(rows["algorithm"].unique())
    size = (WIDTH if len(draws) > 1 else WIDTH * 0.67, 0.8 + 3.4 * len(algorithms))
    figure, axes = plt.subplots(len(algorithms), len(draws), figsize=size, squeeze=False)
    for line, algorithm in zip(axes, algorithms, strict=True):
        methods = dict(list(rows[rows["algorithm"] == algorithm].groupby("method", sort=False)))
        for axis, draw in zip(line, draws, strict=True):
            axis.set_title(algorithm.upper(), loc="left")
            for method, look in looks(methods).items():
                draw(axis, method, methods[method], look)
        line[0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def named(method: str, seeds: pd.DataFrame) -> str:
    """The method, with the length of its episodes: sm depends on it."""
    lengths = seeds["length_mean"].dropna() if "length_mean" in seeds else ()
    return f"{method}, {np.median(lengths):,.0f} steps" if len(lengths) else method


def tradeoff_figure(rows: pd.DataFrame, title: str, measures=("smoothness_mean",)) -> plt.Figure:
    """Return against sm (and other measures), a dot per seed, with the median of each method as a large mark."""

    def panel(measure):
        def draw(axis, method, seeds, look):
            x, y = seeds[measure], seeds["return_mean"]
            axis.scatter(x, y, s=16, alpha=0.6, linewidth=0, **look)
            axis.scatter([x.median()], [y.median()], s=90, edgecolor="white", label=named(method, seeds), **look)
            axis.margins(0.12)
            axis.set(xlabel=AXES[measure], ylabel=AXES["return_mean"])
            axis.set_xlim(0, 1.1 * axis.dataLim.xmax or 1)

        return draw

    return panels(rows, title, list(map(panel, measures)))


def noise_figure(rows: pd.DataFrame, title: str) -> plt.Figure | None:
    """Return and sm (and the length) against noise on what the policy sees; None where no run has any."""
    levels = sorted(float(name.partition("@")[2]) for name in rows if name.startswith("return_mean@"))
    shown = [name for name in AXES if all(f"{name}@{level:g}" in rows for level in levels) and name != "oscillation"]

    def panel(measure):
        columns = [measure, *(f"{measure}@{level:g}" for level in levels)]

        def draw(axis, method, seeds, look):
            curves = seeds[columns].dropna().to_numpy(float)
            if len(curves):
                draw_seeds(axis, (0, *levels), curves, look, named(method, seeds))
            axis.set(xlabel="observation noise ±$k$ (standard deviations)", ylabel=AXES[measure])
            axis.set_xticks((0, *levels), [f"{level:g}" for level in (0, *levels)])
            if measure != "return_mean":
                axis.set_ylim(bottom=0)

        return draw

    return panels(rows, title, list(map(panel, shown))) if levels else None


def tradeoff(runs: Paths, /, labels: Labels = (), output: Output = Path("tradeoff.png")) -> None:
    """Return against sm, from evaluation.json: a dot per run, the median of each group."""
    shown = open_runs(runs, labels)
    save(tradeoff_figure(table_of(shown), f"{shown[0][1].args.env_id}: return against smoothness"), output)


def noise(runs: Paths, /, labels: Labels = (), output: Output = Path("noise.png")) -> None:
    """Return and sm against noise on what the policy sees, from evaluation.json."""
    shown = open_runs(runs, labels)
    figure = noise_figure(table_of(shown), f"{shown[0][1].args.env_id}: the policy under observation noise")
    if not figure:
        raise UserError("no evaluation.json of these runs has noise: run benchmarks/evaluate.py again")
    save(figure, output)


# ------------------------------------------------------------------------------------------------------- curves


def read_curve(run: Run, tag: str, needed: bool = True) -> dict[int, float]:
    """Step -> value of one tag of the run's TensorBoard files; UserError (or {}) if it isn't there."""
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    has = sorted(events.Tags()["scalars"])
    if needed and tag not in has:
        raise UserError(f"{run.path} has no {tag} in its TensorBoard files: it has {', '.join(has)}")
    return {event.step: event.value for event in events.Scalars(tag)} if tag in has else {}


def curves(runs: Paths, /, labels: Labels = (), output: Output = Path("curves.png"), tags: Tags = ()) -> None:
    """Learning curves of --tags, or else of the evaluations during training."""
    chosen = tags or ("eval/return", "eval/smoothness", "eval/length")
    shown = open_runs(runs, labels, one_env=set(chosen) <= set(TAGS))  # the units of two envs can't be compared
    read = {(i, tag): read_curve(run, tag, tag in tags or tag != "eval/length")
            for (i, (_, run)), tag in itertools.product(enumerate(shown), chosen)}  # fmt: skip
    chosen = [tag for tag in chosen if all(read[i, tag] for i in range(len(shown)))]  # old runs have no lengths
    figure, axes = plt.subplots(1, len(chosen), figsize=(WIDTH, 3.6), squeeze=False)
    for (axis, tag), (label, look) in itertools.product(
        zip(axes[0], chosen, strict=True), looks(name for name, _ in shown).items()
    ):
        curves_of = [read[i, tag] for i, (name, _) in enumerate(shown) if name == label]
        steps = sorted(set.intersection(*map(set, curves_of)))
        if not steps:
            raise UserError(f"the runs of {label} have no common step in {tag}: give --labels")
        values = np.array([[curve[step] for step in steps] for curve in curves_of])
        draw_seeds(axis, steps, values, look, f"{label} ({len(values)} seed{'s'[: len(values) > 1]})")
        axis.set(xlabel="environment steps", ylabel=TAGS.get(tag, tag))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if tag in TAGS and tag != "eval/return":
            axis.set_ylim(bottom=0)
        elif tag == "losses/lambda_curv":
            axis.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(", ".join(dict.fromkeys(run.args.env_id.rpartition(":")[2] for _, run in shown)) + ": training")
    save(figure, output)


# --------------------------------------------------------------------------------------------- actions and field


def play(run: Run, episode: int):
    """Episode number `episode`, from 0, of those that evaluate() plays: the same start for every run."""
    if episode < 0:
        raise UserError(f"--episode is {episode}; it must be 0 or more")
    with run.script.make_env(run.args.env_id) as env:
        return rollout(run, env, episode + 1).episodes[episode]


def choose_action(env_actions: np.ndarray, dimension: int | None) -> int:
    """The action to trace: `dimension`, or by default the one that changes most from step to step, (T, d_a)."""
    changes = np.abs(np.diff(env_actions, axis=0)).mean(axis=0) if len(env_actions) > 1 else env_actions[0]
    if dimension is not None and not 0 <= dimension < len(changes):
        raise UserError(f"--dimension is {dimension}; this env's actions are 0 to {len(changes) - 1}")
    return int(changes.argmax()) if dimension is None else dimension


def spectrum(env_actions) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (cycles per step) and amplitudes (action units, mean over actions) of (T, d_a), without the mean.

    The amplitude 2 |FFT| / T at the frequencies that sm weighs; a sine of amplitude 1 has 1 at its frequency.
    """
    steps = len(env_actions)
    kept = slice(1, max(steps // 2, 2))
    amplitudes = 2 / steps * np.abs(np.fft.rfft(env_actions, axis=0)).mean(axis=1)
    return np.fft.rfftfreq(steps)[kept], amplitudes[kept]


def actions(
    runs: Paths,
    /,
    labels: Labels = (),
    output: Output = Path("actions.png"),
    episode: EpisodeNumber = 0,
    steps: Annotated[int, tyro.conf.arg(help="length of the trace; the spectrum is of the whole episode")] = 100,
    dimension: Dimension = None,
) -> None:
    """One episode's actions, and the amplitude spectrum from which sm is computed."""
    if steps < 1:
        raise UserError(f"--steps is {steps}; it must be at least 1")
    shown = distinct(open_runs(runs, labels))
    colours = looks(label for label, _ in shown)
    episodes = [play(run, episode) for _, run in shown]
    dimension = choose_action(episodes[0].env_actions, dimension)
    figure = plt.figure(figsize=(WIDTH, 1 + 1.6 * max(len(shown), 2)))
    grid = figure.add_gridspec(len(shown), 2, width_ratios=(1.7, 1))
    spectra, trace = figure.add_subplot(grid[:, 1]), None
    for i, ((label, run), played) in enumerate(zip(shown, episodes, strict=True)):
        colour, env_actions = colours[label]["color"], played.env_actions
        trace = figure.add_subplot(grid[i, 0], sharex=trace, sharey=trace)
        trace.plot(env_actions[:steps, dimension], color=colour, linewidth=1.2)
        sm, total = run.script.smoothness(env_actions), played.rewards.sum()
        trace.set_title(f"{label}: return {total:,.1f}, sm {sm:.3f}, {len(env_actions)} steps", loc="left", fontsize=10)
        trace.tick_params(labelbottom=i == len(shown) - 1)
        trace.set_ylabel(f"action {dimension} (env units)")
        frequencies, amplitudes = spectrum(env_actions)
        spectra.plot(frequencies, amplitudes, color=colour, alpha=0.25, linewidth=0.8)
        window = np.ones(max(1, len(env_actions) // 100))  # 0.01 cycles per step
        smooth = (np.convolve(part, window / len(window), "valid") for part in (frequencies, amplitudes))
        spectra.plot(*smooth, color=colour, label=label)
    trace.set_xlabel("step")
    spectra.set_title("amplitude spectrum", loc="left")
    spectra.set(yscale="log", xlim=(0, 0.5), xlabel="frequency (cycles per step)")
    spectra.set_ylabel("amplitude, mean over actions (env units)")
    spectra.legend()
    figure.suptitle(f"{shown[0][1].args.env_id}: one episode of the deterministic policy")
    save(figure, output)


def dominant_pair(critic, observation, action) -> tuple[int, int]:
    """The (state, action) dimensions with the largest |d2Q/dsda| at one point: s (d_s,), a (d_a,)."""
    hessian = mixed_hessians(critic, observation[None], action[None])[0]  # (d_a, d_s)
    return divmod(int(hessian.abs().argmax()), hessian.shape[1])[::-1]


def field_surface(critic, observation, action, pair: tuple[int, int]):
    """||d2Q/dsda||_2 (GRID, GRID) over the sweep of `pair` around s (d_s,), a (d_a,): rows are a, columns are s."""
    states, actions = observation.repeat(GRID, GRID, 1), action.repeat(GRID, GRID, 1)
    states[..., pair[0]] += torch.linspace(-STATE_SWEEP, STATE_SWEEP, GRID, dtype=states.dtype)
    actions[..., pair[1]] += torch.linspace(-ACTION_SWEEP, ACTION_SWEEP, GRID, dtype=actions.dtype)[:, None]
    hessians = mixed_hessians(critic, states.flatten(0, 1), actions.flatten(0, 1))
    return spectral_norms(hessians).reshape(GRID, GRID).numpy()


def field(runs: Paths, /, labels: Labels = (), output: Output = Path("field.png"), episode: EpisodeNumber = 0) -> None:
    """The Q-gradient field: ||d2Q/dsda||_2 around (s, pi(s)) halfway through an episode, one surface per run.

    The sweep is over the pair of dimensions with the largest |d2Q/dsda| of the first run, +-1.0 in the observation and
    +-1.5 in the normalised action on 50 x 50. Every run has its own (s, pi(s)), and the first one's pair and colours,
    clipped at its 99th percentile.
    """
    shown, surfaces, pair = distinct(open_runs(runs, labels)), [], None
    for _, run in shown:
        played = play(run, episode)
        point = [torch.from_numpy(part[len(part) // 2]).double() for part in (played.observations, played.actions)]
        pair = pair or dominant_pair(run.critic, *point)
        surfaces.append(field_surface(run.critic, *point, pair))
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure = plt.figure(figsize=(WIDTH, 0.4 + 3.8 * rows), layout="none")
    s, a = np.meshgrid(np.linspace(-STATE_SWEEP, STATE_SWEEP, GRID), np.linspace(-ACTION_SWEEP, ACTION_SWEEP, GRID))
    colours = matplotlib.colors.Normalize(0, np.quantile(surfaces[0], 0.99))
    style = {"cmap": "viridis", "norm": colours, "rcount": GRID, "ccount": GRID}
    for i, ((label, _), surface) in enumerate(zip(shown, surfaces, strict=True)):
        axis = figure.add_subplot(rows, columns, i + 1, projection="3d")
        axis.plot_surface(s, a, surface, antialiased=False, rasterized=True, **style)
        axis.set_title(f"{label}\nmean {surface.mean():.3g}, max {surface.max():.3g}", y=1.0)
        axis.set_xlabel(f"$\\Delta s_{{{pair[0]}}}$ (observation units)")
        axis.set_ylabel(f"$\\Delta a_{{{pair[1]}}}$ (normalised)")
        axis.set_zlim(0, max(map(np.max, surfaces)))
        axis.set(xticks=(-STATE_SWEEP, 0, STATE_SWEEP), yticks=(-ACTION_SWEEP, 0, ACTION_SWEEP))
        axis.set_box_aspect(None, zoom=0.98)
    figure.subplots_adjust(left=0.01, right=0.86, bottom=0.06, top=1 - 0.65 / figure.get_figheight(), wspace=0.05)
    label = r"height and colour: $\|\nabla^2_{sa} Q_1\|_2$"
    scale = matplotlib.cm.ScalarMappable(colours, "viridis")
    figure.colorbar(scale, cax=figure.add_axes((0.9, 0.2, 0.018, 0.55)), extend="max", label=label)
    what = "how fast the action gradient of $Q$ turns with the state, around $(s, \\pi(s))$"
    figure.suptitle(f"{shown[0][1].args.env_id}: {what}", y=0.98)
    save(figure, output)


def main(arguments: list[str] | None = None) -> None:
    """The command line: `arguments`, or the program's own."""
    commands = {function.__name__: function for function in (field, actions, curves, tradeoff, noise)}
    with user_errors(), plt.rc_context(STYLE):
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=arguments)


if __name__ == "__main__":
    main()
