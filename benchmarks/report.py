"""The evidence: report.md, CSVs and figures from our own runs, the paper's numbers beside them.

    python -m benchmarks.report benchmarks/results/report/runs.csv --output benchmarks/results/report
    python -m benchmarks.report OLD/runs.csv runs/sweep --output NEW

An input is an earlier report's runs.csv or a folder of runs that have an evaluation.json (benchmarks.evaluate), such as
a sweep's. Where two inputs have a run, the later one counts; a run without a result stays in runs.csv, with the reason.
--output gets report.md, its figures, and runs.csv, a row for each run: what it measured, and how it was made. The
report is made from the runs.csv that it writes, and the figure of saturation from results/saturation.csv, too.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib import pyplot as plt
from scipy import stats

from benchmarks import plot
from benchmarks.common import UserError, load_run, read_json, require, user_errors
from benchmarks.evaluate import flat

CELL = ["env_id", "steps", "algorithm", "method"]  # whose rows are seeds of one thing
KEY = [*CELL, "seed"]
RESULTS = {  # heading: column of runs.csv
    "return": "return_mean", "sm": "smoothness_mean", "episode length": "length_mean", "oscillation": "oscillation",
}  # fmt: skip
CRITIC = {
    "M/μ": "bound_sup", "M": "m_sup", "NegDef": "neg_def", "flip rate": "flip_rate", "saturation": "saturation",
    "return, k = 0.1": "return_mean@0.1", "sm, k = 0.1": "smoothness_mean@0.1",
}  # fmt: skip
OTHERS = ["return_std", "evaluations", "good_evaluations"]  # what else the report tells
EVALUATED = ["episodes", "version", "noise_reference"]  # how
TRAINED = ["steps_per_second", "wall_seconds", "machine", "torch", "commit", "command", "missing"]  # how
GOOD_RETURNS = {"LunarLanderContinuous-v3": 200, "Hopper-v5": 2500}  # it lands (Gymnasium calls it solved); it hops
ENOUGH = 10  # seeds from which on an interval says more than the seeds themselves
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
- Everything else that was measured, with each run's command, commit and machine: [runs.csv](runs.csv)."""

SUMMARY = """Median of the method's seeds over median of base's; below 1 is smoother. In brackets: over all pairs of a
seed of the method and one of base, so that base's column shows how much base itself scatters. There is no mean over the
envs: few have the same methods. \\*: episode lengths differ or were not recorded, so sm isn't comparable."""


@dataclass
class Args:
    inputs: tyro.conf.Positional[tuple[Path, ...]] = ()  # runs.csv files of earlier reports, and folders of runs
    output: Path = Path("report")  # folder for what is written; made if it isn't there


def read_csv(path: Path) -> pd.DataFrame:
    """A runs.csv; UserError where it is none, or a number in it isn't one."""
    numbers = {"seed": int, "steps": int, "return_mean": float, "smoothness_mean": float}
    try:
        rows = pd.read_csv(path, dtype=numbers | {"missing": object, "commit": str})
        rows["missing"] = rows.get("missing")  # None where the file has no such column
        empty = rows[KEY].isna().any(axis=1) | rows["missing"].isna() & rows[[*numbers]].isna().any(axis=1)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot read {path}, no runs.csv of a report: {' '.join(str(error).split())}") from error
    require(not empty.any(), f"{path}, line {empty.argmax() + 2}: a run's name, return or sm is empty")
    return rows


def read_run(path: Path) -> dict:
    """The row of a run folder; `missing` says why it has no result."""
    run = load_run(path, need_critic=False)
    row = {"env_id": run.args.env_id, "steps": run.args.total_timesteps, "algorithm": run.algorithm}
    row |= {"method": run.method, "seed": run.args.seed}
    files = (path / "summary.json", path / "evaluation.json", path.parent / "cell.json")
    summary, evaluation, cell = map(read_json, files)
    if summary.get("steps") != row["steps"]:
        return row | {"missing": f"stopped at step {run.step:,}"}
    if not evaluation:
        return row | {"missing": "not evaluated (benchmarks.evaluate)"}
    row |= flat(evaluation) | {name: cell.get(name, summary.get(name)) for name in TRAINED}
    if not row["command"]:  # not of a sweep
        defaults = vars(run.script.Args())
        own = {k: v for k, v in plot.settings_of(run).items() if v not in (None, defaults.get(k))}
        row["command"] = f"{run.script.SCRIPT}.py with {own}"
    if least := GOOD_RETURNS.get(run.args.env_id):
        returns = plot.read_curve(run, "eval/return").loc[row["steps"] / 2 + 1 :]  # of the training's second half
        row |= {"evaluations": len(returns), "good_evaluations": (returns >= least).sum()}
    return row


