"""Weights from the cache of the hub, and a model sent to one: a server on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from dcft_dist.cli import main
from dcft_dist.errors import DataError
from dcft_dist.packages import local_weights

from ..own import tiny_encoder
from ..processes import output_of
from ..train.test_run import SHORT, SMALL

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the tiny encoder as `lab/tiny`."""
    folder = tmp_path / "hub/models--lab--tiny"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_encoder(tmp_path / "encoder"), snapshot)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_weights_come_from_the_cache_of_the_hub(cache: Path, tmp_path: Path) -> None:
    for name in ("hub:lab/tiny", "hub:lab/tiny@main", f"hub:lab/tiny@{COMMIT}"):
        assert local_weights(name) == str(cache)
    assert local_weights("some/folder") == "some/folder" and local_weights(None) is None
    for name, said in (
        ("hub:lab/other", "hf download lab/other"),
        ("hub:lab/tiny@v2", "hf download lab/tiny --revision v2"),
    ):
        with pytest.raises(DataError, match=f"is not in the cache of the hub .*{said}"):
            local_weights(name)
    (tmp_path / "tiny.toml").write_text(SHORT + SMALL.replace("WEIGHTS", "hub:lab/tiny"))
    quick = ["--train.max_steps", "1", "--engine", "single", "--method", "full", "--removal.fractions", "[]"]
    assert main(["train", str(tmp_path / "tiny.toml"), "--runs_dir", str(tmp_path), *quick]) == 0
    assert 'weights = "hub:lab/tiny"' in (tmp_path / "tiny/config.toml").read_text()


class Hub(BaseHTTPRequestHandler):
    """What a hub answers to one who makes a repository and commits files."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]
    refuses = False

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({"id": "lab/mine", "siblings": [], "sha": COMMIT})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if type(self).refuses:
            self._answer({"error": "you are not allowed to do that"}, 403)
        elif self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/lab/mine", "name": "lab/mine"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]
            self._answer({"files": answers})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"http://{self.headers['Host']}/lab/mine/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"error": f"no {self.path} here"}, 404)

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("ThisHub", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield kind
    server.shutdown()
    server.server_close()


def test_a_model_is_sent_to_a_hub(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.toml").write_text(SHORT + SMALL.replace("WEIGHTS", str(tiny_encoder(tmp_path / "encoder"))))
    quick = ["--engine", "single", "--method", "linear_probe", "--head_warmup.max_epochs", "1", "--test_resamples", "0"]
    output_of("train", tmp_path / "tiny.toml", "--runs_dir", tmp_path, *quick)
    run = tmp_path / "tiny"
    assert main(["push", str(run), "lab/mine"]) == 0
    assert f"/lab/mine/commit/{COMMIT}" in capsys.readouterr().out
    sent = {str(file.relative_to(run / "model")): file.read_bytes() for file in (run / "model").rglob("*") if file.is_file()}
    assert sent == hub.files and "model.safetensors" in sent and "README.md" in sent
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private", hub.made[0]

    assert main(["push", str(run), "no name"]) == 2
    assert "is not the name of a repository" in capsys.readouterr().err
    hub.refuses = True
    assert main(["push", str(run), "lab/mine"]) == 2
    assert "refuses lab/mine" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "lab/mine"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("private = false", "private = true"))
    assert main(["push", str(run), "lab/mine"]) == 2
