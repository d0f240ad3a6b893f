"""The evidence: report.md, CSVs and figures from our own runs, the paper's numbers beside them.

    python -m benchmarks.report benchmarks/results/report/runs.csv --output benchmarks/results/report
    python -m benchmarks.report OLD/runs.csv runs/sweep --output NEW

An input is an earlier report's runs.csv or a folder of runs that have an evaluation.json (benchmarks.evaluate), such as
a sweep's. A run is what its settings, its seed and its start make it, whatever it is called: where two inputs have it,
the later one counts, and runs of other settings under one name stand in lines of their own. A run without a result
stays in runs.csv, with the reason.
--output gets report.md, its figures (effect.png has all tasks in one), and two tables: runs.csv, a row for each run,
what it measured and how it was made; and curves.csv, a row for each evaluation during the training. The report is made
from the tables that it writes. A curves.csv is read with the runs.csv beside it.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib import pyplot as plt
from scipy import stats

import sac_pave_continuous
from benchmarks import common, evaluate, plot
from benchmarks.common import WRAPPERS, Run, UserError, load_run, read_json, require, user_errors

CELL = ["env_id", "steps", "algorithm", "method"]  # names, for readers
LINE = [*CELL, "identity"]  # whose rows are seeds of one thing
KEY = [*LINE, "origin", "seed"]  # one run; a warm-started one began from a run that has a seed, too
NAMED = [*CELL, "seed"]  # what each row of a runs.csv has
CURVE = [*KEY, "step", *plot.EVALUATIONS]  # a row of curves.csv
LEGACY = "legacy"  # identity of a row whose settings were not recorded
RESULTS = {  # heading: column of runs.csv
    "return": "return_mean", "oscillation": "oscillation", "sm": "smoothness_mean", "episode length": "length_mean",
}  # fmt: skip
LOWER = {"P(calmer)": "oscillation", "P(smoother)": "smoothness_mean"}
# With what a method is compared where there are seeds enough
RIVALS = dict.fromkeys(("pave", "untuned", "own", "auto"), ("base", "filter", "penalty", "caps"))
RIVALS["filter+pave"] = ("base", "pave", "filter", "penalty")
CRITIC = {
    "M/μ": "bound_sup", "M": "m_sup", "NegDef": "neg_def", "flip rate": "flip_rate", "saturation": "saturation",
    "return, k = 0.1": "return_mean@0.1", "sm, k = 0.1": "smoothness_mean@0.1",
}  # fmt: skip
OTHERS = ["return_std", "evaluations", "good_evaluations"]  # what else the report tells
ABOUT = ["identity", "origin", "settings", "action_dim", "random_return"]  # what a run is, and its env
EVALUATED = ["episodes", "version", "noise_reference"]  # how
MADE = ["machine", "torch", "commit"]  # where and by what
TRAINED = ["steps_per_second", "wall_seconds", *MADE, "command", "missing"]  # how
GOOD_RETURNS = {"LunarLanderContinuous-v3": 200, "Hopper-v5": 2500}  # it lands (Gymnasium calls it solved); it hops
WORSE = 0.1  # of what plain gained over a random policy: by more than that below plain's return is clearly worse
DASH = "\u2013"

NOTES = """A run is one number: the mean over its evaluation episodes (deterministic policy, the same starts for every
run). What is shown is the scatter over seeds; how much the starts matter is said in each section.

- **Below ten seeds: median (lowest to highest)**, no confidence interval. From ten on: interquartile mean [95 %
  bootstrap interval].
