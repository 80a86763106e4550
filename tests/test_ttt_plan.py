"""The plan of test-time training: every document once, no wasted work, balanced ranks, the published phases, any number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from off_default import FEW_LAYERS
from test_isolation import on_ranks
from ttt_tools import CONTEXTS, make_model, make_run, make_val, quantized

import train_gpt as g

RECORD = g.Config()
WORLDS = (1, 2, 3, 8)


def heavy_tailed(count: int) -> np.ndarray:
    """Lengths of documents, descending: the quantiles of a log-normal distribution, like the web's (mean 997, longest 59,360 of 50,000)."""
    normal = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return np.sort(torch.exp(6.3 + 1.1 * normal).long().numpy())[::-1]


LENGTHS = heavy_tailed(50_000)


def scored_by(plan: g.PhasePlan) -> int:
    """Documents that are scored when the plan has ended."""
    return plan.batches[-1].stop


def window_tokens(lengths: np.ndarray) -> np.ndarray:
    """Tokens that the record's steps forward for a batch of documents, step by step: the longest one's windows for all that go on."""
    ends = np.arange(48, lengths[0] + 48, 48)
    return np.minimum(ends, 2048) * (lengths[:, None] > ends - 48).sum(0)


def needed_tokens(lengths: np.ndarray) -> int:
    """Tokens that scoring the documents one by one forwards: each chunk's window, no longer than the document."""
    ends = np.arange(48, lengths.max() + 48, 48)
    windows = np.append(0, np.cumsum(np.minimum(ends, 2048)))
    whole = (lengths - 1) // 48  # chunks before the last one
    return int((windows[whole] + np.minimum(lengths, 2048)).sum())


@pytest.mark.parametrize("world", WORLDS)
def test_every_document_is_in_one_batch_and_every_batch_on_one_rank(world: int) -> None:
    plans = g.plan_ttt(RECORD, LENGTHS, world)
    assert [d for plan in plans for batch in plan.batches for d in batch] == list(range(50_000))
    for plan in plans:
        assert max(map(len, plan.batches)) <= RECORD.ttt_batch_size
        assert len(plan.ranks) == world and sorted(sum(plan.ranks, ())) == list(range(len(plan.batches)))


def test_eight_ranks_are_balanced_within_three_percent_by_seconds_reckoned_anew() -> None:
    for plan in g.plan_ttt(RECORD, LENGTHS, 8):
        seconds = []
        for batches in plan.ranks:
            steps = [window_tokens(LENGTHS[plan.batches[b].start: plan.batches[b].stop]) for b in batches]
            seconds.append(sum(s.sum() / 411_000 + 0.012 * len(s) for s in steps))
        assert plan.seconds == pytest.approx(seconds, rel=1e-9)
        assert max(seconds) / np.mean(seconds) < 1.03


def test_padded_work_is_below_two_percent() -> None:
    batches = [batch for plan in g.plan_ttt(RECORD, LENGTHS, 8) for batch in plan.batches]
    made = sum(int(window_tokens(LENGTHS[b.start: b.stop]).sum()) for b in batches)
    assert 1 <= made / needed_tokens(LENGTHS) < 1.02


