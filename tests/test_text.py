"""What must stay true of the text: shared code is the same letter for letter, and what the READMEs say holds."""

import ast
import functools
import inspect
import re
import shlex
import sys
import tomllib

import pandas as pd
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS
from helper_programs import run_program
from stable_baselines3 import SAC
from torch.nn import functional as F

# Where SAC and TD3 differ; everything else in the two scripts must be the same text.
DIFFERENT = {
    "Args.tau", "Args.policy_lr", "Args.q_lr", "Args.policy_frequency", "Args.autotune", "Args.alpha",
    "Args.exploration_noise", "Args.policy_noise", "Args.noise_clip", "TUNED_LAMBDAS", "validate", "Actor",
    "Agent.__init__", "Agent.explore", "Agent.update", "Agent.td_target", "Agent.actor_loss",
}  # fmt: skip
AS_IN_TD3 = {"SAC": "TD3", "sac_": "td3_", "1/2 TD": "TD", "0.5 * td_loss": "td_loss", "is halved": "is not halved"}
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


def split(name):
    """A script's lines, None where a definition is that may differ; and those definitions."""
    source = (ROOT / f"{name}.py").read_text()
    for sac, td3 in AS_IN_TD3.items():
        source = source.replace(sac, td3)
    lines, different, body = source.splitlines(), {}, ast.parse(source).body
    nodes = [("", node) for node in body]
    classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name not in DIFFERENT]
    nodes += [(f"{node.name}.", part) for node in classes for part in node.body]
    for prefix, node in nodes:
        first, last = node.lineno - 1, node.end_lineno
        name = prefix + re.search(r"(?:def |class )?(\w+)", lines[first])[1]
        if name in DIFFERENT:
            different[name] = lines[first:last]
            lines[first:last] = [None] * (last - first)
    return [line for line in lines if line is not None], different


def test_what_the_scripts_share_is_the_same_text():
    (shared, sac), (also_shared, td3) = map(split, SCRIPTS)
    assert shared == also_shared and len(shared) > 400
    assert all(sac.get(name) != td3.get(name) for name in DIFFERENT)


def test_each_script_alone_names_the_packages_of_requirements_txt(script):
    """Its first lines are inline metadata (PEP 723), from which `uv run` makes the environment."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", source)[1]
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    assert metadata["requires-python"].replace(">=3.", "py3") == target


def test_only_core_packages_are_imported():
    source = (ROOT / f"{SCRIPTS[0]}.py").read_text()
    imported = set(re.findall(r"(?m)^ *(?:import|from) (\w+)[.\w]*(?: as \w+| import .*)?$", source))
    assert imported - sys.stdlib_module_names == {"gymnasium", "numpy", "torch", "tqdm", "tyro"}


def commands(text):
    """What of ours a text's commands run, in blocks and in line: a module, and its arguments."""
    found = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    found += re.findall(r"(?<!`)`([^`]*python [^`]*)`(?!`)", text)
    for line in "\n".join(found).replace("\\\n", "").splitlines():
        for command in re.split(r" (?:&&|\||;) ", line):
            words = shlex.split(command, comments=True)
            for i, word in enumerate(words):
                if word.endswith(".py") or (words[i - 1 : i] == ["-m"] and word.startswith("benchmarks.")):
                    yield word.removesuffix(".py").replace("/", "."), words[i + 1 :]
                    break


@pytest.fixture
def parse_only(monkeypatch):
    """Programs exit with "parsed" where they have taken their command line."""
    real_cli, real_subcommand_cli = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def stopped(function):
        return functools.wraps(function)(lambda *args, **kwargs: sys.exit("parsed"))

    def cli(settings, **options):
        real_cli(settings if isinstance(settings, type) else stopped(settings), **options)
        sys.exit("parsed")

    def subcommand_cli(functions, **options):
        return real_subcommand_cli({name: stopped(function) for name, function in functions.items()}, **options)

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", subcommand_cli)
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_command_is_one_that_the_programs_take(name):
    ours = list(commands(TEXTS[name]))
    assert len(ours) > 2
    for module, arguments in ours:
        with pytest.raises(SystemExit) as ended:
            run_program(module, *arguments)
        assert ended.value.code == (0 if "--help" in arguments else "parsed"), f"{module} does not take {arguments}"


def test_the_set_up_commands_stay_as_they_are_and_the_files_that_a_repository_needs():
    assert all(f"\n{command}\n" in README for command in SET_UP)
    assert SET_UP[1] in (ROOT / ".ci/run").read_text()
    assert all((ROOT / name).stat().st_size for name in ("LICENSE", "pyproject.toml", "requirements.txt"))


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_flag_named_exists(name):
    """Flags in code spans that begin with one; what commands pass is tested above."""
    sources = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")))
    known = {name.replace("_", "-") for name in re.findall(r"(?m)^ +(\w+): \w.*=", sources)}
    spans = re.findall(r"`(--[^`]+)`", TEXTS[name])
    named = re.findall(r"--(?:no-)?([a-z-]+)", " ".join(spans))
    assert named and set(named) <= known | {"help"}


