"""Sending what units save for backward to the host, and fetching it back before backward asks for it.

A unit that is offloaded runs as ever. What autograd saves in it is copied over the link while later units run; where
one of them begins, the copy is waited for and the memory let go of. Likewise on the way back. Both places are part of
the plan, so that what is alive where does not depend on how fast the host is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from gradkern.checkpoint._recompute import Recompute, RecomputedForward

__all__ = ["Copy", "Link", "Offload", "OffloadedForward", "Route", "link_of"]

# What is smaller stays: a copy costs more than it frees.
_LEAST_BYTES = 2**16


@dataclass(frozen=True)
class Offload:
    """When what a unit saves travels.

    Attributes:
        unit: Name of the unit.
        released_at: Unit before whose forward the copy to the host is waited for and the memory let go of.
        fetched_at: Unit before whose backward the copy back begins.
    """

    unit: str
    released_at: str
    fetched_at: str


class Copy(NamedTuple):
    """A copy that was begun, and what the link knows of when it is done."""

    tensor: Tensor
    ready: Any


class Link(Protocol):
    """Between a device and the memory of its host; both ways at once."""

    def carries(self, tensor: Tensor) -> bool:
        """Whether it can copy a tensor."""

    def send(self, tensor: Tensor) -> Copy:
        """Begin to copy a contiguous tensor to the host."""

    def fetch(self, tensor: Tensor) -> Copy:
        """Begin to copy a tensor of the host back."""

    def wait(self, copy: Copy) -> None:
        """Have what runs next on the device wait until a copy is done."""


class CudaLink:
    """Pinned memory and a stream each way, beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def carries(self, tensor: Tensor) -> bool:
        """Plain tensors on this device."""
        return type(tensor) in (Tensor, nn.Parameter) and tensor.device == self._device

    def send(self, tensor: Tensor) -> Copy:
        """Begin to copy to the host; ``tensor`` must stay until the copy was waited for."""
        there = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return self._copied(there, tensor, self._out)

    def fetch(self, tensor: Tensor) -> Copy:
        """Begin to copy back; the copy must stay until it was waited for."""
        return self._copied(torch.empty_like(tensor, device=self._device), tensor, self._back)

    def wait(self, copy: Copy) -> None:
        """Have the stream that computes wait."""
        torch.cuda.current_stream(self._device).wait_event(copy.ready)

    def _copied(self, to: Tensor, tensor: Tensor, stream: torch.cuda.Stream) -> Copy:
        # What computes may still write the one or, in memory that is used again, read the other.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            to.copy_(tensor, non_blocking=True)
        return Copy(to, stream.record_event())


def link_of(device: torch.device) -> Link | None:
    """The link of a device to its host; None for the CPU, which is its own host."""
    return _cuda_link(device) if device.type == "cuda" else None


@functools.cache
def _cuda_link(device: torch.device) -> CudaLink:
    return CudaLink(device)


def _check_version(tensor: Tensor, version: int) -> None:
    """Raise RuntimeError where a tensor was written since it was saved, which autograd cannot see behind hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "a tensor that an offloaded unit saved for backward has been modified by an inplace operation since: it is "
            f"at version {tensor._version}, expected {version}; plan without offload"
        )


class _Item:
    """Memory that travels: one storage, whatever the tensors on it."""

    def __init__(self, tensor: Tensor, link: Link) -> None:
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._here: Tensor | None = tensor.detach().as_strided((count,), (1,), 0)
        self._version = tensor._version
        self._link = link
        self._there: Copy | None = None
        self._back: Copy | None = None

    def send(self) -> None:
        """Begin the way to the host."""
        if self._here is not None and self._there is None:
            self._there = self._link.send(self._here)

    def release(self) -> None:
        """Let go of the memory here, once the copy is done."""
        if self._here is None or self._there is None:
            return
        self._check()
        self._link.wait(self._there)
        self._here = None

    def fetch(self) -> None:
        """Begin the way back."""
        if self._here is None and self._back is None and self._there is not None:
            self._back = self._link.fetch(self._there.tensor)

    def arrive(self) -> Tensor:
        """The memory, back again."""
        if self._here is not None:
            self._check()
            return self._here
        self.fetch()
        if self._back is None:
            raise AssertionError("only what was sent is ever let go of")
        self._link.wait(self._back)
        self._here, self._back, self._there = self._back.tensor, None, None
        self._version = self._here._version
        return self._here

    def _check(self) -> None:
        if self._here is not None:
            _check_version(self._here, self._version)


@dataclass(frozen=True)
class _Sent:
    """What autograd holds in place of a tensor that travels."""

    item: _Item
    parcel: _Parcel
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor, back again."""
        memory = self.parcel.arrive(self.item)
        return memory.view(self.dtype).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Stayed:
    """What autograd holds in place of a tensor that does not."""

    held: Tensor
    version: int

    def tensor(self) -> Tensor:
        """The tensor, unless it was changed."""
        _check_version(self.held, self.version)
        return self.held


