"""The command ``check`` against vendors on loopback: all is well, then every fault on its own."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from commands import check, preflight_command
from commands.check.report import Line
from commands.check.sources import check_clock, stored_rows
from continuous_training import PRESETS, Settings
from data_sources import sources
from data_sources.lake import lake
from data_sources.lake.lake import Lake
from data_sources.refresh import refresh
from data_sources.sources import Answer
from data_sources.vendors import http
from data_sources.vendors.http import RetryPolicy
from tests.data_sources.vendors.loopback import Answer as HttpAnswer
from tests.data_sources.vendors.loopback import Fault, LoopbackServer, Notes
from tests.data_sources.vendors.s3_server import Fault as S3Fault
from tests.program import NAMES_IN_ENV, PATIENCE, ROOT, environment
from tests.training.checkpoints import untrained
from tests.vendors import KEY_ID, SECRET, Vendors, closed_port
from training import checkpoint, devices
from training.checkpoint import Checkpoint
from training.data_feed import data_request
from training.devices import Devices

GB = 10**9
FULL = Settings()
SMALL = Settings(**PRESETS["small"])
REST_KEY = "restkeyrestkeyrestkey"
CPU = Devices(1, text="on the CPU")
Usage = namedtuple("Usage", "total used free")


class Splits(LoopbackServer):
    """Massive's list of splits, for one key."""

    def plain(self, handler: BaseHTTPRequestHandler, faults: list[Fault]) -> HttpAnswer:
        if handler.headers.get("Authorization") != f"Bearer {REST_KEY}":
            return 401, b"{}", {}
        return 200, json.dumps({"results": []}).encode(), {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Vendors, Splits]]:
    with Vendors() as vendors, Splits() as splits:
        yield vendors, splits


@pytest.fixture
def vendors(
    running: tuple[Vendors, Splits], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Vendors]:
    """Three vendors and the list of splits, with all keys set, in a folder of its own."""
    for name in (*NAMES_IN_ENV, "NPROC"):
        monkeypatch.delenv(name, raising=False)
    keys = {"POLYGON_S3_ACCESS_KEY": KEY_ID, "POLYGON_S3_SECRET_KEY": SECRET, "POLYGON_API_KEY": REST_KEY}
    for name, value in (running[0].addresses | keys | {"POLYGON_API_URL": running[1].url}).items():
        monkeypatch.setenv(name, value)
    # The machine may be busy.
    patient_policy = RetryPolicy(connect_seconds=30, read_seconds=60, total_seconds=90, attempts=1)
    monkeypatch.setattr(http, "PROBE_POLICY", patient_policy)
    monkeypatch.setattr(check, "memory_bytes", lambda: 16 * GB)
    monkeypatch.setattr(devices, "find", lambda *_: Devices(1, text="on the CPU"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100 * GB))
    monkeypatch.chdir(tmp_path)
    yield running[0]
    for server in (running[0].polygon, running[0].binance, running[0].yahoo):
        server.faults.clear()


def lines(settings: Settings = SMALL, offline: bool = False) -> list[Line]:
    import os

    found = list(check.check_all(settings, os.environ, offline))
    text = "\n".join(line.text for line in found)
    assert not any(secret in text for secret in (KEY_ID, SECRET, REST_KEY))
    assert all("\n" not in line.text and line.text.isascii() for line in found)
    assert all(bool(line.code) == (line.level == "error") for line in found)
    return found


def faults(settings: Settings = SMALL, offline: bool = False) -> list[tuple[str, str, str, int]]:
    return [(e.topic, e.level, e.text, e.code) for e in lines(settings, offline) if e.level != "OK"]


def of_source(source: str) -> Settings:
    return replace(SMALL, sources=(source,), positions=(0.0, 1.0))  # spot pairs alone are not sold short


