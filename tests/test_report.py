"""benchmarks/report.py: statistics by independent calculation, what counts as a run, and that nothing misleads."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from helper_programs import fails
from helper_runs import BASE, make_run

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
    numbers = [report.number(x) for x in (-112.04, 7085.7, 0.35119, 0.00153, 0.99996, 0.0, 0.000234, 2.25e8)]
    assert numbers == ["-112.0", "7,086", "0.351", "0.0015", "1.000", "0.000", "2.3e-04", "2.2e+08"]
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
    rows += [row(env_id="Swimmer-v5")]  # nor with nothing but base
    text = make(tmp_path, rows)
    pave = table(text, "P(smoother)")["TD3 pave"]
    assert pave["sm"] == "0.700 (0.500 to 1.500)" and pave["seeds"] == "3 of 4" and pave["return"] == "-100.0"
    assert pave["P(smoother)"] == "0.93" and pave["P(calmer)"] == "0.50"
    assert table(text, "M/μ")["TD3 pave"] == {"": "TD3 pave", "M/μ": "9.000", "NegDef": "0.500"}
    (summary,) = table(text, "base").values()
    assert [*summary.values()] == ["TD3 Hopper-v5", "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)"]
    assert "| TD3 Hopper-v5 * | 1.00 (0.05 to 20.00) | 0.23 (0.03 to 1.50) |" in re.sub(" +", " ", text)
    assert "TD3 Swimmer-v5 |" not in text and "TD3 Ant-v5 |" not in text
    assert "TD3 pave on Hopper-v5, seed 3: diverged" in text.partition("\n## Runs without a result")[2]
    tradeoffs = [f"{env}_100000_tradeoff.png" for env in ("Ant-v5", "Hopper-v5")]
    assert [*drawn] == ["effect.png", *tradeoffs]  # no noise, no figure of it
    assert "some ±6.325 (standard error)" in text  # 20 / sqrt(10)
    assert text.count("**sm isn't comparable here**") == 1
    assert "isn't comparable here" not in make(tmp_path, [row(), row("pave", length_mean=192.0)])


def test_ten_seeds_are_compared_with_the_rivals_and_shown_one_by_one(tmp_path):
    def rows(method, first, count=10, **more):
        return [row(method, seed, 0.5, oscillation=first + seed / 1000, **more) for seed in range(1, count + 1)]

    few = [*rows("base", 0.3), *rows("pave", 0.1), *rows("filter", 0.2, count=9)]
    text = make(tmp_path, few)
    assert [*table(text, "return: difference")] == ["TD3 pave against base"]  # nine of the filter are too few
    seeds = table(text, " 10 ")
    assert [*seeds] == [f"TD3 {method}, {what}" for method in ("base", "pave") for what in ("oscillation", "return")]
    assert seeds["TD3 pave, oscillation"]["10"] == "0.110" and seeds["TD3 pave, return"]["1"] == "-100.0"
    returns = np.random.default_rng(0).normal(0, 5, (2, 10))
    filtered, on_top = rows("filter", 0.2), rows("filter+pave", 0.2085)
    for i in range(10):
        filtered[i]["return_mean"], on_top[i]["return_mean"] = -100 + returns[0, i], -90 + returns[1, i]
    against = table(make(tmp_path, [*few, *filtered, *on_top]), "return: difference")
    pairs = ("pave", "base"), ("pave", "filter"), *(("filter+pave", other) for other in ("base", "pave", "filter"))
    assert [*against] == [f"TD3 {ours} against {theirs}" for ours, theirs in pairs]
    assert against["TD3 pave against filter"]["P(calmer)"] == "1.00"
    assert against["TD3 filter+pave against filter"]["P(calmer)"].startswith("0.01 [")
    told = against["TD3 filter+pave against filter"]["return: difference"]
    value, low, high = map(float, re.findall(r"-?[\d.]+", told))
    draws = np.random.default_rng(1).integers(0, 10, (2, 4000, 10))
    middles = [np.sort(side[draw], 1)[:, 2:8].mean(1) for side, draw in zip(returns, draws, strict=True)]
    expected = np.percentile(10 + middles[1] - middles[0], [2.5, 97.5])
    assert [low, high] == pytest.approx(list(expected), abs=0.4) and low < value < high
    assert "The seeds" not in make(tmp_path, few[:9])


def test_the_seeds_of_a_warm_start_are_shown_however_few():
    rows = pd.DataFrame([row(method, seed, line=method) for method in ("base", "base-then-pave") for seed in (1, 2)])
    seeds = table(report.seeds_table(rows.assign(missing=None)), " 2 ")
    assert [*seeds] == ["TD3 base-then-pave, oscillation", "TD3 base-then-pave, return"]


def test_two_warm_starts_of_one_seed_are_both_shown():
    rows = pd.DataFrame([row("base-then-base", seed, identity="a", origin="x", line="l") for seed in range(1, 10)])
    again = pd.DataFrame([row("base-then-base", 9, identity="a", origin="y", line="l", oscillation=0.7)])
    seeds = table(report.seeds_table(pd.concat([rows, again]).assign(missing=None)), " 8 ")["TD3 l, oscillation"]
    assert (seeds["8"], seeds["9, from x"], seeds["9, from y"]) == ("0.100", "0.100", "0.700")


def test_different_settings_are_never_averaged_silently(tmp_path):
    rows = [row(seed=s, command=f"x.py --gamma 0.9 --seed {s} --output-dir '/a b/{s}'") for s in (1, 2)]
    assert "differently\n\nNone." in make(tmp_path, rows)
    rows += [row(seed=3, command="x.py --gamma 0.8 --seed 3"), row("pave", 1), row("pave", 2, episodes=30)]
    text = make(tmp_path, rows)
    assert "seeds 3: `x.py --gamma 0.8`" in text and "seeds 1 2: `x.py --gamma 0.9`, evaluated over 10" in text
    assert "TD3 pave on Hopper-v5, 100,000 steps: seeds 1: `x.py`, evaluated over 10 episodes, version 1; " in text
    assert "noise differs" not in text and "noise differs" in make(tmp_path, [*rows, row(noise_reference="a run")])


def test_an_ablation_compares_with_no_loss_also_beside_base_and_shows_every_seed(tmp_path, drawn):
    rows = [row(f"ablation-{n:03b}", s, 1.0 + n, "Walker2d-v5", oscillation=0.4) for n in range(8) for s in range(2)]
    rows += [row("base", s, 1.5, "Walker2d-v5", oscillation=0.1) for s in range(3)]
    rows += [row("pave", s, 1.2, "Walker2d-v5", oscillation=0.1) for s in range(3)]
    text = make(tmp_path, rows)
    told = table(text, "sm")
    assert told["TD3 ablation-001"]["P(smoother)"] == "0.00" and told["TD3 ablation-001"]["P(calmer)"] == "0.50"
    assert told["TD3 ablation-000"]["P(smoother)"] == told["TD3 base"]["P(calmer)"] == "\u2013"
    assert told["TD3 pave"]["P(smoother)"] == "1.00"  # with base
    assert told["TD3 ablation-011"]["paper: return, sm"].endswith(", 1.918")
    assert (
        "two sets of 3 and 2 seeds. **Their median oscillations differ by a factor of 4.0** (0.100 and 0.400)" in text
    )
    assert "trained twice" not in make(tmp_path, rows[:16])
    axis = drawn["Walker2d-v5_100000_ablation.png"].axes[1]
    assert [t.get_text() for t in axis.get_xticklabels()][3:6] == ["011", "100", "101"]
    assert [list(line.get_ydata()) for line in axis.lines] == [[1.0 + n, 1.0 + n] for n in range(8)]


def test_a_warm_start_compares_with_its_source_going_on():
    compared = {
        "base-then-pave": "base-then-base", "base-then-base": "base-then-base", "filter": "base", "filter+pave": "base",
        "filter-then-filter+pave": "filter-then-filter", "base-then-pave-then-auto": "base-then-pave-then-base",
    }  # fmt: skip
    for method, expected in compared.items():
        assert report.reference_method(method, {"base", "ablation-000"}) == expected
    assert report.reference_method("pave", {"pave", "ablation-000"}) == "ablation-000"


def test_the_effects_dots_are_over_plains_median_and_hollow_where_the_return_is_lower():
    plain = [row(seed=i, oscillation=o, return_mean=r) for i, o, r in ((1, 0.2, 90.0), (2, 0.4, 100.0), (3, 0.8, 89.9))]
    rows = [row("pave", 1, oscillation=0.1, return_mean=80.0), row("pave", 2, oscillation=0.2, return_mean=78.9)]
    rows += [row("own", oscillation=0.0), row("ablation-101"), row(env_id="Ant-v5"), row("pave", steps=7)]
    rows += [row("base-then-base", oscillation=0.5, return_mean=5.0, steps=9)]
    rows += [row("base-then-pave", oscillation=1.0, return_mean=5.0, steps=9)]
    rows += [row(env_id="x:Few-v0", action_dim=1, random_return=None)]
    rows += [row("auto", env_id="x:Few-v0", action_dim=1, random_return=None, return_mean=-1e6)]
    rows = pd.DataFrame({"action_dim": 2, "random_return": -10.0} | own | LINE for own in (*plain, *rows))
    dots = report.effect(rows.assign(line=rows["method"]))
    assert dots["task"].unique().tolist() == [
        "Few-v0, TD3, 100,000",
        "Hopper-v5, TD3, 9 after base",
        "Hopper-v5, TD3, 100,000",
    ]
    dots = dots.set_index(["task", "method"])
    told = dots.loc["Hopper-v5, TD3, 100,000"]
    assert told.loc["base", "ratio"].tolist() == pytest.approx([0.5, 1, 2]) and not told.loc["base", "worse"].any()
    assert told.loc["pave", "ratio"].tolist() == pytest.approx([0.25, 0.5])
    assert told.loc["pave", "worse"].tolist() == [False, True]  # plain gained 100: below 90 - 10
    assert set(told.index) == {"base", "pave"}
    assert dots.loc["Hopper-v5, TD3, 9 after base", "ratio"].tolist() == [1, 2]
    assert not dots.loc["Few-v0, TD3, 100,000", "worse"].any()  # nobody knows


LINE = {"identity": "legacy", "origin": "", "settings": ""}


def test_runs_of_other_settings_or_starts_are_other_lines_and_replace_nothing(tmp_path, drawn):
    cells, origin = tmp_path / "sweep", {"run": "x", "step": 25_000, "args": {"env_id": "Pendulum-v1"} | BASE}
    for i, settings in enumerate((BASE, {}, {"q_lr": 1e-4}, {"q_lr": 1e-4} | BASE, {"eval_episodes": 3})):
        make_run(cells / str(i), td3, **settings)  # the last one is the second's training again
    for i in (1, 2):
        source = origin | {"args": origin["args"] | {"seed": i}, "origin": None}
        make_run(cells / f"then {i}", td3, seed=3, origin=source, **BASE)  # two runs, of one seed
        make_run(cells / f"pave {i}", td3, seed=i, origin=source)
    make_run(cells / "late", td3, origin=source | {"step": 50_000})
    legacy = [row(env_id="Pendulum-v1", steps=300), row("pave", env_id="Pendulum-v1", steps=300)]
    text = make(tmp_path, legacy, cells)
    lines = table(text, "P(calmer)")
    assert {name.removeprefix("TD3 "): line["seeds"] for name, line in lines.items()} == {
        "base": "1", "base (q_lr 0.0001)": "1", "base (settings not recorded)": "1", "pave": "1",
        "pave (q_lr 0.0001)": "1", "pave (settings not recorded)": "1", "base-then-base": "2",
        "base-then-pave (from base at 25,000)": "2", "base-then-pave (from base at 50,000)": "1",
    }  # fmt: skip
    rows = pd.read_csv(tmp_path / "out/runs.csv", dtype={"identity": str}).set_index(["method", "seed"])
    assert rows.loc[("base-then-base", 3), "origin"].tolist() == ["base seed 1 at 25,000", "base seed 2 at 25,000"]
    assert json.loads(rows.loc[("base-then-base", 3), "settings"].iloc[0])["lambda_mpr"] == 0
    assert rows.loc[("base", 1), "identity"].nunique() == 3 and (rows["identity"] == "legacy").sum() == 2
    again = (tmp_path / "out/runs.csv").read_bytes()
    make(tmp_path, [row(identity="00123e456789", settings="{}")])  # of digits alone, or a power of ten to pandas
    assert ",00123e456789," in (tmp_path / "out/runs.csv").read_text()
    report.main(report.Args((tmp_path / "out/runs.csv",), tmp_path / "out"))
    assert ",00123e456789," in (tmp_path / "out/runs.csv").read_text()
    (tmp_path / "out/runs.csv").write_bytes(again)
    report.main(report.Args((tmp_path / "out/runs.csv", cells), tmp_path / "twice"))  # the same runs: still once each
    assert (tmp_path / "twice/runs.csv").read_bytes() == again
    assert {"effect.png", "Pendulum-v1_300_tradeoff.png"} <= drawn.keys()


def test_a_line_compares_with_the_base_of_its_own_settings():
    lines = [
        ("base (new)", "{}", 0.5),
        ("base", "", 1.0),
        ("base (q_lr)", '{"q_lr": 1}', 2.0),
        ("base (gamma)", '{"gamma": 1}', 3.0),
    ]
    lines += [("pave (q_lr)", '{"q_lr": 1, "lambda_mpr": 2}', 9.0), ("pave", '{"lambda_mpr": 2, "gamma": 1}', 9.0)]
    lines += [("auto (old)", "", 9.0)]
    rows = pd.DataFrame(lines, columns=["line", "settings", "oscillation"])
    rows["method"] = rows["line"].str.partition(" ")[0]
    expected = {"pave (q_lr)": [2.0], "pave": [3.0], "auto (old)": [1.0], "base": [], "base (q_lr)": []}
    for line, told in expected.items():
        assert report.reference(rows, line)["oscillation"].tolist() == told


def test_methods_stand_in_one_order_also_after_a_warm_start():
    methods = ["base-then-auto", "pave", "base-then-base", "ablation-000", "base-then-pave", "base"]
    ordered = pd.DataFrame({"method": methods}).sort_values("method", key=report.in_order)["method"]
    assert [*ordered] == ["base", "pave", "ablation-000", "base-then-base", "base-then-pave", "base-then-auto"]


def test_a_wrapped_env_reports_under_the_env_inside(tmp_path):
    told = report.read_run(make_run(tmp_path, td3, env_id="benchmarks.envs:filter/Pendulum-v1", **BASE))[0]
    assert (told["env_id"], told["method"], told["action_dim"]) == ("Pendulum-v1", "filter", 1)
    assert told["return_mean"] == -100


def test_an_evaluation_counts_only_for_the_training_that_it_is_of(tmp_path):
    run = make_run(tmp_path, td3)
    file = run / "evaluation.json"
    good = json.loads(file.read_text())
    assert report.read_run(run)[0]["return_mean"] == -100
    for stale in ({"step": 100}, {"episodes": 0}, {"version": 1}, {"step": None}):
        changed = {name: value for name, value in (good | stale).items() if value is not None}
        file.write_text(json.dumps(changed))
        told, _ = report.read_run(run)
        assert told["missing"].startswith("not evaluated (evaluation.json is of ") and "return_mean" not in told


def test_each_stretch_of_a_training_tells_its_machine_and_commit(tmp_path):
    run = make_run(tmp_path, td3)
    stretches = [{"machine": "A", "torch": "2.13", "commit": "c1", "preload": "x.so"}]
    stretches += [{"machine": name, "torch": "2.13", "commit": "c2", "preload": None} for name in ("B", "A")]
    (run.parent / "cell.json").write_text(json.dumps({"stretches": stretches, "command": "how", "wall_seconds": None}))
    told, _ = report.read_run(run)
    assert [told[name] for name in report.MADE] == ["A, LD_PRELOAD=x.so; B; A", "2.13", "c1; c2"]
    assert (told["command"], told["wall_seconds"]) == ("how", None)
    (run.parent / "cell.json").write_text('{"machine": "one", "torch": "2", "commit": "abc"}')  # an older cell
    assert [report.read_run(run)[0][name] for name in report.MADE] == ["one", "2", "abc"]


def test_the_evaluations_during_the_training_are_those_of_the_run_that_counts(tmp_path, drawn):
    cells = tmp_path / "sweep"
    for seed in (1, 2):
        make_run(cells / f"base {seed}", td3, seed=seed, **BASE)
        make_run(cells / f"pave {seed}", td3, seed=seed, returns=(-9.0, -8.0, -7.0))
    make_run(cells / "none", td3, seed=3, evaluated=False)
    report.main(report.Args((cells,), tmp_path / "old"))
    curves = pd.read_csv(tmp_path / "old/curves.csv").set_index(["method", "seed"])
    assert curves.loc[("pave", 2), ["step", "return"]].to_numpy().tolist() == [[100, -9], [200, -8], [300, -7]]
    assert set(curves.index) == {("base", 1), ("base", 2), ("pave", 1), ("pave", 2)} and len(curves) == 12
    assert set(curves["oscillation"]) == {0.05}
    lines = drawn["Pendulum-v1_300_training.png"].axes[0].lines
    assert lines[0].get_ydata().tolist() == [-300, -200, -100] and len(lines) == 6  # a median, two seeds
    make_run(tmp_path / "again", td3, seed=1, returns=(-6.0,), **BASE)  # evaluated more seldom
    report.main(report.Args((tmp_path / "old/runs.csv", tmp_path / "again"), tmp_path / "new"))
    curves = pd.read_csv(tmp_path / "new/curves.csv").set_index(["method", "seed"])
    assert curves.loc[[("base", 1)], ["step", "return"]].to_numpy().tolist() == [[100, -6]] and len(curves) == 10
    assert drawn["Pendulum-v1_300_training.png"].axes[0].lines[0].get_xdata().tolist() == [100]  # which both have
    (tmp_path / "new/curves.csv").unlink()  # an older report has none
    report.main(report.Args((tmp_path / "new/runs.csv",), tmp_path / "older"))
    assert len((tmp_path / "older/curves.csv").read_text().splitlines()) == 1
    (tmp_path / "new/curves.csv").write_text("a,b\n1,2\n")
    assert "curves.csv" in fails("benchmarks.report", tmp_path / "new/runs.csv")


def test_a_section_says_where_and_by_what_its_runs_were_made(tmp_path):
    commit = "0123456789" * 4
    rows = [row(commit=commit, machine="A", version=2), row("pave", commit=f"{commit}; {commit[::-1]}", machine="A")]
    text = make(tmp_path, rows)
    assert (
        "Commits: 0123456 (1 run); 0123456; 9876543 (1 run). Machines: A. Versions of the evaluation: 2 (1 run); 1"
        in text
    )


def test_the_published_report_is_that_of_its_csv(tmp_path):
    published = (PUBLISHED / "report.md").read_text()
    report.main(report.Args((PUBLISHED / "runs.csv",), tmp_path))
    for name in ("runs.csv", "curves.csv"):
        assert (tmp_path / name).read_bytes() == (PUBLISHED / name).read_bytes()
    assert (tmp_path / "report.md").read_text().replace(str(tmp_path), "benchmarks/results/report") == published
    assert set(re.findall(r"!\[.*\]\((.*)\)", published)) == {path.name for path in PUBLISHED.glob("*.png")}
    assert max(path.stat().st_size for path in PUBLISHED.glob("*.png")) < 80_000


def test_a_later_input_counts_but_what_has_no_result_replaces_none(tmp_path, capsys):
    cells = tmp_path / "sweep"
    hopper = BASE | {"env_id": "Hopper-v5", "returns": (9000.0, 2500.0, 2499.0)}
    runs = [make_run(cells / f"any name {i}", td3, seed=i, **hopper) for i in (1, 2, 3)]
    report.main(report.Args((cells,), tmp_path / "old"))
    old = pd.read_csv(tmp_path / "old/runs.csv", dtype={"identity": str}).assign(smoothness_mean=7.0)
    make_run(cells / "4", td3, seed=4, evaluated=False)
    (make_run(cells / "6", td3, seed=6) / "evaluation.json").write_text('{"return_mean": 1')
    (runs[0].parent / "cell.json").write_text(json.dumps({"wall_seconds": 12.5, "command": "how"}))
    (runs[1] / "checkpoint.pt").unlink()  # it may have been too large to keep
    (runs[2] / "summary.json").unlink()
    (make_run(cells / "5", td3, seed=5) / "checkpoint.pt").write_bytes(b"broken")
    make(tmp_path, old, cells, runs[1])
    told = pd.read_csv(tmp_path / "out/runs.csv").set_index(["env_id", "method", "seed"])
    names = ["smoothness_mean", "return_mean", "return_mean@0.1", "wall_seconds", "command", "random_return"]
    names += ["evaluations", "good_evaluations"]  # those at 200 and 300 steps
    assert told.loc[("Hopper-v5", "base", 1), names].tolist() == [0.1, 2499.0, 2498.9, 12.5, "how", -1000, 2, 1]
    assert told.loc[("Hopper-v5", "base", 3), "smoothness_mean"] == 7.0  # what has no result replaces none
    command = told.loc[("Hopper-v5", "base", 2), "command"]  # not of a sweep: what makes it differ from the defaults
    assert command.startswith("td3_pave_continuous.py with {") and "'lambda_mpr': 0" in command
    assert "seed" not in command and "gamma" not in command
    missing = {("Pendulum-v1", "pave", seed): "not evaluated (benchmarks.evaluate)" for seed in (4, 6)}
    assert told["missing"].dropna().to_dict() == missing
    errors = capsys.readouterr().err
    assert "continuous__5 is left out" in errors and "3 results are replaced" in errors


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
