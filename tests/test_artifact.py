"""Section 9: exact round trips, exact sizes, an entropy coder near its bound, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import tracemalloc
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from artifact_tools import codes, config, header_of, random_tensors

import train_gpt as tg

COMPRESSORS = ("brotli", "rans")
OFF_DEFAULT = {"SMEAR_GATE_ENABLED": 1, "MLP_GATE_ENABLED": 1, "GATED_ATTN_QUANT_GATE": 0,
               "TTT_CHUNK_DOUBLES_AT": "32", "TTT_CONTEXT": "cache"}


def assert_same(left: tg.Tensors, right: tg.Tensors) -> None:
    """Same names in the same order, same types, shapes and bits."""
    assert list(left) == list(right)
    for name, tensor in left.items():
        other = right[name]
        assert type(tensor) is type(other)
        if isinstance(tensor, tg.Quantized):
            assert tensor.method == other.method
            assert torch.equal(tensor.codes, other.codes) and other.codes.dtype == torch.int8
            assert torch.equal(tensor.scales, other.scales) and other.scales.dtype == torch.float16
        else:
            assert torch.equal(tensor.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("changes", [{}, {"QUANTIZER": "trellis"}, OFF_DEFAULT], ids=["default", "trellis", "gates"])
def test_round_trip_gives_the_same_settings_and_bits_and_packs_to_the_same_bytes(compressor: str, changes: dict) -> None:
    cfg = config(COMPRESSOR=compressor, SEED=5, EVAL_SEQ_LEN=32, **changes)
    tensors = random_tensors(cfg)
    data = tg.pack_artifact(tensors, cfg)
    loaded_cfg, loaded = tg.unpack_artifact(data)
    assert {f.name: getattr(loaded_cfg, f.name) for f in tg.STORED_SETTINGS} == {f.name: getattr(cfg, f.name) for f in tg.STORED_SETTINGS}
    assert_same(tensors, loaded)
    assert tg.pack_artifact(loaded, cfg) == data


def test_an_artifact_carries_what_the_score_depends_on_and_no_place_on_disk() -> None:
    carried = set(header_of(tg.pack_artifact(random_tensors(config()), config()))["settings"])
    assert {"model_dim", "seed", "eval_seq_len", "eval_loop_depth", "ttt_lora_lr", "global_ttt_lr", "phased_ttt_prefix_docs"} <= carried
    assert not carried & {"data_dir", "data_path", "artifact_dir", "run_id", "tokenizer_path", "iterations", "matrix_lr"}


@pytest.mark.parametrize("value", [-0.0, 6e-8, 65504.0])
def test_floats_at_the_ends_of_their_range_come_back(value: float) -> None:
    cfg = config()
    tensors = random_tensors(cfg)
    tensors["skip_weights"][0] = value
    tensors["qo_bank"].scales[0] = value
    assert_same(tensors, tg.unpack_artifact(tg.pack_artifact(tensors, cfg))[1])


def coded(*banks: np.ndarray, trellis: bool = False, across: bool = False) -> list[bytes]:
    """The streams of these codes, which have been read back and compared."""
    streams = tg.encode_codes([tg.Bank(bank, trellis, across) for bank in banks])
    found = [tg.Bank(np.zeros_like(bank), trellis, across) for bank in banks]
    tg.decode_codes(streams, found)
    assert all(np.array_equal(bank, read.codes) for bank, read in zip(banks, found))
    return streams


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (1, 7, 1), (3, 5, 2), (4, 3, 1), (2, 300, 70), (1, 3, 2100)])
def test_codes_of_any_shape_come_back(shape: tuple[int, int, int], trellis: bool, across: bool) -> None:
    coded(codes(*shape), codes(1, 9, 3), codes(*shape, seed=1), trellis=trellis, across=across)


@pytest.mark.parametrize("trellis", [False, True])
def test_extreme_codes_come_back(trellis: bool) -> None:
    generator = np.random.default_rng(1)
    outlier = np.zeros((1, 6, 9000), np.int8)
    outlier[0, 3, 4] = -128
    either = np.where(generator.random((1, 6, 300)) < 0.5, 127, -128).astype(np.int8)
    anything = generator.integers(-128, 128, (1, 6, 5000)).astype(np.int8)
    coded(either, anything, outlier, np.zeros((2, 6, 64), np.int8), np.full((1, 6, 64), 127, np.int8), trellis=trellis)


def test_dequantized_weights_are_codes_times_scales() -> None:
    bank = random_tensors(config())["kv_bank"]
    expected = bank.codes.numpy().astype(np.float32) * bank.scales.numpy().astype(np.float32)[..., None]
    assert np.array_equal(tg.dequantize(bank).numpy(), expected)


def test_rans_is_within_one_and_a_half_percent_of_the_entropy_and_smaller_than_brotli() -> None:
    bank = codes(4, 256, 256)
    columns = bank.transpose(0, 2, 1).reshape(4 * 256, 256)
    bits = sum(tg.entropy_bits(np.bincount(columns[group].ravel().astype(int) + 128))
               for group in np.argsort(np.abs(columns.astype(int)).mean(1)).reshape(32, 32))
    size = sum(map(len, coded(bank)))
    assert size < bits / 8 * 1.015 + 1024
    assert size < len(brotli.compress(bank.transpose(0, 2, 1).tobytes(), quality=11, lgwin=24))


def test_another_bank_costs_its_codes_and_a_table() -> None:
    one, four = (sum(map(len, coded(*(codes(1, 64, 64, seed=n) for n in range(count))))) for count in (1, 4))
    assert four - one < 3 * 64 * 64 * 4 // 8 + 2000


def tall(rows: int = 1024, cols: int = 64, seed: int = 0) -> torch.Tensor:
    """Weights of a tall matrix whose columns hang together, as an embedding's do: few directions carry most of it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, cols, generator=generator)
    return torch.randn(rows, 8, generator=generator) @ directions + 0.7 * torch.randn(rows, cols, generator=generator)


