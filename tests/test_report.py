"""benchmarks/report.py: statistics by independent calculation, what counts as a run, and that nothing misleads."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from make_run import BASE, make_run
from programs import fails

import td3_pave_continuous as td3
from benchmarks import report

PUBLISHED = ROOT / "benchmarks" / "results" / "report"


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Keep figures from being rendered, which takes a second each; what was drawn, by file name."""
    figures = {}

    def save(figure, path):
        figures[path.name] = figure
        report.plt.close(figure)

    monkeypatch.setattr(report.plot, "save", save)
    return figures


def row(method="base", seed=1, sm=0.5, env_id="Hopper-v5", algorithm="td3", **more) -> dict:
    values = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": 100_000}
    values |= {"episodes": 10, "return_mean": -100.0, "return_std": 20.0, "smoothness_mean": sm, "oscillation": 0.1}
    return values | {"length_mean": 200.0, "neg_def": 0.5, "bound_sup": 9.0, "command": f"x.py --seed {seed}"} | more


def make(tmp_path, rows, *inputs) -> str:
    """The report of these rows, and other inputs."""
    pd.DataFrame(rows).to_csv(tmp_path / "in.csv", index=False)
    report.main(report.Args((tmp_path / "in.csv", *inputs), tmp_path / "out"))
    return (tmp_path / "out" / "report.md").read_text()


def table(text: str, heading: str) -> dict[str, dict]:
    """The first table whose header has `heading`: a dict of the cells by their headings for each line's name."""
    found = next(p for p in text.split("\n\n") if p.startswith("|") and heading in p.partition("\n")[0])
    header, _, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in found.splitlines())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def told(statistic, *groups, form=str) -> list[float]:
    """The numbers that a table shows of these seeds."""
    text = report.told(statistic, *map(pd.Series, groups), form=form)
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def test_statistics_by_brute_force():
    assert told(report.centre, [1, 2, 3, 4, 1000, 6]) == [3.5, 1, 1000]  # the median, the lowest, the highest
    squares = np.arange(12.0) ** 2
    assert told(report.centre, squares + 6)[0] == pytest.approx(235 / 6)  # 6 + (9 + 16 + ... + 64) / 6
    rng = np.random.default_rng(0)
    for n, m in ((5, 5), (3, 4), (1, 1)):
        x, y = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, m).astype(float)  # many ties
        pairs = [(a < b) + (a == b) / 2 for a, b in itertools.product(x, y)]
        assert told(report.p_lower, x, y) == pytest.approx([np.mean(pairs)])
    numbers = [report.number(x) for x in (-112.04, 7085.7, 0.35119, 0.99996, 0.0, 0.000234, 2.25e8)]
    assert numbers == ["-112.0", "7,086", "0.351", "1.000", "0.000", "2.3e-04", "2.2e+08"]
    assert report.told(report.centre, pd.Series([5.0])) == "5.000" and not told(report.centre, [np.nan])


def test_intervals_from_ten_seeds_on_with_base_resampled():
    values = np.random.default_rng(1).normal(7, 2, 400)
    assert len(told(report.p_lower, np.arange(30.0), np.arange(9.0))) == 1
    # the interquartile mean of normal values has about 1.2 times the variance of their mean
    _, low, high = told(report.centre, values)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20 * 1.2**0.5, rel=0.15)
    for ours in (values[:20], np.full(10, 7.0)):  # also where only base scatters
        share, low, high = told(report.p_lower, ours, values[20:40])
        assert 0.2 < high - low < 0.6 and low < share < high


def test_tables_show_every_seed_and_warn_where_sm_is_not_comparable(tmp_path, drawn):
    rows = [row(seed=i, sm=sm) for i, sm in enumerate((1.0, 2.0, 3.0, 4.0, 20.0))]
    rows += [row("pave", i, sm, length_mean=186.0) for i, sm in enumerate((0.5, 1.5, 0.7))]
    rows += [row("pave", 3, None, return_mean=None, missing="diverged")]
    rows += [row("auto", env_id="Ant-v5"), row("pave", env_id="Ant-v5")]  # no base: in no summary
    text = make(tmp_path, rows)
    pave = table(text, "P(smoother)")["TD3 pave"]
    assert pave["sm"] == "0.700 (0.500 to 1.500)" and pave["seeds"] == "3 of 4" and pave["return"] == "-100.0"
    assert pave["P(smoother)"] == "0.93" and pave["P(calmer)"] == "0.50"
    assert table(text, "M/μ")["TD3 pave"] == {"": "TD3 pave", "M/μ": "9.000", "NegDef": "0.500"}
    (summary,) = table(text, "base").values()
    assert [*summary.values()] == ["TD3 Hopper-v5 *", "1.00 (0.05 to 20.00)", "0.23 (0.03 to 1.50)"]
    assert "TD3 pave on Hopper-v5, seed 3: diverged" in text.partition("\n## Runs without a result")[2]
    assert [*drawn] == [f"{env}_100000_tradeoff.png" for env in ("Ant-v5", "Hopper-v5")]  # no noise, no figure of it
    assert "some ±6.325 (standard error)" in text  # 20 / sqrt(10)
    assert text.count("**sm isn't comparable here**") == 1
    assert "isn't comparable here" not in make(tmp_path, [row(), row("pave", length_mean=192.0)])


