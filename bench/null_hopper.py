"""Python's side of the null CUDA device: what Triton and Inductor launch is noted with its bytes, and never run.

Two ways for a kernel to arrive. Our own Triton kernels are compiled for sm_90 and built by ptxas, as on a GPU, when they are
first launched. The kernels that Inductor writes are replaced by a stub that reads their bytes off their source: building the
hundreds of a training step would take minutes; `build` makes single ones, for their registers and spills.

A process must start with build/null_cuda.so preloaded (bench/rehearse.py does it); `install()` comes before any compilation.
"""
from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

BUILD = Path(__file__).resolve().parent / "null_cuda" / "build"
SHARED_MAX = 232_448  # bytes of shared memory that a block of an H100 may have
SLOW_CALLS = ("libdevice.pow", "tl_math.cos", "tl_math.sin")  # tens of instructions each


class Calls(NamedTuple):
    """What reached the device since the last reset."""

    counts: dict[str, int]  # by kernel name; "host waits: ..." and "captured ..." among them
    order: list[str]  # every launch with its sizes, replayed ones included
    faults: list[str]  # what a real device would have refused
    notes: list[str]

    @property
    def host_waits(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith("host waits"))


class Built(NamedTuple):
    """A kernel as ptxas built it."""

    name: str
    registers: int
    spilled: int  # bytes of stack and local memory of a thread
    shared: int