def rounded(weights: torch.Tensor, quantizer: str) -> np.ndarray:
    """Codes (1, rows, cols) without any Hessian's help (an identity)."""
    return tg.gptq(weights[None], torch.eye(weights.shape[1])[None], 7, 15.0, tg.Log(None, enabled=False), quantizer).codes.numpy()


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
@pytest.mark.parametrize("shape", [(1024, 64), (1025, 70), (4099, 64)])
def test_tall_matrices_come_back_and_their_columns_are_predicted(quantizer: str, shape: tuple[int, int]) -> None:
    found = rounded(tall(*shape), quantizer)
    shuffled = np.random.default_rng(0).permuted(found, axis=1)  # each column by itself: nothing hangs together any more
    size = len(coded(found, codes(1, 30, 40), trellis=quantizer == "trellis")[2])
    assert size < 0.93 * len(tg.encode_codes([tg.Bank(shuffled, quantizer == "trellis")])[2])


def test_a_matrix_that_writes_learns_from_one_that_reads() -> None:
    """Rows of one and columns of the other are vectors in the same basis, so that the second is cheaper after the first."""
    found = rounded(tall(2048 + 256, 64), "scalar")
    banks = [tg.Bank(found[:, :2048], False), tg.Bank(np.ascontiguousarray(found[:, 2048:].transpose(0, 2, 1)), False, across=True)]
    after, alone = tg.encode_codes(banks)[3], tg.encode_codes(banks[1:])[2]
    assert len(after) < 0.97 * len(alone)


def test_prediction_costs_nothing_where_nothing_hangs_together() -> None:
    bank = np.rint(2.7 * np.random.default_rng(0).standard_normal((1, 2048, 64))).astype(np.int8)
    assert 8 * len(coded(bank)[2]) < 1.003 * tg.entropy_bits(np.bincount(bank.ravel().astype(int) + 128))


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("trellis", [False, True])
def test_prediction_of_extreme_codes_comes_back(value: int, trellis: bool) -> None:
    extreme = np.full((1, 1024, 64), value, np.int8)
    extreme[np.random.default_rng(0).random(extreme.shape) < 0.3] = 0
    coded(extreme, trellis=trellis)