def read_folder(folder: Path) -> pd.DataFrame:
    """A row for each run in a folder, however deep; what can't be read is told and left out."""
    rows = []
    for path in sorted({file.parent for file in folder.rglob("*.pt")}):
        try:
            rows.append(read_run(path))
        except Exception as error:  # whatever it is, the other runs count
            print(f"warning: {path} is left out: {' '.join(str(error).split())}", file=sys.stderr)
    require(len(rows) > 0, f"{folder} has no run folder with a checkpoint.pt or actor.pt that can be read")
    return pd.DataFrame(rows)


def read_inputs(paths) -> pd.DataFrame:
    """Every run once, in order; a later input counts, but what has no result doesn't replace a result."""
    tables = [read_folder(path) if path.is_dir() else read_csv(path) for path in paths]
    done = any("return_mean" in table for table in tables)
    require(done, f"no finished run in {', '.join(map(str, paths)) or 'no input'}")
    rows = pd.concat(tables, ignore_index=True).infer_objects().sort_values("missing", kind="stable")  # empty: last
    if twice := (rows["missing"].isna() & rows.duplicated(KEY, keep="last")).sum():
        print(f"{twice} results are replaced by those of a later input or run", file=sys.stderr)
    rows = rows.drop_duplicates(KEY, keep="last")
    others = rows.columns.drop([*TRAINED, "step"], errors="ignore")
    columns = [*KEY, *EVALUATED, *RESULTS.values(), *others, *CRITIC.values(), *OTHERS, *TRAINED]
    rows = rows.reindex(columns=dict.fromkeys(columns)).fillna({"version": 1})
    order = {method: str(i) for i, method in enumerate(plot.METHODS)}  # base, pave, ..., then the ablation's
    return rows.sort_values(KEY, key=lambda column: column.replace(order))


def centre(values, axis: int = -1):  # with an axis scipy resamples 200 times as fast
    """The median; from ENOUGH seeds on the interquartile mean, without the lowest and the highest quarter."""
    many = np.shape(values)[axis] >= ENOUGH
    return stats.trim_mean(values, 0.25, axis=axis) if many else np.median(values, axis=axis)


def p_lower(x: np.ndarray, y: np.ndarray) -> float:
    """P(X < Y) for a draw from each, ties counting half: over all pairs."""
    return ((x[:, None] < y) + 0.5 * (x[:, None] == y)).mean()


def number(value: float) -> str:
    """4 digits, at most 3 decimals; powers of ten for what is tiny or huge."""
    if value and not 0.001 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.{min(3, max(0, 3 - int(np.floor(np.log10(abs(value) or 1)))))}f}"


def told(statistic, *groups: pd.Series, form=number) -> str:
    """A statistic of the seeds of each group, with how far it can be trusted: see NOTES."""
    groups = [group.dropna().to_numpy(float) for group in groups]
    if not all(map(len, groups)):
        return DASH
    spread = ""
    if min(map(len, groups)) >= ENOUGH:  # of three seeds it would be [lowest, highest], and of five too narrow
        low, high = stats.bootstrap(groups, statistic, method="percentile", rng=0).confidence_interval  # base, too
        spread = f" [{form(low)}, {form(high)}]"
    elif len(groups) == 1 and np.ptp(groups[0]):
        spread = f" ({form(groups[0].min())} to {form(groups[0].max())})"
    return form(statistic(*groups)) + spread


def markdown(lines: list[dict]) -> str:
    """The lines as a table, without the columns that have nothing."""
    cells = pd.DataFrame(lines, dtype=object).fillna(DASH)
    return cells.loc[:, (cells != DASH).any()].to_markdown(index=False, disable_numparse=True)


def paper(env_id: str) -> dict[tuple, str]:
    """(algorithm, method) -> the paper's return and sm, on an env; {} where it has none."""
    folder = Path(__file__).parent / "paper"
    results, ablation = (pd.read_csv(folder / f"paper_{name}.csv", dtype=str) for name in ("tables", "ablation"))
    ablation["method"] = "ablation-" + ablation["mpr"] + ablation["vfc"] + ablation["curv"]
    rows = pd.concat([results, ablation])
    rows = rows[rows["env"] == re.sub(r"(Continuous)?(-v\d+)?$", "", env_id)]
    return {(row.algo, row.method): f"{row.return_mean}, {row.sm_mean}" for row in rows.itertuples()}


