"""What the user was promised, one test per promise: the bars, from three vendors to the weights.

The program runs for real, tiny, with a .env of its own, against vendors on loopback that speak the real protocols
up to this minute. It is started a few times, some of them side by side; every test looks at what those left.
"""

import datetime as dt
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from continuous_training import Settings
from data_sources.bars import COLUMNS
from data_sources.calendar import new_york_midnight_ns
from data_sources.lake.lake import READY_FOLDER, Lake
from data_sources.lake.quality import bar_table, closed_before
from data_sources.load import load
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import Fault
from tests.program import ALONE, SUPERVISED, Start, checkpoint, epochs_of, is_same, tiny_flags
from tests.vendors import (
    DAY_NS,
    ENOUGH,
    KEY_ID,
    MINUTE_NS,
    SECRET,
    SINCE,
    SPLIT_RATIO,
    TODAY,
    TOO_FEW,
    WANTED,
    Vendors,
    closed_port,
    environment_of_a_user,
    midnight_ns,
    program_with_keys,
)
from training.data_feed import data_request

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")

EPOCHS = 2
REAL = WANTED | {
    "sources": "polygon,binance,yahoo",
    "start_date": SINCE,
    "end_date": "none",  # up to this minute
    "holdout_days": 2,
    "epochs": EPOCHS,
}
WRONG = {"batch_size": 7, "sources": "nasdaq"}
EXAM_DAYS = 4
EXAM = {
    "sources": "binance",
    "binance_pairs": "BTCUSDT",
    "positions": "0,1",
    "end_date": TODAY - dt.timedelta(days=2),  # in the lake since the first start: nothing is left to ask
    "holdout_days": EXAM_DAYS,
    "epochs": 8,
    "runs": 1,
}


@dataclass(frozen=True)
class Asked:
    """What a start asked of the vendors."""

    day_files: list[str]  # of Polygon, by key
    zips: list[str]  # of Binance's archive
    klines: list[str]  # of Binance's API
    minutes: list[str]  # of Yahoo


