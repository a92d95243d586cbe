"""What the compiler made of a kernel, read from its machine code.

No GPU is needed, only Triton, which brings its disassembler. Which accesses are hot is read from the first stage of the
compiler, where a load or store of a whole tensor without a mask is one line; how wide they became, from the last.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import triton

from gradkern.ops import _record, _registry
from gradkern.ops._triton.launch import Variant, compile_ahead

__all__ = ["MachineCode", "all_variants", "problems", "read", "target_name", "variant_name"]

WIDE = 128
"""Bits that a hot load or store should move at once."""
LEAST_OCCUPANCY = 0.5
"""Share of a processor's threads that must be able to be resident, so that memory latency hides behind them."""

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_FORBIDDEN = re.compile(r"\b(?:fma[.\w]*|\w+\.approx[.\w]*|\w+\.full[.\w]*|\w+\.ftz[.\w]*)")
# Of an AMD kernel. Divisions, roots and fp64 made an integer become sequences with fused steps of their own, exact as
# a whole; where the LLVM code has none of them, the machine code must have no fused step at all.
_FORBIDDEN_LLVM = re.compile(
    r"\bllvm\.(?:fma|fmuladd|amdgcn\.(?:rcp|rsq|sqrt|fma))\b|\b(?:contract|fast|afn|arcp|reassoc)(?= )"
)
_FUSED = re.compile(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f\w+")
_FUSES_RIGHTLY = re.compile(r"\bfdiv\b|\bllvm\.sqrt\b|\bfpto[us]i double\b")
_IEEE_DENORMALS = "3"
_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1}


@dataclass(frozen=True, slots=True)
class _Processor:
    """A streaming multiprocessor, or a compute unit: what its programs share."""

    registers: int
    threads: int
    programs: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, for every program
    granule: int  # registers of a thread are given out in multiples of this


# NVIDIA: CUDA programming guide, technical specifications per compute capability. AMD: CDNA3 and CDNA4 instruction set
# guides; four SIMDs, each with 512 vector registers a lane and 8 waves.
_PROCESSORS = {
    "sm_80": _Processor(65536, 2048, 32, 164 * 1024, 1024, 8),
    "sm_90": _Processor(65536, 2048, 32, 228 * 1024, 1024, 8),
    "sm_100": _Processor(65536, 2048, 32, 228 * 1024, 1024, 8),
    "sm_120": _Processor(65536, 1536, 24, 100 * 1024, 1024, 8),
    "gfx942": _Processor(4 * 512 * 64, 4 * 8 * 64, 32, 64 * 1024, 0, 8),
    "gfx950": _Processor(4 * 512 * 64, 4 * 8 * 64, 32, 160 * 1024, 0, 8),
}


@dataclass(frozen=True, slots=True)
class MachineCode:
    """Facts about one compiled kernel.

    Attributes:
        registers: Of a thread; vector registers on AMD.
        spill_bytes: Bytes that a thread's spilled registers take on their way out and back, where the code has them.
        local_bytes: Memory of a thread beside registers: stack, local memory, scratch.
        shared_bytes: Shared memory of a program.
        threads: Threads of a program.
        hot_bytes: Bytes of the hot loads and stores in the code, each counted once: those of one tile of a loop.
        hot_access_bits: Width of the narrowest hot load or store; 0 where the kernel has none.
        occupancy: Share of a processor's threads that can be resident, by registers, shared memory and programs.
        forbidden: Instructions in the PTX, or the LLVM code of an AMD kernel, that break the arithmetic contract.
        arithmetic: Whether floating-point arithmetic, or a maximum of bits, was found at all.
    """

    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    threads: int
    hot_bytes: int
    hot_access_bits: int
    occupancy: float
    forbidden: tuple[str, ...]
    arithmetic: bool


