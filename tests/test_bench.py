"""The benchmark itself, at a size for a CPU, and the arithmetic of the roofline."""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import cpu  # noqa: E402
import gpu  # noqa: E402
import roofline  # noqa: E402

QUICK = replace(cpu.SMALL, depths=(1,), steps=1, ttt_lengths=(20, 40), data_tokens=20_000)


def results_of(part: str, out: Path) -> dict[str, gpu.Result]:
    """Run one part here; its results by name, which must also be in its file."""
    bench = gpu.Bench(QUICK, out, None)
    bench.part = part
    gpu.PARTS[part](bench)
    assert [gpu.Result(*row) for row in json.loads((out / f"{part}.json").read_text())][0].name == bench.results[0].name
    assert not [r for r in bench.results if gpu.failed(r)]
    return {r.name: r for r in bench.results}


def test_the_checks_pass_on_a_cpu_and_name_what_is_not_there(tmp_path: Path) -> None:
    results = results_of("checks", tmp_path)
    assert results["attention sdpa grad k"].value < 1e-5
    assert "needs a CUDA device" in results["attention fa3"].note
    assert results["gptq codes that differ from the CPU's"].value == 0


def test_a_step_is_timed_and_profiled(tmp_path: Path) -> None:
    results = results_of("steps", tmp_path)
    assert results["depth 1 step"].value > 0 and results["depth 1 graphs compiled while timed"].value == 0
    assert "aten::" in (tmp_path / "profile_depth1.txt").read_text()


@pytest.mark.parametrize("part, name", [("kernels", "mlp fused"), ("ttt", "ttt: documents of 40 tokens"),
                                        ("quantize", "gptq of all matrices")])
def test_every_other_part_measures_something(part: str, name: str, tmp_path: Path) -> None:
    assert results_of(part, tmp_path)[name].value > 0


def test_the_short_run_trains_and_scores(tmp_path: Path) -> None:
    results = results_of("run", tmp_path)
    assert results["run last loss"].value < results["run first loss"].value
    assert 0 < results["run val_bpb"].value < 8


def test_parts_run_in_processes_and_end_in_one_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "cpu.py"), "--parts", "quantize", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| quantize | gptq of all matrices |" in done.stdout and (tmp_path / "table.md").read_text() in done.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["environment"]["torch"] and {r["part"] for r in written["results"]} == {"quantize"}


def test_a_missed_bound_and_a_missing_value_fail() -> None:
    assert gpu.failed(gpu.Result("p", "n", 0.03, "", "bound 2e-2; kernel"))
    assert gpu.failed(gpu.Result("p", "n", math.nan, "", "bound 2e-2"))
    assert not gpu.failed(gpu.Result("p", "n", 0.01, "", "bound 2e-2; kernel"))
    assert not gpu.failed(gpu.Result("p", "n", math.nan, "", "not available"))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit):
        gpu.main(QUICK, Path("unused"), ["--parts", "checks,stesp"])


def test_a_step_of_the_record_has_the_operations_of_its_weights() -> None:
    visit = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 512 * 2048 + 8 * 512
    for depth, visits in ((1, 11), (3, 17), (4, 20)):
        kernels = roofline.step_kernels(depth, 1000, 0.0, True, 8)
        products = sum(k.operations for k in kernels if k.name != "orthogonalize")
        assert products == pytest.approx(6 * 1000 * (visits * visit + 512 * 8192))
        assert sum(k.traffic for k in kernels) < sum(k.traffic for k in roofline.step_kernels(depth, 1000, 0.0, False, 8))


def test_the_published_run_is_a_quarter_of_peak() -> None:
    for row in roofline.rows(98_304, 500.0, 8)[:3]:
        assert 0.25 < row["published_share"] < 0.28
        assert row["arithmetic_ms"] < row["kernels_ms"] < row["compiled_ms"] < row["published_ms"]
