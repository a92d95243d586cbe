"""Tensors of equal content are written once.

Most streams of a segment have the same visits, and the gradient of a bias, where a layer sees one row a sample, is the
left factor of its weight's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.rollback._json_tensor import from_tensor, to_tensor

__all__ = ["share_equal", "unshare"]

# Names the shared tensors and where they are, as UTF-8 of JSON: {name: [name of the other, shape]}.
_SHARED = "shared"

# What naming one takes.
_LEAST_BYTES = 128

# Bytes at either end that are looked at first.
_ENDS = 64


def share_equal(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors that have the dtype and the bytes of an earlier one by name, of whatever shape."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, tuple[str, list[int]]] = {}
    first: dict[tuple[torch.dtype, bytes], str] = {}
    large = {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        for name, tensor in named.items()
        if tensor.nbytes >= _LEAST_BYTES
    }
    # Most differ at their ends, and only those that do not are worth a checksum.
    looks = {
        name: (named[name].dtype, len(flat), flat[:_ENDS].tobytes(), flat[-_ENDS:].tobytes())
        for name, flat in large.items()
    }
    alike = Counter(looks.values())
    for name, tensor in sorted(named.items()):
        if name in large and alike[looks[name]] > 1:
            earlier = first.setdefault((tensor.dtype, hashlib.sha256(large[name].data).digest()), name)
            if earlier != name:
                shared[name] = (earlier, list(tensor.shape))
                continue
        # Small ones may still share memory, after a longer tensor was read that was shared, which a file cannot.
        kept[name] = tensor if name in large else tensor.clone()
    if shared:
        kept[_SHARED] = to_tensor(shared)
    return kept


def unshare(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`share_equal`; shared tensors share memory.

    Raises:
        LedgerError: What is shared cannot be read.
    """
    found = {name: tensor for name, tensor in named.items() if name != _SHARED}
    if _SHARED in named:
        try:
            shared = from_tensor(named[_SHARED])
            found |= {name: named[earlier].reshape(shape) for name, (earlier, shape) in shared.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise LedgerError(
                f"a segment shares tensors that it does not hold ({error}); it was written by another version of "
                f"gradkern: read it with that version"
            ) from error
    return found
