"""The program on hourly bars, with the processes that it starts: ``python -m tests.commands.hourly_program``."""

import continuous_training
from tests.commands import hourly

hourly.plant(strength=1.0)  # in every process: those of --jobs import this module, too

if __name__ == "__main__":
    continuous_training.main()
