"""Every way in which a feature of one's own can cheat or break is one line, before anything is trained on it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from commands import cli
from commands.check.features import check_features
from commands.cli import application
from continuous_training import PRESETS, Settings, train_command
from data_sources.bars import COLUMNS, Bars
from data_sources.simulated import simulated_bars
from envs import features
from envs.feature_checks import FEWEST_CUTS, FeatureReport, check_own_features
from envs.feature_errors import FeatureError, import_own
from tests.envs.markets import walk
from tests.program import ALONE, PACKAGES, ROOT, SUPERVISED, Start, tiny_flags
from tests.training.checkpoints import untrained
from training import data_feed
from training.distributed import Ranks

NOW_NS = 20_000 * 86_400 * 10**9
HEADER = """
import math, random
import numpy as np
import torch
from envs.features import History, feature, lagged, rolling_max, rolling_means

remembered = {}

@feature
def mine(history):
"""
Check = Callable[..., FeatureReport]


@pytest.fixture(scope="module")
def bars() -> list[Bars]:
    stock = walk("STK", 3_000, asset_class="stock", gaps=dict.fromkeys(range(390, 3_000, 390), 1_050))
    return [*simulated_bars(2, 6_000, seed=1, end_ns=NOW_NS), stock]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bars: list[Bars]) -> Check:
    def check_body(body: str, fewest_cuts: int = 40, more: str = "") -> FeatureReport:
        file = tmp_path / "own_features.py"
        file.write_text(HEADER + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n" + more)
        monkeypatch.setattr(features, "OWN_FILE", file)
        monkeypatch.setattr(features, "FEATURES", dict(features.FEATURES))
        features.FEATURES.update(features.read_own_features())
        # Copies: some features change them.
        copies = [
            Bars(series.symbol, series.asset_class, *(getattr(series, name).copy() for name in COLUMNS))
            for series in bars
        ]
        return check_own_features(copies, fewest_cuts)

    return check_body


LOOKS_AHEAD = {
    "the next bar": "return history.log_close.roll(-1).float()",
    "the next bar's volume": "return (history.volume.roll(-1) + 1).log().float()",
    "the next bar's time": "return (history.open_time.roll(-1) - history.open_time).float()",
    "five bars ahead": "return (history.close.roll(-5) / history.close).log().float()",
    "a minute's sign": "return torch.sign(history.close.roll(-1) - history.close).float()",
    "only rises": "return ((history.close.roll(-1) / history.close).log() > 0.0005).float()",
    "only large falls": "return ((history.close.roll(-1) / history.close).log() < -0.05).float()",
    "one bar of 300": """
        ahead = history.close.roll(-1).log().float()
        return torch.where(torch.arange(len(history)) % 300 == 7, ahead, 0.0)""",
    "one minute of the day": """
        ahead = history.close.roll(-1).log().float()
        return torch.where(history.local_minute % 1440 == 601, ahead, 0.0)""",
    "the last minute before a gap": """
        gap = history.open_time.roll(-1) - history.open_time > 3_600_000_000_000
        return gap.float()""",
    "one symbol": """
        ahead = history.log_close.roll(-1).float()
        return torch.zeros_like(ahead) if history.is_crypto else ahead""",
    "late bars": """
        ahead = history.log_close.roll(-1).float()
        return torch.where(torch.arange(len(history)) > 2_500, ahead, 0.0)""",
    "the mean of all bars": "return (history.log_close - history.log_close.mean()).float()",
    "the spread of all bars": "return history.log_return(1) / history.log_return(1).std()",
    "the mean of the first part": "return (history.log_close - history.log_close[:2_000].mean()).float()",
    "another symbol's next bar": "return history.peers.log_return(1).roll(-1)",
    "how the others will rank": "return history.peers.rank('volume').argsort().float()",
    "ranks": "return history.volume.argsort().argsort().float()",
    "how many bars there are": "return torch.linspace(0, 1, len(history))",
    "the last price": "return (history.log_close - history.log_close[-1]).float()",
    "a centred window": "return rolling_means(history.close, [9])[9].roll(-4).log().float()",
    "numpy": "return torch.from_numpy(np.append(np.diff(np.log(history.close.numpy())), 0.0))",
    "a cumulative sum from the end": "return history.log_return(1).flip(0).cumsum(0).flip(0)",
    "filling NaN from later bars": """
        series = history.log_return(1).numpy().copy()
        for t in range(len(series) - 2, -1, -1):
            if history.local_minute[t] % 5 == 0:
                series[t] = series[t + 1]
        return torch.from_numpy(series)""",
}
NOT_ITS_HISTORY = {
    "the other symbol's bars": """
        remembered.setdefault("first", history.log_close)
        other = remembered["first"]
        size = min(len(other), len(history))
        ahead = torch.zeros(len(history))
        ahead[: size - 1] = other[1:size].float()
        return ahead""",
    "the last symbol's bars": """
        other = remembered.get("last", history.log_close)
        remembered["last"] = history.log_close
        return torch.full((len(history),), float(other[-1]))""",
    "random numbers": "return torch.randn(len(history))",
    "random numbers of Python": "return history.log_return(1) + random.random()",
    "a counter": """
        remembered["calls"] = remembered.get("calls", 0) + 1
        return history.log_return(1) * remembered["calls"]""",
    "a cache by length": """
        if len(history) not in remembered:
            remembered[len(history)] = history.log_close.roll(-1).float()
        return remembered[len(history)]""",
}
BREAKS = {
    "an error": ("return history.close / (1 / 0)", "ZeroDivisionError: division by zero"),
    "a name": ("return history.closes", "AttributeError: 'History' object has no attribute 'closes'"),
    "an exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "a scalar": ("return history.close.mean()", "must have shape (6000,), was ()"),
    "one bar less": ("return history.close.diff()", "must have shape (6000,), was (5999,)"),
    "a column": ("return history.close[:, None]", "must have shape (6000,), was (6000, 1)"),
    "an array": ("return history.close.numpy()", "was ndarray"),
    "nothing": ("history.close.log()", "was NoneType"),
    "complex numbers": ("return torch.fft.fft(history.close)", "was torch.complex128"),
    "only NaN": ("return (history.close - 1e9).log()", "is NaN or infinite at 100 % of bars"),
    "only infinities": ("return history.close / 0", "is NaN or infinite at 100 % of bars"),
    "only unscaled values": ("return history.open_time.float()", "is out of bounds at 100 % of bars"),
    "a changed price": ("return history.close.log_().float()", "changes history.close in place"),
    "a changed slice": ("history.volume[0] = 0; return history.volume", "changes history.volume in place"),
    "a changed building block": (
        "return history.volatility(240).clamp_(min=0.1)",
        "changes history.volatility(240) in place",
    ),
    "another price": ("history.close = history.close / 2; return history.close", "changes history.close"),
    "a price changed by numpy": (
        "history.close.numpy()[3] = 1.0; return history.log_close",
        "changes close of",
    ),
}
FINE = {
    "a candle": "return (history.close / history.open).log().float() / history.volatility(240)",
    "a cumulative sum": "return torch.tanh(history.log_return(1).cumsum(0))",
    "its own window": """
        padded = torch.nn.functional.pad(history.log_return(1), (29, 0))
        return padded.unfold(0, 30, 1).std(-1).clamp(min=1e-6).log()""",
    "whole numbers": "return (history.local_minute % 60) // 10",
    "the others' mean": "return history.peers.mean('return_5') - history.peers.share_up('return_5')",
    "its residual": "return history.log_return(2) - history.peers.beta * history.peers.log_return(2)",
    "booleans": "return history.close > history.open",
    "an exponential mean": """
        mean, values = 0.0, []
        for change in history.log_return(1).tolist():
            mean += 0.1 * (change - mean)
            values.append(1e3 * mean)
        return torch.tensor(values)""",
    "a helper with gradients": """
        weight = torch.ones(1, requires_grad=True)
        return history.log_return(1) * weight""",
    "a constant": "return torch.zeros(len(history))",
}


@pytest.mark.parametrize("body", LOOKS_AHEAD.values(), ids=LOOKS_AHEAD)
def test_a_feature_that_looks_ahead_is_refused(check: Check, body: str) -> None:
    (line,) = check(body, FEWEST_CUTS).errors
    assert "own_features.py:9: feature mine looks ahead: its value at S" in line
    assert line.endswith("depends on later bars; correct envs/own_features.py, or take the feature out")


@pytest.mark.parametrize("body", NOT_ITS_HISTORY.values(), ids=NOT_ITS_HISTORY)
def test_a_feature_that_depends_on_anything_else_is_refused(check: Check, body: str) -> None:
    (line,) = check(body).errors
    assert "own_features.py:9: feature mine has other values when S" in line
    assert "without random numbers, a clock, or memory of other symbols" in line


@pytest.mark.parametrize(("body", "fault"), BREAKS.values(), ids=BREAKS)
def test_a_feature_that_cannot_be_used_is_one_line(check: Check, body: str, fault: str) -> None:
    (line,) = check(body).errors
    assert fault in line and len(line.splitlines()) == 1
    assert "own_features.py" in line


@pytest.mark.parametrize("body", FINE.values(), ids=FINE)
def test_an_honest_feature_passes(check: Check, body: str) -> None:
    assert check(body) == FeatureReport(["mine"])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            "return torch.where(history.volume > 120, math.nan, history.log_return(1))",
            "is NaN or infinite at",
        ),
        ("return history.close * torch.where(history.volume > 120, 1e6, 0.0)", "is out of bounds at"),
    ],
)
def test_values_that_are_often_unusable_are_a_warning(check: Check, body: str, line: str) -> None:
    report = check(body)
    assert report.errors == []
    (warning,) = report.warnings
    assert line in warning


def test_every_feature_has_its_own_line(check: Check) -> None:
    other = "@feature\ndef other(history): return torch.randn(len(history))\n"
    report = check("return history.log_close.roll(-1)", more=other)
    assert [line.split(": feature ")[1].split(" ")[0] for line in report.errors] == ["other", "mine"]


def test_a_changed_history_is_refused_wherever_features_are_computed() -> None:
    def change(history: features.History) -> torch.Tensor:
        return history.close.mul_(0.5)

    with pytest.raises(
        FeatureError, match=r"test_feature_checks.py:\d+: feature change changes history.close"
    ):
        features.compute(walk(), torch.device("cpu"), {"change": change})


FILES = {
    "syntax": ("def broken(:\n", "own_syntax.py:1: SyntaxError: invalid syntax"),
    "indentation": ("if 1:\nx = 1\n", "own_indentation.py:2: IndentationError: expected an indented block"),
    "library": ("\nimport talib_of_mine\n", "own_library.py:2: ModuleNotFoundError: No module named"),
    "name": ("@feature\ndef f(h): ...\n", "own_name.py:1: NameError: name 'feature' is not defined"),
    "twice": (
        "from envs.features import feature\n\n@feature\ndef jump(h): ...\n",
        "own_twice.py:3: ValueError: feature jump is already registered",
    ),
    "exit": ("import sys\nsys.exit(3)\n", "own_exit.py:2: SystemExit: 3"),
    "bytes": (b"\xff\xfe\x00", "own_bytes.py: SyntaxError: "),
}


@pytest.mark.parametrize(("name", "content", "line"), [(name, *case) for name, case in FILES.items()])
def test_a_file_that_cannot_be_run_is_one_line_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, line: str
) -> None:
    file = tmp_path / f"own_{name}.py"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FeatureError) as error:
        import_own(file.stem, file)
    (text,) = str(error.value).splitlines()
    assert f"{tmp_path.as_posix()}/{line}" in text
    assert text.endswith("correct this file, or empty it to train without features of your own")


def test_a_file_that_was_removed_is_no_fault() -> None:
    import_own("envs.features_of_nobody", Path("envs/features_of_nobody.py"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program, whose envs/own_features.py is the test's."""
    folder = tmp_path_factory.mktemp("program")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "continuous_training.py", folder)
    return folder


