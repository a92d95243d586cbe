"""The Gauss-Newton matrix of every step's loss, from the training run again.

With ``z`` the model's output on a micro-batch, ``J`` its Jacobian matrix by the parameters and ``H`` the Hessian matrix
of the loss by ``z``, it is the sum over micro-batches of ``Jᵀ H J`` (Schraudolph, "Fast curvature matrix-vector
products", 2002). It leaves out how the model bends, and is positive semi-definite where the loss is convex in ``z``,
as a cross-entropy is (``H = diag(p) - p pᵀ``): what keeps the sweep from growing.

Products with ``u`` are three passes over one graph, each for all functions at once: ``J u``, ``H (J u)`` and
``Jᵀ (H J u)``. The model's forward runs once and as ever, with its random numbers, modes and buffers.

For each function they cost what three passes through the model do. A convolution, or a layer over tokens, multiplies
at many places of a sample, while its gradient for that sample is no larger than for one place. Where samples do not
mix, in the model or in the loss, and have one row of ``z`` each, ``H`` falls apart into an ``H_i`` for each of them,
and the matrix is the sum of ``e (J_iᵀ v) (J_iᵀ v)ᵀ`` over its eigenvalues ``e`` and their vectors ``v``: one backward
pass for each that is kept, however many functions there are, and then products with gradients. Of a batch as many are
kept as have nine tenths of all eigenvalues. Both ways are compared wherever batches have another size or modules other
modes, and of a step the one is taken that costs less.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from glob import escape

import torch
from torch import Tensor, nn

from gradkern.rollback._layout import Layout
from gradkern.rollback._output import losses_and_outputs, pull, push, require_output_decides
from gradkern.rollback._ownership import claim
from gradkern.rollback._sample_gradients import SampleGradients
from gradkern.rollback._sweep import StepBack, norms
from gradkern.rollback._trajectory import StepStart, Trajectory

__all__ = ["GaussNewton", "gauss_newton_product"]


class GaussNewton:
    """The curvature of a sweep; see :class:`gradkern.rollback._sweep.Curvature`.

    Args:
        layout: The ledger's layout, whose owned parameters count.
        trajectory: The training, gone through together with the sweep.

    Attributes:
        by_gradients: Steps so far whose product was taken with gradients of samples.
    """

    def __init__(self, layout: Layout, trajectory: Trajectory) -> None:
        self._layout = layout
        self._starts = trajectory.backwards()
        self._is_checked = False
        self._gradients: SampleGradients | None = None
        # By what a step is like: how long the output of a sample is where both ways agree, else 0.
        self._agrees: dict[Hashable, int] = {}
        self.by_gradients = 0

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
                for loss, output in losses_and_outputs(start, "gauss_newton"):
                    require_output_decides(loss, output, list(parameters.values()))
                self._gradients = _sample_gradients(start.training.model, self._layout)
                self._is_checked = True
            products = self._by_gradients(start, parameters, directions)
            if products is None:
                products = _by_passes(start, parameters, directions)
            else:
                self.by_gradients += 1
            for index, each in products.items():
                sums[index].add_(each)

    def _by_gradients(
        self, start: StepStart, parameters: Mapping[int, nn.Parameter], directions: Mapping[int, Tensor]
    ) -> dict[int, Tensor] | None:
        """The product by gradients of samples; None where that is another, or costs more."""
        gradients = self._gradients
        if gradients is None:
            return None
        like = (frozenset(start.step.log.options["eval"]), tuple(map(len, start.step.ids)), tuple(parameters))
        if like not in self._agrees:
            self._agrees[like] = _agree(gradients, start, parameters)
        length, functions = self._agrees[like], len(next(iter(directions.values())))
        # Not even tried where it would be the cheaper at best with one eigenvector of several.
        if not length or not _is_cheaper(gradients, min(2, max(1, length - 1)), functions):
            return None
        return _product_by_gradients(gradients, start, parameters, directions, _ENOUGH)


# Of the eigenvalues of a batch, the share of those that are kept.
_ENOUGH = 0.9

# More classes than that have too large a matrix for each sample.
_MOST_CLASSES = 32

# Bytes that the gradients of a micro-batch's samples may take.
_MOST_BYTES = 1 << 28

# Of two ways to the same product, in fp32.
_APART = 1e-3


def _by_passes(
    start: StepStart, parameters: Mapping[int, nn.Parameter], directions: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    sums = {index: torch.zeros_like(each) for index, each in directions.items()}
    for loss, output in losses_and_outputs(start, "gauss_newton"):
        found = gauss_newton_product(loss, output, list(parameters.values()), list(directions.values()))
        for sum_, each in zip(sums.values(), found, strict=True):
            sum_.add_(each)
    return sums


def _sample_gradients(model: nn.Module, layout: Layout) -> SampleGradients | None:
    """What takes them; None where some layer's are not known."""
    unowned = [escape(info.name) for info in layout.parameters if not info.owned]
    try:
        found = SampleGradients(claim(model, layout.trained_parameters(model), unowned, []))
    except ValueError:  # a layer has a forward of its own by now
        return None
    return found if found.can_tell_apart else None


