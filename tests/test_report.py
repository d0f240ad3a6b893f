"""benchmarks/report.py: the statistics by independent calculation, what counts as a run, and how it is told."""

import csv
import itertools
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import sac_pave_continuous as sac
import td3_pave_continuous as td3

pytest.importorskip("matplotlib", reason="needs benchmarks/requirements.txt")
pytest.importorskip("scipy", reason="needs benchmarks/requirements.txt")

from benchmarks import evaluate, report

BASE = {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}
CELL = "Pendulum-v1__{}__{}__{}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep of two finished cells, td3 base and pave, and one that was not."""
    folder = tmp_path_factory.mktemp("sweep")
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 110, "learning_starts": 100, "batch_size": 16}
    settings |= {"buffer_size": 1000, "eval_episodes": 0, "compile": False}

    def train(script, algorithm, method, **lambdas):
        cell = folder / CELL.format(algorithm, method, 1)
        return script.train(script.Args(**settings, output_dir=str(cell), **lambdas))

    train(td3, "td3", "base", **BASE)
    train(td3, "td3", "pave")
    stopped = train(sac, "sac", "pave")
    (stopped / "summary.json").unlink()  # as if killed after its last checkpoint
    return folder


@pytest.fixture
def sweep(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


@pytest.fixture
def quick(monkeypatch):
    """Make evaluations cost nothing; the list of the runs that were evaluated."""
    evaluated = []

    def evaluate_run(run, episodes):
        evaluated.append(run.path.parent.name)
        result = {name: 1 / 3 for name in report.EVALUATION if "@" not in name and name != "episodes"}
        levels = {str(level): {"return_mean": -1.0, "smoothness_mean": 0.5} for level in evaluate.NOISE_LEVELS}
        return result | {"mu_inf": None, "robustness": levels}

    monkeypatch.setattr(report, "evaluate_run", evaluate_run)
    return evaluated


@pytest.fixture(autouse=True)
def save(monkeypatch):
    """Keep figures from being rendered, which takes a second each; the function that does it."""
    original = report.plot.save

    def save(figure, path):
        path.write_bytes(b"")
        report.plt.close(figure)

    monkeypatch.setattr(report.plot, "save", save)
    return original


def row(algorithm="td3", method="base", seed=1, env_id="Pendulum-v1", steps=100_000, **more) -> dict:
    values = dict.fromkeys(report.COLUMNS, 0.5) | dict.fromkeys(report.TEXTS, "said") | {"episodes": 10}
    key = {"algorithm": algorithm, "method": method, "env_id": env_id, "seed": seed, "steps": steps}
    return values | key | more


def write(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, report.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def make(tmp_path, *inputs, episodes=10) -> str:
    """The report of these inputs."""
    report.main(report.Args(inputs=inputs, output=tmp_path / "out", episodes=episodes))
    return (tmp_path / "out" / "report.md").read_text()


def lines_of(text: str, heading: str) -> dict[tuple, dict]:
    """The first table whose header holds `heading`: (algorithm, method) -> its cells by their headings."""
    tables = [part for part in text.split("\n\n") if part.startswith("|") and heading in part.splitlines()[0]]
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in tables[0].splitlines())
    return {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}


# ---------------------------------------------------------------------------------------------------- statistics


def slow_iqm(values) -> float:
    kept = sorted(values)[len(values) // 4 : len(values) - len(values) // 4]
    return sum(kept) / len(kept)


def test_iqm_by_sorting():
    rng = np.random.default_rng(0)
    for n in range(1, 14):
        values = rng.normal(size=n)
        assert report.iqm(values) == pytest.approx(slow_iqm(values))
    assert report.iqm([1, 2, 3, 4, 1000]) == 3
    assert report.iqm_of_all([1.0, 2.0], [3.0, 4.0, 1000.0]) == 3
    table = rng.normal(size=(4, 8))
    assert np.allclose(report.iqm(table), [slow_iqm(line) for line in table])


def test_probability_of_improvement_by_brute_force():
    rng = np.random.default_rng(0)
    for n, m in ((5, 5), (3, 4), (1, 1), (6, 2)):
        x, y = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, m).astype(float)  # many ties
        pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(x, y)]
        assert report.probability_of_improvement(x, y) == pytest.approx(sum(pairs) / (n * m))
        assert report.probability_of_improvement(x, y) + report.probability_of_improvement(y, x) == pytest.approx(1)
    resampled = report.probability_of_improvement(np.stack([x, x + 9, x - 9]), np.stack([y, y, y]))
    assert np.allclose(resampled, [report.probability_of_improvement(x, y), 1, 0])


