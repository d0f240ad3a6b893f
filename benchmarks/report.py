"""The evidence: report.md, CSVs and figures from our own runs, the paper's numbers beside them.

    python -m benchmarks.report benchmarks/results/report/runs.csv --output benchmarks/results/report
    python -m benchmarks.report OLD/runs.csv runs/sweep --output NEW

An input is an earlier report's runs.csv or a sweep's folder, whose runs have an evaluation.json (benchmarks.evaluate).
Where two inputs have a run, the later one counts; a run without a result stays in runs.csv, with the reason. The report
is made from the runs.csv that it writes, and from nothing else. All files in --output:

    report.md     the summary over the envs, then a section for each env
    runs.csv      a row for each run: what it measured, and how it was made
    methods.csv   a row for each method and measure: seeds, median, lowest, highest
    pairs.csv     a row for each two methods: the share of pairs of seeds in which the first is smoother, or better
"""

import itertools
import json
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

from benchmarks import plot
from benchmarks.common import ROOT, Run, UserError, load_run, read_json, require, user_errors
from benchmarks.evaluate import flat

CELL = ["env_id", "steps", "algorithm", "method"]  # whose rows are seeds of one thing
KEY = [*CELL, "seed"]
MEASURES = ["return_mean", "smoothness_mean", "length_mean", "oscillation"]
HEADINGS = ["return", "sm", "episode length", "oscillation"]
CRITIC = {"M/μ": "bound_sup", "M": "m_sup", "NegDef": "neg_def", "flip rate": "flip_rate", "saturation": "saturation"}
CRITIC |= {"return, k = 0.1": "return_mean@0.1", "sm, k = 0.1": "smoothness_mean@0.1"}
EVALUATED = ["episodes", "version", "noise_reference"]  # how
TRAINED = ["steps_per_second", "wall_seconds", "machine", "torch", "commit", "command", "missing"]  # how
COMPARED = {"base", "pave", "auto"}  # the mean over the envs is over those that have them all
FIXED_LENGTHS = {"Pendulum": 200, "Reacher": 50, "HalfCheetah": 1000, "Swimmer": 1000}  # nothing ends an episode early
GOOD_RETURNS = {"LunarLanderContinuous-v3": 200, "Hopper-v5": 2500}  # it lands (Gymnasium calls it solved); it hops
UNEQUAL = 1.05  # median episode lengths of two methods, longer / shorter, from which on their sm isn't compared
DASH = "\u2013"

NOTES = """A run is one number: the mean over its evaluation episodes (deterministic policy, the same starts for every
run). What is shown is the scatter over seeds; how much the starts matter is said in each section.

- **Below ten seeds: median (lowest to highest)**, no confidence interval. From ten on: interquartile mean [95 %
  bootstrap interval].
- **base**: the same agent, every λ 0. **untuned**: λ where the paper's search starts. **pave**: the paper's tuned λ
  (HalfCheetah's are ours). **auto**: `--autotune-curv`. **caps**: CAPS instead of PAVE.
- **ablation-101**: MPR on, VFC off, Curv on, and so on; P compares with 000.
- **sm** (lower is smoother) and **oscillation**, mean |a(t+1) - a(t)|, are in the env's action units. sm grows with
  the episode's length, oscillation does not.
- **P(smoother)**: share of the pairs, a seed of the method and one of base, in which its sm is lower. **P(calmer)**: in
  which its oscillation is.
- **M**: largest ‖∇²sa Q‖. **M/μ**: the theorem's bound on the policy's slope. **NegDef**: share of states where Q is
  concave in a. **flip rate**: share of steps where ∇a Q turns by more than 90°. **saturation**: share of action entries
  within 1 % of a limit.
- **evaluations ≥ 200**: with at least this return, of those in the second half of the trainings, all seeds together.
- **k = 0.1**: observation noise of ±0.1 standard deviations of what `noise_reference` in runs.csv visits; in version 1
  of the evaluation, of what the run itself visits.
- **paper**: its own numbers, after 100,000 steps on Pendulum, 500,000 on LunarLander and Reacher, else 1,000,000.
- Everything else: [methods.csv](methods.csv) (every measure), [pairs.csv](pairs.csv) (every two methods),
  [runs.csv](runs.csv) (every run, with its command, commit and machine)."""

