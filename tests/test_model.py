"""Section 5: the forward against a float64 model written from the formulas, and what must not reach across documents."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny
import torch

import train_gpt as tg

CPU = torch.device("cpu")


def config(**changes: object) -> tg.Config:
    return tg.Config.from_env({name: str(value) for name, value in {**tiny.SETTINGS, **changes}.items()})


def random_model(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """Every parameter away from its special initial value."""
    model, generator = tg.GPT(cfg), torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator) / (1 if param.dim() < 3 else param.size(-1) ** 0.5))
    return model


def packed(documents: list[np.ndarray], longest: int = 64) -> tg.Batch:
    tokens = np.concatenate(documents)
    targets = np.append(tokens[1:], tg.BOS_ID)
    starts = tg.segment_starts(tokens, len(tokens), longest)
    return tg.make_batch(tokens, targets, starts, longest, CPU)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_forward_matches_float64_oracle(depth: int) -> None:
    cfg = config()
    model = random_model(cfg)
    documents = tiny.documents(3, seed=5, shortest=3, longest=20)
    batch = packed(documents)
    losses = model(batch, tg.loop_schedule(cfg, depth)).detach()
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    at = 0
    for document in documents:
        rows = slice(at, at + len(document))
        expected = oracle.document_losses(weights, batch.tokens[rows], batch.targets[rows], cfg, depth)
        assert (losses[rows] - expected).abs().max() < 1e-4
        at += len(document)


def test_schedules_are_the_published_ones() -> None:
    cfg = tg.Config()
    assert tg.loop_schedule(cfg, 1) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
    assert tg.loop_schedule(cfg, 3).encoder == (0, 1, 2, 3, 4, 5, 3, 4) and tg.loop_schedule(cfg, 3).visits == 17
    assert tg.loop_schedule(cfg, 4).visits == 20 and tg.num_skips(cfg) == 8


def test_full_size_model_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = tg.GPT(tg.Config())
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(35.99e6, rel=3e-4)
    assert names["qo_bank"] == (22, 512, 512) and names["kv_bank"] == (22, 256, 512) and names["mlp_up_bank"] == (11, 2048, 512)
    assert names["blocks.10.attn.attn_gate_w"] == (8, 512) and names["skip_gates"] == (8, 512)


def test_initial_loss_is_that_of_the_uniform_distribution_over_a_small_embedding() -> None:
    cfg = config()
    model = tg.GPT(cfg)
    model.init_weights(0)
    loss = model(packed(tiny.documents(4, seed=6)), tg.loop_schedule(cfg, 4)).mean()
    assert loss.item() == pytest.approx(np.log(tiny.VOCAB), abs=0.1)


def test_later_tokens_and_other_documents_change_no_earlier_loss_to_the_last_bit() -> None:
    cfg = config()
    model, schedule = random_model(cfg), tg.loop_schedule(cfg, 4)
    documents = tiny.documents(4, seed=7, shortest=30, longest=60)
    before = model(packed(documents), schedule).detach()
    changed = [d.copy() for d in documents]
    changed[1][20:] = 9
    changed[3][1:] = 11
    after = model(packed(changed), schedule).detach()
    first = len(documents[0]) + 19  # the loss at 19 has the changed token 20 as its target
    assert torch.equal(before[:first], after[:first]) and not torch.equal(before[first:], after[first:])
    third = slice(len(documents[0]) + len(documents[1]), sum(map(len, documents[:3])))
    assert torch.equal(before[third], after[third]), "documents before and after do not matter"


def test_gradients_of_one_document_do_not_depend_on_another() -> None:
    cfg = config()
    model, schedule = random_model(cfg), tg.loop_schedule(cfg, 3)
    documents = tiny.documents(2, seed=8, shortest=30, longest=60)
    cut = len(documents[0])

    def gradient(second: np.ndarray) -> torch.Tensor:
        model.zero_grad()
        model(packed([documents[0], second]), schedule)[: cut - 1].sum().backward()
        return model.qo_bank.grad.clone()

    other = documents[1].copy()
    other[1:] = 5
    assert torch.equal(gradient(documents[1]), gradient(other))


@pytest.mark.parametrize("setting", ["SKIP_GATES_ENABLED=0", "LN_SCALE=0", "XSA_LAST_N=3", "GATED_ATTN_ENABLED=0",
                                     "PARALLEL_FINAL_LANE=mlp", "PARALLEL_FINAL_LANE=attn", "PARALLEL_START_LAYER=11",
                                     "LOGIT_SOFTCAP=2", "ROPE_DIMS=0"])
def test_every_model_setting_changes_the_function(setting: str) -> None:
    name, value = setting.split("=")
    cfg, other = config(), config(**{name: value})
    batch, model = packed(tiny.documents(2, seed=9)), random_model(cfg)
    changed = tg.GPT(other)
    changed.load_state_dict({k: v for k, v in model.state_dict().items() if k in changed.state_dict()})
    assert not torch.allclose(model(batch, tg.loop_schedule(cfg, 4)), changed(batch, tg.loop_schedule(other, 4)), atol=1e-4)


def test_one_graph_a_depth_without_breaks() -> None:
    cfg = config()
    model, batch = random_model(cfg), packed(tiny.documents(4, seed=10))
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    for depth in (1, 3):
        schedule = tg.loop_schedule(cfg, depth)
        torch.testing.assert_close(forward(batch, schedule), model(batch, schedule), atol=1e-5, rtol=1e-5)
