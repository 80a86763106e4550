"""A process that ends as by kill -9 at its n-th call that changes a file, and a disk that is full at some write."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # names of audit events


class Wrapped:
    """A file opened for writing, to which something happens at its writes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class DyingFile(Wrapped):
    """Every write may be the last: it gets half of the bytes to the disk first."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        super().__init__(file)
        self.tick = tick

    def write(self, data: Any) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.tick()
        self.file.write(data[len(data) // 2 :])
        return len(data)


class FullDisk(Wrapped):
    """So many writes, counted over all files, still fit."""

    left = 0

    def write(self, data: Any) -> int:
        FullDisk.left -= 1
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def open_on_full_disk(path: Any, mode: str = "r") -> Any:
    """In place of `open`."""
    return FullDisk(open(path, mode)) if mode.startswith("w") else open(path, mode)


def dies(step: int, module: ModuleType, work: Callable[[], object]) -> bool:
    """Do `work` in a forked process that ends at change number `step` (from 0) that `module` makes; False: it got through."""
    child = os.fork()
    if not child:
        try:
            make_mortal(step, module)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"step {step}: the work itself failed"
    return code == 9


def make_mortal(step: int, module: ModuleType) -> None:
    """Count changes of files in this process from here on, and end it at number `step`."""
    calls = itertools.count()

    def tick() -> None:
        if next(calls) == step:
            os._exit(9)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            tick()

    def mortal_open(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = open(path, mode, *arguments, **options)
        return file if mode in ("r", "rb") else DyingFile(file, tick)

    sys.addaudithook(watch)
    module.open = mortal_open