def test_interval_of_a_known_distribution():
    values = [0.0, 1.0, 2.0, 4.0, 8.0]
    resamples = [slow_iqm(resample) for resample in itertools.product(values, repeat=5)]  # all, equally likely
    expected = tuple(np.quantile(resamples, (0.025, 0.975)))
    assert report.stratified_bootstrap([np.array(values)]) == pytest.approx(expected, abs=0.34)  # one atom at most
    values = np.random.default_rng(1).normal(7, 2, 400)
    low, high = report.stratified_bootstrap([values])
    # the IQM of a normal sample has about 1.2 times the variance of its mean
    assert low < 7 < high and high - low == pytest.approx(2 * 1.96 * 2 / 20 * 1.2**0.5, rel=0.15)
    assert report.stratified_bootstrap([values]) == (low, high)  # seeded


def test_strata_are_resampled_apart():
    """Two envs far apart, each without spread: resampling one by one keeps their shares, so nothing varies."""
    strata = [np.full(4, 1.0), np.full(4, 100.0)]
    assert report.stratified_bootstrap(strata) == pytest.approx((50.5, 50.5))
    low, high = report.stratified_bootstrap([np.concatenate(strata)])
    assert high - low > 40
    assert report.stratified_bootstrap([strata[0], strata[1][:2]]) is None  # 2 seeds: no interval
    apart = report.stratified_bootstrap(strata[::-1], report.probability_of_improvement)
    assert apart == (1, 1)


def test_numbers_are_short():
    told = [report.number(x) for x in (-112.04, 7085.7, 0.35119, 1.5, 0.00234, 0.0, -0.0511, 123456.7)]
    assert told == ["-112.0", "7086", "0.351", "1.500", "0.00234", "0.000", "-0.051", "123457"]
    assert report.spread([1.0, 2.0, 3.0], 4) == "2.000 ± 1.000 (3 of 4)"
    assert report.spread([5.0]) == "5.000" and report.spread([]) == report.NONE


# ---------------------------------------------------------------------------------------------------------- runs


def test_columns_are_those_of_an_evaluation(trained):
    run = evaluate.load_run(next((trained / CELL.format("td3", "pave", 1)).glob("*/checkpoint.pt")).parent)
    assert {"episodes", *evaluate.flat(evaluate.evaluate_run(run, 1))} == set(report.EVALUATION)


