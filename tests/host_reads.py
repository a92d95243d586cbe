"""A watch that raises where a value would have to leave the device: what a stream capture forbids."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoHostReads"]

_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")


class NoHostReads(TorchDispatchMode):
    """Also raises at ``others``, overload packets of more operations to forbid."""

    def __init__(self, *others):
        super().__init__()
        self.others = others

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in _READS:
            raise AssertionError(f"{func} reads on the host")
        if func.overloadpacket in self.others:
            raise AssertionError(f"{func} was called")
        return func(*args, **(kwargs or {}))
