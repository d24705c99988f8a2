"""A loopback Yahoo of our own: chart v8 with cookie, crumb, events, limits and live row, and faults on demand."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

import numpy as np

from tests.data_sources.vendors.loopback import Answer, Fault, LoopbackServer

MINUTE_NS = 60_000_000_000
DAY_SECONDS = 86_400
NEW_YORK = ZoneInfo("America/New_York")
COOKIE, CRUMB = "d=AQABBLoopback", "cr.Umb"
FIELDS = ("open", "high", "low", "close", "volume")
Rows = dict[str, list[Any]]  # "timestamp" in seconds and FIELDS, each with one value per row


def bars_of(symbol: str, open_time: np.ndarray) -> np.ndarray:
    """Raw bars as a pure function of symbol and minute: columns of FIELDS, exact in single precision."""
    minutes = open_time // MINUTE_NS
    phase = sum(map(ord, symbol)) % 97
    level = 1024.0 + phase + np.round(40 * np.sin((minutes + phase) / 700.0))
    close = level + ((minutes * 7919 + phase) % 41 - 20) / 8.0
    volume = (minutes * 31 + phase) % 1000 * 16.0 + 16.0
    return np.column_stack(
        [level, np.maximum(level, close) + 0.25, np.minimum(level, close) - 0.5, close, volume]
    )


class YahooServer(LoopbackServer):
    """Serves stocks at ``now_ns``, the running minute and the live row included."""

    def __init__(self, now_ns: int, stocks: tuple[str, ...] = ("AAPL", "MSFT", "NVDA")) -> None:
        super().__init__()
        self.now_ns = now_ns
        self.stocks = stocks
        self.holidays = {date(2026, 2, 16), date(2026, 4, 3)}
        self.splits: dict[str, list[tuple[date, float]]] = {}
        self.halts: list[tuple[int, int]] = []  # no trade anywhere in [start, end): rows of nulls
        self.wants_crumb = self.wants_browser = True

    # ---------------------------------------------------------------- truth

    def sessions(self, start_ns: int, end_ns: int) -> list[tuple[int, int]]:
        """Return (open, close) in ns of the sessions that touch the span."""
        day = datetime.fromtimestamp(start_ns // 10**9, NEW_YORK).date()
        found = []
        while True:
            opens, closes = (
                int(datetime(day.year, day.month, day.day, *clock, tzinfo=NEW_YORK).timestamp()) * 10**9
                for clock in ((9, 30), (16, 0))
            )
            if opens >= end_ns:
                return found
            if closes > start_ns and day.weekday() < 5 and day not in self.holidays:
                found.append((opens, closes))
            day += timedelta(days=1)

    def truth(self, symbol: str, start_ns: int, end_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Return open_time (ns) and FIELDS of all bars of the span, adjusted for the splits up to ``now_ns``."""
        minutes = [np.arange(a, b, MINUTE_NS) for a, b in self.sessions(start_ns, end_ns)]
        times = np.concatenate([np.empty(0, np.int64), *minutes])
        times = times[(times >= start_ns) & (times < end_ns)]
        for halt_start, halt_end in self.halts:
            times = times[(times < halt_start) | (times >= halt_end)]
        return times, self._known_at(symbol, times, self.now_ns)

    def raw(self, symbol: str, times: np.ndarray) -> np.ndarray:
        """Return FIELDS of the bars as they traded: a split is a jump."""
        return self._known_at(symbol, times, 0)

    def _known_at(self, symbol: str, times: np.ndarray, known_ns: int) -> np.ndarray:
        """Return FIELDS with the splits up to ``known_ns``; those of ``bars_of`` have all splits."""
        values = bars_of(symbol, times)
        for day, ratio in self.splits.get(symbol, []):
            executed = int(datetime(day.year, day.month, day.day, tzinfo=NEW_YORK).timestamp()) * 10**9
            if executed > known_ns:
                values[times < executed] *= [ratio] * 4 + [1 / ratio]
        return values

    # --------------------------------------------------------------- answers

    def plain(self, handler: BaseHTTPRequestHandler, faults: list[Fault]) -> Answer:
        parts = urlsplit(handler.path)
        query = {name: value[0] for name, value in parse_qs(parts.query).items()}
        if self.wants_browser and "Mozilla/" not in handler.headers.get("User-Agent", ""):
            return 429, b"Too Many Requests", {"Content-Type": "text/html"}
        has_cookie = not self.wants_crumb or COOKIE in handler.headers.get("Cookie", "")
        if parts.path == "/v1/test/getcrumb":
            if not has_cookie:
                return _error(401, "Unauthorized", "Invalid Cookie", "finance")
            return 200, CRUMB.encode(), {"Content-Type": "text/plain"}
        chart = re.fullmatch(r"/v8/finance/chart/([^/]+)", parts.path)
        if chart:
            if self.wants_crumb and not (has_cookie and query.get("crumb") == CRUMB):
                return _error(401, "Unauthorized", "Invalid Crumb", "finance")
            return self._chart(chart[1], query, faults)
        if parts.path == "/":  # fc.yahoo.com answers 404 and still sets its cookie
            return 404, b"", {"Set-Cookie": f"A3={COOKIE}; Max-Age=31536000; Path=/; HttpOnly"}
        return _error(404, "Not Found", "no such page", "finance")

    def _chart(self, symbol: str, query: dict[str, str], faults: list[Fault]) -> Answer:
        interval = query["interval"]
        if symbol not in self.stocks:
            return _error(404, "Not Found", "No data found, symbol may be delisted")
        now = self.now_ns // 10**9
        start, end = int(query.get("period1", now - DAY_SECONDS)), int(query.get("period2", now))
        if interval == "1m":
            head = f"1m data not available for startTime={start} and endTime={end}. "
            if end - start > 8 * DAY_SECONDS:
                text = "Only 8 days worth of 1m granularity data are allowed to be fetched per request."
                return _error(422, "Unprocessable Entity", head + text)
            if start < now - 30 * DAY_SECONDS:
                text = "The requested range must be within the last 30 days."
                return _error(422, "Unprocessable Entity", head + text)
        rows = self._minutes(symbol, start, end) if interval == "1m" else self._days(symbol, start, end)
        for fault in faults:
            rows = fault.rows(rows)
        result: dict[str, Any] = {"meta": self._meta(symbol, interval, start, end)}
        quote = {name: rows[name] for name in FIELDS} if rows["timestamp"] else {}
        result["indicators"] = {"quote": [quote]}
        if rows["timestamp"]:
            result["timestamp"] = rows["timestamp"]
            if interval != "1m":
                result["indicators"]["adjclose"] = [{"adjclose": rows["close"]}]
            events = {}
            for day, ratio in self.splits.get(symbol, []):
                at = int(datetime(day.year, day.month, day.day, 9, 30, tzinfo=NEW_YORK).timestamp())
                if start <= at < min(end, now + DAY_SECONDS):
                    events[str(at)] = {"date": at, "numerator": ratio, "denominator": 1.0}
            if events:
                result["events"] = {"splits": events}
        body = {"chart": {"result": [result], "error": None}}
        return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}

    def _minutes(self, symbol: str, start: int, end: int) -> Rows:
        """Every regular minute up to the running one, nulls where there was no trade, then the live row."""
        end_ns = min(end * 10**9, self.now_ns)
        times, values = self.truth(symbol, start * 10**9, end_ns)
        every = [np.arange(a, b, MINUTE_NS) for a, b in self.sessions(start * 10**9, end_ns)]
        grid = np.concatenate([np.empty(0, np.int64), *every])
        grid = grid[(grid >= start * 10**9) & (grid < end_ns)]
        known = dict(zip(times.tolist(), values.tolist(), strict=True))
        rows: Rows = {"timestamp": (grid // 10**9).tolist()}
        for place, name in enumerate(FIELDS):
            column = [known[t][place] if t in known else None for t in grid.tolist()]
            rows[name] = [int(x) if name == "volume" and x is not None else x for x in column]
        if len(grid) and grid[-1] + MINUTE_NS > self.now_ns and grid[-1] in known:
            rows["volume"][-1] = 1  # still forming
            rows["timestamp"].append(self.now_ns // 10**9)
            for name in FIELDS:
                rows[name].append(0 if name == "volume" else rows["close"][len(grid) - 1])
        return rows

    def _days(self, symbol: str, start: int, end: int) -> Rows:
        rows: Rows = {name: [] for name in ("timestamp", *FIELDS)}
        for opens, closes in self.sessions(start * 10**9, min(end * 10**9, self.now_ns)):
            _, values = self.truth(symbol, opens, closes)
            rows["timestamp"].append(opens // 10**9)
            day = (
                values[0, 0],
                values[:, 1].max(),
                values[:, 2].min(),
                values[-1, 3],
                int(values[:, 4].sum()),
            )
            for name, value in zip(FIELDS, day, strict=True):
                rows[name].append(value)
        return rows

    def _meta(self, symbol: str, interval: str, start: int, end: int) -> dict[str, Any]:
        periods = [
            [{"timezone": "EST", "start": a // 10**9, "end": b // 10**9, "gmtoffset": -18000}]
            for a, b in self.sessions(start * 10**9, min(end * 10**9, self.now_ns))
        ]
        last = self.sessions(self.now_ns - 7 * DAY_SECONDS * 10**9, self.now_ns)[-1]
        period = {"timezone": "EST", "start": last[0] // 10**9, "end": last[1] // 10**9, "gmtoffset": -18000}
        return {
            "currency": "USD",
            "symbol": symbol,
            "instrumentType": "EQUITY",
            "firstTradeDate": 345479400,
            "regularMarketTime": self.now_ns // 10**9,
            "gmtoffset": -18000,
            "timezone": "EST",
            "exchangeTimezoneName": "America/New_York",
            "priceHint": 2,
            "currentTradingPeriod": {name: dict(period) for name in ("pre", "regular", "post")},
            "tradingPeriods": periods,
            "dataGranularity": interval,
            "range": "",
            "validRanges": ["1d", "5d", "1mo", "max"],
        }


def _error(status: int, code: str, description: str, root: str = "chart") -> Answer:
    body = {root: {"result": None, "error": {"code": code, "description": description}}}
    return status, json.dumps(body).encode(), {"Content-Type": "application/json"}
