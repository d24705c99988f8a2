"""Does the exam keep its promises? Worthless policies on real days, through its statistics as they were and are.

    nice python benchmarks/exam_calibration.py --data ../shared/real

A worthless policy draws its positions at random: on any bars it earns nothing on average, before costs, and more
can only be luck. ``--data`` has a folder of Parquet files (``timestamp``, ``close``) per market; those of stocks
have "stock" in their name. Each policy trades all bars of a market, a world is a run of its days, and counted is
what the exam says of a world. On the left of an arrow is the exam of before: percentiles of the bootstrap, and the
expected best of all trials. Prints the tables of docs/exam.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.evidence import LOST, PROVEN, bets_on, most_of
from evaluation.uncertainty import LEAST_DAYS, NORMAL, resampled_days, score, tail_of
from evaluation.verdict import CERTAINTY, PROBABILITY, expected_luck, power, sharpe_bar

Array = NDArray[np.float64]
# Trades a day, and the share of them that lead to a position.
TRADERS = {
    "frequent": (100.0, 0.67),
    "daily": (2.0, 0.67),
    "rare": (1 / 3, 0.67),
    "mostly in cash": (1 / 3, 0.1),
}
MARKETS = ("crypto", "stocks", "both")
EXAMS_PER_RUN, EXAMS = 8, 100
PANELS = 300  # policies that trade all bars; worlds are runs of their days
FEWER_BARS = np.timedelta64(6, "h")  # a hole in crypto over which no return is known


def read_returns(path: Path, is_stock: bool) -> tuple[NDArray[np.datetime64], Array]:
    """Return the day of every bar and its simple return, 0 after a hole."""
    table = pq.read_table(path, columns=["timestamp", "close"])
    time, close = table["timestamp"].to_numpy().astype("datetime64[m]"), table["close"].to_numpy()
    earned = np.zeros(len(close))
    earned[1:] = close[1:] / close[:-1] - 1
    longest = np.timedelta64(6, "D") if is_stock else FEWER_BARS
    earned[1:][np.diff(time) > longest] = 0.0
    shift = np.timedelta64(5 if is_stock else 0, "h")
    return (time - shift).astype("datetime64[D]"), earned


def trade(
    day: NDArray[np.datetime64], earned: Array, trades: float, held: float, random: np.random.Generator
) -> tuple[NDArray[np.datetime64], Array]:
    """Let policies hold random positions; return the days, and what each earned on them, (policies, days)."""
    days, first = np.unique(day, return_index=True)
    ends = np.append(first[1:], len(earned))
    growth = np.concatenate([[0.0], np.cumsum(earned)])
    count = int(trades * len(days) * 1.25 + 60)
    waits = random.geometric(min(1.0, trades * len(days) / len(earned)), (PANELS, count))
    switched = np.minimum(np.cumsum(waits, axis=1) - waits[:, :1], len(earned))
    position = random.choice([-1, 0, 1], (PANELS, count), p=[held / 2, 1 - held, held / 2])
    until = np.concatenate([switched[:, 1:], np.full((PANELS, 1), len(earned))], axis=1)
    gained = np.cumsum(position * (growth[until] - growth[switched]), axis=1)
    before = np.concatenate([np.zeros((PANELS, 1)), gained[:, :-1]], axis=1)
    # The newest switch at each end of a day: rows are kept apart, so that one search serves all.
    row = np.arange(PANELS)[:, None]
    apart = row * (len(earned) + 1)
    place = np.searchsorted((switched + apart).ravel(), (ends + apart).ravel(), side="right")
    newest = np.clip(place.reshape(PANELS, -1) - 1 - row * count, 0, count - 1)
    worth = before[row, newest] + position[row, newest] * (growth[ends] - growth[switched[row, newest]])
    return days, np.diff(worth, axis=1, prepend=0.0)


@dataclass(frozen=True)
class Panel:
    """What policies of one kind earned on all days: sums over the symbols of crypto, and the mean stock."""

    crypto: Array  # (policies, days)
    symbols: Array  # (days,) coins with bars
    stocks: Array  # (policies, sessions)
    num_stocks: int

    def days(self, market: str, rows: NDArray[np.int64], num_days: int, random: np.random.Generator) -> Array:
        """Return a run of days of some policies, the same for all, (rows, num_days); the sample is a circle.

        Every policy has its mirror image, so that all of them together earn exactly nothing.
        """
        total = self.crypto.shape[1]
        run = (random.integers(total) + np.arange(num_days)) % total
        coins = self.crypto[rows[:, None], run] * random.choice([-1, 1], (len(rows), 1))
        if market == "crypto":
            return coins / self.symbols[run]
        # Few sessions: a longer run of them is traded by several policies, one after the other.
        sessions = self.stocks.shape[1]
        laps = -(-num_days // sessions) + 1
        offset = random.integers(sessions)
        stock = np.concatenate(
            [
                self.stocks[(7 * rows + 13 * lap) % PANELS] * random.choice([-1, 1], (len(rows), 1))
                for lap in range(laps)
            ],
            axis=1,
        )
        stock = stock[:, offset : offset + num_days]
        if market == "stocks":
            return stock
        is_session = (np.arange(num_days) + random.integers(7)) % 7 < 5
        week = np.zeros(stock.shape)
        week[:, is_session] = stock[:, : is_session.sum()]
        return (coins + self.num_stocks * week) / (self.symbols[run] + self.num_stocks)


def panel(folder: Path, trades: float, held: float, random: np.random.Generator) -> Panel:
    """Let policies of one kind trade all bars of a folder."""
    found: dict[bool, list[tuple[NDArray[np.datetime64], Array]]] = {True: [], False: []}
    for path in sorted(folder.glob("*/*.parquet")):
        is_stock = "stock" in path.parent.name
        found[is_stock].append(trade(*read_returns(path, is_stock), trades, held, random))
    if not all(found.values()):
        numbers = f"found {len(found[True])} and {len(found[False])} symbols"
        raise SystemExit(f"{folder} needs folders with Parquet files of stocks and of others; {numbers}")
    days = np.unique(np.concatenate([days for days, _ in found[False]]))
    total, symbols = np.zeros((PANELS, len(days))), np.zeros(len(days))
    for own_days, earned in found[False]:
        place = np.searchsorted(days, own_days)
        total[:, place] += earned
        symbols[place] += 1
    pooled = symbols >= 2
    stocks = np.mean([earned for _, earned in found[True]], axis=0)
    return Panel(total[:, pooled], symbols[pooled], stocks, len(found[True]))


def counts_of(num_days: int) -> Array:
    """Return how often each resampled history has each day, as shares, (resamples, days)."""
    rows = resampled_days(num_days)
    return np.stack([np.bincount(row, minlength=num_days) for row in rows]) / num_days


def errors(panels: dict[str, Panel], worlds: int, random: np.random.Generator) -> None:
    """Print how often an interval or the gate finds something in nothing."""
    print("| days | market | trades | interval above 0 (2.5 %) | below 0 (2.5 %) | the gate passes (5 %) |")
    print("|---|---|---|---|---|---|")
    for num_days in (5, 14, 60, 250):
        counts = counts_of(num_days)
        for market in MARKETS:
            for name, own in panels.items():
                rows = random.integers(PANELS, size=(worlds, 1))
                days = np.concatenate([own.days(market, row, num_days, random) for row in rows])
                means = np.sort(days @ counts.T, axis=1)
                before = _outside(means, 0.025), (means > 0).mean(axis=1) >= CERTAINTY
                if num_days < LEAST_DAYS:
                    now = (np.zeros(1), np.zeros(1)), np.zeros(1)
                else:
                    now = _outside(means, tail_of(num_days)), score(days) >= NORMAL.inv_cdf(CERTAINTY)
                cells = [
                    f"{100 * np.mean(then):.1f} -> {100 * np.mean(today):.1f}"
                    for then, today in (
                        (before[0][0], now[0][0]),
                        (before[0][1], now[0][1]),
                        (before[1], now[1]),
                    )
                ]
                print(f"| {num_days} | {market} | {name} | {' | '.join(cells)} |", flush=True)


def _outside(means: Array, tail: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    end = round(tail * means.shape[1])
    return means[:, end] > 0, means[:, -1 - end] < 0


def lives(panels: dict[str, Panel], worlds: int, random: np.random.Generator, num_days: int = 14) -> None:
    """Print in how many lives of 100 exams something is claimed of nothing."""
    counts = counts_of(num_days)
    luck = np.array([expected_luck(number) for number in range(1, EXAMS + 1)])
    run = np.arange(EXAMS) // EXAMS_PER_RUN
    print(
        "| market | trades | new days a run | an exam says edge | the record says edge | champions | titles lost |"
    )
    print("|---|---|---|---|---|---|---|")
    for market in MARKETS:
        for name, own in panels.items():
            for shift in (1, 7):
                figures = []
                for _ in range(worlds):
                    # Every exam is of another policy: as many independent trials as can be.
                    policies = random.permutation(PANELS)[:EXAMS]
                    days = own.days(market, policies, num_days + shift * (run[-1] + 1), random)
                    seen = np.stack([days[k, r * shift : r * shift + num_days] for k, r in enumerate(run)])
                    is_above = ((seen @ counts.T) > 0).mean(axis=1) >= 0.975
                    with np.errstate(all="ignore"):
                        ratio = seen.mean(axis=1) / seen.std(axis=1, ddof=1)
                    before = is_above & (ratio > luck / math.sqrt(num_days))
                    now = score(seen) - luck >= NORMAL.inv_cdf(PROBABILITY)
                    old, _, _ = _champions(
                        days,
                        run,
                        shift,
                        num_days,
                        lambda d: ((d @ counts.T) > 0).mean() >= CERTAINTY,
                        math.inf,
                    )
                    new, lost, record = _champions(
                        days,
                        run,
                        shift,
                        num_days,
                        lambda d: float(score(d)) >= NORMAL.inv_cdf(CERTAINTY),
                        LOST,
                    )
                    proven = most_of(record) >= PROVEN
                    figures.append((before.any(), now.any(), proven, old, new, lost))
                said, says, proven, old, new, lost = np.mean(figures, axis=0)
                cells = f"{said:.0%} -> {says:.1%} | {proven:.1%} | {old:.1f} -> {new:.1f} | {lost:.2f}"
                print(f"| {market} | {name} | {shift} | {cells} |", flush=True)


def _champions(
    days: Array,
    run: NDArray[np.int64],
    shift: int,
    num_days: int,
    beats: Callable[[Array], bool],
    most: float,
) -> tuple[int, int, Array]:
    """Return how many champions there were, how many lost the title, and what they earned while they had it.

    A champion loses it once bets against its own days have grown ``most``-fold.
    """
    number, lost, champion, record = 0, 0, -1, [np.zeros(0)]
    own = record[:1]  # of the champion
    for k, r in enumerate(run):
        span = slice(r * shift, r * shift + num_days)
        if champion >= 0 and r > run[k - 1]:
            own = [*own, days[champion, span.stop - shift : span.stop]]
            record.append(own[-1])
        has_lost = champion >= 0 and most_of(-np.concatenate(own)) >= most
        is_rival = champion >= 0 and not has_lost
        promoted = beats(days[k, span] - (days[champion, span] if is_rival else 0.0))
        lost += has_lost
        number += promoted
        if promoted or has_lost:
            champion, own = k if promoted else -1, record[:1]
    return number, lost, np.concatenate(record)


def titles(panels: dict[str, Panel], worlds: int, random: np.random.Generator) -> None:
    """Print how often a champion loses its title, by what it is worth and the days that it has it."""
    spans = (30, 90, 365)
    print("| true Sharpe | days | " + " | ".join(f"lost in {number} days" for number in spans) + " |")
    print("|---|---|" + "---|" * len(spans))
    for sharpe in (-20, -10, -5, -2, 0, 2, 5, 10):
        given = {"normal": random.normal(0, 1, (worlds, spans[-1]))}
        for name, own in panels.items():
            rows = random.integers(PANELS, size=(worlds, 1))
            given[f"of coins, {name}"] = np.concatenate(
                [own.days("crypto", row, spans[-1], random) for row in rows]
            )
        for kind, days in given.items():
            worth = days + sharpe / math.sqrt(365) * days.std(axis=1, keepdims=True)
            against = np.maximum.accumulate(bets_on(-worth), axis=1)
            cells = " | ".join(f"{(against[:, number - 1] >= LOST).mean():.1%}" for number in spans)
            print(f"| {sharpe} | {kind} | {cells} |", flush=True)


def powers() -> None:
    """Print what exams see, by their number of days, and how soon a record proves."""
    print("| days | trials | Sharpe 2 | Sharpe 5 | Sharpe 10 | Sharpe 20 | seen in half of all exams |")
    print("|---|---|---|---|---|---|---|")
    for num_days in (10, 14, 21, 28, 60, 120, 250):
        for trials in (1, 8, 100):
            seen = " | ".join(f"{power(sharpe, trials, num_days, 365):.1%}" for sharpe in (2, 5, 10, 20))
            print(f"| {num_days} | {trials} | {seen} | {sharpe_bar(trials, num_days, 365):.1f} |")
    print("\n| true Sharpe | days after which half of all records have proven it |\n|---|---|")
    random = np.random.default_rng(0)
    for sharpe in (2, 3, 5, 10, 20):
        grown = bets_on(random.normal(sharpe / math.sqrt(365), 1, (400, 1500)))
        first = np.where((grown >= PROVEN).any(axis=1), (grown >= PROVEN).argmax(axis=1) + 1, 10**6)
        half = np.median(first)
        print(f"| {sharpe} | {half:.0f} |" if half <= 1500 else f"| {sharpe} | over 1,500 |")


def main() -> None:
    """Read the options and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of Parquet files per market"
    )
    parser.add_argument(
        "--worlds", type=int, default=300, help="of each row of the table of lives; tenfold of the others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("powers", "errors", "lives", "titles"), help="print one table")
    given = parser.parse_args()
    random = np.random.default_rng(given.seed)
    if given.only in (None, "powers"):
        powers()
    if given.only == "powers":
        return
    panels = {name: panel(given.data, *how, random) for name, how in TRADERS.items()}
    tables = {"errors": (errors, 10), "lives": (lives, 1), "titles": (titles, 10)}
    for name, (print_table, times) in tables.items():
        if given.only in (None, name):
            print()
            print_table(panels, times * given.worlds, random)


if __name__ == "__main__":
    main()