SUMMARY = """Median of the method's seeds over median of base's; below 1 is smoother. In brackets: over all pairs of a
seed of the method and one of base, so that base's column shows how much base itself scatters. The mean (geometric, all
envs weigh alike) is over the envs that have base, pave and auto. \\*: episode lengths differ or were not recorded, so
sm isn't comparable; not in the mean."""


@dataclass
class Args:
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """runs.csv files of earlier reports, and sweep folders"""
    output: Path = Path("report")
    """folder for what is written; made if it isn't there"""


# ---------------------------------------------------------------------------------------------------------- runs


def read_csv(path: Path) -> pd.DataFrame:
    """A runs.csv; UserError where it is none, or a number in it isn't one."""
    try:
        rows = pd.read_csv(path, dtype={"commit": str})
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    numbers = ["seed", "steps", "return_mean", "smoothness_mean"]
    lacking = sorted({*KEY, *numbers} - set(rows))
    require(not lacking, f"{path} is no runs.csv of a report: it lacks {', '.join(lacking)}")
    rows["missing"] = rows.get("missing", pd.Series(dtype=object)).astype(object)
    rows[numbers] = rows[numbers].apply(pd.to_numeric, errors="coerce")
    bad = rows[KEY].isna().any(axis=1) | rows["missing"].isna() & rows[numbers].isna().any(axis=1)
    line = bad.idxmax() + 2 if len(bad) else 0
    require(not bad.any(), f"{path}, line {line}: a run's name, return or sm is empty or not a number")
    return rows


def command_of(run: Run) -> str:
    """The command that gives a run its settings."""
    defaults, words = vars(run.script.Args()), ["python", f"{run.script.SCRIPT}.py"]
    for name, value in vars(run.args).items():
        if value is not None and value != defaults.get(name):
            flag = name.replace("_", "-")
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def read_run(path: Path) -> dict:
    """The row of a run folder; `missing` says why it has no result."""
    run = load_run(path, need_critic=False)
    row = {"env_id": run.args.env_id, "steps": run.args.total_timesteps, "algorithm": run.algorithm}
    row |= {"method": run.method, "seed": run.args.seed}
    files, evaluation = (path / "summary.json", path.parent / "cell.json"), read_json(path / "evaluation.json")
    summary, cell = (json.loads(file.read_text()) if file.is_file() else {} for file in files)
    if summary.get("steps") != row["steps"]:
        return row | {"missing": f"stopped at step {run.step:,}"}
    if not evaluation:
        return row | {"missing": "not evaluated (benchmarks.evaluate)"}
    row |= flat(evaluation)
    row |= {name: cell.get(name, summary.get(name)) for name in TRAINED}
    if least := GOOD_RETURNS.get(run.args.env_id):
        returns = plot.read_curve(run, "eval/return").loc[row["steps"] / 2 + 1 :]  # of the training's second half
        row |= {"evaluations": len(returns), "good_evaluations": (returns >= least).sum()}
    return row | {"command": row["command"] or command_of(run)}


def read_sweep(folder: Path) -> pd.DataFrame:
    """A row for each run in the cells of a sweep; what can't be read is told and left out."""
    rows = []
    for path in sorted({file.parent for file in folder.glob("*/*/*.pt")}):
        try:
            rows.append(read_run(path))
        except (UserError, ValueError, KeyError, AttributeError, TypeError) as error:
            print(f"warning: {path} is left out: {' '.join(str(error).split())}", file=sys.stderr)
    require(len(rows) > 0, f"{folder} is no sweep: it has no <cell>/<run>/checkpoint.pt or actor.pt that can be read")
    return pd.DataFrame(rows)


def order(column: pd.Series) -> pd.Series:
    """The sort key of a column: methods in the order base, pave, ..., then the ablation's."""
    return column.map(lambda value: f"{plot.METHODS.index(value)}" if value in plot.METHODS else value)


