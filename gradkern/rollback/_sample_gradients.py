"""The exact gradient of every sample of a backward pass, as sum over samples of what captured layers hand over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.rollback._capture import captured
from gradkern.rollback._ownership import LayerKind, OwnedLayer, Ownership
from gradkern.rollback._records import add_outer, times_weights

__all__ = ["SampleGradient", "SampleGradients"]

# Layers whose rows are not told apart here.
_OTHERS = (LayerKind.EMBEDDING, LayerKind.ATTENTION)


@dataclass(frozen=True, slots=True)
class SampleGradient:
    """Gradients of one parameter, or of one use of it, along several directions of each sample's output.

    Attributes:
        parameter: Its index.
        rows: Shape ``(directions, samples, numel)``; with ``columns`` the factor along dimension 0, of that many
            elements.
        columns: The factor along the rest, of all directions, shape ``(samples, columns)``.
    """

    parameter: int
    rows: Tensor
    columns: Tensor | None = None

    def inner(self, weights: Tensor) -> Tensor:
        """Inner products with ``weights`` of shape ``(m, *parameter)``: ``(m, directions, samples)``."""
        if self.columns is None:
            return (weights.flatten(1) @ self.rows.flatten(0, 1).t()).view(len(weights), *self.rows.shape[:2])
        passed = times_weights(self.columns, weights)
        return torch.stack([(passed * rows.unsqueeze(1)).sum(dim=2).t() for rows in self.rows], dim=1)

    def add_to(self, sums: Tensor, coefficients: Tensor) -> None:
        """Add all, times ``coefficients`` of shape ``(m, directions, samples)``, to ``sums``, ``(m, *parameter)``."""
        if self.columns is None:
            sums.view(len(sums), -1).addmm_(coefficients.flatten(1), self.rows.flatten(0, 1))
            return
        add_outer(sums, torch.einsum("mdn,dnr->nmr", coefficients, self.rows), self.columns)


class SampleGradients:
    """The sink of captured layers, see :class:`gradkern.rollback._sink.Sink`.

    Args:
        ownership: What is captured.

    Attributes:
        paused: See there.
        products: Elements of all matrices, and the same times the tokens that each saw: what one product with all of
            their gradients takes, and what one with the layers takes, of a sample.
        length: Of a sample's output.
    """

    def __init__(self, ownership: Ownership) -> None:
        self.paused = False
        self.products = (0, 0)
        self.length = 0
        self._layers = ownership.layers
        self._parameters = [stream.parameter for stream in ownership.layout.streams]
        self._samples = 0
        self._fits = True
        self._found: list[SampleGradient] = []

    @property
    def can_tell_apart(self) -> bool:
        """Whether all layers are of kinds that are known here."""
        return all(layer.kind not in _OTHERS and not layer.is_time_first for layer in self._layers)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Run the layers through capturing functions."""
        with captured(self._layers, self):
            yield

    def along(
        self, output: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> list[SampleGradient] | None:
        """``J_iᵀ v`` of every sample, by one backward pass for each direction; keeps the graph.

        Args:
            output: Computed within :meth:`capturing`, shape ``(samples, n)``.
            parameters: Of which gradients are taken.
            directions: ``v`` of every sample, each of the shape of ``output``.

        Returns:
            Of every parameter that the output depends on; one that was used twice comes twice. None where a layer's
            rows are no multiple of the samples.
        """
        passes, self._fits, self.length = [], True, output.shape[1]
        for direction in directions:
            self._samples, self._found, self.products = len(output), [], (0, 0)
            try:
                torch.autograd.grad(output, parameters, direction, retain_graph=True, allow_unused=True)
                passes.append(self._found)
            finally:
                self._samples, self._found = 0, []
        if not self._fits:
            return None
        # The graph is the same, and so is the order in which it is gone through.
        return [
            SampleGradient(same[0].parameter, torch.cat([each.rows for each in same]), same[0].columns)
            for same in zip(*passes, strict=True)
        ]

    def expand_shared(self, layer: OwnedLayer, output: Tensor, ids: Tensor) -> Tensor:
        """See :class:`gradkern.rollback._sink.Sink`; there is no embedding here."""
        return output

    def take_matrix(
        self,
        layer: OwnedLayer,
        rows: Tensor,
        columns: Tensor,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None = None,
        is_transposed: bool = False,
    ) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if not self._samples:
            return
        if bias_grad is not None:
            self.take_bias(layer, rows, bias_grad)
        if layer.weight is None:
            return
        factors = self._per_sample(rows, columns)
        if factors is None:
            return
        rows, columns = factors
        tokens, numel = rows.shape[1], rows.shape[2] * columns.shape[2]
        self.products = self.products[0] + numel, self.products[1] + tokens * numel
        # A Linear's columns are its input, which all directions share.
        if tokens == 1 and layer.kind is LayerKind.LINEAR:
            self._add(layer.weight, rows[:, 0], columns[:, 0])
        else:
            self._add(layer.weight, (rows.transpose(1, 2) @ columns).flatten(1))

    def take_logits(self, layer: OwnedLayer, logits: Tensor, grad: Tensor) -> None:
        """See :class:`gradkern.rollback._sink.Sink`; nothing to do."""

    def take_bias(self, layer: OwnedLayer, grad: Tensor, bias_grad: Tensor | None) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if self._samples and layer.bias is not None and (rows := self._per_sample(grad)):
            self._add(layer.bias, rows[0].sum(dim=1))

    def take_embedding(self, layer: OwnedLayer, ids: Tensor, grad: Tensor) -> None:
        """See :class:`gradkern.rollback._sink.Sink`; there is none here."""

    def take_gradient(self, layer: OwnedLayer, gradient: Tensor, *, of_weight: bool) -> None:
        """See :class:`gradkern.rollback._sink.Sink`; nothing to do."""

    def take_norm(
        self, layer: OwnedLayer, normalised: Tensor, grad: Tensor, weight_grad: Tensor | None, bias_grad: Tensor | None
    ) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        factors = self._per_sample(grad, normalised) if self._samples else None
        if factors is None:
            return
        grad, normalised = factors
        if layer.weight is not None and weight_grad is not None:
            self._add(layer.weight, (grad * normalised).sum(dim=1))
        if layer.bias is not None and bias_grad is not None:
            self._add(layer.bias, grad.sum(dim=1))

    def take_vectors(self, layer: OwnedLayer, grads: Tensor, weight_grad: Tensor | None) -> None:
        """See :class:`gradkern.rollback._sink.Sink`."""
        if self._samples and layer.weight is not None and (rows := self._per_sample(grads.flatten(1))):
            numel = rows[0].shape[2]
            self.products = self.products[0] + numel, self.products[1] + numel
            self._add(layer.weight, rows[0].sum(dim=1))

    def _add(self, stream: int, rows: Tensor, columns: Tensor | None = None) -> None:
        self._found.append(SampleGradient(self._parameters[stream], rows.unsqueeze(0), columns))

    def _per_sample(self, *tensors: Tensor) -> list[Tensor] | None:
        """View ``(B, ..., N)`` or sample-major ``(B * T, N)`` as ``(B, T, N)``; None, and noted, where none is."""
        if any(tensor.shape[:-1].numel() % self._samples for tensor in tensors):
            self._fits = False
            return None
        return [tensor.detach().reshape(self._samples, -1, tensor.shape[-1]) for tensor in tensors]
