"""Small artifacts, and ways to change what is in them so that only the checks behind the checksum can tell."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import brotli
import numpy as np
import safetensors.torch
import tiny
import torch

import train_gpt as tg

Plain = dict[str, torch.Tensor]


def config(**changes: object) -> tg.Config:
    return tg.Config.from_env({name: str(value) for name, value in {**tiny.SETTINGS, **changes}.items()})


def codes(*shape: int, seed: int = 0, sigma: float = 2.7) -> np.ndarray:
    """Rounded Gaussian codes whose columns differ in scale, as trained weights have them."""
    generator = np.random.default_rng(seed)
    columns = np.exp(0.3 * generator.standard_normal((*shape[:-2], 1, shape[-1])))
    return np.clip(np.rint(generator.standard_normal(shape) * sigma * columns), -127, 127).astype(np.int8)


def random_tensors(cfg: tg.Config, seed: int = 0) -> tg.Tensors:
    """What a model of these settings could be stored as."""
    generator, tensors = np.random.default_rng(seed), {}
    for number, row in enumerate(tg.parameter_table(cfg)):
        if row.matrices or row.int8:
            scales = torch.from_numpy(generator.uniform(0.001, 0.01, row.shape[:-1]).astype(np.float16))
            stored = torch.from_numpy(codes(*row.shape, seed=number))
            tensors[row.name] = tg.Quantized(stored, scales, cfg.quantizer if row.matrices else "scalar")
        else:
            tensors[row.name] = torch.from_numpy(generator.standard_normal(row.shape).astype(np.float16))
    return tensors


def parts(data: bytes) -> tuple[bytes, bytes]:
    """The packed part of an artifact, decompressed, and its coded part."""
    size, start = tg.ARTIFACT_PREFIX.unpack_from(data)[1], tg.ARTIFACT_PREFIX.size
    return brotli.decompress(data[start: start + size]), data[start + size:]


def sealed(plain: bytes, coded: bytes = b"") -> bytes:
    """An artifact of these parts, with a checksum that fits."""
    packed = brotli.compress(plain, quality=1)
    start = struct.pack("<8sI", tg.ARTIFACT_MAGIC, len(packed))
    return start + hashlib.sha256(start + packed + coded).digest() + packed + coded


def with_tensors(data: bytes, change: Callable[[Plain], object]) -> bytes:
    """The artifact with its safetensors changed in place."""
    plain, coded = parts(data)
    tensors = safetensors.torch.load(plain)
    change(tensors)
    return sealed(safetensors.torch.save(tensors), coded)


def with_header(data: bytes, text: bytes) -> bytes:
    """The artifact with this text for its settings."""
    return with_tensors(data, lambda tensors: tensors.update(settings=torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)))


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(safetensors.torch.load(parts(data)[0])["settings"].numpy().tobytes())


def with_settings(data: bytes, **values: Any) -> bytes:
    """The artifact with these values for settings, as JSON of Python's kind writes them (NaN and Infinity included)."""
    header = header_of(data)
    header["settings"].update(values)
    return with_header(data, json.dumps(header).encode())


def with_streams(data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The artifact with other streams in its coded part."""
    plain, coded = parts(data)
    return sealed(plain, tg.join_streams(change(tg.cut_streams(coded))))
