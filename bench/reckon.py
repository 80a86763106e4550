"""Two models of a run on H100s, for bench/rehearse.py: what a whole run takes, and what a list of launches takes.

Every constant of both stands in the first section with its source, but for the two that the run itself plans with
(`TTT_TOKENS_PER_SECOND` and `TTT_STEP_SECONDS` in train_gpt.py) and the data sheet's peaks (roofline.py). `published_plan` is
the published code's own batching: with it the first model must give back the published logs, which is what makes it
believable for ours. The second has no measurement behind it but the data sheet and shares of it that are usual.
"""
from __future__ import annotations

import heapq
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

ROOT = Path(os.environ.get("REPO") or Path(__file__).resolve().parent.parent)  # whose train_gpt.py is looked at
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import roofline  # noqa: E402
import train_gpt as g  # noqa: E402

# --------------------------------------------------------------------------------------------------------------- constants

STEP_MS = (15.0, 7.55)  # a training step of 98,304 tokens a GPU: beside the visits, and a visit. Fitted to the published logs:
# 98 / 143 / 166 ms at depth 1 / 3 / 4 (11 / 17 / 20 visits)
STEP_TOKENS = 98_304  # tokens of one of eight GPUs in a published step
HESSIAN_MARGIN = (1.1, 0.5)  # what a run keeps for them: so many times what they take, and seconds beside (Trainer in train_gpt.py)
HESSIAN_BATCH_MS = 250.0  # a calibration batch of STEP_TOKENS a GPU; published: 4.0 s for 16
FORWARD_SHARE = 1 / 3  # of a step's arithmetic: a forward has one product of a weight, a backward two
SGD_SECONDS = (2.4, 0.0863)  # global SGD: a pass and a chunk of 32,768 tokens over 8 GPUs; published: 111 / 185 / 250 in 12 / 18 / 24 s
PUBLISHED_PAUSES = (1104, 1808, 2448)  # documents scored when the published run paused for global SGD; timing had a part in it
PUBLISHED_SLOTS, PUBLISHED_CHUNK, PUBLISHED_CONTEXT = 64, 48, 2048  # its batches of documents, their chunks and windows
MEMORY_BESIDE_GB = 5.0  # training memory that does not grow with depth: weights and optimizer 0.8, logits and their gradient 3.2
MEMORY_VISIT_GB = 1.22  # a visit's activations of STEP_TOKENS. Null device: 18.8 / 26.1 / 29.5 GB at 11 / 17 / 20 visits (2026-11-25)
PUBLISHED_MEMORY_VISIT_GB = 2.08  # of the published code: 46.6 GB at 20 visits in its logs, the rest as ours
TTT_TOKEN_KB = 12.3  # a visit's activations of a window token and its adapters' terms. Null device: 42.2 GB, 131,072 tokens, 20 visits; 58.7 at 196,608
TTT_VALUE_BYTES = 16  # of a value of the adapters: itself, its gradient, two moments
HINT_SECONDS = 1.4e-7  # of a token: 6.6 CPU seconds for 47.85 M, order 16, a shared core (2026-11-25)
VAL_DOCUMENTS, VAL_TOKENS = g.PUBLISHED_VAL["documents"], g.PUBLISHED_VAL["tokens"]
MADE_UP_LENGTHS = (6.28, 0.915, 0.08)  # log length = a + b z + c z^2 at the normal quantile z: fitted to the published set
MADE_UP_LONGEST = 62_000  # tokens; the 16 longest published documents have 46,000 on average

# of launches. Shares of the data sheet's peaks that products, other kernels and FlashAttention 2 usually reach on an H100:
PRODUCT_SHARE, FUSED_PRODUCT_SHARE, BANDWIDTH_SHARE = 0.68, 0.60, 0.85
FLASH_OPERATIONS = {"forward": 250e12, "backward": 200e12}  # a second, heads of 64, documents of some hundred tokens
FLOAT32_OPERATIONS = 50e12  # a second, of float32 products: three quarters of the 67e12 outside the tensor cores
LAUNCH_SECONDS = 2.5e-6  # of a kernel that moves next to nothing
SLOW_CALL_INSTRUCTIONS = 50  # that really run in a sine, cosine or power; ptxas makes 470 an element of six calls, slow paths included
INSTRUCTIONS = 132 * 4 * 1.755e9 * 0.7 * 32  # a second: 4 warps of 32 issue on each of 132 multiprocessors, at 70 %
COLLECTIVE_BYTES = 350e9  # a second over NVLink, of a tensor that is summed or gathered over 8 ranks
APPLY_CHUNK = 65_536  # elements of a block of torch's multi-tensor kernels
UNKNOWN_THREAD_BYTES = 16  # moved by a thread of an eager kernel of which only the grid is known: four float32
SUMMING_THREAD_BYTES = 24  # of FlashAttention 2's sums over two grouped heads: four sums of two bfloat16
SMALL_BYTES = 3_000_000  # a kernel that moves less is one of the small ones in the table


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
    tokens = np.concatenate(g.Dataset(cfg.shards_dir).read("val"))
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


