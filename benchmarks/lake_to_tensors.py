"""From the lake to float32 tensors: mapping the snapshot, compared with reading its bytes and decoding Parquet.

    python benchmarks/lake_to_tensors.py [--symbols 42] [--bars 1000000] [--rounds 3]

The lake is simulated, with one part per month and symbol, like Binance's. Every measurement is a fresh process
that has done the same on one small symbol before the clock starts; the ways take turns, and the files are in the
page cache (a warm start). ``read`` reads the bytes of the snapshot into memory and does nothing with them.
``copy`` maps the snapshot and fills ragged tensors: open_time int64 (bars,) and open, high, low, close, volume
float32 (5, bars). ``lake`` fills the same tensors from Parquet, verifying every checksum, as the first rank does
when it writes the snapshot. Memory is the peak of anonymous memory above the imports, in units of the tensors:
pages of the mapped file belong to the page cache, one copy for all processes of the machine. The goals: copy
takes at most 1.5 times as long as read, and at most 1.3 times the memory of the tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WAYS = ("read", "copy", "lake")
MINUTE_NS = 60_000_000_000
START_NS = 1_732_406_400 * 10**9  # 2024-11-24
PART_BARS = 44_640  # of a month
SMALL = 5_000


def request_for(num_symbols: int, num_bars: int):
    from data_sources.sources import DataRequest

    pairs = tuple(f"COIN{number:03d}USDT" for number in range(num_symbols))
    return DataRequest(("binance",), {"binance_pairs": pairs}, START_NS, START_NS + num_bars * MINUTE_NS)


def make(folder: Path, num_symbols: int, num_bars: int) -> str:
    """Fill a lake with random walks; return the path of its snapshot."""
    import numpy as np
    import pyarrow as pa

    from data_sources import snapshot
    from data_sources.lake.lake import Lake
    from data_sources.lake.quality import SCHEMA

    random = np.random.default_rng(0)
    lake, request = Lake(folder), request_for(num_symbols, num_bars)
    for pair in request.symbols["binance_pairs"]:
        for first in range(0, num_bars, PART_BARS):
            count = min(PART_BARS, num_bars - first)
            close = np.round(100 * np.exp(np.cumsum(random.normal(0, 5e-4, count))), 2)
            opened = np.append(100.0, close[:-1])
            times = START_NS + (first + np.arange(count)) * MINUTE_NS
            names = pa.repeat(pa.scalar(pair, pa.string()), count)
            high, low = np.maximum(opened, close) + 0.01, np.minimum(opened, close) - 0.01
            volume = np.round(random.exponential(5.0, count), 5)
            table = pa.table([names, times, opened, high, low, close, volume], schema=SCHEMA)
            span = {"start_ns": int(times[0]), "end_ns": int(times[-1]) + MINUTE_NS}
            unit = f"part{first // PART_BARS:03d}"
            lake.write(
                "binance",
                pair,
                unit,
                table,
                key=unit,
                version="",
                symbols=[pair],
                now_ns=request.end_ns + 10**12,
                **span,
            )
    return str(snapshot.provide(lake, request))


def allocate(way: str, copy: Path, symbols: int, bars: int) -> tuple:
    """Allocate the tensors of a way and touch every page, so that page faults are not measured."""
    import torch

    if way == "read":
        return (torch.empty(copy.stat().st_size, dtype=torch.uint8).fill_(1),)
    return torch.empty(symbols * bars, dtype=torch.int64).fill_(1), torch.empty(5, symbols * bars).fill_(1)


def fill(bars: list, first: int, times, values) -> int:
    """Fill the ragged tensors from ``first`` on, symbol by symbol; return the index after the last."""
    import torch

    for series in bars:
        last = first + len(series)
        times[first:last] = torch.from_numpy(series.open_time)
        for row, name in enumerate(("open", "high", "low", "close", "volume")):
            values[row, first:last] = torch.from_numpy(getattr(series, name))
        first = last
    return first


def with_read(folder: Path, copy: Path, symbols: int, bars: int, buffer) -> None:
    with copy.open("rb", buffering=0) as file:
        view = memoryview(buffer.numpy())
        while len(view):
            view = view[file.readinto(view) :]


def with_copy(folder: Path, copy: Path, symbols: int, bars: int, times, values) -> None:
    from data_sources.snapshot import open_snapshot

    fill(open_snapshot(copy).bars, 0, times, values)


def with_lake(folder: Path, copy: Path, symbols: int, bars: int, times, values) -> None:
    from data_sources.lake.lake import Lake
    from data_sources.load import each_symbol

    first = 0
    for series, _ in each_symbol(Lake(folder), request_for(symbols, bars)):
        first = fill([series], first, times, values)


def anonymous_megabytes() -> float:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class Peak:
    """Measures the peak of this process's anonymous memory during a block."""

    def __enter__(self) -> Peak:
        self.megabytes = self.before = anonymous_megabytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.megabytes = max(self.megabytes, anonymous_megabytes())

    def __exit__(self, *_: object) -> None:
        self.megabytes = max(self.megabytes, anonymous_megabytes()) - self.before
        self._done.set()
        self._thread.join()


def measure(way: str, small: list[str], large: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    job = {"read": with_read, "copy": with_copy, "lake": with_lake}[way]
    for folder, copy, symbols, bars in (small, large):
        places = (Path(folder), Path(copy), int(symbols), int(bars))
        with places[1].open("rb") as file:
            while file.read(1 << 24):  # a warm start
                pass
        with Peak() as peak:
            buffers = allocate(way, *places[1:])
            start = time.perf_counter_ns()
            job(*places, *buffers)
            seconds = (time.perf_counter_ns() - start) / 1e9
    print(json.dumps({"seconds": seconds, "megabytes": peak.megabytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbols", type=int, default=42)
    parser.add_argument("--bars", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=9, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, *rest = arguments.measure
        return measure(way, rest[:4], rest[4:])

    symbols, bars = arguments.symbols, arguments.bars
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        words = [str(small), make(small, 1, SMALL), "1", str(SMALL)]
        words += [str(large), make(large, symbols, bars), str(symbols), str(bars)]
        size = Path(words[5]).stat().st_size / 1e6
        for _ in range(arguments.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, *words]
                figures[way].append(
                    json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                )
    seconds = {way: statistics.median(figure["seconds"] for figure in figures[way]) for way in WAYS}
    megabytes = {way: max(figure["megabytes"] for figure in figures[way]) for way in WAYS}
    tensors = symbols * bars * (8 + 5 * 4) / 1e6
    print(
        f"{symbols} symbols x {bars:,} bars, copy of {size:,.0f} MB, tensors of {tensors:,.0f} MB, "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{arguments.rounds} rounds"
    )
    print("| way | seconds (median) | of read | memory over the tensors |")
    print("|---|---|---|---|")
    for way in WAYS:
        memory = "" if way == "read" else f"{megabytes[way] * 1.048576 / tensors:.2f}x"
        print(f"| {way} | {seconds[way]:.2f} | {seconds[way] / seconds['read']:.2f}x | {memory} |")
    return None


if __name__ == "__main__":
    main()
