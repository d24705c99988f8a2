"""What a training pays for being watched: CPU seconds of an epoch beside a flooded page, and beside each tracker.

    python benchmarks/watchers.py --rounds 5                     # the page: flooded, and another port is, in turns
    python benchmarks/watchers.py --trackers mlflow,wandb        # those that are installed; offline

The flood: 60 clients that ask a thousand times a second together, and 30 that read a byte a second. They take
cores and caches themselves, so in the other turns they ask a port that answers nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.page import CLIENTS, REQUEST, ask  # noqa: E402
from tests.program import environment, tiny_flags  # noqa: E402

EPOCHS = 40
SKIPPED = 4  # at the start libraries are still loaded
SLOW_READERS = 30
SIZES = {"d_model": 64, "num_layers": 2, "num_heads": 4, "envs_per_gpu": 32, "context_bars": 64, "horizon": 64,
         "episode_bars": 128, "batch_size": 512, "micro_batch_segments": 8, "epochs": EPOCHS, "runs": 1,
         "checkpoint_every": 10, "simulated_symbols": 4}  # fmt: skip
# Nothing leaves this machine.
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}


def read_slowly(port: int, until: float) -> None:
    """Hold a connection, and read a byte of the page a second."""
    while time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), 2.0) as connection:
                connection.settimeout(3.0)
                connection.sendall(REQUEST)
                while time.monotonic() < until and connection.recv(1):
                    time.sleep(1.0)
        except OSError:
            time.sleep(0.2)


def flood(port: int, seconds: float) -> None:
    """Ask and read until this process is ended: one of its own, whose CPU time is not the training's."""
    until = time.monotonic() + seconds
    for target, count in ((ask, CLIENTS), (read_slowly, SLOW_READERS)):
        for _ in range(count):
            extra = ([],) if target is ask else ()
            threading.Thread(target=target, args=(port, until, *extra), daemon=True).start()
    time.sleep(seconds)


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def train(folder: Path, flags: list[str], flooded: int) -> tuple[float, float, float]:
    """Train; return an epoch's CPU seconds, of the training and of the companion, and its seconds by the clock."""
    words = [sys.executable, str(ROOT / "continuous_training.py"), "train", *tiny_flags(folder, **SIZES)]
    given = environment(**OFFLINE, MLFLOW_TRACKING_URI=f"file://{folder}/mlruns", TRACKIO_DIR=str(folder))
    marks: dict[int, tuple[float, float, float]] = {}  # by the number of finished epochs
    asking = None
    with (folder / "out").open("wb") as out:
        training = psutil.Popen(
            [*words, "--no-dashboard", *flags], env=given, cwd=folder, stdout=out, stderr=out
        )
        if flooded:
            clients = [sys.executable, __file__, "--flood", str(flooded)]
            asking = psutil.Popen(clients, env=given)
        rows = folder / "logs" / "metrics.jsonl"
        while training.poll() is None:
            done = rows.read_bytes().count(b"\n") if rows.exists() else 0
            try:
                companions = [child for child in training.children() if "companion" in child.cmdline()]
                marks.setdefault(
                    done, (seconds_of(training), sum(map(seconds_of, companions)), time.monotonic())
                )
            except psutil.Error:
                pass  # one has just ended
            time.sleep(0.01)
        if asking:
            asking.kill()
    said = (folder / "out").read_text() + (folder / "logs" / "train.log").read_text()
    if training.returncode or "took no figures" in said:
        sys.exit(said)
    first, last = (max(n for n in marks if n <= SKIPPED), max(n for n in marks if n < EPOCHS))
    return tuple((b - a) / (last - first) for a, b in zip(marks[first], marks[last], strict=True))  # type: ignore[return-value]


def measure(title: str, flags: list[str], flooded: int = 0) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        own, beside, clock = train(Path(name), flags, flooded)
    text = f"companion {beside:.4f} or {beside / clock:.4f} cores, {beside / own:.1%} of it"
    print(f"{title}: an epoch of {clock:.2f} s takes {own:.3f} CPU s, {text}", flush=True)
    return own, beside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trackers", default="")
    parser.add_argument("--flood", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.flood:
        flood(given.flood, 3_600.0)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page, ratios = ["--web-port", str(port)], []
    trackers = [name for name in given.trackers.split(",") if name]
    for number in range(given.rounds):
        if trackers:
            for name in trackers:
                measure(name, ["--telemetry", name])
            continue
        turns = {}
        with socket.create_server(("127.0.0.1", 0)) as silent:
            asked = {"the page is flooded": port, "another port is": silent.getsockname()[1]}
            for title in sorted(asked, reverse=number % 2 == 0):
                turns[title], _ = measure(title, page, asked[title])
        ratios.append(turns["the page is flooded"] / turns["another port is"])
    if ratios:
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"an epoch of the flooded one, relative: {shown}; median {statistics.median(ratios):.3f}; on "
              f"{os.cpu_count()} cores")  # fmt: skip


if __name__ == "__main__":
    main()
