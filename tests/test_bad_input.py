"""Bad input of every kind, generated from the rules: one line says what is wrong, and no traceback ever reaches a user."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import zstandard
from test_data import changed, changes_of

import data_tools
import prepare_caseops_data as prepare

GOOD = '{"text": "some words"}'
WHOLE_NUMBERS = ("val-docs", "train-shards", "round-trips", "workers", "shard-entries", "vocab-size", "sample-bytes")
NO_NUMBERS = ("-1", "", "x", "1.5", "1e3", "1_0", "\u0661", "\uff11", " 1", "0x1", "nan", "99999999999999999999", "+1", "1\n")
LINES = {
    "cut short": '{"text": ',
    "a word": "word",
    "no object": '["text"]',
    "a number": "5",
    "null": "null",
    "another key": '{"Text": "x"}',
    "null text": '{"text": null}',
    "a list of texts": '{"text": ["x"]}',
    "nested too deep": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "a huge number": "1" * 5000,
    "a lone surrogate": r'{"text": "\ud800"}',
    "surrogates in the wrong order": r'{"text": "\udc00\ud800"}',
    "not UTF-8": b'{"text": "\xff"}',
    "a control character": '{"text": "\x01"}',
    "NUL": "\x00",
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "two objects": GOOD + GOOD,
    "single quotes": "{'text': 'x'}",
    "a trailing comma": '{"text": "x",}',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.jsonl").write_text("\n".join([GOOD, '{"text": "other words"}', GOOD]))
    return tmp_path


def build(folder: Path, *more: str, docs: str = "good.jsonl") -> list[str]:
    model = data_tools.tokenizer("lossless").path
    return ["--docs", str(folder / docs), "--out", str(folder / "set"), "--sp", str(model), "--val-docs", "1", "--workers", "1", *more]


def assert_refused(arguments: list[str], capsys: pytest.CaptureFixture[str], words: str = "") -> None:
    """The program ends with code 2 and says why in its last line, which holds `words`."""
    capsys.readouterr()
    try:
        code = prepare.main(arguments)
    except SystemExit as end:  # how argparse refuses an option
        code = end.code
    said = capsys.readouterr().err
    assert code == 2 and "error" in said.splitlines()[-1] and words in said and "Traceback" not in said, (arguments, said)


@pytest.mark.parametrize("option", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_whole_number(option: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(build(folder, f"--{option}={value}"), capsys, f"--{option}")


@pytest.mark.parametrize("option", ["val-docs", "workers", "shard-entries", "vocab-size"])
def test_none_at_all(option: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(build(folder, f"--{option}=0"), capsys, f"--{option}")


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("place", [0, 2])
def test_bad_documents(line: str, place: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by their number, with a way to go on that works."""
    lines = [GOOD.encode()] * 4
    lines.insert(place, LINES[line] if isinstance(LINES[line], bytes) else LINES[line].encode())
    (folder / "bad.jsonl").write_bytes(b"\n".join(lines))
    whole_file = line == "UTF-16" and not place  # known by its first bytes
    assert_refused(build(folder, docs="bad.jsonl"), capsys, "is a text in UTF-16" if whole_file else f"document {place + 1} of ")
    if place:  # else it is the only one for validation, and its tokens are those of all others
        (folder / "bad.jsonl").write_bytes(b"\n".join([b'{"text": "val"}', *lines]))
        assert_refused(build(folder, "--force", docs="bad.jsonl"), capsys, "leave bad documents out with --skip-bad")
        shard = folder / "set/fineweb_val_000000.bin"
        built = shard.exists() and shard.stat().st_mtime_ns
        assert prepare.main(build(folder, "--skip-bad", docs="bad.jsonl")) == 0
        assert not built or shard.stat().st_mtime_ns == built, "what is there is not built again"


COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}
HARM = {
    "cut": lambda data: data[:-5],
    "cut at half": lambda data: data[: len(data) // 2],
    "only its mark": lambda data: data[:6],
    "noise": lambda data: data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :],
    "noise behind": lambda data: data + b"noise that is no frame",
}


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("harm", HARM)
def test_damaged_compressed_files(kind: str, harm: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(json.dumps({"text": f"{number} words {number**7}"}) for number in range(3000))
    (folder / "bad").write_bytes(HARM[harm](COMPRESS[kind](text.encode())))
    if harm == "noise behind" and kind in ("bzip2", "xz"):
        assert prepare.main(build(folder, docs="bad")) == 0  # their own tools leave alone what is no stream, too
    else:
        assert_refused(build(folder, docs="bad"), capsys, "bad")


STARTS = {"UTF-16": b"\xff\xfe", "LZMA": b"\x5d\0\0\x80\0",
          "zip": b"PK\x03\x04", "Parquet": b"PAR1", "7z": b"7z\xbc\xaf", "LZ4": b"\x04\x22\x4d\x18", "ELF": b"\x7fELF", "zeros": bytes(9)}


@pytest.mark.parametrize("start", STARTS)
def test_files_of_other_kinds(start: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad").write_bytes(STARTS[start] + bytes(range(256)) * 9)
    assert_refused(build(folder, docs="bad"), capsys, f"bad is a {start}" if start in ("zip", "Parquet", "7z", "LZ4") else "bad")


def test_closed_streams(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert_refused(["--docs", "-", "--out", str(folder / "set")], capsys, "standard input is closed")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        assert prepare.main(build(folder)) == 0


def test_paths_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a file").touch()
    (folder / "a folder").mkdir()
    (folder / "link").symlink_to("nowhere")
    good, out = str(folder / "good.jsonl"), str(folder / "set")
    cases = [
        ["--docs", str(folder / docs), "--out", out] for docs in ("none.jsonl", "a folder", "link", "x" * 300, "\udcff")
    ] + [
        ["--docs", "-", "-", "--out", out],
        ["--docs", good, "/dev/fd/0", "/dev/fd/0", "--out", out],
        ["--docs", good, "--out", str(folder / "a file")],
        ["--docs", good, "--out", str(folder / "a file/set")],
        ["--docs", good, "--out", "/proc/set"],
        ["--docs", good],
        ["--out", out],
        ["--docs", good, "--out", out, "--sp", str(folder / "a folder")],
        ["--docs", good, "--out", out, "--sp", good],
        ["--docs", good, "--out", out, "--sp", str(folder / "none.model")],
        ["--verify", str(folder / "none")],
        ["--verify", good],
        ["--verify", str(folder), "--sp", good],
        ["--sample", "--data-dir", str(folder / "a file")],
        ["--download", "--data-dir", str(folder / "a file")],
        ["--train-tokenizer", str(folder / "a file/x"), "--docs", good, "--val-docs", "0"],
        ["--train-tokenizer", str(folder / "x"), "--docs", good, "--val-docs", "0"],
        ["--train-tokenizer", str(folder / "x"), "--docs", good, "--val-docs", "9"],
        ["--sample", "--verify", out],
        ["--nonsense"],
    ]
    for arguments in cases:
        assert_refused(arguments, capsys)


def damaged_models() -> list[bytes]:
    """A tokenizer cut short, with bits flipped, and with whole stretches of noise."""
    model = data_tools.tokenizer("lossless").path.read_bytes()
    cut = [model[: len(model) * part // 9] for part in range(9)]
    flipped = [bytes([byte ^ (255 if index == place else 0) for index, byte in enumerate(model)]) for place in range(0, 60, 7)]
    return [*cut, *flipped, model[:99] + bytes(99) + model[198:], b"\xff" * 99, b"\n" * 99]


def test_damaged_tokenizers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, or what SentencePiece itself makes of it: never a traceback."""
    for model in damaged_models():
        (folder / "bad.model").write_bytes(model)
        code = prepare.main(build(folder, "--force", "--sp", str(folder / "bad.model")))
        said = capsys.readouterr().err
        assert code == 0 or code == 2 and said.splitlines()[-1].startswith("error "), said


def test_damaged_manifests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However a manifest was changed, a build and --verify end with a line that names it or what differs."""
    assert prepare.main(build(folder)) == 0
    path = folder / "set/manifest.json"
    manifest = json.loads(path.read_bytes())
    cases = list(changes_of(manifest))
    verify = ["--verify", str(folder / "set"), *build(folder)[4:6]]
    for number, (where, wrong) in enumerate(cases):
        path.write_text(json.dumps(changed(manifest, where, wrong)))
        for arguments in [build(folder), verify][: 1 + (number % 8 == 0)]:
            code = prepare.main(arguments)
            said = capsys.readouterr()
            assert code in (0, 1) or code == 2 and said.err.splitlines()[-1].startswith("error "), (where, wrong, said.err)
    assert len(cases) > 200


def test_damaged_journals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "set").mkdir()
    path = folder / "set/build.json"
    record = {"request": {"program": "2"}}
    for where, wrong in changes_of(record):
        path.write_text(json.dumps(changed(record, where, wrong)))
        assert_refused(build(folder), capsys, str(folder / "set"))
    for text in (b"", b"{", b"[" * 100_000, b"\xff"):
        path.write_bytes(text)
        assert_refused(build(folder), capsys, "build.json")
    assert prepare.main(build(folder, "--force")) == 0  # the way on that the line names


VARIABLES = {
    "HF_ENDPOINT": ("", "nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://[::1"),
    "MATCHED_FINEWEB_REPO_ID": ("a b", "/", "a/b/c", "..", "x" * 300),
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in VARIABLES.items() for value in values])
def test_bad_variables(name: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WAITS_S", ())
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", value if name == "HF_ENDPOINT" else "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_refused(["--download", "--data-dir", str(folder)], capsys)


def test_an_empty_or_odd_data_dir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "")
    assert prepare.parse([]).data_dir == Path("data")


def test_a_name_that_a_console_cannot_print(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file name that is no UTF-8 builds, and stands in the manifest."""
    shutil.copy(folder / "good.jsonl", str(folder / "\udcff\u00e9.jsonl"))
    assert prepare.main(build(folder, docs="\udcff\u00e9.jsonl")) == 0
    assert json.loads((folder / "set/manifest.json").read_bytes())["sources"][0]["name"] == "\udcff\u00e9.jsonl"