def start(program: Path, own: str, *words: str) -> tuple[int, list[str]]:
    """Run the program with these features of one's own; return its exit code and its output."""
    (program / "envs" / "own_features.py").write_text(own)
    result = Start(program / "log.txt", [*words, *tiny_flags(program, epochs=2, runs=1)], cwd=program)
    return result.ends(), result.lines


PEEK = (
    "from envs.features import feature\n\n@feature\ndef peek(history):\n    return history.close.roll(-1)\n"
)
AS_DOCUMENTED = """
from commands.selftest.lookahead import features_that_look_ahead
from data_sources.simulated import simulated_bars
print(features_that_look_ahead(simulated_bars(1, 500, 0, 10**18)[0], [200, 400]))
"""


def test_no_training_starts_on_a_feature_that_sees_the_next_bar(program: Path) -> None:
    code, lines = start(program, PEEK, *ALONE)
    assert code == 2
    assert lines[-1].startswith("envs/own_features.py:3: feature peek looks ahead: its value at SIM00")
    assert not list((program / "checkpoints").glob("*.pt"))
    command = [sys.executable, "-c", AS_DOCUMENTED]  # it makes no market
    result = subprocess.run(command, cwd=program, capture_output=True, text=True, check=True)
    assert result.stdout == "{'peek': 200}\n"


