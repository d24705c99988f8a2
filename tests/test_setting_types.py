"""Every setting with wrong types and absurd values: one line that names it, exit code 2, never a traceback."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from commands import cli
from continuous_training import PRESETS, Settings, train_command
from tests.program import ROOT
from training import validation

HINTS = get_type_hints(Settings)
NAMES = [field.name for field in fields(Settings)]
PROGRAM = cli.application(Settings, PRESETS, train_command, "Help.")
ANYTHING = (object(), {}, {"AAPL"}, b"AAPL", print, [[]], (None,), ("AAPL", 3), 1j, Settings)
NUMBERS = (10**30, -(10**30), 10**5000, 1e30, -1e30, float("nan"), float("inf"))
WRONG = {
    int: (*ANYTHING, *NUMBERS, None, "5", 2.5, True, -1),
    float: (*ANYTHING, *NUMBERS, None, "0.5", True, -1.0),
    bool: (*ANYTHING, *NUMBERS, None, "yes", 0, 1),
    str: (*ANYTHING, *NUMBERS, None, "", " ", "a\0b", 5, True),
    tuple: (*ANYTHING, *NUMBERS, None, "AAPL", "", 5, ("",), ("a b",), ("a\nb",), ("..",), ("x/y",), (True,)),
}
# As people write them.
ABSURD = {
    int: ("1e9", "2.5", "-1", "many", "", "1" * 30, "1" * 5000, "nan"),
    float: ("1e9", "-1", "many", "", "1" * 400, "nan", "inf", "1e400"),
}
ABSURD_BUT_MEANT = {("max_grad_norm", "1e9"), ("account_value", "1e9")}  # no clipping; a fund


def kind_of(name: str) -> Any:
    """Return the plain type of a setting; of a choice str, of several values tuple."""
    hint = HINTS[name]
    if NoneType in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return get_origin(hint) if get_origin(hint) is tuple else hint if isinstance(hint, type) else str


def end_of(capsys: pytest.CaptureFixture[str], program: Any, *arguments: str) -> tuple[Any, list[str]]:
    with pytest.raises(SystemExit) as end:
        cli.run(program, arguments)
    return end.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_of_a_wrong_type_or_an_absurd_value_is_one_line_with_its_name(name: str) -> None:
    is_optional = NoneType in get_args(HINTS[name])
    for value in WRONG[kind_of(name)]:
        if value is None and is_optional:
            continue
        with pytest.raises(ValueError) as error:
            Settings(**{name: value})
        (line,) = str(error.value).splitlines()
        assert name in line and 10 < len(line) < 400, line


@pytest.mark.parametrize("name", [name for name in NAMES if kind_of(name) in ABSURD])
def test_an_absurd_flag_is_one_line_with_its_name(name: str) -> None:
    for value in ABSURD[kind_of(name)]:
        if (name, value) in ABSURD_BUT_MEANT:
            continue
        with pytest.raises(ValueError) as error:
            Settings(**cli._parse_given(Settings, HINTS, {name: value}))
        (line,) = str(error.value).splitlines()
        assert name in line and len(line) < 400, line


def test_what_says_the_same_in_another_type_is_taken() -> None:
    settings = Settings(stocks=["AAPL"], weight_decay=0, data_dir=Path("lake"))  # type: ignore[arg-type]
    assert (settings.stocks, settings.weight_decay, settings.data_dir) == (("AAPL",), 0.0, "lake")
    assert type(settings.weight_decay) is float and settings.positions == (-1.0, 0.0, 1.0)
    assert Settings(positions=(0, 1)).positions == (0.0, 1.0)


def edited(folder: Path, old: str, new: str) -> ModuleType:
    """Return the program with one line edited, as people do."""
    text = (ROOT / "continuous_training.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = folder / "edited_training.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_training", path)
    assert spec and spec.loader
    module = sys.modules["edited_training"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIMULATED = {"sources": ("simulated",)}
STOCKS_LINE = "    stocks: tuple[str, ...] = STOCKS  #"
D_MODEL = "    d_model: int = 2_048  #"
SMALL = '        "d_model": 256,'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (STOCKS_LINE, '    stocks: tuple[str, ...] = ("AAPL")  #', "stocks='AAPL' must be a tuple of texts"),
        (STOCKS_LINE, '    stocks = ("AAPL")  #', "stocks must have a type to be a setting, such as stocks: "),
        (STOCKS_LINE, '    stocks: tuple[str, ...] = {"AAPL"}  #', "stocks={'AAPL'} must be a tuple of texts"),
        (STOCKS_LINE, '    stocks: tuple[str, ...] = ("AAPL MSFT",)  #', "stocks=AAPL MSFT has '"),
        (D_MODEL, '    d_model: int = "1024"  #', "d_model='1024' must be a whole number"),
        (D_MODEL, "    d_model: int = [1024]  #", "d_model=[1024] must be a whole number"),
        (D_MODEL, f"    d_model: int = {10**20}  #", f"d_model={10**20} must be a whole number of at most"),
        (D_MODEL, "    d_modle: int = 1024  #", "d_model is missing: "),
        (SMALL, '        "d_modle": 256,', "preset small has d_modle, which is no setting"),
        (SMALL, '        "d_model": "256",', "d_model='256' must be a whole number"),
    ],
)  # fmt: skip
def test_an_edited_program_says_what_is_wrong_with_the_edit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    module = edited(tmp_path, old, new)
    program = cli.application(module.Settings, module.PRESETS, module.train_command, "Help.")
    code, lines = end_of(capsys, program, "check", "--preset", "small" if old == SMALL else "full")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"Invalid setting: {message}"), lines


def test_a_list_of_symbols_is_as_good_as_a_tuple(tmp_path: Path) -> None:
    module = edited(tmp_path, STOCKS_LINE, '    stocks: tuple[str, ...] = ["AAPL", "MSFT"]  #')
    assert module.Settings().stocks == ("AAPL", "MSFT")
    assert cli.flags_of(module.Settings())[1] == "--stocks=AAPL,MSFT"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"history_days": 400, "holdout_days": 400}, "holdout_days=400 must be below the 400 days of bars"),
        ({"start_date": "2026-01-01", "end_date": "2026-01-14"}, "holdout_days=14 must be below the 14 days"),
        ({**SIMULATED, "holdout_days": 42}, "holdout_days=42 must be below the 41.67 days of bars"),
        ({**SIMULATED, "simulated_bars": 1_999}, "simulated_bars=1999 must be at least min_bars=2000"),
        ({**SIMULATED, "simulated_bars": 20_300}, "simulated_bars=20300 must be 20355 or more: 20160"),
        ({"sources": ("binance",), "binance_pairs": ()}, "sources=binance must have symbols: set binance_pairs"),
        ({"sources": ("yahoo", "binance"), "binance_pairs": (), "stocks": ()}, "set stocks or binance_pairs"),
        ({"data_dir": "here", "checkpoint_dir": "./here/"}, "data_dir=here must be another folder"),
    ],
)  # fmt: skip
def test_settings_that_leave_nothing_to_train_on_are_refused_before_a_start(
    given: dict[str, Any], message: str
) -> None:
    settings = Settings(**given)  # may be right for other commands
    with pytest.raises(ValueError) as error:
        validation.check_training(settings, 1)
    assert message in str(error.value)
