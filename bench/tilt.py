"""Fit the n-gram tilt's betas by bins on TRAINING documents, and say what they gain there over one constant.

    python bench/tilt.py --artifact A --data FOLDER [--tokens 50000000] [--scored 2000000] [--order 16] [--least 200]

Hints are found in the first --tokens tokens of the training shards, in scoring order, as in a score of as many tokens: how often a
hint is right depends on how much came before. Of the documents that have hints, as many as hold --scored tokens are scored by the
artifact's model, without test-time training. For each bin of occurrences and share (train_gpt.py, NGRAM_TILT_BETAS) beta is where the
loss is least: hits = sum of q e^beta / (1 + q (e^beta - 1)); bins with fewer than --least hints are fitted together. Half of the
documents fit, the other half say what the fit gains. The last line is what the environment of a run takes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as g  # noqa: E402

BINS, HIGHEST = 25, 20.0


def training_text(folder: Path, tokens: int) -> g.ValData:
    """The first documents of the training shards, as if they were to be scored."""
    text = np.concatenate(g.Dataset(folder).read("train"))[:tokens]
    starts = np.flatnonzero(text == g.BOS_ID)
    text = text[starts[0]: starts[-1] + 1]
    return g.ValData(text, np.ones_like(text), int((text == g.BOS_ID).sum()))


def hint_losses(run: g.Run, model: g.GPT, documents: g.Documents, hints: g.NgramHints, scored: int, rng: np.random.Generator,
                limit: int = 8192) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probability of the hint, whether it is right, document) at the index of each hint that was scored; NaN for the others."""
    order = np.argsort(documents.starts)
    owner = order[np.searchsorted(documents.starts[order], hints.at) - 1]
    with_hints = rng.permutation(np.unique(owner))
    keep = with_hints[np.cumsum(documents.lengths[with_hints]) <= max(scored, documents.lengths[with_hints[0]])]
    top = np.zeros(len(documents.tokens), np.int64)
    top[hints.at] = hints.top
    losses, schedule = np.full(len(documents.tokens), np.nan), g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)
    for document in keep:
        start, length = int(documents.starts[document]), int(documents.lengths[document])
        for begin in range(start, start + length, limit):
            end = min(begin + limit, start + length)
            starts = np.arange(0, end - begin, run.cfg.eval_seq_len)
            tokens = documents.tokens[begin: end + 1].astype(np.int64)
            batch = g.make_batch(tokens[:-1], tokens[1:], starts, run.cfg.eval_seq_len, run.device)
            with torch.no_grad():
                also = torch.from_numpy(top[begin + 1: end + 1]).to(run.device)
                losses[begin + 1: end + 1] = model(batch, schedule, also=also)[1].cpu().numpy()
    return np.exp(-losses[hints.at]), documents.tokens[hints.at] == hints.top, owner


def gain(betas: np.ndarray, q: np.ndarray, hit: np.ndarray) -> float:
    """Nats that these betas take off the losses of all hints."""
    return float((betas * hit - np.log1p(q * np.expm1(betas))).sum())


def best_beta(q: np.ndarray, hit: np.ndarray) -> float:
    """Where the gain of one beta is largest, 0 if none gains; the gain is concave in it. One more hint, a wrong one, is imagined: no
    number of right ones is proof."""
    q, hit, low, high = np.append(q, q.mean()), np.append(hit, False), 0.0, HIGHEST
    for _ in range(50):
        middle = (low + high) / 2
        up = np.exp(middle)
        low, high = (middle, high) if hit.sum() > (q * up / (1 + q * (up - 1))).sum() else (low, middle)
    return round(low, 2)


def bins_of(hints: g.NgramHints) -> np.ndarray:
    """The bin of every hint, by the program's own rule."""
    return hints.betas(g.Config(ngram_tilt_betas=tuple(map(float, range(BINS))))).astype(int)


def fit(bins: np.ndarray, q: np.ndarray, hit: np.ndarray, least: int) -> list[float]:
    """The beta of every bin; bins with few hints have one in common, those of full share and the others."""
    few = np.isin(bins, [b for b in range(BINS) if (bins == b).sum() < least])
    groups = [bins == b if (bins == b).sum() >= least else few & ((bins % 5 == 4) == (b % 5 == 4)) for b in range(BINS)]
    return [best_beta(q[group], hit[group]) if group.any() else 0.0 for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (("tokens", 50_000_000), ("scored", 2_000_000), ("order", 16), ("least", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    cfg, tensors = g.unpack_artifact(options.artifact.read_bytes())
    run = g.Run(replace(cfg, data_path=str(options.data)), g.Ranks(), g.Log(None, enabled=False))
    model = g.model_from_tensors(run, tensors)
    val = training_text(options.data, options.tokens)
    documents = g.Documents(val)
    hints = g.ngram_hints(documents, options.order)
    q, hit, owner = hint_losses(run, model, documents, hints, options.scored, np.random.default_rng(0))
    known, bins, even = np.isfinite(q), bins_of(hints), owner % 2 == 0
    once = hints.betas(g.Config())
    print(f"{len(val.tokens)} training tokens, {len(hints.at)} hints, {known.sum()} of them scored in "
          f"{len(np.unique(owner[known]))} documents")
    print(f"{'bin':>3} {'occurrences':>11} {'share':>6} {'hints':>8} {'right':>6} {'mean q':>7} {'beta':>6}")
    betas = fit(bins[known], q[known], hit[known], options.least)
    for b in range(BINS):
        if (here := known & (bins == b)).any():
            means = f"{hit[here].mean():6.3f} {q[here].mean():7.3f}"
            print(f"{b:3} {2 ** (b // 5):>10}+ {(b % 5) / 4:6.2f} {here.sum():8} {means} {betas[b]:6.2f}")
    fitted = np.array(fit(bins[known & even], q[known & even], hit[known & even], options.least))
    test = known & ~even
    best = best_beta(q[known & even & (once > 0)], hit[known & even & (once > 0)])
    for name, these in (("constant 2.625", once), (f"constant {best}", np.where(once > 0, best, 0.0)), ("by bins", fitted[bins])):
        print(f"{name}: {gain(these[test], q[test], hit[test]) / max(test.sum(), 1):.5f} nats a hint on the other half")
    print("NGRAM_TILT_BETAS=" + ",".join(f"{beta:g}" for beta in betas))


if __name__ == "__main__":
    main()