def training_parts(cfg: g.Config, world: int, published: bool) -> list[Part]:
    """Training by depth, and the Hessians, which count as training; the published code keeps no margin for them."""
    tokens, (times, beside) = cfg.train_batch_tokens / world, (1.0, 0.0) if published else HESSIAN_MARGIN
    hessians = 1e-3 * HESSIAN_BATCH_MS * cfg.gptq_calibration_batches * tokens / STEP_TOKENS
    reserve = max(cfg.gptq_reserve_seconds, times * hessians + beside)
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
    took = HINT_SECONDS * int(lengths.sum())
    parts = [Part("n-gram hints, on the host", took, (took,) * world, f"order {cfg.ngram_tilt_order}")] if cfg.ngram_tilt_enabled else []
    for i, plan in enumerate(plans, 1):
        note = f"{sum(map(len, plan.batches))} documents in {len(plan.batches)} batches"
        parts.append(Part(f"ttt phase {i}/{len(plans)}", max(plan.seconds), plan.seconds, note))
        if len(plan.learns):
            took, chunks = sgd_seconds(cfg, lengths[list(plan.learns)], world)
            parts.append(Part(f"global sgd {i}", took, (took,) * world, f"{len(plan.learns)} documents, {chunks} chunks"))
    return parts


def ttt_gb(cfg: g.Config) -> float:
    """Memory of test-time training with a full batch of documents, all at the end of a whole context."""
    seen = cfg.ttt_eval_seq_len if cfg.ttt_context == "window" else cfg.chunk_sizes[-1]
    visits = g.loop_schedule(cfg, cfg.eval_loop_depth).visits
    cache = 0 if cfg.ttt_context == "window" else 4 * visits * cfg.kv_dim * cfg.ttt_eval_seq_len
    return 1e-9 * cfg.ttt_batch_size * (g.adapter_values(cfg) * TTT_VALUE_BYTES + 1e3 * TTT_TOKEN_KB * visits * seen + cache)


def training_gb(cfg: g.Config, world: int, visit_gb: float) -> float:
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
        plans.append(g.PhasePlan(mine, tuple(map(tuple, ranks)), seconds, range(end - 1, end - 1 - learns, -1)))
        begin = end
    return plans


# ---------------------------------------------------------------------------------------------------------------- launches


class Attended(NamedTuple):
    """What the attention kernels of a part work on: tokens, and how many tokens each of them sees on average."""

    tokens: int
    context: float


class Group(NamedTuple):
    """Launches of one kind: their number, bytes moved, seconds."""

    launches: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


KINDS = (  # of Triton kernels, by what their names hold; the first that fits
    ("mlp", r"^mlp"), ("cross entropy", r"cross_entropy"), ("rotary, head norm", r"_cos_|_sin_|rotary|rotate|head_norm"),
    ("xsa, gate", r"vector_norm|masked_fill|xsa|exclude|^(?!.*(rms|lerp)).*sigmoid"), ("residual, norm", r"rms_norm"),
    ("column sums", r"^triton_red"), ("other pointwise", r""),
)


def product_of(line: str, name: str) -> int:
    """The product of the numbers x,y,z that stand behind a word; 0 if it is not there."""
    found = re.search(rf"\b{name} (\d+),(\d+),(\d+)", line)
    return math.prod(map(int, found.groups())) if found else 0


def numbers(line: str, *names: str) -> list[int]:
    """The whole numbers that stand behind these words; -1 for one that is not there."""
    found = (re.search(rf"\b{name} (\d+)", line) for name in names)
    return [int(match[1]) if match else -1 for match in found]


def streamed(size: float) -> float:
    """Seconds of a kernel that does nothing but move `size` bytes."""
    return max(size / roofline.PEAKS["H100 SXM"][1] / BANDWIDTH_SHARE, LAUNCH_SECONDS)


def product_cost(m: int, n: int, k: int, batch: int, width: int, adds: bool = False, share: float = PRODUCT_SHARE) -> tuple[float, float]:
    """Bytes and seconds of a product (m, k) x (k, n) of elements of `width` bytes, perhaps added to what is there."""
    size = float(width * batch * (m * k + n * k + m * n * (1 + adds)))
    rate = roofline.PEAKS["H100 SXM"][0] * share if width == 2 else FLOAT32_OPERATIONS
    return size, max(2.0 * batch * m * n * k / rate, streamed(size))


