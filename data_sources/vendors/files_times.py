"""Times of people's own files: numbers in s, ms, us or ns, dates as digits, and text, with or without a zone."""

from __future__ import annotations

import re

import polars as pl

from data_sources.errors import BadAnswer

NUMBER = r"^\d+(\.\d+)?$"
# Units of numbers since 1970, from 1973 to 2255 or so, and how many ns they are. Between them no number is a time.
UNITS = (("s", 10**8, 10**9), ("ms", 10**11, 10**6), ("us", 10**14, 10**3), ("ns", 10**17, 1))
LARGEST_FOLD = 90  # of the least number of a unit
# Dates as digits, and the range of numbers that they take; as times since 1970 all of them were before 1977.
DIGITS = (("%Y%m%d", 1_900_01_01, 2_199_12_31), ("%Y%m%d%H%M", 1_900 * 10**8, 2_200 * 10**8),
          ("%Y%m%d%H%M%S", 1_900 * 10**10, 2_200 * 10**10))  # fmt: skip
MOST_FORMS = 24  # of text in one batch, each text that is no time among them
UTC_ENDINGS = ("Z", "UTC", "GMT")
_MONTH = r"(?P<word>[A-Za-z]{3})"
_DATE = (
    r"(?P<ymd>\d{4}(?P<s1>[-/.])\d{1,2}(?P=s1)\d{1,2})|(?P<digits>\d{8})|"
    r"(?P<short>\d{1,2}(?P<s2>[-/.])\d{1,2}(?P=s2)\d{4})|"
    rf"(?P<words>\d{{1,2}}(?P<s3>[- ]){_MONTH}(?P=s3)\d{{4}})"
)
_CLOCK = (
    r"(?:(?P<packed>\d{4}(?:\d\d)?)|"
    r"\d{1,2}:\d{2}(?P<second>:\d{2}(?P<fraction>[.,]\d{1,9})?)?(?P<half> ?[AaPp][Mm])?)"
)
_ZONE = r"(?P<zone> ?(?:Z|UTC|GMT)?)(?P<offset> ?[+-]\d{2}:?\d{2})?"
_TEXT = re.compile(rf"(?:{_DATE})(?:(?P<between>[T ]+|  ?){_CLOCK}{_ZONE})?")


