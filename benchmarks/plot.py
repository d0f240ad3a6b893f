"""Figures of trained runs at README width: PNG, SVG or PDF by the extension of --output.

    python benchmarks/plot.py field BASE PAVE           the Q-gradient field ||d2Q/dsda||_2, a surface per run
    python benchmarks/plot.py actions BASE PAVE         an episode's actions and their spectrum
    python benchmarks/plot.py curves RUN RUN ...        return and sm over training (TensorBoard files)
    python benchmarks/plot.py robustness RUN RUN ...    return and sm under observation noise (evaluation.json)
    python benchmarks/plot.py tradeoff RUN RUN ...      return against sm, a point per run

Runs with one label are the seeds of one group. The first run sets the axes and the scale: give the base agent first.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import Episode, Run, UserError, load_run, mixed_hessians, rollout, spectral_norms, user_errors

COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#000000")  # Okabe-Ito: colour-blind safe
MARKERS = "osD^vPX"
WIDTH = 9.0  # inches: shown 900 px wide, 10 pt is 14 px
STATE_SWEEP, ACTION_SWEEP, GRID = 1.0, 1.5, 50  # the paper's half-widths (observation, normalised action) and points
MEANS = ("return_mean", "smoothness_mean")  # keys of evaluation.json and summary.json
RETURN, SMOOTHNESS = "return per episode\n(higher is better)", "sm in env action units\n(lower is smoother)"
OSCILLATION = "oscillation in env action units\n(lower is smoother)"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",
}

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help="run folders")]
Labels = Annotated[tuple[str, ...], tyro.conf.arg(help="one per run, seeds share one; default: SAC or TD3, and + PAVE")]
Output = Annotated[Path, tyro.conf.arg(help=".png, .svg or .pdf")]
EpisodeNumber = Annotated[int, tyro.conf.arg(help="which of the evaluation's episodes, from 0")]
Dimension = Annotated[int | None, tyro.conf.arg(help="action to trace; default: what changes most in the first run")]


# ---------------------------------------------------------------------------------------------------------- runs


def open_runs(paths: Paths, labels: Labels = (), one_env: bool = True) -> list[Run]:
    """Load the runs under these labels, or their own; UserError where they can't share a figure.

    one_env: refuse runs on different envs
    """
    if not paths:
        raise UserError("give at least one run folder")
    if labels and len(labels) != len(paths):
        raise UserError(f"{len(labels)} --labels for {len(paths)} runs: give one label per run, in the same order")
    runs = [load_run(path) for path in paths]
    envs = sorted({run.args.env_id for run in runs})
    if one_env and len(envs) > 1:
        raise UserError(f"the runs are on different envs ({', '.join(envs)}): plot one env at a time")
    steps = sorted({run.step for run in runs})
    if len(steps) > 1:
        print(f"warning: the runs were trained for {steps[0]:,} to {steps[-1]:,} steps: not alike", file=sys.stderr)
    return [run._replace(label=label) for run, label in zip(runs, labels, strict=True)] if labels else runs


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Label -> its runs, in the order in which labels first appear."""
    groups = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def colours_of(things) -> tuple[str, ...]:
    """One colour each; UserError for more things than can be told apart."""
    if len(things) > len(COLOURS):
        raise UserError(f"{len(things)} lines in one figure, {len(COLOURS)} colours: plot fewer, or label seeds alike")
    return COLOURS[: len(things)]


def distinct(runs: list[Run]) -> list[Run]:
    """The runs, with the seed added to a label that several share: for figures that show each run on its own."""
    labels = [run.label for run in runs]
    return [
        run._replace(label=f"{run.label} (seed {run.args.seed})") if labels.count(run.label) > 1 else run
        for run in runs
    ]