def test_different_settings_are_never_averaged_silently(tmp_path):
    rows = [row(seed=s, command=f"x.py --gamma 0.9 --seed {s} --output-dir '/a b/{s}'") for s in (1, 2)]
    assert "differently\n\nNone." in make(tmp_path, rows)
    rows += [row(seed=3, command="x.py --gamma 0.8 --seed 3"), row("pave", 1), row("pave", 2, episodes=30)]
    text = make(tmp_path, rows)
    assert "seeds 3: `x.py --gamma 0.8`" in text and "seeds 1 2: `x.py --gamma 0.9`, evaluated over 10" in text
    assert "TD3 pave on Hopper-v5, 100,000 steps: seeds 1: `x.py`, evaluated over 10 episodes, version 1; " in text
    assert "noise differs" not in text and "noise differs" in make(tmp_path, [*rows, row(noise_reference="a run")])


def test_an_ablation_compares_with_no_loss_and_shows_every_seed(tmp_path, drawn):
    rows = [row(f"ablation-{n:03b}", s, 1.0 + n, "Walker2d-v5") for n in range(8) for s in range(2)]
    told = table(make(tmp_path, rows), "sm")
    assert told["TD3 ablation-001"]["P(smoother)"] == "0.00"
    assert told["TD3 ablation-011"]["paper: return, sm"].endswith(", 1.918")
    axis = drawn["Walker2d-v5_100000_ablation.png"].axes[1]
    assert [t.get_text() for t in axis.get_xticklabels()][3:6] == ["011", "100", "101"]
    assert [list(line.get_ydata()) for line in axis.lines] == [[1.0 + n, 1.0 + n] for n in range(8)]


def test_the_figure_of_saturation_sorts_the_tasks_by_it(tmp_path, drawn):
    """And shows what pave leaves of base's oscillation."""
    rows = [row(env_id="Ant-v5", saturation=0.3), row(env_id="x:Ball-v0", saturation=0.2)]
    rows += [row("pave", env_id="Ant-v5", oscillation=0.02), row("pave", env_id="x:Ball-v0", oscillation=0.15)]
    make(tmp_path, rows)
    (axis,) = drawn["saturation.png"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["Ball\nTD3\n20.0%", "Ant\nTD3\n30.0%"]
    assert axis.collections[0].get_offsets()[:, 1].tolist() == pytest.approx([1.5, 0.2])


def test_the_published_report_is_that_of_its_csv(tmp_path):
    published = (PUBLISHED / "report.md").read_text()
    report.main(report.Args((PUBLISHED / "runs.csv",), tmp_path))
    assert (tmp_path / "runs.csv").read_bytes() == (PUBLISHED / "runs.csv").read_bytes()
    assert (tmp_path / "report.md").read_text().replace(str(tmp_path), "benchmarks/results/report") == published
    assert set(re.findall(r"!\[.*\]\((.*)\)", published)) == {path.name for path in PUBLISHED.glob("*.png")}
    assert max(path.stat().st_size for path in PUBLISHED.glob("*.png")) < 80_000


def test_a_sweeps_runs_count_over_a_csvs(tmp_path, capsys):
    cells = tmp_path / "sweep"
    hopper = {"env_id": "Hopper-v5", "returns": (9000.0, 2500.0, 2499.0)}
    runs = [make_run(cells / f"any name {i}", td3, seed=i, **BASE | hopper) for i in (1, 2, 3)]
    make_run(cells / "4", td3, seed=4, evaluated=False)
    (make_run(cells / "6", td3, seed=6) / "evaluation.json").write_text('{"return_mean": 1')
    (runs[0].parent / "cell.json").write_text(json.dumps({"wall_seconds": 12.5, "command": "how"}))
    (runs[1] / "checkpoint.pt").unlink()  # it may have been too large to keep
    (runs[2] / "summary.json").unlink()
    (make_run(cells / "5", td3, seed=5) / "checkpoint.pt").write_bytes(b"broken")
    make(tmp_path, [row(steps=300, sm=9.0), row("pave", steps=300), row(seed=3, steps=300, sm=7.0)], cells, runs[1])
    told = pd.read_csv(tmp_path / "out" / "runs.csv").set_index(["env_id", "method", "seed"])
    names = ["smoothness_mean", "return_mean", "return_mean@0.1", "wall_seconds", "command"]
    names += ["evaluations", "good_evaluations"]  # those at 200 and 300 steps
    assert told.loc[("Hopper-v5", "base", 1), names].tolist() == [0.1, 2499.0, 2498.9, 12.5, "how", 2, 1]
    assert told.loc[("Hopper-v5", "base", 3), "smoothness_mean"] == 7.0  # what has no result replaces none
    command = told.loc[("Hopper-v5", "base", 2), "command"]  # not of a sweep: what makes it differ from the defaults
    assert command.startswith("td3_pave_continuous.py with {'env_id': 'Hopper-v5', ") and "'lambda_mpr': 0.0" in command
    assert "seed" not in command and "gamma" not in command
    missing = {("Pendulum-v1", "pave", seed): "not evaluated (benchmarks.evaluate)" for seed in (4, 6)}
    assert told["missing"].dropna().to_dict() == missing
    errors = capsys.readouterr().err
    assert "continuous__5 is left out" in errors and "2 results are replaced" in errors


BAD_ROWS = {  # what the error says: rows of in.csv
    "'algorithm'": [{"a": 1}], "No columns": [], "'x'": [row(seed="x")], "line 2": [row(method=None)],
    "line 3": [row(), row(sm=None)],
}  # fmt: skip
BAD_INPUTS = dict.fromkeys(BAD_ROWS, "in.csv")
BAD_INPUTS |= {"cannot read": "none.csv", "no finished run in no input": "", "has no run folder": "."}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(message, tmp_path, monkeypatch):
    pd.DataFrame(BAD_ROWS.get(message)).to_csv(tmp_path / "in.csv", index=False)
    monkeypatch.chdir(tmp_path)
    assert message in fails("benchmarks.report", *BAD_INPUTS[message].split())
    assert not (tmp_path / "report").exists()
