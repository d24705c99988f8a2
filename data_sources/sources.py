"""Requests for bars, and the interface of a source; ``vendors/__init__.py`` has the list of all sources.

Adding one: docs/adding_a_source.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from data_sources.bars import AssetClass, Bars
from data_sources.errors import DataError
from data_sources.progress import Progress
from data_sources.splits import SplitLedger
from data_sources.universe import top_of

if TYPE_CHECKING:
    from data_sources.lake.lake import Lake, Part  # which imports pyarrow and polars

Keys = Mapping[str, str]


@dataclass(frozen=True)
class DataRequest:
    """Which bars are wanted: from which sources, of which symbols, over [start_ns, end_ns), and when to drop one.

    ``symbols`` has the symbols by the setting that lists them, such as {"stocks": ("AAPL",)}. A rule such as
    "top:500" (universe.py) may be among those that a source keeps in one dataset. ``min_bars`` counts after
    cleaning. Without ``extended_hours`` stocks keep 09:30-16:00 New York. ``keep_pegged`` keeps series that stand
    still (pegged.py); a rule never chooses them. ``files_dir`` and ``files_timezone`` are for the source "files".

    Raises:
        ValueError: a source is unknown, a rule is malformed, or the setting takes none.
    """

    sources: Sequence[str]
    symbols: Mapping[str, Sequence[str]]
    start_ns: int
    end_ns: int
    min_bars: int = 2000
    extended_hours: bool = False
    keep_pegged: bool = False
    files_dir: str = ""
    files_timezone: str = "UTC"
    simulated_symbols: int = 32
    simulated_bars: int = 60_000
    simulated_seed: int = 0

    def __post_init__(self) -> None:
        from data_sources.vendors import RULE_SETTINGS, SOURCES  # its modules import this one

        unknown = [source for source in self.sources if source not in SOURCES]
        if unknown:
            raise ValueError(f"sources must be among {', '.join(SOURCES)}; {', '.join(unknown)} is not")
        for setting, names in self.symbols.items():
            if top_of(names) and setting not in RULE_SETTINGS:
                others = " and ".join(RULE_SETTINGS)
                raise ValueError(f"{setting} must be names: a rule such as top:50 is for {others}")

    @property
    def chosen(self) -> list[Source]:
        """The sources of the request, each once, in its order."""
        from data_sources.vendors import SOURCES

        return [SOURCES[name] for name in dict.fromkeys(self.sources)]

    @property
    def needs_lake(self) -> bool:
        """Whether any of its bars come from the lake."""
        return not all(source.is_computed for source in self.chosen)


@dataclass(frozen=True)
class SymbolGroup:
    """Symbols of one asset class that a source has.

    Attributes:
        setting: the setting that lists them; "" for those that are found, see ``symbols_in``.
        dataset: the dataset of the lake with all of them; None: each symbol is a dataset of its own name.
        stale_minutes: of trade; bars that end longer before the end of the request are called stale.
        advise: returns what is wrong with a name that the source cannot have, such as "is spelled BRK.B here".
        adjusts_splits: its prices are adjusted for the splits that were known when they were fetched.
    """

    asset_class: AssetClass
    setting: str = ""
    dataset: str | None = None
    stale_minutes: int = 60
    advise: Callable[[str], str] = lambda name: ""
    adjusts_splits: bool = False

    def symbols(self, request: DataRequest) -> tuple[str, ...]:
        """Return the group's symbols in a request, rules included."""
        return tuple(request.symbols.get(self.setting, ()))

    def symbols_in(self, lake: Lake, request: DataRequest) -> tuple[str, ...]:
        """Return the group's symbols in a request, as ``symbols``; of those that are found, what the lake has."""
        return self.symbols(request)

    def dataset_in(self, request: DataRequest) -> str | None:
        """Return the dataset that a request needs of the group, as ``dataset``."""
        return self.dataset


