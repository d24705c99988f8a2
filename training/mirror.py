"""A second place for checkpoints, so that a dead disk loses at most what was trained since the newest copy.

    MIRROR/resume/run1_epoch25.pt   copied first
    MIRROR/run1_epoch25.pt          so, as in the checkpoint folder, weights in place mean that both are complete
    MIRROR/best.pt, ledger.jsonl    the champion and the decisions; beside them the record and its head

A thread copies the newest checkpoint after it was saved and read back; while a slow copy is under way, newer ones
wait, and only the newest of them follows. The place is a folder, or any URL of fsspec with its library installed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from runtime.control import heartbeat_thread
from runtime.files import write_atomically
from training import checkpoint
from training.checkpoint import BEST, NUM_RESUME_STATES, RESUME, Checkpoint, CheckpointError

if TYPE_CHECKING:
    from continuous_training import Settings

log = logging.getLogger("continuous_training")

LEDGER = "ledger.jsonl"
# What grows while it is copied: the head of the record last, since it says how long the record is.
KEPT = (LEDGER, "record.jsonl", "record.head")
LONGEST_FETCH_SECONDS = 24 * 3600.0
LAST_COPY_SECONDS = 60.0  # for which the end of the program waits


class Mirror:
    """Copies checkpoints to the mirror, and fetches them into an empty folder. A context manager.

    Does nothing on ranks that do not write, and where no mirror is set.
    """

    def __init__(self, settings: Settings, wanted: bool) -> None:
        self.url = settings.mirror or ""
        self._folder = Path(settings.checkpoint_dir)
        self._wanted = wanted and bool(self.url)
        self._waiting: Path | None = None  # the newest that is not copied yet
        self._changed = threading.Condition()
        self._is_ending = self._has_failed = False
        self._best: tuple[int, int] | None = None  # inode and time of the champion that was copied
        self._thread = threading.Thread(target=self._copy_all, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        """Fetch the newest checkpoint if the folder has none, else copy the one there is.

        Raises:
            CheckpointError: the mirror has to be read and cannot be.
        """
        if not self._wanted:
            return self
        try:
            paths = checkpoint.existing(self._folder)
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be read: {error.strerror}") from error
        self._waiting = paths[0] if paths else None
        if not paths:
            with heartbeat_thread(LONGEST_FETCH_SECONDS):
                self.fetch()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._thread.is_alive():
            return
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        with heartbeat_thread(LAST_COPY_SECONDS):
            self._thread.join(LAST_COPY_SECONDS)
        if self._thread.is_alive():
            log.warning(f"the last copy to {self.url} takes longer; the next start repeats it")

    def after(self, on_saved: Callable[[Checkpoint], None]) -> Callable[[Checkpoint], None]:
        """Return a function that does ``on_saved``, then has the checkpoint copied in the background."""

        def save_and_copy(saved: Checkpoint) -> None:
            on_saved(saved)
            with self._changed:
                self._waiting = saved.path
                self._changed.notify()

        return save_and_copy

    # --- to the mirror --------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_ending)
                path, self._waiting = self._waiting, None
            if path is None:
                return
            try:
                self.copy(path)
                self._has_failed = False
            except Exception as error:  # noqa: BLE001 - a mirror never stops training, whatever its library raises
                if not self._has_failed:
                    log.warning(
                        f"{path.name} was not copied to {self.url}: {reason(error)}. Training continues."
                    )
                self._has_failed = True

    def copy(self, path: Path) -> None:
        """Read a checkpoint back, copy it with champion and ledger, and remove old copies.

        Raises:
            CheckpointError: it is damaged on the disk.
            Exception: the mirror cannot be written.
        """
        Checkpoint.read(path).with_resume()
        files, root = _open(self.url)
        files.makedirs(f"{root}/{RESUME}", exist_ok=True)
        self._put(files, self._folder / RESUME / path.name, f"{root}/{RESUME}/{path.name}")
        self._put(files, path, f"{root}/{path.name}")
        best = self._folder / BEST
        if best.exists() and (stamp := (best.stat().st_ino, best.stat().st_mtime_ns)) != self._best:
            self._put(files, best, f"{root}/{BEST}")
            self._best = stamp
        for name in KEPT:
            if (self._folder / name).exists():
                self._put(files, self._folder / name, f"{root}/{name}")
        # Older ones that are gone here go there, too; whatever is newer is of another training, and stays.
        here = {kept.name for kept in checkpoint.existing(self._folder)}
        names, states = _series(files, root), _series(files, f"{root}/{RESUME}")
        old = [name for name in names[names.index(path.name) + 1 :] if name not in here]
        old += [f"{RESUME}/{name}" for name in states[states.index(path.name) + NUM_RESUME_STATES :]]
        for name in old:
            files.rm_file(f"{root}/{name}")
        log.info(f"Copied {path.name} to {self.url}")

    @staticmethod
    def _put(files: Any, path: Path, target: str) -> None:
        if isinstance(files, LocalFileSystem):
            with path.open("rb") as source:
                write_atomically(Path(target), lambda file: shutil.copyfileobj(source, file, 1 << 20))
            return
        files.put_file(str(path), target)
        size = files.info(target)["size"]
        if size is not None and size != path.stat().st_size and path.name not in KEPT:
            raise OSError(f"{size} bytes arrived of {path.stat().st_size}")

    # --- from the mirror ------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring the newest whole checkpoint, its champion and the ledger into the folder, weights last.

        Raises:
            CheckpointError: the mirror cannot be read, or holds damaged checkpoints only.
        """
        try:
            files, root = _open(self.url)
            names = _series(files, root)
            for name in (*KEPT, BEST) if names else ():
                if files.exists(f"{root}/{name}"):
                    self._get(files, f"{root}/{name}", self._folder / name)
            for name in names:
                if files.exists(f"{root}/{RESUME}/{name}"):
                    log.info(f"Fetching {name} from {self.url}")
                    self._get(files, f"{root}/{RESUME}/{name}", self._folder / RESUME / name)
                    self._get(files, f"{root}/{name}", self._folder / name)
                    if checkpoint.read_complete(self._folder, name):
                        return
                    log.warning(f"{name} in {self.url} is damaged; the one before it is used")
                    (self._folder / name).unlink()
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever library
            raise CheckpointError(
                f"the mirror {self.url} cannot be read: {reason(error)}; a start without --mirror begins afresh"
            ) from None
        if names:
            raise CheckpointError(f"the mirror {self.url} has no whole checkpoint with its resume state")

    @staticmethod
    def _get(files: Any, source: str, path: Path) -> None:
        with files.open(source, "rb") as content:
            write_atomically(path, lambda file: shutil.copyfileobj(content, file, 1 << 20))


