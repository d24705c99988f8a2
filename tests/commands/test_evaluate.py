"""``evaluate``: an exam on demand, as the options say; a mistake is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from commands import evaluate_command
from commands.cli import checkpoint_command_from
from continuous_training import Settings
from evaluation import plots
from runtime.files import sha256_of
from tests.evaluation.reports import Page
from tests.program import ALONE, SEGMENTS_OF_AN_HOUR, Start, checkpoint, tiny_flags

# Three days, of which the last one is held out.
FLAGS = {
    **SEGMENTS_OF_AN_HOUR,
    "simulated_symbols": 2,
    "simulated_bars": 4_320,
    "holdout_days": 1,
    "feature_encoding": "linear",  # so short a training trades with it
    "epochs": 2,
    "runs": 1,
}
NAME = "run1_epoch2"
FOLDER = "run1-epoch2_2026-01-31_2026-01-31"
# Never ends by itself: its first segment means that it is at work.
FOR_EVER = """
import sys, time
from commands import evaluate
def examine(*_, on_segment, **__):
    on_segment(1, 100)
    while True:
        time.sleep(0.01)
evaluate.examine_accounts = examine
import continuous_training
continuous_training.main()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training of two epochs in it."""
    folder = tmp_path_factory.mktemp("trained")
    Start(folder / "out", [*ALONE, *tiny_flags(folder, **FLAGS)]).ends_well()
    return folder


@pytest.fixture(scope="module")
def ask(trained: Path) -> Callable[..., Result]:
    """Evaluate as on the command line, in this process."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(checkpoint_command_from(Settings, evaluate_command))

    def invoke(folder: Path, *words: str | Path, path: Path | None = None) -> Result:
        where = path or trained / "checkpoints" / f"{NAME}.pt"
        threads = torch.get_num_threads()
        result = CliRunner().invoke(app, [*map(str, (where, "--report-dir", folder, *words))])
        assert torch.get_num_threads() == threads
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture(scope="module")
def reported(ask: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("reports")
    return folder, ask(folder, "--costs", "6,0,6")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ``reported``, which is older than this, has real pictures; each takes half a second."""
    monkeypatch.setattr(plots, "as_png", lambda figure: b"png")
    monkeypatch.setattr(plots, "as_svg", lambda figure, name: "")


def report_in(folder: Path) -> dict[str, Any]:
    """Read the only report in a folder."""
    (path,) = folder.glob("*/report.json")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


# --- what is written --------------------------------------------------------------------------------------


def test_the_report_is_one_folder(reported: tuple[Path, Result]) -> None:
    folder, result = reported
    assert result.exit_code == 0, result.output
    assert [path.name for path in folder.iterdir()] == [FOLDER]
    names = {path.name for path in (folder / FOLDER).iterdir()}
    assert names >= {"report.html", "report.json", "equity.png", "drawdown.png", "costs.png", "training.png"}
    assert names >= {"returns.csv", "equity.csv", "trades.csv", "hours.png", "day.png"}
    assert sum(name.startswith("symbol") for name in names) == 2
    page = Page((folder / FOLDER / "report.html").read_bytes())
    page.loads_nothing()
    assert "2 epochs up to this checkpoint" in page.text


def test_the_terminal_shows_the_result(reported: tuple[Path, Result]) -> None:
    folder, result = reported
    lines = result.output.splitlines()
    assert lines[0] == "Evaluating run 1, epoch 2 on 2 symbols, 2026-01-30 23:59 to 2026-02-01 00:00 UTC"
    assert any(line.startswith("No edge on these days of a simulated market. It ") for line in lines)
    assert "too few to tell, 10 are needed" in result.output
    # Each of 44 is read once; the clock's segments of both symbols begin at midnight.
    assert "evaluation: 68 segments read and walked" in lines
    assert lines[-1].startswith(f"Wrote {folder / FOLDER / 'report.html'} in ")
    assert result.output.isascii()


def test_it_is_the_exam_of_the_training(trained: Path, ask: Callable[..., Result], tmp_path: Path) -> None:
    assert ask(tmp_path, "--costs", "").exit_code == 0
    report, exam = report_in(tmp_path), checkpoint(trained, f"{NAME}.pt")["exam"]["line"]
    assert report["cost_ladder"] == []
    assert report["trials"] == exam["trials"]
    assert report["first"][:16] == exam["first"] and report["last"][:16] == exam["last"]
    assert report["verdict"]["reason"] == exam["verdict_reason"]
    for name in ("policy", "buy and hold", "momentum"):
        assert report["pooled"][name] == pytest.approx(exam["pooled"][name])


def test_a_flat_cost_as_high_as_fee_and_slippage_gives_the_same_walk(reported: tuple[Path, Result]) -> None:
    report = report_in(reported[0])
    free, paid = report["cost_ladder"]
    assert (free["bps"], paid["bps"]) == (0.0, 6.0)  # 5 bps of fee and 1 of slippage
    assert {name: value for name, value in paid.items() if name != "bps"} == pytest.approx(
        report["pooled"]["policy"]
    )
    assert free["costs"] < paid["costs"]


def test_nothing_of_the_training_is_changed(
    trained: Path, ask: Callable[..., Result], tmp_path: Path
) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in trained.rglob("*") if path.is_file()}

    before = state()
    assert ask(tmp_path, "--costs", "").exit_code == 0
    assert state() == before


def test_evaluating_twice_gives_the_same_report(
    reported: tuple[Path, Result], ask: Callable[..., Result], tmp_path: Path
) -> None:
    assert ask(tmp_path, "--costs", "0,6").exit_code == 0
    again, report = report_in(tmp_path), report_in(reported[0])
    assert again.pop("made") | {"made": ""} == report.pop("made") | {"made": ""}
    assert is_same(again, report)


def test_symbols_dates_costs_and_fees_can_be_chosen(ask: Callable[..., Result], tmp_path: Path) -> None:
    # The simulated market has later days too, as another source would have new bars.
    words = "--from 2026-02-02 --to 2026-02-02 --symbols SIM001 --plot-symbols SIM001 --costs 3 --crypto-fee-bps 0"
    result = ask(tmp_path, *words.split())
    assert result.exit_code == 0, result.output
    report = report_in(tmp_path)
    assert [row["symbol"] for row in report["symbols"]] == ["SIM001"]
    assert report["first"][:10] == report["last"][:10] == "2026-02-02"
    assert report["made"]["fees"] == "stocks 0.5 bps, crypto 0 bps of traded value"
    assert [rung["bps"] for rung in report["cost_ladder"]] == [3.0]
    assert (tmp_path / "run1-epoch2_2026-02-02_2026-02-02" / "symbol1_SIM001.png").exists()


def test_days_of_the_training_are_shown_with_a_stamp_only(ask: Callable[..., Result], tmp_path: Path) -> None:
    result = ask(tmp_path, "--from", "2026-01-30", "--to", "2026-01-30", "--costs", "", "--allow-overlap")
    assert result.exit_code == 0, result.output
    assert "Not an exam: it was trained on some of these days." in result.output
    report = report_in(tmp_path)
    assert report["overlaps_training"] is True and report["verdict"]["edge"] is False
    (page,) = tmp_path.glob("*/report.html")
    assert "OVERLAPS TRAINING" in Page(page.read_bytes()).text


def test_a_checkpoint_is_compared_with_another(
    trained: Path, ask: Callable[..., Result], tmp_path: Path
) -> None:
    other = trained / "checkpoints" / f"{NAME}.pt"
    result = ask(tmp_path, "--costs", "", "--against", other)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Evaluating run 1, epoch 2 against run 1, epoch 2 on 2 symbols")
    report = report_in(tmp_path)
    assert report["comparison"]["mean_difference"] == 0.0
    assert report["pooled"]["the other checkpoint"] == report["pooled"]["policy"]
    assert "the other checkpoint" not in report["verdict"]["reason"]
    assert ask(tmp_path, "--against", tmp_path / "none.pt").exit_code == 2


def test_two_checkpoints_are_evaluated_as_one(
    trained: Path, ask: Callable[..., Result], tmp_path: Path
) -> None:
    weights = checkpoint(trained, f"{NAME}.pt")
    weights["model"]["head.logits.bias"] = torch.tensor([1.0, 0.0, 0.0])
    weights["trained_until_ns"] += 6 * 3_600 * 10**9  # later than the other
    other = tmp_path / "later.pt"
    torch.save(weights, other)
    result = ask(tmp_path / "reports", other, "--costs", "", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Evaluating {NAME}.pt + later.pt on 2 symbols, 2026-01-31 05:59 to ")
    report = report_in(tmp_path / "reports")
    assert (report["checkpoint"], report["run"], report["overlaps_training"]) == (
        f"{NAME}.pt + later.pt",
        None,
        False,
    )
    assert [member["sha256"] for member in report["members"]] == [
        sha256_of(path) for path in (trained / "checkpoints" / f"{NAME}.pt", other)
    ]
    assert report["trials"] == 2  # the training's exam, and this one
    assert report["record"].startswith("of checkpoints: No record yet")
    assert any("Each set of members that was tried is one more trial" in note for note in report["notes"])
    (page,) = (tmp_path / "reports").glob("*/report.html")
    assert f"Evaluation of {NAME}.pt + later.pt, " in Page(page.read_bytes()).text
    result = ask(tmp_path / "more", other, "--costs", "", "--from", "2026-01-31")
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert result.output.startswith(
        "Invalid setting: later.pt was trained on bars up to 2026-01-31 05:59 UTC"
    )


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--from 2026-01-30",
            "was trained on bars up to 2026-01-30 23:59 UTC: the first day allowed is 2026-01-31",
        ),
        ("--to 2026-01-29", "--allow-overlap shows older ones, and stamps the report"),
        ("--from 2026-02-01 --to 2026-01-31", "--from 2026-02-01 must not be after --to 2026-01-31"),
        (
            "--from 2026-02-01",
            "there is no time between 2026-02-01 00:00 and 2026-02-01 00:00 UTC: give --from and",
        ),
        ("--from 31.1.2026", "--from 31.1.2026 must be a day such as 2026-11-20"),
        (
            "--from 2200-01-01 --to 2200-01-02",
            "there are no bars from 2200-01-01 00:00 to 2200-01-03 00:00 UTC",
        ),
        (
            "--symbols SIM000,NOPE",
            "--symbols NOPE: no bars from 2026-01-30 23:59 to 2026-02-01 00:00 UTC; there are:",
        ),
        ("--plot-symbols NOPE", "--plot-symbols NOPE is not among the symbols that are evaluated"),
        ("--costs 0,x", "--costs 0,x must be basis points of 0 or more, such as 0,1,2,5,10"),
        ("--costs=-1", "--costs -1 must be basis points of 0 or more"),
        ("--costs 10000", "--costs 10000 must be under 5000 bps"),
        ("--d-model 32", "d_model=32, but "),
        ("--horizon 128", "horizon=128 must be at most 64 with "),
        ("--sources nowhere", "sources="),
        ("--crypto-fee-bps x", "crypto_fee_bps='x' must be a number"),
    ],
)
def test_an_invalid_option_is_reported_in_one_line(
    ask: Callable[..., Result], tmp_path: Path, words: str, message: str
) -> None:
    result = ask(tmp_path, *words.split())
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lake_without_bars_is_reported(ask: Callable[..., Result], tmp_path: Path) -> None:
    result = ask(tmp_path / "reports", "--sources", "binance", "--data-dir", tmp_path / "lake")
    assert result.exit_code == 3
    assert result.output.startswith(f"No bars are in {tmp_path / 'lake'}: fetch them with --refresh")
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "reports").exists()


def of_another_format(weights: dict[str, Any]) -> None:
    weights["format"] = 99


def of_other_features(weights: dict[str, Any]) -> None:
    weights["features"]["names"] = [*weights["features"]["names"][:-1], "moon_phase"]


def of_another_version(weights: dict[str, Any]) -> None:
    del weights["model_config"]


def of_another_model(weights: dict[str, Any]) -> None:
    weights["model_config"]["trunk"]["d_model"] = 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_format, "has format 99, this program reads 1"),
        (of_other_features, "was trained on other features than this program computes: "),
        (of_another_version, "is of another version of this program: it has no model_config"),
        (
            of_another_model,
            "is of another version of this program: Error(s) in loading state_dict for Policy",
        ),
    ],
)
def test_a_checkpoint_of_another_program_is_reported(
    trained: Path,
    ask: Callable[..., Result],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    weights = checkpoint(trained, f"{NAME}.pt")
    change(weights)
    path = tmp_path / "other.pt"
    torch.save(weights, path)
    result = ask(tmp_path / "reports", path=path)
    assert result.exit_code == 2
    assert str(path) in result.output and message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, None])
def test_a_file_that_is_no_checkpoint_is_reported(
    trained: Path, ask: Callable[..., Result], tmp_path: Path, share: float | None
) -> None:
    path = tmp_path / "torn.pt"
    if share is not None:  # else there is no file
        content = (trained / "checkpoints" / f"{NAME}.pt").read_bytes()
        path.write_bytes(content[: int(share * len(content))])
    result = ask(tmp_path / "reports", path=path)
    assert result.exit_code == 2
    fault = (
        "cannot be read: No such file" if share is None else "is damaged, its end" if share else "is empty"
    )
    assert result.output.startswith(f"{path} {fault}")
    assert len(result.output.splitlines()) == 1


def test_the_state_for_the_next_start_is_no_checkpoint(
    trained: Path, ask: Callable[..., Result], tmp_path: Path
) -> None:
    result = ask(tmp_path, path=trained / "checkpoints" / "resume" / f"{NAME}.pt")
    assert result.exit_code == 2 and "has format None, this program reads 1" in result.output


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which even root cannot write")
def test_a_report_that_cannot_be_written_is_reported(ask: Callable[..., Result]) -> None:
    result = ask(Path("/proc/self/reports"), "--costs", "")
    assert result.exit_code == 1
    assert "The report was not written: " in result.output


# --- aborted ---------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_the_previous_report(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--costs", "", "--symbols", "SIM000")
    assert ask(tmp_path, *words).exit_code == 0

    def state() -> dict[str, bytes]:
        return {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}

    def interrupted(figure: object) -> bytes:
        raise KeyboardInterrupt

    before = state()
    monkeypatch.setattr(plots, "as_png", interrupted)
    result = ask(tmp_path, *words)
    assert result.exit_code == 130
    assert result.output.splitlines()[-1] == "Aborted; no report was written"
    assert state() == before
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudoterminal")
def test_ctrl_c_restores_the_terminal(trained: Path, tmp_path: Path) -> None:
    words = [trained / "checkpoints" / f"{NAME}.pt", "--report-dir", tmp_path / "reports"]
    start = Start(tmp_path / "out", ["-c", FOR_EVER, "evaluate", *words], terminal=True)
    try:
        start.wait_for("1/100")
        assert start.process.stdin is not None
        start.process.stdin.write(b"\x03")
        start.process.stdin.flush()
        assert start.ends() == 130
    finally:
        start.kill()
    assert "Aborted; no report was written" in start.output
    assert "Traceback" not in start.output
    shown = (tmp_path / "out").read_bytes()
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is visible again
    assert not (tmp_path / "reports").exists()
