"""Run by torchrun in test_endless_exam.py: the program itself, with exams that never end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

import continuous_training
from evaluation import examiner


def examine(*_: object, check_stop: Callable[[], None], **__: object) -> NoReturn:
    while True:
        check_stop()


if __name__ == "__main__":
    examiner.examine = examine
    continuous_training.main()