def unequal_lengths(rows: pd.DataFrame) -> str:
    """A line where the methods' median lengths differ by more than 5 %, or aren't known; rows: of one env."""
    if rows["length_mean"].isna().any():
        return "Episode lengths were not recorded here, and episodes can end early: **sm may not be comparable**."
    for algorithm, runs in rows.groupby("algorithm"):
        lengths = runs.groupby("method")["length_mean"].median()
        if lengths.max() > 1.05 * lengths.min():
            pair = " and ".join(f"{m} ({lengths[m]:,.0f} steps)" for m in (lengths.idxmin(), lengths.idxmax()))
            differ = f"**sm isn't comparable here**: episodes differ in length, as {algorithm.upper()} {pair} do. "
            return differ + "Compare the oscillation, which does not grow with the length."
    return ""


def tables(rows: pd.DataFrame) -> str:
    """The results of one env and number of steps, then what the claims need."""
    env_id, results, critics = rows["env_id"].iloc[0], [], []
    quoted, good_return = paper(env_id), GOOD_RETURNS.get(env_id)
    for algorithm, runs in rows.groupby("algorithm"):
        methods = dict(list(runs.groupby("method", sort=False)))
        base = methods.get("base", methods.get("ablation-000", runs[:0]))
        for method, every in methods.items():
            seeds, name = every[every["missing"].isna()], {"": f"{algorithm.upper()} {method}"}
            line = name | {"seeds": f"{len(seeds)}" + f" of {len(every)}" * (len(seeds) < len(every))}
            line |= {heading: told(centre, seeds[measure]) for heading, measure in RESULTS.items()}
            than = runs[:0] if every is base else base
            for heading, measure in {"P(smoother)": "smoothness_mean", "P(calmer)": "oscillation"}.items():
                line[heading] = told(p_lower, seeds[measure], than[measure], form="{:.2f}".format)
            if good_return:
                good, of = seeds[["good_evaluations", "evaluations"]].sum()
                line[f"evaluations ≥ {good_return:,}"] = f"{good:g} of {of:g}" if of else DASH
            results.append(line | {"paper: return, sm": quoted.get((algorithm, method))})
            critics.append(name | {heading: told(centre, seeds[measure]) for heading, measure in CRITIC.items()})
    return f"{markdown(results)}\n\n{markdown(critics)}"


def summary(rows: pd.DataFrame, measure: str) -> str:
    """The measure over base's: a line for each env at its largest number of steps."""
    rows, lines = rows[rows["method"].isin(plot.METHODS) & rows[measure].notna()], []
    for (algorithm, env_id), runs in rows.groupby(["algorithm", "env_id"]):
        runs = runs[runs["steps"] == runs["steps"].max()]
        seeds = dict(list(runs.groupby("method")[measure]))
        if len(seeds) < 2 or "base" not in seeds:
            continue
        comparable, base = measure != "smoothness_mean" or not unequal_lengths(runs), seeds["base"]
        line = {"": f"{algorithm.upper()} {env_id}" + " *" * (not comparable)} | dict.fromkeys(plot.METHODS)
        for method, ours in seeds.items():
            low, high = ours.min() / base.max(), ours.max() / base.min()
            line[method] = f"{centre(ours) / centre(base):.2f} ({low:.2f} to {high:.2f})"
        lines.append(line)
    return markdown(lines)


def different_settings(rows: pd.DataFrame) -> list[str]:
    """A line for each cell whose seeds had not all the same command (but for seed and folders) and evaluation."""
    own, lines = r" ?--(output.dir|resume|seed)[ =]('[^']*'|\S+)", []
    made = "`" + rows["command"].fillna("not recorded").str.replace(own, "", regex=True) + "`, evaluated over "
    made += rows["episodes"].map("{:g} episodes, version ".format) + rows["version"].map("{:g}".format)
    for (env_id, steps, algorithm, method), runs in rows.groupby(CELL, sort=False):
        sides = [f"seeds {' '.join(map(str, seeds))}: {how}" for how, seeds in runs["seed"].groupby(made)]
        if len(sides) > 1:
            lines.append(f"- {algorithm.upper()} {method} on {env_id}, {steps:,} steps: {'; '.join(sides)}")
    return lines


