"""The Gauss-Newton matrix of every step's loss, from the training run again.

With ``z`` the model's output on a micro-batch, ``J`` its Jacobian matrix by the parameters and ``H`` the Hessian matrix
of the loss by ``z``, it is the sum over micro-batches of ``Jᵀ H J`` (Schraudolph, "Fast curvature matrix-vector
products", 2002). It leaves out how the model bends, and is positive semi-definite where the loss is convex in ``z``,
as a cross-entropy is (``H = diag(p) - p pᵀ``): what keeps the sweep from growing.

Products with ``u`` are three passes over one graph, each for all functions at once: ``J u``, ``H (J u)`` and
``Jᵀ (H J u)``. The model's forward runs once and as ever, with its random numbers, modes and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradkern.rollback._layout import Layout
from gradkern.rollback._output import losses_and_outputs, pull, push, require_output_decides
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
        if not directions:
            return
        owned = self._layout.owned(self._layout.trained_parameters(start.training.model))
        parameters = [owned[index] for index in directions]
        with start.as_recorded():
            for loss, output in losses_and_outputs(start, "gauss_newton"):
                if not self._is_checked:
                    require_output_decides(loss, output, parameters)
                    self._is_checked = True
                found = gauss_newton_product(loss, output, parameters, list(directions.values()))
                for index, each in zip(directions, found, strict=True):
                    sums[index].add_(each)


def gauss_newton_product(
    loss: Tensor, output: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Multiply the Gauss-Newton matrix of a loss with many directions.

    Args:
        loss: With the graph by which it comes from ``output``.
        output: With the graph by which it comes from ``parameters``.
        parameters: Some that require gradients.
        directions: One for each parameter, shape ``(functions, *parameter)``.

    Returns:
        By parameter, shape ``(functions, *parameter)``.
    """
    (residual,) = torch.autograd.grad(loss, output, create_graph=True)
    moved = push(output, parameters, directions)
    return pull([output], parameters, [push(residual, [output], [moved])], keep=False)
