"""What the shell, a notebook or another program left in the environment, and libraries would act upon.

Settings of this program are its constants, flags and .env. Proxies, certificates, devices and threads are those
of the machine, and stay. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.util
import io
import os
import select
import sys
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TextIO

from runtime.control import EXIT_SETTING
from runtime.cores import limit_threads

START = "START_CONTINUOUS.bat" if sys.platform == "win32" else "bash START_CONTINUOUS.sh"
# Read by libraries, and meant for other programs.
FOREIGN = (
    "MPLBACKEND",  # a notebook's, which is not installed here
    "MATPLOTLIBRC",
    "ARROW_DEFAULT_MEMORY_POOL",  # prints a line for a pool that it does not know
    "PROMETHEUS_MULTIPROC_DIR",
    "prometheus_multiproc_dir",
    "PYTHON_DOTENV_DISABLED",
    "PYTHONINSPECT",  # waits for input where the program should end
    "PYTHONOPTIMIZE",
    "PYTHONSAFEPATH",  # hides the program's own modules
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
    "SSLKEYLOGFILE",  # the keys of every connection, in a file
    "TERMINAL_WIDTH",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)
# AWS: Polygon's S3 is not Amazon's. PET: torchrun's own options, as Kubeflow sets them. GIT: within a hook.
# POLARS: an engine that is not installed, or debugging.
FOREIGN_PREFIXES = ("AWS_", "BOTO_", "PET_", "GIT_", "POLARS_")
KEPT = ("AWS_CA_BUNDLE", "POLARS_MAX_THREADS")
# The parent may be a rank of something (Slurm, Kubeflow, another torchrun): its numbers are not ours.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_")  # of its store, which a rank of ours would wait for
# The reader of a stream is gone for good; Windows reports EINVAL. Other errors, as of a full disk, may pass.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE, errno.ECONNRESET, errno.EINVAL)
FULL_SECONDS = 5.0
MOST_FILES = 65_536
USUAL_THRESHOLD = gc.get_threshold()
_lost: list[str] = []  # reasons of writes that failed while the reader was there


def shut_out(environment: MutableMapping[str, str]) -> None:
    """Remove what was meant for other programs from an environment; requests reads no netrc with it."""
    for name in list(environment):
        if (name in FOREIGN or name.startswith(FOREIGN_PREFIXES)) and name not in KEPT:
            del environment[name]
    environment["NETRC"] = os.devnull
    if "error" in environment.get("PYTHONWARNINGS", ""):
        del environment["PYTHONWARNINGS"]
    if not _is_count(environment.get("POLARS_MAX_THREADS", "1"), least=1):
        del environment["POLARS_MAX_THREADS"]


def shut_out_ranks(environment: MutableMapping[str, str]) -> None:
    """Remove the numbers of a rank of something else from an environment."""
    for name in list(environment):
        if name in RANKS or name.startswith(RANK_PREFIXES):
            del environment[name]


def is_rank(environment: Mapping[str, str], arguments: Sequence[str]) -> bool:
    """Whether this is a rank that a launcher started: a training, with all that torch needs to find the others."""
    is_training = not arguments or arguments[0].startswith("-") or arguments[0] == "train"
    is_whole = all(_is_count(environment.get(name, "")) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return is_training and is_whole and bool(environment.get("MASTER_ADDR"))


def _is_count(text: str, least: int = 0) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= least


def require_packages() -> None:
    """End with one line where this Python is not the one that the start script has prepared."""
    if importlib.util.find_spec("typer") and importlib.util.find_spec("torch"):
        return
    command = " ".join([START, *sys.argv[1:]])
    text = f"{sys.executable} has no packages of this program: use those of .venv, by {command}\n"
    if sys.stderr is not None:
        sys.stderr.write(text)
    sys.exit(EXIT_SETTING)


def prepare_process() -> None:
    """Keep the surroundings out of this process and its children; call it before libraries are imported."""
    if "error" in os.environ.get("PYTHONWARNINGS", ""):  # a library's warning is no crash
        warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error"]  # type: ignore[index]
    shut_out(os.environ)
    if not is_rank(os.environ, sys.argv[1:]):
        shut_out_ranks(os.environ)
    os.environ.update(limit_threads())  # torch's would be as many as the machine has cores
    guard_streams()
    raise_file_limit()
    # Imports make a million objects and no garbage: to look for some as often as usual takes a tenth of a start.
    gc.set_threshold(50_000, 20, 50)


def collect_as_usual() -> None:
    """Look for garbage as often as usual, but no more among what was imported: what it holds may be gigabytes."""
    gc.freeze()
    gc.set_threshold(*USUAL_THRESHOLD)


def raise_file_limit() -> None:
    """Let this process open as many files as it may; a shell's usual limit is lower, and some set it far lower."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Output(io.FileIO):
    """A standard stream whose reader may go away: what is written then is lost, and nothing else."""

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
            while count is None and select.select((), (self,), (), FULL_SECONDS)[1]:
                count = super().write(data)  # a program beside this one made the terminal non-blocking
        except OSError as error:
            if error.errno in GONE:
                _open_nowhere(self.fileno())
            elif self.fileno() == 1:
                _lost.append(error.strerror or str(error))
            count = None
        return memoryview(data).nbytes if count is None else count


def lost_output() -> str:
    """Return why output of this process was lost that a reader may wait for, as on a full disk; "" if none was."""
    sys.stdout.flush()
    return _lost[0] if _lost else ""


def guard_streams() -> None:
    """Let no standard stream that is closed, goes away or lacks a character end or damage the program."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed from the start: the next file opened would become the output of libraries
            _open_nowhere(number)
    sys.stdout, sys.stderr = _guard(sys.stdout, 1), _guard(sys.stderr, 2)


def _guard(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - until the process ends
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    unbuffered = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(unbuffered, io.FileIO):
        return stream  # a console of Windows
    stream.flush()
    raw: Any = _Output(number, "wb", closefd=False)
    return io.TextIOWrapper(
        raw if stream.buffer is unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)
