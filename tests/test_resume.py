"""Work is not lost: kills at every change of a file, signals in every phase, damaged states, failing ranks."""

from __future__ import annotations

import json
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
    complete = json.loads((out / "run.run.json").read_text())["stage"] == "done"
    assert complete and set(status) <= {0, tg.EXIT_USER_ERROR}, (out / "run.log").read_text()[-2000:]
    assert (out / "run.artifact").read_bytes() == expected
    assert {path.name for path in out.iterdir()} == forked.COMPLETE


@pytest.mark.parametrize(("ranks", "stride"), [(1, 1), (2, 9)])
def test_a_kill_at_any_change_of_a_file_loses_nothing(few_data: Path, whole: Whole, tmp_path: Path, ranks: int, stride: int) -> None:
    for number in range(1, 200, stride):
        out, struck = tmp_path / str(number), tmp_path / f"{number}.struck"
        env = forked.environment(few_data, out)
        statuses = forked.run(env, ranks, forked.killed_at_change(number, struck))
        if not struck.exists():
            assert statuses == [0] * ranks and number > 30
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
    "initial evaluation": (tg, "evaluate", 1), "first step": (tg.Trainer, "train_step", 1), "last step": (tg.Trainer, "train_step", 3),
    "final evaluation": (tg, "evaluate", 2), "evaluation of the average": (tg, "evaluate", 3), "Hessians": (tg.Calibration, "add", 1),
    "GPTQ": (tg, "gptq", 1), "last of GPTQ": (tg, "gptq", 7), "packing": (tg, "pack_artifact", 1),
    "compression": (tg, "compress", 1), "artifact": (tg, "write_atomically", 4), "scoring": (tg, "model_from_tensors", 1),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_in_any_phase_ends_the_run_and_the_same_command_goes_on(few_data: Path, whole: Whole, tmp_path: Path, place: str,
                                                                                 number: int) -> None:
    env = forked.environment(few_data, tmp_path, VAL_LOSS_EVERY=100)
    status = forked.run(env, fault=forked.at_call(*PLACES[place], lambda: os.kill(os.getpid(), number)))
    assert status == [128 + number] or (place == "scoring" and status == [-number]), (tmp_path / "run.log").read_text()[-1500:]
    goes_on(env, whole[1])


def test_a_signal_to_one_of_two_ranks_stops_both(few_data: Path, whole: Whole, tmp_path: Path) -> None:
    env = forked.environment(few_data, tmp_path)
    fault = forked.at_call(tg.Trainer, "train_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert forked.run(env, 2, fault, faulty=1) == [128 + signal.SIGTERM] * 2
    goes_on(env, whole[2], ranks=2)


def fail() -> None:
    raise KeyError("made to fail")


@pytest.mark.parametrize(("act", "status"), [(fail, (1, 2)), (lambda: os.kill(os.getpid(), signal.SIGKILL), (-9,))],
                         ids=["error", "killed"])
@pytest.mark.parametrize("place", ["first step", "Hessians", "GPTQ"])
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
    assert {path.name for path in out.iterdir()} == {"run.log", "run.run.json", "run.state2"}
    return env


@pytest.mark.parametrize("damage", ["state byte", "state cut", "state gone", "index byte", "index cut", "index list", "index stage"])
def test_a_damaged_state_or_index_is_told_and_nothing_is_lost(few_data: Path, tmp_path: Path, damage: str) -> None:
    env = stopped_after_checkpoint(few_data, tmp_path)
    path = tmp_path / ("run.state2" if damage.startswith("state") else "run.run.json")
    data = path.read_bytes()
    changed = {"byte": data[:50] + bytes([data[50] ^ 1]) + data[51:], "cut": data[:-7], "list": b"[]", "stage": b'{"stage": "training"}'}
    path.unlink() if damage == "state gone" else path.write_bytes(changed[damage.split()[1]])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"}
    said = tmp_path.parent / f"{tmp_path.name}.said"
    assert forked.run(env, said=said) == [tg.EXIT_USER_ERROR]
    assert "Traceback" not in said.read_text() and said.read_text().splitlines()[-1].startswith("error: ")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".log"} == before


def test_every_flipped_byte_of_an_index_is_refused_or_harmless(few_data: Path, tmp_path: Path) -> None:
    env = stopped_after_checkpoint(few_data, tmp_path)
    cfg, index = tg.Config.from_env(env), tmp_path / "run.run.json"
    run = tg.Run(cfg, tg.Ranks(), tg.Log(None, enabled=False))
    data, found = index.read_bytes(), tg.Checkpoint(run).found
    accepted = []
    for at in range(len(data)):
        index.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        try:
            accepted += [at] if tg.Checkpoint(run).found != found else []
        except ValueError:
            continue
    assert not accepted, [data[max(0, at - 20): at + 3] for at in accepted][:5]


def test_other_settings_under_the_same_run_id_are_refused(few_data: Path, tmp_path: Path) -> None:
    env = stopped_after_checkpoint(few_data, tmp_path)
    assert forked.run({**env, "MATRIX_LR": "0.01"}) == [tg.EXIT_USER_ERROR]
    assert (tmp_path / "run.state2").exists()


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
