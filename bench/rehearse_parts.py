"""The parts of bench/rehearse.py: each runs a piece of the record, at its size, on the null CUDA device of this process.

A part makes rows of the table. What it raises is the fault that the table shows, so nothing is caught here.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import null_hopper as nh

nh.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402

import gpu  # noqa: E402
import reckon  # noqa: E402
import train_gpt as g  # noqa: E402

TOKENS, CONTEXT = 98_304, 500.0  # of a rank's share of a step; tokens that one sees on average (bench/roofline.py's assumption)
KERNELS_BUILT = 6  # the largest of Inductor's kernels of a row, built by ptxas for their registers
CONTEXT_BYTES = 530 << 20  # of device memory that a CUDA context takes


class Row(NamedTuple):
    """One row of the table. `fault` is empty where all went well."""

    part: str
    fault: str = ""
    graphs: int = 0
    breaks: int = 0
    late: int = 0
    waits: int = 0
    launches: int = 0
    gigabytes: float = 0.0
    ms: float = 0.0
    allocated_gb: float = 0.0  # at most, of tensors
    peak_gb: float = 0.0  # at most, of the device: what the allocator took and the context
    built: tuple[tuple[str, int, int, int], ...] = ()  # largest kernels: name, bytes of a launch, registers, bytes spilled
    groups: dict[str, tuple[int, float, float]] = {}  # by kind: launches, bytes, seconds
    note: str = ""


class Stage:
    """What a part needs to act: settings, a place for files, and its rows."""

    def __init__(self, out: Path, builds: int = KERNELS_BUILT) -> None:
        self.out, self.builds, self.rows, self.device = out, builds, [], torch.device("cuda", 0)

    def run(self, **settings: Any) -> g.Run:
        """A compiled run of one rank with an eighth of the record's batch, the attention resolved."""
        given = g.Config.from_env(json.loads(os.environ.get("REHEARSE_SETTINGS", "{}")))
        cfg = replace(given, **({"train_batch_tokens": TOKENS, "artifact_dir": str(self.out), "run_id": "rehearsal"} | settings))
        cfg.check_together()
        run = g.Run(cfg, g.Ranks.start({}), g.Log(None, enabled=False), compile=True)
        g.resolve_attention(cfg.attn_backend, run.device)
        return run

    def model(self, run: g.Run) -> g.GPT:
        """The record's model with the weights that it starts from."""
        model = g.GPT(run.cfg, run.dtype)
        model.init_weights(run.cfg.seed)
        return model.to(run.device)

    @contextlib.contextmanager
    def measure(self, part: str, run: g.Run, attended: reckon.Attended, repeats: int = 1, note: str = "") -> Iterator[None]:
        """A row from what the block launches; its graphs count as late. Figures are of one of `repeats` equal rounds."""
        torch.cuda.reset_peak_memory_stats()
        nh.reset()
        before = g.graphs_made(run)
        yield
        calls = nh.calls()
        groups = reckon.reckon_launches(calls.order, attended)
        built = tuple(self.built(calls.order))
        self.rows.append(Row(
            part, "; ".join(calls.faults[:3]), g.graphs_made(run), sum(torch._dynamo.utils.counters["graph_break"].values()),
            g.graphs_made(run) - before, calls.host_waits, len(calls.order) // repeats,
            sum(group.bytes for group in groups.values()) / 1e9 / repeats,
            1e3 * sum(group.seconds for group in groups.values()) / repeats,
            torch.cuda.max_memory_allocated() / 1e9, (torch.cuda.max_memory_reserved() + CONTEXT_BYTES) / 1e9, built,
            {kind: (n // repeats, size / repeats, seconds / repeats) for kind, (n, size, seconds) in groups.items()},
            note or "; ".join(calls.notes[:2])))
        (self.out / f"{re.sub('[ /]', '_', part)}.launches.txt").write_text("\n".join(calls.order))

    def built(self, order: list[str]) -> Iterator[tuple[str, int, int, int]]:
        """The largest kernels with their registers and spills: ours as they ran, Inductor's built now."""
        for name, size, _ in reckon.largest_kernels(order, self.builds):
            if name in nh.Stub.sources:
                (self.out / f"{name}.py").write_text(nh.Stub.sources[name])
                made = nh.build(name)
            else:
                made = [kernel for kernel in nh.Utils.kernels.values() if kernel.name == name]
            for kernel in made[:1]:
                yield name, size, kernel.registers, kernel.spilled


def made_up_documents(lengths: list[int], vocab: int) -> g.ValData:
    """A validation set of documents of these lengths; every token stands for one byte."""
    total = sum(lengths)
    tokens = np.random.default_rng(total).integers(8, vocab, total).astype(np.uint16)
    tokens[np.cumsum([0, *lengths[:-1]])] = g.BOS_ID
    return g.ValData(tokens, np.ones_like(tokens), len(lengths))


def loader_of(run: g.Run) -> g.TrainLoader:
    """Batches of the made-up language, documents of the published mean length."""
    tokens = gpu.made_up_tokens(2 * run.cfg.train_batch_tokens + 400_000, gpu.PUBLISHED_MEAN_LENGTH, run.cfg.vocab_size, seed=1)
    return g.TrainLoader([tokens], run.cfg, run.ranks)


@contextlib.contextmanager
def arithmetic_succeeds() -> Iterator[None]:
    """Checks of values answered by hand: a device that computes nothing leaves in their results what its memory held before."""
    factor, better = torch.linalg.cholesky_ex, g.nearest_is_better
    answers = ((torch, "isfinite", lambda tensor: torch.ones((), dtype=torch.bool)), (g.math, "isfinite", lambda number: True),
               (torch.linalg, "cholesky_ex", lambda *args, **named: (factor(*args, **named)[0], torch.zeros(1))),
               (g, "nearest_is_better", lambda error, *rest: torch.zeros(len(better(error, *rest)), dtype=torch.bool)))
    with contextlib.ExitStack() as stack:
        for module, name, answer in answers:
            stack.enter_context(mock.patch.object(module, name, answer))
        yield


# ------------------------------------------------------------------------------------------------------------------ parts


def forward_backward(stage: Stage, trainer: g.Trainer, depth: int, part: str) -> None:
    """The row of a training step's forward and backward."""
    run, batch = trainer.run, trainer.loader.next()[0]
    trainer.optimizers.zero_grad()
    with stage.measure(part, run, reckon.Attended(TOKENS, CONTEXT)):
        trainer.forward(batch, g.loop_schedule(run.cfg, depth)).mean().backward()


def part_steps(stage: Stage) -> None:
    """The warm-up as a run does it, then a step at each depth, and what comes behind the backward."""
    run = stage.run(warmup_steps=1)
    trainer = g.Trainer(run, stage.model(run), loader_of(run))
    trainer.warm_up()
    for depth in dict.fromkeys(run.cfg.train_loop_phase_depths):
        trainer.train_step(depth, 1.0)
        forward_backward(stage, trainer, depth, f"step depth {depth}")
        stage.rows[-1] = stage.rows[-1]._replace(late=stage.rows[-1].late + trainer.late_graphs)
    with stage.measure("optimizer", run, reckon.Attended(0, 0.0), note="one rank does what eight share"):
        trainer.optimizers.step(1.0, 0)
        torch._foreach_lerp_(trainer.ema, trainer.params, 1 - run.cfg.ema_decay)


def part_depth(stage: Stage, inductor: Mapping[str, Any] = MappingProxyType({})) -> None:
    """A step at one depth (REHEARSE_DEPTH, default 4), for work on the model; perhaps with other settings of Inductor."""
    depth = int(os.environ.get("REHEARSE_DEPTH", 4))
    run = stage.run()
    trainer = g.Trainer(run, stage.model(run), loader_of(run))
    with torch._inductor.config.patch(dict(inductor)):
        trainer.train_step(depth, 1.0)
        forward_backward(stage, trainer, depth, f"step depth {depth}")


def part_mix_order(stage: Stage) -> None:
    """Inductor's mix-order reductions on and off, depth 4: which reads fewer bytes, which spills."""
    for on in (True, False):
        torch._dynamo.reset()
        stage.builds = 40
        part_depth(stage, {"triton.mix_order_reduction": on})
        stage.rows[-1] = stage.rows[-1]._replace(part=f"mix-order {'on' if on else 'off'}")


def part_evaluate(stage: Stage) -> None:
    """Plain evaluation of a few batches, the second time."""
    run = stage.run()
    model, tokens = stage.model(run), gpu.made_up_tokens(400_000, gpu.PUBLISHED_MEAN_LENGTH, run.cfg.vocab_size, seed=2)
    tokens[0] = g.BOS_ID
    val = g.ValData(tokens, np.ones_like(tokens), int((tokens == g.BOS_ID).sum()))
    g.evaluate(run, model, val, "warm-up", run.cfg.eval_loop_depth)
    with stage.measure("evaluation", run, reckon.Attended(run.cfg.val_batch_tokens // 8, CONTEXT), note="400,000 tokens"):
        g.evaluate(run, model, val, "quantized", run.cfg.eval_loop_depth)


def part_quantize(stage: Stage) -> None:
    """Hessians of two batches, GPTQ of all matrices, an artifact packed and read again."""
    run = stage.run(gptq_calibration_batches=2)
    model, loader, nothing = stage.model(run), loader_of(run), reckon.Attended(0, 0.0)
    g.collect_hessians(run, model, loader)
    with stage.measure("hessians", run, reckon.Attended(TOKENS, CONTEXT), repeats=2, note="a batch of 16"):
        hessians = g.collect_hessians(run, model, loader)
    with arithmetic_succeeds(), stage.measure("gptq", run, nothing):
        tensors, _ = g.quantize(run, model, hessians)
    for tensor in tensors.values():  # what memory happened to hold is no weight
        (tensor.codes if isinstance(tensor, g.Quantized) else tensor).zero_()
        if isinstance(tensor, g.Quantized):
            tensor.scales.fill_(0.01)
    with stage.measure("packing", run, nothing):
        g.model_from_tensors(run, g.unpack_artifact(g.pack_artifact(tensors, run.cfg))[1])


def score_documents(stage: Stage, part: str, **settings: Any) -> None:
    """The row of a full batch of documents after the warm-up of a run: all see a whole window, then end one by one."""
    run = stage.run(**settings)
    cfg, scorer = run.cfg, g.TTTScorer(run, stage.model(run).requires_grad_(False))
    lengths = [int(n) for n in np.linspace(cfg.ttt_eval_seq_len + 352, cfg.ttt_eval_seq_len + 12, cfg.ttt_batch_size)]
    documents = g.Documents(made_up_documents(lengths, cfg.vocab_size))
    scorer.warm_up()
    bounds = np.array(g.chunk_bounds(cfg, int(documents.lengths[0])))
    live, seen = (documents.lengths > bounds[:-1, None]).sum(1), np.minimum(bounds[1:], cfg.ttt_eval_seq_len)
    tokens = live * (seen if cfg.ttt_context == "window" else np.diff(bounds))
    context = float((tokens * seen).sum() / tokens.sum()) / (2 if cfg.ttt_context == "window" else 1)
    note = f"a step of {len(seen)}: {len(lengths)} documents of {lengths[-1]} to {lengths[0]} tokens, reckoned "
    note += f"{1e3 * g.chunk_seconds(cfg, bounds, live).mean():.0f} ms by the plan"
    with stage.measure(part, run, reckon.Attended(int(tokens.mean()), context), len(seen), note):
        scorer.score(documents, range(len(lengths)))


def part_ttt_window(stage: Stage) -> None:
    """Windowed test-time training, the record's."""
    score_documents(stage, "ttt window")


def part_ttt_cache(stage: Stage) -> None:
    """Cached test-time training, steps captured as CUDA graphs."""
    score_documents(stage, "ttt cache", ttt_context="cache", ttt_chunk_size=16)


def part_sgd(stage: Stage) -> None:
    """Global SGD over a text of three chunks, after its warm-up."""
    run = stage.run()
    sgd = g.GlobalSGD(run, stage.model(run).requires_grad_(False))
    sgd.warm_up()
    text = gpu.made_up_tokens(3 * run.cfg.global_ttt_chunk_tokens + 5000, gpu.PUBLISHED_MEAN_LENGTH, run.cfg.vocab_size, seed=2)
    attended = reckon.Attended(run.cfg.global_ttt_chunk_tokens, CONTEXT)
    with stage.measure("global sgd", run, attended, repeats=3, note="a chunk, on one rank"):
        sgd.learn(text, "1/1")


def part_checkpoint(stage: Stage) -> None:
    """A step, the state on disk, read by a second trainer, a step of that one."""
    run = stage.run()
    trainer = g.Trainer(run, stage.model(run), loader_of(run))
    trainer.train_step(1, 1.0)
    checkpoint = g.Checkpoint(run)
    with stage.measure("checkpoint", run, reckon.Attended(TOKENS, CONTEXT), note="written, read, a step"):
        checkpoint.write(trainer)
        again = g.Trainer(run, stage.model(run), loader_of(run))
        checkpoint = g.Checkpoint(run)
        checkpoint.resume(again)
        if (again.step, again.loader.position) != (trainer.step, trainer.loader.position):
            raise RuntimeError(f"resumed at step {again.step}, position {again.loader.position}")
        again.train_step(1, 1.0)
    checkpoint.path.unlink()


# ----------------------------------------------------------------------------------------------------- ranks over NCCL


def rank_pieces(stage: Stage) -> dict[str, Callable[[], Any]]:
    """What each rank of the part `ranks` does, by name, in order; small but for the step."""
    ranks = g.Ranks.start(os.environ)
    stage.device = ranks.device
    cfg = g.Config(train_batch_tokens=ranks.world * TOKENS, gptq_calibration_batches=1, ttt_batch_size=8, phased_ttt_prefix_docs=24,
                   phased_ttt_num_phases=1, phased_ttt_leave_out=0, global_ttt_chunk_tokens=4096)
    run = g.Run(cfg, ranks, g.Log(None, enabled=False), compile=True)
    g.resolve_attention(cfg.attn_backend, run.device)
    model, loader = stage.model(run), loader_of(run)
    trainer = g.Trainer(run, model, loader)
    val = made_up_documents([8000, *[int(n) for n in np.linspace(600, 40, 60)]], cfg.vocab_size)
    box: dict[str, Any] = {}
    plain = replace(run, compile=False)  # graphs have parts of their own, here the collectives count
    return {
        "step": lambda: trainer.train_step(1, 1.0),
        "second step": lambda: trainer.train_step(1, 1.0),
        "pace": lambda: g.Pace(trainer).after_step(False),
        "evaluation": lambda: g.evaluate(plain, model, val, "final", cfg.eval_loop_depth),
        "hessians": lambda: box.update(hessians=g.collect_hessians(run, model, loader)),
        "gptq": lambda: g.quantize(run, model, box["hessians"]),
        "ttt": lambda: g.score_with_ttt(plain, model.requires_grad_(False), val),
        "stop": ranks.stop,
    }


def one_rank(stage: Stage) -> None:
    """A process of the part `ranks`: its collectives, piece by piece, go to a file."""
    done = {}
    with arithmetic_succeeds():
        for name, piece in rank_pieces(stage).items():
            nh.reset()
            piece()
            calls = nh.calls()
            done[name] = {"collectives": [line for line in calls.order if line.startswith("nccl")], "faults": calls.faults}
    (stage.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(done))


def part_ranks(stage: Stage, world: int = 2) -> None:
    """Ranks over NCCL: each must ask for the same collectives in the same order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(Path(__file__).resolve()),
               "one_rank", str(stage.out)]
    if subprocess.run(command, env={**os.environ, **nh.environment(world)}).returncode:
        raise RuntimeError("a rank failed: its traceback stands in the part's log")
    ranks = [json.loads((stage.out / f"rank{rank}.json").read_text()) for rank in range(world)]
    for name, first in ranks[0].items():
        same = all([without_place(line) for line in rank[name]["collectives"]] == [without_place(line) for line in first["collectives"]]
                   for rank in ranks)
        faults = [fault for rank in ranks for fault in rank[name]["faults"]]
        faults += [] if same else ["the ranks ask for different collectives"]
        groups = reckon.reckon_launches(first["collectives"], reckon.Attended(0, 0.0)).get("collectives", reckon.Group())
        stage.rows.append(Row(f"{world} ranks: {name}", "; ".join(faults[:3]), launches=groups.launches, gigabytes=groups.bytes / 1e9,
                              ms=1e3 * groups.seconds, note="collectives only"))


def without_place(line: str) -> str:
    """A collective without where in memory it reads, which differs by rank."""
    return line.split(" in place ")[0]


# ------------------------------------------------------------------------------------------------------------- bench/gpu.py


def part_gpu(name: str, stage: Stage) -> None:
    """A part of bench/gpu.py, without the profiler: whether it gets to its end. Its figures mean nothing here."""
    sizes = gpu.Sizes(data_tokens=600_000, steps=2, ttt_lengths=(240,), ttt_cache_batches=(64,), ttt_cache_chunks=(16,))
    bench = gpu.Bench(sizes, stage.out, None)
    bench.part = f"gpu_{name}_results"
    segments = g.segment_attention  # reads where they begin from the device, which has not computed it
    checked = arithmetic_succeeds() if name in ("checks", "quantize") else contextlib.nullcontext()
    with checked, mock.patch.object(g, "segment_attention", lambda *args: segments(*args[:3], args[3].cpu())), \
            mock.patch.object(gpu, "profile_step"), stage.measure(f"bench/gpu.py {name}", bench.make_run(), reckon.Attended(0, 0.0)):
        gpu.PARTS[name](bench)
    stage.rows[-1] = stage.rows[-1]._replace(late=0, note=f"{len(bench.results)} results")


PARTS: dict[str, Callable[[Stage], None]] = {
    "steps": part_steps, "evaluate": part_evaluate, "quantize": part_quantize, "ttt_window": part_ttt_window,
    "ttt_cache": part_ttt_cache, "sgd": part_sgd, "checkpoint": part_checkpoint, "ranks": part_ranks,
    "depth": part_depth, "mix_order": part_mix_order, "one_rank": one_rank,
    **{f"gpu_{name}": partial(part_gpu, name) for name in gpu.PARTS if name != "run"},
}


def main(part: str, out: str) -> None:
    """Run one part in this process; its rows, also those before a fault, go to PART.json in `out`."""
    stage = Stage(Path(out))
    try:
        PARTS[part](stage)
    finally:
        (stage.out / f"{part}.json").write_text(json.dumps([row._asdict() for row in stage.rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