def test_where_all_is_well_every_line_is_ok(vendors: Vendors) -> None:
    found = lines()
    assert [line for line in found if line.level != "OK"] == []
    assert [line.topic for line in found] == [
        "settings", "folder", "checkpoint", "keys", "keys", "keys", "sources", "sources", "sources", "sources",
        "sources", "sources", "clock", "GPU", "memory", "disk", "disk", "disk",
        "versions",
    ]  # fmt: skip
    texts = [line.text for line in found if line.topic == "sources"]
    days = vendors.days[-2], vendors.days  # of the newest one there is no file yet
    assert texts[0] == f"Polygon us_stocks_sip accepts the keys; newest day file {days[0]}"
    assert texts[1].startswith("Polygon global_crypto accepts the keys; newest day file ")
    assert texts[2:5] == [
        "Polygon splits accepts the key",
        "Binance API answers for BTCUSDT",
        "Binance archive answers",
    ]
    assert texts[5].startswith("Yahoo answers for AAPL with ")
    assert not Path(SMALL.data_dir).exists()  # nothing was fetched for keeps


# Without them nothing of their source is left.
ALONE = {"POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY", "POLYGON_S3_ENDPOINT", "YAHOO_BASE_URL"}


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("POLYGON_S3_ACCESS_KEY", "", "Polygon is skipped: POLYGON_S3_ACCESS_KEY is not set"),
        ("POLYGON_S3_SECRET_KEY", "with a space", "POLYGON_S3_SECRET_KEY has spaces"),
        ("POLYGON_S3_ENDPOINT", "nonsense", "POLYGON_S3_ENDPOINT must look like"),
        ("POLYGON_API_KEY", "another", "check POLYGON_API_KEY, the REST key"),
        ("POLYGON_API_KEY", "", "POLYGON_API_KEY is not set: splits come from Yahoo alone"),
        ("BINANCE_API_URL", "closed", "Binance API: Binance does not answer"),
        ("BINANCE_ARCHIVE_URL", "closed", "Binance archive: Binance archive does not answer"),
        ("YAHOO_BASE_URL", "closed", "Yahoo: Yahoo does not answer"),
        ("POLYGON_S3_ENDPOINT", "closed", "(list us_stocks_sip 2026) does not answer"),
    ],
)
def test_a_wrong_key_or_address_is_reported_with_its_fix(
    vendors: Vendors, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, closed_port() if value == "closed" else value)
    found = faults(of_source(variable.split("_")[0].lower()))
    assert ("warning", True) in [(level, expected in text) for _, level, text, _ in found], found
    assert any(expected in text and variable in text for _, _, text, _ in found)
    # Nothing else would give bars here.
    assert ("error" in {level for _, level, _, _ in found}) == (variable in ALONE), found


@pytest.mark.parametrize(
    ("server", "fault", "expected"),
    [
        ("polygon", S3Fault("status", "us_stocks_sip.*gz", status=403), "(get us_stocks_sip"),
        ("polygon", S3Fault("status", "prefix=global_crypto", status=403), "(list global_crypto"),
        ("polygon", S3Fault("status", "us_stocks", status=503), "(list us_stocks_sip"),
        ("polygon", S3Fault("page", "prefix=us_stocks"), "sent no listing"),
        ("binance", Fault("/klines\\?", status=451), "Binance API: Binance refuses access (HTTP 451)"),
        ("binance", Fault("CHECKSUM", status=403), "Binance archive: Binance archive refuses access (HTTP 403)"),
        ("yahoo", Fault("chart", status=429), "Yahoo: Yahoo rate limit"),
        ("yahoo", Fault("chart", status=403), "Yahoo: Yahoo refuses access (HTTP 403)"),
    ],
)  # fmt: skip
def test_a_refusal_differs_from_a_silence(vendors: Vendors, server: str, fault: Any, expected: str) -> None:
    getattr(vendors, server).faults.append(replace(fault))
    (text,) = [
        text for _, _, text, _ in faults(of_source(server)) if text.endswith("; a start continues without it")
    ]
    assert expected in text
    assert ("refuses access" in text) == (fault.status in (403, 451))
    assert ("check the network" in text) == (fault.status in (200, 503))


def test_one_source_that_fails_is_no_error(vendors: Vendors) -> None:
    vendors.yahoo.faults.append(Fault("chart", status=403))
    ((topic, level, _, _),) = faults()
    assert (topic, level) == ("sources", "warning")