@dataclass(frozen=True)
class Answer:
    """What came of one question of a probe: ``found`` in words, or the ``error``.

    ``seconds_ahead`` is how far this machine's clock is ahead of the vendor's at least (negative: behind), None
    where the vendor sent no time. ``address`` is the environment variable that says where the question went.
    """

    asked: str  # for people, such as "Polygon us_stocks_sip"
    error: Exception | None = None
    found: str = ""
    seconds_ahead: float | None = None
    address: str = ""
    gives_bars: bool = True


@dataclass(frozen=True)
class RefreshJob:
    """What a source gets for a refresh.

    Attributes:
        lake: locked against other writers.
        request: symbols and interval.
        now_ns: the present; later minutes, and those not closed for 5 seconds, must not be written.
        progress: receives work done, warnings, and one summary per source.
        splits: receives the splits that a source lists.
    """

    lake: Lake
    request: DataRequest
    now_ns: int
    progress: Progress
    splits: SplitLedger

    @property
    def start_ns(self) -> int:
        """The first instant wanted."""
        return self.request.start_ns

    @property
    def end_ns(self) -> int:
        """The end of what is wanted and may exist."""
        return min(self.request.end_ns, self.now_ns)


class Source:
    """A source of bars. One instance of each is in vendors.SOURCES.

    Attributes:
        name: in the setting ``sources``, in reports and as the lake's folder.
        label: in messages.
        groups: its symbols.
        is_computed: ``compute`` makes the bars when they are loaded: no lake, no refresh.
    """

    name: str
    label: str
    groups: tuple[SymbolGroup, ...] = ()
    is_computed = False

    def keys(self, request: DataRequest) -> Keys:
        """Return the environment variables with keys that a request needs, by name: what is missing without it."""
        return {}

    def refresh(self, job: RefreshJob) -> None:
        """Write to the lake what it lacks of the request; what arrived stays, whatever is raised.

        Raises:
            MissingCredentials: a key is not set; the source is skipped.
            DataError: nothing could be brought up to date, or the source was given up.
            ImportError: its library is not installed.
        """
        raise NotImplementedError

    def without_flow(self, lake: Lake, request: DataRequest, now_ns: int) -> list[Part]:
        """Return the parts of a request without order flow that ``add_flow`` would fetch again, newest first.

        None where its files are large for what is kept of them.
        """
        return []

    def add_flow(self, lake: Lake, parts: Sequence[Part], now_ns: int, progress: Progress) -> None:
        """Fetch parts again and add their order flow to the lake, by ``Lake.add_flow``, each as it comes.

        Raises:
            DataError, ImportError: the source was given up; what was added stays.
        """
        raise NotImplementedError

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        """Ask the vendor the smallest questions that show whether a refresh would work; keep nothing.

        Raises:
            DataError, OSError, ImportError: no question could be asked.
        """
        return iter(())

    def compute(self, request: DataRequest) -> Iterator[Bars]:
        """Yield the bars of a computed source."""
        raise NotImplementedError

    def parameters(self, request: DataRequest) -> tuple[int, ...]:
        """Return all that the bars of a computed source depend on."""
        raise NotImplementedError


def ask(
    asked: str, question: Callable[[], tuple[str, str]], address: str = "", gives_bars: bool = True
) -> Answer:
    """Ask ``question``, which returns what came, in words, and the HTTP header Date ("" without one)."""
    asked_at = time.time()
    try:
        found, date = question()
    except (DataError, OSError, ImportError) as error:
        return Answer(asked, error, address=address, gives_bars=gives_bars)
    return Answer(asked, None, found, _seconds_ahead(date, asked_at, time.time()), address, gives_bars)


def _seconds_ahead(date: str, asked_at: float, answered_at: float) -> float | None:
    """Return the least offset that explains the header: the answer may have been under way for long."""
    try:
        server = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    # The header has whole seconds, cut off.
    return max(0.0, asked_at - server - 1) - max(0.0, server - answered_at)
