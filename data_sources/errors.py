"""What can go wrong with data, sorted by who must act.

* DataError                  everything that data_sources raises
  x MissingCredentials       a person must act: a key is not set; names the variable
  x Refused                  a person must act: the vendor refuses these credentials or this place
  x SourceUnavailable        time must pass: the source is down, slow or answers nonsense
    - RateLimited            ... for ``retry_after`` seconds, when the vendor says so
  x BadAnswer                one answer (file, page) is damaged or not what was asked for
  x LakeError                the lake's folder cannot be read, written or locked

A vendor's own exception never leaves its adapter; it is the ``__cause__`` of one of these.
"""

from __future__ import annotations


class DataError(Exception):
    """Base of every error of this package. Its text is one line that can be shown as it is."""


class MissingCredentials(DataError):
    """A credential is not set: which variable, and where to get it."""


class Refused(DataError):
    """The vendor refuses: wrong key, expired plan, blocked place. Retrying does not help."""


class SourceUnavailable(DataError):
    """The source does not answer usefully now; usually passes by itself."""


class RateLimited(SourceUnavailable):
    """The vendor asks to wait."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds, when the vendor says so


class BadAnswer(DataError):
    """One answer is damaged, truncated, or not what was asked for; others may be fine."""


class LakeError(DataError):
    """The lake's folder cannot be read, written or locked."""
