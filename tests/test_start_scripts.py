"""The start scripts, run for real in a copy of the project whose folder has blanks in its name.

Installing is real too (venv, pip, a wheel), but offline: the only package is made here.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.runtime.machines import add_nvidia_smi

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("START_CONTINUOUS.sh", "tests/run.sh", ".ci/run", "runtime/venv.sh")
PATIENCE = 120.0  # a bound for a busy machine, not an expectation

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash")


def make_wheel(folder: Path, version: str, name: str = "tinypackage") -> Path:
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Project:
    """A copy of the files that the start scripts need, with the fake worker as the program."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent / "a folder (x86) & more"
        (self.folder / "tests").mkdir(parents=True)
        no_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "runtime", self.folder / "runtime", ignore=no_caches)
        for name in SCRIPTS:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, self.folder / name)
        shutil.copy2(ROOT / "tests" / "runtime" / "fake_worker.py", self.folder / "continuous_training.py")
        self.wheels = parent / "wheels"
        self.wheels.mkdir()
        for version in ("1.0", "2.0"):
            make_wheel(self.wheels, version)
        self.require("tinypackage==1.0")
        (self.folder / "requirements_dev.txt").write_text("-r requirements_simple.txt\n")
        self.state = parent / "state"
        self.state.mkdir()
        self.environment = os.environ | {
            "FAKE_FOLDER": str(self.state),
            "NPROC": "1",
            "EPOCH_SECONDS": "0.1",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
        }

    @property
    def python(self) -> Path:
        return self.folder / ".venv" / "bin" / "python"

    def require(self, line: str) -> None:
        (self.folder / "requirements_simple.txt").write_text(line + "\n")

    def start(self, *arguments: str, **how: object) -> subprocess.Popen[str]:
        """Start it from another folder, in a session of its own, so that it can be killed as a whole."""
        return subprocess.Popen(
            ["bash", str(self.folder / "START_CONTINUOUS.sh"), *arguments],
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **({"env": self.environment} | how),  # type: ignore[call-overload]
        )

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        process = self.start(*arguments, env=environment or self.environment)
        output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors

    def installed(self, name: str = "tinypackage") -> str:
        """Return the version of a required package."""
        code = f"import {name}; print({name}.version)"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An installed copy with tinypackage 1.0, for tests that leave it unchanged."""
    project = Project(tmp_path_factory.mktemp("project"))
    code, output, errors = project.run("check", "--name", "two words", "*")
    assert (code, output) == (7, "alone: check --name two words *\n"), errors
    assert [line.split()[0] for line in errors.splitlines()] == [
        "Creating",
        "Installing",
        "unpacking",
        "Installed.",
    ]
    return project


def test_a_second_start_installs_and_prints_nothing(project):
    assert project.run("check") == (7, "alone: check\n", "")
    assert project.installed() == "1.0"


def test_the_program_learns_from_where_it_was_called(project):
    assert project.run("folder") == (0, "/\n", "")


def test_the_script_becomes_the_supervisor_so_that_signals_reach_it(project):
    process = project.start("--epochs", "2")
    end = time.monotonic() + PATIENCE
    while not (project.state / "epochs").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Stopping after this epoch" in errors
    assert "preflight --epochs 2 planned=1" in (project.state / "log").read_text()


def test_ctrl_c_that_python_swallows_while_it_starts_ends_the_script(project, tmp_path):
    deaf = tmp_path / "python3"
    deaf.write_text(
        f"#!/bin/bash\ntouch '{tmp_path}/asked'\ntrap 'exit 1' INT\nwhile :; do sleep 0.02; done\n"
    )
    deaf.chmod(0o755)
    process = project.start("check", env=project.environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, "")


def test_a_changed_requirement_is_installed_and_a_failing_one_reports_why(project):
    project.require("tinypackage==3.0")
    code, _, errors = project.run("check")
    assert code == 1 and "No matching distribution found for tinypackage==3.0" in errors
    assert errors.splitlines()[-1] == "Installation failed. Nothing is lost; the next start tries again."
    assert project.installed() == "1.0"
    for version in ("2.0", "1.0"):
        project.require(f"tinypackage=={version}")
        assert project.run("check")[0] == 7
        assert project.installed() == version


def test_the_tests_requirements_cover_the_programs(project):
    """After tests/run.sh a start has nothing to install."""
    command = [sys.executable, "-m", "runtime.install", "requirements_dev.txt"]
    subprocess.run(command, cwd=project.folder, env=project.environment, check=True, capture_output=True)
    (project.folder / ".venv" / "bin" / "pip").unlink(missing_ok=True)
    assert project.run("check") == (7, "alone: check\n", "")


def test_an_old_python_is_refused_with_the_version_needed(project, tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "python3").write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.8.1 || exit 1\n")
    (tmp_path / "python3").chmod(0o755)
    bare = Project(tmp_path)
    code, _, errors = bare.run(environment={"PATH": str(tmp_path)})
    assert code == 1
    assert errors.startswith(
        "Python 3.11 or newer is needed and was not found (python3 --version: Python 3.8.1)."
    )
    # An environment that is there already is enough.
    (bare.folder / ".venv").symlink_to(project.folder / ".venv")
    (bare.folder / "requirements_simple.txt").write_text(
        (project.folder / "requirements_simple.txt").read_text()
    )
    environment = project.environment | {"PATH": str(tmp_path)}
    assert bare.run("check", environment=environment)[0] == 7


class Box:
    """A machine with four GPUs, and wheels named torch, as in a mirror of PyTorch's index."""

    def __init__(self, folder: Path) -> None:
        self.project, self.tools = Project(folder), folder / "bin"
        self.for_cuda_12 = make_wheel(self.project.wheels, "2.13.0+cu126", "torch")
        self.project.require("torch==2.13.0\ntinypackage==1.0")

    def start(self, driver: str, **additions: str) -> tuple[int, str]:
        """Start with this driver; return exit code and standard error."""
        add_nvidia_smi(self.tools, driver, count=4)
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        environment = self.project.environment | {"PATH": path} | additions
        code, _, errors = self.project.run("check", environment=environment)
        return code, errors


