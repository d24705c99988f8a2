"""What can go wrong with data, sorted by who must act.

* DataError                  everything that data_sources raises
  x MissingCredentials       a person must act: a key is not set; names the variable
  x Refused                  a person must act: the vendor refuses these credentials or this country
  x SourceUnavailable        time must pass: the source is down, slow or sends nonsense
    - RateLimited            ... for ``retry_after`` seconds, if the vendor sent them
  x BadAnswer                one answer (file, page) is damaged or does not fit the request
  x LakeError                the lake's folder cannot be read, written or locked
    - LakeBusy               ... while another process writes

An exception of a vendor's library never leaves its module; it is the ``__cause__`` of one of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(Exception):
    """Base of every error of this package. Its text is one line for the user."""


class MissingCredentials(DataError):
    """A credential is not set: which variable, and where to get it."""


class Refused(DataError):
    """The vendor refuses: wrong key, expired plan, blocked country. Retrying does not help."""


class SourceUnavailable(DataError):
    """The source sends no useful answer now; usually this passes by itself."""


class RateLimited(SourceUnavailable):
    """The vendor limits the rate of requests."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds, if the vendor sent them


class BadAnswer(DataError):
    """One answer is damaged, truncated, or does not fit the request; others may be fine."""


class LakeError(DataError):
    """The lake's folder cannot be read, written or locked."""


class LakeBusy(LakeError):
    """Another process writes to the lake: which."""


@contextmanager
def lake_errors(action: str, path: Path, *unless: type[OSError]) -> Iterator[None]:
    """Raise an OSError of the block as a LakeError such as "cannot read PATH: Permission denied"."""
    try:
        yield
    except unless:
        raise
    except OSError as error:
        raise LakeError(f"cannot {action} {path}: {error.strerror or error}") from error
