"""What README and docs say is so: files, flags, commands, settings, keys, metrics, features, and their code."""

import ast
import json
import re
import shlex
import shutil
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
import torch
import typer

from commands import export
from commands.cli import application, helps_of
from continuous_training import PRESETS, Settings, train_command, walkforward_command
from data_sources.bars import COLUMNS, DAY_NS
from data_sources.lake.lake import Lake
from data_sources.load import load
from data_sources.refresh import probe, refresh
from data_sources.simulated import simulated_bars
from data_sources.sources import DataRequest
from data_sources.vendors import SOURCES
from envs import features
from envs.features import FEATURES
from evaluation.trained_policy import TrainedPolicy
from models.policy import Policy
from runtime import control
from tests.data_sources.vendors.loopback import Answer, Fault, LoopbackServer, Notes
from tests.program import ALONE, NAMES_IN_ENV, PACKAGES, ROOT, Start, checkpoint, is_same, metrics, tiny_flags

MARKDOWN = sorted(
    path for folder in ("", "docs", "benchmarks", "checkpoints") for path in (ROOT / folder).glob("*.md")
)
START_SCRIPTS = [ROOT / "START_CONTINUOUS.sh", ROOT / "START_CONTINUOUS.bat"]
# docs/LOG.md and CHANGELOG.md describe the past, with the flags of their day.
CURRENT = [path for path in MARKDOWN if path.name not in ("LOG.md", "CHANGELOG.md", "RESULTS.md")]
WITH_COMMANDS = [*CURRENT, *START_SCRIPTS, ROOT / ".env.example"]
OWN_FOLDERS = (*PACKAGES, "benchmarks", "docs", "tests", ".ci")
OF_USERS = {"bars.toml"}  # which they write themselves
START = re.compile(r"(?:START_CONTINUOUS\.(?:sh|bat)|python continuous_training\.py)(?= |`|$)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
ENVIRONMENT_NAME = re.compile(r"[A-Z][A-Z0-9_]{3,}")
# The processes of one start set these for each other; users never do.
BETWEEN_PROCESSES = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "RANK", "WORLD_SIZE"}
# Documented by CUDA, curl, polars, Python, torch and systemd.
OF_OTHERS = {
    *("CUDA_VISIBLE_DEVICES", "NETRC", "PYTHONHOME", "PYTHONWARNINGS", "PYTORCH_CUDA_ALLOC_CONF"),
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "POLARS_MAX_THREADS"),
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def table_rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of the Markdown table that begins with ``header``."""
    lines = text.split(header)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", MARKDOWN, ids=name_of)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(document)):
        if not target.startswith(("https://", "http://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", CURRENT, ids=name_of)
def test_every_file_that_is_named_exists(document: Path) -> None:
    for words in quoted(text_of(document)) + re.findall(
        r"^```\w*\n(.*?)^```", text_of(document), re.M | re.S
    ):
        for word in re.findall(r"(?<![\w/.])[\w.]+(?:/[\w.]*)*", words):
            first, *rest = word.split("/")
            is_ours = bool(rest) and first in OWN_FOLDERS
            is_program = not rest and re.search(r"\w\.(?:py|sh|bat|toml)$", word) and word not in OF_USERS
            if is_ours or is_program:
                assert (ROOT / word).exists(), word


def test_the_readme_shows_every_package_and_no_other() -> None:
    (tree,) = re.findall(r"^```\n(continuous_training\.py .*?)^```", text_of(ROOT / "README.md"), re.M | re.S)
    shown, parents = set(), [""]
    for line in tree.splitlines():
        indent, name, what = re.fullmatch(r"( *)(\S+?)/?  +(\S.*)", line).groups()  # type: ignore[union-attr]
        parents = [*parents[: len(indent) // 2 + 1], name]
        shown.add("/".join(parents[1:]))
        assert what, name
    packages = {
        name_of(init.parent) for package in PACKAGES for init in (ROOT / package).rglob("__init__.py")
    }
    assert shown == packages | {"continuous_training.py", "tests", "benchmarks", "contrib", "docs"}


def test_contributors_are_led_to_files_that_hold_the_named_symbols() -> None:
    text = text_of(ROOT / "CONTRIBUTING.md")
    rows = table_rows(text, "| to change | look in | and |")
    for what, places, _ in rows:
        found = re.findall(r"`([\w/]+\.py)`(?: \(`(\w+)`\))?", places)
        assert found, what
        for file, symbol in found:
            assert not symbol or symbol in names_defined_in(ROOT / file), (what, file, symbol)
    first = text.split("## Read these ten files first")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `(\S+)`: .+\.$", first, re.M)
    assert len(files) == 10 and all((ROOT / file).is_file() for file in files)


def names_defined_in(source: Path) -> set[str]:
    """Names of the functions, classes and constants at the top of a module."""
    names = set()
    for node in ast.parse(text_of(source)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


# --- commands and flags -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands() -> dict[str, set[str]]:
    """The options of every command of the program, by its name, hidden ones included."""
    group = typer.main.get_command(application(Settings, PRESETS, train_command, None, [walkforward_command]))
    return {
        name: {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def quoted_commands(document: Path) -> list[list[str]]:
    """Return the arguments of every start of the program that a document shows."""
    found = []
    for line in text_of(document).splitlines():
        for start in START.finditer(line):
            rest = re.split(r"`|  +|#|\bmust\b", line[start.end() :])[0]
            words = shlex.split(rest.replace("[", " ").replace("]", " ").replace("...", " "))
            is_prose = words and not re.fullmatch(r"-.*|[a-z]+", words[0])
            if (
                rest.startswith(" ")
                and not is_prose
                and ("bash" in line or "python" in line or "rem  " in line)
            ):
                found.append(words)
    return found


def test_commands_are_found_in_the_documents() -> None:
    readme = quoted_commands(ROOT / "README.md")
    assert ["--demo"] in readme and ["data"] in readme and ["train"] in readme
    assert ["--envs-per-gpu", "256"] in quoted_commands(ROOT / "START_CONTINUOUS.bat")


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=name_of)
def test_every_command_that_is_shown_can_be_given(document: Path, commands: dict[str, set[str]]) -> None:
    for words in quoted_commands(document):
        name = words.pop(0) if words and not words[0].startswith("-") else "train"
        assert name in commands, f"{document.name} shows the command {name}"
        given = {word.split("=")[0] for word in words if word.startswith("--")} - {"--flag"}
        assert given <= commands[name] | {"--help"}, f"{document.name}: {name}"
    for names in re.findall(r"any other command: ([a-z, ]+)$", text_of(document), re.M):
        assert set(names.split(", ")) <= set(commands), document.name


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=name_of)
def test_every_flag_that_is_named_exists(document: Path, commands: dict[str, set[str]]) -> None:
    known = set().union(*commands.values()) | {"--flag", "--help", "--version"}
    lines = text_of(document).splitlines()
    others = (
        "tests/run.sh",
        "tests.drill",
        "`tensorboard ",
        "docker run",
        "runtime.install",
        "`--index-url`",
        "benchmarks/",
    )
    ours = [line for line in lines if not any(other in line for other in others)]
    assert set(FLAG.findall("\n".join(ours))) <= known


def test_the_readme_shows_every_command(commands: dict[str, set[str]]) -> None:
    shown = " ".join(row[0] for row in table_rows(text_of(ROOT / "README.md"), "| command | what |"))
    # The supervisor calls these, users do not.
    hidden = {"preflight", "companion"}
    assert {name for name in commands if f"continuous_training.py {name}" not in shown} == hidden


def test_the_readme_names_every_exit_code() -> None:
    codes = text_of(ROOT / "README.md").split("Exit codes: ")[1].split("\n\n")[0]
    values = {value for name, value in vars(control).items() if name.startswith("EXIT_")}
    assert values == set(map(int, re.findall(r"\b\d+\b", codes)))


# --- settings and keys --------------------------------------------------------------------------------------


def test_the_readme_lists_every_setting_with_its_default_and_help() -> None:
    rows = table_rows(text_of(ROOT / "README.md"), "| setting | default | what |")
    helps = helps_of(Settings)
    assert [row[0].strip("`") for row in rows] == [field.name for field in fields(Settings)]
    for (name, default, what), field in zip(rows, fields(Settings), strict=True):
        value = field.default
        shown = (
            ",".join(f"{part:g}" if isinstance(part, float) else part for part in value)
            if (isinstance(value, tuple))
            else "not set"
            if value is None
            else str(value)
        )
        assert default in (shown, f"{len(value)} symbols" if isinstance(value, tuple) else shown), name
        assert what == helps[field.name], name


def environment_names(source: Path) -> set[str]:
    """Names that a file reads from the environment: given to it by name, or in a loop over names."""
    names = set()
    for node in ast.walk(ast.parse(text_of(source))):
        if isinstance(node, ast.Call):
            near = [node.func, *node.args]
        elif isinstance(node, ast.Subscript):
            near = [node.value, node.slice]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            near = [*node.iter.elts, *node.body]
        else:
            continue
        if any("environ" in ast.unparse(node) for node in near):
            names |= {node.value for node in near if isinstance(node, ast.Constant)}
    return {name for name in names if isinstance(name, str) and ENVIRONMENT_NAME.fullmatch(name)}


def names_read_in(*folders: str) -> set[str]:
    sources = [source for folder in folders for source in ROOT.glob(folder)]
    return set().union(*map(environment_names, sources))


def test_the_env_file_has_every_name_that_sources_read_and_no_other() -> None:
    readers = ("data_sources/**/*.py", "training/mirror.py", "training/urls.py", "commands/companion.py")
    readers += ("commands/push.py",)
    assert names_read_in(*readers) == set(NAMES_IN_ENV)
    readme = text_of(ROOT / "README.md")
    assert [name for name in NAMES_IN_ENV if f"`{name}`" not in readme] == []


def test_the_readme_names_what_else_is_read_from_the_environment() -> None:
    read = names_read_in("*.py", *(f"{package}/**/*.py" for package in PACKAGES if package != "data_sources"))
    assert {"NPROC", "HANG_SECONDS", "RANK"} <= read
    readme = text_of(ROOT / "README.md")
    assert {name for name in read - BETWEEN_PROCESSES - OF_OTHERS if f"`{name}`" not in readme} == set()


# --- metrics, features, code --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    given = tiny_flags(folder, runs=1, epochs=1, holdout_days=1, forecast_coef=0.5)
    Start(folder / "out", [*ALONE, *given]).ends_well()
    return folder


def test_every_metric_has_its_sentence_and_no_other_has_one(trained: Path) -> None:
    rows = table_rows(text_of(ROOT / "docs" / "metrics.md"), "| key | what it is |")
    explained = {name for row in rows for name in quoted(row[0])}
    assert all(row[1] for row in rows)
    (entry,) = metrics(trained)
    recorded = {re.sub(r"(in_position_)\S+", r"\1X", name) for name in entry}
    recorded = {re.sub(r"(rank_ic_)\d+$", r"\1H", name) for name in recorded}
    on_gpus = set(re.findall(r'"(gpu/\w+)"', text_of(ROOT / "training" / "metrics.py")))
    texts = [text_of(ROOT / file) for file in ("training/trainer.py", "evaluation/examiner.py")]
    of_others = set(re.findall(r'"(\w+/(?:funding|market)_\w+)"', "".join(texts)))  # bars and settings
    assert on_gpus and not on_gpus & recorded and of_others and not of_others & recorded
    of_record = set(re.findall(r'"(record/\w+)"', text_of(ROOT / "evaluation" / "record_summary.py")))
    assert of_record and not of_record & recorded
    of_groups = set(re.findall(r'"(rollout/(?:gross|net)_exposure)"', texts[0]))
    assert of_groups and not of_groups & recorded
    assert explained == recorded | on_gpus | of_others | of_record | of_groups


def test_every_feature_has_its_row() -> None:
    explained = []
    for row in table_rows(text_of(ROOT / "docs" / "features.md"), "| feature | is | looks at |"):
        if row[0].startswith("**group"):
            continue
        first, *others = quoted(row[0])
        stem = first.rstrip("0123456789").removesuffix("_")
        explained += [first, *(stem + name if name.startswith("_") else name for name in others)]
    assert sorted(explained) == sorted(FEATURES)


def code_of(document: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(ROOT / "docs" / document), re.M | re.S)
    return code


def test_the_code_that_uses_the_weights_works(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained / "checkpoints"
    shutil.copy(folder / "run1_epoch1.pt", folder / "run1_epoch25.pt")  # the one that is shown
    monkeypatch.chdir(trained)
    names: dict[str, object] = {}
    exec(code_of("checkpoints.md"), names)  # the documents are ours
    policy = names["policy"]
    assert isinstance(policy, Policy)
    assert is_same(dict(policy.state_dict()), checkpoint(trained, "run1_epoch25.pt")["model"])


def test_the_code_of_a_bot_works(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = code_of("use.md")
    assert len(code.splitlines()) <= 20
    policy = TrainedPolicy.read(trained / "checkpoints" / "run1_epoch1.pt", Settings)
    export.command(policy, trained / "exports" / "run1_epoch25", False, print)
    (bars,) = simulated_bars(1, 500, seed=0, end_ns=30 * 86_400 * 10**9)
    columns = {name: getattr(bars, name) for name in COLUMNS}
    pd.DataFrame(columns | {"open_time": pd.to_datetime(bars.open_time)}).to_csv(
        trained / "bars.csv", index=False
    )
    ((decision,), _) = policy.actor.decide([replace(bars, symbol="BTCUSDT")])
    monkeypatch.chdir(trained)
    for held in policy.settings.positions:
        names: dict[str, object] = {}
        exec(code.replace("held = 0.0", f"held = {held}"), names)  # the documents are ours
        target, probability = decision.when_holding(held)
        change = f"BTCUSDT: go from {held:+g} to {target:+g} of equity at the next open ({probability:.0%})\n"
        assert capsys.readouterr().out == (change if target != held else "")


def test_the_code_that_adds_a_feature_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", dict(FEATURES))
    names: dict[str, object] = {"torch": torch}
    exec(code_of("features.md"), names)  # the documents are ours
    assert set(features.FEATURES) - set(FEATURES) == {"body"}
    (bars,) = simulated_bars(1, 500, seed=0, end_ns=30 * 86_400 * 10**9)
    values = features.FEATURES["body"](features.History(bars, torch.device("cpu")))
    assert values.shape == (500,) and values.isfinite().all()


class _Acme(LoopbackServer):
    """The vendor of docs/adding_a_source.md: one coin at a price of 100, a minute without news every hour."""

    def plain(self, handler: BaseHTTPRequestHandler, faults: list[Fault]) -> Answer:
        query = parse_qs(urlsplit(handler.path).query)
        first, last = (-(-int(query[name][0]) // 60_000) * 60_000 for name in ("start", "end"))
        minutes = range(first, last, 60_000)
        bars = [[minute, 100, 101, 99, 100, 5] for minute in minutes if minute % 3_600_000]
        return 200, json.dumps(bars).encode(), {}


def test_the_code_that_adds_a_source_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(code_of("adding_a_source.md"), names)  # the documents are ours
    monkeypatch.setitem(SOURCES, "acme", names["SOURCE"])
    now_ns = 1_764_000_030 * 10**9
    request = DataRequest(("acme",), {"acme_coins": ("COIN",)}, now_ns - 3 * DAY_NS, now_ns, min_bars=1)
    lake, notes = Lake(tmp_path), Notes()
    with _Acme() as server:
        monkeypatch.setenv("ACME_URL", server.url)
        (answer,) = probe(request, now_ns)
        assert (answer.error, answer.found) == (None, "has 1416 bars of a day")
        for _ in range(2):
            report = refresh(lake, request, now_ns, notes)["acme"]
            assert report.status == "ok", report.message
        assert len(server.requests) == 1 + 4  # a probe and four days; nothing of them twice
        server.faults = [Fault("/bars", status=403)]
        failed = refresh(Lake(tmp_path / "other"), request, now_ns, notes)["acme"]
    assert failed.message == (
        "Acme failed: Acme refuses access (HTTP 403): check ACME_URL in .env; nothing is kept of it yet"
    )
    (row,) = load(lake, request).rows
    assert (row.num_bars, row.sources, row.rejected) == (3 * 1416, ("acme",), {})
