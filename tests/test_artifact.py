"""The artifact container and its entropy coder: exact round trips, exact sizes, and nothing but errors from bad files."""

import errno
import hashlib
import json
import os
import pickle
import random
import struct
import tracemalloc

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import ArtifactError, Quantized, dequantize, pack_artifact, unpack_artifact, write_atomically

COMPRESSORS = ("brotli", "lzma", "rans")
PREFIX_BYTES = 48


def quantized(*shape: int, seed: int = 0, sigma: float = 2.7) -> Quantized:
    """Rounded Gaussian codes whose columns differ in scale, as trained weights have them."""
    generator = np.random.default_rng(seed)
    columns = np.exp(0.3 * generator.standard_normal((*shape[:-2], 1, shape[-1])))
    codes = np.clip(np.rint(generator.standard_normal(shape) * sigma * columns), -127, 127).astype(np.int8)
    scales = generator.uniform(0.001, 0.01, shape[:-1]).astype(np.float16)
    return Quantized(torch.from_numpy(codes), torch.from_numpy(scales))


def small_model() -> dict:
    """A table with every kind of entry."""
    return {
        "tok_emb.weight": quantized(40, 24, sigma=3.0),
        "qo_bank": quantized(4, 24, 24, seed=1),
        "skip_weights": torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).half(),
        "scalar": torch.tensor(3.5),
        "counts": torch.arange(5, dtype=torch.int32),
    }


def assert_same(left: dict, right: dict) -> None:
    """Same names in the same order, same types, shapes and bits."""
    assert list(left) == list(right)
    for name, tensor in left.items():
        other = right[name]
        assert type(tensor) is type(other)
        if isinstance(tensor, Quantized):
            assert tensor.method == other.method
            assert torch.equal(tensor.codes, other.codes) and other.codes.dtype == torch.int8
            assert torch.equal(tensor.scales, other.scales) and other.scales.dtype == torch.float16
        else:
            assert tensor.dtype == other.dtype and tensor.shape == other.shape
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def with_checksum(data: bytes) -> bytes:
    """The same file with a checksum that fits, so that mutations reach the code behind it."""
    return data[:16] + hashlib.sha256(data[:16] + data[PREFIX_BYTES:]).digest() + data[PREFIX_BYTES:]


def with_header(data: bytes, change) -> bytes:
    """The artifact with its JSON header changed by a function, checksum fitted."""
    magic, version, size = struct.unpack_from("<8sII", data)
    header = json.loads(brotli.decompress(data[PREFIX_BYTES : PREFIX_BYTES + size]))
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = brotli.compress(text)
    body = packed + data[PREFIX_BYTES + size :]
    return with_checksum(struct.pack("<8sII", magic, version, len(packed)) + bytes(32) + body)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_round_trip_gives_the_same_bits(compressor):
    tensors, config = small_model(), {"model_dim": 24, "train_loop_phase_depths": [1, 3, 4], "name": "é", "x": 0.1}
    data = pack_artifact(tensors, config, compressor)
    loaded_config, loaded = unpack_artifact(data)
    assert loaded_config == config
    assert_same(tensors, loaded)
    assert pack_artifact(loaded, loaded_config, compressor) == data


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5, 2), (0, 5), (5, 0), (2, 0, 5), (0, 3, 3), (2, 2, 3, 1)])
def test_round_trip_of_odd_shapes(compressor, shape):
    tensors = {"first": quantized(*shape), "plain": torch.zeros(shape), "last": quantized(9, 3)}
    assert_same(tensors, unpack_artifact(pack_artifact(tensors, {}, compressor))[1])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_round_trip_of_extreme_values(compressor):
    scales = torch.tensor([0.0, 6e-8, 65504.0, 1.0, 1.0, 1.0]).half()
    generator = torch.Generator().manual_seed(1)
    extremes = torch.randint(0, 2, (6, 300), generator=generator).mul(255).sub(128).to(torch.int8)
    codes_everywhere = torch.randint(-128, 128, (6, 5000), generator=generator, dtype=torch.int8)
    one_outlier = torch.zeros(6, 9000, dtype=torch.int8)
    one_outlier[3, 4] = -128
    floats = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    tensors = {
        "extremes": Quantized(extremes, scales),
        "everywhere": Quantized(codes_everywhere, scales),
        "outlier": Quantized(one_outlier, scales),
        "zeros": Quantized(torch.zeros(2, 6, 64, dtype=torch.int8), torch.ones(2, 6).half()),
        "constant": Quantized(torch.full((6, 64), 127, dtype=torch.int8), scales),
        "floats": floats,
        "halves": floats.half(),
    }
    assert_same(tensors, unpack_artifact(pack_artifact(tensors, {}, compressor))[1])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_empty_table_round_trips(compressor):
    assert unpack_artifact(pack_artifact({}, {"seed": 1}, compressor)) == ({"seed": 1}, {})


