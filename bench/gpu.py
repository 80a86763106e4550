"""Checks and measures everything of train_gpt.py that is there for speed, on one GPU, in under nine minutes.

    bash bench/gpu.sh                                   the whole, results under runs/bench
    python bench/gpu.py --parts checks,steps --out DIR  some parts

    checks    every attention backend and kernel against float64; GPTQ on the device against GPTQ on the CPU
    steps     the training step with the share of the record's batch that one rank of eight has: time, tokens a second, share
              of peak, at each depth, and with Inductor's mix-order reductions the other way; what the optimizer, the average and
              the wait for data take; memory; a profile
    kernels   each attention backend, the fused MLP and the cross entropy beside what torch.compile makes of the plain
              form, and what the device can do at best (a large product, a large copy)
    ttt       documents a second of test-time training by document length, and the whole validation set estimated from it
    ttt_cache (only when named) the same with kept keys and values, at batch 64, 128, 256 and chunk 8, 16, 48
    quantize  Hessians and GPTQ of the full-size model
    run       train_gpt.py from start to end on real shards (--data) or on a made-up language

Each part is a process of its own: a fault of the device in one cannot spoil the others, and no part outlives its time. One
table is printed; results.json, table.md and profile_*.txt are written. bench/cpu.py is the same at a size for a CPU.
"""
import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import reckon  # noqa: E402
import roofline  # noqa: E402
import train_gpt as g  # noqa: E402

PUBLISHED_VAL_DOCS, PUBLISHED_MEAN_LENGTH = 50_000, 957


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The defaults are the record's, for one of its eight ranks."""

    settings: dict[str, Any] = field(default_factory=lambda: {"train_batch_tokens": 98_304})
    depths: tuple[int, ...] = (1, 3, 4)
    steps: int = 20
    check_tokens: int = 4096
    data_tokens: int = 12_000_000
    document_tokens: float = PUBLISHED_MEAN_LENGTH
    ttt_lengths: tuple[int, ...] = (240, 960, 2400)
    ttt_cache_batches: tuple[int, ...] = (64, 128, 256)
    ttt_cache_chunks: tuple[int, ...] = (16, 8, 48)
    mlp_tiles: tuple[tuple[int, int, int], ...] = ((128, 256, 64), (128, 128, 64), (256, 128, 64))
    square: int = 8192
    run_settings: dict[str, Any] = field(default_factory=lambda: {
        "iterations": 90, "max_wallclock_seconds": 0, "warmup_steps": 3, "val_loss_every": 0, "train_log_every": 10,
        "gptq_calibration_batches": 4, "phased_ttt_prefix_docs": 64, "train_batch_tokens": 98_304})
    limits: dict[str, int] = field(default_factory=lambda: {
        "checks": 80, "steps": 300, "kernels": 80, "ttt": 120, "quantize": 60, "run": 200,
        "ttt_cache": 520})
    total_seconds: int = 530


class Result(NamedTuple):
    """One line of the table."""

    part: str
    name: str
    value: float
    unit: str
    note: str = ""


