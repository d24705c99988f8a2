"""Refreshes of one lake on demand, each in a process of its own that may be killed; started by test_kill.py.

Reads one JSON object per line (root, s3, binance, stocks, pairs, start_ns, now_ns, perhaps largest_file in bytes),
forks, and the child refreshes Polygon and Binance. Answers the child's id at once and its exit status when it has
ended. Forking saves every child the second that the vendors' libraries take to import.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from unittest.mock import patch

from data_sources.lake.lake import Lake
from data_sources.progress import NullProgress
from data_sources.refresh import refresh
from data_sources.sources import DataRequest
from data_sources.vendors.binance_refresh import Binance
from data_sources.vendors.http import RetryPolicy
from data_sources.vendors.polygon_refresh import Polygon

QUICK = RetryPolicy(read_seconds=20, total_seconds=30, backoff_seconds=0.01, attempts=2)


def run(job: dict) -> int:
    if job.get("largest_file"):  # no file may grow beyond it, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    symbols = {"stocks": job["stocks"], "binance_pairs": job["pairs"]}
    request = DataRequest(("polygon", "binance"), symbols, job["start_ns"], job["now_ns"])
    binance = Binance(job["binance"], job["binance"], policy=QUICK)
    with (
        patch.object(Polygon, "from_environment", lambda: Polygon("key", "secret", job["s3"], QUICK)),
        patch.object(Binance, "from_environment", lambda _: binance),
    ):
        reports = refresh(Lake(Path(job["root"])), request, job["now_ns"], NullProgress())
    return 0 if all(report.status == "ok" for report in reports.values()) else 1


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = run(json.loads(line))
            finally:
                os._exit(code)
        answer(child)
        _, status = os.waitpid(child, 0)
        answer(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
