"""Each recipe on Pendulum-v1, 20,000 steps, without and with PAVE: benchmarks/results/recipes.csv and its table.

    python -m benchmarks.recipes.table    # about an hour; goes on where it was stopped
"""

import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "recipes.csv"
RECIPES, SEEDS, METHODS = ("plain", "sb3", "ensemble"), ("1", "2", "3"), {"base": ["--lambdas", "0", "0", "0"], "pave": []}
COLUMNS = ("return_mean", "smoothness_mean", "oscillation")


def read() -> dict[tuple, dict]:
    rows = csv.DictReader(RESULTS.open()) if RESULTS.exists() else ()
    return {(row["seed"], row["recipe"], row["method"]): row for row in rows}


def table(rows: dict[tuple, dict]) -> str:
    """Markdown; the values of the seeds in their order."""
    lines = ["| recipe | | return | sm | oscillation |", "|---|---|---|---|---|"]
    for recipe, method in product(RECIPES, METHODS):
        runs = [rows[key] for seed in SEEDS if (key := (seed, recipe, method)) in rows]
        cells = [" · ".join(f"{float(run[name]):.{digits}f}" for run in runs) for name, digits in zip(COLUMNS, (1, 4, 3), strict=True)]
        lines.append(" | ".join([f"| `{recipe}.py`", {"base": "without", "pave": "with PAVE"}[method], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    for key in product(SEEDS, RECIPES, METHODS):
        if key in read():
            continue
        seed, recipe, method = key
        command = [sys.executable, "-m", f"benchmarks.recipes.{recipe}", "--seed", seed, *METHODS[method]]
        evaluation = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["recipe", "method", "seed", *COLUMNS])
            writer.writerow([recipe, method, seed, *(f"{evaluation[name]:.5g}" for name in COLUMNS)])
    print(table(read()))


if __name__ == "__main__":
    main()