def read_inputs(paths) -> pd.DataFrame:
    """Every run once, in order; a later input counts, but what has no result doesn't replace a result."""
    tables = [read_sweep(path) if path.is_dir() else read_csv(path) for path in paths]
    done = any("return_mean" in table for table in tables)
    require(done, f"no finished run in {', '.join(map(str, paths)) or 'no input'}")
    rows = pd.concat(tables, ignore_index=True).sort_values("missing", na_position="last", kind="stable")
    if twice := (rows["missing"].isna() & rows.duplicated(KEY, keep="last")).sum():
        print(f"{twice} results are replaced by those of a later input or run", file=sys.stderr)
    rows = rows.drop_duplicates(KEY, keep="last").astype(dict.fromkeys(("seed", "steps"), int))
    others = [name for name in rows if name not in [*KEY, *EVALUATED, *TRAINED, "step"]]
    rows = rows.reindex(columns=dict.fromkeys([*KEY, *EVALUATED, *MEASURES, *others, *TRAINED]))
    env = rows["env_id"].str.extract(r"(?:.*:)?([A-Za-z]+)")[0]
    return rows.fillna({"length_mean": env.map(FIXED_LENGTHS), "version": 1}).sort_values(KEY, key=order)


# ---------------------------------------------------------------------------------------------------- statistics


def centre(values, axis: int = -1):
    """The median; from ENOUGH seeds on the interquartile mean, without the lowest and the highest quarter."""
    many = np.shape(values)[axis] >= plot.ENOUGH
    return stats.trim_mean(values, 0.25, axis=axis) if many else np.median(values, axis=axis)


def p_lower(x, y, axis: int = -1):
    """P(X < Y) for a draw from each, ties counting half: over all pairs."""
    x, y = np.expand_dims(np.moveaxis(x, axis, -1), -1), np.expand_dims(np.moveaxis(y, axis, -1), -2)
    return ((x < y) + 0.5 * (x == y)).mean(axis=(-2, -1))


def mean_ratio(*groups, axis: int = -1):
    """method, base, method, base, ... (a pair an env) -> geometric mean of centre / centre: all envs weigh alike."""
    logs = [np.log(centre(values, axis=axis)) for values in groups]
    return np.exp(np.mean(logs[::2], axis=0) - np.mean(logs[1::2], axis=0))


