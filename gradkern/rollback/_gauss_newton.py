"""The Gauss-Newton matrix of every step's loss, from the training run again.

With ``z`` the model's output on a micro-batch, ``J`` its Jacobian matrix by the parameters and ``H`` the Hessian matrix
of the loss by ``z``, it is the sum over micro-batches of ``Jᵀ H J`` (Schraudolph, "Fast curvature matrix-vector
products", 2002). It leaves out how the model bends, and is positive semi-definite where the loss is convex in ``z``, as a
cross-entropy is (``H = diag(p) - p pᵀ``): what keeps the sweep from growing.

Products with ``u`` are made of three passes over one graph, each for all functions at once: ``J u`` as the derivative of
``Jᵀ v`` by ``v``, ``H J u`` as that of the gradient by ``z``, and ``Jᵀ``. So the model's forward runs once and as ever,
with its random numbers, modes and buffers, which no transform of it has to understand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradkern.rollback._layout import Layout
from gradkern.rollback._output import losses_and_outputs, product, require_output_decides
from gradkern.rollback._sweep import StepBack
from gradkern.rollback._trajectory import Trajectory

__all__ = ["GaussNewton", "gauss_newton_product"]


class GaussNewton:
    """The curvature of a sweep; see :class:`gradkern.rollback._sweep.Curvature`.

    Args:
        layout: The ledger's layout, whose owned parameters count.
        trajectory: The training, gone through together with the sweep.
    """

    def __init__(self, layout: Layout, trajectory: Trajectory) -> None:
        self._layout = layout
        self._starts = trajectory.backwards()
        self._is_checked = False

    def add_product(self, step: StepBack, sums: Mapping[int, Tensor]) -> None:
        """See :meth:`gradkern.rollback._sweep.Curvature.add_product`.

        Raises:
            LedgerError: The loss does not come from the model's output alone.
            TypeError: The model returns neither a tensor nor ``.logits``.
        """
        start = next(self._starts)
        directions = step.directions()
        owned = self._layout.owned(self._layout.trained_parameters(start.training.model))
        parameters = [owned[index] for index in directions]
        with start.as_recorded():
            for loss, output in losses_and_outputs(start, "gauss_newton"):
                if not self._is_checked:
                    require_output_decides(loss, output, parameters)
                    self._is_checked = True
                found = gauss_newton_product(loss, output, parameters, list(directions.values()))
                for index, each in zip(directions, found, strict=True):
                    if each is not None:
                        sums[index].add_(each)


def gauss_newton_product(
    loss: Tensor, output: Tensor, parameters: list[Tensor], directions: list[Tensor]
) -> list[Tensor | None]:
    """Multiply the Gauss-Newton matrix of a loss with many directions.

    Args:
        loss: With the graph by which it comes from ``output``.
        output: With the graph by which it comes from ``parameters``.
        parameters: Some that require gradients.
        directions: One for each parameter, shape ``(functions, *parameter)``.

    Returns:
        By parameter, shape ``(functions, *parameter)``; None where it is zero.
    """
    (residual,) = torch.autograd.grad(loss, output, create_graph=True)
    if not residual.requires_grad:  # a loss that is linear in the output
        return [None] * len(parameters)
    cotangent = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, parameters, cotangent, create_graph=True, allow_unused=True)
    pairs = [(each, along) for each, along in zip(pulled, directions, strict=True) if each is not None]
    (pushed,) = product([each for each, _ in pairs], [cotangent], [along for _, along in pairs], keep=True)
    if pushed is None:
        return [None] * len(parameters)
    (bent,) = product([residual], [output], [pushed], keep=True)
    if bent is None:
        return [None] * len(parameters)
    return product([output], parameters, [bent], keep=False)