- **base**: the same agent, every λ 0. **untuned**: λ where the paper's search starts. **pave**: the paper's tuned λ
  (HalfCheetah's are ours). **own**: λ given by hand. **auto**: `--autotune-curv`. **caps**: CAPS instead of PAVE.
  **filter**: a low-pass filter on the action, in training and evaluation. **penalty**: a punishment of the action's
  change in the reward. **filter+pave**: both.
- **base-then-pave**: PAVE began in a trained agent of base (`--warm-start`); steps are those after it. Compare it with
  base-then-base, which went on plainly.
- **ablation-101**: MPR on, VFC off, Curv on, and so on. It compares with ablation-000 where there is one.
- Runs of other settings under one name are lines of their own; what differs stands in brackets. "settings not
  recorded": rows of an older report, see their commands in runs.csv.
- **oscillation**, mean |a(t+1) - a(t)|, and **sm** (the paper's; the lower, the smoother) are in the env's action
  units, of the action that the env receives. sm grows with the episode's length, oscillation does not.
- **P(calmer)**: share of the pairs, a seed of the method and one of base, in which its oscillation is lower.
  **P(smoother)**: in which its sm is.
- **M**: largest ‖∇²sa Q‖. **M/μ**: the theorem's bound on the policy's slope. **NegDef**: share of states where Q is
  concave in a. **flip rate**: share of steps where ∇a Q turns by more than 90°. **saturation**: share of action entries
  within 1 % of a limit.
- **evaluations ≥ 200**: with at least this return, of those in the second half of the trainings, all seeds together.
- **In the figures** a thick line is the median. Below ten seeds each is a thin line or a dot, from ten on a band holds
  the middle half. "During the training": its own evaluations, of ten episodes (`--eval-episodes`).
- **k = 0.1**: observation noise of ±0.1 standard deviations of what `noise_reference` in runs.csv visits; in version 1
  of the evaluation, of what the run itself visits.
- **paper**: its own numbers, after 100,000 steps on Pendulum, 500,000 on LunarLander and Reacher, else 1,000,000.
- Everything else that was measured, with each run's command, commit and machine: [runs.csv](runs.csv)."""

EFFECT = """A row is a task: env, agent, steps. A dot is a seed: its oscillation over the median of plain's seeds, so
that plain's own dots show how much seeds differ anyway. Left of the line at 1 the action is calmer. A hollow dot
learned less: its return is below plain's median by more than a tenth of what plain gained over a random policy (where
random's return was not measured, none is hollow). The numbers are in the tables below."""

RIVALRY = """PAVE beside plain agents and rivals. P: the share of the pairs of seeds in which the first has the lower
value (where all pairs agree, without an interval). A difference above 0: the first has the higher return. Intervals as
above."""

SUMMARY = """Oscillation and sm over base's, env by env: median of the method's seeds over median of base's; below 1 is
calmer, or smoother. In brackets: over all pairs of a seed of the method and one of base, so that base's column shows
how much base itself scatters. There is no mean over the envs: few have the same methods. \\*: episode lengths differ or
were not recorded, so sm isn't comparable."""


@dataclass
class Args:
    inputs: tyro.conf.Positional[tuple[Path, ...]] = ()  # runs.csv files of earlier reports, and folders of runs
    output: Path = Path("report")  # folder for what is written; made if it isn't there


# ------------------------------------------------------------------------------------------------------------- reading


WORDS = dict.fromkeys(("identity", "origin", "settings", "commit"), str)  # an identity may look like a number


def read_csv(path: Path) -> pd.DataFrame:
    """A runs.csv; UserError where it is none, or a number in it isn't one."""
    numbers = {"seed": int, "steps": int, "return_mean": float, "smoothness_mean": float}
    try:
        rows = pd.read_csv(path, dtype=numbers | WORDS | {"missing": object})
        for name in ("missing", "identity", "origin", "settings"):
            rows[name] = rows.get(name)  # None where the file has no such column
        empty = rows[NAMED].isna().any(axis=1)
        empty |= rows["missing"].isna() & rows[[*numbers]].isna().any(axis=1)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot read {path}, no runs.csv of a report: {' '.join(str(error).split())}") from error
    require(not empty.any(), f"{path}, line {empty.argmax() + 2}: a run's name, return or sm is empty")
    return rows.fillna({"identity": LEGACY, "origin": "", "settings": ""})


def read_curves(path: Path) -> pd.DataFrame:
    """The curves.csv beside a runs.csv, which an older report lacks; UserError where it is none."""
    path = path.with_name("curves.csv")
    if not path.exists():
        return pd.DataFrame(columns=CURVE)
    try:
        numbers = dict.fromkeys(plot.EVALUATIONS, float) | dict.fromkeys(("seed", "steps", "step"), int)
        return pd.read_csv(path, dtype=numbers | WORDS)[CURVE].fillna({"origin": ""})
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot read {path}, no curves.csv of a report: {' '.join(str(error).split())}") from error


def result_of(run: Run) -> dict:
    """Its evaluation as columns; {"missing": why} where it has none that is of this training, in full."""
    steps, summary = run.args.total_timesteps, read_json(run.path / "summary.json")
    evaluation = read_json(run.path / "evaluation.json")
    if summary.get("steps") != steps:
        return {"missing": f"stopped at step {run.step:,}"}
    if not evaluation:
        return {"missing": "not evaluated (benchmarks.evaluate)"}
    step, episodes, version = (evaluation.get(name, 0) for name in ("step", "episodes", "version"))
    if step != steps or version != evaluate.VERSION or not episodes > 0:
        told = f"step {step:,}, {episodes} episodes, version {version}"
        return {"missing": f"not evaluated (evaluation.json is of {told}: benchmarks.evaluate makes it anew)"}
    return evaluate.flat(evaluation)


def made_by(about: dict) -> dict:
    """Machine, torch and commit of a cell.json (or summary.json): of each stretch of the training, in order."""
    told = {}
    for name in MADE:
        values = [stretch_value(stretch, name) for stretch in about.get("stretches") or [about]]
        told[name] = "; ".join(dict.fromkeys(value for value in values if value)) or None
    return told


def stretch_value(stretch: dict, name: str) -> str | None:
    """What a stretch says; the machine with the library that was preloaded there, as older cells have it."""
    value, preload = stretch.get(name), stretch.get("preload")
    if name == "machine" and value and preload and preload not in value:
        return f"{value}, LD_PRELOAD={preload}"
    return value


def read_run(path: Path) -> tuple[dict, pd.DataFrame]:
    """The row of a run folder, where `missing` says why it has no result; and its rows of curves.csv."""
    run = load_run(path, need_critic=False)
    _, env_id = common.unwrap(run.args.env_id)
    settings = common.settings_of(run.script, vars(run.args))
    row = {"env_id": env_id, "steps": run.args.total_timesteps, "algorithm": run.algorithm, "method": run.method}
    row |= {"identity": run.identity, "origin": common.origin_text(run.script, run.origin), "seed": run.args.seed}
    row |= {"settings": json.dumps(settings), "action_dim": run.action_dim} | result_of(run)
    if row.get("missing"):
        return row, pd.DataFrame(columns=CURVE)
    summary, cell = read_json(path / "summary.json"), read_json(path.parent / "cell.json")
    about = summary | {name: value for name, value in cell.items() if value is not None}
    row |= {name: about.get(name) for name in TRAINED if name not in row} | made_by(about)
    if not row["command"]:  # not of a sweep
        row["command"] = f"{run.script.SCRIPT}.py with {settings}"
    evaluations = plot.read_evaluations(run)
    if least := GOOD_RETURNS.get(env_id):
        returns = evaluations.loc[evaluations["step"] > row["steps"] / 2, "return"]  # of the training's second half
        row |= {"evaluations": len(returns), "good_evaluations": (returns >= least).sum()}
    return row, evaluations.assign(**{name: row[name] for name in KEY})


def read_folder(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of runs.csv and curves.csv of the runs in a folder, however deep; what can't be read is left out.

    That is told.
    """
    rows, curves = [], []
    for path in sorted({file.parent for file in folder.rglob("*.pt")}):
        try:
            row, curve = read_run(path)
        except Exception as error:  # whatever it is, the other runs count
            print(f"warning: {path} is left out: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        rows.append(row)
        curves.append(curve)
    require(len(rows) > 0, f"{folder} has no run folder with a checkpoint.pt or actor.pt that can be read")
    return pd.DataFrame(rows), pd.concat(curves)


def read_inputs(paths) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every run once, in order, and the evaluations during its training.

    A later input counts, but what has no result doesn't replace a result.
    """
    tables, curves = [], [pd.DataFrame(columns=[*CURVE, "input"])]
    for i, path in enumerate(paths):
        table, curve = read_folder(path) if path.is_dir() else (read_csv(path), read_curves(path))
        tables.append(table.assign(input=i))
        curves.append(curve.assign(input=i))
    done = any("return_mean" in table for table in tables)
    require(done, f"no finished run in {', '.join(map(str, paths)) or 'no input'}")
    rows = pd.concat(tables, ignore_index=True).infer_objects().sort_values("missing", kind="stable")  # empty: last
    if twice := (rows["missing"].isna() & rows.duplicated(KEY, keep="last")).sum():
        print(f"{twice} results are replaced by those of a later input or run", file=sys.stderr)
    rows = rows.drop_duplicates(KEY, keep="last")
    curves = pd.concat(curves).astype(dict.fromkeys(plot.EVALUATIONS, float))  # from object, where a table is empty
    curves = rows[[*KEY, "input"]].merge(curves)[CURVE]  # of the input that counts
    rows = rows.drop(columns="input")
    others = rows.columns.drop([*TRAINED, "step"], errors="ignore")
    columns = [*NAMED, *ABOUT, *EVALUATED, *RESULTS.values(), *others, *CRITIC.values(), *OTHERS, *TRAINED]
    rows = rows.reindex(columns=dict.fromkeys(columns)).fillna({"version": 1})
    order = [*CELL, "settings", "identity", "origin", "seed"]
    curves = curves.sort_values([*KEY, "step"], key=in_order).drop_duplicates([*KEY, "step"], keep="last")
    return rows.sort_values(order, key=in_order), curves


def in_order(column: pd.Series) -> pd.Series:
    """For sorting: the methods in plot's order, base first, and then the others by name; empty settings come last.

    So also those after each warm start.
    """
    if column.name == "method":
        places = {method: f"{i:02}" for i, method in enumerate(plot.METHODS)}
        return column.map(lambda method: f"{start_of(method)} {places.get(plot.last_part(method), method)}")
    return column.replace("", "~") if column.name == "settings" else column


# --------------------------------------------------------------------------------- what is one line, compared with what


def name_lines(rows: pd.DataFrame) -> pd.DataFrame:
    """With a column `line`, the method; where it has several settings in one cell, with what tells them apart."""
    rows = rows.assign(line=rows["method"])
    for (*_, method), cell in rows.groupby(CELL):
        lines = cell.drop_duplicates("identity").set_index("identity")
        if len(lines) > 1:
            labels = tell_apart(method, lines)
            rows.loc[cell.index, "line"] = cell["identity"].map(labels)
    return rows


def tell_apart(method: str, lines: pd.DataFrame) -> dict[str, str]:
    """identity -> label, of lines (by identity, with settings and origin) that have one name."""
    settings = {name: json.loads(text) for name, text in lines["settings"].items() if text}
    every = set().union(*settings.values())
    differing = [key for key in sorted(every) if len({str(own.get(key)) for own in settings.values()}) > 1]
    starts = lines["origin"].str.replace(r" seed \d+", "", regex=True)
    labels = {}
    for name in lines.index:
        parts = [f"{key} {settings[name][key]}" for key in differing if key in settings.get(name, {})]
        if name not in settings:
            parts = ["settings not recorded"]
        if starts.nunique() > 1 and starts[name]:
            parts.append(f"from {starts[name]}")
        labels[name] = f"{method} ({', '.join(parts)})" if parts else method
    for name, label in labels.items():  # sources of other settings under one name, say
        if list(labels.values()).count(label) > 1:
            labels[name] = f"{label} [{name}]"
    return labels


def start_of(method: str) -> str:
    """base of base-then-pave; "" from scratch."""
    return method.rpartition("-then-")[0]


def reference_method(method: str, methods) -> str:
    """With what a method compares: an ablation with no loss, a warm start with its source going on, all else with base.

    methods: those that there are.
    """
    if start := start_of(method):
        wrapper = plot.last_part(method).partition("+")[0]
        return f"{start}-then-{wrapper if wrapper in WRAPPERS else 'base'}"
    alone = method.startswith("ablation-") or "base" not in methods
    return "ablation-000" if alone and "ablation-000" in methods else "base"


def reference(runs: pd.DataFrame, line: str) -> pd.DataFrame:
    """The rows that a line compares with; none where that is itself, or isn't there. runs: of one agent and task."""
    own = runs[runs["line"] == line].iloc[0]
    candidates = runs[runs["method"] == reference_method(own["method"], set(runs["method"]))]
    return nearest(candidates, own["settings"]) if line not in set(candidates["line"]) else runs[:0]


def nearest(candidates: pd.DataFrame, settings: str) -> pd.DataFrame:
    """Of some lines' rows those of one line: the one whose settings differ in the fewest from these."""
    lines = candidates.drop_duplicates("line")
    if lines.empty:
        return candidates
    distances = [distance(settings, other) for other in lines["settings"]]
    return candidates[candidates["line"] == lines["line"].iloc[distances.index(min(distances))]]


def distance(settings: str, others: str) -> tuple[bool, int]:
    """How far apart two lines are: whether just one has its settings recorded, and the number of those that differ."""
    ours, theirs = (json.loads(text) if text else {} for text in (settings, others))
    differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    return bool(settings) != bool(others), len(differing)


# ---------------------------------------------------------------------------------------------------------- statistics


def centre(values, axis: int = -1):  # with an axis scipy resamples 200 times as fast
    """The median; from plot.ENOUGH seeds on the interquartile mean, without the lowest and the highest quarter."""
    many = np.shape(values)[axis] >= plot.ENOUGH
    return stats.trim_mean(values, 0.25, axis=axis) if many else np.median(values, axis=axis)


def p_lower(x: np.ndarray, y: np.ndarray) -> float:
    """P(X < Y) for a draw from each, ties counting half: over all pairs."""
    return ((x[:, None] < y) + 0.5 * (x[:, None] == y)).mean()


def difference(x, y, axis: int = -1):
    """How far the centre of x is above that of y."""
    return centre(x, axis) - centre(y, axis)


def number(value: float) -> str:
    """4 digits, at most 3 decimals, 4 below 0.01; powers of ten for what is tiny or huge."""
    if value and not 0.001 <= abs(value) < 1e5:
        return f"{value:.1e}"
    if 0 < abs(value) < 0.01:
        return f"{value:.4f}"
    before_the_point = 1 + int(np.floor(np.log10(abs(value) or 1)))  # digits; 0 or fewer below 1
    decimals = min(3, max(0, 4 - before_the_point))
    return f"{value:,.{decimals}f}"


def told(statistic, *groups: pd.Series, form=number) -> str:
    """A statistic of the seeds of each group, with how far it can be trusted: see NOTES."""
    groups = [group.dropna().to_numpy(float) for group in groups]
    if not all(map(len, groups)):
        return DASH
    spread = ""
    if min(map(len, groups)) >= plot.ENOUGH:  # of three seeds it would be [lowest, highest], and of five too narrow
        low, high = stats.bootstrap(groups, statistic, method="percentile", rng=0).confidence_interval  # base, too
        spread = f" [{form(low)}, {form(high)}]" if low < high else ""  # where all pairs agree the bootstrap is blind
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
    rows = rows[rows["env"] == sac_pave_continuous.env_name(env_id).removesuffix("Continuous")]
    return {(row.algo, row.method): f"{row.return_mean}, {row.sm_mean}" for row in rows.itertuples()}


def unequal_lengths(rows: pd.DataFrame) -> str:
    """A line where the methods' median lengths differ by more than 5 %, or aren't known; rows: of one env."""
    if rows["length_mean"].isna().any():
        return "Episode lengths were not recorded here, and episodes can end early: **sm may not be comparable**."
    for algorithm, runs in rows.groupby("algorithm"):
        lengths = runs.groupby("line")["length_mean"].median()
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
        for line, every in runs.groupby("line", sort=False):
            seeds, than = every[every["missing"].isna()], reference(runs, line)
            name = {"": f"{algorithm.upper()} {line}"}
            cells = name | {"seeds": f"{len(seeds)}" + f" of {len(every)}" * (len(seeds) < len(every))}
            for heading, measure in RESULTS.items():
                cells[heading] = told(centre, seeds[measure])
            for heading, measure in LOWER.items():
                cells[heading] = told(p_lower, seeds[measure], than[measure], form="{:.2f}".format)
            if good_return:
                good, of = seeds[["good_evaluations", "evaluations"]].sum()
                cells[f"evaluations ≥ {good_return:,}"] = f"{good:g} of {of:g}" if of else DASH
            cells["paper: return, sm"] = quoted.get((algorithm, every["method"].iloc[0]))
            results.append(cells)
            critics.append(name | {heading: told(centre, seeds[measure]) for heading, measure in CRITIC.items()})
    return f"{markdown(results)}\n\n{markdown(critics)}"


def enough_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of the lines that have an interval; rows: of one env and number of steps."""
    done = rows[rows["missing"].isna()]
    return done[done.groupby(["algorithm", "line"])["seed"].transform("size") >= plot.ENOUGH]


def rivals_table(rows: pd.DataFrame) -> str:
    """What PAVE gives over a rival, and on top of one; "" where too few seeds are there for an interval."""
    lines = []
    for algorithm, runs in enough_seeds(rows).groupby("algorithm"):
        for (method, line), ours in runs.groupby(["method", "line"], sort=False):
            for rival in RIVALS.get(method, ()):
                theirs = nearest(runs[runs["method"] == rival], ours["settings"].iloc[0])
                if len(theirs):
                    name = f"{algorithm.upper()} {line} against {theirs['line'].iloc[0]}"
                    lines.append({"": name} | against(ours, theirs))
    return markdown(lines) if lines else ""


def against(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, str]:
    """The cells of a line of rivals_table: the seeds of one line against those of another."""
    cells = {}
    for heading, measure in (LOWER | {"P(smoother), k = 0.1": "smoothness_mean@0.1"}).items():
        cells[heading] = told(p_lower, ours[measure], theirs[measure], form="{:.2f}".format)
    for heading, measure in {"return": "return_mean", "return, k = 0.1": "return_mean@0.1"}.items():
        cells[f"{heading}: difference"] = told(difference, ours[measure], theirs[measure])
    return cells


def seeds_table(rows: pd.DataFrame) -> str:
    """Each seed's oscillation and return, where the table above shows an interval, and after a warm start; else "".

    After a warm start the same seed is the same agent, gone on in several ways.
    """
    done, lines = rows[rows["missing"].isna()], []
    shown = done.index.isin(enough_seeds(rows).index) | (done["method"].map(start_of) != "")
    for (algorithm, line), seeds in done[shown].groupby(["algorithm", "line"], sort=False):
        for heading in ("oscillation", "return"):
            cells = {"seed": f"{algorithm.upper()} {line}, {heading}"}
            for _, run in seeds.sort_values("seed").iterrows():
                twice = (seeds["seed"] == run["seed"]).sum() > 1  # warm starts from several sources
                name = f"{run['seed']}, from {run['origin']}" if twice else str(run["seed"])
                cells[name] = number(run[RESULTS[heading]])
            lines.append(cells)
    return markdown(lines) if lines else ""


def same_settings_twice(rows: pd.DataFrame) -> str:
    """How far base and ablation-000, the same settings, are apart: a measure of what so few seeds can tell."""
    sentences = []
    for algorithm, runs in rows.groupby("algorithm"):
        ablation = runs[runs["method"] == "ablation-000"]
        if ablation.empty:
            continue
        one = nearest(runs[runs["method"] == "base"], ablation["settings"].iloc[0])["oscillation"]
        other = ablation["oscillation"]
        if len(one):
            low, high = sorted((one.median(), other.median()))
            twice = f"are the same settings, trained twice: two sets of {len(one)} and {len(other)} seeds"
            factor = f"**Their median oscillations differ by a factor of {high / low:.1f}**"
            numbers = f"({number(one.median())} and {number(other.median())})"
            told = f"{algorithm.upper()} base and ablation-000 {twice}. {factor} {numbers}: so much chance is in these"
            sentences.append(f"{told}.")
    return "\n".join(sentences)


def summary(rows: pd.DataFrame, measure: str) -> str:
    """The measure over base's: a line for each env and agent at its largest number of steps; warm starts apart."""
    rows = rows[rows[measure].notna()]
    rows = rows[rows["method"].map(plot.last_part).isin(plot.METHODS)]
    lines = []
    for (algorithm, env_id, start), runs in rows.groupby(["algorithm", "env_id", rows["method"].map(start_of)]):
        runs = runs[runs["steps"] == runs["steps"].max()]
        for line, base in runs.groupby("line", sort=False):
            if base["method"].iloc[0] != reference_method(base["method"].iloc[0], {"base"}):
                continue
            cells = compared_with(base, runs, measure)
            if len(cells) < 2:
                continue
            name = f"{algorithm.upper()} {env_id}" + f", after {start}" * bool(start)
            name += line.removeprefix(base["method"].iloc[0])  # the settings, where there are others
            if measure == "smoothness_mean" and unequal_lengths(runs):
                name += " *"
            lines.append({"": name} | dict.fromkeys(plot.METHODS) | cells)
    return markdown(lines)


def compared_with(base: pd.DataFrame, runs: pd.DataFrame, measure: str) -> dict[str, str]:
    """method -> its seeds over base's, for all that compare with these rows of base, itself included."""
    cells = {}
    for line, ours in runs.groupby("line", sort=False):
        than = reference(runs, line)
        if line != base["line"].iloc[0] and (than.empty or than["line"].iloc[0] != base["line"].iloc[0]):
            continue
        x, y, method = ours[measure], base[measure], plot.last_part(ours["method"].iloc[0])
        ratio = f"{centre(x) / centre(y):.2f} ({x.min() / y.max():.2f} to {x.max() / y.min():.2f})"
        cells[method] = "several settings, see below" if method in cells else ratio
    return cells


def effect(rows: pd.DataFrame) -> pd.DataFrame:
    """The dots of plot.effect_figure, of every task that has plain and something else; fewest action dimensions first.

    rows: finished runs, with `line`. The ablation's subsets have a figure of their own.
    """
    rows = rows[rows["oscillation"].notna() & rows["method"].map(plot.last_part).isin(plot.METHODS)]
    tables = []
    for (env_id, algorithm, steps, start), runs in rows.groupby(
        ["env_id", "algorithm", "steps", rows["method"].map(start_of)]
    ):
        task = f"{env_id.rpartition(':')[2]}, {algorithm.upper()}, {steps:,}" + f" after {start}" * bool(start)
        lines = [effect_of(runs, line) for line in runs["line"].unique()]
        dots = pd.concat(lines, ignore_index=True)
        if dots["line"].nunique() > 1:
            tables.append(dots.assign(task=task, env_id=env_id, action_dim=runs["action_dim"].median()))
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables, ignore_index=True).sort_values(["action_dim", "env_id"], kind="stable")


def effect_of(runs: pd.DataFrame, line: str) -> pd.DataFrame:
    """The dots of one line; none where there is no plain agent to compare with. runs: of one agent and task."""
    seeds, plain = runs[runs["line"] == line], reference(runs, line)
    method = seeds["method"].iloc[0]
    if method == reference_method(method, {"base"}):
        plain = seeds
    reached = plain["return_mean"].median()
    gained = reached - plain["random_return"].median()  # NaN where random's return wasn't measured
    worse = (seeds["return_mean"] < reached - WORSE * gained) & (gained > 0)  # of nothing nothing is lost
    ratio = seeds["oscillation"] / plain["oscillation"].median()
    dots = pd.DataFrame({"line": line, "method": plot.last_part(method), "ratio": ratio, "worse": worse})
    return dots[dots["ratio"] > 0]  # none, or an action that never changes: no place on a logarithmic axis


def different_settings(rows: pd.DataFrame) -> list[str]:
    """A line for each whose seeds had not all the same evaluation and, but for seed and folders, the same command."""
    own, lines = r" ?--(output.dir|resume|seed|warm.start)[ =]('[^']*'|\S+)", []
    made = "`" + rows["command"].fillna("not recorded").str.replace(own, "", regex=True) + "`, evaluated over "
    made = made.where(rows["identity"] == LEGACY, "evaluated over ")  # an identity is the settings
    made += rows["episodes"].map("{:g} episodes, version ".format) + rows["version"].map("{:g}".format)
    for _, runs in rows.groupby(LINE, sort=False):
        sides = [f"seeds {' '.join(map(str, seeds))}: {how}" for how, seeds in runs["seed"].groupby(made)]
        if len(sides) > 1:
            lines.append(f"- {name_of(runs.iloc[0])}, {runs['steps'].iloc[0]:,} steps: {'; '.join(sides)}")
    return lines


def name_of(run: pd.Series) -> str:
    return f"{run['algorithm'].upper()} {run['line']} on {run['env_id']}"


def provenance(rows: pd.DataFrame) -> str:
    """By which commits, on which machines, and with which version of the evaluation these runs were made."""
    commits, machines = (rows[name].astype(object).fillna("not recorded") for name in ("commit", "machine"))
    commits = commits.str.replace(r"([0-9a-f]{7})[0-9a-f]{33}", r"\1", regex=True)
    versions = rows["version"].map("{:g}".format)
    told = {"Commits": commits, "Machines": machines, "Versions of the evaluation": versions}
    return " ".join(f"{name}: {counted(values)}." for name, values in told.items())


def counted(values: pd.Series) -> str:
    """Each value once, the most frequent first, with its number of runs where there is more than one value."""
    counts = values.value_counts()
    if len(counts) == 1:
        return counts.index[0]
    return "; ".join(f"{value} ({count} runs)" if count > 1 else f"{value} (1 run)" for value, count in counts.items())


# ------------------------------------------------------------------------------------------------------------- writing


def ablation_figure(rows: pd.DataFrame, title: str) -> plt.Figure:
    """Return and sm with each set of losses: a dot is a seed."""
    figure, parts = plot.pairs_of_panels(rows, title)
    for axes, method, _, seeds in parts:
        for axis, measure in zip(axes, ("return_mean", "smoothness_mean"), strict=True):
            axis.plot([method.removeprefix("ablation-")] * len(seeds), seeds[measure], "ko", alpha=0.6)
            axis.set(xlabel="MPR, VFC, Curv: 1 on, 0 off", ylabel=plot.AXES[measure])
    return figure


def section(rows: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[str]:
    """The tables and figures of one env and number of steps."""
    env_id, steps = rows[["env_id", "steps"]].iloc[0]
    title, done = f"{env_id}, {steps:,} steps", rows[rows["missing"].isna()]
    parts = [f"## {title}"]
    if len(done):
        parts.append(provenance(done))
    if (error := (done["return_std"] / done["episodes"] ** 0.5).median()) > 0:
        parts.append(f"Other starts would move a run's mean return by some ±{number(error)} (standard error).")
    parts.append(unequal_lengths(done))
    if done["noise_reference"].nunique(dropna=False) > 1:
        parts.append("The observation noise differs between runs here (`noise_reference`): **don't compare it**.")
    parts.append(same_settings_twice(done))
    parts.append(tables(rows))
    if rivals := rivals_table(rows):
        parts += [RIVALRY, rivals]
    if seeds := seeds_table(rows):
        parts += ["The seeds:", seeds]
    for kind, figure in figures(done, curves, title).items():
        name = re.sub(r"[^\w-]+", "-", f"{env_id}_{steps}_{kind}") + ".png"
        plot.save(figure, folder / name)
        parts.append(f"![{kind}]({name})")
    return [part for part in parts if part]


def figures(done: pd.DataFrame, curves: pd.DataFrame, title: str) -> dict[str, plt.Figure]:
    """kind -> figure, of the finished runs of a section."""
    ablation, drawn = done["method"].str.startswith("ablation"), {}
    others = done[~ablation]
    if others["line"].nunique() > 1:
        drawn["tradeoff"] = plot.tradeoff_figure(others, title)
        if others["return_mean@0.1"].notna().any():
            drawn["noise"] = plot.noise_figure(others, title)
        runs = others[KEY].assign(row=others.index)
        evaluations = runs.merge(curves).set_index("row")
        known = others.loc[others.index.isin(evaluations.index)]
        if evaluations["step"].nunique() > 1 and known["line"].nunique() > 1:
            drawn["training"] = plot.training_figure(known, evaluations, f"{title}, during the training")
    if ablation.any():
        drawn["ablation"] = ablation_figure(done[ablation], title)
    return drawn


def main(args: Args) -> None:
    (rows, curves), folder = read_inputs(args.inputs), args.output
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g", lineterminator="\n")  # 6 digits: small diffs
    curves.to_csv(folder / "curves.csv", index=False, float_format="%.5g", lineterminator="\n")
    rows, curves = name_lines(read_csv(folder / "runs.csv")), read_curves(folder / "runs.csv")
    done, gone = rows[rows["missing"].isna()], rows[rows["missing"].notna()]
    command = f"python -m benchmarks.report {folder}/runs.csv --output {folder}"
    parts = ["# Our runs, and the paper's numbers beside them", f"Made by `{command}`."]
    with plt.rc_context(plot.STYLE):
        dots = effect(done)
        if len(dots):
            plot.save(plot.effect_figure(dots), folder / "effect.png")
            parts += ["![Each agent's oscillation over the plain agent's, task by task](effect.png)", EFFECT]
        parts += ["## How to read the tables", NOTES]
        parts += ["## Summary", SUMMARY]
        parts += ["Oscillation:", summary(done, "oscillation"), "sm:", summary(done, "smoothness_mean")]
        for _, part in rows.groupby(["env_id", "steps"]):
            parts += section(part, curves, folder)
    parts += ["## Seeds trained or evaluated differently", "\n".join(different_settings(done)) or "None."]
    lines = [f"- {name_of(run)}, seed {run['seed']}: {run['missing']}" for _, run in gone.iterrows()]
    parts += ["## Runs without a result", "\n".join(lines) or "None."]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {folder / 'report.md'}: {len(done)} runs, {len(gone)} without a result")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args, description=__doc__))
