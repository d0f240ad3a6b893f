"""benchmarks/report.py: statistics by independent calculation, what counts as a run, and that nothing misleads."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import td3_pave_continuous as td3

pytest.importorskip("matplotlib", reason="needs benchmarks/requirements.txt")
pytest.importorskip("tabulate", reason="needs benchmarks/requirements.txt")

from benchmarks import report


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Keep figures from being rendered, which takes a second each; what was drawn, by file name."""
    figures = {}
    monkeypatch.setattr(report.plot, "save", lambda figure, path: figures.__setitem__(path.name, figure))
    yield figures
    report.plt.close("all")


def row(method="base", seed=1, sm=0.5, env_id="Pendulum-v1", algorithm="td3", **more) -> dict:
    values = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": 100_000}
    values |= {"episodes": 10, "return_mean": -100.0, "return_std": 20.0, "smoothness_mean": sm, "oscillation": 0.1}
    return values | {"length_mean": 200.0, "neg_def": 0.5, "bound_sup": 9.0, "command": f"x.py --seed {seed}"} | more


def make(tmp_path, rows, **args) -> str:
    """The report of these rows."""
    pd.DataFrame(rows).to_csv(tmp_path / "in.csv", index=False)
    report.main(report.Args(csv=(tmp_path / "in.csv",), output=tmp_path / "out", **args))
    return (tmp_path / "out" / "report.md").read_text()


def lines_of(text: str, heading: str, number=0) -> dict[tuple, dict]:
    """The table `number` of those whose header has `heading`: (algorithm, method) -> its cells by their headings."""
    tables = [part for part in text.split("\n\n") if part.startswith("|") and heading in part.splitlines()[0]]
    header, _, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in tables[number].splitlines())
    return {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}


# ---------------------------------------------------------------------------------------------------- statistics


def test_iqm_and_pairs_by_brute_force():
    assert report.iqm([1, 2, 3, 4, 1000]) == 3
    rng = np.random.default_rng(0)
    for n, m in ((5, 5), (3, 4), (1, 1)):
        x, y = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, m).astype(float)  # many ties
        pairs = [(a < b) + (a == b) / 2 for a, b in itertools.product(x, y)]
        assert report.p_lower(x, y) == pytest.approx(np.mean(pairs))
    assert report.p_lower(np.stack([x, x - 9]), np.stack([y, y])).tolist() == [report.p_lower(x, y), 1]


def test_interval_only_from_ten_seeds_on():
    values = np.arange(9.0)
    assert report.interval([values], report.iqm) is None and report.told(values) == "4.000 (0.000 to 8.000)"
    assert report.interval([np.arange(30.0), values], report.p_lower) is None
    values = np.random.default_rng(1).normal(7, 2, 400)
    low, high = report.interval([values], report.iqm)  # a normal IQM has about 1.2 times the variance of its mean
    assert low < 7 < high and high - low == pytest.approx(2 * 1.96 * 2 / 20 * 1.2**0.5, rel=0.15)
    assert report.told(values) == f"{report.iqm(values):.3f} [{low:.3f}, {high:.3f}]"
    assert report.told([5.0]) == "5.000" and report.told([np.nan]) == report.NONE


def test_envs_weigh_alike_and_base_is_resampled():
    """One env with ratio 1/4 and 40 seeds, one with ratio 1 and 10: the geometric mean is 1/2 whatever the counts."""
    groups = [np.full(40, 1.0), np.full(10, 4.0), np.full(10, 3.0), np.full(10, 3.0)]
    assert report.mean_ratio(*groups) == pytest.approx(0.5)
    assert report.interval(groups, report.mean_ratio) == pytest.approx((0.5, 0.5))
    groups[1] = np.linspace(2, 6, 10)  # only base scatters
    low, high = report.interval(groups, report.mean_ratio)
    assert high - low > 0.05


