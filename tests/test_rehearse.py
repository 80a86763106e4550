"""The plan of a whole run against the published logs, and the null device's reading of launches. No GPU, no null device.

The published validation set's document lengths are not in the repository: a file of them (bench/rehearse.py's --lengths) may be named
in REHEARSE_LENGTHS; without it they are made up by a formula of the same count, mean and tail.
"""
from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import null_hopper  # noqa: E402
import reckon  # noqa: E402
import rehearse  # noqa: E402
import train_gpt  # noqa: E402

LENGTHS_FILE = os.environ.get("REHEARSE_LENGTHS")
CACHED = ROOT / "records/track_non_record_16mb/2026-11-24_CachedTTT/record.env"


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return reckon.read_lengths(Path(LENGTHS_FILE)) if LENGTHS_FILE else reckon.made_up_lengths()


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    """The words of the plan command's last line."""
    source = ["--lengths", LENGTHS_FILE] if LENGTHS_FILE else []
    assert rehearse.main(["plan", *source, *arguments]) in (0, 3)
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[0] == "plan"
    return {name: int(value) for name, value in (word.split(":") for word in words[1:])}


@pytest.mark.parametrize("name", ["2026-11-25_BestAccepted", "2026-11-25_Ours"])
def test_the_configurations_fit_their_clocks_and_an_h100(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--gpus", "8", "--env", str(ROOT / "records/track_10min_16mb" / name / "record.env"))
    assert found["train_ms"] + found["hessians_ms"] < 600_000 and found["eval_ms"] < 500_000
    assert found["peak_mb"] < 1e3 * rehearse.PEAK_LIMIT_GB


# ------------------------------------------------------------------------------------------------- the published logs


@pytest.mark.parametrize("depth, logged", [(1, 98.0), (3, 143.0), (4, 166.0)])
def test_the_published_steps(depth: int, logged: float) -> None:
    visits = train_gpt.loop_schedule(train_gpt.Config(), depth).visits
    assert reckon.step_ms(visits, 786_432 / 8) == pytest.approx(logged, rel=0.05)


def test_the_published_test_time_training(lengths: np.ndarray) -> None:
    cfg = train_gpt.Config()
    parts = reckon.ttt_parts(cfg, lengths, reckon.published_plan(cfg, lengths, 8), 8)
    assert parts[0].seconds == pytest.approx(199.5, rel=0.05)
    assert sum(part.seconds for part in parts) == pytest.approx(470.6, rel=0.05)
    assert [part.seconds for part in parts[1::2]] == pytest.approx([12, 18, 24], rel=0.05 if LENGTHS_FILE else 0.08)
    chunks = [int(part.note.split()[-2]) for part in parts[1::2]]
    assert chunks == pytest.approx([111, 185, 250], rel=0.01 if LENGTHS_FILE else 0.08)


def test_the_published_run_as_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--published")
    assert (plan["train_ms"], plan["hessians_ms"]) == pytest.approx((596_100, 4000), rel=0.05)
    assert (plan["eval_ms"], plan["peak_mb"]) == pytest.approx((470_600, 46_600), rel=0.05)


def test_the_published_batches_hold_every_document_once(lengths: np.ndarray) -> None:
    plans = reckon.published_plan(train_gpt.Config(), lengths, 8)
    assert [document for plan in plans for batch in plan.batches for document in batch] == list(range(50_000))
    assert len(plans[0].batches[0]) == 16 and {len(batch) for plan in plans for batch in plan.batches[1:]} == {64}
    for plan in plans:
        assert sorted(index for rank in plan.ranks for index in rank) == list(range(len(plan.batches)))


# ------------------------------------------------------------------------------------------------------------ our plan


def test_the_record_fits_its_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys)
    assert plan["eval_ms"] <= 400_000 and plan["train_ms"] + plan["hessians_ms"] < 600_000 and plan["peak_mb"] < 75_000


