# The commands that developers type most. Everything else: README.md, CONTRIBUTING.md.

PYTHON ?= .venv/bin/python

.PHONY: test drill soak

test:  # lint, format, types and all tests but the long ones
	bash tests/run.sh

drill:  # every fault on the real program with two ranks, and 50 random kills; with wine, the .bat: about 40 minutes on two cores
	PATIENCE=900 DRILL=1 $(PYTHON) -m pytest --timeout 3600 --durations 0 tests/drill tests/faults tests/runtime/test_surroundings.py tests/training/test_integrity.py tests/test_start_bat.py
	PATIENCE=900 $(PYTHON) -m tests.drill.soak --minutes 600 --kills 50 --shortest 1 --longest 30

soak:  # two ranks, a random kill every 20 to 60 seconds, for half an hour
	PATIENCE=900 $(PYTHON) -m tests.drill.soak --minutes 30