def environment(devices: int = 1) -> dict[str, str]:
    """Variables for a process on the null device."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"), "TRITON_CACHE_DIR": str(BUILD / "triton")}
    return {**caches, "LD_PRELOAD": str(BUILD / "null_cuda.so"), "LD_LIBRARY_PATH": str(BUILD), "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "NULL_CUDA_DEVICES": str(devices), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}


def library() -> ctypes.CDLL:
    """The preloaded device."""
    return ctypes.CDLL(str(BUILD / "null_cuda.so"))


def note(name: str, shape: str, stream: int | None) -> None:
    """Log a launch on a stream, as the device logs its own."""
    library().null_cuda_note(name.encode(), shape.encode(), ctypes.c_void_p(stream or 0))


def reset() -> None:
    """Forget what was launched; from here on the order is kept."""
    library().null_cuda_reset()
    library().null_cuda_keep_order(1)


def calls() -> Calls:
    """What happened since the last reset."""
    result = Calls({}, [], [], [])
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        library().null_cuda_dump(file.name.encode())
        lines = Path(file.name).read_text(errors="replace").splitlines()
    for line in lines:
        kind, _, rest = line.partition("\t")
        if kind == "count":
            number, name = rest.split("\t", 1)
            result.counts[name] = int(number)
        else:
            {"order": result.order, "fault": result.faults, "note": result.notes}[kind].append(rest)
    return result


# ------------------------------------------------------------------------------------------------- our own Triton kernels


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and its bytes of stack and local memory, of the kernel in a cubin."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers.get("LOCAL", 0)


class Utils:
    """What Triton asks of its driver. A function's handle is its entry here."""

    kernels: dict[str, Built] = {}

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MAX, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32,
                "sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}

    @classmethod
    def load_binary(cls, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers, spilled = resources(cubin)
        handle = f"{name}|{hash(cubin)}"
        cls.kernels[handle] = Built(name, registers, spilled, shared)
        return 1, handle, registers, spilled // 4, 1024

    @staticmethod
    def unload_module(*_: Any) -> None:
        pass


class Launcher:
    """Notes a launch in place of making it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        """Check what a launch would: tensors on the device, a legal grid. Then its bytes, numbers and resources go to the log."""
        import torch

        tensors, numbers = {}, []
        for value in rest:
            base = getattr(value, "base", value)  # of a TMA descriptor
            if isinstance(base, torch.Tensor):
                if not base.is_cuda:
                    raise RuntimeError(f"{self.metadata.name}: an argument is on {base.device}")
                tensors[base.data_ptr(), base.numel()] = base.numel() * base.element_size()
            elif type(base) is int:
                numbers.append(base)
        if min(x, y, z) < 1:
            return
        if max(y, z) > 65_535:
            raise RuntimeError(f"{self.metadata.name}: grid {x, y, z} is not legal")
        kernel = Utils.kernels[function]
        note(f"triton {kernel.name}", f"grid {x},{y},{z} bytes {sum(tensors.values())} ints {','.join(map(str, numbers))} "
             f"registers {kernel.registers} spilled {kernel.spilled} shared {kernel.shared} warps {self.metadata.num_warps}", stream)


# --------------------------------------------------------------------------------------------------- Inductor's kernels


def balanced(text: str, opened: int) -> str:
    """What stands in the parentheses that open at `opened`."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return text[opened + 1: at]
    raise ValueError(f"unbalanced parentheses: {text[opened: opened + 80]}")


class Traffic:
    """How many elements of each pointer an Inductor kernel reads and writes, read off its source.

    An access `pointer + (expression)` touches as many elements as the index variables in it have values: an operand that is
    broadcast counts once, and of a wide buffer only the columns that are used. What a program reads again a few columns to
    the side, as halves of a head that rotate, comes out of the cache and counts once.
    """

    def __init__(self, name: str, source: str) -> None:
        body = source[source.index(f"def {name}("):]
        self.roles = [role.split(":")[0].strip() for role in balanced(body, body.index("(")).split(",")]
        self.accesses: dict[str, dict[bool, set[str]]] = {}  # pointer -> writes -> expressions
        for found in re.finditer(r"tl\.(load|store|atomic_add)\((\w+) \+ (?=\()", body):
            kinds = self.accesses.setdefault(found[2], {False: set(), True: set()})
            kinds[found[1] != "load"].add(balanced(body, found.end()))
        self.variables = dict(re.findall(r"^ *([xyr]\d*(?:_\d+)?) = (.*(?:xindex|yindex|r\d_index).*)$", body, re.M))
        self.sizes = {axis: int(n) for axis, n in re.findall(r"^ *((?:[xy]|r\d_)numel) = (\d+)$", body, re.M)}
        self.slow = sum(body.count(call) for call in SLOW_CALLS)

    def range_of(self, variable: str, sizes: dict[str, int]) -> tuple[str, int]:
        """The axis of an index variable and the number of its values; ValueError if its formula is of an unknown form."""
        found = re.fullmatch(r"\(*(\w+?)index(?: // (\w+)\)?)?(?: % (\w+)\)?)?\)*", self.variables[variable].strip())
        if found is None:
            raise ValueError(self.variables[variable])
        axis, divisor, modulus = found.groups()
        size = sizes[f"{axis}numel"]
        divisor, modulus = (int(n) if n.isdigit() else sizes[n] for n in (divisor or "1", modulus or str(size)))
        return axis, min(math.ceil(size / divisor), modulus)

    def elements(self, expression: str, sizes: dict[str, int]) -> int:
        """Elements that one access touches; ValueError or KeyError if the source does not tell."""
        names = set(re.findall(r"\b[a-z]\w*\b", expression))
        if any(name.startswith("tmp") or name == "program_id" for name in names):
            raise ValueError(expression)
        axes: dict[str, int] = {}
        for name in names & set(self.variables):
            axis, values = self.range_of(name, sizes)
            axes[axis] = min(axes.get(axis, 1) * values, sizes[f"{axis}numel"])
        return math.prod(axes.values())

    def together(self, expressions: set[str], sizes: dict[str, int]) -> int:
        """Elements that accesses of one pointer touch: those that differ by a constant are one, wider by that constant."""
        groups: dict[Any, list[int]] = {}
        for expression in sorted(expressions):
            names = sorted(set(re.findall(r"\b[a-z]\w*\b", expression)))
            linear = not re.search(r"//|%", expression) and set(names) <= set(self.variables)
            at = [eval(expression, {name: int(name == one) for name in names}) for one in ("", *names)] if linear else [0]
            steps = tuple((name, value - at[0]) for name, value in zip(names, at[1:]))
            groups.setdefault(steps if linear else expression, [self.elements(expression, sizes)]).append(at[0])
        total = 0
        for steps, (elements, *offsets) in groups.items():
            run = 1  # neighbouring elements that one access takes, as of all heads that lie side by side
            for name, step in sorted(steps, key=lambda item: item[1]) if len(offsets) > 1 else ():
                run *= self.range_of(name, sizes)[1] if step == run else 1
            total += min(elements + elements * (max(offsets) - min(offsets)) // run, elements * len(offsets))
        return total

    def moved(self, role: str, numel: int, sizes: dict[str, int]) -> int:
        """Elements read plus elements written of a tensor of `numel`; all of it where the source does not tell."""
        total = 0
        for expressions in filter(None, self.accesses.get(role, {}).values()):
            try:
                total += min(numel, self.together(expressions, sizes))
            except (ValueError, KeyError):
                total += numel
        return total


class Stub:
    """Stands where a compiled kernel of Inductor would and notes its launches."""

    sources: dict[str, str] = {}

    def __init__(self, name: str, source: str) -> None:
        self.name, self.traffic = name, Traffic(name, source)
        self.sources[name] = source

    def run(self, *args: Any, stream: int | None = None, **_: Any) -> None:
        """A launch: bytes moved, elements, slow calls in the source, and every tensor's type and shape go to the log."""
        import torch

        named = dict(zip(self.traffic.roles, args))
        sizes = self.traffic.sizes | {role: value for role, value in named.items() if isinstance(value, int)}
        moved, shapes = 0, []
        for role, value in named.items():
            if isinstance(value, torch.Tensor):
                if not value.is_cuda:
                    raise RuntimeError(f"{self.name}: {role} is on {value.device}")
                moved += self.traffic.moved(role, value.numel(), sizes) * value.element_size()
                shapes.append(f"{role}:{str(value.dtype)[6:]}{list(value.shape)}".replace(" ", ""))
        elements = math.prod(n for axis, n in sizes.items() if axis.endswith("numel"))
        note(f"triton {self.name}", f"bytes {moved} elements {elements} slow {self.traffic.slow} {' '.join(shapes)}", stream)


def build(name: str) -> list[Built]:
    """What ptxas makes of one of Inductor's kernels that was stubbed, for each configuration that would be tried."""
    from torch._inductor.codecache import PyCodeCache

    kernel = getattr(PyCodeCache.load(Stub.sources[name]), name)
    kernel.precompile()
    return [Built(name, one.n_regs, 4 * one.n_spills, one.shared) for one in kernel.launchers]


def install() -> None:
    """Give Triton the null driver, and Inductor the stub."""
    os.environ.update({name: value for name, value in environment().items() if name not in os.environ})
    import torch
    import torch._inductor.async_compile as async_compile
    import torch._inductor.config as config
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher
            self.get_device_capability = torch.cuda.get_device_capability
            self.get_current_stream = torch._C._cuda_getCurrentRawStream
            self.get_current_device = torch.cuda.current_device
            self.set_current_device = torch.cuda.set_device

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    config.use_static_triton_launcher = False
    config.compile_threads = 1
    config.triton.autotune_pointwise = False  # a choice needs times
    async_compile.AsyncCompile.triton = lambda self, kernel_name, source_code, device_str="cuda": Stub(kernel_name, source_code)
