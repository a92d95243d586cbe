"""Tables for speed: lists of tensors as one int64 tensor of sizes and addresses.

Passing four lists of 1,500 tensors through the dispatcher costs more than the update of small tensors itself. A kernel
gets instead one int64 table of shape ``(tensors, 2 + operands)``: element count, first chunk, then an address per
operand. The table is rebuilt only where an address changed, and it never keeps a tensor alive.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter, eq
from typing import NamedTuple, cast, overload

import numpy as np
import torch

from gradkern.ops._chunks import CHUNK, DTYPE_CODES, chunk_count, flat_view, is_dense
from gradkern.ops._kinds import Kinds

__all__ = ["AddressTable", "Operands", "Role"]

Tensors = Sequence[torch.Tensor] | None
Column = Tensors | Sequence[int]

# Attributes by way of map(): a table of 1,500 tensors is checked at every step.
_data_ptr = torch.Tensor.data_ptr
_is_contiguous = torch.Tensor.is_contiguous
_numel = torch.Tensor.numel
_stride = torch.Tensor.stride
_shape = attrgetter("shape")
_dtype = attrgetter("dtype")
_device = attrgetter("device")


class Role(NamedTuple):
    """What an operand must be.

    Attributes:
        dtype: Its dtype; None for any that kernels store.
        like_first: Whether it has shape and strides of the first operand.
        numel: Its elements, for so many elements of the first operand; None for any number.
    """

    dtype: torch.dtype | None = None
    like_first: bool = True
    numel: Callable[[int], int] | None = None


_ANY = Role()
Roles = Mapping[str, Role | None]  # None: a column of integers


class AddressTable:
    """Sizes and addresses of the operands of one op, refreshed before each call.

    Attributes:
        chunks: Chunks of all rows together.
    """

    __slots__ = (
        "_addresses",
        "_aligned",
        "_data",
        "_device_data",
        "_dtypes",
        "_kinds",
        "_rows",
        "_shapes",
        "_strides",
        "_wide",
        "chunks",
    )

    def __init__(self) -> None:
        self._addresses: dict[str, list[int]] = {}
        self._shapes: list[torch.Size] = []
        self._strides: list[tuple[int, ...]] | None = None  # None: all contiguous
        self._dtypes: dict[str, torch.dtype | None] = {}
        self._kinds: dict[str, Kinds] = {}
        self._rows = np.empty((0, 2), dtype=np.int64)  # numpy takes lists several times faster
        self._data = torch.from_numpy(self._rows)  # the same memory
        self._device_data: torch.Tensor | None = None
        self._aligned: bool | None = None
        self._wide: set[str] = set()  # operands laid out as the first
        self.chunks = 0

    def refresh(
        self,
        op: str,
        columns: Mapping[str, Column],
        roles: Roles | None = None,
        moving: Collection[str] | None = None,
        *,
        checked: bool = False,
    ) -> torch.Tensor:
        """Bring the table up to date and return it: int64, CPU, shape ``(tensors, 2 + len(columns))``.

        Args:
            op: Name of the op, for messages.
            columns: Operand name to its tensors, all lists of one length; ``None`` leaves the addresses zero. The first
                column gives the rows their layout.
            roles: What each operand must be; tensors of any kernel dtype laid out as the first where it is not named.
                A role of None: a column of integers, written as they are.
            moving: The operands that can have changed since the last call; None for all.
            checked: Only their addresses can have: dtypes, devices, shapes and strides are known to be the same.

        Raises:
            ValueError: Lists of unequal length, mixed dtypes or devices in a column, or operands of unequal layout.
            TypeError: A dtype that kernels do not store, or another than the operand's role says.
        """
        roles = {} if roles is None else roles
        names = list(columns)
        first = columns[names[0]]
        if first is None:
            raise ValueError(f"{op}: {names[0]} must be a list of tensors, got None")
        if len(first) != self._data.shape[0] or names != list(self._addresses):
            self._reset(len(first), names)
            moving = None
        for position, (name, column) in enumerate(columns.items()):
            if moving is not None and name not in moving and (column is None or self._dtypes[name] is not None):
                continue
            role = roles.get(name, _ANY)
            if role is None:
                self._set_integers(op, position, name, cast("Sequence[int] | None", column))
                continue
            tensors = cast("Tensors", column)
            addresses = [] if tensors is None else list(map(_data_ptr, tensors))
            # The same addresses prove nothing: memory that was freed is handed out again, for other shapes and dtypes.
            if self._dtypes[name] is None or tensors is None:
                known = tensors is None and not self._addresses[name]
            else:
                known = (checked and moving is not None) or self._kinds[name].are_those_of(tensors)
            if not known:
                self._rebuild(op, position, name, role, tensors, addresses, cast("Sequence[torch.Tensor]", first))
            elif addresses != self._addresses[name]:
                if 0 in addresses:
                    self._check_storage(op, name, cast("Sequence[torch.Tensor]", tensors))
                self._move(position, name, addresses)
        return self._data

    @classmethod
    def of_rows(cls, name: str, dtype: torch.dtype, sizes: np.ndarray, addresses: np.ndarray) -> AddressTable:
        """A table of one operand whose rows are known: int64 element counts and addresses, shape ``(rows,)``."""
        table = cls()
        table._reset(len(sizes), [name])
        chunks = -(-sizes // CHUNK)
        table._rows[:, 0] = sizes
        table._rows[:, 1] = np.cumsum(chunks) - chunks
        table._rows[:, 2] = addresses
        table._dtypes[name] = dtype
        table._aligned = bool((addresses % 16 == 0).all())
        table.chunks = int(chunks.sum())
        return table

    def on_device(self, device: torch.device) -> torch.Tensor:
        """The current table on ``device``; on a GPU copied asynchronously from pinned memory when it changed."""
        if device.type == "cpu":
            return self._data
        if self._device_data is None:
            self._device_data = self._data.pin_memory().to(device, non_blocking=True)
        return self._device_data

    def dtype_code(self, name: str) -> int:
        """Kernel code of the column's dtype; 0 for an empty column."""
        dtype = self._dtypes[name]
        return 0 if dtype is None else DTYPE_CODES[dtype]

    def aligned(self) -> bool:
        """Whether every operand laid out as the first starts at a multiple of 16 bytes, as 128-bit accesses need."""
        if self._aligned is None:
            self._aligned = all(address % 16 == 0 for name in self._wide for address in self._addresses[name])
        return self._aligned

    def _reset(self, rows: int, names: list[str]) -> None:
        self._addresses = {name: [] for name in names}
        self._dtypes = dict.fromkeys(names)
        self._kinds = {}
        self._shapes = []
        self._strides = None
        self._rows = np.zeros((rows, 2 + len(names)), dtype=np.int64)
        self._data = torch.from_numpy(self._rows)
        self._device_data = None
        self.chunks = 0

    def _set_integers(self, op: str, position: int, name: str, integers: Sequence[int] | None) -> None:
        values = [] if integers is None else list(integers)
        if integers is not None and len(values) != self._data.shape[0]:
            raise ValueError(f"{op}: {name} has {len(values)} numbers, expected {self._data.shape[0]}")
        if values != self._addresses[name]:
            self._rows[:, 2 + position] = values or 0
            self._addresses[name] = values
            self._device_data = None
        self._dtypes[name] = torch.int64

    def _rebuild(
        self,
        op: str,
        position: int,
        name: str,
        role: Role,
        tensors: Tensors,
        addresses: list[int],
        first: Sequence[torch.Tensor],
    ) -> None:
        if tensors is not None and len(tensors) != len(first):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, expected {len(first)} as in the first operand")
        dtype = None
        if tensors:
            dtype = self._check_column(op, name, role, tensors, first)
            if 0 in addresses:
                self._check_storage(op, name, tensors)
        if position == 0:
            self._set_layouts(op, name, first)
        elif tensors is not None and role.like_first:
            self._check_layouts(op, name, tensors)
        if role.like_first:
            self._wide.add(name)
        self._dtypes[name] = dtype
        self._move(position, name, addresses)
        if name not in self._kinds:
            self._kinds[name] = Kinds()  # a table may be used but once
        elif tensors:
            self._kinds[name].remember(tensors)

    def _move(self, position: int, name: str, addresses: list[int]) -> None:
        if addresses != self._addresses[name]:
            self._rows[:, 2 + position] = addresses or 0
            self._addresses[name] = addresses
            self._device_data = None
            self._aligned = None

    def _check_storage(self, op: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
        for i, tensor in enumerate(tensors):
            if tensor.numel() > 0 and tensor.data_ptr() == 0:
                raise ValueError(
                    f"{op}: {name}[{i}] is a {type(tensor).__name__} on {tensor.device} without memory of its own, "
                    "expected a plain tensor; leave it to torch"
                )

    def _check_column(
        self, op: str, name: str, role: Role, tensors: Sequence[torch.Tensor], first: Sequence[torch.Tensor]
    ) -> torch.dtype:
        dtype, device = tensors[0].dtype, first[0].device
        if role.dtype is not None and dtype != role.dtype:
            raise TypeError(f"{op}: {name}[0] has dtype {dtype}, expected {role.dtype}; convert it first")
        if role.dtype is None and dtype not in DTYPE_CODES:
            raise TypeError(
                f"{op}: {name}[0] has dtype {dtype}, kernels store {', '.join(map(str, DTYPE_CODES))}; "
                "convert it or leave it to torch"
            )
        if set(map(_dtype, tensors)) != {dtype} or set(map(_device, tensors)) != {device}:
            i, tensor = next((i, t) for i, t in enumerate(tensors) if t.dtype != dtype or t.device != device)
            raise ValueError(
                f"{op}: {name}[{i}] is {tensor.dtype} on {tensor.device}, expected {dtype} on {device} like the "
                "others; call once per dtype and device"
            )
        if role.numel is not None:
            for i, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
                if tensor.numel() != role.numel(like.numel()) or not tensor.is_contiguous():
                    raise ValueError(
                        f"{op}: {name}[{i}] has {tensor.numel()} elements, expected {role.numel(like.numel())}, "
                        f"contiguous, for {like.numel()} elements of the first operand"
                    )
        return dtype

    def _set_layouts(self, op: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
        shapes = self._shapes if self._has_shapes(tensors) else list(map(_shape, tensors))
        strides = None if all(map(_is_contiguous, tensors)) else list(map(_stride, tensors))
        if strides is not None:
            for i, tensor in enumerate(tensors):
                if not is_dense(tensor):
                    raise ValueError(
                        f"{op}: {name}[{i}] has gaps or overlaps (shape {tuple(tensor.shape)}, stride "
                        f"{tensor.stride()}), expected dense memory; call .contiguous()"
                    )
        if shapes is not self._shapes or strides != self._strides:
            for other in self._addresses:  # every other operand must be held against the new layout
                if other != name:
                    self._addresses[other] = []
                    self._dtypes[other] = None
        if shapes is not self._shapes:
            sizes = list(map(_numel, tensors))
            first_chunks = list(accumulate(map(chunk_count, sizes), initial=0))
            self.chunks = first_chunks.pop()
            self._rows[:, 0] = sizes
            self._rows[:, 1] = first_chunks
        self._shapes = shapes
        self._strides = strides

    def _has_shapes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Shape by shape, none of them kept: thousands of tuples kept at once make the garbage collector look."""
        return len(tensors) == len(self._shapes) and all(map(eq, map(_shape, tensors), self._shapes))

    def _check_layouts(self, op: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
        if self._strides is None:
            laid_out = all(map(_is_contiguous, tensors))
        else:
            laid_out = all(map(eq, map(_stride, tensors), self._strides))
        if laid_out and self._has_shapes(tensors):
            return
        for i, tensor in enumerate(tensors):
            shape = self._shapes[i]
            # Strides of a dimension of size one mean nothing: torch calls such tensors contiguous as well.
            same = tensor.is_contiguous() if self._strides is None else tensor.stride() == self._strides[i]
            if tensor.shape != shape or not same:
                expected = "contiguous" if self._strides is None else f"stride {self._strides[i]}"
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(tensor.shape)} and stride {tensor.stride()}, expected shape "
                    f"{tuple(shape)}, {expected}, as in the first operand; copy it into that layout first"
                )


class _Units(Sequence[torch.Tensor]):
    """Units of tensors as tensors, each made when asked for."""

    def __init__(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        self._tensors = tensors
        self._sizes = sizes
        counts = (t.numel() // size for t, size in zip(tensors, sizes, strict=True))
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        unit = index - (self._ends[at - 1] if at else 0)
        flat = flat_view(self._tensors[at].detach())
        return flat[unit * self._sizes[at] : (unit + 1) * self._sizes[at]]


class Operands:
    """The tensors of one call, by operand name, checked, with the table that kernels read.

    Args:
        op: Name of the op, for messages.
        columns: Operand name to its tensors.
        cache: Table kept from the last call with the same operands; a fresh one when None.
        roles: As in :meth:`AddressTable.refresh`.
        moving: As in :meth:`AddressTable.refresh`.
        checked: As in :meth:`AddressTable.refresh`.

    Attributes:
        table: int64, CPU, up to date.

    Raises:
        ValueError: As :meth:`AddressTable.refresh`, before anything is written.
        TypeError: As :meth:`AddressTable.refresh`.
    """

    __slots__ = ("cache", "columns", "op", "table")

    def __init__(
        self,
        op: str,
        columns: Mapping[str, Column],
        cache: AddressTable | None = None,
        *,
        roles: Roles | None = None,
        moving: Collection[str] | None = None,
        checked: bool = False,
    ) -> None:
        self.op = op
        self.columns = columns
        self.cache = AddressTable() if cache is None else cache
        self.table = self.cache.refresh(op, columns, roles, moving, checked=checked)

    def __getitem__(self, name: str) -> Sequence[torch.Tensor]:
        return cast("Tensors", self.columns[name]) or ()

    @classmethod
    def of_units(cls, op: str, name: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Operands:
        """A row for every unit of consecutive elements, without a tensor for each: there may be many thousands.

        Args:
            op: Name of the op, for messages.
            name: Of its one operand.
            tensors: Of one dtype and device, dense; at least one.
            sizes: Elements in a unit, by tensor; each divides its tensor's elements.
        """
        counts = np.array([t.numel() // size for t, size in zip(tensors, sizes, strict=True)], dtype=np.int64)
        unit_sizes = np.repeat(np.array(sizes, dtype=np.int64), counts)
        inside = np.arange(len(unit_sizes)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(np.array(list(map(_data_ptr, tensors)), dtype=np.int64), counts)
        operands = cls.__new__(cls)
        operands.op = op
        operands.columns = {name: _Units(tensors, sizes)}
        operands.cache = AddressTable.of_rows(
            name, tensors[0].dtype, unit_sizes, starts + inside * unit_sizes * tensors[0].itemsize
        )
        operands.table = operands.cache.on_device(torch.device("cpu"))
        return operands

    def integers(self, name: str) -> Sequence[int]:
        """A column of integers; zeros where it was left out."""
        return cast("Sequence[int] | None", self.columns[name]) or [0] * len(self.table)

    def device(self) -> torch.device:
        """Device of the first operand; the CPU for empty lists."""
        first = next(iter(self.columns.values()))
        return cast("Sequence[torch.Tensor]", first)[0].device if first else torch.device("cpu")
