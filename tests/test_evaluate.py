"""Section 10: every target once, the tail included, the same figure however the work is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import train_gpt as tg


def setup(data: Path, **changes: object) -> tuple[tg.Run, tg.GPT, tg.ValData]:
    cfg = tg.Config.from_env({k: str(v) for k, v in {**tiny.SETTINGS, "DATA_PATH": data, **changes}.items()})
    model = tg.GPT(cfg)
    model.init_weights(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    return tg.Run(cfg, tg.Ranks(), tg.Log(None, enabled=False)), model, tg.load_val(cfg)


def test_every_target_is_scored_once_and_bytes_add_up(tiny_data: Path) -> None:
    run, model, val = setup(tiny_data)
    score = tg.evaluate(run, model, val, "x", 4)
    assert not np.isnan(score.losses).any() and len(score.losses) == len(val.tokens) - 1
    assert score.nats == pytest.approx(score.losses.sum(dtype=np.float64), rel=1e-12)
    sidecar = np.fromfile(tiny_data / "tiny_val_bytes_000000.bin", "<u2", offset=1024)
    assert score.num_bytes == sidecar.sum(dtype=np.int64)
    assert score.val_bpb == pytest.approx(score.nats / np.log(2) / sidecar.sum(), rel=1e-12)


def test_packed_segments_hold_each_segment_once_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 500)
    batches = tg.pack_segments(lengths, 512)
    assert [i for batch in batches for i in batch] == list(range(500))
    sums = np.array([lengths[batch].sum() for batch in batches])
    assert max(sums) <= 512 and (sums[:-1] + lengths[[batch.start for batch in batches[1:]]] > 512).all(), "as many as fit"


def test_score_does_not_depend_on_batch_size(tiny_data: Path) -> None:
    losses = []
    for tokens in (1024, 8192):
        run, model, val = setup(tiny_data, VAL_BATCH_TOKENS=tokens)
        losses.append(tg.evaluate(run, model, val, "x", 3).losses)
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-5)


def test_losses_are_those_of_each_document_alone(tiny_data: Path) -> None:
    run, model, val = setup(tiny_data)
    losses = tg.evaluate(run, model, val, "x", 4).losses
    starts = val.document_starts()
    for i in (0, 7, len(starts) - 1):
        begin, end = int(starts[i]), int(starts[i + 1]) if i + 1 < len(starts) else len(val.tokens) - 1
        tokens, targets = val.tokens[begin:end], val.tokens[begin + 1: end + 1]
        batch = tg.make_batch(tokens, targets, tg.segment_starts(tokens, len(tokens), 64), 64, torch.device("cpu"))
        with torch.no_grad():
            alone = model(batch, tg.loop_schedule(run.cfg, 4)).numpy()
        np.testing.assert_allclose(losses[begin:end], alone, atol=2e-5)


def test_later_tokens_and_documents_change_no_earlier_score_to_the_last_bit(tiny_data: Path) -> None:
    run, model, val = setup(tiny_data)
    before = tg.evaluate(run, model, val, "x", 4).losses
    cut = int(val.document_starts()[20]) + 9
    tokens = val.tokens.copy()
    tail = tokens[cut + 1:]
    tail[tail != tg.BOS_ID] = 4 + (tail[tail != tg.BOS_ID] + 13) % 60
    after = tg.evaluate(run, model, val._replace(tokens=tokens), "x", 4).losses
    assert np.array_equal(before[:cut], after[:cut]) and not np.array_equal(before[cut:], after[cut:])


def test_wider_context_helps_no_document_beyond_its_segment(tiny_data: Path) -> None:
    """EVAL_SEQ_LEN cuts within documents only, so documents shorter than it are scored the same."""
    short, long = (setup(tiny_data, EVAL_SEQ_LEN=n, VAL_BATCH_TOKENS=4096) for n in (32, 256))
    losses = [tg.evaluate(*s, "x", 1).losses for s in (short, long)]
    assert np.allclose(losses[0][:32], losses[1][:32], atol=1e-5) and not np.allclose(losses[0], losses[1], atol=1e-5)
