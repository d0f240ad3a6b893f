#!/usr/bin/env bash
# Everything that waits for a GPU, in one call from the repository's root: first whether it is right, then how fast it
# is, then trainings for as long as the GPU is there. The same call goes on where the last one ended.
#
#     OUT=/somewhere/that/stays SECONDS_LEFT=3000 PYTHON=.venv/bin/python benchmarks/gpu_day.sh
#
# OUT keeps logs, tables and the members' checkpoints. To go on, copy it back and give it again. A training that is cut
# after SECONDS_LEFT saves: SIGTERM, then a minute to write.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu_day}
PYTHON=${PYTHON:-python}
END=$((SECONDS + ${SECONDS_LEFT:-3000}))
mkdir -p "$OUT"

# 1. Right? Compiled and graphed updates on the device against eager ones, member against single run.
$PYTHON -m pytest -q tests/test_agent.py tests/test_population.py 2>&1 | tee "$OUT/tests.log"

# 2. Fast? Agent-steps a second of N agents at once against one after another. Done once.
if [ ! -f "$OUT/throughput/throughput.csv" ]; then
    $PYTHON -m benchmarks.throughput --population 1 8 32 64 --rounds 3 --output-dir "$OUT/throughput"
fi

# 3. Use it. Each line goes on where it was stopped, and is over at once when it is finished.
train() {
    local left=$((END - SECONDS))
    if [ "$left" -le 60 ]; then
        echo "no time left for: $*"
        return
    fi
    local status=0
    timeout --foreground --signal=TERM --kill-after=60 "$left" $PYTHON -m benchmarks.population "$@" || status=$?
    [ "$status" -le 1 ] || [ "$status" -ge 124 ] || exit "$status" # 1: a member diverged; 124 and above: stopped
}

# Ten seeds of plain SAC, of PAVE with its lambda, and of --autotune-curv, at the script's own settings
train sac_pave_continuous --env-id HalfCheetah-v5 --members benchmarks/gpu_day.toml --seeds 1 2 3 4 5 6 7 8 9 10 \
    --total-timesteps 300000 --eval-interval 10000 --checkpoint-interval 50000 --output-dir "$OUT/halfcheetah"
# A search of lambda, on development seeds
train sac_pave_continuous --env-id HalfCheetah-v5 --seeds 101 102 --lambda-mpr 0.1 --lambda-vfc 0.0005 0.01 0.1 0.5 \
    --lambda-curv 0.03 0.1 0.3 1 --total-timesteps 300000 --checkpoint-interval 50000 --output-dir "$OUT/search"
