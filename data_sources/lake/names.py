"""Names of the lake's folders and files, which every operating system and file system takes."""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from urllib.parse import quote

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names of devices on Windows

# Of a name, beside the endings of a part and of a temporary file: 255 fit a file system.
MOST_CHARACTERS = 214


def as_text(name: str) -> str:
    """Return a file's name as text that can be written anywhere: bytes that are not UTF-8 as \\xfc."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@lru_cache(maxsize=1 << 14)  # a refresh asks for the same few names thousands of times
def escape(name: str, folds_case: bool = False) -> str:
    """Return any text as one file name of every system: "^GSPC" -> "%5EGSPC", "CON" -> "%43ON", ".." -> "%2E%2E".

    One that would be too long is cut and ends in a digest.

    Args:
        name: of a source, dataset or unit.
        folds_case: whether two names may differ in case only, which many file systems take for one: "aapl" becomes
            "%61%61%70%6C". Datasets of many symbols, whose names have a "_", keep theirs.
    """
    escaped = quote(name, safe="")
    if folds_case and "_" not in name:
        escaped = re.sub("[a-z]", _encode, escaped)
    escaped = re.sub(r"^\.|\.$", _encode, escaped)
    if len(escaped) > MOST_CHARACTERS:
        return f"{escaped[:150]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return _encode(escaped[0]) + escaped[1:] if RESERVED.fullmatch(escaped) else escaped


def _encode(letter: str | re.Match[str]) -> str:
    return f"%{ord(letter if isinstance(letter, str) else letter[0]):02X}"