def test_numbers_are_short():
    told = [report.number(x) for x in (-112.04, 7085.7, 0.35119, 1.5, 0.00234, 0.0, 0.000234, 2.25e8)]
    assert told == ["-112.0", "7086", "0.351", "1.500", "0.002", "0.000", "2.34e-04", "2.25e+08"]


# ------------------------------------------------------------------------------------------------------- the report


def test_tables_show_the_seeds_and_the_papers_numbers(tmp_path):
    rows = [row(seed=i, sm=sm) for i, sm in enumerate((1.0, 2.0, 3.0, 4.0, 20.0))]
    rows += [row("pave", i, sm) for i, sm in enumerate((0.5, 1.5, 0.7))]
    rows += [row("pave", 3, None, return_mean=None, missing="diverged")]
    text = make(tmp_path, rows)
    told = lines_of(text, "P(smoother)", 0)
    assert list(told) == [("TD3", "base"), ("TD3", "pave")]
    base, pave = told.values()
    assert base["sm"] == "3.000 (1.000 to 20.00)" and base["seeds"] == "5" and base["P(smoother)"] == report.NONE
    assert pave["seeds"] == "3 of 4" and pave["P(smoother)"] == "0.93 (15 pairs)"
    assert (pave["paper: return"], pave["paper: sm"]) == ("-167.6", "0.351")
    assert lines_of(text, "M/μ")["TD3", "pave"]["NegDef"] == "0.500 (0.500 to 0.500)"
    assert "TD3 pave on Pendulum-v1, seed 3: diverged" in text[text.index("## Missing") :]
    assert "[" not in "".join(line for line in text.splitlines() if line.startswith("|"))  # no interval anywhere
    assert text.count("no confidence interval") == 1
    assert "some ±6.325 (standard error" in text  # 20 / sqrt(10)


def test_length_beside_every_sm_and_sm_not_comparable(tmp_path, drawn):
    rows = [row(m, s, length_mean=n) for m, n in (("base", 1000.0), ("pave", 930.0)) for s in (1, 2)]
    text = make(tmp_path, rows)
    told = lines_of(text, "sm")["TD3", "pave"]
    names = list(told)
    assert told["episode length"].startswith("930") and names.index("episode length") == names.index("sm") + 1
    columns = list(pd.read_csv(tmp_path / "out" / "runs.csv"))
    assert columns.index("length_mean") == columns.index("smoothness_mean") + 1
    assert "**sm isn't comparable here**" in text and "TD3 pave (930 steps) and base (1,000 steps)" in text
    assert told["P(oscillates less)"] == "0.50 (4 pairs)"
    figure = drawn["Pendulum-v1_100000_tradeoff.png"]
    assert [axis.get_xlabel().partition(" ")[0] for axis in figure.axes] == ["sm", "oscillation"]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["base, 1,000 steps", "pave, 930 steps"]
    near = make(tmp_path, [r | {"length_mean": max(r["length_mean"], 960.0)} for r in rows])
    assert "isn't comparable here" not in near and "oscillates less" not in near
    old = make(tmp_path, [{k: v for k, v in r.items() if k != "length_mean"} for r in rows])
    assert lines_of(old, "sm")["TD3", "pave"]["episode length"] == report.NONE and "were not recorded" in old


