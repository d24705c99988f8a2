"""Create .venv and install a requirements file into it; returns at once if that is done already.

``python3 -m runtime.install requirements_simple.txt``, run from the project's folder by the start scripts
and tests/run.sh; ``--dry-run`` in front prints what it would install. A stamp holds a digest of the installed
requirements, another one the build of torch that the driver needs, so that a changed file or driver is installed
again. An installation that was killed while it changed the environment leaves a mark, and the next one starts
over in an empty .venv. Two starts at once take turns. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime import surroundings, torch_build
from runtime.control import EXIT_SETTING
from runtime.locking import try_lock
from runtime.processes import WINDOWS

VENV = Path(".venv")
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
LOG = VENV / "install.log"
UNFINISHED = VENV / "unfinished"
TORCH_STAMP = VENV / "installed-torch"  # the build that was chosen, and the requirement that became of it
CHOSEN = VENV / "requirements.txt"  # the requirements with that torch
IS_NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"
# Where pip finds packages and how it gets there; its other variables would install elsewhere, or something else.
PIP_KEPT = tuple(
    f"PIP_{name}"
    for name in (
        *("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CONFIG_FILE", "KEYRING_PROVIDER"),
        *("CERT", "CLIENT_CERT", "TRUSTED_HOST", "PROXY", "TIMEOUT", "DEFAULT_TIMEOUT", "RETRIES"),
        *("CACHE_DIR", "NO_CACHE_DIR", "CONSTRAINT", "PREFER_BINARY", "NO_BUILD_ISOLATION", "USE_FEATURE"),
    )
)
# "pip config list" obeys the "user" of a pip.conf itself, and lists a part. Newer versions group by file.
READ_PIP_CONF = """
import json
from pip._internal.configuration import Configuration
read = Configuration(isolated=False)
read.load()
groups = [value if isinstance(value, dict) else {key: value} for key, value in read.items()]
print(json.dumps([pair for group in groups for pair in group.items()]))
"""
LOG_LINES = 30  # shown to the user if the installation fails


class InstallError(Exception):
    """Python or pip failed; the text ends with their output."""


def digests(requirements: Path) -> dict[str, str]:
    """Return digests by name of the file and of those that it includes with ``-r``; its own covers theirs."""
    text = content = requirements.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("-r "):
            name = line.removeprefix("-r").strip()
            found |= digests(requirements.parent / name)
            content += f"\n{found[name]}"
    return found | {requirements.name: hashlib.sha256(content.encode()).hexdigest()}


def install(requirements: Path, arguments: Sequence[str] = (), dry_run: bool = False) -> None:
    """Install the file into .venv unless that is done already.

    Args:
        requirements: the file.
        arguments: of the start, which may ask for the CPU.
        dry_run: print what would be installed, and change nothing.

    Raises:
        InstallError: Python or pip failed.
        TooOldError: no torch runs on this driver.
        OSError: the folder cannot be written.
    """
    wanted, lines = digests(requirements), _lines(requirements)
    torch = next((line for line in lines if line.startswith("torch=")), None)
    build = torch_build.choose(torch, os.environ, arguments) if torch else None
    if dry_run:
        if build:
            _say(f"{build.requirement} from {build.source}: {build.reason}.")
        is_done = _is_done(requirements.name, wanted, build)
        _say(f"{requirements.name} is installed." if is_done else f"{requirements.name} would be installed.")
        return
    if _is_done(requirements.name, wanted, build):
        return
    with Path("requirements_simple.txt").open("rb") as lock:
        if not try_lock(lock.fileno()):
            _say("Another start is installing; waiting for it.")
            try_lock(lock.fileno(), wait=True)
        if _is_done(requirements.name, wanted, build):
            return
        before = _chosen_before() if _is_current(requirements.name, wanted) else None
        _make_venv()
        LOG.unlink(missing_ok=True)
        _say(f"Installing {requirements.name} into {VENV} (torch is large: the first time takes minutes).")
        try:
            _run_all(requirements, build, lines)
        except InstallError:
            if build is None or UNFINISHED.exists() or not build.can_wait(before):
                raise
            _say(f"{build.requirement} cannot be had now; {before} runs on this driver too.")
            return
        for name, digest in wanted.items():
            _stamp(name).write_text(digest)
        LOG.unlink(missing_ok=True)
        _say("Installed.")


def _lines(requirements: Path) -> list[str]:
    """Return the lines of the file and of those that it includes, without comments."""
    found = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found += _lines(requirements.parent / text.removeprefix("-r").strip())
        elif text:
            found.append(text)
    return found


def _is_done(name: str, wanted: dict[str, str], build: torch_build.Build | None) -> bool:
    if not _is_current(name, wanted):
        return False
    chosen = _chosen_before()
    return build is None or chosen == str(build) or (not build.needs_gpu and chosen is not None)


def _is_current(name: str, wanted: dict[str, str]) -> bool:
    """Return whether these requirements are installed, with some torch."""
    stamp = _stamp(name)
    is_current = stamp.exists() and stamp.read_text() == wanted[name]
    return is_current and not UNFINISHED.exists() and _runs("pass")


def _chosen_before() -> str | None:
    """Return the build that is installed; PyPI's own where none is recorded, None in a new environment."""
    if TORCH_STAMP.exists():
        return TORCH_STAMP.read_text(encoding="utf-8").splitlines()[0]
    required = [line for line in _lines(Path("requirements_simple.txt")) if line.startswith("torch=")]
    return required[0] if required and _stamp("requirements_simple.txt").exists() else None


