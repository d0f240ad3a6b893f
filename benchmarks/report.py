"""The paper's tables from our own runs, its numbers beside them: report.md, runs.csv and figures in --output.

    python benchmarks/report.py benchmarks/results/report/runs.csv --output benchmarks/results/report
    python benchmarks/report.py OLD/runs.csv --runs runs/sweep --output runs/report

It reads runs.csv files of earlier reports, and with --runs the cells <env>__<sac|td3>__<method>__<seed>/ of a sweep,
each run with the evaluation.json that evaluate.py wrote; where both have a run, the sweep's counts. What has no result
stays in runs.csv, with the reason. The report is made from the runs.csv that it writes, and from nothing else.
"""

import itertools
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib import pyplot as plt
from scipy import stats

if __package__ in (None, ""):  # as a plain path, Python has benchmarks/ on its path but not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import plot
from benchmarks.common import UserError, load_run, user_errors
from benchmarks.evaluate import flat

ROOT = Path(__file__).resolve().parents[1]
KEY = ["algorithm", "method", "env_id", "seed", "steps"]
CELL = ["env_id", "steps", "algorithm", "method"]  # whose rows are seeds of one thing
MEASURES = ["return_mean", "smoothness_mean", "length_mean", "oscillation"]
CLAIMS = {"M/μ": "bound_sup", "M": "m_sup", "NegDef": "neg_def", "saturation": "saturation"}
CLAIMS |= {"return, k = 0.1": "return_mean@0.1", "sm, k = 0.1": "smoothness_mean@0.1"}
FACTS = ["steps_per_second", "wall_seconds", "machine", "torch", "commit", "command", "missing"]
TEXTS = ["algorithm", "method", "env_id", "machine", "torch", "commit", "command", "missing"]
UNEQUAL = 1.05  # median episode lengths of two methods, longer / shorter, from which on their sm isn't compared
RESAMPLES = 10_000
NONE = "\u2013"

NOTES = """A run is one number: the mean over its evaluation episodes ({episodes}; deterministic policy, the same starts
for every run). What is shown is the scatter over seeds; that of the starts stands in a line of each section.

- **Fewer than ten seeds are shown as they are: median (lowest to highest).** That is no confidence interval. From ten
  seeds on it is the interquartile mean [95 % bootstrap interval].
- **base**: the same agent with every λ 0. **untuned**: λ where the paper's search starts. **pave**: the paper's tuned
  λ. **auto**: `--autotune-curv`. **caps**: CAPS instead of PAVE.
- **sm** (lower is smoother) and oscillation, mean |a(t+1) - a(t)|, are in the env's action units. sm grows with the
  episode's length, so the length stands beside it. {none}: not recorded.
- **P(smoother)**: the share of pairs, a seed of the method and a seed of base, in which the method's sm is lower.
- **M/μ**: the theorem's bound on the policy's slope; M: the largest ‖∇²sa Q‖; NegDef: the share of visited states
  where Q is concave in the action; k = 0.1: under observation noise of 0.1 standard deviations.
- **paper**: its own numbers (`benchmarks/paper/`), at its own number of steps.
- Every other measure, one row a run, is in [runs.csv](runs.csv)."""


@dataclass
class Args:
    csv: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """runs.csv files of earlier reports"""
    runs: tuple[Path, ...] = ()
    """sweep folders, whose evaluated runs are added"""
    output: Path = Path("report")
    """folder for report.md, runs.csv and the figures; made if it isn't there"""


# ---------------------------------------------------------------------------------------------------------- runs


def read_csv(path: Path) -> pd.DataFrame:
    """A runs.csv; UserError where it is none, or a number in it isn't one."""
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if lacking := [name for name in (*KEY, "return_mean", "smoothness_mean") if name not in rows]:
        raise UserError(f"{path} is no runs.csv of a report: it lacks {', '.join(lacking)}")
    rows = rows.assign(missing=rows.get("missing"))
    numbers = [name for name in rows if name not in TEXTS]
    rows[numbers] = rows[numbers].apply(pd.to_numeric, errors="coerce")
    needed = rows[["seed", "steps", "return_mean", "smoothness_mean"]]
    bad = rows["missing"].isna() & (~np.isfinite(needed).all(axis=1) | rows[KEY].isna().any(axis=1))
    if bad.any():
        raise UserError(f"{path}, line {bad.idxmax() + 2}: a run's name, return or sm is empty or not a number")
    return rows.astype(dict.fromkeys(("seed", "steps"), "Int64"))


