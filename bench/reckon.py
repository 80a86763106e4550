"""How long a whole run takes and what it keeps in memory, reckoned before it runs: the model behind `bench/rehearse.py plan`.

Every constant of the model stands in the first section with its source, but for the two that the run itself plans with
(`TTT_TOKENS_PER_SECOND` and `TTT_STEP_SECONDS` in train_gpt.py). `published_plan` is the published code's own batching: with
it the model must give back the published logs, which is what makes it believable for ours.
"""
from __future__ import annotations

import heapq
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import train_gpt as g  # noqa: E402

# --------------------------------------------------------------------------------------------------------------- constants

STEP_MS = (15.0, 7.55)  # a training step of 98,304 tokens a GPU: beside the visits, and a visit. Fitted to the published logs:
# 98 / 143 / 166 ms at depth 1 / 3 / 4 (11 / 17 / 20 visits)
STEP_TOKENS = 98_304  # tokens of one of eight GPUs in a published step
HESSIAN_BATCH_MS = 250.0  # a calibration batch of STEP_TOKENS a GPU; published: 4.0 s for 16
FORWARD_SHARE = 1 / 3  # of a step's arithmetic: a forward has one product of a weight, a backward two
SGD_SECONDS = (2.4, 0.0863)  # global SGD: a pass and a chunk of 32,768 tokens over 8 GPUs; published: 111 / 185 / 250 in 12 / 18 / 24 s
PUBLISHED_PAUSES = (1104, 1808, 2448)  # documents scored when the published run paused for global SGD; timing had a part in it
PUBLISHED_SLOTS, PUBLISHED_CHUNK, PUBLISHED_CONTEXT = 64, 48, 2048  # its batches of documents, their chunks and windows
MEMORY_BESIDE_GB = 4.6  # training memory that does not grow with depth: weights and optimizer 0.6, logits and their gradient 3.2
MEMORY_VISIT_GB = 2.26  # a visit's activations of STEP_TOKENS. Null device: 29.5 / 43.1 / 49.8 GB at 11 / 17 / 20 visits (2026-11-25)
PUBLISHED_MEMORY_VISIT_GB = 2.10  # of the published code: 46.6 GB at 20 visits in its logs, the rest as ours
VAL_DOCUMENTS, VAL_TOKENS = g.PUBLISHED_VAL["documents"], g.PUBLISHED_VAL["tokens"]
MADE_UP_LENGTHS = (6.273, 0.906, 0.085)  # log length = a + b z + c z^2 at the normal quantile z: fitted to the published set's
MADE_UP_LONGEST = 60_000  # tokens; the 16 longest published documents have 46,000 on average


# ------------------------------------------------------------------------------------------------------- document lengths


def made_up_lengths(count: int = VAL_DOCUMENTS) -> np.ndarray:
    """Lengths with the published set's count, mean (957) and heavy tail, by formula; scoring order, longest first."""
    a, b, c = MADE_UP_LENGTHS
    z = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in reversed(range(count))])
    return np.minimum(np.exp(a + b * z + c * z * z), MADE_UP_LONGEST).round().astype(np.int64)


def read_lengths(path: Path) -> np.ndarray:
    """Document lengths in scoring order, longest first, from a JSON file.

    It holds a list of lengths, or {"points": [[documents that are shorter, length], ...]} of the published validation set:
    then lengths between two points follow a power of the rank, and the longest documents, behind the last point, rise
    evenly so that the sum is the published one.

    Raises:
        ValueError: if it holds neither.
    """
    content = json.loads(path.read_text())
    if isinstance(content, list) and content and all(isinstance(n, int) and n > 0 for n in content):
        return np.sort(np.array(content, dtype=np.int64))[::-1]
    if not isinstance(content, dict) or not content.get("points"):
        raise ValueError(f"{path} must hold a list of document lengths or an object with \"points\"")
    shorter, length = np.array(content["points"], dtype=np.float64).T
    known = int(shorter[-1]) + 1
    rank = np.log(VAL_DOCUMENTS - np.arange(known))
    body = np.exp(np.interp(-rank, -np.log(VAL_DOCUMENTS - shorter), np.log(length)))
    longest = VAL_DOCUMENTS - known
    mean = (VAL_TOKENS - body.sum()) / max(longest, 1)
    tail = np.linspace(body[-1], max(2 * mean - body[-1], body[-1]), longest)
    return np.concatenate([body, tail]).round().astype(np.int64)[::-1]


def lengths_of_data(cfg: g.Config) -> np.ndarray:
    """Document lengths in scoring order of the validation shards in DATA_PATH."""
    tokens = np.concatenate(g.read_shards(cfg.shards_dir, "val"))
    return np.asarray(g.Documents(g.ValData(tokens, np.ones_like(tokens), int((tokens == g.BOS_ID).sum()))).lengths)


# ---------------------------------------------------------------------------------------------------------- a whole run


class Part(NamedTuple):
    """One line of the plan: what it is, seconds until its last rank is through, each rank's seconds."""

    name: str
    seconds: float
    ranks: tuple[float, ...]
    note: str = ""


def step_ms(visits: int, tokens: float) -> float:
    """Milliseconds of a training step of `tokens` a GPU, forward, backward and optimizer, at the published speed."""
    beside, visit = STEP_MS
    return (beside + visit * visits) * tokens / STEP_TOKENS


