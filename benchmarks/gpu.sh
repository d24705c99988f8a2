#!/usr/bin/env bash
# Every GPU figure that README and RESULTS want, in ten minutes on one GPU, the most wanted first.
#
#   bash benchmarks/gpu.sh            # after bash START_CONTINUOUS.sh check, which installs; uses no network
#   TINY=1 bash benchmarks/gpu.sh     # a dry run of every step in a few minutes, on CPUs too
#
# Variables: OUT (folder for the results), PYTHON, LIMIT (seconds for everything). Each step has its own limit, none
# stops the next, and all that was printed is in $OUT/gpu.log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT="${OUT:-reports/gpu}"
PYTHON="${PYTHON:-.venv/bin/python}"
TINY="${TINY:-}"
LIMIT="${LIMIT:-570}"
mkdir -p "$OUT"
LOG="$OUT/gpu.log"
: > "$LOG"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# Later steps reuse what the first one compiled.
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton" PYTHONUNBUFFERED=1
began=$SECONDS
failed=0

say() { echo "=== $*" | tee -a "$LOG"; }

# step NAME SECONDS COMMAND...: run it for at most so many seconds, and never beyond LIMIT.
step() {
    local name=$1 most=$2 left=$((LIMIT - (SECONDS - began))) start=$SECONDS code
    shift 2
    ((left < most)) && most=$left
    if ((most < 15)); then
        say "$name: skipped, $left s are left"
        failed=1
        return
    fi
    say "$name: at most $most s, $((SECONDS - began)) s spent"
    timeout --signal=TERM --kill-after=30 "$most" "$@" >> "$LOG" 2>&1
    code=$?
    ((code)) && failed=1
    say "$name: exit $code after $((SECONDS - start)) s"
}

full=(--preset full --compile on)
eager=(--preset full --compile off)
fp8=(--preset full --compile on --precision fp8)
small=(--preset small --compile on)
probe=(--preset full --compile on --kernels "$OUT/kernels.txt")
demo=()
epochs=5
if [ -n "$TINY" ]; then
    tiny=(--preset demo --envs-per-gpu 16 --batch-size 2048 --compile off)
    full=("${tiny[@]}") eager=("${tiny[@]}") fp8=("${tiny[@]}" --precision fp8) small=("${tiny[@]}")
    probe=("${tiny[@]}" --bars 20000 --symbols 4 --exam-days 2)
    demo=(--epochs 2 --envs-per-gpu 16 --batch-size 2048 --simulated-symbols 4 --simulated-bars 30000 --holdout-days 1)
    epochs=1
fi

step machine 40 "$PYTHON" continuous_training.py check --offline --checkpoint-dir "$work/checkpoints" --log-dir "$work/logs"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv >> "$LOG" 2>&1
# Where an epoch goes, MFU, transitions/s, the rollout's share, peak against plan; compiling takes 1 to 3 minutes.
step epoch_full 260 "$PYTHON" benchmarks/epoch.py "${full[@]}" --measured-epochs "$epochs"
# Host syncs, kernels, the exam's share.
step probe_full 150 "$PYTHON" benchmarks/gpu_probe.py "${probe[@]}"
# Exit code 5: no test ran. Without a GPU they only show what they would be.
if [ -n "$TINY" ]; then collect=(--collect-only); else collect=(); fi
step gpu_tests 120 "$PYTHON" -m pytest -m gpu -q --no-header -p no:cacheprovider --timeout 110 "${collect[@]}" \
    tests/training/test_rollout.py tests/envs/test_trading_env.py tests/models/test_transformer.py
# A real start, supervisor and all.
step demo $((${TINY:-0} ? 240 : 90)) env NPROC=1 "$PYTHON" -m runtime.supervisor --demo --runs 1 "${demo[@]}" \
    --checkpoint-dir "$work/checkpoints" --log-dir "$work/logs"
[ -f "$work/logs/metrics.jsonl" ] && cp "$work/logs/metrics.jsonl" "$OUT/demo_metrics.jsonl"
step epoch_small 90 "$PYTHON" benchmarks/epoch.py "${small[@]}" --measured-epochs "$epochs"
# From compute capability 8.9 on; on other GPUs it is bf16 again.
step epoch_full_fp8 150 "$PYTHON" benchmarks/epoch.py "${fp8[@]}" --measured-epochs "$epochs"
step epoch_full_eager 60 "$PYTHON" benchmarks/epoch.py "${eager[@]}" --measured-epochs "$epochs"
# As on a card of 24 GB.
step epoch_full_16 90 "$PYTHON" benchmarks/epoch.py "${eager[@]}" --micro-batch-segments 16 --measured-epochs "$epochs"
say "all: $((SECONDS - began)) s; the figures are in $LOG"
exit "$failed"