def test_a_rank_forwards_the_tokens_that_the_plan_reckons(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {name: getattr(RECORD, name.lower()) for name in ("TTT_CHUNK_SIZE", "TTT_EVAL_SEQ_LEN", "TTT_BATCH_SIZE")}
    run = make_run(**record, ttt_lora_rank=1, num_layers=1, loop_start=0, loop_end=0, parallel_start_layer=1)
    lengths = heavy_tailed(60)
    documents = g.Documents(make_val([np.append(1, np.full(n, 5)) for n in lengths[::-1] - 1] + [np.array([1])]))
    assert documents.lengths[:60].tolist() == lengths.tolist()
    scorer = g.TTTScorer(run, make_model(run))
    monkeypatch.setattr(scorer, "_step", lambda chunk, live, begin, trains: torch.zeros(live, run.cfg.ttt_chunk_size))
    reckoned = 0
    for plan in g.plan_ttt(run.cfg, lengths, 4):
        for batch in plan.batches:
            scorer.score(documents, batch)
            reckoned += int(window_tokens(lengths[batch.start: batch.stop]).sum())
    assert 0.995 * reckoned < scorer.forwarded <= reckoned
    assert 1 <= scorer.forwarded / needed_tokens(lengths) < 1.02


def test_the_longest_documents_are_in_a_small_batch_and_the_next_ones_on_other_ranks() -> None:
    plan = g.plan_ttt(RECORD, LENGTHS, 8)[0]
    assert len(plan.batches[0]) < 64, "their steps are many, so they share them with few"
    assert len({rank for rank, batches in enumerate(plan.ranks) for b in batches if b < 4}) == 4


# ---------------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("changes", [{}, {"ttt_context": "cache", "ttt_chunk_size": 16}], ids=str)
def test_the_plan_is_a_function_of_lengths_and_settings_and_the_phases_do_not_depend_on_ranks(changes: dict[str, object]) -> None:
    cfg = g.replace(RECORD, **changes)
    before = LENGTHS.copy()
    plans = {world: g.plan_ttt(cfg, LENGTHS, world) for world in WORLDS}
    assert g.plan_ttt(cfg, before, 8) == plans[8] and np.array_equal(before, LENGTHS)
    assert all([(scored_by(p), p.learns) for p in plans[world]] == [(scored_by(p), p.learns) for p in plans[1]] for world in WORLDS)


def test_the_record_learns_from_the_shortest_of_what_is_scored_and_leaves_the_longest_out() -> None:
    plans = g.plan_ttt(RECORD, LENGTHS, 8)
    assert len(plans) == 4 and len(plans[-1].learns) == 0
    for plan, learned in zip(plans, (666, 1333, 2000)):
        scored = scored_by(plan)
        assert (50_000 - scored) % 64 == 0, "whole batches, cut from the short end, are left"
        assert list(plan.learns) == list(range(scored - 1, scored - 1 - learned, -1))
        assert (np.diff(LENGTHS[plan.learns.start: plan.learns.stop: -1]) >= 0).all(), "from short to long"
        assert 0 <= scored - learned - RECORD.phased_ttt_leave_out < 64


@pytest.mark.parametrize(("leave_out", "count", "expected"), [
    (0, 50, [(6, 6), (14, 13), (22, 20)]), (3, 50, [(10, 6), (18, 13), (26, 20)]), (0, 10, [(6, 6)]), (50, 50, [])])
def test_a_pause_comes_with_the_first_whole_batch_at_which_enough_is_scored(
        leave_out: int, count: int, expected: list[tuple[int, int]]) -> None:
    cfg = make_run(phased_ttt_enabled=1, phased_ttt_prefix_docs=20, phased_ttt_num_phases=3, phased_ttt_leave_out=leave_out,
                   ttt_batch_size=4).cfg
    for settings, pauses in ((cfg, expected), (g.replace(cfg, phased_ttt_enabled=False), [])):
        plans = g.plan_ttt(settings, np.full(count, 9), 2)
        assert [(scored_by(plan), len(plan.learns)) for plan in plans] == [*pauses, (count, 0)]


def test_the_global_sgd_is_given_those_documents_with_the_bos_behind_each(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(phased_ttt_enabled=1, phased_ttt_prefix_docs=6, phased_ttt_num_phases=2, phased_ttt_leave_out=1, ttt_batch_size=2)
    docs = [np.append(1, np.full(n, 4 + n)) for n in (3, 9, 5, 12, 7, 4, 10, 6, 8, 11)]
    learned: list[tuple[list[int], str]] = []
    monkeypatch.setattr(g.GlobalSGD, "learn", lambda self, text, phase: learned.append((text.tolist(), phase)) or 0.0)
    g.score_with_ttt(run, make_model(run), make_val(docs))
    in_order = {n: [1, *[4 + n] * n, *([1] if n != 11 else [])] for n in range(3, 13)}  # the one of 11 is the last in the data
    assert learned == [(sum((in_order[n] for n in (9, 11, 10)), []), "1/2"), (sum((in_order[n] for n in (5, 6, 7, 8, 9, 11)), []), "2/2")]


# ----------------------------------------------------------------------------------------------------------------- lanes


def lanes_of(plan: g.PhasePlan) -> set[tuple[int, ...]]:
    """The runs of batches, each with the A of the one before it."""
    found: list[list[int]] = []
    for index in itertools.chain(*plan.ranks):
        if index in plan.warm:
            found[-1].append(index)
        else:
            found.append([index])
    return set(map(tuple, found))


def test_lanes_of_whole_batches_do_not_depend_on_the_ranks() -> None:
    cfg = g.replace(RECORD, ttt_warm_start_a=True, ttt_short_chunks=(256, 8, 2000, 24))
    plans = {world: g.plan_ttt(cfg, LENGTHS, world) for world in (*WORLDS, 11)}
    for world, phases in plans.items():
        assert len(phases) == 4
        for plan, alone in zip(phases, plans[1]):
            assert (plan.learns, plan.batches, plan.warm) == (alone.learns, alone.batches, alone.warm)
            assert lanes_of(plan) == lanes_of(alone) and all(list(lane) == sorted(lane) for lane in lanes_of(plan))
            assert sorted(itertools.chain(*plan.ranks)) == list(range(len(plan.batches))) and len(plan.ranks) == world
    sizes = [len(batch) for plan in plans[1] for batch in plan.batches]
    assert sizes == [50_000 % 64] + [64] * (50_000 // 64), "the odd batch is the one of the longest"
    assert len(lanes_of(plans[1][0])) == 9 and len(lanes_of(plans[1][3])) == 8, "the odd batch leaves no A to the next in its lane"
    assert max(plans[8][3].seconds) / np.mean(plans[8][3].seconds) < 1.01


def test_a_batch_has_the_chunk_of_its_longest_document_with_both_bos() -> None:
    cfg = g.replace(RECORD, ttt_short_chunks=(13, 2, 27, 3))
    assert g.chunk_bounds(cfg, 12) == list(range(0, 13, 2)) and g.chunk_bounds(cfg, 13) == [0, 3, 6, 9, 12, 15]
    assert g.chunk_bounds(cfg, 26)[1] == 3 and g.chunk_bounds(cfg, 27) == [0, 48]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_warm_a_gives_one_score_on_one_two_three_and_eight_ranks(context: str) -> None:
    short = {"ttt_short_chunks": "24,4"} if context == "window" else {}
    run = make_run(ttt_context=context, ttt_warm_start_a=1, ttt_batch_size=2, ttt_chunk_size=8, ttt_eval_seq_len=24, ttt_lora_lr=0.01,
                   phased_ttt_enabled=1, phased_ttt_prefix_docs=5, phased_ttt_num_phases=1, phased_ttt_leave_out=2, global_ttt_lr=0.02,
                   global_ttt_chunk_tokens=64, eval_loop_depth=1, **FEW_LAYERS, **short)
    val = make_val(tiny.documents(41, seed=19, shortest=8, longest=32))

    def score(ranks: g.Ranks) -> g.Score:
        return g.score_with_ttt(g.replace(run, ranks=ranks), make_model(run), val)

    one = score(g.Ranks())
    for world in WORLDS[1:] if context == "window" else (3,):
        by_rank = on_ranks(world, score)
        np.testing.assert_allclose(np.nanmax([s.losses for s in by_rank], 0), one.losses, atol=1e-5)
        assert [s.nats for s in by_rank] == pytest.approx([one.nats] * world, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("context", "ranks"), list(zip(CONTEXTS, (2, 3))))
def test_processes_that_share_the_work_give_the_score_of_one(context: str, ranks: int, tmp_path: Path) -> None:
    changes = {"ttt_context": context, "phased_ttt_enabled": 1, "phased_ttt_prefix_docs": 9, "phased_ttt_num_phases": 3,
               "phased_ttt_leave_out": 2, "global_ttt_lr": 0.02,
               "global_ttt_chunk_tokens": 32, "ttt_batch_size": 3, "eval_loop_depth": 2, "num_layers": 6}
    data = tiny.write_dataset(tmp_path / "data", val_docs=16)
    run = make_run(**changes, data_path=data)
    tensors = quantized(run)
    (tmp_path / "model.artifact").write_bytes(g.pack_artifact(tensors, run.cfg))
    one = g.score_with_ttt(run, g.model_from_tensors(run, tensors), g.load_val(run.cfg))
    done = tiny.run(tiny.environment(data, tmp_path, RUN_ID="model", EVAL_ONLY=1, **{k.upper(): v for k, v in changes.items()}), ranks)
    assert done.returncode == 0, done.stderr + done.stdout
    assert float(tiny.records(done.stdout, "final")[0]["val_bpb"]) == pytest.approx(one.val_bpb, abs=1e-6)
    assert len(tiny.records(done.stdout, "ttt_sgd")) == 3, "the phases took part"
    assert tiny.records(done.stdout, "ttt_work")[0]["context"] == context
