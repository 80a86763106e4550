"""Section 3: shards, segments, spans, and every fault of the data that must be named before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

import train_gpt as tg


def config(folder: Path, **changes: object) -> tg.Config:
    return tg.Config.from_env({k: str(v) for k, v in {**tiny.SETTINGS, "DATA_PATH": folder, **changes}.items()})


def checked(cfg: tg.Config) -> tg.ValData:
    """The validation set, after every check of the data."""
    return tg.check_dataset(cfg, tg.Dataset(cfg.shards_dir))[1]


def test_segments_start_at_bos_spans_and_lengths() -> None:
    tokens = np.array([1, 5, 5, 5, 5, 5, 5, 1, 5, 1, 5, 5])
    assert tg.segment_starts(tokens, span=12, longest=3).tolist() == [0, 3, 6, 7, 9]
    assert tg.segment_starts(tokens, span=5, longest=8).tolist() == [0, 5, 7, 9, 10]
    assert tg.segment_starts(np.array([5, 5, 1, 5]), span=4, longest=9).tolist() == [0, 2], "a span may begin within a document"


def test_positions_count_within_a_segment() -> None:
    tokens = np.array([1, 5, 5, 1, 5, 5, 5])
    batch = tg.make_batch(tokens, tokens, np.array([0, 3]), 8, tg.torch.device("cpu"))
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3] and batch.cu_seqlens.tolist() == [0, 3, 7]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_all_ranks_together_see_the_stream_once_whatever_their_number(tiny_data: Path, world: int) -> None:
    cfg = config(tiny_data)
    shards = tg.Dataset(tiny_data).read("train")
    seen, starts = [], []
    for step in range(2):
        for rank in range(world):
            loader = tg.TrainLoader(shards, cfg, tg.Ranks(rank, world))
            loader.seek(step * cfg.train_batch_tokens)
            for batch in loader.next():
                starts += [len(np.concatenate([[], *seen])) + int(s) for s in batch.cu_seqlens[:-1]]
                seen.append(batch.tokens.numpy())
                assert np.array_equal(batch.targets[:-1], batch.tokens[1:])
                assert len(batch.tokens) <= cfg.micro_batch_tokens
    whole = np.concatenate(seen)
    assert np.array_equal(whole, tg.read_stream(shards, 0, 2 * cfg.train_batch_tokens))
    one_rank = tg.segment_starts(whole, cfg.train_batch_tokens // 8, cfg.train_seq_len)
    assert starts == one_rank.tolist(), "documents are cut in the same places"


def test_stream_goes_round_and_crosses_shards() -> None:
    shards = [np.arange(5), np.arange(5, 7), np.arange(7, 10)]
    assert tg.read_stream(shards, 3, 12).tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert tg.read_stream(shards, 29, 2).tolist() == [9, 0]


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide TRAIN_BATCH_TOKENS=1024"):
        tg.SpanLayout.plan(config(Path(".")), 3)
    with pytest.raises(ValueError, match="2048 ranks"):
        tg.SpanLayout.plan(config(Path(".")), 2048)


def test_record_batch_is_one_forward_on_each_of_eight_ranks_and_eight_on_one() -> None:
    assert tg.SpanLayout.plan(tg.Config(), 8) == (8, 98304, 1, 1) and tg.SpanLayout.plan(tg.Config(), 1) == (8, 98304, 8, 1)


def test_the_glob_never_takes_the_sidecar_for_tokens(tiny_data: Path) -> None:
    assert [p.name for p in tg.Dataset(tiny_data).paths["val"]] == ["tiny_val_000000.bin"]
    assert [p.name for p in tg.Dataset(tiny_data).paths["val_bytes"]] == ["tiny_val_bytes_000000.bin"]
    assert len(tg.Dataset(tiny_data).paths["train"]) == 2


def rewrite(path: Path, change) -> None:
    header, entries = bytearray(path.read_bytes()[:1024]), np.fromfile(path, "<u2", offset=1024)
    path.write_bytes(change(header, entries))


def damaged_header(index: int, value: int):
    def change(header: bytearray, entries: np.ndarray) -> bytes:
        header[4 * index: 4 * index + 4] = int(value).to_bytes(4, "little")
        return bytes(header) + entries.tobytes()
    return change


def with_entries(edit):
    return lambda header, entries: tiny.shard_bytes(edit(entries.copy()))


def replaced(old: int, new: int):
    return with_entries(lambda e: np.where(e == old, new, e))


FAULTS = {
    "magic": ("tiny_train_000000.bin", damaged_header(0, 7), "magic number 7"),
    "version": ("tiny_train_000000.bin", damaged_header(1, 2), "version 2"),
    "count": ("tiny_val_000000.bin", damaged_header(2, 99), "promises 99 entries"),
    "negative count": ("tiny_val_000000.bin", damaged_header(2, 0xFFFFFFFF), "promises -1 entries"),
    "no entries": ("tiny_val_000000.bin", with_entries(lambda e: e[:0]), "promises 0 entries"),
    "truncated": ("tiny_train_000001.bin", lambda h, e: bytes(h) + e[:-1].tobytes(), "cut short"),
    "no header": ("tiny_train_000001.bin", lambda h, e: bytes(h[:100]), "shorter than"),
    "no bos in train": ("tiny_train_000000.bin", replaced(1, 5), "no BOS"),
    "no bos in val": ("tiny_val_000000.bin", replaced(1, 5), "no BOS"),
    "val starts without bos": ("tiny_val_000000.bin", with_entries(lambda e: np.append(5, e[1:])), "not BOS"),
    "token out of range": ("tiny_val_000000.bin", with_entries(lambda e: np.append(e[:-1], 64)), "token 64"),
    "train token out of range": ("tiny_train_000001.bin", with_entries(lambda e: np.append(e[:-1], 70)), "token 70"),
    "sidecar shorter": ("tiny_val_bytes_000000.bin", with_entries(lambda e: e[:-1]), "must be the same"),
    "sidecar longer": ("tiny_val_bytes_000000.bin", with_entries(lambda e: np.append(e, 0)), "must be the same"),
    "sidecar of other tokens": ("tiny_val_bytes_000000.bin", with_entries(lambda e: np.roll(e, 1)), "bytes to BOS"),
    "sidecar empty": ("tiny_val_bytes_000000.bin", with_entries(lambda e: e * 0), "0 bytes"),
    "no sidecar": ("tiny_val_bytes_000000.bin", None, "no byte sidecar"),
    "no val": ("tiny_val_000000.bin", None, "no val shards"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_data_is_named_with_its_file_or_folder(tmp_path: Path, fault: str) -> None:
    name, change, told = FAULTS[fault]
    tiny.write_dataset(tmp_path, train_docs=40, val_docs=5)
    if change is None:
        (tmp_path / name).unlink()
    else:
        rewrite(tmp_path / name, change)
    with pytest.raises(ValueError, match=told) as raised:
        checked(config(tmp_path))
    assert str(tmp_path) in str(raised.value)


def copied(name: str, to: str):
    return lambda folder: (folder / to).write_bytes((folder / name).read_bytes())


def renamed(name: str, to: str):
    return lambda folder: (folder / name).rename(folder / to)


WRONG_SETS = {
    "two prefixes": (copied("tiny_train_000000.bin", "other_train_000000.bin"), "several data sets .other, tiny."),
    "validation of another": (renamed("tiny_val_000000.bin", "x_val_000000.bin"), "several data sets .tiny, x."),
    "a gap": (renamed("tiny_train_000001.bin", "tiny_train_000002.bin"), "train shards are numbered 0, 2, not"),
    "no first": (renamed("tiny_train_000000.bin", "tiny_train_000007.bin"), "train shards are numbered 1, 7, not"),
    "one number twice": (copied("tiny_train_000001.bin", "tiny_train_1.bin"), "train shards are numbered 0, 1, 1, not"),
    "a copy from a Mac": (copied("tiny_val_000000.bin", "._tiny_val_000000.bin"), r"holds \._tiny_val_000000.bin: no name of a shard"),
    "no number": (copied("tiny_val_000000.bin", "tiny_val.bin"), "holds tiny_val.bin: no name of a shard"),
    "a copy": (copied("tiny_val_000000.bin", "tiny_val_000000 (1).bin"), "no name of a shard"),
    "sidecar numbered otherwise": (renamed("tiny_val_bytes_000000.bin", "tiny_val_bytes_000001.bin"), "val_bytes .* numbered 1, not"),
    "more sidecars": (copied("tiny_val_bytes_000000.bin", "tiny_val_bytes_000001.bin"), "2 sidecar shards .* for 1 validation"),
    "validation twice": (copied("tiny_val_000000.bin", "tiny_val_000001.bin"), "1 sidecar shards .* for 2 validation"),
    "unfinished build": (lambda folder: (folder / "build.json").write_text("{}"), "unfinished build"),
    "a folder for a shard": (lambda folder: (folder / "tiny_train_000002.bin").mkdir(), "tiny_train_000002.bin cannot be read: Is a"),
    "a link to nothing": (lambda folder: (folder / "tiny_train_000002.bin").symlink_to("none"), "cannot be read: No such file"),
    "train is val": (copied("tiny_val_000000.bin", "tiny_train_000001.bin"), "tiny_train_000001.bin holds the validation tokens"),
}


@pytest.mark.parametrize("case", WRONG_SETS)
def test_a_wrong_set_of_shards_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, told = WRONG_SETS[case]
    tiny.write_dataset(tmp_path, train_docs=40, val_docs=5)
    change(tmp_path)
    with pytest.raises(ValueError, match=told) as raised:
        checked(config(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_what_a_build_writes_is_what_a_run_reads() -> None:
    """The writer's constants beside the rules."""
    import prepare_caseops_data as prepare

    assert (prepare.SHARD_MAGIC, prepare.SHARD_VERSION, prepare.HEADER_INTS) == (tg.SHARD_MAGIC, tg.SHARD_VERSION, tg.SHARD_HEADER_INTS)
    assert (prepare.MANIFEST, prepare.JOURNAL, prepare.PUBLISHED.format(prepare.V1.name)) == (tg.MANIFEST, tg.JOURNAL, tg.PUBLISHED_NAME)
    for name in (prepare.VAL_TOKENS, prepare.VAL_BYTES, prepare.TRAIN_TOKENS.format(7)):
        assert tg.SHARD_NAME.fullmatch(name) and prepare.OWN_NAMES.fullmatch(name)


