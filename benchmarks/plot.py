"""Figures of trained runs at README width; PNG, SVG or PDF by the extension of --output.

    python -m benchmarks.plot field BASE PAVE        the Q-gradient field, ||d2Q/dsda||_2, a surface a run
    python -m benchmarks.plot actions BASE PAVE      an episode's actions and their spectrum
    python -m benchmarks.plot curves RUN RUN ...     return, sm and episode length over training (TensorBoard files)

Runs of one algorithm and method, as the runs themselves say, are the seeds of a group; --labels makes other groups.
Each seed is shown, as a thin line, with their median. The first run sets axes and scale. Return against sm, and both
under observation noise, are drawn by benchmarks.report.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from PIL import Image
from scipy.ndimage import uniform_filter1d
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.linalg import matrix_norm

from benchmarks import common
from benchmarks.common import Episode, Run, evaluation_env, load_run, require, rollout, user_errors
from benchmarks.evaluate import critic_hessians

COLOURS = {  # each method has its own, whatever else is in the figure; the first seven are Okabe and Ito's
    "base": "#D55E00", "pave": "#0072B2", "untuned": "#E69F00", "caps": "#56B4E9", "auto": "#009E73",
    "filter": "#CC79A7", "penalty": "#000000", "filter+pave": "#7A3E9D", "own": "#8C6D31",
}  # fmt: skip
METHODS = tuple(COLOURS)
LEGEND = {  # the methods in words
    "base": "plain", "pave": "PAVE, tuned λ", "untuned": "PAVE, untuned λ", "own": "PAVE, λ by hand",
    "auto": "PAVE, auto", "caps": "CAPS", "filter": "filter in training", "penalty": "penalty",
    "filter+pave": "filter + PAVE",
}  # fmt: skip
WIDTH = 9.0  # inches; 900 px at 100 dpi
ENOUGH = 10  # seeds from which on an interval says more than the seeds themselves
STATE_SWEEP, ACTION_SWEEP, GRID = 1.0, 1.5, 50  # the paper's half-widths (observation, normalised action) and points
AXES = {
    "return_mean": "return per episode\n(higher is better)",
    "smoothness_mean": "sm in env action units\n(lower is smoother)",
    "length_mean": "steps per episode",
    "oscillation": "oscillation in env action units\n(lower is smoother)",
}
EVALUATIONS = ("return", "smoothness", "oscillation")  # what is kept of an evaluation during the training
TAGS = {f"eval/{name.removesuffix('_mean')}": text for name, text in AXES.items()}
STYLE = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 11, "font.size": 10,
    "figure.constrained_layout.use": True, "grid.color": "#e4e4e4", "legend.frameon": False,
}  # fmt: skip

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help="run folders")]
Labels = Annotated[tuple[str, ...], tyro.conf.arg(help="one per run, seeds share one; default: algorithm and method")]
Output = Annotated[Path, tyro.conf.arg(help=".png, .svg or .pdf")]
Tags = Annotated[tuple[str, ...], tyro.conf.arg(help="TensorBoard curves, a panel each")]
EpisodeNumber = Annotated[int, tyro.conf.arg(help="which of the evaluation's episodes, from 0")]
Steps = Annotated[int, tyro.conf.arg(help="length of what is shown; all numbers are of the whole episode")]
Dimension = Annotated[int | None, tyro.conf.arg(help="action to trace; default: what changes most in the first run")]


def settings_of(run: Run) -> dict:
    """What makes a training: all seeds of a group have the same."""
    settings = common.settings_of(run.script, vars(run.args)) | {"steps trained": run.step}
    if run.origin:
        source = common.identity(run.script, run.origin["args"], run.origin.get("origin"))
        settings["origin"] = (source, run.origin["step"])
    return settings


def open_runs(paths, labels=(), need_critic=False) -> list[tuple[str, Run]]:
    """(label, run) each. UserError for runs on different envs, or of one label with different settings."""
    require(len(paths) > 0, "give at least one run folder")
    fit = len(labels) in (0, len(paths))
    require(fit, f"{len(labels)} --labels for {len(paths)} runs: give one label per run, in the same order")
    runs = [load_run(path, need_critic) for path in paths]
    envs = sorted({run.args.env_id for run in runs})
    require(len(envs) == 1, f"the runs are on different envs ({', '.join(envs)}): plot one env at a time")
    shown = list(zip(labels or [f"{run.algorithm.upper()} {run.method}" for run in runs], runs, strict=True))
    first = {}
    for label, run in shown:
        settings = settings_of(run)
        expected = first.setdefault(label, settings)
        names = sorted(settings.keys() | expected.keys())
        differing = ", ".join(name for name in names if settings.get(name) != expected.get(name))
        require(not differing, f"the runs of {label} differ in {differing}: tell them apart by --labels")
    return shown


def name_seeds(shown) -> list[tuple[str, Run]]:
    """With the seed in a label that several runs share: for figures that show each run on its own."""
    labels = [label for label, _ in shown]
    return [(f"{name}, seed {run.args.seed}" if labels.count(name) > 1 else name, run) for name, run in shown]


def last_part(method: str) -> str:
    """pave of base-then-pave."""
    return method.rpartition("-then-")[2]


def colours_of(labels) -> dict[str, str]:
    """A method has its own colour, also after a warm start.

    SAC and TD3 in one panel, or labels of the user's, have them in order.
    """
    labels = list(dict.fromkeys(labels))
    methods = [last_part(label.rpartition(" ")[2]) for label in labels]
    if set(methods) <= set(METHODS) and len(set(methods)) == len(methods):
        return {label: COLOURS[method] for label, method in zip(labels, methods, strict=True)}
    if len(labels) <= len(COLOURS):
        return dict(zip(labels, COLOURS.values(), strict=False))
    return dict(zip(labels, plt.get_cmap("turbo")(np.linspace(0, 1, len(labels))), strict=True))


def play(run: Run, episode: int) -> Episode:
    """The `episode`th, from 0, of those that evaluate() plays, the same start for every run."""
    require(episode >= 0, f"--episode is {episode}; it must be 0 or more")
    with evaluation_env(run) as env:
        return rollout(run, env, episode + 1)[0][episode]


def choose_action(env_actions: np.ndarray, dimension: int | None) -> int:
    """The action to trace: `dimension`, or the one that changes most from step to step, (T, d_a)."""
    if dimension is None:
        return int(np.abs(np.diff(env_actions, axis=0)).sum(axis=0).argmax())
    last = env_actions.shape[1] - 1
    require(0 <= dimension <= last, f"--dimension is {dimension}; this env's actions are 0 to {last}")
    return dimension


def save(figure, output: Path) -> None:
    """Write the figure; UserError for another extension."""
    require(output.suffix in (".png", ".svg", ".pdf"), f"--output is {output}; it must end in .png, .svg or .pdf")
    figure.savefig(output, dpi=100)
    if output.suffix == ".png":  # a palette: a third of the size
        Image.open(output).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(output, optimize=True)
    plt.close(figure)
    print(f"wrote {output}")


def pairs_of_panels(rows: pd.DataFrame, title: str):
    """A figure with two panels for each algorithm; and of each line (panels, name, name in a legend, rows)."""
    algorithms, parts = list(rows.groupby("algorithm")), []
    figure, axes = plt.subplots(len(algorithms), 2, figsize=(WIDTH, 0.7 + 3.1 * len(algorithms)), squeeze=False)
    figure.suptitle(title)
    for line, (algorithm, runs) in zip(axes, algorithms, strict=True):
        line[0].set_title(algorithm.upper(), loc="left")
        for name, seeds in runs.groupby("line", sort=False):
            length = seeds["length_mean"].median()  # sm depends on it
            label = name if np.isnan(length) else f"{name} ({length:,.0f} steps)"
            parts.append((line, name, label, seeds))
    return figure, parts


def tradeoff_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return against oscillation and sm: a dot is a seed, a ring their median."""
    figure, parts = pairs_of_panels(rows, title)
    colours = colours_of(rows["line"])
    for axes, name, label, seeds in parts:
        for axis, measure in zip(axes, ("oscillation", "smoothness_mean"), strict=True):
            axis.scatter(seeds[measure], seeds["return_mean"], s=20, color=colours[name], linewidth=0, alpha=0.7)
            ring = {"markersize": 11, "markerfacecolor": "none", "color": colours[name]}
            axis.plot(*seeds[[measure, "return_mean"]].median(), "o", label=label, **ring)
            axis.set(xlabel=AXES[measure], ylabel=AXES["return_mean"])
            axis.set_xlim(0, 1.08 * axis.dataLim.xmax)
        axes[0].legend(fontsize=8)
    return figure


