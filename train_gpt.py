"""Train, quantize and score the best language model that fits 16 MB, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        # the record's settings, on eight H100s
    bash run.sh                                                  # the same system, small, on any machine
    python train_gpt.py --help                                   # every setting with its default

A run goes through these stages, and this file is in their order:

    settings -> ranks and log -> data checked and opened -> looped GPT built
    -> warm-up: every graph compiled and run once, then everything put back; the clock starts
    -> training: depth 1, then 3, then 4; Muon and AdamW; a moving average (EMA) of the weights
    -> Hessians from training data; the clock stops
    -> GPTQ on the averaged weights -> one artifact file, counted with this code against 16,000,000 bytes
    -> the file is read back and scored: every target of the validation set once
    -> scored again with test-time training (TTT): each token is scored before anything learns from it
    -> the line `final seed:... val_bpb:...`

Contents: 1 settings - 2 runtime - 3 data - 4 attention - 5 model - 6 optimizers - 7 training - 8 quantization -
9 artifact - 10 evaluation - 11 test-time training - 12 kernels (appendix) - 13 main.

Glossary. *visit*: one place in the unrolled schedule, where one physical layer is applied; a looped layer is visited
several times. *depth*: passes through the loop block. *schedule*: the visits of one depth, cut into encoder and decoder.
*site*: (layer, visit, name), the address of one use of one weight. *segment*: a stretch of the token stream that attention
does not cross: a document or a piece of one. *sidecar*: for each validation token the bytes of original text it stands for.
*bpb*: bits per byte, the score: nats / ln 2 / bytes of the original text.
"""

from __future__ import annotations

import bisect
import difflib
import fcntl
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin slow a busy CPU down tenfold

import brotli
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the kernels of section 12 need it; everything else runs without
    triton = None

ARTIFACT_CAP_BYTES = 16_000_000  # decimal, model and code together
BOS_ID = 1
OPERATORS = __name__.strip("_")  # namespace of the operators: two copies of this file in one process must not share it


# ======================================================================================================================
# 1. Settings
#
# One frozen dataclass; every field is one environment variable of the same name in capitals. The defaults are the
# record's values. `Config.from_env` is the only reader of settings; nothing below looks at the environment, except the
# runtime for what torchrun sets. A field marked `model` changes which function the weights are, one marked `score` how it
# is scored: an artifact carries both, so the file alone gives its score.
# ======================================================================================================================


def require(holds: Any, words: str) -> None:
    """ValueError with `words`, which say what is wrong and what to do, unless `holds`."""
    if not holds:
        raise ValueError(words)


class Check(NamedTuple):
    """What a setting may be: words for the error message, and the test."""

    text: str
    accepts: Callable[[Any], bool]


def between(low: float, high: float) -> Check:
    return Check(f"from {low:.10g} to {high:.10g}", lambda value: low <= value <= high)


def above(low: float, high: float) -> Check:
    return Check(f"above {low:.10g}, up to {high:.10g}", lambda value: low < value <= high)


def below(low: float, high: float) -> Check:
    return Check(f"from {low:g} to below {high:g}", lambda value: low <= value < high)


def one_of(*words: str) -> Check:
    return Check("one of " + ", ".join(words), lambda value: value in words)


def matching(text: str, pattern: str) -> Check:
    return Check(text, lambda value: re.fullmatch(pattern, value) is not None)


def each(check: Check, most: int = 16) -> Check:
    return Check(f"up to {most} numbers with commas between, each {check.text}",
                 lambda value: len(value) <= most and all(map(check.accepts, value)))


TEXT = Check("text without line breaks, up to 1000 characters",
             lambda v: len(v) <= 1000 and v.encode(errors="replace").decode().isprintable())
WORD = matching("a name of letters, digits and '_'", "[A-Za-z0-9_]{1,100}")
FILE_NAME = matching("up to 100 of the letters a-z A-Z, digits, '.', '_' and '-'", "[A-Za-z0-9_.-]{0,100}")
INTERVAL = matching("a whole number of steps, or of seconds with an s behind it", "([1-9][0-9]{0,8}s?)?")
FLAG = Check("0 or 1", lambda value: True)
SECONDS, RATE = between(0, 1e7), between(0, 10)


def setting(default: Any, check: Check, model: bool = False, score: bool = False) -> Any:
    """A field of Config: default, what is allowed, and whether an artifact carries it; the comment behind it says what it does."""
    return field(default=default, metadata={"check": check, "model": model, "score": score})


model_setting, score_setting = partial(setting, model=True), partial(setting, score=True)


@dataclass(frozen=True)
class Config:
    """All settings of a run. `Config()` is the published record."""

    # where things are
    data_dir: str = setting("./data", TEXT)  # folder that holds datasets/ and tokenizers/
    data_path: str = setting("", TEXT)  # folder of the shards; empty: the published data set under DATA_DIR
    tokenizer_path: str = setting("", TEXT)  # SentencePiece model; empty: the published one under DATA_DIR
    caseops_enabled: bool = score_setting(True, FLAG)  # bytes come from the sidecar; 0: from the tokenizer's pieces
    caseops_version: str = model_setting("lossless_caps_caseops_v1", WORD)  # transform of the text, as the data's manifest.json names it
    artifact_dir: str = setting("./runs", TEXT)  # folder for the log and the artifact of a run
    run_id: str = setting("", FILE_NAME)  # name of the run's files; empty: time, seed and a random part
    artifact_path: str = setting("", TEXT)  # with EVAL_ONLY: the artifact to score; empty: that of RUN_ID
    losses_path: str = setting("", TEXT)  # .npz file for the nats of every target, an array a score; empty: none
    eval_only: bool = setting(False, FLAG)  # score an existing artifact, no training data needed
    # the run
    seed: int = score_setting(1337, between(0, 2**31 - 1))  # seed of initialisation and adapters
    iterations: int = setting(20000, between(1, 10**9))  # steps at most; with no time cap, exactly
    max_wallclock_seconds: float = setting(600.0, SECONDS)  # training time, Hessians included; 0: no cap
    eval_budget_seconds: float = setting(600.0, SECONDS)  # time that the final scoring may take; 0: no cap
    rank_timeout_seconds: float = setting(1800.0, between(1, 1e7))  # longest that a rank waits for the others before the run ends
    warmup_steps: int = setting(20, between(0, 10**6))  # steps at each depth before the clock, all undone
    warmdown_frac: float = setting(0.75, between(0, 1))  # last share of the run, in which the learning rate falls
    min_lr: float = setting(0.0, between(0, 1))  # floor of the learning rate, as a share
    train_batch_tokens: int = setting(786432, between(16, 2**26))  # tokens of one step, over all ranks
    micro_batch_tokens: int = setting(98304, between(1, 2**26))  # tokens of one forward on one rank, at most
    train_seq_len: int = setting(2048, between(2, 2**20))  # tokens that attention sees at most in training
    eval_seq_len: int = score_setting(2048, between(2, 2**20))  # the same in evaluation
    val_batch_tokens: int = setting(524288, between(16, 2**26))  # tokens of eight evaluation batches
    val_loss_every: int = setting(4000, between(0, 10**9))  # steps between evaluations; 0: only at the end
    checkpoint_every: str = setting("", INTERVAL)  # write the complete state every N steps (`200`) or seconds (`60s`); empty: never
    train_log_every: int = setting(500, between(1, 10**9))  # steps between log lines
    compile: str = setting("auto", one_of("auto", "0", "1"))  # torch.compile: auto is on for CUDA, off for a CPU
    attn_backend: str = setting("auto", one_of("auto", "fa3", "fa4", "varlen", "sdpa"))  # attention kernel
    # the model
    vocab_size: int = model_setting(8192, between(8, 65536))  # tokens in the alphabet
    num_layers: int = model_setting(11, between(1, 256))  # physical layers
    model_dim: int = model_setting(512, between(2, 4096))  # width
    num_heads: int = model_setting(8, between(1, 256))  # query heads
    num_kv_heads: int = model_setting(4, between(1, 256))  # key and value heads
    mlp_mult: int = model_setting(4, between(1, 64))  # hidden width of the MLP over MODEL_DIM
    xsa_last_n: int = model_setting(11, between(0, 256))  # layers, from the last, with exclusive self-attention
    rope_base: float = model_setting(10000.0, above(1, 1e9))  # base of the rotary frequencies
    rope_dims: int = model_setting(16, between(0, 4096))  # dimensions of a head that rotate
    qk_gain_init: float = setting(5.0, above(0, 1000))  # initial gain of the queries
    logit_softcap: float = model_setting(30.0, between(0.001, 1e4))  # logits are cap * tanh(logits / cap)
    ln_scale: bool = model_setting(True, FLAG)  # layer i reads its normalised input over sqrt(i + 1)
    skip_gates_enabled: bool = model_setting(True, FLAG)  # skips are mixed in through a gate; 0: added
    tied_embed_init_std: float = setting(0.005, above(0, 100))  # standard deviation of the initial embedding
    num_loops: int = model_setting(2, between(0, 63))  # extra passes of the loop without phase depths; sizes the skips
    loop_start: int = model_setting(3, between(0, 255))  # first looped layer
    loop_end: int = model_setting(5, between(0, 255))  # last looped layer
    enable_looping_at: float = setting(0.35, between(0, 1))  # share of the run without loops when no phase depths are set
    train_loop_phase_depths: tuple[int, ...] = setting((1, 3, 4), each(between(1, 64)))  # depth curriculum; 'none': ENABLE_LOOPING_AT
    train_loop_phase_fractions: tuple[float, ...] = setting((), each(above(0, 1e6)))  # shares of the phases; empty: equal
    train_loop_prewarm_depths: tuple[int, ...] = setting((3, 4), each(between(1, 64)))  # depths compiled before the clock
    eval_loop_depth: int = score_setting(4, between(1, 64))  # depth of evaluation, calibration and TTT
    parallel_start_layer: int = model_setting(8, between(0, 256))  # first layer with two residual lanes
    parallel_final_lane: str = model_setting("mean", one_of("mean", "attn", "mlp"))  # lane that is read at the end
    gated_attn_enabled: bool = model_setting(True, FLAG)  # one sigmoid gate a head
    gated_attn_init_std: float = setting(0.005, between(0, 100))  # standard deviation of the initial gate weights
    gated_attn_quant_gate: bool = model_setting(True, FLAG)  # gate weights in int8; 0: float16
    sparse_attn_gate_enabled: bool = model_setting(False, FLAG)  # the gate of a head reads GATE_WINDOW dimensions, in place of all
    sparse_attn_gate_scale: float = model_setting(1.0, above(0, 100))  # factor inside the sigmoid of that gate
    mlp_gate_enabled: bool = model_setting(False, FLAG)  # one sigmoid gate on the MLP's output
    smear_gate_enabled: bool = model_setting(False, FLAG)  # each embedding takes a share of the one before it in its segment
    gate_window: int = model_setting(12, between(1, 4096))  # dimensions that a narrow gate reads
    # the optimizers
    matrix_lr: float = setting(0.026, RATE)  # learning rate of Muon, the four banks
    tied_embed_lr: float = setting(0.03, RATE)  # learning rate of AdamW on the embedding
    scalar_lr: float = setting(0.02, RATE)  # learning rate of AdamW on the small parameters
    muon_momentum: float = setting(0.97, below(0, 1))  # momentum of Muon
    muon_momentum_warmup_start: float = setting(0.92, below(0, 1))  # momentum at the first step
    muon_momentum_warmup_steps: int = setting(1500, between(0, 10**9))  # steps until MUON_MOMENTUM is reached
    muon_backend_steps: int = setting(5, between(1, 50))  # Newton-Schulz iterations
    muon_ns: str = setting("quintic", one_of("quintic", "polar"))  # coefficients of the iterations; polar: Polar Express, five of them
    muon_row_normalize: bool = setting(True, FLAG)  # rows of the update get unit norm first
    muon_wd: float = setting(0.095, RATE)  # decoupled weight decay of the banks
    muon_wd_taper: float = setting(1.0, between(0, 1))  # share of MUON_WD that is left at the end, falling over the last 30 % of the run
    embed_wd: float = setting(0.085, RATE)  # weight decay of the embedding
    adam_wd: float = setting(0.02, RATE)  # weight decay of the small parameters
    beta1: float = setting(0.9, below(0, 1))  # AdamW
    beta2: float = setting(0.95, below(0, 1))  # AdamW
    adam_eps: float = setting(1e-8, between(1e-20, 1))  # AdamW
    grad_clip_norm: float = setting(0.3, between(0, 1e6))  # norm of the averaged gradient, at most; 0: no limit
    ema_decay: float = setting(0.9965, below(0, 1))  # moving average of the weights, a step; these are exported
    # the artifact
    compressor: str = setting("brotli", one_of("brotli", "rans"))  # entropy coder of the quantized weights
    quantizer: str = model_setting("scalar", one_of("scalar", "trellis"))  # rounding inside GPTQ: 'trellis' takes fewer bytes
    artifact_target_bytes: int = setting(0, between(0, ARTIFACT_CAP_BYTES))  # bytes of artifact and code to fill by one factor on
        # all clip sigmas; 0: only if over the cap
    matrix_bits: int = setting(6, between(2, 8))  # bits of a matrix weight
    embed_bits: int = setting(7, between(2, 8))  # bits of an embedding weight
    matrix_clip_sigmas: float = setting(12.85, above(0, 1000))  # range of other matrices in standard deviations of a row
    mlp_clip_sigmas: float = setting(12.0, above(0, 1000))  # range of MLP matrices
    attn_clip_sigmas: float = setting(13.0, above(0, 1000))  # range of attention matrices
    embed_clip_sigmas: float = setting(15.0, above(0, 1000))  # range of the embedding
    lqer_enabled: bool = model_setting(False, FLAG)  # low-rank terms in small integers for what GPTQ leaves of the worst matrices
    lqer_rank: int = model_setting(4, between(1, 64))  # their rank
    lqer_group: int = model_setting(32, between(1, 2**16))  # numbers that share a scale in their wide factor
    lqer_column_scales: bool = model_setting(True, FLAG)  # a scale for each column of their tall factor; 0: one, as published
    lqer_top_k: int = setting(3, between(1, 1000))  # matrices with such a term, those of largest error
    embed_damping: float = setting(0.0, between(0, 100))  # share of the embedding's mean Hessian diagonal added to it: rows are inputs too
    gptq_calibration_batches: int = setting(16, between(1, 10**6))  # training batches for the Hessians
    gptq_reserve_seconds: float = setting(4.0, SECONDS)  # training time kept for the Hessians, at least
    # test-time training
    ttt_enabled: bool = score_setting(True, FLAG)  # score again with test-time training
    phased_ttt_enabled: bool = score_setting(True, FLAG)  # global SGD phases on documents already scored
    ttt_context: str = score_setting("window", one_of("window", "cache"))  # earlier chunks: computed again, or keys and values kept
    ttt_lora_rank: int = score_setting(96, between(1, 4096))  # rank of the adapters
    ttt_lora_alpha: float = score_setting(0.0, between(0, 1e6))  # adapters count alpha / rank times; 0: once
    ttt_lora_lr: float = score_setting(1e-4, RATE)  # learning rate of the adapters
    ttt_lora_lr_power: float = score_setting(0.0, between(-1, 0))  # update n of a document has the learning rate times n to this power
    ttt_chunk_size: int = score_setting(48, between(1, 2**16))  # tokens scored between two updates
    ttt_chunk_doubles_at: tuple[int, ...] = score_setting((), each(between(1, 2**30), 8))  # positions from which chunks are twice as large
    ttt_eval_seq_len: int = score_setting(2048, between(2, 2**20))  # tokens a chunk sees at most, itself included (cache: whole chunks)
    ttt_batch_size: int = score_setting(64, between(1, 4096))  # documents adapted side by side, at most
    ttt_grad_steps: int = score_setting(1, between(1, 100))  # updates a chunk
    ttt_weight_decay: float = score_setting(0.5, between(0, 1000))  # decoupled weight decay of the adapters
    ttt_warm_start_a: bool = score_setting(False, FLAG)  # A goes on from batch to batch in its lane (eight at any ranks); B begins at 0
    ttt_short_chunks: tuple[int, ...] = score_setting((), each(between(1, 2**20)))  # pairs LIMIT,CHUNK: a batch whose longest document, its
        # two BOS counted, is no longer than LIMIT has this chunk
    ttt_beta1: float = score_setting(0.0, below(0, 1))  # AdamW on the adapters
    ttt_beta2: float = score_setting(0.999, below(0, 1))  # AdamW on the adapters
    ttt_q_lora: bool = score_setting(True, FLAG)  # adapters on the queries
    ttt_k_lora: bool = score_setting(True, FLAG)  # adapters on the keys
    ttt_v_lora: bool = score_setting(True, FLAG)  # adapters on the values
    ttt_o_lora: bool = score_setting(True, FLAG)  # adapters around attention
    ttt_mlp_lora: bool = score_setting(True, FLAG)  # adapters around the MLP
    val_doc_fraction: float = score_setting(1.0, above(0, 1))  # share of the validation documents to score; below 1 is no full score
    ngram_tilt_enabled: bool = score_setting(False, FLAG)  # raise what most often followed the same tokens before, in scoring order
    ngram_tilt_order: int = score_setting(16, between(2, 64))  # tokens of an n-gram, the predicted one included
    ngram_tilt_threshold: float = score_setting(0.8, between(0, 1))  # least share of the earlier occurrences that agree
    ngram_tilt_beta: float = score_setting(2.625, between(0, 100))  # nats by which the hint is raised before all is normalised again
    ngram_tilt_betas: tuple[float, ...] = score_setting((), each(between(0, 100), 25))  # instead of threshold and one beta: 25, for 1, 2,
        # 4, 8, 16 occurrences and more by shares from 0, 1/4, 1/2, 3/4, 1 (bench/tilt.py fits them on training documents)
    phased_ttt_prefix_docs: int = score_setting(2000, between(0, 10**9))  # documents that the global SGD may learn from
    phased_ttt_num_phases: int = score_setting(3, between(1, 1000))  # parts of the prefix, each followed by global SGD
    phased_ttt_leave_out: int = score_setting(432, between(0, 10**9))  # longest documents, scored by then, that the global SGD leaves out
        # (published: seven batches in hand)
    global_ttt_lr: float = score_setting(1e-3, RATE)  # learning rate of the global SGD
    global_ttt_momentum: float = score_setting(0.9, below(0, 1))  # its momentum
    global_ttt_epochs: int = score_setting(1, between(0, 1000))  # passes over each of its chunks
    global_ttt_chunk_tokens: int = score_setting(32768, between(1, 2**26))  # tokens of one of its steps
    global_ttt_batch_seqs: int = setting(32, between(1, 2**20))  # sequences of EVAL_SEQ_LEN tokens in one of its forwards on one rank
    global_ttt_grad_clip: float = score_setting(1.0, between(0, 1e6))  # norm of its gradient, at most; 0: no limit

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read every setting from `environ`; ValueError names the variable, its value and what is allowed."""
        given = {f.name: parse_setting(f, environ[f.name.upper()]) for f in fields(cls) if f.name.upper() in environ}
        cfg = cls(**given)
        if not cfg.eval_only:  # else the artifact may replace what does not go together
            cfg.check_together()
        return cfg

    def check_together(self) -> None:
        """Conditions that join several settings; ValueError names them."""
        head_dim, depths = self.model_dim // self.num_heads, len(self.train_loop_phase_depths)
        doubles = self.ttt_chunk_doubles_at
        rules = [
            (self.model_dim % self.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"),
            (self.num_heads % self.num_kv_heads == 0, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
            (self.rope_dims % 2 == 0 and self.rope_dims <= head_dim, f"ROPE_DIMS must be even and at most {head_dim}"),
            (self.loop_start <= self.loop_end < self.num_layers, "LOOP_START <= LOOP_END < NUM_LAYERS must hold"),
            (self.loop_end < self.parallel_start_layer, "LOOP_END must be below PARALLEL_START_LAYER"),
            (self.gate_window <= self.model_dim, "GATE_WINDOW must be at most MODEL_DIM"),
            (not self.train_loop_phase_fractions or len(self.train_loop_phase_fractions) == depths,
             "TRAIN_LOOP_PHASE_FRACTIONS must have one share for each of TRAIN_LOOP_PHASE_DEPTHS"),
            (self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
             "GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS"),
            (self.train_batch_tokens % 8 == 0, "TRAIN_BATCH_TOKENS must be a multiple of 8"),
            (not self.lqer_enabled or all(self.lqer_rank * width % self.lqer_group == 0 for width in (self.model_dim, self.mlp_dim)),
             "LQER_RANK times the width of every matrix (MODEL_DIM, and times MLP_MULT) must be a multiple of LQER_GROUP"),
            (self.val_batch_tokens // 8 >= self.eval_seq_len, "VAL_BATCH_TOKENS must be at least 8 * EVAL_SEQ_LEN"),
            (self.chunk_sizes[-1] <= self.ttt_eval_seq_len,
             "TTT_CHUNK_SIZE, doubled by TTT_CHUNK_DOUBLES_AT, must be at most TTT_EVAL_SEQ_LEN"),
            (not doubles or self.ttt_context == "cache", "TTT_CHUNK_DOUBLES_AT needs TTT_CONTEXT=cache"),
            (len(self.ngram_tilt_betas) in (0, 25), "NGRAM_TILT_BETAS must be 25 numbers or none"),
            (not self.ttt_short_chunks or self.ttt_context == "window" and len(self.ttt_short_chunks) % 2 == 0
             and max(self.ttt_short_chunks[1::2]) <= self.ttt_eval_seq_len,
             "TTT_SHORT_CHUNKS must be pairs, with chunks of at most TTT_EVAL_SEQ_LEN, and TTT_CONTEXT=window"),
            (all(a < b for a, b in zip(doubles, doubles[1:])) and all(at % size == 0 for at, size in zip(doubles, self.chunk_sizes[1:])),
             "TTT_CHUNK_DOUBLES_AT must ascend, each a multiple of the chunks that begin there (TTT_CHUNK_SIZE times 2, 4, ...)"),
        ]
        broken = [message for holds, message in rules if not holds]
        weights = 0 if broken else sum(math.prod(row.shape) for row in parameter_table(self))
        if weights > ARTIFACT_MAX_WEIGHTS:
            broken = [f"{weights:,} weights are more than an artifact's {ARTIFACT_MAX_WEIGHTS:,}: lower NUM_LAYERS, MODEL_DIM, MLP_MULT or "
                      "VOCAB_SIZE"]
        if broken:
            mentioned = [f.name for f in fields(self) if f.name.upper() in re.findall(r"\w+", broken[0])]
            here = ", ".join(f"{name.upper()}={format_setting(getattr(self, name))}" for name in mentioned)
            raise ValueError(f"{broken[0]} (here: {here})")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads

    @property
    def mlp_dim(self) -> int:
        return self.mlp_mult * self.model_dim

    @property
    def chunk_sizes(self) -> list[int]:
        """Sizes of the chunks of TTT, in the order in which a document comes to them."""
        return [self.ttt_chunk_size << i for i in range(len(self.ttt_chunk_doubles_at) + 1)]

    @property
    def shards_dir(self) -> Path:
        """Folder of the shards: DATA_PATH, else the published layout under DATA_DIR."""
        return Path(self.data_path or self._published("datasets", f"fineweb10B_sp{self.vocab_size}"))

    @property
    def tokenizer_file(self) -> Path:
        """SentencePiece model: TOKENIZER_PATH, else the published layout under DATA_DIR."""
        return Path(self.tokenizer_path or self._published("tokenizers", f"fineweb_{self.vocab_size}_bpe", ".model"))

    def _published(self, kind: str, name: str, ending: str = "") -> Path:
        if not self.caseops_enabled:
            return Path(self.data_dir, kind, name + ending)
        root = Path(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}_caseops", "datasets")
        return root / kind / f"{name}_{self.caseops_version}_reserved{ending}"


SETTING_TYPES = typing.get_type_hints(Config)
PLACES = {f.name for f in fields(Config) if f.metadata["check"] is TEXT}  # what may differ between machines
STORED_SETTINGS = [f for f in fields(Config) if f.metadata["model"] or f.metadata["score"]]  # what an artifact carries
NUMBER = {int: r"[+-]?[0-9]+", float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}  # ASCII, no underscores


def is_allowed(f: Field, value: Any) -> bool:
    """Whether `value` is exactly of the type of setting `f`, finite, and what its rule accepts."""
    kind = SETTING_TYPES[f.name]
    items, item_kind = (value, typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else ((value,), kind)
    if typing.get_origin(kind) is tuple and type(value) is not tuple or any(type(v) is not item_kind for v in items):
        return False
    return all(math.isfinite(v) for v in items if item_kind in NUMBER) and f.metadata["check"].accepts(value)


def parse_setting(f: Field, text: str) -> Any:
    """The value of setting `f` written as `text`; ValueError names the variable, its value and what is allowed."""
    kind, text = SETTING_TYPES[f.name], text.strip()

    def number(text: str, kind: type) -> Any:
        if not re.fullmatch(NUMBER[kind], text) or len(text) > 40:
            raise ValueError(text)
        return kind(text)

    try:
        if typing.get_origin(kind) is tuple:
            value = tuple(number(item.strip(), typing.get_args(kind)[0]) for item in text.split(",") if text not in ("", "none"))
        else:
            value = {"0": False, "1": True}[text] if kind is bool else text if kind is str else number(text, kind)
        good = is_allowed(f, value)
    except (ValueError, KeyError):
        good = False
    if not good:
        what = {int: "a whole number, ", float: "a number, "}.get(kind, "")
        raise ValueError(f"{f.name.upper()}={text[:200]!r} is not allowed; it must be {what}{f.metadata['check'].text} (default "
                         f"{format_setting(f.default)!r})")
    return value


def format_setting(value: Any) -> str:
    """A setting as one writes it in the environment."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(map(format_setting, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def misspelt_settings(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name found, name meant) for every variable that is close to a setting but is none."""
    known = {f.name.upper() for f in fields(Config)}
    found = []
    for name in sorted(environ):
        if name not in known and re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", name):
            found += [(name, meant) for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.85)]
    return found


def setting_docs() -> dict[str, str]:
    """What each setting does, by field: the comments in the readable source; the packed one has none."""
    found = re.findall(r"^    (\w+): \S+(?: \.\.\.\])? = \w*setting\(.*?  # (.*(?:\n {8}# .*)*)", own_source(), re.MULTILINE)
    return {name: re.sub(r"\n +#", "", words) for name, words in found}


def settings_help() -> str:
    """Every setting, its default, what it may be and what it does, one a line."""
    docs = setting_docs()
    return "\n".join(f"{f.name.upper()}={format_setting(f.default)}  {docs.get(f.name, '')} ({f.metadata['check'].text})"
                     for f in fields(Config))


# ======================================================================================================================
# 2. Runtime
#
# What a process knows of its surroundings: its rank, its device, the log, the clock, and whether the run is asked to end.
# On one process `Ranks` is the identity, so nothing else asks whether torch.distributed is up. A rank that fails says so on
# a board that all ranks watch, because a collective on an error path would wait for ever.
# ======================================================================================================================

EXIT_USER_ERROR, EXIT_OVER_LIMIT = 2, 3
PROGRESS_MS = 15e3  # between two lines of a long phase
LOOK_SECONDS = 0.5  # between two looks at the other ranks
SIGNAL_GRACE_SECONDS = 25.0  # torchrun kills 30 s after it asked; a rank that waits for a dead one says so before that


