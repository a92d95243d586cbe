"""The output of a model that is run again, and how the loss hangs on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradkern.errors import LedgerError
from gradkern.rollback._trajectory import StepStart

__all__ = ["losses_and_outputs", "output_tensor", "pull", "push", "require_output_decides"]

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

    The model runs as it did then. Attention alone takes the formula that has second derivatives, with other last bits.
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


def pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor], *, keep: bool
) -> list[Tensor]:
    """Products of the transposed Jacobian matrix of ``outputs`` by ``inputs`` with many directions at once.

    Args:
        outputs: With a graph.
        inputs: Tensors of that graph.
        directions: One for each of ``outputs``, shape ``(functions, *output)``.
        keep: The graph, for another product.

    Returns:
        One for each of ``inputs``, shape ``(functions, *input)``; zeros where no output depends on it.
    """
    found = torch.autograd.grad(
        outputs, inputs, directions, is_grads_batched=True, retain_graph=keep, allow_unused=True
    )
    functions = len(directions[0])
    return [
        each.new_zeros(functions, *each.shape) if product is None else product
        for each, product in zip(inputs, found, strict=True)
    ]


def push(output: Tensor, inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Products of the Jacobian matrix of ``output`` by ``inputs`` with many directions at once; keeps the graph.

    As the derivative by ``v`` of ``Jᵀ v``, which is linear in it. Forward mode would run the model within a transform;
    this needs no more of it than two derivatives.

    Args:
        output: With a graph, or without one where it depends on nothing.
        inputs: Tensors of that graph.
        directions: One for each of ``inputs``, shape ``(functions, *input)``.

    Returns:
        Shape ``(functions, *output)``; zeros where the output depends on no input, or has no slope by any.
    """
    if output.requires_grad:
        cotangent = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, inputs, cotangent, create_graph=True, allow_unused=True)
        pairs = [
            (each, along)
            for each, along in zip(pulled, directions, strict=True)
            if each is not None and each.requires_grad
        ]
        if pairs:
            return pull([each for each, _ in pairs], [cotangent], [along for _, along in pairs], keep=True)[0]
    return output.new_zeros(len(directions[0]), *output.shape)


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