def test_summary_takes_the_envs_that_all_its_methods_share(tmp_path):
    sm = {"Pendulum-v1": {"base": 2.0, "pave": 1.0, "auto": 0.5}, "Reacher-v5": {"base": 0.1, "pave": 0.1, "auto": 0.1}}
    sm |= {
        "Ant-v5": {"base": 3.0, "auto": 0.3},
        "benchmarks.scaled_rewards:Pendulum-x10-v1": {"base": 9.0, "auto": 9.0},
    }
    rows = [row(m, s, v, env) for env, of in sm.items() for m, v in of.items() for s in range(5 if "P" in env else 3)]
    text = make(tmp_path, [*rows, row(seed=9, steps=500)])
    assert text.index("## Summary") < text.index("## Ant-v5")
    wide, narrow = (lines_of(text, "over the envs", i) for i in (0, 1))
    assert set(wide) == {("TD3", "base"), ("TD3", "auto")} and "Ant-v5" in wide["TD3", "auto"]
    assert float(wide["TD3", "auto"]["over the envs"]) == pytest.approx((0.25 * 1 * 0.1) ** (1 / 3), abs=0.01)
    assert set(narrow) == {("TD3", "base"), ("TD3", "pave"), ("TD3", "auto")} and "Ant-v5" not in narrow["TD3", "auto"]
    assert narrow["TD3", "auto"]["over the envs"] == "0.50" and narrow["TD3", "pave"]["Pendulum-v1"].startswith(
        "0.50 ("
    )
    assert "x10" not in "".join(wide["TD3", "auto"])


def test_different_settings_are_never_averaged_silently(tmp_path):
    rows = [row(seed=s, command=f"x.py --gamma 0.9 --seed {s} --output-dir '/a b/{s}'") for s in (1, 2)]
    assert "share one command" in make(tmp_path, rows)
    rows += [row(seed=3, command="x.py --gamma 0.8 --seed 3"), row("pave", 1), row("pave", 2, episodes=30)]
    text = make(tmp_path, [*rows, row(seed=4, steps=50_000, sm=7.0)])
    assert "TD3 base on Pendulum-v1, 100,000 steps: seeds 1 2 `--gamma=0.9`; seeds 3 `--gamma=0.8`" in text
    assert "TD3 pave on Pendulum-v1, 100,000 steps: evaluated over 10 or 30 episodes" in text
    assert "## Pendulum-v1, 50,000 steps" in text and "7.000" not in text[text.index("## Pendulum-v1, 100,000") :]


def test_ablation_with_base_and_pave_as_its_ends(tmp_path, drawn):
    rows = [row(f"ablation-{n:03b}", s, 1.0 + n, "Walker2d-v5") for n in range(1, 7) for s in range(2)]
    text = make(tmp_path, rows + [row(seed=s, sm=1.5, env_id="Walker2d-v5") for s in range(3)])
    told = lines_of(text[text.index("**Ablation.**") :], "sm")
    assert len(told) == 7 and told["TD3", "ablation-000"]["seeds"] == "3"
    assert told["TD3", "ablation-011"]["paper: sm"] == "1.918"
    assert told["TD3", "ablation-001"]["P(smoother)"] == "0.00 (6 pairs)"
    assert "Walker2d-v5_100000_ablation.png" in drawn and "over the envs |" not in text


def test_saturation_against_the_gain(tmp_path, drawn):
    rows = [row(m, s, sm, saturation=x) for m, sm, x in (("base", 2.0, 0.75), ("pave", 0.5, 0.1)) for s in (1, 2)]
    assert "saturation_gain.png" in make(tmp_path, rows)
    (points,) = drawn["saturation_gain.png"].axes[0].collections
    assert points.get_offsets().tolist() == [[0.75, 0.25]]
    assert "saturation_gain" not in make(tmp_path, [row(), row("pave")])


def test_the_report_is_made_again_by_its_own_command(tmp_path):
    rows = [row(m, s, 1 / 3 + s, wall_seconds=1 / 7, steps=1_234_567) for m in ("base", "pave") for s in (1, 2)]
    text = make(tmp_path, rows)
    command = re.search(r"Made by `python benchmarks/report.py (\S+) --output (\S+)`", text)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    report.main(report.Args(csv=(report.ROOT / command[1],), output=report.ROOT / command[2]))
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pd.read_csv(tmp_path / "out" / "runs.csv")["steps"].tolist() == [1_234_567] * 4
    for heading in re.findall(r"^- \[(.+)\]\(#", text, re.M):
        assert f"\n## {heading}\n" in text