def test_the_formula_map_points_at_real_functions(script):
    section = SECTIONS["The idea"]
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


def code(title, which=0):
    """A section's Python blocks, of which this is one."""
    return re.findall(r"```python\n(.*?)```", SECTIONS[title], flags=re.S)[which]


def test_the_block_pasted_and_the_four_edits_give_the_scripts_losses(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    block = source.split("PAVE: paste from here to the next dashed line\n")[1].split("\n# -----")[0]
    edits = code("Your own code")
    assert "PAVE: paste from here" in edits
    names = {"F": F, "q": script.QNetwork(3, 2), "target": torch.randn(8)}
    names |= {"s": torch.randn(8, 3), "a": torch.rand(8, 2), "next_s": torch.randn(8, 3)}
    exec("import torch\n" + block, names)
    exec(edits, names | dict.fromkeys(script.LAMBDAS, 0.0), plain := {})
    exec(edits, names | dict(zip(script.LAMBDAS, (1.0, 2.0, 3.0), strict=True)), ours := {})
    torch.testing.assert_close(plain["loss"], F.mse_loss(names["q"](names["s"], names["a"]), names["target"]))
    pave = script.pave_losses(*(names[name] for name in ("q", "s", "a", "next_s")), ours["noise"], ours["probe"], 1.0)
    torch.testing.assert_close(ours["loss"] - plain["loss"], pave.mpr + 2 * pave.vfc + 3 * pave.curvature)


def test_the_robots_code_runs(script, tmp_path, monkeypatch):
    env, cpu = script.make_env("Pendulum-v1"), torch.device("cpu")
    agent = script.Agent(3, 1, script.validate(script.Args(env_id="Pendulum-v1", compile=False)), cpu)
    agent.actor.net[-1].bias.data += 0.5
    script.save_checkpoint(tmp_path, 1, agent, script.ReplayBuffer(1000, 3, 1, cpu), env)
    monkeypatch.chdir(tmp_path)
    observation, _ = env.reset(seed=1)
    exec(code("Your own env"), names := {"torch": torch, "Actor": script.Actor, "observation": observation})
    expected = env.action(agent.actor(torch.as_tensor(observation)).detach().numpy())
    assert names["command"] == pytest.approx(expected) and expected > 0.2


@pytest.mark.parametrize("name", ["README.md", "benchmarks/results/README.md"])
def test_numbers_in_prose_are_those_of_runs_csv(name):
    """After their paragraph a comment says which runs they are of: the lowest to the highest seed, or the median.

    <!-- td3 Pendulum-v1 25000 base oscillation: 0.105 to 0.130 -->
    """
    runs = pd.read_csv(RESULTS / "report/runs.csv").dropna(subset="return_mean")
    columns = {"return": "return_mean", "sm": "smoothness_mean", "oscillation": "oscillation"}
    comments = re.findall(r"((?:(?!<!--)[^\n]+\n)+)((?:<!-- .* -->\n?)+)", TEXTS[name])
    assert comments
    for paragraph, lines in comments:
        for algorithm, env_id, steps, method, measure, told in re.findall(
            r"<!-- (\S+) (\S+) (\d+) (\S+) (\w+): (.*) -->", lines
        ):
            of = (runs.algorithm == algorithm) & (runs.env_id == env_id) & (runs.steps == int(steps))
            values = runs[of & (runs.method == method) & runs.settings.notna()][columns[measure]]
            numbers = re.findall(r"-?[\d.,]*\d", told)
            expected = [values.median()] if len(numbers) == 1 else [values.min(), values.max()]
            for number, value in zip(numbers, expected, strict=True):
                digits = len(number.partition(".")[2])
                assert f"{value:,.{digits}f}" == number, (method, measure, value)
                assert number.replace("-", "\u2212") in paragraph, (number, paragraph)


def test_the_tables_of_the_evidence_are_the_reports():
    """Each row of a method, letter for letter but for the padding."""

    def rows(text):
        lines = re.findall(r"(?m)^\| (?:SAC|TD3) \w+ .*\|$", text)
        return {re.sub(" +", " ", line) for line in lines}

    evidence = rows(TEXTS["benchmarks/results/README.md"])
    assert len(evidence) > 20
    assert evidence <= rows((RESULTS / "report/report.md").read_text())


def test_the_finish_of_a_stable_baselines3_agent_runs_and_plain_sb3_loads_it(tmp_path, monkeypatch):
    """Also the lines that measure the agent."""
    monkeypatch.chdir(tmp_path)
    plain = SAC("MlpPolicy", "Pendulum-v1", device="cpu")
    plain.learn(120)
    plain.save("plain.zip")
    plain.save_replay_buffer("plain_buffer.pkl")
    finish = code("Your trained agent")
    assert finish.count("5_000") == 1
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="no update before"):
        exec(finish.replace("5_000", "5"), names := {})
    exec(code("Your trained agent", 1), names)
    observation = torch.zeros(3).numpy()
    actions = [model.predict(observation, deterministic=True)[0] for model in (names["model"], SAC.load("smooth.zip"))]
    assert actions[0] == pytest.approx(actions[1], abs=1e-6)


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