def read_cell(cell: Path, row: dict) -> dict:
    """The row of the newest finished run in a cell, or with the reason why there is none."""
    row |= {"missing": "not started"}
    for file in sorted(cell.glob("*/summary.json")) or sorted(cell.glob("*/*.pt")):
        try:
            run = load_run(file.parent)
            row |= {"steps": run.args.total_timesteps, "missing": f"stopped at step {run.step:,}"}
            summary = json.loads(file.read_text()) if file.suffix == ".json" else {}
            if summary.get("steps") != run.step:
                continue
            if not (evaluation := file.parent / "evaluation.json").is_file():
                row["missing"] = "not evaluated yet (benchmarks/evaluate.py)"
                continue
            facts = json.loads((cell / "cell.json").read_text()) if (cell / "cell.json").is_file() else {}
            facts = {name: facts.get(name, summary.get(name)) for name in FACTS}
            row |= facts | flat(json.loads(evaluation.read_text()))
            row |= {"algorithm": run.algorithm, "method": run.method, "seed": run.args.seed, "steps": run.step}
            row |= {"env_id": run.args.env_id, "missing": None}
        except (UserError, ValueError, KeyError, AttributeError, TypeError) as error:  # what isn't whole doesn't count
            row["missing"] = " ".join(str(error).split()) or repr(error)
    return row


def read_sweep(folder: Path) -> pd.DataFrame:
    """A row for each cell of a sweep."""
    cells = [(path, re.fullmatch(r"(.+)__(sac|td3)__([^_]+)__(\d+)", path.name)) for path in sorted(folder.iterdir())]
    names, rows = ("env_id", "algorithm", "method", "seed"), []
    for path, match in cells:
        if match:
            rows.append(read_cell(path, dict(zip(names, match.groups(), strict=True)) | {"seed": int(match[4])}))
    if not rows:
        raise UserError(f"{folder} is no sweep: it has no folder <env>__<sac|td3>__<method>__<seed>")
    rows = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows])
    return rows.astype(dict.fromkeys(("seed", "steps"), "Int64"))


def order(column: pd.Series) -> pd.Series:
    """The sort key of a column: methods in the order base, pave, ..., then the ablation's."""
    ranks = {method: f"{i}" for i, method in enumerate(plot.METHODS)}
    return column.map(lambda value: ranks.get(value, value)) if column.name == "method" else column


def read_inputs(args: Args) -> pd.DataFrame:
    """Every run once, in order; UserError where two CSVs differ on a run."""
    tables = [read_csv(path) for path in args.csv]
    rows = pd.concat(tables).drop_duplicates() if tables else pd.DataFrame(columns=[*KEY, "missing"])
    if (twice := rows.duplicated(KEY)).any():
        raise UserError(f"the CSVs differ on {' '.join(map(str, rows.loc[twice, KEY].iloc[0]))}: give one of them")
    sweeps = [read_sweep(folder) for folder in args.runs]
    gone = [sweep[sweep["missing"].notna()] for sweep in sweeps]  # a run that a CSV has isn't missing
    done = [sweep[sweep["missing"].isna()] for sweep in sweeps]
    rows = pd.concat([*gone, rows, *done]).drop_duplicates(KEY, keep="last")
    has = rows.loc[rows["missing"].isna(), KEY[:-1]].apply(tuple, axis=1)  # of unknown steps, too
    rows = rows[rows["missing"].isna() | rows["steps"].notna() | ~rows[KEY[:-1]].apply(tuple, axis=1).isin(has)]
    if "return_mean" not in rows or rows["return_mean"].isna().all():
        first = f" (the first: {rows['missing'].iloc[0]})" if len(rows) else ""
        raise UserError(f"no finished run in {', '.join(map(str, args.csv + args.runs)) or 'no input'}{first}")
    measured = [name for name in rows if name not in KEY + FACTS]
    front = ["episodes", *MEASURES]  # the length beside sm
    columns = [*KEY, *front, *(name for name in measured if name not in front), *FACTS]
    return rows.reindex(columns=columns).sort_values([*CELL, "seed"], key=order)


# ---------------------------------------------------------------------------------------------------- statistics


