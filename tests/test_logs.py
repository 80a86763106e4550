"""tools/logs.py: both dialects are read right, the statistics are Welch's, the page needs nothing but itself."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_record import SEEDS, made

import logs

THEIRS = """Hyperparameters:
  train_batch_tokens: 786432
  seed: 0
  matrix_lr: 0.026
0/20000 val_loss: 9.0314 val_bpb: 4.1271
1/20000 train_loss: 9.0324 train_time: 0.0m tok/s: 8000000
500/20000 train_loss: 2.5859 train_time: 0.8m tok/s: 8011933
layer_loop:phase step:1960 frac:0.333 depth:3
2000/20000 train_loss: 2.5012 train_time: 3.3m tok/s: 7901933
4000/20000 val_loss: 2.4071 val_bpb: 1.1000
stopping_early: wallclock_cap train_time: 596100ms step: 4599/20000
diagnostic pre-quantization post-ema val_loss:2.33673 val_bpb:1.06779 eval_time:7021ms
Total submission size quantized+brotli: 15984426 bytes
diagnostic quantized val_loss:2.35664 val_bpb:1.07689 eval_time:9103ms
ttp: b782/782 bl:2.2 bb:1.08 rl:2.2 rb:1.0812 dl:100-2000 gd:0
ttp: b700/782 bl:2.2 bb:1.08 rl:2.2 rb:1.0712 dl:100-2000 gd:1
quantized_ttt_phased val_loss:2.32880 val_bpb:1.06417 eval_time:420000ms
total_eval_time:470.6s
"""


def our_log(path: Path, seed: int, loss: float, lines: str = "") -> Path:
    """A log of ours with a given score on 3 bytes a token."""
    bpb = loss / math.log(2) / 3
    path.write_text(
        f'run id:x seed:{seed} ranks:8 device:"NVIDIA H100 80GB HBM3" torch:2.13.0\nsetting *SEED value:{seed} default:1\n'
        f"setting MATRIX_LR value:0.026\ndata val_tokens:1001 val_bytes:3000 val_docs:10 published:0\n{lines}"
        f"eval name:quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} tokens:1000 bytes:3000 time_ms:5\n"
        f"final seed:{seed} val_loss:{loss:.8f} val_bpb:{bpb:.8f} pre_ttt_bpb:{bpb:.8f} steps:9 train_ms:1 eval_ms:5 total_bytes:7\n"
    )
    return path


def group(tmp_path: Path, name: str, losses: list[float]) -> logs.Group:
    (tmp_path / name).mkdir()
    for seed, loss in enumerate(losses):
        our_log(tmp_path / name / f"train_seed{seed}.log", seed, loss)
    return logs.read_group(str(tmp_path / name))


def test_a_log_of_train_gpt_is_read_whole() -> None:
    run = logs.read_log(made().runs / "train_seed3.log")
    assert run.dialect == "ours" and run.seed == 3 and run.problems == []
    assert [phase.depth for phase in run.phases] == [1, 2] and run.phases[0].step == 0
    assert [point.step for point in run.train] == list(range(1, 9)) and all(p.loss > 0 and p.step_ms > 0 for p in run.train)
    assert list(run.evals) == ["initial", "step4", "final", "ema", "quantized", "quantized_ttt"]
    assert run.ttt[-1].done == 1 and run.ttt[-1].val_bpb == pytest.approx(run.final.val_bpb, abs=1e-5)
    assert run.final.val_bpb == run.evals["quantized_ttt"].val_bpb and run.final.steps == 8
    assert run.settings["TTT_LORA_RANK"] == "4" and "TTT_LORA_RANK" in run.starred and "NUM_LOOPS" not in run.starred
    assert run.run["device"] and int(run.data["val_docs"]) == 16 and list(run.code) == ["train_gpt.py"]


def test_the_published_dialect_is_read(tmp_path: Path) -> None:
    (tmp_path / "theirs.log").write_text(THEIRS)
    run = logs.read_log(tmp_path / "theirs.log")
    assert run.dialect == "published" and run.problems == []
    assert {name: score.val_bpb for name, score in run.evals.items()} == {
        "initial": 4.1271, "step4000": 1.1, "ema": 1.06779, "quantized": 1.07689, "quantized_ttt": 1.06417}
    assert run.phases == [logs.Phase(1960, 0.333, 3)]
    assert [(p.step, p.loss, p.depth) for p in run.train] == [(1, 9.0324, 1), (500, 2.5859, 1), (2000, 2.5012, 3)]
    assert run.train[1].elapsed_ms == pytest.approx(500 * 786432 / 8011933 * 1e3)
    assert run.train[1].step_ms == pytest.approx(98.15, abs=0.1)
    assert [point.val_bpb for point in run.ttt] == [1.0812, 1.0712] and run.ttt[-1].done == 1
    final = run.final
    assert (final.seed, final.steps, final.train_ms, final.eval_ms, final.total_bytes) == (0, 4599, 596100, 470600, 15984426)
    assert (final.val_bpb, final.pre_ttt_bpb) == (1.06417, 1.07689)


def their_log(path: Path, seed: int = 0, changes: dict[str, str] | None = None) -> Path:
    """THEIRS with pieces replaced, each of which must be there."""
    text = THEIRS.replace("  seed: 0", f"  seed: {seed}")
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


LAST = "quantized_ttt_phased val_loss:2.32880 val_bpb:1.06417 eval_time:420000ms\n"


@pytest.mark.parametrize("name", ["quantized_ttt_lora", "quantized_ttt_perdoc", "final_int6_ttt", "legal_ttt", "ttt_sliding_window"])
def test_a_stage_of_another_name_is_read(name: str, tmp_path: Path) -> None:
    run = logs.read_log(their_log(tmp_path / "a.log", changes={"quantized_ttt_phased": name, "total_eval_time:": "total_eval_wallclock:"}))
    assert (run.final.val_bpb, run.final.pre_ttt_bpb, run.final.eval_ms) == (1.06417, 1.07689, 470600)


CUT = THEIRS[THEIRS.index("ttp:"):]
CUT_IN_TTT = {
    "the settings say TTT": {LAST: "", "  matrix_lr": "  ttt_enabled: True\n  matrix_lr", "ttp:": "x:"},
    "they say it in other words": {CUT: "", "  matrix_lr": "  eval_ttt: true\n  ttt_lora_rank: 96\n  matrix_lr"},
    "it broke off in TTT": {LAST: ""}, "at its warm-up": {CUT: "ttt_lora:warming up\n"}, "in its SGD": {CUT: "tttg: c1/99 lr:0.001\n"},
    "at its clock": {CUT: "beginning TTT eval timer\n"},
}


@pytest.mark.parametrize("form", CUT_IN_TTT)
def test_no_score_is_final_before_the_test_time_training_that_was_to_follow(form: str, tmp_path: Path) -> None:
    changes = CUT_IN_TTT[form]
    run = logs.read_log(their_log(tmp_path / "a.log", changes=changes))
    assert run.final.val_bpb is None and "no score of it is here" in run.problems[-1]
    off = "  ttt_enabled: False\n  phased_ttt_enabled: True\n  matrix_lr"
    plain = logs.read_log(their_log(tmp_path / "b.log", changes={LAST: "", "ttp:": "x:", "  matrix_lr": off}))
    assert plain.final.val_bpb == 1.07689 and plain.problems == []


@pytest.mark.parametrize("line", ["doc_adapted val_loss:2.3288 val_bpb:1.06417", "adapted | loss 2.3288 | bpb 1.06417",
                                  "Traceback (most recent call last):"])
def test_a_score_or_an_error_in_no_known_form_behind_the_last_score_is_said(line: str, tmp_path: Path) -> None:
    run = logs.read_log(their_log(tmp_path / "a.log", changes={CUT: line + "\n"}))
    assert run.final.val_bpb == 1.07689 and "may not be the final score" in run.problems[-1] and line[:7] in run.problems[-1]
    before = logs.read_log(their_log(tmp_path / "b.log", changes={"diagnostic quantized": line + "\ndiagnostic quantized"}))
    assert before.final.val_bpb == 1.06417 and before.problems == []


@pytest.mark.parametrize("form", ["Total submission size: 15,984,426 bytes", "total submission size int6+lzma: 15984426 bytes"])
def test_a_total_size_is_read_however_it_is_said(form: str, tmp_path: Path) -> None:
    run = logs.read_log(their_log(tmp_path / "a.log", changes={"Total submission size quantized+brotli: 15984426 bytes": form}))
    assert run.final.total_bytes == 15984426


def test_two_scores_of_one_stage_are_both_kept_and_the_last_counts(tmp_path: Path) -> None:
    more = "final_int6_sliding_window val_loss:2.34000 val_bpb:1.06929 stride:64 eval_time:9000ms\n"
    run = logs.read_log(their_log(tmp_path / "a.log", changes={LAST: more, "ttp:": "x:"}))
    assert run.final.val_bpb == 1.06929 and run.evals["diagnostic quantized"].val_bpb == 1.07689


def test_a_dialect_that_is_not_known_is_named_so(tmp_path: Path) -> None:
    run = logs.read_log(their_log(tmp_path / "a.log", changes={LAST: "my own score val_loss:2.3 val_bpb:1.05\n", "ttp:": "x:",
                                                               "diagnostic quantized": "diagnostic other"}))
    assert run.final.val_bpb is None
    assert "or its dialect is another" in run.problems[-1] and "my own score" in run.problems[-1]


def test_the_dialect_of_the_first_records_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("train_batch_tokens:524288 train_seq_len:1024 iterations:20000\nseed:1337\n"
                                    "step:200/20000 train_loss:3.1 train_time:8400ms step_avg:42.00ms\n"
                                    "step:400/20000 train_loss:2.9 train_time:16900ms step_avg:42.25ms\n"
                                    "stopping_early: wallclock_cap train_time:600038ms step:13780/20000\n"
                                    "final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2276 eval_time:1387ms\n")
    run = logs.read_log(tmp_path / "a.log")
    assert run.seed == 1337 and run.final.val_bpb == 1.2276 and run.train[1].step_ms == pytest.approx(42.5)


@pytest.mark.parametrize("listed, depth", [(" encoder:[0, 1, 2, 3, 4, 5, 3, 4] decoder:[5, 3, 4, 5, 6, 7]", 3), ("", 2),
                                           (" num_loops:1", 2)])
def test_the_depth_of_a_loop_that_is_switched_on_is_read(listed: str, depth: int, tmp_path: Path) -> None:
    run = logs.read_log(
        their_log(
            tmp_path / "a.log",
            changes={
                "layer_loop:phase step:1960 frac:0.333 depth:3": f"layer_loop:enabled step:1960 frac:0.333{listed}",
                "  seed": "  num_loops: 1\n  seed",
            },
        )
    )
    assert [point.depth for point in run.train] == [1, 1, depth]


def test_source_in_a_log_is_no_setting_and_hessians_are_training(tmp_path: Path) -> None:
    source = "class Hyperparameters:\n  matrix_lr: float = 0.9\n    vocab: int = 3\n"
    changes = {
        "Hyperparameters:\n": source + "Hyperparameters:\n",
        "Total submission": "GPTQ:collected 67 Hessians in 3.4s\nTotal submission",
    }
    run = logs.read_log(their_log(tmp_path / "a.log", changes=changes))
    assert run.settings == {"TRAIN_BATCH_TOKENS": "786432", "SEED": "0", "MATRIX_LR": "0.026"} and run.final.train_ms == 599500


def test_a_run_behind_an_aborted_one_is_read_alone(tmp_path: Path) -> None:
    for text in (
        THEIRS[: THEIRS.index("4000/20000")] + THEIRS,
        THEIRS.replace("2000/20000 train", "9000/20000 train: \n2000/20000 train").replace(
            "0/20000 val_loss: 9.0314", "500/20000 train_loss: 2.6 tok/s: 99\n0/20000 val_loss: 9.0314"
        ),
    ):
        (tmp_path / "a.log").write_text(text)
        run = logs.read_log(tmp_path / "a.log")
        assert [point.step for point in run.train] == [1, 500, 2000] and all(point.step_ms > 0 for point in run.train)
        assert "an earlier run in this file" in run.problems[0] and run.final.val_bpb == 1.06417


@pytest.mark.parametrize("form", ["utf-16", "utf-8-sig", "prefix", "prefix and blank", "blank", "no blank"])
def test_prefixes_and_other_encodings_change_nothing(form: str, tmp_path: Path) -> None:
    start = {"prefix": "[default{}]:", "prefix and blank": "[rank{}]: ", "blank": "[default{}]: ", "no blank": "[rank{}]:"}.get(form)
    text = "".join(start.format(rank) + f"{line}\n" for line in THEIRS.splitlines() for rank in (0, 1)) if start else THEIRS
    (tmp_path / "a.log").write_bytes(text.encode("utf-8" if start else form))
    (tmp_path / "b.log").write_text(THEIRS)
    first, second = (logs.read_log(tmp_path / name) for name in ("a.log", "b.log"))
    assert (first.train, first.evals, first.final, first.settings) == (second.train, second.evals, second.final, second.settings)


def test_a_folder_says_which_logs_it_leaves_out(tmp_path: Path) -> None:
    """A seed run again, logs of other names, an empty one; and the folder's name has a comma."""
    folder = tmp_path / "two, three"
    folder.mkdir()
    for name, seed in (("train_seed0.log", 0), ("train_seed1.log", 1), ("ablation.log", 2)):
        their_log(folder / name, seed)
    (folder / "train_seed01.log").write_text(THEIRS)
    (folder / "train_seed9.log").write_text("")
    (folder / "logs").mkdir()
    for path in (folder / "seed5.txt", folder / "logs" / "six.log"):
        their_log(path, 5)
    (folder / "requirements.txt").write_text("torch\n")
    found = logs.read_group(str(folder))
    assert len(found.runs) == 2 and "(std 0.00000, 2 seeds)" in logs.headline(found)
    said = logs.summary([found])
    assert "requirements" not in said and "logs/six.log, seed5.txt" in said
    assert all(words in said for words in ("ablation.log", "train_seed9.log is no log", "seed 0 is here twice, counted once"))


