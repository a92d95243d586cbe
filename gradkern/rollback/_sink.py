"""What capturing layers hand over in backward, and to whom."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gradkern.rollback._ownership import OwnedLayer

__all__ = ["Sink"]


class Sink(Protocol):
    """Receives what backward saw. Tensors are lent until the backward pass ends; nobody may change them.

    Attributes:
        paused: While True, layers run as if they were not captured.
    """

    paused: bool

    def expand_shared(self, layer: OwnedLayer, output: Tensor, ids: Tensor) -> Tensor:
        """Give an embedding's output one row per sample if its ids are shared by all samples."""
        ...

    def take_matrix(
        self,
        layer: OwnedLayer,
        rows: Tensor,
        columns: Tensor,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None = None,
        is_transposed: bool = False,
    ) -> None:
        """Take a Linear's, Conv1D's or convolution's factors.

        Args:
            layer: The layer.
            rows: The factor along the weight's dimension 0, shape ``(..., weight.shape[0])``.
            columns: The factor along its dimension 1, shape ``(..., weight.shape[1])``.
            weight_grad: ``rowsᵀ @ columns`` over all tokens, as it goes to the parameter; None where
                :meth:`take_gradient` says that.
            bias_grad: The sum of ``rows`` over all tokens, where that is what goes to a bias.
            is_transposed: Whether ``weight_grad`` is the transpose of that.
        """
        ...

    def take_logits(self, layer: OwnedLayer, logits: Tensor, grad: Tensor) -> None:
        """Take what the output layer gave and its gradient, shape ``(..., classes)``, before its factors."""
        ...

    def take_bias(self, layer: OwnedLayer, grad: Tensor, bias_grad: Tensor | None) -> None:
        """Take a Linear's or Conv1D's output gradient and its sum over all tokens, None as for a matrix."""
        ...

    def take_embedding(self, layer: OwnedLayer, ids: Tensor, grad: Tensor) -> None:
        """Take an embedding's ids and output gradient, shape ``(*ids.shape, columns)`` or ``(B, ...)``."""
        ...

    def take_gradient(self, layer: OwnedLayer, gradient: Tensor, *, of_weight: bool) -> None:
        """Take what goes to a layer's weight or bias, where that differs from what its factors make by a rounding."""
        ...

    def take_norm(
        self, layer: OwnedLayer, normalised: Tensor, grad: Tensor, weight_grad: Tensor | None, bias_grad: Tensor | None
    ) -> None:
        """Take a norm's normalised input and output gradient, features flattened to one dimension, the last.

        And what goes to its parameters; None for one that is not trained.
        """
        ...

    def take_vectors(self, layer: OwnedLayer, grads: Tensor, weight_grad: Tensor | None) -> None:
        """Take a grouped convolution's gradients of every row of the input, and their sum, None as for a matrix."""
        ...
