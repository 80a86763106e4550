"""Test-time training: score first, every target once, the same for any number of ranks, equal to a plain oracle."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from oracle import span_segments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from ttt_tools import CONTEXTS, CPU, Oracle, make_model, make_run, make_val, score_all

import train_gpt as g


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain_losses(run: g.Run, model: g.GPT, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Losses of one stretch of text seen as a whole, without adapters."""
    batch = g.make_batch(tokens, targets, np.array([0]), len(tokens), CPU)
    with torch.no_grad():
        return model(batch, g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)).numpy()


def document_losses(run: g.Run, val: g.ValData, model: g.GPT) -> list[np.ndarray]:
    """Losses of each document in scoring order, scored alone."""
    documents, scorer = g.Documents(val), g.TTTScorer(run, model)
    return [scorer.score(documents, range(d, d + 1))[0] for d in range(len(documents))]


# ------------------------------------------------------------------------------------------------------------ the oracle


@pytest.mark.parametrize(("context", "chunk", "limit", "doubles"), [
    ("window", 16, 64, ""), ("window", 7, 20, ""), ("cache", 16, 64, ""), ("cache", 7, 20, ""), ("cache", 4, 21, "8,32"),
    ("cache", 5, 64, "20")])
def test_scores_are_those_of_the_oracle_and_the_last_chunk_teaches_nothing(context: str, chunk: int, limit: int, doubles: str) -> None:
    run = make_run(ttt_context=context, ttt_chunk_size=chunk, ttt_eval_seq_len=limit, ttt_chunk_doubles_at=doubles)
    model = make_model(run)
    val = make_val(tiny.documents(3, seed=5, shortest=26, longest=45))
    documents, scorer = g.Documents(val), g.TTTScorer(run, model)
    got = scorer.score(documents, range(len(documents)))

    def chunks_of(length: int) -> int:
        return len(g.chunk_bounds(run.cfg, length)) - 1 if doubles else -(-length // chunk)

    for d, losses in enumerate(got):
        start, length = documents.starts[d], documents.lengths[d]
        oracle = Oracle(run, model)
        np.testing.assert_allclose(losses, oracle.score(val.tokens[start: start + length + 1].astype(np.int64)), atol=2e-5)
        assert oracle.updates == chunks_of(length) - 1
    scorer.score(documents, range(1))
    assert set(map(float, scorer.adapters.steps.values())) == {chunks_of(documents.lengths[0]) - 1}


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
    ({"ttt_short_chunks": "20,4"}, "TTT_CONTEXT=window"),
    ({"ttt_short_chunks": "20,4,30", "ttt_context": "window"}, "must be pairs"),
    ({"ttt_short_chunks": "20,101", "ttt_context": "window"}, "at most TTT_EVAL_SEQ_LEN"),
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
        followed = [] if d == 4 else [1]  # the fifth in scoring order is the last in the data
        assert documents.text(d).tolist() == [1] + [5] * (int(documents.byte_sums[d]) // 2) + followed


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
    for d, losses in enumerate(g.TTTScorer(run, model).score(documents, range(2))):
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


# ----------------------------------------------------------------------------------------------------------- warm A, lanes


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_goes_on_in_its_row_and_decays_until_its_batch_has_ended(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "TTT_LANES", 1)
    run = make_run(ttt_warm_start_a=1, ttt_batch_size=2, ttt_chunk_size=8, ttt_lora_lr=0.02, ttt_weight_decay=5, ttt_context=context)
    texts = [np.random.default_rng(n).integers(4, tiny.VOCAB, n) for n in (31, 47, 20, 38, 26)]
    model, val = make_model(run), make_val([np.append(1, text) for text in texts])
    documents, losses = g.Documents(val), score_all(run, val)
    assert len(set(documents.lengths)) == 5
    kept: dict[int, Oracle] = {}
    for batch in ((0,), (1, 2), (3, 4)):  # cut from the short end: the odd one has the longest and leaves no A to the next
        steps = -(-int(documents.lengths[batch[0]]) // 8) - 1
        for row, document in enumerate(batch):
            oracle, start = Oracle(run, model), int(documents.starts[document])
            if batch == (3, 4):
                for key, (a, _) in kept[row].lora.items():
                    oracle.lora[key][0].data.copy_(a.detach())
            found = oracle.score(documents.text(document).astype(np.int64))
            np.testing.assert_allclose(losses[start: start + len(found)], found, atol=5e-5)
            for a, _ in oracle.lora.values():
                a.data.mul_((1 - 0.02 * 5) ** (steps - oracle.updates))
            kept[row] = oracle
    cold = score_all(g.replace(run, cfg=g.replace(run.cfg, ttt_warm_start_a=False)), val)
    first = slice(int(documents.starts[3]) + 8, int(documents.starts[3]) + int(documents.lengths[3]))
    assert np.abs(cold[first] - losses[first]).max() > 1e-3, "the A of before matters"


def test_with_a_warm_a_later_text_changes_no_earlier_score_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "TTT_LANES", 2)
    run = make_run(ttt_warm_start_a=1, ttt_batch_size=2, ttt_lora_lr=0.02, ttt_short_chunks="40,8", ttt_eval_seq_len=64)
    val = make_val(tiny.documents(12, seed=12, longest=100))
    documents, before = g.Documents(val), score_all(run, val)
    plan = g.plan_ttt(run.cfg, documents.lengths, 1)[0]
    lanes = [list(part) for part in np.split(np.array(plan.ranks[0]), [i for i, b in enumerate(plan.ranks[0]) if i and b not in plan.warm])]
    assert len(lanes) == 2 and min(map(len, lanes)) > 1
    changed = plan.batches[lanes[0][1]].start
    start, length = int(documents.starts[changed]), int(documents.lengths[changed])
    at = length // 2 + 3
    tokens = val.tokens.copy()
    tokens[start + at: start + length] = 4 + (tokens[start + at: start + length] + 9) % 60
    differs = score_all(run, val._replace(tokens=tokens)) != before
    for lane in lanes:
        for place, batch in enumerate(lane):
            for document in plan.batches[batch]:
                own = differs[documents.starts[document]:][: documents.lengths[document]]
                if document == changed:
                    assert not own[: at - 1].any() and own[at - 1: length - 1].mean() > 0.9
                else:  # those that come later in the lane, and in the row of the changed one, begin with another A
                    row = document - plan.batches[batch].start == changed - plan.batches[lanes[0][1]].start
                    later = lane is lanes[0] and place > 1 and row and len(own) > 16
                    assert own.any() == later, (batch, document)


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
        scored = next(stop for p in g.plan_ttt(run.cfg, documents.lengths, 1) if order < (stop := p.batches[-1].stop))
        for start in map(int, starts):
            other, same = place_in_order[start], slice(start, start + int(documents.lengths[place_in_order[start]]))
            if other != order and other < scored:  # earlier, or adapted beside it: they never see each other
                np.testing.assert_array_equal(after[same], before[same])
            if other >= scored:
                assert (after[same] != before[same]).any(), "the global SGD has learnt from the changed document"


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(context: str) -> None:
    run = make_run(ttt_context=context, ttt_chunk_size=8)
    val = make_val(tiny.documents(4, seed=13, longest=80))
    documents = g.Documents(val)
    together = g.TTTScorer(run, make_model(run)).score(documents, range(4))
    for one, other in zip(document_losses(run, val, make_model(run)), together):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_scoring_twice_gives_the_same_bits() -> None:
    run, val = make_run(ttt_context="cache", **PHASED), make_val(tiny.documents(10, seed=14, longest=60))
    np.testing.assert_array_equal(score_all(run, val), score_all(run, val))


# ------------------------------------------------------------------------------------------------------------ global SGD


def test_global_sgd_is_plain_sgd_with_momentum_over_the_chunks_but_the_last() -> None:
    changes = {"global_ttt_chunk_tokens": 100, "eval_seq_len": 40, "global_ttt_lr": 0.3, "global_ttt_grad_clip": 0.5,
               "global_ttt_batch_seqs": 2}
    run = make_run(**changes)
    model, expected = make_model(run), make_model(run).requires_grad_()
    text = np.concatenate(tiny.documents(6, seed=15))[:430].astype(np.int64)
    schedule, params = g.loop_schedule(run.cfg, run.cfg.eval_loop_depth), list(expected.parameters())
    momentum = [torch.zeros_like(p) for p in params]
    chunks = 5  # 429 targets
    for i in range(chunks - 1):
        tokens, targets = text[i * 100: i * 100 + 100], text[i * 100 + 1: i * 100 + 101]
        parts = span_segments(torch.from_numpy(tokens), 40)
        batches = [g.make_batch(tokens[part], targets[part], np.array([0]), 40, CPU) for part in parts]
        assert len(batches) >= 3, "documents and pieces of them"
        grads = torch.autograd.grad(sum(expected(batch, schedule).sum() for batch in batches) / 100, params)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        assert norm > 0.5, "the clipping is exercised"
        lr = 0.3 * 0.5 * (1 + math.cos(math.pi * i / (chunks - 1)))
        with torch.no_grad():
            for param, grad, moment in zip(params, grads, momentum):
                moment.mul_(0.9).add_(grad * (0.5 / norm))
                param.sub_(lr * moment)
    g.GlobalSGD(run, model).learn(text, "1/1")
    for (name, param), want in zip(model.named_parameters(), params):
        assert not param.requires_grad and param.grad is None
        torch.testing.assert_close(param.data, want.data, atol=1e-5, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------------------- the cache


def test_places_that_hold_nothing_yet_are_out_of_sight() -> None:
    run = make_run(ttt_context="cache", ttt_chunk_size=8, ttt_eval_seq_len=32)
    model, documents = make_model(run), g.Documents(make_val(tiny.documents(2, seed=17, shortest=50, longest=60)))
    exact = g.TTTScorer(run, model).score(documents, range(2))
    rounded = g.TTTScorer(run, model)
    rounded.seen_sizes = [rounded.cache.places]  # a GPU rounds up
    for _ in range(2):  # the second time the places hold what the first left there
        for one, other in zip(exact, rounded.score(documents, range(2))):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_cache_is_a_ring_that_never_holds_more_than_the_limit() -> None:
    run = make_run(ttt_context="cache", ttt_chunk_size=8, ttt_eval_seq_len=24)
    cache = g.KVCache(run, documents=2)
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = run.cfg.num_heads, run.cfg.num_kv_heads, run.cfg.head_dim
    stream = [torch.randn(2, 40, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    for begin in range(0, 40, 8):
        q, k, v = (t[:, begin: begin + 8].flatten(0, 1) for t in stream)
        fresh: list[tuple[Tensor, Tensor]] = []
        attend = cache.bind(2, 8, min(begin, 24), fresh)
        out = [attend(visit, q, k, v) for visit in range(len(cache.keys))][-1].unflatten(0, (2, 8))
        cache.store(fresh)
        assert cache.places == 24
        past = slice(max(0, begin + 8 - 24), begin + 8)
        keys, values = (t[:, past].transpose(1, 2) for t in stream[1:])
        mask = torch.ones(8, keys.size(2), dtype=torch.bool).tril(keys.size(2) - 8)
        want = F.scaled_dot_product_attention(stream[0][:, begin: begin + 8].transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)

class Recorded(TorchDispatchMode):
    """A CUDA graph on a CPU: notes the operations under `graph`, which work on the same memory again at every replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        memory = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, made))
        self.calls.append((function, *memory))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            for kept, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs))):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.mark.parametrize("changes", [{}, {"ttt_chunk_doubles_at": "16", "ttt_lora_lr_power": -0.5, "ngram_tilt_enabled": 1}], ids=str)
def test_replayed_steps_score_as_those_that_run(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fake in {"Stream": MagicMock, "current_stream": MagicMock, "stream": nullcontext, "graph_pool_handle": int,
                       "CUDAGraph": Recorded, "graph": lambda graph, **_: graph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    small = {"num_layers": 1, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1, "eval_loop_depth": 2}
    run = make_run(ttt_context="cache", ttt_chunk_size=8, ttt_eval_seq_len=32, ttt_batch_size=4, **small, **changes)
    model, documents = make_model(run), g.Documents(make_val(tiny.documents(7, seed=17, shortest=20, longest=60)))
    if run.cfg.ngram_tilt_enabled:
        g.take_hints(run, documents)
    plain, scorer = (g.TTTScorer(run, model) for _ in range(2))
    scorer.captures, scorer.live_sizes, scorer.seen_sizes = True, [2, 4], [16, 32]
    run.compile = True
    scorer.warm_up()
    run.compile = False
    assert scorer.captured.keys() == set(itertools.product([2, 4], run.cfg.chunk_sizes, [16, 32]))
    monkeypatch.setattr(scorer, "_losses_and_learn", lambda *_, **__: pytest.fail("every step is replayed"))
    for members in (range(4), range(4, 7)):
        for replayed, expected in zip(scorer.score(documents, members), plain.score(documents, members)):
            np.testing.assert_allclose(replayed, expected, atol=1e-5)