def with_manifest(folder: Path) -> dict:
    """The tiny data set with a manifest as a build writes it, as far as a run reads it."""
    tiny.write_dataset(folder, train_docs=40, val_docs=5)
    files = {path.name: {"file": path.name, "entries": (path.stat().st_size - 1024) // 2, "sha256": "0" * 64}
             for path in sorted(folder.glob("*.bin"))}
    return {"transform": tg.Config.caseops_version, "splits": {"val": {"files": [files[name] for name in files if "val" in name]},
                       "train": {"files": [files[name] for name in files if "train" in name]}}}


def test_the_manifest_decides_which_shards_there_are(tmp_path: Path) -> None:
    manifest = with_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert checked(config(tmp_path)).documents == 5
    (tmp_path / "build.json").write_text("{}")  # a kill between the manifest and the removal of this leaves both
    assert checked(config(tmp_path)).documents == 5
    copied("tiny_train_000000.bin", "tiny_train_000002.bin")(tmp_path)
    with pytest.raises(ValueError, match="holds tiny_train_000002.bin: not in manifest.json"):
        checked(config(tmp_path))
    (tmp_path / "tiny_train_000002.bin").unlink()
    (tmp_path / "tiny_train_000001.bin").write_bytes((tmp_path / "tiny_val_000000.bin").read_bytes())
    with pytest.raises(ValueError, match=r"tiny_train_000001.bin: \d+ entries, manifest.json beside it says"):
        checked(config(tmp_path))
    (tmp_path / "tiny_train_000001.bin").unlink()
    with pytest.raises(ValueError, match="tiny_train_000001.bin cannot be read"):
        checked(config(tmp_path))
    assert checked(config(tmp_path, EVAL_ONLY=1)).documents == 5, "to score, the validation set is enough"


def changes_of(value: object, path: tuple = ()):
    """Every way to drop a part of something read from JSON, or to put something of another kind in its place."""
    for wrong in (None, -1, "x", [], {}, 1e99, True):
        if type(wrong) is not type(value):
            yield path, wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from changes_of(part, (*path, key))


def changed(value: object, path: tuple, wrong: object) -> object:
    if not path:
        return wrong
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = changed(value[path[0]], path[1:], wrong)
    return value


def test_a_damaged_manifest_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    manifest = with_manifest(tmp_path)
    cases = list(changes_of(manifest))
    assert len(cases) > 90
    for path, wrong in cases:
        (tmp_path / "manifest.json").write_text(json.dumps(changed(manifest, path, wrong)))
        with pytest.raises(ValueError, match=str(tmp_path)):
            checked(config(tmp_path))
    for text in (b"", b"{", b"[" * 100_000, b"\xff", b"5", b"{}", b'{"datasets": []}'):
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(ValueError, match="is not the manifest of a data set"):
            checked(config(tmp_path))


@pytest.mark.parametrize("what", ["a folder", "not there", "no model", "empty"])
@pytest.mark.parametrize("caseops", [0, 1])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, what: str, caseops: int) -> None:
    tiny.write_dataset(tmp_path / "data", train_docs=40, val_docs=5)
    path = tmp_path / "t.model"
    if what == "a folder":
        path.mkdir()
    elif what != "not there":
        path.write_bytes(b"" if what == "empty" else b"not a model at all")
    cfg = config(tmp_path / "data", CASEOPS_ENABLED=caseops, TOKENIZER_PATH=path)
    with pytest.raises(ValueError, match=str(path)):
        tg.check_tokenizer(cfg, tg.Dataset(cfg.shards_dir))
    if not caseops:
        with pytest.raises(ValueError, match=str(path)):
            checked(cfg)


