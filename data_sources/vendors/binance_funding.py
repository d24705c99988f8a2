"""One perpetual's funding: which rows to ask of REST and of the archive, for the ledger.

Facts that shape this file (Binance's REST documentation, and issues 495 and 500 of binance-public-data, 2026-09):

* a row is there some seconds after its time, with a stamp some milliseconds late;
* the interval is 8 hours, for many contracts 4, 2 or 1, and Binance changes it from one day to the next;
* REST has nothing of a contract that was settled and whose name was taken up again; the archive, of months, has;
* the archive has rows after a settlement, too: those after the last bar are nobody's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_sources.bars import DAY_NS, HOUR_NS
from data_sources.errors import DataError, LakeError
from data_sources.funding import LONGEST_INTERVAL_NS, FundingLedger
from data_sources.vendors.binance_archive import SETTLED_NS, Archive, months
from data_sources.vendors.binance_rest import PAGE_FUNDING, Rest, UnknownPair

SHORTEST_INTERVAL_NS = HOUR_NS
OVERLAP_NS = DAY_NS  # asked for again, so that a row that came late or was corrected is found
LATE = 1.5  # of an interval: a row that comes as late is not missing


class FundingRefresh:
    """Brings one perpetual's rows in the ledger up to date."""

    def __init__(self, rest: Rest, archive: Archive, ledger: FundingLedger, symbol: str, now_ns: int) -> None:
        self._rest, self._archive, self._ledger = rest, archive, ledger
        self._symbol, self._now_ns = symbol, now_ns
        self.warnings: list[str] = []

    def run(self, first_ns: int, end_ns: int, has_news: bool) -> DataError | None:
        """Ask for the rows of [first_ns, end_ns), from the first bar on; return the error of the last host asked.

        A host's error is kept while the other one gets its turn; what arrived is in the ledger.

        Args:
            first_ns: the first bar.
            end_ns: the end of the bars.
            has_news: there are more bars than before; without them, funding is asked for only if there is none.

        Raises:
            LakeError: the ledger cannot be read or written.
        """
        known, _ = self._ledger.rates(self._symbol)
        known = known[(known >= first_ns) & (known < end_ns)]
        is_new = not len(known) or int(known[0]) > first_ns + LONGEST_INTERVAL_NS
        start_ns = first_ns if is_new else max(first_ns, int(known[-1]) - OVERLAP_NS)
        error = None
        try:
            if is_new or (has_news and end_ns > int(known[-1]) + SHORTEST_INTERVAL_NS):
                self._ask_rest(start_ns, end_ns)
        except LakeError:
            raise
        except UnknownPair:
            pass  # settled: the archive may have it
        except DataError as failure:
            error = failure
        try:
            if is_new or has_news:
                self._ask_archive(first_ns, end_ns, is_new)
        except LakeError:
            raise
        except DataError as failure:
            error = failure
        return error

    def _ask_rest(self, start_ns: int, end_ns: int) -> None:
        while start_ns < end_ns:
            rows = self._rest.funding(self._symbol, start_ns, end_ns)
            self._keep(rows)
            if len(rows) < PAGE_FUNDING:
                return
            start_ns = rows[-1][0] + 1_000_000

    def _ask_archive(self, first_ns: int, end_ns: int, is_new: bool) -> None:
        """Ask for the months, newest first, of which a row is missing: once, and while they are young."""
        for month in list(months(first_ns, end_ns))[::-1]:
            is_young = self._now_ns < month.end_ns + SETTLED_NS
            if self._now_ns < month.published_ns or not (is_new or is_young):
                continue
            times, _ = self._ledger.rates(self._symbol)
            if _has_gap(times, max(first_ns, month.start_ns), min(end_ns, month.end_ns)):
                self._keep(self._archive.fetch_funding(self._symbol, month) or [])

    def _keep(self, rows: list[tuple[int, float]]) -> None:
        self.warnings += self._ledger.update(self._symbol, rows, self._now_ns)


def _has_gap(times: NDArray[np.int64], start_ns: int, end_ns: int) -> bool:
    """Return whether a row is missing: a step is much longer than 8 hours, or than both of those beside it."""
    inside = times[(times >= start_ns) & (times < end_ns)]
    if (np.diff(inside, prepend=start_ns, append=end_ns) > LONGEST_INTERVAL_NS * LATE).any():
        return True
    steps = np.diff(inside)
    return bool((steps[1:-1] > np.maximum(steps[:-2], steps[2:]) * LATE).any())
