"""Each recipe on Pendulum-v1, 20,000 steps, without and with PAVE: benchmarks/results/recipes.csv and its table.

python -m benchmarks.recipes.table    # some two hours; goes on where it was stopped
"""

import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "recipes.csv"
RECIPES, SEEDS = ("plain", "sb3", "ensemble"), ("1", "2", "3")
METHODS = {"without": ["--lambdas", "0", "0", "0"], "with PAVE": []}
COLUMNS = {"return_mean": ".1f", "smoothness_mean": ".4f", "oscillation": ".3f"}


def read() -> dict[tuple, list[str]]:
    """(seed, recipe, method): the COLUMNS."""
    lines = list(csv.reader(RESULTS.open()))[1:] if RESULTS.exists() else []
    return {tuple(line[:3]): line[3:] for line in lines}


def table(runs: dict[tuple, list[str]]) -> str:
    """Markdown; in each cell the seeds in their order."""
    lines = ["| recipe | PAVE | return | sm | oscillation |", "|---|---|---|---|---|"]
    for recipe, method in product(RECIPES, METHODS):
        columns = zip(*(runs[key] for key in product(SEEDS, [recipe], [method]) if key in runs), strict=True)
        cells = (
            ", ".join(f"{float(value):{form}}" for value in column)
            for column, form in zip(columns, COLUMNS.values(), strict=False)
        )
        lines.append(f"| `{recipe}.py` | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if not RESULTS.exists():
        RESULTS.write_text(",".join(["seed", "recipe", "method", *COLUMNS]) + "\n")
    for key in product(SEEDS, RECIPES, METHODS):
        if key not in read():
            seed, recipe, method = key
            command = [sys.executable, "-m", f"benchmarks.recipes.{recipe}", "--seed", seed, *METHODS[method]]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            evaluation = json.loads(ended.stdout)
            with RESULTS.open("a") as file:
                file.write(",".join([*key, *(f"{evaluation[name]:.5g}" for name in COLUMNS)]) + "\n")
    print(table(read()))


if __name__ == "__main__":
    main()
