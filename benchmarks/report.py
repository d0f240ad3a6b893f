"""The paper's tables from our own runs, its numbers beside them: report.md, runs.csv and figures in --output.

    python benchmarks/report.py runs/sweep --output runs/report
    python benchmarks/report.py runs/sweep benchmarks/results/report/runs.csv --output benchmarks/results/report

An input is a sweep folder, with a cell <env>__<sac|td3>__<method>__<seed>/ for each run, or a runs.csv that an earlier
report wrote; where both have a run, the folder's counts. Finished runs are evaluated once (evaluation.json beside the
checkpoint, made again if the checkpoint is newer or --episodes differs); the others are listed as missing.

Statistics are over seeds, each the mean of its episodes: IQM and 95% stratified bootstrap intervals as in Agarwal et
al. 2021, by scipy: rliable 1.2.0 fails at import in a fresh install (its arch 7.2 does not know pandas 3).
"""

import csv
import itertools
import json
import math
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib import pyplot as plt
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks import plot
from benchmarks.evaluate import NOISE_LEVELS, Run, UserError, evaluate_run, flat, load_run, user_errors, write_csv

PAPER = Path(__file__).parent / "paper"
PAPER_STEPS = {"Pendulum": 100_000, "LunarLander": 500_000, "Reacher": 500_000}  # the others: a million
METHODS = ("base", "untuned", "pave", "auto", "caps")  # then ablation-000 to ablation-111: MPR, VFC, Curv on or off
LOOKS = ("base", "pave", "untuned", "caps", "auto")  # in the order of plot.py's colours and markers
RESULTS = {"return": ("return_mean", "return_std", ">"), "sm": ("smoothness_mean", "smoothness_std", "<")}  # better
LABELS = dict(zip(plot.MEANS, (plot.RETURN, plot.SMOOTHNESS), strict=True))
GEOMETRY = {
    "M_sup": "m_sup",
    "\u03bc": "mu_inf",
    "NegDef": "neg_def",
    "cosine": "cosine_mean",
    "flip rate": "flip_rate",
    "largest ‖∂π/∂s‖": "actor_jacobian_sup",
    "bound holds": "bound_holds_share",
}
PAPER_GEOMETRY = {"M_sup": "m_sup", "NegDef": "neg_def", "cosine": "mean_cosine", "flip rate": "flip_rate"}
FEWEST = 3  # seeds below which no interval is shown
RESAMPLES = 10_000
NONE = "\u2013"  # a dash

TEXTS, INTEGERS = (
    ("algorithm", "method", "env_id", "machine", "torch", "commit", "command"),
    ("seed", "steps", "episodes"),
)
KEY = ("algorithm", "method", "env_id", "seed", "steps")
NEEDED = (*KEY, "return_mean", "smoothness_mean")  # what every run has; the rest may be unknown
EVALUATION = ("episodes", "return_mean", "return_std", "smoothness_mean", "smoothness_std", "oscillation", "m_sup")
EVALUATION += ("m_mean", "mu_inf", "mu_defined_share", "trace_abs_inf", "neg_def", "cosine_mean", "flip_rate")
EVALUATION += ("actor_jacobian_sup", "bound_sup", "bound_holds_share")
EVALUATION += tuple(f"{name}@{level}" for level in NOISE_LEVELS for name in ("return_mean", "smoothness_mean"))
COLUMNS = (*KEY, *EVALUATION, "steps_per_second", "wall_seconds", *TEXTS[3:])

NOTES = """A run counts as one number, the mean of its {episodes} evaluation episodes (deterministic policy, the
same starts for every run).

- **mean ± std**: the standard deviation (n - 1) is over the seeds.
- **std over episodes**: over all episodes of all seeds. The paper's ± seems to be this one: on Pendulum its ± of the
  return is 74 to 81 for every method, as large as the spread from start to start.
- **IQM**: the mean without the lowest and the highest quarter of the seeds (below 4 seeds: the mean), with a 95%
  stratified bootstrap interval ({resamples:,} resamples of the seeds, percentiles).
- **P(> base)**, **P(< base)**: how probably a seed of the method is better than a seed of base (Mann-Whitney's U /
  n\u00b2), with its bootstrap interval; [1, 1] says that every seed here is better, not that every one would be.
- Below {fewest} seeds neither an interval nor P is shown. "3 of 5": fewer seeds than the fullest cell of the table
  has or waits for; \u2013: not there.
- sm (lower is smoother) and oscillation are in the env's action units. The paper's numbers: `benchmarks/paper/`."""


