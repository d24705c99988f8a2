"""Names in a checkpoint folder, for those who look at one without loading torch."""

from __future__ import annotations

import re

NAME = re.compile(r"run(\d+)_epoch(\d+)(?:_step(\d+))?\.pt")
RESUME = "resume"
BEST = "best.pt"  # the champion; outside the series, so it is neither pruned nor resumed from
# The newest two: should the newest file be damaged, training resumes exactly from the one before.
NUM_RESUME_STATES = 2