def interval(groups, statistic) -> str:
    """95 % percentile bootstrap, every group resampled by itself, base as well; "" where one has too few seeds."""
    if min(map(len, groups)) < plot.ENOUGH:
        return ""  # of three seeds it would be [lowest, highest], and of five it is too narrow
    settings = {"n_resamples": 10_000, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
    low, high = stats.bootstrap(groups, statistic, **settings).confidence_interval
    return f" [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """4 digits, at most 3 decimals; powers of ten for what is tiny or huge."""
    if value and not 0.001 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.{min(3, max(0, 3 - int(np.floor(np.log10(abs(value) or 1)))))}f}"


def told(values: pd.Series) -> str:
    """What a table shows of the seeds: see NOTES."""
    values = values.dropna().to_numpy(float)
    if not len(values):
        return DASH
    spread = f" ({number(values.min())} to {number(values.max())})" if np.ptp(values) else ""
    return number(centre(values)) + (interval([values], centre) or spread)


def told_p(ours: pd.Series, base: pd.Series) -> str:
    """P(ours is lower than base)."""
    groups = [ours.dropna().to_numpy(), base.dropna().to_numpy()]
    return f"{p_lower(*groups):.2f}{interval(groups, p_lower)}" if min(map(len, groups)) else DASH


# -------------------------------------------------------------------------------------------------------- tables


def markdown(lines: list[dict]) -> str:
    return pd.DataFrame(lines, dtype=object).fillna(DASH).to_markdown(index=False, disable_numparse=True)


def paper(env_id: str) -> dict[tuple, str]:
    """(algorithm, method) -> the paper's return and sm, on an env; {} where it has none."""
    results, ablation = (
        pd.read_csv(Path(__file__).parent / "paper" / f"paper_{name}.csv", dtype=str) for name in ("tables", "ablation")
    )
    ablation["method"] = "ablation-" + ablation["mpr"] + ablation["vfc"] + ablation["curv"]
    rows = pd.concat([results, ablation])
    rows = rows[rows["env"] == re.sub(r"(Continuous)?(-v\d+)?$", "", env_id)]
    return {(row.algo, row.method): f"{row.return_mean}, {row.sm_mean}" for row in rows.itertuples()}


def unequal_lengths(rows: pd.DataFrame) -> str:
    """A line where the methods' episodes are not about as long, or it isn't known; rows: of one env."""
    if rows["length_mean"].isna().any():
        return "Episode lengths were not recorded here, and episodes can end early: **sm may not be comparable**."
    for algorithm, runs in rows.groupby("algorithm"):
        lengths = runs.groupby("method")["length_mean"].median()
        if lengths.max() > UNEQUAL * lengths.min():
            pair = " and ".join(f"{m} ({lengths[m]:,.0f} steps)" for m in (lengths.idxmin(), lengths.idxmax()))
            return (
                f"**sm isn't comparable here**: episodes differ in length, as {algorithm.upper()} {pair} do. "
                "Compare the oscillation, which does not grow with the length."
            )
    return ""


def tables(rows: pd.DataFrame) -> str:
    """The results of one env and number of steps, then what the claims need."""
    env_id, results, critics = rows["env_id"].iloc[0], [], []
    quoted = paper(env_id)
    for algorithm, runs in rows.groupby("algorithm"):
        methods = dict(list(runs.groupby("method", sort=False)))
        base = methods.get("base", methods.get("ablation-000", runs[:0]))
        for method, every in methods.items():
            seeds, name = every[every["missing"].isna()], {"": f"{algorithm.upper()} {method}"}
            line = name | {"seeds": f"{len(seeds)}" + f" of {len(every)}" * (len(seeds) < len(every))}
            line |= {heading: told(seeds[measure]) for heading, measure in zip(HEADINGS, MEASURES, strict=True)}
            for heading, measure in {"P(smoother)": "smoothness_mean", "P(calmer)": "oscillation"}.items():
                line[heading] = DASH if every is base else told_p(seeds[measure], base[measure])
            if env_id in GOOD_RETURNS and rows.get("evaluations", pd.Series(dtype=float)).any():
                good, of = seeds[["good_evaluations", "evaluations"]].sum()
                line[f"evaluations ≥ {GOOD_RETURNS[env_id]:,}"] = f"{good:g} of {of:g}" if of else DASH
            results.append(line | ({"paper: return, sm": quoted.get((algorithm, method))} if quoted else {}))
            measured = {heading: m for heading, m in CRITIC.items() if m in rows and rows[m].notna().any()}
            critics.append(name | {heading: told(seeds[m]) for heading, m in measured.items()})
    return "\n\n".join(map(markdown, (results, critics)))


def summary(rows: pd.DataFrame, measure: str) -> str:
    """The measure over base's: a line for each env at its largest number of steps, then the mean over common envs."""
    rows = rows[rows["method"].isin(plot.METHODS) & rows[measure].notna()]
    rows = rows[rows["steps"] == rows.groupby(["algorithm", "env_id"])["steps"].transform("max")]
    lines = []
    for algorithm, runs in rows.groupby("algorithm"):
        common = []
        for env_id, part in runs.groupby("env_id"):
            seeds = {method: some[measure].to_numpy() for method, some in part.groupby("method")}
            if len(seeds) < 2 or "base" not in seeds:
                continue
            comparable, base = measure != "smoothness_mean" or not unequal_lengths(part), seeds["base"]
            line = {"": f"{algorithm.upper()} {env_id}" + " *" * (not comparable)} | dict.fromkeys(plot.METHODS)
            for method, ours in seeds.items():
                low, high = ours.min() / base.max(), ours.max() / base.min()
                line[method] = f"{centre(ours) / centre(base):.2f} ({low:.2f} to {high:.2f})"
            lines.append(line)
            common += [seeds] if comparable and seeds.keys() >= COMPARED else []
        if len(common) > 1:
            line = {"": f"**{algorithm.upper()}, mean over {len(common)} envs**"}
            for method in set.intersection(*map(set, common)):
                groups = [seeds[name] for seeds in common for name in (method, "base")]
                line[method] = f"**{mean_ratio(*groups):.2f}{interval(groups, mean_ratio)}**"
            lines.append(line)
    return markdown(lines) if lines else ""


def different_settings(rows: pd.DataFrame) -> list[str]:
    """A line for each cell whose seeds had not all the same command (but for seed and folders) and evaluation."""
    own = r" ?--(output.dir|resume|seed)[ =]('[^']*'|\S+)"
    made = "`" + rows["command"].fillna("not recorded").str.replace(own, "", regex=True) + "`, evaluated over "
    made += rows["episodes"].map("{:g} episodes, ".format) + rows["version"].map("version {:g}".format)
    rows, lines = rows.assign(made=made), []
    for (env_id, steps, algorithm, method), seeds in rows.groupby(CELL, sort=False):
        if seeds["made"].nunique() > 1:
            sides = [f"seeds {' '.join(map(str, some))}: {made}" for made, some in seeds.groupby("made")["seed"]]
            lines.append(f"- {algorithm.upper()} {method} on {env_id}, {steps:,} steps: {'; '.join(sides)}")
    return lines


def write_statistics(rows: pd.DataFrame, folder: Path) -> None:
    """methods.csv and pairs.csv."""
    measures = rows.drop(columns=[*KEY, *EVALUATED]).select_dtypes("number")
    long = rows[CELL].join(measures).melt(CELL, var_name="measure").dropna().groupby([*CELL, "measure"], sort=False)
    table = long["value"].agg(seeds="count", median="median", lowest="min", highest="max")
    table.to_csv(folder / "methods.csv", float_format="%.6g", lineterminator="\n")
    pairs = []
    for (env_id, steps, algorithm), part in rows.groupby(CELL[:-1]):
        for (ours, x), (than, y) in itertools.permutations(part.groupby("method", sort=False), 2):
            line = dict(zip([*CELL, "than"], (env_id, steps, algorithm, ours, than), strict=True))
            for name, measure in {"smoother": "smoothness_mean", "calmer": "oscillation"}.items():
                line[f"P({name})"] = p_lower(x[measure].to_numpy(), y[measure].to_numpy())
            line["P(higher return)"] = p_lower(y["return_mean"].to_numpy(), x["return_mean"].to_numpy())
            pairs.append(line | {"pairs": len(x) * len(y)})
    pd.DataFrame(pairs).to_csv(folder / "pairs.csv", index=False, float_format="%.6g", lineterminator="\n")


# ------------------------------------------------------------------------------------------- figures and sections


def ablation_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return and sm with each set of losses: a dot is a seed, a bar their median."""
    algorithms = list(rows.groupby("algorithm"))
    figure, axes = plt.subplots(len(algorithms), 2, figsize=(plot.WIDTH, 0.7 + 3 * len(algorithms)), squeeze=False)
    for line, (algorithm, runs) in zip(axes, algorithms, strict=True):
        for axis, measure in zip(line, MEASURES, strict=False):
            for method, seeds in runs.groupby("method"):
                digits = method.removeprefix("ablation-")
                names = [name for name, on in zip(("MPR", "VFC", "Curv"), digits, strict=False) if on == "1"]
                name = "\n".join(names) or "none" if digits != method else method
                axis.scatter([name] * len(seeds), seeds[measure], s=14, color="black")
                axis.plot([name], seeds[measure].median(), "_", markersize=30, markeredgewidth=2, color=plot.COLOURS[1])
            axis.tick_params(axis="x", labelsize=8)
            axis.set(title=algorithm.upper(), ylabel=plot.AXES[measure])
    figure.suptitle(title)
    return figure


def saturation_figure(rows: pd.DataFrame) -> plt.Figure | None:
    """How much of base's actions is at a limit against what a method gains: a mark for each method and env."""
    if "saturation" not in rows:
        return None
    gains = {"smoothness_mean": "sm / base's sm", "oscillation": "oscillation / base's oscillation"}
    medians = rows[rows["method"].isin(plot.METHODS)].groupby(CELL, as_index=False)[["saturation", *gains]].median()
    is_base, suffixes = medians["method"] == "base", ("", "_base")
    points = medians[~is_base].merge(medians[is_base], on=CELL[:-1], suffixes=suffixes).dropna(subset="saturation_base")
    if points.empty:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(plot.WIDTH, 4))
    colours = plot.colours_of(plot.METHODS)
    for axis, (measure, label) in zip(axes, gains.items(), strict=True):
        points["gain"] = points[measure] / points[f"{measure}_base"]
        for (algorithm, method), part in points.groupby(["algorithm", "method"]):
            look = {"edgecolor": colours[method], "facecolor": colours[method] if algorithm == "sac" else "none"}
            axis.scatter(part["saturation_base"], part["gain"], label=f"{algorithm.upper()} {method}", **look)
        for point in points.drop_duplicates(["env_id", "algorithm"]).itertuples():
            name, place = re.sub(r"^.*:|-v\d+$", "", point.env_id), (point.saturation_base, point.gain)
            axis.annotate(name, place, (0, 7), textcoords="offset points", ha="center", fontsize=7)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set(xlabel="saturation of base's actions", ylabel=f"{label}\n(below 1: smoother)")
        axis.margins(0.25, 0.1)
    axes[1].legend(fontsize=8)
    figure.suptitle("What base saturates, and what a method gains (medians)")
    return figure


