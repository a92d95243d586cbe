"""How kernels are launched, and compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "FIXED_THREADS",
    "TARGETS",
    "TILE_ELEMENTS",
    "LaunchCount",
    "Variant",
    "compile_ahead",
    "count_launches",
    "fold_warps",
    "launch",
    "warp_size",
]

TILE_ELEMENTS = 1024
"""Elements of a chunk that one load of a folding kernel takes: two rows of each of its 8 groups."""

FIXED_THREADS = 256
"""Threads of a program of a kernel that does not fold."""

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("cuda", 120, 32),
    GPUTarget("hip", "gfx942", 64),
    GPUTarget("hip", "gfx950", 64),
)
"""GPUs that every kernel is compiled for in the tests."""

# Contraction into fused multiply-adds would change bits.
_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a kernel, for ahead-of-time compilation.

    Attributes:
        kernel: The jitted function.
        pointers: Argument name to Triton type, for arguments that are not constexpr.
        constants: Constexpr values.
        item_bytes: Bytes of the narrowest element of the hot streams, which sets the threads of a folding kernel;
            0 for a kernel with a fixed number of warps.
        hot_bytes: Bytes that one program loads and stores for a full chunk, beside tables and scalars.
        hot_bits: Bits that a thread moves at once of the narrowest hot stream, where that is less than 128.
        capped: Whether registers are capped so that half of a processor's threads are resident.
        threads: Of a program of a kernel with a fixed number of warps; one warp where that has more.
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    item_bytes: int
    hot_bytes: int
    hot_bits: int = 128
    capped: bool = False
    threads: int = FIXED_THREADS

    def warps(self, target: GPUTarget) -> int:
        """Warps of a program on ``target``."""
        if self.item_bytes:
            return fold_warps(self.item_bytes, target.warp_size)
        return max(1, int(self.threads // target.warp_size))


@dataclass(slots=True)
class LaunchCount:
    """Launches inside a :func:`count_launches` block so far."""

    launches: int = 0


_COUNT: ContextVar[LaunchCount | None] = ContextVar("gradkern_launches", default=None)


@contextmanager
def count_launches() -> Iterator[LaunchCount]:
    """Count every launch inside the ``with``, on a GPU as in the interpreter; an inner block counts for itself."""
    count = LaunchCount()
    token = _COUNT.set(count)
    try:
        yield count
    finally:
        _COUNT.reset(token)


def launch(kernel: Any, programs: int, *args: Any, num_warps: int, capped: bool = False, **constants: Any) -> None:
    """Launch ``programs`` programs of a kernel where its tensors lie: the one place that sets compiler options.

    Args:
        kernel: The jitted function.
        programs: Programs in the grid, at least 1.
        args: Positional arguments of the kernel, a tensor among them.
        num_warps: Warps of a program.
        capped: Whether registers are capped so that half of a processor's threads are resident: for kernels with more
            live values than that leaves room for, which the compiler can order so that they fit.
        constants: Its constexpr arguments.
    """
    count = _COUNT.get()
    if count is not None:
        count.launches += 1
    options: dict[str, Any] = _OPTIONS
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    # Triton launches on the current device, wherever its arguments lie.
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        if capped and not triton.knobs.runtime.interpret:
            options = {**_OPTIONS, **_register_cap(triton.runtime.driver.active.get_current_target())}
        kernel[(programs,)](*args, **constants, **options, num_warps=num_warps)


def fold_warps(item_bytes: int, lanes: int) -> int:
    """Warps such that every thread of a folding kernel loads 16 bytes of its narrowest stream at once."""
    return max(1, TILE_ELEMENTS * item_bytes // 16 // lanes)


def _register_cap(target: GPUTarget) -> dict[str, int]:
    """65,536 registers for half of 2,048 threads, or of 1,536 on consumer GPUs; AMD's compiler has no such option."""
    if target.backend != "cuda":
        return {}
    return {"maxnreg": 80 if target.arch in (86, 89, 120, 121) else 64}


def warp_size() -> int:
    """Lanes of a warp on the current GPU; 32 in the interpreter, where it has no effect."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def compile_ahead(variant: Variant, target: GPUTarget) -> Any:
    """Compile for ``target`` without a GPU; not in a process that runs the interpreter.

    Returns:
        Triton's compiled kernel: ``asm`` with ``ptx`` and ``cubin``, or ``amdgcn``; ``metadata``.
    """
    names = variant.kernel.arg_names
    signature = {name: variant.pointers.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    return triton.compile(
        ASTSource(variant.kernel, signature, constexprs=constants),
        target=target,
        options={
            **_OPTIONS,
            **(_register_cap(target) if variant.capped else {}),
            "num_warps": variant.warps(target),
        },
    )