def test_the_published_report_is_that_of_its_csv(tmp_path):
    folder = ROOT / "benchmarks" / "results" / "report"
    report.main(report.Args(csv=(folder / "runs.csv",), output=tmp_path))
    assert (tmp_path / "runs.csv").read_bytes() == (folder / "runs.csv").read_bytes()
    text = (tmp_path / "report.md").read_text()
    assert text.replace(str(tmp_path), "benchmarks/results/report") == (folder / "report.md").read_text()
    assert all((folder / name).is_file() for name in re.findall(r"!\[.*\]\((.*)\)", text))


# ------------------------------------------------------------------------------------------------- sweeps, bad input


def test_a_sweeps_runs_count_over_a_csvs(tmp_path):
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 110, "learning_starts": 100, "batch_size": 16}
    settings |= {"buffer_size": 1000, "eval_episodes": 0, "compile": False} | dict.fromkeys(td3.LAMBDAS, 0.0)
    cells = [tmp_path / "sweep" / f"Pendulum-v1__td3__base__{seed}" for seed in (1, 2, 3)]
    runs = [td3.train(td3.Args(**settings, seed=i + 1, output_dir=str(cells[i]))) for i in (0, 1)]
    cells[2].mkdir()
    evaluation = row(sm=0.25, return_mean=-7.0) | {"robustness": {"0.1": {"return_mean": -9.0, "smoothness_mean": 0.3}}}
    (runs[0] / "evaluation.json").write_text(json.dumps(evaluation))
    (cells[0] / "cell.json").write_text(json.dumps({"wall_seconds": 12.5, "commit": None}))
    make(tmp_path, [row(steps=110, sm=9.0), row("pave", steps=110)], runs=(tmp_path / "sweep",))
    told = pd.read_csv(tmp_path / "out" / "runs.csv").set_index(["method", "seed"])
    assert told.loc[("base", 1), ["smoothness_mean", "return_mean@0.1", "wall_seconds"]].tolist() == [0.25, -9.0, 12.5]
    assert told["missing"].dropna().to_dict() == {
        ("base", 2): "not evaluated yet (benchmarks/evaluate.py)",
        ("base", 3): "not started",
    }
    assert told.loc["base", "steps"].tolist()[:2] == [110, 110]
    (runs[0] / "evaluation.json").unlink()  # what a CSV has isn't lost with the sweep's files
    report.main(report.Args(csv=(tmp_path / "out" / "runs.csv",), runs=(tmp_path / "sweep",), output=tmp_path / "new"))
    assert pd.read_csv(tmp_path / "new" / "runs.csv")["smoothness_mean"].tolist()[0] == 0.25


def test_bad_input_is_one_line(tmp_path):
    files = {"lacks.csv": "a,b\n1,2\n", "empty.csv": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name, value in {
        "nan.csv": {"sm": "x"},
        "key.csv": {"seed": "x"},
        "one.csv": {},
        "two.csv": {"sm": 9.0},
    }.items():
        pd.DataFrame([row(**value)]).to_csv(tmp_path / name, index=False)
    cases = {"lacks algorithm": ["lacks.csv"], "cannot read": ["empty.csv"], "line 2": ["nan.csv"], "name": ["key.csv"]}
    cases |= {"differ on td3 base": ["one.csv", "two.csv"], "no finished run in no input": []}
    for message, names in cases.items():
        with pytest.raises(report.UserError, match=message):
            report.read_inputs(report.Args(csv=tuple(tmp_path / name for name in names)))
    with pytest.raises(report.UserError, match="is no sweep"):
        report.read_inputs(report.Args(runs=(tmp_path,)))


@pytest.mark.parametrize("start", [["benchmarks/report.py"], ["-m", "benchmarks.report"]])
def test_the_command_line(start, tmp_path):
    command = [sys.executable, *start, str(tmp_path / "none.csv"), "--output", str(tmp_path / "out")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