def ablation_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return and sm with each set of losses: a dot is a seed."""
    figure, parts = plot.pairs_of_panels(rows, title)
    for axes, method, _, seeds in parts:
        for axis, measure in zip(axes, ("return_mean", "smoothness_mean"), strict=True):
            axis.plot([method.removeprefix("ablation-")] * len(seeds), seeds[measure], "ko", alpha=0.6)
            axis.set(xlabel="MPR, VFC, Curv: 1 on, 0 off", ylabel=plot.AXES[measure])
    return figure


def saturation_figure(rows: pd.DataFrame) -> plt.Figure:
    """What each method leaves of base's oscillation (medians); the tasks by how much base saturates its actions.

    Older runs have no saturation: for their tasks base was trained again, with other seeds, into saturation.csv.
    """
    task = ["env_id", "algorithm"]
    measured = pd.concat([rows, pd.read_csv(Path(__file__).parent / "results" / "saturation.csv")])
    saturation = measured[measured["method"] == "base"].groupby(task)["saturation"].median().dropna()
    medians = rows.pivot_table("oscillation", [*task, "steps"], "method", aggfunc="median")
    medians = medians.reindex(columns=plot.METHODS).dropna(thresh=2)  # base and something else
    medians = medians.join(saturation, how="inner").sort_values("saturation", kind="stable")
    tasks = []
    for (env_id, algorithm, _), share in medians["saturation"].items():
        name = re.sub(r"^.*:|^Inverted|(Continuous)?-v[0-9]+$", "", env_id)
        tasks.append(f"{name}\n{algorithm.upper()}\n{share:.1%}")
    figure, axis = plt.subplots(figsize=(plot.WIDTH, 4))
    for method, colour in plot.colours_of(plot.METHODS[1:]).items():
        axis.scatter(tasks, medians[method] / medians["base"], color=colour, alpha=0.8, label=method)
    axis.tick_params("x", labelsize=7)
    axis.set_axisbelow(True)
    axis.axhline(1, color="#999999", linewidth=0.8)
    axis.set(ylabel="oscillation / base's (below 1: smoother)", ylim=(0, None))
    axis.legend(fontsize=8)
    figure.suptitle("What a method leaves of base's oscillation, and the saturation of base's actions")
    return figure


def section(rows: pd.DataFrame, folder: Path) -> list[str]:
    """The tables and figures of one env and number of steps."""
    env_id, steps = rows[["env_id", "steps"]].iloc[0]
    title, done = f"{env_id}, {steps:,} steps", rows[rows["missing"].isna()]
    parts = [f"## {title}"]
    if (error := (done["return_std"] / done["episodes"] ** 0.5).median()) > 0:
        parts.append(f"Other starts would move a run's mean return by some ±{number(error)} (standard error).")
    parts.append(unequal_lengths(done))
    if done["noise_reference"].nunique(dropna=False) > 1:
        parts.append("The observation noise differs between runs here (`noise_reference`): **don't compare it**.")
    parts.append(tables(rows))
    ablation, figures = done["method"].str.startswith("ablation"), {}
    if done[~ablation]["method"].nunique() > 1:
        figures["tradeoff"] = plot.tradeoff_figure(done[~ablation], title)
        if done[~ablation]["return_mean@0.1"].notna().any():
            figures["noise"] = plot.noise_figure(done[~ablation], title)
    if ablation.any():
        figures["ablation"] = ablation_figure(done, title)
    for kind, figure in figures.items():
        name = re.sub(r"[^\w-]+", "-", f"{env_id}_{steps}_{kind}") + ".png"
        plot.save(figure, folder / name)
        parts.append(f"![{kind}]({name})")
    return [part for part in parts if part]


def main(args: Args) -> None:
    rows, folder = read_inputs(args.inputs), args.output
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g", lineterminator="\n")  # 6 digits: small diffs
    rows = read_csv(folder / "runs.csv")
    done, gone = rows[rows["missing"].isna()], rows[rows["missing"].notna()]
    command = f"python -m benchmarks.report {folder}/runs.csv --output {folder}"
    parts = ["# Our runs, and the paper's numbers beside them", f"Made by `{command}`.", NOTES]
    parts += ["## Summary: sm and oscillation over base's, env by env", SUMMARY]
    parts += ["sm:", summary(done, "smoothness_mean"), "Oscillation:", summary(done, "oscillation")]
    with plt.rc_context(plot.STYLE):
        if done.loc[done["method"] == "base", "saturation"].notna().any():
            plot.save(saturation_figure(done), folder / "saturation.png")
            parts.append("![oscillation over base's, and the saturation of base's actions](saturation.png)")
        for _, part in rows.groupby(["env_id", "steps"]):
            parts += section(part, folder)
    parts += ["## Seeds trained or evaluated differently", "\n".join(different_settings(done)) or "None."]
    lines = [f"- {r.algorithm.upper()} {r.method} on {r.env_id}, seed {r.seed}: {r.missing}" for r in gone.itertuples()]
    parts += ["## Runs without a result", "\n".join(lines) or "None."]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {folder / 'report.md'}: {len(done)} runs, {len(gone)} without a result")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