class Bench:
    """What a part needs: sizes, device, settings, where its results go."""

    def __init__(self, sizes: Sizes, out: Path, data: Path | None) -> None:
        self.sizes, self.out, self.data = sizes, out, data
        self.device = g.Ranks.start({}).device  # with its index: tensors have one, and a mixed comparison is False
        self.cfg = g.Config(**sizes.settings)
        self.cfg.check_together()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.part, self.results = "", []

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        """Note a result and write all of this part, so that a part that is cut short leaves what it has."""
        self.results.append(Result(self.part, name, float(value), unit, note))
        (self.out / f"{self.part}.json").write_text(json.dumps(self.results))

    def make_run(self, **changes: Any) -> g.Run:
        """A run of one rank without a log; compiled on a GPU only."""
        cfg = replace(self.cfg, **changes)
        return g.Run(cfg, g.Ranks(device=self.device), g.Log(None, enabled=False), compile=self.device.type == "cuda")

    def make_model(self, run: g.Run) -> g.GPT:
        """The model with its zero matrices filled as well, so that nothing is multiplied with zeros."""
        model = g.GPT(run.cfg, run.dtype)
        model.init_weights(run.cfg.seed)
        with torch.no_grad():
            model.qo_bank[run.cfg.num_layers:].normal_(std=0.02)
            model.mlp_down_bank.normal_(std=0.02)
        return model.to(self.device)

    def stream(self) -> list[np.ndarray]:
        """Training tokens: the shards of --data, else the made-up language."""
        if self.data is not None:
            return g.Dataset(self.data).read("train")
        return [made_up_tokens(self.sizes.data_tokens, self.sizes.document_tokens, self.cfg.vocab_size, seed=1)]

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in the dtype of activations, wanting gradients."""
        return (scale * torch.randn(*shape, device=self.device)).to(self.dtype).requires_grad_()


def made_up_tokens(count: int, mean_length: float, vocab: int, seed: int) -> np.ndarray:
    """Documents of log-normal length, each walking through the vocabulary at a stride of its own, a tenth of it noise."""
    rng = np.random.default_rng(seed)
    parts, total = [], 0
    while total < count:
        length = int(np.clip(rng.lognormal(np.log(mean_length) - 0.5, 1.0), 4, 40 * mean_length))
        walk = 8 + (rng.integers(vocab - 8) + rng.integers(1, 9) * np.arange(length)) % (vocab - 8)
        noise = rng.random(length) < 0.1
        walk[noise] = rng.integers(8, vocab, int(noise.sum()))
        walk[0] = g.BOS_ID
        parts.append(walk.astype(np.uint16))
        total += length
    return np.concatenate(parts)[:count]


def time_ms(function: Callable[[], Any], device: torch.device, budget_ms: float = 400.0) -> float:
    """Median milliseconds of a call, after two calls to warm up; repeated for about `budget_ms`."""
    function()
    g.synchronize(device)
    began = time.perf_counter()
    function()
    g.synchronize(device)
    repeats = int(np.clip(budget_ms / (1e3 * (time.perf_counter() - began) + 1e-3), 3, 50))
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in float64."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def mean_context(batch: g.Batch) -> float:
    """Mean number of tokens that a token of the batch attends to, itself included."""
    lengths = batch.cu_seqlens.diff().double().cpu()
    return float((lengths * (lengths + 1)).sum() / 2 / lengths.sum())


# --------------------------------------------------------------------------------------------------------------- checks


def part_checks(bench: Bench) -> None:
    """Right before fast: every result here must be below the bound in its note."""
    torch.manual_seed(0)
    check_attention(bench)
    check_mlp(bench)
    check_cross_entropy(bench)
    check_gptq(bench)


def backends(bench: Bench) -> dict[str, Any]:
    """The attention backends that load on this device, by name; the others become a line of the table."""
    found = {}
    for name in ("fa3", "fa4", "varlen", "sdpa"):
        try:
            found[name] = g.resolve_attention(name, bench.device)
        except ValueError as error:
            bench.add(f"attention {name}", float("nan"), "", f"not available: {error}"[:160])
    return found


def ragged_bounds(tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens of segments of 1, 2, 3, 0, then ever longer ones, up to `tokens`, with empty ones at the end."""
    bounds, length = [0, 1, 3, 6, 6], 7
    while bounds[-1] + length < tokens:
        bounds.append(bounds[-1] + length)
        length = int(length * 1.4)
    return torch.tensor([*bounds, tokens, tokens, tokens], dtype=torch.int32, device=device)


