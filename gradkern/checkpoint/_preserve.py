"""Running a model without a trace: random state, buffers, gradients and modes come back bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gradkern.checkpoint._allocator import CountingAllocator
from gradkern.checkpoint._storages import storages_of

__all__ = ["Preserved", "preserved", "same_bits"]


class Preserved:
    """What is put aside while a model runs on trial.

    Args:
        model: Not mutated here; see ``preserved``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.torch_rng = torch.get_rng_state()
        self.training = {module: module.training for module in model.modules()}
        self.buffers = {
            name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers(remove_duplicate=False)
        }
        self.grads = {
            param: (param.grad, param.grad.detach().clone()) for param in model.parameters() if param.grad is not None
        }

    def held_bytes(self, allocator: CountingAllocator) -> int:
        """Bytes that ``allocator`` counts now and would not in a normal step."""
        copies = [copy for _, copy in self.buffers.values()]
        grads = [tensor for pair in self.grads.values() for tensor in pair]
        held = storages_of([self.torch_rng, *copies, *grads]).values()
        return sum(storage.nbytes() for storage in held if allocator.owns(storage))

    def changed_buffers(self, model: nn.Module) -> list[str]:
        """Names of the buffers whose bits differ from when they were put aside."""
        now = dict(model.named_buffers(remove_duplicate=False))
        return [name for name, (_, copy) in self.buffers.items() if not same_bits(now[name], copy)]


@contextmanager
def preserved(model: nn.Module) -> Iterator[Preserved]:
    """Put the model's state aside, hand the model over without gradients and in a training mode, restore.

    A model whose root is in eval mode is put into train mode as a whole (memory in eval mode would say
    little); one in train mode keeps the modes of all its modules.
    """
    kept = Preserved(model)
    python_rng = random.getstate()
    numpy_rng = np.random.get_state()  # noqa: NPY002
    try:
        if not model.training:
            model.train()
        for param in kept.grads:
            param.grad = None
        yield kept
    finally:
        torch.set_rng_state(kept.torch_rng)
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)  # noqa: NPY002
        for module, training in kept.training.items():
            module.training = training
        for name, (buffer, copy) in kept.buffers.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = _restored(buffer, copy)
        for param in model.parameters():
            aside = kept.grads.get(param)
            param.grad = None if aside is None else _restored(*aside)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits (any NaN equal only to its own bits)."""
    left, right = left.detach(), right.detach()
    if left.layout is not torch.strided or left.numel() == 0:
        return torch.equal(left, right)
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def _restored(tensor: Tensor, copy: Tensor) -> Tensor:
    """The tensor itself, rewritten only if its bits changed, so that version counters mostly stay."""
    if not same_bits(tensor, copy):
        with torch.no_grad():
            tensor.copy_(copy)
    return tensor