def _run_all(requirements: Path, build: torch_build.Build | None, lines: Sequence[str]) -> None:
    """Install this build of torch, or PyPI's that comes nearest, and the other requirements around it."""
    if build is None:
        _run_pip("--requirement", str(requirements))
        return
    torch = _install_torch(build)
    CHOSEN.write_text("\n".join(torch if line.startswith("torch=") else line for line in lines) + "\n")
    _run_pip("--requirement", str(CHOSEN))
    TORCH_STAMP.write_text(f"{build}\n{torch}\n", encoding="utf-8")


def _install_torch(build: torch_build.Build) -> str:
    """Install what of torch cannot come with the others; return the requirement that holds from now on.

    A mirror of one's own, which pip is set up with, comes before PyTorch's index.
    """
    _say(f"  {build.requirement}: {build.reason}")
    before = _chosen_before()
    again = ("--force-reinstall", "--no-deps") if before and before != str(build) else ()
    if not build.backend:
        if build.options or again:  # pip sees no difference between builds of one release
            _run_pip(*again, *build.options, build.requirement)
        return build.requirement
    if _uv_installs(build):
        return build.requirement
    index = ("--index-url", f"{torch_build.INDEX}/{build.backend}", "--retries", "1")
    for source in ((), index):
        try:
            _run_pip(*source, build.requirement)
        except InstallError:
            continue
        return build.requirement
    _say(f"  {build.requirement} cannot be had: {build.fallback} of PyPI instead")
    if again:
        _run_pip(*again, build.fallback)
    return build.fallback


def _uv_installs(build: torch_build.Build) -> bool:
    """Install this build by uv, where that is at hand; its own choice, ``auto``, could be another than ours."""
    uv = shutil.which("uv")
    if uv is None:
        return False
    UNFINISHED.touch()
    command = [uv, "pip", "install", "--python", str(PYTHON), f"--torch-backend={build.backend}"]
    result = subprocess.run(
        [*command, build.requirement], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    UNFINISHED.unlink()
    return result.returncode == 0


def _make_venv() -> None:
    """Make sure that .venv has a python and pip that run; a working one is kept as it is."""
    has_python = VENV.is_dir() and not UNFINISHED.exists() and _runs(IS_NEW_ENOUGH)
    if has_python and _runs("import pip"):
        return
    _say(f"Creating {VENV} with Python {sys.version.split()[0]}.")
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    if not has_python:  # else it only lacks pip, as uv creates them, and its packages are kept
        for entry in VENV.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != UNFINISHED:
                entry.unlink()
    # The base interpreter, not that of an environment which may just have been emptied.
    python = getattr(sys, "_base_executable", sys.executable)
    result = subprocess.run(
        [python, "-m", "venv", str(VENV)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise InstallError(f"Python could not create {VENV}:\n{result.stdout.strip()}")
    UNFINISHED.unlink()


def _pip_environment(python: str = str(PYTHON)) -> dict[str, str]:
    """Return an environment without what would make pip install elsewhere, or something else.

    Variables and the user's pip.conf may hold ``target``, ``dry-run`` and more; of both the kept settings remain.
    """
    others = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
    surroundings.shut_out(others)
    given = {name: text for name, text in os.environ.items() if name in PIP_KEPT}
    try:
        answer = subprocess.run(
            [python, "-c", READ_PIP_CONF], capture_output=True, text=True, check=True
        ).stdout
        found = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError):  # another pip: its files count as they are
        return others | given | {"PIP_USER": "0"}
    settings = {}
    for name, text in sorted(found):  # such as global.index-url, then install.index-url, which is stronger
        variable = "PIP_" + name.rpartition(".")[2].replace("-", "_").upper()
        if variable in PIP_KEPT and not name.startswith(":env:"):
            settings[variable] = text
    return others | settings | given | {"PIP_CONFIG_FILE": os.devnull}


def _run_pip(*what: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with (
        LOG.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, "--progress-bar", "off", *what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_pip_environment(),
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            log.flush()
            words = line.split()
            if words[:1] == ["Downloading"] and words[-1:] == ["MB)"]:  # not kB
                _say(f"  {words[1].rsplit('/', 1)[-1]} {words[-2]} {words[-1]}")
            elif words[:1] == ["Installing"]:  # until now pip has changed nothing
                UNFINISHED.touch()
                _say("  unpacking")
    UNFINISHED.unlink(missing_ok=True)  # a pip that fails, unlike one that is killed, undoes its changes
    if pip.returncode:
        last = "\n".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise InstallError(f"pip could not install {what[-1]}; its last lines (all: {LOG}):\n{last}")


def _runs(code: str) -> bool:
    try:
        return subprocess.run([str(PYTHON), "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _stamp(name: str) -> Path:
    return VENV / f"installed-{name}"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main(arguments: list[str]) -> int:
    """Install the named file and return the exit code of the program."""
    dry_run = arguments[0] == "--dry-run"
    try:
        install(Path(arguments[dry_run]), arguments[1 + dry_run :], dry_run)
    except torch_build.TooOldError as error:
        _say(str(error))
        return EXIT_SETTING
    except (InstallError, OSError) as error:
        _say(str(error))
        _say("Installation failed. Nothing is lost; the next start tries again.")
        return 1
    except KeyboardInterrupt:
        _say("Installation interrupted; the next start tries again.")
        return 130
    return 0


if __name__ == "__main__":
    surroundings.guard_streams()
    os.environ.pop("PYTHONHOME", None)  # of another Python; the new one would use it
    sys.exit(main(sys.argv[1:]))
