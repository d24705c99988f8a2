"""The data's ways beside those of another commit, in one run: CPU seconds, in turns.

    git worktree add ../other COMMIT
    python benchmarks/data_beside.py --other ../other [--rounds 7]

A round is a process of each commit, in turns; every job is done there once before its clock starts, then
six times, of which the median counts. ``refresh``: no news but a closed minute, of 8 pairs over a year,
against a stand-in of Binance on loopback; ``day``: a day file of Polygon's with 1.6 million rows to
checked, synced bars of 22 stocks; ``copy`` and ``lake``: from the mapped copy and from the lake's Parquet
to tensors. Each commit has a lake that it wrote, ours with order flow for ``refresh`` and ``lake, with
flow``. CPU seconds are of all threads, so that a busy machine spoils less.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gzip
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTE_NS, DAY_NS = 60_000_000_000, 86_400 * 10**9
NOW_NS = 1_793_707_230 * 10**9  # 2026-11-03 12:00:30, when October's files are out
PAIRS = tuple(f"COIN{letter}USDT" for letter in "ABCDEFGH")
STOCKS = (
    "AAPL", "MSFT", "GOOGL", "AMZN", "NVDA", "META", "TSLA", "JPM", "BAC", "V", "MA", "WMT", "UNH", "PG", "DIS",
    "INTC", "CSCO", "ORCL", "ADBE", "CRM", "NFLX", "AMD",
)  # fmt: skip
DAY = dt.date(2026, 11, 20)
TENSOR_SYMBOLS, TENSOR_DAYS = 4, 173
ATTEMPTS = 7  # in one process, the first unclocked
JOBS = ("refresh", "day", "copy", "lake", "lake, with flow")


def make_day(path: Path) -> None:
    """Write a made-up day like one of late 2026: 10,500 tickers, decimal volumes."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    random = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = {*STOCKS, "NA", "NULL", "TRUE", "1E5"}
    while len(names) < 10_500:
        names.add("".join(random.choice(letters, random.integers(3, 6))))
    counts = random.exponential(1.0, len(names))
    counts = np.minimum(960, (counts / counts.sum() * 1_617_820).astype(int) + 1)
    counts[np.isin(sorted(names), STOCKS)] = 890
    first = int(dt.datetime(DAY.year, DAY.month, DAY.day, 9, tzinfo=dt.UTC).timestamp())  # 04:00 New York
    minutes = np.concatenate([np.sort(random.choice(960, count, replace=False)) for count in counts])
    close = np.round(50 + (np.cumsum(random.normal(0, 0.001, len(minutes))) % 300), 2)
    opened = np.round(close + random.normal(0, 0.05, len(minutes)), 2)
    volume = np.floor(random.exponential(5_000, len(minutes)) + 1)
    volume += np.where(random.random(len(minutes)) < 0.35, np.round(random.random(len(minutes)), 6), 0.0)
    columns = {"ticker": np.repeat(sorted(names), counts), "volume": volume, "open": opened, "close": close}
    columns["high"] = np.round(np.maximum(opened, close) + 0.03, 2)
    columns["low"] = np.round(np.minimum(opened, close) - 0.03, 2)
    columns["window_start"] = (first + 60 * minutes) * 10**9
    columns["transactions"] = random.integers(1, 500, len(minutes))
    text = io.BytesIO()
    text.write((",".join(columns) + "\n").encode())
    csv.write_csv(pa.table(columns), text, csv.WriteOptions(include_header=False, quoting_style="none"))
    path.write_bytes(gzip.compress(text.getvalue(), 6, mtime=0))


