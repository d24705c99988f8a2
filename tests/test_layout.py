"""The shape of the repository is part of its design: who imports whom, how long a file is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each part may import of ours; nothing points the other way.
OURS: dict[str, set[str]] = {
    "data_sources": set(),
    "models": set(),
    "envs": {"data_sources"},
    "training": {"data_sources", "envs", "models"},
    "continuous_training": {"data_sources", "envs", "models", "training"},
}
# What each part must do without, so that it can be tested and read without it.
VENDORS = {"boto3", "binance", "yfinance"}
WITHOUT = {
    "data_sources": {"torch", "rich", "typer"},
    "envs": {*VENDORS, "rich", "typer", "pandas"},
    "models": {"numpy", "pandas", "rich", "typer"},
    "training": {*VENDORS, "pandas"},
    "continuous_training": {*VENDORS, "pandas", "rich"},
}
# The one place of a library.
ONLY_IN = {
    "rich": {"training/console.py", "training/dashboard.py"},
    "tensorboard": {"training/tensorboard.py"},
    "pynvml": {"training/machine.py"},
    "psutil": {"training/machine.py"},
    "typer": {"training/cli.py", "training/commands.py", "continuous_training.py"},
    "boto3": {"data_sources/polygon.py", "data_sources/polygon_files.py"},
    "yfinance": {"data_sources/yahoo.py"},
}
SOURCES = sorted(p for part in OURS for p in (*ROOT.glob(f"{part}.py"), *(ROOT / part).rglob("*.py")))


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def imports(source: Path) -> set[str]:
    """Top-level names imported anywhere in a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_imports_point_one_way(source: Path) -> None:
    part = source.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imports(source) & OURS.keys() - {part} <= OURS[part]
    assert not imports(source) & WITHOUT[part]


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_place(library: str) -> None:
    users = {name_of(source) for source in SOURCES if library in imports(source)}
    assert users
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_a_file_is_read_in_one_sitting(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 450
