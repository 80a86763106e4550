"""--verify: a good data set passes with nothing off, and every kind of damage is named with its file and position."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data_tools
import prepare_caseops_data as prepare

VAL_DOCS = 20


def build(folder: Path, kind: str) -> Path:
    docs = data_tools.write_documents(folder / "docs.jsonl", data_tools.texts())
    prepare.build(
        prepare.BuildRequest(
            (str(docs),), folder / "set", data_tools.tokenizer(kind).path, VAL_DOCS, shard_entries=3000
        )
    )
    return folder


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("lossless"), "lossless")


@pytest.fixture(scope="module")
def nfkc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nfkc"), "nfkc")


def verify(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str = "lossless", docs: tuple[str, ...] = (), round_trips: int = 50
) -> tuple[int, str]:
    """(exit code, printed table)."""
    code = prepare.verify(prepare.BuildRequest(docs, folder / "set", data_tools.tokenizer(kind).path), round_trips)
    return code, capsys.readouterr().out


def test_a_good_data_set_passes_every_check(lossless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, table = verify(lossless, capsys, round_trips=10_000)
    assert code == 0 and "FAULT" not in table and " - " not in table, table
    count = len(data_tools.texts())
    assert re.search(rf"round trip +ok +{count} of {count} documents come back$", table, re.MULTILINE)
    assert re.search(r"equal to a new build +ok", table)


def test_without_the_text_it_decodes_and_encodes_again(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lossless / "set", tmp_path / "set")
    code, table = verify(tmp_path, capsys)
    assert code == 0 and re.search(r"decode and encode +ok", table), table


def test_a_normalising_tokenizer_passes_and_its_losses_are_counted(
    nfkc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, table = verify(nfkc, capsys, "nfkc", round_trips=10_000)
    found = re.search(r"round trip +ok +(\d+) of (\d+) documents come back$", table, re.MULTILINE)
    assert code == 0 and 0 < int(found[1]) < int(found[2]) == len(data_tools.texts()), table


def first_bos_after(shard: np.ndarray, entry: int) -> int:
    return entry + 1 + int(np.flatnonzero(shard[entry + 1 :] == 1)[0])


def flip_val_token(folder: Path) -> str:
    data_tools.damage(
        folder / "fineweb_val_000000.bin",
        10,
        300 if data_tools.shard(folder / "fineweb_val_000000.bin")[10] != 300 else 301,
    )
    return r"fineweb_val_000000.bin: not the file.*"


def charge_an_operator(folder: Path) -> str:
    tokens = data_tools.shard(folder / "fineweb_val_000000.bin")
    at = int(np.flatnonzero(tokens == 4)[0])
    data_tools.damage(folder / "fineweb_val_bytes_000000.bin", at, 3)
    return rf"fineweb_val_bytes_000000.bin entry {at}: 3 bytes for token 4, must be 0"


def charge_bos(folder: Path) -> str:
    data_tools.damage(folder / "fineweb_val_bytes_000000.bin", 0, 1)
    return "charges bytes to BOS"


def id_out_of_range(folder: Path) -> str:
    data_tools.damage(folder / "fineweb_train_000002.bin", 77, 60_000)
    return r"fineweb_train_000002.bin entry 77: id 60000|entry 77 is token 60000"


def padding_id(folder: Path) -> str:
    data_tools.damage(folder / "fineweb_train_000001.bin", 5, 0)
    return r"fineweb_train_000001.bin entry 5: id 0 stands for no text"


def lost_bos(folder: Path) -> str:
    tokens = data_tools.shard(folder / "fineweb_train_000000.bin")
    data_tools.damage(folder / "fineweb_train_000000.bin", first_bos_after(tokens, 0), 300)
    return r"fineweb_train_000000.bin: not the file that manifest.json lists"


def no_bos_first(folder: Path) -> str:
    data_tools.damage(folder / "fineweb_train_000000.bin", 0, 300)
    return r"fineweb_train_000000.bin entry 0: 300, not BOS"


def cut_short(folder: Path) -> str:
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-10])
    return r"fineweb_train_000001.bin: the header promises"


def wrong_magic(folder: Path) -> str:
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    return r"fineweb_val_000000.bin: magic"


def no_sidecar(folder: Path) -> str:
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    return "fineweb_val_bytes_000000.bin cannot be read: No such file"


def missing_shard(folder: Path) -> str:
    max(folder.glob("fineweb_train_*.bin")).unlink()
    return r"fineweb_train_\d+.bin cannot be read: No such file"


def extra_shard(folder: Path) -> str:
    shutil.copy(folder / "fineweb_train_000000.bin", folder / "fineweb_train_000099.bin")
    return r"holds fineweb_train_000099.bin: not in manifest.json"


def val_document_in_train(folder: Path) -> str:
    """A whole validation document over the beginning of a train shard's first whole document."""
    val, train = (
        data_tools.shard(folder / "fineweb_val_000000.bin"),
        data_tools.shard(folder / "fineweb_train_000000.bin"),
    )
    document = val[: first_bos_after(val, 0)]
    path = folder / "fineweb_train_000000.bin"
    data = bytearray(path.read_bytes())
    data[1024 : 1024 + 2 * len(document)] = document.tobytes()
    data[1024 + 2 * len(document) : 1026 + 2 * len(document)] = b"\x01\x00"
    path.write_bytes(data)
    assert len(train) > len(document) + 1
    return r"fineweb_train_000000.bin entry 0: the document that begins there is a validation document"


