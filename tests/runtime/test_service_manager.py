"""What systemd and a container's health check learn of a training, from the real supervisor and real sockets."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.processes import LINUX
from tests.runtime.test_supervisor import ROOT, Daemon, daemon, wait_for

__all__ = ["daemon"]  # the fixture
pytestmark = pytest.mark.skipif(not LINUX, reason="systemd's, and locks of folders")
NAMES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Manager:
    """Stands in for systemd: a datagram socket, by path or (with @) in the abstract namespace."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.received: list[dict[str, str]] = []

    def read(self) -> list[dict[str, str]]:
        """Return everything so far."""
        while True:
            try:
                lines = self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.received
            self.received.append(dict(line.split("=", 1) for line in lines))

    def has(self, name: str) -> bool:
        return any(name in message for message in self.read())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = tmp_path / "notify" if request.param == "path" else f"@continuous-training-{os.getpid()}"
    found = Manager(str(name))
    yield found
    found.close()


def states(messages: list[dict[str, str]]) -> list[str]:
    """The order of events, without the watchdog's."""
    return [name for message in messages for name in message if name in ("READY", "STOPPING")]


def test_systemd_learns_when_training_runs_that_the_supervisor_lives_and_that_it_stops(
    daemon: Callable[..., Daemon], manager: Manager
) -> None:
    run = daemon(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="800000", MISHAP="start:sleep").start()
    wait_for(run.starts)
    wait_for(lambda: manager.has("WATCHDOG"))
    assert states(manager.read()) == []  # the worker is up, but has no heartbeat yet
    psutil.Process(run.starts()[0]).kill()  # the next one has the same fate
    wait_for(lambda: any("SIGKILL" in message.get("STATUS", "") for message in manager.read()))
    assert not any(name in psutil.Process(pid).environ() for pid in run.starts()[1:] for name in NAMES)


def test_a_whole_life(daemon: Callable[..., Daemon], manager: Manager) -> None:
    run = daemon(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="800000").start().train(2)
    # More than the queue of a socket holds, which nothing read so far.
    wait_for(lambda: manager.has("READY") and sum("WATCHDOG" in message for message in manager.read()) > 4)
    assert not any(name in psutil.Process(run.starts()[0]).environ() for name in NAMES)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends()[0] == 0
    assert states(manager.read()) == ["READY", "STOPPING"]


def test_another_process_of_the_watchdog_and_a_manager_that_is_gone_change_nothing(
    daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    run = daemon(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="400000", WATCHDOG_PID="1").start().train(2)
    wait_for(lambda: manager.has("READY"))
    assert not manager.has("WATCHDOG")
    manager.close()
    (tmp_path / "notify").unlink()
    psutil.Process(run.starts()[0]).kill()  # the restart is reported to no one
    run.train(1)
    run.process.send_signal(signal.SIGINT)
    assert run.ends()[0] == 0


def health(run: Daemon, **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "runtime.health"],
        cwd=ROOT, env=run.environment | environment, capture_output=True, text=True,
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr


def test_the_health_check_asks_the_living_training(daemon: Callable[..., Daemon]) -> None:
    run = daemon()
    code, text = health(run)
    assert code == 1 and text.startswith("no training runs here")
    run.start().train()
    code, text = health(run)
    assert code == 0 and text.endswith(": healthy\n")
    assert health(run, HANG_SECONDS="soon") == (
        1,
        "HANG_SECONDS must be a number of seconds above 0, was 'soon'\n",
    )
    # Long ago for the control folder, as if neither worker nor supervisor had done anything for hours.
    (folder,) = run.temporary.glob("continuous_training_*")
    worker = psutil.Process(run.starts()[0])
    for process in (run.process.pid, worker.pid):
        os.kill(process, signal.SIGSTOP)
    for file in folder.iterdir():
        os.utime(file, (time.time() - 2000,) * 2)
    code, text = health(run)
    assert code == 1 and ": no heartbeat for 200" in text
    os.utime(folder / "exit_code")  # the supervisor has just started other workers
    assert health(run)[0] == 0
    run.process.kill()
    worker.kill()
    run.process.wait()
    code, text = health(run)
    assert code == 1 and text.startswith("no training runs here")
