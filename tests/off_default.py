"""Every setting of the model at a value off its default, for a small model of few layers."""

from __future__ import annotations

from dataclasses import fields

import tiny

import train_gpt as g

# a looped layer, skips, both kinds of block, and few enough visits for a test of each setting
FEW_LAYERS = {"NUM_LAYERS": 4, "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_START_LAYER": 3, "XSA_LAST_N": 4}
OFF_DEFAULT = {
    "CASEOPS_VERSION": {"CASEOPS_VERSION": "lossless_caps_caseops_v2"},
    "VOCAB_SIZE": {"VOCAB_SIZE": 81}, "NUM_LAYERS": {"NUM_LAYERS": 5}, "MODEL_DIM": {"MODEL_DIM": 48}, "NUM_HEADS": {"NUM_HEADS": 2},
    "NUM_KV_HEADS": {"NUM_KV_HEADS": 1}, "MLP_MULT": {"MLP_MULT": 3}, "XSA_LAST_N": {"XSA_LAST_N": 2}, "ROPE_BASE": {"ROPE_BASE": 50},
    "ROPE_DIMS": {"ROPE_DIMS": 2}, "LOGIT_SOFTCAP": {"LOGIT_SOFTCAP": 5}, "LN_SCALE": {"LN_SCALE": 0},
    "SKIP_GATES_ENABLED": {"SKIP_GATES_ENABLED": 0}, "NUM_LOOPS": {"NUM_LOOPS": 0}, "LOOP_START": {"LOOP_START": 0},
    "LOOP_END": {"LOOP_END": 2}, "PARALLEL_START_LAYER": {"PARALLEL_START_LAYER": 2}, "PARALLEL_FINAL_LANE": {"PARALLEL_FINAL_LANE": "mlp"},
    "GATED_ATTN_ENABLED": {"GATED_ATTN_ENABLED": 0}, "GATED_ATTN_QUANT_GATE": {"GATED_ATTN_QUANT_GATE": 0},
    "SMEAR_GATE_ENABLED": {"SMEAR_GATE_ENABLED": 1}, "GATE_WINDOW": {"SMEAR_GATE_ENABLED": 1, "GATE_WINDOW": 5},
    "SPARSE_ATTN_GATE_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": 1}, "MLP_GATE_ENABLED": {"MLP_GATE_ENABLED": 1},
    "SPARSE_ATTN_GATE_SCALE": {"SPARSE_ATTN_GATE_ENABLED": 1, "SPARSE_ATTN_GATE_SCALE": 2.5},
    "QUANTIZER": {"QUANTIZER": "trellis"}, "LQER_ENABLED": {"LQER_ENABLED": 1}, "LQER_RANK": {"LQER_ENABLED": 1, "LQER_RANK": 2},
    "LQER_GROUP": {"LQER_ENABLED": 1, "LQER_GROUP": 16}, "LQER_COLUMN_SCALES": {"LQER_ENABLED": 1, "LQER_COLUMN_SCALES": 0},
}
MODEL_SETTINGS = [f.name.upper() for f in fields(g.Config) if f.metadata["model"]]


def settings_of(name: str) -> dict[str, object]:
    """The settings of a run with few layers and `name` off its default; an error for a setting of the model without a row above."""
    changed = OFF_DEFAULT[name]
    small = {**tiny.SETTINGS, **FEW_LAYERS}
    cfg, unlike = (g.Config.from_env({key: str(value) for key, value in {**small, **more}.items()}) for more in (changed, {}))
    assert getattr(cfg, name.lower()) not in (getattr(g.Config(), name.lower()), getattr(unlike, name.lower())), f"{name} is not changed"
    return {**FEW_LAYERS, **changed}