def section(rows: pd.DataFrame, folder: Path) -> list[str]:
    """The tables and figures of one env and number of steps."""
    env_id, steps = rows[["env_id", "steps"]].iloc[0]
    title = f"{env_id}, {steps:,} steps"
    done, parts = rows[rows["missing"].isna()], [f"## {title}"]
    if done.empty:
        return []
    ablation = done["method"].str.startswith("ablation")

    def show(figure, kind, text):
        if figure:
            name = re.sub(r"[^\w-]+", "-", f"{env_id}_{steps}_{kind}") + ".png"
            plot.save(figure, folder / name)
            parts.append(f"![{text}]({name})")

    if "return_std" in done and (error := (done["return_std"] / done["episodes"] ** 0.5).median()) > 0:
        parts.append(f"Other starts would move a run's mean return by some ±{number(error)} (standard error).")
    parts.append(unequal_lengths(done))
    if done["noise_reference"].nunique(dropna=False) > 1:
        parts.append("The observation noise differs between runs here (`noise_reference`): **don't compare it**.")
    parts.append(tables(rows))
    if done[~ablation]["method"].nunique() > 1:
        show(plot.tradeoff_figure(done[~ablation], title), "tradeoff", "return against sm and oscillation")
        show(plot.noise_figure(done[~ablation], title), "noise", "return and sm under observation noise")
    if ablation.any():
        show(ablation_figure(done, title), "ablation", "return and sm with each set of losses")
    return [part for part in parts if part]


