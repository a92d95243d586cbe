"""One convention for "this model's loss on this batch", shared by everything that runs a model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Batch", "LossFn", "compute_loss"]

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
LossFn = Callable[[Any, Any], Tensor]


def compute_loss(model: Callable[..., Any], batch: Batch, loss_fn: LossFn | None = None) -> Tensor:
    """Run ``model`` on ``batch`` and return its scalar loss, with its graph.

    =========================  ===================  =============================
    ``batch``                  the model is called  with ``loss_fn``, the loss is
    =========================  ===================  =============================
    mapping                    ``model(**batch)``   ``loss_fn(output, batch)``
    pair ``(inputs, target)``  ``model(inputs)``    ``loss_fn(output, target)``
    tensor                     ``model(batch)``     ``loss_fn(output, batch)``
    =========================  ===================  =============================

    Without ``loss_fn`` the output itself must be a scalar tensor or carry one as ``.loss`` (as models of
    ``transformers`` do when the batch has ``labels``). A pair needs ``loss_fn``: its target would go unused.
    The model's output is not kept: only what the graph saves outlives this call.

    Args:
        model: A module, or what stands for one; called as given, in the train or eval mode it is in.
        batch: See the table; tensors must already be on the model's device.
        loss_fn: ``(output, target) -> scalar tensor``.

    Returns:
        The loss, a tensor of one element.

    Raises:
        TypeError: ``loss_fn`` is not callable, ``batch`` is none of the three forms, or the result is not a tensor.
        ValueError: The loss has more than one element, a pair is not of length 2 or comes without
            ``loss_fn``, or the output holds no loss.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(3, 1)
        >>> compute_loss(model, (torch.ones(2, 3), torch.zeros(2, 1)), nn.functional.mse_loss).shape
        torch.Size([])
    """
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
    target: Any
    if isinstance(batch, Tensor):
        output, target = model(batch), batch
    elif isinstance(batch, Mapping):
        output, target = model(**batch), batch
    elif isinstance(batch, (tuple, list)):
        if len(batch) != 2:
            raise ValueError(
                f"a {type(batch).__name__} batch must be a pair (inputs, target), got {len(batch)} items; "
                "pass a mapping for a model with several inputs"
            )
        if loss_fn is None:
            raise ValueError("a batch (inputs, target) needs loss_fn, got None; pass loss_fn(output, target)")
        inputs, target = batch
        output = model(inputs)
    else:
        raise TypeError("batch must be a mapping, a pair (inputs, target) or a tensor, got " + type(batch).__name__)
    loss = _loss_of(output) if loss_fn is None else loss_fn(output, target)
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}; check what loss_fn returns")
    if loss.numel() != 1:
        raise ValueError(f"the loss must have one element, got shape {tuple(loss.shape)}; reduce it, e.g. with .mean()")
    return loss


def _loss_of(output: Any) -> Any:
    """Find the loss in the output of a model that computes its own."""
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"the model's output ({type(output).__name__}) holds no loss; put 'labels' into the batch or "
            "pass loss_fn(output, target)"
        )
    return loss
