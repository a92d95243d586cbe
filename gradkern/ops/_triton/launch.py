"""How kernels are launched, and compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["ROW_ELEMENTS", "TARGETS", "Variant", "compile_ahead", "fold_warps", "warp_size"]

ROW_ELEMENTS = 512
"""Elements of a chunk that one load of a folding kernel takes: one row of each of its 8 groups."""

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
"""GPUs that every kernel is compiled for in the tests."""


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
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    item_bytes: int
    hot_bytes: int

    def warps(self, target: GPUTarget) -> int:
        """Warps of a program on ``target``."""
        return fold_warps(self.item_bytes, target.warp_size) if self.item_bytes else 256 // target.warp_size


def fold_warps(item_bytes: int, lanes: int) -> int:
    """Warps such that every thread of a folding kernel loads 16 bytes of its narrowest stream at once."""
    return max(1, ROW_ELEMENTS * item_bytes // 16 // lanes)


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
        options={"enable_fp_fusion": False, "num_warps": variant.warps(target)},
    )
