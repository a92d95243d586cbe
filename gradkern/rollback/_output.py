"""The output of a model that is run again, and how the loss hangs on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradkern.errors import LedgerError
from gradkern.rollback._trajectory import StepStart

__all__ = ["losses_and_outputs", "output_tensor", "product", "require_output_decides"]

# Relative difference of two ways to the same gradient, in fp32.
_MISFIT = 1e-3


def output_tensor(made: Any, caller: str) -> Tensor:
    """What a model returned as a tensor: itself, or its ``.logits``.

    Raises:
        TypeError: It is neither.
    """
    output = getattr(made, "logits", made)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{caller}: the model must return a tensor or have .logits in what it returns, got {type(made).__name__}"
        )
    return output


def losses_and_outputs(start: StepStart, caller: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss and output of every micro-batch of a step, in one graph that can be differentiated twice.

    The model runs as it did then. Attention alone takes the formula that has second derivatives, whose last bits differ.
    """
    seen: list[Any] = []

    def see(module: nn.Module, args: Any, made: Any) -> None:
        seen.append(made)

    handle = start.training.model.register_forward_hook(see)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for loss in start.losses():
                yield loss, output_tensor(seen.pop(), caller)
    finally:
        handle.remove()


def product(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor], *, keep: bool
) -> list[Tensor | None]:
    """Products of many directions with the transposed Jacobian matrix of ``outputs`` by ``inputs``.

    Args:
        outputs: With a graph.
        inputs: Tensors of that graph.
        directions: One for each of ``outputs``, shape ``(functions, *output)``.
        keep: The graph, for another product.

    Returns:
        One for each of ``inputs``, shape ``(functions, *input)``; None where no output depends on it.
    """
    found = torch.autograd.grad(
        outputs, inputs, directions, is_grads_batched=True, retain_graph=keep, allow_unused=True
    )
    return list(found)


def require_output_decides(loss: Tensor, output: Tensor, parameters: Sequence[Tensor]) -> None:
    """Make sure that parameters change the loss by way of the model's output alone.

    Raises:
        LedgerError: They do not: the loss was computed inside the model, or has a penalty on parameters or features.
    """
    (residual,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    if residual is not None and output.requires_grad and output is not loss:
        pairs = zip(
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
            torch.autograd.grad(output, parameters, residual, retain_graph=True, allow_unused=True),
            strict=True,
        )
        whole = missing = 0.0
        for all_of, through in pairs:
            if all_of is not None:
                whole += float(all_of.double().square().sum())
                missing += float((all_of if through is None else all_of - through).double().square().sum())
        if missing <= _MISFIT**2 * whole:
            return
    raise LedgerError(
        "the recorded loss does not come from the model's output alone, as this estimator takes for granted: terms of "
        "it, such as a penalty on weights or features, are not in the graph between the two, or the model returns its "
        "loss without .logits; use estimator='direct'"
    )
