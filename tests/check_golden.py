"""Compare the program with golden files: numbers that the published code computed, which are not part of this repository.

    python tests/check_golden.py FOLDER... [--tokenizer MODEL]

A folder holds any of the files in CHECKS below. Each line says how far apart we are at most, in one kind of quantity, and what is
allowed. Levers that the program does not have yet are "not built", which is no fault. Exits 1 if anything is beyond its tolerance,
or if a folder holds nothing to check.

All contact with the program is in the first part, in a few adapters: where a name changes, they change and nothing else.
A new lever is one row of LEVERS.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lossless_caps import V1  # noqa: E402
import train_gpt as tg  # noqa: E402
from caseops_tokenizer import Encoder, Tokenizer  # noqa: E402

Arrays = dict[str, np.ndarray]
CPU = torch.device("cpu")
SITES = {"q": "q_loras", "k": "k_loras", "v": "v_loras", "attn": "o_loras", "mlp": "mlp_loras", "head": "lm_head_lora"}  # ours: theirs


# ---- adapters: the program, in the terms of the golden files ----


def known_settings(settings: dict[str, object]) -> dict[str, str]:
    """Those of `settings` that the program has, as an environment holds them."""
    return {name: str(value) for name, value in settings.items() if name.lower() in tg.Config.__dataclass_fields__}


def start(settings: dict[str, object]) -> tg.Run:
    """A silent run on one CPU."""
    return tg.Run(tg.Config.from_env(known_settings(settings)), tg.Ranks(), tg.Log(None, enabled=False))


def model_of(run: tg.Run, params: Arrays) -> tg.GPT:
    """The model with these parameters, every one of which must be there."""
    model = tg.GPT(run.cfg)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in params.items()})
    return model


def batch_of(tokens: np.ndarray, targets: np.ndarray, cu_seqlens: np.ndarray) -> tg.Batch:
    """Packed segments from tokens and targets (T,); cu_seqlens may repeat T at its end."""
    starts = np.unique(cu_seqlens[cu_seqlens < len(tokens)]).astype(np.int64)
    longest = int(np.diff(starts, append=len(tokens)).max())
    return tg.make_batch(tokens, targets, starts, longest, CPU)


def losses_of(model: tg.GPT, batch: tg.Batch, depth: int) -> Tensor:
    """Nats of every target, (T,)."""
    return model(batch, tg.loop_schedule(model.cfg, depth))


class Steps:
    """A loader that hands out given micro-batches, step by step."""

    def __init__(self, steps: list[list[tg.Batch]]) -> None:
        self.steps, self.position = iter(steps), 0

    def next(self) -> list[tg.Batch]:
        return next(self.steps)


class Training:
    """A training run on given micro-batches; `averages` are the EMA's parameters by name."""

    def __init__(self, run: tg.Run, params: Arrays, steps: list[list[tg.Batch]]) -> None:
        self.run, self.model = run, model_of(run, params)
        self.trainer = tg.Trainer(run, self.model, Steps(steps))
        self.averages = dict(zip(params_of(self.model), self.trainer.ema))
        self.norms: list[float] = []
        update = self.trainer.optimizers.step

        def step(*args: float) -> Tensor:
            self.norms.append(float(norm := update(*args)))
            return norm

        self.trainer.optimizers.step = step

    def schedule(self, step: int) -> dict[str, float]:
        """What the program sets at a step of a run without a time limit."""
        cfg = self.run.cfg
        frac = step / cfg.iterations
        return {"depth": tg.depth_at(cfg, frac), "lr_scale": tg.learning_rate_scale(cfg, frac),
                "muon_momentum": muon_momentum(self.run, step)}

    def step(self, depth: int, lr_scale: float) -> None:
        self.trainer.train_step(depth, lr_scale)


