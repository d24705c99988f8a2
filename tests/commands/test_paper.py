"""The command ``paper``: a loopback Binance minute by minute, with faults and a restart, and what was booked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from commands import paper, paper_report
from commands.check.report import Line
from commands.paper import PaperOptions
from commands.signals import request_of
from continuous_training import Settings
from data_sources.bars import MINUTE_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.sources import Answer
from envs.market import Market
from envs.open_group_env import account_of
from evaluation import ensemble
from evaluation.open_walk import walk_on
from evaluation.paper import SETTLED_MINUTES
from evaluation.paper_book import LINES, STATE
from evaluation.trained_policy import NEVER_NS, TrainedPolicy
from monitoring.console import Console
from runtime.control import ExitProgram
from runtime.files import sha256_of
from runtime.locking import FolderLock
from tests.data_sources.vendors.binance_server import BinanceServer
from tests.data_sources.vendors.loopback import Fault
from tests.evaluation.members import save_member
from tests.evaluation.reports import Page
from tests.training.checkpoints import NOW, PAIRS, untrained

START = NOW // MINUTE_NS * MINUTE_NS + 6 * 10**9


@pytest.fixture(scope="module")
def server() -> Iterator[BinanceServer]:
    with BinanceServer(NOW) as running:
        yield running


class Trader:
    """A paper account whose clock is moved by hand."""

    def __init__(self, folder: Path, server: BinanceServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.server, self.capsys = folder, server, capsys
        self.path = untrained(folder)
        self.others: list[Path] = []  # further members
        self.now_ns = START
        self.said = ""

    def run(
        self,
        minutes: int,
        settings: Any = (),
        between: Mapping[int, Callable[[], object]] = MappingProxyType({}),
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Start it for so many minutes, with something done before some of them; return what it printed."""
        slept = 0

        def clock() -> int:
            self.server.now_ns = self.now_ns
            return self.now_ns

        def sleep(seconds: float) -> None:
            nonlocal slept
            slept += 1
            self.now_ns += MINUTE_NS
            between.get(slept, lambda: None)()

        trained = ensemble.read([self.path, *self.others], Settings, **dict(settings))
        given = PaperOptions(folder=self.folder / "paper", minutes=minutes, as_json=True)
        with Console(self.folder / "logs", to_stderr=True) as console:
            paper.run(trained, replace(given, **options), console, clock, sleep)
        self.now_ns += MINUTE_NS
        out, self.said = self.capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "paper" / LINES).read_text().splitlines()]

    @property
    def accounts(self) -> dict[str, Any]:
        content = json.loads((self.folder / "paper" / STATE).read_text())
        return dict(content["state"]["accounts"])


