"""From the mapped bars of the next run to its market: all features computed, beside those of former bars kept.

    python benchmarks/between_runs.py [--symbols 48] [--days 730] [--rounds 3] [--groups symbol] [--other FOLDER]

The lake is made up: random walks of pairs, every minute. One run's bars are followed by those of the next one,
a day later: the newest day of each symbol is new, and the oldest one is gone. Every measurement is a process
that has imported all and mapped the bars; the ways take turns. ``computed``: all features, by the commit in
``--other`` or, without one, by this one where it has no file; ``kept``: those of former bars come from the
former run's file; ``same``: all do, as in a restart in the middle of a run. CPU seconds are of all threads. A
digest of all features must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_NS, MINUTE_NS, DAY_BARS = 1_732_406_400 * 10**9, 60_000_000_000, 1_440  # 2024-11-24
WAYS = ("computed", "kept", "same")


def request_for(num_symbols: int, first: int, end: int):
    from data_sources.sources import DataRequest

    pairs = tuple(f"COIN{number:03d}USDT" for number in range(num_symbols))
    times = START_NS + first * MINUTE_NS, START_NS + end * MINUTE_NS
    return DataRequest(("binance",), {"binance_pairs": pairs}, *times)


def make(folder: Path, num_symbols: int, num_days: int) -> list[str]:
    """Fill a lake; return the copies of two runs' bars."""
    import numpy as np

    from data_sources import snapshot
    from data_sources.lake.lake import Lake
    from data_sources.lake.quality import bar_table

    random, lake, size = np.random.default_rng(0), Lake(folder), (num_days + 1) * DAY_BARS
    span = {"start_ns": START_NS, "end_ns": START_NS + size * MINUTE_NS}
    for pair in request_for(num_symbols, 0, size).symbols["binance_pairs"]:
        close = np.round(100 * np.exp(np.cumsum(random.normal(0, 5e-4, size))), 2)
        opened = np.append(100.0, close[:-1])
        high, low = np.maximum(opened, close) + 0.01, np.minimum(opened, close) - 0.01
        volume = np.round(random.exponential(5.0, size), 5)
        table = bar_table(pair, [START_NS + np.arange(size) * MINUTE_NS, opened, high, low, close, volume])
        now_ns = span["end_ns"] + 10**12
        lake.write("binance", pair, "all", table, key="u", version="", symbols=[pair], now_ns=now_ns, **span)
    runs = [(0, num_days * DAY_BARS), (DAY_BARS, size)]
    return [str(snapshot.provide(lake, request_for(num_symbols, *run), kept_snapshots=9)) for run in runs]


def measure(way: str, root: str, groups: str, former: str, copy: str, scale: str) -> None:
    """Make the market of a run and print what that took."""
    sys.path.insert(0, root)
    import time
    import zlib

    import torch

    from continuous_training import Settings
    from data_sources import snapshot
    from envs.features import FeatureStatistics
    from training.data_feed import make_market
    from training.distributed import Ranks

    path, known = Path(copy), Path(scale)
    settings = Settings(sources=("binance",), features=tuple(groups.split(",")))
    data, ranks = snapshot.open_snapshot(path), Ranks(0, 1, torch.device("cpu"))
    if not known.exists():  # the training's first run: measures the scale, and keeps its features
        begun = make_market(settings, snapshot.open_snapshot(Path(former)).bars, ranks, None, Path(former))
        torch.save(begun.statistics.state_dict(), known)
        return
    scaled = FeatureStatistics.from_state_dict(torch.load(known))
    where = () if way == "computed" else (path,)
    if way == "kept":
        for table in path.parent.glob(f"{path.stem}-*.features*"):
            table.unlink()
    # A small market first, and every page of the bars: neither a cold start nor a disk is measured.
    make_market(settings, [series.rows(0, 40 * DAY_BARS) for series in data.bars[:1]], ranks, None)
    for series in data.bars:
        for name in series.columns:
            getattr(series, name).sum()
    begin, cpu = time.monotonic(), time.process_time()
    market = make_market(settings, data.bars, ranks, scaled, *where)
    wall, cpu = time.monotonic() - begin, time.process_time() - cpu
    digest = zlib.crc32(market.features.numpy().data)
    print(json.dumps({"wall": wall, "cpu": cpu, "digest": digest, "bars": len(market.open_time)}))


def main() -> None:
    """Measure all ways in turns, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--symbols", type=int, default=48)
    parser.add_argument("--days", type=int, default=730)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", default="symbol")
    parser.add_argument("--other", default=str(ROOT), help="folder of another commit, for `computed`")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    sys.path.insert(0, str(ROOT))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        former, copy = make(Path(folder), options.symbols, options.days)

        def run(way: str, root: str) -> str:
            words = [way, root, options.groups, former, copy, str(Path(folder) / "scale.pt")]
            command = [sys.executable, __file__, *("--measure", *words)]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout

        run("kept", str(ROOT))
        for _ in range(options.rounds):
            for way in WAYS:
                root = options.other if way == "computed" else str(ROOT)
                found[way].append(json.loads(run(way, root)))
    assert len({each["digest"] for way in WAYS for each in found[way]}) == 1, "other bits"
    print(f"{found['kept'][0]['bars']:,} bars of {options.symbols} symbols, features {options.groups}")
    print("| | CPU seconds | least and most | seconds by the clock, least |")
    print("|---|---|---|---|")
    for way, each in found.items():
        cpu, wall = [one["cpu"] for one in each], [one["wall"] for one in each]
        middle = statistics.median(cpu)
        print(f"| {way} | {middle:.1f} | {min(cpu):.1f}, {max(cpu):.1f} | {min(wall):.1f} |")


if __name__ == "__main__":
    main()
