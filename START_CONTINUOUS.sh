#!/usr/bin/env bash
# Train forever on every GPU of this machine, on fresh bars. Settings: the top of continuous_training.py.
#
#   bash START_CONTINUOUS.sh                      # as set there
#   bash START_CONTINUOUS.sh --demo               # simulated market, small model, no keys, no GPU
#   bash START_CONTINUOUS.sh --envs-per-gpu 256   # one setting for this start
#   bash START_CONTINUOUS.sh data                 # any other command, here: show what bars there are
#   NPROC=2 bash START_CONTINUOUS.sh              # ranks, where it should not be one per GPU
#
# Ctrl+C finishes the epoch, saves and exits; a second one ends at once. Works from any folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source runtime/venv.sh
prepare_venv requirements_simple.txt
# exec: from here on, signals and the duties of a container's first process are Python's.
exec .venv/bin/python -m runtime.supervisor "$@"
