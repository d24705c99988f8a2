"""The shape of the repository is part of its design: who imports whom, how long a file is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each package may import of ours; nothing points the other way.
OURS: dict[str, set[str]] = {
    "runtime": set(),
    "models": set(),
    "data_sources": {"runtime"},
    "envs": {"data_sources"},
    "training": {"runtime", "models", "data_sources", "envs"},
    "evaluation": {"runtime", "models", "data_sources", "envs", "training"},
    "monitoring": {"runtime", "models", "data_sources", "envs", "training"},
}
OURS["commands"] = {*OURS}
OURS["continuous_training"] = {*OURS}
# What each package must do without, so that it can be tested and read without it.
VENDORS = {"boto3", "binance", "yfinance"}
WITHOUT = {
    "runtime": {*VENDORS, "torch", "numpy", "pandas", "rich", "typer"},
    "data_sources": {"torch", "rich", "typer"},
    "envs": {*VENDORS, "rich", "typer", "pandas"},
    "models": {"numpy", "pandas", "rich", "typer"},
    "training": {*VENDORS, "pandas", "rich", "typer"},
    "evaluation": {*VENDORS, "pandas", "rich", "typer"},
    "monitoring": {*VENDORS, "pandas", "typer"},
    "commands": {*VENDORS, "pandas", "rich"},
    "continuous_training": {*VENDORS, "pandas", "rich"},
}
EXEMPT = {"runtime/torchrun.py": {"torch"}}  # torch's own launcher
# Old paths that exported examples import, for one release.
ALIASES = {"training/acting.py": {"evaluation"}}
# The one place of a library.
ONLY_IN = {
    "rich": {"monitoring/console.py", "monitoring/dashboard.py"},
    "jinja2": {"evaluation/page.py", "monitoring/page.py"},
    "apprise": {"monitoring/notify.py"},
    "tensorboard": {"monitoring/exporters.py", "monitoring/tensorboard_head.py"},
    "huggingface_hub": {"commands/push.py"},
    "wandb": {"monitoring/telemetry.py"},
    "mlflow": {"monitoring/telemetry.py"},
    "trackio": {"monitoring/telemetry.py"},
    "prometheus_client": {"monitoring/exporters.py"},
    "pynvml": {"monitoring/machine.py", "training/metrics.py"},
    "psutil": {"monitoring/machine.py"},
    "fsspec": {"training/mirror.py"},
    "typer": {
        "commands/cli.py",
        "commands/__init__.py",
        "commands/options.py",
        "commands/help_layout.py",
        "continuous_training.py",
    },
    "boto3": {"data_sources/vendors/polygon_files.py"},
    "yfinance": {"data_sources/vendors/yahoo_client.py"},
}
SOURCES = sorted(p for part in OURS for p in (*ROOT.glob(f"{part}.py"), *(ROOT / part).rglob("*.py")))


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def statements(source: Path, *, for_types: bool) -> Iterator[ast.AST]:
    """Yield all nodes of a file outside (or inside) its ``if TYPE_CHECKING:`` blocks."""
    waiting: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    inside: list[ast.AST] = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inside += node.body
            waiting += node.orelse
            continue
        if not for_types:
            yield node
        waiting += ast.iter_child_nodes(node)
    for node in inside if for_types else ():
        yield from ast.walk(node)


def imports(source: Path, *, for_types: bool = False) -> set[str]:
    """Top-level names imported anywhere in a file, inside functions too."""
    names = set()
    for node in statements(source, for_types=for_types):
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
    up = imports(source) & OURS.keys() - {part} - OURS[part]
    assert up <= ALIASES.get(name_of(source), set())
    assert not imports(source) & WITHOUT[part] - EXEMPT.get(name_of(source), set())


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_of_types_only_that_of_the_settings_is_imported_from_above(source: Path) -> None:
    part = source.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imports(source, for_types=True) & OURS.keys() <= {"continuous_training", part} | OURS[part]


def test_settings_have_a_type_everywhere() -> None:
    assert [
        name_of(source) for source in SOURCES if "settings: Any" in source.read_text(encoding="utf-8")
    ] == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_place(library: str) -> None:
    users = {name_of(source) for source in SOURCES if library in imports(source)}
    assert users
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_a_file_is_read_in_one_sitting(source: Path) -> None:
    # What a training is wired from attracts everything that has no other home.
    limit = 250 if name_of(source) == "commands/train.py" else 450
    assert len(source.read_text(encoding="utf-8").splitlines()) <= limit


def test_the_main_loop_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / "continuous_training.py").read_text(encoding="utf-8"))
    (loop,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 45
