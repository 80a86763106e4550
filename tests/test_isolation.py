"""No token reaches an earlier one or another document, and ranks do not matter: for every setting of the model off its default.

The settings are looped over, so a new one without a row in off_default.py fails here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from off_default import MODEL_SETTINGS, OFF_DEFAULT, settings_of
from torch import Tensor
from ttt_tools import CONTEXTS, make_model, make_run, make_val

import train_gpt as g

SCORERS = ("evaluation", *CONTEXTS)
PLAN = {"TTT_CHUNK_SIZE": 8, "TTT_EVAL_SEQ_LEN": 16, "EVAL_SEQ_LEN": 40, "TTT_BATCH_SIZE": 3, "EVAL_LOOP_DEPTH": 2, "TTT_LORA_RANK": 2,
        "VAL_BATCH_TOKENS": 800}
DOCS = [np.append(1, np.random.default_rng(seed).integers(4, tiny.VOCAB, length)) for seed, length in enumerate((27, 34, 22, 30))]
every_setting = pytest.mark.parametrize("setting", MODEL_SETTINGS)
every_scorer = pytest.mark.parametrize("scorer", SCORERS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def losses(setting: str, scorer: str, docs: list[np.ndarray], ranks: g.Ranks | None = None, **changes: object) -> g.Score:
    """The score of documents as a run computes it, on one rank unless `ranks` says otherwise."""
    context = {} if scorer == "evaluation" else {"TTT_CONTEXT": scorer}
    run = make_run(**{**settings_of(setting), **PLAN, **context, **changes})
    run.ranks = ranks or run.ranks
    model, val = make_model(run), make_val(docs)
    if scorer == "evaluation":
        return g.evaluate(run, model, val, "plain", run.cfg.eval_loop_depth)
    return g.score_with_ttt(run, model, val)


@lru_cache
def unchanged(setting: str, scorer: str) -> np.ndarray:
    """Losses of the documents as they are."""
    return losses(setting, scorer, DOCS).losses


def changed_places(setting: str, scorer: str, document: int, first: int) -> np.ndarray:
    """Targets whose loss is another one to the last bit after the tokens of a document have changed from place `first` on."""
    docs = [d.copy() for d in DOCS]
    docs[document][first:] = 4 + (docs[document][first:] + 9) % (tiny.VOCAB - 4)
    return np.flatnonzero(losses(setting, scorer, docs).losses != unchanged(setting, scorer))


def check_isolation(setting: str, scorer: str) -> None:
    """Tokens that change move the losses of themselves and of what follows in their document, and no others."""
    starts = np.cumsum([0, *map(len, DOCS)])  # the loss of a token stands at the one before it; a document's last is that of the next BOS
    for document, first in ((1, 13), (0, len(DOCS[0]) - 1)):
        expected = np.arange(starts[document] + first - 1, starts[document + 1])
        assert changed_places(setting, scorer, document, first).tolist() == expected.tolist(), (document, first)


@every_scorer
@every_setting
def test_a_token_changes_nothing_before_it_and_nothing_in_other_documents(setting: str, scorer: str) -> None:
    check_isolation(setting, scorer)


def previous_of_the_stream(make_batch: Callable[..., g.Batch]) -> Callable[..., g.Batch]:
    """A make_batch with a leak: the token before the first of a segment is the last of the segment before."""

    def make(tokens: np.ndarray, *rest: Any, **named: Any) -> g.Batch:
        batch = make_batch(tokens, *rest, **named)
        return batch._replace(previous=torch.cat([batch.previous[:1], batch.tokens[:-1]]))

    return make


@every_scorer
def test_a_predecessor_from_another_document_is_noticed(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "make_batch", previous_of_the_stream(g.make_batch))
    unchanged.cache_clear()
    with pytest.raises(AssertionError):
        check_isolation("SMEAR_GATE_ENABLED", scorer)
    unchanged.cache_clear()


def test_a_setting_without_a_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OFF_DEFAULT, "ROPE_BASE")
    with pytest.raises(KeyError):
        check_isolation("ROPE_BASE", "evaluation")


# ----------------------------------------------------------------------------------------- one function, whoever computes it


@pytest.mark.parametrize("context", CONTEXTS)
@every_setting
def test_without_learning_every_target_has_its_plain_score(setting: str, context: str) -> None:
    found = losses(setting, context, DOCS, TTT_LORA_LR=0, TTT_EVAL_SEQ_LEN=40).losses
    np.testing.assert_allclose(found, unchanged(setting, "evaluation"), atol=1e-5)


class ThreadRanks(g.Ranks):
    """One of several ranks that are threads of this process."""

    meeting: threading.Barrier
    table: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.meeting.wait(60)
        values = list(self.table)
        self.meeting.wait(60)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(sum(self.gather(tensor.clone())))


def on_ranks(world: int, function: Callable[[g.Ranks], Any]) -> list[Any]:
    """What `function` returns on each rank."""
    meeting, table = threading.Barrier(world), [None] * world

    def on_rank(rank: int) -> Any:
        ranks = ThreadRanks(rank, world)
        ranks.meeting, ranks.table = meeting, table
        try:
            return function(ranks)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on_rank, range(world)))


@every_scorer
@every_setting
def test_one_rank_and_two_give_the_same_score(setting: str, scorer: str) -> None:
    phases = {"PHASED_TTT_ENABLED": 1, "PHASED_TTT_PREFIX_DOCS": 2, "PHASED_TTT_NUM_PHASES": 1, "PHASED_TTT_LEAVE_OUT": 1,
              "TTT_BATCH_SIZE": 1, "GLOBAL_TTT_CHUNK_TOKENS": 20} if scorer != "evaluation" else {}
    one = losses(setting, scorer, DOCS, **phases)
    two = on_ranks(2, lambda ranks: losses(setting, scorer, DOCS, ranks, **phases))
    assert two[0].nats == two[1].nats == pytest.approx(one.nats, rel=1e-6)
    by_rank = np.stack([score.losses for score in two])
    if scorer != "evaluation":
        assert (np.isnan(by_rank).sum(0) == 1).all(), "every target is scored on one rank"
    np.testing.assert_allclose(np.nanmax(by_rank, 0), one.losses, atol=1e-5)