def test_dequantized_weights_are_codes_times_scales():
    bank = quantized(3, 4, 5)
    expected = bank.codes.numpy().astype(np.float32) * bank.scales.numpy().astype(np.float32)[..., None]
    assert np.array_equal(dequantize(bank).numpy(), expected)


def test_strided_and_transposed_tensors_are_stored_as_they_read():
    bank = quantized(6, 10)
    view = Quantized(bank.codes[::2, 1::3], bank.scales[::2])
    tensors = {"view": view, "plain": torch.arange(12.0).reshape(3, 4).T}
    for compressor in COMPRESSORS:
        assert_same(
            {"view": Quantized(view.codes.contiguous(), view.scales.contiguous()), "plain": tensors["plain"].contiguous()},
            unpack_artifact(pack_artifact(tensors, {}, compressor))[1],
        )


def test_rans_is_within_one_percent_of_the_entropy_and_smaller_than_brotli():
    bank = quantized(4, 256, 256)
    sizes = {name: len(pack_artifact({"bank": bank}, {}, name)) for name in COMPRESSORS}
    columns = bank.codes.numpy().transpose(0, 2, 1).reshape(4 * 256, 256)
    scale_order = np.argsort(np.abs(columns).mean(1)).reshape(32, 32)
    bits = 0.0
    for group in scale_order:
        counts = np.bincount(columns[group].ravel().astype(int) + 128)
        counts = counts[counts > 0]
        bits += -(counts * np.log2(counts / counts.sum())).sum()
    scale_bytes = 2 * bank.scales.numel()
    assert sizes["rans"] < bits / 8 * 1.01 + scale_bytes + 1024
    assert sizes["rans"] < sizes["brotli"]


def test_rans_states_cost_nothing_per_tensor():
    one = len(pack_artifact({"a": quantized(64, 64)}, {}, "rans"))
    four = len(pack_artifact({name: quantized(64, 64, seed=ord(name)) for name in "abcd"}, {}, "rans"))
    assert four - one < 3 * 64 * 64 * 4 // 8 + 2000

def tall(rows: int = 1024, cols: int = 64, seed: int = 0) -> torch.Tensor:
    """Weights of a tall matrix whose columns hang together, as an embedding's do: few directions carry most of it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, cols, generator=generator)
    return torch.randn(rows, 8, generator=generator) @ directions + 0.7 * torch.randn(rows, cols, generator=generator)


def rounded(weights: torch.Tensor, quantizer: str) -> Quantized:
    """Quantized without any Hessian's help (an identity)."""
    found = train_gpt.gptq(weights[None], torch.eye(weights.shape[1])[None], 7, 15.0, print, quantizer)
    return Quantized(found.codes[0], found.scales[0], found.method)


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
@pytest.mark.parametrize("shape", [(1024, 64), (1025, 70), (4099, 64)])
def test_tall_matrices_come_back_and_their_columns_are_predicted(quantizer, shape):
    quantized_tall = rounded(tall(*shape), quantizer)
    data = pack_artifact({"tall": quantized_tall, "after": quantized(30, 40)}, {}, "rans")
    assert_same({"tall": quantized_tall, "after": quantized(30, 40)}, unpack_artifact(data)[1])
    bank = train_gpt._as_bank(quantized_tall)
    predicted, plain = (train_gpt._fit_model(bank, flag) for flag in (True, False))
    assert train_gpt._fit_bank(bank).model.predicted
    assert train_gpt._entropy_bits(predicted.counts) < 0.92 * train_gpt._entropy_bits(plain.counts)


def test_prediction_is_left_out_where_it_does_not_help():
    noise = quantized(2048, 64)
    assert not train_gpt._fit_bank(train_gpt._as_bank(noise)).model.predicted


