"""Downloads with the real hub client against a local server: whole, cut off, of a wrong size, and not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest

import prepare_caseops_data as prepare

PROGRAM = Path(prepare.__file__)
NAME = prepare.PUBLISHED
MODEL = "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
COMMIT = "0" * 40


def shard_bytes(entries: int, seed: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = prepare.SHARD_MAGIC, prepare.SHARD_VERSION, entries
    return header.tobytes() + np.random.default_rng(seed).integers(0, 8192, entries).astype("<u2").tobytes()


def published_files() -> dict[str, bytes]:
    """A small repository in the form of the published one."""
    manifest = {
        "datasets": [
            {"name": "another", "tokenizer_name": "t0", "stats": {"files_train": 1, "files_val": 1}},
            {
                "name": NAME,
                "tokenizer_name": "t1",
                "stats": {"files_train": 3, "files_val": 1},
                "val_bytes_glob": f"datasets/{NAME}/fineweb_val_bytes_*.bin",
            },
        ],
        "tokenizers": [{"name": "t1", "model_path": MODEL, "vocab_path": MODEL.replace(".model", ".vocab")}],
    }
    files = {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        f"datasets/{MODEL}": b"model",
        f"datasets/{MODEL}".replace(".model", ".vocab"): b"vocab",
        "datasets/docs_selected.jsonl": b'{"text": "one"}\n' * 1000,
        "datasets/docs_selected.source_manifest.json": b"{}",
    }
    for number, kind in enumerate(("train_000000", "train_000001", "train_000002", "val_000000", "val_bytes_000000")):
        entries = 6_000_000 if kind == "train_000000" else 40_000 + number  # the client writes in steps of 10 MB
        files[f"datasets/datasets/{NAME}/fineweb_{kind}.bin"] = shard_bytes(entries, number)
    return files


class HubServer(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as a download needs; `cuts` and `wrong` make it misbehave."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cuts: dict[str, list[int]] = {}  # file -> after how many bytes each of the next answers breaks off
        self.wrong: dict[str, int] = {}  # file -> a size that the listing claims for it
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The listing of paths (POST) and the files themselves (HEAD and GET, with ranges)."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        listed = []
        for path in parse_qs(body).get("paths", []):
            if path in self.server.files:
                data = self.server.files[path]
                size = self.server.wrong.get(path, len(data))
                listed.append(
                    {
                        "type": "file",
                        "path": path,
                        "size": size,
                        "oid": "1" * 40,
                        "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 100},
                    }
                )
        self._answer(200, json.dumps(listed).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, _, path = unquote(self.path).partition("/resolve/main/")
        wanted = self.headers.get("Range")
        self.server.asked.append((self.command, path, wanted))
        data = self.server.files.get(path)
        if data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if wanted else 200, data[start:], headers, path)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/octet-stream",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts.get(path):
            self.wfile.write(body[: self.server.cuts[path].pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(published_files()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(endpoint: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, because the client reads its environment when it is imported."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "MATCHED_")) and name.lower() not in ("http_proxy", "https_proxy", "all_proxy")
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--data-dir", str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def base(folder: Path) -> Path:
    return folder / "datasets/fineweb10B_sp8192_caseops/datasets"


def assert_complete(hub: HubServer, folder: Path, train_shards: int) -> None:
    """The files lie where a run looks for them, whole, and nothing else is left."""
    expected = {path.removeprefix("datasets/") for path in hub.files if "docs_selected" not in path}
    expected -= {f"datasets/{NAME}/fineweb_train_{number:06d}.bin" for number in range(train_shards, 3)}
    found = {str(path.relative_to(base(folder))) for path in base(folder).rglob("*") if path.is_file()}
    assert found == expected
    for name in found:
        assert (base(folder) / name).read_bytes() == hub.files[f"datasets/{name}"], name


def test_published_data_set_arrives_where_a_run_looks_for_it(hub: HubServer, tmp_path: Path) -> None:
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"data path:{base(tmp_path) / 'datasets' / NAME}\n"
    assert_complete(hub, tmp_path, 2)
    hub.asked.clear()
    done = download(hub.endpoint, tmp_path, "--download")  # the third shard only
    assert done.returncode == 0, done.stderr
    assert_complete(hub, tmp_path, 3)
    fetched = {path for command, path, _ in hub.asked if command == "GET" and path}
    assert fetched == {f"datasets/datasets/{NAME}/fineweb_train_000002.bin"}


def test_a_cut_connection_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    path = f"datasets/datasets/{NAME}/fineweb_train_000000.bin"
    hub.cuts[path] = [11_000_000]
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    assert_complete(hub, tmp_path, 1)
    ranges = [wanted for command, asked, wanted in hub.asked if command == "GET" and asked == path]
    assert len(ranges) == 2 and ranges[1] and 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 11_000_000


def test_a_wrong_size_is_refused_and_mended_by_the_next_run(hub: HubServer, tmp_path: Path) -> None:
    path = f"datasets/datasets/{NAME}/fineweb_val_000000.bin"
    hub.wrong[path] = len(hub.files[path]) + 2
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "0")
    assert done.returncode == 2 and "fineweb_val_000000.bin arrived with" in done.stderr, done.stderr
    assert not (base(tmp_path) / path.removeprefix("datasets/")).exists()
    hub.wrong.clear()
    assert download(hub.endpoint, tmp_path, "--download", "--train-shards", "0").returncode == 0
    assert_complete(hub, tmp_path, 0)


def test_a_file_that_is_no_shard_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.files[f"datasets/datasets/{NAME}/fineweb_val_000000.bin"] += b"xx"
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "0")
    assert done.returncode == 2 and "fineweb_val_000000.bin has" in done.stderr and "its header promises" in done.stderr


def test_documents_and_another_repository(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {path.replace("datasets/", "mirror/", 1): data for path, data in hub.files.items()}
    done = download(
        hub.endpoint,
        tmp_path,
        "--download-docs",
        MATCHED_FINEWEB_REPO_ID="me/mine",
        MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="mirror",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"docs path:{tmp_path / 'datasets/docs_selected.jsonl'}\n"
    assert (tmp_path / "datasets/docs_selected.jsonl").read_bytes() == hub.files["mirror/docs_selected.jsonl"]
    assert (tmp_path / "datasets/docs_selected.source_manifest.json").exists()


def test_what_the_repository_lacks_is_named(hub: HubServer, tmp_path: Path) -> None:
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "9")
    assert done.returncode == 2 and "--train-shards 9" in done.stderr and "has 3" in done.stderr
    del hub.files[f"datasets/datasets/{NAME}/fineweb_val_bytes_000000.bin"]
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "0")
    assert done.returncode == 2 and "fineweb_val_bytes_000000.bin: ask for fewer" in done.stderr


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = download("http://127.0.0.1:9", tmp_path, "--download", **variables)
        assert done.returncode == 2, done.stderr
        assert (
            "Check the network" in done.stderr and "or use --sample" in done.stderr and "Traceback" not in done.stderr
        )