def iqm(values, axis: int = -1):
    """Interquartile mean: without the lowest and the highest quarter (rounded down) of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def p_lower(x, y, axis: int = -1):
    """P(X < Y) for a draw from each, ties counting half: over all pairs."""
    x, y = np.expand_dims(np.moveaxis(x, axis, -1), -1), np.expand_dims(np.moveaxis(y, axis, -1), -2)
    return ((x < y) + 0.5 * (x == y)).mean(axis=(-2, -1))


def mean_ratio(*groups, axis: int = -1):
    """method, base, method, base, ... (a pair an env) -> geometric mean over the envs of IQM / IQM: all weigh alike."""
    centres = [iqm(values, axis=axis) for values in groups]
    return np.exp(np.mean([np.log(a / b) for a, b in zip(centres[::2], centres[1::2], strict=True)], axis=0))


def interval(groups, statistic) -> tuple[float, float] | None:
    """95 % percentile bootstrap, every group resampled by itself, base as well; None where one has too few seeds."""
    if min(map(len, groups)) < plot.ENOUGH:
        return None  # of 3 seeds it would be [lowest, highest], and of 5 it is too narrow
    settings = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": True, "axis": -1}
    return tuple(stats.bootstrap(groups, statistic, rng=np.random.default_rng(0), **settings).confidence_interval)


def number(value: float) -> str:
    """4 digits, at most 3 decimals; powers of ten for what is tiny or huge."""
    if value and not 0.001 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.{min(3, max(0, 3 - int(np.floor(np.log10(abs(value) or 1)))))}f}"


def told(values) -> str:
    """What the table shows of the seeds: see NOTES."""
    values = np.asarray(values, float)[~np.isnan(np.asarray(values, float))]
    if not len(values):
        return NONE
    if found := interval([values], iqm):
        return "{} [{}, {}]".format(*map(number, (iqm(values), *found)))
    spread = f" ({number(values.min())} to {number(values.max())})" if len(values) > 1 else ""
    return number(np.median(values)) + spread


def p_told(ours, base) -> str:
    """P(lower than base) over the pairs of seeds."""
    ours, base = ours.dropna().to_numpy(), base.dropna().to_numpy()
    if not len(ours) or not len(base):
        return NONE
    found, pairs = interval([ours, base], p_lower), ours.size * base.size
    return f"{p_lower(ours, base):.2f}" + (" [{:.2f}, {:.2f}]".format(*found) if found else f" ({pairs} pairs)")


# -------------------------------------------------------------------------------------------------------- tables


def paper(env_id: str, name: str) -> dict[tuple, pd.Series]:
    """The rows of one of the paper's tables for an env: (algorithm, method) -> row."""
    rows = pd.read_csv(Path(__file__).parent / "paper" / f"paper_{name}.csv", dtype=str)
    if name == "ablation":
        rows["method"] = "ablation-" + rows["mpr"] + rows["vfc"] + rows["curv"]
    rows = rows[rows["env"] == re.sub(r"(Continuous)?(-v\d+)?$", "", env_id)]
    return {(row["algo"], row["method"]): row for _, row in rows.iterrows()}


def unequal_lengths(rows: pd.DataFrame) -> str:
    """A line where the methods' episodes are not about as long, or it isn't known; rows: of one env."""
    if (rows["missing"].isna() & rows["length_mean"].isna()).any():
        return "Episode lengths were not recorded for all: where episodes can end early, sm may not be comparable."
    for algorithm, runs in rows.groupby("algorithm"):
        lengths = runs.groupby("method")["length_mean"].median()
        if lengths.max() > UNEQUAL * lengths.min():
            told = " and ".join(f"{m} ({lengths[m]:,.0f} steps)" for m in (lengths.idxmin(), lengths.idxmax()))
            told = f"**sm isn't comparable here**: episodes differ in length, as {algorithm.upper()} {told} do. "
            return told + "Compare the oscillation, which does not grow with the length."
    return ""


def with_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """The ablation's rows; where its two ends weren't run by themselves, base and pave stand in."""
    ends = {"base": "ablation-000", "pave": "ablation-111"}
    parts = rows[rows["method"].str.startswith("ablation")]
    others = rows[rows["method"].isin(ends) & rows["algorithm"].isin(parts["algorithm"])]
    others = others.assign(method=others["method"].replace(ends))
    own = set(zip(parts["algorithm"], parts["method"], strict=True))
    others = others[[cell not in own for cell in zip(others["algorithm"], others["method"], strict=True)]]
    return pd.concat([parts, others]).sort_values([*CELL, "seed"])


