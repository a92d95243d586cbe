"""Finds and loads ``_C.so``, and remembers why it did not.

The library only implements operators (torch's stable ABI, no Python API); their schemas are declared here, so that the
namespace looks the same with and without it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gradkern import _env

__all__ = ["define", "isa", "unavailable_reason"]

_LIBRARY = torch.library.Library("gradkern", "FRAGMENT")
_SCHEMAS = (
    "_sumsq_table_(Tensor table, int operand, int dtype, Tensor(a!) partials) -> ()",
    "_sumsq_exact_table_(Tensor table, int operand, int dtype, Tensor(a!) limbs) -> ()",
    "_abs_norm_table_(Tensor table, int dtype, bool maximum, Tensor(a!) partials) -> ()",
    "_accumulate_table_(Tensor table, int dtype, Tensor(a!)? partials, bool overwrite) -> ()",
    "_stash_table_(Tensor table, int dtype, Tensor(a!) partials) -> ()",
    "_unstash_table_(Tensor table, int dtype, Tensor multiplier) -> ()",
    "_step_scalars_native_(Tensor(a!) scalars, Tensor(b!)[] steps, Tensor[] partials, Tensor[] tables, "
    "int[] operands, int[] dtypes, Tensor(c!)[] sums, float max_norm, float? grad_scale, bool skip, "
    "bool skip_nonfinite) -> ()",
    "_least_capacity_(Tensor first, Tensor saved, Tensor peak, Tensor extra, Tensor(a!) choices) -> int",
    "_prefix_knapsack_(Tensor first, Tensor saved, Tensor peak, Tensor extra, int capacity, int states, "
    "Tensor(a!) choices) -> (float, bool)",
    "_rotor_table_(Tensor first, Tensor option_held, Tensor option_needs, Tensor option_s, Tensor input_held, "
    "Tensor start_needs, Tensor run_needs, Tensor forward_s, int slots, Tensor(a!) table) -> ()",
    "_reduce_matrix_(Tensor? left, Tensor right, int samples, Tensor start, Tensor(a!) left_codes, "
    "Tensor(b!) left_scales, Tensor(c!) right_codes, Tensor(d!) right_scales) -> ()",
    "_reduce_vector_(Tensor rows, Tensor? factors, int samples, Tensor(a!) codes, Tensor(b!) scales) -> ()",
    "_record_matrices_(Tensor[] rows, Tensor[] columns, Tensor[] starts, int[] offsets, int samples, "
    "Tensor(a!) block) -> ()",
    "_add_gradients_(Tensor(a!)[] sums, Tensor[] gradients, int[] are_first) -> ()",
    "_compare_gradients_(Tensor[] captured, Tensor[] gradients, Tensor(a!) squares) -> ()",
    "_measure_bends_(Tensor logits, Tensor grad, int samples, float scale, bool is_declared, Tensor(a!) sums) -> float",
    "_shadow_step_(Tensor[] gradients, Tensor(a!)[] momenta, Tensor(b!)[] deltas, Tensor[] second_moments, "
    "Tensor numbers, Tensor(c!) roundings, Tensor(d!) smoothed, float sum_rounding) -> bool",
    "_sketch_top_(Tensor codes, Tensor scales, Tensor ids, Tensor ranges, Tensor queries, Tensor query_scales, "
    "Tensor(a!) scores, Tensor(b!) best_ids) -> ()",
    "_triad_(Tensor(a!) out, Tensor a, Tensor b, bool streaming) -> ()",
    "_isa() -> str",
)


def define(schema: str) -> None:
    """Declare an operator that ``_C.so`` implements."""
    _LIBRARY.define(schema)


def _load() -> str | None:
    for schema in _SCHEMAS:
        define(schema)
    if not _env.native_wanted():
        return "GRADKERN_NATIVE=0"
    path = Path(__file__).with_name("_C.so")
    if not path.exists():
        return f"{path.name} is not built (install a C++ compiler and ninja, then reinstall with --no-build-isolation)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    wanted = _env.cpu_isa()
    chosen = torch.ops.gradkern._isa()
    if wanted is not None and wanted != chosen:
        raise ValueError(
            f"GRADKERN_CPU_ISA is {wanted!r}, but this CPU runs at most {chosen!r}; unset it to choose automatically"
        )
    return None


_REASON = _load()


def unavailable_reason() -> str | None:
    """Why the native library is off, or None when it is loaded."""
    return _REASON


def isa() -> str | None:
    """Instruction set of the CPU loops, or None without the native library."""
    return None if _REASON is not None else str(torch.ops.gradkern._isa())
