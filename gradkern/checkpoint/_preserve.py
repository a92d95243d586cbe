"""Running a model without a trace: random state, buffers, gradients and modes come back bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradkern.checkpoint._storages import Memory, storages_of

__all__ = ["Generators", "Preserved", "preserved", "same_bits"]


class Preserved:
    """What is put aside while a model runs on trial.

    Args:
        model: Not mutated here; see ``preserved``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generators = Generators.now()
        self.training = {module: module.training for module in model.modules()}
        self.registered = {
            module: (dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()
        }
        self.buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
        self.grads = {
            param: (param.grad, param.grad.detach().clone()) for param in model.parameters() if param.grad is not None
        }

    def held_bytes(self, allocator: Memory) -> int:
        """Bytes that ``allocator`` counts now and would not in a normal step."""
        grads = [tensor for pair in self.grads.values() for tensor in pair]
        aside = [self.generators.torch_state, *self.buffers.values(), *grads]
        held = storages_of(aside, places=(allocator.place,)).values()
        return sum(allocator.size_of(storage) for storage in held if allocator.owns(storage))

    def changed_buffers(self) -> list[str]:
        """Names of the buffers, still there, whose tensor or bits are not those that were put aside."""
        changed = []
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            before, _ = self.registered.get(module, ({}, set()))
            for name, buffer in before.items():
                now = module._buffers.get(name)
                if buffer is None or now is None:
                    continue
                if now is not buffer or not same_bits(now, self.buffers[buffer]):
                    changed.append(f"{prefix}.{name}" if prefix else name)
        return changed

    def rewind_generators(self) -> None:
        """Set the global generators of torch, Python and numpy to where they were."""
        self.generators.restore()

    def restore(self) -> None:
        """Put everything back: what cannot fail first, for a user's gradients exist nowhere else."""
        self.rewind_generators()
        for module, training in self.training.items():
            module.training = training
        for param in self.model.parameters():
            aside = self.grads.get(param)
            param.grad = None if aside is None else _restored(*aside)
        for module, (buffers, non_persistent) in self.registered.items():
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
        for buffer, copy in self.buffers.items():
            _restored(buffer, copy)


@dataclass(frozen=True)
class Generators:
    """States of the global generators of torch (those of GPUs in use too), Python and numpy."""

    torch_state: Tensor
    cuda_states: list[Tensor]
    python_state: tuple[Any, ...]
    numpy_state: dict[str, Any]

    @classmethod
    def now(cls) -> Generators:
        """Read them."""
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda_states, random.getstate(), np.random.get_state(legacy=False))  # noqa: NPY002

    def restore_torch(self) -> None:
        """Set those of torch back."""
        torch.set_rng_state(self.torch_state)
        if self.cuda_states:
            torch.cuda.set_rng_state_all(self.cuda_states)

    def restore(self) -> None:
        """Set all of them back."""
        self.restore_torch()
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)  # noqa: NPY002


@contextmanager
def preserved(model: nn.Module) -> Iterator[Preserved]:
    """Put the model's state aside, hand the model over without gradients and in a training mode, restore.

    A model whose root is in eval mode is put into train mode as a whole (memory in eval mode would say
    little); one in train mode keeps the modes of all its modules.
    """
    kept = Preserved(model)
    try:
        if not model.training:
            model.train()
        for param in kept.grads:
            param.grad = None
        yield kept
    finally:
        kept.restore()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one shape and dtype and the same bits (any NaN equal only to its own bits)."""
    if (left.shape, left.dtype, left.layout) != (right.shape, right.dtype, right.layout):
        return False
    left, right = left.detach(), right.detach()
    if left.layout is not torch.strided or left.numel() == 0:
        return torch.equal(left, right)
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def _restored(tensor: Tensor, copy: Tensor) -> Tensor:
    """The tensor itself, rewritten only if its bits changed, so that version counters mostly stay."""
    if (tensor.shape, tensor.dtype) != (copy.shape, copy.dtype):
        tensor.data = copy
    elif not same_bits(tensor, copy):
        with torch.no_grad():
            tensor.copy_(copy)
    return tensor