def tables(rows: pd.DataFrame, base: str = "base") -> str:
    """The results of one env and number of steps, then what the claims need; base: what P compares with."""
    source = "tables" if base == "base" else "ablation"
    quoted, comparable = paper(rows["env_id"].iloc[0], source), "isn't comparable" not in unequal_lengths(rows)
    results, claims = [], []
    for (algorithm, method), seeds in rows.groupby(["algorithm", "method"], sort=False):
        done = seeds[seeds["missing"].isna()]
        plain = rows[(rows["algorithm"] == algorithm) & (rows["method"] == base) & rows["missing"].isna()]
        count = f"{len(done)} of {len(seeds)}" if len(done) < len(seeds) else f"{len(seeds)}"
        line = {"algorithm": algorithm.upper(), "method": method, "seeds": count}
        names = ("return", "sm", "episode length", "oscillation")
        result = {name: told(done[measure]) for name, measure in zip(names, MEASURES, strict=True)}
        pairs = {"P(smoother)": "smoothness_mean"} | ({} if comparable else {"P(oscillates less)": "oscillation"})
        result |= {name: NONE if method == base else p_told(done[m], plain[m]) for name, m in pairs.items()}
        if quoted:
            row = quoted.get((algorithm, method), {})
            result |= {f"paper: {name}": row.get(f"{name}_mean", NONE) for name in ("return", "sm")}
        results.append(line | result)
        claims.append(line | {name: told(done[column]) for name, column in CLAIMS.items() if column in done})
    return "\n\n".join(markdown(pd.DataFrame(part)) for part in (results, claims))


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def different_settings(rows: pd.DataFrame) -> list[str]:
    """A line for each cell whose seeds were not trained by the same command, up to seed and folders."""
    lines = []
    for (env_id, steps, algorithm, method), seeds in rows[rows["missing"].isna()].groupby(CELL, sort=False):
        commands = seeds["command"].fillna("not recorded").map(flags)
        groups = seeds.groupby(commands.map(lambda words: " ".join(words)), sort=False)["seed"]
        episodes = [f"{n:g}" for n in seeds["episodes"].unique()]
        if groups.ngroups > 1 or len(episodes) > 1:
            common, sides = set.intersection(*map(set, commands)), []
            for command, some in groups if groups.ngroups > 1 else ():
                own = " ".join(word for word in command.split(" ") if word not in common)
                sides.append(f"seeds {' '.join(map(str, some))} `{own or 'no more flags'}`")
            sides += [f"evaluated over {' or '.join(episodes)} episodes"] if len(episodes) > 1 else []
            lines.append(f"- {algorithm.upper()} {method} on {env_id}, {steps:,} steps: {'; '.join(sides)}")
    return lines


def flags(command: str) -> list[str]:
    """A training's command as its words, each flag with its value, without the seed and the folders."""
    text = re.sub(r" --(output-dir|resume|seed)[ =]('[^']*'|\S+)", "", command)
    return re.sub(r" (?!--)", "=", text).split(" ") if "--" in text else [text]


# ------------------------------------------------------------------------------------------ the summary over envs


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """sm of each run of the methods proper, of each env at its largest number of steps that has a base."""
    rows = rows[rows["missing"].isna() & rows["method"].isin(plot.METHODS)]
    rows = rows[~rows["env_id"].str.startswith("benchmarks.")]  # one env in other units counts once
    has_base = rows[rows["method"] == "base"].groupby(["algorithm", "env_id"])["steps"].max()
    largest = rows.set_index(["algorithm", "env_id"]).index.map(has_base)
    return rows[rows["steps"].to_numpy() == largest.to_numpy()]


def shared(has: dict[str, set]) -> list[tuple[list[str], list[str]]]:
    """has: env -> its methods. Every (methods, the envs that have them all) of two envs or more, widest first."""
    sets = {frozenset(methods) for methods in has.values()}
    sets |= {a & b for a, b in itertools.product(sets, sets)}
    found = [(sorted(s, key=plot.METHODS.index), [env for env in has if s <= has[env]]) for s in sets]
    found = [(methods, envs) for methods, envs in found if len(envs) > 1 and len(methods) > 1]
    return sorted(found, key=lambda pair: (-len(pair[1]), -len(pair[0]), pair[0]))


