"""What several test files share: one tiny data set and one complete tiny run for the whole session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tiny  # noqa: E402


class TinyRun(NamedTuple):
    """A finished run: where its data and files are, and its log."""

    data: Path
    out: Path
    log: str


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


def finished(data: Path, out: Path, ranks: int) -> TinyRun:
    done = tiny.run(tiny.environment(data, out, RUN_ID="run", LOSSES_PATH=out / "losses.npz"), ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return TinyRun(data, out, (out / "run.log").read_text())


@pytest.fixture(scope="session")
def one_rank(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return finished(tiny_data, tmp_path_factory.mktemp("one"), ranks=1)


@pytest.fixture(scope="session")
def two_ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return finished(tiny_data, tmp_path_factory.mktemp("two"), ranks=2)


LONG = ("test_ttt_compiled.py", "test_verify_record.py", "test_hostile.py", "test_referee.py", "test_run.py", "test_machines.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of a minute and more first: else one core waits at the end while the other works through the last of them."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