def draw_seeds(axis, x, values: np.ndarray, colour: str, label: str) -> None:
    """values (seeds, len(x)): their median, and each as a thin line; of many a band for the middle half instead."""
    axis.plot(x, np.median(values, axis=0), color=colour, label=label, linewidth=2)
    if len(values) >= ENOUGH:
        axis.fill_between(x, *np.quantile(values, (0.25, 0.75), axis=0), color=colour, alpha=0.15, linewidth=0)
    elif len(values) > 1:
        axis.plot(x, values.T, color=colour, linewidth=0.8, alpha=0.4)


def noise_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return and sm against the noise on what the policy sees."""
    measured = rows.filter(like="return_mean@").dropna(axis=1, how="all")
    levels = sorted(float(name.partition("@")[2]) for name in measured)
    figure, parts = pairs_of_panels(rows, title)
    colours = colours_of(rows["line"])
    for axes, name, label, seeds in parts:
        for axis, measure in zip(axes, ("return_mean", "smoothness_mean"), strict=True):
            curves = seeds[[measure, *(f"{measure}@{level:g}" for level in levels)]].dropna().to_numpy(float)
            if len(curves):
                draw_seeds(axis, (0, *levels), curves, colours[name], label)
            axis.set(xlabel="observation noise ±$k$ (standard deviations)", ylabel=AXES[measure])
        axes[0].legend(fontsize=8)
        axes[1].set_ylim(bottom=0)
    return figure


def training_figure(rows: pd.DataFrame, evaluations: pd.DataFrame, title: str) -> plt.Figure:
    """Return and oscillation over the training.

    rows: a row for each run; evaluations: a row for each of its evaluations, with step and the index of the run's row
    """
    figure, parts = pairs_of_panels(rows, title)
    colours = colours_of(rows["line"])
    for axes, name, _, seeds in parts:
        own = evaluations[evaluations.index.isin(seeds.index)]
        for axis, tag in zip(axes, ("return", "oscillation"), strict=True):
            curves = own.set_index("step", append=True)[tag].unstack().dropna(axis=1)  # where all seeds have one
            if curves.size:
                draw_seeds(axis, curves.columns, curves.to_numpy(), colours[name], name)
            axis.set(xlabel="environment steps", ylabel=TAGS[f"eval/{tag}"])
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[0].legend(fontsize=8)
        if (own["oscillation"] > 0).all():
            axes[1].set_yscale("log")
    return figure


def effect_figure(dots: pd.DataFrame) -> plt.Figure:
    """Oscillation over plain's median, a row for each task, a lane in it for each method, a dot for each seed.

    dots, a row for each seed: task (its label), action_dim, line (its lane), method (its colour), ratio (> 0), worse
    (whether it is hollow). Tasks are in the order of the table, with a heading where action_dim changes.
    """
    lane, gap, heading = 1.0, 0.9, 1.5  # heights, in lanes
    figure, axis = plt.subplots(figsize=(WIDTH, 1))
    y, ticks, names, dimension = 0.0, [], [], object()
    for task, runs in dots.groupby("task", sort=False):
        if runs["action_dim"].iloc[0] != dimension:
            dimension = runs["action_dim"].iloc[0]
            y += heading
            told = "action of unknown size" if np.isnan(dimension) else f"{dimension:.0f} action dimension"
            told += "s" * bool(dimension > 1)
            axis.text(0.004, y - 0.35, told, transform=axis.get_yaxis_transform(), fontsize=8, color="#777777")
        top = y
        for _, seeds in runs.groupby("line", sort=False):
            colour = COLOURS[seeds["method"].iloc[0]]
            y += lane
            filled = np.where(seeds["worse"], "none", colour)
            axis.scatter(seeds["ratio"], [y] * len(seeds), s=26, c=filled, edgecolors=colour, linewidths=1.1, zorder=3)
            axis.plot([seeds["ratio"].median()] * 2, [y - 0.45, y + 0.45], color=colour, linewidth=2.2, zorder=2)
        ticks.append((top + y + lane) / 2)
        names.append(task)
        axis.axhspan(top + 0.35, y + 0.65, color="#f4f4f4", zorder=0)
        y += gap
    axis.axvline(1, color="#333333", linewidth=1.2, zorder=1)
    axis.set(
        xscale="log",
        ylim=(y + 0.3, 0.2),
        xlabel="oscillation, as a multiple of the median plain agent's; one dot is one seed",
    )
    axis.set_yticks(ticks, names, fontsize=8.5)
    axis.tick_params("y", length=0)
    axis.grid(False, axis="y")
    low, high = (edge(dots["ratio"]) for edge in (np.min, np.max))
    marks = [mark for mark in (0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30) if low / 1.6 <= mark <= high * 1.6]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.minorticks_off()
    heads = {"transform": axis.transAxes, "ha": "right", "va": "bottom", "fontsize": 9, "color": "#333333"}
    axis.text(-0.01, 1.0, "env, agent, training steps", **heads)
    heads |= {"transform": axis.get_xaxis_transform()}
    axis.text(0.93, 1.0, "◀ calmer than plain", **heads)
    axis.text(1.08, 1.0, "more restless ▶", **heads | {"ha": "left"})
    used = [method for method in METHODS if method in set(dots["method"])]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[m], label=LEGEND[m]) for m in used]
    hollow = {"marker": "o", "linestyle": "", "color": "#555555", "markerfacecolor": "none"}
    handles.append(plt.Line2D([], [], label="hollow: learned less (its return is lower)", **hollow))
    handles.append(plt.Line2D([], [], color="#555555", marker="|", linestyle="", markersize=10, label="median"))
    figure.set_size_inches(WIDTH, 1.35 + 0.135 * y)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)
    figure.suptitle("How much does the action still jump from step to step?", fontsize=12)
    return figure


def read_scalars(run: Run) -> dict[str, pd.Series]:
    """tag -> its values by step, of the run's TensorBoard files."""
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    return {tag: pd.Series({event.step: event.value for event in events.Scalars(tag)}) for tag in tags}


