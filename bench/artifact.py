"""How many bytes the same quantized integers take under each coder, and what their entropy allows.

    python bench/artifact.py runs/RUN.artifact                    the integers of a trained model of ours
    python bench/artifact.py --safetensors model.safetensors      float weights of any transformer, rounded to nearest with
                                                                  the record's bits and ranges (no Hessians)

Rows: a byte-shuffled torch.save pickle under brotli 11 (how earlier records packed), the same under lzma, then our
container with each compressor. Then where the bytes of "rans" are, with the entropies as bounds. Encoding uses all cores.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import struct
import sys
import time
from pathlib import Path

import brotli
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt
from train_gpt import Config, Quantized, pack_artifact, round_to_codes, row_scales, unpack_artifact

GROUPS = (("embedding", ("emb",)), ("mlp", ("mlp", "up", "down", "intermediate", "output.dense")), ("attention", ("",)))
SMALLEST_MATRIX = 65536


def group_of(name: str) -> str:
    """embedding, attention or mlp, by a tensor's name."""
    if "attention" in name:
        return "attention"
    return next(group for group, words in GROUPS if any(word in name for word in words))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The float32 matrices of a safetensors file, larger than 65,536 elements."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    table = json.loads(raw[8 : 8 + header_bytes])
    matrices = {}
    for name, entry in table.items():
        if name == "__metadata__" or entry["dtype"] != "F32" or len(entry["shape"]) != 2:
            continue
        if math.prod(entry["shape"]) > SMALLEST_MATRIX:
            start = 8 + header_bytes + entry["data_offsets"][0]
            values = np.frombuffer(raw, np.float32, math.prod(entry["shape"]), start)
            matrices[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    return matrices


def bank_name(name: str) -> str:
    """The name without its layer number, under which equal matrices of all layers are stacked."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def round_to_nearest(matrices: dict[str, torch.Tensor]) -> dict[str, Quantized]:
    """Banks of the matrices of equal names, quantized with the record's bits and clip ranges."""
    cfg, banks = Config(), {}
    for name, weights in matrices.items():
        banks.setdefault(bank_name(name), []).append(weights)
    rules = {
        "embedding": (cfg.embed_bits, cfg.embed_clip_sigmas),
        "mlp": (cfg.matrix_bits, cfg.mlp_clip_sigmas),
        "attention": (cfg.matrix_bits, cfg.attn_clip_sigmas),
    }
    result = {}
    for name, parts in banks.items():
        weights, (bits, clip_sigmas) = torch.stack(parts), rules[group_of(name)]
        scales = row_scales(weights, bits, clip_sigmas)
        codes = round_to_codes(weights, scales.float()[..., None], bits)
        result[name] = Quantized(codes.to(torch.int8), scales)
    return result


def shuffled_pickle(tensors: dict) -> bytes:
    """torch.save of plain tensors, even bytes before odd ones."""
    buffer = io.BytesIO()
    plain = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized):
            plain[name + ".q"], plain[name + ".scale"] = tensor.codes, tensor.scales
        else:
            plain[name] = tensor
    torch.save(plain, buffer)
    raw = buffer.getvalue()
    return raw[0::2] + raw[1::2]


def timed(function, *arguments):
    """(result, seconds) of a call."""
    began = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - began


def same_tensors(left: dict, right: dict) -> bool:
    """Whether two tensor tables hold the same integers and floats."""
    pairs = [(left[name], right[name]) for name in left]
    return list(left) == list(right) and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) if isinstance(a, Quantized) else torch.equal(a, b)
        for a, b in pairs
    )


def compare(config: dict, tensors: dict) -> list[tuple[str, int, float, float]]:
    """(coder, bytes, seconds to encode, seconds to decode) of every way to store the tensors."""
    rows = []
    raw = shuffled_pickle(tensors)
    packed, encode_s = timed(lambda: brotli.compress(raw, quality=11, lgwin=24))
    rows.append(("pickle, shuffled, brotli 11", len(packed), encode_s, timed(brotli.decompress, packed)[1]))
    packed, encode_s = timed(lambda: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    rows.append(("pickle, shuffled, lzma 9e", len(packed), encode_s, timed(lzma.decompress, packed)[1]))
    for compressor in train_gpt.COMPRESSORS:
        packed, encode_s = timed(pack_artifact, tensors, config, compressor)
        (_, unpacked), decode_s = timed(unpack_artifact, packed)
        if not same_tensors(tensors, unpacked):
            raise SystemExit(f"{compressor}: what came back is not what was stored")
        rows.append((f"container, {compressor}", len(packed), encode_s, decode_s))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, help="artifact of a run")
    parser.add_argument("--safetensors", type=Path, help="float weights to round to nearest instead")
    arguments = parser.parse_args()
    if (arguments.artifact is None) == (arguments.safetensors is None):
        parser.error("name one artifact or one --safetensors file")
    if arguments.artifact:
        config, tensors = unpack_artifact(arguments.artifact.read_bytes())
    else:
        config, tensors = {}, round_to_nearest(read_safetensors(arguments.safetensors))
    weights = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Quantized))
    print(f"{weights:,} quantized weights in {len(tensors)} tensors\n")
    print(f"{'coder':30} {'bytes':>12} {'bits/weight':>12} {'to pickle':>10} {'encode s':>9} {'decode s':>9}")
    rows = compare(config, tensors)
    for name, size, encode_s, decode_s in rows:
        change = f"{100 * (size / rows[0][1] - 1):+.2f} %"
        print(f"{name:30} {size:12,} {8 * size / weights:12.4f} {change:>10} {encode_s:9.1f} {decode_s:9.2f}")
    print()
    for row in train_gpt.size_table(pack_artifact(tensors, config, "rans"), tensors):
        print(" ".join(f"{name}:{value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