class Times:
    """Parses the times of one file to int64 ns UTC.

    Attributes:
        units: of the numbers that were seen.
        num_ambiguous: times of an hour that the clocks repeat or skip, and that are null for it.
    """

    def __init__(self, timezone: str) -> None:
        self._timezone = timezone
        self.units: set[str] = set()
        self.num_ambiguous = 0
        self._month_first: bool | None = None
        self._clock_has_seconds: bool | None = None

    def parse(self, values: pl.Series, clock: pl.Series | None = None) -> pl.Series:
        """Return instants, null where a value is none.

        Args:
            values: times, numbers or texts.
            clock: the times of day, where ``values`` are days.

        Raises:
            BadAnswer: 01/02/2026 may be January or February, and no other date of the batch says which.
        """
        if isinstance(values.dtype, pl.Datetime):
            return self._instants(values) if clock is None else self._parse_pair(values.dt.date(), clock)
        if values.dtype == pl.Date:
            return (
                self._instants(values.cast(pl.Datetime("ns")))
                if clock is None
                else self._parse_pair(values, clock)
            )
        if clock is not None:
            return self._parse_pair(values, clock)
        if values.dtype.is_numeric():
            return self._parse_numbers(values)
        texts = values.cast(pl.String).str.strip_chars()
        is_number = texts.str.contains(NUMBER).fill_null(False)
        if not is_number.any():
            return self._parse_text(texts)
        whole = texts.cast(pl.Int64, strict=False)
        numbers = whole if not (is_number & whole.is_null()).any() else texts.cast(pl.Float64, strict=False)
        parsed = self._parse_numbers(numbers)
        if is_number.all():
            return parsed
        return parsed.fill_null(self._parse_text(texts.set(is_number, None)))

    def _parse_numbers(self, values: pl.Series) -> pl.Series:
        if not values.dtype.is_integer():
            values = values.cast(pl.Float64)
            if ((values == values.floor()) | values.is_null()).all():
                values = values.cast(pl.Int64, strict=False)
        result = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(values))
        for form, low, high in DIGITS:
            is_date = values.is_between(low, high).fill_null(False)
            if is_date.any():
                days = values.set(~is_date, None).cast(pl.Int64).cast(pl.String)
                result = result.fill_null(
                    self._instants(days.str.to_datetime(form, time_unit="ns", strict=False))
                )
                values = values.set(is_date, None)
        for unit, least, factor in UNITS:
            fits = values.is_between(least, LARGEST_FOLD * least).fill_null(False)
            if fits.any():
                self.units.add(unit)
                scaled = values.set(~fits, None) * factor
                result = result.fill_null(scaled.cast(pl.Int64, strict=False))
        return result

    def _parse_pair(self, days: pl.Series, clock: pl.Series) -> pl.Series:
        if days.dtype == pl.Date:
            days = days.dt.to_string("%Y-%m-%d")
        if clock.dtype == pl.Time:
            clock = clock.dt.to_string("%H:%M:%S")
        texts = clock.cast(pl.String).str.strip_chars().str.replace(r"\.0$", "")
        is_digits = texts.str.contains(r"^\d{1,6}$").fill_null(False)
        if is_digits.any():
            if self._clock_has_seconds is None:
                digits = texts.filter(is_digits)
                largest = digits.cast(pl.Int64).max()
                self._clock_has_seconds = isinstance(largest, int) and largest > 2359
            width = 6 if self._clock_has_seconds else 4
            padded = texts.str.zfill(width).str.replace(r"^(\d\d)(\d\d)(\d\d)?$", "$1:$2:$3")
            texts = padded.str.strip_chars_end(":").set(~is_digits, None).fill_null(texts)
        joined = pl.DataFrame({"day": days.cast(pl.String).str.strip_chars(), "clock": texts}).select(
            pl.concat_str("day", "clock", separator=" ")
        )
        return self._parse_text(joined.to_series())

    def _parse_text(self, texts: pl.Series) -> pl.Series:
        result = pl.Series(texts.name, [None], dtype=pl.Int64).new_from_index(0, len(texts))
        rest = texts
        for _ in range(MOST_FORMS):
            if rest.null_count() == len(rest):
                break
            first = rest.drop_nulls()[0]
            found = (rest == first).fill_null(False)
            if form := self._form_of(first, texts):
                own = rest.str.replace(",", ".", literal=True) if "," in first else rest
                parsed = own.str.to_datetime(form, time_unit="ns", strict=False, exact=True)
                if form.endswith(UTC_ENDINGS):
                    parsed = parsed.dt.replace_time_zone("UTC")
                result = result.fill_null(self._instants(parsed))
                found |= parsed.is_not_null()
            rest = rest.set(found, None)
        return result

    def _form_of(self, text: str, texts: pl.Series) -> str | None:
        """Return the format of a text, as chrono spells it; None for one that is no time."""
        match = _TEXT.fullmatch(text)
        if not match:
            return None
        found = match.groupdict()
        if found["ymd"]:
            form = "%Y{0}%m{0}%d".format(found["s1"])
        elif found["digits"]:
            form = "%Y%m%d"
        elif found["words"]:
            form = "%d{0}%b{0}%Y".format(found["s3"])
        elif found["s2"] == "." or not self._is_month_first(found["s2"], text, texts):
            form = "%d{0}%m{0}%Y".format(found["s2"])
        else:
            form = "%m{0}%d{0}%Y".format(found["s2"])
        if not found["between"]:
            return form
        if packed := found["packed"]:
            clock = "%H%M%S" if len(packed) == 6 else "%H%M"
        else:
            clock = "%I:%M" if found["half"] else "%H:%M"
        clock += (":%S" if found["second"] else "") + ("%.f" if found["fraction"] else "")
        clock += (" %p" if half.startswith(" ") else "%p") if (half := found["half"]) else ""
        offset = found["offset"] or ""
        zone = found["zone"] + (" " if offset.startswith(" ") else "") + ("%z" if offset else "")
        return f"{form}{found['between']}{clock}{zone}"

    def _is_month_first(self, separator: str, text: str, texts: pl.Series) -> bool:
        if self._month_first is None:
            pattern = rf"^(\d{{1,2}}){re.escape(separator)}(\d{{1,2}}){re.escape(separator)}"
            first, second = (
                texts.str.extract(pattern, group).cast(pl.Int64, strict=False) > 12 for group in (1, 2)
            )
            if first.any() == second.any():
                why = "both orders are there" if first.any() else "no date says which is the month"
                raise BadAnswer(f"{text} has its day or its month first, {why}: write dates as 2026-01-31")
            self._month_first = bool(second.any())
        return self._month_first

    def _instants(self, times: pl.Series) -> pl.Series:
        """Return datetimes as int64 ns UTC; those without a zone are in the file's."""
        if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is None:
            local = times.dt.replace_time_zone(self._timezone, ambiguous="null", non_existent="null")
            self.num_ambiguous += local.null_count() - times.null_count()
            times = local
        return times.dt.convert_time_zone("UTC").dt.epoch("ns")