class Story:
    """Every start that the tests look at, in order. Those that start together ask different vendors, or none."""

    def __init__(self, folder: Path, vendors: Vendors) -> None:
        self.folder, self.vendors = folder, vendors
        self.program = program_with_keys(folder / "program", vendors.addresses)
        self.starts: dict[str, Start] = {}

    def play(self) -> None:
        closed = closed_port()
        unreachable = dict.fromkeys(
            ("POLYGON_S3_ENDPOINT", "BINANCE_API_URL", "BINANCE_ARCHIVE_URL", "YAHOO_BASE_URL"), closed
        )

        self._run(
            *(self._start(f"wrong {name}", SUPERVISED, {name: WRONG[name]}, NPROC="2") for name in WRONG)
        )
        self.num_requests_of_wrong_settings = self.vendors.num_requests

        empty = {"sources": "polygon,yahoo", "runs": 1}
        self._run(
            self._start("first", ALONE, {"runs": 1}),
            self._start("nothing", ALONE, empty, POLYGON_S3_ACCESS_KEY="", YAHOO_BASE_URL=closed),
        )
        self.first = self._asked()
        self.newest_ns = {part.dataset: part.end_ns for part in self.lake("first").all_parts()}
        for name in ("down", "mended", "exam", "other exam"):
            shutil.copytree(self.folder / "first" / "data", self.folder / name / "data")

        self.vendors.publish()
        self.second_began_ns = time.time_ns()
        # So that every source has something to ask.
        older = {"runs": 1, "start_date": SINCE - dt.timedelta(days=7)}
        with BinanceServer(0) as broken:  # whatever it is asked for, it is out of order
            broken.faults.append(Fault("", status=503))
            self._run(
                self._start("second", ALONE, {"runs": 2}, "first"),
                self._start("down", ALONE, older, **unreachable | {"YAHOO_BASE_URL": broken.url}),
            )
        self.second = self._asked()

        self.damaged = self._damage()
        self._change_the_exam()
        self._run(
            self._start("mended", ALONE, {"runs": 2, "epochs": 1}, POLYGON_S3_ACCESS_KEY=""),
            self._start("exam", ALONE, EXAM, **unreachable),
            self._start("other exam", ALONE, EXAM, **unreachable),
        )
        self.mended = self._asked()

    def _start(
        self, name: str, how: tuple[str, ...], changes: dict[str, Any], folder: str = "", **env: str
    ) -> Start:
        words = [*how, *tiny_flags(self.folder / (folder or name), **REAL | changes)]
        log = self.folder / "output" / name
        self.starts[name] = Start(log, words, environment_of_a_user(**env), cwd=self.program)
        return self.starts[name]

    def _run(self, *starts: Start) -> None:
        for start in starts:
            start.ends()

    def _asked(self) -> Asked:
        vendors = self.vendors
        asked = Asked(vendors.polygon.gets(), vendors.zips(), vendors.klines(), vendors.minutes())
        vendors.forget_requests()
        return asked

    def lake(self, name: str) -> Lake:
        return Lake(self.folder / name / "data")

    def output(self, name: str) -> str:
        return self.starts[name].output

    def lines(self, name: str, text: str) -> list[str]:
        return [line for line in self.starts[name].lines if text in line]

    def _damage(self) -> list[str]:
        """Flip a bit in the bars of a Binance file and cut a week of Yahoo short; return both names."""
        root = self.folder / "mended" / "data"
        units = self.lake("mended").parts("binance", "ETHUSDT")
        flipped = root / "binance" / "ETHUSDT" / f"{max(unit for unit in units if unit[0].isdigit())}.parquet"
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        cut = root / "yahoo" / "NVDA" / f"{min(self.lake('mended').parts('yahoo', 'NVDA'))}.parquet"
        cut.write_bytes(cut.read_bytes()[:1000])
        shutil.rmtree(root / READY_FOLDER)  # else a start within the same minute reads no bars
        return [path.relative_to(root).as_posix() for path in (flipped, cut)]

    def _change_the_exam(self) -> None:
        """Make every price of the holdout another one, in one of two lakes that are the same before it."""
        lake, pair = self.lake("other exam"), "BTCUSDT"
        self.exam_start_ns = midnight_ns(TODAY) - (1 + EXAM_DAYS) * DAY_NS - 60 * 10**9
        for part in list(lake.parts("binance", pair).values()):
            bars = lake.columns("binance", pair, [pair], part.start_ns, part.end_ns)[pair]
            factor = np.where(bars["open_time"] >= self.exam_start_ns, 1.5, 1.0)
            prices = {name: bars[name] * factor for name in ("open", "high", "low", "close")}
            table = bar_table(pair, [(bars | prices)[name] for name in COLUMNS])
            lake.write(
                "binance", pair, part.unit, table, key=part.key, version=part.version, start_ns=part.start_ns,
                end_ns=part.end_ns, symbols=part.symbols, now_ns=part.fetched_ns,
            )  # fmt: skip


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with Vendors() as vendors:
        story = Story(tmp_path_factory.mktemp("story"), vendors)
        try:
            story.play()
            yield story
        finally:
            for start in story.starts.values():
                start.kill()


# --- bars of three vendors in one market --------------------------------------------------------------------


def test_bars_of_all_three_vendors_end_in_one_market(story: Story) -> None:
    assert story.starts["first"].process.returncode == 0, story.output("first")
    assert set(checkpoint(story.folder / "first", "run1_epoch2.pt")["symbols"]) == ENOUGH
    listed = dict(
        line.split()[:2] for line in story.starts["first"].lines if line.split(" ")[0] in ENOUGH | TOO_FEW
    )
    assert listed == {
        "AAPL": "polygon+yahoo",  # Polygon's newest day is not out, Yahoo has it
        "MSFT": "polygon+yahoo",
        "NVDA": "yahoo",
        "BTCUSDT": "binance",
        "ETHUSDT": "binance",
        "X:BTC-USD": "polygon",
    }
    assert epochs_of(story.folder / "first") == [(run, epoch) for run in (1, 2) for epoch in (1, 2)]


def test_symbols_under_2000_bars_are_dropped_and_listed_by_name(story: Story) -> None:
    dropped = story.lines("first", "dropped, ")
    for symbol, bars in (("JNJ", "780"), ("NEWUSDT", "1,..."), ("X:SOL-USD", "1,800")):
        (line,) = [line for line in dropped if re.search(rf"\b{re.escape(symbol)}$", line)]
        assert re.search(rf"dropped, {bars} bars, fewer than 2,000: ", line)
    assert len(dropped) == len(TOO_FEW)
    for name in ("run1_epoch2.pt", "run2_epoch2.pt"):
        assert not TOO_FEW & set(checkpoint(story.folder / "first", name)["symbols"])


