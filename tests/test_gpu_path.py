"""What a GPU would run, at the record's size, as shapes and dtypes only: meta tensors, the kernels and the flash attention on."""
from __future__ import annotations

import pytest
import torch

import train_gpt

TOKENS = 98_304


def meta_batch(segments: int) -> train_gpt.Batch:
    """One rank's share of the record's batch."""
    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")
    return train_gpt.Batch(empty(TOKENS, torch.int64), empty(TOKENS, torch.int64), empty(segments, torch.int32),
                           empty(TOKENS, torch.int32), 2048)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_step_of_the_record_in_bfloat16_with_every_kernel(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no variable-length attention")
    dtypes = set()
    varlen = train_gpt.load_varlen()

    def attend(q: torch.Tensor, *rest: object) -> torch.Tensor:
        dtypes.add(q.dtype)
        return varlen(q, *rest)

    monkeypatch.setattr(train_gpt, "attention", attend)
    monkeypatch.setattr(train_gpt, "kernels_take", lambda x: dtypes.add(x.dtype) is None)
    cfg = train_gpt.Config()
    with torch.device("meta"):
        model = train_gpt.GPT(cfg, torch.bfloat16)
    losses = model(meta_batch(128), train_gpt.loop_schedule(cfg, depth))
    losses.mean().backward()
    assert dtypes == {torch.bfloat16}, "no kernel meets float32"
    assert losses.shape == (TOKENS,) and losses.dtype == torch.float32
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.shape == param.shape and param.grad.dtype == torch.float32, name