class _Parcel:
    """What one call of a unit saves. Items live as long as the graph that needs them."""

    def __init__(self, link: Link, staying: set[int]) -> None:
        self._link = link
        self._staying = staying
        self._items: dict[int, weakref.ref[_Item]] = {}
        # Memory that is being written may not be given to another before the writing is waited for.
        self._arriving: dict[_Item, None] = {}

    def pack(self, tensor: Tensor) -> _Sent | _Stayed:
        """Pack hook."""
        if not self._travels(tensor):
            # Not the tensor itself: its graph would then hold it and it its graph, for good.
            return _Stayed(tensor.detach(), tensor._version)
        key = tensor.untyped_storage()._cdata
        known = self._items.get(key)
        item = None if known is None else known()
        if item is None:
            item = _Item(tensor, self._link)
            self._items[key] = weakref.ref(item)
        return _Sent(item, self, tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))

    def send(self) -> None:
        """Begin the way to the host."""
        for item in self._alive():
            item.send()

    def release(self) -> None:
        """Let go of the memory here."""
        for item in self._alive():
            item.release()

    def fetch(self, grad: Tensor | None = None) -> None:
        """Begin the way back; a hook on a gradient."""
        for item in self._alive():
            self._arriving[item] = None
            item.fetch()

    def arrive(self, item: _Item) -> Tensor:
        """The memory of an item, back again."""
        memory = item.arrive()
        self._arriving.pop(item, None)
        return memory

    def end(self) -> None:
        """Wait for what is on its way back and was never asked for."""
        for item in list(self._arriving):
            self.arrive(item)

    def _travels(self, tensor: Tensor) -> bool:
        return (
            tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.untyped_storage().nbytes() >= _LEAST_BYTES
            and tensor.untyped_storage()._cdata not in self._staying
            and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
            and self._link.carries(tensor)
        )

    def _alive(self) -> list[_Item]:
        items = (reference() for reference in self._items.values())
        return [item for item in items if item is not None]


class Route:
    """The offloaded units of a model, and what of them is on its way; shared by their forwards.

    Args:
        link: The link of a device.
    """

    def __init__(self, link: Callable[[torch.device], Link | None]) -> None:
        self.link = link
        self._parcels: dict[str, _Parcel] = {}

    def call(self, name: str, forward: OffloadedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a unit, and send off what it saved."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = (*forward.module.parameters(), *forward.module.buffers())
        links = (self.link(tensor.device) for tensor in (*tensors, *own))
        link = next((each for each in links if each is not None), None)
        self._end(name)
        if link is None:
            return forward.run(*args, **kwargs)
        # Masks and the like are shared by all units; sending them frees nothing.
        shared = (*own, *(tensor for tensor in tensors if not tensor.requires_grad))
        dense = (tensor for tensor in shared if tensor.layout is torch.strided)
        parcel = _Parcel(link, {tensor.untyped_storage()._cdata for tensor in dense})
        with saved_tensors_hooks(parcel.pack, _unpacked):
            output = forward.run(*args, **kwargs)
        parcel.send()
        self._parcels[name] = parcel
        return output

    def release(self, name: str, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the unit where another lets go of its memory."""
        if name in self._parcels:
            self._parcels[name].release()

    def watch(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the unit before whose backward another begins its way back."""
        parcel = self._parcels.get(name)
        for leaf in tree_leaves(output):
            if parcel is not None and isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(parcel.fetch)

    def _end(self, name: str) -> None:
        """An earlier call of this unit lets go of its memory, be its backward still to come or not."""
        before = self._parcels.pop(name, None)
        if before is not None:
            before.release()
            before.end()

    def __getstate__(self) -> dict[str, Any]:
        return {"link": self.link, "_parcels": {}}


class OffloadedForward(RecomputedForward):
    """Stands as ``module.forward`` of a unit that is offloaded.

    Args:
        module: The unit.
        plan_id: The plan that this belongs to.
        name: The unit's name.
        route: What it belongs to.
    """

    def __init__(self, module: nn.Module, plan_id: str, name: str, route: Route) -> None:
        super().__init__(module, Recompute(), plan_id)
        self.name = name
        self.route = route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        return self.route.call(self.name, self, args, kwargs)


def _unpacked(packed: _Sent | _Stayed) -> Tensor:
    return packed.tensor()
