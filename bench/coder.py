"""Bytes of the codes of quantized matrices: our coder beside lrzip, and beside coders that know less.

    python bench/coder.py [--code OTHER/train_gpt.py] FILE...

FILE is an artifact, read by the train_gpt.py that --code names (a record's artifact needs the record's own), or an .npz
with the codes of all banks, int8 (matrices, rows, cols), by their names in the parameter table; "trellis" in its name says what wrote them.

Columns, in bytes: `table`, the entropy with one frequency table a bank; `columns`, with up to 32 tables chosen by how large the
codes above in the column were (what `rans` was before it predicted); `lrzip` -z -L9 of the codes, columns together; `rans`, the
coder's own streams, tables included in the total. Entropies come without their tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import Bank, Config, Quantized, decode_codes, encode_codes, entropy_bits, parameter_table, row_banks, trellis_quantizers


def read_banks(path: Path, code: Path | None) -> dict[str, list[Bank]]:
    """{parameter: its codes as the coder takes them} of a file."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            found = {name: Quantized(torch.from_numpy(file[name]), torch.empty(0), "trellis" if "trellis" in path.name else "scalar")
                     for name in file}
    else:
        spec = importlib.util.spec_from_file_location("coder_of_the_artifact", code or Path(__file__).parent.parent / "train_gpt.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found = module.unpack_artifact(path.read_bytes())[1]
    table = parameter_table(Config(num_layers=len(found["mlp_up_bank"].codes)))
    return {row.name: row_banks(row, found[row.name]) for row in table if row.matrices}


def column_bits(codes: np.ndarray, trellis: bool, spreads: int) -> float:
    """Entropy with `spreads` tables (for each quantizer), by the mean of |code| above in the column."""
    size = np.abs(codes.astype(np.int64))
    above = np.cumsum(size, 1) - size
    feature = (32 * above + 128 * size.mean()) / (np.arange(codes.shape[1])[:, None] + 4)
    thresholds = np.unique(np.quantile(feature, np.arange(1, spreads) / spreads))
    table = np.searchsorted(thresholds, feature, side="right")
    if trellis:
        table += spreads * trellis_quantizers(torch.from_numpy(codes)).numpy()
    symbols = (table * 256 + codes.astype(np.int64) + 128).ravel()
    return entropy_bits(np.bincount(symbols, minlength=spreads * 512).reshape(-1, 256))


def lrzip_bytes(codes: np.ndarray) -> int | None:
    """What lrzip -z -L9 makes of the codes, columns together; None where it is not installed."""
    if not shutil.which("lrzip"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "codes"), Path(folder, "codes.lrz")
        plain.write_bytes(np.ascontiguousarray(codes.transpose(0, 2, 1)).tobytes())
        subprocess.run(["lrzip", "-z", "-L9", "-q", "-o", packed, plain], check=True, stdout=subprocess.DEVNULL)
        return packed.stat().st_size


def measure(path: Path, code: Path | None, with_lrzip: bool) -> None:
    """Print the rows of a file; SystemExit if the coder does not give the codes back."""
    parameters = read_banks(path, code)
    banks = [bank for group in parameters.values() for bank in group]
    began = time.process_time()
    streams = encode_codes(banks)
    encode_s, began = time.process_time() - began, time.process_time()
    found = [bank._replace(codes=np.zeros_like(bank.codes)) for bank in banks]
    decode_codes(streams, found)
    decode_s = time.process_time() - began
    if not all(np.array_equal(bank.codes, other.codes) for bank, other in zip(banks, found)):
        raise SystemExit(f"{path}: what came back is not what was stored")
    sizes, total = iter(streams[2:]), np.zeros(4)
    for name, group in parameters.items():
        codes, size = np.concatenate([bank.codes for bank in group]), sum(len(next(sizes)) for _ in group)
        entropies = [column_bits(codes, group[0].trellis, spreads) / 8 for spreads in (1, 32)]
        row = [*entropies, (lrzip_bytes(codes) if with_lrzip else None) or 0, size]
        print_row(path, name, codes.size, row)
        total += row
    beside = len(streams[0]) + len(streams[1])
    total[3] += beside
    print_row(path, "total", sum(bank.codes.size for bank in banks), total.tolist())
    print(f"  encoded in {encode_s:.1f}, decoded in {decode_s:.1f} CPU seconds; tables and states {beside:,} bytes")


def print_row(path: Path, name: str, weights: int, row: list[float]) -> None:
    """One line: bytes by coder, bits a weight and how our coder compares."""
    table, columns, lrzip, ours = row
    against = f"{100 * (ours / lrzip - 1):+.2f} %" if lrzip else "-"
    print(f"{path.stem:24} {name:15} {weights:11,} {table:12,.0f} {columns:12,.0f} {lrzip:12,.0f} {ours:12,.0f} {8 * ours / weights:8.4f} "
          f"{100 * (ours / columns - 1):+7.2f} % {against:>9}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--code", type=Path, help="the train_gpt.py that wrote the artifacts")
    parser.add_argument("--no-lrzip", action="store_true", help="it takes minutes")
    arguments = parser.parse_args()
    print(f"{'file':24} {'bank':15} {'weights':>11} {'table':>12} {'columns':>12} {'lrzip':>12} {'rans':>12} {'bits':>8}"
          "  columns     lrzip")
    for path in arguments.files:
        measure(path, arguments.code, not arguments.no_lrzip)


if __name__ == "__main__":
    main()