def summary(rows: pd.DataFrame) -> list[str]:
    """sm over base's: a table for each set of methods with the envs that all of them share."""
    parts = []
    for algorithm, runs in medians(rows).groupby("algorithm"):
        has = runs.groupby("env_id")["method"].agg(set).to_dict()
        odd = {env for env in has if "isn't comparable" in unequal_lengths(runs[runs["env_id"] == env])}
        for methods, envs in shared({env: methods for env, methods in has.items() if "base" in methods}):
            sm = {key: part["smoothness_mean"].to_numpy() for key, part in runs.groupby(["method", "env_id"])}
            lines = []
            for method in methods:
                pairs = [(sm[method, env], sm["base", env]) for env in envs]
                groups = list(itertools.chain(*pairs))
                found = interval(groups, mean_ratio)
                text = f"{mean_ratio(*groups):.2f}" + (" [{:.2f}, {:.2f}]".format(*found) if found else "")
                line = {"algorithm": algorithm.upper(), "method": method, "over the envs": text}
                line["P(smoother)"] = f"{np.mean([p_lower(*pair) for pair in pairs]):.2f}"
                for env, (ours, base) in zip(envs, pairs, strict=True):
                    spread = f"{ours.min() / base.max():.2f} to {ours.max() / base.min():.2f}"
                    ratio = f"{iqm(ours) / iqm(base):.2f} ({spread})"
                    line[env + " *" * (env in odd)] = ratio
                lines.append(line)
            parts.append(markdown(pd.DataFrame(lines)))
    note = (
        "sm of the method over sm of base, interquartile means of the seeds; below 1 is smoother. Each table has the "
        "envs that all of its methods share, every env weighs the same (geometric mean, mean of P). In brackets: over "
        "all pairs of a seed of the method and one of base, so base's own row shows how much base itself scatters. "
        "*: episode lengths differ, so sm isn't comparable there. Variants of an env in benchmarks/ don't count."
    )
    return ["## Summary: sm relative to base, over the envs", note, *parts] if parts else []


# ------------------------------------------------------------------------------------------- figures and sections


def ablation_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return, sm and episode length of the eight combinations of losses: dots are seeds, a bar their median."""
    names = {"000": "none", "001": "Curv", "010": "VFC", "100": "MPR", "011": "VFC\nCurv", "101": "MPR\nCurv"}
    names |= {"110": "MPR\nVFC", "111": "all"}
    measures = [m for m in MEASURES[:3] if rows[m].notna().any()]
    algorithms = sorted(rows["algorithm"].unique())
    size = plot.WIDTH, 0.6 + 3.2 * len(algorithms)
    figure, axes = plt.subplots(len(algorithms), len(measures), figsize=size, squeeze=False)
    for axis, (algorithm, measure) in zip(axes.flat, itertools.product(algorithms, measures), strict=True):
        for x, digits in enumerate(names):
            values = rows.loc[(rows["algorithm"] == algorithm) & (rows["method"] == f"ablation-{digits}"), measure]
            axis.scatter([x] * len(values), values, s=14, color="black")
            axis.hlines(values.median(), x - 0.35, x + 0.35, color=plot.COLOURS[digits == "111"], linewidth=2)
        axis.set_title(algorithm.upper(), loc="left")
        axis.set_ylabel(plot.AXES[measure])
        axis.set_xticks(range(8), names.values(), fontsize=8)
    figure.suptitle(title)
    return figure


def saturation_figure(rows: pd.DataFrame) -> plt.Figure | None:
    """Saturation of base's actions against the method's sm over base's, a mark per (env, algorithm, method)."""
    if "saturation" not in rows:
        return None
    runs = medians(rows)
    centres = runs.groupby(["algorithm", "env_id", "method"])[["saturation", "smoothness_mean"]].median()
    base = centres.xs("base", level="method").reindex(centres.index.droplevel("method")).set_axis(centres.index)
    points = pd.DataFrame({"x": base["saturation"], "y": centres["smoothness_mean"] / base["smoothness_mean"]})
    points = points.drop(index="base", level="method").dropna()
    if points.empty:
        return None
    figure, axis = plt.subplots(figsize=(plot.WIDTH * 0.67, 4.2))
    looks = plot.looks(plot.METHODS)
    for (algorithm, env_id, method), (x, y) in points.iterrows():
        colour, marker = looks[method]["color"], looks[method]["marker"]
        face = colour if algorithm == "sac" else "none"
        axis.scatter(x, y, s=50, label=method, facecolor=face, edgecolor=colour, marker=marker)
        axis.annotate(env_id.partition("-v")[0], (x, y), (5, 3), textcoords="offset points", fontsize=7)
    axis.axhline(1, color="#999999", linewidth=0.8)
    axis.set(xlabel="saturation of base's actions", ylabel="sm / base's sm\n(below 1: smoother)")
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=8)
    axis.set_title("what base saturates, and what PAVE gains (filled: SAC, open: TD3; medians)", fontsize=9)
    return figure


