"""The newest champions of a walk decide together, by the plain average of their probabilities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commands import walkforward
from commands.walkforward import Walk, training
from commands.walkforward.book import Book
from commands.walkforward.champions import FOLDER, Champions
from continuous_training import Settings, train
from data_sources.bars import MINUTE_NS
from envs.open_group_env import account_of
from evaluation import ensemble, ledger, plots, record
from evaluation.baselines import BUY_AND_HOLD
from evaluation.exam import CHAMPION, POLICY
from evaluation.open_walk import walk_on
from evaluation.trained_policy import TrainedPolicy
from models.ensemble import Ensemble
from monitoring.console import Console
from runtime.control import ExitProgram
from tests.commands import hourly
from tests.commands.test_walkforward import OPTIONS, STRENGTH, files_of, refused, settings_in, walk
from tests.evaluation.reports import Page


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hourly.plant(patch, strength=STRENGTH)
        patch.setattr(plots, "as_png", lambda _: b"")
        patch.setattr(plots, "as_svg", lambda *_: "<svg/>")
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every champion that walks have kept, by walk and window."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> tuple[Path, Book]:
    return walk_and_keep(tmp_path_factory.mktemp("warm"), kept / "warm")


def walk_and_keep(folder: Path, kept: Path, **changes: Any) -> tuple[Path, Book]:
    drop = Champions.drop_others

    def keep(self: Champions, results: Any) -> None:
        shutil.copytree(self.folder / FOLDER, kept, dirs_exist_ok=True)
        drop(self, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Champions, "drop_others", keep)
        return folder, walk(folder, ensemble=2, **changes)


def accounts_by_hand(folder: Path, book: Book, number: int, paths: list[Path]) -> dict[str, Any]:
    """Let these checkpoints decide together in a window, as ``evaluate`` and ``paper`` would."""
    together = ensemble.read(paths, Settings)
    assert isinstance(together.policy, Ensemble)
    settings, row = settings_in(folder), book.results[number - 1]
    with Console(folder / "log") as console:
        lake = Walk(settings, train, OPTIONS, console)._lake
    window = SimpleNamespace(start_ns=row["start_ns"], end_ns=row["end_ns"])
    symbols = list(row["symbols"])
    market = together.market(walkforward.out_of_sample._bars_until(window.end_ns, symbols, lake, settings))
    before = Book(folder, {}, book.results[: number - 1]).accounts
    given = {"decides_from_ns": window.start_ns - MINUTE_NS, "end_ns": window.end_ns}
    walks = walk_on(together.policy, market, together.env_config(1), symbols, before, **given)
    kept = {symbol: asdict(account) for symbol, account in walks.accounts[POLICY].items()}
    return dict(json.loads(json.dumps(kept)))


def test_the_newest_champions_decide_by_the_average_of_their_probabilities(
    walked: tuple[Path, Book], kept: Path
) -> None:
    folder, book = walked
    older, newer = list(dict.fromkeys(row["champion"] for row in book.results))
    assert [row["members"] for row in book.results] == [[older], [newer, older], [newer, older]]
    paths = [kept / "warm" / name for name in ("0002.pt", "0001.pt")]
    for number in (2, 3):
        accounts = book.results[number - 1]["accounts"]
        assert accounts[POLICY] == accounts_by_hand(folder, book, number, paths)
        assert accounts[POLICY] != accounts[CHAMPION]


def test_the_champion_alone_walks_beside_as_the_daemons_record_says(walked: tuple[Path, Book]) -> None:
    folder, book = walked
    kept = record.read(folder / "walk" / "training")
    for name, own in ((CHAMPION, POLICY), (BUY_AND_HOLD, BUY_AND_HOLD)):
        stands = book.results[1]["accounts"][name]
        assert kept.accounts[own] == {s: account_of(a) for s, a in stands.items()}
    assert "ensemble=2 there, 1 here; give what it was begun with" in refused(folder)


def test_page_and_figures_say_who_decided(walked: tuple[Path, Book]) -> None:
    folder, book = walked
    report = folder / "report" / "walkforward_walk"
    content, page = (
        json.loads((report / "walkforward.json").read_text()),
        Page((report / "walkforward.html").read_bytes()),
    )
    assert [row["members"] for row in content["windows"]] == [row["members"] for row in book.results]
    assert content["measures"].keys() >= {POLICY, CHAMPION}
    assert content["above_champion"]["interval"] and content["above_champion"]["certainty"]
    assert f"with {book.results[2]['members'][1]}" in page.text and "Deciding together was worth" in page.text
    assert page.text.count("champion alone") == 3  # who earned what, what it was worth, the windows
    assert "the newest 2 champions, by the average of their probabilities" in page.text


@pytest.mark.drill  # several walks
def test_a_kill_between_two_windows_changes_no_byte(
    walked: tuple[Path, Book], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = files_of(walked[0])
    for method in ("append", "drop_others"):  # before the window counts, and before champions are removed
        owner = Book if method == "append" else Champions

        def dies(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(ExitProgram):
            patch.setattr(owner, method, dies)
            walk(tmp_path, ensemble=2)
    walk(tmp_path, ensemble=2)
    assert files_of(tmp_path) == reference


def test_fresh_champions_see_each_their_own_scale(tmp_path: Path, kept: Path) -> None:
    settings = settings_in(tmp_path, seed=1)  # with which both windows have a champion
    folder, book = walk_and_keep(
        tmp_path, kept / "fresh", settings=settings, fresh=True, first_day="2026-01-22"
    )
    paths = [kept / "fresh" / name for name in ("0002.pt", "0001.pt")]
    one, other = (TrainedPolicy.read(path, Settings).statistics for path in paths)
    assert not torch.equal(one.mean, other.mean)
    accounts = book.results[1]["accounts"]
    assert accounts[POLICY] == accounts_by_hand(folder, book, 2, paths)
    assert len({json.dumps(accounts[name]) for name in (POLICY, CHAMPION, "first champion")}) == 3


def test_one_that_lost_its_title_does_not_decide(walked: tuple[Path, Book], tmp_path: Path) -> None:
    folder, book = walked
    own, former = book.results[2]["members"]
    copy = tmp_path / "walk"
    shutil.copytree(folder / "walk", copy)
    champions = Champions(copy, 2, is_fresh=False)

    def deciding() -> list[str]:
        return [champion.name for champion in champions.of(3, copy, book.results[:2])]

    assert deciding() == [own, former]
    path = training.training_in(copy) / ledger.NAME
    ledger.append(path, ledger.read(path)[-1] | {"run": 4, "dethroned": former})
    assert deciding() == [own]
    (training.training_in(copy) / "best.pt").unlink()
    assert deciding() == []


def test_only_champions_that_still_decide_are_kept(tmp_path: Path) -> None:
    def left(is_fresh: bool, *names: str | None) -> list[str]:
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        rows = [{"number": number, "champion": name} for number, name in enumerate(names, 1)]
        for row in rows:
            (tmp_path / FOLDER / f"{row['number']:04d}.pt").touch()
        Champions(tmp_path, 2, is_fresh).drop_others(rows)
        return sorted(path.stem for path in (tmp_path / FOLDER).iterdir())

    assert left(False, "a", "a", "b", "b", "c") == ["0003", "0005"]
    assert left(False, "a", "b", None) == [
        "0001",
        "0002",
    ]  # in cash; they may decide once there is a champion
    assert left(True, "a", "a", None, "a") == ["0002", "0004"]


def test_a_champion_that_is_gone_is_one_line(walked: tuple[Path, Book], tmp_path: Path) -> None:
    shutil.copytree(walked[0] / "walk", tmp_path / "walk")
    (tmp_path / "walk" / "windows" / "0003.json").unlink()
    (tmp_path / "walk" / FOLDER / "0001.pt").unlink()
    text = refused(tmp_path, ensemble=2)
    assert text.endswith(
        "0001.pt cannot be read: No such file or directory; put it back, or begin another walk with --output"
    )
