"""What capturing layers need to know of autograd's nodes."""

from __future__ import annotations

from typing import Any

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._ownership import OwnedLayer

__all__ = ["below_views", "require_first_order"]

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")


def below_views(node: Any) -> Any:
    """The node that made what the views at ``node`` look at; None if there is none."""
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node


def require_first_order(layer: OwnedLayer) -> None:
    """Refuse, in a hook, a backward pass that is to be differentiated again.

    Raises:
        LedgerError: It is.
    """
    if torch.is_grad_enabled():
        raise LedgerError(
            f"record: a gradient reached layer {layer.name!r} that is to be differentiated again (create_graph=True); "
            f"what such a gradient does to the parameters cannot be told apart by sample. Run what is not trained on "
            f"inside 'with recorder.paused()', forward and backward"
        )