class Stopped(BaseException):
    """The run was asked to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Ranks:
    """The processes of a run. Tensor collectives run on the device, object collectives on the host."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    host_group: Any = None  # a gloo group: small decisions must not wait for the GPU
    local_world: int = 1  # processes on this machine
    board: Any = field(default_factory=torch.distributed.HashStore)  # that any rank may write to and read from without waiting
    calls: int = 0  # collectives that this rank has come to: one that hangs has come to fewer than the others
    signalled: int = 0  # number of the first signal that came to this rank
    keeps_signals: bool = False  # until the next check_stop; else a signal ends the run at once
    stopping: bool = False  # all ranks know that the run was asked to end

    @classmethod
    def start(cls, environ: Mapping[str, str], timeout_seconds: float = 1800.0) -> Ranks:
        """Join the other processes that torchrun started, if any; NCCL on CUDA, gloo on a CPU."""
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            require(re.fullmatch("[0-9]{1,5}", environ.get(name, "0")), f"{name}={environ.get(name)!r} is no number: leave it to torchrun")
        world, local_rank, device = int(environ.get("WORLD_SIZE", 1)), int(environ.get("LOCAL_RANK", 0)), torch.device("cpu")
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            require(local_rank < gpus, f"local rank {local_rank}, but only {gpus} GPUs here; start torchrun with "
                                       f"--nproc_per_node={gpus} at most")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # its gradient can be NaN with a mask at lengths like 2112 (torch 2.11 on)
        if world == 1:
            return cls(device=device)
        warnings.filterwarnings("ignore", ".*deprecated.*(reduce_scatter|all_gather)_single", FutureWarning)  # not in torch 2.11
        timeout = timedelta(seconds=timeout_seconds + 10)  # the watch speaks before that
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout,
                                                 device_id=device if device.type == "cuda" else None)
            host_group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            raise ValueError(f"not all of the {world} ranks have come within {timeout.total_seconds():g} s ({str(error).splitlines()[0]}): "
                             "look for what the others said, or for one that was not started") from None
        store = torch.distributed.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False,
                                           timeout=timedelta(seconds=30))
        board = torch.distributed.PrefixStore(f"start {environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # torchrun's outlives us
        return cls(int(environ["RANK"]), world, device, host_group, int(environ.get("LOCAL_WORLD_SIZE", world)), board)

    def stop(self) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def together(self, collective: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """A collective of torch.distributed, counted; nothing on one process."""
        self.calls += 1
        return collective(*arguments, **named) if self.world > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        self.together(torch.distributed.all_reduce, tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The objects of all ranks, in rank order, on every rank."""
        values: list[Any] = [value] * self.world
        self.together(torch.distributed.all_gather_object, values, value, group=self.host_group)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def share(self, tensors: list[Tensor]) -> None:
        """Rank 0's values into the host tensors of every rank."""
        for tensor in tensors:
            self.together(torch.distributed.broadcast, tensor, src=0, group=self.host_group)

    def check_same(self, values: dict[str, Any]) -> None:
        """ValueError, on every rank, that names a rank for which not all these values are rank 0's, and which are not."""
        first, *others = self.gather(values)
        for rank, theirs in enumerate(others, 1):
            differing = sorted({name for name, _ in first.items() ^ theirs.items()})
            require(not differing, f"rank {rank} has another {', '.join(differing[:5])} than rank 0: every machine needs the same")

    def post(self, topic: str, text: str) -> None:
        """Leave a note of this rank, in place of its last one on the topic; waits for nobody."""
        self.board.set(f"{topic}/{self.rank}", text)

    def posted(self, topic: str) -> dict[int, str]:
        """The latest notes on a topic, by rank; ranks that left none are not in it."""
        keys = {r: f"{topic}/{r}" for r in range(self.world)}
        return {r: self.board.get(key).decode() for r, key in keys.items() if self.board.check([key])}

    def first(self, topic: str, text: str) -> str:
        """The first words that any rank has had for a topic, these if they are; with "" it only looks."""
        return self.board.compare_set(topic, "", text).decode()

    def hear(self, number: int, frame: object) -> None:
        """What a signal does: the first ends the run, here or in `check_stop`."""
        is_first, self.signalled = not self.signalled, self.signalled or number
        if is_first and not self.keeps_signals:
            raise Stopped(number)

    def check_stop(self) -> None:
        """Raise Stopped on every rank if a signal has come to any; all ranks must call it at the same places."""
        if number := max(self.gather(self.signalled)):
            self.stopping = True
            raise Stopped(number)


def write_line(stream: Any, text: str) -> str:
    """A line to a console or file; why it cannot be written, else "". Then all that is still to come goes nowhere, quietly."""
    try:
        stream.write(text + "\n")
        stream.flush()
        return ""
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error.strerror or str(error)


class Log:
    """Writes lines to standard output and appends them to a file, which it locks; silent on other ranks than 0.

    A file or a console that cannot be written any more costs its lines, not the run. Without a file it is for errors.
    """

    def __init__(self, path: Path | None = None, enabled: bool = True) -> None:
        self.enabled, self.path, self.file = enabled, path, None
        if enabled and path is not None:
            self.open()

    def open(self) -> None:
        """Append to the file from now on; ValueError if another process does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.path}: wait for it to end, or choose another RUN_ID") from None
        if self.path.read_bytes()[-1:] not in (b"", b"\n"):  # a kill cut the last line
            self.file.write("\n")

    def take_over(self) -> None:
        """Speak from this rank, because rank 0 cannot, even where a stopped rank 0 still holds the file."""
        self.enabled = True
        with suppress(OSError, ValueError):
            if self.path is not None and self.file is None:
                self.open()

    def __call__(self, text: str) -> None:
        """One line of prose."""
        if not self.enabled:
            return
        console = sys.stdout if self.path else sys.stderr
        encoding = getattr(console, "encoding", None) or "utf-8"
        printable = text.encode(encoding, "backslashreplace").decode(encoding)
        for name, stream, line in (("standard output", console, printable), (self.path, self.file, text)):
            if stream is not None and (reason := write_line(stream, line)):
                write_line(sys.stderr, f"warning: {name} cannot be written any more ({reason}); the run goes on without it")

    def record(self, word: str, /, **values: Any) -> None:
        """One line `word key:value key:value` for programs."""
        self(" ".join([word, *(f"{key}:{value}" for key, value in values.items())]))


def end_run(ranks: Ranks, log: Log, reason: str, waited: bool = False) -> typing.NoReturn:
    """Leave at once, without any collective, for a reason `STATUS words` that the board has.

    Rank 0 says it, or who is left where it cannot, or, if all have `waited` for each other, who comes first; of several who come to say
    something, in whatever thread, the first alone does.
    """
    status, line = reason.split(" ", 1)
    speaks = ranks.rank % ranks.local_world == 0  # on each machine, if the board went with the process that held it
    with suppress(RuntimeError, OSError):
        time.sleep(4 * LOOK_SECONDS if ranks.rank and not waited else 0.0)
        speaks = ranks.first("said", own := os.urandom(8).hex()) == own
    if speaks:
        log.take_over()
        log(line)
    time.sleep(1.0)  # until the other thread has spoken, and the other ranks have seen why
    sys.stdout.flush()
    os._exit(int(status))


class Watch:
    """Notices the other ranks' failures, and signals, while the main thread may be waiting inside a collective."""

    def __init__(self, ranks: Ranks, log: Log, timeout_seconds: float) -> None:
        self.ranks, self.log, self.over = ranks, log, threading.Event()
        self.limit, self.looks, self.came = timeout_seconds / LOOK_SECONDS, 0, (0, 0)  # collectives, and the look that first saw so many
        self.heard = {rank: ("0 0", 0) for rank in range(ranks.world)}  # the last note of each, and the look that first saw it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ranks.hear)
        if ranks.world > 1:
            self.signals, writer = os.pipe2(os.O_NONBLOCK)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        """In a thread: end this process when another rank has failed or hangs, or when a signal finds the main thread stuck.

        Time is counted in looks: a job that was suspended as a whole does not count its sleep.
        """
        asked = math.inf
        while not self.over.wait(LOOK_SECONDS):
            self.looks += 1
            try:
                reason = self.ranks.first("reason", self._hanging())
            except (RuntimeError, OSError):
                reason = f"{EXIT_USER_ERROR} error: the process that held the ranks together has ended"
            with suppress(BlockingIOError):
                asked = self.looks if os.read(self.signals, 64) else asked
            if (self.looks - asked) * LOOK_SECONDS > SIGNAL_GRACE_SECONDS and not self.ranks.stopping:
                reason = f"{128 + signal.SIGTERM} error: asked to end while waiting for the other ranks: one of them has ended or hangs"
            if reason and not self.over.is_set():
                end_run(self.ranks, self.log, reason)

    def _hanging(self) -> str:
        """The reason to end if ranks have come to fewer collectives than this one waits in, or give no sign of life, for too long."""
        calls = self.ranks.calls
        self.came = self.came if calls == self.came[0] else (calls, self.looks)
        self.ranks.post("at", f"{calls} {self.looks}")
        for rank, note in self.ranks.posted("at").items():
            self.heard[rank] = self.heard[rank] if note == self.heard[rank][0] else (note, self.looks)
        waiting = self.looks - self.came[1] > self.limit
        hanging = [str(rank) for rank, (note, look) in self.heard.items()
                   if self.looks - look > self.limit or (waiting and int(note.split()[0]) < calls)]
        reason = (f"{EXIT_USER_ERROR} error: rank {', '.join(hanging)} hangs: the others have waited for it for "
                  f"{self.limit * LOOK_SECONDS:g} s (RANK_TIMEOUT_SECONDS)")
        return reason if hanging else ""


class Clock:
    """Milliseconds of work; stops for what the budget does not count. On CUDA, waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total_ms, self._since = device, 0.0, None

    def start(self) -> None:
        synchronize(self.device)
        self._since = time.perf_counter()

    def stop(self) -> float:
        synchronize(self.device)
        self.total_ms, self._since = self.elapsed_ms(), None
        return self.total_ms

    def elapsed_ms(self) -> float:
        return self.total_ms + (0.0 if self._since is None else since_ms(self._since))


def since_ms(began: float) -> float:
    """Milliseconds since a reading of time.perf_counter."""
    return 1e3 * (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor; on CUDA through pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Progress:
    """Now and then a line that says where a long phase stands and how long it will still take, at the pace so far."""

    def __init__(self, log: Log) -> None:
        self.log, self.began, self.last = log, time.perf_counter(), time.perf_counter()

    def __call__(self, phase: str, done: float, total: float) -> None:
        if since_ms(self.last) >= PROGRESS_MS and done < total:
            self.last = time.perf_counter()
            self.log.record("progress", phase=phase, done=f"{done:g}/{total:g}",
                            left_ms=int(since_ms(self.began) * (total - done) / max(done, 1e-9)))


@dataclass
class Run:
    """What every stage needs: settings, ranks, log, and whether to compile."""

    cfg: Config
    ranks: Ranks
    log: Log
    compile: bool = False

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, never a part: a name beside it, fsync, rename.

    What a kill leaves under that name the next write takes. Raises OSError with a hint when the folder cannot be written or is
    full; the old file stays.
    """
    path = Path(path)
    unfinished = path.with_name(path.name[:200] + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        hint = "free some space there or choose another place with ARTIFACT_DIR; a file of that name is left as it was"
        raise OSError(error.errno, f"cannot write {len(data)} bytes to {path}: {error.strerror} ({hint})") from error


def as_tensor(data: bytes) -> Tensor:
    """(len(data),) uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# ======================================================================================================================
# 3. Data
#
# Shards are memory-mapped. Training walks the shards as one endless stream; evaluation cuts the validation tokens into
# segments once, so that neither the number of ranks nor the batch size changes a score. One function cuts segments, one
# builds batches, one reads shards, one counts bytes.
# ======================================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
PUBLISHED_VAL = {"documents": 50_000, "tokens": 47_853_344, "bytes": 151_080_645}
PUBLISHED_NAME = Config().shards_dir.name
MANIFEST, JOURNAL = "manifest.json", "build.json"  # of a finished and of an unfinished build
SHARD_KINDS = ("train", "val", "val_bytes")
SHARD_NAME = re.compile(r"([^.].*)_(train|val|val_bytes)_([0-9]{1,9})\.bin")  # prefix, kind, number; macOS's "._" files are none
BUILD_HINT = "build the data with prepare_caseops_data.py, or set DATA_DIR or DATA_PATH to where it is"

class Batch(NamedTuple):
    """T tokens of packed segments. `cu_seqlens` (N + 1,) int32 holds where segments start, T last, and may repeat T."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    previous: Tensor  # (T,) int64, the token before each in its segment; -1 at the first, which has none
    cu_seqlens: Tensor  # (N + 1,) int32
    positions: Tensor  # (T,) int32, counted from the start of the segment
    max_seqlen: int


def read_shard(path: Path, entries: int | None = None) -> np.ndarray:
    """The entries of a shard, `entries` of them where that is known, as a read-only memory map (uint16); ValueError says what is wrong."""
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; {BUILD_HINT}") from None
    require(len(header) == SHARD_HEADER_INTS, f"{path}: {size} bytes, shorter than the {header_bytes}-byte header: the file is cut short; "
                                              "copy or build it again")
    magic, version, count = (int(v) for v in header[:3])
    require(magic == SHARD_MAGIC, f"{path}: magic number {magic}, not {SHARD_MAGIC}: this is no token shard; {BUILD_HINT}")
    require(version == SHARD_VERSION, f"{path}: version {version}, this program reads {SHARD_VERSION}; {BUILD_HINT}")
    require(size == header_bytes + 2 * count and count > 0,
            f"{path}: the header promises {count} entries = {header_bytes + 2 * count} bytes, the file has {size}: it is empty, cut short "
            "or damaged; copy or build it again")
    require(entries in (None, count), f"{path}: {count} entries, {MANIFEST} beside it says {entries}: it is of another data set; copy or "
                                      "build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


class Dataset:
    """A folder of shards, looked at once: which there are, and what its manifest says. What a right set is stands here alone.

    `manifest.json` decides where there is one: its files, no others. Always: one prefix, numbers from 0 without a gap, and
    a sidecar shard for each validation shard or none at all. A wrong `.bin` file or an unfinished build is refused by name.
    """

    paths: dict[str, list[Path]]  # by kind (train, val, val_bytes), in order
    listed: dict[str, int]  # entries of each shard that the manifest names; with no manifest, this is empty and so are the next two
    transform = ""  # CaseOps version
    tokenizer_sha256 = ""

    def __init__(self, folder: Path) -> None:
        """ValueError names the folder and what is wrong with it."""
        require(folder.is_dir(), f"no data: {folder} is not a folder; {BUILD_HINT}")
        self.folder, self.listed = folder, {}
        if (folder / MANIFEST).exists():
            self._read_manifest(folder / MANIFEST)
        require(self.listed or not (folder / JOURNAL).exists(), f"{folder} holds an unfinished build ({JOURNAL}): give the same "
                "prepare_caseops_data.py command again, it goes on where it stopped")
        there = sorted(path.name for path in folder.glob("*.bin"))
        named = {name: match.groups() for name in self.listed or there if (match := SHARD_NAME.fullmatch(name))}
        foreign = [name for name in there if name not in named]
        reason = f"not in {MANIFEST}" if self.listed else "no name of a shard, PREFIX_train|val|val_bytes_NNNNNN.bin"
        require(not foreign, f"{folder} holds {', '.join(foreign[:3])}{' …' if foreign[3:] else ''}: {reason}; move or delete it")
        prefixes = sorted({prefix for prefix, _, _ in named.values()})
        require(len(prefixes) < 2, f"{folder} holds shards of several data sets ({', '.join(prefixes)}): one folder, one data set")
        self.paths = {}
        for kind in SHARD_KINDS:
            numbered = sorted((int(number), folder / name) for name, (_, its, number) in named.items() if its == kind)
            numbers, self.paths[kind] = [number for number, _ in numbered], [path for _, path in numbered]
            require(numbers == list(range(len(numbers))),
                    f"{folder}: the {kind} shards are numbered {', '.join(map(str, numbers))}, not from 0 without a gap")
        sidecars, shards = len(self.paths["val_bytes"]), len(self.paths["val"])
        require(sidecars == shards or not sidecars or not shards,
                f"{folder}: {sidecars} sidecar shards (val_bytes) for {shards} validation shards")

    def _read_manifest(self, path: Path) -> None:
        try:
            record = json.loads(path.read_bytes())
            files = [entry for split in ("val", "train") for entry in record["splits"][split]["files"]]
            self.listed = {entry["file"]: entry["entries"] for entry in files}
            self.transform, self.tokenizer_sha256 = record.get("transform", ""), record.get("tokenizer", {}).get("sha256", "")
            texts = [self.transform, self.tokenizer_sha256, *(entry["sha256"] for entry in files)]
            require(files and all(map(SHARD_NAME.fullmatch, self.listed)) and all(type(text) is str for text in texts)
                    and all(type(count) is int for count in self.listed.values()), "its list of shards is not in the form of a build")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not the manifest of a data set ({type(error).__name__}: {error}); move it away if it "
                             f"is another program's, else {BUILD_HINT}") from None

    def read(self, kind: str) -> list[np.ndarray]:
        """All shards of one kind, of the lengths that the manifest lists; ValueError if there is none or one is damaged."""
        require(self.paths[kind], f"no {kind} shards (*_{kind}_NNNNNN.bin) in {self.folder}; {BUILD_HINT}")
        return [read_shard(path, self.listed.get(path.name)) for path in self.paths[kind]]


class ValData(NamedTuple):
    """The validation set: entries, and the bytes of original text that each stands for."""

    tokens: np.ndarray  # (N,) uint16
    byte_counts: np.ndarray  # (N,) uint16; 0 for BOS and operators
    documents: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all targets: all entries but the first, which is a BOS."""
        return int(self.byte_counts[1:].sum(dtype=np.int64))

    def document_starts(self) -> np.ndarray:
        return np.flatnonzero(self.tokens == BOS_ID)


def check_tokens(tokens: np.ndarray, vocab_size: int, what: str, sample: int = 20_000_000) -> None:
    """The first `sample` and last `sample` entries must be below `vocab_size` and hold a BOS; ValueError says where not."""
    for offset in {0, max(0, len(tokens) - sample)}:
        part = np.asarray(tokens[offset: offset + sample])
        at = offset + int(np.argmax(part >= vocab_size))  # the first that is, if one is
        require(int(tokens[at]) < vocab_size, f"{what}: entry {at} is token {tokens[at]}, but VOCAB_SIZE is {vocab_size}: the data was "
                                              "made with another tokenizer, or the file is damaged")
    require((np.asarray(tokens[:sample]) == BOS_ID).any(), f"{what}: no BOS (id {BOS_ID}) in {min(len(tokens), sample)} entries: documents "
                                                           f"cannot be told apart; {BUILD_HINT}")


def read_sidecar(dataset: Dataset, val: list[np.ndarray]) -> np.ndarray:
    """The bytes of every validation token, (N,) uint16; ValueError if the sidecar is missing or does not belong to the shards."""
    where = f"the byte sidecar in {dataset.folder}"
    require(dataset.paths["val_bytes"],
            f"no byte sidecar (*_val_bytes_NNNNNN.bin) in {dataset.folder}: bits per byte cannot be counted; {BUILD_HINT}")
    sidecar = dataset.read("val_bytes")
    sizes, own = list(map(len, val)), list(map(len, sidecar))
    require(sizes == own,
            f"{where} has {own} entries, the validation tokens {sizes}: they must be the same; build both again from the same text")
    byte_counts = np.concatenate(sidecar)
    require(not byte_counts[np.concatenate(val) == BOS_ID].any(), f"{where} charges bytes to BOS: it does not belong to these tokens")
    return byte_counts


def load_val(cfg: Config, dataset: Dataset | None = None) -> ValData:
    """The validation set, checked: sidecar present and of the same length, BOS, ids, the published constants; ValueError if not so."""
    folder, dataset = cfg.shards_dir, dataset or Dataset(cfg.shards_dir)
    found, wanted = dataset.transform, ""
    if cfg.caseops_enabled:
        found, wanted = found or Config.caseops_version, cfg.caseops_version
    require(found == wanted, f"the data in {folder} is of CASEOPS_VERSION={found}, this run or its artifact of "
            f"{wanted or 'CASEOPS_ENABLED=0'}: neither can read the other's tokens; choose data, settings and artifact of one")
    shards = dataset.read("val")
    tokens = np.concatenate(shards)
    check_tokens(tokens, cfg.vocab_size, f"validation tokens in {folder}", sample=len(tokens))
    require(tokens[0] == BOS_ID, f"validation tokens in {folder}: the first entry is {tokens[0]}, not BOS ({BOS_ID}); {BUILD_HINT}")
    byte_counts = read_sidecar(dataset, shards) if cfg.caseops_enabled else piece_byte_counts(cfg, tokens)
    val = ValData(tokens, byte_counts, int((tokens == BOS_ID).sum()))
    counts = {"documents": val.documents, "tokens": len(tokens), "bytes": val.num_bytes}
    require(folder.name != PUBLISHED_NAME or counts == PUBLISHED_VAL, f"{folder} has the published data set's name, but its validation set "
            f"has {counts}, the published one {PUBLISHED_VAL}: it is incomplete or another one")
    require(val.num_bytes, f"the validation targets in {folder} stand for 0 bytes: bits per byte cannot be counted")
    if cfg.val_doc_fraction == 1:
        return val
    keep = max(1, int(val.documents * cfg.val_doc_fraction))
    end = int(np.append(val.document_starts(), len(tokens))[keep])
    return ValData(tokens[:end], byte_counts[:end], keep)


def load_tokenizer(cfg: Config) -> Any:
    """The SentencePiece model; ValueError if it is none, or its size is not VOCAB_SIZE."""
    import sentencepiece

    path = cfg.tokenizer_file
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"TOKENIZER_PATH {path} is not a SentencePiece model: {error}") from None
    require(model.vocab_size() == cfg.vocab_size,
            f"{path} has {model.vocab_size()} pieces, VOCAB_SIZE is {cfg.vocab_size}: set the one or the other")
    return model


def piece_byte_counts(cfg: Config, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each of `tokens` (N,) of plain SentencePiece data: a leading space counts unless a control token is before."""
    model, space_mark = load_tokenizer(cfg), "\u2581"
    control = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(cfg.vocab_size)])
    pieces = ["" if control[i] else model.id_to_piece(i) for i in range(cfg.vocab_size)]
    has_space = np.array([piece.startswith(space_mark) for piece in pieces])
    lengths = np.array([1 if model.is_byte(i) else len(piece.removeprefix(space_mark).encode()) for i, piece in enumerate(pieces)])
    before = np.concatenate([[BOS_ID], tokens[:-1]])
    return (lengths[tokens] + (has_space[tokens] & ~control[before])).astype(np.uint16)


def check_tokenizer(cfg: Config, dataset: Dataset) -> str:
    """Words about the tokenizer file for the log; ValueError if it is not the data's, or if it is needed and missing."""
    path, wanted = cfg.tokenizer_file, dataset.tokenizer_sha256
    if not path.exists():
        require(cfg.caseops_enabled and not cfg.tokenizer_path, f"no tokenizer at {path}; set TOKENIZER_PATH")
        return f"no tokenizer at {path}: none is needed, the bytes come from the sidecar"
    load_tokenizer(cfg)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    require(wanted in ("", found), f"{path} (sha256 {found[:16]}) is not the tokenizer that the data in {dataset.folder} was made with "
            f"(sha256 {wanted[:16]}, see {MANIFEST} there): set TOKENIZER_PATH to that one")
    return f"tokenizer {path} sha256 {found}"


def check_dataset(cfg: Config, dataset: Dataset) -> tuple[list[np.ndarray], ValData]:
    """Every check that takes seconds, before any long work; the training shards (none with EVAL_ONLY) and the validation set.

    ValueError names the file, what is wrong and what to do.
    """
    train = [] if cfg.eval_only else dataset.read("train")
    val = load_val(cfg, dataset)
    for path, shard in zip(dataset.paths["train"], train):
        check_tokens(shard, cfg.vocab_size, str(path), sample=max(1_000_000, 200_000_000 // len(train)))
        require(not begins_like(shard, val.tokens), f"{path} holds the validation tokens: they must not be trained on; {BUILD_HINT}")
    return train, val


def begins_like(shard: np.ndarray, tokens: np.ndarray, enough: int = 4096) -> bool:
    """Does a shard begin with the documents of `tokens` (N,): with `enough` entries of them, or with all?"""
    start = tokens[:enough]
    rest = shard[len(start): len(start) + 1]
    return np.array_equal(shard[:len(start)], start) and (len(start) == enough or not len(rest) or rest[0] == BOS_ID)


def segment_starts(tokens: np.ndarray, span: int, longest: int) -> np.ndarray:
    """Where segments start in `tokens` (T,): at every BOS, every `span` tokens, and every `longest` within a segment."""
    is_start = tokens == BOS_ID
    is_start[::span] = True
    starts = np.flatnonzero(is_start)
    pieces = -(-np.diff(starts, append=len(tokens)) // longest)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(starts, pieces) + nth * longest


def make_batch(tokens: np.ndarray, targets: np.ndarray, starts: np.ndarray, longest: int, device: torch.device,
               first_position: int = 0, before: np.ndarray | None = None) -> Batch:
    """The only constructor of a Batch: packed segments that begin at `starts`, none longer than `longest`.

    A segment that goes on from one scored earlier (cached TTT) says at which position and after which token (`before`, one
    a segment). On CUDA the number of segments is rounded up with empty ones, so that few shapes occur.
    """
    count = len(tokens)
    positions = first_position + np.arange(count, dtype=np.int32) - np.repeat(starts, np.diff(starts, append=count)).astype(np.int32)
    slots = len(starts) + 1 if device.type == "cpu" else -(-(len(starts) + 1) // 64) * 64
    cu_seqlens = np.full(slots, count, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    previous = np.empty(count, np.int64)
    previous[1:] = tokens[:-1]
    previous[starts] = -1 if before is None else before  # the only place that says who has a predecessor
    arrays = (tokens.astype(np.int64), targets.astype(np.int64), previous, cu_seqlens, positions)
    return Batch(*(to_device(array, device) for array in arrays), longest)


class SpanLayout(NamedTuple):
    """How a step's tokens are cut: `spans` equal stretches that attention does not cross, `per_micro` of them a forward.

    The cut is by eighths at least, whatever the number of ranks, so that 1, 2, 4 and 8 ranks compute the same numbers.
    """

    spans: int
    span_tokens: int
    per_rank: int
    per_micro: int

    @classmethod
    def plan(cls, cfg: Config, world: int) -> SpanLayout:
        """ValueError if the ranks do not divide the batch."""
        batch, spans = cfg.train_batch_tokens, math.lcm(8, world)
        require(batch % spans == 0 and batch >= 2 * spans, f"{world} ranks do not divide TRAIN_BATCH_TOKENS={batch}: it must be a multiple "
                f"of {spans} (use fewer ranks, or set TRAIN_BATCH_TOKENS={max(2, batch // spans) * spans})")
        while batch // spans > cfg.micro_batch_tokens:
            spans *= 2
            require(batch % spans == 0, f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} does not divide TRAIN_BATCH_TOKENS={batch} into "
                                        f"equal parts for {world} ranks; use a power-of-two share of {batch // world}")
        per_rank, fit = spans // world, cfg.micro_batch_tokens // (batch // spans)
        return cls(spans, batch // spans, per_rank, max(n for n in range(1, min(fit, per_rank) + 1) if per_rank % n == 0))

    @property
    def micro_tokens(self) -> int:
        return self.per_micro * self.span_tokens


def read_stream(shards: list[np.ndarray], start: int, count: int) -> np.ndarray:
    """`count` entries from position `start` of all shards end to end, again and again."""
    ends, parts = np.cumsum([len(shard) for shard in shards]), []
    while count > 0:
        start %= int(ends[-1])
        index = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[index]) - len(shards[index]))
        parts.append(np.asarray(shards[index][offset: offset + count]))
        count, start = count - len(parts[-1]), start + len(parts[-1])
    return np.concatenate(parts)


class TrainLoader:
    """The micro-batches of one rank, step by step, prepared one step ahead in a background thread."""

    def __init__(self, shards: list[np.ndarray], cfg: Config, ranks: Ranks) -> None:
        self.shards, self.layout, self.cfg, self.ranks = shards, SpanLayout.plan(cfg, ranks.world), cfg, ranks
        device = ranks.device  # a thread starts on GPU 0, and pinning memory there would cost every rank a context on it
        choose = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.pool = ThreadPoolExecutor(1, "loader", *choose)
        self.wait_ms = 0.0
        self.seek(0)

    def seek(self, position: int) -> None:
        """Continue at `position`, a token count from the start of the stream."""
        self.position = position
        self._next: Future[list[Batch]] = self.pool.submit(self._prepare, position)

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        began = time.perf_counter()
        batches = self._next.result()
        self.wait_ms += since_ms(began)
        self.seek(self.position + self.cfg.train_batch_tokens)
        return batches

    def _prepare(self, position: int) -> list[Batch]:
        span, size, share = self.layout.span_tokens, self.layout.micro_tokens, self.layout.per_rank * self.layout.span_tokens
        entries, longest = read_stream(self.shards, position + self.ranks.rank * share, share + 1), min(self.cfg.train_seq_len, span)
        batches = []
        for first in range(0, share, size):
            tokens, targets = entries[first: first + size], entries[first + 1: first + size + 1]
            batches.append(make_batch(tokens, targets, segment_starts(tokens, span, longest), longest, self.ranks.device))
        return batches


# ======================================================================================================================
# 4. Attention
#
# One function for all of the program: causal attention over a packed stream of segments with grouped heads. On a GPU it is
# torch's variable-length attention, whose kernel resolve_attention() chooses once: FlashAttention 3 (Hopper) or 4 if their
# packages are installed, else FlashAttention 2, which torch brings. Everywhere else, and for float32, which no flash kernel
# takes, each segment goes through scaled dot product attention; inside torch.compile, where a loop over segments cannot be,
# all of them go through it at once under a mask.
# ======================================================================================================================

FLASH_HINTS = {
    "fa3": "install the wheel flash_attn_3 from the PyTorch index (module flash_attn_interface)",
    "fa4": "pip install flash-attn-4 (module flash_attn.cute)",
    "varlen": "torch >= 2.11 has it (torch.nn.attention.varlen)",
}


class AttentionBackend(NamedTuple):
    """What computes attention on a GPU: its name for the log, torch's function, and why faster ones were passed over."""

    name: str
    varlen: Callable[..., Tensor] | None = None
    skipped: str = ""


attention_backend = AttentionBackend("sdpa")


def load_flash(name: str) -> Callable[..., Tensor]:
    """torch's variable-length attention with kernel `name`, causal (the window (-1, 0)); ImportError if it is not installed."""
    import torch.nn.attention as attention_library
    from torch.nn.attention.varlen import varlen_attn

    if name != "varlen":
        attention_library.activate_flash_attention_impl(name.upper())
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.11 has no such flag
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


def resolve_attention(name: str, device: torch.device) -> AttentionBackend:
    """Choose the attention of this process before anything is compiled; "auto" takes the first that can be loaded.

    Raises:
        ValueError: the named one cannot be used here.
    """
    global attention_backend
    attention_backend = AttentionBackend("sdpa")
    if name in FLASH_HINTS and device.type != "cuda":
        raise ValueError(f"ATTN_BACKEND={name} needs a CUDA device and this run is on {device.type}: use auto or sdpa")
    if name == "sdpa" or device.type != "cuda":
        return attention_backend
    capability, skipped = torch.cuda.get_device_capability(device)[0], []
    fitting = [n for n in FLASH_HINTS if n == "varlen" or capability == 9 or (n == "fa4" and capability > 9)]
    for candidate in fitting if name == "auto" else [name]:
        try:
            attention_backend = AttentionBackend(candidate, load_flash(candidate), "; ".join(skipped))
            return attention_backend
        except (ImportError, OSError, RuntimeError) as error:  # not there, built for another torch, or refused by it
            if name != "auto":
                raise ValueError(f"ATTN_BACKEND={name} cannot be loaded ({error}): "
                                 f"{FLASH_HINTS[name]}, or use ATTN_BACKEND=auto") from error
            skipped.append(f"{candidate}: {error}")
    attention_backend = AttentionBackend("sdpa", skipped="; ".join(skipped))
    return attention_backend


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention within each segment of a packed stream, scale 1/sqrt(D).

    q (T, H, D); k, v (T, Hkv, D) with H a multiple of Hkv; cu_seqlens (N+1,) int32 from 0 to T, non-decreasing (equal
    neighbours are empty segments, for padding); max_seqlen >= every segment's length. Returns (T, H, D).
    """
    if attention_backend.varlen is not None and q.device.type != "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return attention_backend.varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return (masked_attention if torch.compiler.is_compiling() else segment_attention)(q, k, v, cu_seqlens)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention() by a loop over the segments, neighbours of one length in one call; any device and float type, eager."""
    runs = [(length, len(list(group))) for length, group in itertools.groupby(n for n in cu_seqlens.diff().tolist() if n)]
    parts = []
    for segments in zip(*(t.split([length * count for length, count in runs]) for t in (q, k, v))):  # one backward node a tensor
        length = runs[len(parts)][0]
        shaped = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in segments)  # (segments, heads, length, D)
        y = F.scaled_dot_product_attention(*shaped, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        parts.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if parts else q.clone()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention() in one call with a (T, T) mask: for small T, under torch.compile."""
    place = torch.arange(q.size(0), device=q.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
    mask = (segment[:, None] == segment) & (place[:, None] >= place)
    y = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return y[0].transpose(0, 1)


# ======================================================================================================================
# 5. Model
#
# Every parameter is declared once, as a row of parameter_table: shape, first value, optimizer, how it is quantized and
# stored. Construction, initialisation, optimizers, calibration, quantization and the artifact loop over these rows.
#
# One forward serves training, evaluation, calibration and test-time training. It takes every matrix product through
# `linear(site, x, w)`, which it is handed: plain, plain and counting Hessians, or plain and a low-rank term. A site with
# no weight (`w` None) is a bypass: it adds something only where an adapter lives. What a token attends to can be handed
# in as well (`attend`): the segments of the batch, or a cache of earlier keys and values. The schedule is an argument
# too, so one model has one compiled graph a depth.
# ======================================================================================================================

Site = tuple[int, int, str]  # (layer, visit, name); the head is (-1, 0, "head")
Linear = Callable[[Site, Tensor, "Tensor | None"], "Tensor | None"]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # visit, q (T, H, D), k and v (T, Hkv, D) -> (T, H, D)
HEAD_SITE: Site = (-1, 0, "head")
NORM_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds when it is told nothing, in half precision too


class Schedule(NamedTuple):
    """The unrolled layers of one depth: physical layer indices, first half (floor) encoder, the rest decoder."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def visits(self) -> int:
        return len(self.encoder) + len(self.decoder)


def loop_schedule(cfg: Config, depth: int) -> Schedule:
    """Layers with the loop block passed `depth` times: 0..LOOP_START-1, the block, the layers behind it."""
    loop = list(range(cfg.loop_start, cfg.loop_end + 1))
    layers = [*range(cfg.loop_start), *loop * depth, *range(cfg.loop_end + 1, cfg.num_layers)]
    half = len(layers) // 2
    return Schedule(tuple(layers[:half]), tuple(layers[half:]))


def num_skips(cfg: Config) -> int:
    """Rows of the skip weights: what fits at depth NUM_LOOPS + 1."""
    schedule = loop_schedule(cfg, cfg.num_loops + 1)
    return min(len(schedule.encoder), len(schedule.decoder))


class MatrixGroup(NamedTuple):
    """Matrices `first` to `last` of a bank that GPTQ takes alike: the input that their Hessian is of, and their rule."""

    first: int
    last: int
    hessian: str
    bits: int
    clip_sigmas: float


class Row(NamedTuple):
    """A parameter: how it starts (a constant, a normal deviate, or which halves of a bank are orthogonal), and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    group: str  # of the optimizers
    constant: float = 0.0
    std: float = 0.0
    orthogonal: tuple[int, ...] = ()  # parts of a bank (0: first L matrices, 1: second L); the others start at `constant`
    matrices: tuple[MatrixGroup, ...] = ()  # GPTQ; else
    int8: bool = False  # rows of int8, or float16


def parameter_table(cfg: Config) -> list[Row]:
    """All parameters of a model, under the names of the published state dict. L layers, d width, k kv width, h hidden."""
    layers, d, k, h, skips = cfg.num_layers, cfg.model_dim, cfg.kv_dim, cfg.mlp_dim, num_skips(cfg)
    bits, attn, mlp = cfg.matrix_bits, cfg.attn_clip_sigmas, cfg.mlp_clip_sigmas
    rows = [
        Row("tok_emb.weight", (cfg.vocab_size, d), "embedding", std=cfg.tied_embed_init_std,
            matrices=(MatrixGroup(0, 1, "head", cfg.embed_bits, cfg.embed_clip_sigmas),)),
        Row("qo_bank", (2 * layers, d, d), "bank", orthogonal=(0,),  # Q of layer i at i, output projection at L + i
            matrices=(MatrixGroup(0, layers, "attn_in", bits, attn), MatrixGroup(layers, 2 * layers, "proj", bits, attn))),
        Row("kv_bank", (2 * layers, k, d), "bank", orthogonal=(0, 1),  # K at i, V at L + i
            matrices=(MatrixGroup(0, layers, "attn_in", bits, attn), MatrixGroup(layers, 2 * layers, "attn_in", bits, attn))),
        Row("mlp_up_bank", (layers, h, d), "bank", orthogonal=(0,), matrices=(MatrixGroup(0, layers, "up", bits, mlp),)),
        Row("mlp_down_bank", (layers, d, h), "bank", matrices=(MatrixGroup(0, layers, "down", bits, mlp),)),
        Row("skip_weights", (skips, d), "small", constant=1.0),
        Row("skip_gates", (skips, d), "small"),
        Row("parallel_post_lambdas", (layers, 2, 2), "small", constant=1.0),  # [0]: attention's, [1]: the MLP's; by lane
        Row("parallel_resid_lambdas", (layers, 2), "small", constant=1.1),
    ]
    for i in range(layers):
        rows += [
            Row(f"blocks.{i}.attn_scale", (d,), "small", constant=1.0),
            Row(f"blocks.{i}.mlp_scale", (d,), "small", constant=1.0),
            Row(f"blocks.{i}.resid_mix", (2, d), "small"),  # (1, 0): see init_weights
            Row(f"blocks.{i}.attn.q_gain", (cfg.num_heads,), "small", constant=cfg.qk_gain_init),
        ]
        if cfg.sparse_attn_gate_enabled:
            rows.append(Row(f"blocks.{i}.attn.attn_gate_w", (cfg.num_heads, cfg.gate_window), "small", int8=cfg.gated_attn_quant_gate))
        elif cfg.gated_attn_enabled:
            rows.append(Row(f"blocks.{i}.attn.attn_gate_w", (cfg.num_heads, d), "small", std=cfg.gated_attn_init_std,
                            int8=cfg.gated_attn_quant_gate))
        if cfg.mlp_gate_enabled:
            rows += [Row(f"blocks.{i}.mlp_gate_out.weight", (1, cfg.gate_window), "small"),
                     Row(f"blocks.{i}.mlp_gate_out.bias", (1,), "small", constant=5.0)]
    if cfg.smear_gate_enabled:
        rows += [Row("smear_gate.weight", (1, cfg.gate_window), "small"), Row("smear_lambda", (1,), "small")]
    return rows


def attn_in_parts(cfg: Config) -> dict[str, int]:
    """What one product makes of an attention's input, in order, and how wide each is."""
    gates = cfg.num_heads * (cfg.gated_attn_enabled or cfg.sparse_attn_gate_enabled)
    return {"q": cfg.model_dim, "k": cfg.kv_dim, "v": cfg.kv_dim, "gate": gates}


def plain_linear(site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
    """x (..., in) times w (out, in), and nothing at a bypass."""
    return None if w is None else F.linear(x, w)


def attend_segments(batch: Batch, visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain `attend`: causal attention within the segments of the batch."""
    return attention(q, k, v, batch.cu_seqlens, batch.max_seqlen)


def rms_norm(x: Tensor, divisor: float = 1.0) -> Tensor:
    ours = torch.compiler.is_compiling() and kernels_take(x)  # without a compiler it would be five passes for one
    return NormFromOutput.apply(x, divisor) if ours else F.rms_norm(x, (x.size(-1),)) / divisor


def norm_factor(x: Tensor) -> Tensor:
    """What rms_norm multiplies each row of x (..., D) with, (..., 1) float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + NORM_EPS)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of one dtype. A plain sum the compiler would join to the product before it, copying x for that; this joins the norm behind."""
    return (x.float() + y.float()).to(x.dtype) if torch.compiler.is_compiling() else x + y


@torch.library.custom_op(f"{OPERATORS}::rotary_tables", mutates_args=())
def rotary_tables(positions: Tensor, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 (T, 1, dims / 2), of rotary embeddings (Su et al. 2021).

    An operator, so that the compiler cannot inline it: it would compute cos, sin and pow again in every kernel that rotates.
    """
    exponents = torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None, None] * base ** (-exponents / max(dims, 1))
    return angles.cos(), angles.sin()


rotary_tables.register_fake(lambda positions, dims, base: tuple(
    positions.new_empty((positions.size(0), 1, dims // 2), dtype=torch.float32) for _ in range(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first dimensions of x (T, H, D); cos and sin are (T, 1, rotated / 2)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half: 2 * half], x[..., 2 * half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def head_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """RMSNorm of each head of x (T, H, D) in float32, times its gain (H,).

    Norm and gain are one factor a row: so the gain's gradient comes out of sums over D that the norm's needs anyway.
    """
    factor = norm_factor(x)
    return x.float() * (factor if gain is None else factor * gain.float()[:, None])


class LayerWeights(NamedTuple):
    """What one layer's visits read, cast to the dtype of the activations once a forward.

    What reads one input is one product: `attn_in` has the rows of Q, K, V and the gate. The scales behind attention and MLP
    are multiplied into the rows of the projections before them, which spares a pass over the activations each way.
    """

    attn_in: Tensor  # (d + 2 k + heads, d)
    proj: Tensor  # (d, d)
    up: Tensor  # (h, d)
    down: Tensor  # (d, h), float32 still: a visit may multiply a factor into its rows
    attn_scale: Tensor  # (d,)
    mlp_scale: Tensor  # (d,)
    resid_mix: Tensor  # (2, d)
    q_gain: Tensor  # (heads,)
    resid: Tensor  # (2,): what each lane keeps
    post: Tensor  # (2, 2)


class Context(NamedTuple):
    """What all visits of one forward share."""

    linear: Linear
    attend: Attend
    cos: Tensor
    sin: Tensor
    layers: list[LayerWeights]


class GPT(nn.Module):
    """Looped-recurrence transformer with the parameters of parameter_table."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        for row in parameter_table(cfg):
            *path, leaf = row.name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(row.shape)))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, on the CPU, from `seed` alone. Orthogonal matrices are drawn layer by layer over all banks."""
        generator, table, layers = torch.Generator().manual_seed(seed), parameter_table(self.cfg), self.cfg.num_layers
        banks = [row for row in table if row.orthogonal]
        for row in table:
            value = self.get_parameter(row.name).fill_(row.constant)
            if row.std:
                value.normal_(std=row.std, generator=generator)
            if row.name.endswith("resid_mix"):
                value[0] = 1.0
            for layer in range(layers) if row is banks[-1] else ():
                for bank in banks:
                    for part in bank.orthogonal:
                        nn.init.orthogonal_(self.get_parameter(bank.name)[part * layers + layer], generator=generator)

    def forward(self, batch: Batch, schedule: Schedule, linear: Linear = plain_linear, attend: Attend | None = None,
                rows: Tensor | None = None, also: Tensor | None = None) -> Tensor:
        """Negative log likelihood in nats of every target, or of those at `rows`, (T,) float32.

        Without `attend`, segments see themselves. With `also` (T,), other tokens at the same places, theirs too: (2, T).
        """
        x, targets = self.hidden_states(batch, schedule, linear, attend or partial(attend_segments, batch)), batch.targets
        if rows is not None:
            x, targets = x[rows], targets[rows]
        logits = linear(HEAD_SITE, x, self.tok_emb.weight.to(self.dtype))
        losses = softcapped_cross_entropy(logits, targets, self.cfg.logit_softcap)
        return losses if also is None else torch.stack([losses, softcapped_cross_entropy(logits.detach(), also, self.cfg.logit_softcap)])

    def hidden_states(self, batch: Batch, schedule: Schedule, linear: Linear, attend: Attend) -> Tensor:
        """What the output head reads, (T, d)."""
        cfg = self.cfg
        context = Context(linear, attend, *rotary_tables(batch.positions, cfg.rope_dims, cfg.rope_base), self._layer_weights())
        embedded = F.embedding(batch.tokens, self.tok_emb.weight)
        if cfg.smear_gate_enabled:
            embedded = embedded + self._smear(embedded, batch.previous)
        x = x0 = rms_norm(embedded.to(self.dtype))
        half, mlp, lanes, skips = len(schedule.encoder), None, None, []  # mlp: what the serial visit before has still to add to x
        for visit, layer in enumerate(schedule.encoder + schedule.decoder):
            skip = (visit - half, skips.pop()) if visit >= half and skips else None
            starts_skip = half - self.skip_weights.size(0) <= visit < half
            serial = visit < half or layer < cfg.parallel_start_layer
            if serial:
                x = self._mixed(context, layer, x, mlp, x0, skip)
                x = self._attention(context, layer, visit, rms_norm(x, self._divisor(layer)), x)
                mlp = partial(self._mlp, context, layer, visit, x)
            if mlp is not None and (starts_skip or not serial):
                x, mlp = add(x, mlp()), None
            if starts_skip:
                skips.append(x)
            if not serial:
                lanes = self._parallel_block(context, layer, visit, (x, x) if lanes is None else lanes, x0, skip)
        if lanes is not None:
            x = {"mean": 0.5 * (lanes[0] + lanes[1]), "attn": lanes[0], "mlp": lanes[1]}[cfg.parallel_final_lane]
        elif mlp is not None:
            x = add(x, mlp())
        return rms_norm(x)

    def _layer_weights(self) -> list[LayerWeights]:
        """The weights by layer."""
        layers, p = self.cfg.num_layers, dict(self.named_parameters())

        def of_blocks(name: str) -> Tensor:
            return torch.stack([p[f"blocks.{i}.{name}"] for i in range(layers)])

        attn_scale, mlp_scale = of_blocks("attn_scale"), of_blocks("mlp_scale")
        gates = [of_blocks("attn.attn_gate_w")] if attn_in_parts(self.cfg)["gate"] else []
        if self.cfg.sparse_attn_gate_enabled:
            gates = [F.pad(self.cfg.sparse_attn_gate_scale * gates[0], (0, self.cfg.model_dim - self.cfg.gate_window))]
        stacked = LayerWeights(
            torch.cat([self.qo_bank[:layers], self.kv_bank[:layers], self.kv_bank[layers:], *gates], dim=1),
            self.qo_bank[layers:] * attn_scale[:, :, None], self.mlp_up_bank, self.mlp_down_bank * mlp_scale[:, :, None],
            attn_scale, mlp_scale, of_blocks("resid_mix"), of_blocks("attn.q_gain"), self.parallel_resid_lambdas,
            self.parallel_post_lambdas)
        cast = stacked._replace(**{name: t.to(self.dtype) for name, t in stacked._asdict().items() if name != "down"})
        return [LayerWeights(*tensors) for tensors in zip(*(t.unbind() for t in cast))]

    def _smear(self, embedded: Tensor, previous: Tensor) -> Tensor:
        """SmearGate: a gated share of the embedding of the token before, none at the start of a segment; (T, d)."""
        gate = torch.sigmoid(F.linear(embedded[:, : self.cfg.gate_window], self.smear_gate.weight))
        return self.smear_lambda * gate * (previous >= 0)[:, None] * F.embedding(previous.clamp_min(0), self.tok_emb.weight)

    def _skip_factors(self, row: int) -> tuple[Tensor, Tensor]:
        """What a channel is multiplied with, and what its skip."""
        if not self.cfg.skip_gates_enabled:
            return torch.ones_like(self.skip_weights[row]), self.skip_weights[row]
        gate = torch.sigmoid(self.skip_gates[row])
        return gate, (1 - gate) * self.skip_weights[row]

    def _mixed(self, context: Context, layer: int, x: Tensor, mlp: Callable[..., Tensor] | None, x0: Tensor,
               skip: tuple[int, Tensor] | None) -> Tensor:
        """What a serial visit reads, (T, d): x and what `mlp` adds to it, x0 and the skip (row, (T, d)), a factor a channel each.

        `mlp` multiplies its factor into its weights: so neither that sum nor the sum's gradient is ever written.
        """
        mix = context.layers[layer].resid_mix
        kept, mixed = mix[0], mix[1] * x0
        if skip is not None:
            gate, share = self._skip_factors(skip[0])
            kept, mixed = (kept * gate).to(self.dtype), mixed + (kept * share).to(self.dtype) * skip[1]
        mixed = kept * x + mixed
        return mixed if mlp is None else add(mixed, mlp(kept))

    def _divisor(self, layer: int) -> float:
        """What a layer divides its normalised inputs by."""
        return math.sqrt(layer + 1) if self.cfg.ln_scale else 1.0

    def _parallel_block(self, context: Context, layer: int, visit: int, lanes: tuple[Tensor, Tensor], x0: Tensor,
                        skip: tuple[int, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Attention reads lane 0, which the skip is mixed into, the MLP lane 1; both write to both."""
        weights = context.layers[layer]
        if skip is not None:
            gate, share = (factor.to(self.dtype) for factor in self._skip_factors(skip[0]))
            lanes = gate * lanes[0] + share * skip[1], lanes[1]
        mix, resid, post = weights.resid_mix, weights.resid, weights.post
        a = self._attention(context, layer, visit, rms_norm(mix[0] * lanes[0] + mix[1] * x0, self._divisor(layer)))
        m = self._mlp(context, layer, visit, lanes[1])
        return (resid[0] * lanes[0] + post[0, 0] * a + post[1, 0] * m, resid[1] * lanes[1] + post[0, 1] * a + post[1, 1] * m)

    def _attention(self, context: Context, layer: int, visit: int, n: Tensor, x: Tensor | None = None) -> Tensor:
        """What attention of the normalised input n (T, d) adds, gate, output projection and scale included; added to x, if given."""
        cfg, weights, linear = self.cfg, context.layers[layer], context.linear
        q, k, v, gate = linear((layer, visit, "attn_in"), n, weights.attn_in).split(list(attn_in_parts(cfg).values()), dim=-1)
        q, k, v = (t.unflatten(-1, (-1, cfg.head_dim)) for t in (q, k, v))
        q = rotate(head_norm(q, weights.q_gain), context.cos, context.sin).to(self.dtype)
        k = rotate(head_norm(k), context.cos, context.sin).to(self.dtype)
        y = context.attend(visit, q, k, v)
        gate = torch.sigmoid(gate) if gate.size(-1) else torch.ones_like(y[..., 0])
        y = exclude_self(y, v, gate) if layer >= cfg.num_layers - cfg.xsa_last_n else y * gate.unsqueeze(-1)
        if x is not None and linear is plain_linear:
            return add_product(x, y.flatten(1), weights.proj)
        y = linear((layer, visit, "proj"), y.flatten(1), weights.proj)
        bypass = linear((layer, visit, "attn_bypass"), n, None)
        y = y if bypass is None else y + weights.attn_scale * bypass
        return y if x is None else add(x, y)

    def _mlp(self, context: Context, layer: int, visit: int, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """What the MLP of x (T, d), which it normalises itself, adds: scale and gate included, and a factor (d,) of the caller's."""
        weights, linear = context.layers[layer], context.linear
        if linear is plain_linear:
            down = weights.down if factor is None else weights.down * factor[:, None]
            y = fused_mlp(x, self._divisor(layer), weights.up, down.to(self.dtype))
        else:
            n = rms_norm(x, self._divisor(layer))
            h = activation(linear((layer, visit, "up"), n, weights.up))
            y = linear((layer, visit, "down"), h, weights.down.to(self.dtype))
            bypass = linear((layer, visit, "mlp_bypass"), n, None)
            y = y if bypass is None else y + weights.mlp_scale * bypass
            y = y if factor is None else factor * y
        if not self.cfg.mlp_gate_enabled:
            return y
        weight, bias = (self.get_parameter(f"blocks.{layer}.mlp_gate_out.{name}").to(self.dtype) for name in ("weight", "bias"))
        return torch.sigmoid(F.linear(x[:, : self.cfg.gate_window], weight, bias)) * y


# ======================================================================================================================
# 6. Optimizers
#
# Muon (Jordan et al. 2024) on the banks, AdamW on the rest. A group of the parameter table is a row of optimizer_groups
# with all its hyper-parameters. Large tensors are sharded along their first axis: gradients are reduce-scattered, each rank
# updates its rows, the rows are all-gathered. Their storage is padded to equal shares, so both collectives work in place.
# The small parameters live in one flat gradient and take one all-reduce.
# ======================================================================================================================


class Group(NamedTuple):
    """The rule of one group of parameters."""

    kind: str  # "muon" or "adamw"
    lr: float
    weight_decay: float
    sharded: bool
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0


def optimizer_groups(cfg: Config) -> dict[str, Group]:
    """The groups of the parameter table."""
    adam = dict(betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps)
    return {
        "bank": Group("muon", cfg.matrix_lr, cfg.muon_wd, sharded=True),
        "embedding": Group("adamw", cfg.tied_embed_lr, cfg.embed_wd, sharded=True, **adam),
        "small": Group("adamw", cfg.scalar_lr, cfg.adam_wd, sharded=False, **adam),
    }


# Coefficients (a, b, c) of x <- a x + (b g + c g g) x with g = x x^T, one triple an iteration. The quintic's are Keller Jordan's (2024):
# singular values end near 1, not at it. Polar Express (Amsel et al. 2025): each step the best for what the one before left.
NEWTON_SCHULZ = {
    "quintic": ((3.4445, -4.7750, 2.0315),) * 50,
    "polar": ((8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype, kind: str = "quintic") -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for each matrix of update (N, rows, cols)."""
    x = update.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ[kind][:steps]:
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class ShardedTensor:
    """A parameter whose update is shared out: rank r owns rows [r * share, (r + 1) * share) of its padded storage."""

    def __init__(self, param: nn.Parameter, ranks: Ranks) -> None:
        self.ranks, self.rows = ranks, param.size(0)
        share = -(-self.rows // ranks.world)
        self.storage = torch.zeros(share * ranks.world, *param.shape[1:], device=param.device, dtype=param.dtype)
        self.storage[: self.rows] = param.data
        self.full_grad = torch.zeros_like(self.storage)
        param.data, param.grad = self.storage[: self.rows], self.full_grad[: self.rows]
        self.own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.shard = nn.Parameter(self.storage[self.own])
        self.shard.grad = self.full_grad if ranks.world == 1 else torch.zeros_like(self.shard)
        self._pending: Any = None

    def start_reduce(self) -> None:
        """Begin to sum the gradient's rows over the ranks into `shard.grad`."""
        self._pending = self.ranks.together(torch.distributed.reduce_scatter_tensor, self.shard.grad, self.full_grad, async_op=True)

    def start_gather(self) -> None:
        """Begin to hand the updated rows to all ranks."""
        self._pending = self.ranks.together(torch.distributed.all_gather_into_tensor, self.storage, self.shard.data, async_op=True)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def whole(self, shard: Tensor) -> Tensor:
        """All rows of a tensor of which every rank has a shard like its own of the parameter."""
        if self.ranks.world == 1:
            return shard.clone()
        full = torch.empty_like(self.storage)
        self.ranks.together(torch.distributed.all_gather_into_tensor, full, shard.contiguous())
        return full[: self.rows].clone()

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's shard of `whole`, padding included."""
        padded = torch.zeros(self.storage.shape, dtype=whole.dtype)
        padded[: self.rows] = whole
        return padded[self.own]


class Optimizers:
    """All parameters of a model, their gradients and optimizer state.

    Gradients accumulate over micro-batches as sums; `step` averages them over ranks, clips the average, and updates.
    """

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks) -> None:
        self.cfg, self.ranks, self.groups = cfg, ranks, optimizer_groups(cfg)
        self.ns_dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        members = {name: [model.get_parameter(row.name) for row in parameter_table(cfg) if row.group == name] for name in self.groups}
        assert {id(p) for m in members.values() for p in m} == {id(p) for p in model.parameters()}, "every parameter has one group"
        small = [p for name, group in self.groups.items() if not group.sharded for p in members[name]]
        self.flat_grad = torch.zeros(sum(p.numel() for p in small), device=ranks.device)
        for param, view in zip(small, self.flat_grad.split([p.numel() for p in small])):
            param.grad = view.view_as(param)
        self.sharded = {name: [ShardedTensor(p, ranks) for p in members[name]] for name, group in self.groups.items() if group.sharded}
        self.large = [tensor for tensors in self.sharded.values() for tensor in tensors]
        self.momenta = {name: [torch.zeros_like(t.shard) for t in self.sharded[name]]
                        for name, group in self.groups.items() if group.kind == "muon"}
        self.adamw = torch.optim.AdamW(
            [{"params": [t.shard for t in self.sharded[name]] if g.sharded else members[name], "lr": g.lr, "base_lr": g.lr,
              "betas": g.betas, "eps": g.eps, "weight_decay": g.weight_decay} for name, g in self.groups.items() if g.kind == "adamw"],
            fused=True)

    def zero_grad(self) -> None:
        torch._foreach_zero_([*(t.full_grad for t in self.large), self.flat_grad])

    @torch.no_grad()
    def step(self, lr_scale: float, step: int, muon_wd_scale: float = 1.0) -> Tensor:
        """Update from the accumulated gradients; returns the norm of the averaged gradient, a 0-d tensor."""
        for tensor in self.large:
            tensor.start_reduce()
        self.ranks.sum(self.flat_grad)
        for tensor in self.large:
            tensor.wait()
        norm = self._average_and_clip()
        for name, buffers in self.momenta.items():
            group = self.groups[name]
            group = group._replace(lr=group.lr * lr_scale, weight_decay=group.weight_decay * muon_wd_scale)
            self._muon(group, self.sharded[name], buffers, self._momentum(step))
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()
        for name, tensors in self.sharded.items():
            for tensor in tensors if name not in self.momenta else ():
                tensor.start_gather()
        for tensor in self.large:
            tensor.wait()
        return norm

    def _average_and_clip(self) -> Tensor:
        """Divide the summed gradients by the ranks and clip their norm, which is that of the average over all ranks."""
        grads = [*(t.shard.grad for t in self.large), self.flat_grad]
        norms = torch.stack(torch._foreach_norm(grads)).square()
        norm = (self.ranks.sum(norms[:-1].sum()) + norms[-1]).sqrt() / self.ranks.world
        limit = self.cfg.grad_clip_norm
        clip = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit > 0 else torch.ones_like(norm)
        torch._foreach_mul_(grads, clip / self.ranks.world)
        return norm

    def _momentum(self, step: int) -> float:
        cfg = self.cfg
        warm = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
        return (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum

    def _muon(self, group: Group, banks: list[ShardedTensor], buffers: list[Tensor], momentum: float) -> None:
        """Nesterov momentum, orthogonalised; each bank's rows travel while the next bank is worked on."""
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, [bank.shard.grad for bank in banks])
        for bank, buffer in zip(banks, buffers):
            update = torch.add(bank.shard.grad, buffer, alpha=momentum)
            if self.cfg.muon_row_normalize:
                update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            update = orthogonalize(update, self.cfg.muon_backend_steps, self.ns_dtype, self.cfg.muon_ns).to(bank.shard.dtype)
            scale = math.sqrt(max(1.0, update.size(-2) / update.size(-1)))
            bank.shard.mul_(1 - group.lr * group.weight_decay).add_(update, alpha=-group.lr * scale)
            bank.start_gather()

    def _slots(self) -> Iterator[tuple[str, ShardedTensor | None, Tensor]]:
        """Every tensor of optimizer state: its name, the sharded parameter that it is cut like, and itself."""
        for name, buffers in self.momenta.items():
            for i, (tensor, buffer) in enumerate(zip(self.sharded[name], buffers)):
                yield f"{name}.{i}.momentum", tensor, buffer
        cut = {id(t.shard): t for t in self.large}
        params = [p for group in self.adamw.param_groups for p in group["params"]]
        for i, param in enumerate(params):
            state = self.adamw.state[param]
            if not state:  # AdamW fills it at its first step; a state can be put back before that
                state |= {"step": torch.zeros((), device=param.device)}
                state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            for key, value in state.items():
                yield f"adamw.{i}.{key}", cut.get(id(param)) if value.dim() else None, value

    def state(self) -> dict[str, Tensor]:
        """All optimizer state, copied; shards are joined, so that it is the same on every rank and for any number of them."""
        return {name: value.clone() if tensor is None else tensor.whole(value) for name, tensor, value in self._slots()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor, value in self._slots():
            value.copy_(state[name] if tensor is None else tensor.own_rows(state[name].cpu()))


# ======================================================================================================================
# 7. Training
#
# The schedules are functions of the finished share of the run, by time or by steps. The warm-up runs every graph and
# then puts back the complete state, the same state that a checkpoint holds.
# ======================================================================================================================


def depth_at(cfg: Config, frac: float) -> int:
    """Depth of the loop when the share `frac` of the run is done."""
    depths = cfg.train_loop_phase_depths
    if not depths:
        return 1 if frac < cfg.enable_looping_at else cfg.num_loops + 1
    shares = cfg.train_loop_phase_fractions or (1.0,) * len(depths)
    boundary = 0.0
    for depth, share in zip(depths, shares):
        boundary += share / sum(shares)
        if frac < boundary - 1e-12:
            return depth
    return depths[-1]


def learning_rate_scale(cfg: Config, frac: float) -> float:
    """1 until the warm-down begins, then falling to 0 at the end of the run, but never below MIN_LR."""
    if cfg.warmdown_frac == 0 or frac < 1 - cfg.warmdown_frac:
        return 1.0
    return max((1 - frac) / cfg.warmdown_frac, cfg.min_lr)


def muon_wd_scale(cfg: Config, frac: float) -> float:
    """1 until 70 % of the run, then falling to MUON_WD_TAPER at its end."""
    return 1 - (1 - cfg.muon_wd_taper) * min(max((frac - 0.7) / 0.3, 0.0), 1.0)


def compiled(run: Run, function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """`function(batch, ...)` through torch.compile without graph breaks, or as it is where compilation is off.

    Sizes are all dynamic or, but for the number of segments, all static: left to guess, the compiler would take the first
    packing for a constant and compile again in the middle of the run.
    """
    if not run.compile:
        return function
    torch._dynamo.config.cache_size_limit = 64  # one entry a depth and use; a full cache would be an error
    torch._dynamo.config.specialize_float = True  # no float here changes; as an input, a constant breaks the operators' own gradients
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.ban_recompute_long_fusible_chains = False  # keep no float32 input of a norm where the bfloat16 one gives it again
    inductor.comprehensive_padding = False  # rows of other strides than the operators were traced with: v would be copied for each
    if hasattr(inductor.triton, "mix_order_reduction"):  # torch 2.13 has it
        inductor.triton.mix_order_reduction = False  # it spills registers in the norms' backwards and saves 0.2 % of the bytes
    graph = torch.compile(function, fullgraph=True, dynamic=dynamic)

    def call(batch: Batch, *rest: Any, **named: Any) -> Any:
        torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return graph(batch, *rest, **named)

    return call


def graphs_made(run: Run) -> int:
    """How many graphs torch.compile has made in this process: what grows in a timed phase was not warmed up."""
    if not run.compile:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Trainer:
    """Model, optimizers, moving average and data position: all that a training run is at one step."""

    def __init__(self, run: Run, model: GPT, loader: TrainLoader) -> None:
        self.run, self.cfg, self.model, self.loader = run, run.cfg, model, loader
        self.optimizers = Optimizers(model, run.cfg, run.ranks)
        self.names, self.params = [name for name, _ in model.named_parameters()], [p.data for p in model.parameters()]
        self.ema = [p.clone() for p in self.params]
        self.forward = compiled(run, model)
        self.step = self.depth = 0
        self.end: tuple[int, float] | None = None  # position and time when training was over: there the Hessians begin, again if need be
        self.late_graphs = 0  # made after the warm-up, on the clock: there should be none
        self.reserve_seconds = run.cfg.gptq_reserve_seconds
        self.clock = Clock(run.device)

    def train_step(self, depth: int, lr_scale: float, wd_scale: float = 1.0) -> Tensor:
        """One step; the mean loss of this rank's tokens as a 0-d tensor, so that nothing waits for the device."""
        schedule, graphs = loop_schedule(self.cfg, depth), graphs_made(self.run)
        batches = self.loader.next()
        self.optimizers.zero_grad()
        total = torch.zeros((), device=self.run.device)
        for batch in batches:
            loss = self.forward(batch, schedule).mean() / len(batches)
            loss.backward()
            total += loss.detach()
        self.late_graphs += graphs_made(self.run) - graphs
        self.optimizers.step(lr_scale, self.step, wd_scale)
        torch._foreach_lerp_(self.ema, self.params, 1 - self.cfg.ema_decay)
        self.step += 1
        return total

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A copy of the complete state, the same on every rank: tensors by name, and numbers. A collective."""
        tensors = {"rng": torch.get_rng_state()}
        tensors |= {f"param.{name}": p.clone() for name, p in zip(self.names, self.params)}
        tensors |= {f"ema.{name}": p.clone() for name, p in zip(self.names, self.ema)}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizers.state().items()}
        position, elapsed_ms = self.end or (self.loader.position, self.clock.total_ms)
        return tensors, {"position": position, "elapsed_ms": elapsed_ms, "step": self.step, "depth": self.depth,
                         "trained": self.end is not None}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for kind, values in (("param", self.params), ("ema", self.ema)):
            for name, value in zip(self.names, values):
                value.copy_(tensors[f"{kind}.{name}"])
        self.optimizers.load_state({name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")})
        self.loader.seek(numbers["position"])
        self.step, self.depth, self.clock.total_ms = numbers["step"], numbers["depth"], numbers["elapsed_ms"]
        self.end = (numbers["position"], numbers["elapsed_ms"]) if numbers["trained"] else None
        torch.set_rng_state(tensors["rng"].cpu())

    def warm_up(self) -> None:
        """Run WARMUP_STEPS steps at the first depth and at each prewarmed one, then put everything back."""
        cfg, before, began = self.cfg, self.snapshot(), time.perf_counter()
        depths = list(dict.fromkeys([depth_at(cfg, 0.0), *cfg.train_loop_prewarm_depths]))
        for depth in depths if cfg.warmup_steps else []:
            for _ in range(cfg.warmup_steps):
                self.train_step(depth, 1.0)
            synchronize(self.run.device)
            self.run.log(f"warm-up: depth {depth} after {time.perf_counter() - began:.1f} s")
        self._reserve_time_for_hessians()
        self.restore(*before)
        self.loader.wait_ms, self.late_graphs = 0.0, 0

    def _reserve_time_for_hessians(self) -> None:
        """Keep what the Hessians will take, by the time of one batch, and a margin: they count as training; ValueError if that is all."""
        cfg, calibration, batch_ms = self.cfg, Calibration(self.cfg, self.run.device), 0.0
        if not cfg.max_wallclock_seconds:
            return
        for _ in range(2):  # the first has everything to load
            clock = Clock(self.run.device)
            clock.start()
            calibration.add(self.model, self.loader.next())
            batch_ms = max(self.run.ranks.gather(clock.stop()))
        need = 1.1e-3 * cfg.gptq_calibration_batches * batch_ms + 0.5
        self.reserve_seconds = max(cfg.gptq_reserve_seconds, need)
        self.run.log.record("reserve", seconds=f"{self.reserve_seconds:.2f}", batch_ms=f"{batch_ms:.1f}",
                            batches=cfg.gptq_calibration_batches)
        require(self.reserve_seconds < cfg.max_wallclock_seconds,
                f"the Hessians alone would take {need:.0f} s here, MAX_WALLCLOCK_SECONDS is {cfg.max_wallclock_seconds:g}: give it more "
                "time, or set GPTQ_CALIBRATION_BATCHES or TRAIN_BATCH_TOKENS lower")

    def load_averaged_weights(self) -> None:
        """From here on the model holds the moving average, which is what is exported."""
        torch._foreach_copy_(self.params, self.ema)
        self.end = self.loader.position, self.clock.total_ms


class Checkpoint:
    """What a run leaves on disk so that the same command goes on from there: one file, replaced as a whole, that rank 0 alone reads.

    It begins with the SHA-256 of the rest, a safetensors file. Its stages: "training" (the complete state), "exported" (the
    artifact, which has its own file in the next moment), "done".
    """

    def __init__(self, run: Run) -> None:
        self.run, self.path, self.last = run, output_path(run.cfg, ".state"), time.perf_counter()
        self.settings = checksum(identity(run.cfg, but={"checkpoint_every"}))
        self.record, self.tensors = {"stage": ""}, {}
        there = run.ranks.gather(self.path.exists())
        if any(there[1:]) and not there[0]:
            raise ValueError(f"{self.path} is on the machine of rank {there.index(True)} and not on that of rank 0: give the machines "
                             "their old places (--node_rank), or delete it to start again")
        if there[0] and run.ranks.rank == 0:
            self._read()
        self.record = run.ranks.agree(self.record)

    def due(self, step: int) -> bool:
        every = self.run.cfg.checkpoint_every
        if every.endswith("s"):
            return time.perf_counter() - self.last >= float(every[:-1])
        return every != "" and step % int(every) == 0

    def write(self, trainer: Trainer) -> None:
        """Save the state of this step, with the clock stopped. A collective."""
        trainer.clock.stop()
        tensors, numbers = trainer.snapshot()
        self._write("training", tensors, **numbers)
        self.last = time.perf_counter()
        self.run.log.record("checkpoint", step=trainer.step, path=self.path)
        trainer.clock.start()

    def resume(self, trainer: Trainer) -> None:
        """Put back the state that was found, if one was. A collective."""
        if self.record["stage"] != "training":
            return
        tensors = {name: t.cpu() for name, t in trainer.snapshot()[0].items()} | self.tensors  # the others' are read into
        self.run.ranks.share([tensors[name] for name in sorted(tensors)])
        trainer.restore(tensors, self.record)
        self.tensors = {}
        self.run.log(f"resumed from step {trainer.step}, {trainer.clock.total_ms / 1e3:.1f} s of training done")

    def export(self, data: bytes, **numbers: Any) -> None:
        """Write the artifact; from now on the run goes on with scoring it."""
        self._write("exported", {"artifact": as_tensor(data)}, **numbers)
        if self.run.ranks.rank == 0:
            write_atomically(output_path(self.run.cfg, ".artifact"), data)

    def exported(self) -> bytes:
        """The artifact, if it had been exported before this start, else nothing. A collective."""
        if self.record["stage"] != "exported":
            return b""
        self.run.log(f"the artifact of this run is there, after {self.record['steps']} steps: it is scored")
        data = self.run.ranks.agree(self.tensors["artifact"].numpy().tobytes() if self.tensors else b"")
        self.export(data, steps=self.record["steps"], train_ms=self.record["train_ms"])
        return data

    def done(self) -> None:
        self._write("done", {})

    def _write(self, stage: str, tensors: dict[str, Tensor], **numbers: Any) -> None:
        self.record = {"stage": stage, "settings": self.settings, **numbers}
        if self.run.ranks.rank == 0:
            tensors = {**tensors, "record": as_tensor(json.dumps(self.record).encode())}
            data = safetensors.torch.save({name: t.cpu().contiguous() for name, t in tensors.items()})
            write_atomically(self.path, hashlib.sha256(data).digest() + data)

    def _read(self) -> None:
        """The record and the tensors of the file; ValueError if the run cannot go on from it."""
        data = self.path.read_bytes()
        digest, data = data[:32], data[32:]
        require(hashlib.sha256(data).digest() == digest,
                f"{self.path} is damaged; delete it to start this run again, or choose another RUN_ID")
        self.tensors = safetensors.torch.load(data)
        self.record = json.loads(self.tensors.pop("record").numpy().tobytes())
        require(self.record["stage"] != "done", f"run {self.run.cfg.run_id} is complete: its log ends with the score; choose another "
                                                "RUN_ID, or score its artifact again with EVAL_ONLY=1")
        require(self.record["settings"] == self.settings, f"{self.path} is of a run with settings or code that differ from this one's; "
                                                          "start it as it was started, or choose another RUN_ID")


def checksum(values: dict[str, Any]) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def identity(cfg: Config, but: set[str]) -> dict[str, str]:
    """The code's hash and all settings but some, by the names that people know."""
    settings = {f.name.upper(): format_setting(getattr(cfg, f.name)) for f in fields(Config) if f.name not in but}
    return {**settings, "code": hashlib.sha256(counted_code()).hexdigest()}


def train(run: Run, trainer: Trainer, val: ValData, checkpoint: Checkpoint) -> None:
    """Train until the time cap (less the Hessians' reserve) or ITERATIONS; evaluation and checkpoints stop the clock.

    Stopped, if the run was asked to end, comes at the end of a step.
    """
    cfg, pace = run.cfg, Pace(trainer)
    trainer.clock.start()
    while True:
        done = pace.frac >= 1 or trainer.step >= cfg.iterations
        if cfg.val_loss_every and (trainer.step % cfg.val_loss_every == 0 or done):
            trainer.clock.stop()
            name = "final" if done else f"step{trainer.step}" if trainer.step else "initial"
            evaluate(run, trainer.model, val, name, cfg.eval_loop_depth if done else max(trainer.depth, depth_at(cfg, pace.frac)))
            trainer.clock.start()
        if done:
            break
        depth = depth_at(cfg, pace.frac)
        if depth != trainer.depth:
            trainer.depth = depth
            run.log.record("phase", step=trainer.step, frac=f"{pace.frac:.3f}", depth=depth)
        lr_scale = learning_rate_scale(cfg, pace.frac)
        loss = trainer.train_step(depth, lr_scale, muon_wd_scale(cfg, pace.frac))
        save, signalled = pace.after_step(checkpoint.due(trainer.step))
        pace.report(loss, lr_scale)
        if signalled:
            run.ranks.check_stop()
        if save:
            checkpoint.write(trainer)
    trainer.clock.stop()


class Pace:
    """What share of the run is done, the same on all ranks; keeps the host at most two steps ahead of the device; the train lines."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run, cfg, self.events = trainer, trainer.run, trainer.cfg, []
        self.budget_ms = 1e3 * (cfg.max_wallclock_seconds - trainer.reserve_seconds) if cfg.max_wallclock_seconds else 0.0
        self.last_step, self.last_ms = trainer.step, trainer.clock.total_ms
        self._set_frac(trainer.clock.total_ms)

    def _set_frac(self, elapsed_ms: float) -> None:
        self.frac = elapsed_ms / self.budget_ms if self.budget_ms else self.trainer.step / self.trainer.cfg.iterations

    def after_step(self, save: bool) -> tuple[bool, bool]:
        """Whether rank 0 wants to save, and whether a signal has come to any rank: one exchange a step, with rank 0's time."""
        if self.run.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        elapsed, saves, signals = zip(*self.run.ranks.gather((self.trainer.clock.elapsed_ms(), save, self.run.ranks.signalled)))
        self._set_frac(elapsed[0])
        return saves[0], any(signals)

    def report(self, loss: Tensor, lr_scale: float) -> None:
        """Now and then the line of a step whose loss on this rank was `loss`; a collective. ValueError if the mean is not finite."""
        cfg, trainer, log, step, frac = self.run.cfg, self.trainer, self.run.log, self.trainer.step, min(self.frac, 1.0)
        if not (step <= 5 or step % cfg.train_log_every == 0 or frac >= 1 or step == cfg.iterations):
            return
        mean, elapsed_ms = self.run.ranks.sum(loss).item() / self.run.ranks.world, trainer.clock.elapsed_ms()
        step_ms = (elapsed_ms - self.last_ms) / max(step - self.last_step, 1)
        self.last_step, self.last_ms = step, elapsed_ms
        log.record("train", step=f"{step}/{cfg.iterations}", frac=f"{frac:.3f}", depth=trainer.depth, loss=f"{mean:.4f}",
                   lr_scale=f"{lr_scale:.4f}", step_ms=f"{step_ms:.1f}", tok_s=int(1e3 * cfg.train_batch_tokens / step_ms),
                   elapsed_ms=int(elapsed_ms), left_ms=int(elapsed_ms * (1 - frac) / max(frac, 1e-9)),
                   wait_ms=f"{trainer.loader.wait_ms:.0f}", late_graphs=trainer.late_graphs)
        require(math.isfinite(mean), f"the loss is {mean} at step {step}; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
        is_record = self.budget_ms and cfg.train_batch_tokens >= Config.train_batch_tokens
        if step == 3 and is_record and self.budget_ms < 1000 * step_ms:  # while there is time to stop
            log(f"warning: at {step_ms / 1e3:.1f} s a step this machine takes about {self.budget_ms / step_ms:.0f} steps in "
                f"{cfg.max_wallclock_seconds:g} s; the published record took 4,600 on 8xH100 and the score will be far from it. To try the "
                "system here, stop this and run `bash run.sh`; to train long enough, set "
                f"MAX_WALLCLOCK_SECONDS={4600 * step_ms / 1e3:.0f}")


def check_memory(run: Run, layout: SpanLayout) -> None:
    """On a CPU, refuse a micro-batch that cannot fit; ValueError names what is needed, what is here and what to run."""
    cfg, have, local_ranks = run.cfg, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), run.ranks.local_world
    depth = max([cfg.eval_loop_depth, *cfg.train_loop_phase_depths])
    visits = cfg.num_layers + (depth - 1) * (cfg.loop_end - cfg.loop_start + 1)
    token = 4 * (visits * (15 + 3 * cfg.mlp_mult) * cfg.model_dim + cfg.vocab_size)  # kept for its backward: within 4 % of what torch does
    weights = 16 * sum(math.prod(row.shape) for row in parameter_table(cfg))  # values, gradients, average, optimizer state
    need = local_ranks * (token * layout.micro_tokens + weights)
    fits = max(1, int((0.7 * have / local_ranks - weights) / token))
    require(run.device.type != "cpu" or need <= 0.9 * have,
            f"a forward of {layout.micro_tokens} tokens needs about {need / 1e9:.0f} GB on this CPU, which has {have / 1e9:.0f} GB. "
            "The record's settings are for 8xH100: run `bash run.sh` for the same system at a size for this machine, or, to train "
            f"this one all the same, set MICRO_BATCH_TOKENS={2 ** int(math.log2(fits))} or less")


# ======================================================================================================================
# 8. Quantization
#
# GPTQ (Frantar et al. 2022): round a matrix column by column and let the columns still to come make up for the error, as
# the inverse Hessian of the layer's input says. All matrices of one group go through it together, shared out over the
# ranks. The scale of a row is set beforehand from its standard deviation. The method says what a code stands for: `scalar`
# rounds to the nearest step, `trellis` looks for the best path through two interleaved sets of levels.
# ======================================================================================================================


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix, or a bank of matrices, as small integers with one scale a row."""

    codes: Tensor  # (..., rows, cols) int8
    scales: Tensor  # (..., rows) float16
    method: str = "scalar"  # or "trellis"
    low_rank: tuple[LowRank, ...] = ()  # what is added to some of the matrices


class LowRank(NamedTuple):
    """A product A B for matrix `index` of a bank, in small integers: most of what GPTQ left of it (LQER, Zhang et al. 2024)."""

    index: int
    a: Tensor  # (rows, rank) int8, -2..1
    a_scales: Tensor  # (rank,) float16, or (1,) for all
    b: Tensor  # (rank, cols) int8, -8..7
    b_scales: Tensor  # (rank * cols / LQER_GROUP,) float16

    @classmethod
    def of(cls, index: int, a: Tensor, b: Tensor, cfg: Config) -> LowRank:
        """In integers: a (rows, rank), b (rank, cols)."""
        groups = b.reshape(-1, cfg.lqer_group)
        a_scales = (a.std(0) if cfg.lqer_column_scales else a.abs().max().reshape(1) / 1.5).clamp_min(2.0**-24).half()
        b_scales = (groups.abs().amax(1) / 7.5).clamp_min(2.0**-24).half()
        a = (a / a_scales.float()).round().clamp(-2, 1)
        b = (groups / b_scales.float()[:, None]).round().clamp(-8, 7).reshape(b.shape)
        return cls(index, a.to(torch.int8).cpu(), a_scales.cpu(), b.to(torch.int8).cpu(), b_scales.cpu())

    def product(self) -> Tensor:
        """(rows, cols) float32."""
        groups = self.b.reshape(len(self.b_scales), -1).float() * self.b_scales.float()[:, None]
        return (self.a.float() * self.a_scales.float()) @ groups.reshape(self.b.shape)


def best_product(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rows, rank) and B (rank, cols) nearest to an error. The levels are lopsided, so the sign is ruled: each row of B has its entry
    of largest size positive."""
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    signs = vt[:rank].gather(1, vt[:rank].abs().argmax(1, keepdim=True)).sign()
    return u[:, :rank] * s[:rank] * signs.T, vt[:rank] * signs


def correct_largest(cfg: Config, model: GPT, tensors: Tensors) -> None:
    """Give the LQER_TOP_K matrices with the largest errors their low-rank terms."""
    errors = {}  # of each matrix: (bank, index)
    for row in parameter_table(cfg):
        if row.matrices:
            left = model.get_parameter(row.name).detach() - dequantize(tensors[row.name]).to(model.tok_emb.weight.device)
            errors |= {(row.name, i): error for i, error in enumerate(left.reshape(-1, *row.shape[-2:]))}
    for name, i in sorted(errors, key=lambda key: -float(errors[key].norm()))[: cfg.lqer_top_k]:
        term = LowRank.of(i, *best_product(errors[name, i], cfg.lqer_rank), cfg)
        tensors[name] = replace(tensors[name], low_rank=(*tensors[name].low_rank, term))


def row_scales(weights: Tensor, bits: int, clip_sigmas: float, method: str) -> Tensor:
    """Step of every row, float16 (..., rows): clip_sigmas standard deviations over the largest code.

    A trellis has finer steps, with which its codes take as many bytes as scalar ones; no range needs clipping. Its scales keep 5 bits
    of mantissa: steps need not be more exact, and half of their bytes are saved.
    """
    steps = clip_sigmas * weights.std(dim=-1) / (2 ** (bits - 1) - 1)
    if method == "scalar":
        return steps.clamp(2.0**-24, 65504.0).to(torch.float16)
    mantissa, exponent = torch.frexp(steps * 0.533)
    return torch.ldexp((mantissa * 64).round() / 64, exponent).clamp(2.0**-20, 65000.0).to(torch.float16)


def scalar_round(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes and levels, which are the same, of values in steps."""
    codes = values.round().clamp_(-limit, limit)
    return codes, codes


def dequantize(quantized: Quantized) -> Tensor:
    """The weights that the codes stand for: levels * scales and the low-rank terms, float32 (..., rows, cols)."""
    levels = quantized.codes.float()
    if quantized.method == "trellis":
        levels = trellis_levels(levels, trellis_quantizers(quantized.codes).float())
    weights = levels * quantized.scales.float().unsqueeze(-1)
    for term in quantized.low_rank:
        weights.view(-1, *weights.shape[-2:])[term.index] += term.product()
    return weights


class Calibration:
    """A `linear` that also sums x^T x of every matrix's input, by layer; the visits of a looped layer add up."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.schedule = loop_schedule(cfg, cfg.eval_loop_depth)
        groups = {m.hessian: (m.last - m.first, row.shape[-1]) for row in parameter_table(cfg) for m in row.matrices}
        self.hessians = {name: torch.zeros(n, d, d, device=device) for name, (n, d) in groups.items()}

    @torch.no_grad()
    def add(self, model: GPT, batches: list[Batch]) -> None:
        """Sum over these batches as well."""
        for batch in batches:
            model(batch, self.schedule, self)

    def __call__(self, site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
        layer, _, name = site
        if name in self.hessians:
            hessian = self.hessians[name][max(layer, 0)]
            if x.dtype == torch.float32:
                hessian.addmm_(x.T, x)
            else:
                hessian.add_(torch.mm(x.T, x, out_dtype=torch.float32))
        return plain_linear(site, x, w)


def collect_hessians(run: Run, model: GPT, loader: TrainLoader) -> dict[str, Tensor]:
    """Sums of x^T x over GPTQ_CALIBRATION_BATCHES batches of training data at EVAL_LOOP_DEPTH, over all ranks.

    Returns:
        By site: "attn_in", "proj", "up" (L, d, d), "down" (L, h, h), "head" (1, d, d), float32.
    """
    cfg, began, progress = run.cfg, time.perf_counter(), Progress(run.log)
    calibration = Calibration(cfg, run.device)
    for i in range(cfg.gptq_calibration_batches):
        run.ranks.check_stop()
        calibration.add(model, loader.next())
        progress("hessians", i + 1, cfg.gptq_calibration_batches)
    for hessian in calibration.hessians.values():
        run.ranks.sum(hessian)
    diagonal = calibration.hessians["head"].diagonal(dim1=-2, dim2=-1)
    diagonal += cfg.embed_damping * diagonal.mean()
    synchronize(run.device)
    run.log.record("hessians", batches=cfg.gptq_calibration_batches, tokens=cfg.gptq_calibration_batches * cfg.train_batch_tokens,
                   time_ms=int(since_ms(began)))
    return calibration.hessians


def hessian_error(error: Tensor, hessian: Tensor) -> Tensor:
    """trace(E H E^T) of error (N, R, C), (N,): the squared error of the layer's outputs over the calibration inputs."""
    return ((error @ hessian) * error).sum((-2, -1))


def damped_factor(hessian: Tensor, log: Log) -> Tensor:
    """Lower Cholesky factors of hessian (N, C, C), damped in place by 1 % of the mean diagonal, more if it must be."""
    diagonal, damped = hessian.diagonal(dim1=-2, dim2=-1), 0.0
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    for damping in (0.01, 0.1, 1.0, 10.0):
        diagonal += (damping - damped) * mean
        damped = damping
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.any():
            return factor
        log(f"warning: a Hessian is not positive definite at damping {damping:g} of its mean diagonal; using more")
    raise ValueError("a Hessian cannot be factored at any damping: the calibration inputs are not finite or far too large")


def gptq(weights: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, log: Log, method: str = "scalar") -> Quantized:
    """Quantize matrices weights (N, R, C) against hessian (N, C, C), damped; never worse by it than rounding to nearest.

    Columns go in order of descending diagonal; columns that no input reaches become 0.

    Raises:
        ValueError: a weight or Hessian is not finite, or no damping makes a Hessian positive definite.
    """
    weights, hessian = weights.float(), hessian.float()
    if not all(torch.isfinite(torch.stack(t.aminmax())).all() for t in (weights, hessian)):
        raise ValueError("a weight or its Hessian is NaN or infinite: the training diverged; lower the learning rates")
    scales, coarse = row_scales(weights, bits, clip_sigmas, method), row_scales(weights, bits, clip_sigmas, "scalar").float()[:, None]
    nearest = rounding = partial(scalar_round, limit=2 ** (bits - 1) - 1)
    if method == "trellis":
        rounding = partial(trellis_round, segments=trellis_segments(*weights.shape[1:]))
    steps, diagonal = scales.float(), hessian.diagonal(dim1=-2, dim2=-1)
    order = torch.argsort(diagonal, dim=-1, descending=True, stable=True).flip(-1)[..., None]  # (N, C, 1): the first one last
    columns = weights.masked_fill(diagonal[:, None] == 0, 0.0).mT  # (N, C, R): a column is contiguous from here on
    columns = columns.gather(1, order.expand_as(columns))
    permuted = hessian.gather(1, order.expand_as(hessian)).gather(2, order.mT.expand_as(hessian))
    sorted_diagonal = permuted.diagonal(dim1=-2, dim2=-1)
    sorted_diagonal += sorted_diagonal == 0
    factor = damped_factor(permuted, log)
    codes, error = gptq_columns(columns, factor, steps, rounding)
    missed = nearest(columns / coarse)[1].mul_(coarse).sub_(columns)
    for index in nearest_is_better(missed, factor, error).nonzero().ravel().tolist():  # so little to gain that feedback does harm
        codes[index] = rounding(columns[index] / steps[index])[0]
    codes = torch.empty_like(codes).scatter_(1, order.expand_as(codes), codes).mT.contiguous()
    return Quantized(codes.cpu(), scales.cpu(), method)


def gptq_columns(columns: Tensor, factor: Tensor, steps: Tensor, rounding: Callable) -> tuple[Tensor, Tensor]:
    """Codes (N, C, R) int8 of columns (N, C, R) by the Hessian's lower factor (N, C, C), the last column first; errors (N,).

    With H = L L^T and E = weights - levels * steps, the outputs' squared error trace(E H E^T) is |E L|^2, and column k of E L is
    L_kk (E_k + sum over j > k of E_j L_jk / L_kk): so k aims at its weights plus that sum. It is what the inverse Hessian's factor
    gives (Frantar et al. 2022), without the inverse. The sum is taken by halves, so that nearly all of it is matrix products.
    """
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    feedback, aims = factor / pivots[:, None], columns.clone()
    codes, errors = torch.empty_like(columns, dtype=torch.int8), torch.empty_like(columns)

    def quantize_range(begin: int, end: int) -> None:
        if end - begin > 16:
            middle = (begin + end) // 2
            quantize_range(middle, end)
            aims[:, begin:middle].baddbmm_(feedback[:, middle:end, begin:middle].mT, errors[:, middle:end])
            quantize_range(begin, middle)
            return
        for j in reversed(range(begin, end)):
            codes[:, j], levels = rounding(aims[:, j] / steps)
            errors[:, j] = columns[:, j] - levels * steps
            aims[:, begin:j].addcmul_(feedback[:, j, begin:j, None], errors[:, j: j + 1])

    quantize_range(0, columns.size(1))
    missed = aims.sub_(columns).add_(errors)  # by how much each level is off its aim
    return codes, (missed.square_().sum(-1) * pivots.square()).sum(-1)


def nearest_is_better(error: Tensor, factor: Tensor, bound: Tensor, block: int = 128) -> Tensor:
    """Is |E L|^2 of error E^T (N, C, R) and lower factor L (N, C, C) below `bound`, (N,)? Followed only until no one's is."""
    total = torch.zeros_like(bound)
    for begin in reversed(range(0, factor.size(-1), block)):
        total += (factor[:, begin:, begin: begin + block].mT @ error[:, begin:]).square_().sum((1, 2))
        if (total >= bound).all():
            break
    return total < bound


# ---- trellis ----
# Entropy-coded trellis quantization (Marcellin and Fischer 1990; two interleaved quantizers as in video coding). The
# step is half as wide as a scalar one would be at the same size, but a code can only name every second level: the even
# ones in quantizer 0, 0 and the odd ones in quantizer 1. Which of the two holds follows from the parities of the codes
# above it in the same column, through a shift register; so the encoder looks for the path through all the register's
# states whose levels lie nearest, and the reader follows the parities. The error is that of scalar rounding with about
# 0.18 bits a weight more.

TRELLIS_STATES = 64
TRELLIS_TAPS = (17, 54)
TRELLIS_ZERO_COST = 0.2


def trellis_segments(rows: int, cols: int) -> int:
    """Independent trellises in a column: row r follows row r - trellis_segments. In a tall matrix, an embedding, there
    are more of them, because the coder takes as many rows at once."""
    return max(1, -(-rows // (128 if rows >= 8 * cols else 256)))


def trellis_next_states(device: torch.device | str = "cpu") -> Tensor:
    """(TRELLIS_STATES, 2) int64: the state that follows a state, by the parity of the code written in it.

    The lowest bit of a state names the quantizer of the next code.
    """
    state, parity = torch.arange(TRELLIS_STATES, device=device)[:, None], torch.arange(2, device=device)
    return (state >> 1) ^ (TRELLIS_TAPS[0] * parity) ^ (TRELLIS_TAPS[1] * (state & 1))


def trellis_quantizers(codes: Tensor) -> Tensor:
    """Which quantizer (0 or 1) each of codes (..., rows, cols) was written in; the codes alone tell."""
    next_states, (rows, cols) = trellis_next_states(codes.device), codes.shape[-2:]
    segments = trellis_segments(rows, cols)
    steps = F.pad(codes, (0, 0, 0, -rows % segments)).unflatten(-2, (-1, segments))  # (..., steps, segments, cols)
    quantizers, state = torch.empty_like(steps), torch.zeros_like(steps[..., 0, :, :], dtype=torch.int64)
    for i in range(steps.shape[-3]):
        quantizers[..., i, :, :] = state & 1
        state = next_states[state, steps[..., i, :, :].long() & 1]
    return quantizers.flatten(-3, -2)[..., :rows, :]


def trellis_levels(codes: Any, quantizers: Any) -> Any:
    """What codes stand for, in steps: 2k in quantizer 0, 2k - sign(k) in quantizer 1. Tensors or numpy arrays."""
    return 2 * codes - quantizers * ((codes > 0) * 1 - (codes < 0) * 1)


def nearest_by_subset(values: Tensor) -> Tensor:
    """(4, ...): the codes whose levels are nearest to values in quantizer 0 with an even code, odd, quantizer 1 even, odd."""
    sign, size = values.sign(), values.abs()
    even = torch.where(size < 1.5, 0.0, 2 * ((size + 1) / 4).round().clamp(min=1))
    odd = 1 + 2 * ((size - 1) / 4).round().clamp(min=0)
    return torch.stack([2 * (values / 4).round(), 2 * (values / 4).floor() + 1, sign * even, sign * odd])


def trellis_round(values: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Codes and levels of values (columns, rows), which are in steps: least distance plus a price for the bits.

    For a Gaussian the price of a level grows with its square, so it comes to shrinking the values first. All segments
    start in state 0, so that they, and all columns, go down the trellis side by side.
    """
    columns, rows = values.shape
    shrunk = values / (1 + 0.23 / values.square().mean(-1, keepdim=True).clamp_min(1.0))
    lanes = F.pad(shrunk.clamp(-250, 250), (0, -rows % segments)).reshape(columns, -1, segments)
    lanes = lanes.transpose(0, 1).reshape(-1, columns * segments)  # (steps, lanes)
    codes, levels = (found.reshape(-1, columns, segments).transpose(0, 1).reshape(columns, -1)[:, :rows]
                     for found in trellis_search(lanes))
    return codes, levels


def trellis_search(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and levels of values (steps, lanes) by Viterbi's algorithm: least squared distance, and a price for 0 in quantizer 1."""
    next_states = trellis_next_states(values.device)
    edges = next_states.ravel().argsort(stable=True).reshape(-1, 2).T.ravel()  # into each state one, then another
    sources, subsets = edges // 2, (edges // 2 & 1) * 2 + (edges & 1)
    candidates = nearest_by_subset(values)
    quantizers = torch.tensor([0, 0, 1, 1], device=values.device).reshape(4, 1, 1)
    levels = trellis_levels(candidates, quantizers)
    costs = (levels - values).square_()
    costs[2] += TRELLIS_ZERO_COST * (candidates[2] == 0)
    costs = costs.transpose(0, 1).contiguous()  # (steps, 4, lanes)
    total = torch.full((TRELLIS_STATES, values.size(1)), 1e9, device=values.device)
    total[0] = 0
    by_second = torch.empty((len(values), *total.shape), dtype=torch.bool, device=values.device)
    for step in range(len(values)):
        first, second = total[sources].add_(costs[step][subsets]).view(2, *total.shape)
        torch.lt(second, first, out=by_second[step])
        total = torch.minimum(first, second)
    state, lane = total.argmin(0), torch.arange(values.size(1), device=values.device)
    path = torch.empty(1, *values.shape, dtype=torch.int64, device=values.device)
    for step in range(len(values) - 1, -1, -1):
        edge = state + TRELLIS_STATES * by_second[step, state, lane]
        path[0, step] = subsets[edge]
        state = sources[edge]
    return candidates.gather(0, path)[0], levels.gather(0, path)[0]


Tensors = dict[str, "Tensor | Quantized"]  # a model as an artifact stores it, by parameter


@torch.no_grad()
def quantize(run: Run, model: GPT, hessians: dict[str, Tensor], clip_factor: float = 1.0) -> tuple[Tensors, float]:
    """Every parameter as the artifact stores it, and the sum of the matrices' Hessian-weighted squared errors.

    GPTQ for the matrices, with their clip sigmas times clip_factor; int8 or float16, as the table says, for the rest.
    """
    tensors: Tensors = {}
    total_error = 0.0
    for row in parameter_table(run.cfg):
        value = model.get_parameter(row.name).detach()
        if not torch.isfinite(value).all():
            raise ValueError(f"{row.name} is NaN or infinite: the training diverged; lower the learning rates")
        if row.matrices:
            tensors[row.name], error = quantize_bank(run, row, value, hessians, clip_factor)
            total_error += error
        elif row.int8:
            tensors[row.name] = rows_of_int8(value)
        else:
            tensors[row.name] = value.clamp(-65504.0, 65504.0).to(torch.float16).cpu()
    if run.cfg.lqer_enabled:
        correct_largest(run.cfg, model, tensors)
    return tensors, total_error


def rows_of_int8(value: Tensor) -> Quantized:
    """A small matrix (rows, cols), rounded to nearest, a row's largest size being 127."""
    scales = (value.abs().amax(-1) / 127).clamp(2.0**-24, 65504.0).to(torch.float16)
    codes = (value / scales.float()[:, None]).round().clamp(-127, 127)
    return Quantized(codes.to(torch.int8).cpu(), scales.cpu())


def quantize_bank(run: Run, row: Row, value: Tensor, hessians: dict[str, Tensor], clip_factor: float) -> tuple[Quantized, float]:
    """The matrices of a parameter, each group shared out over the ranks, and their Hessian-weighted squared error. A collective.

    Logs how large the error of each group's outputs is, relative to the outputs.
    """
    ranks, bank, parts, total_error = run.ranks, value.reshape(-1, *row.shape[-2:]), [], 0.0
    for group in row.matrices:
        ranks.check_stop()
        count, clip_sigmas = group.last - group.first, group.clip_sigmas * clip_factor
        first, last = (count * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
        weights, hessian = bank[group.first + first: group.first + last], hessians[group.hessian][first:last]
        energy, part = torch.zeros(2, dtype=torch.float64, device=run.device), None
        if first < last:
            part = gptq(weights, hessian, group.bits, clip_sigmas, run.log, run.cfg.quantizer)
            error = dequantize(part).to(run.device) - weights
            energy += torch.stack([hessian_error(e.float(), hessian).double().sum() for e in (error, weights)])
        ranks.sum(energy)
        run.log.record("gptq", tensor=row.name, first=group.first, matrices=count, clip_sigmas=f"{clip_sigmas:.4f}",
                       relative_error=f"{(energy[0] / energy[1].clamp_min(1e-30)).item():.4e}")
        parts += [p for p in ranks.gather(part) if p is not None]
        total_error += energy[0].item()
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    return Quantized(codes.reshape(row.shape), scales.reshape(row.shape[:-1]), run.cfg.quantizer), total_error


TARGET_SLACK = 0.001


def quantize_and_pack(run: Run, model: GPT, hessians: dict[str, Tensor], code_bytes: int) -> tuple[Tensors, bytes]:
    """The tensors and, on rank 0, the artifact. ARTIFACT_TARGET_BYTES, if set, is filled up to TARGET_SLACK.

    If it is not, the clip sigmas stay as they were set, unless the artifact would be over the cap: then it is made to fit.

    Scaling every step by a factor takes log2(factor) bits off every weight, so two rounds are enough as a rule. The
    last that fitted wins, else the smallest; the factor is bounded, because a small model cannot fill any number of bytes.
    """
    cfg, target, factor = run.cfg, run.cfg.artifact_target_bytes, 1.0
    best, best_size, error_as_set = ({}, b""), math.inf, 0.0
    progress = Progress(run.log)

    def tick(done: float, total: float) -> None:
        progress("pack", done, total)
        if run.ranks.signalled:
            raise Stopped(run.ranks.signalled)

    for attempt in range(4):
        tensors, error = quantize(run, model, hessians, factor)
        data = b""
        with suppress(Stopped):  # which all ranks hear of in the next line
            data = pack_artifact(tensors, cfg, tick) if run.ranks.rank == 0 else b""
        run.ranks.check_stop()
        size = run.ranks.agree(len(data)) + code_bytes
        if not target:
            if size <= ARTIFACT_CAP_BYTES:
                return tensors, data
            run.log(f"warning: artifact and code are {size} bytes, over the cap of {ARTIFACT_CAP_BYTES}: all clip sigmas are "
                    "raised until they fit; COMPRESSOR=rans or QUANTIZER=trellis take fewer bytes")
            target = ARTIFACT_CAP_BYTES
        error_as_set = error_as_set or error
        run.log.record("fit", attempt=attempt + 1, clip_factor=f"{factor:.5f}", total_bytes=size, target_bytes=target,
                       hessian_error=f"{error:.4e}", saved=f"{1 - error / max(error_as_set, 1e-30):.4f}")
        if size <= max(target, best_size - 1):
            best, best_size = (tensors, data), size
        if (1 - TARGET_SLACK) * target <= size <= target:
            break
        weights = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Quantized))
        wanted = factor * 2 ** (8 * (size - (1 - TARGET_SLACK / 2) * target) / weights)
        before, factor = factor, min(max(wanted, 0.4), 2.5)
        if factor == before:
            break
    return best


def model_from_tensors(run: Run, tensors: Tensors) -> GPT:
    """The model that an artifact's tensors are, on the run's device."""
    model = GPT(run.cfg, run.dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            value = tensors[name]
            param.copy_(dequantize(value) if isinstance(value, Quantized) else value.float())
    return model.to(run.device)


# ======================================================================================================================
# 9. Artifact
#
# One file holds everything that evaluation needs: the stored settings and the tensors of the parameter table. The table
# follows from the settings, so the file carries none of its own, and whatever in it does not fit is an ArtifactError before
# memory is taken for it. Integers are little-endian:
#
#     offset  size  field
#     0       8     magic "\x89CAPSGP3"
#     8       4     P, bytes of the packed part
#     12      32    SHA-256 of everything else in the file
#     44      P     a safetensors file under brotli: "settings" (JSON as bytes), a float16 tensor for every plain parameter,
#                   NAME.scales and NAME.codes (columns together) for every quantized one, NAME.lowI.* for its matrices with LQER
#     44+P    ...   with COMPRESSOR=rans: the codes of the matrices, by the coder below, in place of their NAME.codes
# ======================================================================================================================

ARTIFACT_MAGIC = b"\x89CAPSGP3"
ARTIFACT_PREFIX = struct.Struct("<8sI32s")
ARTIFACT_MAX_FILE_BYTES = 1 << 27
ARTIFACT_MAX_PLAIN_BYTES = 1 << 28
ARTIFACT_MAX_WEIGHTS = 1 << 26  # whatever their bits, the bounds above hold
ARTIFACT_MAX_CODES_PER_BYTE = 128  # a sixteenth of a bit each: bounds the work that a small file can ask for


class ArtifactError(ValueError):
    """The file is no artifact of this program, or it is damaged."""


def pack_artifact(tensors: Tensors, cfg: Config, tick: Callable[[float, float], None] = lambda done, total: None) -> bytes:
    """The bytes of an artifact file; unpack_artifact gives back the same integers and the same floats, bit for bit.

    `tick` hears now and then how many bytes of how many are compressed.
    """
    header = {"compressor": cfg.compressor, "settings": {f.name: getattr(cfg, f.name) for f in STORED_SETTINGS}}
    plain = {"settings": as_tensor(json.dumps(header, allow_nan=False).encode())}
    banks = []
    for row in parameter_table(cfg):
        tensor = tensors[row.name]
        if not isinstance(tensor, Quantized):
            plain[row.name] = tensor.contiguous()
            continue
        plain[row.name + ".scales"] = tensor.scales.contiguous()
        for term in tensor.low_rank:
            plain |= {f"{row.name}.low{term.index}.{part}": t.contiguous() for part, t in zip(LowRank._fields[1:], term[1:])}
        if row.matrices and cfg.compressor == "rans":
            banks += row_banks(row, tensor)
        else:
            plain[row.name + ".codes"] = tensor.codes.mT.contiguous()
    coded = join_streams(encode_codes(banks)) if banks else b""
    if sum(bank.codes.size for bank in banks) > ARTIFACT_MAX_CODES_PER_BYTE * len(coded):  # hardly anything but zeros, in banks of any size
        return pack_artifact(tensors, replace(cfg, compressor="brotli"), tick)
    packed = compress(safetensors.torch.save(plain), tick)
    start = struct.pack("<8sI", ARTIFACT_MAGIC, len(packed))
    return start + hashlib.sha256(start + packed + coded).digest() + packed + coded


def open_artifact(data: bytes) -> tuple[Config, str, dict[str, Tensor], bytes]:
    """The settings of an artifact, all others at their defaults, its compressor, its plain tensors and its coded part.

    Raises:
        ArtifactError: the file is damaged or no artifact, or its settings are not allowed.
    """
    if len(data) < ARTIFACT_PREFIX.size or data[:8] != ARTIFACT_MAGIC:
        raise ArtifactError("this is not an artifact of this train_gpt.py (wrong first bytes)")
    _, packed_bytes, digest = ARTIFACT_PREFIX.unpack_from(data)
    body = data[ARTIFACT_PREFIX.size:]
    if hashlib.sha256(data[:12] + body).digest() != digest:
        raise ArtifactError("the artifact is cut short or damaged (its checksum does not match); copy or make it again")
    if packed_bytes > len(body):
        raise ArtifactError("the artifact's packed part is longer than the file")
    try:
        plain = safetensors.torch.load(decompress(body[:packed_bytes], ARTIFACT_MAX_PLAIN_BYTES))
    except (safetensors.SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError, KeyError) as error:
        raise ArtifactError(f"the artifact's packed part is no safetensors file ({str(error)[:200]})") from error
    return *stored_config(plain.pop("settings", torch.zeros(0))), plain, body[packed_bytes:]


def unpack_artifact(data: bytes) -> tuple[Config, Tensors]:
    """The settings and the tensors of an artifact, on the CPU; ArtifactError if anything in it does not fit."""
    cfg, compressor, plain, coded = open_artifact(data)
    return cfg, take_tensors(cfg, compressor, plain, coded)


def stored_config(stored: Tensor) -> tuple[Config, str]:
    """The settings in an artifact's header, every one of them checked, and its compressor."""
    try:
        header = json.loads(stored.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the artifact's settings are not JSON") from error
    if not isinstance(header, dict) or set(header) != {"compressor", "settings"} or header["compressor"] not in ("brotli", "rans"):
        raise ArtifactError("the artifact's header is not of this program")
    settings = header["settings"]
    if not isinstance(settings, dict) or set(settings) != {f.name for f in STORED_SETTINGS}:
        raise ArtifactError("the artifact has not the settings of this program's models")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    for f in STORED_SETTINGS:
        if not is_allowed(f, values[f.name]):
            raise ArtifactError(f"the artifact's {f.name.upper()}={str(values[f.name])[:100]} must be {f.metadata['check'].text}")
    cfg = replace(Config(val_batch_tokens=max(Config.val_batch_tokens, 8 * values["eval_seq_len"])), **values)
    try:
        cfg.check_together()
    except ValueError as error:
        raise ArtifactError(f"the artifact's settings do not go together: {error}") from error
    return cfg, header["compressor"]


def take_tensors(cfg: Config, compressor: str, plain: dict[str, Tensor], coded: bytes) -> Tensors:
    """The tensors of the parameter table out of an artifact's two parts, which they use up."""
    table, rank, rans = parameter_table(cfg), cfg.lqer_rank, compressor == "rans"
    codes = sum(math.prod(row.shape) for row in table if row.matrices and rans)
    if codes > ARTIFACT_MAX_CODES_PER_BYTE * len(coded):
        raise ArtifactError(f"the artifact's settings ask for {codes} codes, which cannot be in {len(coded)} bytes")

    def take(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = plain.pop(name, None)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ArtifactError(f"the artifact does not hold this model: {name} must be {dtype} {shape}, it is {found}")
        if dtype.is_floating_point and not torch.isfinite(tensor).all():
            raise ArtifactError(f"the artifact's {name} is not finite")
        return tensor

    tensors: Tensors = {}
    for row in table:
        name, shape = row.name, row.shape
        if not row.matrices and not row.int8:
            tensors[name] = take(name, torch.float16, *shape)
            continue
        *banks, rows, cols = shape
        scales = take(name + ".scales", torch.float16, *banks, rows)
        values = torch.zeros(shape, dtype=torch.int8) if row.matrices and rans else take(name + ".codes", torch.int8, *banks, cols, rows).mT
        parts = {"a": (torch.int8, rows, rank), "a_scales": (torch.float16, rank if cfg.lqer_column_scales else 1),
                 "b": (torch.int8, rank, cols), "b_scales": (torch.float16, rank * cols // cfg.lqer_group)}
        low_rank = tuple(LowRank(i, *(take(f"{name}.low{i}.{part}", *kind) for part, kind in parts.items()))
                         for i in range(math.prod(banks)) if cfg.lqer_enabled and f"{name}.low{i}.a" in plain)
        tensors[name] = Quantized(values.contiguous(), scales, cfg.quantizer if row.matrices else "scalar", low_rank)
    if plain or (coded and not rans):
        raise ArtifactError(f"the artifact holds more than its model: {', '.join([*plain][:3]) or f'{len(coded)} bytes'}")
    if rans:
        decode_codes(cut_streams(coded), [bank for row in table if row.matrices for bank in row_banks(row, tensors[row.name])])
    return tensors


def row_banks(row: Row, quantized: Quantized) -> list[Bank]:
    """The codes of a parameter by groups of matrices (matrices, rows, cols), sharing memory."""
    codes = quantized.codes.reshape(-1, *quantized.codes.shape[-2:]).numpy()
    return [Bank(codes[g.first: g.last], quantized.method == "trellis", across=g.hessian in ("proj", "down")) for g in row.matrices]


def join_streams(streams: list[bytes]) -> bytes:
    """[bytes, ...] -> their number and lengths, then themselves."""
    return struct.pack(f"<{len(streams) + 1}I", len(streams), *map(len, streams)) + b"".join(streams)


def cut_streams(joined: bytes) -> list[bytes]:
    """The inverse of join_streams; ArtifactError unless it adds up."""
    count = int.from_bytes(joined[:4], "little")
    lengths = struct.unpack_from(f"<{count}I", joined, 4) if len(joined) >= 4 * (count + 1) else ()
    ends = np.cumsum([4 * (count + 1), *lengths]).tolist()
    if ends[-1] != len(joined):
        raise ArtifactError("the artifact's streams do not add up to its coded part")
    return [joined[start:end] for start, end in zip(ends, ends[1:])]


def compress(data: bytes, tick: Callable[[float, float], None], step: int = 1 << 18) -> bytes:
    """brotli.compress at its best, half a megabyte a second or so."""
    packer, parts = brotli.Compressor(quality=11, lgwin=24), []
    for at in range(0, len(data), step):
        tick(at, len(data))
        parts.append(packer.process(data[at: at + step]))
    return b"".join([*parts, packer.finish()])


def decompress(stream: bytes, limit: int) -> bytes:
    """What a brotli stream holds, at most `limit` bytes; it is never expanded much further."""
    decoder = brotli.Decompressor()
    try:
        found = decoder.process(stream, output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise ArtifactError("a part of the artifact cannot be decompressed") from error
    if len(found) > limit or not decoder.is_finished():
        raise ArtifactError("a part of the artifact is cut short, or larger than a model can be")
    return found


def size_table(data: bytes, tensors: Tensors, cfg: Config) -> list[dict[str, str | int]]:
    """Where the bytes of an artifact with these tensors are: one row for every matrix bank in the coder, one for the rest.

    Columns: tensor, weights, bytes, bits_per_weight (scales not included) and entropy: bits a weight of the best code that
    knows nothing but the tensor (and the quantizer of a trellis).
    """
    coded = data[ARTIFACT_PREFIX.size + ARTIFACT_PREFIX.unpack_from(data)[1]:]
    sizes, rows, rest = map(len, cut_streams(coded)[2:] if coded else ()), [], len(data)
    for row in parameter_table(cfg):
        if row.matrices:
            codes, size = tensors[row.name].codes.int(), sum(itertools.islice(sizes, len(row.matrices)))
            quantizers = trellis_quantizers(codes) if tensors[row.name].method == "trellis" else 0
            counts = np.bincount((codes + 128 + 256 * quantizers).ravel().numpy(), minlength=512).reshape(2, 256)
            rows.append({"tensor": row.name, "weights": codes.numel(),
                         **({"bytes": size, "bits_per_weight": f"{8 * size / codes.numel():.4f}"} if size else {}),
                         "entropy": f"{entropy_bits(counts) / codes.numel():.4f}"})
            rest -= size
    return [*rows, {"tensor": "rest", "bytes": rest}]


# ---- code ----
# The rules count the code with the model. What a record folder ships as its train_gpt.py, and what therefore counts, is the
# packed file (`python train_gpt.py --pack`): a few readable lines that run a brotli payload, which is this source less what it
# runs without: comments, docstrings, blanks, most annotations, and what packs it, which stands under `if not PACKED`. The readable
# source lies beside it in source/; a run from either makes the same artifact.

PACKED = "PACKED_SOURCE" in globals()

if not PACKED:
    import ast
    import tokenize

    PACKED_HEAD = b'''# coding: latin-1
"""Packed: source/train_gpt.py beside it is what it runs, to be read."""
import brotli, linecache
PACKED_SOURCE = brotli.decompress("""'''
    PACKED_TAIL = b'''""".encode("latin-1"))
linecache.cache["packed.py"] = len(PACKED_SOURCE), None, PACKED_SOURCE.decode().splitlines(True), "packed.py"
exec(compile(PACKED_SOURCE, "packed.py", "exec"))
'''
    PACKED_ESCAPES = (r"\\", r"\\\\"), ("\r", r"\\r"), ("\0(?=[0-7])", r"\\x00"), ("\0", r"\\0"), (r'"(?="|\Z)', r'\\"')
    BLIND_DECORATORS = {"property", "classmethod", "staticmethod", "lru_cache", "torch.no_grad"}

    def needless_spans(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Rows and columns, from and up to, of what is not shipped; annotations stay where a decorator may read them."""
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "not PACKED":
                yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) and len(node.body) > 1:
                yield (node.body[0].lineno, node.body[0].col_offset), (node.body[0].end_lineno, node.body[0].end_col_offset)
            if isinstance(node, ast.FunctionDef) and {ast.unparse(d).partition("(")[0] for d in node.decorator_list} <= BLIND_DECORATORS:
                for arg in ast.walk(node.args):
                    if isinstance(arg, ast.arg) and arg.annotation:
                        yield (arg.lineno, arg.col_offset + len(arg.arg)), (arg.end_lineno, arg.end_col_offset)
                if (last := node.returns) is not None:
                    yield (last.lineno, last.col_offset - len("-> ")), (last.end_lineno, last.end_col_offset)

    def joints(source: str) -> dict[tuple[int, int], str]:
        """Rows and columns of statements that go on the line of the one before, or of their block's head, and what comes between."""
        found = {}
        for node in ast.walk(ast.parse(source)):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) and len(node.body) > 1
            for body in (getattr(node, part, None) for part in ("body", "orelse", "finalbody")):
                if isinstance(body, list):
                    body = body[bool(documented):]
                    simple = [not {"body", "cases"} & {*statement._fields} for statement in body]
                    found |= {(s.lineno, s.col_offset): ";" for s, *both in zip(body[1:], simple, simple[1:]) if all(both)}
                    found |= {(s.lineno, s.col_offset): "" for s in body[:1] if all(simple) and not isinstance(node, ast.Module)}
        return found

    def shipped_source(source: str) -> str:
        """`source` without all that: what the packed file runs."""
        lines = [0, *itertools.accumulate(map(len, io.StringIO(source)))]  # where they begin
        joined, spans, shipped, depth, f_strings, end = joints(source), sorted(needless_spans(source)), "\n", 0, 0, 0
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind, before = tokenize.tok_name[token.type], end
            begin, end = (lines[row - 1] + column for row, column in (token.start, token.end))
            text = source[begin:end]
            while spans and spans[0][1] <= token.start:
                spans.pop(0)
            needless = bool(spans) and spans[0][0] <= token.start
            depth += (kind == "INDENT") - (kind == "DEDENT")
            if f_strings and not needless:  # which Python takes apart from 3.12 on
                text = source[before:end]
            elif kind == "NEWLINE":
                text = "" if shipped[-1] == "\n" else "\n"
            elif kind in ("COMMENT", "NL", "INDENT", "DEDENT", "ENDMARKER") or needless:
                text = ""
            elif shipped[-1] == "\n" and token.start in joined:
                shipped, text = shipped[:-1], joined[token.start] + text
            elif shipped[-1] == "\n":
                text = " " * depth + text
            elif re.fullmatch(r"\w\w|['\"]{2}", shipped[-1] + text[0]):
                text = " " + text
            f_strings += (kind == "FSTRING_START") - (kind == "FSTRING_END")
            shipped += text
        return shipped[1:]

    def pack_code(source: str) -> bytes:
        """The packed file that runs `source`; of itself, unpacked, it is made again to the byte."""
        payload = brotli.compress(shipped_source(source).encode(), quality=11, lgwin=24).decode("latin-1")
        for pattern, escape in PACKED_ESCAPES:
            payload = re.sub(pattern, escape, payload)
        return PACKED_HEAD + payload.encode("latin-1") + PACKED_TAIL


def own_source() -> str:
    """The source of this program: the readable one, or, where it runs packed, what the packed file holds."""
    return globals()["PACKED_SOURCE"].decode() if PACKED else Path(__file__).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def counted_code() -> bytes:
    """The packed file, whichever runs: what a record folder ships, and what counts."""
    return Path(__file__).read_bytes() if PACKED else pack_code(own_source())


# ---- entropy coder ("rans") ----
# Every matrix reads from the residual stream or writes to it, so all are lists of vectors in one basis: rows, or the columns of a
# matrix that writes. How a vector's elements follow from those before them is much the same from matrix to matrix, and second moments
# of the vectors already known say it. Their factors (L D L^T, as in Cholesky's method) turn a vector into guesses and innovations,
# what could not be guessed: level_j = sum over k < j of L_jk innovation_k + innovation_j. What a guess leaves of a code is coded by
# a table that is picked by where in its code the guess lies and by how far off it may be: the element's misses in earlier vectors
# times the vector's so far. All are fixed-point integers, so that every machine makes the same guesses: levels have 8 fractional
# bits, L 16, moments 12. Matrix products go through float64, in which integers of this size are exact in any order of summation.
# Symbols go through range asymmetric numeral systems (Duda, 2013; arXiv:1311.2540): up to 1,024 states of
# 32 bits take turns and share one list of 16-bit words. Encoding runs the symbols backwards, so that decoding reads forwards.

RANS_BITS = 14
RANS_LOW = 1 << 16
RANS_SPREADS = 8
GUESS_EIGHTHS = np.array([1, 3, 5, 7, 10])  # of a code: guesses up to these have tables of their own, and so have those between
GUESS_KINDS = len(GUESS_EIGHTHS) + 1 + 3
RANS_MEAN_UNIT = 32
PREDICT_BLOCK = 64  # vectors of the first block; the later ones are an eighth of what is known
PREDICT_MEMORY = 4096  # vectors after which a moment counts half
PREDICT_PANEL = 64
PREDICT_LIMIT = 1 << 17  # of guesses and innovations: no table can make them overflow
# How the codes of a bank are coded, in the file: mean of |code| in units of 1/RANS_MEAN_UNIT; what divides the features, rising; square
# roots of the frequencies of (kinds, spreads, symbols), up to a factor, so that a byte serves rare and frequent symbols alike.
RANS_MODEL = np.dtype([("mean", "<u2"), ("thresholds", "<u2", RANS_SPREADS - 1), ("roots", "u1", (2 * GUESS_KINDS, RANS_SPREADS, 256))])


class Bank(NamedTuple):
    """Codes (matrices, rows, cols), int8, whether a trellis wrote them, and whether their vectors are the columns."""

    codes: np.ndarray
    trellis: bool
    across: bool = False

    @property
    def vectors(self) -> np.ndarray:
        """The codes as (matrices, vectors, elements), sharing memory."""
        return self.codes.transpose(0, 2, 1) if self.across else self.codes


class Step(NamedTuple):
    """Codes that are coded side by side, and what both sides know of them before; what is coded is code * sign - offset, modulo 256.

    place: in the bank's vectors. signs: of the guesses. offsets: the codes next to large guesses, else 0. kinds: where in its code
    a guess lies, below GUESS_KINDS, and as many more for quantizer 1 of a trellis. features: how far off it may be.
    """

    place: tuple[slice, slice, slice]
    signs: np.ndarray
    offsets: np.ndarray
    kinds: np.ndarray
    features: np.ndarray


def coder_tables(model: np.void) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and where they start, for each context of a RANS_MODEL: (contexts, 256) int64, rows of 2**RANS_BITS; integers only."""
    squares = model["roots"].reshape(-1, 256).astype(np.int64) ** 2
    scaled = squares * (1 << RANS_BITS) // np.maximum(squares.sum(1, keepdims=True), 1)
    scaled = np.where(squares > 0, np.maximum(scaled, 1), 0)
    # The largest takes what is missing, or gives what is too much. It has it: s rare symbols are raised to 1, and s (256 - s) <= 2**14.
    scaled[np.arange(len(scaled)), scaled.argmax(1)] += (1 << RANS_BITS) - scaled.sum(1)
    return scaled, np.cumsum(scaled, 1) - scaled


def coder_contexts(model: np.void, kinds: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The table of each code."""
    return kinds * RANS_SPREADS + np.searchsorted(model["thresholds"].astype(np.int64), features, side="right")


def encode_codes(banks: list[Bank]) -> list[bytes]:
    """[tables, states, words of each bank], for decode_codes with banks of the same shapes."""
    models, slots, known = np.zeros(len(banks), RANS_MODEL), [], None
    for bank, model in zip(banks, models):
        model["mean"] = round(float(np.abs(bank.codes.astype(np.int16)).mean()) * RANS_MEAN_UNIT)
        known = Predictor(bank, int(model["mean"]), known)
        steps = list(coding_steps(bank, known))
        coded = [(bank.vectors[step.place] * step.signs - step.offsets).astype(np.uint8).ravel() for step in steps]  # modulo 256
        symbols, ends = np.concatenate(coded), np.cumsum([len(part) for part in coded])[:-1]
        kinds, features = (np.concatenate([getattr(step, name).ravel() for step in steps]) for name in ("kinds", "features"))
        contexts = fit_model(model, symbols, kinds, features)
        slots.append([np.split(table[contexts, symbols].astype(np.uint16), ends) for table in coder_tables(model)])
    return [brotli.compress(models.tobytes(), quality=11), *rans_encode(slots, rans_lanes(banks))]


def decode_codes(streams: list[bytes], banks: list[Bank]) -> None:
    """Fill the codes of banks with those that encode_codes was given."""
    size, states, words = len(banks) * RANS_MODEL.itemsize, 4 * rans_lanes(banks), b"".join(streams[2:])
    models = decompress(streams[0], size) if len(streams) == 2 + len(banks) else b""
    if len(models) != size or len(streams[1]) != states or len(words) % 2:
        raise ArtifactError("the artifact's streams of codes have not the number or the lengths that its model needs")
    decoder, known = RansDecoder(streams[1], words), None
    for bank, model in zip(banks, np.frombuffer(models, RANS_MODEL)):
        decoder.load(*coder_tables(model))
        known = Predictor(bank, int(model["mean"]), known)
        for step in coding_steps(bank, known):
            symbols = decoder.symbols(coder_contexts(model, step.kinds, step.features).ravel()).reshape(step.signs.shape)
            bank.vectors[step.place] = step.signs * (symbols + step.offsets)  # modulo 256
    decoder.finish()


def rans_lanes(banks: list[Bank]) -> int:
    """States of the coder: many are fast, few are small."""
    return min(1024, 1 + sum(bank.codes.size for bank in banks) // 8192)


class Predictor:
    """What is known of a bank's vectors while they are coded; the next bank begins with it.

    code: what a code is worth in the unit of guesses. moments: (elements, elements) int64, summed products of the elements' levels
    over `count` vectors, all matrices alike. sums: (matrices, elements), of |level - guess| over the vectors so far. scale: mean
    |level|. agreed, energy: (matrices, 1, 1), sums of guess * level and guess^2, which say what part of a guess to believe.
    """

    def __init__(self, bank: Bank, mean: int, prior: Predictor | None) -> None:
        matrices, _, elements = bank.vectors.shape
        self.code = 512 if bank.trellis else 256
        self.scale = mean * self.code // RANS_MEAN_UNIT
        self.sums = np.zeros((matrices, elements), np.int64)
        self.moments, self.count = np.zeros(2 * (elements * (elements <= 2048),), np.int64), 0  # wider: nothing is guessed
        if prior is not None and prior.count and prior.moments.shape == self.moments.shape:
            self.count = min(2 * elements, prior.count)  # vectors that those of other banks count for
            covariance = (prior.moments << 8) // prior.count * self.scale ** 2 // max(prior.scale, 1) ** 2
            self.moments = covariance * self.count >> 8
        self.agreed, self.energy = np.full((2, matrices, 1, 1), int(elements * PREDICT_BLOCK * self.scale ** 2 / 100), np.int64)

    def fit(self) -> None:
        """Take the moments as they are now for the guesses to come."""
        enough = self.count >= PREDICT_BLOCK // 2 and self.moments.any()
        self.factor = fit_predictor(self.moments, self.count) if enough else None

    def spread(self, elements: slice, seen: int) -> np.ndarray:
        """Expected |level - guess| of some elements after `seen` vectors, (matrices, 1, elements), at least 1."""
        return np.maximum((self.sums[:, None, elements] + 2 * self.scale) // (seen + 2), 1)

    def guess(self, innovations: np.ndarray, group: slice) -> tuple[np.ndarray, np.ndarray]:
        """What a group's levels should be by the innovations (matrices, vectors, elements) of the elements before, and how much of it
        each matrix believes: the part that has been right so far."""
        guesses = np.zeros((*innovations.shape[:2], group.stop - group.start), np.int64)
        if self.factor is not None:
            sums = innovations[:, :, : group.start] @ self.factor[group, : group.start].T
            guesses += np.clip(np.floor(sums / (1 << 16)), -PREDICT_LIMIT, PREDICT_LIMIT).astype(np.int64)
        return guesses, guesses * np.clip((self.agreed << 8) // np.maximum(self.energy, 1), 0, 256) >> 8

    def step(self, place: tuple[slice, slice, slice], guesses: np.ndarray, sizes: np.ndarray, quantizers: np.ndarray) -> Step:
        """The step of a place in the vectors. Codes near 0 stay themselves, because there a trellis has levels of its own."""
        code, distances = self.code, np.abs(guesses)
        nearest = (distances + code // 2) // code
        fraction = (5 * (distances - nearest * code) + code) // (2 * code)  # 0: up to -1/5 of a code, 1: between, 2: from 1/5
        near = np.searchsorted(GUESS_EIGHTHS * code // 8, distances, side="right")
        large = nearest > 1
        kinds = np.where(large, len(GUESS_EIGHTHS) + 2 + fraction, near) + quantizers * GUESS_KINDS
        features = np.minimum(self.spread(place[2], place[1].start) * sizes >> 8, 65534)
        return Step(place, np.where(guesses < 0, -1, 1), nearest * large, kinds, features)

    def innovations(self, levels: np.ndarray, guesses: np.ndarray, group: slice) -> np.ndarray:
        """What a group's own elements leave of each other: its levels less all that L makes of the innovations before."""
        self.agreed += (guesses * levels).sum((1, 2), keepdims=True)
        self.energy += (guesses * guesses).sum((1, 2), keepdims=True)
        rest = (levels - guesses).astype(np.float64)
        for j in range(1, rest.shape[2] if self.factor is not None else 0):
            rest[:, :, j] -= np.floor(rest[:, :, :j] @ self.factor[group.start + j, group.start: group.start + j] / (1 << 16))
            np.clip(rest[:, :, j], -PREDICT_LIMIT, PREDICT_LIMIT, out=rest[:, :, j])
        return np.clip(rest, -PREDICT_LIMIT, PREDICT_LIMIT)

    def learn(self, levels: np.ndarray) -> None:
        """Add a block of levels (matrices, vectors, elements) to the moments, and fade the older ones."""
        flat = levels.reshape(-1, levels.shape[2])[:, : len(self.moments)]
        self.moments = self.moments * PREDICT_MEMORY // (PREDICT_MEMORY + len(flat)) + (flat.T @ flat).astype(np.int64)
        self.count = self.count * PREDICT_MEMORY // (PREDICT_MEMORY + len(flat)) + len(flat)


def cut_range(whole: slice, size: int) -> list[slice]:
    """A range in pieces of `size`; uncut if that is 0."""
    return [slice(at, min(at + size, whole.stop)) for at in range(whole.start, whole.stop, size)] if size else [whole]


def coding_steps(bank: Bank, known: Predictor) -> Iterator[Step]:
    """The steps of a bank in order. Each must have been read, or written to bank.vectors, before the next is asked for.

    Blocks of vectors are guessed by the moments of those before; a block goes by groups of elements, and a trellis in steps of so many
    rows as it has segments. Blocks and groups end where such a step does.
    """
    matrices, vectors, elements = bank.vectors.shape
    lanes = trellis_segments(*bank.codes.shape[1:]) if bank.trellis else 0
    tall, wide = (0, lanes) if bank.across else (lanes, 0)  # vectors and elements of a step; 0: all of the block, of the group
    shape, next_states = (matrices, tall or vectors, wide or elements), trellis_next_states().numpy()
    states = np.zeros(shape, np.int64) if lanes else np.broadcast_to(np.int64(0), shape)
    width, end = -(-max(2, elements // 32) // (wide or 1)) * (wide or 1), 0
    while end < vectors:
        block = slice(end, min(vectors, end + -(-max(PREDICT_BLOCK, end // 8) // (tall or 1)) * (tall or 1)))
        begin, end = block.start, block.stop
        known.fit()
        levels, innovations = np.zeros((2, matrices, end - begin, elements))
        believed = np.zeros(levels.shape, np.int64)
        sizes = np.full((matrices, end - begin, 1), 8 << 8, np.int64)  # of each vector's innovations so far, in spreads
        for group in cut_range(slice(0, elements), width):
            guesses, believed[:, :, group] = known.guess(innovations, group)
            size = sizes // (8 + group.start)
            for down, along in itertools.product(cut_range(block, tall), cut_range(group, wide)):
                here = np.s_[:, down.start - begin: down.stop - begin, along]
                state = states[:, down, : along.stop - along.start] if bank.across else states[:, : down.stop - down.start, along]
                quantizers = state & 1
                yield known.step(np.s_[:, down, along], believed[here], size[here[:2]], quantizers)
                level = bank.vectors[:, down, along].astype(np.int64)
                if lanes:
                    state[:], level = next_states[state, level & 1], trellis_levels(level, quantizers)
                levels[here] = level
                known.sums[:, along] += np.abs((level << 8) - believed[here]).sum(1)
            exact = levels[:, :, group].astype(np.int64) << 8
            misses = (np.abs(exact - believed[:, :, group]) << 8) // known.spread(group, end)
            sizes += np.minimum(misses, 1 << 12).sum(2, keepdims=True)
            innovations[:, :, group] = known.innovations(exact, guesses, group)
        known.learn(levels)


def fit_predictor(moments: np.ndarray, count: int) -> np.ndarray:
    """L, float64 that holds integers with 16 fractional bits, from the summed x^T x of `count` vectors of levels, int64.

    What lies off the diagonal counts less the fewer vectors there were.
    """
    elements = len(moments)
    doubt = min(max((1 << 16) // 40, (1 << 15) * elements // count), (1 << 16) * 19 // 20)
    matrix = (moments << 12) // count * ((1 << 16) - doubt * (1 - np.eye(elements, dtype=np.int64))) >> 16
    factor = np.zeros((elements, elements))
    for begin in range(0, elements, PREDICT_PANEL):
        panel = matrix[begin:, begin: begin + PREDICT_PANEL].copy()
        width = panel.shape[1]
        end = begin + width
        for j in range(width):
            below = np.clip((panel[j + 1:, j] << 16) // max(int(panel[j, j]), 64), -(1 << 18), 1 << 18)
            factor[begin + j + 1:, begin + j] = below
            panel[j + 1:, j + 1:] -= below[:, None] * panel[j + 1: width, j] >> 16
        done = factor[end:, begin:end] @ panel[width:].T.astype(np.float64)
        matrix[end:, end:] -= np.floor(done / (1 << 16)).astype(np.int64)
    return factor


def fit_model(model: np.void, symbols: np.ndarray, kinds: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Set the thresholds and frequencies of a model for these symbols, 1-d like their kinds and features; their contexts."""

    def fit(spreads: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Bits with so many spreads, and about 6 for each root in the tables; thresholds; contexts; counts (contexts, 256)."""
        model["thresholds"] = (1 << 16) - 1
        model["thresholds"][: spreads - 1] = np.quantile(features, np.arange(1, spreads) / spreads, method="higher")
        contexts = coder_contexts(model, kinds, features)
        counts = np.bincount(contexts * 256 + symbols, minlength=model["roots"].size).reshape(-1, 256)
        return entropy_bits(counts) + 6 * np.count_nonzero(counts), model["thresholds"].copy(), contexts, counts

    choices = (1, 2, 4, RANS_SPREADS) if symbols.size < 1 << 20 else (RANS_SPREADS,)  # tables weigh in small banks alone
    _, model["thresholds"], contexts, counts = min(map(fit, choices), key=lambda found: found[0])
    roots = np.rint(255 * np.sqrt(counts / np.maximum(counts.max(1, keepdims=True), 1)))
    model["roots"] = np.where(counts > 0, np.maximum(roots, 1), 0).reshape(model["roots"].shape)
    return contexts


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of symbols that occurred so often, (..., symbols), with a table each; the tables themselves come free."""
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return float(-(counts * np.log2(np.where(counts > 0, share, 1.0))).sum())


def rans_encode(slots: list[tuple[list[np.ndarray], list[np.ndarray]]], lane_count: int) -> list[bytes]:
    """[states, words of each bank] for the frequencies and starts of each bank's steps; last symbol first."""
    state, streams = np.full(lane_count, RANS_LOW, np.uint64), []
    for steps in reversed(slots):
        words = []
        for frequencies, starts in reversed(list(zip(*steps))):
            for begin in reversed(range(0, len(frequencies), lane_count)):
                frequency = frequencies[begin: begin + lane_count].astype(np.uint64)
                lanes = state[: len(frequency)]
                full = lanes >= frequency << np.uint64(32 - RANS_BITS)
                words.append(lanes[full].astype("<u2"))
                lanes[full] >>= np.uint64(16)
                quotient = lanes // frequency
                lanes += quotient * (np.uint64(1 << RANS_BITS) - frequency) + starts[begin: begin + lane_count]
        streams.append(b"".join(word.tobytes() for word in reversed(words)))
    return [state.astype("<u4").tobytes(), *reversed(streams)]


class RansDecoder:
    """Reads what rans_encode wrote; the caller gives the same tables and contexts in the same order."""

    def __init__(self, states: bytes, words: bytes) -> None:
        self.state = np.frombuffer(states, "<u4").astype(np.uint32)
        self.words = np.frombuffer(words, "<u2").astype(np.uint32)
        self.position = 0

    def load(self, frequencies: np.ndarray, starts: np.ndarray) -> None:
        """Take the tables of coder_tables."""
        self.symbol_of_slot = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(frequencies)), frequencies.ravel())
        self.frequency, self.start = (table.astype(np.uint32).ravel() for table in (frequencies, starts))

    def symbols(self, context: np.ndarray) -> np.ndarray:
        """The next symbols, uint8 (n,), given the context of each."""
        result, lane_count = np.empty(len(context), np.uint8), len(self.state)
        for begin in range(0, len(context), lane_count):
            chunk = context[begin: begin + lane_count]
            lanes = self.state[: len(chunk)]
            slot = lanes & np.uint32((1 << RANS_BITS) - 1)
            symbol = self.symbol_of_slot[(chunk << RANS_BITS) + slot]
            result[begin: begin + lane_count] = symbol
            entry = chunk * 256 + symbol
            lanes[:] = self.frequency[entry] * (lanes >> np.uint32(RANS_BITS)) + slot - self.start[entry]
            empty = np.flatnonzero(lanes < RANS_LOW)
            fresh = self.words[self.position: self.position + len(empty)]
            if len(fresh) < len(empty):
                raise ArtifactError("the artifact's coder words end too early")
            self.position += len(empty)
            lanes[empty] = (lanes[empty] << np.uint32(16)) | fresh
        return result

    def finish(self) -> None:
        """Raise ArtifactError unless all words are used and the states are where the encoder started."""
        if self.position != len(self.words) or (self.state != RANS_LOW).any():
            raise ArtifactError("the artifact's coder words do not end where its tensors do")


# ======================================================================================================================
# 10. Evaluation
#
# The validation set is cut into segments once, at every BOS and every EVAL_SEQ_LEN tokens within a document; whole
# segments are packed into batches, and the batches dealt to the ranks. So every target is scored exactly once, the tail
# included, and the sum does not depend on the number of ranks: per-batch sums are added in the order of the batches.
# ======================================================================================================================


class Score(NamedTuple):
    """What scoring some targets gave, and how long it took."""

    nats: float
    num_bytes: int
    time_ms: float
    losses: np.ndarray  # (targets of the validation set,) float32; NaN where another rank scored

    @property
    def val_loss(self) -> float:
        """Nats a token."""
        return self.nats / max(len(self.losses), 1)

    @property
    def val_bpb(self) -> float:
        """Bits per byte of original text."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)


def joint_score(run: Run, val: ValData, name: str, began: float, losses: np.ndarray, sums: np.ndarray, scored: int) -> Score:
    """Of what all ranks have scored since `began`, this one `scored` targets: logged under `name`. A collective.

    `sums` (batches or documents,) float64 are those of `losses`, 0 where another rank scored: so ranks do not change the total.
    ValueError if it is no number.
    """
    by_rank, counts = zip(*run.ranks.gather((sums, scored)))
    assert sum(counts) == len(losses), "every target is scored exactly once"
    score = Score(float(np.sum(by_rank, axis=0).sum()), val.num_bytes, since_ms(began), losses)
    run.log.record("eval", name=name, val_loss=f"{score.val_loss:.8f}", val_bpb=f"{score.val_bpb:.8f}", tokens=len(losses),
                   bytes=val.num_bytes, time_ms=int(score.time_ms))
    if not math.isfinite(score.nats):
        raise ValueError(f"the score {name} is not finite: the weights or their adaptation diverged; lower the learning rates "
                         "(TTT_LORA_LR and GLOBAL_TTT_LR if it is only the one with test-time training)")
    return score


def pack_segments(lengths: np.ndarray, limit: int) -> list[range]:
    """Consecutive segments of these lengths in batches of up to `limit` tokens; no segment is longer than that."""
    bounds, cuts = np.append(0, np.cumsum(lengths)), [0]
    while cuts[-1] < len(lengths):
        cuts.append(int(np.searchsorted(bounds, bounds[cuts[-1]] + limit, side="right")) - 1)
        assert cuts[-1] > cuts[-2], "a segment fits a batch"
    return [range(first, last) for first, last in itertools.pairwise(cuts)]


def segment_batch(run: Run, entries: np.ndarray, starts: np.ndarray, lengths: np.ndarray, size: int) -> Batch:
    """The batch of the segments of `entries` (N,) at `starts`, in that order; each target is the entry behind its token.

    Under torch.compile it is filled up to `size` tokens with segments that nobody scores, so that few graphs serve all.
    """
    local, count = np.cumsum(lengths) - lengths, int(lengths.sum())
    at = np.arange(count) + np.repeat(starts - local, lengths)
    tokens, targets = entries[at], entries[at + 1]
    if run.compile:
        local = np.append(local, np.arange(count, size, run.cfg.eval_seq_len))
        tokens, targets = (np.pad(a, (0, size - count)) for a in (tokens, targets))
    return make_batch(tokens, targets, local, run.cfg.eval_seq_len, run.device)


@torch.no_grad()
def evaluate(run: Run, model: GPT, val: ValData, name: str, depth: int) -> Score:
    """Score every target of the validation set once at `depth` and log it under `name`."""
    cfg, ranks, began, count = run.cfg, run.ranks, time.perf_counter(), len(val.tokens) - 1
    forward, schedule, progress = compiled(run, model), loop_schedule(cfg, depth), Progress(run.log)
    starts = segment_starts(val.tokens[:-1], count, cfg.eval_seq_len)
    lengths, size = np.diff(starts, append=count), cfg.val_batch_tokens // 8
    batches = pack_segments(lengths, size)
    losses, sums, scored = np.full(count, np.nan, dtype=np.float32), np.zeros(len(batches)), 0
    for first_of_round in range(0, len(batches), ranks.world):
        ranks.check_stop()
        i = first_of_round + ranks.rank
        if i >= len(batches):
            continue
        begin, tokens = int(starts[batches[i].start]), int(lengths[batches[i]].sum())
        batch = segment_batch(run, val.tokens, starts[batches[i]], lengths[batches[i]], size)
        part = forward(batch, schedule)[:tokens].float().cpu().numpy()
        losses[begin: begin + tokens] = part
        sums[i] = part.sum(dtype=np.float64)
        scored += tokens
        progress(f"eval_{name}", i + 1, len(batches))
    return joint_score(run, val, name, began, losses, sums, scored)


# ======================================================================================================================
# 11. Test-time training
#
# Documents are scored chunk by chunk, longest documents first, each with low-rank adapters of its own (Hu et al. 2021)
# that take one AdamW step on a chunk after that chunk has been scored. Between the phases the weights of the model
# itself learn from documents already scored. A document's score does not depend on which others are scored beside it, so
# the plan that deals documents to batches and batches to ranks is free: it is made, alike on every rank, to end soonest.
#
# With TTT_WARM_START_A a score does depend on others, though never on later text: a document's A is what the document in its
# row of the lane's batch before has made of it, decayed until the longest of that batch ended. So batches, the lanes that they
# are dealt to and the order in a lane are then fixed by the lengths alone; ranks take whole lanes.
#
# What a chunk sees of the earlier ones is computed again with the adapters of the moment (TTT_CONTEXT=window, the record:
# many forwards a token), or is the keys and values as they were when those chunks were scored (cache: one).
# ======================================================================================================================

# What the plan reckons with. The first two are the published run's on an H100, the others are reckoned: a captured step has
# no launches to wait for, and AdamW moves 40 bytes a value of the adapters at 85 % of 3.35 TB/s.
TTT_TOKENS_PER_SECOND = 411_000  # forwarded and learned
TTT_STEP_SECONDS = 0.012  # beside its tokens
TTT_CAPTURED_STEP_SECONDS = 0.003
TTT_SECONDS_PER_ADAPTER_VALUE = 40 / (0.85 * 3.35e12)
TTT_LANES = 8


class PhasePlan(NamedTuple):
    """A part of the scoring order (longest documents first), how it is dealt to the ranks, and what is learned after it."""

    batches: tuple[range, ...]  # neighbours in the scoring order, at most TTT_BATCH_SIZE
    ranks: tuple[tuple[int, ...], ...]  # for each rank, its batches in the order it runs them
    seconds: tuple[float, ...]  # reckoned, for each rank, with the constants above
    learns: range = range(0)  # whose text the global SGD learns from then, shortest first; empty after the last part
    warm: frozenset[int] = frozenset()  # batches that take over A from the one that their rank ran before


def chunk_bounds(cfg: Config, length: int) -> list[int]:
    """Where the chunks of a batch begin whose longest document has `length` targets; the last one ends there or behind."""
    short = zip(cfg.ttt_short_chunks[::2], cfg.ttt_short_chunks[1::2])
    bounds, size = [0], next((chunk for limit, chunk in short if length < limit), cfg.ttt_chunk_size)
    while bounds[-1] < length:
        bounds.append(bounds[-1] + (size << sum(bounds[-1] >= at for at in cfg.ttt_chunk_doubles_at)))
    return bounds


def adapter_shapes(cfg: Config) -> dict[str, tuple[int, int]]:
    """Adapters by name, in the order in which they are drawn: their visits and the width out; the width in is MODEL_DIM.

    q, k and v add to their parts of the site attn_in, the others to the site or bypass of their name.
    """
    visits, d, k = loop_schedule(cfg, cfg.eval_loop_depth).visits, cfg.model_dim, cfg.kv_dim
    table = [("head", 1, cfg.vocab_size, True), ("k", visits, k, cfg.ttt_k_lora), ("mlp", visits, d, cfg.ttt_mlp_lora),
             ("attn", visits, d, cfg.ttt_o_lora), ("q", visits, d, cfg.ttt_q_lora), ("v", visits, k, cfg.ttt_v_lora)]
    return {name: (visits, out) for name, visits, out, enabled in table if enabled}


def adapter_values(cfg: Config) -> int:
    """Values of one document's adapters."""
    return sum(visits * cfg.ttt_lora_rank * (cfg.model_dim + out) for visits, out in adapter_shapes(cfg).values())


def chunk_seconds(cfg: Config, bounds: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Reckoned seconds of steps that end at bounds[1:] with so many documents, (steps,)."""
    if cfg.ttt_context == "window":
        tokens, beside = live * np.minimum(bounds[1:], cfg.ttt_eval_seq_len), TTT_STEP_SECONDS
    else:
        tokens, beside = live * np.diff(bounds), TTT_CAPTURED_STEP_SECONDS + live * adapter_values(cfg) * TTT_SECONDS_PER_ADAPTER_VALUE
    return cfg.ttt_grad_steps * (tokens / TTT_TOKENS_PER_SECOND + beside)


def batch_seconds(cfg: Config, lengths: np.ndarray) -> float:
    """Reckoned seconds of a batch of documents of `lengths`, descending."""
    bounds = np.array(chunk_bounds(cfg, int(lengths[0])))
    return chunk_seconds(cfg, bounds, (lengths[:, None] > bounds[:-1]).sum(0)).sum()


def deal(costs: np.ndarray, hands: int) -> np.ndarray:
    """The hand that each of `costs` goes to, (n,): they are dealt the dearest first, each to whom has least."""
    hand_of, sums = np.zeros(len(costs), np.int64), np.zeros(hands)
    for index in np.argsort(-costs, kind="stable"):
        hand_of[index] = sums.argmin()
        sums[hand_of[index]] += costs[index]
    return hand_of


def plan_ttt(cfg: Config, lengths: np.ndarray, world: int) -> list[PhasePlan]:
    """The plan of test-time training for documents of `lengths`, descending, on `world` ranks: the same on every rank.

    A pause for global SGD comes with the first whole batch, cut from the short end, at which as many are scored as are learned from
    and left out.
    """
    count, size, phases = len(lengths), cfg.ttt_batch_size, cfg.phased_ttt_num_phases if cfg.phased_ttt_enabled else 0
    learned = [min(cfg.phased_ttt_prefix_docs, count) * phase // phases for phase in range(1, phases + 1)]
    pauses = {count - (count - n - cfg.phased_ttt_leave_out) // size * size: n for n in learned if n}
    plans, begin, plan_part = [], 0, plan_lanes if cfg.ttt_warm_start_a or cfg.ttt_short_chunks else plan_phase
    for end, n in [*((end, n) for end, n in sorted(pauses.items()) if end < count), (count, 0)]:
        plans.append(plan_part(cfg, range(begin, end), lengths, world)._replace(learns=range(end - 1, end - 1 - n, -1)))
        begin = end
    return plans


def plan_lanes(cfg: Config, part: range, lengths: np.ndarray, world: int) -> PhasePlan:
    """Whole batches, cut from the short end, dealt to TTT_LANES lanes, and the lanes to the ranks."""
    cuts = [part.start, *range(part.stop, part.start, -cfg.ttt_batch_size)[::-1]]
    batches = [range(a, b) for a, b in itertools.pairwise(cuts)]
    costs = np.array([batch_seconds(cfg, lengths[batch]) for batch in batches])
    lane_of = deal(costs, TTT_LANES)
    rank_of = deal(np.bincount(lane_of, costs, TTT_LANES), world)[lane_of]
    order = np.argsort(lane_of, kind="stable")
    warm = [b for a, b in itertools.pairwise(order) if lane_of[a] == lane_of[b] and len(batches[a]) == len(batches[b])]
    return PhasePlan(tuple(batches), tuple(tuple(order[rank_of[order] == rank].tolist()) for rank in range(world)),
                     tuple(np.bincount(rank_of, costs, world).tolist()), warm=frozenset(warm if cfg.ttt_warm_start_a else ()))


def plan_phase(cfg: Config, part: range, lengths: np.ndarray, world: int) -> PhasePlan:
    """The soonest end of several ways to cut: few batches share the steps' fixed costs, many take the longest documents apart."""
    bounds = np.array(chunk_bounds(cfg, int(lengths[0])))
    alone, none = (np.cumsum(chunk_seconds(cfg, bounds, np.full(len(bounds) - 1, live))) for live in (1, 0))
    last_chunk = np.searchsorted(bounds, lengths) - 1
    work = np.append(0.0, np.cumsum((alone - none)[last_chunk])).tolist()  # what the tokens of all documents before one cost
    beside = none[last_chunk].tolist()  # what else the steps of a batch cost whose longest document it is

    def fill(end: float, pieces: int) -> PhasePlan | None:
        """Batches of at most a piece of the time until `end`, each to the rank that is free first, the last ones cut to the room left."""
        batches, held, seconds, first = [], [[] for _ in range(world)], [0.0] * world, part.start
        while first < part.stop:
            rank = seconds.index(min(seconds))
            room = end - seconds[rank]
            fitting = bisect.bisect_right(work, work[first] + min(room, end / pieces) - beside[first]) - 1
            last = min(max(fitting, first + 1), first + cfg.ttt_batch_size, part.stop)
            cost = work[last] - work[first] + beside[first]
            if cost > room:
                return None
            held[rank].append(len(batches))
            batches.append(range(first, last))
            seconds[rank], first = seconds[rank] + cost, last
        return PhasePlan(tuple(batches), tuple(map(tuple, held)), tuple(seconds))

    best = fill(math.inf, 1)
    for pieces in (1, 2, 3, 4, 6, 8, 12, 16):
        early, late = 0.0, max(best.seconds)
        while late - early > 1e-3 * late:
            middle = (early + late) / 2
            found = fill(middle, pieces)
            best, early, late = (best, middle, late) if found is None else (found, early, max(found.seconds))
    return best


class Adapters:
    """Low-rank terms x A^T B^T for documents side by side at every visit, with their AdamW (Loshchilov and Hutter 2019).

    A (documents, visits, rank, in) starts uniform in +-1/sqrt(in), the same draw for every document; B (documents, visits,
    out, rank) starts at 0. A document that has ended is left out by taking fewer of the first axis.
    """

    def __init__(self, run: Run, documents: int) -> None:
        cfg, device = run.cfg, run.device
        self.cfg, self.documents, self.shapes, self.parts = cfg, documents, adapter_shapes(cfg), attn_in_parts(cfg)
        self.scale = cfg.ttt_lora_alpha / cfg.ttt_lora_rank if cfg.ttt_lora_alpha else 1.0
        self.initial, self.values, generator = {}, {}, torch.Generator().manual_seed(cfg.seed)
        for name, (visits, out) in self.shapes.items():
            draw = torch.rand(visits, 1, cfg.ttt_lora_rank, cfg.model_dim, generator=generator) * 2 - 1
            self.initial[name] = (draw / math.sqrt(cfg.model_dim)).transpose(0, 1).to(device)
            self.values[f"a.{name}"] = torch.empty(documents, visits, cfg.ttt_lora_rank, cfg.model_dim, device=device)
            self.values[f"b.{name}"] = torch.empty(documents, visits, out, cfg.ttt_lora_rank, device=device)
        self.first, self.second = ({name: torch.empty_like(t) for name, t in self.values.items()} for _ in range(2))
        self.steps = {name: torch.zeros((), device=device) for name in self.values}  # all the same: AdamW counts for each
        self.lr = torch.tensor(cfg.ttt_lora_lr, device=device)

    @torch.no_grad()
    def reset(self, warm: bool = False) -> None:
        """As before the first chunk: fresh adapters, but for A if `warm`, no optimizer state."""
        for name, initial in self.initial.items():
            if not warm:
                self.values[f"a.{name}"].copy_(initial.expand_as(self.values[f"a.{name}"]))
            self.values[f"b.{name}"].zero_()
        for tensor in (*self.first.values(), *self.second.values(), *self.steps.values()):
            tensor.zero_()

    def live(self, documents: int) -> dict[str, Tensor]:
        """The adapters of the first `documents`, as leaves that share their memory."""
        return {name: tensor[:documents].detach().requires_grad_() for name, tensor in self.values.items()}

    def bind(self, live: dict[str, Tensor]) -> Linear:
        """`linear` for one forward: each visit's slice is taken here, once, so that its gradient is gathered once."""
        by_visit = {name: tensor.unbind(1) for name, tensor in live.items()}

        def adapted(name: str, visit: int, x: Tensor, y: Tensor | None) -> Tensor | None:
            """y (..., out) with the adapter's term, if there is one of this name."""
            if name not in self.shapes:
                return y
            a, b = by_visit[f"a.{name}"][visit].to(x.dtype), by_visit[f"b.{name}"][visit].to(x.dtype)
            delta = (x.unflatten(0, (a.size(0), -1)) @ a.mT @ b.mT).flatten(0, 1)
            delta = delta if self.scale == 1 else self.scale * delta
            return delta if y is None else y + delta

        def linear(site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
            y, (_, visit, place) = plain_linear(site, x, w), site
            if place == "attn_in":
                return torch.cat([adapted(name, visit, x, part) for name, part in zip(self.parts, y.split([*self.parts.values()], -1))], -1)
            return adapted(place.removesuffix("_bypass"), visit, x, y)

        return linear

    @torch.no_grad()
    def learn(self, loss: Tensor, live: dict[str, Tensor]) -> None:
        """One AdamW step on `loss`. The gradients are never accumulated: a captured graph writes them anew each time."""
        cfg, count, steps = self.cfg, next(iter(live.values())).size(0), [self.steps[name] for name in live]
        grads = [grad.contiguous() for grad in torch.autograd.grad(loss, list(live.values()))]  # the compiler's may have other strides
        if cfg.ttt_lora_lr_power:
            self.lr.copy_(cfg.ttt_lora_lr * (steps[0] + 1) ** cfg.ttt_lora_lr_power)
        fused_adamw(
            [t.detach() for t in live.values()], grads, [self.first[n][:count] for n in live], [self.second[n][:count] for n in live], [],
            steps, fused=True, capturable=self.lr.is_cuda, amsgrad=False, maximize=False, beta1=cfg.ttt_beta1, beta2=cfg.ttt_beta2,
            lr=self.lr if cfg.ttt_lora_lr_power else cfg.ttt_lora_lr, weight_decay=cfg.ttt_weight_decay, eps=1e-10)
        if cfg.ttt_warm_start_a and count < self.documents:  # an A that will be taken over decays until its whole batch has ended
            torch._foreach_mul_([self.values[f"a.{name}"][count:] for name in self.shapes], 1 - self.lr * cfg.ttt_weight_decay)


class Documents:
    """The validation documents as TTT sees them, in scoring order: longest first, equals in data order."""

    def __init__(self, val: ValData) -> None:
        self.tokens = val.tokens
        starts = val.document_starts()
        ends = np.append(starts[1:], len(val.tokens) - 1)  # a document also predicts the BOS that follows it
        order = np.argsort(-(ends - starts), kind="stable")
        self.starts, self.lengths = starts[order], (ends - starts)[order]
        self.byte_sums = np.add.reduceat(np.append(val.byte_counts[1:], 0).astype(np.int64), starts)[order]
        self.hints: tuple[np.ndarray, np.ndarray] | None = None  # (N,) of the entry behind: a token, and its beta; 0, 0 for none

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, document: int) -> np.ndarray:
        """Entries of a document, BOS first, with the BOS that follows if there is one."""
        start = int(self.starts[document])
        return self.tokens[start: start + int(self.lengths[document]) + 1]


class NgramHints(NamedTuple):
    """What followed earlier occurrences of the tokens before a target, at targets where there were any; by index of the target's entry."""

    at: np.ndarray  # (n,) int64, ascending
    top: np.ndarray  # (n,) the token that followed most often, the first to reach its count
    count: np.ndarray  # (n,) how often it did
    total: np.ndarray  # (n,) occurrences

    def betas(self, cfg: Config) -> np.ndarray:
        """(n,) float32 nats by which the hints are raised: by bin, or one where the share, in float32, is at least the threshold."""
        share = self.count.astype(np.float32) / self.total.astype(np.float32)
        if not cfg.ngram_tilt_betas:
            return np.where(share >= np.float32(cfg.ngram_tilt_threshold), np.float32(cfg.ngram_tilt_beta), np.float32(0))
        return np.array(cfg.ngram_tilt_betas, np.float32)[5 * np.minimum(np.log2(self.total).astype(int), 4) + (4 * share).astype(int)]


def ngram_hints(documents: Documents, order: int) -> NgramHints:
    """Hints of n-grams of `order` tokens from the documents in scoring order, each target learned right after it was read.

    Contexts lie within a document, its BOS included. Nothing at or behind a target, in that order, has a part in its hint. Contexts
    that occur once, nearly all, are told by their hashes; the others are compared token by token.
    """
    width, tokens, by_start = order - 1, documents.tokens, np.argsort(documents.starts)
    keys = np.zeros(len(tokens), np.uint64)  # by the entry of a target: hash of the tokens before it
    factors = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for begin in range(width, len(tokens), 1 << 18):  # what a processor's cache holds
        part = keys[begin: begin + (1 << 18)]
        for back, factor in enumerate(factors, 1):
            part += tokens[begin - back: begin - back + len(part)] * factor
        part ^= part >> np.uint64(29)
        part *= np.uint64(0x9E3779B97F4A7C15)
    seen, repeats = np.sort(keys), np.zeros(1 << 24, bool)
    repeats[seen[1:][seen[1:] == seen[:-1]] >> np.uint64(40)] = True
    at = np.flatnonzero(repeats[keys >> np.uint64(40)])
    document = by_start[np.searchsorted(documents.starts[by_start], at) - 1]
    inside = at - documents.starts[document] >= width
    at, document = at[inside], document[inside]
    at = at[np.lexsort((at, document, keys[at]))]  # occurrences of one context side by side, in scoring order
    return count_followers(at, keys[at], tokens[at[:, None] + np.arange(-width, 0)], tokens[at].astype(np.int64))


def count_followers(at: np.ndarray, keys: np.ndarray, contexts: np.ndarray, targets: np.ndarray) -> NgramHints:
    """Hints at the entries `at`, (n,), from those of the same key and context (n, width) that stand before them."""
    place = np.arange(len(at))
    fresh = np.append(True, (keys[1:] != keys[:-1]) | (contexts[1:] != contexts[:-1]).any(1))[: len(at)]  # a hash may serve two contexts
    group = np.cumsum(fresh)
    order = np.lexsort((targets, group))  # one target after one context, in order
    pair = group[order] << 16 | targets[order]
    first = np.maximum.accumulate(np.where(np.append(True, pair[1:] != pair[:-1])[: len(at)], place, 0))
    count = np.empty_like(place)
    count[order] = place - first + 1  # how often this target has come, now included
    most = np.maximum.accumulate(group * (len(at) + 1) + count) - group * (len(at) + 1)
    better = np.maximum.accumulate(np.where(fresh | (most > np.roll(most, 1)), place, 0))  # where the present top token got ahead
    known = np.flatnonzero(~fresh)
    known = known[np.argsort(at[known])]
    total = known - np.maximum.accumulate(np.where(fresh, place, 0))[known]
    return NgramHints(at[known], targets[better[known - 1]], most[known - 1], total)


def tilted(losses: Tensor, hint_losses: Tensor, hit: Tensor, betas: Tensor) -> Tensor:
    """Losses under p'(a) ~ p(a) e^(beta [a = hint]), normalised in closed form; untouched where beta is 0. All (T,)."""
    return losses - betas * hit + torch.log1p(torch.exp(-hint_losses) * torch.expm1(betas))


class Chunk(NamedTuple):
    """A step's input: one chunk of every document that has not ended, with the earlier tokens that it computes again."""

    batch: Batch  # a row of equal width a document
    rows: Tensor | None  # (documents * chunk size,) the tokens of the batch that are scored; None: all of them
    weights: Tensor  # (documents * chunk size,) shares in the training loss; 0 in a document's last chunk
    hints: Tensor | None = None  # (documents * chunk size,) tokens that n-grams point to
    betas: Tensor | None = None  # by how much they are raised; 0 where none does

    def tensors(self) -> list[Tensor]:
        """All that a captured step reads."""
        return [t for t in (*self.batch[:5], *self[1:]) if t is not None]


def make_chunk(run: Run, documents: Documents, starts: np.ndarray, lengths: np.ndarray, begin: int, end: int) -> Chunk:
    """The chunk from position `begin` to `end` of documents with these starts and lengths; a length of 0 makes an empty row."""
    cfg, cached, size = run.cfg, run.cfg.ttt_context == "cache", end - begin
    starts, stops = starts[:, None], np.minimum(end, lengths)[:, None]
    firsts = np.full_like(stops, begin) if cached else np.maximum(0, stops - cfg.ttt_eval_seq_len)
    width = size if cached else max(int((stops - firsts).max()), size if run.compile else 1)
    chunk = np.arange(begin, end)

    def entries(places: np.ndarray) -> np.ndarray:
        """Where these places of every document are in the data; those behind its end are filled up with the first entry."""
        return np.where(places < stops, starts + places, 0).ravel()

    seen, scored = entries(firsts + np.arange(width)), entries(chunk)
    before = documents.tokens[entries(np.array([begin - 1]))] if cached and begin else None
    batch = make_batch(documents.tokens[seen], documents.tokens[seen + 1], np.arange(len(starts)) * width, width, run.device,
                       begin if cached else 0, before)
    rows = np.arange(len(starts))[:, None] * width + np.clip(chunk - firsts, 0, width - 1)
    weights = np.repeat((end < lengths) / np.float32(size), size)
    hints = [to_device(values[scored], run.device) for values in documents.hints or ()]
    return Chunk(batch, None if cached else to_device(rows.ravel(), run.device), to_device(weights, run.device), *hints)


class KVCache:
    """Keys and values of the positions already scored, at every visit, for documents that go on chunk by chunk together.

    A ring: position p of a document lies at place p % places, where `places` is a number of whole chunks: what a chunk
    sees at most, itself included. Where the current chunk begins is a tensor, so that a captured graph can advance it.
    """

    def __init__(self, run: Run, documents: int) -> None:
        cfg, largest = run.cfg, run.cfg.chunk_sizes[-1]
        self.places = -(-cfg.ttt_eval_seq_len // largest) * largest
        shape = (loop_schedule(cfg, cfg.eval_loop_depth).visits, documents, cfg.num_kv_heads, self.places, cfg.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=run.dtype, device=run.device) for _ in range(2))
        self.begin = torch.zeros((), dtype=torch.int64, device=run.device)

    def bind(self, documents: int, size: int, seen: int, made: list[tuple[Tensor, Tensor]]) -> Attend:
        """`attend` for one forward: a chunk of `size` tokens looks at the first `seen` places and at itself.

        Its own keys and values, (documents, Hkv, chunk, D) a visit, are appended to `made`; the gradient runs through
        these alone. The chunk that they will replace in the ring is out of sight already.
        """
        last, chunk = self.begin - 1, torch.arange(size, device=self.begin.device)
        held = last - (last - torch.arange(seen, device=last.device)) % self.places  # position there; below 0: none yet
        old = (held >= 0) & (held >= self.begin + size - self.places)
        mask = torch.cat([old.expand(size, seen), chunk[:, None] >= chunk], dim=1)

        def attend(visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            groups = q.size(1) // k.size(1)
            k, v = (t.unflatten(0, (documents, size)).transpose(1, 2) for t in (k, v))
            made.append((k.detach(), v.detach()))
            keys = torch.cat([self.keys[visit][:documents, :, :seen], k], dim=2)
            values = torch.cat([self.values[visit][:documents, :, :seen], v], dim=2)
            q = q.unflatten(1, (-1, groups)).unflatten(0, (documents, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(groups, 1))
            return y.unflatten(2, (groups, size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

        return attend

    @torch.no_grad()
    def store(self, made: list[tuple[Tensor, Tensor]]) -> None:
        """Put a chunk's keys and values in their places; the next chunk begins."""
        documents, _, size, _ = made[0][0].shape
        places = (self.begin + torch.arange(size, device=self.begin.device)) % self.places
        for kept, new in zip((self.keys, self.values), zip(*made)):
            kept[:, :documents].index_copy_(3, places, torch.stack(new))
        self.begin += size


class TTTScorer:
    """Scores batches of documents with adapters that learn from each chunk after it has been scored.

    With a cache on CUDA the whole step (forward, backward, AdamW, cache) is captured once for each number of documents, size
    of chunk and number of places in sight, and replayed: nothing in a batch of documents waits for the host.
    """

    def __init__(self, run: Run, model: GPT) -> None:
        schedule, documents = loop_schedule(run.cfg, run.cfg.eval_loop_depth), max(run.cfg.ttt_batch_size, 2)
        self.run, self.adapters = run, Adapters(run, documents)
        self.cache = KVCache(run, documents) if run.cfg.ttt_context == "cache" else None
        self.captures = run.device.type == "cuda" and self.cache is not None
        self.captured: dict[tuple[int, int, int], Callable[[Chunk], Tensor]] = {}
        # A step has the next of these numbers of documents (one alone the compiler would take for a constant) and of places in sight.
        self.live_sizes: range | list[int] = range(2 if run.compile else 1, documents + 1)
        self.seen_sizes: range | list[int] = range(self.cache.places + 1 if self.cache else 1)
        if self.captures:
            self.live_sizes = sorted({max(2, -(-documents // share)) for share in (1, 2, 4, 8)})
            self.seen_sizes = sorted({min(256 << i, self.cache.places) for i in range(self.cache.places.bit_length())})
        self.steps = self.forwarded = 0  # steps, and tokens that went through the model

        def losses_of(batch: Batch, live: dict[str, Tensor], rows: Tensor | None, also: Tensor | None, seen: int) -> tuple[Tensor, list]:
            made: list[tuple[Tensor, Tensor]] = []
            documents = next(iter(live.values())).size(0)
            attend = None if self.cache is None else self.cache.bind(documents, batch.max_seqlen, seen, made)
            return model(batch, schedule, self.adapters.bind(live), attend, rows, also), made

        self.losses_of = compiled(run, losses_of, dynamic=True)

    def score(self, documents: Documents, members: range, warm: bool = False) -> list[np.ndarray]:
        """The losses of each document, (length,) float32, every one computed before anything learned from its token.

        warm: A begins where the batch before, one of the same size, left it.
        """
        own, spare = slice(members.start, members.stop), self.adapters.documents - len(members)
        starts, lengths = (np.pad(values[own], (0, spare)) for values in (documents.starts, documents.lengths))
        longest = int(lengths[0])
        bounds = chunk_bounds(self.run.cfg, longest)
        self.adapters.reset(warm)
        if self.cache is not None:
            self.cache.begin.zero_()
        result = torch.zeros(len(lengths), bounds[-1], device=self.run.device)
        for begin, end in itertools.pairwise(bounds):
            live = self.live_sizes[bisect.bisect_left(self.live_sizes, int((lengths > begin).sum()))]
            chunk = make_chunk(self.run, documents, starts[:live], lengths[:live], begin, end)
            result[:live, begin:end] = self._step(chunk, live, begin, trains=end < longest).view(live, -1)
            self.steps, self.forwarded = self.steps + 1, self.forwarded + len(chunk.batch.tokens)
        return [losses[:length] for length, losses in zip(lengths[: len(members)], result.cpu().numpy())]

    def _step(self, chunk: Chunk, live: int, begin: int, trains: bool) -> Tensor:
        """The losses of a chunk, computed before the step on them; where captured they are overwritten by the next such step."""
        seen = self.seen_sizes[bisect.bisect_left(self.seen_sizes, min(begin, self.seen_sizes[-1]))]
        captured = self.captured.get((live, chunk.batch.max_seqlen, seen))
        return captured(chunk) if captured else self._losses_and_learn(chunk, live, seen, trains)

    def _losses_and_learn(self, chunk: Chunk, live: int, seen: int, trains: bool) -> Tensor:
        """Everything that happens to a chunk."""
        leaves, hints = self.adapters.live(live), chunk.hints
        with torch.set_grad_enabled(trains):
            forward = partial(self.losses_of, chunk.batch, leaves, chunk.rows, hints, seen)
            losses, made = forward()
            scored = losses.detach().clone()
            for again in range(self.run.cfg.ttt_grad_steps if trains else 0):
                losses = forward()[0] if again else losses
                self.adapters.learn(((losses if hints is None else losses[0]) * chunk.weights).sum(), leaves)
        if hints is not None:
            targets = chunk.batch.targets if chunk.rows is None else chunk.batch.targets[chunk.rows]
            scored = tilted(*scored, (hints == targets).float(), chunk.betas)
        if self.cache is not None:
            self.cache.store(made)
        return scored

    def warm_up(self) -> None:
        """Compile and run everything on random tokens, and capture what will be replayed, before the clock."""
        if not self.run.compile:
            return
        cfg, count = self.run.cfg, self.adapters.documents
        self.adapters.reset()
        documents = self._random_documents(np.linspace(min(cfg.ttt_eval_seq_len, 640) + 3, cfg.chunk_sizes[-1] + 1, count).astype(int))
        if self.captures:
            pool = torch.cuda.graph_pool_handle()
            for live, size, seen in itertools.product(self.live_sizes, cfg.chunk_sizes, self.seen_sizes):
                chunk = make_chunk(self.run, documents, documents.starts[:live], documents.lengths[:live], 0, size)
                self.captured[live, size, seen] = self._capture(chunk, live, seen, pool)
        elif self.run.device.type == "cuda":
            # A full batch with whole windows comes before all others, which then take their memory out of its blocks. Windows grow from
            # chunk to chunk: without this no block that the allocator kept would fit the next, and it would keep all.
            begin, end = chunk_bounds(cfg, cfg.ttt_eval_seq_len)[-2:]
            widest = self._random_documents(np.full(count, end + 1))
            chunk = make_chunk(self.run, widest, widest.starts, widest.lengths, begin, end)
            for _ in range(2):
                self._step(chunk, count, begin, trains=True)
        for _ in range(2):
            self.score(documents, range(count))
        self.steps = self.forwarded = 0

    def _random_documents(self, lengths: np.ndarray) -> Documents:
        """Documents of random tokens, of these lengths (descending)."""
        cfg = self.run.cfg
        tokens = np.random.default_rng(cfg.seed).integers(4, cfg.vocab_size, lengths.sum()).astype(np.uint16)
        tokens[np.cumsum(lengths) - lengths] = BOS_ID
        documents = Documents(ValData(tokens, np.ones_like(tokens), len(lengths)))
        documents.hints = (tokens.astype(np.int64), np.ones(len(tokens), np.float32)) if cfg.ngram_tilt_enabled else None
        return documents

    def _capture(self, kept: Chunk, live: int, seen: int, pool: tuple[int, int]) -> Callable[[Chunk], Tensor]:
        """Record a step on `kept`; what replays it on another chunk. What adapters and cache hold is lost: a reset comes next."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles
                self._losses_and_learn(kept, live, seen, trains=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph, losses = torch.cuda.CUDAGraph(), torch.empty_like(kept.weights)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            losses.copy_(self._losses_and_learn(kept, live, seen, trains=True))

        def replay(chunk: Chunk) -> Tensor:
            for held, new in zip(kept.tensors(), chunk.tensors()):
                held.copy_(new)
            graph.replay()
            return losses

        return replay


class GlobalSGD:
    """SGD with momentum of the model's own weights on text already scored."""

    def __init__(self, run: Run, model: GPT) -> None:
        self.run, self.params, schedule = run, list(model.parameters()), loop_schedule(run.cfg, run.cfg.eval_loop_depth)
        self.forward = compiled(run, lambda batch: model(batch, schedule), dynamic=True)

    def warm_up(self) -> None:
        """Compile forward and backward on random tokens, with few segments and with many; weights stay."""
        cfg, rng = self.run.cfg, np.random.default_rng(self.run.cfg.seed)
        for every in (cfg.eval_seq_len, 32, 700) if self.run.compile else ():
            tokens = rng.integers(4, cfg.vocab_size, cfg.global_ttt_chunk_tokens + 1).astype(np.uint16)
            tokens[::every] = BOS_ID
            self._gradients(tokens)
        self._release()

    def learn(self, text: np.ndarray, phase: str) -> float:
        """One pass over `text`, GLOBAL_TTT_EPOCHS steps a chunk of GLOBAL_TTT_CHUNK_TOKENS, the last chunk left out; its milliseconds.

        A collective.
        """
        cfg, began, size, progress = self.run.cfg, time.perf_counter(), self.run.cfg.global_ttt_chunk_tokens, Progress(self.run.log)
        chunks = max((len(text) - 2) // size, 0)
        sgd = torch.optim.SGD(self.params, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)
        loss = total = torch.zeros((), device=self.run.device)
        for i in range(chunks):
            sgd.param_groups[0]["lr"] = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * i / chunks))
            for _ in range(cfg.global_ttt_epochs):
                loss = self._gradients(text[i * size: (i + 1) * size + 1])
                if cfg.global_ttt_grad_clip > 0:
                    torch.nn.utils.clip_grad_norm_(self.params, cfg.global_ttt_grad_clip)
                sgd.step()
            total = total + loss
            progress(f"ttt_sgd_{phase}", i + 1, chunks)
        self._release()
        loss, time_ms = total.item() / max(chunks, 1), since_ms(began)
        self.run.log.record("ttt_sgd", phase=phase, tokens=len(text), chunks=chunks, loss=f"{loss:.4f}", time_ms=int(time_ms))
        return time_ms

    def _gradients(self, entries: np.ndarray) -> Tensor:
        """Gradients of the mean loss of a chunk over all ranks, into the parameters' .grad; the loss.

        `entries` are one more than the chunk has. Its sequences, which start at documents and every EVAL_SEQ_LEN tokens within one, are
        dealt to the ranks.
        """
        run, count, loss = self.run, len(entries) - 1, torch.zeros((), device=self.run.device)
        for param in self.params:
            param.requires_grad_(True).grad = torch.zeros_like(param)
        starts = segment_starts(entries[:-1], count, run.cfg.eval_seq_len)
        lengths = np.diff(starts, append=count)
        own = np.flatnonzero(deal(lengths, run.ranks.world) == run.ranks.rank)
        for part in pack_segments(lengths[own], run.cfg.global_ttt_batch_seqs * run.cfg.eval_seq_len):
            tokens = int(lengths[own[part]].sum())
            batch = segment_batch(run, entries, starts[own[part]], lengths[own[part]], tokens + 256 - tokens % 256)
            share = self.forward(batch)[:tokens].sum() / count
            share.backward()
            loss += share.detach()
        for param in self.params:
            run.ranks.sum(param.grad)
        return run.ranks.sum(loss)

    def _release(self) -> None:
        for param in self.params:
            param.requires_grad_(False).grad = None


class TTTProgress:
    """Some twenty lines a run with the time still to come, and a warning as soon as the budget will not hold.

    Every rank posts where it stands; rank 0 reads that without waiting. The plan's seconds are those of an H100: only their
    shares count here, and the pace is measured. The same with the tokens of the global SGD.
    """

    def __init__(self, run: Run, plans: list[PhasePlan], documents: Documents) -> None:
        self.run, self.documents, self.plans = run, documents, plans
        self.began, self.sgd_ms, self.warned, self.done = time.perf_counter(), 0.0, False, 0
        self.scored = np.zeros(4)  # of this rank: documents, nats, bytes, and its share in the time of the plan
        self.reckoned = sum(max(plan.seconds) for plan in plans)
        self.sgd_tokens = [sum(int(documents.lengths[d]) + 1 for d in plan.learns) for plan in plans]
        self.batches = sum(len(plan.ranks[run.ranks.rank]) for plan in plans)
        imbalance = max(max(plan.seconds) / max(sum(plan.seconds) / len(plan.seconds), 1e-9) for plan in plans) - 1
        run.log.record("ttt_plan", h100_ms=int(1e3 * self.reckoned), batches=sum(len(plan.batches) for plan in plans), phases=len(plans),
                       imbalance=f"{imbalance:.4f}", sgd_docs=",".join(str(len(plan.learns)) for plan in plans[:-1]) or 0)

    def add(self, phase: int, members: range, nats: float) -> None:
        """A batch of this rank in `phase`, counted from 0, is scored. Rank 0 speaks now and then, for all."""
        ranks, plan, self.done = self.run.ranks, self.plans[phase], self.done + 1
        share = plan.seconds[ranks.rank] / len(plan.ranks[ranks.rank]) / sum(plan.seconds) * max(plan.seconds) / self.reckoned
        self.scored += len(members), nats, self.documents.byte_sums[members.start: members.stop].sum(), share
        ranks.post("ttt", json.dumps(self.scored.tolist()))
        if ranks.rank or self.done % max(1, self.batches // 20) and self.done not in (1, self.batches):
            return
        docs, nats, num_bytes, share = np.sum([json.loads(note) for note in ranks.posted("ttt").values()], axis=0)
        elapsed, budget = since_ms(self.began), 1e3 * self.run.cfg.eval_budget_seconds
        sgd_ms = self.sgd_ms * sum(self.sgd_tokens) / max(sum(self.sgd_tokens[:phase]), 1)
        whole = (elapsed - self.sgd_ms) / max(share, 1e-9) + sgd_ms
        self.run.log.record("ttt", docs=f"{docs:.0f}/{len(self.documents)}", phase=f"{phase + 1}/{len(self.plans)}",
                            val_bpb=f"{nats / math.log(2) / max(num_bytes, 1):.5f}", bytes=int(num_bytes), time_ms=int(elapsed),
                            left_ms=int(max(0.0, whole - elapsed)))
        if budget and whole > budget and not self.warned:
            self.warned = True
            self.run.log(f"warning: at this pace test-time training will take {whole / 1e3:.0f} s, more than EVAL_BUDGET_SECONDS="
                         f"{budget / 1e3:g}; TTT_CONTEXT=cache, a larger TTT_CHUNK_SIZE or fewer PHASED_TTT_NUM_PHASES take less")


def take_hints(run: Run, documents: Documents) -> None:
    """Find the n-gram hints on rank 0 and give them to all; a collective."""
    began, found = time.perf_counter(), None
    if run.ranks.rank == 0:
        hints = ngram_hints(documents, run.cfg.ngram_tilt_order)
        betas = hints.betas(run.cfg)
        found = [values[betas > 0] for values in (hints.at, hints.top, betas)]
    at, top, betas = run.ranks.agree(found)
    documents.hints = np.zeros(len(documents.tokens), np.int64), np.zeros(len(documents.tokens), np.float32)
    documents.hints[0][at - 1], documents.hints[1][at - 1] = top, betas
    run.log.record("tilt", hints=len(at), targets=int(documents.lengths.sum()), time_ms=int(since_ms(began)))


def score_with_ttt(run: Run, model: GPT, val: ValData) -> Score:
    """Score every target once, each before any update that has seen it; the model's weights change in the phases.

    The time is that from after the warm-up.
    """
    ranks, documents = run.ranks, Documents(val)
    plans = plan_ttt(run.cfg, documents.lengths, ranks.world)
    model.requires_grad_(False)
    scorer, sgd = TTTScorer(run, model), GlobalSGD(run, model)
    scorer.warm_up()
    if len(plans) > 1:
        sgd.warm_up()
    synchronize(run.device)
    began, progress = time.perf_counter(), TTTProgress(run, plans, documents)
    if run.cfg.ngram_tilt_enabled:
        take_hints(run, documents)
    losses = np.full(len(val.tokens) - 1, np.nan, np.float32)
    nats, scored = np.zeros(len(documents)), 0  # float64, by place in the scoring order
    for phase, plan in enumerate(plans):
        for index in plan.ranks[ranks.rank]:
            members = plan.batches[index]
            for document, part in zip(members, scorer.score(documents, members, index in plan.warm)):
                nats[document] = part.sum(dtype=np.float64)
                losses[documents.starts[document]:][: len(part)] = part
                scored += len(part)
            progress.add(phase, members, float(nats[members.start: members.stop].sum()))
        if plan.learns:
            text = np.concatenate([documents.text(d) for d in plan.learns])
            progress.sgd_ms += sgd.learn(text, f"{phase + 1}/{len(plans) - 1}")
    steps, forwarded = zip(*ranks.gather((scorer.steps, scorer.forwarded)))
    memory = {"peak_mb": torch.cuda.max_memory_allocated() >> 20} if run.device.type == "cuda" else {}
    run.log.record("ttt_work", context=run.cfg.ttt_context, chunk=run.cfg.ttt_chunk_size, steps=max(steps),
                   forwards_per_target=f"{sum(forwarded) / len(losses):.3f}", **memory)
    return joint_score(run, val, "quantized_ttt", began, losses, nats, scored)


# ======================================================================================================================
# 12. Kernels (appendix)
#
# Five places where writing the fused form by hand saves memory traffic that torch.compile cannot: the MLP, whose norm and
# activation join the matrix product before it (forward) and the one after it (backward); norms whose backward reads what they
# returned; the sum of the stream and attention's projection, made in place; exclusive self-attention, one pass each way; and
# the softcapped cross entropy, which never stores the float32 logits of a batch. Each has a form in plain torch, which runs
# without Triton; the tests hold both against float64. The kernels hide in operators, so the compiler keeps its single graph.
# Matrix tiles go through Hopper's copy engine (TMA descriptors), one persistent program on every multiprocessor.
# ======================================================================================================================


MLP_TILE = (128, 256, 64)          # rows, columns, depth of one tile of the fused product: 3 stages fit Hopper's 227 KB
CROSS_ENTROPY_CHUNK = 2**22        # float32 logits alive at once where no kernel runs: 16 MiB


def activation(z: Tensor) -> Tensor:
    """leaky_relu(z, 0.5)^2."""
    return F.leaky_relu(z, 0.5).square()


if triton is not None:

    @triton.jit
    def mlp_kernel(a_desc, b_desc, hidden_desc, out_desc, factors, rows, columns, depth, BACKWARD: tl.constexpr, BIT: tl.constexpr,
                   TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PROGRAMS: tl.constexpr):
        """out = leaky(z)^2 with z = f a @ b^T, f a row's factor, and its sign in bit BIT; or, BACKWARD, the gradient of a @ b^T.

        That is f (a @ b) d leaky(z)^2 / dz, by what hidden kept of z.
        """
        tiles_n = tl.cdiv(columns, TILE_N)
        tiles = tl.cdiv(rows, TILE_M) * tiles_n
        HALF: tl.constexpr = TILE_N // 2
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            row = (tile // tiles_n) * TILE_M
            column = (tile % tiles_n) * TILE_N
            total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            for k in range(0, depth, TILE_K):
                a = a_desc.load([row, k])
                if BACKWARD:
                    total = tl.dot(a, b_desc.load([k, column]), total, input_precision="ieee")
                else:
                    total = tl.dot(a, b_desc.load([column, k]).T, total, input_precision="ieee")
            at = row + tl.arange(0, TILE_M)
            total = total * tl.load(factors + at, mask=at < rows, other=0.0)[:, None]
            halves = tl.permute(tl.reshape(total, (TILE_M, 2, HALF)), (0, 2, 1))   # half the staging memory a store
            left, right = tl.split(halves)
            for half in tl.static_range(2):
                z = left if half == 0 else right
                side = column + half * HALF
                if BACKWARD:
                    hidden = hidden_desc.load([row, side]).to(tl.float32)
                    negative = (hidden.to(tl.int32, bitcast=True) >> BIT) & 1
                    root = tl.sqrt(hidden)
                    out_desc.store([row, side], (z * tl.where(negative == 1, -root, 2 * root)).to(out_desc.dtype))
                else:
                    leaky = tl.where(z < 0, 0.5 * z, z)
                    bits = (leaky * leaky).to(tl.int32, bitcast=True)
                    even = ((bits + (1 << BIT)) >> (BIT + 1)) << (BIT + 1)         # the nearest with a last bit of 0, or of 1
                    odd = ((bits >> (BIT + 1)) << (BIT + 1)) + (1 << BIT)
                    out_desc.store([row, side], tl.where(z < 0, odd, even).to(tl.float32, bitcast=True).to(out_desc.dtype))

    @triton.jit
    def exclude_self_kernel(y, v, gate, grad, out, grad_v, grad_gate, rows, v_stride, BACKWARD: tl.constexpr, KV: tl.constexpr,
                            GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
        """A row is a position and a value: out = gate * (y - (y.v / v.v) v) for the heads that share it; or, BACKWARD, all gradients."""
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, d = row < rows, tl.arange(0, DIM)
        value_at = (row // KV * v_stride + row % KV * DIM)[:, None] + d[None, :]
        value = tl.load(v + value_at, mask=inside[:, None], other=0.0).to(tl.float32)
        square = tl.maximum(tl.sum(value * value, 1), 1e-24)
        total = tl.zeros((BLOCK, DIM), dtype=tl.float32)
        for group in tl.static_range(GROUPS):
            head = row * GROUPS + group
            at = head[:, None] * DIM + d[None, :]
            x = tl.load(y + at, mask=inside[:, None], other=0.0).to(tl.float32)
            share = tl.load(gate + head, mask=inside, other=0.0).to(tl.float32)
            along = tl.sum(x * value, 1) / square
            rest = x - along[:, None] * value
            if BACKWARD:
                g = tl.load(grad + at, mask=inside[:, None], other=0.0).to(tl.float32)
                tl.store(grad_gate + head, tl.sum(g * rest, 1).to(grad_gate.dtype.element_ty), mask=inside)
                g = g * share[:, None]
                across = tl.sum(g * value, 1) / square
                tl.store(out + at, (g - across[:, None] * value).to(out.dtype.element_ty), mask=inside[:, None])
                total -= along[:, None] * g + across[:, None] * (rest - along[:, None] * value)
            else:
                tl.store(out + at, (share[:, None] * rest).to(out.dtype.element_ty), mask=inside[:, None])
        if BACKWARD:
            tl.store(grad_v + row[:, None] * DIM + d[None, :], total.to(grad_v.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def cross_entropy_kernel(logits, targets, losses, lses, width, stride, cap, BLOCK: tl.constexpr):
        """One row: lse = logsumexp(cap * tanh(logits / cap)), loss = lse - softcapped logit of the target."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        capped = tl.where(column < width, cap * (2 * tl.sigmoid(2 * x / cap) - 1), -float("inf"))
        top = tl.max(capped, 0)
        lse = top + tl.log(tl.sum(tl.exp(capped - top), 0))
        target = tl.load(targets + row)
        tl.store(lses + row, lse)
        tl.store(losses + row, lse - tl.sum(tl.where(column == target, capped, 0.0), 0))

    @triton.jit
    def cross_entropy_backward_kernel(logits, targets, lses, grads, out, width, stride, cap, BLOCK: tl.constexpr):
        """One row: out = grad * (softmax - onehot) * (1 - tanh^2), with 1 - tanh^2 = 4 s (1 - s), s = sigmoid(2x/cap)."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        s = tl.sigmoid(2 * x / cap)
        p = tl.exp(cap * (2 * s - 1) - tl.load(lses + row))
        p = tl.where(column == tl.load(targets + row), p - 1.0, p)
        value = tl.load(grads + row) * p * (4 * s * (1 - s))
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


def launch_mlp_kernel(a: Tensor, factor: Tensor, b: Tensor, hidden: Tensor, out: Tensor, backward: bool,
                      tile: tuple[int, int, int] = MLP_TILE) -> None:
    """Run mlp_kernel over contiguous matrices whose rows are multiples of 16 bytes (Hopper's copy engine asks for that)."""
    tile_m, tile_n, tile_k = tile
    a, b = a.contiguous(), b.contiguous()
    (rows, depth), columns = a.shape, out.size(1)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    mlp_kernel[(min(programs, triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n)),)](
        TensorDescriptor.from_tensor(a, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(b, [tile_k, tile_n] if backward else [tile_n, tile_k]),
        TensorDescriptor.from_tensor(hidden, [tile_m, tile_n // 2]),
        TensorDescriptor.from_tensor(out, [tile_m, tile_n // 2]),
        factor, rows, columns, depth, backward, 16 if out.dtype == torch.bfloat16 else 0, tile_m, tile_n, tile_k, programs,
        num_warps=8, num_stages=3)


@torch.library.custom_op(f"{OPERATORS}::mlp_up", mutates_args=())
def mlp_up_op(x: Tensor, factor: Tensor, w_up: Tensor) -> Tensor:
    """The activation of z = factor * x @ w_up^T, its last bit the sign of z: (T, d), (T, 1) float32, (h, d) -> (T, h)."""
    out = x.new_empty((x.size(0), w_up.size(0)))
    launch_mlp_kernel(x, factor, w_up, out, out, backward=False)
    return out


@torch.library.custom_op(f"{OPERATORS}::mlp_up_backward", mutates_args=())
def mlp_up_backward_op(grad: Tensor, factor: Tensor, w_down: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of x @ w_up^T from that of the MLP's output: (T, d), (T, 1) float32, (d, h), (T, h) -> (T, h).

    d/dz leaky(z)^2 is 2 z or z / 2: that is 2 or -1 times the root of the activation.
    """
    out = torch.empty_like(hidden)
    launch_mlp_kernel(grad, factor, w_down, hidden, out, backward=True)
    return out


mlp_up_op.register_fake(lambda x, factor, w_up: x.new_empty((x.size(0), w_up.size(0))))
mlp_up_backward_op.register_fake(lambda grad, factor, w_down, hidden: torch.empty_like(hidden))


class FusedMLP(torch.autograd.Function):
    """down(leaky_relu(factor * up(x), 0.5)^2) around the two fused products; the others are plain, for the compiler to place.

    Nothing but the activation is kept for the backward: the sign that squaring loses lies in its last bit, which costs it
    half a bit of precision and saves writing, keeping and reading the pre-activation, (T, h) a visit. The norm's factor (T, 1)
    comes apart from x, so that the normalised input is never written either.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        hidden = mlp_up_op(x, factor, w_up)
        ctx.save_for_backward(x, factor, w_up, w_down, hidden)
        return F.linear(hidden, w_down)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, factor, w_up, w_down, hidden = ctx.saved_tensors
        grad_before = mlp_up_backward_op(grad, factor, w_down, hidden)
        grad_x = grad_before @ w_up
        grad_factor = (grad_x.float() * x.float()).sum(-1, keepdim=True) / factor
        return grad_x, grad_factor, grad_before.t() @ x, grad.t() @ hidden


@torch.compiler.assume_constant_result
def has_tma() -> bool:
    """Whether this process's GPU has Hopper's copy engine. The compiler asks once; it cannot trace the question itself."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def kernels_take(x: Tensor) -> bool:
    """Whether the Triton kernels run on x: it is half precision and on a CUDA device that has TMA, and Triton is there."""
    return triton is not None and x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16) and has_tma()


def fused_mlp(x: Tensor, divisor: float, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The MLP of rms_norm(x) / divisor, all of one dtype. x (T, d), w_up (h, d), w_down (d, h) -> (T, d)."""
    if kernels_take(x) and x.dtype != torch.float16 and x.size(1) % 8 == 0 and w_up.size(0) % 8 == 0:
        return FusedMLP.apply(x, norm_factor(x) / divisor, w_up, w_down)
    return F.linear(activation(F.linear(rms_norm(x, divisor), w_up)), w_down)


class NormFromOutput(torch.autograd.Function):
    """rms_norm whose backward reads what it returned, which is kept anyway, in place of x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, divisor: float) -> Tensor:
        factor = norm_factor(x) / divisor
        y = (x.float() * factor).to(x.dtype)
        ctx.save_for_backward(y, factor)
        ctx.divisor = divisor
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        grad, y = grad.float(), y.float()
        along = ctx.divisor**2 * (grad * y).mean(-1, keepdim=True)
        return (factor * (grad - along * y)).to(ctx.saved_tensors[0].dtype), None


@torch.library.custom_op(f"{OPERATORS}::add_product_", mutates_args=("x",))
def add_product_op(x: Tensor, y: Tensor, w: Tensor) -> None:
    """x (T, d) += y (T, k) w^T."""
    x.addmm_(y, w.t())


class AddProduct(torch.autograd.Function):
    """x + y w^T, the sum made by the product where x stands: nobody may need x any more, or the compiler copies it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        out = x * 1.0  # a clone the compiler would take out, and then not join the norm of x with what writes x
        add_product_op(out, y, w)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, w = ctx.saved_tensors
        return grad, grad @ w, grad.t() @ y


def add_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """x (T, d) + y (T, k) w^T."""
    return AddProduct.apply(x, y, w) if kernels_take(x) else add(x, F.linear(y, w))


def launch_exclude_self(tensors: tuple[Tensor, ...], y: Tensor, v: Tensor, backward: bool) -> None:
    """Run exclude_self_kernel; the rows of v (T, Hkv, D) may lie apart, everything else is contiguous."""
    kv, dim, block = v.size(1), v.size(2), 32
    rows = y.size(0) * kv
    exclude_self_kernel[(triton.cdiv(rows, block),)](*tensors, rows, v.stride(0), BACKWARD=backward, KV=kv, GROUPS=y.size(1) // kv, DIM=dim,
                                                    BLOCK=block, num_warps=4)


@torch.library.custom_op(f"{OPERATORS}::exclude_self", mutates_args=())
def exclude_self_op(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """exclude_self by the kernel."""
    out = torch.empty_like(y)
    launch_exclude_self((y, v, gate, y, out, y, y), y, v, backward=False)
    return out


@torch.library.custom_op(f"{OPERATORS}::exclude_self_backward", mutates_args=())
def exclude_self_backward_op(grad: Tensor, y: Tensor, v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, v and gate by the kernel."""
    grads = torch.empty_like(y), v.new_empty(v.shape), torch.empty_like(gate)
    launch_exclude_self((y, v, gate, grad, *grads), y, v, backward=True)
    return grads


exclude_self_op.register_fake(lambda y, v, gate: torch.empty_like(y))
exclude_self_backward_op.register_fake(lambda grad, y, v, gate: (torch.empty_like(y), v.new_empty(v.shape), torch.empty_like(gate)))
exclude_self_op.register_autograd(lambda ctx, grad: exclude_self_backward_op(grad.contiguous(), *ctx.saved_tensors),
                                  setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def exclude_self(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Exclusive self-attention: y (T, H, D) without its part along the value v (T, Hkv, D) of its own position, times gate (T, H)."""
    if kernels_take(y) and v.size(2) in (16, 32, 64, 128):
        return exclude_self_op(y.contiguous(), v, gate.contiguous())
    v = v.float().repeat_interleave(y.size(1) // v.size(1), dim=1)
    along = (y.float() * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (gate.unsqueeze(-1) * (y.float() - along * v)).to(y.dtype)


def row_chunks(logits: Tensor) -> range:
    """First rows of chunks of at most CROSS_ENTROPY_CHUNK logits."""
    return range(0, logits.size(0), max(1, CROSS_ENTROPY_CHUNK // logits.size(1)))


def numbers_of_rows(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Room for two numbers a row, (T,), float32 or, for float64, that."""
    losses, lses = (logits.new_empty(logits.size(0), dtype=torch.promote_types(logits.dtype, torch.float32)) for _ in range(2))
    return losses, lses


@torch.library.custom_op(f"{OPERATORS}::softcapped_cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(T, V), (T,) -> losses (T,) and the logsumexp of each row (T,), float32."""
    losses, lses = numbers_of_rows(logits)
    if kernels_take(logits):
        cross_entropy_kernel[(logits.size(0),)](logits, targets, losses, lses, logits.size(1), logits.stride(0), cap,
                                                BLOCK=triton.next_power_of_2(logits.size(1)), num_warps=8)
        return losses, lses
    chunks = row_chunks(logits)
    for start in chunks:
        rows = slice(start, start + chunks.step)
        capped = logits[rows].to(losses.dtype).div(cap).tanh_().mul_(cap)
        lses[rows] = capped.logsumexp(-1)
        losses[rows] = lses[rows] - capped.gather(1, targets[rows, None]).squeeze(1)
    return losses, lses


@torch.library.custom_op(f"{OPERATORS}::softcapped_cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(grads: Tensor, logits: Tensor, targets: Tensor, lses: Tensor, cap: float) -> Tensor:
    """The gradient of the logits, in their dtype, from the gradients (T,) of the losses."""
    out = logits.new_empty(logits.shape)
    if kernels_take(logits):
        cross_entropy_backward_kernel[(logits.size(0),)](
            logits, targets, lses, grads, out, logits.size(1), logits.stride(0), cap,
            BLOCK=triton.next_power_of_2(logits.size(1)), num_warps=8)
        return out
    chunks = row_chunks(logits)
    for start in chunks:
        rows = slice(start, start + chunks.step)
        tanh = logits[rows].to(lses.dtype).div(cap).tanh_()
        p = (cap * tanh).sub_(lses[rows, None]).exp_()
        p.scatter_add_(1, targets[rows, None], p.new_full((p.size(0), 1), -1.0))
        out[rows] = p.mul_(tanh.square_().neg_().add_(1.0)).mul_(grads[rows, None])
    return out


def cross_entropy_backward(ctx: torch.autograd.function.FunctionCtx, grads: Tensor, _: Tensor) -> tuple:
    """autograd's side of cross_entropy_op."""
    logits, targets, lses = ctx.saved_tensors
    return cross_entropy_backward_op(grads.contiguous(), logits, targets, lses, ctx.cap), None, None


def cross_entropy_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward of cross_entropy_op reads: the logits as they came, never their float32 form."""
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


cross_entropy_op.register_fake(numbers_of_rows)
cross_entropy_backward_op.register_fake(lambda grads, logits, targets, lses, cap: logits.new_empty(logits.shape))
cross_entropy_op.register_autograd(cross_entropy_backward, setup_context=cross_entropy_setup)


def softcapped_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Per-token cross entropy of cap * tanh(logits / cap). logits (T, V), targets (T,) int64 -> (T,) float32 nats.

    No float32 copy of all the logits ever exists, forward or backward; the gradient has the dtype of the logits.
    """
    return cross_entropy_op(logits, targets, float(cap))[0]


# ======================================================================================================================
# 13. Main
# ======================================================================================================================


def output_path(cfg: Config, suffix: str) -> Path:
    return Path(cfg.artifact_dir, cfg.run_id + suffix)


def open_log(cfg: Config, ranks: Ranks) -> Log:
    """The run's log, which a run that goes on appends to; that of an evaluation gets the first free name."""
    path = output_path(cfg, ".log")
    if ranks.rank:
        return Log(path, enabled=False)
    if cfg.eval_only:
        names = (output_path(cfg, f".eval{n}.log") for n in itertools.count(1))
        path = next(name for name in names if not name.exists())
    try:
        log, free = Log(path), shutil.disk_usage(path.parent).free
        if cfg.losses_path:
            losses = Path(cfg.losses_path)
            losses.parent.mkdir(parents=True, exist_ok=True)
            require(not losses.is_dir(), f"LOSSES_PATH={cfg.losses_path} is a folder")
            tempfile.TemporaryFile(dir=losses.parent).close()  # it is written after training, which must not be in vain
    except OSError as error:
        raise ValueError(f"cannot write to {error.filename or path.parent}: {error.strerror}; set ARTIFACT_DIR or LOSSES_PATH to a place "
                         "you may write to") from error
    require(free >= 4 * ARTIFACT_CAP_BYTES, f"only {free / 1e6:.0f} MB free in {path.parent}: the log and the artifact need "
                                            f"{4 * ARTIFACT_CAP_BYTES / 1e6:.0f}; free some space there or set ARTIFACT_DIR")
    return log


def log_start(run: Run, environ: Mapping[str, str]) -> None:
    """What ran, with which settings, on what."""
    log, cfg, device = run.log, run.cfg, run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    log.record("run", id=cfg.run_id, seed=cfg.seed, ranks=run.ranks.world, device=f'"{name}"', torch=torch.__version__,
               python=platform.python_version(), threads=torch.get_num_threads(), attention=attention_backend.name,
               compile=int(run.compile), date=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}")
    if attention_backend.skipped:
        log(f"faster attention was passed over: {attention_backend.skipped}")
    code, source = counted_code(), own_source().encode()
    log.record("code", file="train_gpt.py", bytes=len(code), sha256=hashlib.sha256(code).hexdigest(), source_bytes=len(source),
               source_sha256=hashlib.sha256(source).hexdigest())
    for f in fields(cfg):
        value, starred = format_setting(getattr(cfg, f.name)), getattr(cfg, f.name) != f.default
        default = f" default:{format_setting(f.default)}" if starred else ""
        log(f"setting {'*' if starred else ''}{f.name.upper()} value:{value}{default}")
    for found, meant in misspelt_settings(environ):
        log(f"warning: {found} is no setting; did you mean {meant}? It has no effect")


def prepare(run: Run, environ: Mapping[str, str]) -> tuple[list[np.ndarray], ValData]:
    """Log the start and check the data; the training shards and the validation set."""
    cfg, log = run.cfg, run.log
    resolve_attention(cfg.attn_backend, run.device)
    log_start(run, environ)
    dataset = Dataset(cfg.shards_dir)
    train, val = check_dataset(cfg, dataset)
    sizes = {path.name: len(shard) for path, shard in zip(dataset.paths["train"], train)}
    run.ranks.check_same({**sizes, "validation set": hashlib.sha256(val.tokens.tobytes() + val.byte_counts.tobytes()).hexdigest()})
    log(check_tokenizer(cfg, dataset))
    if cfg.val_doc_fraction < 1:
        log(f"warning: VAL_DOC_FRACTION={cfg.val_doc_fraction:g}: only {val.documents} documents are scored, no full score")
    trained = {} if cfg.eval_only else {"train_shards": len(train), "train_tokens": sum(map(len, train))}
    log.record("data", **trained, val_tokens=len(val.tokens), val_bytes=val.num_bytes, val_docs=val.documents,
               published=int(cfg.shards_dir.name == PUBLISHED_NAME))
    return train, val


def train_and_export(run: Run, shards: list[np.ndarray], val: ValData, checkpoint: Checkpoint) -> bytes:
    """Everything from the first weights to the artifact, whose bytes all ranks get; from a checkpoint, if there is one.

    Before Stopped leaves it, a checkpoint has been written.
    """
    cfg, log, layout = run.cfg, run.log, SpanLayout.plan(run.cfg, run.ranks.world)
    check_memory(run, layout)
    model = GPT(cfg, run.dtype)
    model.init_weights(cfg.seed)
    model.to(run.device)
    log(f"model of {sum(p.numel() for p in model.parameters()):,} parameters; a step is {layout.spans} spans of "
        f"{layout.span_tokens} tokens, {layout.per_rank // layout.per_micro} forwards of {layout.micro_tokens} tokens a rank")
    trainer = Trainer(run, model, TrainLoader(shards, cfg, run.ranks))
    trainer.warm_up()
    checkpoint.resume(trainer)
    run.ranks.keeps_signals = True  # what is trained is saved first
    try:
        if trainer.end is None:
            train(run, trainer, val, checkpoint)
            trainer.load_averaged_weights()
        ema = evaluate(run, model, val, "ema", cfg.eval_loop_depth)
        if cfg.losses_path:
            write_losses(run, {"ema": ema})
        trainer.clock.start()
        hessians = collect_hessians(run, model, trainer.loader)
        train_ms = trainer.clock.stop()
        return export(run, model, hessians, checkpoint, trainer.step, train_ms)
    except Stopped:
        checkpoint.write(trainer)
        raise
    finally:
        run.ranks.keeps_signals = False


def export(run: Run, model: GPT, hessians: dict[str, Tensor], checkpoint: Checkpoint, steps: int, train_ms: float) -> bytes:
    """Quantize, pack and write the artifact; its bytes, on every rank."""
    cfg, began, code_bytes = run.cfg, time.perf_counter(), len(counted_code())
    tensors, data = quantize_and_pack(run, model, hessians, code_bytes)
    for row in size_table(data, tensors, cfg) if data else []:  # on rank 0
        run.log.record("size", **row)
    data = run.ranks.agree(data)
    checkpoint.export(data, steps=steps, train_ms=train_ms)
    run.log.record("artifact", model_bytes=len(data), code_bytes=code_bytes, total_bytes=len(data) + code_bytes,
                   cap_bytes=ARTIFACT_CAP_BYTES, sha256=hashlib.sha256(data).hexdigest(), quantize_and_pack_ms=int(since_ms(began)),
                   path=output_path(cfg, ".artifact"))
    return data


def write_losses(run: Run, scores: dict[str, Score]) -> None:
    """LOSSES_PATH gets an array a score, (targets,) float32 nats in data order, whatever rank scored them. A collective.

    A training run adds to what the file holds: its first score is there before the artifact is.
    """
    joined = {name: np.fmax.reduce(run.ranks.gather(score.losses)) for name, score in scores.items()}  # fmax passes over NaN
    if run.ranks.rank == 0:
        path, buffer = Path(run.cfg.losses_path), io.BytesIO()
        before = dict(np.load(path)) if "ema" not in joined and not run.cfg.eval_only and path.exists() else {}
        np.savez(buffer, **before | joined)
        write_atomically(path, buffer.getvalue())


def score_and_finish(run: Run, val: ValData, artifact: bytes, trained: dict[str, Any]) -> int:
    """Score the artifact's model, then with test-time training if enabled; the final lines and the exit status.

    `trained` holds steps and train_ms where this run made it. The budget counts reading the artifact and the score that is
    final, from after its warm-up.
    """
    cfg, clock, log = run.cfg, Clock(run.device), run.log
    clock.start()
    model = model_from_tensors(run, unpack_artifact(artifact)[1])
    clock.stop()
    plain = score = evaluate(run, model, val, "quantized", cfg.eval_loop_depth)
    if cfg.ttt_enabled:
        score = score_with_ttt(run, model, val)
    if cfg.losses_path:
        write_losses(run, {"quantized": plain} | ({"quantized_ttt": score} if cfg.ttt_enabled else {}))
    eval_ms, total_bytes = clock.total_ms + score.time_ms, len(artifact) + len(counted_code())
    problems = [f"{what} took {time_ms / 1e3:.1f} s, over the budget of {budget:g} s"
                for what, time_ms, budget in (("training", trained.get("train_ms", 0.0), cfg.max_wallclock_seconds),
                                              ("evaluation", eval_ms, cfg.eval_budget_seconds))
                if budget and time_ms > 1e3 * budget]
    if total_bytes > ARTIFACT_CAP_BYTES:
        over = total_bytes - ARTIFACT_CAP_BYTES
        problems.append(f"artifact and code are {total_bytes} bytes, {over} over the cap of {ARTIFACT_CAP_BYTES}")
    log.record("final", seed=cfg.seed, val_loss=f"{score.val_loss:.8f}", val_bpb=f"{score.val_bpb:.8f}", pre_ttt_bpb=f"{plain.val_bpb:.8f}",
               **{name: int(number) for name, number in trained.items()}, eval_ms=int(eval_ms), total_bytes=total_bytes)
    for problem in problems:
        log(f"error: {problem}")
    return EXIT_OVER_LIMIT if problems else 0


def read_artifact(cfg: Config, ranks: Ranks) -> tuple[bytes, Config]:
    """The artifact to score, read by rank 0 alone, and the settings in it; ValueError if it cannot be."""
    path = Path(cfg.artifact_path) if cfg.artifact_path else output_path(cfg, ".artifact")
    data, stored = b"", cfg
    if ranks.rank == 0:
        require(path.is_file(),
                f"no artifact at {path}; set ARTIFACT_PATH to one, or ARTIFACT_DIR and RUN_ID to those of the run that made it")
        size = path.stat().st_size
        require(size <= ARTIFACT_MAX_FILE_BYTES, f"{path}: {size} bytes are more than an artifact may have ({ARTIFACT_MAX_FILE_BYTES})")
        try:
            data = path.read_bytes()
            stored = open_artifact(data)[0]
        except (ArtifactError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
    return ranks.agree((data, stored))


def adopt_settings(cfg: Config, stored: Config, environ: Collection[str]) -> tuple[Config, list[str]]:
    """The settings to score an artifact with, and words about every one named in the environment that is not the artifact's.

    What the weights mean is the artifact's business; how they are scored, the environment may change.
    """
    taken, words = {}, []
    for f in STORED_SETTINGS:
        given, value = getattr(cfg, f.name), getattr(stored, f.name)
        differs = f.name.upper() in environ and given != value
        taken[f.name] = given if differs and f.metadata["score"] else value
        if differs:
            words.append(f"{f.name.upper()}={format_setting(given)} differs from the artifact's {format_setting(value)}: "
                         + ("it is scored with yours" if f.metadata["score"] else "the artifact's is used"))
    if "VAL_BATCH_TOKENS" not in environ:
        taken["val_batch_tokens"] = max(cfg.val_batch_tokens, 8 * taken["eval_seq_len"])
    cfg = replace(cfg, **taken)
    cfg.check_together()
    return cfg, words


def run_stages(run: Run, environ: Mapping[str, str]) -> int:
    """A run, or a part of it: what has been done already under this RUN_ID is not done again."""
    cfg = run.cfg
    if cfg.eval_only:
        data, stored = read_artifact(cfg, run.ranks)
        run.cfg, words = adopt_settings(cfg, stored, run.ranks.agree(list(environ)))
        _, val = prepare(run, environ)
        for text in words:
            run.log(f"warning: {text}")
        return score_and_finish(run, val, data, {})
    SpanLayout.plan(cfg, run.ranks.world)  # says at once if the ranks do not divide the batch
    checkpoint = Checkpoint(run)
    shards, val = prepare(run, environ)
    data = checkpoint.exported() or train_and_export(run, shards, val, checkpoint)
    status = score_and_finish(run, val, data, {name: checkpoint.record[name] for name in ("steps", "train_ms")})
    checkpoint.done()
    return status


def describe(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit status."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        number = getattr(error, "number", signal.SIGINT)
        return (f"stopped by {signal.Signals(number).name}; the same command, with the RUN_ID of this log, goes on from what is there",
                128 + number)
    if isinstance(error, torch.OutOfMemoryError):
        hint = "set MICRO_BATCH_TOKENS, VAL_BATCH_TOKENS or TTT_BATCH_SIZE lower"
        return f"out of GPU memory: {str(error).splitlines()[0]}; {hint}", EXIT_USER_ERROR
    if isinstance(error, (ValueError, OSError)):
        return str(error), EXIT_USER_ERROR
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch has no kind of its own for it on a CPU
        return "out of memory: smaller batches, models or data take less", EXIT_USER_ERROR
    return f"{type(error).__name__}: {error}", 1


def describe_lost(error: BaseException, ranks: Ranks) -> str:
    """Which ranks were killed, when a collective has failed: those whose watches leave no new note, or have left none yet."""
    with suppress(RuntimeError, OSError):
        before, _, after = ranks.posted("at"), time.sleep(4 * LOOK_SECONDS), ranks.posted("at")
        if killed := [str(rank) for rank in range(ranks.world) if after.get(rank) == before.get(rank)]:
            return f"rank {', '.join(killed)} was killed, or its machine was"
    return f"lost the other ranks: {str(error).splitlines()[0][:300]}"


def fail(error: BaseException, ranks: Ranks, log: Log) -> int:
    """Report an error once for the whole run, without any collective: the other ranks may be waiting in one."""
    ranks.keeps_signals = True
    text, status = describe(error)
    if status == 1 and not isinstance(error, RuntimeError):
        traceback.print_exc()
    lost = ranks.world > 1 and isinstance(error, RuntimeError) and re.search("(?i)gloo|nccl|connection", str(error))
    if lost:  # for a reason of another's
        text = describe_lost(error, ranks)
    elif ranks.rank:
        text = f"rank {ranks.rank}: {text}"
    line = text if status > 128 else f"error: {text}"
    if ranks.world == 1 or ranks.stopping:
        log(line)
        return status
    reason = f"{status} {line}"
    with suppress(RuntimeError, OSError):
        first = ranks.first("reason", reason)
        reason = first if lost else reason
    end_run(ranks, log, reason, waited=bool(lost))


def main(environ: Mapping[str, str] = os.environ, arguments: tuple[str, ...] = ()) -> int:
    """Run as the environment says; the exit status: 0, 2 for what the user can mend, 3 over a cap or budget, 128 + a signal's number."""
    if arguments:
        if arguments[0] == "--pack":
            sys.stdout.buffer.write(counted_code())
            return 0
        known = {"--help": settings_help(), "--source": own_source()}
        print(known.get(arguments[0], f"{arguments[0]} is not known; settings are environment variables (--help lists them, --source "
                                      "prints the code, --pack packs it)"))
        return 0 if arguments[0] in known else EXIT_USER_ERROR
    ranks, log, handlers = Ranks(), Log(), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        cfg = Config.from_env(environ)
        ranks = Ranks.start(environ, cfg.rank_timeout_seconds)
        name = f"{datetime.now(timezone.utc):%Y%m%d_%H%M%S}_seed{cfg.seed}_{os.urandom(3).hex()}"
        cfg = replace(cfg, **ranks.agree({"run_id": cfg.run_id or name, "losses_path": cfg.losses_path}))
        log = open_log(cfg, ranks)
        watch = Watch(ranks, log, cfg.rank_timeout_seconds)
        ranks.check_same(identity(cfg, but=PLACES))  # a rank with other settings would wait in other places
        use_compile = cfg.compile == "1" or (cfg.compile == "auto" and ranks.device.type == "cuda")
        status = run_stages(Run(cfg, ranks, log, use_compile), environ)
        watch.over.set()
        ranks.stop()
        return status
    except SystemExit:
        raise
    except BaseException as error:
        return fail(error, ranks, log)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    if sys.argv[1:]:  # --help and the like end with their reader
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(arguments=tuple(sys.argv[1:])))