@dataclass
class Args:
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """sweep folders, and runs.csv files of earlier reports"""
    output: Path = Path("report")
    """folder for report.md, runs.csv and the figures; made if it isn't there"""
    episodes: int = 10
    """episodes in the evaluation of a run, and again at each noise level"""


# ---------------------------------------------------------------------------------------------------------- runs


def method_order(method: str) -> tuple:
    return (METHODS.index(method) if method in METHODS else len(METHODS)), method


def order(row: dict) -> tuple:
    return row["env_id"], row["steps"] or 0, row["algorithm"], method_order(row["method"]), row["seed"]


def clean(row: dict, path: Path) -> dict:
    """The row with COLUMNS alone, in their types, and its path; ValueError if it is not a run's.

    Numbers get 6 significant digits: a report from a runs.csv equals the one from the folders, and its diffs are small.
    """
    cleaned = {"path": path}
    for name in COLUMNS:
        value = row.get(name)
        if value is None or value == "":
            if name in NEEDED:
                raise ValueError(f"{name} is empty")
            cleaned[name] = None
        elif name in TEXTS:
            cleaned[name] = str(value)
        else:
            cleaned[name] = int(value) if name in INTEGERS else float(f"{float(value):.6g}")
            if not math.isfinite(cleaned[name]):
                raise ValueError(f"{name} is {value}")
    return cleaned


def read_csv(path: Path) -> list[dict]:
    """The rows of a runs.csv; UserError says which line is wrong."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            lacking = [name for name in NEEDED if name not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"{path} is no runs.csv of a report: it lacks {', '.join(lacking)}")
            return [clean(row, path) for row in reader]
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def evaluation(run: Run, episodes: int) -> dict:
    """The evaluation in flat columns: evaluation.json if it is of this checkpoint and number of episodes, else anew."""
    file = run.path / "evaluation.json"
    try:
        row = flat(json.loads(file.read_text()))
        newer = file.stat().st_mtime_ns >= (run.path / "checkpoint.pt").stat().st_mtime_ns
        if newer and row["episodes"] == episodes and row.keys() >= set(EVALUATION):
            return row
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none, or a damaged one, or without "episodes": evaluate.py doesn't write that
    result = {"episodes": episodes} | evaluate_run(run, episodes)
    write_csv(run.path / "evaluation.csv", [run], [result])
    file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return flat(result)


def read_cell(cell: dict, episodes: int) -> dict:
    """The row of the newest finished run in a cell; UserError says why there is none."""
    reason = "not started"
    for folder in sorted((path for path in cell["path"].iterdir() if path.is_dir()), reverse=True):
        if not (folder / "checkpoint.pt").is_file():
            reason = "no checkpoint yet"
            continue
        run = load_run(folder)
        summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else {}
        if run.step >= run.args.total_timesteps and summary.get("steps") == run.step:
            facts = {"env_id": run.args.env_id, "steps": run.step, **evaluation(run, episodes)}
            return clean({"steps_per_second": summary.get("steps_per_second")} | cell | facts, cell["path"])
        cell |= {"env_id": run.args.env_id, "steps": run.args.total_timesteps}
        reason = f"at step {run.step:,} of {run.args.total_timesteps:,}, not finished"
    raise UserError(reason)


def read_sweep(folder: Path, episodes: int) -> tuple[list[dict], list[dict]]:
    """The rows of a sweep's finished runs, and its other cells, each with the `reason`; their steps may be None."""
    rows, missing = [], []
    matches = [re.fullmatch(r"(.+)__(sac|td3)__([^_]+)__(\d+)", path.name) for path in sorted(folder.iterdir())]
    if not any(matches):
        raise UserError(f"{folder} is no sweep: it has no folder <env>__<sac|td3>__<method>__<seed>")
    for match in tqdm(list(filter(None, matches)), unit="run", disable=None, leave=False):
        cell = dict(zip(("env_id", "algorithm", "method", "seed"), match.groups(), strict=True), steps=None)
        cell |= {"seed": int(cell["seed"]), "path": folder / match[0]}
        try:
            if (cell["path"] / "cell.json").is_file():
                facts = json.loads((cell["path"] / "cell.json").read_text())
                cell |= {name: value for name, value in facts.items() if value is not None}
            rows.append(read_cell(cell, episodes))
        except (UserError, ValueError, KeyError, AttributeError) as error:  # what isn't whole doesn't count
            missing.append(cell | {"reason": " ".join(f"{error}".split()) or repr(error)})
    return rows, missing