def _agree(gradients: SampleGradients, start: StepStart, parameters: Mapping[int, nn.Parameter]) -> int:
    """Whether both ways give the same product, all eigenvalues taken: samples do not mix, and all is captured.

    Returns:
        How long the output of a sample is; 0 where they differ.
    """
    generator = torch.Generator().manual_seed(0)
    directions = {
        index: torch.randn(1, *each.shape, generator=generator).to(each.device) for index, each in parameters.items()
    }
    found = _product_by_gradients(gradients, start, parameters, directions, 1.0)
    if found is None:
        return 0
    expected = _by_passes(start, parameters, directions)
    apart = norms(found[index] - each for index, each in expected.items())
    return gradients.length if bool(apart <= _APART * norms(expected.values())) else 0


def _product_by_gradients(
    gradients: SampleGradients,
    start: StepStart,
    parameters: Mapping[int, nn.Parameter],
    directions: Mapping[int, Tensor],
    enough: float,
) -> dict[int, Tensor] | None:
    """None where it cannot be taken, or costs more than by passes though not all eigenvalues are asked for."""
    sums = {index: torch.zeros_like(each) for index, each in directions.items()}
    functions = len(next(iter(directions.values())))
    with gradients.capturing():
        for loss, output in losses_and_outputs(start, "gauss_newton"):
            if not _is_small(output):
                return None
            sizes, vectors = _leading(_hessians(loss, output), enough)
            # Of every gradient, and once more while those of all eigenvalues are put together.
            if 8 * sizes.numel() * sum(each.numel() for each in parameters.values()) > _MOST_BYTES:
                return None
            if enough < 1.0 and not _is_cheaper(gradients, len(sizes), functions):
                return None
            if len(sizes) == 0:
                continue
            found = gradients.along(output, list(parameters.values()), list(vectors))
            if found is None:
                return None
            inner = torch.stack([each.inner(directions[each.parameter]) for each in found]).sum(dim=0) * sizes
            for each in found:
                each.add_to(sums[each.parameter], inner)
    return sums


def _is_small(output: Tensor) -> bool:
    """Whether every sample has one row of few numbers, as precise as gradients are."""
    has_rows = output.dim() == 2 and output.shape[1] <= _MOST_CLASSES
    return has_rows and output.requires_grad and output.dtype == torch.float32


def _is_cheaper(gradients: SampleGradients, count: int, functions: int) -> bool:
    """Whether products with so many gradients a sample take less than passes do, by multiplications.

    A pass is a product of all rows with all matrices; there are three for each function, and for each gradient. Then
    every function has an inner product with each gradient and a sum of them.
    """
    elements, with_tokens = gradients.products
    return count * (3 * with_tokens + 2 * functions * elements) < 3 * functions * with_tokens


def _hessians(loss: Tensor, output: Tensor) -> Tensor:
    """``H_i`` of every sample, if no sample's output changes another's residual: fp64, ``(samples, n, n)``."""
    samples, classes = output.shape
    (residual,) = torch.autograd.grad(loss, output, create_graph=True)
    if not residual.requires_grad:  # a loss without curvature
        return torch.zeros(samples, classes, classes, dtype=torch.float64, device=output.device)
    along = torch.eye(classes, dtype=output.dtype, device=output.device).unsqueeze(1).expand(-1, samples, -1)
    found = pull([residual], [output], [along], keep=True)[0].transpose(0, 1).double()
    return (found + found.transpose(1, 2)) / 2


def _leading(hessians: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of every sample, as few as have that share of all, and their vectors.

    Returns:
        Of shapes ``(n, samples)`` and ``(n, samples, classes)``, fp32.
    """
    values, vectors = torch.linalg.eigh(hessians)
    order = values.abs().argsort(dim=1, descending=True)
    values, vectors = values.gather(1, order), vectors.gather(2, order.unsqueeze(1).expand_as(vectors))
    # What rounding makes of none is none.
    parts = values.abs().sum(dim=0)
    parts = torch.where(parts > 1e-6 * parts[:1], parts, 0.0)
    before = parts.cumsum(dim=0) - parts
    count = int(((before < enough * parts.sum()) & (parts > 0)).sum())
    return values.t()[:count].float(), vectors.permute(2, 0, 1)[:count].float()


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