def test_sweep_to_csv_to_report(sweep, tmp_path, quick, capsys, save, monkeypatch):
    monkeypatch.setattr(report.plot, "save", save)
    facts = {"wall_seconds": 12.5, "machine": "CPU, 2 cores", "commit": None, "command": "python x.py --seed 1"}
    (sweep / CELL.format("td3", "pave", 1) / "cell.json").write_text(json.dumps(facts))
    (sweep / CELL.format("td3", "caps", 2)).mkdir()
    text = make(tmp_path, sweep)
    assert sorted(quick) == [CELL.format("td3", method, 1) for method in ("base", "pave")]
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        base, pave = csv.DictReader(file)
    assert list(base) == list(report.COLUMNS)
    assert [pave[name] for name in ("method", "seed", "steps", "episodes")] == ["pave", "1", "110", "10"]
    assert (pave["return_mean"], pave["mu_inf"]) == ("0.333333", "")
    assert [pave[name] for name in facts] == ["12.5", "CPU, 2 cores", "", "python x.py --seed 1"]
    assert float(pave["steps_per_second"]) > 0 and base["machine"] == ""
    assert "`python x.py --seed SEED` (machine CPU, 2 cores" in text and "command not recorded" in text
    assert f"- {CELL.format('sac', 'pave', 1)}: at step 110 of 110, not finished" in text
    assert f"- {CELL.format('td3', 'caps', 2)}: not started" in text
    assert "2 runs, 2 missing" in capsys.readouterr().out
    told = lines_of(text, "return: mean")
    assert told["TD3", "pave"]["seeds"] == "1" and told["TD3", "caps"]["seeds"] == "0 of 1"
    for figure in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / "out" / figure).read_bytes().startswith(b"\x89PNG")

    copy = shutil.copy(tmp_path / "out" / "runs.csv", tmp_path / "earlier.csv")
    again = make(tmp_path, Path(copy))
    assert (tmp_path / "out" / "runs.csv").read_bytes() == Path(copy).read_bytes()
    told_again = lines_of(again, "return: mean")
    assert told_again["TD3", "base"] == told["TD3", "base"] and ("TD3", "caps") not in told_again
    assert sorted(quick) == [CELL.format("td3", method, 1) for method in ("base", "pave")]  # nothing anew


def test_evaluations_are_kept(sweep, tmp_path, quick):
    run = next((sweep / CELL.format("td3", "pave", 1)).glob("*/checkpoint.pt")).parent

    def evaluated(episodes=10) -> bool:
        quick.clear()
        report.read_inputs([sweep], episodes)
        return CELL.format("td3", "pave", 1) in quick

    assert evaluated() and not evaluated()
    assert evaluated(3) and not evaluated(3)
    os.utime(run / "checkpoint.pt", (2e9, 2e9))
    assert evaluated(3)
    os.utime(run / "checkpoint.pt", (1e9, 1e9))
    assert not evaluated(3)
    file = run / "evaluation.json"
    content = json.loads(file.read_text())
    for damaged in ("{", "[]", json.dumps({k: v for k, v in content.items() if k != "episodes"}), '{"episodes": 3}'):
        file.write_text(damaged)
        assert evaluated(3)
    assert json.loads(file.read_text()) == content


def test_what_is_not_whole_does_not_count(sweep, tmp_path, quick):
    run = next((sweep / CELL.format("td3", "base", 1)).glob("*/checkpoint.pt"))
    run.write_bytes(run.read_bytes()[:500])
    (sweep / CELL.format("td3", "caps", 1)).mkdir()
    (sweep / CELL.format("td3", "caps", 1) / "cell.json").write_text("{")
    text = make(tmp_path, sweep)
    assert f"- {CELL.format('td3', 'base', 1)}: cannot read" in text
    assert f"- {CELL.format('td3', 'caps', 1)}: Expecting" in text
    assert quick == [CELL.format("td3", "pave", 1)]


def test_the_folder_wins_over_the_csv(sweep, tmp_path, quick):
    old = write(tmp_path / "old.csv", [row(steps=110, return_mean=7.0), row(steps=110, seed=2, return_mean=8.0)])
    for inputs in ((old, sweep), (sweep, old)):
        make(tmp_path, *inputs)
        rows = report.read_csv(tmp_path / "out" / "runs.csv")
        assert [(r["method"], r["seed"], r["return_mean"]) for r in rows][:2] == [("base", 1, 0.333333), ("base", 2, 8)]


# ------------------------------------------------------------------------------------------------------- reports