def test_the_market_holds_every_bar_that_the_vendors_have(story: Story) -> None:
    """Minute for minute and price for price, from the wire through the lake."""
    vendors, until_ns = story.vendors, min(story.newest_ns["BTCUSDT"], story.newest_ns["AAPL"])
    request = data_request(settings_of(story), until_ns)
    for bars in load(story.lake("first"), request).bars:
        if bars.symbol.endswith("USDT"):
            times, values = vendors.binance.truth(bars.symbol, request.start_ns, until_ns)
        elif bars.asset_class == "stock":
            known_until_ns = min(until_ns, vendors.yahoo.now_ns)  # nothing of today, though New York be open
            times, values = vendors.yahoo.truth(bars.symbol, request.start_ns, known_until_ns)
        else:
            continue
        np.testing.assert_array_equal(bars.open_time, times)
        ours = np.column_stack([bars.open, bars.high, bars.low, bars.close, bars.volume])
        np.testing.assert_allclose(ours, values, rtol=1e-9)


def test_two_years_of_bars_up_to_now_are_asked_for() -> None:
    now_ns = time.time_ns()
    request = data_request(Settings(), now_ns)
    assert (request.start_ns, request.end_ns, request.min_bars) == (now_ns - 730 * DAY_NS, now_ns, 2000)


def settings_of(story: Story) -> Settings:
    saved = checkpoint(story.folder / "first", "run2_epoch2.pt")["config"]
    return Settings(**saved)


# --- splits -------------------------------------------------------------------------------------------------


def test_a_split_is_applied_on_load_and_raw_prices_are_kept(story: Story) -> None:
    split_ns = new_york_midnight_ns(story.vendors.split_day)
    request = data_request(settings_of(story), time.time_ns())
    raw = story.lake("first").columns("polygon", "us_stocks_sip", ["AAPL"], 0, request.end_ns)["AAPL"]
    place = int(np.searchsorted(raw["open_time"], split_ns))
    assert 0 < place < len(raw["close"])
    data = load(story.lake("first"), request)
    (bars,) = [bars for bars in data.bars if bars.symbol == "AAPL"]
    first = int(np.searchsorted(bars.open_time, split_ns))
    assert bars.close[first] == raw["close"][place]
    assert bars.close[first - 1] == raw["close"][place - 1] / SPLIT_RATIO
    assert bars.volume[first - 1] == raw["volume"][place - 1] * SPLIT_RATIO
    (row,) = [row for row in data.rows if row.symbol == "AAPL"]
    assert (row.num_splits, row.flags) == (1, ())


# --- only what is new ---------------------------------------------------------------------------------------


def test_the_next_run_fetches_only_what_is_new(story: Story) -> None:
    assert story.starts["second"].process.returncode == 0, story.output("second")
    first, second = story.first, story.second
    assert len(first.day_files) == len(set(first.day_files)) == len(story.vendors.days) - 1 + 2
    assert second.day_files == [story.vendors.newest]
    assert first.zips and len(first.zips) == len(set(first.zips))
    assert not second.zips
    overlap_ns = 5 * 60 * 10**9
    assert len(second.klines) <= 4
    # NEWUSDT began two days ago: its pages are asked for again, in case what came before is late.
    for path in [path for path in second.klines if "NEWUSDT" not in path]:
        known_ns = story.newest_ns[re.search(r"symbol=(\w+)", path)[1]]
        assert int(re.search(r"startTime=(\d+)", path)[1]) * 10**6 >= known_ns - overlap_ns, path
    assert len(first.minutes) >= 2 * 3
    this_week = TODAY - dt.timedelta(days=TODAY.weekday() + 1)
    for path in second.minutes:
        assert int(re.search(r"period1=(\d+)", path)[1]) * 10**9 >= midnight_ns(this_week), path


def test_the_next_run_trains_on_the_new_bars(story: Story) -> None:
    earlier, later = (checkpoint(story.folder / "first", f"run{run}_epoch2.pt") for run in (1, 2))
    # Up to the last minute that had closed when it began, which may be the one that the first run ended with.
    assert later["data_cutoff_ns"] >= closed_before(story.second_began_ns)
    assert later["data_cutoff_ns"] % MINUTE_NS == 0
    assert (
        later["data_fingerprint"] != earlier["data_fingerprint"]
    )  # by Polygon's newest day, if by no minute
    assert any(line.split()[:2] == ["AAPL", "polygon"] for line in story.starts["second"].lines)


# --- sources that fail --------------------------------------------------------------------------------------