def test_scores_of_other_bytes_are_not_compared(tmp_path: Path) -> None:
    base, new = tmp_path / "base.log", tmp_path / "new.log"
    their_log(base)
    their_log(new, changes={"val_bpb:1.06417": "val_bpb:1.04417"})
    groups = [logs.read_group(str(path)) for path in (base, new)]
    with pytest.raises(ValueError, match=r"base counts 3.157\d+ bytes a token, new 3.217"):
        logs.compare(*groups)
    assert logs.stage_comparison(logs.curves_of(groups))[0] == ["BPB", "base", "new"]  # side by side, and no difference


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    their_log(tmp_path / "a.log")
    done = subprocess.run(
        f"{sys.executable} {logs.__file__} summary {tmp_path / 'a.log'} | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_pictures_name_configurations_by_what_differs_and_show_differences(tmp_path: Path) -> None:
    groups = []
    for name, gain in (("2026-01-01_SP8192_CaseOps_Gated", 1.0), ("2026-01-02_SP8192_CaseOps_Plain", 0.99)):
        (tmp_path / name).mkdir()
        for seed in (0, 1, 2):
            scale = gain * (1 + seed / 1000)
            their_log(tmp_path / name / f"train_seed{seed}.log", seed, {LAST: f"quantized_ttt_phased val_loss:{2.3288 * scale:.5f} val_bpb:"
                                                                        f"{1.06417 * scale:.5f} eval_time:1ms\n"})
        groups.append(logs.read_group(str(tmp_path / name)))
    curves = logs.curves_of(groups)
    assert [curve.label for curve in curves] == ["Gated (3 seeds)", "Plain (3 seeds)"] and len({curve.color for curve in curves}) == 2
    rows = logs.stage_comparison(curves)
    assert [row[0] for row in rows] == ["BPB", "last step", "averaged", "quantized", "+ TTT"]
    assert re.fullmatch(r"-0.0106\d ± 0.0008\d", rows[-1][-1]) and rows[2][-1] == "+0.00000 ± 0.00000"
    assert logs.ttt_line(groups[0].runs[0])[0] == [50, 100]


def test_a_cut_off_log_is_named_and_left_out_of_the_mean(tmp_path: Path) -> None:
    whole = our_log(tmp_path / "a.log", 1, 2.0)
    cut = tmp_path / "b.log"
    cut.write_text("run id:x seed:2\ntrain step:1/9 frac:0.1 depth:1 loss:2.5\ntrain step:2/9 frac:0.2 lo")
    both = logs.read_group(f"{whole},{cut}")
    assert len(both.finished) == 1 and both.values("val_loss") == [2.0]
    text = logs.summary([both])
    assert "the run did not end" in text and "line 3 cannot be read" in text


def test_a_resumed_run_counts_every_step_once(tmp_path: Path) -> None:
    lines = "".join(f"train step:{step}/9 frac:0.1 depth:1 loss:{loss} step_ms:5.0 elapsed_ms:{5 * step}\n"
                    for step, loss in ((1, 3.0), (2, 2.9), (3, 2.8), (2, 2.9), (3, 2.7), (4, 2.6)))
    lines += "resumed from step 1, 0.0 s of training done\n"
    run = logs.read_log(our_log(tmp_path / "a.log", 1, 2.0, lines))
    assert [(p.step, p.loss) for p in run.train] == [(1, 3.0), (2, 2.9), (3, 2.7), (4, 2.6)]
    assert run.problems == ["warning: resumed from step 1, 0.0 s of training done"]


def test_a_score_by_a_later_process_joins_its_run(tmp_path: Path) -> None:
    """As run.sh makes them: NAME.log trains, NAME.eval1.log scores with test-time training."""
    trained = our_log(tmp_path / "small.log", 1, 2.5)
    trained.write_text(trained.read_text().replace("quantized_ttt", "quantized") + "setting *TTT_ENABLED value:0 default:1\n")
    our_log(tmp_path / "small.eval1.log", 1, 2.25, "setting TTT_ENABLED value:1\nsetting *EVAL_ONLY value:1 default:0\n")
    for path in (tmp_path, trained):
        (run,) = logs.read_group(str(path)).runs
        assert (run.final.val_loss, run.evals["quantized"].val_loss, run.evals["quantized_ttt"].val_loss) == (2.25, 2.5, 2.25)
        assert run.final.steps == 9 and run.problems[-1].endswith("small.eval1.log")
    other = tmp_path / "small.eval1.log"
    other.write_text(other.read_text().replace("MATRIX_LR value:0.026", "MATRIX_LR value:0.03"))
    assert logs.read_group(str(trained)).runs[0].final.val_loss == 2.5


def test_what_is_no_log_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.log").write_text("hello\n")
    for path in ("x.log", "nothing", "."):
        folder = tmp_path / "empty" if path == "." else tmp_path / path
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert logs.main(["summary", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_summary_has_mean_and_std_and_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.main(["summary", str(made().record)]) == 0
    text = capsys.readouterr().out
    values = [logs.read_log(made().record / f"train_seed{seed}.log").final.val_bpb for seed in SEEDS]
    mean, std = logs.mean_and_std(values)
    assert f"val_bpb {mean:.5f} (std {std:.5f}, 3 seeds)" in text
    assert all(re.search(rf"^seed {seed} +{value:.5f}", text, re.MULTILINE) for seed, value in zip(SEEDS, values))


def test_the_test_is_welchs(tmp_path: Path) -> None:
    """By its formulas, with and without the bar (Welch, 1947)."""
    old, new = [2.331, 2.3332, 2.3291, 2.3305], [2.3222, 2.3241, 2.3211]
    (old_mean, old_std), (new_mean, new_std) = logs.mean_and_std(old), logs.mean_and_std(new)
    parts = old_std ** 2 / 4, new_std ** 2 / 3
    for bar in (0.0, 0.005):
        found = logs.welch(old, new, bar)
        assert found.statistic == pytest.approx((old_mean - new_mean - bar) / math.sqrt(sum(parts)))
        assert found.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2))
    assert logs.welch(old, new).pvalue < 1e-3 < logs.welch(old, new, 0.0075).pvalue < 0.5 < logs.welch(old, new, 0.02).pvalue


def test_the_seeds_needed_are_the_fewest_that_pass() -> None:
    old, new = [2.3310, 2.3330], [2.3230, 2.3250]  # a gain of 0.008 with a spread of 0.0014
    needed = logs.seeds_needed(old, new, 0.005)
    spread = 0.001 * math.sqrt(2)  # n values with this deviation: pairs at +-a, a**2 n / (n - 1) = spread**2
    def side(mean: float, n: int) -> list[float]:
        return [mean + sign * spread * math.sqrt((n - 1) / n) for sign in (1, -1)] * (n // 2)
    even = needed + needed % 2
    assert (
        logs.welch(side(2.332, even), side(2.324, even), 0.005).pvalue
        < 0.01
        < logs.welch(side(2.332, even - 2), side(2.324, even - 2), 0.005).pvalue
    )
    assert logs.seeds_needed(old, [2.3290, 2.3310], 0.005) is None


def test_compare_says_better_not_shown_and_never(tmp_path: Path) -> None:
    base = group(tmp_path, "base", [2.3310, 2.3307, 2.3312])
    assert logs.compare(base, group(tmp_path, "much", [2.3210, 2.3207, 2.3212])).count(": yes") == 3
    little = logs.compare(base, group(tmp_path, "little", [2.3280, 2.3290, 2.3270]))
    assert "better by more than 0.005 nats: not shown" in little and "not even 1000 seeds a side would show it" in little
    noisy = logs.compare(base, group(tmp_path, "noisy", [2.3110, 2.3300, 2.3200]))
    assert "not shown" in noisy and re.search(r"\d+ seeds a side show it", noisy)
    assert "needs at least 2 finished runs a side" in logs.compare(base, group(tmp_path, "one", [2.3]))


def test_compare_warns_of_another_validation_set(tmp_path: Path) -> None:
    base, new = group(tmp_path, "base", [2.33, 2.34]), group(tmp_path, "new", [2.31, 2.32])
    assert "different validation sets" not in logs.compare(base, new)
    path = tmp_path / "new" / "train_seed0.log"
    path.write_text(path.read_text().replace("tokens:1000 bytes:3000", "tokens:900 bytes:2700"))
    assert "different validation sets" in logs.compare(base, logs.read_group(str(tmp_path / "new")))


def test_published_figures_stand_in_for_a_group(tmp_path: Path) -> None:
    """Those of the folder for the published configuration, labelled as others' everywhere."""
    folders = list((Path(logs.__file__).parent.parent / "records" / "track_10min_16mb").glob("*/" + logs.PUBLISHED_FILE))
    assert len(folders) == 1
    published = logs.read_group(str(folders[0].parent))
    mean, std = logs.mean_and_std(published.values("val_bpb"))
    assert (round(mean, 5), round(std, 5)) == (1.06505, 0.00082) and published.published
    assert logs.mean_and_std(published.values("val_loss"))[0] == pytest.approx(2.33073, abs=1e-5)
    assert "published by others" in logs.summary([published]) and not list(folders[0].parent.glob("*.log"))
    with pytest.raises(ValueError, match=r"counts 3.15716 bytes a token, ours 3.00000"):
        logs.compare(published, group(tmp_path, "ours", [2.33, 2.32]))
    assert "published by others" in logs.compare(published, published)


def test_settings_are_compared_by_value_and_within_a_dialect(tmp_path: Path) -> None:
    (tmp_path / "theirs.log").write_text(THEIRS.replace("matrix_lr: 0.026", "matrix_lr: 0.0260"))
    theirs = logs.read_log(tmp_path / "theirs.log")
    ours = logs.read_log(our_log(tmp_path / "a.log", 1, 2.0, "setting TRAIN_BATCH_TOKENS value:1024\n"))
    assert logs.differing_settings([theirs, ours]) == {"TRAIN_BATCH_TOKENS": ["786432", "1024"]}
    assert logs.canonical("[1, 3, 4]") == logs.canonical("1,3,4") and logs.canonical("True") == logs.canonical("1")


def test_plot_and_report_overlay_both_dialects_and_fetch_nothing(tmp_path: Path) -> None:
    (tmp_path / "theirs.log").write_text(THEIRS)
    paths = [str(made().record), str(tmp_path / "theirs.log")]
    assert logs.main(["plot", *paths, "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert logs.main(["report", *paths, "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 5 and all(source.startswith("data:image/svg+xml") for source in sources)
    assert 'name="viewport"' in page and "<script" not in page and "@import" not in page
    for word in ("seed 3", "seed 4", "seed 5", "1.06417", "Settings that differ"):
        assert word in page


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"this needs no_such_library .* pip install -r requirements-tools.txt"):
        logs.import_for_tools("no_such_library")


def test_names_in_a_log_cannot_break_the_page(tmp_path: Path) -> None:
    log = our_log(tmp_path / "a.log", 1, 2.0, "setting *RUN_ID value:<script>alert(1)</script> default:\nwarning: <b>bold</b>\n")
    logs.report([logs.read_group(str(log))], tmp_path / "r.html")
    assert "<script>" not in (tmp_path / "r.html").read_text() and "<b>" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("piece", ["a" + " " * 10**5, "total submission size " + "1," * 10**5, "1/2 train_loss: " + "1" * 10**5,
                                   "layer_loop:enabled step:1 frac:1" + "[1" * 10**5, "ttp:" + " dl:1" * 10**5])
def test_a_line_made_to_keep_a_reader_busy_does_not(piece: str, tmp_path: Path) -> None:
    began = time.process_time()
    run = logs.read_log(their_log(tmp_path / "a.log", changes={"0/20000 val_loss: 9": f"{piece} val_loss\n" * 20 + "0/20000 val_loss: 9"}))
    assert run.final.val_bpb == 1.06417 and time.process_time() - began < 3


@pytest.mark.parametrize("old, new", [
    ("val_bpb:1.06417", "val_bpb:inf"), ("val_bpb:1.06417", "val_bpb:nan"), ("15984426 bytes", f"{'9' * 400} bytes"),
    ("step: 4599/", f"step: {'9' * 400}/"), ("  seed: 0", "  seed: \u00b2"),
    ("stopping_early", "step size val_loss:2.3 val_bpb:1.05\nstopping_early"),
    ("train_batch_tokens: 786432", f"train_batch_tokens: {'9' * 400}"),
])
def test_figures_that_are_none_end_in_a_table_or_a_line(old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    for seed in (1, 2):
        path = their_log(tmp_path / "records" / f"train_seed{seed}.log", seed)
        text = path.read_text().replace("  seed: 2", "  seed: 0")
        path.write_text(text.replace(old, new))
    for command in (["summary", str(path.parent)], ["compare", str(path.parent), str(path.parent)],
                    ["report", str(path.parent), "--out", str(tmp_path / "x.html")]):
        assert logs.main(command) in (0, 2)
    run = logs.read_log(path)
    assert "inf" not in new and "nan" not in new or run.problems == [f"its final score is {run.final.val_bpb}"]
    assert run.final.val_bpb == 1.06417 or "val_bpb" in old
