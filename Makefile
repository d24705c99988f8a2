# The commands that developers type most. Everything else: README.md, CONTRIBUTING.md.

PYTHON ?= .venv/bin/python

.PHONY: test drill soak nullgpu

test:  # lint, format, types and all tests but the long ones
	bash tests/run.sh

drill:  # every fault on the real program with two ranks, and 50 random kills; with wine, the .bat: about 40 minutes on two cores
	PATIENCE=900 DRILL=1 $(PYTHON) -m pytest --timeout 3600 --durations 0 -m drill
	PATIENCE=900 DRILL=1 $(PYTHON) -m pytest --timeout 3600 tests/data_sources/test_any_bytes.py tests/training/test_any_checkpoint.py tests/test_start_bat.py
	PATIENCE=900 $(PYTHON) -m tests.drill.soak --minutes 600 --kills 50 --shortest 1 --longest 30

soak:  # two ranks, a random kill every 20 to 60 seconds, for half an hour
	PATIENCE=900 $(PYTHON) -m tests.drill.soak --minutes 30

# Torch's CUDA wheel, whatever index of CPU wheels this machine prefers: 3.5 GB.
nullgpu: .venv-nullgpu/installed  # the CUDA path without a GPU: Linux on x86-64, with gcc
	nice -n 19 .venv-nullgpu/bin/python -m pytest -q tests/nullgpu
	nice -n 19 .venv-nullgpu/bin/python -m tests.nullgpu.table

.venv-nullgpu/installed: requirements_simple.txt requirements_dev.txt
	python3 -m venv .venv-nullgpu
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= .venv-nullgpu/bin/python -m pip --isolated install -q -r requirements_dev.txt
	touch $@
