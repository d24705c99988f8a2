"""What the supervisor reports to systemd: that training runs, that the supervisor itself lives, that it stops.

The protocol is sd_notify's: datagrams of ``NAME=value`` to the socket that NOTIFY_SOCKET names
(https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html, 2026-11-28). Started by anything else,
nothing is sent. Standard library only.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping


class ServiceManager:
    """The supervisor's connection to systemd.

    Args:
        environment: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read and removed: they are this process's.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        # Others, such as vsock:, are for virtual machines.
        if address.startswith(("/", "@")) and hasattr(socket, "AF_UNIX"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)  # a manager that reads nothing must not stop the supervisor
        is_ours = pid in ("", str(os.getpid()))
        self._interval = int(microseconds) / 4e6 if microseconds.isdigit() and is_ours else 0.0
        self._pinged = 0.0
        self._waiting: list[str] = []

    def ping(self) -> None:
        """Report that this process lives: four times in the time after which systemd kills it. Call it often."""
        if self._interval and time.monotonic() - self._pinged >= self._interval:
            self._pinged = time.monotonic()
            self._send("WATCHDOG=1")
        self._flush()

    def report_ready(self, status: str) -> None:
        """Report that training runs; again after every restart, for its status."""
        self._send(f"READY=1\nSTATUS={status}")

    def report_stopping(self) -> None:
        """Report that training stops."""
        self._send("STOPPING=1\nSTATUS=saving")

    def report_status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._send("STATUS=" + " ".join(text.split()))

    def _send(self, message: str) -> None:
        if self._socket is not None and message not in self._waiting:
            self._waiting.append(message)
            self._flush()

    def _flush(self) -> None:
        """Send what waits, in order; systemd reads nothing while it reloads, and its queue is short."""
        while self._socket is not None and self._waiting:
            try:
                self._socket.sendto(self._waiting[0].encode(), self._address)
            except OSError:  # its queue is full, or it restarts: the next ping tries again
                return
            del self._waiting[0]
