"""Runs in forked children of this process, which spares each of them the imports, with faults that strike at a chosen place."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import tiny
import torch

import train_gpt as tg

SMALL = {"NUM_LAYERS": 4, "LOOP_START": 1, "LOOP_END": 1, "PARALLEL_START_LAYER": 3, "TRAIN_LOOP_PHASE_DEPTHS": "1", "EVAL_LOOP_DEPTH": 1,
         "TRAIN_LOOP_PREWARM_DEPTHS": "none", "ITERATIONS": 3, "CHECKPOINT_EVERY": 2, "WARMUP_STEPS": 0, "TTT_ENABLED": 0, "MODEL_DIM": 16,
         "TRAIN_BATCH_TOKENS": 256, "GPTQ_CALIBRATION_BATCHES": 1, "RUN_ID": "run", "GATE_WINDOW": 4, "RANK_TIMEOUT_SECONDS": 20}
COMPLETE = {"run.artifact", "run.log", "run.state"}
Fault = Callable[[], object]


def start(env: dict[str, str], fault: Fault | None = None, said: Path | None = None) -> int:
    """main(env) in a child; its process id. `fault` is called in the child first."""
    tg.counted_code()  # kept, so that every child need not make it
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        sink = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.clear()
        os.environ.update(env)
        if fault is not None:
            fault()
        status = tg.main(env, [])
        sys.stdout.flush()
    except BaseException:
        status = 99
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def wait(child: int, seconds: float = 60.0) -> int:
    """The child's exit status, negative if it ended by a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"still running after {seconds:g} s")


def wait_for_all(children: list[int], grace_seconds: float = 5.0) -> list[int]:
    """Exit statuses; when one has failed the others are killed a little later, as torchrun does."""
    statuses, end = {}, math.inf
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + (grace_seconds if statuses[child] else 60.0))
            elif time.monotonic() > end:
                os.kill(child, 9)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def run(env: dict[str, str], ranks: int = 1, fault: Fault | None = None, faulty: int = 0, said: Path | None = None,
        own: Mapping[int, dict[str, str]] | None = None) -> list[int]:
    """Exit statuses of all ranks of a run; the fault is in rank `faulty`, and each rank has its `own` variables beside the common ones."""
    if ranks == 1:
        return [wait(start(env, fault, said))]
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    shared = {**env, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = [start({**shared, "RANK": str(r), "LOCAL_RANK": str(r), **(own or {}).get(r, {})}, fault if r == faulty else None, said)
                for r in range(ranks)]
    return wait_for_all(children)


def environment(data: Path, out: Path, **changes: object) -> dict[str, str]:
    return tiny.environment(data, out, **{**SMALL, **changes})


def at_call(owner: object, name: str, number: int, act: Fault) -> Fault:
    """A fault: `act` right before the number-th call (from 1) of a function."""
    def arm() -> None:
        original, left = getattr(owner, name), [number]

        def counted(*arguments: object, **keywords: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                act()
            return original(*arguments, **keywords)

        setattr(owner, name, counted)
    return arm


def killed_at_change(number: int, counter: Path) -> Fault:
    """A fault: the process ends, as by SIGKILL, before the number-th call that changes a file, or half way through a write."""
    def arm() -> None:
        left, original, fsync = [number], Path.open, os.fsync

        def strike(file: object = None, data: bytes = b"") -> None:
            left[0] -= 1
            if left[0] == 0:
                if file is not None:
                    file.write(data[: len(data) // 2])
                    file.flush()
                counter.write_text("struck")
                os._exit(9)

        def audit(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if left[0] > 0 and (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.chmod")):
                strike()

        def watched(path: Path, mode: str = "r", *arguments: object, **keywords: object) -> object:
            file = original(path, mode, *arguments, **keywords)
            if mode != "wb":
                return file

            class Writer:
                def __enter__(self) -> Writer:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, data: bytes) -> int:
                    strike(file, data)
                    return file.write(data)

                def __getattr__(self, name: str) -> object:
                    return getattr(file, name)
            return Writer()

        def synced(handle: int) -> None:
            strike()
            fsync(handle)

        Path.open, os.fsync = watched, synced
        sys.addaudithook(audit)
    return arm


def killed_at_log_line(number: int, counter: Path) -> Fault:
    """A fault: the process ends, as by SIGKILL, half way through the number-th line of its log (from 1)."""
    def arm() -> None:
        original, left = tg.Log.open, [number]

        class Writer:
            def __init__(self, file: object) -> None:
                self.file = file

            def __getattr__(self, name: str) -> object:
                return getattr(self.file, name)

            def write(self, text: str) -> None:
                left[0] -= 1
                if left[0] == 0:
                    self.file.write(text[: len(text) // 2])
                    self.file.flush()
                    counter.write_text("struck")
                    os._exit(9)
                self.file.write(text)

        def opened(log: tg.Log) -> None:
            original(log)
            log.file = Writer(log.file)

        tg.Log.open = opened
    return arm
