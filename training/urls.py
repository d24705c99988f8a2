"""Addresses: the targets of messages, which have secrets in them, and where the page is served."""

from __future__ import annotations

import importlib.util
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

WEBHOOKS = ("http", "https")


class Url:
    """An address that nothing but ``reveal`` gives away, so that no line, file or traceback has it."""

    def __init__(self, text: str) -> None:
        self._text = text.strip()

    def reveal(self) -> str:
        """Return the address, for what connects to it."""
        return self._text

    @property
    def scheme(self) -> str:
        """Its scheme in lower case, "" without one."""
        return self._text.partition("://")[0].lower() if "://" in self._text else ""

    def __repr__(self) -> str:
        """Return what may be shown: of a webhook scheme, host and port, of any other the scheme alone."""
        if self.scheme not in WEBHOOKS:
            return f"{self.scheme}://..." if self.scheme.isalnum() else "..."
        try:
            parts = urlsplit(self._text)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            return f"{self.scheme}://..."
        return f"{self.scheme}://{parts.hostname}{port}/..."

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def find_fault(self) -> str:
        """Return what is wrong with it as a target of messages, "" if it can be used."""
        if not self.scheme.isalnum() or any(char.isspace() for char in self._text):
            return "must be a URL such as https://host/path, without spaces"
        if self.scheme in WEBHOOKS:
            return "" if self._names_a_host() else "must name a host, such as https://host:8443/path"
        if importlib.util.find_spec("apprise") is None:
            return "needs the package apprise (.venv/bin/pip install apprise); an https:// URL does not"
        return ""

    def _names_a_host(self) -> bool:
        try:
            parts = urlsplit(self._text)
            return bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            return False


def find_targets(given: Sequence[Url], environment: Mapping[str, str]) -> list[Url]:
    """Return the targets of the setting ``notify`` and of NOTIFY_URLS, each once."""
    return list(dict.fromkeys([*given, *_from_environment(environment)]))


def _from_environment(environment: Mapping[str, str]) -> Iterator[Url]:
    for text in environment.get("NOTIFY_URLS", "").split():
        yield Url(text)


def is_address(host: str) -> bool:
    """Whether it is an IP address, or localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host) is not None
    except ValueError:
        return False


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
