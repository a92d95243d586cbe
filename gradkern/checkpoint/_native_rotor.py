"""The rotor recurrence in C++: hundreds of stages in a second."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gradkern import _native
from gradkern.checkpoint._rotor import Floats, Grid, Table, reference_table

__all__ = ["fastest_rotor", "native_table"]

_WIDTH = 32  # of a block, as in csrc/cpu/rotor.h


def native_table(grid: Grid) -> Floats:
    """As ``reference_table``, to the same numbers, in blocks."""
    # A simulated GPU may be running around this: these tensors have values and are none of its own.
    with _disable_current_modes():
        return _filled(grid)


def _filled(grid: Grid) -> Floats:
    table = torch.empty(grid.slots // _WIDTH + 1, grid.rows, _WIDTH, dtype=torch.float64)
    torch.ops.gradkern._rotor_table_(
        torch.from_numpy(grid.first),
        torch.from_numpy(grid.option_held),
        torch.from_numpy(grid.option_needs),
        torch.from_numpy(grid.option_s),
        torch.from_numpy(grid.input_held),
        torch.from_numpy(grid.start_needs),
        torch.from_numpy(grid.run_needs),
        torch.from_numpy(grid.forward_s),
        grid.slots,
        table,
    )
    seconds: Floats = table.numpy()
    return seconds


def fastest_rotor() -> Table:
    """The native one where the library is loaded."""
    return native_table if _native.unavailable_reason() is None else reference_table
