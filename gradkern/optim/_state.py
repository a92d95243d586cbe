"""Optimizer state that counts what is replaced in it.

A step over 1,500 small tensors takes 3 ms, and looking up thousands of state tensors to see that they are still the
same takes another. These dictionaries are told of every replacement instead, so that a step that follows none reads
nothing. They turn into plain ones when they are copied or pickled.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

__all__ = ["Changes", "WatchedState", "WatchedStates"]


class Changes:
    """How often something was replaced."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class WatchedState(dict[str, Any]):
    """State of one parameter."""

    __slots__ = ("changes",)

    def __init__(self, values: dict[str, Any], changes: Changes) -> None:
        super().__init__(values)
        self.changes = changes

    def __setitem__(self, key: str, value: Any) -> None:
        self.changes.count += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.changes.count += 1
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.changes.count += 1
        super().update(*args, **kwargs)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.changes.count += 1
        return super().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        self.changes.count += 1
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        self.changes.count += 1
        return super().popitem()

    def clear(self) -> None:
        self.changes.count += 1
        super().clear()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class WatchedStates(defaultdict[Any, Any]):
    """State of all parameters: ``optimizer.state``."""

    def __init__(self, values: dict[Any, Any], changes: Changes) -> None:
        super().__init__(dict, values)
        self.changes = changes

    def __setitem__(self, key: Any, value: Any) -> None:
        self.changes.count += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.changes.count += 1
        super().__delitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.changes.count += 1
        super().update(*args, **kwargs)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self.changes.count += 1
        return super().setdefault(key, default)

    def pop(self, *args: Any) -> Any:
        self.changes.count += 1
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self.changes.count += 1
        return super().popitem()

    def clear(self) -> None:
        self.changes.count += 1
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain_states, (dict(self),)


def _plain_states(values: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, values)
