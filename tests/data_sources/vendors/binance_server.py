"""A loopback Binance of our own: REST klines and the archive with CHECKSUM files, with faults on demand.

Spot pairs and USD-M perpetuals, whose names have ".P" here: REST under /api and /fapi, two folders in one archive.
Files of futures have a header, and milliseconds for ever.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import polars as pl

from tests.data_sources.vendors.loopback import Answer, Fault, LoopbackServer

MINUTE_NS = 60_000_000_000
HOUR_NS = 60 * MINUTE_NS
MICROSECONDS_FROM_NS = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp()) * 10**9
ARCHIVE_NAME = re.compile(
    r"/data/(?P<market>spot|futures/um)/(?P<kind>monthly|daily)/klines/(?P<pair>\w+)/1m/"
    r"(?P=pair)-1m-(?P<unit>\d{4}-\d{2}(?:-\d{2})?)\.zip(?P<checksum>\.CHECKSUM)?"
)


FUNDING_NAME = re.compile(
    r"/data/futures/um/monthly/fundingRate/(?P<pair>\w+)/(?P=pair)-fundingRate-(?P<unit>\d{4}-\d{2})\.zip"
    r"(?P<checksum>\.CHECKSUM)?"
)
PERPETUAL = ".P"
FUNDING_HEADER = "calc_time,funding_interval_hours,last_funding_rate\n"
HEADER = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,"
    "ignore\n"
)


def bars_of(pair: str, minutes: np.ndarray) -> np.ndarray:
    """Bars as a pure function of pair and minute: columns open high low close volume, exact in 4 decimals."""
    phase = sum(map(ord, pair)) % 97
    level = 1000.0 + phase + np.round(50 * np.sin((minutes + phase) / 700.0), 2)
    move = ((minutes * 7919 + phase) % 41 - 20) / 20.0
    close = level + move
    high = np.maximum(level, close) + 0.25
    low = np.minimum(level, close) - 0.5
    return np.column_stack([level, high, low, close, (minutes * 31 + phase) % 1000 / 8.0]).round(4)


def flow_of(volume: np.ndarray, minutes: np.ndarray) -> np.ndarray:
    """Order flow of bars, also a pure function: columns trades taker_buy_volume; none where nothing was traded."""
    trades = np.where(volume > 0, 1 + minutes * 17 % 300, 0)
    return np.column_stack([trades, (volume * (minutes * 13 % 101) / 100).round(4)])


class BinanceServer(LoopbackServer):
    """Serves pairs minute by minute up to ``now_ns``, the running bar included and half made."""

    def __init__(self, now_ns: int, pairs: tuple[str, ...] = ("BTCUSDT", "ETHUSDT")) -> None:
        super().__init__()
        self.now_ns = now_ns
        self.pairs = pairs
        self.listed_ns: dict[str, int] = {}
        self.delisted_ns: dict[str, int] = {}
        self.outages: list[tuple[int, int]] = []  # no bars anywhere in [start, end)
        self.codes: dict[str, int] = {}  # by symbol: the error with which REST answers for it
        self.intervals: dict[str, list[tuple[int, int]]] = {}  # of funding: from when on, hours; else 8
        self.lingering: set[str] = set()  # settled, with flat bars ever since
        self.weight = 2
        # Monotonic; asking earlier than a Retry-After allows ends in a ban.
        self.banned_from = self.banned_until = 0.0

    # ---------------------------------------------------------------- truth

    def truth(self, pair: str, start_ns: int, end_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Return open_time (ns) and the five columns of all bars that open in the span."""
        start_ns = max(start_ns, self.listed_ns.get(pair, 0))
        end_ns = min(end_ns, self.delisted_ns.get(pair, end_ns))
        minutes = np.arange(-(-start_ns // MINUTE_NS), -(-end_ns // MINUTE_NS))
        for outage_start, outage_end in self.outages:
            minutes = minutes[(minutes * MINUTE_NS < outage_start) | (minutes * MINUTE_NS >= outage_end)]
        return minutes * MINUTE_NS, bars_of(pair, minutes)

    def _rows(self, pair: str, start_ns: int, end_ns: int, unit_ns: Callable[[int], int]) -> list[list[Any]]:
        times, values = self.truth(pair, start_ns, end_ns)
        settled_ns = self.delisted_ns.get(pair, end_ns)
        if pair in self.lingering and end_ns > settled_ns:
            after = np.arange(max(start_ns, settled_ns), end_ns, MINUTE_NS)
            _, last = self.truth(pair, settled_ns - MINUTE_NS, settled_ns)
            flat = np.append(np.repeat(last[0, 3], 4), 0.0)
            times, values = np.append(times, after), np.append(values, np.tile(flat, (len(after), 1)), axis=0)
        flow = flow_of(values[:, 4], times // MINUTE_NS)
        rows = []
        for open_ns, bar, (trades, taker) in zip(times.tolist(), values.tolist(), flow.tolist(), strict=True):
            unit = unit_ns(open_ns)
            stamps = [open_ns // unit, (open_ns + MINUTE_NS) // unit - 1]
            quote = [f"{bar[4] * bar[3]:.8f}", int(trades), f"{taker:.8f}", f"{taker * bar[3]:.8f}", "0"]
            rows.append([stamps[0], *(f"{value:.8f}" for value in bar), stamps[1], *quote])
        return rows

    def funding(self, pair: str, start_ns: int, end_ns: int) -> list[tuple[int, float, int]]:
        """Return time (ns), rate and interval (hours) of all funding in [start, end), also after a settlement."""
        rows = []
        for time_ns in range(
            -(-max(start_ns, self.listed_ns.get(pair, 0)) // HOUR_NS) * HOUR_NS, end_ns, HOUR_NS
        ):
            begun = [hours for since_ns, hours in self.intervals.get(pair, []) if since_ns < time_ns]
            hours = begun[-1] if begun else 8
            if time_ns % (hours * HOUR_NS) == 0:
                rows.append((time_ns, (time_ns // HOUR_NS * 7919 + len(pair)) % 41 * 1e-5 - 15e-5, hours))
        return [(time_ns, round(rate, 8), hours) for time_ns, rate, hours in rows]

    # --------------------------------------------------------------- answers

    def answered_with(self, fault: Fault) -> None:
        with self._lock:
            if "Retry-After" in fault.headers:
                seconds = float(fault.headers["Retry-After"])
                # What was under way by then is no offence.
                self.banned_from = time.monotonic() + seconds / 2
                self.banned_until = self.banned_from + seconds / 2

    def plain(self, handler: BaseHTTPRequestHandler, faults: list[Fault]) -> Answer:
        parts = urlsplit(handler.path)
        if parts.path in ("/api/v3/klines", "/fapi/v1/klines"):
            query = {name: value[0] for name, value in parse_qs(parts.query).items()}
            return self._klines(query, PERPETUAL if "fapi" in parts.path else "", faults)
        if parts.path == "/fapi/v1/fundingRate":
            return self._funding({name: value[0] for name, value in parse_qs(parts.query).items()}, faults)
        match, body = ARCHIVE_NAME.fullmatch(parts.path), None
        if match:
            suffix = PERPETUAL if match["market"] == "futures/um" else ""
            body = self._archive(match["pair"] + suffix, match["unit"], faults)
        elif match := FUNDING_NAME.fullmatch(parts.path):
            body = self._funding_file(match["pair"], match["unit"], faults)
        if match is None or body is None:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {"Content-Type": "application/xml"}
        if match["checksum"]:
            name = parts.path.rsplit("/", 1)[1].removesuffix(".CHECKSUM")
            return 200, f"{hashlib.sha256(body).hexdigest()}  {name}\n".encode(), {}
        return 200, body, {"Content-Type": "application/zip"}

    def _head(self, pair: str) -> tuple[dict[str, str], Answer | None]:
        """Return the headers of an answer of REST about a symbol, and the answer, where it is a refusal."""
        headers = {"Content-Type": "application/json", "X-MBX-USED-WEIGHT-1M": str(self.weight)}
        if self.banned_from < time.monotonic() < self.banned_until:
            self.banned_until += 3600
        if self.banned_until > time.monotonic() + 1800:
            banned = b'{"code":-1003,"msg":"IP banned"}'
            return headers, (418, banned, headers | {"Retry-After": "3600"})
        code = self.codes.get(pair, 0 if pair in self.pairs else -1121)
        if code:
            return headers, (400, json.dumps({"code": code, "msg": "Invalid symbol."}).encode(), headers)
        return headers, None

    def _funding(self, query: dict[str, str], faults: list[Fault]) -> Answer:
        name = query["symbol"]
        headers, refusal = self._head(name + PERPETUAL)
        if refusal:
            return refusal
        start_ns, end_ns = (int(query[key]) * 1_000_000 for key in ("startTime", "endTime"))
        found = self.funding(name + PERPETUAL, start_ns, min(end_ns + 1_000_000, self.now_ns))
        rows = [
            # Some milliseconds late, as Binance's are.
            {
                "symbol": name,
                "fundingTime": time_ns // 10**6 + time_ns // HOUR_NS % 3,
                "fundingRate": f"{rate:.8f}",
            }
            for time_ns, rate, _ in found[: int(query.get("limit", "100"))]
        ]
        for fault in faults:
            rows = fault.rows(rows)
        return 200, json.dumps(rows).encode(), headers

    def _funding_file(self, name: str, unit: str, faults: list[Fault]) -> bytes | None:
        start = datetime.fromisoformat(f"{unit}-01").replace(tzinfo=UTC)
        end = (start + timedelta(days=32)).replace(day=1)
        start_ns, end_ns = (int(moment.timestamp()) * 10**9 for moment in (start, end))
        if name + PERPETUAL not in self.pairs or self.now_ns < end_ns:
            return None
        rows: list[list[Any]] = [
            [time_ns // 10**6 + time_ns // HOUR_NS % 3, hours, f"{rate:.8f}"]
            for time_ns, rate, hours in self.funding(name + PERPETUAL, start_ns, end_ns)
        ]
        for fault in faults:
            rows = fault.rows(rows)
        text = FUNDING_HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows)
        return zipped(f"{name}-fundingRate-{unit}.csv", text) if rows else None

    def _klines(self, query: dict[str, str], suffix: str, faults: list[Fault]) -> Answer:
        headers, refusal = self._head(query["symbol"] + suffix)
        if refusal:
            return refusal
        pair = query["symbol"] + suffix
        start_ns = int(query["startTime"]) * 1_000_000
        end_ns = min(int(query["endTime"]) * 1_000_000 + 1, self.now_ns)
        limit = int(query.get("limit", "500"))
        # Outages and listing dates leave room on a page, so look beyond one page's span where needed.
        first = max(start_ns, self.listed_ns.get(pair, 0))
        stop = min(end_ns, first + (limit + 20_000 * bool(self.outages)) * MINUTE_NS)
        rows = self._rows(pair, first, stop, lambda open_ns: 1_000_000)[:limit]
        for row in rows:
            if row[6] * 1_000_000 >= self.now_ns:
                row[5] = "0.00000001"  # still forming
        for fault in faults:
            rows = fault.rows(rows)
        return 200, json.dumps(rows).encode(), headers

    def _archive(self, pair: str, unit: str, faults: list[Fault]) -> bytes | None:
        start = datetime.fromisoformat(unit if unit.count("-") == 2 else f"{unit}-01").replace(tzinfo=UTC)
        end = (
            start + timedelta(days=1) if unit.count("-") == 2 else (start + timedelta(days=32)).replace(day=1)
        )
        out = end if unit.count("-") == 2 else end + timedelta(days=-end.weekday() % 7)
        start_ns, end_ns, out_ns = (int(moment.timestamp()) * 10**9 for moment in (start, end, out))
        ends_ns = end_ns if pair in self.lingering else self.delisted_ns.get(pair, end_ns)
        unlisted = end_ns <= self.listed_ns.get(pair, 0) or start_ns >= ends_ns
        if pair not in self.pairs or unlisted or self.now_ns < out_ns + 2 * HOUR_NS:
            return None
        name = f"{pair.removesuffix(PERPETUAL)}-1m-{unit}.csv"
        is_perpetual = pair.endswith(PERPETUAL)
        header = HEADER if is_perpetual else ""
        if faults or pair in self.lingering:
            rows = self._rows(
                pair, start_ns, end_ns, lambda open_ns: 10**6 if is_perpetual else _archive_unit_ns(open_ns)
            )
            for fault in faults:
                rows = fault.rows(rows)
            return zipped(name, header + "".join(",".join(map(str, row)) + "\n" for row in rows))
        times, values = self.truth(pair, start_ns, end_ns)
        known = _ZIPS.get(pair + unit)
        if known is None or known[0] != len(times):
            unit_ns = 10**6 if is_perpetual else _archive_unit_ns(start_ns)
            flow = flow_of(values[:, 4], times // MINUTE_NS)
            columns = {"open_time": times // unit_ns} | {str(i): values[:, i] for i in range(5)}
            columns |= {
                "close_time": (times + MINUTE_NS) // unit_ns - 1,
                "quote": values[:, 3] * values[:, 4],
            }
            columns |= {"trades": flow[:, 0].astype(np.int64), "taker": flow[:, 1]}
            columns |= {"taker_quote": flow[:, 1] * values[:, 3], "ignore": np.zeros(len(times), np.int64)}
            frame = pl.DataFrame(columns)
            known = _ZIPS[pair + unit] = (
                len(times),
                zipped(name, header + frame.write_csv(include_header=False)),
            )
        return known[1]


_ZIPS: dict[str, tuple[int, bytes]] = {}  # by pair and unit: number of rows, zip; shared by all servers


def _archive_unit_ns(open_ns: int) -> int:
    return 1_000 if open_ns >= MICROSECONDS_FROM_NS else 1_000_000


def zipped(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bundle:
        bundle.writestr(
            zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), text, compress_type=zipfile.ZIP_DEFLATED
        )
    return buffer.getvalue()