def read_json(run: Run, names: tuple[str, ...], keys: tuple[str, ...]) -> dict:
    """The first of these files that the run has; UserError if it has none, or one that isn't whole or lacks a key."""
    advice = f"run `python benchmarks/evaluate.py {run.path}`"
    for path in (run.path / name for name in names):
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): {advice}") from error
            if not isinstance(content, dict) or not content.keys() >= set(keys):
                raise UserError(f"{path} lacks one of {', '.join(keys)}: {advice}")
            return content
    raise UserError(f"{run.path} has no {' or '.join(names)}: {advice} first")


def play(run: Run, episode: int) -> Episode:
    """Episode number `episode`, from 0, of those that evaluate() plays: the same start for every run."""
    if episode < 0:
        raise UserError(f"--episode is {episode}; it must be 0 or more")
    with run.script.make_env(run.args.env_id) as env:
        return rollout(run, env, episode + 1).episodes[episode]


def save(figure, output: Path) -> None:
    """Write the figure; UserError for an extension that matplotlib doesn't know, or a folder that isn't there."""
    try:
        figure.savefig(output, dpi=200)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --output {output}: {error}") from error
    finally:
        plt.close(figure)
    print(f"wrote {output}")


# --------------------------------------------------------------------------------------------------------- field


def dominant_pair(critic, observation, action) -> tuple[int, int]:
    """The (state, action) dimensions with the largest |d2Q/dsda| at one point: s (d_s,), a (d_a,)."""
    hessian = mixed_hessians(critic, observation[None], action[None])[0]  # (d_a, d_s)
    action_dim, state_dim = divmod(int(hessian.abs().argmax()), hessian.shape[1])
    return state_dim, action_dim


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
    agents, surfaces = distinct(open_runs(runs, labels)), []
    for run in agents:
        played = play(run, episode)
        point = [torch.from_numpy(part[len(part) // 2]).double() for part in played[:2]]
        if not surfaces:
            pair = dominant_pair(run.critic, *point)
        surfaces.append(field_surface(run.critic, *point, pair))

    columns = min(len(agents), 2)
    rows = math.ceil(len(agents) / columns)
    figure = plt.figure(figsize=(WIDTH, 0.4 + 3.8 * rows), layout="none")
    s, a = np.meshgrid(np.linspace(-STATE_SWEEP, STATE_SWEEP, GRID), np.linspace(-ACTION_SWEEP, ACTION_SWEEP, GRID))
    colours = matplotlib.colors.Normalize(0, np.quantile(surfaces[0], 0.99))
    for i, (run, surface) in enumerate(zip(agents, surfaces, strict=True)):
        axis = figure.add_subplot(rows, columns, i + 1, projection="3d")
        axis.plot_surface(
            s, a, surface, cmap="viridis", norm=colours, rcount=GRID, ccount=GRID, antialiased=False, rasterized=True
        )
        axis.set_title(f"{run.label}\nmean {surface.mean():.3g}, max {surface.max():.3g}", y=1.0)
        axis.set_xlabel(f"$\\Delta s_{{{pair[0]}}}$ (observation units)")
        axis.set_ylabel(f"$\\Delta a_{{{pair[1]}}}$ (normalised)")
        axis.set_zlim(0, max(map(np.max, surfaces)))
        axis.set(xticks=(-STATE_SWEEP, 0, STATE_SWEEP), yticks=(-ACTION_SWEEP, 0, ACTION_SWEEP))
        axis.set_box_aspect(None, zoom=0.98)
    figure.subplots_adjust(left=0.01, right=0.86, bottom=0.06, top=1 - 0.65 / figure.get_figheight(), wspace=0.05)
    figure.colorbar(
        matplotlib.cm.ScalarMappable(colours, "viridis"),
        cax=figure.add_axes((0.9, 0.2, 0.018, 0.55)),
        extend="max",
        label=r"height and colour: $\|\nabla^2_{sa} Q_1\|_2$",
    )
    figure.suptitle(
        f"{agents[0].args.env_id}: how fast the action gradient of $Q$ turns with the state, around $(s, \\pi(s))$",
        y=0.98,
    )
    save(figure, output)


# ------------------------------------------------------------------------------------------------------- actions


def choose_action(episode: Episode, dimension: int | None) -> int:
    """The action to trace: `dimension`, or by default the one that changes most from step to step in this episode."""
    changes = np.abs(np.diff(episode.actions, axis=0)).mean(axis=0)
    if dimension is None:
        return int(changes.argmax())
    if not 0 <= dimension < len(changes):
        raise UserError(f"--dimension is {dimension}; this env's actions are 0 to {len(changes) - 1}")
    return dimension


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
    agents = distinct(open_runs(runs, labels))
    colours = colours_of(agents)
    if steps < 1:
        raise UserError(f"--steps is {steps}; it must be at least 1")
    episodes = [play(run, episode) for run in agents]
    dimension = choose_action(episodes[0], dimension)

    figure = plt.figure(figsize=(WIDTH, 1 + 1.6 * max(len(agents), 2)))
    grid = figure.add_gridspec(len(agents), 2, width_ratios=(1.7, 1))
    spectrum_axis, trace_axis = figure.add_subplot(grid[:, 1]), None
    for i, (run, played) in enumerate(zip(agents, episodes, strict=True)):
        trace_axis = figure.add_subplot(grid[i, 0], sharex=trace_axis, sharey=trace_axis)
        trace_axis.plot(played.env_actions[:steps, dimension], color=colours[i], linewidth=1.2)
        sm = run.script.smoothness(played.env_actions)
        trace_axis.set_title(f"{run.label}: return {played.rewards.sum():,.1f}, sm {sm:.3f}", loc="left")
        trace_axis.tick_params(labelbottom=i == len(agents) - 1)
        trace_axis.set_ylabel(f"action {dimension} (env units)")
        frequencies, amplitudes = spectrum(played.env_actions)
        spectrum_axis.plot(frequencies, amplitudes, color=colours[i], alpha=0.25, linewidth=0.8)
        window = max(1, len(played.env_actions) // 100)  # 0.01 cycles per step
        smooth = (np.convolve(part, np.ones(window) / window, "valid") for part in (frequencies, amplitudes))
        spectrum_axis.plot(*smooth, color=colours[i], label=run.label)
    trace_axis.set_xlabel("step")
    spectrum_axis.set_title("amplitude spectrum", loc="left")
    spectrum_axis.set(yscale="log", xlim=(0, 0.5), xlabel="frequency (cycles per step)")
    spectrum_axis.set_ylabel("amplitude, mean over actions (env units)")
    spectrum_axis.legend()
    figure.suptitle(f"{agents[0].args.env_id}: one episode of the deterministic policy")
    save(figure, output)


# -------------------------------------------------------------------------------------------------------- curves


def read_curve(run: Run, tag: str) -> dict[int, float]:
    """Step -> value of one tag of the run's TensorBoard files; UserError if it isn't there."""
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()
    has = sorted(events.Tags()["scalars"])
    if tag not in has:
        raise UserError(f"{run.path} has no {tag} in its TensorBoard files: it has {', '.join(has)}")
    return {event.step: event.value for event in events.Scalars(tag)}


def mean_and_band(axis, x, values: np.ndarray, colour: str, label: str) -> None:
    """Draw the mean of values (seeds, len(x)) as a line, and +-1 standard deviation over the seeds as a band."""
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axis.plot(
        x,
        mean,
        color=colour,
        label=f"{label} ({len(values)} seed{'s'[: len(values) > 1]})",
        marker="." if len(x) < 50 else None,
    )
    if len(values) > 1:
        axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)


Tags = Annotated[tuple[str, ...], tyro.conf.arg(help="TensorBoard curves, such as losses/lambda_curv, a panel each")]
EVALUATIONS = {"eval/return": RETURN, "eval/smoothness": SMOOTHNESS, "eval/oscillation": OSCILLATION}


def curves(
    runs: Paths,
    /,
    labels: Labels = (),
    output: Output = Path("curves.png"),
    tags: Tags = ("eval/return", "eval/smoothness"),
) -> None:
    """Learning curves, of the evaluations or else of --tags: mean over the seeds of each label, band of +-1 std."""
    evaluations = set(tags) <= set(EVALUATIONS)
    agents = open_runs(runs, labels, one_env=evaluations)  # returns and sm of two envs can't be compared
    groups = group(agents)
    colours = colours_of(groups)
    figure, axes = plt.subplots(1, len(tags), figsize=(WIDTH, 3.6), squeeze=False)
    for axis, tag in zip(axes[0], tags, strict=True):
        for colour, (label, seeds) in zip(colours, groups.items(), strict=True):
            read = [read_curve(run, tag) for run in seeds]
            steps = sorted(set.intersection(*map(set, read)))
            if not steps:
                raise UserError(f"the runs labelled {label} have no common step in {tag}: give them --labels")
            mean_and_band(axis, steps, np.array([[curve[step] for step in steps] for curve in read]), colour, label)
        axis.set(xlabel="environment steps", ylabel=EVALUATIONS.get(tag, tag))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if tag in ("eval/smoothness", "eval/oscillation"):
            axis.set_ylim(bottom=0)
        elif tag == "losses/lambda_curv":
            axis.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    what = "evaluation of the deterministic policy during training" if evaluations else "training"
    envs = dict.fromkeys(agent.args.env_id.rpartition(":")[2] for agent in agents)
    figure.suptitle(f"{', '.join(envs)}: {what}")
    save(figure, output)


# ---------------------------------------------------------------------------------------- robustness and tradeoff


def robustness(runs: Paths, /, labels: Labels = (), output: Output = Path("robustness.png")) -> None:
    """Return and sm against noise on what the policy sees, from evaluation.json: mean and band over the seeds."""
    agents = open_runs(runs, labels)
    groups = group(agents)
    colours = colours_of(groups)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    for colour, (label, seeds) in zip(colours, groups.items(), strict=True):
        evaluations = [read_json(run, ("evaluation.json",), (*MEANS, "robustness")) for run in seeds]
        for axis, key, name in zip(axes, MEANS, (RETURN, SMOOTHNESS), strict=True):
            read = [{0.0: e[key]} | {float(k): v[key] for k, v in e["robustness"].items()} for e in evaluations]
            levels = sorted(set.intersection(*map(set, read)))
            mean_and_band(axis, levels, np.array([[row[level] for level in levels] for row in read]), colour, label)
            axis.set(xlabel="observation noise ±$k$ (standard deviations)", ylabel=name)
            axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axes[1].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{agents[0].args.env_id}: the policy under observation noise")
    save(figure, output)


def tradeoff(runs: Paths, /, labels: Labels = (), output: Output = Path("tradeoff.png")) -> None:
    """Return against sm, one point per run, from evaluation.json or else the run's summary.json."""
    agents = open_runs(runs, labels)
    groups = group(agents)
    figure, axis = plt.subplots(figsize=(WIDTH * 0.67, 4.2))
    axis.margins(0.15)
    for colour, marker, (label, seeds) in zip(colours_of(groups), MARKERS, groups.items(), strict=False):
        rows = [read_json(run, ("evaluation.json", "summary.json"), MEANS) for run in seeds]
        returns, sm = ([row[key] for row in rows] for key in MEANS)
        axis.scatter(sm, returns, s=70, color=colour, marker=marker, label=label, alpha=0.8, edgecolor="white")
    axis.set(xlabel=SMOOTHNESS, ylabel=RETURN)
    axis.set_xlim(left=0)
    axis.legend()
    axis.set_title(f"{agents[0].args.env_id}: return against smoothness")
    save(figure, output)


def main(arguments: list[str] | None = None) -> None:
    """The command line: `arguments`, or the program's own."""
    commands = {function.__name__: function for function in (field, actions, curves, robustness, tradeoff)}
    with user_errors(), plt.rc_context(STYLE):
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=arguments)


if __name__ == "__main__":
    main()
