"""Features of many symbols at once: CPU seconds and memory, from bars in memory to normalised features.

    python benchmarks/panel.py [--symbols 48] [--days 730] [--asset-class crypto] [--groups symbol,panel]

Bars are random walks of every minute of the market. Each symbol's features are computed as ``Market.from_bars``
does, once for the statistics and once for the table, of which only one symbol's part is kept at a time: all of it
takes 2 bytes per bar and feature. Memory is the peak beside the bars, which a training maps from a file.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_sources.bars import MINUTE_NS, Bars
from data_sources.calendar import date_ns, expected_minutes
from envs.features import FeatureStatistics, chosen_features, compute, panel_of

START_NS = date_ns("2024-11-25")
DAY_NS = 1_440 * MINUTE_NS
CPU = torch.device("cpu")


def minutes_of(asset_class: str, num_days: int) -> np.ndarray:
    """Return the open times of a market's minutes."""
    end_ns = START_NS + num_days * DAY_NS
    if asset_class != "stock":
        return np.arange(START_NS, end_ns, MINUTE_NS)
    days = (expected_minutes(first, first + DAY_NS) for first in range(START_NS, end_ns, DAY_NS))
    return np.concatenate([day for day in days if day is not None])


def walk(number: int, asset_class: str, open_time: np.ndarray) -> Bars:
    """Return a random walk with order flow; the first two symbols are the leaders."""
    random, size = np.random.default_rng(number), len(open_time)
    leaders = {"stock": ("SPY", "QQQ"), "crypto": ("BTCUSDT", "ETHUSDT")}[asset_class]
    close = 100 * np.exp(np.cumsum(random.normal(0, 5e-4, size)))
    opens = np.append(100.0, close[:-1])
    high, low = np.maximum(opens, close) * 1.0002, np.minimum(opens, close) * 0.9998
    volume = random.lognormal(8, 1, size)
    taker = volume * random.random(size) if asset_class == "crypto" else None
    name = leaders[number] if number < 2 else f"SYM{number:03d}"
    return Bars(name, asset_class, open_time, opens, high, low, close, volume, taker_buy_volume=taker)


def peak_bytes() -> int:
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure once and print a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--symbols", type=int, default=48)
    parser.add_argument("--days", type=int, default=730)
    parser.add_argument("--asset-class", choices=("crypto", "stock"), default="crypto")
    parser.add_argument("--groups", default="symbol,panel")
    options = parser.parse_args()
    torch.set_num_threads(1)
    open_time = minutes_of(options.asset_class, options.days)
    bars = [walk(number, options.asset_class, open_time) for number in range(options.symbols)]
    functions = chosen_features(options.groups.split(","))
    before, began, wall = peak_bytes(), time.process_time(), time.monotonic()
    panel = panel_of(bars, CPU, functions)
    raws = (compute(series, CPU, functions, panel) for series in bars)
    statistics = FeatureStatistics.measure(list(functions), raws, [len(open_time)] * len(bars))
    for series in bars:
        statistics.normalise(compute(series, CPU, functions, panel))
    seconds, num_bars = time.process_time() - began, len(bars) * len(open_time)
    print(
        f"{len(bars)} symbols x {len(open_time):,} minutes, {len(functions)} features ({options.groups}): "
        f"{seconds:.0f} CPU seconds, {seconds / num_bars * 1e6:.2f} per million bars; "
        f"{time.monotonic() - wall:.0f} s by the clock; {(peak_bytes() - before) / 2**30:.2f} GiB beside "
        f"{before / 2**30:.2f} GiB of bars"
    )


if __name__ == "__main__":
    main()