@pytest.fixture
def trader(
    server: BinanceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Trader:
    server.now_ns = NOW
    server.faults.clear()
    monkeypatch.setenv("BINANCE_API_URL", server.url)
    monkeypatch.setenv("BINANCE_ARCHIVE_URL", server.url)
    return Trader(tmp_path, server, capsys)


def test_two_starts_earn_what_an_exam_of_the_same_minutes_says(trader: Trader) -> None:
    contents = [*trader.run(6, gross=1.0), *trader.run(SETTLED_MINUTES + 6, gross=1.0)]
    trained = TrainedPolicy.read(trader.path, Settings)
    data = load(Lake(Path(trained.settings.data_dir)), request_of(trained.settings, trader.now_ns, ()))
    market = Market.from_settings(data.bars, trained.settings, trained.device, NEVER_NS, trained.statistics)
    settled_ns = trader.now_ns // MINUTE_NS * MINUTE_NS - (1 + SETTLED_MINUTES) * MINUTE_NS
    exam = walk_on(
        trained.policy,
        market,
        trained.env_config(1),
        PAIRS,
        {},
        START // MINUTE_NS * MINUTE_NS - MINUTE_NS,
        settled_ns,
    )
    fills = [line for line in trader.lines if line["kind"] == "fill"]
    for name in ("policy", "buy and hold"):
        for symbol in PAIRS:
            assert account_of(trader.accounts[name][symbol]) == exam.accounts[name][symbol]  # to the bit
    assert len(fills) == sum(int((walk.traded > 0).sum()) for walk in exam.walks["policy"])
    last = contents[-1]
    assert len(contents) == 12 + SETTLED_MINUTES and last["trades"] == len(fills)
    assert len({(line["time"], line["symbol"]) for line in fills}) == len(fills)  # none twice
    assert {row["symbol"] for row in last["symbols"]} == set(PAIRS)
    assert all(row["target"] in (-1.0, 0.0, 1.0) for row in last["symbols"])
    assert 0 <= last["portfolio"]["exposure"] <= 1.001
    page = Page((trader.folder / "paper" / "paper.html").read_bytes())
    page.loads_nothing()
    assert "No orders were sent" in page.text


def test_accounts_over_groups_earn_what_an_exam_of_the_same_minutes_says(trader: Trader) -> None:
    trader.path = untrained(trader.folder, account="pair", net_exposure=1.0)
    with pytest.raises(
        ValueError, match="--portfolio is of single accounts: those of account=pair have caps of"
    ):
        trader.run(1, gross=1.0)
    contents = [*trader.run(4), *trader.run(SETTLED_MINUTES + 4)]
    trained = TrainedPolicy.read(trader.path, Settings)
    data = load(Lake(Path(trained.settings.data_dir)), request_of(trained.settings, trader.now_ns, ()))
    market = Market.from_settings(data.bars, trained.settings, trained.device, NEVER_NS, trained.statistics)
    first_ns = START // MINUTE_NS * MINUTE_NS - MINUTE_NS
    settled_ns = first_ns + (len(contents) - SETTLED_MINUTES) * MINUTE_NS
    exam = walk_on(
        trained.policy, market, trained.env_config(1), market.symbols, {}, first_ns, settled_ns
    )  # fmt: skip
    (group,) = exam.accounts["policy"]
    for name in ("policy", "buy and hold"):
        expected = json.loads(json.dumps(asdict(exam.accounts[name][group])))
        assert trader.accounts[name] == {group: expected}  # to the bit
    fills = [line for line in trader.lines if line["kind"] == "fill"]
    assert len(fills) == contents[-1]["trades"] > 0
    assert {(line["group"], line["symbol"]) for line in fills} <= {(group, pair) for pair in market.symbols}
    walked = exam.walks["policy"][0]
    assert sum(line["traded"] for line in fills) == pytest.approx(walked.traded.sum())
    assert {line["time"] for line in fills} == {str(t)[:16] for t in walked.time[walked.traded > 0]}
    assert all(line["from"] != line["to"] and line["costs"] > 0 for line in fills)
    rows = contents[-1]["symbols"]
    assert [(row["group"], row["symbol"]) for row in rows] == [(group, pair) for pair in market.symbols]
    assert [row["position"] for row in rows] == list(exam.accounts["policy"][group].weight)
    assert "group 1: BTCUSDT" in Page((trader.folder / "paper" / "paper.html").read_bytes()).text
    (_, columns, table_rows) = paper_report.table(contents[-1])
    assert columns[:2] == ["group", "symbol"] and len(table_rows[0]) == len(columns)


def test_late_bars_sources_that_are_down_and_wrong_clocks_are_no_trade_and_said(
    trader: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trader.run(2)
    late = Fault(r"klines\?.*BTCUSDT", "rows", rows=lambda rows: rows[:-2])
    trader.server.faults.append(late)
    (content,) = trader.run(1)
    states = {row["symbol"]: (row["target"], row["state"]) for row in content["symbols"]}
    assert (
        states["BTCUSDT"][0] is None and "stale: its newest bar closed 1 minute ago" in states["BTCUSDT"][1]
    )
    assert states["ETHUSDT"][0] is not None
    trader.server.faults[:] = [Fault("/api/v3/klines", status=451)]
    (content,) = trader.run(1)
    assert "(ETHUSDT)" in trader.said
    assert (
        "No trade: stale: its newest bar closed " in trader.said
        and "sources are down, or this clock is ahead" in trader.said
    )
    trader.server.faults.clear()
    trader.run(SETTLED_MINUTES + 3)
    assert "BTCUSDT: bar" in trader.said and "came too late" in trader.said
    behind = trader.now_ns
    trader.now_ns -= 10 * MINUTE_NS
    assert trader.run(1) == []
    assert "No trade: the clock went back" in trader.said
    trader.now_ns = behind
    off = Line("clock", "warning", "90 s behind api.example.com's: set it, as with timedatectl set-ntp true")
    monkeypatch.setattr(paper, "check_clock", lambda answers: off)
    (content,) = trader.run(1)
    assert "No trade: this clock is 90 s behind api.example.com's" in trader.said
    assert all(row["target"] is None for row in content["symbols"])


def test_a_bar_that_changes_makes_it_look_at_the_clock(
    trader: Trader, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def look(answers: Sequence[Answer]) -> Line:
        looks.append(trader.now_ns)
        return check_clock(answers)

    def half_made(rows: list[list[Any]]) -> list[list[Any]]:
        *before, row, running = rows
        return [*before, [*row[:4], row[1], *row[5:]], running]  # its close is its open

    check_clock = paper.check_clock
    monkeypatch.setattr(paper, "check_clock", look)
    wrong = Fault("klines", "rows", rows=half_made)
    faults = trader.server.faults
    trader.run(6, between={2: lambda: faults.append(wrong), 3: faults.clear})
    assert "changed since: used as they are now until they are booked" in trader.said
    assert [(time_ns - START) // MINUTE_NS for time_ns in looks] == [0, 3, 4]


def test_a_new_champion_is_followed(trader: Trader) -> None:
    trader.run(1)
    other = untrained(trader.folder / "other")
    best = trader.path
    best.write_bytes(other.read_bytes())
    contents = trader.run(1)
    assert contents[0]["checkpoint"] == "run1_epoch2.pt"


def test_a_champion_that_loses_its_title_goes_to_cash_until_there_is_another(trader: Trader) -> None:
    best = trader.path.with_name("best.pt")
    trader.path.rename(best)
    trader.path = best
    taken = trader.path.with_name("dethroned.pt")
    contents = trader.run(9, between={2: lambda: best.rename(taken), 7: lambda: taken.rename(best)})
    targets = [{row["target"] for row in content["symbols"]} for content in contents]
    assert targets[2:7] == [{0.0}] * 5 and all(-1.0 in own or 1.0 in own for own in (targets[1], targets[7]))
    assert (
        trader.said.count("best.pt lost its title: accounts go to cash until there is another champion") == 1
    )
    assert "run1_epoch2.pt decides from now on, after run1_epoch2.pt" in trader.said
    contents = trader.run(2, between={1: best.unlink})  # pruned, or deleted
    assert contents[1]["symbols"][0]["target"] is not None


def test_an_ensemble_follows_its_members_and_writes_down_who_decides(trader: Trader) -> None:
    other = save_member(trader.folder / "b", 2, d_model=16)
    trader.others = [other]
    first = sha256_of(other)

    def change() -> None:
        save_member(trader.folder / "b", 3, d_model=16)

    contents = trader.run(3, between={1: change, 2: lambda: other.write_bytes(b"torn")})
    assert [content["checkpoint"].count(" + ") for content in contents] == [1, 1, 1]
    deciding = [line["members"] for line in trader.lines if line["kind"] == "deciding"]
    assert [member["sha256"] for member in deciding[0]] == [sha256_of(trader.path), first]
    assert len(deciding) == 2 and deciding[1][0] == deciding[0][0] and deciding[1][1] != deciding[0][1]
    assert "b/checkpoints/run1_epoch2.pt decides from now on, after " in trader.said
    assert "run1_epoch2.pt is " in trader.said and "goes on deciding" in trader.said
    assert all(row["target"] is not None for content in contents for row in content["symbols"])


def test_one_folder_is_one_papers(trader: Trader) -> None:
    trader.run(1)
    with FolderLock(trader.folder / "paper").hold():
        with pytest.raises(ExitProgram, match=r"is used by another paper, process \d+: stop it") as failure:
            trader.run(1)
        assert failure.value.code == 75
    with pytest.raises(ExitProgram, match="has accounts of another symbols, gross: use another --output"):
        trader.run(1, symbols=("BTCUSDT",), gross=0.5)
    with pytest.raises(ValueError, match="--end-date none lifts that"):
        trader.run(1, settings={"end_date": "2026-11-19"})
    with pytest.raises(ValueError, match="sources=simulated has no live bars"):
        trader.run(1, settings={"sources": ("simulated",)})
    with pytest.raises(ValueError, match="--gross -1 must be above 0"):
        trader.run(1, gross=-1.0)
    with pytest.raises(ValueError, match="--symbols NOPE"):
        trader.run(1, symbols=("NOPE",))
    (trader.folder / "paper" / STATE).write_text("{")
    with pytest.raises(ExitProgram, match=r"paper\.state is damaged"):
        trader.run(1)
