"""Processes, files and locks: standard library only, so that it runs before anything is installed."""

import sys
from types import TracebackType

_report = sys.excepthook


def _report_unless_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _report(kind, error, trace)


# Ctrl+C while modules load ends the program without a traceback; every program of ours imports this first.
sys.excepthook = _report_unless_interrupted
