# Sourced by START_CONTINUOUS.sh and tests/run.sh, in the project's folder.
# shellcheck shell=bash

# Of another Python, or against finding this program's own modules.
unset PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONINSPECT

# prepare_venv FILE [ARGUMENT ...]: find a Python, and install the requirements FILE into .venv, with the torch that
# suits this machine's driver and the start's arguments.
prepare_venv() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python .venv/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -m runtime.install "$@"
            return
        fi
    done
    echo "Python 3.11 or newer is needed and was not found (python3 --version: $(python3 --version 2>&1))." >&2
    echo "Install it from your system's packages or python.org, then start again." >&2
    return 1
}
