"""Several machines without a shared folder, and ranks that hang: rank 0 decides, one line says which rank and why."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import tiny
from test_run import scores

import train_gpt as tg


class Machines:
    """Two machines with a rank each: their own data and their own folder for what a run writes."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data, self.out = [folder / f"data{n}" for n in (0, 1)], [folder / f"out{n}" for n in (0, 1)]
        self.said = folder / "said"
        for own in self.data:
            shutil.copytree(data, own)

    def run(self, fault: forked.Fault | None = None, faulty: int = 0, second: dict[str, object] | None = None,
            **changes: object) -> list[int]:
        """Exit statuses of the ranks; `second` are settings of the second machine alone."""
        envs = [forked.environment(self.data[n], self.out[n], LOCAL_WORLD_SIZE=1, LOCAL_RANK=0, **changes) for n in (0, 1)]
        envs[1] |= {name: str(value) for name, value in (second or {}).items()}
        self.said.unlink(missing_ok=True)
        return forked.run({}, 2, fault, faulty, self.said, own=dict(enumerate(envs)))

    def files(self, n: int) -> set[str]:
        return {path.name for path in self.out[n].iterdir()} if self.out[n].exists() else set()

    def errors(self) -> list[str]:
        """What was said of errors, which is never a traceback."""
        text = self.said.read_text()
        assert "Traceback" not in text, text[-3000:]
        return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("few"), train_docs=40, val_docs=4)


@pytest.fixture
def machines(tmp_path: Path, few_data: Path) -> Machines:
    return Machines(tmp_path, few_data)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_resumed_machines_make_the_artifact_of_one_and_keep_no_state(machines: Machines, few_data: Path,
                                                                                        tmp_path: Path) -> None:
    one = forked.environment(few_data, tmp_path / "one", CHECKPOINT_EVERY=1)
    assert forked.run(one, 2) == [0, 0]
    for faulty in (0, 1):
        at = forked.at_call(tg.Trainer, "train_step", 2 if faulty == 0 else 1, killed)
        statuses = machines.run(at, faulty, CHECKPOINT_EVERY=1)
        assert statuses[faulty] == -9 and 0 not in statuses
        assert machines.files(0) == {"run.log", "run.state"}
        assert len(machines.errors()) == 1
    assert machines.run(CHECKPOINT_EVERY=1) == [0, 0] and "resumed from step 1" in machines.said.read_text()
    assert machines.files(0) == forked.COMPLETE
    assert machines.files(1) <= {"run.log"}, "the line of a rank 0 that was killed"
    assert (machines.out[0] / "run.artifact").read_bytes() == (tmp_path / "one" / "run.artifact").read_bytes()
    trained = scores(machines.said.read_text())["quantized"]
    assert machines.run(EVAL_ONLY=1, second={"ARTIFACT_PATH": "nowhere", "LOSSES_PATH": "nowhere"}) == [0, 0]
    assert scores(machines.said.read_text())["quantized"] == trained


def test_a_state_on_another_machine_than_rank_0s_is_not_trained_over(machines: Machines) -> None:
    machines.run(forked.at_call(tg.Trainer, "train_step", 3, killed), 1)
    before = machines.files(0)
    machines.out.reverse()
    assert 0 not in machines.run() and machines.files(1) == before
    assert len(machines.errors()) == 1 and "rank 1" in machines.errors()[0]
    machines.out.reverse()
    assert machines.run() == [0, 0]


@pytest.mark.parametrize(("second", "named"), [
    ({"MATRIX_LR": 0.01}, "MATRIX_LR"), ({"RUN_ID": "other"}, ""), ({"DATA_PATH": "nowhere"}, "nowhere"),
])
def test_a_machine_with_other_settings_or_without_data_is_named(machines: Machines, second: dict, named: str) -> None:
    statuses = machines.run(second=second, RANK_TIMEOUT_SECONDS=5)
    assert (statuses == [0, 0] and not machines.errors()) if not named else (0 not in statuses and named in machines.errors()[0])


def test_a_machine_with_other_data_is_named(machines: Machines) -> None:
    shutil.rmtree(machines.data[1])
    tiny.write_dataset(machines.data[1], train_docs=40, val_docs=4, seed=5)
    assert 0 not in machines.run()
    assert len(machines.errors()) == 1 and "rank 1 has another tiny_train_000000.bin" in machines.errors()[0]


@pytest.mark.parametrize(("act", "faulty", "place"), [
    (lambda: os.kill(os.getpid(), signal.SIGSTOP), 1, (tg.Trainer, "train_step", 2)), (lambda: time.sleep(60), 1, (tg, "gptq", 2)),
    (lambda: time.sleep(60), 0, (tg.Calibration, "add", 1)), (lambda: os.kill(os.getpid(), signal.SIGSTOP), 0, (tg, "evaluate", 1)),
], ids=["stopped", "asleep", "rank 0 asleep", "rank 0 stopped"])
def test_a_rank_that_hangs_is_named_in_the_log_and_ends_the_run(machines: Machines, act, faulty: int, place: tuple) -> None:
    began = time.monotonic()
    statuses = machines.run(forked.at_call(*place, act), faulty, RANK_TIMEOUT_SECONDS=4)
    assert time.monotonic() - began < 30 and statuses[1 - faulty] == tg.EXIT_USER_ERROR
    assert {line for line in machines.errors() if f"rank {faulty} hangs" in line} == set(machines.errors()) != set()
    logs = [out / "run.log" for out in machines.out if (out / "run.log").exists()]
    assert any(f"rank {faulty} hangs" in log.read_text().splitlines()[-1] for log in logs)