def test_tables_by_hand(tmp_path):
    base, pave = (1.0, 2.0, 3.0, 4.0, 20.0), (0.5, 0.6, 0.7)
    rows = [row(seed=i, smoothness_mean=sm, smoothness_std=0.0, return_mean=-sm) for i, sm in enumerate(base)]
    rows += [row(method="pave", seed=i, smoothness_mean=sm, return_mean=-170.0) for i, sm in enumerate(pave)]
    rows += [row("sac", seed=1), row("sac", "pave", 1), row("sac", "caps", 1)]
    text = make(tmp_path, write(tmp_path / "runs.csv", rows))
    sm, returns = lines_of(text, "sm: mean"), lines_of(text, "return: mean")
    assert list(sm) == [(a, m) for a in ("SAC", "TD3") for m in ("base", "pave", "caps")]
    told = sm["TD3", "base"]
    assert told["sm: mean ± std"] == f"6.000 ± {np.std(base, ddof=1):.3f}"
    assert told["std over episodes"] == f"{np.std(base):.3f}" and told["seeds"] == "5"
    assert told["IQM [95% interval]"].startswith("3.000 [") and told["P(< base)"] == report.NONE
    assert told["paper, 100,000 steps"] == "1.590 ± 0.571"
    assert sm["TD3", "pave"]["seeds"] == "3 of 5"
    assert sm["TD3", "pave"]["P(< base)"] == "1.000 [1.000, 1.000]"
    assert returns["TD3", "pave"]["P(> base)"] == "0.000 [0.000, 0.000]"
    assert returns["TD3", "pave"]["paper, 100,000 steps"] == "-167.6 ± 77.5"
    assert set(list(sm["TD3", "caps"].values())[3:-1]) == {report.NONE} and sm["TD3", "caps"]["seeds"] == "0 of 5"
    assert sm["SAC", "pave"]["IQM [95% interval]"] == "0.500" and sm["SAC", "pave"]["P(< base)"] == report.NONE
    geometry = lines_of(text, "M_sup")
    assert geometry["TD3", "pave"]["paper: NegDef"] == "0.995"
    assert geometry["SAC", "pave"]["paper: NegDef"] == report.NONE
    assert not (tmp_path / "out" / "Pendulum-v1_100000_ablation.png").exists()


def test_undefined_values_are_left_out_and_said(tmp_path):
    rows = [row(seed=i, mu_inf="" if i == 1 else float(i)) for i in range(1, 4)]
    text = make(tmp_path, write(tmp_path / "runs.csv", rows))
    assert lines_of(text, "M_sup")["TD3", "base"]["\u03bc"] == "2.500 ± 0.707 (2 of 3)"


def test_envs_and_steps_apart_and_together(tmp_path):
    rows = []
    for (env_id, sm), method, seed in itertools.product(
        {"Pendulum-v1": 2.0, "Reacher-v5": 0.1}.items(), ("base", "pave"), range(4)
    ):
        rows.append(row(method=method, env_id=env_id, seed=seed, smoothness_mean=sm / (2 if method == "pave" else 1)))
    rows += [row(steps=500, seed=9), row(env_id="HalfCheetah-v5", method="pave")]
    text = make(tmp_path, write(tmp_path / "runs.csv", rows))
    sections = [f"{env}, {steps} steps" for env, steps in (("HalfCheetah-v5", "100,000"), ("Pendulum-v1", "500"))]
    assert all(f"## {title}\n" in text for title in sections)
    together = lines_of(text, "envs (seeds)")
    assert set(together) == {("TD3", "base"), ("TD3", "pave")}
    assert together["TD3", "pave"]["envs (seeds)"] == "Pendulum (4), Reacher (4)"  # the 500 steps are left out
    assert together["TD3", "pave"]["IQM [95% interval]"] == "0.500 [0.500, 0.500]"
    cheetah = text[text.index("## HalfCheetah") : text.index("## Pendulum")]
    assert "paper" not in cheetah  # it has no such env


