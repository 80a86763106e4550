"""Two numbers for a training step: the operations it must do, the bytes it must move, and the floor they give.

    python bench/roofline.py [--tokens 98304] [--context 500]

A step is written down as a list of kernels, each with its floating-point operations and with the bytes that it reads
and writes in device memory (every input once, every output once, bfloat16 activations). Three times come out of it:

    arithmetic   all operations at the peak rate of the tensor cores: nothing can be faster
    kernels      each kernel at the larger of its two times, added up: what this cut into kernels can reach
    published    the step time of the published record, whose share of peak is arithmetic / published

Two cuts are compared. "compiled" fuses what torch.compile fuses: runs of elementwise work, with normalisations. "ours" also
joins the MLP's activation to the products next to it. Peaks are data-sheet figures (dense bfloat16, memory bandwidth). A
large square product reaches about 0.8 of the first and a large copy about 0.9 of the second, so a floor of "kernels" over 0.8
is a fair hope for a real step. Everything here is arithmetic on paper; bench/gpu.py measures.
"""
import argparse
from typing import NamedTuple

MODEL = {"vocab": 8192, "d": 512, "kv": 256, "heads": 8, "hidden": 2048, "layers": 11, "loop": 3}
PEAKS = {"H100 SXM": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}      # operations / s, bytes / s
PUBLISHED_MS = {1: 98.0, 3: 143.0, 4: 166.0}
PARAMETERS = 35_990_000


class Kernel(NamedTuple):
    """One kernel of a step: total floating-point operations and bytes of device memory."""

    name: str
    operations: float
    traffic: float

    def seconds(self, peak: tuple[float, float]) -> float:
        """The larger of the two times on a device with `peak` = (operations / s, bytes / s)."""
        return max(self.operations / peak[0], self.traffic / peak[1])


def product(name: str, tokens: int, inputs: int, outputs: int) -> list[Kernel]:
    """A linear layer's three products: forward, gradient of the input, gradient of the weight."""
    operations, weight = 2.0 * tokens * inputs * outputs, 2.0 * inputs * outputs
    traffic = 2.0 * tokens * (inputs + outputs) + weight
    return [Kernel(f"{name} {part}", operations, traffic) for part in ("forward", "input gradient", "weight gradient")]


def elementwise(name: str, tokens: int, forward: float, backward: float) -> list[Kernel]:
    """A fused run of elementwise work; `forward` and `backward` are values read plus written for a token."""
    return [Kernel(f"{name} forward", 0.0, 2.0 * tokens * forward), Kernel(f"{name} backward", 0.0, 2.0 * tokens * backward)]


def visit_kernels(tokens: int, context: float, fused_mlp: bool) -> list[Kernel]:
    """One visit of a layer, forward and backward; `context` is the mean number of tokens that a token attends to."""
    d, kv, hidden, heads = (MODEL[name] for name in ("d", "kv", "hidden", "heads"))
    attention = 4.0 * tokens * context * d
    kernels = [
        *elementwise("residual mix and norm", tokens, 4 * d, 6 * d),     # x, x0 -> u, n; and back with both gradients
        *product("q k v", tokens, d, d + 2 * kv),
        *product("gate", tokens, d, heads),
        *elementwise("head norm, rotary, gain", tokens, 2 * (d + kv), 3 * (d + kv)),
        Kernel("attention forward", attention, 2.0 * tokens * (2 * d + 2 * kv)),
        Kernel("attention backward", 2.5 * attention, 2.0 * tokens * (4 * d + 4 * kv) + 8.0 * tokens * d),
        *elementwise("xsa and gate", tokens, 2 * d + kv, 4 * d + 2 * kv),
        *product("projection", tokens, d, d),
        *elementwise("residual and norm", tokens, 4 * d, 6 * d),
        *product("up", tokens, d, hidden),
        *product("down", tokens, hidden, d),
    ]
    if not fused_mlp:
        return kernels + elementwise("activation", tokens, 2 * hidden, 3 * hidden)
    extra = 2.0 * tokens * hidden                                        # the pre-activation, written once and read once
    grown = {"up forward", "down input gradient"}
    return [kernel._replace(traffic=kernel.traffic + extra) if kernel.name in grown else kernel for kernel in kernels]


