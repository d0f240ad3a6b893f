"""What must stay true of the text: shared code is the same letter for letter, and the README's words hold."""

import ast
import csv
import re
import shlex
import sys
import tomllib

import pytest
import tyro
from conftest import ROOT, SCRIPTS

from benchmarks.report import iqm, number

# Where SAC and TD3 differ; everything else that the two scripts define must be the same text.
DIFFERENT = {
    "Args.policy_lr", "Args.q_lr", "Args.policy_frequency", "Args.autotune", "Args.alpha", "Args.exploration_noise",
    "Args.policy_noise", "Args.noise_clip", "TUNED_LAMBDAS", "validate", "Actor.__doc__", "Actor.__init__",
    "Actor.forward", "Actor.sample", "Agent.__doc__", "Agent.__init__", "Agent.explore", "Agent.td_target",
    "Agent.actor_loss", "Agent.alpha_loss", "Agent.update_critics", "Agent.update_actor", "Agent.update",
}  # fmt: skip


def pieces(name):
    """Every definition of a script as {name: source}, classes by member; a string below a field goes with the field."""
    source = (ROOT / f"{name}.py").read_text()
    found, last = {}, ""

    def text(node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(source.splitlines()[first - 1 : node.end_lineno])

    def add(node, prefix=""):
        nonlocal last
        if isinstance(node, ast.FunctionDef):
            last = prefix + node.name
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "".join(map(ast.unparse, node.decorator_list + node.bases))
            last = f"{node.name}.__doc__"
            for member in node.body:
                add(member, f"{node.name}.")
            return
        elif isinstance(node, (ast.AnnAssign, ast.Assign)):
            last = prefix + ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        elif not isinstance(node, ast.Expr):
            last = f"{prefix}{ast.unparse(node).partition(chr(10))[0]}"
        found[last] = found.get(last, "") + text(node)

    body = ast.parse(source).body
    assert isinstance(body[0], ast.Expr)  # the module's docstring names its algorithm
    for node in body[1:]:
        add(node)
    return found


def test_what_the_scripts_share_is_the_same_text():
    sac, td3 = map(pieces, SCRIPTS)
    different = {name for name in sac.keys() | td3.keys() if sac.get(name) != td3.get(name)}
    assert different == DIFFERENT
    assert {"pave_losses", "train", "ReplayBuffer.add", "Agent.critic_loss", "restore", "import copy"} <= sac.keys()


def test_the_scripts_differ_in_no_other_line():
    def skeleton(name):
        """Comments and layout: all lines that are outside the differing definitions."""
        text = (ROOT / f"{name}.py").read_text()
        comments = re.findall(r"^# .*$", text, flags=re.M)
        return [line for line in comments if "paper's tuned" not in line]

    sac, td3 = map(skeleton, SCRIPTS)
    assert sac == td3


def test_only_core_packages_are_imported(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"gymnasium", "numpy", "torch", "tqdm", "tyro"}


def test_inline_script_metadata_equals_requirements(script):
    text = (ROOT / f"{script.__name__}.py").read_text()
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+)^# ///$", text)
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))
    assert text.startswith("# /// script")
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_readme_commands_are_ones_that_the_scripts_take(script):
    commands = [command for command in readme_commands() if f"{script.__name__}.py" in command]
    assert commands
    for command in commands:
        flags = shlex.split(command.split(f"{script.__name__}.py", 1)[1], comments=True)
        if "--help" not in flags:
            tyro.cli(script.Args, args=flags)


def test_ci_installs_and_tests_exactly_as_the_readme_says():
    (command,) = [command for command in readme_commands() if "pytest" in command]
    assert command in (ROOT / ".ci" / "run").read_text()


def test_every_flag_is_explained_in_the_readme(script):
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in script.Args.__dataclass_fields__ if f"--{name.replace('_', '-')}" not in readme]
    assert not missing


def test_the_formula_map_of_the_readme_points_at_real_functions(script):
    for name in ("pave_losses", "action_gradient", "hutchinson_trace", "rademacher_like", "smoothness"):
        assert callable(getattr(script, name))
        assert f"`{name}" in (ROOT / "README.md").read_text()


def patched(text, diff):
    """The text with each hunk's old lines (" ", "-") replaced by its new ones (" ", "+")."""
    for hunk in diff.strip("\n").split("\n\n"):
        old, new = ("\n".join(line[1:] for line in hunk.splitlines() if line[0] in signs) for signs in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("autotune_curv", [False, True])
def test_the_worked_example_of_the_readme_runs(script, autotune_curv):
    readme = (ROOT / "README.md").read_text()
    (example,), (diff,) = (re.findall(rf"```{kind}\n(.*?)```", readme, flags=re.S) for kind in ("python", "diff"))
    assert "PAVE" in example
    block = (ROOT / f"{script.__name__}.py").read_text().split("PAVE: paste from here to the next dashed line\n")[1]
    pasted = example.replace("# <the PAVE block>", block.split("\n# -----")[0])
    assert pasted != example
    pasted = patched(pasted, diff) if autotune_curv else pasted
    namespace = {}
    exec(compile(re.sub(r"TOTAL_TIMESTEPS = [\d_]+", "TOTAL_TIMESTEPS = 300", pasted), "README.md", "exec"), namespace)
    assert all(p.isfinite().all() for p in namespace["critics"].parameters())
    if autotune_curv:
        assert namespace["g"] > 0 and namespace["log_lambda"].exp() != pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "pyproject.toml", ".ci/run", "requirements.txt"])
def test_the_files_that_a_repository_needs(name):
    assert (ROOT / name).stat().st_size > 0


def test_results_in_the_readme_are_those_of_the_reports():
    """Each report's first table, "In short", is there, line by line."""
    reports = list((ROOT / "benchmarks/results").glob("*/report.md"))
    assert reports
    for report in reports:
        tables = re.findall(r"### In short\n\n((?:\|.*\n)+)", report.read_text())
        assert len(tables) == report.read_text().count("### In short") > 0
        for table in tables:
            assert table in (ROOT / "README.md").read_text(), report


def test_what_autotune_curv_gives_is_what_the_report_has():
    """The README's table over the envs: IQMs of return and sm."""
    with open(ROOT / "benchmarks/results/report/runs.csv", newline="") as file:
        reported = [row for row in csv.DictReader(file) if not row["method"].startswith("ablation-")]
    section = (ROOT / "README.md").read_text().split("**What it gives.**")[1].split("\n\n")[1]
    lines = section.replace("\u2212", "-").replace(" (ours)", "").splitlines()[2:]
    assert len(lines) > 5
    for line in lines:
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        env_id, algorithm = re.search(r"[\w-]+-v\d", title)[0], "td3" if "TD3" in title else "sac"
        rows = [row for row in reported if (row["env_id"], row["algorithm"]) == (env_id, algorithm)]
        for method, cell in zip(("base", "untuned", "pave", "auto"), cells[:4], strict=True):
            runs = [row for row in rows if row["method"] == method]
            values = ([float(run[name]) for run in runs] for name in ("return_mean", "smoothness_mean"))
            assert cell == (", ".join(number(iqm(column)) for column in values) if runs else "\u2013"), (line, method)