def all_variants() -> Iterator[tuple[str, Variant]]:
    """Every variant of every registered op and of recording, with the name of the op."""
    modules = {name: spec.triton.split(":")[0] for name, spec in _registry.SPECS.items()}
    folder = Path(_record.__file__).parent
    modules |= {
        f"record {path.parent.name}": f"{_record.__name__}.{path.parent.name}.triton"
        for path in sorted(folder.glob("*/triton.py"))
    }
    for name, module in modules.items():
        for variant in importlib.import_module(module).VARIANTS:
            yield name, variant


def variant_name(op: str, variant: Variant) -> str:
    """The op and the numbers that tell its variants apart."""
    same = {"ALIGNED", "BLOCK", "STATES", "HYPER"}
    numbers = (f"{k}={v:d}" for k, v in variant.constants.items() if isinstance(v, int) and k not in same)
    return " ".join([op, *numbers])


def target_name(target: Any) -> str:
    """``sm_90``, ``gfx942``."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def read(variant: Variant, target: Any) -> MachineCode:
    """Compile for ``target`` and read the result; not in a process that runs the interpreter."""
    compiled = compile_ahead(variant, target)
    threads = variant.warps(target) * target.warp_size
    name = target_name(target)
    return (_read_nvidia if target.backend == "cuda" else _read_amd)(compiled, threads, name)


def problems(code: MachineCode, variant: Variant) -> Iterator[str]:
    """What is wrong with the machine code of a variant."""
    if code.spill_bytes or code.local_bytes:
        yield f"spills {code.spill_bytes} bytes, {code.local_bytes} bytes of local memory"
    if code.forbidden:
        yield f"has {sorted(code.forbidden)}"
    if variant.hot_bytes and not code.arithmetic:
        yield "no arithmetic: the reader is looking at the wrong thing"
    if variant.hot_bytes and code.hot_access_bits < variant.hot_bits:
        yield f"a hot access moves {code.hot_access_bits} bits, expected {variant.hot_bits}"
    if code.occupancy < LEAST_OCCUPANCY:
        yield (
            f"occupancy {code.occupancy:.2f} with {code.registers} registers, {code.threads} threads and "
            f"{code.shared_bytes} bytes of shared memory, expected at least {LEAST_OCCUPANCY}"
        )


def _occupancy(name: str, registers: int, threads: int, shared: int) -> float:
    processor = _PROCESSORS[name]
    given = -(-max(registers, 1) // processor.granule) * processor.granule
    programs = min(
        processor.registers // (given * threads),
        processor.threads // threads,
        processor.programs,
        processor.shared_bytes // (shared + processor.reserved_bytes) if shared else processor.programs,
    )
    return programs * threads / processor.threads


def _hot_bytes(ttir: str) -> int:
    """Bytes of the loads and stores of whole tensors without a mask, each counted once: the hot accesses."""
    total = 0
    for line in ttir.splitlines():
        access = re.search(r"tt\.(load|store) ([^:]*) : tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", line)
        # Operands are the pointer, the value of a store, then the mask.
        if access and access[2].count(",") == (access[1] == "store"):
            total += prod(map(int, access[3].rstrip("x").split("x"))) * _BYTES[access[4]]
    return total


def _single_words(ttir: str) -> int:
    """Loads and stores of one 4-byte scalar."""
    return len(re.findall(r"tt\.(?:load|store) [^:]* : !tt\.ptr<(?:f32|i32)>", ttir))


def _hot_access_bits(hot: int, wide: int, narrower: list[int]) -> int:
    """Width of the narrowest hot access: all are wide where wide ones account for every hot byte, and none is not."""
    if hot == 0:
        return 0
    if narrower:
        return min(narrower)
    return WIDE if wide >= hot else 32


def _read_nvidia(compiled: Any, threads: int, name: str) -> MachineCode:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(  # noqa: S603  Triton's own program on a file just written
            [str(_CUOBJDUMP), "-res-usage", "-sass", cubin.name], capture_output=True, text=True, check=True
        )
    text = dump.stdout + dump.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"{_CUOBJDUMP} printed no resource usage, got: {text[:500]}")
    # Unmasked accesses have no predicate; what is masked is the tail of a tensor.
    widths = [
        int(vector or 1) * int(bits)
        for vector, bits in re.findall(r"^\s*(?:ld|st)\.global(?:\.v(\d))?\.[bfusi](\d+) ", ptx, re.MULTILINE)
    ]
    shapes = re.findall(r"^\s*(?:ld|st)\.global(\.v\d)?\.[bfusi](\d+) ", ptx, re.MULTILINE)
    narrower = [
        width
        for width, (vector, bits) in zip(widths, shapes, strict=True)
        if width < WIDE and (vector or int(bits) < 32)
    ]
    words = [width for width, (vector, _) in zip(widths, shapes, strict=True) if width == 32 and not vector]
    if len(words) > _single_words(compiled.asm["ttir"]):
        narrower.append(32)
    in_sass = len(re.findall(r"\b(?:LDG|STG)\.E[.\w]*\.128", text))
    hot = _hot_bytes(compiled.asm["ttir"])
    wide = min(widths.count(WIDE), in_sass) * WIDE // 8 * threads
    sizes = {"64": 8, "128": 16, "S16": 2, "U16": 2, "S8": 1, "U8": 1}
    spilled = re.findall(r"\b(?:LDL|STL)((?:\.\w+)*)", text)
    return MachineCode(
        registers=int(usage[1]),
        spill_bytes=sum(next((sizes[s] for s in sizes if f".{s}" in kind), 4) for kind in spilled),
        local_bytes=int(usage[2]) + int(usage[3]),
        shared_bytes=compiled.metadata.shared,
        threads=threads,
        hot_bytes=hot,
        hot_access_bits=_hot_access_bits(hot, wide, narrower),
        occupancy=_occupancy(name, int(usage[1]), threads, compiled.metadata.shared),
        forbidden=tuple(sorted(set(_FORBIDDEN.findall(ptx)))),
        arithmetic=re.search(r"\b(?:(?:add|mul)\.(?:rn\.)?f(?:32|64)|max\.[su]32)", ptx) is not None,
    )


def _read_amd(compiled: Any, threads: int, name: str) -> MachineCode:
    code = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}: +(\d+)", code)
        if found is None:
            raise RuntimeError(f"the code object has no .{key}: the reader is looking at the wrong thing")
        return int(found[1])

    # One file holds both kinds of vector register.
    registers = -(-field("vgpr_count") // 4) * 4 + field("agpr_count") if field("agpr_count") else field("vgpr_count")
    scratch = len(re.findall(r"\bscratch_(?:load|store)", code))
    hot, moved, bits = _hot_bytes(compiled.asm["ttir"]), 0, 0
    for bits, suffix in ((128, "x4"), (64, "x2"), (32, "")):  # what is masked moves single elements
        moved += len(re.findall(rf"\b(?:buffer|global)_(?:load|store)_dword{suffix}\b", code)) * bits // 8 * threads
        if moved >= hot:
            break
    return MachineCode(
        registers=registers,
        spill_bytes=4 * (field("vgpr_spill_count") + scratch),
        local_bytes=field("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        threads=threads,
        hot_bytes=hot,
        hot_access_bits=bits if hot else 0,
        occupancy=_occupancy(name, registers, threads, compiled.metadata.shared),
        forbidden=_forbidden_amd(compiled.asm["llir"], code),
        arithmetic=re.search(r"\bv_(?:(?:pk_)?(?:add|mul)_f(?:32|64)|max_[iu]32)", code) is not None,
    )


def _forbidden_amd(llvm: str, code: str) -> tuple[str, ...]:
    found = set(_FORBIDDEN_LLVM.findall(llvm))
    if not _FUSES_RIGHTLY.search(llvm):
        found.update(_FUSED.findall(code))
    modes = re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", code)
    if not modes or set(modes) != {_IEEE_DENORMALS}:
        found.add(f"denormal modes {modes}")
    return tuple(sorted(found))
