"""A refresh without news beside a first one: seconds and requests, against whatever the environment points to.

    python benchmarks/lake_refresh.py --data-dir FOLDER [--rounds 3]

Meant for stand-ins on loopback (POLYGON_S3_ENDPOINT, BINANCE_API_URL, BINANCE_ARCHIVE_URL and YAHOO_BASE_URL,
and keys). The first refresh brings FOLDER up to date, however long that takes; then come rounds of refreshes with
the default stocks and pairs over two years, each a Lake of its own, as after a restart; imports are paid before.
Each waits for the next minute, so that there is one closed bar per pair to ask for. Requests are counted as they
leave the process. The goal: under 3 s and under 100 requests.
"""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yfinance  # noqa: F401  (imports are paid before the clock starts)

from continuous_training import Settings
from data_sources.lake.lake import Lake
from data_sources.progress import Silence
from data_sources.refresh import refresh
from data_sources.vendors import binance, polygon, yahoo  # noqa: F401
from data_sources.vendors.yahoo_client import Watch
from training.data_feed import data_request

asked = 0


def counted(function):
    """Count the calls of a function."""

    def call(*arguments, **more):
        global asked
        asked += 1
        return function(*arguments, **more)

    return call


def one(folder: Path, settings: Settings) -> tuple[float, int, bool]:
    """Refresh once; return seconds, requests, and whether every source answered."""
    global asked
    asked = 0
    now_ns = time.time_ns()
    began = time.perf_counter()
    reports = refresh(Lake(folder), data_request(settings, now_ns), now_ns, Silence())
    return time.perf_counter() - began, asked, all(report.status == "ok" for report in reports.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    # boto3, requests and python-binance all end in http.client; yfinance's curl passes by Watch.send.
    http.client.HTTPConnection.putrequest = counted(http.client.HTTPConnection.putrequest)  # type: ignore[method-assign]
    Watch.send = counted(Watch.send)  # type: ignore[method-assign]
    settings = Settings(data_dir=str(arguments.data_dir))
    seconds, requests, is_whole = one(arguments.data_dir, settings)
    print(
        f"{len(settings.stocks)} stocks, {len(settings.binance_pairs)} pairs, {settings.history_days} days, "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(f"first: {seconds:.1f} s, {requests:,} requests{'' if is_whole else ', a source failed'}")
    later = []
    for _ in range(arguments.rounds):
        time.sleep(66 - time.time() % 60)  # five seconds after its end a minute is closed
        later.append(one(arguments.data_dir, settings))
    failed = "" if all(each[2] for each in later) else ", a source failed"
    print(
        f"without news: {statistics.median(each[0] for each in later):.2f} s (median of {len(later)}), "
        f"at most {max(each[1] for each in later)} requests{failed}"
    )


if __name__ == "__main__":
    main()