@pytest.mark.parametrize("value", [-128, 127])
def test_prediction_of_extreme_codes_comes_back(value):
    codes = torch.full((1024, 64), value, dtype=torch.int8)
    codes[torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
    tensors = {"tall": Quantized(codes, torch.ones(1024).half()), "same": Quantized(codes | 1, torch.ones(1024).half(), "trellis")}
    assert_same(tensors, unpack_artifact(pack_artifact(tensors, {}, "rans"))[1])


def test_predictor_factors_are_those_of_cholesky():
    rows = tall(4000).mul(4).round().double().numpy()
    moments = (rows.T @ rows).astype(np.int64)
    factor, deviations = train_gpt._fit_predictor(moments, len(rows))
    doubt = max(0.1, 0.3 * 64 / 4000)
    expected = moments / len(rows) * np.where(np.eye(64) > 0, 1, 1 - doubt)
    lower = np.linalg.cholesky(expected)
    np.testing.assert_allclose(deviations / 64, np.diag(lower), rtol=0.01)
    np.testing.assert_allclose(factor / 65536 + np.eye(64), lower / np.diag(lower), atol=0.01)


def test_decoding_does_not_depend_on_how_matrix_products_are_summed(monkeypatch):
    """Products of integers in float64 are exact, so that another order of summation gives the same codes."""
    tensors = {"tall": rounded(tall(2000, 64), "scalar")}
    data = pack_artifact(tensors, {}, "rans")
    original = train_gpt._fit_predictor

    def reordered(moments, count):
        factor, deviations = original(moments, count)
        return np.asfortranarray(factor), deviations

    monkeypatch.setattr(train_gpt, "_fit_predictor", reordered)
    assert_same(tensors, unpack_artifact(data)[1])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_size_table_adds_up_to_the_file(compressor):
    tensors = {"emb": rounded(tall(2048, 64), "trellis"), "bank": quantized(3, 200, 150), "small": torch.ones(3)}
    data = pack_artifact(tensors, {}, compressor)
    table = train_gpt.size_table(data, tensors)
    assert [row["tensor"] for row in table] == ["emb", "bank", "rest"]
    assert sum(row["bytes"] for row in table) == len(data)
    assert all(float(row["entropy"]) < 2 * float(row["bits_per_weight"]) for row in table[:-1])


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.zeros(3, dtype=torch.float64), "float64"),
        (Quantized(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3).half()), "float16 \\(..., rows\\)"),
        (Quantized(torch.zeros(2, 3), torch.ones(2).half()), "int8"),
        (Quantized(torch.zeros(2, 3, dtype=torch.int8), torch.tensor([1.0, float("inf")]).half()), "finite"),
        (Quantized(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2).half(), "magic"), "magic"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_names_the_tensor(tensor, words):
    with pytest.raises(ValueError, match=f"qo_bank.*{words}"):
        pack_artifact({"qo_bank": tensor}, {}, "brotli")


def test_unknown_compressor_is_an_error_that_names_the_allowed_ones():
    with pytest.raises(ValueError, match="COMPRESSOR='zip'.*brotli, lzma, rans"):
        pack_artifact({}, {}, "zip")


def test_cut_short_or_foreign_files_say_so():
    data = pack_artifact(small_model(), {}, "brotli")
    with pytest.raises(ArtifactError, match="checksum"):
        unpack_artifact(data[:-1])
    with pytest.raises(ArtifactError, match="not an artifact"):
        unpack_artifact(b"PK\x03\x04" + data)
    with pytest.raises(ArtifactError, match="not an artifact"):
        unpack_artifact(b"")
    later = data[:8] + struct.pack("<I", 99) + data[12:]
    with pytest.raises(ArtifactError, match="format 99"):
        unpack_artifact(later)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_no_pickle_is_read_or_written(compressor, monkeypatch):
    def forbidden(*arguments, **keywords):
        raise AssertionError("an artifact is no pickle")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dumps"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    tensors = small_model()
    assert_same(tensors, unpack_artifact(pack_artifact(tensors, {}, compressor))[1])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_fuzz_every_mutation_is_read_or_refused(compressor):
    """4,000 mutations a compressor, each as it is and with its checksum fitted: cuts, bits, bytes, header text."""
    generator = random.Random(compressor)
    trellis = Quantized(quantized(2, 5, 6).codes, torch.ones(2, 5).half(), "trellis")
    data = pack_artifact({"a": quantized(12, 8), "b": trellis, "c": torch.ones(3)}, {"seed": 1}, compressor)
    refused = 0
    for case in range(4000):
        mutant = bytearray(data)
        kind = case % 4
        if kind == 0:
            del mutant[generator.randrange(len(mutant)) :]
        elif kind == 1:
            for _ in range(generator.choice([1, 1, 2, 8])):
                mutant[generator.randrange(len(mutant))] ^= 1 << generator.randrange(8)
        elif kind == 2:
            start = generator.randrange(PREFIX_BYTES, len(mutant))
            mutant[start : start + generator.randrange(20)] = generator.randbytes(generator.randrange(20))
        else:
            mutant = bytearray(with_header(data, lambda header: _spoil_text(header, generator)))
        for candidate in (bytes(mutant), with_checksum(bytes(mutant).ljust(PREFIX_BYTES, b"\0"))):
            try:
                config, tensors = unpack_artifact(candidate)
                assert isinstance(config, dict) and isinstance(tensors, dict)
            except ArtifactError:
                refused += 1
    assert refused > 6000


