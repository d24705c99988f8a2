"""``export --push`` speaks to a hub over HTTP: one commit of all files, and the token in no message."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from commands.push import check_push
from tests.program import PATIENCE, ROOT, environment
from tests.training.checkpoints import untrained

TOKEN = "hf_sesame0123456789"


class Hub(ThreadingHTTPServer):
    """What a push needs of the hub's API; ``status`` is answered to a commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.summary = ""

    @property
    def is_private(self) -> bool:
        """As releases of the client spell it."""
        return self.created.get("visibility") == "private" or self.created.get("private") is True


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append(("POST", self.path))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.url}/me/policy"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answered = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": answered})
        if self.path.endswith("/commit/main") and self.server.status == 200:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.summary = line["value"]["summary"]
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{self.server.url}/me/policy/commit/0123", "commitOid": "0123"}
            return self.answer(commit | {"success": True, "hookOutput": ""})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.answer(
            {"error": f"refused {TOKEN}"}, self.server.status if self.server.status != 200 else 404
        )

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def run(tmp_path: Path, url: str, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    checkpoint = untrained(tmp_path)
    given = environment(
        HF_ENDPOINT=url, HF_TOKEN=token, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1"
    )
    command = [sys.executable, "continuous_training.py", "export", str(checkpoint)]
    return subprocess.run(
        [*command, "--output", str(tmp_path / "exported"), *words],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_push_is_one_commit_of_the_whole_export(tmp_path: Path, hub: Hub) -> None:
    result = run(tmp_path, hub.url, "--push", "me/policy")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Pushed {hub.url}/me/policy/commit/0123"
    folder = tmp_path / "exported"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()} and len(hub.files) == 4
    assert hub.files["README.md"].startswith(b"---\ntags: [")
    assert hub.is_private and hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.summary == "Export exported"
    shown = result.stdout + result.stderr
    assert TOKEN not in shown and TOKEN.encode() not in b"".join(hub.files.values())


@pytest.mark.parametrize(
    ("status", "words"), [(403, "HTTP 403; HF_TOKEN in .env must be"), (500, "HTTP 500; ")]
)
def test_a_refused_push_is_one_line_and_keeps_the_export(
    tmp_path: Path, hub: Hub, status: int, words: str
) -> None:
    hub.status = status
    result = run(tmp_path, hub.url, "--push", "me/policy", "--public")
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert f"the export is in {tmp_path / 'exported'}" in result.stderr
    assert not hub.is_private and (tmp_path / "exported" / "card.json").exists()
    assert TOKEN not in result.stdout + result.stderr


def test_no_hub_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "http://127.0.0.1:9", "--push", "me/policy")
    assert result.returncode == 2 and "the hub cannot be reached (" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("repository", "given", "message"),
    [
        ("policy", {"HF_TOKEN": TOKEN}, "--push policy must be OWNER/NAME, such as me/policy"),
        ("me/../policy", {"HF_TOKEN": TOKEN}, "must be OWNER/NAME"),
        ("me/policy", {}, "--push needs HF_TOKEN in .env, a token that may write"),
        ("me/policy", {"HF_TOKEN": " "}, "--push needs HF_TOKEN in .env"),
    ],
)
def test_what_a_push_needs_is_said_before_anything_is_exported(
    repository: str, given: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check_push(repository, given)
