#!/usr/bin/env bash
# All checks, set-up included: lint, format, types, tests. Arguments go to pytest.
#
#   bash tests/run.sh                 # everything
#   bash tests/run.sh -m "not slow"   # the quick ones
#   bash tests/run.sh tests/envs -x   # one folder, up to the first failure
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runtime/venv.sh
prepare_venv requirements_dev.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# Two at a time, file by file: most tests wait for processes and servers. OMP_NUM_THREADS: a core for each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
