"""Columns of people's own files: which is which by its name, and numbers and times in all their spellings.

A batch comes with its raw columns, texts of a CSV or values of a Parquet file, and leaves as ROWS. What cannot be
read as a number becomes infinite, and a time null, so that the lake's checks set the row aside with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import polars as pl

from data_sources.bars import COLUMNS, FLOW_COLUMNS
from data_sources.errors import BadAnswer
from data_sources.vendors.files_times import Times

ROWS = {"symbol": pl.String, "open_time": pl.Int64} | dict.fromkeys((*COLUMNS[1:], *FLOW_COLUMNS), pl.Float64)
# By role, in lower case without signs; of several the first one counts.
NAMES = {
    "open_time": (
        "opentime windowstart barstart starttime start timestamp timestampms timestampus timestampns timestamputc "
        "datetime datetimeutc dateandtime dateutc timeutc utctime gmttime localtime tsevent ts unix unixtime "
        "unixtimestamp epoch time date t index indexlevel0 unnamed0"
    ).split(),
    "date": "date day yyyymmdd dtyyyymmdd".split(),
    "clock": "time hhmmss hhmm clock".split(),
    "symbol": "symbol ticker sym instrument instrumentid pair code secid".split(),
    "open": "open o openprice op".split(),
    "high": "high h highprice hi max".split(),
    "low": "low l lowprice lo min".split(),
    "close": "close c closeprice cl last".split(),
    "volume": "volume vol v basevolume volumebase qty".split(),
    "trades": "trades numberoftrades numtrades tradecount count transactions numtransactions n".split(),
    "taker_buy_volume": (
        "takerbuyvolume takerbuybasevolume takerbuybaseassetvolume takerbuybase takerbuyvol"
    ).split(),
}
REQUIRED = ("open", "high", "low", "close", "volume")
# Binance's archive of spot pairs has no header.
BINANCE = (
    "open_time open high low close volume close_time quote_volume count taker_buy_volume "
    "taker_buy_quote_volume ignore"
).split()
MISSING = ("", "na", "n/a", "nan", "null", "none", "-")
_KNOWN = {name for names in NAMES.values() for name in names}
_DECIMAL = r"^[+-]?(\d+|\d{1,3}([. ']\d{3})+),(\d{1,2}|\d{4,})$|^[+-]?(0\d*|\d{4,}),\d+$|\.\d{3},\d+$"
_THOUSANDS = r"^[+-]?\d{1,3}(,\d{3})+\.\d*$|^[+-]?\d{1,3}(,\d{3}){2,}$"
_EITHER = r"^[+-]?\d{1,3},\d{3}$"
_POINT = r"^[+-]?\d+\.\d+$"


def plain(name: str) -> str:
    """Return a column's name in lower case, without blanks and signs: "<OPEN>" and "Open" are "open"."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _plain(role: str) -> pl.Expr:
    return pl.col(role).str.to_lowercase().str.replace_all("[^a-z0-9]", "")


def find_roles(header: Sequence[str]) -> dict[str, int]:
    """Return the place of each role's column, of those in NAMES that the header has.

    Raises:
        BadAnswer: a column that is needed is missing or there twice.
    """
    names = [plain(name) for name in header]
    roles: dict[str, int] = {}
    for role, known in NAMES.items():
        for name in known:
            places = [place for place, own in enumerate(names) if own == name]
            if len(places) > 1:
                there = " and ".join(repr(header[place].strip()) for place in places)
                raise BadAnswer(f"the column {role} is there twice, as {there}: keep one of them")
            if places:
                roles[role] = places[0]
                break
    if "open_time" not in roles and names and not header[0].strip():
        roles["open_time"] = 0  # an index that was saved without a name
    missing = [name for name in ("open_time", *REQUIRED) if name not in roles]
    if missing:
        raise BadAnswer(
            f"no column is {', '.join(missing)}; it must have a time, open, high, low, close and volume, and has "
            f"{', '.join(name.strip() or '(no name)' for name in header[:12]) or 'none'}"
        )
    has_both = "date" in roles and "clock" in roles
    if has_both and roles["open_time"] in (roles["date"], roles["clock"]):
        roles["open_time"] = roles["date"]
    else:
        roles.pop("clock", None)
    roles.pop("date", None)
    return roles