def check_attention(bench: Bench) -> None:
    cfg, tokens = bench.cfg, bench.sizes.check_tokens
    bounds = ragged_bounds(tokens, bench.device)
    longest = int(bounds.diff().max())
    inputs = [bench.random(tokens, heads, cfg.head_dim) for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
    grad = torch.randn(inputs[0].shape, device=bench.device)
    precise = [t.detach().double().requires_grad_() for t in inputs]
    oracle = with_gradients(lambda *t: g.segment_attention(*t, bounds), precise, grad)
    for name in backends(bench):
        g.resolve_attention(name, bench.device)
        attend = functools.partial(g.attention, cu_seqlens=bounds, max_seqlen=longest)
        ours = with_gradients(attend, inputs, grad)
        for what, value, reference in zip(("values", "grad q", "grad k", "grad v"), ours, oracle):
            bench.add(f"attention {name} {what}", relative_error(value, reference), "relative error", "bound 2e-2")
        later = [torch.cat([t[: tokens // 2], 3 * torch.randn_like(t[tokens // 2:])]).detach() for t in inputs]
        same = torch.equal(attend(*later)[: tokens // 2], ours[0][: tokens // 2])
        bench.add(f"attention {name} sees later tokens", float(not same), "", "bound 0.5 (0: earlier outputs equal to the bit)")


def plain_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(g.activation(F.linear(g.rms_norm(x), up)), down)


def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return g.fused_mlp(x, 1.0, up, down)


def check_mlp(bench: Bench) -> None:
    cfg, rows = bench.cfg, bench.sizes.check_tokens - 3
    inputs = [bench.random(rows, cfg.model_dim), bench.random(cfg.mlp_dim, cfg.model_dim, scale=cfg.model_dim**-0.5),
              bench.random(cfg.model_dim, cfg.mlp_dim, scale=cfg.mlp_dim**-0.5)]
    grad = torch.randn(rows, cfg.model_dim, device=bench.device)
    precise = [t.detach().double().requires_grad_() for t in inputs]
    oracle = with_gradients(plain_mlp, precise, grad)
    plain = with_gradients(plain_mlp, inputs, grad)
    ours = with_gradients(fused_mlp, inputs, grad)
    kernel = "kernel" if g.kernels_take(inputs[0]) else "torch path"
    for what, value, other, reference in zip(("values", "grad x", "grad up", "grad down"), ours, plain, oracle):
        bench.add(f"fused mlp {what}", relative_error(value, reference), "relative error",
                  f"bound 2e-2; {kernel}; the plain form has {relative_error(other, reference):.1e}")


def plain_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


def check_cross_entropy(bench: Bench) -> None:
    cfg, rows = bench.cfg, bench.sizes.check_tokens // 4 - 1
    logits, cap = bench.random(rows, cfg.vocab_size, scale=15.0), cfg.logit_softcap
    targets = torch.randint(cfg.vocab_size, (rows,), device=bench.device)
    grad = torch.rand(rows, device=bench.device)
    oracle = with_gradients(lambda x: F.cross_entropy(cap * torch.tanh(x / cap), targets, reduction="none"),
                            [logits.detach().double().requires_grad_()], grad)
    ours = with_gradients(lambda x: g.softcapped_cross_entropy(x, targets, cap), [logits], grad)
    kernel = "kernel" if g.kernels_take(logits) else "torch path"
    for what, value, reference in zip(("values", "gradient"), ours, oracle):
        bench.add(f"cross entropy {what}", relative_error(value, reference), "relative error", f"bound 1e-2; {kernel}")


def check_gptq(bench: Bench) -> None:
    """The same integers on the device as on the CPU, but for ties that rounding in another order may tip."""
    torch.manual_seed(1)
    columns = min(256, bench.cfg.model_dim)
    weights, x = torch.randn(2, 64, columns), torch.randn(2, 4 * columns, columns)
    hessian = x.mT @ x
    log = g.Log(None, enabled=False)
    cpu, device = (g.gptq(weights.to(d), hessian.to(d, copy=True), 6, 12.0, log) for d in (torch.device("cpu"), bench.device))
    share = (cpu.codes != device.codes).float().mean().item()
    bench.add("gptq codes that differ from the CPU's", share, "share", "bound 1e-2")


# ---------------------------------------------------------------------------------------------------------------- steps


def part_steps(bench: Bench) -> None:
    """The training step at each depth, then where its time goes."""
    run = bench.make_run()
    g.resolve_attention(run.cfg.attn_backend, bench.device)
    loader = g.TrainLoader(bench.stream(), run.cfg, run.ranks)
    trainer = g.Trainer(run, bench.make_model(run), loader)
    context = statistics.mean(mean_context(batch) for _ in range(3) for batch in loader.next())
    bench.add("tokens a token attends to", context, "tokens", f"attention: {g.attention_backend.name}")
    for depth in bench.sizes.depths:
        measure_step(bench, trainer, depth, context, f"depth {depth}")
    if bench.device.type == "cuda":
        measure_other_reductions(bench, trainer, bench.sizes.depths[-1], context)
    measure_optimizer(bench, trainer)
    profile_step(bench, trainer, bench.sizes.depths[-1])


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def measure_other_reductions(bench: Bench, trainer: g.Trainer, depth: int, context: float) -> None:
    """The step with Inductor's mix-order reductions switched the other way: they save passes and may spill registers."""
    compiled_so_far, other = trainer.forward, not torch._inductor.config.triton.mix_order_reduction
    torch._dynamo.reset()
    trainer.forward = g.compiled(trainer.run, trainer.model)
    with torch._inductor.config.patch({"triton.mix_order_reduction": other}):
        measure_step(bench, trainer, depth, context, f"depth {depth}, mix-order reductions {'on' if other else 'off'},")
    torch._dynamo.reset()
    trainer.forward = compiled_so_far


def measure_step(bench: Bench, trainer: g.Trainer, depth: int, context: float, name: str) -> None:
    """Compile, then time `steps` steps twice; the spread of the two is the noise."""
    began = time.perf_counter()
    for _ in range(3):
        trainer.train_step(depth, 1.0)
    g.synchronize(bench.device)
    bench.add(f"{name} compile and warm up", time.perf_counter() - began, "s")
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphs, waited, rounds = compiled_graphs(), trainer.loader.wait_ms, []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(bench.sizes.steps):
            loss = trainer.train_step(depth, 1.0)
        g.synchronize(bench.device)
        rounds.append(1e3 * (time.perf_counter() - began) / bench.sizes.steps)
    tokens, step_ms = bench.cfg.train_batch_tokens, min(rounds)
    waited = (trainer.loader.wait_ms - waited) / (sum(rounds) * bench.sizes.steps)
    published = roofline.PUBLISHED_MS.get(depth)
    faster = f"; published {published:.0f} ms: {published / step_ms:.2f}x its speed" if published and tokens == 98_304 else ""
    bench.add(f"{name} step", step_ms, "ms", f"two rounds differ by {100 * abs(rounds[0] / rounds[1] - 1):.1f} %{faster}")
    bench.add(f"{name} tokens", 1e3 * tokens / step_ms, "tokens/s", f"loss {loss.item():.3f}")
    if bench.cfg.model_dim == roofline.MODEL["d"]:
        operations = sum(k.operations for k in roofline.step_kernels(depth, tokens, context, True, ranks=1))
        bench.add(f"{name} share of peak", 1e3 * operations / step_ms / 989e12, "share", "of 989e12 operations a second")
    bench.add(f"{name} graphs compiled while timed", compiled_graphs() - graphs, "", "bound 0.5: it must be 0")
    bench.add(f"{name} wait for data", waited, "share of a step", "aim 0.01")
    if bench.device.type == "cuda":
        bench.add(f"{name} memory", torch.cuda.max_memory_allocated() / 1e9, "GB", "published 46.6")


def measure_optimizer(bench: Bench, trainer: g.Trainer) -> None:
    """The parts of a step behind the backward, on one rank: an eighth of the first is what one rank of eight does."""
    step_ms = {r.name: r.value for r in bench.results}[f"depth {bench.sizes.depths[0]} step"]
    parts = {
        "optimizer": lambda: trainer.optimizers.step(0.0, 0),
        "zero gradients": trainer.optimizers.zero_grad,
        "moving average": lambda: torch._foreach_lerp_(trainer.ema, trainer.params, 0.0035),
    }
    for name, function in parts.items():
        took = time_ms(function, bench.device)
        bench.add(name, took, "ms", f"{100 * took / step_ms:.1f} % of a step at depth {bench.sizes.depths[0]}; aim 5 %")


def profile_step(bench: Bench, trainer: g.Trainer, depth: int) -> None:
    """A step or two under torch's profiler: a table of kernels and a trace for a viewer."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        for _ in range(2 if cuda else 1):
            trainer.train_step(depth, 1.0)
        g.synchronize(bench.device)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=90)
    (bench.out / f"profile_depth{depth}.txt").write_text(table)
    if cuda:
        recorded.export_chrome_trace(str(bench.out / f"profile_depth{depth}.json.gz"))


# -------------------------------------------------------------------------------------------------------------- kernels


def part_kernels(bench: Bench) -> None:
    """Each piece at the size it has in a step, beside its plain form compiled by torch."""
    time_ceilings(bench)
    time_attention(bench)
    time_mlp(bench)
    time_cross_entropy(bench)


def time_ceilings(bench: Bench) -> None:
    """What the device can do at best, on random data."""
    n = bench.sizes.square
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    bench.add("large product", 2e-9 * n**3 / time_ms(lambda: a @ b, bench.device), "1e12 operations/s", f"{n} cubed")
    source = torch.randn(16 * n * n // 4, device=bench.device)
    target = torch.empty_like(source)
    took = time_ms(lambda: target.copy_(source), bench.device)
    bench.add("large copy", 8e-9 * source.numel() / took, "1e12 bytes/s", "read and written")


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """A call that runs `function` and its backward."""
    grad = torch.randn_like(function(*inputs))
    return lambda: [None for _ in torch.autograd.grad(function(*inputs), inputs, grad)] and None


def compiled(bench: Bench, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile on a GPU, as it is on a CPU."""
    return torch.compile(function, fullgraph=True) if bench.device.type == "cuda" else function


def time_attention(bench: Bench) -> None:
    cfg, tokens = bench.cfg, bench.cfg.micro_batch_tokens
    loader = g.TrainLoader(bench.stream(), cfg, g.Ranks(device=bench.device))
    batch = loader.next()[0]
    tokens = batch.tokens.numel()
    inputs = [bench.random(tokens, heads, cfg.head_dim) for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
    operations = 4.0 * tokens * mean_context(batch) * cfg.num_heads * cfg.head_dim
    for name in backends(bench):
        g.resolve_attention(name, bench.device)
        attend = functools.partial(g.attention, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        took = time_ms(lambda: attend(*[t.detach() for t in inputs]), bench.device)
        bench.add(f"attention {name} forward", took, "ms", f"{1e-9 * operations / took:.0f}e12 operations/s")
        took = time_ms(forward_backward(attend, inputs), bench.device)
        bench.add(f"attention {name} forward and backward", took, "ms", f"{3.5e-9 * operations / took:.0f}e12 operations/s")


def time_mlp(bench: Bench) -> None:
    cfg, tokens = bench.cfg, bench.cfg.micro_batch_tokens
    inputs = [bench.random(tokens, cfg.model_dim), bench.random(cfg.mlp_dim, cfg.model_dim, scale=0.04),
              bench.random(cfg.model_dim, cfg.mlp_dim, scale=0.02)]
    plain = compiled(bench, plain_mlp)
    bench.add("mlp plain, compiled", time_ms(forward_backward(plain, inputs), bench.device), "ms", "forward and backward")
    took = time_ms(forward_backward(compiled(bench, fused_mlp), inputs), bench.device)
    bench.add("mlp fused", took, "ms", "forward and backward; the kernel stays only if this is less")
    if not g.kernels_take(inputs[0]):
        return
    x, up, down = (t.detach() for t in inputs)
    factor = g.norm_factor(x)
    hidden = g.mlp_up_op(x, factor, up)
    out = torch.empty_like(hidden)
    bench.add("up product alone", time_ms(lambda: F.linear(x, up), bench.device), "ms", "cuBLAS, for comparison")
    for tile in bench.sizes.mlp_tiles:
        note = "the tile in use" if tile == g.MLP_TILE else ""
        for backward, a, b in ((False, x, up), (True, x, down)):
            try:
                took = time_ms(functools.partial(g.launch_mlp_kernel, a, factor, b, hidden, out, backward, tile), bench.device)
            except g.triton.runtime.errors.OutOfResources as error:
                took, note = float("nan"), str(error)[:120]
            bench.add(f"mlp kernel {'backward' if backward else 'forward'} {tile}", took, "ms", note)


def time_cross_entropy(bench: Bench) -> None:
    cfg, tokens = bench.cfg, bench.cfg.micro_batch_tokens
    logits, cap = bench.random(tokens, cfg.vocab_size, scale=5.0), cfg.logit_softcap
    targets = torch.randint(cfg.vocab_size, (tokens,), device=bench.device)
    for name, function in (("plain, compiled", plain_cross_entropy), ("ours", g.softcapped_cross_entropy)):
        call = compiled(bench, lambda x, function=function: function(x, targets, cap))
        bench.add(f"cross entropy {name}", time_ms(forward_backward(call, [logits]), bench.device), "ms", "forward and backward")


# ------------------------------------------------------------------------------------------------------- ttt, quantize


def part_ttt(bench: Bench) -> None:
    """A batch of documents at each of a few lengths, and the published validation set estimated from them."""
    measure_ttt(bench, bench.make_run(), "ttt", "adapters alone; published 470 with global SGD")


def measure_ttt(bench: Bench, run: g.Run, name: str, note: str) -> None:
    """Warm up, then time a batch of documents of each length; what the plan reckons for them gives the rest of the set."""
    cfg, slots, ratios = run.cfg, run.cfg.ttt_batch_size, []
    g.resolve_attention(cfg.attn_backend, bench.device)
    scorer, began = g.TTTScorer(run, bench.make_model(run).requires_grad_(False)), time.perf_counter()
    scorer.warm_up()
    bench.add(f"{name}: compile and warm up", time.perf_counter() - began, "s")
    for length in bench.sizes.ttt_lengths:
        documents = g.Documents(equal_documents(cfg, slots, length))
        bounds = np.array(g.chunk_bounds(cfg, int(documents.lengths[0])))
        graphs, began = compiled_graphs(), time.perf_counter()
        scorer.score(documents, range(slots))
        g.synchronize(bench.device)
        took, steps = time.perf_counter() - began, len(bounds) - 1
        ratios.append(took / g.chunk_seconds(cfg, bounds, np.full(steps, slots)).sum())
        bench.add(f"{name}: documents of {length} tokens", slots / took, "documents/s",
                  f"{1e3 * took / steps:.1f} ms a step, {ratios[-1]:.2f} of what the plan reckons")
        bench.add(f"{name}: graphs compiled at {length} tokens", compiled_graphs() - graphs, "", "bound 0.5: it must be 0")
    plans = g.plan_ttt(cfg, reckon.made_up_lengths(PUBLISHED_VAL_DOCS), 8)
    reckoned = sum(max(plan.seconds) for plan in plans)
    bench.add(f"{name}: 50,000 documents on 8 such devices", reckoned * statistics.mean(ratios), "s", note)
    if bench.device.type == "cuda":
        bench.add(f"{name}: memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
        torch.cuda.reset_peak_memory_stats()


def equal_documents(cfg: g.Config, count: int, length: int) -> g.ValData:
    """A validation set of `count` documents of `length` random tokens."""
    tokens = np.random.default_rng(length).integers(8, cfg.vocab_size, count * length + 1).astype(np.uint16)
    tokens[:-1:length] = g.BOS_ID
    return g.ValData(tokens, np.ones_like(tokens), count)


def part_ttt_cache(bench: Bench) -> None:
    """TTT with kept keys and values (on a GPU every step is one replayed graph), by size of chunk and batch."""
    check_captured_steps(bench)
    for chunk, slots in itertools.product(bench.sizes.ttt_cache_chunks, bench.sizes.ttt_cache_batches):
        name = f"ttt cache, chunk {chunk}, batch {slots}"
        try:
            measure_ttt(bench, bench.make_run(ttt_context="cache", ttt_chunk_size=chunk, ttt_batch_size=slots), name, "aim 120")
        except torch.OutOfMemoryError:
            bench.add(f"{name}: does not fit", float("nan"), "")


def check_captured_steps(bench: Bench) -> None:
    """Documents scored by captured steps of two sizes, and again by the same steps without graphs."""
    slots = min(bench.sizes.ttt_cache_batches)
    run = bench.make_run(ttt_context="cache", ttt_chunk_size=8, ttt_chunk_doubles_at=(16,), ttt_batch_size=slots)
    g.resolve_attention(run.cfg.attn_backend, bench.device)
    scorer = g.TTTScorer(run, bench.make_model(run).requires_grad_(False))
    scorer.warm_up()
    documents = g.Documents(equal_documents(run.cfg, slots, 60))
    captured = np.concatenate(scorer.score(documents, range(slots)))
    bench.add("ttt cache: steps captured", len(scorer.captured), "", "0 on a CPU")
    scorer.captured.clear()
    eager = np.concatenate(scorer.score(documents, range(slots)))
    bench.add("ttt cache: captured against eager", np.abs(captured - eager).max(), "nats", "bound 0.02")


def part_quantize(bench: Bench) -> None:
    """Hessians from two steps' batches, GPTQ of all matrices, packing."""
    run = bench.make_run(gptq_calibration_batches=2)
    g.resolve_attention(run.cfg.attn_backend, bench.device)
    loader = g.TrainLoader(bench.stream(), run.cfg, run.ranks)
    model = bench.make_model(run)
    g.collect_hessians(run, model, loader)
    began = time.perf_counter()
    hessians = g.collect_hessians(run, model, loader)
    took = (time.perf_counter() - began) / run.cfg.gptq_calibration_batches
    batches = g.Config().gptq_calibration_batches
    bench.add("hessians of a batch", 1e3 * took, "ms", f"{batches} batches: {batches * took:.1f} s; the record reserves 4 s")
    began = time.perf_counter()
    tensors, _ = g.quantize(run, model, hessians)
    g.synchronize(bench.device)
    bench.add("gptq of all matrices", time.perf_counter() - began, "s", "one rank does all; aim 20 s")
    began = time.perf_counter()
    data = g.pack_artifact(tensors, run.cfg)
    bench.add("artifact packed", time.perf_counter() - began, "s", f"{len(data)} bytes of random weights, {run.cfg.compressor}")


# ------------------------------------------------------------------------------------------------------------------ run


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """A shard file: header, then entries."""
    header = np.zeros(g.SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = g.SHARD_MAGIC, g.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def write_made_up_data(bench: Bench, folder: Path) -> Path:
    """Shards of the made-up language; every token but BOS stands for four bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, vocab = bench.sizes, bench.cfg.vocab_size
    write_shard(folder / "made_train_000000.bin", bench.stream()[0])
    val = made_up_tokens(max(4096, sizes.data_tokens // 60), sizes.document_tokens, vocab, seed=2)
    write_shard(folder / "made_val_000000.bin", val)
    write_shard(folder / "made_val_bytes_000000.bin", np.where(val == g.BOS_ID, 0, 4))
    return folder


def part_run(bench: Bench) -> None:
    """train_gpt.py as its users start it, short; what its log says."""
    data = bench.data or write_made_up_data(bench, bench.out / "data")
    settings = bench.sizes.settings | bench.sizes.run_settings
    name = f"bench{int(time.time())}"
    environment = os.environ | {k.upper(): str(v) for k, v in settings.items()} | {
        "DATA_PATH": str(data), "ARTIFACT_DIR": str(bench.out), "RUN_ID": name, "EVAL_BUDGET_SECONDS": "0"}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=environment, capture_output=True, text=True)
    bench.add("run from start to end", time.perf_counter() - began, "s", f"exit status {done.returncode}")
    (bench.out / "run_output.txt").write_text(done.stdout + done.stderr)
    lines = [dict(word.split(":", 1) for word in line.split()[1:] if ":" in word) | {"phase": line.split()[0]}
             for line in done.stdout.splitlines() if line]
    losses = [float(line["loss"]) for line in lines if line["phase"] == "train"]
    for what, loss in (("first", losses[:1]), ("last", losses[-1:])):
        bench.add(f"run {what} loss", loss[0] if loss else float("nan"), "nats")
    final = [line for line in lines if line["phase"] == "final"]
    for key in ("pre_ttt_bpb", "val_bpb", "total_bytes"):
        bench.add(f"run {key}", float(final[0][key]) if final else float("nan"), "",
                  "" if final else "bound 0: the log has no final line, see run_output.txt")


# ----------------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Bench], None]] = {
    "checks": part_checks, "steps": part_steps, "kernels": part_kernels, "ttt": part_ttt, "quantize": part_quantize,
    "run": part_run, "ttt_cache": part_ttt_cache,
}
ONLY_BY_NAME = ("ttt_cache",)  # nearly as long as all others together


def failed(result: Result) -> bool:
    """Whether a result with a bound in its note is not below it."""
    return result.note.startswith("bound ") and not result.value < float(result.note.split()[1].rstrip(":;"))


def table(results: list[Result]) -> str:
    """All results as one Markdown table."""
    lines = ["| part | what | value | unit | note |", "|---|---|---|---|---|"]
    for r in results:
        value = "-" if np.isnan(r.value) else f"{r.value:.4g}" if abs(r.value) < 1e5 else f"{r.value:,.0f}"
        lines.append(f"| {r.part} | {r.name} | {'**FAIL** ' if failed(r) else ''}{value} | {r.unit} | {r.note} |")
    return "\n".join(lines)


def run_parts(options: argparse.Namespace, parts: list[str], sizes: Sizes) -> list[Result]:
    """Each part in a process of its own, within its limit and what is left of the whole."""
    results, deadline = [], time.perf_counter() + sizes.total_seconds
    for part in parts:
        limit = min(sizes.limits[part], deadline - time.perf_counter())
        if limit < 5:
            results.append(Result(part, "not started", float("nan"), "", "no time left"))
            continue
        command = [sys.executable, *options.script, "--part", part, "--out", str(options.out)]
        command += ["--data", str(options.data)] if options.data else []
        (options.out / f"{part}.json").unlink(missing_ok=True)
        began = time.perf_counter()
        with (options.out / f"{part}.txt").open("w") as log:
            try:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
                ended = f"exit status {status}: see {part}.txt" if status else ""
            except subprocess.TimeoutExpired:
                ended = f"stopped after {limit:.0f} s"
        file = options.out / f"{part}.json"
        results += [Result(*row) for row in json.loads(file.read_text())] if file.exists() else []
        results.append(Result(part, "whole part", time.perf_counter() - began, "s", ended and f"bound 0: {ended}"))
        print(f"{part}: {time.perf_counter() - began:.0f} s {ended}", flush=True)
    return results


def environment() -> dict[str, str]:
    """What the numbers were measured on."""
    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores", "torch": torch.__version__,
            "triton": g.triton.__version__ if g.triton is not None else "none", "python": sys.version.split()[0]}


def main(sizes: Sizes, script: Path, arguments: list[str] | None = None) -> int:
    """Run the parts, or, with --part, one of them in this process; 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--data", type=Path, help="folder of shards; without it a made-up language is used")
    parser.add_argument("--parts", default=",".join(part for part in PARTS if part not in ONLY_BY_NAME),
                        help="which parts, with commas between")
    parser.add_argument("--part", choices=list(PARTS), help="run this one here (used by the program itself)")
    options = parser.parse_args(arguments)
    options.script = [str(script)]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        bench = Bench(sizes, options.out, options.data)
        bench.part = options.part
        PARTS[options.part](bench)
        return 0
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    results = run_parts(options, parts, sizes)
    text = f"{' · '.join(f'{k} {v}' for k, v in environment().items())}\n\n{table(results)}\n"
    (options.out / "table.md").write_text(text)
    rows = [r._asdict() | {"failed": failed(r)} for r in results]
    (options.out / "results.json").write_text(
        json.dumps({"environment": environment(), "sizes": asdict(sizes), "results": rows}, indent=1))
    print(text)
    return int(any(failed(r) for r in results))


if __name__ == "__main__":
    sys.exit(main(Sizes(), Path(__file__).resolve()))