def test_predictor_factors_are_those_of_cholesky() -> None:
    rows = tall(4000).mul(4).round().double().numpy()
    moments = (rows.T @ rows).astype(np.int64)
    factor = tg.fit_predictor(moments, len(rows))
    doubt = max(1 / 40, 0.5 * 64 / 4000)
    lower = np.linalg.cholesky(moments / len(rows) * np.where(np.eye(64) > 0, 1, 1 - doubt))
    np.testing.assert_allclose(factor / 65536 + np.eye(64), lower / np.diag(lower), atol=0.01)


def test_decoding_does_not_depend_on_how_matrix_products_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of integers in float64 are exact, so that another order of summation gives the same codes."""
    bank = rounded(tall(2000, 64), "scalar")
    streams, read = coded(bank), tg.Bank(np.zeros_like(bank), False)
    original = tg.fit_predictor

    monkeypatch.setattr(tg, "fit_predictor", lambda moments, count: np.asfortranarray(original(moments, count)))
    tg.decode_codes(streams, [read])
    assert np.array_equal(read.codes, bank)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_size_table_adds_up_to_the_file(compressor: str) -> None:
    cfg = config(COMPRESSOR=compressor, VOCAB_SIZE=2048, MODEL_DIM=64, NUM_LAYERS=9)
    tensors = random_tensors(cfg)
    data = tg.pack_artifact(tensors, cfg)
    *rows, rest = tg.size_table(data, tensors, cfg)
    assert [row["tensor"] for row in rows][0] == "tok_emb.weight" and rest["tensor"] == "rest"
    assert sum(row.get("bytes", 0) for row in rows) + rest["bytes"] == len(data)
    assert all(float(row["entropy"]) < 2 * float(row["bits_per_weight"]) for row in rows if "bits_per_weight" in row)
    assert compressor == "brotli" or rest["bytes"] < len(data) / 2


def test_the_entropy_of_a_trellis_knows_its_quantizers() -> None:
    cfg = config(QUANTIZER="trellis")
    tensors = random_tensors(cfg)
    (row,) = [row for row in tg.size_table(tg.pack_artifact(tensors, cfg), tensors, cfg) if row["tensor"] == "qo_bank"]
    codes = tensors["qo_bank"].codes.int()
    apart = sum(tg.entropy_bits(np.bincount(codes[tg.trellis_quantizers(codes) == q].numpy() + 128)) for q in (0, 1))
    assert float(row["entropy"]) == pytest.approx(apart / codes.numel(), abs=1e-4)
    assert apart < tg.entropy_bits(np.bincount(codes.ravel().numpy() + 128))


def test_no_pickle_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **keywords: object) -> None:
        raise AssertionError("an artifact is no pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dumps"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    for compressor in COMPRESSORS:
        cfg = config(COMPRESSOR=compressor)
        tg.unpack_artifact(tg.pack_artifact(random_tensors(cfg), cfg))


def test_a_decompression_bomb_is_stopped_at_its_limit() -> None:
    bomb = brotli.compress(bytes(1 << 26), quality=5)
    tracemalloc.start()
    with pytest.raises(tg.ArtifactError):
        tg.decompress(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_writing_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.artifact"
    tg.write_atomically(path, b"old")
    tg.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["run.artifact"]


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_a_failed_write_keeps_the_old_file_and_gives_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    path = tmp_path / "run.artifact"
    tg.write_atomically(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tg.os, call, fail)
    with pytest.raises(OSError, match="ARTIFACT_DIR") as caught:
        tg.write_atomically(path, b"new")
    assert caught.value.errno == code
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.artifact"]


def test_a_full_disk_is_an_error_with_a_hint() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="ARTIFACT_DIR"):
        tg.write_atomically("/dev/full/run.artifact", b"new")
