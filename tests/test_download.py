"""Downloads with the real hub client against a local server: whole, cut off, of a wrong size, and not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import huggingface_hub.constants
import kills
import numpy as np
import pytest

import prepare_caseops_data as prepare

PROGRAM = Path(prepare.__file__)
NAME = prepare.PUBLISHED.format(prepare.V1.name)
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
    """Speaks as much of the hub's protocol as a download needs; `cuts`, `wrong` and `refuse` make it misbehave."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cuts: dict[str, list[int]] = {}  # file -> after how many bytes each of the next answers breaks off
        self.wrong: dict[str, int] = {}  # file -> a size that the listing claims for it
        self.refuse: list[tuple[str, int]] = []  # (part of a path, status): the next request for it is answered so
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listed(self, path: str) -> dict[str, object]:
        """What the hub lists of a file."""
        size = self.wrong.get(path, len(self.files[path]))
        lfs = {"oid": hashlib.sha256(self.files[path]).hexdigest(), "size": size, "pointerSize": 100}
        return {"type": "file", "path": path, "size": size, "oid": "1" * 40, "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    """The listing of paths (POST), of all files, and the files themselves (HEAD and GET, with ranges)."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self._refused():
            paths = [path for path in parse_qs(body).get("paths", []) if path in self.server.files]
            self._answer(200, json.dumps(list(map(self.server.listed, paths))).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._refused():
            return
        if "/revision/" in self.path:
            self._answer(200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": []}).encode())
        elif "/tree/" in self.path:
            self._answer(200, json.dumps(list(map(self.server.listed, self.server.files))).encode())
        else:
            self._file(re.sub(r".*/resolve/[^/]+/", "", unquote(self.path)))

    def _refused(self) -> bool:
        """Answer as `refuse` wants it."""
        for part, status in self.server.refuse:
            if part in self.path:
                self.server.refuse.remove((part, status))
                self._answer(status, b"not now", {"Retry-After": "0"})
                return True
        return False

    def _file(self, path: str) -> None:
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
    script = "import sys, prepare_caseops_data as p; p.WAITS_S, p.PROGRESS_S = (0.01,) * 4, 0.02; sys.exit(p.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, "--data-dir", str(folder), *arguments],
        cwd=PROGRAM.parent,
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
    fetched = {path for command, path, _ in hub.asked if command == "GET" and path.endswith(".bin")}
    assert fetched == {f"datasets/datasets/{NAME}/fineweb_train_000002.bin"}


def test_a_cut_connection_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    path = f"datasets/datasets/{NAME}/fineweb_train_000000.bin"
    hub.cuts[path] = [11_000_000]
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "1")
    assert done.returncode == 0, done.stderr
    assert_complete(hub, tmp_path, 1)
    assert re.search(r"download mb:\d+ of_mb:12 mb_s:", done.stderr), "progress in bytes"
    ranges = [wanted for command, asked, wanted in hub.asked if command == "GET" and asked == path]
    assert len(ranges) == 2 and ranges[1] and 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 11_000_000


def test_killed_at_any_change_of_a_file_a_download_goes_on_and_leaves_nothing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(prepare, "WAITS_S", ())
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for step in itertools.count(0, 13):
        folder = tmp_path / str(step)
        died = kills.dies(step, prepare, lambda: prepare.download_published(folder, 0))
        prepare.download_published(folder, 0)
        assert_complete(hub, folder, 0)
        if not died:
            break
    assert step > 40


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
    assert done.returncode == 2 and "fineweb_val_000000.bin: the header promises" in done.stderr


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


def test_answers_that_may_pass_are_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    """Too many requests, or no service for the moment: the list of files, the revision, the tree, a file."""
    hub.refuse = [(what, status) for what in ("paths-info", "/revision/", "/tree/", "/resolve/") for status in (429, 503)]
    done = download(hub.endpoint, tmp_path, "--download", "--train-shards", "0")
    assert done.returncode == 0 and not hub.refuse, done.stderr
    assert_complete(hub, tmp_path, 0)


def test_a_refusal_is_said_at_once(hub: HubServer, tmp_path: Path) -> None:
    hub.refuse = [("paths-info", 403)] * 2
    done = download(hub.endpoint, tmp_path, "--download")
    assert done.returncode == 2 and "403" in done.stderr and len(hub.refuse) == 1


def test_a_full_disk_is_not_called_the_network(hub: HubServer, tmp_path: Path) -> None:
    """Said before the download where it can be known, and by its true cause where not."""
    script = (
        "import sys, os, errno, collections, prepare_caseops_data as p\n"
        "import huggingface_hub\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x')\n"
        "usage = collections.namedtuple('usage', 'total used free')(10, 9, 1)\n"
        "if sys.argv.pop(1) == 'before': p.shutil.disk_usage = lambda path: usage\n"
        "else: huggingface_hub.snapshot_download = full\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    for when, words in (("before", "the disk lacks 0.00 GB"), ("while", "No space left on device")):
        command = [sys.executable, "-c", script, when, "--data-dir", str(tmp_path), "--download"]
        done = subprocess.run(command, cwd=PROGRAM.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and "network" not in done.stderr, done.stderr


def test_a_file_that_is_there_but_damaged_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    assert download(hub.endpoint, tmp_path, "--download", "--train-shards", "0").returncode == 0
    path = base(tmp_path) / f"datasets/{NAME}/fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert download(hub.endpoint, tmp_path, "--download", "--train-shards", "0").returncode == 0
    assert_complete(hub, tmp_path, 0)


HOSTILE = {
    "not JSON": b"{",
    "another form": b'{"datasets": 5}',
    "numbers as words": b'{"datasets": [{"name": "%s", "tokenizer_name": "t", "stats": {"files_train": "3"}}], "tokenizers": []}'
    % NAME.encode(),
    "no tokenizer": json.dumps(
        {"datasets": [{"name": NAME, "tokenizer_name": "t", "stats": {"files_train": 0, "files_val": 1}}], "tokenizers": []}
    ).encode(),
    "outside": json.dumps(
        {
            "datasets": [{"name": NAME, "tokenizer_name": "t", "stats": {"files_train": 0, "files_val": 1}}],
            "tokenizers": [{"name": "t", "model_path": "../../../outside"}],
        }
    ).encode(),
}


@pytest.mark.parametrize("manifest", HOSTILE)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = prepare.Hub.fetch

    def first_only(hub: prepare.Hub, base: Path, names: list[str]) -> None:
        if names == ["manifest.json"]:
            (base / "manifest.json").write_bytes(HOSTILE[manifest])
        else:
            fetch(hub, base, names)

    monkeypatch.setattr(prepare.Hub, "fetch", first_only)
    with pytest.raises(ValueError, match="manifest.json|is no path in a repository"):
        prepare.download_published(tmp_path, None)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = download("http://127.0.0.1:9", tmp_path, "--download", **variables)
        assert done.returncode == 2, done.stderr
        assert (
            "Check the network" in done.stderr and "or use --sample" in done.stderr and "Traceback" not in done.stderr
        )