def test_a_source_without_keys_is_one_line_and_training_goes_on_with_the_rest(story: Story) -> None:
    assert story.starts["mended"].process.returncode == 0, story.output("mended")
    line = "Warning: Polygon skipped: POLYGON_S3_ACCESS_KEY is not set, see .env.example"
    assert story.lines("mended", "POLYGON") == [line] * 2  # once in each of two runs
    assert not story.mended.day_files
    assert epochs_of(story.folder / "mended") == [(1, 1), (2, 1)]


def test_sources_that_are_down_are_a_warning_each_and_cached_bars_are_used(story: Story) -> None:
    assert story.starts["down"].process.returncode == 0, story.output("down")
    for source in ("Polygon", "Binance", "Yahoo"):
        (line,) = story.lines("down", f"Warning: {source} failed: ")
        assert re.search(r"; [\d,]+ bars up to \S+ \S+ UTC are kept$", line), line
    assert set(checkpoint(story.folder / "down", "run1_epoch2.pt")["symbols"]) == ENOUGH
    printed = story.output("down").split("6 symbols, ")[0].splitlines()
    assert len([line for line in printed if line.startswith("Warning: ")]) == 3
    assert all(line.startswith(("Warning: ", "binance: ", "yahoo: ")) for line in printed)  # no noise


def test_no_source_at_all_is_exit_code_3_with_what_to_do(story: Story) -> None:
    assert story.starts["nothing"].process.returncode == 3
    last = story.starts["nothing"].lines[-1]
    assert last.startswith("No symbol has 2,000 bars: ")
    assert ".env" in last and "--demo" in last
    assert len(story.lines("nothing", "Polygon skipped")) == len(story.lines("nothing", "Yahoo failed")) == 1


def test_a_corrupt_cache_file_is_set_aside_and_fetched_again(story: Story) -> None:
    root, kept = story.folder / "mended" / "data", story.folder / "down" / "data"
    for name in story.damaged:
        assert (root / f"{name}.corrupt").exists()
        (line,) = story.lines("mended", name.removesuffix(".parquet"))
        assert line.startswith("Warning: ") and "to be fetched again" in line
        assert (root / name).exists()
        source, dataset, unit = name.removesuffix(".parquet").split("/")
        ours, theirs = (Lake(path).parts(source, dataset)[unit] for path in (root, kept))
        assert ours.content == theirs.content
    flipped, _ = story.damaged
    assert [path.split("1m-")[1] for path in story.mended.zips] == [f"{Path(flipped).stem}.zip"]
    assert set(checkpoint(story.folder / "mended", "run2_epoch1.pt")["symbols"]) == ENOUGH


# --- secrets ------------------------------------------------------------------------------------------------


def test_keys_come_from_the_env_file_and_appear_nowhere_else(story: Story) -> None:
    assert story.first.day_files  # so the keys of .env were used
    files = [path for path in story.folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "run1_epoch2.pt", "first"} <= {path.name for path in files}
    for secret in (KEY_ID, SECRET, "canary"):
        holders = [path for path in files if secret.encode() in path.read_bytes()]
        assert [path.relative_to(story.folder).as_posix() for path in holders] == (["program/.env"])


# --- the holdout --------------------------------------------------------------------------------------------


def test_the_newest_days_are_never_trained_on(story: Story) -> None:
    """Two trainings whose bars differ in all of the holdout, and nowhere else, end with the same weights."""
    ours, theirs = (checkpoint(story.folder / name, "run1_epoch8.pt") for name in ("exam", "other exam"))
    assert ours["data_fingerprint"] != theirs["data_fingerprint"]
    assert is_same(ours["model"], theirs["model"])
    assert is_same(ours["features"], theirs["features"])
    for name in ("exam", "other exam"):
        saved = torch.load(
            story.folder / name / "checkpoints" / "resume" / "run1_epoch8.pt", weights_only=True
        )
        places = saved["ranks"][0]["env"]["open_time"]
        assert len(places) == 8 and int(places.max()) < story.exam_start_ns


# --- wrong settings -----------------------------------------------------------------------------------------


def test_a_wrong_setting_is_told_once_before_any_request(story: Story) -> None:
    for name, value in WRONG.items():
        start = story.starts[f"wrong {name}"]
        assert start.process.returncode == 2
        (line,) = start.lines  # with NPROC=2
        assert line.startswith(f"Invalid setting: {name}={value}") and "use " in line
        assert not (story.folder / f"wrong {name}" / "data").exists()
    assert story.num_requests_of_wrong_settings == 0
