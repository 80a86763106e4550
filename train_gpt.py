"""Train, quantize and score the best language model that fits 16 MB, in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        # the record's settings, on eight H100s
    bash run.sh                                                  # the same system, small, on any machine

A run goes through these stages, and this file is in their order:

    settings -> ranks and log -> data checked and opened -> looped GPT built
    -> warm-up: every graph compiled and run once, then everything put back; the clock starts
    -> training: depth 1, then 3, then 4; Muon and AdamW; a moving average (EMA) of the weights
    -> Hessians from training data; the clock stops
    -> GPTQ on the averaged weights -> one artifact file, counted against 16,000,000 bytes
    -> the file is read back and scored: every target of the validation set once
    -> scored again with test-time training (TTT): each token is scored before anything learns from it
    -> the line `final seed:... val_bpb:...`

Contents: 1 configuration - 2 run context - 3 data - 4 attention - 5 model - 6 optimizers - 7 training -
8 quantization - 9 artifact container - 10 evaluation - 11 test-time training - 12 kernels (appendix) - 13 main.

Glossary. *visit*: one place in the unrolled schedule, where one physical layer is applied; a looped layer is visited
several times. *depth*: passes through the loop block. *schedule*: the visits of one depth, cut into encoder and decoder.
*site*: (layer, visit, name), the address of one use of one weight. *segment*: a stretch of the token stream that attention
does not cross: a document or a piece of one. *sidecar*: for each validation token the bytes of original text it stands for.
*bpb*: bits per byte, the score: nats / ln 2 / bytes of the original text.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the kernels of section 12 need it; everything else runs without
    triton = None

ARTIFACT_CAP_BYTES = 16_000_000  # decimal, model and code together
BOS_ID = 1
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
OPERATORS = __name__.strip("_")  # namespace of the operators: two copies of this file in one process must not share it


# ======================================================================================================================
# 1. Configuration
#
# One frozen dataclass; every field is one environment variable of the same name in capitals. The defaults are the
# record's values. `Config.from_env` is the only reader of settings; nothing below looks at the environment, except the
# run context for what torchrun sets.
# ======================================================================================================================


class Check(NamedTuple):
    """What a setting may be: words for the error message, and the test."""

    text: str
    accepts: Callable[[Any], bool]


def at_least(low: float) -> Check:
    return Check(f"at least {low:g}", lambda value: value >= low)


def above(low: float) -> Check:
    return Check(f"above {low:g}", lambda value: value > low)


def between(low: float, high: float) -> Check:
    return Check(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*words: str) -> Check:
    return Check("one of " + ", ".join(words), lambda value: value in words)


ANY = Check("any text", lambda value: True)
EACH_AT_LEAST_1 = Check("whole numbers of at least 1 with commas between", lambda value: all(v >= 1 for v in value))
EACH_ABOVE_0 = Check("numbers above 0 with commas between", lambda value: all(v > 0 for v in value))
FLAG = Check("0 or 1", lambda value: True)


def setting(default: Any, doc: str, check: Check) -> Any:
    """A field of Config: default, one line of documentation, what is allowed."""
    return field(default=default, metadata={"doc": doc, "check": check})


@dataclass(frozen=True)
class Config:
    """All settings of a run. `Config()` is the published record."""

    # where things are
    data_dir: str = setting("./data", "folder that holds datasets/ and tokenizers/", ANY)
    data_path: str = setting("", "folder of the shards; empty: the published data set under DATA_DIR", ANY)
    tokenizer_path: str = setting("", "SentencePiece model; empty: the published one under DATA_DIR", ANY)
    caseops_enabled: bool = setting(True, "bytes come from the sidecar; 0: from the tokenizer's pieces", FLAG)
    artifact_dir: str = setting("./runs", "folder for the log and the artifact of a run", ANY)
    run_id: str = setting("", "name of the run's files; empty: time and seed", Check(
        "letters, digits, '.', '_' and '-'", lambda v: re.fullmatch(r"[\w.-]*", v) is not None))
    artifact_path: str = setting("", "with EVAL_ONLY: the artifact to score; empty: that of RUN_ID", ANY)
    eval_only: bool = setting(False, "score an existing artifact, no training data needed", FLAG)
    # the run
    seed: int = setting(1337, "seed of initialisation and adapters", between(0, 2**31 - 1))
    iterations: int = setting(20000, "steps at most; with no time cap, exactly", at_least(1))
    max_wallclock_seconds: float = setting(600.0, "training time, Hessians included; 0: no cap", at_least(0))
    eval_budget_seconds: float = setting(600.0, "time that the final scoring may take; 0: no cap", at_least(0))
    warmup_steps: int = setting(20, "steps at each depth before the clock, all undone", at_least(0))
    warmdown_frac: float = setting(0.75, "last share of the run, in which the learning rate falls", between(0, 1))
    min_lr: float = setting(0.0, "learning rate at the end, as a share", between(0, 1))
    train_batch_tokens: int = setting(786432, "tokens of one step, over all ranks", at_least(8))
    micro_batch_tokens: int = setting(98304, "tokens of one forward on one rank, at most", at_least(1))
    train_seq_len: int = setting(2048, "tokens that attention sees at most in training", at_least(2))
    eval_seq_len: int = setting(2048, "the same in evaluation", at_least(2))
    val_batch_tokens: int = setting(524288, "tokens of eight evaluation batches", at_least(16))
    val_loss_every: int = setting(4000, "steps between evaluations; 0: only at the end", at_least(0))
    checkpoint_every: str = setting("", "write the complete state every N steps (`200`) or seconds (`60s`); empty: never", Check(
        "a whole number of steps, or of seconds with an s behind it", lambda v: re.fullmatch(r"([1-9]\d*s?)?", v) is not None))
    train_log_every: int = setting(500, "steps between log lines", at_least(1))
    compile: str = setting("auto", "torch.compile: auto is on for CUDA, off for a CPU", one_of("auto", "0", "1"))
    attn_backend: str = setting("auto", "attention kernel", one_of("auto", "fa3", "fa4", "varlen", "sdpa"))
    # the model
    vocab_size: int = setting(8192, "tokens in the alphabet", between(2, 65536))
    num_layers: int = setting(11, "physical layers", at_least(1))
    model_dim: int = setting(512, "width", at_least(2))
    num_heads: int = setting(8, "query heads", at_least(1))
    num_kv_heads: int = setting(4, "key and value heads", at_least(1))
    mlp_mult: int = setting(4, "hidden width of the MLP over MODEL_DIM", at_least(1))
    xsa_last_n: int = setting(11, "layers, from the last, with exclusive self-attention", at_least(0))
    rope_base: float = setting(10000.0, "base of the rotary frequencies", above(1))
    rope_dims: int = setting(16, "dimensions of a head that rotate", at_least(0))
    qk_gain_init: float = setting(5.0, "initial gain of the queries", above(0))
    logit_softcap: float = setting(30.0, "logits are cap * tanh(logits / cap)", above(0))
    ln_scale: bool = setting(True, "layer i reads its normalised input over sqrt(i + 1)", FLAG)
    skip_gates_enabled: bool = setting(True, "skips are mixed in through a gate; 0: added", FLAG)
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding", above(0))
    num_loops: int = setting(2, "extra passes of the loop without phase depths; sizes the skips", at_least(0))
    loop_start: int = setting(3, "first looped layer", at_least(0))
    loop_end: int = setting(5, "last looped layer", at_least(0))
    enable_looping_at: float = setting(0.35, "share of the run without loops when no phase depths are set", between(0, 1))
    train_loop_phase_depths: tuple[int, ...] = setting((1, 3, 4), "depth curriculum; 'none': ENABLE_LOOPING_AT", EACH_AT_LEAST_1)
    train_loop_phase_fractions: tuple[float, ...] = setting((), "shares of the phases; empty: equal", EACH_ABOVE_0)
    train_loop_prewarm_depths: tuple[int, ...] = setting((3, 4), "depths compiled before the clock", EACH_AT_LEAST_1)
    eval_loop_depth: int = setting(4, "depth of evaluation, calibration and TTT", at_least(1))
    parallel_start_layer: int = setting(8, "first layer with two residual lanes", at_least(0))
    parallel_final_lane: str = setting("mean", "lane that is read at the end", one_of("mean", "attn", "mlp"))
    gated_attn_enabled: bool = setting(True, "one sigmoid gate a head", FLAG)
    gated_attn_init_std: float = setting(0.005, "standard deviation of the initial gate weights", at_least(0))
    gated_attn_quant_gate: bool = setting(True, "gate weights in int8; 0: float16", FLAG)
    # the optimizers
    matrix_lr: float = setting(0.026, "learning rate of Muon, the four banks", at_least(0))
    tied_embed_lr: float = setting(0.03, "learning rate of AdamW on the embedding", at_least(0))
    scalar_lr: float = setting(0.02, "learning rate of AdamW on the small parameters", at_least(0))
    muon_momentum: float = setting(0.97, "momentum of Muon", between(0, 1))
    muon_momentum_warmup_start: float = setting(0.92, "momentum at the first step", between(0, 1))
    muon_momentum_warmup_steps: int = setting(1500, "steps until MUON_MOMENTUM is reached", at_least(0))
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations", at_least(1))
    muon_row_normalize: bool = setting(True, "rows of the update get unit norm first", FLAG)
    muon_wd: float = setting(0.095, "decoupled weight decay of the banks", at_least(0))
    embed_wd: float = setting(0.085, "weight decay of the embedding", at_least(0))
    adam_wd: float = setting(0.02, "weight decay of the small parameters", at_least(0))
    beta1: float = setting(0.9, "AdamW", between(0, 1))
    beta2: float = setting(0.95, "AdamW", between(0, 1))
    adam_eps: float = setting(1e-8, "AdamW", above(0))
    grad_clip_norm: float = setting(0.3, "norm of the averaged gradient, at most; 0: no limit", at_least(0))
    ema_decay: float = setting(0.9965, "moving average of the weights, a step; these are exported", between(0, 1))
    # the artifact
    compressor: str = setting("brotli", "entropy coder of the artifact", one_of("brotli", "lzma", "rans"))
    quantizer: str = setting("scalar", "rounding inside GPTQ: 'trellis' takes fewer bytes", one_of("scalar", "trellis"))
    artifact_target_bytes: int = setting(0, "bytes of artifact and code to fill by one factor on all clip sigmas; 0: only if over the cap", at_least(0))
    matrix_bits: int = setting(6, "bits of a matrix weight", between(2, 8))
    embed_bits: int = setting(7, "bits of an embedding weight", between(2, 8))
    matrix_clip_sigmas: float = setting(12.85, "range of other matrices in standard deviations of a row", above(0))
    mlp_clip_sigmas: float = setting(12.0, "range of MLP matrices", above(0))
    attn_clip_sigmas: float = setting(13.0, "range of attention matrices", above(0))
    embed_clip_sigmas: float = setting(15.0, "range of the embedding", above(0))
    gptq_calibration_batches: int = setting(16, "training batches for the Hessians", at_least(1))
    gptq_reserve_seconds: float = setting(4.0, "training time kept for the Hessians", at_least(0))
    # test-time training
    ttt_enabled: bool = setting(True, "score again with test-time training", FLAG)
    phased_ttt_enabled: bool = setting(True, "global SGD phases on documents already scored", FLAG)
    ttt_context: str = setting("window", "what a chunk sees of earlier ones: computed again, or keys and values kept",
                               one_of("window", "cache"))
    ttt_lora_rank: int = setting(96, "rank of the adapters", at_least(1))
    ttt_lora_lr: float = setting(1e-4, "learning rate of the adapters", at_least(0))
    ttt_lora_lr_power: float = setting(0.0, "update n of a document has the learning rate times n to this power", between(-1, 0))
    ttt_chunk_size: int = setting(48, "tokens scored between two updates", at_least(1))
    ttt_chunk_doubles_at: tuple[int, ...] = setting((), "positions in a document from which chunks are twice as large", EACH_AT_LEAST_1)
    ttt_eval_seq_len: int = setting(2048, "tokens that a chunk sees at most, itself included (a cache: whole chunks)", at_least(2))
    ttt_batch_size: int = setting(64, "documents adapted side by side", at_least(1))
    ttt_grad_steps: int = setting(1, "updates a chunk", at_least(1))
    ttt_weight_decay: float = setting(0.5, "decoupled weight decay of the adapters", at_least(0))
    ttt_beta1: float = setting(0.0, "AdamW on the adapters", between(0, 1))
    ttt_beta2: float = setting(0.999, "AdamW on the adapters", between(0, 1))
    ttt_q_lora: bool = setting(True, "adapters on the queries", FLAG)
    ttt_k_lora: bool = setting(True, "adapters on the keys", FLAG)
    ttt_v_lora: bool = setting(True, "adapters on the values", FLAG)
    ttt_o_lora: bool = setting(True, "adapters around attention", FLAG)
    ttt_mlp_lora: bool = setting(True, "adapters around the MLP", FLAG)
    val_doc_fraction: float = setting(1.0, "share of the validation documents to score; below 1 is no full score", Check(
        "above 0, up to 1", lambda v: 0 < v <= 1))
    phased_ttt_prefix_docs: int = setting(2000, "documents that the global SGD may learn from", at_least(0))
    phased_ttt_num_phases: int = setting(3, "parts of the prefix, each followed by global SGD", at_least(1))
    global_ttt_lr: float = setting(1e-3, "learning rate of the global SGD", at_least(0))
    global_ttt_momentum: float = setting(0.9, "its momentum", between(0, 1))
    global_ttt_epochs: int = setting(1, "its passes over the documents", at_least(0))
    global_ttt_chunk_tokens: int = setting(32768, "tokens of one of its steps", at_least(2))
    global_ttt_batch_seqs: int = setting(32, "sequences of one of its forwards", at_least(1))
    global_ttt_grad_clip: float = setting(1.0, "norm of its gradient, at most; 0: no limit", at_least(0))

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read every setting from `environ`; ValueError names the variable, its value and what is allowed."""
        values = {}
        for f in fields(cls):
            if (text := environ.get(f.name.upper())) is not None:
                values[f.name] = parse_setting(f, text)
        cfg = cls(**values)
        cfg.check_together()
        return cfg

    def check_together(self) -> None:
        """Conditions that join several settings; ValueError names them."""
        head_dim = self.model_dim // self.num_heads
        depths = len(self.train_loop_phase_depths)
        rules = [
            (self.model_dim % self.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"),
            (self.num_heads % self.num_kv_heads == 0, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
            (self.rope_dims % 2 == 0 and self.rope_dims <= head_dim, f"ROPE_DIMS must be even and at most {head_dim}"),
            (self.loop_start <= self.loop_end < self.num_layers, "LOOP_START <= LOOP_END < NUM_LAYERS must hold"),
            (self.loop_end < self.parallel_start_layer, "LOOP_END must be below PARALLEL_START_LAYER"),
            (not self.train_loop_phase_fractions or len(self.train_loop_phase_fractions) == depths,
             "TRAIN_LOOP_PHASE_FRACTIONS must have one share for each of TRAIN_LOOP_PHASE_DEPTHS"),
            (self.max_wallclock_seconds == 0 or self.gptq_reserve_seconds < self.max_wallclock_seconds,
             "GPTQ_RESERVE_SECONDS must be below MAX_WALLCLOCK_SECONDS"),
            (self.train_batch_tokens % 8 == 0, "TRAIN_BATCH_TOKENS must be a multiple of 8"),
            (self.val_batch_tokens // 8 >= self.eval_seq_len, "VAL_BATCH_TOKENS must be at least 8 * EVAL_SEQ_LEN"),
            (self.chunk_sizes[-1] <= self.ttt_eval_seq_len,
             "TTT_CHUNK_SIZE, doubled by TTT_CHUNK_DOUBLES_AT, must be at most TTT_EVAL_SEQ_LEN"),
            (not self.ttt_chunk_doubles_at or self.ttt_context == "cache", "TTT_CHUNK_DOUBLES_AT needs TTT_CONTEXT=cache"),
            (all(a < b for a, b in zip(self.ttt_chunk_doubles_at, self.ttt_chunk_doubles_at[1:]))
             and all(at % size == 0 for at, size in zip(self.ttt_chunk_doubles_at, self.chunk_sizes[1:])),
             "TTT_CHUNK_DOUBLES_AT must ascend, each a multiple of the chunks that begin there (TTT_CHUNK_SIZE times 2, 4, ...)"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(f"{message} (here: {self.named_in(message)})")

    def named_in(self, message: str) -> str:
        """The values of the settings that a message mentions."""
        names = [f.name for f in fields(self) if re.search(rf"\b{f.name.upper()}\b", message)]
        return ", ".join(f"{name.upper()}={format_setting(getattr(self, name))}" for name in names)

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
        if self.data_path:
            return Path(self.data_path)
        if not self.caseops_enabled:
            return Path(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}")
        return self._caseops_root / "datasets" / f"fineweb10B_sp{self.vocab_size}_lossless_caps_caseops_v1_reserved"

    @property
    def tokenizer_file(self) -> Path:
        """SentencePiece model: TOKENIZER_PATH, else the published layout under DATA_DIR."""
        if self.tokenizer_path:
            return Path(self.tokenizer_path)
        if not self.caseops_enabled:
            return Path(self.data_dir, "tokenizers", f"fineweb_{self.vocab_size}_bpe.model")
        return self._caseops_root / "tokenizers" / f"fineweb_{self.vocab_size}_bpe_lossless_caps_caseops_v1_reserved.model"

    @property
    def _caseops_root(self) -> Path:
        return Path(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}_caseops", "datasets")


# What an artifact carries: the settings that decide which function its tensors are.
MODEL_SETTINGS = (
    "vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult xsa_last_n rope_base rope_dims logit_softcap ln_scale "
    "skip_gates_enabled num_loops loop_start loop_end eval_loop_depth parallel_start_layer parallel_final_lane "
    "gated_attn_enabled"
).split()


def parse_setting(f: Any, text: str) -> Any:
    """The value of field `f` written as `text`; ValueError names the variable, its value and what is allowed."""
    check: Check = f.metadata["check"]
    kind, text = str(f.type), text.strip()
    parse = {"int": int, "float": float, "str": str}.get(kind)
    try:
        if kind == "bool":
            value: Any = {"0": False, "1": True}[text]
        elif kind.startswith("tuple"):
            items = [] if text in ("", "none") else text.split(",")
            value = tuple((int if "int" in kind else float)(item) for item in items)
        else:
            value = parse(text)
        numbers = value if isinstance(value, tuple) else (value,)
        good = all(math.isfinite(n) for n in numbers if isinstance(n, float)) and check.accepts(value)
    except (ValueError, KeyError):
        good = False
    if not good:
        what = {"int": "a whole number, ", "float": "a number, "}.get(kind, "")
        raise ValueError(f"{f.name.upper()}={text!r} is not allowed; it must be {what}{check.text} (default "
                         f"{format_setting(f.default)})")
    return value


def format_setting(value: Any) -> str:
    """A setting as one writes it in the environment."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(map(format_setting, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def misspelt_settings(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name found, name meant) for every variable that is close to a setting but is none."""
    known = {f.name.upper() for f in fields(Config)}
    found = []
    for name in sorted(environ):
        if name not in known and re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", name):
            found += [(name, meant) for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.85)]
    return found


# ======================================================================================================================
# 2. Run context
#
# What a process knows of its surroundings: its rank, its device, the log and the clock. On one process `Ranks` is the
# identity, so nothing else asks whether torch.distributed is up.
# ======================================================================================================================


@dataclass
class Ranks:
    """The processes of a run. Tensor collectives run on the device, object collectives and the clock on the host."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    host_group: Any = None  # a gloo group: small decisions must not wait for the GPU
    local_world: int = 1  # processes on this machine

    @classmethod
    def start(cls, environ: Mapping[str, str]) -> Ranks:
        """Join the other processes that torchrun started, if any; NCCL on CUDA, gloo on a CPU."""
        world, local_rank = int(environ.get("WORLD_SIZE", 1)), int(environ.get("LOCAL_RANK", 0))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise ValueError(f"local rank {local_rank}, but only {torch.cuda.device_count()} GPUs here; "
                                 f"start torchrun with --nproc_per_node={torch.cuda.device_count()} at most")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        if world == 1:
            return cls(device=device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             device_id=device if device.type == "cuda" else None)
        host_group = torch.distributed.new_group(backend="gloo")
        warnings.filterwarnings("ignore", ".*deprecated.*(reduce_scatter|all_gather)_single", FutureWarning)  # not in torch 2.11
        return cls(int(environ["RANK"]), world, device, host_group, int(environ.get("LOCAL_WORLD_SIZE", world)))

    def stop(self) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The objects of all ranks, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.host_group)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def agree_numbers(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank, without waiting for the device."""
        if self.world == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(box, src=0, group=self.host_group)
        return box.tolist()


class Log:
    """Writes lines to standard output and to a file, a new one unless `goes_on`; silent on other ranks than 0."""

    def __init__(self, path: Path | None, speaks: bool = True, goes_on: bool = False) -> None:
        self.speaks = speaks
        self.path = path if speaks else None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.open("a" if goes_on else "x").close()
            except FileExistsError:
                raise ValueError(f"{self.path} exists; a log is never overwritten: choose another RUN_ID") from None

    def __call__(self, text: str) -> None:
        """One line of prose."""
        if self.speaks:
            print(text, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def record(self, word: str, /, **values: Any) -> None:
        """One line `word key:value key:value` for programs."""
        self(" ".join([word, *(f"{key}:{value}" for key, value in values.items())]))


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
        return self.total_ms + (0.0 if self._since is None else 1e3 * (time.perf_counter() - self._since))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Progress:
    """Now and then a line that says where a long phase stands and how long it will still take."""

    def __init__(self, log: Log, every_seconds: float = 15.0) -> None:
        self.log, self.every, self.began = log, every_seconds, time.perf_counter()
        self.last = self.began

    def left_ms(self, done: float, total: float) -> int:
        """Estimated milliseconds until `total`, at the pace so far."""
        return int(1e3 * (time.perf_counter() - self.began) * (total - done) / max(done, 1e-9))

    def __call__(self, phase: str, done: float, total: float) -> None:
        now = time.perf_counter()
        if now - self.last >= self.every and done < total:
            self.last = now
            self.log.record("progress", phase=phase, done=f"{done:g}/{total:g}", left_ms=self.left_ms(done, total))


@dataclass
class Run:
    """What every stage needs: settings, ranks, log."""

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


# ======================================================================================================================
# 3. Data
#
# Shards are memory-mapped. Training walks the shards as one endless stream; evaluation cuts the validation tokens into
# segments once, so that neither the number of ranks nor the batch size changes a score. One function cuts segments, one
# builds batches, one reads shards, one counts bytes.
# ======================================================================================================================

PUBLISHED_VAL = {"documents": 50_000, "tokens": 47_853_344, "bytes": 151_080_645}
PUBLISHED_NAME = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
MANIFEST, JOURNAL = "manifest.json", "build.json"  # of a finished and of an unfinished build
SHARD_KINDS = ("train", "val", "val_bytes")
SHARD_NAME = re.compile(r"([^.].*)_(train|val|val_bytes)_([0-9]{1,9})\.bin")  # prefix, kind, number; macOS's "._" files are none
BUILD_HINT = "build the data with prepare_caseops_data.py, or set DATA_DIR or DATA_PATH to where it is"


class Batch(NamedTuple):
    """T tokens of packed segments. `cu_seqlens` (N + 1,) int32 holds where segments start, T last, and may repeat T."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32
    positions: Tensor  # (T,) int32, counted from the start of the segment
    max_seqlen: int


def read_shard(path: Path, entries: int | None = None) -> np.ndarray:
    """The entries of a shard, `entries` of them where that is known, as a read-only memory map (uint16).

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    header_bytes = 4 * SHARD_HEADER_INTS
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; {BUILD_HINT}") from None
    if len(header) < SHARD_HEADER_INTS:
        raise ValueError(f"{path}: {size} bytes, shorter than the {header_bytes}-byte header: the file is cut short; "
                         "copy or build it again")
    magic, version, count = (int(v) for v in header[:3])
    if magic != SHARD_MAGIC:
        raise ValueError(f"{path}: magic number {magic}, not {SHARD_MAGIC}: this is no token shard; {BUILD_HINT}")
    if version != SHARD_VERSION:
        raise ValueError(f"{path}: version {version}, this program reads {SHARD_VERSION}; {BUILD_HINT}")
    if size != header_bytes + 2 * count or count < 1:
        raise ValueError(f"{path}: the header promises {count} entries = {header_bytes + 2 * count} bytes, the file has "
                         f"{size}: it is empty, cut short or damaged; copy or build it again")
    if entries is not None and count != entries:
        raise ValueError(f"{path}: {count} entries, {MANIFEST} beside it says {entries}: it is of another data set; "
                         "copy or build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def manifest_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What `manifest.json` says of each shard (file name -> entries, sha256); None where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        splits = json.loads(path.read_bytes())["splits"]
        files = {entry["file"]: entry for split in ("val", "train") for entry in splits[split]["files"]}
        if not files or not all(SHARD_NAME.fullmatch(name) and type(entry["entries"]) is int and type(entry["sha256"]) is str
                                for name, entry in files.items()):
            raise ValueError("its list of shards is not in the form of a build")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of a data set ({type(error).__name__}: {error}); move it away if it "
                         f"is another program's, else {BUILD_HINT}") from None
    return files


def dataset_shards(folder: Path) -> dict[str, list[Path]]:
    """The shards of a data set by kind (train, val, val_bytes), in order. What a right set of shards is stands here alone.

    `manifest.json` decides where there is one: its files, no others. Always: one prefix, numbers from 0 without a gap, and
    a sidecar shard for each validation shard or none at all. A wrong `.bin` file or an unfinished build is refused by name.
    """
    if not folder.is_dir():
        raise ValueError(f"no data: {folder} is not a folder; {BUILD_HINT}")
    listed = manifest_files(folder)
    if listed is None and (folder / JOURNAL).exists():
        raise ValueError(f"{folder} holds an unfinished build ({JOURNAL}): give the same prepare_caseops_data.py command again, "
                         "it goes on where it stopped")
    there = sorted(path.name for path in folder.glob("*.bin"))
    named = {name: match.groups() for name in listed or there if (match := SHARD_NAME.fullmatch(name))}
    if foreign := [name for name in there if name not in named]:
        reason = "no name of a shard, PREFIX_train|val|val_bytes_NNNNNN.bin" if listed is None else f"not in {MANIFEST}"
        raise ValueError(f"{folder} holds {', '.join(foreign[:3])}{' …' if foreign[3:] else ''}: {reason}; move or delete it")
    if len(prefixes := {prefix for prefix, _, _ in named.values()}) > 1:
        raise ValueError(f"{folder} holds shards of several data sets ({', '.join(sorted(prefixes))}): one folder, one data set")
    shards = {kind: sorted((int(number), folder / name) for name, (_, its, number) in named.items() if its == kind) for kind in SHARD_KINDS}
    for kind, numbered in shards.items():
        if (numbers := [number for number, _ in numbered]) != list(range(len(numbers))):
            raise ValueError(f"{folder}: the {kind} shards are numbered {', '.join(map(str, numbers))}, not from 0 without a gap")
    if shards["val"] and shards["val_bytes"] and len(shards["val"]) != len(shards["val_bytes"]):
        raise ValueError(f"{folder}: {len(shards['val_bytes'])} sidecar shards (val_bytes) for {len(shards['val'])} validation shards")
    return {kind: [path for _, path in numbered] for kind, numbered in shards.items()}


def shard_paths(folder: Path, kind: str) -> list[Path]:
    """Shards of one kind ('train', 'val' or 'val_bytes') in order; the sidecar is never taken for tokens."""
    return dataset_shards(folder)[kind]


def read_shards(folder: Path, kind: str) -> list[np.ndarray]:
    """All shards of one kind, of the lengths that the manifest lists; ValueError if there is none."""
    if not (paths := shard_paths(folder, kind)):
        raise ValueError(f"no {kind} shards (*_{kind}_NNNNNN.bin) in {folder}; {BUILD_HINT}")
    listed = manifest_files(folder)
    return [read_shard(path, listed[path.name]["entries"] if listed else None) for path in paths]


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
        if len(part) and int(part.max()) >= vocab_size:
            at = offset + int(np.argmax(part >= vocab_size))
            raise ValueError(f"{what}: entry {at} is token {int(tokens[at])}, but VOCAB_SIZE is {vocab_size}: the data was "
                             "made with another tokenizer, or the file is damaged")
    if not (np.asarray(tokens[:sample]) == BOS_ID).any():
        raise ValueError(f"{what}: no BOS (id {BOS_ID}) in {min(len(tokens), sample)} entries: documents cannot be told "
                         "apart; " + BUILD_HINT)


def read_sidecar(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The bytes of every validation token; ValueError if the sidecar is missing or does not belong to `tokens` (N,)."""
    if not shard_paths(folder, "val_bytes"):
        raise ValueError(f"no byte sidecar (*_val_bytes_NNNNNN.bin) in {folder}: bits per byte cannot be counted; {BUILD_HINT}")
    sizes, own = (list(map(len, read_shards(folder, kind))) for kind in ("val", "val_bytes"))
    if sizes != own:
        raise ValueError(f"the byte sidecar in {folder} has {own} entries, the validation tokens {sizes}: they must be the same; "
                         "build both again from the same text")
    byte_counts = np.concatenate(read_shards(folder, "val_bytes"))
    if byte_counts[tokens == BOS_ID].any():
        raise ValueError(f"the byte sidecar in {folder} charges bytes to BOS: it does not belong to these tokens")
    return byte_counts


def load_val(cfg: Config) -> ValData:
    """The validation set, checked: sidecar present and of the same length, BOS, ids, the published constants.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    folder = cfg.shards_dir
    tokens = np.concatenate(read_shards(folder, "val"))
    check_tokens(tokens, cfg.vocab_size, f"validation tokens in {folder}", sample=len(tokens))
    if int(tokens[0]) != BOS_ID:
        raise ValueError(f"validation tokens in {folder}: the first entry is {int(tokens[0])}, not BOS ({BOS_ID}); {BUILD_HINT}")
    if not cfg.caseops_enabled:
        byte_counts = piece_byte_counts(cfg, tokens)
    else:
        byte_counts = read_sidecar(folder, tokens)
    val = ValData(tokens, byte_counts, int((tokens == BOS_ID).sum()))
    if folder.name == PUBLISHED_NAME:
        found = {"documents": val.documents, "tokens": len(tokens), "bytes": val.num_bytes}
        if found != PUBLISHED_VAL:
            raise ValueError(f"{folder} has the published data set's name, but its validation set has {found}, the "
                             f"published one {PUBLISHED_VAL}: it is incomplete or another one")
    if val.num_bytes == 0:
        raise ValueError(f"the validation targets in {folder} stand for 0 bytes: bits per byte cannot be counted")
    if cfg.val_doc_fraction < 1:
        starts = val.document_starts()
        keep = max(1, int(len(starts) * cfg.val_doc_fraction))
        end = len(tokens) if keep == len(starts) else int(starts[keep])
        val = ValData(tokens[:end], byte_counts[:end], keep)
    return val


@lru_cache(maxsize=1)
def _piece_byte_table(path: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By token: its bytes without a leading space mark, whether it has that mark, whether it is a control token."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"TOKENIZER_PATH {path} is not a SentencePiece model: {error}") from None
    if model.vocab_size() != vocab_size:
        raise ValueError(f"{path} has {model.vocab_size()} pieces, VOCAB_SIZE is {vocab_size}: set the one or the other")
    lengths, space = np.zeros(vocab_size, np.uint16), np.zeros(vocab_size, bool)
    control = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(vocab_size)])
    for i in np.flatnonzero(~control):
        piece = model.id_to_piece(int(i))
        space[i] = piece.startswith("\u2581")
        lengths[i] = 1 if model.is_byte(int(i)) else len(piece.removeprefix("\u2581").encode("utf-8"))
    return lengths, space, control


def piece_byte_counts(cfg: Config, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each of `tokens` (N,) of plain SentencePiece data: a leading space counts unless a control token is before."""
    lengths, space, control = _piece_byte_table(str(cfg.tokenizer_file), cfg.vocab_size)
    before = np.concatenate([[BOS_ID], tokens[:-1]])
    return (lengths[tokens] + (space[tokens] & ~control[before])).astype(np.uint16)


def check_tokenizer(cfg: Config) -> str:
    """Words about the tokenizer file for the log; ValueError if its size is not VOCAB_SIZE, or if it is needed and missing."""
    path = cfg.tokenizer_file
    if not path.exists():
        if not cfg.caseops_enabled or cfg.tokenizer_path:
            raise ValueError(f"no tokenizer at {path}; set TOKENIZER_PATH")
        return f"no tokenizer at {path}: none is needed, the bytes come from the sidecar"
    _piece_byte_table(str(path), cfg.vocab_size)
    return f"tokenizer {path} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def check_dataset(cfg: Config, with_train: bool = True) -> ValData:
    """Every check that takes seconds, before any long work; the validation set, loaded.

    Raises:
        ValueError: names the file, what is wrong and what to do.
    """
    train = dict(zip(shard_paths(cfg.shards_dir, "train"), read_shards(cfg.shards_dir, "train"))) if with_train else {}
    val = load_val(cfg)
    for path, shard in train.items():
        check_tokens(shard, cfg.vocab_size, str(path), sample=max(1_000_000, 200_000_000 // len(train)))
        if begins_like(shard, val.tokens):
            raise ValueError(f"{path} holds the validation tokens: they must not be trained on; {BUILD_HINT}")
    return val


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


def make_batch(tokens: np.ndarray, targets: np.ndarray, starts: np.ndarray, longest: int, device: torch.device) -> Batch:
    """Batch of packed segments; on CUDA the number of segments is rounded up (empty ones), so that few shapes occur."""
    count = len(tokens)
    positions = np.arange(count, dtype=np.int32) - np.repeat(starts, np.diff(starts, append=count)).astype(np.int32)
    slots = len(starts) + 1 if device.type == "cpu" else -(-(len(starts) + 1) // 64) * 64
    cu_seqlens = np.full(slots, count, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts

    def put(array: np.ndarray, dtype: type) -> Tensor:
        tensor = torch.from_numpy(array.astype(dtype))
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    return Batch(put(tokens, np.int64), put(targets, np.int64), put(cu_seqlens, np.int32), put(positions, np.int32), longest)


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
        if batch % spans or batch < 2 * spans:
            raise ValueError(f"{world} ranks do not divide TRAIN_BATCH_TOKENS={batch}: it must be a multiple of "
                             f"{spans} (use fewer ranks, or set TRAIN_BATCH_TOKENS={max(2, batch // spans) * spans})")
        while batch // spans > cfg.micro_batch_tokens:
            spans *= 2
            if batch % spans:
                raise ValueError(f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} does not divide TRAIN_BATCH_TOKENS={batch} "
                                 f"into equal parts for {world} ranks; use a power-of-two share of {batch // world}")
        per_rank = spans // world
        fit = cfg.micro_batch_tokens // (batch // spans)
        per_micro = max(n for n in range(1, min(fit, per_rank) + 1) if per_rank % n == 0)
        return cls(spans, batch // spans, per_rank, per_micro)

    @property
    def micro_tokens(self) -> int:
        return self.per_micro * self.span_tokens


class TokenStream:
    """All shards end to end, again and again."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards = shards
        self.ends = np.cumsum([len(s) for s in shards])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` entries from position `start` of the endless stream."""
        parts, start = [], start % int(self.ends[-1])
        while count > 0:
            index = int(np.searchsorted(self.ends, start, side="right"))
            offset = start - (int(self.ends[index - 1]) if index else 0)
            parts.append(np.asarray(self.shards[index][offset: offset + count]))
            count -= len(parts[-1])
            start = (start + len(parts[-1])) % int(self.ends[-1])
        return np.concatenate(parts)


class TrainLoader:
    """The micro-batches of one rank, step by step, prepared one step ahead in a background thread."""

    def __init__(self, stream: TokenStream, layout: SpanLayout, cfg: Config, ranks: Ranks) -> None:
        self.stream, self.layout, self.cfg, self.ranks = stream, layout, cfg, ranks
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
        self.wait_ms += 1e3 * (time.perf_counter() - began)
        self.seek(self.position + self.cfg.train_batch_tokens)
        return batches

    def _prepare(self, position: int) -> list[Batch]:
        layout = self.layout
        share = layout.per_rank * layout.span_tokens
        entries = self.stream.read(position + self.ranks.rank * share, share + 1)
        batches = []
        for first in range(0, share, layout.micro_tokens):
            tokens = entries[first: first + layout.micro_tokens]
            targets = entries[first + 1: first + layout.micro_tokens + 1]
            starts = segment_starts(tokens, layout.span_tokens, self.cfg.train_seq_len)
            longest = min(self.cfg.train_seq_len, layout.span_tokens)
            batches.append(make_batch(tokens, targets, starts, longest, self.ranks.device))
        return batches


# ======================================================================================================================
# 4. Attention
#
# One function for all of the program: causal attention over a packed stream of segments with grouped heads. Which library
# does it is decided once, by resolve_attention(), because Dynamo can trace neither the choice nor the creation of an
# operator. The order on a GPU is FlashAttention 3 (Hopper only), FlashAttention 4, and what torch itself brings
# (FlashAttention 2). Everywhere else, and for float32, which no flash kernel takes, each segment goes through scaled dot
# product attention; inside torch.compile that loop hides in an operator, since its trip count depends on the data.
# ======================================================================================================================


ATTENTION_BACKENDS = ("auto", "fa3", "fa4", "varlen", "sdpa")
ATTENTION_HINTS = {
    "fa3": "install the wheel flash_attn_3 from the PyTorch index (module flash_attn_interface)",
    "fa4": "pip install flash-attn-4 (module flash_attn.cute)",
    "varlen": "torch >= 2.11 has it (torch.nn.attention.varlen)",
}


class AttentionBackend(NamedTuple):
    """One way to compute attention: its name for the log, the function, and why faster ones were passed over."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    skipped: str = ""


def segment_runs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Segment bounds (N+1,) -> [(length, how many neighbours in a row have it), ...], empty segments left out."""
    bounds = cu_seqlens.tolist()
    runs: list[tuple[int, int]] = []
    for length in (stop - start for start, stop in zip(bounds, bounds[1:])):
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        elif length > 0:
            runs.append((length, 1))
    return runs


def split_runs(packed: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    """(T, H, D) -> one (count, H, length, D) view a run. `split` has one backward node; T-sized slices would have many."""
    parts = packed.split([length * count for length, count in runs])
    return [part.view(count, length, *packed.shape[1:]).transpose(1, 2) for part, (length, count) in zip(parts, runs)]


def join_runs(parts: list[Tensor]) -> Tensor:
    """The inverse of split_runs: one contiguous (T, H, D)."""
    return torch.cat([part.transpose(1, 2).reshape(-1, part.size(1), part.size(3)) for part in parts])


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention() by a loop over the segments, neighbours of one length in one call; any device and float type, eager."""
    runs = segment_runs(cu_seqlens)
    assert sum(length * count for length, count in runs) == q.size(0), "cu_seqlens must end at the number of tokens"
    if not runs:
        return q.clone()
    grouped = q.size(1) != k.size(1)
    parts = zip(split_runs(q, runs), split_runs(k, runs), split_runs(v, runs))
    return join_runs([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=grouped) for part in parts])


def segment_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Gradients of segment_attention for q, k, v, from the formulas: an operator's body cannot use autograd."""
    runs, groups, scale = segment_runs(cu_seqlens), q.size(1) // k.size(1), q.size(2) ** -0.5
    grads: list[list[Tensor]] = [[], [], []]
    for grad_n, q_n, k_n, v_n in zip(*(split_runs(t, runs) for t in (grad, q, k, v))):
        grad_n, q_n, k_n, v_n = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (grad_n, q_n, k_n, v_n))
        grad_n, q_n = (t.unflatten(1, (-1, groups)) for t in (grad_n, q_n))            # (n, Hkv, groups, L, D)
        k_n, v_n = k_n.unsqueeze(2), v_n.unsqueeze(2)                                  # (n, Hkv, 1, L, D)
        scores = q_n @ k_n.mT * scale
        future = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)
        p = scores.masked_fill(future, -torch.inf).softmax(-1)
        dp = grad_n @ v_n.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        grads[0].append((ds @ k_n).flatten(1, 2))
        grads[1].append((ds.mT @ q_n).sum(2))
        grads[2].append((p.mT @ grad_n).sum(2))
    return [join_runs(parts).to(t.dtype) if parts else torch.zeros_like(t) for parts, t in zip(grads, (q, k, v))]


@torch.library.custom_op(f"{OPERATORS}::segment_attention", mutates_args=())
def segment_attention_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """segment_attention as an operator that torch.compile takes as it is."""
    return segment_attention(q, k, v, cu_seqlens)


@torch.library.custom_op(f"{OPERATORS}::segment_attention_backward", mutates_args=())
def segment_attention_backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """segment_attention_backward as an operator."""
    return segment_attention_backward(grad, q, k, v, cu_seqlens)


segment_attention_op.register_fake(lambda q, k, v, cu_seqlens: q.new_empty(q.shape))
segment_attention_backward_op.register_fake(
    lambda grad, q, k, v, cu_seqlens: [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)])
segment_attention_op.register_autograd(
    lambda ctx, grad: (*segment_attention_backward_op(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def load_fa3() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """FlashAttention 3: the wheel brings operators that torch.compile knows."""
    from flash_attn_interface import flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                                     max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out                 # older builds return (out, lse)

    return run


def load_fa4() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """FlashAttention 4: the package has no torch operators, so its two kernels are wrapped here.

    The two private functions are the ones that torch's own registry calls. That registry is of no use before torch 2.13:
    it refuses the backward of a causal varlen call.
    """
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return make_fa4_attention(_flash_attn_fwd, _flash_attn_bwd)


def make_fa4_attention(fwd: Callable, bwd: Callable) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """The forward and backward functions of flash_attn.cute.interface -> an attention that torch.compile can trace."""

    def segments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Tensor | int | bool]:
        return dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                    max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True)

    @torch.library.custom_op(f"{OPERATORS}::fa4_forward", mutates_args=())
    def forward_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        out, lse = fwd(q, k, v, return_lse=True, **segments(cu_seqlens, max_seqlen))[:2]
        return out, lse.contiguous()

    @torch.library.custom_op(f"{OPERATORS}::fa4_backward", mutates_args=())
    def backward_op(saved: list[Tensor], grad: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
        q, k, v, out, lse = saved
        return list(bwd(q, k, v, out, grad, lse, **segments(cu_seqlens, max_seqlen))[:3])

    def setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
        *saved, cu_seqlens = ctx.saved_tensors
        return *backward_op(saved, grad.contiguous(), cu_seqlens, ctx.max_seqlen), None, None

    forward_op.register_fake(lambda q, k, v, cu_seqlens, max_seqlen: (
        q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)))
    backward_op.register_fake(lambda saved, grad, cu_seqlens, max_seqlen: [t.new_empty(t.shape) for t in saved[:3]])
    forward_op.register_autograd(backward, setup_context=setup)
    return lambda q, k, v, cu_seqlens, max_seqlen: forward_op(q, k, v, cu_seqlens, max_seqlen)[0]


def load_varlen() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """torch's own variable-length attention. Causal is the window (-1, 0); newer versions want grouped heads announced."""
    from torch.nn.attention.varlen import varlen_attn

    flags = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **flags)

    return run


ATTENTION_LOADERS = {"fa3": load_fa3, "fa4": load_fa4, "varlen": load_varlen}
ATTENTION_SDPA = AttentionBackend("sdpa", lambda q, k, v, cu_seqlens, max_seqlen: segment_attention(q, k, v, cu_seqlens))
attention_backend = ATTENTION_SDPA


def resolve_attention(name: str, device: torch.device) -> AttentionBackend:
    """Choose the attention of this process; call it before compiling anything.

    `name` is one of ATTENTION_BACKENDS; "auto" takes the first that imports. ValueError when a named one cannot be used.
    """
    global attention_backend
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"ATTN_BACKEND={name!r}: allowed are {', '.join(ATTENTION_BACKENDS)}")
    if name in ATTENTION_LOADERS and device.type != "cuda":
        raise ValueError(f"ATTN_BACKEND={name} needs a CUDA device and this run is on {device.type}: use auto or sdpa")
    if name == "sdpa" or device.type != "cuda":
        attention_backend = ATTENTION_SDPA
        return attention_backend
    capability = torch.cuda.get_device_capability(device)[0]
    fitting = [n for n in ATTENTION_LOADERS if n == "varlen" or capability == 9 or (n == "fa4" and capability > 9)]
    skipped: list[str] = []
    for candidate in fitting if name == "auto" else [name]:
        try:
            attention_backend = AttentionBackend(candidate, ATTENTION_LOADERS[candidate](), "; ".join(skipped))
            return attention_backend
        except (ImportError, OSError) as error:                          # OSError: a library built for another torch
            if name != "auto":
                raise ValueError(f"ATTN_BACKEND={name} cannot be loaded ({error}): "
                                 f"{ATTENTION_HINTS[name]}, or use ATTN_BACKEND=auto") from error
            skipped.append(f"{candidate}: {error}")
    attention_backend = ATTENTION_SDPA._replace(skipped="; ".join(skipped))
    return attention_backend


def attention_backend_name() -> str:
    """The backend that resolve_attention chose, for the log; "sdpa" before it was called."""
    return attention_backend.name


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention within each segment of a packed stream, scale 1/sqrt(D).

    q (T, H, D); k, v (T, Hkv, D) with H a multiple of Hkv; cu_seqlens (N+1,) int32 from 0 to T, non-decreasing (equal
    neighbours are empty segments, for padding); max_seqlen >= every segment's length. Returns (T, H, D).
    """
    if attention_backend.name == "sdpa" or q.device.type == "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        if torch.compiler.is_compiling():
            return segment_attention_op(q, k, v, cu_seqlens)
        return segment_attention(q, k, v, cu_seqlens)
    return attention_backend.run(q, k, v, cu_seqlens, max_seqlen)


# ======================================================================================================================
# 5. Model
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


def plain_linear(site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
    """x (..., in) times w (out, in), and nothing at a bypass."""
    return None if w is None else F.linear(x, w)


def attend_segments(batch: Batch, visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain `attend`: causal attention within the segments of the batch."""
    return attention(q, k, v, batch.cu_seqlens, batch.max_seqlen)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the first dimensions of x (T, H, D); cos and sin are (T, 1, rotated / 2)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half: 2 * half], x[..., 2 * half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: y (T, H, D) without its part along the value v (T, Hkv, D) of its own position."""
    unit = F.normalize(v, dim=-1).unsqueeze(2)  # (T, Hkv, 1, D)
    grouped = y.unflatten(1, (v.size(1), -1))  # (T, Hkv, H / Hkv, D)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(1, 2)


class Attention(nn.Module):
    """The small parameters of one layer's attention; its matrices are in the banks."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.empty(cfg.num_heads))
        if cfg.gated_attn_enabled:
            self.attn_gate_w = nn.Parameter(torch.empty(cfg.num_heads, cfg.model_dim))


class Block(nn.Module):
    """The small parameters of one physical layer."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.attn_scale = nn.Parameter(torch.empty(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim))
        self.attn = Attention(cfg)


class Pass(NamedTuple):
    """What all visits of one forward share. Banks are cast to the dtype of the activations and taken apart, once."""

    batch: Batch
    linear: Linear
    attend: Attend
    cos: Tensor
    sin: Tensor
    qo: tuple[Tensor, ...]
    kv: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


class GPT(nn.Module):
    """Looped-recurrence transformer. Parameter names are those of the published state dict."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        layers, dim, kv_dim, hidden = cfg.num_layers, cfg.model_dim, cfg.kv_dim, cfg.mlp_dim
        self.tok_emb = nn.Embedding(cfg.vocab_size, dim)
        self.qo_bank = nn.Parameter(torch.empty(2 * layers, dim, dim))  # Q of layer i at i, output projection at L + i
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, kv_dim, dim))  # K at i, V at L + i
        self.mlp_up_bank = nn.Parameter(torch.empty(layers, hidden, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(layers, dim, hidden))
        self.skip_weights = nn.Parameter(torch.empty(num_skips(cfg), dim))
        self.skip_gates = nn.Parameter(torch.empty(num_skips(cfg), dim))
        self.parallel_post_lambdas = nn.Parameter(torch.empty(layers, 2, 2))  # [0]: attention's, [1]: the MLP's; by lane
        self.parallel_resid_lambdas = nn.Parameter(torch.empty(layers, 2))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(layers))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, on the CPU, from `seed` alone.

        | parameter | initial value |
        |---|---|
        | tok_emb | normal, TIED_EMBED_INIT_STD |
        | Q, K, V, up | orthogonal |
        | output and down projections, skip_gates | 0 |
        | attn_scale, mlp_scale, skip_weights, post lambdas | 1 |
        | residual lambdas | 1.1 |
        | resid_mix | (1, 0) |
        | q_gain | QK_GAIN_INIT |
        | attn_gate_w | normal, GATED_ATTN_INIT_STD |
        """
        cfg, layers = self.cfg, self.cfg.num_layers
        generator = torch.Generator().manual_seed(seed)
        self.tok_emb.weight.normal_(std=cfg.tied_embed_init_std, generator=generator)
        for i in range(layers):
            for matrix in (self.qo_bank[i], self.kv_bank[i], self.kv_bank[layers + i], self.mlp_up_bank[i]):
                nn.init.orthogonal_(matrix, generator=generator)
        for zero in (self.qo_bank[layers:], self.mlp_down_bank, self.skip_gates):
            zero.zero_()
        self.skip_weights.fill_(1.0)
        self.parallel_post_lambdas.fill_(1.0)
        self.parallel_resid_lambdas.fill_(1.1)
        for block in self.blocks:
            block.attn_scale.fill_(1.0)
            block.mlp_scale.fill_(1.0)
            block.resid_mix.copy_(torch.tensor([[1.0], [0.0]]).expand(2, cfg.model_dim))
            block.attn.q_gain.fill_(cfg.qk_gain_init)
            if cfg.gated_attn_enabled:
                block.attn.attn_gate_w.normal_(std=cfg.gated_attn_init_std, generator=generator)

    def forward(self, batch: Batch, schedule: Schedule, linear: Linear = plain_linear, attend: Attend | None = None,
                rows: Tensor | None = None) -> Tensor:
        """Negative log likelihood in nats of every target, or of those at `rows`, (T,) float32.

        Without `attend`, segments see themselves.
        """
        x, targets = self.hidden_states(batch, schedule, linear, attend or partial(attend_segments, batch)), batch.targets
        if rows is not None:
            x, targets = x[rows], targets[rows]
        logits = linear(HEAD_SITE, x, self.tok_emb.weight.to(self.dtype))
        return softcapped_cross_entropy(logits, targets, self.cfg.logit_softcap)

    def hidden_states(self, batch: Batch, schedule: Schedule, linear: Linear, attend: Attend) -> Tensor:
        """What the output head reads, (T, d)."""
        cfg = self.cfg
        banks = (bank.to(self.dtype).unbind() for bank in (self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank))
        shared = Pass(batch, linear, attend, *self._rotary(batch.positions), *banks)
        x = x0 = rms_norm(F.embedding(batch.tokens, self.tok_emb.weight).to(self.dtype))
        skips = []
        for visit, layer in enumerate(schedule.encoder):
            x = self._serial_block(shared, layer, visit, x, x0)
            skips.append(x)
        lanes = None
        for j, layer in enumerate(schedule.decoder):
            visit = len(schedule.encoder) + j
            skip = skips.pop() if j < self.skip_weights.size(0) and skips else None
            if layer < cfg.parallel_start_layer:
                x = x if skip is None else self._mix_skip(j, skip, x)
                x = self._serial_block(shared, layer, visit, x, x0)
            else:
                lane0, lane1 = (x, x) if lanes is None else lanes
                lane0 = lane0 if skip is None else self._mix_skip(j, skip, lane0)
                lanes = self._parallel_block(shared, layer, visit, (lane0, lane1), x0)
        if lanes is not None:
            x = {"mean": 0.5 * (lanes[0] + lanes[1]), "attn": lanes[0], "mlp": lanes[1]}[cfg.parallel_final_lane]
        return rms_norm(x)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, rotated / 2); positions count within a segment, only distances matter."""
        exponents = torch.arange(0, self.cfg.rope_dims, 2, device=positions.device, dtype=torch.float32)
        frequencies = self.cfg.rope_base ** (-exponents / max(self.cfg.rope_dims, 1))
        angles = positions.float()[:, None, None] * frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _mix_skip(self, row: int, skip: Tensor, x: Tensor) -> Tensor:
        weighted = self.skip_weights[row].to(self.dtype) * skip
        if not self.cfg.skip_gates_enabled:
            return x + weighted
        return torch.lerp(weighted, x, torch.sigmoid(self.skip_gates[row]).to(self.dtype))

    def _normed(self, x: Tensor, layer: int) -> Tensor:
        return rms_norm(x) / math.sqrt(layer + 1) if self.cfg.ln_scale else rms_norm(x)

    def _serial_block(self, shared: Pass, layer: int, visit: int, x: Tensor, x0: Tensor) -> Tensor:
        block = self.blocks[layer]
        mix, scales = block.resid_mix.to(self.dtype), (block.attn_scale.to(self.dtype), block.mlp_scale.to(self.dtype))
        x = mix[0] * x + mix[1] * x0
        x = x + scales[0] * self._attention(shared, layer, visit, self._normed(x, layer))
        return x + scales[1] * self._mlp(shared, layer, visit, self._normed(x, layer))

    def _parallel_block(self, shared: Pass, layer: int, visit: int, lanes: tuple[Tensor, Tensor], x0: Tensor) -> tuple[Tensor, Tensor]:
        """Attention reads lane 0, the MLP lane 1; both write to both."""
        block = self.blocks[layer]
        mix = block.resid_mix.to(self.dtype)
        resid, post = self.parallel_resid_lambdas[layer].to(self.dtype), self.parallel_post_lambdas[layer].to(self.dtype)
        a = self._attention(shared, layer, visit, self._normed(mix[0] * lanes[0] + mix[1] * x0, layer))
        m = self._mlp(shared, layer, visit, self._normed(lanes[1], layer))
        a, m = block.attn_scale.to(self.dtype) * a, block.mlp_scale.to(self.dtype) * m
        return (resid[0] * lanes[0] + post[0, 0] * a + post[1, 0] * m, resid[1] * lanes[1] + post[0, 1] * a + post[1, 1] * m)

    def _attention(self, shared: Pass, layer: int, visit: int, n: Tensor) -> Tensor:
        """Attention of normalised input n (T, d), gate and output projection included."""
        cfg, linear, attn = self.cfg, shared.linear, self.blocks[layer].attn
        q = linear((layer, visit, "q"), n, shared.qo[layer]).unflatten(-1, (cfg.num_heads, cfg.head_dim))
        k = linear((layer, visit, "k"), n, shared.kv[layer]).unflatten(-1, (cfg.num_kv_heads, cfg.head_dim))
        v = linear((layer, visit, "v"), n, shared.kv[cfg.num_layers + layer]).unflatten(-1, (cfg.num_kv_heads, cfg.head_dim))
        q = rotate(rms_norm(q), shared.cos, shared.sin) * attn.q_gain.to(self.dtype)[:, None]
        k = rotate(rms_norm(k), shared.cos, shared.sin)
        y = shared.attend(visit, q, k, v)
        if layer >= cfg.num_layers - cfg.xsa_last_n:
            y = exclude_self(y, v)
        if cfg.gated_attn_enabled:
            y = y * torch.sigmoid(linear((layer, visit, "gate"), n, attn.attn_gate_w.to(self.dtype))).unsqueeze(-1)
        y = linear((layer, visit, "proj"), y.flatten(1), shared.qo[cfg.num_layers + layer])
        bypass = linear((layer, visit, "o"), n, None)
        return y if bypass is None else y + bypass

    def _mlp(self, shared: Pass, layer: int, visit: int, n: Tensor) -> Tensor:
        linear = shared.linear
        if linear is plain_linear:
            return fused_mlp(n, shared.up[layer], shared.down[layer])
        h = F.leaky_relu(linear((layer, visit, "up"), n, shared.up[layer]), 0.5).square()
        y = linear((layer, visit, "down"), h, shared.down[layer])
        bypass = linear((layer, visit, "mlp"), n, None)
        return y if bypass is None else y + bypass


# ======================================================================================================================
# 6. Optimizers
#
# Muon (Jordan et al. 2024) on the four banks, AdamW on the rest. The large tensors are sharded along their first axis:
# gradients are reduce-scattered, each rank updates its rows, the rows are all-gathered. Their storage is padded to equal
# shares, so both collectives work in place. The small parameters live in one flat gradient and take one all-reduce.
# ======================================================================================================================

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for each matrix of update (N, rows, cols).

    The quintic's coefficients are Keller Jordan's (2024): singular values end near 1, not at it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class ShardedTensor:
    """A parameter whose update is shared out: rank r owns rows [r * share, (r + 1) * share) of its padded storage."""

    def __init__(self, param: nn.Parameter, ranks: Ranks) -> None:
        self.param, self.ranks = param, ranks
        rows = param.size(0)
        share = -(-rows // ranks.world)
        padded = torch.zeros(share * ranks.world, *param.shape[1:], device=param.device, dtype=param.dtype)
        padded[:rows] = param.data
        self.storage, self.full_grad = padded, torch.zeros_like(padded)
        param.data, param.grad = padded[:rows], self.full_grad[:rows]
        mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.shard = self.storage[mine]
        self.grad = self.full_grad if ranks.world == 1 else torch.zeros_like(self.shard)
        self._work: Any = None

    def start_reduce(self) -> None:
        """Begin to sum the gradient's rows over the ranks into `grad`."""
        if self.ranks.world > 1:
            self._work = torch.distributed.reduce_scatter_tensor(self.grad, self.full_grad, async_op=True)

    def start_gather(self) -> None:
        """Begin to hand the updated rows to all ranks."""
        if self.ranks.world > 1:
            self._work = torch.distributed.all_gather_into_tensor(self.storage, self.shard, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class Optimizers:
    """All parameters of a model, their gradients and optimizer state.

    Gradients accumulate over micro-batches as sums; `step` averages them over ranks, clips the average, and updates.
    """

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.ns_dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        named = dict(model.named_parameters())
        self.banks = [ShardedTensor(named.pop(name), ranks) for name in BANKS]
        self.embedding = ShardedTensor(named.pop("tok_emb.weight"), ranks)
        self.momenta = [torch.zeros_like(bank.shard) for bank in self.banks]
        self.small = list(named.values())
        self.flat_grad = torch.zeros(sum(p.numel() for p in self.small), device=ranks.device)
        for param, view in zip(self.small, self.flat_grad.split([p.numel() for p in self.small])):
            param.grad = view.view_as(param)
        self.embedding_rows = nn.Parameter(self.embedding.shard)
        self.embedding_rows.grad = self.embedding.grad
        groups = [  # parameters, learning rate, weight decay
            ([self.embedding_rows], cfg.tied_embed_lr, cfg.embed_wd),
            (self.small, cfg.scalar_lr, cfg.adam_wd),
        ]
        self.adamw = torch.optim.AdamW(
            [{"params": p, "lr": lr, "base_lr": lr, "weight_decay": wd} for p, lr, wd in groups],
            betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        covered = {id(p) for p in [*(b.param for b in self.banks), self.embedding.param, *self.small]}
        assert covered == {id(p) for p in model.parameters()}, "every parameter has one optimizer"

    def zero_grad(self) -> None:
        torch._foreach_zero_([*(b.full_grad for b in self.banks), self.embedding.full_grad, self.flat_grad])

    @torch.no_grad()
    def step(self, lr_scale: float, step: int) -> Tensor:
        """Update from the accumulated gradients; returns the norm of the averaged gradient, a 0-d tensor."""
        large = [*self.banks, self.embedding]
        for tensor in large:
            tensor.start_reduce()
        self.ranks.sum(self.flat_grad)
        for tensor in large:
            tensor.wait()
        norm = self._average_and_clip(large)
        momentum = self._momentum(step)
        torch._foreach_mul_(self.momenta, momentum)
        torch._foreach_add_(self.momenta, [bank.grad for bank in self.banks])
        for bank, buffer in zip(self.banks, self.momenta):
            self._muon_update(bank, buffer, momentum, self.cfg.matrix_lr * lr_scale)
            bank.start_gather()
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()
        self.embedding.start_gather()
        for tensor in large:
            tensor.wait()
        return norm

    def _average_and_clip(self, large: list[ShardedTensor]) -> Tensor:
        """Divide the summed gradients by the ranks and clip their norm, which is that of the average over all ranks."""
        shards = [tensor.grad for tensor in large]
        norms = torch.stack(torch._foreach_norm([*shards, self.flat_grad])).square()
        norm = (self.ranks.sum(norms[:-1].sum()) + norms[-1]).sqrt() / self.ranks.world
        limit = self.cfg.grad_clip_norm
        clip = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit > 0 else torch.ones_like(norm)
        torch._foreach_mul_([*shards, self.flat_grad], clip / self.ranks.world)
        return norm

    def _momentum(self, step: int) -> float:
        cfg = self.cfg
        warm = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
        return (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum

    def _muon_update(self, bank: ShardedTensor, buffer: Tensor, momentum: float, lr: float) -> None:
        update = torch.add(bank.grad, buffer, alpha=momentum)  # Nesterov
        if self.cfg.muon_row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        update = orthogonalize(update, self.cfg.muon_backend_steps, self.ns_dtype).to(bank.shard.dtype)
        scale = math.sqrt(max(1.0, update.size(-2) / update.size(-1)))
        bank.shard.mul_(1 - lr * self.cfg.muon_wd).add_(update, alpha=-lr * scale)

    def state(self) -> dict[str, Any]:
        """All optimizer state of this rank, copied."""
        adamw = [{k: v.clone() for k, v in self.adamw.state[p].items()} if p in self.adamw.state else None
                 for group in self.adamw.param_groups for p in group["params"]]
        return {"momenta": [m.clone() for m in self.momenta], "adamw": adamw}

    def load_state(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.momenta, state["momenta"]):
            mine.copy_(saved)
        params = [p for group in self.adamw.param_groups for p in group["params"]]
        for param, saved in zip(params, state["adamw"]):
            if saved is None:
                self.adamw.state.pop(param, None)
            else:
                self.adamw.state[param] = {k: v.clone() for k, v in saved.items()}


# ======================================================================================================================
# 7. Training
#
# The schedules are functions of the finished share of the run, by time or by steps. The warm-up runs every graph and
# then puts back the complete state, the same state that a snapshot holds.
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
    """1 until the warm-down begins, then linear to MIN_LR at the end."""
    if cfg.warmdown_frac == 0 or frac <= 1 - cfg.warmdown_frac:
        return 1.0
    return cfg.min_lr + (1 - cfg.min_lr) * max(0.0, 1 - frac) / cfg.warmdown_frac


def compiled(run: Run, function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """`function(batch, ...)` through torch.compile without graph breaks, or as it is where compilation is off.

    Sizes are all dynamic or, but for the number of segments, all static: left to guess, the compiler would take the first
    packing for a constant and compile again in the middle of the run.
    """
    if not run.compile:
        return function
    torch._dynamo.config.cache_size_limit = 64  # one entry a depth and use; a full cache would be an error
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
        self.params = [p.data for p in model.parameters()]
        self.ema = [p.clone() for p in self.params]
        self.forward = compiled(run, model)
        self.step = 0
        self.depth = 0
        self.late_graphs = 0  # made after the warm-up, on the clock: there should be none
        self.clock = Clock(run.device)

    def train_step(self, depth: int, lr_scale: float) -> Tensor:
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
        self.optimizers.step(lr_scale, self.step)
        torch._foreach_lerp_(self.ema, self.params, 1 - self.cfg.ema_decay)
        self.step += 1
        return total

    def snapshot(self) -> dict[str, Any]:
        """A copy of the complete state of this rank: nothing that a step changes is left out."""
        return {
            "params": [p.clone() for p in self.params], "ema": [p.clone() for p in self.ema],
            "optimizers": self.optimizers.state(), "position": self.loader.position, "step": self.step,
            "rng": torch.get_rng_state(), "elapsed_ms": self.clock.total_ms, "depth": self.depth,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for mine, saved in zip([*self.params, *self.ema], [*state["params"], *state["ema"]]):
            mine.copy_(saved)
        self.optimizers.load_state(state["optimizers"])
        self.loader.seek(state["position"])
        self.step, self.depth = state["step"], state["depth"]
        self.clock.total_ms = state["elapsed_ms"]
        torch.set_rng_state(state["rng"].cpu())  # a checkpoint is read onto the device; this state lives on the host

    def warm_up(self) -> None:
        """Run WARMUP_STEPS steps at the first depth and at each prewarmed one, then put everything back."""
        cfg, before, began = self.cfg, self.snapshot(), time.perf_counter()
        depths = list(dict.fromkeys([depth_at(cfg, 0.0), *cfg.train_loop_prewarm_depths]))
        for depth in depths if cfg.warmup_steps else []:
            for _ in range(cfg.warmup_steps):
                self.train_step(depth, 1.0)
            synchronize(self.run.device)
            self.run.log(f"warm-up: depth {depth} after {time.perf_counter() - began:.1f} s")
        self.restore(before)
        self.loader.wait_ms, self.late_graphs = 0.0, 0

    def load_averaged_weights(self) -> None:
        """From here on the model holds the moving average, which is what is exported."""
        torch._foreach_copy_(self.params, self.ema)


class Checkpoints:
    """The complete state of a run on disk: a file a rank, and an index that is replaced last, when all files are there.

    A run that finds an index of its RUN_ID goes on from it. The files go when the artifact is written.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.index = run, output_path(run.cfg, ".checkpoint")
        every = run.cfg.checkpoint_every
        self.steps = int(every) if every.isdigit() else 0
        self.seconds = float(every[:-1]) if every.endswith("s") else 0.0
        self.last = time.perf_counter()
        self.last_step = 0

    def state_path(self, step: int) -> Path:
        return output_path(self.run.cfg, f".checkpoint.step{step}.rank{self.run.ranks.rank}")

    def due(self, step: int) -> bool:
        return bool(self.steps and step % self.steps == 0) or bool(self.seconds and time.perf_counter() - self.last >= self.seconds)

    def write(self, trainer: Trainer) -> None:
        """Save the state of this step, with the clock stopped, and drop the one before."""
        trainer.clock.stop()
        buffer = io.BytesIO()
        torch.save(trainer.snapshot(), buffer)
        write_atomically(self.state_path(trainer.step), buffer.getvalue())
        self.run.ranks.gather(None)
        before = self._read_index()
        self.run.ranks.gather(None)
        if self.run.ranks.rank == 0:
            content = {"step": trainer.step, "ranks": self.run.ranks.world, "settings": self._fingerprint()}
            write_atomically(self.index, json.dumps(content).encode())
        self.run.ranks.gather(None)
        if before is not None and before["step"] != trainer.step:
            self.state_path(before["step"]).unlink(missing_ok=True)
        self.last = time.perf_counter()
        self.run.log.record("checkpoint", step=trainer.step, path=self.index)
        trainer.clock.start()

    def resume(self, trainer: Trainer) -> None:
        """Go on from the index, if there is one; ValueError if it is of other settings or another number of ranks."""
        if (index := self._read_index()) is None:
            return
        if (index["ranks"], index["settings"]) != (self.run.ranks.world, self._fingerprint()):
            raise ValueError(f"{self.index} is a checkpoint of {index['ranks']} ranks with settings or code that differ from this "
                             "run's; start it as it was started, or choose another RUN_ID")
        trainer.restore(torch.load(self.state_path(index["step"]), map_location=self.run.device, weights_only=True))
        self.run.log(f"resumed from step {trainer.step}, {trainer.clock.total_ms / 1e3:.1f} s of training done")

    def remove(self) -> None:
        if (index := self._read_index()) is not None:
            self.state_path(index["step"]).unlink(missing_ok=True)
            self.run.ranks.gather(None)
            self.index.unlink(missing_ok=True)

    def _read_index(self) -> dict[str, Any] | None:
        return json.loads(self.index.read_text()) if self.index.exists() else None

    def _fingerprint(self) -> str:
        """Changes with the code and with every setting but the checkpoints' own."""
        settings = {f.name: format_setting(getattr(self.run.cfg, f.name)) for f in fields(Config) if f.name != "checkpoint_every"}
        code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in code_files()]
        return hashlib.sha256(json.dumps([settings, code]).encode()).hexdigest()


class Termination:
    """Whether SIGTERM has come since training began; outside of training it ends the program as always."""

    def __enter__(self) -> Termination:
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def train(run: Run, trainer: Trainer, val: ValData, checkpoints: Checkpoints) -> bool:
    """Train until the time cap (less the Hessians' reserve) or ITERATIONS; evaluation and checkpoints stop the clock.

    Returns False if SIGTERM came: then a checkpoint has been written and the run must end.
    """
    with Termination() as termination:
        return train_steps(run, trainer, val, checkpoints, termination)


def train_steps(run: Run, trainer: Trainer, val: ValData, checkpoints: Checkpoints, termination: Termination) -> bool:
    """The loop of `train`."""
    cfg, log = run.cfg, run.log
    budget_ms = 1e3 * (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds) if cfg.max_wallclock_seconds else 0.0
    pace = Pace(run, trainer)
    trainer.clock.start()
    frac = trainer.step / cfg.iterations if not budget_ms else trainer.clock.total_ms / budget_ms
    while True:
        done = frac >= 1 or trainer.step >= cfg.iterations
        if cfg.val_loss_every and (trainer.step % cfg.val_loss_every == 0 or done):
            trainer.clock.stop()
            name = "final" if done else f"step{trainer.step}" if trainer.step else "initial"
            depth = cfg.eval_loop_depth if done else max(trainer.depth, depth_at(cfg, frac))
            evaluate(run, trainer.model, val, name, depth)
            trainer.clock.start()
        if done:
            break
        depth = depth_at(cfg, frac)
        if depth != trainer.depth:
            trainer.depth = depth
            log.record("phase", step=trainer.step, frac=f"{frac:.3f}", depth=depth)
        lr_scale = learning_rate_scale(cfg, frac)
        loss = trainer.train_step(depth, lr_scale)
        elapsed_ms, stop, save = pace.after_step(trainer.clock.elapsed_ms(), termination.asked, checkpoints.due(trainer.step))
        frac = elapsed_ms / budget_ms if budget_ms else trainer.step / cfg.iterations
        pace.report(trainer, loss, min(frac, 1.0), lr_scale)
        if stop or save:
            checkpoints.write(trainer)
        if stop:
            return False
    trainer.clock.stop()
    return True


class Pace:
    """Keeps the host at most two steps ahead of the device, agrees the time over the ranks, and writes the train lines."""

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self.run, self.events = run, []
        self.last_step, self.last_ms = trainer.step, trainer.clock.total_ms

    def after_step(self, *values: float) -> list[float]:
        """Rank 0's numbers (time, whether to stop, whether to save), on every rank."""
        if self.run.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        return self.run.ranks.agree_numbers(*values)

    def report(self, trainer: Trainer, loss: Tensor, frac: float, lr_scale: float) -> None:
        cfg, log, step = self.run.cfg, self.run.log, trainer.step
        if not (step <= 5 or step % cfg.train_log_every == 0 or frac >= 1 or step == cfg.iterations):
            return
        mean = self.run.ranks.sum(loss).item() / self.run.ranks.world
        elapsed_ms = trainer.clock.elapsed_ms()
        step_ms = (elapsed_ms - self.last_ms) / max(step - self.last_step, 1)
        self.last_step, self.last_ms = step, elapsed_ms
        log.record("train", step=f"{step}/{cfg.iterations}", frac=f"{frac:.3f}", depth=trainer.depth, loss=f"{mean:.4f}",
                   lr_scale=f"{lr_scale:.4f}", step_ms=f"{step_ms:.1f}", tok_s=int(1e3 * cfg.train_batch_tokens / step_ms),
                   elapsed_ms=int(elapsed_ms), left_ms=int(elapsed_ms * (1 - frac) / max(frac, 1e-9)),
                   wait_ms=f"{trainer.loader.wait_ms:.0f}", late_graphs=trainer.late_graphs)
        if not math.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {step}; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR")
        if step == 3 and cfg.max_wallclock_seconds:
            self._warn_if_slow(step_ms)

    def _warn_if_slow(self, step_ms: float) -> None:
        """The record's batch on a machine that will not get far with it: say so while there is time to stop."""
        cfg = self.run.cfg
        steps = 1e3 * (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds) / step_ms
        if cfg.train_batch_tokens >= Config.train_batch_tokens and steps < 1000:
            self.run.log(
                f"warning: at {step_ms / 1e3:.1f} s a step this machine takes about {steps:.0f} steps in "
                f"{cfg.max_wallclock_seconds:g} s; the published record took 4,600 on 8xH100 and the score will be far from "
                "it. To try the system here, stop this and run `bash run.sh`; to train long enough, set "
                f"MAX_WALLCLOCK_SECONDS={4600 * step_ms / 1e3:.0f}")


def activation_bytes_per_token(run: Run, model: GPT) -> float:
    """Memory that a forward at the largest depth keeps for its backward, a token, measured on a few tokens."""
    cfg, tokens = run.cfg, 64
    array = np.full(tokens, BOS_ID + 1)
    batch = make_batch(array, array, np.array([0]), tokens, run.device)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= tokens and tokens in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    depth = max([cfg.eval_loop_depth, *cfg.train_loop_phase_depths])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch, loop_schedule(cfg, depth))
    del losses
    return sum(kept.values()) / tokens


def check_memory(run: Run, model: GPT, layout: SpanLayout) -> None:
    """On a CPU, refuse a micro-batch that cannot fit; ValueError names what is needed, what is here and what to run."""
    if run.device.type != "cpu":
        return
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    local_ranks = run.ranks.local_world
    weights = 16 * sum(p.numel() for p in model.parameters())  # values, gradients, average, optimizer state
    need = local_ranks * (activation_bytes_per_token(run, model) * layout.micro_tokens + weights)
    if need > 0.9 * have:
        fits = max(1, int((0.7 * have / local_ranks - weights) * layout.micro_tokens * local_ranks / need))
        raise ValueError(
            f"a forward of {layout.micro_tokens} tokens needs about {need / 1e9:.0f} GB on this CPU, which has "
            f"{have / 1e9:.0f} GB. The record's settings are for 8xH100: run `bash run.sh` for the same system at a size for "
            f"this machine, or, to train this one all the same, set MICRO_BATCH_TOKENS={2 ** int(math.log2(fits))} or less")


# ======================================================================================================================
# 8. Quantization
#
# GPTQ (Frantar et al. 2022): round a matrix column by column and let the columns still to come make up for the error, as
# the inverse Hessian of the layer's input says. All matrices of one shape go through it together, shared out over the
# ranks. The scale of a row is set beforehand from its standard deviation.
# ======================================================================================================================


class Calibration:
    """A `linear` that also sums x^T x of every matrix's input, by layer; the visits of a looped layer add up."""

    GROUPS = {"q": "qkv", "proj": "proj", "up": "up", "down": "down", "head": "head"}  # k and v read what q reads

    def __init__(self, cfg: Config, device: torch.device) -> None:
        layers, dim = cfg.num_layers, cfg.model_dim
        shapes = {"qkv": (layers, dim), "proj": (layers, dim), "up": (layers, dim), "down": (layers, cfg.mlp_dim), "head": (1, dim)}
        self.hessians = {name: torch.zeros(n, d, d, device=device) for name, (n, d) in shapes.items()}

    def __call__(self, site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
        layer, _, name = site
        if (group := self.GROUPS.get(name)) is not None:
            hessian = self.hessians[group][max(layer, 0)]
            if x.dtype == torch.float32:
                hessian.addmm_(x.T, x)
            else:
                hessian.add_(torch.mm(x.T, x, out_dtype=torch.float32))
        return plain_linear(site, x, w)


@torch.no_grad()
def collect_hessians(run: Run, model: GPT, loader: TrainLoader) -> dict[str, Tensor]:
    """Sums of x^T x over GPTQ_CALIBRATION_BATCHES batches of training data at EVAL_LOOP_DEPTH, over all ranks.

    Returns:
        By input: "qkv", "proj", "up" (L, d, d), "down" (L, h, h), "head" (1, d, d), float32.
    """
    cfg, began, progress = run.cfg, time.perf_counter(), Progress(run.log)
    calibration, schedule = Calibration(cfg, run.device), loop_schedule(cfg, cfg.eval_loop_depth)
    for i in range(cfg.gptq_calibration_batches):
        for batch in loader.next():
            model(batch, schedule, calibration)
        progress("hessians", i + 1, cfg.gptq_calibration_batches)
    for hessian in calibration.hessians.values():
        run.ranks.sum(hessian)
    synchronize(run.device)
    run.log.record("hessians", batches=cfg.gptq_calibration_batches, tokens=cfg.gptq_calibration_batches * cfg.train_batch_tokens,
                   time_ms=int(1e3 * (time.perf_counter() - began)))
    return calibration.hessians


def row_scales(weights: Tensor, bits: int, clip_sigmas: float, quantizer: str = "scalar") -> Tensor:
    """Step of every row, float16 (..., rows): clip_sigmas standard deviations over the largest code.

    The trellis has finer steps; its codes take as many bytes as scalar ones and no range needs clipping. Its scales keep
    5 bits of mantissa: steps need not be more exact, and half the bytes of the scales are saved.
    """
    scales = clip_sigmas * weights.std(dim=-1) / (2 ** (bits - 1) - 1)
    if quantizer == "scalar":
        return scales.clamp(2.0**-24, 65504.0).to(torch.float16)
    mantissa, exponent = torch.frexp(scales * TRELLIS_STEP)
    return torch.ldexp((mantissa * 64).round() / 64, exponent).clamp(2.0**-20, 65000.0).to(torch.float16)


def round_to_codes(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Nearest codes of weights (..., rows) at scales of the same shape, clipped symmetrically, as float32."""
    limit = 2 ** (bits - 1) - 1
    return (weights / scales).round().clamp(-limit, limit)


def inverse_factor(hessian: Tensor, log: Log) -> Tensor:
    """Upper Cholesky factors of the inverses of hessian (N, C, C), damped by 1 % of the mean diagonal, more if it must be."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1).clamp_min(1e-12)
    for damping in (0.01, 0.1, 1.0, 10.0):
        damped = hessian + torch.diag_embed((damping * mean)[:, None].expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed.any():
                return upper
        log(f"warning: a Hessian is not positive definite at damping {damping:g} of its mean diagonal; using more")
    raise ValueError("a Hessian cannot be inverted at any damping: the calibration inputs are not finite or far too large")


def hessian_error(error: Tensor, hessian: Tensor) -> Tensor:
    """trace(E H E^T) of error (N, R, C), (N,): the squared error of the layer's outputs over the calibration inputs."""
    return ((error @ hessian) * error).sum((-2, -1))


def gptq(weights: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, log: Log, quantizer: str = "scalar") -> Quantized:
    """Quantize matrices weights (N, R, C) against hessian (N, C, C); never worse than rounding to nearest.

    Columns go in order of descending diagonal, in blocks of 128; columns that no input reaches become 0.

    Raises:
        ValueError: a weight or Hessian is not finite, or no damping makes a Hessian invertible.
    """
    weights, hessian = weights.float(), hessian.float()
    if not (torch.isfinite(weights).all() and torch.isfinite(hessian).all()):
        raise ValueError("a weight or its Hessian is NaN or infinite: the training diverged; lower the learning rates")
    scales = row_scales(weights, bits, clip_sigmas, quantizer)
    steps = scales.float()
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0  # (N, C)
    order = torch.argsort(hessian.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    work = weights.masked_fill(dead[:, None, :], 0.0).gather(-1, order[:, None, :].expand_as(weights))
    permuted = hessian + torch.diag_embed(dead.float())
    permuted = permuted.gather(-1, order[:, None, :].expand_as(hessian)).gather(-2, order[:, :, None].expand_as(hessian))
    rounding = partial(scalar_round, bits=bits)
    if quantizer == "trellis":
        rounding = partial(trellis_round, segments=trellis_segments(*weights.shape[1:]))
    codes, levels = gptq_columns(work, inverse_factor(permuted, log), steps, rounding)
    codes, levels = (torch.zeros_like(t).scatter_(-1, order[:, None, :].expand_as(t), t) for t in (codes, levels))
    coarse = row_scales(weights, bits, clip_sigmas).float()[..., None]
    nearest = round_to_codes(weights, coarse, bits) * coarse
    errors = [hessian_error(quantized - weights, hessian) for quantized in (levels * steps[..., None], nearest)]
    for index in (errors[0] > errors[1]).nonzero().ravel().tolist():  # so little to gain that feedback does harm
        codes[index] = rounding((weights[index] / steps[index, :, None]).T)[0].T
    return Quantized(codes.to(torch.int8).cpu(), scales.cpu(), quantizer)


def scalar_round(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and levels, which are the same, of values in steps."""
    codes = round_to_codes(values, torch.ones((), device=values.device), bits)
    return codes, codes


def gptq_columns(work: Tensor, factor: Tensor, steps: Tensor, rounding: Callable[[Tensor], tuple[Tensor, Tensor]],
                 block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes and levels of work (N, R, C), changed in place, by `factor` (N, C, C), the upper factor of the inverse Hessian."""
    codes, levels, columns = torch.empty_like(work), torch.empty_like(work), work.size(-1)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = work.new_empty(*work.shape[:2], end - begin)
        for j in range(begin, end):
            codes[..., j], levels[..., j] = rounding(work[..., j] / steps)
            error = (work[..., j] - levels[..., j] * steps) / factor[:, j, j, None]
            work[..., j + 1: end] -= error[..., None] * factor[:, j, None, j + 1: end]
            errors[..., j - begin] = error
        work[..., end:] -= errors @ factor[:, begin:end, end:]
    return codes, levels


# ---- trellis ----
# Entropy-coded trellis quantization (Marcellin and Fischer 1990; two interleaved quantizers as in video coding). The
# step is half as wide as a scalar one would be at the same size, but a code can only name every second level: the even
# ones in quantizer 0, 0 and the odd ones in quantizer 1. Which of the two holds follows from the parities of the codes
# above it in the same column, through a shift register; so the encoder looks for the path through all the register's
# states whose levels lie nearest, and the reader follows the parities. The error is that of scalar rounding with about
# 0.18 bits a weight more.

TRELLIS_STATES = 64
TRELLIS_TAPS = (17, 54)
TRELLIS_SEGMENT_ROWS = 256
TRELLIS_TALL_SEGMENT_ROWS = 128
TRELLIS_STEP = 0.533
TRELLIS_SHRINK = 0.23
TRELLIS_ZERO_COST = 0.2


def trellis_segments(rows: int, cols: int) -> int:
    """Independent trellises in a column: row r follows row r - trellis_segments. In a tall matrix, an embedding, there
    are more of them, because the coder takes as many rows at once."""
    longest = TRELLIS_TALL_SEGMENT_ROWS if rows >= TALL_RATIO * cols else TRELLIS_SEGMENT_ROWS
    return max(1, -(-rows // longest))


def trellis_next_states(device: torch.device | str = "cpu") -> Tensor:
    """(TRELLIS_STATES, 2) int64: the state that follows a state, by the parity of the code written in it.

    The lowest bit of a state names the quantizer of the next code.
    """
    state, parity = torch.arange(TRELLIS_STATES, device=device)[:, None], torch.arange(2, device=device)
    return (state >> 1) ^ (TRELLIS_TAPS[0] * parity) ^ (TRELLIS_TAPS[1] * (state & 1))


def trellis_quantizers(codes: Tensor) -> Tensor:
    """Which quantizer (0 or 1) each of codes (..., rows, cols) was written in; the codes alone tell."""
    next_states, segments = trellis_next_states(codes.device), trellis_segments(*codes.shape[-2:])
    state = torch.zeros(*codes.shape[:-2], segments, codes.shape[-1], dtype=torch.int64, device=codes.device)
    quantizers = torch.empty_like(codes)
    for begin in range(0, codes.shape[-2], segments):
        step = codes[..., begin: begin + segments, :]
        count = step.shape[-2]  # the last step may be short
        quantizers[..., begin: begin + segments, :] = state[..., :count, :] & 1
        state[..., :count, :] = next_states[state[..., :count, :], step.long() & 1]
    return quantizers


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
    shrunk = values / (1 + TRELLIS_SHRINK / values.square().mean(-1, keepdim=True).clamp_min(1.0))
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


class MatrixGroup(NamedTuple):
    """Matrices of one bank that are quantized alike: rows `first` to `last` of the bank, their Hessian, their rule."""

    bank: str
    first: int
    last: int
    hessian: str
    bits: int
    clip_sigmas: float


def matrix_groups(cfg: Config) -> list[MatrixGroup]:
    """Every tensor that GPTQ takes; `MATRIX_CLIP_SIGMAS` is for matrices that are neither attention nor MLP: none here."""
    layers, bits = cfg.num_layers, cfg.matrix_bits
    return [
        MatrixGroup("qo_bank", 0, layers, "qkv", bits, cfg.attn_clip_sigmas),
        MatrixGroup("qo_bank", layers, 2 * layers, "proj", bits, cfg.attn_clip_sigmas),
        MatrixGroup("kv_bank", 0, layers, "qkv", bits, cfg.attn_clip_sigmas),
        MatrixGroup("kv_bank", layers, 2 * layers, "qkv", bits, cfg.attn_clip_sigmas),
        MatrixGroup("mlp_up_bank", 0, layers, "up", bits, cfg.mlp_clip_sigmas),
        MatrixGroup("mlp_down_bank", 0, layers, "down", bits, cfg.mlp_clip_sigmas),
        MatrixGroup("tok_emb.weight", 0, 1, "head", cfg.embed_bits, cfg.embed_clip_sigmas),
    ]


@torch.no_grad()
def quantize(run: Run, model: GPT, hessians: dict[str, Tensor],
             clip_factor: float = 1.0) -> tuple[dict[str, Tensor | Quantized], float]:
    """Every parameter as the artifact stores it, and the sum of the matrices' Hessian-weighted squared errors.

    The matrices of a group are shared out over the ranks.

    GPTQ for the matrices, with their clip sigmas times clip_factor; int8 for the gates, float16 for tensors of up to
    65,536 elements. Logs how large the error of each group's outputs is, relative to the outputs.
    """
    cfg, ranks = run.cfg, run.ranks
    state = {name: p.detach() for name, p in model.named_parameters()}
    parts: dict[str, list[Quantized]] = {}
    total_error = 0.0
    for group in matrix_groups(cfg):
        clip_sigmas, energy = group.clip_sigmas * clip_factor, torch.zeros(2, dtype=torch.float64, device=run.device)
        weights = state[group.bank]
        weights = weights[None] if weights.dim() == 2 else weights[group.first: group.last]
        mine = slice(len(weights) * ranks.rank // ranks.world, len(weights) * (ranks.rank + 1) // ranks.world)
        part = None
        if mine.start < mine.stop:
            hessian = hessians[group.hessian][mine]
            part = gptq(weights[mine], hessian, group.bits, clip_sigmas, run.log, cfg.quantizer)
            error = dequantize(part).to(run.device) - weights[mine]
            energy += torch.stack([hessian_error(e.float(), hessian).double().sum() for e in (error, weights[mine])])
        ranks.sum(energy)
        total_error += energy[0].item()
        run.log.record("gptq", tensor=group.bank, first=group.first, matrices=len(weights), clip_sigmas=f"{clip_sigmas:.4f}",
                       relative_error=f"{(energy[0] / energy[1].clamp_min(1e-30)).item():.4e}")
        parts.setdefault(group.bank, []).extend(p for p in ranks.gather(part) if p is not None)
    tensors: dict[str, Tensor | Quantized] = {}
    for name, value in state.items():
        if name in parts:
            codes = torch.cat([p.codes for p in parts[name]])
            scales = torch.cat([p.scales for p in parts[name]])
            tensors[name] = Quantized(codes.reshape(value.shape), scales.reshape(value.shape[:-1]), cfg.quantizer)
        elif name.endswith("attn_gate_w") and cfg.gated_attn_quant_gate:
            scales = (value.abs().amax(-1) / 127).clamp(2.0**-24, 65504.0).to(torch.float16)
            codes = round_to_codes(value, scales.float()[:, None], 8)
            tensors[name] = Quantized(codes.to(torch.int8).cpu(), scales.cpu())
        else:
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} is NaN or infinite: the training diverged; lower the learning rates")
            tensors[name] = value.to(torch.float16).cpu()
    return tensors, total_error


TARGET_ROUNDS = 4
TARGET_SLACK = 0.001
CLIP_FACTORS = (0.4, 2.5)


def quantize_and_pack(run: Run, model: GPT, hessians: dict[str, Tensor],
                      code_bytes: int) -> tuple[dict[str, Tensor | Quantized], bytes]:
    """The tensors and, on rank 0, the artifact. ARTIFACT_TARGET_BYTES, if set, is filled up to TARGET_SLACK.

    If it is not, the clip sigmas stay as they were set, unless the artifact would be over the cap: then it is made to fit.

    Scaling every step by a factor takes log2(factor) bits off every weight, so two rounds are enough as a rule. The
    last that fitted wins, else the smallest; CLIP_FACTORS bound it, because a small model cannot fill any number of bytes.
    """
    cfg, target, factor = run.cfg, run.cfg.artifact_target_bytes, 1.0
    best, best_size, error_as_set = ({}, b""), math.inf, 0.0
    for attempt in range(TARGET_ROUNDS):
        tensors, error = quantize(run, model, hessians, factor)
        data = b""
        if run.ranks.rank == 0:
            data = pack_artifact(tensors, {name: getattr(cfg, name) for name in MODEL_SETTINGS}, cfg.compressor)
        size = run.ranks.agree(len(data)) + code_bytes
        if not target and size <= ARTIFACT_CAP_BYTES:
            return tensors, data
        if not target:
            run.log(f"warning: artifact and code are {size} bytes, over the cap of {ARTIFACT_CAP_BYTES}: all clip sigmas are raised until they "
                    "fit; COMPRESSOR=rans or QUANTIZER=trellis take fewer bytes")
            target = ARTIFACT_CAP_BYTES
        error_as_set = error if attempt == 0 else error_as_set
        run.log.record("fit", attempt=attempt + 1, clip_factor=f"{factor:.5f}", total_bytes=size, target_bytes=target,
                       hessian_error=f"{error:.4e}", saved=f"{1 - error / max(error_as_set, 1e-30):.4f}")
        if size <= max(target, best_size - 1):
            best, best_size = (tensors, data), size
        if (1 - TARGET_SLACK) * target <= size <= target:
            break
        weights = sum(t.codes.numel() for t in tensors.values() if isinstance(t, Quantized))
        wanted = factor * 2 ** (8 * (size - (1 - TARGET_SLACK / 2) * target) / weights)
        bounded = min(max(wanted, CLIP_FACTORS[0]), CLIP_FACTORS[1])
        if bounded == factor:
            break
        factor = bounded
    return best


def model_from_tensors(cfg: Config, tensors: Mapping[str, Tensor | Quantized], run: Run) -> GPT:
    """The model that an artifact's tensors are; ValueError if names or shapes are not those of the configuration."""
    model = GPT(cfg, run.dtype)
    expected = {name: p.shape for name, p in model.named_parameters()}
    found = {name: t.codes.shape if isinstance(t, Quantized) else t.shape for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"the artifact does not hold this model: {wrong[0]} has shape {tuple(found.get(wrong[0], ()))}, "
                         f"the configuration wants {tuple(expected.get(wrong[0], ()))} ({len(wrong)} such tensors)")
    with torch.no_grad():
        for name, param in model.named_parameters():
            value = tensors[name]
            param.copy_(dequantize(value) if isinstance(value, Quantized) else value.float())
    return model.to(run.device)


# ======================================================================================================================
# 9. Artifact container
#
# One file holds everything that evaluation needs: the configuration, a table of tensors and their values. There is no
# pickle in it, every size is checked before memory is taken for it, and a damaged or hostile file can do nothing but
# raise ArtifactError. All integers are little-endian:
#
#     offset  size  field
#     0       8     magic "\x89CAPSGPT"
#     8       4     format version, 1
#     12      4     H, bytes of the header
#     16      32    SHA-256 of everything else in the file (bytes 0-15, then bytes 48 to the end)
#     48      H     header: JSON under brotli (configuration, compressor, tensor table, stream lengths)
#     48+H    ...   payload: the streams one after another, in table order, nothing between or after them
#
# A plain tensor is one stream: its bytes, first all lowest bytes, then all second bytes and so on, under brotli (lzma if
# that is the compressor). A quantized tensor has such a stream for its scales. Its codes follow one stream a matrix,
# stored column after column because neighbours in a column resemble each other most. With the compressor "rans" they
# come last, all tensors' together: the tables of the coder below, its states, and one stream of its words a tensor.
# ======================================================================================================================


ARTIFACT_MAGIC = b"\x89CAPSGPT"
ARTIFACT_VERSION = 1
ARTIFACT_PREFIX = struct.Struct("<8sII32s")
ARTIFACT_MAX_HEADER_BYTES = 1 << 20
ARTIFACT_MAX_TENSOR_BYTES = 1 << 28
ARTIFACT_MAX_ROWS = 1 << 20
ARTIFACT_MAX_WIDTH = 1 << 20
COMPRESSORS = ("brotli", "lzma", "rans")
PLAIN_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
QUANTIZE_METHODS = ("scalar", "trellis")


class ArtifactError(ValueError):
    """The file is no artifact of this format, or it is damaged."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix, or a bank of matrices, as small integers with one scale a row.

    codes: int8 (..., rows, cols); scales: float16 (..., rows); method: how the two give weights back, see dequantize.
    """

    codes: Tensor
    scales: Tensor
    method: str = "scalar"


def dequantize(quantized: Quantized) -> Tensor:
    """The weights that the codes stand for: levels * scales, float32 (..., rows, cols); a scalar code is its level."""
    assert quantized.method in QUANTIZE_METHODS, quantized.method
    levels = quantized.codes.float()
    if quantized.method == "trellis":
        levels = trellis_levels(levels, trellis_quantizers(quantized.codes).float())
    return levels * quantized.scales.float().unsqueeze(-1)


def pack_artifact(tensors: dict[str, Tensor | Quantized], config: dict, compressor: str) -> bytes:
    """The bytes of an artifact file; unpack_artifact gives back the same integers and the same floats, bit for bit.

    config must be JSON; compressor is one of COMPRESSORS. Raises ValueError for what cannot be stored: an unknown
    compressor, dtype or method, scales that are not finite (the message names the tensor).
    """
    if compressor not in COMPRESSORS:
        raise ValueError(f"COMPRESSOR={compressor!r}: allowed are {', '.join(COMPRESSORS)}")
    table = [_table_entry(name, tensor) for name, tensor in tensors.items()]
    jobs: list[bytes] = []
    for tensor in tensors.values():
        jobs.append(_byte_planes(tensor.scales if isinstance(tensor, Quantized) else tensor))
        if isinstance(tensor, Quantized) and compressor != "rans":
            matrices = tensor.codes.cpu().numpy()
            jobs += [matrices[index].T.tobytes() for index in np.ndindex(matrices.shape[:-2])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = list(pool.map(lambda job: _compress(job, compressor), jobs))
    if compressor == "rans":
        streams += encode_codes([_as_bank(t) for t in tensors.values() if isinstance(t, Quantized)])
    header = {"config": config, "compressor": compressor, "tensors": table, "streams": [len(s) for s in streams]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > ARTIFACT_MAX_HEADER_BYTES:
        raise ValueError(f"the artifact's header takes {len(text)} bytes, more than {ARTIFACT_MAX_HEADER_BYTES}")
    packed_header = brotli.compress(text, quality=11)
    body = b"".join([packed_header, *streams])
    start = struct.pack("<8sII", ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed_header))
    return start + hashlib.sha256(start + body).digest() + body


def unpack_artifact(data: bytes) -> tuple[dict, dict[str, Tensor | Quantized]]:
    """(config, tensors) of an artifact, on the CPU. Raises ArtifactError when the file is not of this format.

    The tensors take at most ARTIFACT_MAX_TENSOR_BYTES, unpacking them at most four times that.
    """
    if len(data) < ARTIFACT_PREFIX.size or data[:8] != ARTIFACT_MAGIC:
        raise ArtifactError("this is not an artifact of train_gpt.py (wrong first bytes)")
    _, version, header_bytes, digest = ARTIFACT_PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"artifact format {version}; this program reads format {ARTIFACT_VERSION}")
    view = memoryview(data)
    body = view[ARTIFACT_PREFIX.size :]
    if hashlib.sha256(bytes(view[:16]) + body).digest() != digest:
        raise ArtifactError("the artifact is cut short or damaged (its checksum does not match); copy or make it again")
    if header_bytes > len(body):
        raise ArtifactError("the artifact's header is longer than the file")
    header = _parse_header(bytes(body[:header_bytes]))
    streams = _cut_streams(body[header_bytes:], header["streams"])
    return header["config"], _unpack_tensors(header["tensors"], streams, header["compressor"])


def size_table(data: bytes, tensors: dict[str, Tensor | Quantized]) -> list[dict[str, str | int]]:
    """Where the bytes of an artifact with these tensors are: one row for every large quantized tensor, one for the rest.

    Columns: tensor, weights, bytes, bits_per_weight (scales included) and entropy: bits a weight, scales not included,
    of the best code that knows nothing but the tensor (and the quantizer of a trellis).
    """
    header_bytes = ARTIFACT_PREFIX.unpack_from(data)[2]
    header = _parse_header(data[ARTIFACT_PREFIX.size : ARTIFACT_PREFIX.size + header_bytes])
    lengths, rows, listed = iter(header["streams"]), {}, 0
    for entry in header["tensors"]:
        own = next(lengths)
        if entry["kind"] == "plain":
            continue
        if header["compressor"] != "rans":
            own += sum(next(lengths) for _ in range(math.prod(entry["shape"][:-2])))
        rows[entry["name"]] = own
    if header["compressor"] == "rans":
        next(lengths), next(lengths)
        rows = {name: own + next(lengths) for name, own in rows.items()}
    table = []
    for name, size in rows.items():
        weights = tensors[name].codes.numel()
        if weights <= 8192:
            continue
        listed += size
        table.append({"tensor": name, "weights": weights, "bytes": size, "bits_per_weight": f"{8 * size / weights:.4f}",
                      "entropy": f"{_table_entropy(tensors[name]) / weights:.4f}"})
    return [*table, {"tensor": "rest", "bytes": len(data) - listed}]


def _table_entropy(quantized: Quantized) -> float:
    """Bits of the codes with one frequency table a quantizer."""
    symbols = quantized.codes.cpu().int() + 128
    if quantized.method == "trellis":
        symbols = symbols + 256 * trellis_quantizers(quantized.codes.cpu())
    return _entropy_bits(np.bincount(symbols.ravel().numpy(), minlength=512).reshape(2, 256))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, never a part: temporary name in the same folder,
    fsync, rename. Raises OSError with a hint when the folder cannot be written or is full; the old file stays."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        hint = "free some space there or choose another place with ARTIFACT_DIR; a file of that name is left as it was"
        raise OSError(error.errno, f"cannot write {len(data)} bytes to {path}: {error.strerror} ({hint})") from error


def _table_entry(name: str, tensor: Tensor | Quantized) -> dict:
    if not isinstance(tensor, Quantized):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in PLAIN_DTYPES:
            raise ValueError(f"{name}: {dtype} cannot be stored, only {', '.join(PLAIN_DTYPES)}; convert it first")
        return {"name": name, "kind": "plain", "dtype": dtype, "shape": list(tensor.shape)}
    codes, scales = tensor.codes, tensor.scales
    if tensor.method not in QUANTIZE_METHODS:
        raise ValueError(f"{name}: unknown quantization {tensor.method!r}")
    if codes.dtype != torch.int8 or scales.dtype != torch.float16 or codes.ndim < 2 or scales.shape != codes.shape[:-1]:
        raise ValueError(f"{name}: codes must be int8 (..., rows, cols) and scales float16 (..., rows)")
    if not torch.isfinite(scales).all():
        raise ValueError(f"{name}: its scales are not all finite, the weights behind it have diverged")
    return {"name": name, "kind": tensor.method, "shape": list(codes.shape)}


def _parse_header(packed: bytes) -> dict:
    """The header as a dict whose every field has been checked."""
    text = _decompress(packed, "brotli", ARTIFACT_MAX_HEADER_BYTES, exact=False)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the artifact's header is not JSON") from error
    if not isinstance(header, dict) or set(header) != {"config", "compressor", "tensors", "streams"}:
        raise ArtifactError("the artifact's header has other fields than this format")
    if not isinstance(header["config"], dict) or header["compressor"] not in COMPRESSORS:
        raise ArtifactError("the artifact's configuration or compressor is not of this format")
    if not isinstance(header["tensors"], list) or not isinstance(header["streams"], list):
        raise ArtifactError("the artifact's tensor table or stream list is not a list")
    table = header["tensors"]
    for entry in table:
        _check_entry(entry)
    if len({entry["name"] for entry in table}) != len(table):
        raise ArtifactError("the artifact's tensor table repeats a name")
    rows = sum(entry["shape"][-2] for entry in table if entry["kind"] != "plain")
    tensor_bytes = sum(_entry_bytes(entry) for entry in table)
    if tensor_bytes > ARTIFACT_MAX_TENSOR_BYTES or rows > ARTIFACT_MAX_ROWS:
        raise ArtifactError(f"the artifact's tensor table asks for {tensor_bytes} bytes in {rows} rows, out of bounds")
    return header


def _entry_bytes(entry: dict) -> int:
    """Memory that the tensor of a table row takes."""
    shape = entry["shape"]
    if entry["kind"] == "plain":
        return math.prod(shape) * PLAIN_DTYPES[entry["dtype"]].itemsize
    return math.prod(shape) + 2 * math.prod(shape[:-1])


def _check_entry(entry: object) -> None:
    """Raise ArtifactError unless this is a row of the tensor table."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    fields = {"name", "kind", "shape", "dtype"} if kind == "plain" else {"name", "kind", "shape"}
    if not isinstance(kind, str) or kind not in ("plain", *QUANTIZE_METHODS) or set(entry) != fields:
        raise ArtifactError(f"the artifact's tensor table has a row that is none: {str(entry)[:200]}")
    shape = entry["shape"]
    sizes_fit = isinstance(shape, list) and len(shape) <= 4 and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
    dtype_fits = kind != "plain" or (isinstance(entry["dtype"], str) and entry["dtype"] in PLAIN_DTYPES)
    if not (isinstance(entry["name"], str) and sizes_fit and dtype_fits and (kind == "plain" or len(shape) >= 2)):
        raise ArtifactError(f"the artifact's tensor table has an impossible row: {str(entry)[:200]}")
    if kind != "plain" and math.prod(shape[:-2]) * max(1, shape[-1]) > ARTIFACT_MAX_WIDTH:
        raise ArtifactError(f"the artifact's tensor table has a row with too many columns: {str(entry)[:200]}")


def _cut_streams(payload: memoryview, lengths: list) -> list[memoryview]:
    """The payload cut in streams of these lengths, which must use it up."""
    if not all(type(n) is int and 0 <= n <= len(payload) for n in lengths) or sum(lengths) != len(payload):
        raise ArtifactError("the artifact's streams do not add up to its payload")
    ends = np.cumsum([0, *lengths]).tolist()
    return [payload[start:end] for start, end in zip(ends, ends[1:])]


def _unpack_tensors(table: list[dict], streams: list[memoryview], compressor: str) -> dict[str, Tensor | Quantized]:
    """The tensors of a checked table; every stream is used once."""
    matrix_counts = [math.prod(entry["shape"][:-2]) if entry["kind"] != "plain" else 0 for entry in table]
    quantized_count = sum(entry["kind"] != "plain" for entry in table)
    expected = len(table) + (2 + quantized_count if compressor == "rans" else sum(matrix_counts))
    if len(streams) != expected:
        raise ArtifactError(f"the artifact has {len(streams)} streams where its table needs {expected}")
    remaining = iter(streams)
    tensors: dict[str, Tensor | Quantized] = {}
    for entry, matrices in zip(table, matrix_counts):
        shape = entry["shape"]
        if entry["kind"] == "plain":
            tensors[entry["name"]] = _from_planes(next(remaining), PLAIN_DTYPES[entry["dtype"]], shape, compressor)
            continue
        scales = _from_planes(next(remaining), torch.float16, shape[:-1], compressor)
        codes = np.empty((matrices, *shape[-2:]), np.int8)
        if compressor != "rans":
            rows, cols = shape[-2:]
            for matrix in codes:
                column_major = _decompress(next(remaining), compressor, rows * cols)
                matrix[:] = np.frombuffer(column_major, np.int8).reshape(cols, rows).T
        tensors[entry["name"]] = Quantized(torch.from_numpy(codes).reshape(shape), scales, entry["kind"])
    if compressor == "rans":
        banks = [_as_bank(t) for t in tensors.values() if isinstance(t, Quantized)]
        decode_codes(next(remaining), next(remaining), b"".join(remaining), banks)
    return tensors


def _as_bank(quantized: Quantized) -> Bank:
    """The codes (..., rows, cols) seen as (matrices, rows, cols), sharing memory when they can."""
    shape = quantized.codes.shape
    codes = quantized.codes.cpu().numpy().reshape(math.prod(shape[:-2]), *shape[-2:])
    return Bank(codes, quantized.method == "trellis")


def _byte_planes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, all first bytes of the elements before all second ones and so on."""
    values = tensor.detach().cpu().contiguous().numpy()
    return values.reshape(-1, 1).view(np.uint8).T.tobytes()


def _from_planes(stream: memoryview, dtype: torch.dtype, shape: list[int], compressor: str) -> Tensor:
    count = math.prod(shape)
    planes = _decompress(stream, compressor, count * dtype.itemsize)
    interleaved = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, count).T.copy()
    return torch.from_numpy(interleaved).reshape(-1).view(dtype).reshape(shape)


LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22, "lc": 0, "lp": 0, "pb": 0}]


def _compress(data: bytes, compressor: str) -> bytes:
    if compressor == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return brotli.compress(data, quality=11, lgwin=24)


def _decompress(stream: bytes | memoryview, compressor: str, size: int, exact: bool = True) -> bytes:
    """At most size bytes out of a stream (exactly size unless told otherwise); it is never expanded further."""
    stream = bytes(stream)
    try:
        if compressor == "lzma":
            decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
            plain = decoder.decompress(stream, max_length=size + 1)
        else:
            decoder, plain, more = brotli.Decompressor(), b"", stream
            while len(plain) <= size and not decoder.is_finished():
                piece = decoder.process(more, output_buffer_limit=size + 1)
                if not piece and not more:
                    break
                plain, more = plain + piece, b""
    except (brotli.error, lzma.LZMAError, EOFError) as error:
        raise ArtifactError("a stream of the artifact cannot be decompressed") from error
    if len(plain) > size or (exact and len(plain) != size):
        raise ArtifactError(f"a stream of the artifact does not hold the {size} bytes that its table says")
    return plain


# ---- entropy coder ("rans") ----
# Codes come row by row, all columns and all matrices of a bank at once. What tells most about a code is how large the
# codes above it in its column were; that mean, known to both sides, picks one of up to 32 frequency tables of the bank.
# Symbols go through range asymmetric numeral systems (Duda, 2013; arXiv:1311.2540): up to RANS_MAX_LANES states of
# 32 bits take turns and share one list of 16-bit words. The decoder computes with integers only, so that every machine gets
# the same codes. Encoding runs the symbols backwards, so that decoding reads the words forwards.

RANS_BITS = 14
RANS_MAX_LANES = 1024
RANS_LANE_SYMBOLS = 8192
RANS_LOW = 1 << 16
RANS_CONTEXTS = 32
RANS_CONTEXT_SYMBOLS = 8192
RANS_PRIOR_ROWS = 4
RANS_MEAN_UNIT = 32
_MODEL_FIELDS = np.dtype([("predicted", "u1"), ("lowest", "<i2"), ("symbols", "<u2"), ("mean", "<u2"), ("contexts", "<u2")])


class Bank(NamedTuple):
    """Codes (matrices, rows, cols), int8, and whether a trellis wrote them."""

    codes: np.ndarray
    trellis: bool

    @property
    def can_predict(self) -> bool:
        """Tall enough to learn on the way how a row's codes hang together."""
        matrices, rows, cols = self.codes.shape
        return matrices == 1 and 64 <= cols <= 2048 and rows >= TALL_RATIO * cols


class _Step(NamedTuple):
    """Codes that are coded side by side, and what both sides know of them before: a guess, how far off it may be, and
    the quantizer (0 when there is no trellis). where: their place in the bank as (matrices, rows, cols)."""

    where: tuple
    guesses: np.ndarray
    features: np.ndarray
    quantizers: np.ndarray


@dataclass(frozen=True, eq=False)
class _BankModel:
    """How the codes of one bank are coded: what the encoder chose and the decoder reads.

    predicted: codes are coded as differences to a guess. lowest: smallest difference. mean: mean of |code| in units of
    1/RANS_MEAN_UNIT. thresholds: (contexts-1,) of the feature, rising. roots: (quantizers, contexts, symbols) uint8,
    square roots of the frequencies up to a factor, so that a byte serves rare and frequent symbols alike.
    """

    predicted: bool
    lowest: int
    mean: int
    thresholds: np.ndarray
    roots: np.ndarray

    def frequencies(self) -> np.ndarray:
        """(quantizers*contexts, symbols) int64, every row adds up to 2**RANS_BITS; integers only."""
        squares = self.roots.reshape(-1, self.roots.shape[-1]).astype(np.int64) ** 2
        total = np.maximum(squares.sum(1, keepdims=True), 1)
        scaled = np.where(squares > 0, np.maximum(squares * (1 << RANS_BITS) // total, 1), 0)
        largest = scaled.argmax(1)
        scaled[np.arange(len(scaled)), largest] += (1 << RANS_BITS) - scaled.sum(1)
        return scaled

    def contexts(self, features: np.ndarray, quantizers: np.ndarray) -> np.ndarray:
        """The table of each code, from what is known before it."""
        return np.searchsorted(self.thresholds, features, side="right") + quantizers * (len(self.thresholds) + 1)


def encode_codes(banks: list[Bank]) -> list[bytes]:
    """[tables, states, words of each bank], for decode_codes with banks of the same shapes."""
    models, slots = [], []
    for bank in banks:
        if bank.codes.size == 0:
            slots.append((np.empty(0, np.uint16), np.empty(0, np.uint16), []))
            continue
        fit = _fit_bank(bank)
        models.append(fit.model)
        frequencies = fit.model.frequencies()
        starts = np.cumsum(frequencies, 1) - frequencies
        chosen = (fit.contexts, fit.symbols)
        slots.append((frequencies[chosen].astype(np.uint16), starts[chosen].astype(np.uint16), fit.lengths))
    return [_pack_models(models), *_rans_encode(slots, _lane_count(banks))]


def decode_codes(tables: memoryview, states: memoryview, words: bytes, banks: list[Bank]) -> None:
    """Fill the codes of banks with those that encode_codes was given; words are those of all banks, joined."""
    banks = [bank for bank in banks if bank.codes.size]
    decoder = _RansDecoder(states, words, _lane_count(banks))
    for bank, model in zip(banks, _unpack_models(tables, banks)):
        decoder.load(model.frequencies())
        for step in _steps(bank, model.predicted, model.mean):
            symbols = decoder.symbols(model.contexts(step.features, step.quantizers))
            differences = symbols.astype(np.int64) + (step.guesses + model.lowest)
            bank.codes[step.where] = differences.reshape(bank.codes[step.where].shape)
    decoder.finish()


def _lane_count(banks: list[Bank]) -> int:
    """States of the coder: many are fast, few are small."""
    return min(RANS_MAX_LANES, 1 + sum(bank.codes.size for bank in banks) // RANS_LANE_SYMBOLS)


def _steps(bank: Bank, predicted: bool, mean: int) -> Iterator[_Step]:
    """The steps of a bank in order. Each must have been read, or written to bank.codes, before the next is asked for."""
    return _predicted_steps(bank) if predicted else _plain_steps(bank, mean)


def _plain_steps(bank: Bank, mean: int) -> Iterator[_Step]:
    """Row by row, all matrices at once: the feature of a code is the mean of |code| above it in its column."""
    matrices, rows, cols = bank.codes.shape
    segments, next_states = trellis_segments(rows, cols), trellis_next_states().numpy()
    states = np.zeros((segments, matrices * cols), np.int64)
    sums, guesses = np.zeros(matrices * cols, np.int64), np.zeros(matrices * cols, np.int64)
    for row in range(rows):
        state = states[row % segments]
        features = (sums * RANS_MEAN_UNIT + mean * RANS_PRIOR_ROWS) // (row + RANS_PRIOR_ROWS)
        yield _Step(np.s_[:, row, :], guesses, features, state & 1 if bank.trellis else guesses)
        codes = bank.codes[:, row, :].ravel().astype(np.int64)
        sums += np.abs(codes)
        if bank.trellis:
            state[:] = next_states[state, codes & 1]


# A tall matrix, the embedding, is coded column by column in blocks of rows, because the codes of a row hang together:
# once some blocks are known, the second moments of their rows say how each column follows from those before it. The
# moments' factors (L D L^T, as in Cholesky's method) turn a row into guesses and innovations, the share that could not
# be guessed: level_j = sum over k < j of L_jk innovation_k + innovation_j. It is all fixed-point integers, so that
# every machine makes the same guesses: levels have 8 fractional bits, L 16, moments 12. Matrix products go through
# float64, in which integers of this size are exact in any order of summation.

TALL_RATIO = 8
TALL_BLOCK_ROWS = 256
TALL_REFIT = 1.25
TALL_LEVEL_BITS = 8
TALL_FACTOR_BITS = 16
TALL_MOMENT_BITS = 12
TALL_PANEL = 64


def _predicted_steps(bank: Bank) -> Iterator[_Step]:
    """Column by column through blocks of rows; a feature is the column's expected innovation times the row's so far."""
    codes, next_states = bank.codes[0], trellis_next_states().numpy()
    rows, cols = codes.shape
    block = trellis_segments(rows, cols) if bank.trellis else TALL_BLOCK_ROWS
    factor, deviations, fitted = np.zeros((cols, cols)), np.full(cols, 1 << TALL_MOMENT_BITS // 2, np.int64), 0
    moments, levels, states = np.zeros((cols, cols)), np.zeros((rows, cols)), np.zeros((cols, block), np.int64)
    for begin in range(0, rows, block):
        if begin and begin >= fitted * TALL_REFIT:
            moments += levels[fitted:begin].T @ levels[fitted:begin]
            (factor, deviations), fitted = _fit_predictor(moments.astype(np.int64), begin), begin
        where = slice(begin, min(begin + block, rows))
        count = where.stop - begin
        innovations, sizes = np.zeros((count, cols)), np.full(count, 16 * 205, np.int64)
        for col in range(cols):
            exact = innovations[:, :col] @ factor[col, :col]
            guess = np.floor(exact / (1 << TALL_FACTOR_BITS)).astype(np.int64)
            state = states[col, :count]
            quantizers = state & 1 if bank.trellis else np.zeros_like(guess)
            features = np.minimum(deviations[col] * sizes // (col + 16) >> 5, 65535)
            yield _Step((slice(0, 1), where, col), _code_guesses(guess, quantizers, bank.trellis), features, quantizers)
            level = codes[where, col].astype(np.int64)
            if bank.trellis:
                state[:] = next_states[state, level & 1]
                level = trellis_levels(level, quantizers)
            levels[where, col] = level
            innovation = (level << TALL_LEVEL_BITS) - guess
            innovations[:, col] = innovation
            sizes += np.minimum((np.abs(innovation) << 6) // deviations[col], 1 << 12)


def _code_guesses(guess: np.ndarray, quantizers: np.ndarray, trellis: bool) -> np.ndarray:
    """The code nearest to a guess of its level; nearly so near 0 in a trellis."""
    if not trellis:
        return np.clip((guess + 128) >> 8, -128, 127)
    return np.clip((guess + quantizers * (np.sign(guess) << 8) + 256) >> 9, -128, 127)


def _fit_predictor(moments: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(factor, deviations) from the summed x^T x of `count` rows of levels, int64 (cols, cols).

    factor: L, float64 that holds integers, with TALL_FACTOR_BITS; deviations: (cols,) int64, standard deviations of the
    innovations with TALL_MOMENT_BITS // 2. What lies off the diagonal counts less the fewer rows there were.
    """
    cols = len(moments)
    doubt = min(max((1 << 16) // 10, (1 << 16) * 3 * cols // (10 * count)), (1 << 16) * 19 // 20)
    matrix = (moments << TALL_MOMENT_BITS) // count
    diagonal = np.diagonal(matrix).copy()
    matrix = matrix * ((1 << 16) - doubt) >> 16
    np.fill_diagonal(matrix, diagonal)
    factor, deviations = np.zeros((cols, cols)), np.empty(cols, np.int64)
    for begin in range(0, cols, TALL_PANEL):
        width = min(TALL_PANEL, cols - begin)
        panel = matrix[begin:, begin : begin + width].copy()
        for j in range(width):
            pivot = max(int(panel[j, j]), 64)
            deviations[begin + j] = math.isqrt(pivot)
            below = np.clip((panel[j + 1 :, j] << TALL_FACTOR_BITS) // pivot, -(1 << 18), 1 << 18)
            factor[begin + j + 1 :, begin + j] = below
            panel[j + 1 :, j + 1 :] -= below[:, None] * panel[j + 1 : width, j] >> TALL_FACTOR_BITS
        done = factor[begin + width :, begin : begin + width] @ panel[width:].T.astype(np.float64)
        matrix[begin + width :, begin + width :] -= np.floor(done / (1 << TALL_FACTOR_BITS)).astype(np.int64)
    return factor, deviations


class _Fit(NamedTuple):
    """A bank's model with what it makes of the bank: 1-d contexts and symbols in coding order, the lengths of the steps,
    and how often each context saw each symbol, (quantizers, contexts, symbols)."""

    model: _BankModel
    contexts: np.ndarray
    symbols: np.ndarray
    lengths: list[int]
    counts: np.ndarray


def _fit_bank(bank: Bank) -> _Fit:
    """The better of the models that the bank allows."""
    fits = [_fit_model(bank, predicted) for predicted in ([False, True] if bank.can_predict else [False])]
    return min((fit for fit in fits if fit is not None), key=lambda fit: _entropy_bits(fit.counts))


def _fit_model(bank: Bank, predicted: bool) -> _Fit | None:
    """A model with the frequencies of this bank; None if it would need more than 256 symbols."""
    mean = int(round(float(np.abs(bank.codes.astype(np.int16)).mean()) * RANS_MEAN_UNIT))
    steps, differences = [], []
    for step in _steps(bank, predicted, mean):
        steps.append(step)
        differences.append(bank.codes[step.where].ravel() - step.guesses)
    differences = np.concatenate(differences)
    features, quantizers = (np.concatenate([step[i] for step in steps]) for i in (2, 3))
    lowest, symbols = int(differences.min()), int(differences.max() - differences.min()) + 1
    if symbols > 256:
        return None
    contexts = int(min(RANS_CONTEXTS, max(1, differences.size // RANS_CONTEXT_SYMBOLS)))
    thresholds = np.unique(np.quantile(features, np.arange(1, contexts) / contexts, method="higher")).astype(np.int64)
    shape = (1 + bank.trellis, len(thresholds) + 1, symbols)
    context = _BankModel(predicted, lowest, mean, thresholds, np.zeros(shape, np.uint8)).contexts(features, quantizers)
    differences -= lowest
    counts = np.bincount(context * symbols + differences, minlength=math.prod(shape)).reshape(shape)
    largest = np.maximum(counts.max(-1, keepdims=True), 1)
    roots = np.where(counts > 0, np.maximum(np.rint(255 * np.sqrt(counts / largest)), 1), 0).astype(np.uint8)
    model = _BankModel(predicted, lowest, mean, thresholds, roots)
    return _Fit(model, context, differences, [len(step.features) for step in steps], counts)


def _entropy_bits(counts: np.ndarray) -> float:
    """Bits of symbols that occurred so often, (..., symbols), with a table each; the tables themselves come free."""
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return float(-(counts * np.log2(np.where(counts > 0, share, 1.0))).sum())


def _pack_models(models: list[_BankModel]) -> bytes:
    parts = []
    for model in models:
        _, contexts, symbols = model.roots.shape
        parts.append(np.array([(model.predicted, model.lowest, symbols, model.mean, contexts)], _MODEL_FIELDS).tobytes())
        parts += [model.thresholds.astype("<u2").tobytes(), model.roots.tobytes()]
    return brotli.compress(b"".join(parts), quality=11)


def _unpack_models(stream: memoryview, banks: list[Bank]) -> list[_BankModel]:
    limit = len(banks) * (_MODEL_FIELDS.itemsize + RANS_CONTEXTS * (2 + 2 * 256))
    data = _decompress(stream, "brotli", limit, exact=False)
    models, position = [], 0
    for bank in banks:
        if position + _MODEL_FIELDS.itemsize > len(data):
            raise ArtifactError("the artifact's coder tables are cut short")
        predicted, lowest, symbols, mean, contexts = np.frombuffer(data, _MODEL_FIELDS, 1, position)[0].item()
        position += _MODEL_FIELDS.itemsize
        shape = (1 + bank.trellis, contexts, symbols)
        size = 2 * (contexts - 1) + math.prod(shape)
        in_range = predicted <= bank.can_predict and 1 <= symbols <= 256 and 1 <= contexts <= RANS_CONTEXTS
        if not in_range or position + size > len(data):
            raise ArtifactError("the artifact's coder tables are impossible")
        thresholds = np.frombuffer(data, "<u2", contexts - 1, position).astype(np.int64)
        roots = np.frombuffer(data, np.uint8, math.prod(shape), position + 2 * (contexts - 1))
        position += size
        model = _BankModel(bool(predicted), lowest, mean, thresholds, roots.reshape(shape))
        if (model.frequencies() < 0).any() or (np.diff(thresholds) < 0).any():
            raise ArtifactError("the artifact's coder tables are impossible")
        models.append(model)
    if position != len(data):
        raise ArtifactError("the artifact's coder tables have bytes left over")
    return models


def _rans_encode(slots: list[tuple[np.ndarray, np.ndarray, list[int]]], lane_count: int) -> list[bytes]:
    """[states, words of each bank] for banks of (frequencies, starts, lengths of the steps); last symbol first."""
    state = np.full(lane_count, RANS_LOW, np.uint64)
    streams: list[bytes] = []
    for frequencies, starts, lengths in reversed(slots):
        words: list[np.ndarray] = []
        end = len(frequencies)
        for length in reversed(lengths):
            for begin in range(end - length + (length - 1) // lane_count * lane_count, end - length - 1, -lane_count):
                stop = min(begin + lane_count, end)
                frequency = frequencies[begin:stop].astype(np.uint64)
                lanes = state[: len(frequency)]
                full = lanes >= frequency << np.uint64(32 - RANS_BITS)
                words.append(lanes[full].astype("<u2"))
                lanes[full] >>= np.uint64(16)
                quotient = lanes // frequency
                lanes += quotient * (np.uint64(1 << RANS_BITS) - frequency)
                lanes += starts[begin:stop]
            end -= length
        streams.append(b"".join(word.tobytes() for word in reversed(words)))
    return [state.astype("<u4").tobytes(), *reversed(streams)]


class _RansDecoder:
    """Reads what _rans_encode wrote; the caller gives the same tables and contexts in the same order."""

    def __init__(self, states: memoryview, words: bytes, lane_count: int) -> None:
        if len(states) != 4 * lane_count or len(words) % 2:
            raise ArtifactError("the artifact's coder states or words are cut short")
        self.state = np.frombuffer(states, "<u4").astype(np.uint32)
        self.words = np.frombuffer(words, "<u2").astype(np.uint32)
        self.position = 0

    def load(self, frequencies: np.ndarray) -> None:
        """Take (contexts, symbols) tables, each row adding up to 2**RANS_BITS."""
        contexts, self.alphabet = frequencies.shape
        symbols = np.tile(np.arange(self.alphabet, dtype=np.uint8), contexts)
        self.symbol_of_slot = np.repeat(symbols, frequencies.ravel())
        self.frequency = frequencies.astype(np.uint32).ravel()
        self.start = (np.cumsum(frequencies, 1) - frequencies).astype(np.uint32).ravel()

    def symbols(self, context: np.ndarray) -> np.ndarray:
        """The next symbols, uint8 (n,), given the context of each."""
        result = np.empty(len(context), np.uint8)
        lane_count = len(self.state)
        for begin in range(0, len(context), lane_count):
            chunk = context[begin : begin + lane_count]
            lanes = self.state[: len(chunk)]
            slot = lanes & np.uint32((1 << RANS_BITS) - 1)
            symbol = self.symbol_of_slot[(chunk << RANS_BITS) + slot]
            result[begin : begin + lane_count] = symbol
            entry = chunk * self.alphabet + symbol
            lanes[:] = self.frequency[entry] * (lanes >> np.uint32(RANS_BITS)) + slot - self.start[entry]
            empty = np.flatnonzero(lanes < RANS_LOW)
            fresh = self.words[self.position : self.position + len(empty)]
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
    """What scoring some targets gave."""

    nats: float
    tokens: int
    num_bytes: int
    losses: np.ndarray  # (targets of the validation set,) float32; NaN where another rank scored

    @property
    def val_loss(self) -> float:
        """Nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def val_bpb(self) -> float:
        """Bits per byte of original text."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    def report(self, log: Log, name: str, time_ms: float) -> None:
        log.record("eval", name=name, val_loss=f"{self.val_loss:.8f}", val_bpb=f"{self.val_bpb:.8f}", tokens=self.tokens,
                   bytes=self.num_bytes, time_ms=int(time_ms))


def pack_segments(starts: np.ndarray, total: int, limit: int) -> list[tuple[int, int]]:
    """Runs [first, last) of consecutive segments, each of up to `limit` tokens in sum; no segment is longer than that."""
    ends = np.append(starts[1:], total)
    runs, first = [], 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + limit, side="right"))
        assert last > first, "a segment fits a batch"
        runs.append((first, last))
        first = last
    return runs


def evaluation_batch(run: Run, val: ValData, starts: np.ndarray) -> Batch:
    """The batch of the consecutive segments that begin at `starts` (its last entry is where they end).

    Under torch.compile it is filled up to the fixed size with segments that nobody scores, so that one graph serves all.
    """
    cfg, begin, end = run.cfg, int(starts[0]), int(starts[-1])
    tokens, targets, local = val.tokens[begin:end], val.tokens[begin + 1: end + 1], starts[:-1] - begin
    if run.compile:
        size = cfg.val_batch_tokens // 8
        local = np.append(local, np.arange(end - begin, size, cfg.eval_seq_len))
        tokens, targets = (np.pad(a, (0, size - len(a))) for a in (tokens, targets))
    return make_batch(tokens, targets, local, cfg.eval_seq_len, run.device)


@torch.no_grad()
def evaluate(run: Run, model: GPT, val: ValData, name: str, depth: int) -> Score:
    """Score every target of the validation set once at `depth` and log it under `name`."""
    cfg, ranks, began = run.cfg, run.ranks, time.perf_counter()
    forward, schedule, progress = compiled(run, model), loop_schedule(cfg, depth), Progress(run.log)
    count = len(val.tokens) - 1
    starts = segment_starts(val.tokens[:-1], count, cfg.eval_seq_len)
    runs = pack_segments(starts, count, cfg.val_batch_tokens // 8)
    bounds = np.append(starts, count)
    losses = np.full(count, np.nan, dtype=np.float32)
    sums = np.zeros(len(runs))
    scored = 0
    for i in range(ranks.rank, len(runs), ranks.world):
        first, last = runs[i]
        begin, end = int(bounds[first]), int(bounds[last])
        part = forward(evaluation_batch(run, val, bounds[first: last + 1]), schedule)[: end - begin].float().cpu().numpy()
        losses[begin:end] = part
        sums[i] = part.sum(dtype=np.float64)
        scored += end - begin
        progress(f"eval_{name}", i + 1, len(runs))
    gathered = ranks.gather((sums, scored))
    assert sum(n for _, n in gathered) == count, "every target is scored exactly once"
    score = Score(float(sum(s for s, _ in gathered).sum()), count, val.num_bytes, losses)
    score.report(run.log, name, 1e3 * (time.perf_counter() - began))
    return score


# ======================================================================================================================
# 11. Test-time training
#
# Documents are scored chunk by chunk, longest documents first, each with low-rank adapters of its own (Hu et al. 2021)
# that take one AdamW step on a chunk after that chunk has been scored. Between the phases the weights of the model
# itself learn from documents already scored. Which rank does what depends on document order alone, never on timing.
#
# What a chunk sees of the earlier ones is computed again with the adapters of the moment (TTT_CONTEXT=window, the record:
# many forwards a token), or is the keys and values as they were when those chunks were scored (cache: one).
# ======================================================================================================================


class Adapters:
    """Low-rank terms x A^T B^T for a batch of documents at every visit, with their AdamW; callable through `bind()`.

    A (visits, documents, rank, in) starts uniform in +-1/sqrt(in), the same draw for every document; B (visits,
    documents, out, rank) starts at 0. "o" and "mlp" are the bypasses around attention and MLP.
    """

    def __init__(self, run: Run, schedule: Schedule, documents: int) -> None:
        cfg, visits = run.cfg, schedule.visits
        dim, kv_dim = cfg.model_dim, cfg.kv_dim
        shapes = {"head": (1, dim, cfg.vocab_size)}
        shapes |= {"q": (visits, dim, dim)} if cfg.ttt_q_lora else {}
        shapes |= {"k": (visits, dim, kv_dim)} if cfg.ttt_k_lora else {}
        shapes |= {"v": (visits, dim, kv_dim)} if cfg.ttt_v_lora else {}
        shapes |= {"o": (visits, dim, dim)} if cfg.ttt_o_lora else {}
        shapes |= {"mlp": (visits, dim, dim)} if cfg.ttt_mlp_lora else {}
        generator = torch.Generator().manual_seed(cfg.seed)
        rank, self.documents = cfg.ttt_lora_rank, documents
        self.initial = {name: ((torch.rand(n, 1, rank, i, generator=generator) * 2 - 1) / math.sqrt(i)).to(run.device)
                        for name, (n, i, _) in sorted(shapes.items())}
        self.a = {name: initial.repeat(1, documents, 1, 1).requires_grad_() for name, initial in self.initial.items()}
        self.b = {name: torch.zeros(n, documents, o, rank, device=run.device, requires_grad=True)
                  for name, (n, _, o) in sorted(shapes.items())}
        self.params = [*self.a.values(), *self.b.values()]
        self.cfg, self.updates = cfg, torch.zeros((), device=run.device)
        lr = torch.tensor(cfg.ttt_lora_lr, device=run.device) if cfg.ttt_lora_lr_power else cfg.ttt_lora_lr
        self.adamw = torch.optim.AdamW(self.params, lr=lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10,
                                       weight_decay=cfg.ttt_weight_decay, fused=True, capturable=run.device.type == "cuda")

    @torch.no_grad()
    def reset(self) -> None:
        """As before the first chunk: fresh adapters, no optimizer state."""
        for name, initial in self.initial.items():
            self.a[name].copy_(initial.expand_as(self.a[name]))
            self.b[name].zero_()
        for state in self.adamw.state.values():
            for value in state.values():
                value.zero_()
        self.updates.zero_()

    def bind(self) -> Linear:
        """`linear` for one forward: each visit's slice is taken here, once, so that its gradient is gathered once."""
        a = {name: tensor.unbind(0) for name, tensor in self.a.items()}
        b = {name: tensor.unbind(0) for name, tensor in self.b.items()}
        documents = self.documents

        def linear(site: Site, x: Tensor, w: Tensor | None) -> Tensor | None:
            _, visit, name = site
            y = plain_linear(site, x, w)
            if name not in a:
                return y
            low = x.unflatten(0, (documents, -1)) @ a[name][visit].to(x.dtype).mT  # (documents, W, rank)
            delta = (low @ b[name][visit].to(x.dtype).mT).flatten(0, 1)
            return delta if y is None else y + delta

        return linear

    def learn(self, loss: Tensor) -> None:
        """One AdamW step on `loss`. The gradients are never accumulated: a captured graph writes them anew each time."""
        for param, grad in zip(self.params, torch.autograd.grad(loss, self.params)):
            param.grad = grad
        if isinstance(lr := self.adamw.param_groups[0]["lr"], Tensor):
            self.updates += 1
            lr.copy_(self.cfg.ttt_lora_lr * self.updates**self.cfg.ttt_lora_lr_power)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


class Documents:
    """The validation documents as TTT sees them, in scoring order: longest first, equals in data order."""

    def __init__(self, val: ValData) -> None:
        self.tokens = val.tokens
        starts = val.document_starts()
        ends = np.append(starts[1:], len(val.tokens) - 1)  # a document also predicts the BOS that follows it
        order = np.argsort(-(ends - starts), kind="stable")
        self.starts, self.lengths = starts[order], (ends - starts)[order]
        self.byte_sums = np.add.reduceat(np.append(val.byte_counts[1:], 0).astype(np.int64), starts)[order]

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, document: int) -> np.ndarray:
        """Tokens of a document, BOS first, without the BOS that follows."""
        start, length = int(self.starts[document]), int(self.lengths[document])
        last = start + length == len(self.tokens) - 1
        return self.tokens[start: start + length + last]


class Window(NamedTuple):
    """One chunk of every document of a batch with what it may look at; documents padded to W tokens, W a row.

    Only the rows of the chunks go through the output head, the same number a document; those that are no target fill up.
    """

    batch: Batch
    rows: Tensor  # (documents * chunk size,): rows (of documents * W) that are scored
    slots: Tensor  # where their losses go: document * longest + position, or behind all of them
    weights: Tensor  # a row's share in the training loss; 0 in a document's last chunk
    trains: bool


def chunk_window(run: Run, documents: Documents, members: range, slots: int, chunk: int) -> Window:
    """The window of chunk `chunk` for the documents `members` in `slots` places."""
    cfg, size = run.cfg, run.cfg.ttt_chunk_size
    lengths = np.zeros(slots, np.int64)
    lengths[: len(members)] = documents.lengths[members.start: members.stop]
    begin, end = np.minimum(chunk * size, lengths), np.minimum((chunk + 1) * size, lengths)
    first = np.where(end > begin, np.maximum(0, end - cfg.ttt_eval_seq_len), end)
    width = int((end - first).max())
    if run.compile:
        width = min(-(-width // 256) * 256, max(cfg.ttt_eval_seq_len, size))
    tokens, targets = np.zeros((slots, width), np.int64), np.zeros((slots, width), np.int64)
    for i, document in enumerate(members):
        at, n = int(documents.starts[document] + first[i]), int(end[i] - first[i])
        tokens[i, :n], targets[i, :n] = documents.tokens[at: at + n], documents.tokens[at + 1: at + 1 + n]
    place = begin[:, None] + np.arange(size)  # position in the document
    scored, trains = place < end[:, None], end < lengths
    document, longest = np.arange(slots)[:, None], int(lengths.max())
    rows = document * width + np.minimum(place - first[:, None], width - 1)
    places = np.where(scored, document * longest + place, slots * longest)
    weights = scored * (trains / np.maximum(end - begin, 1))[:, None]
    batch = make_batch(tokens.ravel(), targets.ravel(), np.arange(slots) * width, width, run.device)

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array.ravel())
        return tensor if run.device.type == "cpu" else tensor.pin_memory().to(run.device, non_blocking=True)

    return Window(batch, put(rows), put(places), put(weights.astype(np.float32)), bool(trains.any()))


class Cache:
    """Keys and values of the positions already scored, at every visit, for documents that go on chunk by chunk together.

    A ring: position p of a document lies at place p % places, where `places` is a number of whole chunks: what a chunk
    sees at most, itself included. Where the current chunk begins is a tensor, so that a captured graph can advance it.
    """

    def __init__(self, run: Run, schedule: Schedule, documents: int, places: int) -> None:
        cfg = run.cfg
        assert all(places % size == 0 for size in cfg.chunk_sizes), "a chunk never runs across the end of the ring"
        shape = (schedule.visits, documents, cfg.num_kv_heads, places, cfg.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=run.dtype, device=run.device) for _ in range(2))
        self.begin = torch.zeros((), dtype=torch.int64, device=run.device)
        self.documents, self.places = documents, places

    def bind(self, size: int, seen: int, fresh: list[tuple[Tensor, Tensor]]) -> Attend:
        """`attend` for one forward: a chunk of `size` tokens looks at the first `seen` places and at itself.

        Its own keys and values, (documents, Hkv, chunk, D) a visit, are appended to `fresh`; the gradient runs through
        these alone. The chunk that they will replace in the ring is out of sight already.
        """
        documents, last, chunk = self.documents, self.begin - 1, torch.arange(size, device=self.begin.device)
        held = last - (last - torch.arange(seen, device=last.device)) % self.places  # position there; below 0: none yet
        old = (held >= 0) & (held >= self.begin + size - self.places)
        mask = torch.cat([old.expand(size, seen), chunk[:, None] >= chunk], dim=1)

        def attend(visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            groups = q.size(1) // k.size(1)
            k, v = (t.unflatten(0, (documents, size)).transpose(1, 2) for t in (k, v))
            fresh.append((k.detach(), v.detach()))
            keys = torch.cat([self.keys[visit][:, :, :seen], k], dim=2)
            values = torch.cat([self.values[visit][:, :, :seen], v], dim=2)
            q = q.unflatten(1, (-1, groups)).unflatten(0, (documents, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(groups, 1))
            return y.unflatten(2, (groups, size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

        return attend

    @torch.no_grad()
    def store(self, fresh: list[tuple[Tensor, Tensor]]) -> None:
        """Put a chunk's keys and values in their places; the next chunk begins."""
        size = fresh[0][0].size(2)
        places = (self.begin + torch.arange(size, device=self.begin.device)) % self.places
        for kept, new in zip((self.keys, self.values), zip(*fresh)):
            kept.index_copy_(3, places, torch.stack(new))
        self.begin += size


class ChunkStep:
    """A step of cached TTT, in tensors that stay where they are: score a chunk of every document, then learn from it.

    On CUDA the whole step (forward, backward, AdamW, cache) is captured once for each number of places in sight, and
    replayed: nothing in a batch of documents waits for the host.
    """

    def __init__(self, run: Run, losses_of: Callable[..., Any], adapters: Adapters, cache: Cache, size: int) -> None:
        self.run, self.losses_of, self.adapters, self.cache, self.size = run, losses_of, adapters, cache, size
        rows = adapters.documents * size
        self.tokens, self.targets = (torch.zeros(rows, dtype=torch.int64, device=run.device) for _ in range(2))
        self.weights, self.losses = (torch.zeros(rows, device=run.device) for _ in range(2))
        self.bounds = torch.arange(0, rows + 1, size, dtype=torch.int32, device=run.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if run.device.type == "cuda":
            self.capture()

    def places_in_sight(self, begin: int) -> int:
        """Places that a chunk from position `begin` on looks at: the filled ones, on CUDA rounded up to one of a few numbers."""
        filled = min(begin, self.cache.places)
        if self.run.device.type == "cuda":
            filled = 2 ** max(8, math.ceil(math.log2(max(filled, 1))))
        return min(filled, self.cache.places)

    def capture(self) -> None:
        """Record a graph for each number of places. What adapters and cache hold is lost: a reset comes next."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        for seen in sorted({self.places_in_sight(begin) for begin in range(0, self.cache.places + 1, self.size)}):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and makes the optimizer's state
                    self.work(seen, trains=True)
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[seen] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[seen], pool=pool, capture_error_mode="thread_local"):
                self.work(seen, trains=True)

    def work(self, seen: int, trains: bool) -> None:
        """Everything that happens to a chunk; the losses are set before any adapter changes."""
        positions = (self.cache.begin + torch.arange(self.size, device=self.run.device)).int().repeat(self.adapters.documents)
        batch = Batch(self.tokens, self.targets, self.bounds, positions, self.size)
        with torch.set_grad_enabled(trains):
            losses, fresh = self.losses_of(batch, self.adapters, self.cache, seen)
            self.losses.copy_(losses.detach())
            for again in range(self.run.cfg.ttt_grad_steps if trains else 0):
                if again:
                    losses, _ = self.losses_of(batch, self.adapters, self.cache, seen)
                self.adapters.learn((losses * self.weights).sum())
        self.cache.store(fresh)

    def __call__(self, tokens: Tensor, targets: Tensor, weights: Tensor, begin: int, trains: bool) -> Tensor:
        """The losses (documents, size) of the chunk from position `begin` on; they are overwritten by the next one."""
        for kept, new in ((self.tokens, tokens), (self.targets, targets), (self.weights, weights)):
            kept.view_as(new).copy_(new)
        seen = self.places_in_sight(begin)
        self.graphs[seen].replay() if seen in self.graphs else self.work(seen, trains)
        return self.losses.view_as(tokens)


def chunk_bounds(cfg: Config, length: int) -> list[int]:
    """Where the chunks of a document begin, and where the last one ends: at or behind `length`."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(bounds[-1] + (cfg.ttt_chunk_size << sum(bounds[-1] >= at for at in cfg.ttt_chunk_doubles_at)))
    return bounds


def chunk_tables(run: Run, documents: Documents, members: range, slots: int, bounds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and shares in the training loss, each (slots, bounds[-1]), of a batch of documents."""
    starts, lengths = np.zeros((2, slots, 1), np.int64)
    starts[: len(members), 0] = documents.starts[members.start: members.stop]
    lengths[: len(members), 0] = documents.lengths[members.start: members.stop]
    place, sizes = np.arange(bounds[-1]), np.diff(bounds)
    inside = place < lengths
    at = np.where(inside, starts + place, 0)
    learns = np.repeat(bounds[1:], sizes) < lengths  # its chunk is not the document's last one
    tables = (np.where(inside, documents.tokens[at], 0).astype(np.int64),
              np.where(inside, documents.tokens[at + 1], 0).astype(np.int64),
              learns.astype(np.float32) / np.repeat(sizes, sizes).astype(np.float32))

    def put(table: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(table)
        return tensor if run.device.type == "cpu" else tensor.pin_memory().to(run.device, non_blocking=True)

    return tuple(map(put, tables))


class Adapter:
    """Scores batches of documents with adapters that learn from each chunk after it has been scored."""

    def __init__(self, run: Run, model: GPT) -> None:
        self.run, self.schedule = run, loop_schedule(run.cfg, run.cfg.eval_loop_depth)
        self.adapters: dict[int, Adapters] = {}
        self.cache: Cache | None = None
        self.chunk_steps: dict[int, ChunkStep] = {}  # by size of the chunk, all of one cache
        self.steps = self.forwarded = 0  # steps, and tokens that went through the model
        schedule = self.schedule

        def losses_of(batch: Batch, adapters: Adapters, cache: Cache | None = None, seen: int = 0,
                      rows: Tensor | None = None) -> tuple[Tensor, list]:
            fresh: list[tuple[Tensor, Tensor]] = []
            attend = None if cache is None else cache.bind(batch.max_seqlen, seen, fresh)
            return model(batch, schedule, adapters.bind(), attend, rows), fresh

        self.losses_of = compiled(run, losses_of, dynamic=True)

    def score(self, documents: Documents, members: range) -> list[np.ndarray]:
        """The losses of each document, (length,) float32, every one computed before anything learned from its token."""
        cfg = self.run.cfg
        slots = cfg.ttt_batch_size if self.run.compile else len(members)
        longest = int(documents.lengths[members.start: members.stop].max())
        if slots not in self.adapters:
            self.cache, self.adapters = None, {slots: Adapters(self.run, self.schedule, slots)}
        table = (self._score_cached if cfg.ttt_context == "cache" else self._score_windows)(documents, members, slots, longest)
        return [losses[: documents.lengths[d]] for d, losses in zip(members, table)]

    def _score_windows(self, documents: Documents, members: range, slots: int, longest: int) -> np.ndarray:
        """Losses (slots, longest), each chunk with its window computed again."""
        cfg, adapters = self.run.cfg, self.adapters[slots]
        adapters.reset()
        result = torch.zeros(slots * longest + 1, device=self.run.device)
        for chunk in range(-(-longest // cfg.ttt_chunk_size)):
            window = chunk_window(self.run, documents, members, slots, chunk)
            updates = cfg.ttt_grad_steps if window.trains else 0
            with torch.set_grad_enabled(window.trains):
                losses, _ = self.losses_of(window.batch, adapters, rows=window.rows)
                result[window.slots] = losses.detach()
                for again in range(updates):
                    if again:
                        losses, _ = self.losses_of(window.batch, adapters, rows=window.rows)
                    adapters.learn((losses * window.weights).sum())
            self._count(1, max(1, updates) * len(window.batch.tokens))
        return result[:-1].cpu().numpy().reshape(slots, longest)

    def _score_cached(self, documents: Documents, members: range, slots: int, longest: int) -> np.ndarray:
        """Losses (slots, longest or more), each chunk looking at keys and values kept from the earlier ones."""
        cfg, adapters, largest = self.run.cfg, self.adapters[slots], self.run.cfg.chunk_sizes[-1]
        cuda = self.run.device.type == "cuda"
        places = -(-(cfg.ttt_eval_seq_len if cuda else min(longest, cfg.ttt_eval_seq_len)) // largest) * largest
        if self.cache is None or self.cache.places != places:
            self.cache = Cache(self.run, self.schedule, slots, places)
            self.chunk_steps = {size: ChunkStep(self.run, self.losses_of, adapters, self.cache, size) for size in cfg.chunk_sizes}
        adapters.reset()
        self.cache.begin.zero_()
        bounds = chunk_bounds(cfg, longest)
        tables = chunk_tables(self.run, documents, members, slots, bounds)
        result = torch.zeros(slots, bounds[-1], device=self.run.device)
        for begin, end in zip(bounds, bounds[1:]):
            inputs = [table[:, begin:end] for table in tables]
            result[:, begin:end] = self.chunk_steps[end - begin](*inputs, begin, trains=end < longest)
        self._count(len(bounds) - 1, result.numel() * cfg.ttt_grad_steps)
        return result.cpu().numpy()

    def _count(self, steps: int, forwarded: int) -> None:
        self.steps += steps
        self.forwarded += forwarded

    def report_work(self, targets: int) -> None:
        """One line: steps of the rank that had most, forwards of a token on average over all ranks, memory at its peak."""
        steps, forwarded = zip(*self.run.ranks.gather((self.steps, self.forwarded)))
        memory = {"peak_mb": torch.cuda.max_memory_allocated() >> 20} if self.run.device.type == "cuda" else {}
        self.run.log.record("ttt_work", context=self.run.cfg.ttt_context, chunk=self.run.cfg.ttt_chunk_size, steps=max(steps),
                            forwards_per_target=f"{sum(forwarded) / targets:.3f}", **memory)

    def warm_up(self, val: ValData) -> None:
        """Compile and run everything on random tokens, before the clock."""
        if not self.run.compile:
            return
        cfg = self.run.cfg
        length = min(cfg.ttt_eval_seq_len, 512)
        tokens = np.random.default_rng(cfg.seed).integers(4, cfg.vocab_size, cfg.ttt_batch_size * length).astype(np.uint16)
        tokens[::length] = BOS_ID
        documents = Documents(ValData(tokens, np.ones_like(tokens), cfg.ttt_batch_size))
        self.score(documents, range(cfg.ttt_batch_size))
        self.steps = self.forwarded = 0


def phase_parts(cfg: Config, documents: int) -> list[range]:
    """The scoring order cut into the parts of the prefix and the rest; after each part of the prefix comes global SGD."""
    prefix = min(cfg.phased_ttt_prefix_docs, documents) if cfg.phased_ttt_enabled else 0
    phases = cfg.phased_ttt_num_phases
    cuts = [prefix * i // phases for i in range(phases + 1)] if prefix else [0]
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], documents])]


def global_sgd(run: Run, model: GPT, text: np.ndarray, phase: str) -> None:
    """One pass (GLOBAL_TTT_EPOCHS) of SGD over `text`, tokens already scored: a step a chunk, the last chunk left out.

    A chunk's sequences of EVAL_SEQ_LEN tokens are shared out over the ranks; its loss is the mean over all its tokens.
    """
    cfg, ranks, began = run.cfg, run.ranks, time.perf_counter()
    size = cfg.global_ttt_chunk_tokens
    chunks = -(-(len(text) - 1) // size)
    params = [p.requires_grad_() for p in model.parameters()]
    sgd = torch.optim.SGD(params, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)
    forward, schedule, progress = compiled(run, model), loop_schedule(cfg, cfg.eval_loop_depth), Progress(run.log)
    total = torch.zeros((), device=run.device)
    for i in range(chunks - 1):
        for group in sgd.param_groups:
            group["lr"] = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * i / max(chunks - 1, 1)))
        for _ in range(cfg.global_ttt_epochs):
            sgd.zero_grad(set_to_none=False)
            loss = torch.zeros((), device=run.device)
            for batch in global_sgd_batches(run, text[i * size: (i + 1) * size + 1]):
                part = forward(batch, schedule).sum() / size
                part.backward()
                loss += part.detach()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for param, grad in zip(params, grads):
                param.grad = ranks.sum(grad)
            if cfg.global_ttt_grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(params, cfg.global_ttt_grad_clip)
            sgd.step()
        total += ranks.sum(loss)
        progress(f"ttt_sgd_{phase}", i + 1, chunks - 1)
    for param in params:
        param.requires_grad_(False)
        param.grad = None
    run.log.record("ttt_sgd", phase=phase, tokens=len(text), chunks=max(chunks - 1, 0),
                   loss=f"{total.item() / max(chunks - 1, 1):.4f}", time_ms=int(1e3 * (time.perf_counter() - began)))


def warm_up_global_sgd(run: Run, model: GPT) -> None:
    """Compile forward and backward of the global SGD on random tokens, with few segments and with many; weights stay."""
    cfg, rng = run.cfg, np.random.default_rng(run.cfg.seed)
    forward, schedule = compiled(run, model), loop_schedule(cfg, cfg.eval_loop_depth)
    for param in model.parameters():
        param.requires_grad_(True)
    for every in (cfg.eval_seq_len, 32):
        tokens = rng.integers(4, cfg.vocab_size, cfg.global_ttt_chunk_tokens + 1).astype(np.uint16)
        tokens[::every] = BOS_ID
        for batch in global_sgd_batches(run, tokens):
            forward(batch, schedule).sum().backward()
    for param in model.parameters():
        param.requires_grad_(False)
        param.grad = None


def global_sgd_batches(run: Run, entries: np.ndarray) -> Iterator[Batch]:
    """This rank's share of a chunk, whole sequences, GLOBAL_TTT_BATCH_SEQS at a time; `entries` has one token more."""
    cfg, ranks, count = run.cfg, run.ranks, len(entries) - 1
    length = min(cfg.eval_seq_len, count)
    sequences = -(-count // length)
    first, last = (sequences * (ranks.rank + r) // ranks.world for r in (0, 1))
    for at in range(first, last, cfg.global_ttt_batch_seqs):
        begin, end = at * length, min(min(at + cfg.global_ttt_batch_seqs, last) * length, count)
        tokens = entries[begin:end]
        yield make_batch(tokens, entries[begin + 1: end + 1], segment_starts(tokens, length, length), length, run.device)


def score_with_ttt(run: Run, model: GPT, val: ValData) -> tuple[Score, float]:
    """Score every target once, each before any update that has seen it; the model's weights change in the phases.

    Returns the score and its milliseconds, from after the warm-up.
    """
    cfg, ranks = run.cfg, run.ranks
    documents, adapter = Documents(val), Adapter(run, model)
    for param in model.parameters():
        param.requires_grad_(False)
    parts = phase_parts(cfg, len(documents))
    adapter.warm_up(val)
    if run.compile and len(parts) > 1:
        warm_up_global_sgd(run, model)
    began, progress = time.perf_counter(), Progress(run.log)
    losses = np.full(len(val.tokens) - 1, np.nan, np.float32)
    nats = np.zeros(len(documents))  # float64, by place in the scoring order; a document is scored on one rank
    rounds_total = sum(-(-len(part) // (cfg.ttt_batch_size * ranks.world)) for part in parts)
    rounds = 0
    for phase, part in enumerate(parts, 1):
        batches = [range(i, min(i + cfg.ttt_batch_size, part.stop)) for i in range(part.start, part.stop, cfg.ttt_batch_size)]
        for i in range(0, len(batches), ranks.world):
            mine = batches[i + ranks.rank] if i + ranks.rank < len(batches) else range(0)
            for document, part_losses in zip(mine, adapter.score(documents, mine) if mine else []):
                nats[document] = part_losses.sum(dtype=np.float64)
                start = documents.starts[document]
                losses[start: start + len(part_losses)] = part_losses
            rounds += 1
            if rounds % max(1, rounds_total // 20) == 0:
                done = batches[min(i + ranks.world, len(batches)) - 1].stop
                so_far = float(sum(ranks.gather(nats[:done].sum())))
                run.log.record("ttt", docs=f"{done}/{len(documents)}", phase=f"{phase}/{len(parts)}",
                               val_bpb=f"{so_far / math.log(2) / max(int(documents.byte_sums[:done].sum()), 1):.5f}",
                               time_ms=int(1e3 * (time.perf_counter() - began)),
                               left_ms=progress.left_ms(documents.lengths[:done].sum(), documents.lengths.sum()))
        if phase < len(parts) and part.stop < len(documents):
            text = np.concatenate([documents.text(d) for d in range(part.stop)])
            global_sgd(run, model, text, f"{phase}/{len(parts) - 1}")
    total = np.sum(ranks.gather(nats), axis=0)
    score = Score(float(total.sum()), len(losses), val.num_bytes, losses)
    assert int(documents.lengths.sum()) == len(losses), "every target belongs to one document"
    time_ms = 1e3 * (time.perf_counter() - began)
    adapter.report_work(score.tokens)
    score.report(run.log, "quantized_ttt", time_ms)
    return score, time_ms


# ======================================================================================================================
# 12. Kernels (appendix)
#
# Two places where writing the fused form by hand saves memory traffic that torch.compile cannot: the MLP, whose
# activation joins the matrix product before it (forward) and the one after it (backward), and the softcapped cross
# entropy, which never stores the float32 logits of a batch. Beside each kernel stands what it computes in plain torch,
# which is also what runs without Triton; the tests hold one against the other and both against float64. The kernels hide in
# operators, so the compiler keeps its single graph. Matrix tiles go through Hopper's copy engine (TMA descriptors), one
# persistent program on every multiprocessor.
# ======================================================================================================================


MLP_TILE = (128, 256, 64)          # rows, columns, depth of one tile of the fused product: 3 stages fit Hopper's 227 KB
CROSS_ENTROPY_CHUNK = 2**22        # float32 logits alive at once where no kernel runs: 16 MiB


def mlp_up(x: Tensor, w_up: Tensor) -> Tensor:
    """leaky_relu(x @ w_up^T, 0.5)^2 in plain torch. x (T, d), w_up (h, d) -> (T, h)."""
    return F.leaky_relu(F.linear(x, w_up), 0.5).square()


def mlp_up_reference(x: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    """What mlp_kernel computes going forward: the pre-activation and its activation, both (T, h)."""
    before = F.linear(x, w_up)
    return before, F.leaky_relu(before, 0.5).square()


def mlp_up_backward_reference(grad: Tensor, w_down: Tensor, before: Tensor) -> Tensor:
    """What mlp_kernel computes going backward: the gradient (T, h) of `before`, from `grad` (T, d) of the MLP's output."""
    slope = torch.where(before > 0, 2.0, 0.5).to(before.dtype)           # d/dz leaky(z)^2 = 2 z, or 2 (z/2) / 2
    return F.linear(grad, w_down.t()) * slope * before


if triton is not None:

    @triton.jit
    def mlp_kernel(a_desc, b_desc, before_desc, out_desc, rows, columns, depth, BACKWARD: tl.constexpr,
                   TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PROGRAMS: tl.constexpr):
        """before = a @ b^T, out = leaky(before)^2; or, BACKWARD, out = (a @ b) * d leaky(before)^2 / d before."""
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
            halves = tl.permute(tl.reshape(total, (TILE_M, 2, HALF)), (0, 2, 1))   # half the staging memory a store
            left, right = tl.split(halves)
            for half in tl.static_range(2):
                z = left if half == 0 else right
                at = column + half * HALF
                if BACKWARD:
                    before = before_desc.load([row, at]).to(tl.float32)
                    out_desc.store([row, at], (z * before * tl.where(before > 0, 2.0, 0.5)).to(out_desc.dtype))
                else:
                    before_desc.store([row, at], z.to(before_desc.dtype))
                    z = tl.where(z > 0, z, 0.5 * z)
                    out_desc.store([row, at], (z * z).to(out_desc.dtype))

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


def launch_mlp_kernel(a: Tensor, b: Tensor, before: Tensor, out: Tensor, backward: bool,
                      tile: tuple[int, int, int] = MLP_TILE) -> None:
    """Run mlp_kernel over contiguous matrices whose rows are multiples of 16 bytes (Hopper's copy engine asks for that)."""
    tile_m, tile_n, tile_k = tile
    a, b = a.contiguous(), b.contiguous()
    (rows, depth), columns = a.shape, out.size(1)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    mlp_kernel[(min(programs, triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n)),)](
        TensorDescriptor.from_tensor(a, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(b, [tile_k, tile_n] if backward else [tile_n, tile_k]),
        TensorDescriptor.from_tensor(before, [tile_m, tile_n // 2]),
        TensorDescriptor.from_tensor(out, [tile_m, tile_n // 2]),
        rows, columns, depth, backward, tile_m, tile_n, tile_k, programs, num_warps=8, num_stages=3)


@torch.library.custom_op(f"{OPERATORS}::mlp_up", mutates_args=())
def mlp_up_op(x: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    """mlp_up_reference by the kernel: (T, d), (h, d) -> before (T, h), hidden (T, h)."""
    before, hidden = (x.new_empty((x.size(0), w_up.size(0))) for _ in range(2))
    launch_mlp_kernel(x, w_up, before, hidden, backward=False)
    return before, hidden


@torch.library.custom_op(f"{OPERATORS}::mlp_up_backward", mutates_args=())
def mlp_up_backward_op(grad: Tensor, w_down: Tensor, before: Tensor) -> Tensor:
    """mlp_up_backward_reference by the kernel: (T, d), (d, h), (T, h) -> (T, h)."""
    out = torch.empty_like(before)
    launch_mlp_kernel(grad, w_down, before, out, backward=True)
    return out


mlp_up_op.register_fake(lambda x, w_up: (x.new_empty((x.size(0), w_up.size(0))), x.new_empty((x.size(0), w_up.size(0)))))
mlp_up_backward_op.register_fake(lambda grad, w_down, before: torch.empty_like(before))


class FusedMLP(torch.autograd.Function):
    """down(leaky_relu(up(x), 0.5)^2) around the two fused products; the others are plain, for the compiler to place."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        before, hidden = mlp_up_op(x, w_up)
        ctx.save_for_backward(x, w_up, w_down, before, hidden)
        return F.linear(hidden, w_down)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w_up, w_down, before, hidden = ctx.saved_tensors
        grad_before = mlp_up_backward_op(grad, w_down, before)
        return grad_before @ w_up, grad_before.t() @ x, grad.t() @ hidden


@torch.compiler.assume_constant_result
def has_tma() -> bool:
    """Whether this process's GPU has Hopper's copy engine. The compiler asks once; it cannot trace the question itself."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def kernels_take(x: Tensor) -> bool:
    """Whether the Triton kernels run on x: it is half precision and on a CUDA device that has TMA, and Triton is there."""
    return triton is not None and x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16) and has_tma()


def fused_mlp(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """F.linear(mlp_up(x, w_up), w_down), all of one dtype. x (T, d), w_up (h, d), w_down (d, h) -> (T, d)."""
    if kernels_take(x) and x.size(1) % 8 == 0 and w_up.size(0) % 8 == 0:
        return FusedMLP.apply(x, w_up, w_down)
    return F.linear(mlp_up(x, w_up), w_down)


def cross_entropy_reference(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """What softcapped_cross_entropy computes, storing all of it: (T, V), (T,) -> (T,)."""
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


def row_chunks(logits: Tensor) -> range:
    """First rows of chunks of at most CROSS_ENTROPY_CHUNK logits."""
    return range(0, logits.size(0), max(1, CROSS_ENTROPY_CHUNK // logits.size(1)))


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """float32 for anything less, float64 for float64."""
    return torch.promote_types(t.dtype, torch.float32)


@torch.library.custom_op(f"{OPERATORS}::softcapped_cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(T, V), (T,) -> losses (T,) and the logsumexp of each row (T,), float32."""
    losses, lses = (logits.new_empty(logits.size(0), dtype=accumulation_dtype(logits)) for _ in range(2))
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


cross_entropy_op.register_fake(lambda logits, targets, cap: (
    logits.new_empty(logits.size(0), dtype=accumulation_dtype(logits)),
    logits.new_empty(logits.size(0), dtype=accumulation_dtype(logits))))
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

EXIT_USER_ERROR, EXIT_OVER_LIMIT = 2, 3


def code_files() -> list[Path]:
    """Every code file that evaluation needs: this one."""
    return [Path(__file__).resolve()]


def output_path(cfg: Config, suffix: str) -> Path:
    return Path(cfg.artifact_dir, cfg.run_id + suffix)


def start_run(environ: Mapping[str, str]) -> tuple[Config, Ranks]:
    """Settings and ranks, with the run's name agreed over the ranks."""
    cfg = Config.from_env(environ)
    ranks = Ranks.start(environ)
    if not cfg.run_id:
        cfg = replace(cfg, run_id=ranks.agree(f"{datetime.now(timezone.utc):%Y%m%d_%H%M%S}_seed{cfg.seed}"))
    return cfg, ranks


def open_log(cfg: Config, ranks: Ranks) -> Log:
    """The run's log; that of an evaluation gets the first free name."""
    path = output_path(cfg, ".log")
    if cfg.eval_only:
        names = (output_path(cfg, f".eval{n}.log") for n in itertools.count(1))
        path = next(name for name in names if not name.exists()) if ranks.rank == 0 else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < 4 * ARTIFACT_CAP_BYTES:
            raise ValueError(f"only {free / 1e6:.0f} MB free in {path.parent}: the log and the artifact need {4 * ARTIFACT_CAP_BYTES / 1e6:.0f}; "
                             "free some space there or set ARTIFACT_DIR")
        return Log(path, speaks=ranks.rank == 0, goes_on=not cfg.eval_only and output_path(cfg, ".checkpoint").exists())
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent}: {error.strerror}; set ARTIFACT_DIR to a folder you may write to") from error


def log_start(run: Run, environ: Mapping[str, str]) -> None:
    """What ran, with which settings, on what."""
    log, cfg, device = run.log, run.cfg, run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    log.record("run", id=cfg.run_id, seed=cfg.seed, ranks=run.ranks.world, device=f'"{name}"', torch=torch.__version__,
               python=platform.python_version(), threads=torch.get_num_threads(), attention=attention_backend_name(),
               compile=int(run.compile), date=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}")
    if attention_backend.skipped:
        log(f"faster attention was passed over: {attention_backend.skipped}")
    for path in code_files():
        data = path.read_bytes()
        log.record("code", file=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    for f in fields(cfg):
        value = format_setting(getattr(cfg, f.name))
        starred = getattr(cfg, f.name) != f.default
        log(f"setting {'*' if starred else ''}{f.name.upper()} value:{value}" + (f" default:{format_setting(f.default)}" if starred else ""))
    for found, meant in misspelt_settings(environ):
        log(f"warning: {found} is no setting; did you mean {meant}? It has no effect")


def prepare(run: Run, environ: Mapping[str, str]) -> ValData:
    """Log the start and check the data; the validation set."""
    resolve_attention(run.cfg.attn_backend, run.device)
    log_start(run, environ)
    val = check_dataset(run.cfg, with_train=not run.cfg.eval_only)
    run.log(check_tokenizer(run.cfg))
    if run.cfg.val_doc_fraction < 1:
        run.log(f"warning: VAL_DOC_FRACTION={run.cfg.val_doc_fraction:g}: only {val.documents} documents are scored, no full score")
    return val


def train_and_score(run: Run, environ: Mapping[str, str]) -> int:
    """The whole run; the exit status."""
    cfg, ranks, log = run.cfg, run.ranks, run.log
    layout = SpanLayout.plan(cfg, ranks.world)
    val = prepare(run, environ)
    shards = read_shards(cfg.shards_dir, "train")
    log.record("data", train_shards=len(shards), train_tokens=sum(map(len, shards)), val_tokens=len(val.tokens),
               val_bytes=val.num_bytes, val_docs=val.documents, published=int(cfg.shards_dir.name == PUBLISHED_NAME))
    model = GPT(cfg, run.dtype)
    model.init_weights(cfg.seed)
    model.to(run.device)
    log(f"model of {sum(p.numel() for p in model.parameters()):,} parameters; a step is {layout.spans} spans of "
        f"{layout.span_tokens} tokens, {layout.per_rank // layout.per_micro} forwards of {layout.micro_tokens} tokens a rank")
    check_memory(run, model, layout)
    loader = TrainLoader(TokenStream(shards), layout, cfg, ranks)
    trainer = Trainer(run, model, loader)
    trainer.warm_up()
    checkpoints = Checkpoints(run)
    checkpoints.resume(trainer)
    if not train(run, trainer, val, checkpoints):
        log(f"stopped by SIGTERM after step {trainer.step}; start again with RUN_ID={cfg.run_id} to go on")
        return 0
    trainer.load_averaged_weights()
    evaluate(run, model, val, "ema", cfg.eval_loop_depth)
    trainer.clock.start()
    hessians = collect_hessians(run, model, loader)
    train_ms = trainer.clock.stop()
    data = export(run, model, hessians)
    checkpoints.remove()
    problems = budget_problems(run, "training", train_ms, cfg.max_wallclock_seconds)
    steps = trainer.step
    del trainer, hessians, model, loader
    scored, pre_ttt = score_artifact(run, data, val)
    problems += budget_problems(run, "evaluation", scored.time_ms, cfg.eval_budget_seconds)
    total_bytes = len(data) + sum(p.stat().st_size for p in code_files())
    if total_bytes > ARTIFACT_CAP_BYTES:
        problems.append(f"artifact and code are {total_bytes} bytes, {total_bytes - ARTIFACT_CAP_BYTES} over the cap of {ARTIFACT_CAP_BYTES}")
    log_final(run, scored.score, pre_ttt, steps=steps, train_ms=int(train_ms), eval_ms=int(scored.time_ms), total_bytes=total_bytes)
    for problem in problems:
        log(f"error: {problem}")
    return EXIT_OVER_LIMIT if problems else 0


def budget_problems(run: Run, what: str, time_ms: float, budget_seconds: float) -> list[str]:
    """A sentence if `what` took longer than its budget."""
    if not budget_seconds or time_ms <= 1e3 * budget_seconds:
        return []
    return [f"{what} took {time_ms / 1e3:.1f} s, over the budget of {budget_seconds:g} s"]


def export(run: Run, model: GPT, hessians: dict[str, Tensor]) -> bytes:
    """Quantize, pack and write the artifact; its bytes, on every rank."""
    cfg, began = run.cfg, time.perf_counter()
    code_bytes = sum(p.stat().st_size for p in code_files())
    tensors, data = quantize_and_pack(run, model, hessians, code_bytes)
    if run.ranks.rank == 0:
        for row in size_table(data, tensors):
            run.log.record("size", **row)
        path = output_path(cfg, ".artifact")
        write_atomically(path, data)
        run.log.record("artifact", model_bytes=len(data), code_bytes=code_bytes, total_bytes=len(data) + code_bytes,
                       cap_bytes=ARTIFACT_CAP_BYTES, sha256=hashlib.sha256(data).hexdigest(),
                       quantize_and_pack_ms=int(1e3 * (time.perf_counter() - began)), path=path)
    return run.ranks.agree(data)


class Scored(NamedTuple):
    """The final score and the milliseconds that count for it."""

    score: Score
    time_ms: float


def score_artifact(run: Run, data: bytes, val: ValData) -> tuple[Scored, Score]:
    """Score the model of an artifact, then with test-time training if enabled; the final and the plain score."""
    cfg, clock = run.cfg, Clock(run.device)
    clock.start()
    model = model_from_tensors(cfg, unpack_artifact(data)[1], run)
    clock.stop()
    began = time.perf_counter()
    plain = evaluate(run, model, val, "quantized", cfg.eval_loop_depth)
    plain_ms = 1e3 * (time.perf_counter() - began)
    if not cfg.ttt_enabled:
        return Scored(plain, clock.total_ms + plain_ms), plain
    score, ttt_ms = score_with_ttt(run, model, val)
    return Scored(score, clock.total_ms + ttt_ms), plain


def log_final(run: Run, score: Score, pre_ttt: Score, **values: Any) -> None:
    run.log.record("final", seed=run.cfg.seed, val_loss=f"{score.val_loss:.8f}", val_bpb=f"{score.val_bpb:.8f}",
                   pre_ttt_bpb=f"{pre_ttt.val_bpb:.8f}", **values)


def read_artifact(cfg: Config, environ: Mapping[str, str]) -> tuple[Config, bytes]:
    """The artifact to score, and the settings with its model in them; ValueError if one that was set contradicts it."""
    path = Path(cfg.artifact_path) if cfg.artifact_path else output_path(cfg, ".artifact")
    if not path.is_file():
        raise ValueError(f"no artifact at {path}; set ARTIFACT_PATH to one, or ARTIFACT_DIR and RUN_ID to those of the run that made it")
    data = path.read_bytes()
    try:
        stored, _ = unpack_artifact(data)
    except ArtifactError as error:
        raise ValueError(f"{path}: {error}") from error
    if set(stored) != set(MODEL_SETTINGS):
        raise ValueError(f"{path}: its configuration has not the settings of this program's models ({', '.join(sorted(stored))})")
    for name in MODEL_SETTINGS:
        if name.upper() in environ and getattr(cfg, name) != stored[name]:
            raise ValueError(f"{name.upper()}={format_setting(getattr(cfg, name))} contradicts {path}, which was made with "
                             f"{format_setting(stored[name])}; leave it unset to take the artifact's")
    cfg = replace(cfg, **stored)
    cfg.check_together()
    return cfg, data


def score_only(run: Run, data: bytes, environ: Mapping[str, str]) -> int:
    """EVAL_ONLY: score an artifact; the exit status."""
    val = prepare(run, environ)
    run.log.record("data", val_tokens=len(val.tokens), val_bytes=val.num_bytes, val_docs=val.documents,
                   published=int(run.cfg.shards_dir.name == PUBLISHED_NAME))
    scored, pre_ttt = score_artifact(run, data, val)
    total_bytes = len(data) + sum(p.stat().st_size for p in code_files())
    log_final(run, scored.score, pre_ttt, eval_ms=int(scored.time_ms), total_bytes=total_bytes)
    problems = budget_problems(run, "evaluation", scored.time_ms, run.cfg.eval_budget_seconds)
    for problem in problems:
        run.log(f"error: {problem}")
    return EXIT_OVER_LIMIT if problems else 0


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Run as the environment says; the exit status: 0, 2 for something the user can mend, 3 over a cap or budget."""
    log, ranks = None, None
    try:
        cfg, ranks = start_run(environ)
        cfg, data = read_artifact(cfg, environ) if cfg.eval_only else (cfg, b"")
        log = open_log(cfg, ranks)
        use_compile = cfg.compile == "1" or (cfg.compile == "auto" and ranks.device.type == "cuda")
        run = Run(cfg, ranks, log, use_compile)
        return score_only(run, data, environ) if cfg.eval_only else train_and_score(run, environ)
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory: {str(error).splitlines()[0]}; set MICRO_BATCH_TOKENS, VAL_BATCH_TOKENS or TTT_BATCH_SIZE lower"
    except (ValueError, OSError) as error:
        message = str(error)
    finally:
        if ranks is not None and sys.exc_info()[0] is None:
            ranks.stop()
    if log is not None and log.speaks:
        log(f"error: {message}")
    else:
        print(f"error: {message}" if ranks is None or ranks.world == 1 else f"rank {ranks.rank}: error: {message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
