"""Polygon (now Massive): flat files of US stocks and global crypto, and its list of stock splits."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from zoneinfo import ZoneInfo

from data_sources import renames
from data_sources.calendar import to_ns, utc
from data_sources.errors import DataError, LakeError
from data_sources.sources import Answer, DataRequest, Keys, RefreshJob, Source, SymbolGroup, ask
from data_sources.universe import top_of
from data_sources.vendors.spelling import advise_polygon_crypto, advise_stock


@dataclass(frozen=True)
class DataType:
    """One of the vendor's data types: where its day files are, and the hours of its days."""

    dataset: str
    zone: dt.tzinfo
    ending: str = ""  # of the tickers that a rule may choose

    @property
    def prefix(self) -> str:
        """The prefix of the keys of its minute files."""
        return f"{self.dataset}/minute_aggs_v1/"

    def interval(self, day: dt.date) -> tuple[int, int]:
        """Return the half-open interval of ``day``, ns UTC: from midnight to midnight in its own zone."""
        midnights = (
            dt.datetime.combine(day + dt.timedelta(days=more), dt.time(), self.zone) for more in (0, 1)
        )
        start_ns, end_ns = map(to_ns, midnights)
        return start_ns, end_ns

    def day_of(self, time_ns: int) -> dt.date:
        """Return the day that holds ``time_ns``."""
        return utc(time_ns).astimezone(self.zone).date()


US_STOCKS = DataType("us_stocks_sip", ZoneInfo("America/New_York"))  # 04:00-20:00 New York
GLOBAL_CRYPTO = DataType("global_crypto", dt.UTC, "-USD")  # every calendar day

# A day's file is out at 11:00 New York on the next day, over a weekend later.
STOCKS = SymbolGroup("stock", "stocks", US_STOCKS.dataset, 900, advise_stock)
CRYPTO = SymbolGroup("crypto", "polygon_crypto", GLOBAL_CRYPTO.dataset, 2_880, advise_polygon_crypto)


class _Polygon(Source):
    name, label, groups = "polygon", "Polygon", (STOCKS, CRYPTO)

    def keys(self, request: DataRequest) -> Keys:
        keys = dict.fromkeys(("POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY"), "Polygon is skipped")
        if STOCKS.symbols(request):
            keys["POLYGON_API_KEY"] = "splits come from Yahoo alone"
        return keys

    # Imported on use: boto3 takes a second, and its absence must cost this source alone.

    def refresh(self, job: RefreshJob) -> None:
        from data_sources.vendors.polygon_refresh import Polygon

        stocks = STOCKS.symbols(job.request)
        if stocks:
            self._refresh_splits(job, stocks)
        Polygon.from_environment().refresh(job)

    def _refresh_splits(self, job: RefreshJob, stocks: tuple[str, ...]) -> None:
        """Fetch splits if there is a key; without, Yahoo's and those of earlier refreshes must do."""
        from data_sources.vendors.polygon_splits import PolygonSplits

        has_rule = top_of(stocks) > 0
        former = renames.former(renames.read(job.lake.root), STOCKS.setting, stocks, job.start_ns, job.end_ns)
        stocks = (*stocks, *(stretch.name for stretch in former))
        try:
            source = PolygonSplits.from_environment()
            if source is not None:
                _, num_bad = source.update(job.splits, None if has_rule else stocks, job.start_ns, job.now_ns)
                if num_bad:
                    job.progress.warn(self.name, f"splits: {num_bad} unreadable entries")
            elif has_rule:
                message = "splits of stocks that are not named need POLYGON_API_KEY, see .env.example"
                job.progress.warn(self.name, message)
        except LakeError:
            raise
        except DataError as error:
            job.progress.warn(self.name, f"splits: {error}")

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors import http
        from data_sources.vendors.polygon_refresh import Polygon
        from data_sources.vendors.polygon_splits import PolygonSplits

        today = utc(now_ns).date()
        try:
            polygon = Polygon.from_environment(http.PROBE_POLICY)
        except DataError as error:
            yield Answer("Polygon", error, address="POLYGON_S3_ENDPOINT")
        else:
            for group, data_type in ((STOCKS, US_STOCKS), (CRYPTO, GLOBAL_CRYPTO)):
                if group.symbols(request):
                    may_read = partial(polygon.probe, data_type, today)
                    yield ask(f"Polygon {group.dataset}", may_read, "POLYGON_S3_ENDPOINT")
        if not STOCKS.symbols(request):
            return
        try:
            splits = PolygonSplits.from_environment()
        except DataError as error:
            yield Answer("Polygon splits", error, address="POLYGON_API_URL", gives_bars=False)
        else:
            if splits is not None:
                splits = replace(splits, policy=http.PROBE_POLICY)
                yield ask("Polygon splits", splits.probe, "POLYGON_API_URL", gives_bars=False)


SOURCE = _Polygon()
