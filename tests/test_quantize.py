"""Section 8: GPTQ against a plain one, its promises, and the full-size model through to a file under the cap."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import train_gpt as tg

SILENT = tg.Log(None, enabled=False)


def problem(rows: int = 24, cols: int = 160, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Hessians of inputs that are correlated, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, rows, cols, generator=generator)
    mixing = torch.randn(count, cols, cols, generator=generator) * 0.2 + torch.eye(cols)
    inputs = torch.randn(count, 600, cols, generator=generator) @ mixing
    return weights, inputs.mT @ inputs


def plain_gptq(weight: np.ndarray, hessian: np.ndarray, bits: int, sigmas: float) -> np.ndarray:
    """One matrix in float64, column by column, by the textbook update with the inverse Hessian itself."""
    limit = 2 ** (bits - 1) - 1
    scale = np.float16(sigmas * weight.std(axis=1, ddof=1) / limit).astype(np.float64)
    order = np.argsort(-np.diag(hessian), kind="stable")
    work = weight[:, order].copy()
    damped = hessian[np.ix_(order, order)] + 0.01 * np.diag(hessian).mean() * np.eye(len(order))
    inverse = np.linalg.inv(damped)
    codes = np.zeros_like(work)
    for j in range(work.shape[1]):
        codes[:, j] = np.clip(np.rint(work[:, j] / scale), -limit, limit)
        error = (work[:, j] - codes[:, j] * scale) / inverse[j, j]
        work -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    out = np.zeros_like(codes)
    out[:, order] = codes
    return out


def nearest_codes(weights: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    limit = 2 ** (bits - 1) - 1
    return (weights / steps).round().clamp(-limit, limit)


def test_gptq_matches_the_textbook() -> None:
    weights, hessian = problem()
    found = tg.gptq(weights, hessian, 4, 3.0, SILENT)
    for i in range(len(weights)):
        expected = plain_gptq(weights[i].double().numpy(), hessian[i].double().numpy(), 4, 3.0)
        assert (found.codes[i].numpy() != expected).mean() < 0.005, "all but ties"


def test_gptq_beats_rounding_and_is_never_worse() -> None:
    weights, hessian = problem()
    for bits in (3, 6):
        found = tg.gptq(weights, hessian, bits, 3.0, SILENT)
        steps = found.scales.float()[..., None]
        nearest = nearest_codes(weights, steps, bits) * steps
        ours, theirs = (tg.hessian_error(w - weights, hessian) for w in (tg.dequantize(found), nearest))
        assert (ours < 0.9 * theirs).all()
    diagonal = torch.diag_embed(torch.rand(2, 160) + 0.1)
    found = tg.gptq(weights, diagonal, 6, 12.0, SILENT)
    assert torch.equal(found.codes, nearest_codes(weights, found.scales.float()[..., None], 6).to(torch.int8)), "nothing to make up for"


def test_the_errors_of_columns_are_those_of_the_outputs() -> None:
    """|E L|^2, as gptq_columns adds it up and as rounding to nearest is judged, against trace(E H E^T)."""
    weights, hessian = problem()
    hessian = hessian + 0.01 * torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(-1, 160))
    factor, steps = torch.linalg.cholesky(hessian), tg.row_scales(weights, 4, 3.0, "scalar").float()
    codes, error = tg.gptq_columns(weights.mT.contiguous(), factor, steps, tg.partial(tg.scalar_round, limit=7))
    ours = codes.mT * steps[..., None] - weights
    torch.testing.assert_close(error, tg.hessian_error(ours, hessian), rtol=1e-4, atol=0.0)
    for bound, below in ((1.001, True), (0.999, False)):
        assert (tg.nearest_is_better(ours.mT, factor, bound * error, block=48) == below).all()


def test_many_small_matrices_are_never_worse_than_rounded() -> None:
    """Where columns are few and alike, feedback now and then loses; those matrices are rounded to nearest."""
    generator = torch.Generator().manual_seed(2)
    weights, inputs = torch.randn(2000, 1, 5, generator=generator), torch.randn(2000, 7, 5, generator=generator)
    hessian = (inputs.mT @ inputs) + 0.1 * torch.eye(5)
    found = tg.gptq(weights, hessian, 3, 2.0, SILENT)
    steps = found.scales.float()[..., None]
    nearest = nearest_codes(weights, steps, 3)
    damped = hessian + 0.01 * torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(-1, 5))
    ours, theirs = (tg.hessian_error(codes * steps - weights, damped) for codes in (found.codes, nearest))
    assert (ours <= theirs * (1 + 1e-5)).all() and ours.sum() < 0.8 * theirs.sum()
    assert sum(bool((plain_gptq(w, h, 3, 2.0) != c).any()) for w, h, c in zip(weights.numpy(), hessian.numpy(), found.codes.numpy())) > 20


def test_codes_stay_in_range_and_dead_columns_become_zero() -> None:
    weights, hessian = problem()
    hessian[:, :, 5] = hessian[:, 5, :] = 0
    found = tg.gptq(weights * 100, hessian, 5, 2.0, SILENT)
    assert found.codes.abs().max() == 15 and (found.codes[:, :, 5] == 0).all()


def test_a_hessian_of_too_few_inputs_and_zero_rows_are_no_trouble() -> None:
    weights, _ = problem()
    inputs = torch.randn(2, 3, 160, generator=torch.Generator().manual_seed(1))
    weights[:, 3] = 0
    found = tg.gptq(weights, inputs.mT @ inputs, 6, 12.85, SILENT)
    assert (found.codes[:, 3] == 0).all() and torch.isfinite(tg.dequantize(found)).all()


def test_weights_that_are_not_finite_are_an_error() -> None:
    weights, hessian = problem()
    weights[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        tg.gptq(weights, hessian, 6, 12.0, SILENT)


@pytest.mark.parametrize("columns", [0, 1])
def test_low_rank_terms_are_small_integers_and_take_most_of_what_can_be_taken(columns: int) -> None:
    cfg = tg.Config.from_env({"LQER_ENABLED": "1", "LQER_COLUMN_SCALES": str(columns)})
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(200, 4, generator=generator) * torch.tensor([8.0, 4, 2, 1]), torch.randn(4, 64, generator=generator)]
    error = parts[0] @ parts[1] + 0.1 * torch.randn(200, 64, generator=generator)
    a, b = tg.best_product(error, 4)
    left = (error - a @ b).square().sum()
    assert left == pytest.approx(torch.linalg.svdvals(error)[4:].square().sum().item(), rel=1e-3), "no product is nearer"
    assert (b.gather(1, b.abs().argmax(1, keepdim=True)) > 0).all() and torch.allclose(b @ b.T, torch.eye(4), atol=1e-5)
    other = tg.best_product(-error, 4)
    assert torch.allclose(other[1], b, atol=1e-4) and torch.allclose(other[0], -a, atol=1e-3), "the sign is that of B alone"
    term = tg.LowRank.of(7, a, b, cfg)
    assert term.a.min() >= -2 and term.a.max() <= 1 and term.b.min() >= -8 and term.b.max() <= 7 and term.index == 7
    assert term.a_scales.shape == (4 if columns else 1,) and term.b_scales.shape == (8,)
    expected = (term.a.double() * term.a_scales.double()) @ (
        term.b.double().reshape(8, 32) * term.b_scales.double()[:, None]).reshape(4, 64)
    torch.testing.assert_close(term.product().double(), expected, atol=1e-4, rtol=1e-4)
    assert (error - term.product()).square().sum() < (0.3 if columns else 0.6) * error.square().sum()


def test_the_worst_matrices_get_low_rank_terms_and_the_artifact_keeps_them() -> None:
    settings = {**tiny.SETTINGS, "LQER_ENABLED": 1, "LQER_TOP_K": 3, "LQER_RANK": 2}
    run = tg.Run(tg.Config.from_env({k: str(v) for k, v in settings.items()}), tg.Ranks(), SILENT)
    model = tg.GPT(run.cfg)
    model.init_weights(1)
    with torch.no_grad():
        for i, factor in ((2, 40.0), (5, 20.0)):
            model.mlp_up_bank[i] *= factor
    tensors, _ = tg.quantize(run, model, {name: torch.eye(h.size(-1)).expand_as(h).clone()
                                          for name, h in tg.Calibration(run.cfg, run.device).hessians.items()})
    assert [term.index for term in tensors["mlp_up_bank"].low_rank][:2] == [2, 5]
    assert sum(len(t.low_rank) for t in tensors.values() if isinstance(t, tg.Quantized)) == 3
    plain = tg.dequantize(tg.replace(tensors["mlp_up_bank"], low_rank=()))
    for i in (2, 5):
        worse, better = ((w[i] - model.mlp_up_bank[i]).square().sum() for w in (plain, tg.dequantize(tensors["mlp_up_bank"])))
        assert better < 0.97 * worse
    data = tg.pack_artifact(tensors, run.cfg)
    loaded = tg.model_from_tensors(run, tg.unpack_artifact(data)[1])
    assert torch.equal(loaded.mlp_up_bank, tg.dequantize(tensors["mlp_up_bank"]))
    small = tensors["mlp_up_bank"].low_rank[0]._replace(a=torch.zeros(3, 2, dtype=torch.int8))
    without = tg.replace(tensors["mlp_up_bank"], low_rank=(small,))
    with pytest.raises(tg.ArtifactError, match="does not hold this model"):
        tg.unpack_artifact(tg.pack_artifact({**tensors, "mlp_up_bank": without}, run.cfg))
    with pytest.raises(tg.ArtifactError, match="more than its model"):
        tg.unpack_artifact(tg.pack_artifact(tensors, tg.replace(run.cfg, lqer_enabled=False)))


def test_a_damped_embedding_is_nearer_to_its_rows_and_farther_by_its_outputs() -> None:
    errors, undamped = [], {}
    for damping in (0, 0.5):
        run = tg.Run(tg.Config.from_env({k: str(v) for k, v in {**tiny.SETTINGS, "EMBED_DAMPING": damping}.items()}), tg.Ranks(), SILENT)
        model = tg.GPT(run.cfg)
        model.init_weights(2)
        stream = [np.concatenate(tiny.documents(40, seed=1))]
        hessians = tg.collect_hessians(run, model, tg.TrainLoader(stream, run.cfg, run.ranks))
        undamped = undamped if damping else {name: h.clone() for name, h in hessians.items()}
        assert [name for name in hessians if not torch.equal(hessians[name], undamped[name])] == ["head"] * bool(damping)
        error = tg.dequantize(tg.quantize(run, model, hessians)[0]["tok_emb.weight"]) - model.tok_emb.weight.detach()
        errors.append([error.square().sum().item(), tg.hessian_error(error[None], undamped["head"]).item()])
    assert errors[1][0] < errors[0][0] and errors[1][1] > errors[0][1]


def test_hessians_add_up_over_visits() -> None:
    cfg = tg.Config.from_env({k: str(v) for k, v in tiny.SETTINGS.items()})
    calibration = tg.Calibration(cfg, torch.device("cpu"))
    x, w = torch.randn(10, 32), torch.randn(32, 32)
    for visit in (3, 6):
        assert torch.equal(calibration((4, visit, "attn_in"), x, w), x @ w.T)
    torch.testing.assert_close(calibration.hessians["attn_in"][4], 2 * x.T @ x)
    assert calibration((4, 3, "o"), x, None) is None and calibration.hessians["proj"].abs().sum() == 0


def test_small_run_quantizes_every_tensor_as_promised(one_rank) -> None:
    config, tensors = tg.unpack_artifact((one_rank.out / "run.artifact").read_bytes())
    assert config.model_dim == 32
    assert isinstance(tensors["qo_bank"], tg.Quantized) and isinstance(tensors["blocks.3.attn.attn_gate_w"], tg.Quantized)
    assert tensors["tok_emb.weight"].codes.abs().max() <= 63 and tensors["mlp_up_bank"].codes.abs().max() <= 31
    assert tensors["skip_weights"].dtype == torch.float16


def test_full_size_model_trains_a_step_and_fits_the_cap() -> None:
    """The record's model on a tiny batch: a step, Hessians, GPTQ, the file, and the file read back."""
    cfg = tg.Config.from_env({"TRAIN_BATCH_TOKENS": "128", "MICRO_BATCH_TOKENS": "128", "GPTQ_CALIBRATION_BATCHES": "1",
                              "COMPRESSOR": "rans"})
    run = tg.Run(cfg, tg.Ranks(), SILENT)
    model = tg.GPT(cfg)
    model.init_weights(0)
    stream = [np.append(1, np.random.default_rng(0).integers(4, 8192, 4000))]
    loader = tg.TrainLoader(stream, cfg, run.ranks)
    trainer = tg.Trainer(run, model, loader)
    first = trainer.train_step(4, 1.0)
    assert first.item() == pytest.approx(np.log(8192), abs=0.1)
    tensors, _ = tg.quantize(run, model, tg.collect_hessians(run, model, loader))
    data = tg.pack_artifact(tensors, cfg)
    assert 11_000_000 < len(data) < tg.ARTIFACT_CAP_BYTES  # rows still orthogonal, as they start, can be guessed from those before
    loaded = tg.model_from_tensors(run, tg.unpack_artifact(data)[1])
    batch = loader.next()[0]
    with torch.no_grad():
        ours, theirs = (m(batch, tg.loop_schedule(cfg, 4)).mean().item() for m in (model, loaded))
    assert ours == pytest.approx(theirs, abs=0.1)
