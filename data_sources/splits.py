"""Stock splits: a ledger of them, applied when bars are loaded, so that raw prices stay raw.

A split of ratio r (new shares per old, 10.0 for 10:1) executed on a date means that prices before that date
are divided by r and volumes multiplied by it; the first session of the date is already at the new price.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS, Bars
from data_sources.calendar import in_regular_session, new_york_midnight_ns, new_york_time
from data_sources.errors import LakeError, lake_errors
from data_sources.renames import Stretch
from runtime.files import move_over, write_atomically

FILE_NAME = "splits.json"
# New to old shares, the likelier first: what is near to two of them is the first.
SPLIT_RATIOS = (
    *((n, 1) for n in (*range(2, 21), *range(25, 101, 5), *range(125, 1001, 25), *range(21, 100))),
    *(
        (3, 2),
        (5, 2),
        (7, 2),
        (9, 2),
        (4, 3),
        (5, 3),
        (7, 3),
        (8, 3),
        (5, 4),
        (7, 4),
        (9, 4),
        (6, 5),
        (7, 5),
        (8, 5),
    ),
)
RATIO_TOLERANCE = 0.02  # of n:1 and n:2; less where ratios lie closer
# A split and the night's own move come together: as far from its ratio as so many usual nights, at most.
USUAL_NIGHTS, LARGEST_NIGHT = 4.0, 0.05
SMALLEST_RATIO = 1.19  # a little less than 6:5
# News moves prices by less than this, and then brings several times the money, and the range, of other sessions.
SURE_RATIO = 3.3
ORDINARY_FACTOR = 3.0
LEAST_RANGE = 0.005  # of a session, as a log; below it a range is no measure
AGAINST = -0.25  # log change of the volume over that of a split: the volume contradicts it
LONGEST_CLOSURE_DAYS = 14  # sessions further apart are no neighbours
NEIGHBOURS = 5  # sessions on each side
SAME_SPLIT = datetime.timedelta(days=5)
_CLEAN_DENOMINATOR = 20
_CLEAN_TOLERANCE = 1e-4  # vendors round 1/30 to 0.033333


@dataclass(frozen=True, order=True)
class Split:
    """New shares per old share from the start of a date in New York."""

    execution_date: datetime.date
    ratio: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ValueError(f"a split's ratio must be finite and above zero, was {self.ratio}")

    @property
    def executed_ns(self) -> int:
        """The time of the first bars at the new price, int64 ns UTC."""
        return new_york_midnight_ns(self.execution_date)

    def is_among(self, others: Iterable[Split]) -> bool:
        """Return whether one of ``others`` is the same split, perhaps with the date of another vendor."""
        return any(
            abs(self.execution_date - other.execution_date) <= SAME_SPLIT
            and abs(self.ratio / other.ratio - 1) < RATIO_TOLERANCE
            for other in others
        )

    @property
    def is_clean(self) -> bool:
        """Whether the ratio is p:q with small p or q; spin-offs are listed with factors such as 1.973."""
        larger = max(self.ratio, 1 / self.ratio)
        nearest = Fraction(larger).limit_denominator(_CLEAN_DENOMINATOR)
        return abs(larger / float(nearest) - 1) < _CLEAN_TOLERANCE


@dataclass(frozen=True)
class SuspectedSplit:
    """A jump between two sessions that looks like an unreported split."""

    symbol: str
    open_time: int  # of the first bar at the new price, ns UTC
    ratio: float  # the ratio of small whole numbers that it is near: 4.0 for 4:1, 0.25 for 1:4


class SplitLedger:
    """The splits of every stock, kept in ``root/splits.json``.

    Raises:
        LakeError: the file cannot be read or written. One that is not a ledger is set aside as
            splits.json.corrupt, and the ledger starts empty; the next refresh fills it again.
    """

    def __init__(self, root: Path) -> None:
        self._path = Path(root) / FILE_NAME
        self._splits = self._load()

    def splits(self, symbol: str) -> list[Split]:
        """Return the known splits of ``symbol``, oldest first."""
        return sorted(
            Split(datetime.date.fromisoformat(day), ratio)
            for day, ratio in self._splits.get(symbol, {}).items()
        )

    def news(self, symbol: str, found: Iterable[Split]) -> list[Split]:
        """Return those of ``found`` that are not in the ledger.

        Two vendors may date one split a few days apart; that is not a second split.
        """
        known = self.splits(symbol)
        return [split for split in found if not split.is_among(known)]

    def _splits_of(self, symbol: str, names: Sequence[Stretch]) -> list[Split]:
        """Return a stock's splits, those under its former names included: a vendor may list them under either."""
        found = self.splits(symbol)
        for stretch in names:
            for split in self.splits(stretch.name) if stretch.name != symbol else ():
                if stretch.start_ns <= split.executed_ns < stretch.end_ns and not split.is_among(found):
                    found.append(split)
        return sorted(found)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return symbol -> execution date -> ratio, as in the file."""
        return {symbol: dict(days) for symbol, days in self._splits.items()}

    def update(self, symbol: str, splits: Iterable[Split]) -> None:
        """Add a vendor's splits; for a date in the ledger the new ratio counts. Writes at once.

        An empty list removes nothing: vendors also answer "none" when they fail.
        """
        known = self._splits.get(symbol, {})
        merged = known | {split.execution_date.isoformat(): float(split.ratio) for split in splits}
        if merged == known:
            return
        updated = self._splits | {symbol: dict(sorted(merged.items()))}
        text = json.dumps({"splits": dict(sorted(updated.items()))}, indent=1)
        with lake_errors("write", self._path):
            write_atomically(self._path, lambda file: file.write(text.encode()))
        self._splits = updated

    def adjust(
        self,
        bars: Bars,
        *,
        fetched_ns: NDArray[np.int64] | None = None,
        until_ns: int | None = None,
        names: Sequence[Stretch] = (),
    ) -> Bars:
        """Return the bars as if every split had been executed before the first one.

        A ratio that is not clean (a spin-off) is applied only if the prices jumped by about that much.

        Args:
            bars: of one stock, at raw prices or at prices adjusted by the vendor.
            fetched_ns: per bar, when it was fetched from a vendor that adjusts prices itself (Yahoo): only
                splits executed later are applied to it. None: the prices are raw.
            until_ns: splits executed after this are not applied; None: all are.
            names: those that the stock had, if it had others.
        """
        factor = np.ones(len(bars))
        for split in self._splits_of(bars.symbol, names):
            executed_ns = split.executed_ns
            if until_ns is not None and executed_ns > until_ns:
                continue
            before = bars.open_time < executed_ns
            if fetched_ns is not None:
                before &= fetched_ns < executed_ns
            if before.any() and (split.is_clean or _is_jump(bars, executed_ns, split.ratio)):
                factor[before] *= split.ratio
        if (factor == 1).all():
            return bars
        adjusted = {name: getattr(bars, name) / factor for name in ("open", "high", "low", "close")}
        adjusted["volume"] = bars.volume * factor  # a split changes no number of trades
        if bars.taker_buy_volume is not None:
            adjusted["taker_buy_volume"] = bars.taker_buy_volume * factor
        return dataclasses.replace(bars, **adjusted)

    def _load(self) -> dict[str, dict[str, float]]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError:
            text = ""  # set aside below
        except OSError as error:
            raise LakeError(f"cannot read {self._path}: {error}") from error
        try:
            ledger = {
                str(symbol): {
                    split.execution_date.isoformat(): split.ratio
                    for split in (Split(datetime.date.fromisoformat(d), float(r)) for d, r in days.items())
                }
                for symbol, days in json.loads(text)["splits"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            try:
                move_over(self._path, self._path.with_name(FILE_NAME + ".corrupt"))
            except OSError as error:
                raise LakeError(f"{self._path} is damaged and cannot be set aside: {error}") from error
            return {}
        return ledger


def suspect_splits(bars: Bars) -> list[SuspectedSplit]:
    """Find jumps from one regular session's close to the next one's open that look like a missing split.

    The ratio is near p:q or q:p for small whole numbers, and the neighbouring sessions confirm it: the number of
    shares traded does not move the other way. Where news may cause such a jump, the money traded and the first
    session's range are as usual, too. Only a flag: nothing is changed.
    """
    regular = in_regular_session(bars.open_time)
    day = new_york_time(bars.open_time[regular]) // DAY_NS
    if not len(day):
        return []
    starts = np.append(0, np.flatnonzero(np.diff(day)) + 1)
    ends = np.append(starts[1:], len(day))
    opens, closes = bars.open[regular][starts], bars.close[regular][ends - 1]
    volumes = np.add.reduceat(bars.volume[regular], starts)
    highs = np.maximum.reduceat(bars.high[regular], starts)
    ranges = np.log(highs / np.minimum.reduceat(bars.low[regular], starts))
    times = bars.open_time[regular][starts]
    ratios = closes[:-1] / opens[1:]
    moves = np.abs(np.log(ratios))
    night = min(LARGEST_NIGHT, USUAL_NIGHTS * float(np.median(moves))) if len(moves) >= NEIGHBOURS else 0.0
    jumps = (moves > math.log(SMALLEST_RATIO)) & (np.diff(day[starts]) <= LONGEST_CLOSURE_DAYS)
    found = []
    for i in (np.flatnonzero(jumps) + 1).tolist():
        ratio = near_split_ratio(ratios[i - 1]) or _nearest_ratio(ratios[i - 1], night)
        if ratio is None:
            continue
        before, after = slice(max(0, i - NEIGHBOURS), i), slice(i, i + NEIGHBOURS)
        usual_volume, volume = (float(np.median(volumes[sessions])) for sessions in (before, after))
        usual_range = max(LEAST_RANGE, float(np.median(ranges[before])))
        shares = math.log(volume / usual_volume) if volume > 0 and usual_volume > 0 else 0.0
        as_usual = abs(shares - math.log(ratio)) < math.log(ORDINARY_FACTOR)
        as_usual &= float(ranges[i]) < ORDINARY_FACTOR * usual_range
        is_sure = max(ratio, 1 / ratio) > SURE_RATIO
        if shares / math.log(ratio) > AGAINST and (is_sure or as_usual):
            found.append(SuspectedSplit(bars.symbol, int(times[i]), ratio))
    return found


def near_split_ratio(ratio: float) -> float | None:
    """Return the ratio of a split of small whole numbers near ``ratio``, None if there is none."""
    larger = max(ratio, 1 / ratio)
    for new, old in SPLIT_RATIOS:
        if abs(larger / (new / old) - 1) < RATIO_TOLERANCE / max(1, old - 1):
            return new / old if ratio > 1 else old / new
    return None


def _nearest_ratio(ratio: float, most: float) -> float | None:
    """Return the nearest ratio of a split, None where the log of ``ratio`` is further than ``most`` from it."""
    larger = max(ratio, 1 / ratio)
    nearest = min((new / old for new, old in SPLIT_RATIOS), key=lambda exact: abs(math.log(larger / exact)))
    if abs(math.log(larger / nearest)) > most:
        return None
    return nearest if ratio > 1 else 1 / nearest


def _is_jump(bars: Bars, executed_ns: int, ratio: float) -> bool:
    """Return whether the jump at ``executed_ns`` is nearer to the ratio than to no change."""
    place = int(np.searchsorted(bars.open_time, executed_ns))
    if place == 0 or place == len(bars):
        return False
    moved = math.log(bars.close[place - 1] / bars.open[place])
    return abs(moved - math.log(ratio)) < abs(moved)