def starts(rows: pd.DataFrame) -> str:
    """How much a run's mean return depends on which starts its episodes have: their standard error."""
    if "return_std" not in rows or rows["return_std"].isna().all():
        return ""
    error = (rows["return_std"] / np.sqrt(rows["episodes"])).median()
    return (
        f"Other starts would move the return of a run by some ±{number(error)} (standard error over its episodes).\n\n"
    )


def section(rows: pd.DataFrame, title: str, folder: Path) -> list[str]:
    """The tables and figures of one env and number of steps."""
    parts, done = [f"## {title}", unequal_lengths(rows)], rows[rows["missing"].isna()]
    name = re.sub(r"[^\w-]+", "-", f"{rows['env_id'].iloc[0]}_{rows['steps'].iloc[0]}")

    def show(figure, kind, text):
        if figure:
            plot.save(figure, folder / f"{name}_{kind}.png")
            parts.append(f"![{text}]({name}_{kind}.png)")

    plain, ablation = (part[~part["method"].str.startswith("ablation")] for part in (rows, done)), with_ends(rows)
    whole, finished = plain
    if len(whole):
        parts.append(starts(done) + tables(whole))
    if len(finished):
        measures = ("smoothness_mean", *(("oscillation",) if "isn't comparable" in parts[1] else ()))
        text = "return against smoothness (dots: seeds, large: their median)"
        show(plot.tradeoff_figure(finished, f"{title}\n{text}", measures), "tradeoff", text)
        text = "under observation noise (thin: seeds, thick: their median)"
        show(plot.noise_figure(finished, f"{title}\n{text}"), "noise", text)
    if len(ablation):
        parts += ["**Ablation.** The digits stand for MPR, VFC and Curv, 1 where the loss is on; P compares with 000."]
        parts.append(tables(ablation, "ablation-000"))
        text = "the three losses on and off (dots: seeds, bars: their median)"
        show(ablation_figure(ablation, f"{title}\n{text}"), "ablation", text)
    return [part for part in parts if part]


def link(heading: str) -> str:
    """A line of the contents; the anchor as GitHub makes it."""
    return f"- [{heading}](#{re.sub(r'[^a-z0-9_ -]', '', heading.lower()).replace(' ', '-')})"


def main(args: Args) -> None:
    rows = read_inputs(args)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "runs.csv"
    rows.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")  # 6 digits: small diffs
    rows = read_csv(path)
    folder = os.path.relpath(args.output, ROOT) if args.output.resolve().is_relative_to(ROOT) else str(args.output)
    command = shlex.join(["python", "benchmarks/report.py", f"{folder}/runs.csv", "--output", folder])
    with plt.rc_context(plot.STYLE):
        parts = summary(rows)
        if figure := saturation_figure(rows):
            plot.save(figure, args.output / "saturation_gain.png")
            parts.append("![saturation of base's actions against the gain in sm](saturation_gain.png)")
        for (env_id, steps), part in rows.groupby(["env_id", "steps"]):
            parts += section(part, f"{env_id}, {steps:,.0f} steps", args.output)
    lines = different_settings(rows)
    parts += ["## Seeds trained differently", "\n".join(lines) or "None: the seeds of a row share one command."]
    gone = rows[rows["missing"].notna()]
    lines = [f"- {r.algorithm.upper()} {r.method} on {r.env_id}, seed {r.seed}: {r.missing}" for r in gone.itertuples()]
    parts += ["## Missing", "\n".join(lines) or "Nothing."]
    parts += ["## How the runs were made", "Each run's command, commit, machine and torch are in [runs.csv](runs.csv)."]
    contents = "\n".join(link(part.removeprefix("## ")) for part in parts if part.startswith("## "))
    episodes = " or ".join(f"{n:g}" for n in sorted(rows["episodes"].dropna().unique())) or "number not recorded"
    head = ["# Our runs beside the paper's numbers", f"Made by `{command}`.", contents]
    text = "\n\n".join([*head, NOTES.format(episodes=episodes, none=NONE), *parts]) + "\n"
    (args.output / "report.md").write_text(text)
    print(f"wrote {args.output / 'report.md'}: {len(rows) - len(gone)} runs, {len(gone)} missing")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
