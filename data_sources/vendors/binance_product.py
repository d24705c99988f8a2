"""What differs between Binance's products: spot pairs, and perpetual futures that are margined in dollars (USD-M).

Both have the same klines, archive and faults: one code serves them, and this is all that it must not assume.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_sources import renames
from data_sources.sources import DataRequest, SymbolGroup
from data_sources.vendors.spelling import advise_binance_pair, advise_binance_perpetual

ARCHIVE_URL = "https://data.binance.vision"
ARCHIVE_VARIABLE = "BINANCE_ARCHIVE_URL"  # one archive has both


def archive_address() -> str:
    """Return where the archive is, by the environment."""
    return os.environ.get("BINANCE_ARCHIVE_URL") or ARCHIVE_URL


@dataclass(frozen=True)
class Product:
    """One of Binance's markets.

    Attributes:
        source: the name of its source, and of its folder in the lake.
        label: in messages.
        noun: what its symbols are called.
        group: its symbols, as the product's users write them.
        suffix: of those symbols, which Binance does not have.
        archive: the folder in the archive.
        api: the folder of REST under its host.
        klines: the endpoint, as the origin of a part.
        has_funding: its holders pay each other.
        api_url: the host of REST.
        api_variable: the environment variable with another one.
        where_else: what to do where REST is refused.
        weight_limit: of all requests of a minute, per address.
    """

    source: str
    label: str
    noun: str
    group: SymbolGroup
    suffix: str
    archive: str
    api: str
    klines: str
    api_url: str
    api_variable: str
    where_else: str
    weight_limit: int
    has_funding: bool = False

    def at_binance(self, symbol: str) -> str:
        """Return Binance's name of a symbol."""
        return symbol.removesuffix(self.suffix)

    def is_name(self, symbol: str) -> bool:
        """Return whether a symbol may be one of Binance's."""
        return re.fullmatch(r"[A-Z0-9]{2,20}" + re.escape(self.suffix), symbol) is not None

    def names(self, root: Path, request: DataRequest) -> Iterator[tuple[str, int, int]]:
        """Yield the names that a request needs and their spans: its symbols, and what those were called before.

        Raises:
            LakeError: the user's table of renames in the lake at ``root`` cannot be read.
        """
        symbols = dict.fromkeys(self.group.symbols(request))
        yield from ((symbol, request.start_ns, request.end_ns) for symbol in symbols)
        span = request.start_ns, request.end_ns
        for stretch in renames.former(renames.read(root), self.group.setting, symbols, *span):
            start_ns, end_ns = max(span[0], stretch.start_ns), min(span[1], stretch.end_ns)
            yield stretch.name, start_ns, end_ns


# Source: https://github.com/binance/binance-spot-api-docs (2026-07-21): 6,000 weight a minute, a page weighs 2.
SPOT = Product(
    source="binance",
    label="Binance",
    noun="pair",
    group=SymbolGroup("crypto", "binance_pairs", advise=advise_binance_pair),
    suffix="",
    archive="data/spot",
    api="api",
    klines="api/v3/klines",
    api_url="https://api.binance.com",
    api_variable="BINANCE_API_URL",
    where_else="set BINANCE_API_URL=https://data-api.binance.vision",
    weight_limit=6000,
)
# Source: https://developers.binance.com/docs/derivatives/usds-margined-futures (2026-11): 2,400 weight a minute; a
# page weighs 1 below 100 klines, 2 below 500, 5 up to 1,000.
USD_M = Product(
    source="binance_futures",
    label="Binance futures",
    noun="perpetual",
    group=SymbolGroup("perpetual", "binance_perpetuals", advise=advise_binance_perpetual),
    suffix=".P",
    archive="data/futures/um",
    api="fapi",
    klines="fapi/v1/klines",
    api_url="https://fapi.binance.com",
    api_variable="BINANCE_FUTURES_API_URL",
    where_else="set BINANCE_FUTURES_API_URL to a proxy; its archive has all but the newest days",
    weight_limit=2400,
    has_funding=True,
)