def link(heading: str) -> str:
    """A line of the contents; the anchor as GitHub makes it."""
    return f"- [{heading}](#{re.sub(r'[^a-z0-9_ -]', '', heading.lower()).replace(' ', '-')})"


def main(args: Args) -> None:
    rows, folder = read_inputs(args.inputs), args.output
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g", lineterminator="\n")  # 6 digits: small diffs
    rows = read_csv(folder / "runs.csv")
    done, gone = rows[rows["missing"].isna()], rows[rows["missing"].notna()]
    write_statistics(done, folder)
    parts = ["## Summary: sm and oscillation over base's, env by env", SUMMARY]
    for heading, measure in {"sm:": "smoothness_mean", "Oscillation:": "oscillation"}.items():
        parts += [heading, summary(done, measure)]
    with plt.rc_context(plot.STYLE):
        if figure := saturation_figure(done):
            plot.save(figure, folder / "saturation.png")
            parts.append("![saturation of base's actions against what a method gains](saturation.png)")
        for _, part in rows.groupby(["env_id", "steps"]):
            parts += section(part, folder)
    lines = different_settings(done)
    parts += ["## Seeds trained or evaluated differently", "\n".join(lines) or "None."]
    lines = [f"- {r.algorithm.upper()} {r.method} on {r.env_id}, seed {r.seed}: {r.missing}" for r in gone.itertuples()]
    parts += ["## Runs without a result", "\n".join(lines) or "None."]
    where = folder.resolve().relative_to(ROOT) if folder.resolve().is_relative_to(ROOT) else folder
    command = shlex.join(["python", "-m", "benchmarks.report", f"{where}/runs.csv", "--output", f"{where}"])
    contents = "\n".join(link(part.removeprefix("## ")) for part in parts if part.startswith("## "))
    head = ["# Our runs, and the paper's numbers beside them", f"Made by `{command}`.", contents, NOTES]
    (folder / "report.md").write_text("\n\n".join([*head, *parts]) + "\n")
    print(f"wrote {folder / 'report.md'}: {len(done)} runs, {len(gone)} without a result")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
