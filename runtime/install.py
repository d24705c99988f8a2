"""Create .venv and install a requirements file into it; returns at once if that is done already.

``python3 -m runtime.install requirements_simple.txt``, run from the project's folder by the start scripts
and tests/run.sh. A stamp holds a digest of the installed requirements, so that a changed file is installed
again. An installation that was killed while it changed the environment leaves a mark, and the next one starts
over in an empty .venv. Two starts at once take turns. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runtime import surroundings
from runtime.locking import try_lock
from runtime.processes import WINDOWS

VENV = Path(".venv")
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
LOG = VENV / "install.log"
UNFINISHED = VENV / "unfinished"
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


def install(requirements: Path) -> None:
    """Install the file into .venv unless that is done already.

    Raises:
        InstallError: Python or pip failed.
        OSError: the folder cannot be written.
    """
    wanted = digests(requirements)
    if _is_done(requirements.name, wanted):
        return
    with Path("requirements_simple.txt").open("rb") as lock:
        if not try_lock(lock.fileno()):
            _say("Another start is installing; waiting for it.")
            try_lock(lock.fileno(), wait=True)
        if _is_done(requirements.name, wanted):
            return
        _make_venv()
        _say(f"Installing {requirements.name} into {VENV} (torch is large: the first time takes minutes).")
        _run_pip(requirements)
        for name, digest in wanted.items():
            _stamp(name).write_text(digest)
        LOG.unlink(missing_ok=True)
        _say("Installed.")


def _is_done(name: str, wanted: dict[str, str]) -> bool:
    stamp = _stamp(name)
    is_current = stamp.exists() and stamp.read_text() == wanted[name]
    return is_current and not UNFINISHED.exists() and _runs("pass")


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


def _pip_environment() -> dict[str, str]:
    """Return the environment without what would make pip install elsewhere, or something else."""
    kept = {
        name: text for name, text in os.environ.items() if not name.startswith("PIP_") or name in PIP_KEPT
    }
    return kept | {"PIP_USER": "0"}  # also of a pip.conf: a virtual environment refuses it


def _run_pip(requirements: Path) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with (
        LOG.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, "--progress-bar", "off", "--requirement", str(requirements)],
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
        raise InstallError(f"pip could not install {requirements.name}; its last lines (all: {LOG}):\n{last}")


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
    try:
        install(Path(arguments[0]))
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
