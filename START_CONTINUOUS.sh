#!/usr/bin/env bash
# Train forever on every GPU of this machine, on fresh bars. Settings: the top of continuous_training.py.
#
#   bash START_CONTINUOUS.sh                      # with those settings
#   bash START_CONTINUOUS.sh --demo               # simulated market, small model, no keys, no GPU
#   bash START_CONTINUOUS.sh --envs-per-gpu 256   # one setting for this start
#   bash START_CONTINUOUS.sh data                 # any other command, such as data: show the bars in the lake
#   NPROC=2 bash START_CONTINUOUS.sh              # number of ranks, by default one per GPU
#
# Ctrl+C finishes the epoch, saves and exits; a second one aborts. Works from any folder: a relative path in an option
# starts where you are.
set -euo pipefail
unset CDPATH
export CONTINUOUS_TRAINING_CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# Else bash goes on where Python swallows a Ctrl+C while it starts.
trap 'exit 130' INT
source runtime/venv.sh
prepare_venv requirements_simple.txt "$@"
# exec: signals, and the duties of a container's first process, go to Python.
exec .venv/bin/python -m runtime.supervisor "$@"
