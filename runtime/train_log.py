"""train.log: every line that people saw, for later; the training's first rank writes it, and the supervisor.

It is in ``log_dir``, with the level of each line and its time in UTC. At 10 MB it becomes train.log.1, and so on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

from runtime.files import make_folder, warn_once

log = logging.getLogger("continuous_training")

NAME = "train.log"
MOST_BYTES = 10_000_000
FORMER_FILES = 5
NOT_KEPT = "train.log misses lines, which cannot be written there"


class TrainLog(RotatingFileHandler):
    """Writes log records; lines that cannot be written are one warning, and do not end the training.

    Only one process may rotate the file.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        with contextlib.suppress(OSError):
            make_folder(folder)
        super().__init__(
            folder / NAME, maxBytes=most_bytes, backupCount=FORMER_FILES, encoding="utf-8", delay=True
        )
        form = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        form.converter = time.gmtime
        self.setFormatter(form)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Report once that lines are missing: a full disk, a folder that is gone."""
        self.close()  # so that the next line tries to open it again
        warn_once(Path(self.baseFilename).parent, NOT_KEPT)


@contextlib.contextmanager
def keep_log(folder: Path | None, level: str) -> Iterator[None]:
    """Keep what is logged meanwhile, from a level of ``logging`` in lower case on; None: nothing."""
    if folder is None:
        yield
        return
    log_file = TrainLog(folder)
    log_file.setLevel(level.upper())
    log.addHandler(log_file)
    try:
        yield
    finally:
        log.removeHandler(log_file)
        log_file.close()


def append_line(folder: Path | None, line: str, level: int = logging.INFO) -> None:
    """Add one line to the train.log of a folder, from a process that holds it not open; None: nowhere."""
    if folder is None:
        return
    log_file = TrainLog(folder, most_bytes=0)  # which another process rotates
    log_file.handle(logging.LogRecord("", level, "", 0, line.strip(), None, None))
    log_file.close()
