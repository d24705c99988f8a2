"""What people say of their own files in ``bars.toml`` beside them; what is not said is guessed from the symbol.

Keys, all optional: ``asset_class`` ("stock", or "crypto" for what trades round the clock), ``calendar`` ("XNYS" or
"24/7"), ``split_adjusted`` (false: splits are still to be applied), ``timezone`` (of times without one, instead of
--files-timezone). A table such as [symbols.BTCUSD] has those of the first three that differ for a symbol.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from data_sources.errors import BadAnswer
from data_sources.vendors.spelling import is_stock

FILE_NAME = "bars.toml"
STOCK, RAW_STOCK, CRYPTO = KINDS = ("stock", "stock-raw", "crypto")
# Exchange calendars by their ISO 10383 codes; the sessions of all three are New York's.
CALENDARS = {"XNYS": "stock", "XNAS": "stock", "24/7": "crypto"}
_OF_SYMBOLS = {"asset_class": str, "calendar": str, "split_adjusted": bool}
_OF_ALL: dict[str, type] = _OF_SYMBOLS | {"timezone": str, "symbols": dict}


def is_timezone(name: str) -> bool:
    """Return whether ``name`` is a time zone of the tz database."""
    try:
        return bool(ZoneInfo(name).key)
    except (KeyError, ValueError, OSError):  # a KeyError for one that is well-formed
        return False


@dataclass(frozen=True)
class Description:
    """What holds for the files of a folder: keys of the module's docstring, all optional."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read a bars.toml.

        Raises:
            BadAnswer: it cannot be read, or has something else; says what.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise BadAnswer(" ".join(str(getattr(error, "strerror", None) or error).split())) from error
        _check(values, _OF_ALL, "")
        for symbol, own in values.get("symbols", {}).items():
            if not isinstance(own, dict):
                raise BadAnswer(f"symbols.{symbol} must be a table, such as [symbols.{symbol}]")
            _check(own, _OF_SYMBOLS, f"symbols.{symbol}: ")
        return cls(values)

    @property
    def text(self) -> str:
        """All of it, the same text for the same content."""
        return json.dumps(self.values, sort_keys=True)

    @property
    def timezone(self) -> str:
        """The time zone of times without one, "" if it is not said."""
        return str(self.values.get("timezone", ""))

    def kind(self, symbol: str) -> tuple[str, bool]:
        """Return which of KINDS a symbol is, and whether its asset class was guessed from its name."""
        said = {**self.values, **self.values.get("symbols", {}).get(symbol, {})}
        asset_class = said.get("asset_class") or CALENDARS.get(said.get("calendar", ""))
        guessed = "stock" if is_stock(symbol) else "crypto"
        if (asset_class or guessed) == "crypto":
            return CRYPTO, asset_class is None
        return STOCK if said.get("split_adjusted", True) else RAW_STOCK, asset_class is None


def _check(values: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    for name, value in values.items():
        if name not in known:
            raise BadAnswer(f"{where}{name} is unknown; it may have {', '.join(known)}")
        if type(value) is not known[name]:
            raise BadAnswer(f"{where}{name} must be of type {known[name].__name__}, was {value!r:.40}")
    asset_class, calendar = values.get("asset_class"), values.get("calendar")
    if asset_class not in (None, "stock", "crypto"):
        raise BadAnswer(f"{where}asset_class must be stock or crypto, was {asset_class}")
    if calendar is not None and calendar not in CALENDARS:
        raise BadAnswer(
            f"{where}calendar must be one of {', '.join(CALENDARS)}, was {calendar}: sessions of other exchanges "
            "are not known here; 24/7 keeps all bars"
        )
    if asset_class and calendar and CALENDARS[calendar] != asset_class:
        raise BadAnswer(f"{where}calendar {calendar} is none of asset_class {asset_class}")
    if "timezone" in values and not is_timezone(values["timezone"]):
        raise BadAnswer(f"timezone must be one such as America/New_York or UTC, was {values['timezone']}")