def read_curve(run: Run, tag: str) -> pd.Series:
    """The values of one tag of the run's TensorBoard files by step; UserError if it isn't there."""
    scalars = read_scalars(run)
    require(tag in scalars, f"{run.path} has no {tag} in its TensorBoard files: it has {', '.join(scalars)}")
    return scalars[tag]


def read_evaluations(run: Run) -> pd.DataFrame:
    """A row for each evaluation during the training: step, and EVALUATIONS; NaN for what is missing."""
    scalars = read_scalars(run)
    columns = {name: scalars.get(f"eval/{name}", pd.Series(dtype=float)) for name in EVALUATIONS}
    return pd.DataFrame(columns).rename_axis("step").reset_index()


def curves(runs: Paths, labels: Labels = (), output: Output = Path("curves.png"), tags: Tags = tuple(TAGS)[:3]) -> None:
    """Learning curves, by default of the evaluations during training."""
    shown = open_runs(runs, labels)
    colours = colours_of(label for label, _ in shown)
    figure, axes = plt.subplots(1, len(tags), figsize=(WIDTH, 3.6), squeeze=False)
    for axis, tag in zip(axes[0], tags, strict=True):
        for label, colour in colours.items():
            seeds = pd.concat([read_curve(run, tag) for name, run in shown if name == label], axis=1).dropna()
            require(len(seeds) > 0, f"the runs of {label} have no common step in {tag}: tell them apart by --labels")
            draw_seeds(axis, seeds.index, seeds.to_numpy().T, colour, f"{label} (seeds: {seeds.shape[1]})")
        axis.set(xlabel="environment steps", ylabel=TAGS.get(tag, tag))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if tag in TAGS and tag != "eval/return":
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{shown[0][1].args.env_id}: training")
    save(figure, output)


