"""Optimizer state that notices what is done to it.

A step over 1,500 small tensors takes little more than a millisecond, and looking up thousands of state tensors to see
that they are still the same takes another quarter. These dictionaries are told of every replacement instead, and of
everyone who looks at what they hold, because ``tensor.data = ...`` is noticed by nobody. They turn into plain ones when
they are copied or pickled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

__all__ = ["Changes", "WatchedState", "WatchedStates"]


class Changes:
    """What was done to the state of an optimizer.

    Args:
        let_go: Called where something is replaced, so that nothing else holds it alive.

    Attributes:
        count: How often something was replaced.
        read: Whether someone has taken a tensor out since this was set to False, and may have given it other memory.
    """

    __slots__ = ("_let_go", "count", "read")

    def __init__(self, let_go: WeakMethod[Callable[[], None]]) -> None:
        self.count = 0
        self.read = False
        self._let_go = let_go

    def note(self) -> None:
        """Something is about to be replaced."""
        self.count += 1
        let_go = self._let_go()
        if let_go is not None:
            let_go()


class _Watched(dict[Any, Any]):
    """Every way into a dictionary but ``dict(self)`` and ``{**self}``, whose values here are watched themselves."""

    __slots__ = ()

    changes: Changes

    def __getitem__(self, key: Any) -> Any:
        self.changes.read = True
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.changes.read = True
        return super().get(key, default)

    def values(self) -> Any:
        self.changes.read = True
        return super().values()

    def items(self) -> Any:
        self.changes.read = True
        return super().items()

    def __setitem__(self, key: Any, value: Any) -> None:
        self.changes.note()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.changes.note()
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.changes.note()
        super().update(*args, **kwargs)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self.changes.note()
        return super().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        self.changes.note()
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self.changes.note()
        return super().popitem()

    def clear(self) -> None:
        self.changes.note()
        super().clear()


class WatchedState(_Watched):
    """State of one parameter."""

    __slots__ = ("changes",)

    def __init__(self, values: dict[str, Any], changes: Changes) -> None:
        super().__init__(values)
        self.changes = changes

    def copy(self) -> dict[str, Any]:
        self.changes.read = True
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


class WatchedStates(_Watched, defaultdict[Any, Any]):
    """State of all parameters: ``optimizer.state``."""

    def __init__(self, values: dict[Any, Any], changes: Changes) -> None:
        defaultdict.__init__(self, dict, values)
        self.changes = changes

    def __or__(self, other: Any) -> Any:
        return _plain_states({**self, **other})

    def __ror__(self, other: Any) -> Any:
        return _plain_states({**other, **self})

    def copy(self) -> Any:
        return _plain_states(dict(self))

    __copy__ = copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain_states, (dict(self),)


def _plain_states(values: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, values)