def read_inputs(inputs, episodes: int) -> tuple[list[dict], list[dict]]:
    """Every run once, and the missing, in order; UserError where two sweeps or two CSVs differ on a run."""
    rows, missing = {}, []
    for path in sorted(inputs, key=lambda path: path.is_dir()):  # folders last: they count
        found, unfinished = read_sweep(path, episodes) if path.is_dir() else (read_csv(path), [])
        missing += unfinished
        for row in found:
            key = tuple(row[name] for name in KEY)
            old = rows.get(key, row)
            if old["path"].is_dir() == path.is_dir() and any(old[name] != row[name] for name in COLUMNS):
                raise UserError(
                    f"{old['path']} and {row['path']} differ on {' '.join(map(str, key))}: give one of them"
                )
            rows[key] = row
    if not rows:
        example = f" (the first: {missing[0]['path'].name}, {missing[0]['reason']})" if missing else ""
        raise UserError(f"no finished run in {', '.join(map(str, inputs)) or 'no input'}{example}")
    missing = [cell for cell in missing if tuple(cell[name] for name in KEY) not in rows]
    return sorted(rows.values(), key=order), sorted(missing, key=order)


# ---------------------------------------------------------------------------------------------------- statistics


def iqm(values, axis: int = -1):
    """Interquartile mean: without the lowest and the highest quarter (rounded down) of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_of_all(*strata, axis: int = -1):
    return iqm(np.concatenate(strata, axis=axis), axis=axis)


def probability_of_improvement(x, y, axis: int = -1):
    """P(X > Y) for a draw from each, ties counting half: Mann-Whitney's U / (len(x) len(y))."""
    x, y = np.expand_dims(np.moveaxis(x, axis, -1), -1), np.expand_dims(np.moveaxis(y, axis, -1), -2)
    return ((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1))


def stratified_bootstrap(strata, statistic=iqm_of_all) -> tuple[float, float] | None:
    """95% percentile interval of statistic(*strata), each stratum resampled by itself; None where one is too small.

    strata: one array of seeds an env, or the two groups that are compared; statistic takes `axis`
    """
    if min(map(len, strata)) < FEWEST:
        return None
    settings = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": True, "axis": -1}
    result = stats.bootstrap(strata, statistic, rng=np.random.default_rng(0), **settings)
    return tuple(map(float, result.confidence_interval))


# -------------------------------------------------------------------------------------------------------- tables


def number(value: float, like: float | None = None) -> str:
    """With as many decimals as show 4 digits of `like` (the value itself), at most 3; small ones in 3 digits."""
    size = abs(value if like is None else like)
    if 0 < size < 0.01:
        return f"{value:.3g}"
    return f"{value:.{min(3, max(0, 3 - math.floor(math.log10(size))) if size else 3)}f}"


def spread(values, most: int | None = None) -> str:
    """Mean ± standard deviation; says where fewer than `most` of the values are defined."""
    if not len(values):
        return NONE
    mean = np.mean(values)
    deviation = f" ± {number(np.std(values, ddof=1), mean)}" if len(values) > 1 else ""
    return number(mean) + deviation + (f" ({len(values)} of {most})" if most and len(values) < most else "")


def estimate(strata, statistic=iqm_of_all) -> str:
    """The statistic with its interval."""
    if not all(map(len, strata)):
        return NONE
    value, interval = statistic(*strata), stratified_bootstrap(strata, statistic)
    return number(value) + (f" [{number(interval[0], value)}, {number(interval[1], value)}]" if interval else "")


