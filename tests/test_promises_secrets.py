"""No key of the .env or the environment is in what a training leaves or shows: files, output, lists of processes.

The vendor with the keys is a bad one: it refuses, and its refusal repeats every header of the request.
"""

from __future__ import annotations

import base64
import contextlib
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow.parquet as pq
import pytest
import torch

from tests.data_sources.vendors.loopback import Answer, Fault, LoopbackServer
from tests.program import SUPERVISED, Start, tiny_flags
from tests.vendors import BinanceNow, environment_of_a_user, program_with_keys

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

# Of this test alone, so that no other process on the machine has them.
IN_FILE = {
    "POLYGON_S3_ACCESS_KEY": f"AKIACANARY{uuid.uuid4().hex}",
    "POLYGON_S3_SECRET_KEY": f"canary/+{uuid.uuid4().hex}",
}
# Of a target of messages, which does not answer.
TARGET_SECRET = f"canarytarget{uuid.uuid4().hex}"
IN_FILE["NOTIFY_URLS"] = f"http://canary:{TARGET_SECRET}@127.0.0.1:9/{TARGET_SECRET}?token={TARGET_SECRET}"
IN_ENVIRONMENT = {"POLYGON_API_KEY": f"canaryapi{uuid.uuid4().hex}"}
KEYS = IN_FILE | IN_ENVIRONMENT
FLAGS: dict[str, Any] = {
    "sources": "polygon,binance",
    "stocks": "AAPL",
    "polygon_crypto": "X:BTC-USD",
    "binance_pairs": "BTCUSDT,ETHUSDT",
    "end_date": "none",
    "history_days": 4,
    "epochs": 12,
    "runs": 1,
    "batch_size": 64,
}


class Repeating(LoopbackServer):
    """Refuses everything, and repeats what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = ""

    def plain(self, handler: Any, faults: list[Fault]) -> Answer:
        self.heard += str(handler.headers)
        error = f"<Error><Code>InvalidAccessKeyId</Code><Message>{handler.headers}</Message></Error>"
        return 403, error.encode(), {"Content-Type": "application/xml"}


def forms_of(secret: str) -> set[bytes]:
    """Return the ways in which a key may be written."""
    encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
    return {form.encode() for form in (secret, quote_plus(secret), encoded)}


FORMS = {form for secret in (*KEYS.values(), TARGET_SECRET) for form in forms_of(secret)}


class Watch:
    """Looks at the command lines of all processes, over and over. A context manager."""

    def __init__(self) -> None:
        self.looks = 0
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    self.seen.add(path.read_bytes())
            self.looks += 1


@dataclass
class Trained:
    folder: Path
    start: Start
    watch: Watch
    heard: str


CRASH = """-> Losses:
    from pathlib import Path
    crash = Path(__file__).with_name("crash")
    if crash.exists():
        crash.unlink()
        raise ZeroDivisionError
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A training on two ranks, one of which crashes, to be started again."""
    folder = tmp_path_factory.mktemp("secrets")
    home = folder / "home"
    home.mkdir()
    # Whatever is written beside the named folders lands here too.
    elsewhere = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    env = environment_of_a_user(NPROC="2", **IN_ENVIRONMENT, **elsewhere)
    with BinanceNow(0, ("BTCUSDT", "ETHUSDT")) as binance, Repeating() as polygon, Watch() as watch:
        addresses = {
            "BINANCE_API_URL": binance.url,
            "BINANCE_ARCHIVE_URL": binance.url,
            "POLYGON_S3_ENDPOINT": polygon.url,
            "POLYGON_API_URL": polygon.url,
        }
        program = program_with_keys(folder / "program", addresses)
        (program / ".env").write_text("".join(f"{name}={v}\n" for name, v in (IN_FILE | addresses).items()))
        losses = program / "training" / "losses.py"
        losses.write_text(losses.read_text().replace("-> Losses:\n", CRASH, 1))
        start = Start(folder / "output", [*SUPERVISED, *tiny_flags(folder, **FLAGS)], env, cwd=program)
        try:
            start.wait_for("run1_epoch2.pt")
            losses.with_name("crash").touch()
            yield Trained(folder, start.ends_well(), watch, polygon.heard)
        finally:
            start.kill()


def test_the_keys_were_used_and_the_training_met_trouble(trained: Trained) -> None:
    assert KEYS["POLYGON_S3_ACCESS_KEY"] in trained.heard and KEYS["POLYGON_API_KEY"] in trained.heard
    output = trained.start.output
    assert "Traceback" in output and "Training died" in output and "Run 1 is complete" in output
    log = (trained.folder / "logs" / "train.log").read_text()
    assert "was not sent to http://127.0.0.1:9/...: Connection refused" in log


def test_no_file_that_a_training_leaves_holds_a_key(trained: Trained) -> None:
    files = [path for path in trained.folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "run1_epoch12.pt", "output"} <= {path.name for path in files}
    holders = {path.name for path in files if any(form in path.read_bytes() for form in FORMS)}
    assert holders == {".env"}


def without_tensors(nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: without_tensors(value) for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        return [without_tensors(value) for value in nest]
    return None if isinstance(nest, torch.Tensor) else nest


def test_no_checkpoint_and_no_bar_file_holds_a_key_in_a_packed_form(trained: Trained) -> None:
    checkpoints = [*trained.folder.glob("checkpoints/**/*.pt")]
    bars = [*trained.folder.glob("data/**/*.parquet")]
    assert len(checkpoints) > 4 and bars
    texts = [repr(without_tensors(torch.load(path, weights_only=True))) for path in checkpoints]
    texts += [str(pq.read_schema(path).metadata) for path in bars]
    assert not [text for text in texts if any(form.decode() in text for form in FORMS)]


def test_no_list_of_processes_shows_a_key(trained: Trained) -> None:
    watch = trained.watch
    ours = [line for line in watch.seen if str(trained.folder).encode() in line]
    assert watch.looks > 20 and len(ours) >= 3  # supervisor, launcher, ranks
    assert not [line for line in watch.seen if any(form in line for form in FORMS)]