def triton_cost(line: str) -> tuple[str, float, float]:
    """Kind, bytes and seconds of a Triton kernel's launch."""
    name = line.split()[1]
    size, elements, slow = numbers(line, "bytes", "elements", "slow")
    if size < SMALL_BYTES:
        return "small kernels", size, LAUNCH_SECONDS
    seconds = max(streamed(size), max(slow, 0) * SLOW_CALL_INSTRUCTIONS * max(elements, 0) / INSTRUCTIONS)
    if name == "mlp_kernel":
        rows, columns, depth = map(int, re.search(r"ints (\d+),(\d+),(\d+)", line).groups())
        seconds = max(seconds, product_cost(rows, columns, depth, 1, 2, share=FUSED_PRODUCT_SHARE)[1])
    return next(kind for kind, pattern in KINDS if re.search(pattern, name)), size, seconds


def flash_cost(line: str, attended: Attended) -> tuple[str, float, float]:
    """Kind, bytes (none: they are not counted) and seconds of a launch of FlashAttention 2 or of SDPA's kernels."""
    width = roofline.MODEL["d"]
    operations = 4.0 * attended.tokens * attended.context * width
    if "dot_do_o" in line:
        return "attention backward", 0.0, streamed(8.0 * attended.tokens * width)
    if "convert_dq" in line:
        return "attention backward", 0.0, streamed(6.0 * attended.tokens * width)
    if re.search(r"bwd|backward|fmha_cutlassB", line):
        return "attention backward", 0.0, 2.5 * operations / FLASH_OPERATIONS["backward"]
    return "attention forward", 0.0, operations / FLASH_OPERATIONS["forward"]


def eager_cost(line: str) -> tuple[str, float, float]:
    """Kind, bytes and seconds of a launch of one of torch's own kernels, as far as its name and grid tell them."""
    elements, copied, set_ = numbers(line, "elements", "memcpy D2D", "memset")
    blocks, threads = product_of(line, "grid"), product_of(line, "block")
    arrays, lists = (re.search(pattern, line) for pattern in (r"St5arrayIPcLm(\d)E", r"TensorListMetadataILi(\d)E"))
    width = 2 if re.search("bfloat16|BFloat16", line) else 4
    if copied > 0 or set_ > 0:
        size = float(max(2 * copied, set_))
    elif "multi_tensor_apply" in line:
        size = float(blocks * APPLY_CHUNK * 4 * max(2, 2 * int(lists[1]) - 1 if lists else 2))
    elif elements > 0:
        size = float(elements * width * (int(arrays[1]) if arrays else 3))
    else:
        size = float(blocks * threads * (SUMMING_THREAD_BYTES if width == 2 and "reduce_kernel" in line else UNKNOWN_THREAD_BYTES))
    return "eager kernels" if size >= SMALL_BYTES else "small kernels", size, streamed(size)


def launch_cost(line: str, attended: Attended) -> tuple[str, float, float]:
    """Kind, bytes and seconds of one line of the null device's log of launches."""
    if line.startswith("triton "):
        return triton_cost(line)
    if line.startswith("cublas"):
        m, n, k, batch, kind, adds = numbers(line, "m", "n", "k", "batch", "type", "adds")
        return "products", *product_cost(m, n, k, batch, 2 if kind in (2, 14) else 4, adds == 1)  # cudaDataType: half, bfloat16
    if line.startswith("nccl"):
        count, kind = numbers(line, "count", "type")
        size = float(count * (2 if kind in (6, 9) else 4))  # ncclDataType: half, bfloat16
        return "collectives", size, max(size / COLLECTIVE_BYTES, LAUNCH_SECONDS)
    if re.search(r"flash_(fwd|bwd)|fmha", line):
        return flash_cost(line, attended)
    return eager_cost(line)


def reckon_launches(order: Sequence[str], attended: Attended) -> dict[str, Group]:
    """The launches of a part by kind, the longest kind first."""
    groups: dict[str, Group] = {}
    for line in order:
        kind, size, seconds = launch_cost(line, attended)
        have = groups.get(kind, Group())
        groups[kind] = Group(have.launches + 1, have.bytes + size, have.seconds + seconds)
    return dict(sorted(groups.items(), key=lambda item: -item[1].seconds))


def largest_kernels(order: Sequence[str], count: int) -> list[tuple[str, int, int]]:
    """The Triton kernels that move most in all their launches: name, bytes of a launch, launches."""
    sizes: dict[str, list[int]] = {}
    for line in order:
        if line.startswith("triton "):
            sizes.setdefault(line.split()[1], []).append(numbers(line, "bytes")[0])
    found = sorted(sizes.items(), key=lambda item: -sum(item[1]))[:count]
    return [(name, max(each), len(each)) for name, each in found]