@pytest.mark.parametrize(
    ("server", "fault", "expected"),
    [
        ("polygon", S3Fault("hang", "us_stocks"), "Polygon us_stocks_sip: http"),
        ("binance", Fault("/klines\\?", kind="hang"), "Binance API: Binance does not answer"),
    ],
)
def test_a_silent_source_does_not_hold_up_the_check(
    vendors: Vendors, monkeypatch: pytest.MonkeyPatch, server: str, fault: Any, expected: str
) -> None:
    impatient_policy = RetryPolicy(connect_seconds=30, read_seconds=0.2, total_seconds=3, attempts=1)
    monkeypatch.setattr(http, "PROBE_POLICY", impatient_policy)
    getattr(vendors, server).faults.append(replace(fault))
    assert any(expected in text for _, _, text, _ in faults(of_source(server)))


def test_no_source_at_all_is_an_error_unless_the_lake_has_bars(
    vendors: Vendors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = replace(of_source("binance"), binance_pairs=("BTCUSDT",), history_days=2, holdout_days=1)
    request = data_request(settings, vendors.binance.now_ns)
    good = vendors.binance.url
    for name in ("BINANCE_API_URL", "BINANCE_ARCHIVE_URL"):
        monkeypatch.setenv(name, closed_port())
    *_, last = [fault for fault in faults(settings) if fault[0] == "sources"]
    assert last[1] == "error" and last[3] == 3
    assert last[2].startswith("no source of bars answers, and data_cache holds none: set the keys in .env")
    for name in ("BINANCE_API_URL", "BINANCE_ARCHIVE_URL"):
        monkeypatch.setenv(name, good)
    refresh(Lake(Path(settings.data_dir)), request, vendors.binance.now_ns, Notes())
    for name in ("BINANCE_API_URL", "BINANCE_ARCHIVE_URL"):
        monkeypatch.setenv(name, closed_port())
    footers: list[Path] = []
    read = lake.parse_footer
    monkeypatch.setattr(lake, "parse_footer", lambda path: footers.append(path) or read(path))
    found = faults(settings)
    assert len(footers) == len(set(footers)) > 0  # each once for all lines
    assert {level for _, level, _, _ in found} == {"warning"}
    expected = f"a start trains on the {stored_rows(settings):,} bars in data_cache"
    assert stored_rows(settings) >= 1440 and any(expected in text for _, _, text, _ in found)
    longer = replace(settings, history_days=400, holdout_days=14)
    (text,) = [text for _, _, text, _ in faults(longer, offline=True) if "holdout_days" in text]
    assert re.match(r"data_cache holds [1-3] days of bars, no more than holdout_days=14; none are left", text)


@pytest.mark.parametrize(
    ("num_processes", "expected"),
    [
        ("3", "Invalid setting: batch_size=4096 must be a multiple of horizon x processes = 128 x 3"),
        ("some", "Invalid setting: NPROC must be a whole number of at least 1, was 'some'"),
    ],
)
def test_what_the_start_scripts_would_refuse_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_processes: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", num_processes)
    settings = replace(SMALL, sources=("simulated",))
    ((topic, level, text, code),) = [fault for fault in faults(settings) if fault[0] == "settings"]
    assert (topic, level, code) == ("settings", "error", 2)
    assert text.startswith(expected)


def of_checkpoint(folder: Path, **changes: Any) -> list[tuple[str, str, str, int]]:
    saved = Checkpoint.read(folder / "checkpoints" / "run1_epoch2.pt")
    settings = Settings(**saved.config)
    settings = replace(
        settings, sources=("simulated",), checkpoint_dir=str(folder / "checkpoints"), **changes
    )
    return [fault for fault in faults(settings, offline=True) if fault[0] in ("folder", "checkpoint")]


def test_the_folder_is_looked_at_as_a_start_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPROC", "1")
    path = untrained(tmp_path, batch_size=1024, envs_per_gpu=64)
    assert of_checkpoint(tmp_path) == []
    with checkpoint.exclusive(tmp_path / "checkpoints"):
        ((topic, level, text, code),) = of_checkpoint(tmp_path)
    assert (topic, level, code) == ("folder", "error", 75) and "is written by process" in text
    ((topic, level, text, code),) = of_checkpoint(tmp_path, d_model=64)
    assert (topic, level, code) == ("checkpoint", "error", 2)
    assert text.startswith("d_model=64, but ") and "was trained with d_model=32: set it back" in text
    saved = Checkpoint.read(path).with_resume()
    older = saved.features | {"names": ["moon", *saved.statistics.names[1:]]}
    newer = path.with_name("run1_epoch3.pt")
    replace(saved, path=newer, epoch=3, features=older).save(keep=9)
    ((_, level, text, code),) = of_checkpoint(tmp_path)
    assert (level, code) == ("error", 2) and "was trained with other features: moon" in text
    newer.write_bytes(newer.read_bytes()[:-100])
    ((_, level, text, code),) = of_checkpoint(tmp_path)
    assert level == "warning" and "run1_epoch3.pt" in text and text.endswith("the one before it is used")

    def refuse(folder: Path) -> list[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint, "_series", refuse)
    found = of_checkpoint(tmp_path)
    assert found == [
        ("checkpoint", "error", f"{tmp_path / 'checkpoints'} cannot be read: Permission denied", 2)
    ]


def test_a_start_says_what_check_knows_of_memory_and_disks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "find", lambda *_: CPU)
    monkeypatch.setattr(check, "memory_bytes", lambda: GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 20 * GB))
    preflight_command(replace(FULL, sources=("simulated",)))
    _, first, memory, disk = capsys.readouterr().err.splitlines()  # the first: PyTorch is loading
    assert first == "Trains on the CPU."
    assert memory.startswith("Warning: memory: ") and disk.startswith("Warning: disk: checkpoints: ")


