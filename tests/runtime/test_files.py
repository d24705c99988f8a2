import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.files import sha256_of, write_atomically

ROOT = Path(__file__).parents[2]


def test_a_written_file_has_its_content_and_leaves_no_other(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, lambda file: file.write(b"first"))
    write_atomically(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_sha256_equals_hashlibs_over_many_pieces(tmp_path):
    data = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    """The writer alternates between two large files' worth of one byte; whole means one byte only."""
    path = tmp_path / "file"
    code = (
        "import sys, itertools, pathlib\n"
        "from runtime.files import write_atomically\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    write = lambda file: [file.write(bytes([i % 256]) * 65536) for _ in range(32)]\n"
        "    write_atomically(pathlib.Path(sys.argv[1]), write)\n"
        "    i < 3 and print(i, flush=True)\n"
    )
    for kill in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(2 + kill % 3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        data = path.read_bytes()
        assert len(data) == 32 * 65536
        assert data == data[:1] * len(data)
