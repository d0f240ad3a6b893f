"""What must stay true of the text: shared code is the same letter for letter, and what the READMEs say holds."""

import ast
import functools
import inspect
import itertools
import re
import runpy
import shlex
import sys

import pandas as pd
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS
from torch.nn import functional as F

# Where SAC and TD3 differ; everything else in the two scripts must be the same text.
DIFFERENT = {
    "Args.tau", "Args.policy_lr", "Args.q_lr", "Args.policy_frequency", "Args.autotune", "Args.alpha",
    "Args.exploration_noise", "Args.policy_noise", "Args.noise_clip", "TUNED_LAMBDAS", "validate", "Actor.__doc__",
    "Actor.__init__", "Actor.forward", "Actor.sample", "Agent.__doc__", "Agent.__init__", "Agent.explore",
    "Agent.update", "Agent.td_target", "Agent.critic_loss", "Agent.actor_loss",
}  # fmt: skip
SET_UP = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    ".venv/bin/python sac_pave_continuous.py --env-id HalfCheetah-v5",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -r tests/requirements.txt && "
    ".venv/bin/python -m pytest",
)
RESULTS = ROOT / "benchmarks/results"
README = (ROOT / "README.md").read_text()
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("benchmarks/*.md")), RESULTS / "README.md")
}
RUNNABLE = ("README.md", "benchmarks/README.md")  # whose commands are of today; those of NOTES.md are of their day
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"(?m)^## ", README)[1:]}


# ------------------------------------------------------------------------------------------------- the two scripts


def pieces(name):
    """A whole script but for its docstring, as {definition: source}; a comment goes with what follows it."""
    source = (ROOT / f"{name}.py").read_text()
    lines, (docstring, *body) = source.splitlines(), ast.parse(source).body
    found, end = {}, docstring.end_lineno

    def take(name, last_line):
        nonlocal end
        found[name] = found.get(name, "") + "\n".join(lines[end:last_line])
        end = last_line

    def walk(body, prefix=""):
        name = "__doc__"
        for node in body:
            if isinstance(node, ast.ClassDef):
                take(node.name, node.body[0].lineno - 1)
                walk(node.body, f"{node.name}.")
                continue
            if isinstance(node, ast.FunctionDef):
                name = node.name
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            elif not isinstance(node, ast.Expr):  # a string below a field goes with the field
                name = ast.unparse(node).partition("\n")[0]
            take(prefix + name, node.end_lineno)

    walk(body)
    assert end == len(lines)
    return found


def test_what_the_scripts_share_is_the_same_text():
    sac, td3 = map(pieces, SCRIPTS)
    assert {name for name in sac.keys() | td3.keys() if sac.get(name) != td3.get(name)} == DIFFERENT
    assert [name for name in sac if name in td3] == [name for name in td3 if name in sac]
    assert {"pave_losses", "train", "ReplayBuffer.add", "Agent.backward", "restore", "import copy"} <= sac.keys()
    sac, td3 = (ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) for name in SCRIPTS)
    assert sac.replace("SAC", "TD3").replace("sac_", "td3_").replace("1/2 TD", "TD") == td3


def test_only_core_packages_are_imported(script):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{script.__name__}.py").read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            imported |= {name.split(".")[0] for name in names}
    assert imported - sys.stdlib_module_names == {"gymnasium", "numpy", "torch", "tqdm", "tyro"}


# --------------------------------------------------------------------------------------------------------- commands


def commands(text):
    """What of ours a text's commands run, in blocks and in line: a file or a module, and its arguments."""
    lines = [*re.findall(r"```bash\n(.*?)```", text, flags=re.S), *re.findall(r"`([^`]*python [^`]*)`", text)]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        for _, command in itertools.groupby(words, {"&&", "|", ";"}.__contains__):
            command = list(command)
            for i, word in enumerate(command):
                if word.endswith(".py") or (command[i - 1 : i] == ["-m"] and word.startswith("benchmarks.")):
                    yield word, command[i + 1 :]
                    break


class Parsed(Exception):
    """Raised where a program has read its command line."""


