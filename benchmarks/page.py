"""What the companion costs: memory, CPU at rest, and CPU while 60 clients ask for the page as often as they can.

    python benchmarks/page.py

It watches files as a training of 400 epochs and 8 exams leaves them; no training runs beside it.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.companion import Companion  # noqa: E402
from tests.monitoring.published_training import exam, hold_exams, publish  # noqa: E402
from tests.program import environment  # noqa: E402

CLIENTS = 60
SECONDS = 30.0
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def ask(port: int, until: float, answers: list[bool]) -> None:
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), 2.0) as connection:
                connection.settimeout(3.0)
                connection.sendall(REQUEST)
                answers.append(connection.recv(9) == b"HTTP/1.0 ")
        except OSError:
            answers.append(False)
        time.sleep(max(0.0, CLIENTS / 1_000 - (time.monotonic() - began)))  # 1,000 a second of all together


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publish(folder, epochs=400)
        hold_exams(folder, *(exam(25 * number) for number in range(1, 9)))
        words = [sys.executable, str(ROOT / "continuous_training.py"), "companion"]
        flags = ["--log-dir", str(folder / "logs"), "--web-port", str(port)]
        with Companion([*words, *flags], environment(), None) as companion:
            companion.start()
            assert companion._process is not None
            process = psutil.Process(companion._process.pid)
            while not any(connection.status == "LISTEN" for connection in process.net_connections()):
                time.sleep(0.2)
            time.sleep(3.0)
            for title, clients in (("at rest", 0), (f"{CLIENTS} clients", CLIENTS)):
                answers: list[bool] = []
                before, until = process.cpu_times(), time.monotonic() + SECONDS
                threads = [threading.Thread(target=ask, args=(port, until, answers)) for _ in range(clients)]
                for thread in threads:
                    thread.start()
                time.sleep(SECONDS)
                after, memory = process.cpu_times(), process.memory_info().rss
                for thread in threads:
                    thread.join()
                cores = (after.user + after.system - before.user - before.system) / SECONDS
                print(
                    f"{title}: {cores:.4f} cores, {memory / 1e6:.0f} MB, {sum(answers)} of {len(answers)} answered"
                )


if __name__ == "__main__":
    main()