def try_out(url: str) -> str:
    """Write a small file to the mirror, read it back and remove it; return the newest copy's name, or "".

    Raises:
        Exception: of whatever library, where one of these fails; see ``reason``.
    """
    files, root = _open(url)
    place = root
    while is_local(url) and not Path(place).is_dir():  # nothing is left behind, not even a folder
        place = str(Path(place).parent)
    path, content = f"{place}/check-{os.getpid()}.tmp", os.urandom(64)
    files.pipe_file(path, content)
    try:
        if files.cat_file(path) != content:
            raise CheckpointError("it gives back other bytes than it took")
    finally:
        files.rm_file(path)
    names = _series(files, root)
    return names[0] if names else ""


def is_local(url: str) -> bool:
    """Return whether the mirror is a folder of this machine."""
    return "://" not in url.removeprefix("file://")


def _open(url: str) -> tuple[Any, str]:
    # MIRROR_OPTIONS is JSON for fsspec's file system, such as keys.
    try:
        options = json.loads(os.environ.get("MIRROR_OPTIONS") or "{}")
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise CheckpointError('MIRROR_OPTIONS must be a JSON object such as {"key": "..."}')
    files, root = fsspec.url_to_fs(url, **options)
    files.invalidate_cache()
    return files, str(root).rstrip("/")


def _series(files: Any, folder: str) -> list[str]:
    """Return the names of checkpoints in a folder of the mirror, newest first; none if it does not exist."""
    try:
        names = [str(path).rpartition("/")[2] for path in files.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    return checkpoint.newest_first(names)


def reason(error: Exception) -> str:
    """Describe an error without the text of a vendor's library, which may repeat keys."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, ImportError):
        return (
            f"its protocol needs another package ({_package(error)}): install it with .venv/bin/python -m pip"
        )
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return "fsspec knows no such protocol"
    return type(error).__name__


def _package(error: ImportError) -> str:
    # fsspec says "Install s3fs to access S3", or "Please install gcsfs".
    words = str(error).split()
    place = next((number for number, word in enumerate(words[:-1]) if word.lower() == "install"), None)
    return error.name or "see fsspec" if place is None else words[place + 1]