def test_cached_test_time_training_fits_a_quarter_of_its_clock(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--env", str(CACHED))["eval_ms"] <= 150_000


def test_a_setting_on_the_command_line_wins_over_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    cached, none = (planned(capsys, "--env", str(CACHED), f"TTT_ENABLED={enabled}") for enabled in (1, 0))
    assert none["ttt_ms"] == 0 < none["eval_ms"] < cached["eval_ms"]


def test_fewer_gpus_take_longer_and_over_the_budget_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--gpus", "4")["eval_ms"] > 1.5 * planned(capsys)["eval_ms"]
    assert rehearse.main(["plan", "--gpus", "1"]) == train_gpt.EXIT_OVER_LIMIT


@pytest.mark.parametrize("arguments", [["SEED"], ["SEED=x"], ["--lengths", "/nowhere.json"], ["--env", "/nowhere.env"]])
def test_what_the_user_can_mend_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse.main(["plan", *arguments]) == train_gpt.EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------------------------------------------- document lengths


def test_made_up_lengths_are_like_the_published_ones() -> None:
    lengths = reckon.made_up_lengths()
    assert len(lengths) == 50_000 and lengths.mean() == pytest.approx(957, rel=0.01)
    assert (np.diff(lengths) <= 0).all() and lengths[16] == pytest.approx(30_330, rel=0.05) and lengths[-1] > 1


def test_lengths_from_a_list_and_from_points(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[3, 9, 5]")
    assert reckon.read_lengths(tmp_path / "list.json").tolist() == [9, 5, 3]
    made = reckon.made_up_lengths()[::-1]
    points = [[int(i), int(made[i])] for i in (0, 5000, 25_000, 45_000, 49_000, 49_900, 49_983)]
    (tmp_path / "points.json").write_text(json.dumps({"points": points}))
    read = reckon.read_lengths(tmp_path / "points.json")
    assert len(read) == 50_000 and read.sum() == pytest.approx(47_853_344, rel=1e-4) and (np.diff(read) <= 0).all()
    assert read[16] == made[49_983]


@pytest.mark.parametrize("content", ["{}", "[]", "[1, -2]", "[\"a\"]", "not json"])
def test_a_file_without_lengths_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(content)
    assert rehearse.main(["plan", "--lengths", str(tmp_path / "wrong.json")]) == train_gpt.EXIT_USER_ERROR


# ------------------------------------------------------------------------------------------------------------ launches

KERNEL = '''
@triton.jit
def triton_per_fused_0(in_ptr0, in_ptr1, in_ptr2, out_ptr0, ws_ptr, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xnumel = 1000
    r0_numel = 64
    xindex = xoffset + tl.arange(0, XBLOCK)[:, None]
    x0 = xindex
    x1 = xindex // 4
    x2 = ((xindex // 2) % 2)
    r0_1 = r0_index
    tmp0 = tl.load(in_ptr0 + (r0_1 + 128*x0), None)
    tmp1 = tl.load(in_ptr0 + (8 + r0_1 + 128*x0), tmp9, other=0.0)
    tmp2 = tl.load(in_ptr1 + (tl.broadcast_to(x1, [XBLOCK, R0_BLOCK])), tmp9, other=0.0)
    tmp3 = tl.load(in_ptr2 + (r0_1 + 64*tmp2), None)
    tmp4 = libdevice.pow(tmp3, tmp2) + tl_math.sin(tmp1) + tmp0
    tl.store(out_ptr0 + (r0_1 + 64*x2), tmp4, None)
    tl.store(ws_ptr + (tl.program_id(0) + 0 * tl.num_programs(0)) * r0_numel + r0_index, tmp4, None)
'''


def test_what_a_kernel_moves_is_read_off_its_source() -> None:
    traffic = null_hopper.Traffic("triton_per_fused_0", KERNEL)
    moved = {role: traffic.moved(role, numel, traffic.sizes) for role, numel in (
        ("in_ptr0", 128_000), ("in_ptr1", 5000), ("in_ptr2", 777), ("out_ptr0", 10_000), ("ws_ptr", 333), ("xnumel", 1))}
    assert moved == {"in_ptr0": 72_000, "in_ptr1": 250, "in_ptr2": 777, "out_ptr0": 128, "ws_ptr": 333, "xnumel": 0}
    assert traffic.slow == 2
    assert traffic.moved("in_ptr0", 10**9, traffic.sizes) == 1000 * (64 + 8)  # the columns that are read, of a wider buffer


def test_heads_that_lie_side_by_side_are_one_run() -> None:
    source = KERNEL.replace("x0 = xindex\n", "x0 = xindex % 4\n").replace("(r0_1 + 128*x0)", "(r0_1 + 64*x0 + 300*x1)").replace(
        "(8 + r0_1 + 128*x0)", "(8 + r0_1 + 64*x0 + 300*x1)")
    assert null_hopper.Traffic("triton_per_fused_0", source).moved("in_ptr0", 10**9, {"xnumel": 1000, "r0_numel": 64}) == 250 * (256 + 8)


def test_a_product_is_bound_by_arithmetic_or_by_bytes() -> None:
    line = "cublasGemmEx m {} n 98304 k 512 batch 1 type 14 adds {}"
    kind, size, seconds = reckon.launch_cost(line.format(2048, 0), reckon.Attended(0, 0.0))
    assert kind == "products" and size == 2 * (2048 * 512 + 98_304 * 512 + 98_304 * 2048)
    assert seconds == pytest.approx(2 * 2048 * 98_304 * 512 / 989e12 / reckon.PRODUCT_SHARE)
    _, narrow, seconds = reckon.launch_cost(line.format(8, 0), reckon.Attended(0, 0.0))
    assert seconds == pytest.approx(narrow / 3.35e12 / reckon.BANDWIDTH_SHARE)
    assert reckon.launch_cost(line.format(8, 1), reckon.Attended(0, 0.0))[1] == narrow + 2 * 8 * 98_304


@pytest.mark.parametrize("line, kind, size", [
    ("triton triton_per_fused__fused_rms_norm_3 bytes 200000000 elements 50000000 slow 0 in_ptr0:bfloat16[98304,512]",
     "residual, norm", 2e8),
    ("triton mlp_kernel grid 132,1,1 bytes 908000000 ints 98304,2048,512 registers 160 spilled 0 shared 1 warps 8", "mlp", 908e6),
    ("triton triton_poi_fused_add_1 bytes 1000 elements 500 slow 0 ", "small kernels", 1000),
    ("memcpy D2D 100663296 bytes", "eager kernels", 2 * 100_663_296), ("memset 16 bytes", "small kernels", 16),
    ("_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EEEEviT0_T1_ grid 9,1,1 block 128,1,1 "
     "shared 0 elements 5000000", "eager kernels", 6e7),
    ("ncclAllReduce count 1000000 type 7 in place 0", "collectives", 4e6),
    ("pytorch_flash16flash_fwd_kernel grid 16,96,8 block 128,1,1 shared 0", "attention forward", 0),
])
def test_launches_by_kind(line: str, kind: str, size: float) -> None:
    found, moved, seconds = reckon.launch_cost(line, reckon.Attended(98_304, 500.0))
    assert (found, moved) == (kind, size) and seconds >= reckon.LAUNCH_SECONDS


def test_slow_functions_cost_more_than_the_bytes() -> None:
    line = "triton triton_per_fused_cos_sin_1 bytes 200000000 elements 50331648 slow {} "
    plain, slow = (reckon.launch_cost(line.format(n), reckon.Attended(0, 0.0))[2] for n in (0, 6))
    assert plain == pytest.approx(200e6 / 3.35e12 / 0.85) and slow > 5 * plain


def test_groups_add_up_and_the_largest_kernels_come_first() -> None:
    order = ["triton a_kernel bytes 5000000 elements 1 slow 0 ", "triton b_kernel bytes 4000000 elements 1 slow 0 "] * 2 + [
        "triton b_kernel bytes 9000000 elements 1 slow 0 "]
    groups = reckon.reckon_launches(order, reckon.Attended(0, 0.0))
    assert sum(group.launches for group in groups.values()) == 5 and sum(group.bytes for group in groups.values()) == 27e6
    assert reckon.largest_kernels(order, 1) == [("b_kernel", 9_000_000, 3)]


# --------------------------------------------------------------------------------------------------------------- table


def row(**changes: object) -> dict:
    plain = {"part": "p", "fault": "", "graphs": 3, "breaks": 0, "late": 0, "waits": 1, "launches": 10, "gigabytes": 1.0, "ms": 2.0,
             "allocated_gb": 39.0, "peak_gb": 40.0, "built": [("k", 100, 64, 0)], "groups": {"products": (1, 1e9, 1e-3)}, "note": ""}
    return plain | changes


@pytest.mark.parametrize("changes, words", [
    ({}, ""), ({"fault": "no"}, "no"), ({"breaks": 2}, "2 graph breaks"), ({"late": 1}, "1 late graphs"), ({"peak_gb": 75.0}, "75.0 GB")])
def test_a_row_fails_for_a_fault_a_break_a_late_graph_or_its_memory(changes: dict, words: str) -> None:
    assert rehearse.failed(row(**changes)) == words


def test_a_part_that_died_is_a_row_of_the_table() -> None:
    table = rehearse.rehearsal_table([row(), {"part": "ttt", "fault": "RuntimeError: strides"}])
    assert "| p | ok | 3 |" in table and "| ttt | **RuntimeError: strides** |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| products | 1 | 1.0 | 1.00 |" in rehearse.details([row()]) and math.isclose(row()["ms"], 2.0)
