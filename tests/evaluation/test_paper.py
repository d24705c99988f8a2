"""Paper accounts, minute by minute under faults, are to the bit what an exam of the same minutes says."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sources.bars import MINUTE_NS, Bars
from evaluation import record
from evaluation.exam import Walk, examine
from evaluation.open_walk import walk_on
from evaluation.paper import SETTLED_MINUTES, Minute, PaperState, run_minute
from evaluation.paper_book import LINES, STATE, Book, BookError
from evaluation.portfolio import Portfolio
from evaluation.trained_policy import Actor
from tests.envs.markets import HORIZON, NEVER, config_of, funded, market_of, walk
from tests.evaluation.test_open_walk import policy_of
from tests.program import ROOT

COINS = (funded(walk("AAA", 200, asset_class="perpetual")), walk("BBB", 190, seed=1, gaps={100: 3}))
MARKET = market_of(*COINS)
CONFIG = config_of(episode_bars=2 * HORIZON, borrow_rate=5.0, range_slippage=0.05, volume_slippage=0.001)
ACTOR = Actor(policy_of(MARKET), MARKET.statistics, CONFIG)
FIRST = 60  # minutes: the bar at whose close it begins
LAST = 106
COLUMNS = ("time", "price", "position", "log_returns", "costs", "traded", "borrowing", "funding")
Source = Callable[[int], list[Bars]]  # what the sources have at a time
SYMBOLS = ("AAA", "BBB")


def time_of(minute: int) -> int:
    """A few seconds after so many minutes."""
    return int(COINS[0].open_time[0]) + minute * MINUTE_NS + 6 * 10**9


def on_time(now_ns: int) -> list[Bars]:
    return [bars.between(0, now_ns - MINUTE_NS + 1) for bars in COINS]


class Life:
    """Paper accounts, and all that they have decided and booked."""

    def __init__(
        self, source: Source, actor: Actor | None = None, at: Callable[[int], int] | None = None
    ) -> None:
        self.source, self.actor, self.at = source, actor or ACTOR, at or time_of
        self.state = PaperState()
        self.minutes: list[Minute] = []
        self.decided: dict[str, dict[int, tuple[float, ...]]] = {}

    def run(self, first: int = FIRST, last: int = LAST) -> Life:
        for minute in range(first, last):
            now_ns = self.at(minute)
            done = run_minute(self.actor, self.state, self.source(now_ns), now_ns)
            self.minutes.append(done)
            self.state = done.state
            for key, own in done.state.decided.items():
                self.decided.setdefault(key, {}).update(own)
        return self

    def booked(self, name: str, symbol: str) -> Walk:
        pieces = [w for m in self.minutes for w in m.booked[name] if w.symbol == symbol]
        columns = [np.concatenate([getattr(piece, column) for piece in pieces]) for column in COLUMNS]
        return Walk(symbol, pieces[0].asset_class, *columns)

    def found(self, what: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for minute in self.minutes:
            for symbol, times in getattr(minute, what).items():
                found.setdefault(symbol, []).extend(times)
        return found


def assert_equal(ours: Walk, theirs: Walk) -> None:
    count = min(len(ours.time), len(theirs.time))
    assert count > 30
    for column in COLUMNS:
        assert np.array_equal(getattr(ours, column)[:count], getattr(theirs, column)[:count]), column


@pytest.fixture(scope="module")
def plain() -> Life:
    return Life(on_time).run()


def test_minute_by_minute_is_one_exam_to_the_bit(plain: Life) -> None:
    exam = examine(ACTOR.policy, MARKET, CONFIG, SYMBOLS, time_of(FIRST - 1) - 6 * 10**9, NEVER)
    positions = set()
    for symbol in SYMBOLS:
        walked = plain.booked("policy", symbol)
        made = [trade for minute in plain.minutes for trade in minute.trades if trade.symbol == symbol]
        rows = np.flatnonzero(walked.traded > 0)
        assert [trade.time_ns for trade in made] == walked.time[rows].astype(np.int64).tolist()
        for trade, row in zip(made, rows, strict=True):
            found = trade.price, trade.after, trade.traded
            assert found == (walked.price[row], walked.position[row], walked.traded[row])  # to the bit
            left = 1 - trade.costs
            assert abs(trade.after * left - trade.before) == pytest.approx(trade.traded, abs=1e-12)
    for name in ("policy", "buy and hold"):
        for number, symbol in enumerate(SYMBOLS):
            assert_equal(plain.booked(name, symbol), exam[name][number])
            positions |= set(plain.booked(name, symbol).position.round())
    assert positions == {-1, 0, 1}
    assert not plain.found("late") and not plain.found("revised") and not plain.found("inserted")
    waiting = {symbol: len(own) for symbol, own in plain.state.decided.items()}
    assert waiting["AAA"] == 2 + SETTLED_MINUTES


def test_a_decision_is_known_before_its_fill(plain: Life) -> None:
    targets = {}
    for number, minute in enumerate(plain.minutes):
        for symbol, (target,) in minute.targets.items():
            targets[symbol, time_of(FIRST + number) // MINUTE_NS] = target
    for symbol in SYMBOLS:
        booked = plain.booked("policy", symbol)
        for filled, position, traded in zip(booked.time, booked.position, booked.traded, strict=True):
            target = targets.get((symbol, int(filled.astype(np.int64)) // MINUTE_NS))
            if target is not None and traded:
                assert position == pytest.approx(target)


def late(bar: int, by: int, symbol: str = "AAA") -> Source:
    """One bar comes so many minutes late."""

    def source(now_ns: int) -> list[Bars]:
        return [
            bars.select(bars.open_time != time_of(bar) - 6 * 10**9).with_funding(
                bars.funding[bars.open_time != time_of(bar) - 6 * 10**9]
            )
            if bars.symbol == symbol and bars.funding is not None and now_ns < time_of(bar + 1 + by)
            else bars
            for bars in on_time(now_ns)
        ]

    return source


def test_a_bar_that_comes_after_newer_ones_is_booked_all_the_same(plain: Life) -> None:
    life = Life(late(85, by=3)).run()
    missed = time_of(85) - 6 * 10**9
    assert life.found("late") == life.found("inserted") == {"AAA": [missed]}
    ours, theirs = life.booked("policy", "AAA"), plain.booked("policy", "AAA")
    assert np.array_equal(ours.time, theirs.time)
    before = ours.time.astype(np.int64) <= missed
    for column in COLUMNS:
        assert np.array_equal(getattr(ours, column)[before], getattr(theirs, column)[before])
    held = life.booked("buy and hold", "AAA")
    assert np.array_equal(held.log_returns, plain.booked("buy and hold", "AAA").log_returns)


def test_a_bar_that_comes_late_is_no_decision_and_the_rest_is_the_exam_that_holds_there() -> None:
    life = Life(late(85, by=1)).run()
    missed = time_of(85) - 6 * 10**9
    assert life.found("late") == {"AAA": [missed]} and not life.found("inserted")
    # An exam whose account may not decide at that bar.
    first = walk_on(
        ACTOR.policy, MARKET, CONFIG, SYMBOLS, {}, decides_from_ns=time_of(FIRST - 1) - 6 * 10**9,
        end_ns=missed + 2 * MINUTE_NS,
    )  # fmt: skip
    held = walk_on(
        ACTOR.policy, MARKET, CONFIG, SYMBOLS, first.accounts, decides_from_ns=missed + MINUTE_NS,
        end_ns=missed + 3 * MINUTE_NS,
    )  # fmt: skip
    rest = walk_on(ACTOR.policy, MARKET, CONFIG, SYMBOLS, held.accounts, decides_from_ns=0, end_ns=NEVER)
    expected = [w for piece in (first, held, rest) for w in piece.walks["policy"] if w.symbol == "AAA"]
    joined = Walk("AAA", "perpetual", *(np.concatenate([getattr(w, c) for w in expected]) for c in COLUMNS))
    assert_equal(life.booked("policy", "AAA"), joined)


def test_a_source_that_is_down_is_no_trade_and_said_and_its_bars_are_booked_later() -> None:
    def source(now_ns: int) -> list[Bars]:
        down = time_of(80) <= now_ns < time_of(86)
        return on_time(time_of(79)) if down else on_time(now_ns)

    life = Life(source).run()
    silent = life.minutes[81 - FIRST]
    assert not silent.targets and "stale: its newest bar closed 2 minutes ago" in silent.waiting["AAA"]
    assert len(life.found("late")["AAA"]) == 6
    exam = examine(ACTOR.policy, MARKET, CONFIG, SYMBOLS, time_of(FIRST - 1) - 6 * 10**9, NEVER)
    ours, theirs = life.booked("policy", "AAA"), exam["policy"][0]
    assert np.array_equal(ours.time, theirs.time[: len(ours.time)])
    held = (ours.time.astype(np.int64) > time_of(80) - 10**10) & (ours.time.astype(np.int64) < time_of(86))
    assert not ours.traded[held].any()
    assert np.array_equal(
        life.booked("buy and hold", "AAA").log_returns, exam["buy and hold"][0].log_returns[: len(ours.time)]
    )


def test_a_revised_bar_is_told_once_and_what_was_booked_stays() -> None:
    wrong = time_of(85) - 6 * 10**9

    def source(now_ns: int) -> list[Bars]:
        bars = on_time(now_ns)
        if now_ns >= time_of(88):
            return bars
        close = np.where(bars[0].open_time == wrong, bars[0].close * 1.001, bars[0].close)
        return [replace(bars[0], close=close, high=np.maximum(bars[0].high, close)), bars[1]]

    life = Life(source).run()
    assert life.found("revised") == {"AAA": [wrong]}
    exam = examine(ACTOR.policy, MARKET, CONFIG, SYMBOLS, time_of(FIRST - 1) - 6 * 10**9, NEVER)
    ours, theirs = life.booked("policy", "AAA"), exam["policy"][0]
    before = ours.time.astype(np.int64) < wrong
    for column in COLUMNS:
        assert np.array_equal(getattr(ours, column)[before], getattr(theirs, column)[: before.sum()])
    assert np.array_equal(ours.time, theirs.time[: len(ours.time)])
    # It was put right before it was booked: only what was decided in between can differ.
    assert np.array_equal(
        life.booked("buy and hold", "AAA").log_returns, exam["buy and hold"][0].log_returns[: len(ours.time)]
    )


def test_a_row_of_funding_that_comes_late_is_paid_once() -> None:
    rate, due = -4e-3, time_of(75) - 6 * 10**9  # a payment that none of the rates before foretold

    def source(now_ns: int) -> list[Bars]:
        coin, other = on_time(now_ns)
        assert coin.funding is not None
        is_known = (coin.open_time == due) & (now_ns > time_of(90))
        return [coin.with_funding(coin.funding + np.where(is_known, rate, 0.0)), other]

    life, in_time = Life(source).run(), COINS[0]
    assert life.found("late_funding") == {"AAA": [(due, pytest.approx(rate, rel=1e-3))]}
    known = in_time.with_funding(in_time.funding + np.where(in_time.open_time == due, rate, 0.0))
    market = market_of(known, COINS[1], statistics=MARKET.statistics)
    begin = time_of(FIRST - 1) - 6 * 10**9
    exam, missed = (examine(ACTOR.policy, m, CONFIG, SYMBOLS, begin, NEVER) for m in (market, MARKET))
    for name in ("policy", "buy and hold"):
        ours, theirs = life.booked(name, "AAA"), exam[name][0]
        earned, without = (walked.log_returns[: len(ours.time)].sum() for walked in (theirs, missed[name][0]))
        assert ours.log_returns.sum() == pytest.approx(earned, abs=5e-5)
        assert abs(earned - without) > 1e-3
    config = replace(CONFIG, borrow_rate=0.0, range_slippage=0.0, volume_slippage=0.0)
    portfolios = Portfolio(gross=1.0, num_symbols=2), Portfolio(gross=1.0, num_symbols=2)
    for minute in life.minutes:
        portfolios[0].follow(minute.fills, config, minute.late_funding)
        portfolios[1].follow(minute.fills, config)
    account = life.state.accounts["policy"]["AAA"]
    (value,) = [charge.value for charge in account.charges if charge.time_ns == due]
    assert value and portfolios[0].funding - portfolios[1].funding == pytest.approx(
        value / 2 * rate, rel=0.05
    )


# --- the folder -------------------------------------------------------------------------------------------------

IDENTITY = {"training": "0123456789abcdef"}


def test_a_restart_after_every_minute_changes_nothing(plain: Life, tmp_path: Path) -> None:
    book = Book.open(tmp_path, IDENTITY)
    life = Life(on_time)
    for minute in range(FIRST, FIRST + 20):
        done = run_minute(ACTOR, book.state, on_time(time_of(minute)), time_of(minute))
        book.save(done.state, {}, [{"minute": minute}])
        life.minutes.append(done)
        # Twice in one minute, as after a kill: nothing is decided or booked again.
        again = run_minute(ACTOR, book.state, on_time(time_of(minute)), time_of(minute) + 10**10)
        assert not any(again.booked["policy"]) and again.state == done.state and again.targets == done.targets
        book = Book.open(tmp_path, IDENTITY)
        assert book.state == done.state
    for number, minute in enumerate(life.minutes):
        assert minute.state == plain.minutes[number].state


def test_a_kill_between_any_two_bytes_loses_no_line_and_doubles_none(tmp_path: Path) -> None:
    book = Book.open(tmp_path, IDENTITY)
    for number in range(3):
        book.save(PaperState(minute_ns=number), {}, [{"n": 2 * number}, {"n": 2 * number + 1}])
    state, whole = (tmp_path / STATE).read_bytes(), (tmp_path / LINES).read_bytes()
    for size in range(len(whole) * 2 // 3, len(whole) + 1):
        (tmp_path / LINES).write_bytes(whole[:size])
        assert Book.open(tmp_path, IDENTITY).state.minute_ns == 2
        assert (tmp_path / LINES).read_bytes() == whole
    for content, text in ((whole[:5], "was edited"), (whole + b"{}\n", "was edited")):
        (tmp_path / LINES).write_bytes(content)
        with pytest.raises(BookError, match=text):
            Book.open(tmp_path, IDENTITY)
    (tmp_path / LINES).write_bytes(whole)
    with pytest.raises(BookError, match="accounts of another training"):
        Book.open(tmp_path, {"training": "other"})
    for damaged in (state[:100], b"{}", b"[]"):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(BookError, match="is damaged"):
            Book.open(tmp_path, IDENTITY)
    (tmp_path / STATE).unlink()
    with pytest.raises(BookError, match="is missing"):
        Book.open(tmp_path, IDENTITY)


ENDLESS = """
import sys
from pathlib import Path
from evaluation import record
from evaluation.paper import PaperState
from evaluation.paper_book import Book
folder = Path(sys.argv[1])
book, kept = Book.open(folder, {}), record.read(folder)
kept.complete()
while True:
    print("another", flush=True)
    n = book.state.minute_ns
    book.save(PaperState(minute_ns=n + 1), {}, [{"n": 2 * n}, {"n": 2 * n + 1}])
    m = len(kept.lines) // 2
    kept.append([{"n": 2 * m}, {"n": 2 * m + 1}], {})