def column(rows: list[dict], name: str) -> np.ndarray:
    """The values of the rows that have one."""
    return np.array([row[name] for row in rows if row[name] is not None], dtype=float)


def paper(name: str) -> dict[tuple, dict]:
    """One of the paper's tables by (algorithm, method, env without version)."""
    with open(PAPER / f"paper_{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["method"] = row.get("method") or "ablation-{mpr}{vfc}{curv}".format(**row)
    return {(row["algo"], row["method"], row["env"]): row for row in rows}


def mean_of(name: str) -> Callable:
    """A table's column: mean ± std of this measure."""
    return lambda cell, rows: spread(column(rows, name), len(rows))


def iqm_of(name: str) -> Callable:
    """A table's column: IQM of this measure, with its interval."""
    return lambda cell, rows: estimate([column(rows, name)])


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


class Group:
    """The runs on one env for one number of steps; a cell is (algorithm, method)."""

    def __init__(self, env_id: str, steps: int, rows: list[dict], missing: list[dict]):
        self.env = re.sub(r"(Continuous)?(-v\d+)?$", "", env_id)  # as in the paper's tables
        self.title, self.file = f"{env_id}, {steps:,} steps", re.sub(r"[^\w-]+", "-", f"{env_id}_{steps}")
        self.planned = Counter((row["algorithm"], row["method"]) for row in rows + missing)
        self.runs = {cell: [row for row in rows if (row["algorithm"], row["method"]) == cell] for cell in self.planned}

    def cells(self, ablation: bool = False) -> list[tuple[str, str]]:
        """Every algorithm with every method that is here (or with all of the ablation), also where there is no run."""
        planned = [cell for cell in self.planned if cell[1].startswith("ablation-") == ablation]
        methods = {f"ablation-{n:03b}" for n in range(8)} if ablation else {method for _, method in planned}
        algorithms = sorted({algorithm for algorithm, _ in planned})
        return [(algorithm, method) for algorithm in algorithms for method in sorted(methods, key=method_order)]

    def rows(self, cell) -> list[dict]:
        """The runs of a cell; base and pave are the two ends of the ablation where these weren't run by themselves."""
        end = {"ablation-000": "base", "ablation-111": "pave"}.get(cell[1])
        return self.runs.get(cell) or self.runs.get((cell[0], end), [])

    def methods(self, algorithm: str) -> list[tuple[str, list[dict]]]:
        """The methods with runs, without the ablation's."""
        return [(cell[1], self.rows(cell)) for cell in self.cells() if cell[0] == algorithm and self.rows(cell)]

    def table(self, columns: dict[str, Callable], ablation: bool = False) -> str:
        """A line a cell: algorithm, method, seeds, and what each column's function makes of (cell, rows)."""
        cells, lines = self.cells(ablation), []
        most = max(self.planned[cell] for cell in cells)
        for cell in cells:
            rows = self.rows(cell)
            method = cell[1] + (f" (= {rows[0]['method']})" if rows and rows[0]["method"] != cell[1] else "")
            seeds = f"{len(rows)} of {most}" if len(rows) < most else f"{len(rows)}"
            lines.append([cell[0].upper(), method, seeds, *(text(cell, rows) for text in columns.values())])
        return markdown(["algorithm", "method", "seeds", *columns], lines)

    def quote(self, heading: str, name: str, *columns: str) -> dict[str, Callable]:
        """A column of the paper's numbers; none where the paper's table lacks the env."""
        published = {key[:2]: row for key, row in paper(name).items() if key[2] == self.env}

        def text(cell, rows):
            row = published.get(cell)
            return " ± ".join(row[column] for column in columns) if row else NONE

        return {heading: text} if published else {}

    def improvement(self, mean: str, better: str, base: str = "base") -> Callable:
        """A column: how probably a seed is better than one of base in this measure."""

        def text(cell, rows):
            pair = [column(rows, mean), column(self.rows((cell[0], base)), mean)]
            if cell[1] == base or min(map(len, pair)) < FEWEST:
                return NONE
            return estimate(pair if better == ">" else pair[::-1], probability_of_improvement)

        return text

    def short(self) -> str:
        """The table that the README shows."""
        columns = {}
        for name, (mean, *_) in RESULTS.items():
            columns |= {f"{name}: IQM [95%]": iqm_of(mean)} | self.quote(f"paper: {name}", "tables", f"{name}_mean")
        mean, _, better = RESULTS["sm"]
        columns["P(smoother than base)"] = self.improvement(mean, better)
        columns["NegDef"] = mean_of(GEOMETRY["NegDef"])
        return self.table(columns)

    def results(self, name: str, ablation: bool = False) -> str:
        """Return or sm, ours beside the paper's."""
        mean, deviation, better = RESULTS[name]

        def pooled(cell, rows):
            means, inside = column(rows, mean), column(rows, deviation)
            if not len(inside) or len(inside) < len(means):
                return NONE
            return number(math.sqrt(np.mean(inside**2) + np.var(means)), np.mean(means))

        columns = {f"{name}: mean ± std": mean_of(mean), "std over episodes": pooled}
        columns |= {"IQM [95% interval]": iqm_of(mean)}
        columns |= {f"P({better} base)": self.improvement(mean, better, "ablation-000" if ablation else "base")}
        source = ("ablation", f"{name}_mean") if ablation else ("tables", f"{name}_mean", f"{name}_std")
        columns |= self.quote(f"paper, {PAPER_STEPS.get(self.env, 1_000_000):,} steps", *source)
        return self.table(columns, ablation)


def aggregate(groups: list[Group]) -> list[str]:
    """sm relative to base over the envs that have enough seeds of both; empty if no method has several envs."""
    groups = {group.env: group for group in groups}.values()  # of several numbers of steps the largest
    lines = []
    cells = {cell for group in groups for cell in group.runs}
    for algorithm, method in sorted(cells, key=lambda cell: (cell[0], method_order(cell[1]))):
        ratios = {}
        for group in groups:
            ours, base = (column(group.rows((algorithm, name)), "smoothness_mean") for name in (method, "base"))
            if min(len(ours), len(base)) >= FEWEST:
                ratios[group.env] = ours / base.mean()
        if len(ratios) > 1:
            seeds = ", ".join(f"{env} ({len(values)})" for env, values in ratios.items())
            lines.append([algorithm.upper(), method, seeds, estimate(list(ratios.values()))])
    note = (
        "Each run's sm over the mean sm of base on its env with its algorithm; resampled env by env, base's mean fixed."
    )
    header = ["algorithm", "method", "envs (seeds)", "IQM [95% interval]"]
    return ["## sm relative to base, over the envs", note, markdown(header, lines)] if lines else []


def origins(rows: list[dict]) -> str:
    """Each command, up to seed and folders, and the runs that it made."""
    made = defaultdict(lambda: defaultdict(list))
    for row in rows:
        command = re.sub(r" --(output-dir|resume)[ =]('[^']*'|\S+)", "", row["command"] or "command not recorded")
        command = re.sub(r"(--seed[ =])\d+", r"\1SEED", command)
        where = ", ".join(f"{name} {row[name] or 'not recorded'}" for name in ("machine", "torch", "commit"))
        cell = f"{row['env_id']}, {row['steps']:,} steps, {row['algorithm'].upper()} {row['method']}, seeds"
        made[f"`{command}` ({where})"][cell].append(str(row["seed"]))
    told = {k: "; ".join(f"{cell} {' '.join(seeds)}" for cell, seeds in cells.items()) for k, cells in made.items()}
    return "\n".join(f"- {origin}: {cells}" for origin, cells in told.items())


# ------------------------------------------------------------------------------------------------------- figures


def look(method: str) -> dict:
    styles = dict(zip(LOOKS, zip(plot.COLOURS, plot.MARKERS, strict=True), strict=False))
    return dict(zip(("color", "marker"), styles.get(method, ("#777777", "o")), strict=True))


def draw_tradeoff(axis, group: Group, algorithm: str) -> None:
    """Return against sm: small dots are seeds, a large marker is their IQM with its intervals."""
    for method, rows in group.methods(algorithm):
        measured = [column(rows, name) for name in ("smoothness_mean", "return_mean")]
        axis.scatter(*measured, s=14, alpha=0.5, linewidth=0, **look(method))
        intervals = [stratified_bootstrap([values]) or (iqm(values), iqm(values)) for values in measured]
        errors = [np.abs(np.subtract(both, iqm(v)))[:, None] for v, both in zip(measured, intervals, strict=True)]
        style = look(method) | {"markersize": 9, "markeredgecolor": "white", "linestyle": "none"}
        axis.errorbar(*map(iqm, measured), errors[1], errors[0], label=method, **style)
    axis.margins(0.12)
    axis.set(xlabel=plot.SMOOTHNESS, ylabel=plot.RETURN)
    if axis.collections:
        axis.set_xlim(0, 1.1 * axis.dataLim.xmax)


def draw_noise(axis, group: Group, algorithm: str, mean: str) -> None:
    """Return or sm against noise on what the policy sees."""
    levels = (0, *NOISE_LEVELS)
    names = (mean, *(f"{mean}@{level}" for level in NOISE_LEVELS))
    for method, rows in group.methods(algorithm):
        curves = [curve for curve in ([row[name] for name in names] for row in rows) if None not in curve]
        if curves:
            plot.mean_and_band(axis, levels, np.array(curves), look(method)["color"], method)
            axis.lines[-1].set_label(method)  # how many seeds, which differs between the panels, is in the tables
    axis.set(xlabel="observation noise ±$k$ (standard deviations)", ylabel=LABELS[mean])
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    if mean == "smoothness_mean":
        axis.set_ylim(bottom=0)


def save(figure, path: Path, text: str) -> str:
    """Write the figure, and return the Markdown that shows it."""
    plot.save(figure, path)
    return f"![{text}]({path.name})"


def panels(group: Group, title: str, path: Path, *draws: Callable) -> str:
    """A panel for each algorithm and each of `draws`, a colour for each method; no figure with nothing in it."""
    algorithms = sorted({algorithm for algorithm, _ in group.cells()})
    columns = len(draws) if len(draws) > 1 else len(algorithms)
    rows = len(algorithms) * len(draws) // columns
    size = plot.WIDTH if columns > 1 else plot.WIDTH * 0.67, 0.8 + 3.6 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    handles = {}
    for axis, (algorithm, draw) in zip(axes.flat, itertools.product(algorithms, draws), strict=True):
        draw(axis, group, algorithm)
        axis.set_title(algorithm.upper(), loc="left")
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not handles:
        plt.close(figure)
        return NONE
    handles = {label: handles[label] for label in sorted(handles, key=method_order)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{group.title}\n{title}")  # one line is too long for a single panel
    return save(figure, path, title)


def ablation(group: Group, path: Path) -> str:
    """Return and sm of the eight combinations: dots are seeds, lines and bars their IQM."""
    algorithms = sorted({algorithm for algorithm, _ in group.cells(ablation=True)})
    figure, axes = plt.subplots(len(algorithms), 2, figsize=(plot.WIDTH, 3.8 * len(algorithms)), squeeze=False)
    for axis, (algorithm, (mean, label)) in zip(axes.flat, itertools.product(algorithms, LABELS.items()), strict=True):
        for x in range(8):
            values = column(group.rows((algorithm, f"ablation-{x:03b}")), mean)
            if len(values):
                bottom = 0 if mean == "smoothness_mean" else iqm(values)  # a return has no natural zero
                colour = look({0: "base", 7: "pave"}.get(x, ""))["color"]
                axis.bar(x, iqm(values) - bottom, 0.7, bottom, color=colour, edgecolor=colour, linewidth=2)
                axis.scatter([x] * len(values), values, s=14, color="black", zorder=3)
        axis.set_title(algorithm.upper(), loc="left")
        axis.set(ylabel=label, xlim=(-0.6, 7.6))
        axis.set_xticks(range(8), ["none", "Curv", "VFC", "VFC\nCurv", "MPR", "MPR\nCurv", "MPR\nVFC", "all"])
        axis.grid(axis="x", visible=False)
    figure.suptitle(f"{group.title}: the three losses on and off (IQM; dots: seeds)")
    return save(figure, path, "the three losses on and off")


# -------------------------------------------------------------------------------------------------------- report


def details(group: Group, ablation: bool = False) -> list[str]:
    """Oscillation and the critic's geometry, then return and sm under noise."""
    geometry = {heading: mean_of(name) for heading, name in {"oscillation": "oscillation", **GEOMETRY}.items()}
    if not ablation:
        for heading, name in PAPER_GEOMETRY.items():
            geometry |= group.quote(f"paper: {heading}", "geometry", name)
    parts = ["### Oscillation and the critic's geometry", group.table(geometry, ablation)]
    parts += ["### Under observation noise of ±k standard deviations"]
    for name, (mean, *_) in RESULTS.items():
        levels = {f"{name}, k = {level}": mean_of(f"{mean}@{level}") for level in NOISE_LEVELS}
        parts += [group.table({f"{name}, k = 0": mean_of(mean)} | levels, ablation)]
    return parts


def section(group: Group, folder: Path) -> list[str]:
    """All tables and figures of a group."""
    parts, path = [f"## {group.title}"], str(folder / group.file)
    if group.cells():
        title = "return against smoothness (IQM, 95% intervals; dots: seeds)"
        parts += ["### In short", group.short()]
        parts += ["### Return and smoothness", group.results("return"), group.results("sm")]
        parts += [panels(group, title, Path(f"{path}_tradeoff.png"), draw_tradeoff)]
        parts += details(group)
        title = "return and sm under observation noise (mean, ± one std over seeds)"
        draws = [partial(draw_noise, mean=mean) for mean in LABELS]
        parts += [panels(group, title, Path(f"{path}_noise.png"), *draws)]
        speed = {"steps/s": mean_of("steps_per_second"), "wall seconds": mean_of("wall_seconds")}
        parts += ["### Speed", group.table(speed)]
    if group.cells(ablation=True):
        parts += ["### Ablation", "The digits stand for MPR, VFC and Curv, 1 where the loss is on."]
        parts += [group.results("return", True), group.results("sm", True)]
        parts += [ablation(group, Path(f"{path}_ablation.png")), *details(group, True)]
    return parts


def make_groups(rows: list[dict], missing: list[dict]) -> list[Group]:
    """One for each env and number of steps; an unfinished cell of unknown length goes where its env has only one."""
    lengths = sorted({(row["env_id"], row["steps"]) for row in rows + missing if row["steps"]})
    only = {env_id: steps for env_id, steps in lengths if [e for e, _ in lengths].count(env_id) == 1}
    missing = [cell | {"steps": cell["steps"] or only.get(cell["env_id"])} for cell in missing]

    def of(part, env_id, steps):
        return [row for row in part if (row["env_id"], row["steps"]) == (env_id, steps)]

    return [Group(*length, of(rows, *length), of(missing, *length)) for length in lengths]


def main(args: Args) -> None:
    if args.episodes < 1:
        raise UserError(f"--episodes is {args.episodes}; it must be at least 1")
    rows, missing = read_inputs(args.inputs, args.episodes)
    groups = make_groups(rows, missing)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with plt.rc_context(plot.STYLE):
        sections = [part for group in groups for part in section(group, args.output)]

    command = ["python", "benchmarks/report.py", *map(str, args.inputs), "--output", str(args.output)]
    command += [] if args.episodes == Args.episodes else ["--episodes", str(args.episodes)]
    episodes = " or ".join(map(str, sorted({row["episodes"] for row in rows} - {None}))) or "?"
    parts = ["# Our runs beside the paper's numbers", f"Made by `{shlex.join(command)}` from [these runs](runs.csv)."]
    parts += [NOTES.format(episodes=episodes, resamples=RESAMPLES, fewest=FEWEST)]
    parts += sections + aggregate(groups)
    parts += ["## How the runs were made", origins(rows)]
    parts += ["## Missing", "\n".join(f"- {cell['path'].name}: {cell['reason']}" for cell in missing) or "Nothing."]
    (args.output / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.output / 'report.md'}: {len(rows)} runs, {len(missing)} missing")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