def test_no_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prepare_caseops_data.py"):
        checked(config(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no train shards"):
        checked(config(tmp_path))


def test_published_name_with_other_counts_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_dataset(tmp_path / tg.PUBLISHED_NAME, train_docs=40, val_docs=5)
    with pytest.raises(ValueError, match="published"):
        checked(config(folder))


def test_evaluation_needs_no_training_data(tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path, train_docs=40, val_docs=5)
    for path in tg.Dataset(tmp_path).paths["train"]:
        path.unlink()
    assert checked(config(tmp_path, EVAL_ONLY=1)).documents == 5


def test_val_doc_fraction_keeps_whole_documents(tiny_data: Path) -> None:
    whole, half = (tg.load_val(config(tiny_data, VAL_DOC_FRACTION=f)) for f in (1, 0.5))
    assert half.documents == whole.documents // 2 == (half.tokens == 1).sum()
    assert np.array_equal(half.tokens, whole.tokens[: len(half.tokens)]) and whole.tokens[len(half.tokens)] == 1


def test_bytes_of_plain_pieces(tmp_path: Path) -> None:
    """Without CaseOps: the piece's bytes without the space mark, plus 1 if it has one and no control token is before."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(["the cat sat on the mat with a small hat and the rat"] * 50))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=300, model_type="bpe",
                                             byte_fallback=True, bos_id=1, eos_id=2, unk_id=3, pad_id=0, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    documents = ["the cat sat", "a small \u00e9 hat"]
    tokens = np.concatenate([[1, *model.encode(d)] for d in documents])
    folder = tmp_path / "data"
    folder.mkdir()
    for kind in ("train", "val"):
        (folder / f"x_{kind}_000000.bin").write_bytes(tiny.shard_bytes(tokens))
    cfg = config(folder, CASEOPS_ENABLED=0, VOCAB_SIZE=300, TOKENIZER_PATH=tmp_path / "m.model")
    assert tg.load_val(cfg).num_bytes == sum(len(d.encode()) for d in documents), "the space mark that the tokenizer adds is free"
    with pytest.raises(ValueError, match="300 pieces, VOCAB_SIZE is 400"):
        checked(config(folder, CASEOPS_ENABLED=0, VOCAB_SIZE=400, TOKENIZER_PATH=tmp_path / "m.model"))
