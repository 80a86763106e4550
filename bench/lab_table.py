"""The table and the picture of the lab: rows in pairs, their difference in bits by document (bench/lab.py makes the rows)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STAGES = ("ema", "quantized", "quantized_ttt")
Row = dict[str, Any]  # a line of lab.jsonl


class Difference(NamedTuple):
    """BPB of a try less that of the base, and the standard errors of its mean over the pairs and over the documents."""

    bpb: float  # of the try
    by_pair: np.ndarray  # (pairs,)
    mean: float
    error_by_seed: float  # NaN for one pair
    error_by_document: float


Found = dict[tuple[str, str], Difference]  # by label and stage


def difference(tried: list[Row], base: list[Row], stage: str) -> Difference:
    """What a stage gained, over rows in pairs; an error if their documents are not the same."""
    sizes = np.array(base[0]["bytes"])
    if any(row["bytes"] != base[0]["bytes"] for row in tried + base):
        raise SystemExit("error: the validation documents of the runs are not the same: their bits cannot be compared")
    bits = np.array([np.subtract(t["bits"][stage], b["bits"][stage]) for t, b in zip(tried, base)])  # (pairs, documents)
    by_pair, (pairs, documents) = bits.sum(1) / sizes.sum(), bits.shape
    mean = float(by_pair.mean())
    rest = bits.mean(0) - mean * sizes  # of a ratio of sums
    return Difference(float(np.mean([row["bpb"][stage] for row in tried])), by_pair, mean,
                      float(by_pair.std(ddof=1)) / math.sqrt(pairs) if pairs > 1 else math.nan,
                      math.sqrt((rest ** 2).sum() * documents / max(documents - 1, 1)) / sizes.sum())


def compare(rows: dict[str, Row], pairs: dict[str, list[tuple[str, str]]]) -> Found:
    """From rows by key, and by label the keys of the try and of the base of each pair, where both are there and have the stage."""
    found = {}
    for label, keys in pairs.items():
        there = [(rows[tried], rows[base]) for tried, base in keys if {tried, base} <= rows.keys()]
        for stage in STAGES:
            if both := [pair for pair in there if all(stage in row["bits"] for row in pair)]:
                found[label, stage] = difference([tried for tried, _ in both], [base for _, base in both], stage)
    return found


def spread(found: Found, stage: str) -> tuple[float, int]:
    """Standard deviation of a pair's difference, pooled over the tries, and its degrees of freedom."""
    rests = [d.by_pair - d.mean for (_, its), d in found.items() if its == stage]
    freedom = sum(len(rest) - 1 for rest in rests)
    return math.sqrt(sum(float(rest @ rest) for rest in rests) / freedom) if freedom else math.nan, freedom


def table(found: Found) -> str:
    lines = ["| try | stage | pairs | BPB | difference | s.e. by seed | s.e. by document | better in |" + "\n" + "|---" * 8 + "|"]
    lines += [f"| {label} | {stage} | {len(d.by_pair)} | {d.bpb:.4f} | {d.mean:+.5f} | {d.error_by_seed:.5f} | {d.error_by_document:.5f} | "
              f"{(d.by_pair < 0).sum()} of {len(d.by_pair)} |" for (label, stage), d in found.items()]
    pooled = [(stage, *spread(found, stage)) for stage in STAGES]
    return "\n".join(lines + [f"spread stage:{stage} sd_of_a_pair:{sd:.5f} degrees_of_freedom:{n}" for stage, sd, n in pooled if n])


def draw(found: Found, path: Path) -> None:
    """A picture of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.28 * len(found)), layout="constrained")
    for y, ((_, stage), d) in enumerate(found.items()):
        color = f"C{STAGES.index(stage)}"
        axes.errorbar(d.mean, -y, xerr=2 * np.nanmax([d.error_by_seed, d.error_by_document]), fmt="o", color=color, capsize=3)
        axes.plot(d.by_pair, [-y] * len(d.by_pair), "|", color=color, markersize=9)
    axes.set_yticks(-np.arange(len(found)), [f"{label}  {stage}" for label, stage in found], fontsize=8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("BPB less the base's; bars: two standard errors (the larger of both kinds), ticks: pairs")
    figure.savefig(path, dpi=110)
