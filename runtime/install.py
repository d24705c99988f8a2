"""Make .venv and install a requirements file into it; done at once when that has happened before.

``python3 -m runtime.install requirements_simple.txt``, run from the project's folder by the start scripts
and tests/run.sh. What is installed is stamped with a digest of the requirements, so that a changed file
installs again. An installation that was cut off while it changed the environment leaves a mark, and the next
one starts over in an empty .venv. Two starts at once take turns. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.processes import WINDOWS, try_lock

VENV = Path(".venv")
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
LOG = VENV / "install.log"
UNFINISHED = VENV / "unfinished"
IS_NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"
LOG_LINES = 30  # of a failed installation, shown to the user


class InstallError(Exception):
    """The environment cannot be made; the text says what to do, and shows the tool's last words."""


def digests(requirements: Path) -> dict[str, str]:
    """Return a digest for the file and for each one that it includes with -r, by file name.

    A file's digest covers what it includes.
    """
    text = requirements.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    included = [line.split(maxsplit=1)[1].strip() for line in text.splitlines() if line.startswith("-r ")]
    for name in included:
        found |= digests(requirements.parent / name)
    content = "\n".join([text, *(found[name] for name in included)])
    return found | {requirements.name: hashlib.sha256(content.encode()).hexdigest()}


def install(requirements: Path) -> None:
    """Bring .venv to what the file asks for.

    Raises:
        InstallError: Python or pip failed.
        OSError: the folder cannot be written.
    """
    wanted = digests(requirements)
    if _is_done(requirements, wanted):
        return
    with Path("requirements_simple.txt").open("rb") as taken:
        if not try_lock(taken.fileno()):
            _say("Another start is installing; waiting for it.")
            try_lock(taken.fileno(), wait=True)
        if _is_done(requirements, wanted):
            return
        _make_venv()
        _say(f"Installing {requirements.name} into {VENV} (torch is large: minutes on the first start).")
        _run_pip(requirements)
        for name, digest in wanted.items():
            _stamp(name).write_text(digest)
        LOG.unlink(missing_ok=True)
        _say("Installed.")


def _is_done(requirements: Path, wanted: dict[str, str]) -> bool:
    stamp = _stamp(requirements.name)
    if UNFINISHED.exists() or not stamp.exists() or stamp.read_text() != wanted[requirements.name]:
        return False
    return _works("pass")


def _make_venv() -> None:
    """Leave a .venv whose python and pip run. One that somebody made before is kept when it works."""
    is_theirs = VENV.is_dir() and not UNFINISHED.exists() and _works(IS_NEW_ENOUGH)
    if is_theirs and _works("import pip"):
        return
    _say(f"Making {VENV} with Python {sys.version.split()[0]}.")
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    if not is_theirs:  # else it only lacks pip, as uv makes them: it gets pip and loses nothing
        for entry in VENV.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != UNFINISHED:
                entry.unlink()
    # The interpreter itself, not that of an environment which may just have been emptied.
    python = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run(
        [python, "-m", "venv", str(VENV)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        raise InstallError(f"Python could not make {VENV}:\n{made.stdout.strip()}")
    UNFINISHED.unlink()


def _run_pip(requirements: Path) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with (
        LOG.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, "--progress-bar", "off", "--requirement", str(requirements)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
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
            if words[:1] == ["Downloading"] and words[-1:] == ["MB)"]:  # the small ones are no news
                _say(f"  {words[1].rsplit('/', 1)[-1]} {words[-2]} {words[-1]}")
            elif words[:1] == ["Installing"]:  # up to here pip has changed nothing
                UNFINISHED.touch()
                _say("  unpacking")
    UNFINISHED.unlink(missing_ok=True)  # a pip that fails by itself puts back what it took away
    if pip.returncode:
        last = "\n".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise InstallError(f"pip could not install {requirements.name}; its last lines (all: {LOG}):\n{last}")


def _works(code: str) -> bool:
    try:
        return subprocess.run([str(PYTHON), "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _stamp(name: str) -> Path:
    return VENV / f"installed-{name}"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main(arguments: list[str]) -> int:
    """Install the named file, told in plain lines; returns the exit code of the program."""
    try:
        install(Path(arguments[0]))
    except (InstallError, OSError) as error:
        _say(str(error))
        _say("Not installed. Nothing is lost; the next start tries again.")
        return 1
    except KeyboardInterrupt:
        _say("Stopped before all was installed. The next start begins the installation again.")
        return 130
    return 0


if __name__ == "__main__":
    os.environ.pop("PYTHONHOME", None)  # of another Python; it would be taken for the new one's
    sys.exit(main(sys.argv[1:]))
