"""Work is not lost: kills at every change of a file, signals in every phase, damaged states, failing ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import forked
import pytest
import tiny

import train_gpt as tg


Whole = dict[int, bytes]


@pytest.fixture(scope="module")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("few"), train_docs=40, val_docs=4)


@pytest.fixture(scope="module")
def whole(few_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The artifact of a run that nothing interrupted, by the number of its ranks."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("whole")
        assert forked.run(forked.environment(few_data, out), ranks) == [0] * ranks
        assert {path.name for path in out.iterdir()} == forked.COMPLETE
        found[ranks] = (out / "run.artifact").read_bytes()
    return found


def goes_on(env: dict[str, str], expected: bytes, ranks: int = 1, said: Path | None = None) -> None:
    """The same command ends with the artifact of a run never interrupted and leaves nothing else; if it had ended already, it says so."""
    out = Path(env["ARTIFACT_DIR"])
    status = forked.run(env, ranks, said=said)
    assert b'"stage": "done"' in (out / "run.state").read_bytes() and set(status) <= {0, tg.EXIT_USER_ERROR}, (
        (out / "run.log").read_text()[-2000:])
    assert (out / "run.artifact").read_bytes() == expected
    assert {path.name for path in out.iterdir()} == forked.COMPLETE


@pytest.mark.parametrize(("ranks", "stride"), [(1, 1), (2, 9)])
def test_a_kill_at_any_change_of_a_file_loses_nothing(few_data: Path, whole: Whole, tmp_path: Path, ranks: int, stride: int) -> None:
    for number in range(1, 200, stride):
        out, struck = tmp_path / str(number), tmp_path / f"{number}.struck"
        env = forked.environment(few_data, out)
        statuses = forked.run(env, ranks, forked.killed_at_change(number, struck))
        if not struck.exists():
            assert statuses == [0] * ranks and number > 20
            return
        assert statuses[0] == 9 and set(statuses[1:]) <= {0, 1, 2}, "rank 1 may be done"
        goes_on(env, whole[ranks], ranks)
    raise AssertionError("no end of changes")


def test_a_kill_within_a_line_of_the_log_spoils_that_line_alone(few_data: Path, whole: Whole, tmp_path: Path) -> None:
    for number in range(1, 400, 29):
        out, struck, said = tmp_path / str(number), tmp_path / f"{number}.struck", tmp_path / f"{number}.said"
        env = forked.environment(few_data, out)
        statuses = forked.run(env, fault=forked.killed_at_log_line(number, struck))
        if not struck.exists():
            assert statuses == [0] and number > 140
            return
        assert statuses == [9]
        goes_on(env, whole[1], said=said)
        assert (out / "run.log").read_text().endswith("\n" + said.read_text())


PLACES = {
    "data": (tg, "check_dataset", 1), "warm-up": (tg.Trainer, "train_step", 2),
    "initial evaluation": (tg, "evaluate", 1), "first step": (tg.Trainer, "train_step", 4), "last step": (tg.Trainer, "train_step", 6),
    "final evaluation": (tg, "evaluate", 2), "evaluation of the average": (tg, "evaluate", 3), "Hessians": (tg.Calibration, "add", 1),
    "GPTQ": (tg, "gptq", 1), "last of GPTQ": (tg, "gptq", 7), "packing": (tg, "pack_artifact", 1),
    "compression": (tg, "compress", 1), "artifact": (tg, "write_atomically", 3), "scoring": (tg, "model_from_tensors", 1),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_in_any_phase_ends_the_run_and_the_same_command_goes_on(few_data: Path, whole: Whole, tmp_path: Path, place: str,
                                                                                 number: int) -> None:
    env = forked.environment(few_data, tmp_path, VAL_LOSS_EVERY=100, WARMUP_STEPS=3)
    status = forked.run(env, fault=forked.at_call(*PLACES[place], lambda: os.kill(os.getpid(), number)))
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert status == [128 + number] and lines[-1].startswith(f"stopped by {signal.Signals(number).name};"), lines[-5:]
    goes_on(env, whole[1])


@pytest.mark.parametrize("step", [1, 4], ids=["warm-up", "training"])
def test_a_signal_to_one_of_two_ranks_stops_both(few_data: Path, whole: Whole, tmp_path: Path, step: int) -> None:
    env = forked.environment(few_data, tmp_path, WARMUP_STEPS=2)
    fault = forked.at_call(tg.Trainer, "train_step", step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert forked.run(env, 2, fault, faulty=1) == [128 + signal.SIGTERM] * 2
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert "stopped by SIGTERM;" in lines[-1] and not any("stopped" in line for line in lines[:-1])
    goes_on(env, whole[2], ranks=2)


def fail() -> None:
    raise KeyError("made to fail")


@pytest.mark.parametrize(("act", "status"), [(fail, (1, 2)), (lambda: os.kill(os.getpid(), signal.SIGKILL), (-9,))],
                         ids=["error", "killed"])
@pytest.mark.parametrize("place", ["warm-up", "Hessians", "GPTQ"])
def test_a_rank_that_fails_ends_the_run_in_seconds_with_a_line_in_the_log(few_data: Path, tmp_path: Path, place: str, act: forked.Fault,
                                                                            status: tuple[int, ...]) -> None:
    env, began = forked.environment(few_data, tmp_path), time.monotonic()
    statuses = forked.run(env, 2, forked.at_call(*PLACES[place], act), faulty=1)
    assert statuses[1] in status and statuses[0] not in (0, 99) and time.monotonic() - began < 20
    last = (tmp_path / "run.log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and ("rank 1: KeyError: 'made to fail'" if act is fail else "rank 1 was killed") in last


def stopped_after_checkpoint(data: Path, out: Path) -> dict[str, str]:
    env = forked.environment(data, out)
    assert forked.run(env, fault=forked.at_call(tg.Trainer, "train_step", 3, lambda: os._exit(9))) == [9]
    assert {path.name for path in out.iterdir()} == {"run.log", "run.state"}
    return env


@pytest.mark.parametrize("damage", ["byte", "first byte", "cut", "short", "empty", "another file"])
def test_a_damaged_state_is_told_and_nothing_is_lost(few_data: Path, tmp_path: Path, damage: str) -> None:
    env = stopped_after_checkpoint(few_data, tmp_path)
    path = tmp_path / "run.state"
    data = path.read_bytes()
    changed = {"byte": data[:50] + bytes([data[50] ^ 1]) + data[51:], "first byte": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-7],
               "short": data[:20], "empty": b"", "another file": b"[]" * 1000}
    path.write_bytes(changed[damage])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"}
    said = tmp_path.parent / f"{tmp_path.name}.said"
    assert forked.run(env, said=said) == [tg.EXIT_USER_ERROR]
    assert "Traceback" not in said.read_text() and said.read_text().splitlines()[-1].startswith("error: ")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"} == before


def test_other_settings_under_the_same_run_id_are_refused(few_data: Path, tmp_path: Path) -> None:
    env = stopped_after_checkpoint(few_data, tmp_path)
    assert forked.run({**env, "MATRIX_LR": "0.01"}) == [tg.EXIT_USER_ERROR]
    assert (tmp_path / "run.state").exists()


def test_a_second_process_under_the_same_run_id_is_refused(few_data: Path, whole: Whole, tmp_path: Path) -> None:
    env, gate = forked.environment(few_data, tmp_path), tmp_path.parent / f"{tmp_path.name}.gate"

    def hold() -> None:
        gate.write_text("")
        while gate.exists():
            time.sleep(0.01)

    first = forked.start(env, forked.at_call(tg.Trainer, "train_step", 2, hold))
    while not gate.exists():
        time.sleep(0.01)
    second = forked.run(env)
    gate.unlink()
    assert second == [tg.EXIT_USER_ERROR] and forked.wait(first) == 0
    assert (tmp_path / "run.artifact").read_bytes() == whole[1]


def test_a_complete_run_says_so_and_is_not_touched(few_data: Path, tmp_path: Path) -> None:
    env = forked.environment(few_data, tmp_path)
    assert forked.run(env) == [0]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"}
    assert forked.run(env) == [tg.EXIT_USER_ERROR]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"} == before


def test_a_log_that_cannot_be_written_costs_its_lines_and_not_the_run(few_data: Path, whole: Whole, tmp_path: Path) -> None:
    def full_disk() -> None:
        original = tg.Log.__init__

        def opened(self: tg.Log, *arguments: object, **keywords: object) -> None:
            original(self, *arguments, **keywords)
            if self.file is not None:
                self.file = open("/dev/full", "a", encoding="utf-8")

        tg.Log.__init__ = opened

    said = tmp_path / "said"
    assert forked.run(forked.environment(few_data, tmp_path), fault=full_disk, said=said) == [0]
    assert (tmp_path / "run.artifact").read_bytes() == whole[1]
    assert "Traceback" not in said.read_text() and tiny.records(said.read_text(), "final")


def test_an_ascii_console_gets_escapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Ascii:
        encoding = "ascii"

        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text.encode("ascii").decode()

        def flush(self) -> None:
            pass

    console = Ascii()
    monkeypatch.setattr(tg.sys, "stdout", console)
    tg.Log(tmp_path / "x.log")("folder ä\ud800")
    assert console.text == "folder \\xe4\\ud800\n" and (tmp_path / "x.log").read_text() == "folder ä\\ud800\n"
