"""Each kind of fault that users have met, as they met it: a line or a score, and nothing lost."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import tiny
from test_run import eval_only

import train_gpt as tg


@pytest.fixture(scope="module")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("few"), train_docs=40, val_docs=4)


@pytest.fixture(scope="module")
def trained(few_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert forked.run(forked.environment(few_data, out)) == [0]
    return out / "run.artifact"


def told(env: dict[str, str], said: Path, fault: forked.Fault | None = None) -> tuple[int, list[str], str]:
    """Exit status of a run, its last lines of errors and warnings, and all it said, which is never a traceback."""
    status, = forked.run(env, fault=fault, said=said)
    text = said.read_text(errors="replace")
    assert "Traceback" not in text, text[-2000:]
    return status, [line for line in text.splitlines() if line.startswith(("error: ", "warning: "))], text


def test_three_runs_started_at_once_without_a_name_do_not_meet(few_data: Path, tmp_path: Path) -> None:
    runs = [forked.start(forked.environment(few_data, tmp_path, RUN_ID="")) for _ in range(3)]
    assert [forked.wait(run) for run in runs] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.artifact"))) == 3


def test_a_failed_start_does_not_take_the_name(few_data: Path, tmp_path: Path) -> None:
    assert forked.run(forked.environment(tmp_path / "none", tmp_path)) == [tg.EXIT_USER_ERROR]
    assert forked.run(forked.environment(few_data, tmp_path)) == [0]


def test_every_flipped_bit_of_a_state_is_noticed(few_data: Path, tmp_path: Path) -> None:
    env = forked.environment(few_data, tmp_path)
    forked.run(env, fault=forked.at_call(tg.Trainer, "train_step", 3, lambda: os._exit(9)))
    run = tg.Run(tg.Config.from_env(env), tg.Ranks(), tg.Log(None, enabled=False))
    model = tg.GPT(run.cfg, run.dtype)
    loader = tg.TrainLoader(tg.Dataset(few_data).read("train"), run.cfg, run.ranks)
    trainer = tg.Trainer(run, model, loader)
    path, generator = tmp_path / "run.state", random.Random(0)
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            tg.Checkpoint(run)
    path.write_bytes(whole)
    tg.Checkpoint(run).resume(trainer)
    assert trainer.step == 2


def onto(device: str, *streams: int) -> forked.Fault:
    """A fault: standard output (1), or errors (2) as well, go to a device."""
    def arm() -> None:
        for stream in streams:
            os.dup2(os.open(device, os.O_WRONLY), stream)
        sys.stdout = os.fdopen(1, "w", closefd=False)
    return arm


def without_a_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize("fault", [onto("/dev/full", 1), onto("/dev/full", 1, 2), without_a_reader], ids=["full", "both full", "no reader"])
def test_a_console_that_cannot_be_written_costs_its_lines_and_not_the_run(few_data: Path, trained: Path, tmp_path: Path,
                                                                          fault: forked.Fault) -> None:
    status, warnings, _ = told(forked.environment(few_data, tmp_path / "out"), tmp_path / "said", fault)
    assert status == 0 and len(warnings) <= 1
    assert (tmp_path / "out" / "run.artifact").read_bytes() == trained.read_bytes()
    assert tiny.records((tmp_path / "out" / "run.log").read_text(), "final")


def test_out_of_memory_is_a_line(few_data: Path, tmp_path: Path) -> None:
    def little() -> None:
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + 50_000_000,) * 2)

    status, lines, _ = told(forked.environment(few_data, tmp_path, MODEL_DIM=1024, MLP_MULT=1), tmp_path / "said", little)
    assert status == tg.EXIT_USER_ERROR and lines[-1].startswith("error: out of memory")


def test_a_disk_that_fills_up_during_a_run_is_a_line_and_the_same_command_goes_on(few_data: Path, trained: Path, tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,) * 2)

    env = forked.environment(few_data, tmp_path / "out")
    status, lines, _ = told(env, tmp_path / "said", small)
    assert status == tg.EXIT_USER_ERROR and "run.state" in lines[-1]
    assert forked.run(env) == [0] and (tmp_path / "out" / "run.artifact").read_bytes() == trained.read_bytes()


def test_an_artifact_over_the_cap_is_reported_when_it_is_scored(few_data: Path, trained: Path, tmp_path: Path) -> None:
    def lower() -> None:
        tg.ARTIFACT_CAP_BYTES = 1000

    status, lines, text = told(eval_only(few_data, tmp_path, trained), tmp_path / "said", lower)
    assert status == tg.EXIT_OVER_LIMIT and "over the cap of 1000" in lines[-1] and tiny.records(text, "final")


@pytest.mark.parametrize("tokenizer", ["folder", "text", "nothing"])
def test_a_tokenizer_that_is_none_is_a_line(few_data: Path, tmp_path: Path, tokenizer: str) -> None:
    path = {"folder": few_data, "text": Path(__file__), "nothing": Path(os.devnull)}[tokenizer]
    env = forked.environment(few_data, tmp_path, CASEOPS_ENABLED=0, TOKENIZER_PATH=path)
    status, lines, _ = told(env, tmp_path / "said")
    assert status == tg.EXIT_USER_ERROR and str(path) in lines[-1]


@pytest.mark.parametrize(("given", "status", "named"), [
    ({"MODEL_DIM": "abc"}, 2, ["MODEL_DIM='abc'"]), ({"MODEL_DIM": 100}, 0, ["MODEL_DIM=100 differs"]),
    ({"NUM_LAYERS": 2, "LOOP_START": 200}, 0, ["NUM_LAYERS=2 differs", "LOOP_START=200 differs"]),
    ({"EVAL_SEQ_LEN": 100_000}, 0, ["EVAL_SEQ_LEN=100000 differs"]), ({"TTT_CHUNK_SIZE": 4096}, 2, ["TTT_CHUNK_SIZE=4096"]),
    ({"EVAL_SEQ_LEN": 100_000, "VAL_BATCH_TOKENS": 16}, 2, ["EVAL_SEQ_LEN=100000, VAL_BATCH_TOKENS=16"]),
], ids=str)
def test_settings_beside_an_artifact_what_is_bad_is_said_and_what_differs_is_said(
    few_data: Path, trained: Path, tmp_path: Path, given: dict, status: int, named: list[str]
) -> None:
    env = eval_only(few_data, tmp_path, trained, **given)
    found, lines, _ = told(env, tmp_path / "said")
    assert found == status and len(lines) == len(named) and all(words in line for words, line in zip(named, lines)), lines


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}],
                         ids=str)
def test_odd_variables_of_a_launcher_are_a_line(few_data: Path, tmp_path: Path, given: dict) -> None:
    status, lines, _ = told({**forked.environment(few_data, tmp_path), **given}, tmp_path / "said")
    assert status == tg.EXIT_USER_ERROR and len(lines) == 1 and not list(tmp_path.glob("run.*"))


def test_a_folder_of_any_letters_on_any_console(few_data: Path, tmp_path: Path) -> None:
    """A real start, because the console's letters and the threads' manners are decided before the program runs."""
    out = tmp_path / "ä\u2028b"
    env = {**forked.environment(few_data, tmp_path / "ä"), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, str(tiny.ROOT / "train_gpt.py")], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"\\xe4" in done.stdout and not done.stderr, done.stderr
    assert tiny.records((tmp_path / "ä" / "run.log").read_text("utf-8"), "final")
    status, lines, _ = told(forked.environment(few_data, out), tmp_path / "said")
    assert status == tg.EXIT_USER_ERROR and "ARTIFACT_DIR" in lines[0]


def test_threads_that_wait_do_not_spin() -> None:
    source = (tiny.ROOT / "train_gpt.py").read_text()
    assert source.index('"OMP_WAIT_POLICY", "passive"') < source.index("import torch\n") and os.environ["OMP_WAIT_POLICY"]
