"""A walk's folder: what is walked, and the windows that are done, each a file that is chained to the one before.

    walk.json               settings, windows and options; written first
    windows/0001.json       what the first window earned, with its accounts; written whole, never changed
    first.pt                the first champion, which is never trained again
    champions/0001.pt       with --ensemble those that still decide, by the first window that had them
    training/               the daemon's folder, warm from window to window; with --fresh training/0001/ and so on
    logs/                   its train.log and metrics.jsonl; with --fresh likewise

A window counts once its file is there. Its accounts go on in the next one, so no file of an earlier window may
change: each has the SHA-256 of the one before, the first that of walk.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from envs.open_group_env import account_of
from evaluation.measures import jsonable
from evaluation.record import Accounts
from runtime.control import EXIT_CRASH, EXIT_SETTING, ExitProgram
from runtime.files import write_atomically

FORMAT = 1
PLAN, WINDOWS, FIRST = "walk.json", "windows", "first.pt"
Result = dict[str, Any]


@dataclass
class Book:
    """A walk's folder as it was read."""

    folder: Path
    plan: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    _hash: str = ""  # of the newest file

    @staticmethod
    def plan_in(folder: Path) -> dict[str, Any] | None:
        """Return the plan of the walk in a folder, None without one.

        Raises:
            ExitProgram: it cannot be understood.
            OSError: it cannot be read.
        """
        try:
            content = (folder / PLAN).read_bytes()
        except FileNotFoundError:
            return None
        return _parse(folder / PLAN, content)

    @staticmethod
    def open(folder: Path, plan: Mapping[str, Any], later: Mapping[str, Any]) -> Book:
        """Read the walk in a folder; a new one is written by ``begin``.

        Args:
            folder: of the walk.
            plan: what is walked.
            later: defaults of what plans have; a walk of an older program meant those that it does not name.

        Raises:
            ExitProgram: another walk is in the folder, or a file of it was edited.
            OSError: the folder cannot be read or written.
        """
        plan, later = (json.loads(json.dumps(jsonable(each))) for each in ({"format": FORMAT, **plan}, later))
        known = Book.plan_in(folder)
        if known is None:
            if (folder / WINDOWS).exists():
                raise ExitProgram(
                    EXIT_CRASH, f"{folder / PLAN} is missing: put it back, or use another --output"
                )
        elif difference := _difference(_completed(known, later), plan):
            raise ExitProgram(
                EXIT_SETTING,
                f"{folder} has another walk: {difference}; give what it was begun with, or another --output",
            )
        book = Book(folder, dict(plan))
        content = book._plan_text() if known is None else (folder / PLAN).read_bytes()
        book._hash = _sha256(content)
        book._read()
        return book

    def begin(self) -> None:
        """Write the plan, where it is not there yet.

        Raises:
            OSError: it cannot be written.
        """
        if not (self.folder / PLAN).exists():
            write_atomically(self.folder / PLAN, lambda file: file.write(self._plan_text()))

    def _plan_text(self) -> bytes:
        return json.dumps(self.plan, indent=1).encode() + b"\n"

    def _read(self) -> None:
        path = self._path(1)
        while path.exists():
            content = path.read_bytes()
            result = _parse(path, content)
            if result.get("previous") != self._hash:
                before = self._path(len(self.results)) if self.results else self.folder / PLAN
                raise ExitProgram(
                    EXIT_CRASH,
                    f"{path} does not follow {before.name}, which was edited: put the right one back, or begin "
                    "another walk with --output",
                )
            self.results.append(result)
            self._hash = _sha256(content)
            path = self._path(len(self.results) + 1)

    def append(self, result: Mapping[str, Any], accounts: Accounts) -> None:
        """Keep what a window earned, durably.

        Raises:
            OSError: it cannot be written; the walk is as it was.
        """
        plain = {name: {s: asdict(a) for s, a in own.items()} for name, own in accounts.items()}
        result = jsonable({"previous": self._hash, **result, "accounts": plain})
        content = json.dumps(result, allow_nan=False).encode() + b"\n"
        write_atomically(self._path(len(self.results) + 1), lambda file: file.write(content))
        self.results.append(json.loads(content))
        self._hash = _sha256(content)

    @property
    def accounts(self) -> Accounts:
        """The accounts as they stand after the newest window."""
        newest = self.results[-1]["accounts"] if self.results else {}
        return {name: {s: account_of(a) for s, a in own.items()} for name, own in newest.items()}

    def _path(self, number: int) -> Path:
        return self.folder / WINDOWS / f"{number:04d}.json"


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ExitProgram(EXIT_CRASH, f"{path} has format {found['format']}, this program reads {FORMAT}")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ExitProgram(
            EXIT_CRASH, f"{path} is damaged: put it back, or begin another walk with --output"
        ) from None
    return dict(found)


def _completed(known: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Add what a plan does not name; settings by their names."""
    found = {**later, **known}
    for name, value in later.items():
        if isinstance(value, dict):
            found[name] = value | found[name]
    return found


def _difference(known: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Say in which value two plans differ first; settings by their names."""
    for name, value in plan.items():
        before = known.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _difference(before, value):
                return inner
        elif before != value:
            if name == "windows":
                return "its windows are others (--from, --to, --step)"
            return f"{name}={_shown(before)} there, {_shown(value)} here"
    return ""


def _shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