@pytest.fixture
def parse(monkeypatch):
    """A function that runs a program until its command line is read; SystemExit where it doesn't take it."""

    def stop(function):
        @functools.wraps(function)
        def stopped(*args, **kwargs):
            raise Parsed

        return stopped

    def cli(settings, **options):
        real_cli(settings if isinstance(settings, type) else stop(settings), **options)
        raise Parsed

    def subcommand_cli(functions, **options):
        return real_subcommand_cli({name: stop(function) for name, function in functions.items()}, **options)

    def parse(name, arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)

    real_cli, real_subcommand_cli = tyro.cli, tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", subcommand_cli)
    monkeypatch.chdir(ROOT)
    return parse


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_command_is_one_that_the_programs_take(name, parse):
    ours = list(commands(TEXTS[name]))
    assert len(ours) > 5
    for file, arguments in ours:
        with pytest.raises((Parsed, SystemExit)) as ended:
            parse(file, arguments)
        assert ended.type is (SystemExit if "--help" in arguments else Parsed), f"{file} does not take {arguments}"


def test_the_set_up_commands_stay_as_they_are_and_the_files_that_a_repository_needs():
    assert all(f"\n{command}\n" in README for command in SET_UP)
    assert SET_UP[1] in (ROOT / ".ci/run").read_text()
    assert all((ROOT / name).stat().st_size for name in ("LICENSE", "pyproject.toml", "requirements.txt"))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_flag_named_exists(parse, capsys):
    """Flags in code spans that begin with one; what commands pass is tested above."""
    programs = [[f"{name}.py"] for name in SCRIPTS]
    programs += [[f"benchmarks.{name}"] for name in ("caps", "evaluate", "report", "sweep", "throughput", "video")]
    programs += [["benchmarks.plot", kind] for kind in ("actions", "curves", "field")]
    for file, *kind in programs:
        with pytest.raises(SystemExit):
            parse(file, [*kind, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for name in RUNNABLE:
        named = {flag for span in re.findall(r"`(--[^`]+)`", TEXTS[name]) for flag in re.findall(r"--[a-z-]+", span)}
        assert named and named <= known, name


# ------------------------------------------------------------------------------------------------------ README's code


def test_the_formula_map_points_at_real_functions(script):
    section = SECTIONS["The idea, and where it is in the code"]
    named = [name for row in section.splitlines() if row.startswith("|") for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 8
    for name in named:
        function, _, parameters = name.rstrip(")").partition("(")
        if function in script.PaveLosses._fields:
            continue
        found = functools.reduce(getattr, function.split("."), script)
        if parameters not in ("", "..."):
            signature = [str(p) for p in inspect.signature(found).parameters.values()]
            assert parameters.replace(" ", "").split(",") == signature


def code(title):
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[title], flags=re.S)
    return block


def test_the_four_edits_give_the_scripts_losses(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    block = source.split("PAVE: paste from here to the next dashed line\n")[1].split("\n# -----")[0]
    edits = code("Paste it into your agent")
    assert "PAVE: paste from here" in edits
    names = {"F": F, "q": script.QNetwork(3, 2), "target": torch.randn(8)}
    names |= {"s": torch.randn(8, 3), "a": torch.rand(8, 2), "next_s": torch.randn(8, 3)}
    exec("import torch\n" + block, names)
    exec(edits, names | dict.fromkeys(script.LAMBDAS, 0.0), plain := {})
    exec(edits, names | dict(zip(script.LAMBDAS, (1.0, 2.0, 3.0), strict=True)), ours := {})
    assert torch.equal(plain["loss"], F.mse_loss(names["q"](names["s"], names["a"]), names["target"]))
    pave = script.pave_losses(*(names[name] for name in ("q", "s", "a", "next_s")), ours["noise"], ours["probe"], 1.0)
    assert torch.allclose(ours["loss"] - plain["loss"], pave.mpr + 2 * pave.vfc + 3 * pave.curvature, atol=1e-5)


def test_the_robots_code_runs(script, tmp_path, monkeypatch):
    env, cpu = script.make_env("Pendulum-v1"), torch.device("cpu")
    agent = script.Agent(3, 1, script.validate(script.Args(env_id="Pendulum-v1", compile=False)), cpu)
    agent.actor.net[-1].bias.data += 0.5
    script.save_checkpoint(tmp_path, 1, agent, script.ReplayBuffer(1000, 3, 1, cpu), env)
    monkeypatch.chdir(tmp_path)
    observation, _ = env.reset(seed=1)
    exec(code("On your own robot"), names := {"torch": torch, "Actor": script.Actor, "observation": observation})
    expected = env.action(agent.actor(torch.as_tensor(observation)).detach().numpy())
    assert names["command"] == pytest.approx(expected) and expected > 0.2


# -------------------------------------------------------------------------------------------------- README's one table


def test_the_table_is_what_the_report_has():
    """Medians over the seeds of runs.csv, to a rounding."""
    runs = pd.read_csv(RESULTS / "report/runs.csv").dropna(subset="return_mean")
    runs["name"] = runs.env_id.str.split(":").str[-1] + ", " + runs.algorithm.str.upper()
    paper = pd.read_csv(ROOT / "benchmarks/paper/paper_tables.csv").set_index(["algo", "env", "method"]).sm_mean
    table = SECTIONS["Does it work?"].replace("\u2212", "-")
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    checked = 0
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        name = re.match(r"\[(.*?)\]", row["env, agent"])[1]
        found = runs[(runs.name == name) & (runs.steps.astype(str) == row["steps"].replace(",", ""))]
        seeds = found.groupby("method").size()
        others = "".join(f" ({method} {n})" for method, n in seeds.items() if n != seeds.max())
        assert row["seeds"] == f"{seeds.max()}{others}", name
        for title in ("base", "untuned", "PAVE", "auto", "CAPS"):
            own = ["own"] if title == "PAVE" else []  # lambdas of ours
            of_method = found[found.method.isin([title.lower(), *own])]
            if of_method.empty:
                assert row[title] == "\u2013", (name, title)
                continue
            sm, value = of_method.smoothness_mean.median(), of_method.return_mean.median()
            digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
            assert row[title].partition(" (")[0] == f"{sm:.3f} / {value:,.{digits}f}", (name, title)
            checked += 1
        env, algorithm = re.fullmatch(r"(.*?)(?:Continuous)?-v\d, (.*)", name).groups()
        numbers = [f"{sm:.3f}" for m in ("base", "pave") if (sm := paper.get((algorithm.lower(), env, m)))]
        assert row["paper's sm: base \u2192 PAVE"] == (" \u2192 ".join(numbers) or "\u2013"), name
    assert checked > 20


def test_the_tables_of_the_evidence_are_the_reports():
    """Each row of a method, letter for letter but for the padding."""

    def rows(text):
        lines = re.findall(r"(?m)^\| (?:SAC|TD3) \w+ .*\|$", text)
        return {re.sub(" +", " ", line) for line in lines}

    evidence = rows(TEXTS["benchmarks/results/README.md"])
    assert len(evidence) > 20
    assert evidence <= rows((RESULTS / "report/report.md").read_text())


# ------------------------------------------------------------------------------------------------- links and lengths


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere_and_lines_are_short(name):
    """120 columns, tables, targets of links and the two set-up commands apart."""
    targets = re.findall(r"\]\((?!https?:)([^)]*)\)", TEXTS[name])
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert linked.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"(?m)^#+ (.*)$", linked.read_text())), target
    for number, line in enumerate(TEXTS[name].splitlines(), 1):
        if not line.startswith("|") and line not in SET_UP:
            assert len(re.sub(r"\]\([^)]*\)", "]", line)) <= 120, (number, line)


LENGTHS = {"README.md": 180, "benchmarks/README.md": 120, **dict.fromkeys((f"{script}.py" for script in SCRIPTS), 600)}
LENGTHS |= {f"benchmarks/recipes/{recipe}.py": 80 for recipe in ("plain", "sb3", "ensemble")}


@pytest.mark.parametrize("name", LENGTHS)
def test_files_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LENGTHS[name]
