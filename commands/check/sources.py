"""Keys, sources and the clock."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commands.check.line import Line
from data_sources.errors import LakeError, MissingCredentials, RateLimited, SourceUnavailable
from data_sources.lake.lake import Lake
from data_sources.load import DataRequest
from data_sources.probing import Answer
from runtime.control import EXIT_NO_DATA

if TYPE_CHECKING:
    from continuous_training import Settings

MOST_SECONDS_APART = 5.0  # a minute counts as closed after so long
# By how the name of a question begins; the first one counts.
ADDRESSES = {
    "Polygon splits": "POLYGON_API_URL",
    "Polygon": "POLYGON_S3_ENDPOINT",
    "Binance archive": "BINANCE_ARCHIVE_URL",
    "Binance": "BINANCE_API_URL",
    "Yahoo": "YAHOO_BASE_URL",
}
ADDRESS = re.compile("|".join(ADDRESSES.values()))
WITHOUT_KEY = {
    "POLYGON_S3_ACCESS_KEY": "Polygon is skipped",
    "POLYGON_S3_SECRET_KEY": "Polygon is skipped",
    "POLYGON_API_KEY": "splits come from Yahoo alone",
}


def keys(request: DataRequest, environment: Mapping[str, str]) -> Iterator[Line]:
    """Say which keys are set; never what they are."""
    if "polygon" not in request.sources:
        yield Line("keys", "OK", f"{', '.join(request.sources)}: none is needed")
        return
    for name, what_then in WITHOUT_KEY.items():
        if name == "POLYGON_API_KEY" and not request.stocks:
            continue
        if environment.get(name, "").strip():
            yield Line("keys", "OK", f"{name} is set")
        else:
            yield Line("keys", "warning", f"{name} is not set: {what_then}; see .env.example")


def answered(answers: Sequence[Answer], settings: Settings) -> Iterator[Line]:
    """Say how each source answered; without any of them a start has what the lake holds, or nothing."""
    for answer in answers:
        if answer.error is None:
            yield Line("sources", "OK", f"{answer.asked} {answer.found}")
        elif isinstance(answer.error, MissingCredentials):
            yield Line("sources", "warning", f"{answer.asked} is skipped: {answer.error}")
        else:
            reason = " ".join(str(answer.error).split())
            is_silent = isinstance(answer.error, SourceUnavailable) and not isinstance(
                answer.error, RateLimited
            )
            if is_silent and not ADDRESS.search(reason):
                reason += f"; look at the network, a firewall, {_address_of(answer.asked)} in .env"
            yield Line("sources", "warning", f"{answer.asked}: {reason}; a start goes on without it")
    if any(answer.error is None for answer in answers if answer.gives_bars):
        return
    held = rows_held(settings)
    if held:
        text = f"no source of bars answers: a start trains on the {held:,} bars in {settings.data_dir}"
        yield Line("sources", "warning", text)
    else:
        text = (
            f"no source of bars answers, and {settings.data_dir} holds none: set the keys in .env, check the "
            "network, or try it offline with --demo"
        )
        yield Line("sources", "error", text, EXIT_NO_DATA)


def _address_of(asked: str) -> str:
    """Return the variable that says where a question goes."""
    return next(variable for start, variable in ADDRESSES.items() if asked.startswith(start))


def rows_held(settings: Settings) -> int:
    """Count the bars that the lake has of the settings' sources, whatever their age; 0 where it cannot be read."""
    lake = Lake(Path(settings.data_dir))
    try:
        return sum(
            part.rows
            for source in settings.sources
            for dataset in lake.datasets(source)
            for part in lake.parts(source, dataset).values()
        )
    except LakeError:
        return 0


def clock(answers: Sequence[Answer]) -> Line:
    """Compare this machine's clock with the servers' that told theirs."""
    told = {answer.asked: answer.seconds_ahead for answer in answers if answer.seconds_ahead is not None}
    if not told:
        return Line("clock", "warning", "not compared: no source told its time")
    # The nearest one: a proxy may hand out an answer of long ago.
    asked, seconds = min(told.items(), key=lambda item: abs(item[1]))
    host = asked.split()[0]
    if abs(seconds) <= MOST_SECONDS_APART:
        return Line("clock", "OK", f"within {max(1.0, abs(seconds)):.0f} s of {host}'s")
    direction = "ahead of" if seconds > 0 else "behind"
    text = f"{abs(seconds):.0f} s {direction} {host}'s: set it, as with timedatectl set-ntp true"
    return Line("clock", "warning", f"{text}; else minutes are taken before they have closed, or late")