def params_of(model: tg.GPT) -> dict[str, Tensor]:
    """Parameters by name, in the program's order."""
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients_of(model: tg.GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def muon_momentum(run: tg.Run, step: int) -> float:
    """Of these settings; no model is needed for it."""
    holder = tg.Optimizers.__new__(tg.Optimizers)
    holder.cfg = run.cfg
    return holder._momentum(step)


def orthogonalized(update: Tensor, steps: int, coefficients: str) -> Tensor:
    """Muon's Newton-Schulz iteration in float32."""
    return tg.orthogonalize(update, steps, torch.float32, coefficients)


def gptq_codes(weights: Tensor, hessian: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales (R,) of one matrix."""
    quantized = tg.gptq(weights[None], hessian[None], bits, clip_sigmas, tg.Log(None, enabled=False))
    return quantized.codes[0], quantized.scales[0]


def gate_codes(weights: np.ndarray) -> tuple[Tensor, Tensor]:
    """Codes (heads, d) and scales (heads,) of one attention gate, as the artifact of a model with this gate stores them."""
    heads, dim = weights.shape
    run = start({"NUM_LAYERS": 3, "LOOP_START": 0, "LOOP_END": 0, "PARALLEL_START_LAYER": 1, "XSA_LAST_N": 3, "MODEL_DIM": dim,
                 "NUM_HEADS": heads, "NUM_KV_HEADS": heads, "MLP_MULT": 1, "VOCAB_SIZE": 16, "GATED_ATTN_QUANT_GATE": 1})
    model = tg.GPT(run.cfg)
    model.init_weights(0)
    name = "blocks.0.attn.attn_gate_w"
    params_of(model)[name].copy_(torch.from_numpy(weights))
    hessians = {key: torch.eye(h.size(-1)).expand_as(h) for key, h in tg.Calibration(run.cfg, CPU).hessians.items()}
    found = tg.quantize(run, model, hessians)[0][name]
    return found.codes, found.scales


def global_sgd(run: tg.Run, model: tg.GPT, tokens: np.ndarray) -> None:
    """One pass over a text; changes the model."""
    tg.GlobalSGD(run, model).learn(tokens, "1/1")


def low_rank(error: Tensor, settings: dict[str, object], like: Tensor) -> tg.LowRank:
    """The low-rank term of an error, each pair of vectors turned to the sign of `like` (rank, cols)."""
    cfg = tg.Config.from_env(known_settings(settings))
    a, b = tg.best_product(error, cfg.lqer_rank)
    signs = (b * like).sum(1).sign()
    return tg.LowRank.of(0, a * signs, b * signs[:, None], cfg)


def tilt(golden: Arrays, order: int, log_probs: Tensor) -> dict[str, np.ndarray]:
    """Hints in scoring order and tilted losses of every target of one stream; log_probs (T, V) are the model's."""
    tokens, config = golden["tokens"], config_of(golden)
    documents = tg.Documents(tg.ValData(tokens, np.ones_like(tokens), int((tokens == tg.BOS_ID).sum())))
    hints = tg.ngram_hints(documents, order)
    found = {name: np.zeros(len(tokens) - 1, np.int64) for name in ("hint", "total", "top_count", "gate")}
    for name, values in (("hint", hints.top), ("total", hints.total), ("top_count", hints.count)):
        found[name][hints.at - 1] = values
    betas = np.zeros(len(tokens) - 1, np.float32)
    betas[hints.at - 1] = hints.betas(tg.Config(ngram_tilt_threshold=config["threshold"], ngram_tilt_beta=config["beta"]))
    found["gate"] = betas > 0
    targets, top = torch.from_numpy(tokens[1:].astype(np.int64)), torch.from_numpy(found["hint"])
    losses = -log_probs.gather(1, torch.stack([targets, top], 1)).T
    found["nll"] = tg.tilted(*losses, (targets == top).float(), torch.from_numpy(betas)).numpy()
    return found


def ttt_losses(run: tg.Run, model: tg.GPT, documents: list[np.ndarray], first_a: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Losses of each document, all in one batch; `first_a` by site: A (visits, documents, rank, in) before the first step.

    A document begins with BOS and ends with the BOS behind it.
    """
    tokens = np.concatenate([*(d[:-1] for d in documents), documents[-1][-1:]]).astype(np.uint16)
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))  # as the program scores them
    scorer = tg.TTTScorer(run, model)
    adapters = scorer.adapters = tg.Adapters(run, len(documents))
    adapters.initial = {site: torch.from_numpy(first_a[site][:, order]).transpose(0, 1) for site in adapters.initial}
    found = scorer.score(tg.Documents(tg.ValData(tokens, np.ones_like(tokens), len(documents))), range(len(documents)))
    return [found[order.index(i)] for i in range(len(documents))]


def ttt_by_plan(run: tg.Run, model: tg.GPT, batches: list[list[np.ndarray]], first_a: list[dict[str, np.ndarray]]) -> Iterator[
        tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Losses of each document, batch by batch as the program plans them in one lane, and every `a.` and `b.` that the batch ends with.

    `first_a` of each batch by site: A (visits, documents, rank, in) where it begins anew, else nothing.
    """
    documents = [d for batch in batches for d in batch]
    tokens = np.concatenate([*(d[:-1] for d in documents), documents[-1][-1:]]).astype(np.uint16)
    known = tg.Documents(tg.ValData(tokens, np.ones_like(tokens), len(documents)))
    known.starts, known.lengths = known.starts[:-1], known.lengths[:-1]  # the last BOS begins an empty document
    tg.TTT_LANES, lanes = 1, tg.TTT_LANES
    plan, scorer = tg.plan_ttt(run.cfg, known.lengths, 1)[0], tg.TTTScorer(run, model)
    tg.TTT_LANES = lanes
    assert [len(b) for b in plan.batches] == list(map(len, batches)), "whole batches, cut from the short end"
    for index, members in enumerate(plan.batches):
        assert (index in plan.warm) == (not first_a[index]), "A begins anew where theirs does"
        if index not in plan.warm:
            adapters = scorer.adapters = tg.Adapters(run, len(members))
            adapters.initial = {site: torch.from_numpy(a[:, ::-1].copy()).transpose(0, 1) for site, a in first_a[index].items()}
        losses = scorer.score(known, members, index in plan.warm)[::-1]  # ours has the longest document first
        yield losses, {name: t.flip(0).transpose(0, 1).numpy() for name, t in scorer.adapters.values.items()}


# ---- comparing ----


class Difference(NamedTuple):
    """The largest difference of one kind; `note` says where."""

    kind: str
    value: float
    tolerance: float
    note: str = ""


def largest(kind: str, pairs: dict[str, tuple[object, object]], tolerance: float, relative: bool = False) -> Difference:
    """The largest |ours - golden| of (ours, golden) pairs by name; relative: norm of the difference over the golden norm."""
    worst, where = 0.0, ""
    for name, pair in pairs.items():
        ours, golden = (np.asarray(value, dtype=np.float64) for value in pair)
        assert ours.shape == golden.shape, (name, ours.shape, golden.shape)
        error = np.abs(ours - golden)
        value = np.linalg.norm(error) / max(np.linalg.norm(golden), 1e-30) if relative else error.max(initial=0.0)
        if not value <= worst:  # a NaN is the worst of all
            worst, where = float(value), name
    return Difference(kind, worst, tolerance, where)


def read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays below `prefix/`, by the rest of their names."""
    return {name.removeprefix(prefix + "/"): value for name, value in arrays.items() if name.startswith(prefix + "/")}


def config_of(arrays: Arrays) -> dict:
    return json.loads(str(arrays["config"]))


# ---- the model and test-time training ----


def check_model(path: Path) -> Iterator[Difference]:
    golden = read(path)
    model = model_of(start(config_of(golden)), under(golden, "param"))
    batch = batch_of(golden["input_ids"], golden["target_ids"], golden["cu_seqlens"])
    for name, losses in under(golden, "loss").items():
        yield largest(f"loss {name}", {"": (losses_of(model, batch, int(name.removeprefix("depth"))).detach(), losses)}, 1e-4)


def check_ttt(path: Path) -> Iterator[Difference]:
    """The model is that of model_small.npz beside it; no text says how exact, so 1e-4 as there."""
    golden = read(path)
    config = config_of(golden)
    run = start(config | {"EVAL_LOOP_DEPTH": config["depth"], "TTT_LORA_RANK": config["rank"], "TTT_CHUNK_SIZE": config["chunk"],
                          "TTT_EVAL_SEQ_LEN": config["window"], "TTT_LORA_LR": config["lr"], "TTT_WEIGHT_DECAY": config["weight_decay"],
                          "TTT_BETA1": config["beta1"], "TTT_BETA2": config["beta2"]})
    model = model_of(run, under(read(path.with_name("model_small.npz")), "param"))
    documents = {name: golden[name] for name in golden if name.startswith("doc")}
    plain = {name: losses_of(model, batch_of(d[:-1], d[1:], np.zeros(1, int)), config["depth"]).detach() for name, d in documents.items()}
    yield largest("loss without adapters", {name: (plain[name], golden[f"plain/{name}"]) for name in documents}, 1e-4)
    scored = ttt_losses(run, model, list(documents.values()), stacked_a(under(golden, "lora_init"), suffix=".A"))
    yield largest("loss scored with adapters", {name: (ours, golden[f"score/{name}"]) for name, ours in zip(documents, scored)}, 1e-4)


def stacked_a(arrays: Arrays, suffix: str) -> dict[str, np.ndarray]:
    """By our site: A (visits, documents, rank, in), from `<their site>.<visit><suffix>` (documents, rank, in) each."""
    found = {"head": arrays[SITES["head"] + suffix][None]}
    for site, theirs in SITES.items():
        visits = sum(name.startswith(theirs + ".") for name in arrays)
        if site != "head" and visits:
            found[site] = np.stack([arrays[f"{theirs}.{visit}{suffix}"] for visit in range(visits)])
    return found


# ---- training ----

NORM_TOLERANCE = 1e-6  # of one float32 number: 2e-7 was met, but its last bits depend on the machine



def check_train(path: Path) -> Iterator[Difference]:
    golden = read(path)
    run = start(dict(line.split("=", 1) for line in golden["settings"].tolist()))
    yield from trajectory(run, golden)
    yield from matrices(golden)
    yield from sgd(run, golden)


def trajectory(run: tg.Run, golden: Arrays) -> Iterator[Difference]:
    """Every loss, norm and schedule of the run, then the parameters and their average."""
    steps = [[batch_of(*row) for row in zip(*arrays)]
             for arrays in zip(golden["step_tokens"], golden["step_targets"], golden["step_cu_seqlens"])]
    training, names = Training(run, under(golden, "init"), steps), sorted(under(golden, "init"))
    losses, schedules, norms_after, first_gradients = [], [], {}, []
    for step, batches in enumerate(steps):
        depth, lr_scale = int(golden["depth"][step]), float(golden["lr_scale"][step])
        with torch.no_grad():
            losses.append([losses_of(training.model, batch, depth).mean() for batch in batches])
        schedules.append(training.schedule(step))
        training.step(depth, lr_scale)
        norms_after[f"norms_after_{step + 1}"] = norms(params_of(training.model), names)
        first_gradients = first_gradients or norms(gradients_of(training.model), names)
    yield largest("loss of a micro-batch", {"": (losses, golden["loss"])}, 2e-6)
    for kind in ("depth", "lr_scale", "muon_momentum"):
        yield largest(f"schedule: {kind}", {"": ([s[kind] for s in schedules], golden[kind])}, 1e-12)
    numbered = by_entry(range(len(steps)), training.norms, golden["grad_norm"])
    yield largest("norm of the gradient, relative", numbered, NORM_TOLERANCE, relative=True)
    theirs = golden["grad_norms_first_step_clipped"]
    yield largest("norms of the clipped gradient, relative", by_entry(names, first_gradients, theirs), 5e-6, relative=True)
    for key in (key for key in golden if key.startswith("norms_after_")):
        yield largest(f"{key}, relative", by_entry(names, norms_after[key], golden[key]), 5e-6, relative=True)
    for kind, ours in (("after", params_of(training.model)), ("ema", training.averages)):
        yield largest(f"parameters: {kind}, relative", {n: (ours[n], v) for n, v in under(golden, kind).items()}, 5e-6, relative=True)


def norms(tensors: dict[str, Tensor], names: list[str]) -> list[float]:
    return [float(tensors[name].double().norm()) for name in names]


def by_entry(names: object, ours: object, golden: np.ndarray) -> dict[str, tuple[object, object]]:
    """Pairs of numbers by name, to be compared one by one."""
    return {str(name): pair for name, *pair in zip(names, ours, golden, strict=True)}


def matrices(golden: Arrays) -> Iterator[Difference]:
    """GPTQ and the gates' int8 rows: codes and scales, all equal."""
    for name in sorted({key.split("/")[0] for key in golden if key.startswith("gptq_")}):
        case = under(golden, name)
        inputs = (torch.from_numpy(case[key]) for key in ("weights", "hessian"))
        found = gptq_codes(*inputs, int(case["bits"]), float(case["clip_sigmas"]))
        yield from equal(name, found, case)
    yield from equal("gate", gate_codes(golden["gate/weights"]), under(golden, "gate"))


def equal(name: str, found: tuple[Tensor, Tensor], golden: Arrays) -> Iterator[Difference]:
    for kind, ours in zip(("codes", "scales"), found):
        yield Difference(f"{name}: share of {kind} that differ", float((ours.numpy() != golden[kind]).mean()), 0.0)


def sgd(run: tg.Run, golden: Arrays) -> Iterator[Difference]:
    """Global SGD from the weights after training: by how much each parameter moves, and its norm."""
    for name in ("sgd_aligned", "sgd_free"):
        case, model = under(golden, name), model_of(run, under(golden, "after"))
        names, before = sorted(params_of(model)), {n: p.clone() for n, p in params_of(model).items()}
        global_sgd(run, model, case["tokens"].astype(np.uint16))
        after = params_of(model)
        moved = norms({n: after[n].double() - before[n].double() for n in names}, names)
        yield largest(f"{name}: norm of the movement, relative", by_entry(names, moved, case["moved"]), 3e-4, relative=True)
        if "norms" in case:
            yield largest(f"{name}: norms, relative", by_entry(names, norms(after, names), case["norms"]), 5e-6, relative=True)


# ---- CaseOps ----


def check_caseops(path: Path, tokenizer: Path | None) -> Iterator[Difference]:
    """The transform both ways, ids and charged bytes. The last two need the published tokenizer."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    yield count("texts transformed otherwise", (V1.encode(c["text"]) != c["transformed"] for c in cases))
    yield count("texts that do not come back", (V1.decode(c["transformed"]) != c["text"] for c in cases))
    if tokenizer is None:
        print(f"{path.name:<20} token ids are not compared: no tokenizer; give --tokenizer")
        return
    encoder = Encoder(Tokenizer(tokenizer))
    for kind, method, key in (("other ids", encoder.ids, "ids"), ("other charges", encoder.charges, "original_bytes")):
        yield count(f"texts with {kind}", (np.frombuffer(method(c["text"]), "<u2").tolist() != c[key] for c in cases))


def count(kind: str, wrong: Iterator[bool]) -> Difference:
    return Difference(kind, sum(wrong), 0.0)


# ---- levers: changes of later records, most of them not in the program ----


class Lever(NamedTuple):
    """A row: what it is, its settings (it is built when the program has them all), its file, how it is compared."""

    name: str
    settings: dict[str, object]
    file: str
    check: Callable[[Path, dict[str, object]], Iterator[Difference]] | None = None


def forward_variant(path: Path, settings: dict[str, object], variant: str, kind: str) -> Iterator[Difference]:
    """Losses at every depth; `loss_alone`: no segment sees a predecessor, `loss`: with gradients of the mean depth-3 loss."""
    golden = read(path)
    model = model_of(start(config_of(golden) | settings), under(golden, "param") | under(golden, f"{variant}/param"))
    batch = batch_of(golden["input_ids"], golden["target_ids"], golden["cu_seqlens"])
    for name, losses in under(golden, f"{variant}/{kind}").items():
        yield largest(f"{kind}/{name}", {"": (losses_of(model, batch, int(name.removeprefix("depth"))).detach(), losses)}, 1e-4)
    if kind == "loss":
        losses_of(model, batch, 3).mean().backward()
        ours = gradients_of(model)
        yield largest("gradients", {name: (ours[name], grad) for name, grad in under(golden, f"{variant}/grad").items()}, 1e-5)


def warm_ttt(path: Path, settings: dict[str, object]) -> Iterator[Difference]:
    """Losses, and A and the head's B after each batch."""
    golden, forward = read(path), read(path.with_name("lever_forward.npz"))
    config = config_of(golden)
    names = {"TTT_LORA_RANK": "rank", "TTT_LORA_ALPHA": "alpha", "TTT_WEIGHT_DECAY": "weight_decay", "TTT_BETA2": "beta2",
             "TTT_EVAL_SEQ_LEN": "window", "TTT_CHUNK_SIZE": "chunk", "TTT_BATCH_SIZE": "batch", "EVAL_LOOP_DEPTH": "depth"}
    for kind, case in config["runs"].items():
        arrays, sites = under(golden, kind), {site.upper(): int(site in case["sites"]) for site in ("q", "k", "v", "o", "mlp")}
        batches = [under(arrays, f"batch{i}") for i in range(len(case["steps"]))]
        run = start(config_of(forward) | SMEAR | SPARSE | settings | {name: config[key] for name, key in names.items()} | {
            "PHASED_TTT_ENABLED": 0, "TTT_LORA_LR": case["lr"], "TTT_SHORT_CHUNKS": case["short_steps"].replace(":", ","),
            **{f"TTT_{site}_LORA": on for site, on in sites.items()}})
        model = model_of(run, under(forward, "param") | under(forward, "sparse_smear/param"))
        rows = [[under(batch, f"row{b}") for b in range(sum(name.endswith("/tokens") for name in batch))] for batch in batches]
        first = [stacked_a(under(batch, "A_start"), "") if under(batch, "A_start") else {} for batch in batches]
        found = list(ttt_by_plan(run, model, [[row["tokens"] for row in batch] for batch in rows], first))
        yield largest(f"{kind}: losses", {f"batch {i} row {b}": (loss, rows[i][b]["loss"])
                                          for i, (losses, _) in enumerate(found) for b, loss in enumerate(losses)}, 5e-4)
        ends = [stacked_a(under(batch, "A_end"), "") if under(batch, "A_end") else {} for batch in batches]
        if any(ends):
            pairs = {f"batch {i} {site}": (found[i][1][f"a.{site}"], a) for i, end in enumerate(ends) for site, a in end.items()}
            yield largest(f"{kind}: A", pairs, 1e-3)
            heads = {f"batch {i}": (found[i][1]["b.head"][0], batch["B_end/lm_head_lora"]) for i, batch in enumerate(batches)}
            yield largest(f"{kind}: B of the head", heads, 5e-3)


def lqer(path: Path, settings: dict[str, object]) -> Iterator[Difference]:
    """Codes, scales, what they add and which matrices are chosen; those coded symmetrically as a group does not fit are left out."""
    golden = read(path)
    config = config_of(golden)
    norms = {name: float(e.norm()) for name, e in ((n, torch.from_numpy(v)) for n, v in under(golden, "e").items())}
    for kind, case in config["runs"].items():
        if not case.get("lqer_asym_enabled", True) or case.get("awq_lite_enabled"):
            continue
        ours = sorted(norms, key=lambda name: -norms[name])[: case["lqer_top_k"]]
        yield Difference(f"{kind}: other matrices chosen", float(len({*ours} ^ {*case["chosen"]})), 0.0)
        codes, added = {}, {}
        for name in case["chosen"]:
            if f"{kind}/{name}/lqA_a" not in golden:
                continue
            exact = under(golden, f"{kind}/{name}")
            found = low_rank(torch.from_numpy(golden[f"e/{name}"]), settings | {
                "LQER_RANK": case["lqer_rank"], "LQER_GROUP": case["lqer_asym_group"]}, torch.from_numpy(exact["lqB_a"]).float())
            keys = {"lqA_a": found.a, "lqAs_a": found.a_scales[0], "lqB_a": found.b, "lqBs_a": found.b_scales}
            codes |= {f"{name} {key}": (ours, exact[key]) for key, ours in keys.items()}
            added[name] = (torch.from_numpy(golden[f"gptq/{name}"]) + found.product(), exact["reconstructed"])
        yield largest(f"{kind}: codes and scales", codes, 0.0)
        yield largest(f"{kind}: weights", added, 1e-6)


def newton_schulz(path: Path, _: dict[str, object], coefficients: str) -> Iterator[Difference]:
    golden = read(path)
    pairs = {name: (orthogonalized(torch.from_numpy(golden["input/" + name.split("/")[0]]), int(name[-1]), coefficients), matrix)
             for name, matrix in under(golden, coefficients).items()}
    yield largest("matrices", pairs, 1e-4)


def ngram_tilt(path: Path, _: dict[str, object]) -> Iterator[Difference]:
    golden = read(path)
    logits = torch.from_numpy(golden["logit_u"]) @ torch.from_numpy(golden["logit_w"])
    targets = torch.from_numpy(golden["tokens"][1:].astype(np.int64))[:, None]
    log_probs = logits.scatter_add(1, targets, torch.from_numpy(golden["logit_bonus"])[:, None]).log_softmax(-1)
    for order in (4, 16):
        exact, found = under(golden, f"scoring_token/order{order}"), tilt(golden, order, log_probs)
        yield largest(
            f"order {order}: hints, counts, gates", {n: (found[n], exact[n]) for n in ("hint", "total", "top_count", "gate")}, 0.0
        )
        yield largest(f"order {order}: losses", {"": (found["nll"], exact["nll"])}, 1e-5)


def learning_rate(path: Path, _: dict[str, object]) -> Iterator[Difference]:
    golden, pairs = read(path), {}
    for name, factors in under(golden, "lr").items():
        if name != "frac":
            warmdown, floor = name.removeprefix("warmdown").split("_min")
            cfg = start({"WARMDOWN_FRAC": warmdown, "MIN_LR": floor}).cfg
            pairs[name] = ([tg.learning_rate_scale(cfg, frac) for frac in golden["lr/frac"].tolist()], factors)
    yield largest("factors", pairs, 1e-12)


def momentum(path: Path, _: dict[str, object]) -> Iterator[Difference]:
    golden, pairs = read(path), {}
    for name, (first, last, steps) in config_of(golden)["momentum"].items():
        run = start({"MUON_MOMENTUM_WARMUP_START": first, "MUON_MOMENTUM": last, "MUON_MOMENTUM_WARMUP_STEPS": steps})
        pairs[name] = ([muon_momentum(run, step) for step in golden[f"momentum/{name}/step"].tolist()], golden[f"momentum/{name}/value"])
    yield largest("values", pairs, 1e-12)


SMEAR, SPARSE = {"SMEAR_GATE_ENABLED": 1}, {"SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 0.5}
LEVERS = (
    Lever("SmearGate", SMEAR, "lever_forward.npz", partial(forward_variant, variant="dense_smear", kind="loss_alone")),
    Lever("sparse gate", SMEAR | SPARSE, "lever_forward.npz", partial(forward_variant, variant="sparse_smear", kind="loss_alone")),
    Lever("MLP gate", {"MLP_GATE_ENABLED": 1}, "lever_forward.npz", partial(forward_variant, variant="dense_mlpgate", kind="loss")),
    Lever("Muon's quintic", {}, "lever_muon.npz", partial(newton_schulz, coefficients="quintic")),
    Lever("Polar Express", {"MUON_NS": "polar"}, "lever_muon.npz", partial(newton_schulz, coefficients="polar")),
    Lever("learning rate", {}, "lever_muon.npz", learning_rate),
    Lever("Muon's momentum", {}, "lever_muon.npz", momentum),
    Lever("LQER", {"LQER_ENABLED": 1, "LQER_COLUMN_SCALES": 0}, "lever_lqer.npz", lqer),
    Lever("AWQ-lite", {"AWQ_LITE_ENABLED": 1}, "lever_lqer.npz"),
    Lever("warm A in TTT", {"TTT_WARM_START_A": 1}, "lever_ttt.npz", warm_ttt),
    Lever("n-gram tilt", {"NGRAM_TILT_ENABLED": 1}, "lever_tilt.npz", ngram_tilt),
    Lever("fused marker pairs", {"FUSED_MARKER_PAIRS": 1}, "lever_fusion.npz"),
)


def check_levers(path: Path) -> Iterator[Difference]:
    """The levers of one file that the program has; a lever without a comparison is a fault once it is built."""
    for lever in LEVERS:
        if lever.file != path.name:
            continue
        if len(known_settings(lever.settings)) < len(lever.settings):
            print(f"{path.name:<20} {lever.name:<48} not built")
        elif lever.check is None:
            yield Difference(f"{lever.name}: built, but nothing compares it", float("nan"), 0.0)
        else:
            yield from (d._replace(kind=f"{lever.name}: {d.kind}") for d in lever.check(path, lever.settings))


# ---- the command ----


def checks(tokenizer: Path | None) -> dict[str, Callable[[Path], Iterator[Difference]]]:
    """By file name."""
    return {"model_small.npz": check_model, "ttt_small.npz": check_ttt, "caseops_cases.json": partial(check_caseops, tokenizer=tokenizer),
            "train_small.npz": check_train, **{lever.file: check_levers for lever in LEVERS}}


def compare(folder: Path, tokenizer: Path | None) -> list[bool]:
    """Print every difference of a folder's files; which of them are within their tolerance."""
    within = []
    for name, check in checks(tokenizer).items():
        if (folder / name).is_file():
            for found in check(folder / name):
                within.append(found.value <= found.tolerance)
                verdict = "ok" if within[-1] else f"WRONG {found.note}"
                print(f"{name:<20} {found.kind:<48} {found.value:9.2e}  allowed {found.tolerance:7.1e}  {verdict}", flush=True)
    if not within:
        print(f"{folder}: nothing to check: none of {', '.join(checks(None))}")
    return within or [False]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare the program with golden files")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model for the token ids (default: where a run finds its own)")
    options = parser.parse_args(arguments)
    tokenizer = options.tokenizer or tg.Config().tokenizer_file
    within = [ok for folder in options.folders for ok in compare(folder, tokenizer if tokenizer.is_file() else None)]
    print(f"golden folders:{len(options.folders)} comparisons:{len(within)} wrong:{within.count(False)}")
    return int(not all(within))


if __name__ == "__main__":
    sys.exit(main())