def test_gpus_that_cannot_be_used_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9")
    ((topic, level, text, code),) = [f for f in faults(replace(SMALL, sources=("simulated",)), True) if f[3]]
    assert (topic, level, code) == ("GPU", "error", 2) and "--device cpu" in text


@pytest.mark.parametrize(
    ("seconds", "level", "expected"),
    [
        ((), "warning", "not compared: no source sent its time"),
        ((0.4,), "OK", "within 1 s of Binance's"),
        ((9.0, -3.0), "OK", "within 3 s of Binance's"),
        ((3600.0,), "warning", "3600 s ahead of Binance's: set it, as with timedatectl set-ntp true"),
        ((-7.0,), "warning", "7 s behind Binance's"),
    ],
)
def test_a_clock_that_is_off_is_reported(seconds: tuple[float, ...], level: str, expected: str) -> None:
    line = check_clock(
        [Answer("Binance API", seconds_ahead=offset) for offset in seconds] + [Answer("Yahoo")]
    )
    assert line.level == level and line.text.startswith(expected)


def test_the_clock_is_compared_with_what_servers_say(
    vendors: Vendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    date = "Sat, 01 Jan 2000 12:00:00 GMT"
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_: date)
    (line,) = [line for line in lines(of_source("binance")) if line.topic == "clock"]
    assert line.level == "warning" and " s ahead of Binance's: set it" in line.text


def test_a_slow_answer_does_not_look_like_a_wrong_clock() -> None:
    date, server = "Sat, 01 Jan 2000 12:00:00 GMT", 946728000.0
    for asked, answered, off in (
        (server - 20, server + 1, 0.0),  # under way for 21 seconds
        (server + 0.9, server + 9, 0.0),
        (server + 10, server + 12, 9.0),
        (server - 12, server - 10, -10.0),
    ):
        assert sources._seconds_ahead(date, asked, answered) == pytest.approx(off)
    assert sources._seconds_ahead("", 0, 1) is None


def test_the_command_for_people_and_for_machines(tmp_path: Path) -> None:
    folders = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--log-dir", str(tmp_path / "logs")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "continuous_training.py", "check", "--demo", *folders, *words]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )

    fine = run("--json")
    content = json.loads(fine.stdout)
    assert (fine.returncode, content["ok"], content["exit_code"]) == (0, True, 0)
    assert {"topic", "level", "text"} == set(content["checks"][0])
    with checkpoint.exclusive(tmp_path / "checkpoints"):
        held = run("--offline")
    assert held.returncode == 75
    assert held.stderr == "" and held.stdout.splitlines()[1].startswith("error    folder      ")
    assert held.stdout.splitlines()[-1].endswith(", 1 error")