def make_lake(folder: Path, pairs: tuple[str, ...], start_ns: int, end_ns: int, has_flow: bool) -> None:
    """Fill a lake with the months of Binance's stand-in."""
    import numpy as np
    import pyarrow as pa

    from data_sources.bars import COLUMNS
    from data_sources.lake.lake import Lake
    from data_sources.vendors.binance_archive import months

    sys.path.insert(0, str(ROOT))  # the stand-in is ours for both
    from tests.data_sources.vendors.binance_server import bars_of, flow_of

    lake = Lake(folder)
    for pair in pairs:
        for month in months(start_ns, end_ns):
            times = np.arange(month.start_ns, min(month.end_ns, end_ns), MINUTE_NS)
            values = bars_of(pair, times // MINUTE_NS)
            columns = {"symbol": [pair] * len(times), **dict(zip(COLUMNS, (times, *values.T), strict=True))}
            if has_flow:
                flow = flow_of(values[:, 4], times // MINUTE_NS)
                columns |= {"trades": flow[:, 0], "taker_buy_volume": flow[:, 1]}
            span = {"start_ns": month.start_ns, "end_ns": month.end_ns, "symbols": [pair], "now_ns": NOW_NS}
            lake.write("binance", pair, month.name, pa.table(columns), key=month.name, version="v", **span)


def request_for(pairs: tuple[str, ...], start_ns: int, end_ns: int):
    from data_sources.sources import DataRequest

    return DataRequest(("binance",), {"binance_pairs": pairs}, start_ns, end_ns)


def do_refresh(folder: Path, day: Path, attempt: int):
    from data_sources.lake.lake import Lake
    from data_sources.progress import NullProgress
    from data_sources.refresh import refresh

    now_ns = int(os.environ["BENCHMARK_NOW_NS"]) + attempt * MINUTE_NS
    request = request_for(PAIRS, NOW_NS - 365 * DAY_NS, now_ns)
    yield
    reports = refresh(Lake(folder), request, now_ns, NullProgress())
    assert reports["binance"].status == "ok", reports


def do_day(folder: Path, day: Path, attempt: int):
    from data_sources.lake.lake import Lake
    from data_sources.vendors.polygon import US_STOCKS
    from data_sources.vendors.polygon_days import read_day

    start_ns, end_ns = US_STOCKS.interval(DAY)
    content = day.read_bytes()
    yield
    table, _ = read_day(content, day.name, STOCKS, start_ns, end_ns)
    span = {"start_ns": start_ns, "end_ns": end_ns, "symbols": STOCKS, "now_ns": end_ns + DAY_NS}
    origin = {"key": day.name, "version": f"{time.time_ns()}"}
    Lake(folder).write("polygon", US_STOCKS.dataset, f"{DAY}", table, **origin, **span)


def do_tensors(folder: Path, day: Path, attempt: int, is_mapped: bool):
    import torch

    from data_sources import snapshot
    from data_sources.lake.lake import Lake
    from data_sources.load import each_symbol

    request = request_for(PAIRS[:TENSOR_SYMBOLS], NOW_NS - TENSOR_DAYS * DAY_NS, NOW_NS)
    ready = snapshot.provide(Lake(folder), request)
    num_bars = TENSOR_SYMBOLS * TENSOR_DAYS * 1_440
    times, values = torch.empty(num_bars, dtype=torch.int64).fill_(1), torch.empty(5, num_bars).fill_(1)
    yield
    first = 0
    found = snapshot.open_snapshot(ready).bars if is_mapped else each_symbol(Lake(folder), request)
    for each in found:
        series = each if is_mapped else each[0]
        last = first + len(series)
        times[first:last] = torch.from_numpy(series.open_time)
        for row, name in enumerate(("open", "high", "low", "close", "volume")):
            values[row, first:last] = torch.from_numpy(getattr(series, name))
        first = last
    assert first > 0.99 * num_bars


def work(folder: Path, day: Path) -> None:
    """Do every job with the modules of the working folder; print its median CPU time in ns, as JSON."""
    spent = {}
    for job in JOBS:
        times = []
        for attempt in range(ATTEMPTS):
            if job == "refresh":
                steps = do_refresh(folder / job, day, attempt)
            elif job == "day":
                steps = do_day(folder / job, day, attempt)
            else:
                steps = do_tensors(folder / job.replace("copy", "lake"), day, attempt, job == "copy")
            next(steps)  # what is ready before the clock starts
            began = time.process_time_ns()
            for _ in steps:
                pass
            times.append(time.process_time_ns() - began)
        spent[job] = int(statistics.median(times[1:]))
    print(json.dumps(spent))


def in_tree(tree: Path, *words: str, **environment: str) -> str:
    """Run this file with the modules of a tree; return what it printed."""
    variables = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    ended = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr[-3_000:])
    return ended.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="a working tree of the other commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*map(Path, arguments.work))
        return
    if arguments.make:
        folder, count, start_ns, flow = arguments.make
        end_ns = NOW_NS - NOW_NS % DAY_NS - 2 * DAY_NS if int(count) == len(PAIRS) else NOW_NS
        make_lake(Path(folder), PAIRS[: int(count)], int(start_ns), end_ns, flow == "flow")
        return
    sys.path.insert(0, str(ROOT))
    from tests.data_sources.vendors.binance_server import BinanceServer

    trees = {"other": arguments.other.resolve(), "ours": ROOT}
    with tempfile.TemporaryDirectory() as temporary, BinanceServer(NOW_NS + DAY_NS, PAIRS) as server:
        root = Path(temporary).resolve()
        day = root / "day.csv.gz"
        make_day(day)
        for name, tree in trees.items():
            for job in ("refresh", "lake", "lake, with flow"):
                count, days = (len(PAIRS), 365) if job == "refresh" else (TENSOR_SYMBOLS, TENSOR_DAYS)
                has_flow = name == "ours" and job != "lake"
                folder, start_ns = root / name / job, NOW_NS - days * DAY_NS
                flow = "flow" if has_flow else "none"
                in_tree(tree, "--make", str(folder), str(count), str(start_ns), flow)
        addresses = {"BINANCE_API_URL": server.url, "BINANCE_ARCHIVE_URL": server.url}
        rounds: list[dict[str, dict[str, int]]] = []
        for number in range(arguments.rounds):
            addresses["BENCHMARK_NOW_NS"] = str(NOW_NS + ATTEMPTS * number * MINUTE_NS)
            rounds.append({})
            for name in sorted(trees, reverse=bool(number % 2)):
                printed = in_tree(trees[name], "--work", str(root / name), str(day), **addresses)
                rounds[-1][name] = json.loads(printed)
            print(f"{number + 1} of {arguments.rounds}: {rounds[-1]}", file=sys.stderr, flush=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, CPU ms")
    for job in JOBS:
        ours, other = ([each[name][job] for each in rounds] for name in ("ours", "other"))
        ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        figures = [f"{statistics.median(each) / 1e6:,.0f} ({min(each) / 1e6:,.0f})" for each in (other, ours)]
        print(
            f"{job}: other {figures[0]}, ours {figures[1]} (least); ours / other {ratio:.3f} by rounds, "
            f"{min(ours) / min(other):.3f} by the least"
        )


if __name__ == "__main__":
    main()