def spectrum(env_actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies (cycles per step) that sm weighs, and their amplitudes, mean over actions, of (T, d_a)."""
    steps = len(env_actions)
    kept = slice(1, max(steps // 2, 2))
    amplitudes = 2 / steps * np.abs(np.fft.rfft(env_actions, axis=0)).mean(axis=1)
    return np.fft.rfftfreq(steps)[kept], amplitudes[kept]


def actions(
    runs: Paths, labels: Labels = (), output: Output = Path("actions.png"),
    episode: EpisodeNumber = 0, dimension: Dimension = None, steps: Steps = 100,
) -> None:  # fmt: skip
    """One episode's actions, and the amplitude spectrum from which sm is computed."""
    require(steps > 0, f"--steps is {steps}; it must be at least 1")
    shown = name_seeds(open_runs(runs, labels))
    colours = colours_of(label for label, _ in shown)
    played = [play(run, episode).env_actions for _, run in shown]
    dimension = choose_action(played[0], dimension)
    figure = plt.figure(figsize=(WIDTH, 1 + 1.6 * max(len(shown), 2)))
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    traces, spectra = left.subplots(len(shown), sharex=True, sharey=True, squeeze=False)[:, 0], right.subplots()
    for trace, (label, run), env_actions in zip(traces, shown, played, strict=True):
        trace.plot(env_actions[:steps, dimension], color=colours[label], linewidth=1.2)
        sm = run.script.smoothness(env_actions)
        trace.set_title(f"{label}: sm {sm:.3f}, {len(env_actions):,} steps", loc="left", fontsize=10)
        trace.set_ylabel(f"action {dimension}")
        frequencies, amplitudes = spectrum(env_actions)
        spectra.plot(frequencies, amplitudes, color=colours[label], alpha=0.25, linewidth=0.8)
        smooth = uniform_filter1d(amplitudes, max(1, len(env_actions) // 100))  # over 0.01 cycles per step
        spectra.plot(frequencies, smooth, color=colours[label], label=label)
    trace.set_xlabel("step")
    spectra.set(yscale="log", xlabel="frequency (cycles per step)", ylabel="amplitude, mean over actions")
    spectra.legend()
    figure.suptitle(f"{shown[0][1].args.env_id}: actions of one episode (env units), and their spectrum")
    save(figure, output)


def dominant_pair(critic, observation, action) -> tuple[int, int]:
    """The (state, action) dimensions with the largest |d2Q/dsda| at one point: s (d_s,), a (d_a,)."""
    hessian = critic_hessians(critic, observation[None], action[None])[0][0]  # (d_a, d_s)
    return divmod(int(hessian.abs().argmax()), hessian.shape[1])[::-1]


def field_surface(critic, observation, action, pair: tuple[int, int]) -> np.ndarray:
    """||d2Q/dsda||_2 (GRID, GRID) over the sweep of `pair` around s (d_s,), a (d_a,): rows are a, columns are s."""
    states, actions = observation.repeat(GRID, GRID, 1), action.repeat(GRID, GRID, 1)
    states[..., pair[0]] += torch.linspace(-STATE_SWEEP, STATE_SWEEP, GRID, dtype=states.dtype)
    actions[..., pair[1]] += torch.linspace(-ACTION_SWEEP, ACTION_SWEEP, GRID, dtype=actions.dtype)[:, None]
    hessians, _ = critic_hessians(critic, states.flatten(0, 1), actions.flatten(0, 1))
    return matrix_norm(hessians, ord=2).reshape(GRID, GRID).numpy()


def field(runs: Paths, labels: Labels = (), output: Output = Path("field.png"), episode: EpisodeNumber = 0) -> None:
    """The Q-gradient field: ||d2Q/dsda||_2 around each run's own (s, pi(s)) halfway through an episode.

    Swept is the pair of dimensions with the largest |d2Q/dsda| of the first run, +-1.0 in the observation and +-1.5 in
    the normalised action, on 50 x 50; the colours are clipped at the first run's 99th percentile.
    """
    shown, surfaces, pair = name_seeds(open_runs(runs, labels, need_critic=True)), [], None
    for _, run in shown:
        played = play(run, episode)
        point = [torch.from_numpy(part[len(part) // 2]).double() for part in (played.observations, played.actions)]
        pair = pair or dominant_pair(run.critic, *point)
        surfaces.append(field_surface(run.critic, *point, pair))
    s, a = np.meshgrid(np.linspace(-STATE_SWEEP, STATE_SWEEP, GRID), np.linspace(-ACTION_SWEEP, ACTION_SWEEP, GRID))
    size, kind = (WIDTH, 0.4 + 7 / len(shown)), {"projection": "3d"}
    figure, axes = plt.subplots(1, len(shown), figsize=size, subplot_kw=kind, squeeze=False)
    look = {"rcount": GRID, "ccount": GRID, "antialiased": False, "rasterized": True, "vmin": 0, "cmap": "viridis"}
    for axis, (label, _), surface in zip(axes[0], shown, surfaces, strict=True):
        drawn = axis.plot_surface(s, a, surface, vmax=np.quantile(surfaces[0], 0.99), **look)
        axis.set_title(f"{label}: mean {surface.mean():.3g}, max {surface.max():.3g}", y=0.95)
        axis.set(xticks=(-STATE_SWEEP, 0, STATE_SWEEP), yticks=(-ACTION_SWEEP, 0, ACTION_SWEEP))
        axis.set(zlim=(0, np.max(surfaces)), xlabel=f"$\\Delta s_{{{pair[0]}}}$ (observation units)")
        axis.set_ylabel(f"$\\Delta a_{{{pair[1]}}}$ (normalised)")
        axis.set_box_aspect(None, zoom=0.85)
    figure.colorbar(drawn, ax=axes, shrink=0.6, extend="max", label=r"$\|\nabla^2_{sa} Q_1\|_2$")
    figure.suptitle(f"{shown[0][1].args.env_id}: how fast the action gradient of $Q$ turns with the state")
    save(figure, output)


if __name__ == "__main__":
    commands = {"field": field, "actions": actions, "curves": curves}
    with user_errors(), plt.rc_context(STYLE):
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