@pytest.mark.parametrize(
    "harm",
    [
        flip_val_token,
        charge_an_operator,
        charge_bos,
        id_out_of_range,
        padding_id,
        lost_bos,
        no_bos_first,
        cut_short,
        wrong_magic,
        no_sidecar,
        missing_shard,
        extra_shard,
        val_document_in_train,
    ],
    ids=lambda harm: harm.__name__,
)
def test_damage_is_named(
    harm: Callable[[Path], str], lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lossless, tmp_path / "copy")
    words = harm(tmp_path / "copy/set")
    code, table = verify(tmp_path / "copy", capsys)
    assert code == 1 and "FAULT" in table
    assert any(re.search(words, line) for line in table.splitlines() if line.startswith("fault ")), table


def test_wrong_charge_of_a_normalising_tokenizer_is_found_by_the_text(
    nfkc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(nfkc, tmp_path / "copy")
    charges = data_tools.shard(tmp_path / "copy/set/fineweb_val_bytes_000000.bin")
    at = int(np.flatnonzero(charges > 1)[-1])
    data_tools.damage(tmp_path / "copy/set/fineweb_val_bytes_000000.bin", at, int(charges[at]) - 1)
    code, table = verify(tmp_path / "copy", capsys, "nfkc")
    assert code == 1 and f"fineweb_val_bytes_000000.bin entry {at}: {charges[at] - 1}, by the documents {charges[at]}" in table


def test_another_source_and_another_tokenizer_are_noticed(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = data_tools.write_documents(tmp_path / "other.jsonl", [*data_tools.texts()[:-1], "another end"])
    code, table = verify(lossless, capsys, docs=(str(other),), round_trips=10_000)
    assert code == 1 and "SHA-256 differs from the source" in table and "by the documents" in table
    code, table = verify(lossless, capsys, "nfkc")
    assert code == 1 and "not the tokenizer of this data set" in table


def test_published_constants_are_checked_by_the_folder_name(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / prepare.PUBLISHED.format(prepare.V1.name)
    shutil.copytree(lossless / "set", folder)
    (folder / "manifest.json").unlink()  # the hub has none beside the shards
    code = prepare.verify(prepare.BuildRequest((), folder, data_tools.tokenizer("lossless").path), 1)
    assert code == 1 and f"has {{'documents': {VAL_DOCS}, " in capsys.readouterr().out


def test_without_a_manifest_there_are_no_hashes(lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(lossless / "set", tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    code, table = verify(tmp_path, capsys)
    assert code == 0 and re.search(r"hashes +- +no manifest.json", table) and re.search(r"decode and encode +ok", table)


@pytest.mark.parametrize("change", [lambda lines: lines[:-3], lambda lines: lines + lines[-1:] * 99, lambda lines: lines[:9]])
def test_another_number_of_documents_is_noticed(
    lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]]
) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(change((lossless / "docs.jsonl").read_text().splitlines(keepends=True))))
    code, table = verify(lossless, capsys, docs=(str(tmp_path / "docs.jsonl"),))
    assert code == 1 and "FAULT" in table


def test_command_line_exit_codes(lossless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sp", str(data_tools.tokenizer("lossless").path), "--verify"]
    assert prepare.main([*arguments, str(lossless / "set")]) == 0
    shutil.copytree(lossless / "set", tmp_path / "set")
    manifest = json.loads((tmp_path / "set/manifest.json").read_bytes())
    manifest["splits"]["val"]["bytes"] += 1
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    assert prepare.main([*arguments, str(tmp_path / "set")]) == 1
    assert "sums to" in capsys.readouterr().out