def training_parts(cfg: g.Config, world: int) -> list[Part]:
    """Training by depth, and the Hessians, which count as training."""
    tokens = cfg.train_batch_tokens / world
    hessians = 1e-3 * HESSIAN_BATCH_MS * cfg.gptq_calibration_batches * tokens / STEP_TOKENS
    reserve = max(cfg.gptq_reserve_seconds, hessians)
    fractions = (np.arange(10_000) + 0.5) / 10_000
    shares = Counter(g.depth_at(cfg, frac) for frac in fractions)
    parts = []
    for depth in dict.fromkeys(g.depth_at(cfg, frac) for frac in fractions):
        took, share = step_ms(g.loop_schedule(cfg, depth).visits, tokens), shares[depth] / len(fractions)
        steps = share * cfg.iterations if not cfg.max_wallclock_seconds else share * (cfg.max_wallclock_seconds - reserve) * 1e3 / took
        parts.append(Part(f"train depth {depth}", steps * took / 1e3, (steps * took / 1e3,) * world, f"{steps:.0f} steps of {took:.1f} ms"))
    return [*parts, Part("hessians", hessians, (hessians,) * world, f"{cfg.gptq_calibration_batches} batches")]


def forward_seconds(cfg: g.Config, targets: int, world: int) -> float:
    """Plain evaluation at EVAL_LOOP_DEPTH: forwards alone."""
    visits = g.loop_schedule(cfg, cfg.eval_loop_depth).visits
    return 1e-3 * FORWARD_SHARE * step_ms(visits, targets / world)


def sgd_seconds(cfg: g.Config, lengths: np.ndarray, world: int) -> tuple[float, int]:
    """Seconds and chunks of a pass of global SGD over documents of these lengths, each with the BOS that follows it.

    A chunk's constant part does not shrink with more GPUs; with fewer its tokens take longer.
    """
    chunks = max(math.ceil((lengths.sum() + len(lengths) - 1) / cfg.global_ttt_chunk_tokens) - 1, 0)
    fixed, each = SGD_SECONDS
    arithmetic = cfg.global_ttt_chunk_tokens / g.TTT_TOKENS_PER_SECOND
    return (fixed + chunks * (each + arithmetic * (1 / world - 1 / 8))) * cfg.global_ttt_epochs if chunks else 0.0, chunks


def ttt_parts(cfg: g.Config, lengths: np.ndarray, plans: Sequence[g.PhasePlan], world: int) -> list[Part]:
    """Test-time training as planned: each phase, and the global SGD behind it."""
    parts = []
    for i, plan in enumerate(plans, 1):
        note = f"{len(plan.documents)} documents in {len(plan.batches)} batches"
        parts.append(Part(f"ttt phase {i}/{len(plans)}", max(plan.seconds), plan.seconds, note))
        if len(plan.learns):
            took, chunks = sgd_seconds(cfg, lengths[plan.learns.start: plan.learns.stop], world)
            parts.append(Part(f"global sgd {i}", took, (took,) * world, f"{len(plan.learns)} documents, {chunks} chunks"))
    return parts


def peak_gb(cfg: g.Config, world: int, visit_gb: float) -> float:
    """Training memory of a rank at the deepest schedule."""
    tokens = min(cfg.micro_batch_tokens, cfg.train_batch_tokens / world)
    visits = max(g.loop_schedule(cfg, depth).visits for depth in (cfg.eval_loop_depth, *cfg.train_loop_phase_depths))
    return (MEMORY_BESIDE_GB + visit_gb * visits) * tokens / STEP_TOKENS


# --------------------------------------------------------------------------------------------------- the published batching


def published_batch_seconds(longest: int, slots: int) -> float:
    """A batch of `slots` documents in the published code: every chunk forwards whole windows for the whole batch."""
    ends = np.minimum(np.arange(1, math.ceil(longest / PUBLISHED_CHUNK) + 1) * PUBLISHED_CHUNK, longest)
    windows = np.minimum(ends, PUBLISHED_CONTEXT)
    return float((slots * windows / g.TTT_TOKENS_PER_SECOND + g.TTT_STEP_SECONDS).sum())


def published_plan(cfg: g.Config, lengths: np.ndarray, world: int) -> list[g.PhasePlan]:
    """What the published code does: batches cut from the short end, so that the odd-sized one holds the longest; scored from
    the longest to the shortest, each by the rank that is free first; a pause for global SGD when enough are scored."""
    odd = len(lengths) % PUBLISHED_SLOTS
    cuts = [0, *range(odd, len(lengths) + 1, PUBLISHED_SLOTS)] if odd else [*range(0, len(lengths) + 1, PUBLISHED_SLOTS)]
    batches = [range(a, b) for a, b in zip(cuts, cuts[1:])]
    prefix = cfg.phased_ttt_prefix_docs
    ends = [*PUBLISHED_PAUSES, len(lengths)]
    learnt = [prefix * (i + 1) // len(PUBLISHED_PAUSES) for i in range(len(PUBLISHED_PAUSES))] + [0]
    plans, begin = [], 0
    for end, learns in zip(ends, learnt):
        mine = tuple(batch for batch in batches if begin <= batch.start and batch.stop <= end)
        queue, ranks = [(0.0, rank) for rank in range(world)], [[] for _ in range(world)]
        for i, batch in enumerate(mine):
            free, rank = heapq.heappop(queue)
            ranks[rank].append(i)
            heapq.heappush(queue, (free + published_batch_seconds(int(lengths[batch.start]), len(batch)), rank))
        seconds = tuple(took for took, _ in sorted(queue, key=lambda item: item[1]))
        plans.append(g.PhasePlan(range(begin, end), mine, tuple(map(tuple, ranks)), seconds, range(end - learns, end)))
        begin = end
    return plans
