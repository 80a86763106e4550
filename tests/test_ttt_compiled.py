"""The step of test-time training lowered by Inductor, which chooses the layout of its gradients and what it compiles again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._inductor.config
from ttt_tools import CONTEXTS, make_model, make_run, make_val

import train_gpt

ONE_LAYER = {"NUM_LAYERS": 1, "LOOP_START": 0, "LOOP_END": 0, "PARALLEL_START_LAYER": 1, "XSA_LAST_N": 1, "NUM_LOOPS": 0,
             "EVAL_LOOP_DEPTH": 1, "TTT_BATCH_SIZE": 4, "MODEL_DIM": 16, "NUM_HEADS": 2}


# Vectorised, torch 2.13's C++ masks a cache's keys wrongly on some CPUs; the compiler's cache on disk may hold it so from before.
@torch._inductor.config.patch({"cpp.simdlen": 1, "force_disable_caches": True})
@pytest.mark.parametrize("context", CONTEXTS)
def test_ttt_lowered_by_inductor_scores_as_eager_with_gradients_laid_out_as_the_parameters(
        context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    changes = {**ONE_LAYER, "TTT_CONTEXT": context, "TTT_LORA_RANK": 2, "TTT_CHUNK_SIZE": 8, "TTT_EVAL_SEQ_LEN": 24}
    eager, run = (make_run(compile, **changes) for compile in (False, True))
    layouts: list[tuple[tuple[int, ...], ...]] = []
    adamw = train_gpt.fused_adamw

    def watched(params: list[torch.Tensor], grads: list[torch.Tensor], *rest: object, **named: object) -> None:
        layouts.extend((p.stride(), g.stride()) for p, g in zip(params, grads))
        adamw(params, grads, *rest, **named)

    monkeypatch.setattr(train_gpt, "fused_adamw", watched)
    model = make_model(run)
    scorer, plain = (train_gpt.TTTScorer(r, model) for r in (run, eager))
    scorer.warm_up()
    graphs = train_gpt.graphs_made(run)
    assert 2 <= graphs <= 4, "for steps that learn and for those that only score"
    for lengths in ([40, 30, 20, 7], [100, 8, 8, 8], [33, 3], [9], [1]):
        docs = [np.append(1, np.arange(n - 1) % 50 + 5) for n in lengths] + [np.array([1])]
        texts = train_gpt.Documents(make_val(docs))
        for one, other in zip(*(s.score(texts, range(len(lengths))) for s in (scorer, plain))):
            np.testing.assert_allclose(one, other, atol=5e-5)
    assert layouts and all(param == grad for param, grad in layouts)
    assert not torch._dynamo.utils.counters["graph_break"]
    if context == "window":  # in a cache, a CPU looks at just the filled places; on a GPU its few steps are captured beforehand
        assert train_gpt.graphs_made(run) == graphs
