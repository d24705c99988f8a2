"""Names in a checkpoint folder, for those who look at one without loading torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

NAME = re.compile(r"run(\d+)_epoch(\d+)(?:_step(\d+))?\.pt")
RESUME = "resume"
BEST = "best.pt"  # the champion; outside the series, so it is neither pruned nor resumed from
# The newest two: should the newest file be damaged, training resumes exactly from the one before.
NUM_RESUME_STATES = 2


def may_have_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint of the series, whole or damaged, or cannot be read."""
    try:
        return any(NAME.fullmatch(name) for name in os.listdir(folder))  # noqa: PTH208
    except FileNotFoundError:
        return False
    except OSError:  # reported by those who read it
        return True
