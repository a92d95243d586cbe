"""The Gauss-Newton matrix of every step's loss, from the training run again.

With ``z`` the model's output on a micro-batch, ``J`` its Jacobian matrix by the parameters and ``H`` the Hessian matrix
of the loss by ``z``, it is the sum over micro-batches of ``Jᵀ H J`` (Schraudolph, "Fast curvature matrix-vector
products", 2002). It leaves out how the model bends, and is positive semi-definite where the loss is convex in ``z``,
as a cross-entropy is (``H = diag(p) - p pᵀ``): what keeps the sweep from growing.

Products with ``u`` are three passes over one graph, each for all functions at once: ``J u``, ``H (J u)`` and
``Jᵀ (H J u)``. The model's forward runs once and as ever, with its random numbers, modes and buffers.

For each function they cost what three passes through the model do. A convolution, or a layer over tokens, multiplies
at many places of a sample, while its gradient for that sample is no larger than for one place. So where samples do not
mix, in the model or in the loss, and have one row of ``z`` each, ``H`` falls apart into an ``H_i`` for each of them. Of
that the two largest eigenvalues ``e`` are kept with their vectors ``v``, and the matrix is the sum of
``e (J_iᵀ v) (J_iᵀ v)ᵀ``: one backward pass for each of the two, however many functions there are, and then products
with gradients. Of two classes the largest is all there is; of ten, two of nine were as good as all (see the
benchmarks). Which way is the cheaper is found out at the last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import escape

import torch
from torch import Tensor, nn

from gradkern.rollback._layout import Layout
from gradkern.rollback._output import losses_and_outputs, pull, push, require_output_decides
from gradkern.rollback._ownership import claim
from gradkern.rollback._sample_gradients import SampleGradients
from gradkern.rollback._sweep import StepBack
from gradkern.rollback._trajectory import StepStart, Trajectory

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
        # None where products are taken with the model.
        self._gradients: SampleGradients | None = None

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
        parameters = {index: owned[index] for index in directions}
        with start.as_recorded():
            if not self._is_checked:
                self._check(start, parameters)
                self._is_checked = True
            if self._gradients is None:
                self._add_by_passes(start, parameters, directions, sums)
            else:
                self._add_by_gradients(self._gradients, start, parameters, directions, sums)

    def _check(self, start: StepStart, parameters: Mapping[int, nn.Parameter]) -> None:
        """Make sure of the loss, and choose how to take products."""
        for loss, output in losses_and_outputs(start, "gauss_newton"):
            require_output_decides(loss, output, list(parameters.values()))
        model = start.training.model
        unowned = [escape(info.name) for info in self._layout.parameters if not info.owned]
        gradients = SampleGradients(claim(model, self._layout.trained_parameters(model), unowned, []))
        if not gradients.can_tell_apart:
            return
        with gradients.capturing():
            if all(
                _is_cheaper(gradients, loss, output, list(parameters.values()))
                for loss, output in losses_and_outputs(start, "gauss_newton")
            ):
                self._gradients = gradients

    def _add_by_passes(
        self,
        start: StepStart,
        parameters: Mapping[int, nn.Parameter],
        directions: Mapping[int, Tensor],
        sums: Mapping[int, Tensor],
    ) -> None:
        for loss, output in losses_and_outputs(start, "gauss_newton"):
            found = gauss_newton_product(loss, output, list(parameters.values()), list(directions.values()))
            for index, each in zip(directions, found, strict=True):
                sums[index].add_(each)

    def _add_by_gradients(
        self,
        gradients: SampleGradients,
        start: StepStart,
        parameters: Mapping[int, nn.Parameter],
        directions: Mapping[int, Tensor],
        sums: Mapping[int, Tensor],
    ) -> None:
        with gradients.capturing():
            for loss, output in losses_and_outputs(start, "gauss_newton"):
                sizes, vectors = _leading(_hessians(loss, output))
                found = gradients.along(output, list(parameters.values()), list(vectors))
                inner = sum(each.inner(directions[each.parameter]) for each in found)
                for each in found:
                    each.add_to(sums[each.parameter], inner * sizes)


# Eigenvectors of a sample's H that are kept; and what share of the largest eigenvalue in the batch is none.
_KEPT, _NOTHING = 2, 1e-6

# More classes than that have too large a matrix for each sample.
_MOST_CLASSES = 128

# Of what one product of all rows with all matrices takes: for a function, with the layers, there and twice back; with
# gradients, inner products and a sum for each direction.
_PASSES, _PRODUCTS = 3, 2

# Of two ways to the same second derivatives, in fp32.
_MIXED = 1e-4


def _is_cheaper(gradients: SampleGradients, loss: Tensor, output: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether products can be taken with the gradients of samples, and in less time than with the model."""
    if output.dim() != 2 or output.shape[1] > _MOST_CLASSES or not output.requires_grad:
        return False
    samples = len(output)
    hessians = _hessians(loss, output)
    # In general position: what one sample's output does to another's residual shows.
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(0)) + 0.5
    weighted = _hessians(loss, output, weights)
    apart = float((weighted - hessians * weights.view(-1, 1, 1)).norm())
    if apart > _MIXED * float(hessians.norm()):
        return False
    count = len(_leading(hessians)[0])
    # Nothing of the second half of samples must come of the first.
    first_half = torch.zeros_like(output)
    first_half[: (samples + 1) // 2] = 1.0
    try:
        found = gradients.along(output, parameters, [first_half])
    except RuntimeError:  # rows that are no multiple of the samples
        return False
    if any(bool(each.sizes()[:, (samples + 1) // 2 :].any()) for each in found):
        return False
    elements, with_tokens = gradients.products
    return _PRODUCTS * count * elements < _PASSES * with_tokens


def _hessians(loss: Tensor, output: Tensor, weights: Tensor | None = None) -> Tensor:
    """``H_i`` of every sample, times ``weights``, if no sample's output changes another's residual."""
    samples, classes = output.shape
    (residual,) = torch.autograd.grad(loss, output, create_graph=True)
    if not residual.requires_grad:  # a loss without curvature
        return output.new_zeros(samples, classes, classes)
    along = torch.eye(classes).unsqueeze(1).expand(-1, samples, -1)
    along = along if weights is None else along * weights.unsqueeze(-1)
    return pull([residual], [output], [along], keep=True)[0].transpose(0, 1)


def _leading(hessians: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of every sample and their vectors: ``(n, samples)`` and ``(n, samples, classes)``."""
    values, vectors = torch.linalg.eigh((hessians + hessians.transpose(1, 2)) / 2)
    order = values.abs().argsort(dim=1, descending=True)[:, :_KEPT]
    values, vectors = values.gather(1, order), vectors.gather(2, order.unsqueeze(1).expand(-1, values.shape[1], -1))
    largest = values.abs().amax(dim=0)
    kept = largest > _NOTHING * largest[0]
    return values.t()[kept], vectors.permute(2, 0, 1)[kept]


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
