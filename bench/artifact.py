"""How many bytes the same quantized integers take under each coder, and what their entropy allows.

    python bench/artifact.py runs/RUN.artifact

Rows: a byte-shuffled torch.save pickle under brotli 11 (how earlier records packed), the same under lzma, then our
container with each compressor. Then where the bytes of "rans" are, with the entropies as bounds.
"""

from __future__ import annotations

import argparse
import io
import lzma
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt
from train_gpt import Config, Quantized, Tensors, pack_artifact, unpack_artifact


def plain_tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Codes, scales and the rest by name."""
    plain = {}
    for name, tensor in tensors.items():
        plain |= {name + ".q": tensor.codes, name + ".scale": tensor.scales} if isinstance(tensor, Quantized) else {name: tensor}
    return plain


def shuffled_pickle(tensors: Tensors) -> bytes:
    """torch.save of plain tensors, even bytes before odd ones."""
    buffer = io.BytesIO()
    torch.save(plain_tensors(tensors), buffer)
    raw = buffer.getvalue()
    return raw[0::2] + raw[1::2]


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(result, seconds) of a call."""
    began = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - began


def compare(cfg: Config, tensors: Tensors) -> list[tuple[str, int, float, float]]:
    """(coder, bytes, seconds to encode, seconds to decode) of every way to store the tensors."""
    rows = []
    raw = shuffled_pickle(tensors)
    packed, encode_s = timed(lambda: brotli.compress(raw, quality=11, lgwin=24))
    rows.append(("pickle, shuffled, brotli 11", len(packed), encode_s, timed(brotli.decompress, packed)[1]))
    packed, encode_s = timed(lambda: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    rows.append(("pickle, shuffled, lzma 9e", len(packed), encode_s, timed(lzma.decompress, packed)[1]))
    for compressor in ("brotli", "rans"):
        packed, encode_s = timed(pack_artifact, tensors, replace(cfg, compressor=compressor))
        (_, unpacked), decode_s = timed(unpack_artifact, packed)
        before, after = plain_tensors(tensors), plain_tensors(unpacked)
        if list(before) != list(after) or not all(map(torch.equal, before.values(), after.values())):
            raise SystemExit(f"{compressor}: what came back is not what was stored")
        rows.append((f"container, {compressor}", len(packed), encode_s, decode_s))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact of a run")
    cfg, tensors = unpack_artifact(parser.parse_args().artifact.read_bytes())
    weights = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Quantized))
    print(f"{weights:,} quantized weights in {len(tensors)} tensors\n")
    print(f"{'coder':30} {'bytes':>12} {'bits/weight':>12} {'to pickle':>10} {'encode s':>9} {'decode s':>9}")
    rows = compare(cfg, tensors)
    for name, size, encode_s, decode_s in rows:
        change = f"{100 * (size / rows[0][1] - 1):+.2f} %"
        print(f"{name:30} {size:12,} {8 * size / weights:12.4f} {change:>10} {encode_s:9.1f} {decode_s:9.2f}")
    print()
    for row in train_gpt.size_table(pack_artifact(tensors, replace(cfg, compressor="rans")), tensors, cfg):
        print(" ".join(f"{name}:{value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
