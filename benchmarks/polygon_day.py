"""One Polygon day file of 1.6 M rows to cached bars of 22 stocks: ours beside bare zlib and pandas' C reader.

    python benchmarks/polygon_day.py [--rounds 5]

Every measurement is a fresh process that first does the job once on a day of a few rows, so that what a
library loads at its first call is paid before the clock starts; the three take turns so that a busy machine
hits all alike. Time is the median; memory is the highest peak, imports included. ``zlib`` only
decompresses, in pieces. ``pandas`` reads with given types, filters, sorts and writes Parquet. ``ours`` is what
a refresh does: read_day() and Lake.write(), with all checks of rows, checksums and fsync. The goal: at
most 3 times zlib, at least twice as fast as pandas, at no more memory than pandas.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gzip
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DAY = dt.date(2026, 11, 20)
NUM_ROWS, NUM_TICKERS, MINUTES = 1_617_820, 10_500, 960
WARM_TICKERS, WARM_ROWS = 40, 100
# fmt: off
STOCKS = [
    "AAPL", "MSFT", "GOOGL", "AMZN", "NVDA", "META", "TSLA", "JPM", "BAC", "V", "MA",
    "WMT", "UNH", "PG", "DIS", "INTC", "CSCO", "ORCL", "ADBE", "CRM", "NFLX", "AMD",
]
# fmt: on
WAYS = ("zlib", "pandas", "ours")


def day_file(num_tickers: int, num_rows: int) -> bytes:
    """Return a made-up day like one of late 2026: decimal volumes, NA and NULL among the tickers."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    random = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = {*STOCKS, "NA", "NULL", "TRUE", "1E5"}
    while len(names) < num_tickers:
        names.add("".join(random.choice(letters, random.integers(3, 6))))
    tickers = sorted(names)
    counts = random.exponential(1.0, num_tickers)
    counts = np.minimum(MINUTES, (counts / counts.sum() * num_rows).astype(int) + 1)
    counts[np.isin(tickers, STOCKS)] = min(890, num_rows // num_tickers * 8)
    first = int(dt.datetime(DAY.year, DAY.month, DAY.day, 9, tzinfo=dt.UTC).timestamp())  # 04:00 New York
    minutes = np.concatenate([np.sort(random.choice(MINUTES, count, replace=False)) for count in counts])
    num_rows = len(minutes)
    close = np.round(50 + (np.cumsum(random.normal(0, 0.001, num_rows)) % 300), 2)
    opened = np.round(close + random.normal(0, 0.05, num_rows), 2)
    volume = np.floor(random.exponential(5_000, num_rows) + 1)
    volume += np.where(random.random(num_rows) < 0.35, np.round(random.random(num_rows), 6), 0.0)
    table = pa.table(
        {
            "ticker": np.repeat(tickers, counts),
            "volume": volume,
            "open": opened,
            "close": close,
            "high": np.round(np.maximum(opened, close) + 0.03, 2),
            "low": np.round(np.minimum(opened, close) - 0.03, 2),
            "window_start": (first + 60 * minutes) * 10**9,
            "transactions": random.integers(1, 500, num_rows),
        }
    )
    text = io.BytesIO(b"")
    text.write((",".join(table.column_names) + "\n").encode())
    csv.write_csv(table, text, csv.WriteOptions(include_header=False, quoting_style="none"))
    return gzip.compress(text.getvalue(), 6, mtime=0)


def with_zlib(path: Path, folder: Path) -> int:
    import zlib

    began = time.perf_counter_ns()
    decompress = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress
    with path.open("rb") as file:
        while piece := file.read(1 << 18):
            decompress(piece)
    return time.perf_counter_ns() - began


def with_pandas(path: Path, folder: Path) -> int:
    import pandas as pd
    import pyarrow.parquet  # noqa: F401  (what to_parquet would import within the time)

    began = time.perf_counter_ns()
    frame = pd.read_csv(
        path,
        engine="c",
        usecols=["ticker", "volume", "open", "close", "high", "low", "window_start"],
        dtype={"ticker": "str", "window_start": "int64", "volume": "float64"},
        na_filter=False,
    )
    frame = frame[frame["ticker"].isin(STOCKS)].sort_values(["ticker", "window_start"])
    frame.to_parquet(folder / "day.parquet", engine="pyarrow", compression="zstd", index=False)
    return time.perf_counter_ns() - began


def with_ours(path: Path, folder: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from data_sources.lake.lake import Lake
    from data_sources.vendors.polygon_days import read_day
    from data_sources.vendors.polygon_files import US_STOCKS

    began = time.perf_counter_ns()
    start_ns, end_ns = US_STOCKS.interval(DAY)
    table = read_day(path.read_bytes(), path.name, STOCKS, start_ns, end_ns)
    Lake(folder).write(
        "polygon",
        US_STOCKS.dataset,
        DAY.isoformat(),
        table,
        key=path.name,
        version=str(path),  # another file each time
        start_ns=start_ns,
        end_ns=end_ns,
        symbols=STOCKS,
        now_ns=end_ns + 12 * 3600 * 10**9,
    )
    return time.perf_counter_ns() - began


def peak_megabytes() -> float:
    """Return this process's peak of resident memory.

    Not ru_maxrss where it can be helped: Linux hands the parent's peak on to it through fork and exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # bytes on macOS


def measure(way: str, path: Path, warm_path: Path, folder: Path) -> None:
    """Run one way in this process and print its figures as JSON."""
    job = {"zlib": with_zlib, "pandas": with_pandas, "ours": with_ours}[way]
    job(warm_path, folder)
    nanoseconds = job(path, folder)
    print(json.dumps({"seconds": nanoseconds / 1e9, "megabytes": peak_megabytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, *paths = arguments.measure
        return measure(way, *map(Path, paths))

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    megabytes: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"{DAY}.csv.gz"
        path.write_bytes(day_file(NUM_TICKERS, NUM_ROWS))
        warm_path = Path(temporary) / "warm.csv.gz"
        warm_path.write_bytes(day_file(WARM_TICKERS, WARM_ROWS))
        size = path.stat().st_size / 1e6
        for number in range(arguments.rounds):
            for way in WAYS:
                folder = Path(temporary) / f"{way}{number}"
                folder.mkdir()
                command = [sys.executable, __file__, "--measure", way]
                command += [str(path), str(warm_path), str(folder)]
                figures = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                seconds[way].append(figures["seconds"])
                megabytes[way].append(figures["megabytes"])
    middle = {way: statistics.median(seconds[way]) for way in WAYS}
    peak = {way: max(megabytes[way]) for way in WAYS}
    print(
        f"{NUM_ROWS:,} rows, {size:.1f} MB gzip, {platform.machine()}, {os.cpu_count()} cores,"
        f" Python {platform.python_version()}, {arguments.rounds} rounds; seconds (fastest-slowest)"
    )
    for way in WAYS:
        spread = f"{min(seconds[way]):.2f}-{max(seconds[way]):.2f}"
        print(f"  {way:6} {middle[way]:.2f} s ({spread}), {peak[way]:.0f} MB")
    print()
    print("| job | zlib alone | pandas C reader | ours | ours / zlib | pandas / ours |")
    print("|---|---|---|---|---|---|")
    cells = [f"{middle[way]:.2f} s, {peak[way]:.0f} MB" for way in WAYS]
    ratios = [f"{middle['ours'] / middle['zlib']:.1f}x", f"{middle['pandas'] / middle['ours']:.1f}x"]
    print("| " + " | ".join(["Polygon day file to cached bars of 22 stocks", *cells, *ratios]) + " |")
    return None


if __name__ == "__main__":
    main()
