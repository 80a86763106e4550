"""Test-time training: score first, every target once, the same for any number of ranks, equal to a plain oracle."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny  # noqa: E402
import train_gpt as g  # noqa: E402

CONTEXTS = ("window", "cache")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_run(**changes: object) -> g.Run:
    """A tiny run at depth 2 without global SGD, unless `changes` say otherwise."""
    settings = {**tiny.SETTINGS, "EVAL_LOOP_DEPTH": 2, "PHASED_TTT_ENABLED": 0, **{k.upper(): v for k, v in changes.items()}}
    return g.Run(g.Config.from_env({name: str(value) for name, value in settings.items()}), g.Ranks(), g.Log(None, speaks=False))


def make_model(run: g.Run, seed: int = 3) -> g.GPT:
    """A model in which every parameter matters: no zeros, no ones."""
    model = g.GPT(run.cfg)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.1)
    return model.requires_grad_(False)


def make_val(docs: list[np.ndarray]) -> g.ValData:
    tokens = np.concatenate(docs).astype(np.uint16)
    return g.ValData(tokens, np.where(tokens == g.BOS_ID, 0, 2).astype(np.uint16), len(docs))


def score_all(run: g.Run, val: g.ValData, model: g.GPT | None = None) -> np.ndarray:
    """Losses of every target, from the function that a run calls; the default model is always the same."""
    return g.score_with_ttt(run, model or make_model(run), val)[0].losses


def plain_losses(run: g.Run, model: g.GPT, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Losses of one stretch of text seen as a whole, without adapters."""
    batch = g.make_batch(tokens, targets, np.array([0]), len(tokens), torch.device("cpu"))
    with torch.no_grad():
        return model(batch, g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)).numpy()


def document_losses(run: g.Run, val: g.ValData, model: g.GPT) -> list[np.ndarray]:
    """Losses of each document in scoring order, scored alone."""
    documents, adapter = g.Documents(val), g.Adapter(run, model)
    return [adapter.score(documents, range(d, d + 1))[0] for d in range(len(documents))]


# ----------------------------------------------------------------------------------------------------- an oracle