def _spoil_text(header: dict, generator: random.Random) -> bytes:
    text = bytearray(json.dumps(header).encode())
    for _ in range(generator.choice([1, 1, 3])):
        position = generator.randrange(len(text))
        text[position : position + generator.randrange(3)] = generator.choice(
            [b"", b"9", b"-", b"0", b"[", b"{}", b"null", b'"', b"1e9", b"99999999", b"true", b"NaN", generator.randbytes(1)]
        )
    return bytes(text)


ABSURD_SHAPES = [
    [1 << 30, 1 << 30], [1 << 31, 1], [1, 1 << 31], [(1 << 28) + 1, 1], [1, 1 << 28], [1 << 20, 1 << 20, 1 << 20], [-1, 3],
    [True, 3], [3.0, 3], ["3", 3], [[3], 3], None, 3, "33", [2] * 5, [1 << 27, 1, 1], [1 << 16, 0, 1 << 16], [1 << 28, 0, 3],
    [10**30, 3], [1 << 20, 1 << 8], [1 << 19, 200], [3], [], [1 << 20, 1 << 5],
]  # fmt: skip


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_absurd_sizes_are_refused_without_taking_the_memory(compressor):
    data = pack_artifact({"a": quantized(12, 8), "b": torch.ones(3)}, {}, compressor)

    def claims(shape, row, lengths=None):
        def change(header):
            header["tensors"][row]["shape"] = shape
            if lengths is not None:
                header["streams"] = lengths

        return with_header(data, change)

    cases = [claims(shape, row) for shape in ABSURD_SHAPES for row in (0, 1)]
    cases += [claims([12, 8], 0, lengths) for lengths in ([], [10**18], [-1, 1], [True], None, "x", [0] * 100000, [0.5])]
    cases += [with_header(data, lambda header: b"[" * 100000), with_header(data, lambda header: b'{"a":' * 50000)]
    cases += [with_header(data, lambda header: b" " * (1 << 24)), with_header(data, lambda header: b"9" * 10000)]
    for key in ("config", "compressor", "tensors", "streams"):
        cases += [with_header(data, lambda header: {**header, key: value}) for value in (None, 1, "zip", [], {}, [1], [{}])]
        cases.append(with_header(data, lambda header: {k: v for k, v in header.items() if k != key}))
    tracemalloc.start()
    for number, case in enumerate(cases):
        try:
            unpack_artifact(case)
        except ArtifactError:
            continue
        assert json.loads(brotli.decompress(case[48 : 48 + struct.unpack_from("<I", case, 12)[0]])), number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * train_gpt.ARTIFACT_MAX_TENSOR_BYTES


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_a_decompression_bomb_is_stopped_at_the_size_its_table_allows(compressor):
    bomb = train_gpt._compress(bytes(1 << 26), compressor)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="does not hold"):
        train_gpt._decompress(bomb, compressor, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_writing_replaces_the_file_whole(tmp_path):
    path = tmp_path / "deep" / "run.artifact"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["run.artifact"]


@pytest.mark.parametrize("call, code", [("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_a_failed_write_keeps_the_old_file_and_gives_a_hint(tmp_path, monkeypatch, call, code):
    path = tmp_path / "run.artifact"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    if call == "write":
        monkeypatch.setattr(train_gpt.os, "fsync", fail)
    else:
        monkeypatch.setattr(train_gpt.os, call, fail)
    with pytest.raises(OSError, match="cannot write 3 bytes to .*ARTIFACT_DIR") as caught:
        write_atomically(path, b"new")
    assert caught.value.errno == code
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.artifact"]


def test_a_full_disk_is_an_error_with_a_hint():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="cannot write"):
        write_atomically("/dev/full/run.artifact", b"new")