def test_a_syntax_error_is_one_line_and_nothing_starts(program: Path) -> None:
    code, lines = start(program, "def broken(:\n", *SUPERVISED)
    assert code == 2
    (_, line) = lines  # after that of loading PyTorch
    assert line.startswith("envs/own_features.py:1: SyntaxError: invalid syntax: correct this file")


def test_the_command_check_finds_what_a_start_would_refuse(check: Check, tmp_path: Path) -> None:
    settings = Settings(sources=("simulated",), simulated_bars=3_000, holdout_days=1, data_dir=str(tmp_path))
    assert list(check_features(settings, NOW_NS)) == []
    check("return history.close.roll(-1)")
    (line,) = check_features(settings, NOW_NS)
    assert line.code == 2 and ": feature mine looks ahead: its value at SIM" in line.text


def test_an_honest_feature_is_reported_and_trained_on(
    check: Check, bars: list[Bars], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check("return history.log_return(2)")
    monkeypatch.setattr(data_feed, "check_own_features", partial(check_own_features, fewest_cuts=50))
    caplog.set_level(logging.INFO, logger="continuous_training")
    market = data_feed.make_market(Settings(holdout_days=0), bars, Ranks(0, 1, torch.device("cpu")), None)
    assert market.statistics.names[-1] == "mine"
    assert caplog.messages[0].startswith("Features of your own: mine; none looks ahead (")


def test_a_policy_is_not_used_while_the_file_cannot_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = untrained(tmp_path)
    monkeypatch.setattr(features, "_own_error", "envs/own_features.py:1: SyntaxError: no")
    with pytest.raises(SystemExit) as end:
        cli.run(application(Settings, PRESETS, train_command, "Help."), ["signals", str(path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == "envs/own_features.py:1: SyntaxError: no\n"
