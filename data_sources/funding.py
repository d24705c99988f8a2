"""Funding of perpetual futures: a ledger of the rates, applied when bars are loaded.

    data_dir/funding/<symbol>.json      {"rows": [[time_ns, rate, fetched_ns], ...]}, oldest first

At each time a long position pays the rate times its value, a short one receives it. As a rule exchanges charge
every 8 hours, for some contracts every 4, 2 or 1, and they change that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS, HOUR_NS, MINUTE_NS, Bars
from data_sources.errors import LakeError, lake_errors
from data_sources.lake.names import escape
from data_sources.renames import Stretch
from runtime.files import move_over, write_atomically

FOLDER = "funding"
# More than exchanges charge at one time: Binance caps it at 3 % or less, by contract (announcements to 2025).
LARGEST_RATE = 0.05
LONGEST_INTERVAL_NS = 8 * HOUR_NS
LATE_NS = HOUR_NS  # a row is there some seconds after its time; one that is missing for longer is late
SAME_RATE = 1e-9  # vendors print 8 decimals
MOST_FLAGS = 3  # of a symbol


class FundingLedger:
    """The funding rates of every perpetual future, one file each in ``root/funding``.

    Raises:
        LakeError: from every method, when a file cannot be read or written. One that is no ledger is set aside as
            <symbol>.json.corrupt, and that ledger starts empty; the next refresh fills it again.
    """

    def __init__(self, root: Path) -> None:
        self._folder = Path(root) / FOLDER

    def rates(
        self, symbol: str, known_ns: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the times, ns UTC, oldest first, and the rates; if given, only those fetched by ``known_ns``."""
        rows = self._read(symbol)
        kept = [time for time in sorted(rows) if known_ns is None or rows[time][1] <= known_ns]
        return np.array(kept, np.int64), np.array([rows[time][0] for time in kept], np.float64)

    def update(self, symbol: str, rows: Iterable[tuple[int, float]], now_ns: int) -> list[str]:
        """Add a vendor's rows (time in ns UTC, rate), in any order; write at once. Return what is wrong with some.

        A time counts as the minute that it is in: vendors stamp rows some milliseconds late. A row that is known
        keeps the time at which it was fetched first; another rate for its time takes its place. An empty list
        removes nothing.
        """
        known = self._read(symbol)
        merged, warnings = dict(known), []
        seen: dict[int, float] = {}
        for stamp, rate in rows:
            time = stamp // MINUTE_NS * MINUTE_NS
            if not (math.isfinite(rate) and abs(rate) <= LARGEST_RATE):
                warnings.append(f"a funding rate of {rate:g} at {_minute(time)} cannot be, left out")
            elif not 0 <= stamp <= now_ns:
                warnings.append(f"funding at {_minute(time)} is still to come, left out")
            else:
                if abs(seen.setdefault(time, rate) - rate) > SAME_RATE:
                    both = f"{seen[time]:g} and {rate:g}"
                    warnings.append(f"two funding rates at {_minute(time)}, {both}: the later row counts")
                seen[time] = rate
        for time, rate in seen.items():
            if time not in known or abs(known[time][0] - rate) > SAME_RATE:
                merged[time] = (rate, now_ns)
        if merged != known:
            text = json.dumps({"rows": [[time, *merged[time]] for time in sorted(merged)]})
            path = self._path(symbol)
            with lake_errors("write", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda file: file.write(text.encode()))
        return [f"{symbol}: {text}" for text in warnings]

    def apply(self, bars: Bars, names: Sequence[Stretch] = ()) -> tuple[Bars, list[str]]:
        """Return the bars of a perpetual future with their ``funding``, and a line on each of its faults.

        Where a row is missing at the interval of its neighbours, or late, the rate before it is charged at its
        time, for a day at most.

        Args:
            bars: of one contract.
            names: those that it had, if it had others: its rows under each, in its time.
        """
        if not len(bars):
            return bars, []
        first, last = int(bars.open_time[0]), int(bars.open_time[-1])
        times, rates = self.rates_of(names or [Stretch(bars.symbol, 0, last + 1, 1.0)])
        inside = (times > first - LONGEST_INTERVAL_NS) & (times <= last)
        # Of a contract that was settled rows go on without bars, perhaps until another one takes up its name.
        inside &= (times <= first) | _follows_a_bar(bars, times, DAY_NS)
        times, rates = times[inside], rates[inside]
        if not len(times):
            return bars, ["no funding is known: none is charged"]
        flags = []
        # No exchange charges twice within half an hour: the same payment under another stamp.
        is_repeat = np.diff(times, prepend=times[0] - HOUR_NS) < HOUR_NS // 2
        if is_repeat.any():
            again = f"{is_repeat.sum()} times, first at {_minute(int(times[is_repeat][0]))}"
            flags.append(f"funding twice within half an hour, {again}: charged once")
            times, rates = times[~is_repeat], rates[~is_repeat]
        gaps = [gap.where_traded(bars) for gap in _gaps(times, rates, last)]
        gaps = [gap for gap in gaps if gap.due]
        if times[0] > first + LONGEST_INTERVAL_NS:
            flags.append(f"no funding is known before {_minute(int(times[0]))}: none is charged until then")
        flags += [gap.text for gap in gaps if gap.due[0] <= last - LATE_NS]
        if len(flags) > MOST_FLAGS:
            flags[MOST_FLAGS:] = [f"and {len(flags) - MOST_FLAGS} more times without a row of funding"]
        for gap in gaps:
            replaced = np.array([time for time in gap.due if time - gap.due[0] < DAY_NS], np.int64)
            times, rates = np.append(times, replaced), np.append(rates, np.full(len(replaced), gap.rate))
        # At the first bar from its time on; of what was held into the first of all nothing is known.
        place = np.searchsorted(bars.open_time, times)
        charged = (place > 0) & (place < len(bars))
        column = np.bincount(place[charged], rates[charged], len(bars))
        return bars.with_funding(column.astype(np.float64)), flags

    def rates_of(self, names: Sequence[Stretch]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the times and rates of a contract under all its names, each in its time."""
        pieces = []
        for stretch in names:
            times, rates = self.rates(stretch.name)
            own = (times >= stretch.start_ns) & (times < stretch.end_ns)
            pieces.append((times[own], rates[own]))
        times, rates = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return times, rates

    def _path(self, symbol: str) -> Path:
        return self._folder / f"{escape(symbol, folds_case=True)}.json"

    def _read(self, symbol: str) -> dict[int, tuple[float, int]]:
        """Return time -> (rate, when it was fetched first)."""
        path = self._path(symbol)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise LakeError(f"cannot read {path}: {error}") from error
        try:
            rows = {
                int(time): (float(rate), int(fetched)) for time, rate, fetched in json.loads(content)["rows"]
            }
            times = (time for row_time, (_, fetched) in rows.items() for time in (row_time, fetched))
            if all(abs(rate) <= LARGEST_RATE for rate, _ in rows.values()) and all(
                0 <= t < 2**63 for t in times
            ):
                return rows
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            pass
        try:
            move_over(path, path.with_name(path.name + ".corrupt"))
        except OSError as error:
            raise LakeError(f"{path} is damaged and cannot be set aside: {error}") from error
        return {}


@dataclass(frozen=True)
class _Gap:
    """Times at which a row is missing, and the rate before them."""

    due: Sequence[int]
    rate: float

    def where_traded(self, bars: Bars) -> _Gap:
        """Return the times at which there was something to hold."""
        near = _follows_a_bar(bars, np.array(self.due, np.int64), HOUR_NS)
        return _Gap([time for time, traded in zip(self.due, near.tolist(), strict=True) if traded], self.rate)

    @property
    def text(self) -> str:
        last = f" to {_minute(self.due[-1])}, {len(self.due)} times" if len(self.due) > 1 else ""
        next_best = "the rate before it is charged, for a day at most"
        return f"no funding is known of {_minute(self.due[0])}{last}: {next_best}"


def _follows_a_bar(bars: Bars, times: NDArray[np.int64], span_ns: int) -> NDArray[np.bool_]:
    """Return at which times there was a bar in the span before."""
    place = np.searchsorted(bars.open_time, times)
    return (place > 0) & (times - bars.open_time[np.maximum(place, 1) - 1] <= span_ns)


def _gaps(times: NDArray[np.int64], rates: NDArray[np.float64], last_ns: int) -> Iterator[_Gap]:
    """Find where rows are missing, up to ``last_ns``.

    The time between two rows misses none if it is hardly longer than 8 hours and than one of its neighbours: so a
    change of the interval from 8 to 4 hours, or back, is no gap. A longer one has the interval that was known when
    it began, as has the time since the newest row. A row up to half an interval after its time is that row, late.
    """
    steps = np.diff(times)
    for number, time in enumerate(times.tolist()):
        before = min(int(steps[number - 1]) if number else LONGEST_INTERVAL_NS, LONGEST_INTERVAL_NS)
        end = last_ns + 1
        if number < len(steps):
            step, after = int(steps[number]), int(steps[min(number + 1, len(steps) - 1)])
            if step * 4 <= min(LONGEST_INTERVAL_NS, max(before, after)) * 5:
                continue
            end = time + step - before // 2
        due = range(time + before, end, before)
        if due:
            yield _Gap(due, float(rates[number]))


def _minute(time_ns: int) -> str:
    return f"{np.datetime64(time_ns, 'ns').astype('datetime64[m]')}".replace("T", " ")