def test_ablation(tmp_path):
    rows = [row(method=f"ablation-{n:03b}", seed=s, env_id="Walker2d-v5") for n in range(1, 7) for s in range(3)]
    rows = [r for r in rows if (r["method"], r["seed"]) != ("ablation-101", 2)]
    rows += [row(seed=s, env_id="Walker2d-v5") for s in range(5)]
    text = make(tmp_path, write(tmp_path / "runs.csv", rows))
    told = lines_of(text[text.index("### Ablation") :], "sm: mean")
    assert [method for _, method in told][:2] == ["ablation-000 (= base)", "ablation-001"] and len(told) == 8
    seeds = {method: line["seeds"] for (_, method), line in told.items()}
    assert seeds["ablation-000 (= base)"] == "5" and seeds["ablation-101"] == "2 of 3"
    assert seeds["ablation-111"] == "0 of 3"
    assert told["TD3", "ablation-011"]["paper, 1,000,000 steps"] == "1.918"
    assert (tmp_path / "out" / "Walker2d-v5_100000_ablation.png").is_file()
    for heading in ("M_sup", "return, k = 0.1", "sm, k = 0.1"):
        told = lines_of(text[text.index("### Ablation") :], heading)
        assert len(told) == 8 and told["TD3", "ablation-011"][heading].startswith("0.500")


def test_commands_are_told_once(tmp_path):
    command = "python a.py --seed {} --output-dir '/x y/{}' --gamma 0.9 --resume /x/checkpoint.pt"
    rows = [row(seed=s, command=command.format(s, s), machine="M", torch="2", commit="c") for s in (1, 2)]
    rows.append(row(seed=3, command=command.format(3, 3), machine="M", torch="2", commit="d"))
    text = make(tmp_path, write(tmp_path / "runs.csv", rows))
    made = (
        "`python a.py --seed SEED --gamma 0.9` (machine M, torch 2, commit {}): Pendulum-v1, 100,000 steps, TD3 base, "
    )
    assert made.format("c") + "seeds 1 2\n" in text and made.format("d") + "seeds 3\n" in text


def test_the_papers_numbers_are_whole():
    tables, geometry, ablation = (report.paper(name) for name in ("tables", "geometry", "ablation"))
    assert len(tables) == 2 * 5 * 6 and len(geometry) == 2 * 6 and len(ablation) == 8
    assert tables["sac", "pave", "Pendulum"]["sm_mean"] == "0.290"
    assert ablation["td3", "ablation-110", "Walker2d"]["sm_mean"] == "2.095"
    envs = {report.Group(env_id, 1, [], []).env for env_id in ("LunarLanderContinuous-v3", "Ant-v5", "Pendulum-v1")}
    assert envs == {"LunarLander", "Ant", "Pendulum"} <= {env for *_, env in tables}


# ----------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_exit_code_2(sweep, tmp_path, quick, capsys):
    (tmp_path / "empty").mkdir()
    for name, text in {"no.csv": "a,b\n1,2\n", "nan.csv": None, "key.csv": None, "other.csv": None}.items():
        values = {"nan.csv": {"return_mean": "nan"}, "key.csv": {"seed": "x"}, "other.csv": {}}.get(name)
        (tmp_path / name).write_text(text) if text else write(tmp_path / name, [row(**values)])
    twin = write(tmp_path / "twin.csv", [row(return_mean=9.0)])
    unfinished = tmp_path / "unfinished"
    (unfinished / CELL.format("td3", "base", 1)).mkdir(parents=True)
    cases = {
        "no finished run in no input": (),
        "No such file": (tmp_path / "missing",),
        "is no sweep": (tmp_path / "empty",),
        "no runs.csv of a report: it lacks algorithm": (tmp_path / "no.csv",),
        "line 2: return_mean is nan": (tmp_path / "nan.csv",),
        "line 2: invalid literal": (tmp_path / "key.csv",),
        "differ on td3 base Pendulum-v1 1 100000": (tmp_path / "other.csv", twin),
        "td3__base__1, not started": (unfinished,),
        "--episodes is 0": (sweep,),
    }
    for message, inputs in cases.items():
        with pytest.raises(SystemExit) as stop, evaluate.user_errors():
            make(tmp_path, *inputs, episodes=0 if "episodes" in message else 10)
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.count("\n") == 1 and errors.startswith("error: ") and message in errors


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "report.py"), run_name="__main__")
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no sweep")