def orthogonalize_operations(steps: int = 5) -> float:
    """Newton-Schulz on all banks: a step is S L^T, (S S)^2 and their product for each matrix of short side S, long side L."""
    d, kv, hidden, count = MODEL["d"], MODEL["kv"], MODEL["hidden"], 2 * MODEL["layers"]
    sides = [(d, d), (kv, d), (d, hidden)]
    return steps * count * sum(4.0 * short**2 * long + 2.0 * short**3 for short, long in sides)


def step_kernels(depth: int, tokens: int, context: float, fused: bool, ranks: int) -> list[Kernel]:
    """All kernels of one step of one of `ranks` ranks at a loop depth."""
    visits = MODEL["layers"] + MODEL["loop"] * (depth - 1)
    d, vocab = MODEL["d"], MODEL["vocab"]
    return [
        *visit_kernels(tokens, context, fused) * visits,
        *elementwise("skips", tokens, 3 * d, 5 * d) * (visits // 2),
        *product("head", tokens, d, vocab),
        Kernel("cross entropy forward", 0.0, 2.0 * tokens * vocab),
        Kernel("cross entropy backward", 0.0, 4.0 * tokens * vocab),
        Kernel("embedding", 0.0, 2.0 * tokens * d * 6),
        Kernel("orthogonalize", orthogonalize_operations() / ranks, 5 * 12.0 * PARAMETERS / ranks),
        Kernel("optimizer and average", 0.0, PARAMETERS * (60.0 / ranks + 30.0)),   # state is shared out; the average is not
    ]


def rows(tokens: int, context: float, ranks: int) -> list[dict[str, float | int | str]]:
    """One row of the table a device and depth; times in milliseconds, operations in 1e12, bytes in 1e9."""
    table = []
    for device, peak in PEAKS.items():
        for depth, published in PUBLISHED_MS.items():
            ours, compiled = (step_kernels(depth, tokens, context, fused, ranks) for fused in (True, False))
            operations = sum(k.operations for k in ours)
            arithmetic = 1e3 * operations / peak[0]
            table.append({
                "device": device, "depth": depth, "tera_operations": operations / 1e12,
                "giga_bytes": sum(k.traffic for k in ours) / 1e9, "arithmetic_ms": arithmetic,
                "kernels_ms": 1e3 * sum(k.seconds(peak) for k in ours),
                "compiled_ms": 1e3 * sum(k.seconds(peak) for k in compiled),
                "published_ms": published if device.startswith("H100") else float("nan"),
                "published_share": arithmetic / published if device.startswith("H100") else float("nan"),
            })
    return table


def markdown(table: list[dict[str, float | int | str]]) -> str:
    """The rows as a table for NOTES.md."""
    lines = ["| device | depth | 1e12 operations | GB | arithmetic ms | kernels ms (ours) | kernels ms (compiled) | "
             "published ms | published share of peak |", "|---|---|---|---|---|---|---|---|---|"]
    for row in table:
        published = "| - | - |" if row["published_ms"] != row["published_ms"] else \
            f"| {row['published_ms']:.0f} | {100 * row['published_share']:.0f} % |"
        lines.append(f"| {row['device']} | {row['depth']} | {row['tera_operations']:.1f} | {row['giga_bytes']:.0f} | "
                     f"{row['arithmetic_ms']:.1f} | {row['kernels_ms']:.1f} | {row['compiled_ms']:.1f} {published}")
    return "\n".join(lines)


def largest(depth: int, tokens: int, context: float, ranks: int, count: int = 10) -> str:
    """The kernels that take most of the floor on the first device, with which of the two times they take."""
    device, peak = next(iter(PEAKS.items()))
    times: dict[str, list[float]] = {}
    for kernel in step_kernels(depth, tokens, context, True, ranks):
        entry = times.setdefault(kernel.name, [0.0, 0.0])
        entry[0] += 1e3 * kernel.operations / peak[0]
        entry[1] += 1e3 * kernel.traffic / peak[1]
    order = sorted(times.items(), key=lambda item: -max(item[1]))[:count]
    lines = [f"{device}, depth {depth}:", "| kernel | arithmetic ms | memory ms |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {a:.1f} | {b:.1f} |" for name, (a, b) in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens of one rank's step")
    parser.add_argument("--context", type=float, default=500.0, help="mean number of tokens that a token attends to")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the optimizer's work")
    options = parser.parse_args()
    print(markdown(rows(options.tokens, options.context, options.ranks)))
    print()
    print(largest(4, options.tokens, options.context, options.ranks))


if __name__ == "__main__":
    main()