"""


@pytest.mark.drill
def test_real_kills_at_random_instants_lose_no_line_and_double_none(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(6):
        command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(random.integers(1, 40)):
                assert child.stdout.readline() == b"another\n"
            time.sleep(random.uniform(0.0, 0.005))
            child.kill()
    book, kept = Book.open(tmp_path, {}), record.read(tmp_path)
    kept.complete()
    assert [line["n"] for line in book.lines()] == list(range(2 * book.state.minute_ns))
    assert not kept.faults and [line["n"] for line in kept.lines] == list(range(len(kept.lines)))
    assert (tmp_path / record.NAME).read_text().count("\n") == len(kept.lines)
    assert min(book.state.minute_ns, len(kept.lines)) > 20


def test_a_full_disk_leaves_the_minute_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book.open(tmp_path, IDENTITY)
    book.save(PaperState(minute_ns=1), {"a": 1}, [{"n": 0}])

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("write_atomically", "append_durably"):
        with monkeypatch.context() as patch:
            patch.setattr(f"evaluation.paper_book.{place}", refuse)
            with pytest.raises(OSError, match="No space"):
                book.save(PaperState(minute_ns=2), {"a": 2}, [{"n": 1}])
        book = Book.open(tmp_path, IDENTITY)
        assert book.state.minute_ns == (1 if place == "write_atomically" else 2)
        assert [line["n"] for line in book.lines()] == list(range(book.state.minute_ns))