class Oracle:
    """TTT of one document, written from the description: plain autograd, AdamW spelled out, Python lists for the cache."""

    def __init__(self, run: g.Run, model: g.GPT) -> None:
        self.cfg, self.model = run.cfg, model
        self.schedule = g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)
        initial = g.Adapters(run, self.schedule, 1).initial
        self.lora: dict[tuple[str, int], list[Tensor]] = {}
        for name, values in initial.items():
            out = {"k": run.cfg.kv_dim, "v": run.cfg.kv_dim, "head": run.cfg.vocab_size}.get(name, run.cfg.model_dim)
            for visit in range(len(values)):
                self.lora[name, visit] = [values[visit, 0].clone(), torch.zeros(out, run.cfg.ttt_lora_rank)]
        for pair in self.lora.values():
            for tensor in pair:
                tensor.requires_grad_()
        self.second = {key: [torch.zeros_like(t) for t in pair] for key, pair in self.lora.items()}
        self.updates = 0

    def linear(self, site: g.Site, x: Tensor, w: Tensor | None) -> Tensor | None:
        _, visit, name = site
        y = None if w is None else x @ w.T
        if (name, visit) not in self.lora:
            return y
        a, b = self.lora[name, visit]
        return (0 if y is None else y) + x @ a.T @ b.T

    def update(self, loss: Tensor) -> None:
        """AdamW with beta1 = 0: the gradient over the root of its debiased second moment, decay decoupled."""
        cfg = self.cfg
        loss.backward()
        self.updates += 1
        for key, pair in self.lora.items():
            for tensor, second in zip(pair, self.second[key]):
                second.mul_(cfg.ttt_beta2).addcmul_(tensor.grad, tensor.grad, value=1 - cfg.ttt_beta2)
                debiased = second / (1 - cfg.ttt_beta2**self.updates)
                lr = cfg.ttt_lora_lr * self.updates**cfg.ttt_lora_lr_power
                with torch.no_grad():
                    tensor.mul_(1 - lr * cfg.ttt_weight_decay)
                    tensor.addcdiv_(tensor.grad, debiased.sqrt() + 1e-10, value=-lr)
                tensor.grad = None

    def losses(self, entries: np.ndarray, first: int, end: int, attend: g.Attend | None) -> Tensor:
        """Losses of the targets first+1 .. end of `entries`, from a forward over the tokens first .. end-1."""
        batch = g.make_batch(entries[first:end], entries[first + 1: end + 1], np.array([0]), end - first, torch.device("cpu"))
        batch = batch._replace(positions=batch.positions + first)
        return self.model(batch, self.schedule, self.linear, attend)

    def score(self, entries: np.ndarray) -> np.ndarray:
        """Losses of a document; `entries` ends with the last target."""
        length, limit, doubles = len(entries) - 1, self.cfg.ttt_eval_seq_len, self.cfg.ttt_chunk_doubles_at
        largest = self.cfg.ttt_chunk_size * 2**len(doubles)
        places = -(-limit // largest) * largest
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        result: list[Tensor] = []
        end = 0
        while end < length:
            begin, size = end, self.cfg.ttt_chunk_size * 2**sum(end >= position for position in doubles)
            end = min(begin + size, length)
            if self.cfg.ttt_context == "cache":
                fresh: dict[int, tuple[Tensor, Tensor]] = {}
                forward = partial(self.losses, entries, begin, end, self.cached_attention(kept, fresh, begin, begin + size - places))
            else:
                first, fresh = max(0, end - limit), {}
                forward = lambda: self.losses(entries, first, end, None)[begin - first:]  # noqa: E731, B023
            result.append(forward().detach())
            scored_with = dict(fresh)
            for _ in range(self.cfg.ttt_grad_steps if end < length else 0):
                self.update(forward().mean())
            for visit, pair in scored_with.items():
                kept.setdefault(visit, []).append(pair)
        return torch.cat(result).numpy()

    @staticmethod
    def cached_attention(kept: dict, fresh: dict, begin: int, lowest: int) -> g.Attend:
        """Attention by a loop over query positions and heads; keys below position `lowest` are out of sight."""

        def attend(visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fresh[visit] = (k.detach(), v.detach())
            keys = torch.cat([pair[0] for pair in kept.get(visit, [])] + [k])
            values = torch.cat([pair[1] for pair in kept.get(visit, [])] + [v])
            group, rows = q.size(1) // k.size(1), []
            for i in range(len(q)):
                seen = slice(max(0, lowest), begin + i + 1)
                heads = []
                for h in range(q.size(1)):
                    p = (keys[seen, h // group] @ q[i, h] / math.sqrt(q.size(2))).softmax(0)
                    heads.append(p @ values[seen, h // group])
                rows.append(torch.stack(heads))
            return torch.stack(rows)

        return attend


@pytest.mark.parametrize(("context", "chunk", "limit", "doubles"), [
    ("window", 16, 64, ""), ("window", 7, 20, ""), ("cache", 16, 64, ""), ("cache", 7, 20, ""), ("cache", 4, 21, "8,32"),
    ("cache", 5, 64, "20")])
def test_scores_are_those_of_the_oracle_and_the_last_chunk_teaches_nothing(context: str, chunk: int, limit: int, doubles: str) -> None:
    run = make_run(ttt_context=context, ttt_chunk_size=chunk, ttt_eval_seq_len=limit, ttt_chunk_doubles_at=doubles)
    model = make_model(run)
    val = make_val(tiny.documents(3, seed=5, shortest=26, longest=45))
    documents, adapter = g.Documents(val), g.Adapter(run, model)
    got = adapter.score(documents, range(len(documents)))

    def chunks_of(length: int) -> int:
        return len(g.chunk_bounds(run.cfg, length)) - 1 if doubles else -(-length // chunk)

    for d, losses in enumerate(got):
        start, length = documents.starts[d], documents.lengths[d]
        oracle = Oracle(run, model)
        np.testing.assert_allclose(losses, oracle.score(val.tokens[start: start + length + 1].astype(np.int64)), atol=2e-5)
        assert oracle.updates == chunks_of(length) - 1
    adapter.score(documents, range(1))
    steps = {float(state["step"]) for state in adapter.adapters[1].adamw.state.values()}
    assert steps == {chunks_of(documents.lengths[0]) - 1}


def test_chunks_double_where_they_are_told_to() -> None:
    cfg = make_run(ttt_context="cache", ttt_chunk_size=4, ttt_chunk_doubles_at="16,32").cfg
    assert cfg.chunk_sizes == [4, 8, 16]
    assert g.chunk_bounds(cfg, 49) == [0, 4, 8, 12, 16, 24, 32, 48, 64]
    assert g.chunk_bounds(cfg, 16) == [0, 4, 8, 12, 16] and g.chunk_bounds(cfg, 1) == [0, 4]


@pytest.mark.parametrize(("changes", "message"), [
    ({"ttt_chunk_doubles_at": "24,16"}, "must ascend"),
    ({"ttt_chunk_doubles_at": "20"}, "a multiple of the chunks that begin there"),
    ({"ttt_chunk_doubles_at": "16,40"}, "a multiple of the chunks that begin there"),
    ({"ttt_chunk_doubles_at": "16,32,64,128"}, "must be at most TTT_EVAL_SEQ_LEN"),
    ({"ttt_chunk_doubles_at": "16", "ttt_context": "window"}, "needs TTT_CONTEXT=cache"),
])
def test_impossible_doublings_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(**{"ttt_context": "cache", "ttt_chunk_size": 8, "ttt_eval_seq_len": 100, **changes})


@pytest.mark.parametrize("context", CONTEXTS)
def test_two_updates_a_chunk_at_a_falling_rate_change_nothing_that_was_scored(context: str) -> None:
    run = make_run(ttt_context=context, ttt_grad_steps=2, ttt_lora_lr=0.02, ttt_lora_lr_power=-0.5)
    model, val = make_model(run), make_val(tiny.documents(1, seed=6, shortest=40, longest=41))
    expected = Oracle(run, model).score(val.tokens.astype(np.int64))
    np.testing.assert_allclose(document_losses(run, val, model)[0], expected, atol=2e-5)


# ------------------------------------------------------------------------------------------------------ what is scored


@pytest.mark.parametrize("context", CONTEXTS)
def test_without_learning_every_target_has_the_plain_score_of_its_document(context: str) -> None:
    run = make_run(ttt_context=context, ttt_lora_lr=0, ttt_chunk_size=11, ttt_eval_seq_len=200)
    model, val = make_model(run), make_val(tiny.documents(11, seed=8))
    losses = score_all(run, val, model)
    assert losses.shape == (len(val.tokens) - 1,) and not np.isnan(losses).any()
    starts = val.document_starts()
    for start, end in zip(starts, [*starts[1:], len(val.tokens) - 1]):
        alone = plain_losses(run, model, val.tokens[start:end], val.tokens[start + 1: end + 1])
        np.testing.assert_allclose(losses[start:end], alone, atol=1e-5)


def test_documents_partition_the_targets_longest_first_equals_in_data_order() -> None:
    docs = [np.append(1, np.full(n, 5)) for n in (4, 9, 4, 1, 9, 4)]
    documents = g.Documents(make_val(docs))
    assert documents.lengths.tolist() == [10, 10, 5, 5, 4, 2]
    assert documents.starts.tolist() == [5, 22, 0, 15, 32, 20]
    targets = np.concatenate([np.arange(s, s + n) + 1 for s, n in zip(documents.starts, documents.lengths)])
    assert sorted(targets) == list(range(1, sum(map(len, docs))))
    assert documents.byte_sums.tolist() == [18, 18, 8, 8, 8, 2]
    for d in range(6):
        assert documents.text(d).tolist() == [1] + [5] * (int(documents.byte_sums[d]) // 2)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_first_chunk_has_the_plain_score_because_b_is_zero(context: str) -> None:
    run = make_run(ttt_context=context, ttt_lora_lr=0.05)
    model, val = make_model(run), make_val(tiny.documents(1, seed=4, shortest=60, longest=61))
    losses = document_losses(run, val, model)[0]
    plain = plain_losses(run, model, val.tokens[:-1], val.tokens[1:])
    np.testing.assert_allclose(losses[:16], plain[:16], atol=1e-5)
    assert np.abs(losses[16:] - plain[16:]).max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 13, 48])
def test_a_frozen_cache_is_full_context_at_any_chunk_size(chunk: int) -> None:
    run = make_run(ttt_context="cache", ttt_lora_lr=0, ttt_chunk_size=chunk, ttt_eval_seq_len=50)
    model, val = make_model(run), make_val(tiny.documents(2, seed=9, shortest=40, longest=50))
    documents = g.Documents(val)
    for d, losses in enumerate(g.Adapter(run, model).score(documents, range(2))):
        start, length = documents.starts[d], documents.lengths[d]
        plain = plain_losses(run, model, val.tokens[start: start + length], val.tokens[start + 1: start + length + 1])
        np.testing.assert_allclose(losses, plain, atol=1e-5)


def test_with_one_chunk_a_document_the_cache_is_the_window() -> None:
    settings = {"ttt_chunk_size": 160, "ttt_eval_seq_len": 160, "ttt_lora_lr": 0.05}
    val = make_val(tiny.documents(9, seed=10))
    window, cache = (score_all(make_run(ttt_context=context, **settings), val) for context in CONTEXTS)
    np.testing.assert_allclose(cache, window, atol=1e-5)


def test_chunks_of_one_token_learn() -> None:
    val = make_val(tiny.documents(3, seed=11, shortest=20, longest=30))
    learnt, frozen = (score_all(make_run(ttt_context="cache", ttt_chunk_size=1, ttt_lora_lr=lr), val) for lr in (0.005, 0))
    starts = val.document_starts()
    np.testing.assert_array_equal(learnt[starts], frozen[starts])
    assert learnt.mean() < frozen.mean()


# ---------------------------------------------------------------------------------------------------------- score first


PHASED = {"phased_ttt_enabled": 1, "phased_ttt_prefix_docs": 9, "phased_ttt_num_phases": 3, "global_ttt_lr": 0.05,
          "global_ttt_chunk_tokens": 32, "ttt_batch_size": 3}


@pytest.mark.parametrize(("context", "doubles"), [("window", ""), ("cache", ""), ("cache", "32")])
def test_a_later_token_changes_no_earlier_score_to_the_last_bit(context: str, doubles: str) -> None:
    run = make_run(ttt_context=context, ttt_chunk_doubles_at=doubles, **PHASED)
    val = make_val(tiny.documents(12, seed=12, longest=100))
    documents, before = g.Documents(val), score_all(run, val)
    place_in_order = {int(start): d for d, start in enumerate(documents.starts)}
    starts = val.document_starts()
    for changed in (int(documents.starts[1]), int(documents.starts[6])):
        order = place_in_order[changed]
        length = int(documents.lengths[order])
        at = length // 2 + 3  # neither the first nor the last token of its chunk
        tokens = val.tokens.copy()
        tokens[changed + at: changed + length] = 4 + (tokens[changed + at: changed + length] + 9) % 60
        after = score_all(run, val._replace(tokens=tokens))
        np.testing.assert_array_equal(after[changed: changed + at - 1], before[changed: changed + at - 1])
        assert (after[changed + at - 1: changed + length - 1] != before[changed + at - 1: changed + length - 1]).mean() > 0.9
        part = next(p for p in g.phase_parts(run.cfg, len(documents)) if order in p)
        for start in map(int, starts):
            other, same = place_in_order[start], slice(start, start + int(documents.lengths[place_in_order[start]]))
            if other != order and other < part.stop:  # earlier, or adapted beside it: they never see each other
                np.testing.assert_array_equal(after[same], before[same])
            if other >= part.stop:
                assert (after[same] != before[same]).any(), "the global SGD has learnt from the changed document"


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(context: str) -> None:
    run = make_run(ttt_context=context, ttt_chunk_size=8)
    val = make_val(tiny.documents(4, seed=13, longest=80))
    documents = g.Documents(val)
    together = g.Adapter(run, make_model(run)).score(documents, range(4))
    for one, other in zip(document_losses(run, val, make_model(run)), together):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_scoring_twice_gives_the_same_bits() -> None:
    run, val = make_run(ttt_context="cache", **PHASED), make_val(tiny.documents(10, seed=14, longest=60))
    np.testing.assert_array_equal(score_all(run, val), score_all(run, val))


# --------------------------------------------------------------------------------------------------------- phases, ranks


def test_the_prefix_is_cut_in_equal_parts_and_the_rest_follows() -> None:
    cfg = make_run(phased_ttt_enabled=1, phased_ttt_prefix_docs=20, phased_ttt_num_phases=3).cfg
    assert g.phase_parts(cfg, 50) == [range(0, 6), range(6, 13), range(13, 20), range(20, 50)]
    assert g.phase_parts(cfg, 10) == [range(0, 3), range(3, 6), range(6, 10), range(10, 10)]
    assert g.phase_parts(replace(cfg, phased_ttt_enabled=False), 10) == [range(0, 10)]


def test_global_sgd_is_plain_sgd_with_momentum_over_the_chunks_but_the_last() -> None:
    changes = {"global_ttt_chunk_tokens": 100, "eval_seq_len": 40, "global_ttt_lr": 0.3, "global_ttt_grad_clip": 0.5, "global_ttt_batch_seqs": 2}
    run = make_run(**changes)
    model, expected = make_model(run), make_model(run).requires_grad_()
    text = np.concatenate(tiny.documents(6, seed=15))[:430].astype(np.int64)
    schedule = g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)
    momentum = [torch.zeros_like(p) for p in expected.parameters()]
    chunks = 5  # 429 targets
    for i in range(chunks - 1):
        total, first = torch.zeros(()), i * 100
        for begin in range(i * 100, i * 100 + 100):
            new = begin == i * 100 or (begin - i * 100) % 40 == 0 or text[begin] == 1
            first = begin if new else first
            ends = begin + 1 == i * 100 + 100 or (begin + 1 - i * 100) % 40 == 0 or text[begin + 1] == 1
            if ends:
                stretch = slice(first, begin + 1)
                batch = g.make_batch(text[stretch], text[first + 1: begin + 2], np.array([0]), begin + 1 - first, torch.device("cpu"))
                total = total + expected(batch, schedule).sum()
        grads = torch.autograd.grad(total / 100, list(expected.parameters()))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        assert norm > 0.5, "the clipping is exercised"
        lr = 0.3 * 0.5 * (1 + math.cos(math.pi * i / (chunks - 1)))
        with torch.no_grad():
            for param, grad, moment in zip(expected.parameters(), grads, momentum):
                moment.mul_(0.9).add_(grad * (0.5 / norm))
                param.sub_(lr * moment)
    g.global_sgd(run, model, text, "1/1")
    for (name, param), want in zip(model.named_parameters(), expected.parameters()):
        assert not param.requires_grad and param.grad is None
        torch.testing.assert_close(param.data, want.data, atol=1e-5, rtol=1e-4, msg=name)


def test_one_and_two_ranks_give_the_same_score(tmp_path: Path) -> None:
    changes = {**PHASED, "ttt_context": "cache", "eval_loop_depth": 2, "global_ttt_lr": 0.02}
    env = tiny.environment(tiny.write_dataset(tmp_path / "data", val_docs=16), tmp_path, RUN_ID="model", EVAL_ONLY=1,
                           **{name.upper(): value for name, value in changes.items()})
    run = make_run(**changes, data_path=tmp_path / "data")
    tensors = {name: param.data.half() for name, param in make_model(run).named_parameters()}
    settings = {name: getattr(run.cfg, name) for name in g.MODEL_SETTINGS}
    (tmp_path / "model.artifact").write_bytes(g.pack_artifact(tensors, settings, "lzma"))
    here = g.score_with_ttt(run, g.model_from_tensors(run.cfg, tensors, run), g.load_val(run.cfg))[0]
    done = tiny.run(env, ranks=2)
    assert done.returncode == 0, done.stderr + done.stdout
    assert float(tiny.records(done.stdout, "final")[0]["val_bpb"]) == pytest.approx(here.val_bpb, abs=1e-6)
    assert len(tiny.records(done.stdout, "ttt_sgd")) == 3, "the phases took part"
    assert tiny.records(done.stdout, "ttt_work")[0]["context"] == "cache"


# -------------------------------------------------------------------------------------------------------------- compiled


def test_the_cached_forward_compiles_without_a_break() -> None:
    run = make_run(ttt_context="cache", eval_loop_depth=1, num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1)
    adapter, size = g.Adapter(run, make_model(run)), run.cfg.ttt_chunk_size
    adapters, cache = g.Adapters(run, adapter.schedule, 2), g.Cache(run, adapter.schedule, 2, 4 * size)
    for tensor in (*adapters.b.values(), cache.keys, cache.values):
        tensor.data.normal_(generator=torch.Generator().manual_seed(1))
    cache.begin.fill_(size)
    tokens = np.arange(2 * size) % 60 + 4
    batch = g.make_batch(tokens, tokens[::-1].copy(), np.array([0, size]), size, torch.device("cpu"))
    traced = torch.compile(adapter.losses_of, fullgraph=True, dynamic=True, backend="eager")
    (losses, fresh), (expected, _) = (function(batch, adapters, cache, size) for function in (traced, adapter.losses_of))
    torch.testing.assert_close(losses, expected)
    assert len(fresh) == 2 and all(not t.requires_grad for pair in fresh for t in pair)


def test_places_that_hold_nothing_yet_are_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(ttt_context="cache", ttt_chunk_size=8, ttt_eval_seq_len=32)
    model, documents = make_model(run), g.Documents(make_val(tiny.documents(2, seed=17, shortest=50, longest=60)))
    exact = g.Adapter(run, model).score(documents, range(2))
    monkeypatch.setattr(g.ChunkStep, "places_in_sight", lambda self, begin: self.cache.places)  # a GPU rounds up
    rounded = g.Adapter(run, model)
    for _ in range(2):  # the second time the places hold what the first left there
        for one, other in zip(exact, rounded.score(documents, range(2))):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_cache_is_a_ring_that_never_holds_more_than_the_limit() -> None:
    run = make_run(ttt_context="cache", ttt_chunk_size=8, ttt_eval_seq_len=24)
    schedule = g.loop_schedule(run.cfg, 1)
    cache = g.Cache(run, schedule, documents=2, places=24)
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = run.cfg.num_heads, run.cfg.num_kv_heads, run.cfg.head_dim
    stream = [torch.randn(2, 40, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    for begin in range(0, 40, 8):
        q, k, v = (t[:, begin: begin + 8].flatten(0, 1) for t in stream)
        fresh: list[tuple[Tensor, Tensor]] = []
        attend = cache.bind(8, min(begin, 24), fresh)
        out = [attend(visit, q, k, v) for visit in range(schedule.visits)][-1].unflatten(0, (2, 8))
        cache.store(fresh)
        past = slice(max(0, begin + 8 - 24), begin + 8)
        keys, values = (t[:, past].transpose(1, 2) for t in stream[1:])
        mask = torch.ones(8, keys.size(2), dtype=torch.bool).tril(keys.size(2) - 8)
        want = F.scaled_dot_product_attention(stream[0][:, begin: begin + 8].transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)
