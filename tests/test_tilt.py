"""The n-gram tilt: hints as a dictionary gives them, nothing from later text, probabilities that add up to 1."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from off_default import FEW_LAYERS
from test_isolation import on_ranks
from ttt_tools import CONTEXTS, CPU, make_model, make_run, make_val, score_all

import train_gpt as g


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def repetitive(count: int, seed: int, longest: int = 60) -> list[np.ndarray]:
    """Documents in which short passages come again, not always with the same end."""
    rng = np.random.default_rng(seed)
    passages = [rng.integers(4, 9, 6) for _ in range(4)]
    docs = [np.concatenate([passages[rng.integers(4)] for _ in range(12)])[: rng.integers(1, longest)] for _ in range(count)]
    for doc in docs:
        doc[rng.random(len(doc)) < 0.1] = 9
    return [np.append(1, doc) for doc in docs]


def plain_hints(documents: g.Documents, order: int) -> list[tuple[int, int, int, int]]:
    """(entry, top token, its count, occurrences) of every target, by a dictionary."""
    known: dict[tuple[int, ...], tuple[Counter, list[int]]] = {}
    found = []
    for document in range(len(documents)):
        text, start = documents.text(document).tolist(), int(documents.starts[document])
        for place in range(order - 1, len(text)):
            counts, top = known.setdefault(tuple(text[place - order + 1: place]), (Counter(), [0]))
            if counts:
                found.append((start + place, top[0], counts[top[0]], sum(counts.values())))
            counts[text[place]] += 1
            if counts[text[place]] > counts[top[0]]:
                top[0] = text[place]
    return sorted(found)


@pytest.mark.parametrize("order", [2, 3, 5, 16])
def test_hints_are_those_of_a_dictionary(order: int) -> None:
    documents = g.Documents(make_val([*repetitive(60, seed=order), np.array([1]), np.arange(20, 60)[:20]]))
    hints = g.ngram_hints(documents, order)
    assert list(zip(*(a.tolist() for a in hints))) == plain_hints(documents, order)
    assert len(hints.at) > 30


@pytest.mark.parametrize("tokens", [[1, 5], [1], [1, 1, 1]])
def test_a_text_shorter_than_an_n_gram_has_no_hints(tokens: list[int]) -> None:
    assert len(g.ngram_hints(g.Documents(make_val([np.array(tokens)])), 16).at) == 0


def test_a_hash_of_two_contexts_gives_no_hint_from_one_to_the_other() -> None:
    at, keys = np.arange(4), np.zeros(4, np.uint64)
    hints = g.count_followers(at, keys, np.array([[1, 2], [1, 2], [3, 4], [3, 4]]), np.array([7, 8, 9, 9]))
    assert [a.tolist() for a in hints] == [[1, 3], [7, 9], [1, 1], [1, 1]]


def test_the_tilted_distribution_adds_up_to_one_in_float64() -> None:
    log_probs = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    tops, betas = torch.arange(50) % 7, torch.linspace(0, 5, 50, dtype=torch.float64)[:, None]
    hint = -log_probs.gather(1, tops[:, None])
    losses = g.tilted(-log_probs, hint, (torch.arange(200) == tops[:, None]).double(), betas)
    torch.testing.assert_close((-losses).exp().sum(1), torch.ones(50, dtype=torch.float64), atol=1e-13, rtol=0)
    assert torch.equal(losses[0], -log_probs[0]), "no beta, no change, to the last bit"
    assert (losses[1:].gather(1, tops[1:, None]) < hint[1:]).all()


def test_betas_come_by_occurrences_and_share_or_by_the_threshold() -> None:
    hints = g.NgramHints(*np.array([(10, 5, 1, 1), (11, 5, 4, 5), (12, 5, 1, 2), (13, 5, 9, 9), (14, 5, 3, 40), (15, 5, 3, 4)]).T)
    assert hints.betas(g.Config()).tolist() == [2.625, 2.625, 0, 2.625, 0, 0], "4 of 5 pass .8 in float32"
    bins = g.Config(ngram_tilt_betas=tuple(map(float, range(25))))
    assert hints.betas(bins).tolist() == [4, 13, 7, 19, 20, 13]
    with pytest.raises(ValueError, match="25 numbers"):
        make_run(ngram_tilt_betas="1,2")


# ----------------------------------------------------------------------------------------------------------- in a score

TILT = {"ngram_tilt_enabled": 1, "ngram_tilt_order": 4, "ttt_lora_lr": 0.02, "ttt_batch_size": 3, "ttt_chunk_size": 8}


@pytest.mark.parametrize("context", CONTEXTS)
def test_frozen_adapters_give_the_models_own_probabilities_tilted(context: str) -> None:
    run = make_run(**{**TILT, "ttt_lora_lr": 0}, ttt_context=context, ttt_eval_seq_len=80)
    model, val = make_model(run), make_val(repetitive(12, seed=3))
    losses, documents = score_all(run, val, model), g.Documents(val)
    betas, tops = np.zeros(len(val.tokens)), np.zeros(len(val.tokens), int)
    for at, top, count, total in plain_hints(documents, 4):
        betas[at], tops[at] = 2.625 * (count / total >= 0.8 - 1e-9), top
    for document in range(len(documents)):
        text, start = documents.text(document).astype(np.int64), int(documents.starts[document])
        batch = g.make_batch(text[:-1], text[1:], np.array([0]), len(text) - 1, CPU)
        with torch.no_grad():
            own, other = model(batch, g.loop_schedule(run.cfg, 2), also=torch.from_numpy(tops[start + 1: start + len(text)])).double()
        for place, (nll, hint) in enumerate(zip(own.tolist(), other.tolist())):
            beta, hit = betas[start + 1 + place], tops[start + 1 + place] == text[place + 1]
            expected = nll - beta * hit + math.log1p(math.exp(-hint) * math.expm1(beta))
            assert losses[start + place] == pytest.approx(expected, abs=1e-5)
    assert (betas > 0).sum() > 20


@pytest.mark.parametrize("changes", [{}, {"ttt_context": "cache"}, {"ttt_warm_start_a": 1}], ids=str)
def test_later_text_in_scoring_order_changes_no_score_to_the_last_bit(changes: dict[str, object]) -> None:
    run = make_run(**TILT, **changes, phased_ttt_enabled=1, phased_ttt_prefix_docs=4, phased_ttt_num_phases=1, phased_ttt_leave_out=1,
                   global_ttt_lr=0.02, global_ttt_chunk_tokens=64, **FEW_LAYERS)
    val = make_val(repetitive(14, seed=4, longest=70))
    documents, before = g.Documents(val), score_all(run, val)
    assert (before != score_all(g.replace(run, cfg=g.replace(run.cfg, ngram_tilt_enabled=False)), val)).sum() > 20
    for document in (2, 11):
        start, length = int(documents.starts[document]), int(documents.lengths[document])
        at, tokens = length // 2 + 1, val.tokens.copy()
        for later in range(document, len(documents)):
            begin = int(documents.starts[later]) + (at if later == document else 1)
            end = int(documents.starts[later]) + len(documents.text(later)) - (1 if later != int(np.argmax(documents.starts)) else 0)
            tokens[begin:end] = 10 + (tokens[begin:end] + 3) % 40
        after = score_all(run, val._replace(tokens=tokens))
        for earlier in range(document + 1):
            first = int(documents.starts[earlier])
            kept = slice(first, first + (int(documents.lengths[earlier]) if earlier < document else at - 1))
            np.testing.assert_array_equal(after[kept], before[kept])
        assert (after[start + at - 1: start + length - 1] != before[start + at - 1: start + length - 1]).all()


def test_ranks_share_one_set_of_hints() -> None:
    run, val = make_run(**TILT, **FEW_LAYERS), make_val(repetitive(14, seed=5))
    one = score_all(run, val)
    two = on_ranks(2, lambda ranks: g.score_with_ttt(g.replace(run, ranks=ranks), make_model(run), val).losses)
    np.testing.assert_allclose(np.nanmax(two, 0), one, atol=1e-5)


def test_documents_that_repeat_are_scored_better() -> None:
    val = make_val([np.append(1, tiny.documents(1, seed=1, shortest=50, longest=51)[0][1:]) for _ in range(6)])
    plain, tilted = (score_all(make_run(**{**TILT, "ngram_tilt_enabled": on}), val) for on in (0, 1))
    assert tilted[60:].mean() < 0.8 * plain[60:].mean()
