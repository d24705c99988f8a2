"""START_CONTINUOUS.bat under Wine's cmd, with a stand-in for python.exe: `make drill`, or DRILL=1.

Needs wine (64 bit) and a compiler for Windows: on Debian ``apt-get install wine wine64
gcc-mingw-w64-x86-64-win32``. The .bat only starts Python, which the other tests run on Linux.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.program import PATIENCE, ROOT

COMPILER = "x86_64-w64-mingw32-gcc"
pytestmark = pytest.mark.skipif(
    os.environ.get("DRILL") != "1" or not shutil.which("wine") or not shutil.which(COMPILER),
    reason="takes a minute and needs wine and mingw: make drill",
)


@dataclass
class Outcome:
    code: int
    output: str
    calls: list[str]


class Windows:
    """A Wine prefix for these tests, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "python.exe"
        subprocess.run([COMPILER, "-o", self.python, ROOT / "tests" / "windows" / "python.c"], check=True)
        own = {"WINEPREFIX": str(folder / "prefix"), "WINEDEBUG": "-all", "DISPLAY": ""}
        self.environment = os.environ | own
        self.cmd("ver")  # creates the prefix

    def cmd(self, line: str, cwd: Path | None = None, **additions: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["wine", "cmd", "/c", line],
            cwd=cwd,
            env=self.environment | additions,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10 * PATIENCE,
        )

    def start(
        self, project: Path, line: str = "", tools: tuple[str, ...] = ("py",), **additions: str
    ) -> Outcome:
        """Start the .bat of a project from the folder above it, with these programs in the PATH."""
        parent, path = project.parent, project.parent / "path"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for tool in tools:
            shutil.copy2(self.python, path / f"{tool}.exe")
        calls = parent / "calls"
        calls.unlink(missing_ok=True)
        # Typed into a file: Wine's command line would change quotes. Without "call", with which every exit code
        # is 1 in Wine 8.
        typed = f'@"{project.name}\\START_CONTINUOUS.bat" {line}\r\n'
        (parent / "typed.bat").write_text(typed, newline="")
        done = self.cmd(
            "typed.bat",
            cwd=parent,
            WINEPATH=f"Z:{path}",
            CALLS=f"Z:{calls}",
            NOPAUSE="1",
            **additions,
        )
        where = f" in [Z:{project}] utf8=1".replace("/", "\\")
        called = calls.read_text().splitlines() if calls.exists() else []
        assert all(where in call for call in called), called
        return Outcome(done.returncode, done.stdout, [call.replace(where, "") for call in called])


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    windows = Windows(tmp_path_factory.mktemp("wine"))
    yield windows
    subprocess.run(["wineserver", "--kill", "--wait"], env=windows.environment, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder (x86) & more"
    folder.mkdir()
    shutil.copy2(ROOT / "START_CONTINUOUS.bat", folder)
    return folder


def without_probes(outcome: Outcome) -> list[str]:
    return [call for call in outcome.calls if "[-c]" not in call]


INSTALL = "[-m] [runtime.install] [requirements_simple.txt]"
TRAIN = "venv [-m] [runtime.supervisor]"


def test_the_first_start_and_the_next_ones_install_and_become_the_supervisor(
    windows: Windows, project: Path
) -> None:
    for _ in ("without .venv", "with it"):
        outcome = windows.start(project, '--demo --data-dir "C:\\my bars" --log-dir "a & b (1)"')
        assert (outcome.code, outcome.output) == (0, "")
        assert without_probes(outcome) == [
            f"launcher [-3] {INSTALL} [--demo] [--data-dir] [C:\\my bars] [--log-dir] [a & b (1)]",
            f"{TRAIN} [--demo] [--data-dir] [C:\\my bars] [--log-dir] [a & b (1)]",
        ]


@pytest.mark.parametrize("code", [2, 75, 130])
def test_the_exit_code_is_passed_on_and_printed(windows: Windows, project: Path, code: int) -> None:
    outcome = windows.start(project, "data", TRAIN_CODE=str(code))
    assert (outcome.code, outcome.output.strip()) == (code, f"Ended with exit code {code}.")
    assert without_probes(outcome)[1:] == [f"{TRAIN} [data]"]


def test_a_failing_installation_ends_it_before_training(windows: Windows, project: Path) -> None:
    outcome = windows.start(project, INSTALL_CODE="1")
    assert (outcome.code, outcome.output.strip()) == (1, "Ended with exit code 1.")
    assert without_probes(outcome) == [f"launcher [-3] {INSTALL}"]


@pytest.mark.parametrize(
    ("tools", "too_old", "taken"),
    [
        (("py", "python"), "", "launcher [-3]"),
        (("py", "python"), "launcher", "python"),
        (("python",), "", "python"),
        (("py", "python"), "launcher python", "venv"),
        ((), "", "venv"),
    ],
)
def test_the_first_python_that_is_new_enough_is_used(
    windows: Windows, project: Path, tools: tuple[str, ...], too_old: str, taken: str
) -> None:
    if taken == "venv":
        windows.start(project)  # made by an earlier start
    outcome = windows.start(project, tools=tools, TOO_OLD=too_old)
    assert (outcome.code, without_probes(outcome)) == (0, [f"{taken} {INSTALL}", TRAIN])


@pytest.mark.parametrize("tools", [(), ("py", "python")])
def test_without_a_python_it_prints_what_to_do(
    windows: Windows, project: Path, tools: tuple[str, ...]
) -> None:
    outcome = windows.start(project, tools=tools, TOO_OLD="launcher python")
    assert outcome.code & 0xFF == 9009 & 0xFF  # all that Linux lets through
    assert outcome.output.startswith("Python 3.11 or newer is needed and was not found.")
    assert "Ended with exit code 9009." in outcome.output
    assert without_probes(outcome) == []