class Columns:
    """Turns the raw batches of one file into ROWS; what the first batch shows counts for all.

    Attributes:
        num_headers: rows that only repeat the header, and were left out.
    """

    def __init__(self, header: dict[str, str], delimiter: str, timezone: str, symbol: str) -> None:
        """Take the header by role, and the symbol of rows without a column for it."""
        self._header, self._delimiter, self._symbol = header, delimiter, symbol
        self.times = Times(timezone)
        self.num_headers = 0
        self._commas: str | None = None  # "decimal", "thousands", "none"; None: not seen yet

    def rows(self, raw: pl.DataFrame) -> pl.DataFrame:
        """Return a batch, its columns named by role, as ROWS; ``open_time`` is exact, not yet a minute.

        Raises:
            BadAnswer: numbers or dates may mean two things, or a column has none.
        """
        raw = raw.with_columns(pl.col(pl.Categorical).cast(pl.String))
        if self._delimiter:
            raw = self._without_headers(raw)
        numbers = [name for name in (*REQUIRED, *FLOW_COLUMNS) if name in raw.columns]
        if self._commas is None and len(raw):
            self._commas = self._find_commas([raw[name] for name in numbers if raw.schema[name] == pl.String])
        columns = {name: self._numbers(raw[name]) for name in numbers}
        absent = pl.Series([None], dtype=pl.Float64).new_from_index(0, len(raw))
        clock = raw["clock"] if "clock" in raw.columns else None
        symbol = pl.Series([self._symbol], dtype=pl.String).new_from_index(0, len(raw))
        if "symbol" in raw.columns:
            symbol = _symbols(raw["symbol"])
        return pl.DataFrame(
            {"symbol": symbol, "open_time": self.times.parse(raw["open_time"], clock)}
            | {name: columns.get(name, absent) for name in (*COLUMNS[1:], *FLOW_COLUMNS)},
            schema=ROWS,
        )

    def _without_headers(self, raw: pl.DataFrame) -> pl.DataFrame:
        """Leave out copies of the header in the middle of a text.

        Raises:
            BadAnswer: another header is there, after which columns may have changed their places.
        """
        words = raw.with_row_index("row").filter(pl.col("close").str.contains(r"^\W*[A-Za-z]"))
        headers = words.filter(pl.all_horizontal(_plain(role).is_in(_KNOWN) for role in REQUIRED))
        if not len(headers):
            return raw
        own = {role: plain(self._header[role]) for role in REQUIRED}
        others = headers.filter(~pl.all_horizontal(_plain(role) == name for role, name in own.items()))
        if len(others):
            line = ",".join(others.select(self._header.keys()).row(0))
            raise BadAnswer(f"another header is in its middle, {line!r:.80}: divide it there")
        self.num_headers += len(headers)
        return raw.with_row_index("row").join(headers, on="row", how="anti").drop("row")

    def _find_commas(self, texts: Sequence[pl.Series]) -> str:
        def example(pattern: str) -> str:
            for text in texts:
                found = text.filter(text.str.strip_chars().str.contains(pattern).fill_null(False))
                if len(found):
                    return str(found[0]).strip()
            return ""

        decimal, thousands, either = example(_DECIMAL), example(_THOUSANDS), example(_EITHER)
        if decimal and thousands:
            raise BadAnswer(f"it has both {decimal} and {thousands}: write all numbers with a decimal point")
        if decimal or thousands or not either:
            return "decimal" if decimal else "thousands" if thousands else "none"
        if example(_POINT):
            return "thousands"
        if self._delimiter != ",":
            return "decimal"
        raise BadAnswer(
            f"{either} may be a whole number or have decimals: write numbers with a decimal point, without commas"
        )

    def _numbers(self, values: pl.Series) -> pl.Series:
        if values.dtype.is_nested():
            raise BadAnswer(f"its column {self._header[values.name]!r} has {values.dtype} for numbers")
        if values.dtype != pl.String:
            return values.cast(pl.Float64, strict=False)
        values = values.str.strip_chars()
        if self._commas == "decimal":
            values = values.str.replace_all(r"[. ']", "").str.replace(",", ".", literal=True)
        number = values.cast(pl.Float64, strict=False)
        failed = number.is_null() & values.is_not_null()
        if not failed.any():
            return number
        texts = values.str.to_lowercase()
        is_missing = texts.is_in(MISSING)
        if self._commas == "thousands":
            grouped = texts.str.contains(r"^[+-]?\d{1,3}(,\d{3})*(\.\d*)?$")
            plain_numbers = texts.str.replace_all(",", "", literal=True).cast(pl.Float64, strict=False)
            number = number.set(failed & grouped, None).fill_null(plain_numbers.set(~grouped, None))
            failed = number.is_null() & values.is_not_null()
        return number.set(failed & ~is_missing, float("inf"))


def is_symbol(name: str) -> bool:
    """Return whether a name could be a symbol."""
    return _symbols(pl.Series([name])).null_count() == 0


def _symbols(values: pl.Series) -> pl.Series:
    """Return names as symbols; what cannot be one is null."""
    frame = values.cast(pl.String).str.strip_chars().str.replace("/", "-", literal=True).to_frame("name")
    name = pl.col("name")
    fits = name.str.contains(r"""^[^\s,;/\\"']{1,32}$""")
    is_lower = name == name.str.to_lowercase()
    return frame.select(
        pl.when(~fits).then(None).when(is_lower).then(name.str.to_uppercase()).otherwise(name)
    ).to_series()
