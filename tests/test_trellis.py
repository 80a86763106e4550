"""The trellis inside GPTQ: the best path there is, readable from the codes alone, fewer bytes at the same error; and the
search that fills a target size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch

import train_gpt as tg

SILENT = tg.Log(None, enabled=False)


def read_quantizers(codes: np.ndarray) -> np.ndarray:
    """Quantizers of one column by a plain loop over the shift register."""
    state, found = 0, []
    for code in codes.tolist():
        found.append(state & 1)
        state = (state >> 1) ^ (tg.TRELLIS_TAPS[0] * (code & 1)) ^ (tg.TRELLIS_TAPS[1] * (state & 1))
    return np.array(found)


def entropy(codes: torch.Tensor, quantizers: torch.Tensor | int = 0) -> float:
    """Bits a code with one frequency table a quantizer."""
    joint = np.bincount((codes.int() + 128 + 256 * quantizers).ravel().numpy(), minlength=512).reshape(2, 256)
    return tg.entropy_bits(joint) / codes.numel()


def test_every_state_is_entered_twice_and_both_quantizers_are_left_by_either_parity() -> None:
    following = tg.trellis_next_states()
    assert (torch.bincount(following.ravel()) == 2).all() and len(following) == tg.TRELLIS_STATES
    assert (following[:, 0] != following[:, 1]).all()


def test_search_finds_the_nearest_of_all_paths() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 3
    codes, levels = tg.trellis_search(values)
    for lane in range(3):
        best = np.inf
        for path in itertools.product(range(-4, 5), repeat=4):
            quantizers = read_quantizers(np.array(path))
            found = tg.trellis_levels(np.array(path), quantizers)
            price = tg.TRELLIS_ZERO_COST * ((np.array(path) == 0) & (quantizers == 1)).sum()
            best = min(best, float(((found - values[:, lane].numpy()) ** 2).sum() + price))
        own = read_quantizers(codes[:, lane].int().numpy())
        price = tg.TRELLIS_ZERO_COST * float(((codes[:, lane] == 0) & torch.from_numpy(own == 1)).sum())
        assert float((levels[:, lane] - values[:, lane]).square().sum()) + price == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 600, 3), (2, 130, 5), (1, 1, 4), (1, 4097, 2)])
def test_levels_follow_from_the_codes_alone(shape: tuple[int, int, int]) -> None:
    matrices, rows, cols = shape
    values = torch.randn(matrices, rows, cols, generator=torch.Generator().manual_seed(1)) * 4
    segments = tg.trellis_segments(rows, cols)
    found = [tg.trellis_round(matrix.T, segments) for matrix in values]
    codes = torch.stack([c.T for c, _ in found])
    quantizers = tg.trellis_quantizers(codes.to(torch.int8))
    assert torch.equal(tg.trellis_levels(codes, quantizers), torch.stack([level.T for _, level in found]))
    plain = read_quantizers(codes[0, ::segments, 0].int().numpy())
    assert (quantizers[0, ::segments, 0].numpy() == plain).all()
    assert (tg.trellis_levels(codes, quantizers) - values).abs().mean() < 1


def test_a_column_does_not_depend_on_its_neighbours() -> None:
    values = torch.randn(7, 300, generator=torch.Generator().manual_seed(2)) * 4
    together = tg.trellis_round(values, 2)[0]
    alone = torch.cat([tg.trellis_round(column[None], 2)[0] for column in values])
    assert torch.equal(together, alone)


def test_a_gaussian_takes_the_same_bits_as_scalar_codes_with_a_fifth_less_error() -> None:
    weights = torch.randn(1, 512, 96, generator=torch.Generator().manual_seed(3))
    identity = torch.eye(96)[None]
    results = {}
    for quantizer in ("scalar", "trellis"):
        found = tg.gptq(weights, identity, 6, 12.85, SILENT, quantizer)
        quantizers = tg.trellis_quantizers(found.codes) if quantizer == "trellis" else 0
        results[quantizer] = entropy(found.codes, quantizers), (tg.dequantize(found) - weights).square().mean().item()
    assert results["trellis"][0] <= results["scalar"][0] + 0.01
    assert results["trellis"][1] < 0.8 * results["scalar"][1]


def test_gptq_with_the_trellis_has_less_error_in_the_hessian_norm_at_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 256, 96, generator=generator)
    inputs = torch.randn(2, 600, 96, generator=generator) @ (torch.randn(2, 96, 96, generator=generator) * 0.2 + torch.eye(96))
    hessian = inputs.mT @ inputs
    found = {quantizer: tg.gptq(weights, hessian, 6, 12.85, SILENT, quantizer) for quantizer in ("scalar", "trellis")}
    errors = {name: tg.hessian_error(tg.dequantize(q) - weights, hessian) for name, q in found.items()}
    sizes = {name: sum(map(len, tg.encode_codes([tg.Bank(q.codes.numpy(), name == "trellis")]))) for name, q in found.items()}
    assert (errors["trellis"] < 0.85 * errors["scalar"]).all()
    assert sizes["trellis"] < 1.005 * sizes["scalar"]


def test_zero_weights_and_dead_columns_stay_zero() -> None:
    weights = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(5))
    hessian = torch.eye(8)[None].clone()
    hessian[0, 3, 3] = 0
    found = tg.gptq(weights, hessian, 6, 12.0, SILENT, "trellis")
    assert (found.codes[..., 3] == 0).all() and (tg.dequantize(found)[..., 3] == 0).all()
    assert (tg.gptq(torch.zeros(1, 64, 8), hessian, 6, 12.0, SILENT, "trellis").codes == 0).all()


def test_outliers_are_not_clipped_beyond_the_range_of_a_code() -> None:
    weights = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(6))
    weights[0, 5, 7] = 1000.0
    found = tg.gptq(weights, torch.eye(256)[None], 6, 2.0, SILENT, "trellis")
    assert found.codes.abs().max() <= 127 and torch.isfinite(tg.dequantize(found)).all()


def model_and_hessians(**changes: object) -> tuple[tg.Run, tg.GPT, dict[str, torch.Tensor]]:
    """A model of 200,000 weights with nothing special in them."""
    settings = {**tiny.SETTINGS, "COMPRESSOR": "rans", "VOCAB_SIZE": 512, "MODEL_DIM": 64, **changes}
    cfg = tg.Config.from_env({name: str(value) for name, value in settings.items()})
    model = tg.GPT(cfg)
    model.init_weights(0)
    for bank in (model.qo_bank, model.mlp_down_bank):
        torch.nn.init.normal_(bank, std=0.02, generator=torch.Generator().manual_seed(0))
    shapes = tg.Calibration(cfg, torch.device("cpu")).hessians
    hessians = {name: torch.eye(h.shape[-1]).expand(h.shape) for name, h in shapes.items()}
    return tg.Run(cfg, tg.Ranks(), SILENT), model, hessians


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
def test_the_target_size_is_filled_and_not_passed(quantizer: str) -> None:
    run, model, hessians = model_and_hessians(QUANTIZER=quantizer, ARTIFACT_TARGET_BYTES=300_000)
    for code_bytes in (110_000, 125_000) if quantizer == "scalar" else (115_000,):
        data = tg.quantize_and_pack(run, model, hessians, code_bytes)[1]
        assert 0.997 * 300_000 <= len(data) + code_bytes <= 300_000


def test_without_a_target_only_an_artifact_over_the_cap_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    run, model, hessians = model_and_hessians()
    as_set = tg.quantize_and_pack(run, model, hessians, code_bytes=1000)[1]
    cap = len(as_set) + 500
    monkeypatch.setattr(tg, "ARTIFACT_CAP_BYTES", cap)
    assert tg.quantize_and_pack(run, model, hessians, code_bytes=400)[1] == as_set
    fitted = tg.quantize_and_pack(run, model, hessians, code_bytes=1000)[1]
    assert 0.997 * cap <= len(fitted) + 1000 <= cap