def test_torch_is_a_build_that_the_driver_runs(tmp_path):
    box = Box(tmp_path)
    project, start = box.project, box.start
    code, errors = start("470.256.02")
    assert code == 2 and "driver 470.256.02 is too old: torch==2.13.0 needs 525 or newer" in errors
    assert not project.python.exists()
    assert start("535.183.01")[0] == 7 and project.installed("torch") == "2.13.0+cu126"
    assert start("550.54.15") == (7, "")
    shutil.rmtree(box.tools)  # a GPU that is gone for a day costs no new installation
    assert project.run("check") == (7, "alone: check\n", "")
    assert start("470.256.02", CUDA_VISIBLE_DEVICES="") == (7, "")


@pytest.mark.drill
def test_a_new_driver_installs_again_and_what_cannot_be_had_is_replaced(tmp_path):
    box = Box(tmp_path)
    project, start = box.project, box.start
    assert start("535.183.01")[0] == 7
    box.for_cuda_12.unlink()
    code, errors = start("580.65.06")  # a new driver, and nothing is in reach
    assert code == 7 and "torch==2.13.0 cannot be had now; torch==2.13.0+cu126 (cu126) runs on" in errors
    for version in ("2.10.0", "2.13.0"):  # as on PyPI
        make_wheel(project.wheels, version, "torch")
    assert start("580.65.06")[0] == 7 and project.installed("torch") == "2.13.0"
    code, errors = start("535.183.01")  # back, and the index is out of reach
    assert code == 7 and "torch==2.13.0+cu126 cannot be had: torch==2.10.0 of PyPI instead" in errors
    assert (project.installed("torch"), project.installed()) == ("2.10.0", "1.0")
    assert start("535.183.01") == (7, "")


@pytest.mark.drill
@pytest.mark.slow
def test_an_installation_that_is_killed_is_repaired_by_the_next_start(tmp_path):
    project = Project(tmp_path)
    process = project.start("check")
    end = time.monotonic() + PATIENCE
    while not project.python.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (project.folder / ".venv" / "installed-requirements_simple.txt").exists()
    code, output, errors = project.run("check")
    assert (code, output) == (7, "alone: check\n"), errors
    assert project.installed() == "1.0"
    # The same while pip unpacks: some files are there, and one is torn.
    site = next((project.folder / ".venv" / "lib").glob("python*/site-packages"))
    (site / "tinypackage.py").write_text("version = 'torn'\n")
    (project.folder / ".venv" / "unfinished").touch()
    assert project.run("check")[0] == 7
    assert project.installed() == "1.0"


@pytest.mark.drill
def test_two_first_starts_at_once_take_turns(tmp_path):
    project = Project(tmp_path)
    both = [project.start("check") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [7, 7], outputs
    assert sorted(errors.count("Installed.") for errors in outputs) == [0, 1]


def test_run_sh_runs_every_check_and_passes_its_arguments_to_pytest(project, tmp_path):
    for name in ("ruff", "mypy", "pytest"):
        (tmp_path / f"{name}.py").write_text(f"import sys\nprint({name!r}, *sys.argv[1:])\n")
    result = subprocess.run(
        ["bash", str(project.folder / ".ci" / "run"), "-k", "one or two"],
        cwd="/",
        env=project.environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "pytest -n 2 --dist loadfile -k one or two",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert b"\r" not in (ROOT / name).read_bytes()


def test_the_bat_does_what_the_sh_does():
    """Checked without Windows: its parts, and rules of cmd that are easily broken."""
    raw = (ROOT / "START_CONTINUOUS.bat").read_bytes()
    assert raw.count(b"\n") == raw.count(b"\r\n"), "cmd loses labels in files with bare line feeds"
    assert raw.isascii()
    assert "*.bat text eol=crlf" in (ROOT / ".gitattributes").read_text()
    text = raw.decode().replace("\r\n", "\n")
    code = [line for line in text.splitlines() if line and not line.startswith("rem")]
    for needed in (
        'cd /d "%~dp0"',
        '"%PY%" %PYARGS% -m runtime.install requirements_simple.txt %*',
        '".venv\\Scripts\\python.exe" -m runtime.supervisor %*',
        "endlocal & exit /b %RC%",
    ):
        assert needed in code
    labels = {line for line in code if line.startswith(":")}
    assert set(re.findall(r"(?:goto|call) (:\w+)", text)) == labels == {":try", ":end"}
    assert all("NOPAUSE" in line for line in code if "pause" in line)
    shell = (ROOT / "START_CONTINUOUS.sh").read_text() + (ROOT / "runtime/venv.sh").read_text()
    assert set(re.findall(r"-m (runtime\.\w+)", text)) == set(re.findall(r"-m (runtime\.\w+)", shell))


def test_env_example_names_every_variable_that_the_program_reads():
    offered = set(re.findall(r"^([A-Z0-9_]+)=$", (ROOT / ".env.example").read_text(), flags=re.M))
    paths = [
        path
        for package in ("commands", "data_sources", "training")
        for path in (ROOT / package).rglob("*.py")
    ]
    sources = "\n".join(path.read_text() for path in paths)
    ours = r'"((?:POLYGON|BINANCE|YAHOO|MIRROR|NOTIFY|WEB)_[A-Z0-9_]+|HF_TOKEN)"'
    assert offered == set(re.findall(ours, sources))
