"""The sums over samples that the conservation law is checked with, carried along while training runs.

One pass over a parameter at each step follows its momentum and its change by the gradients that were captured, and
leaves the smoothed preconditioner, for which the second moment is read anyway.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.ops._registry import backend_for
from gradkern.rollback._lanes import dot
from gradkern.rollback._layout import ParameterInfo
from gradkern.rollback._smoothing import smooth, smoothed_sizes
from gradkern.rollback._to_host import to_host
from gradkern.step_event import ParamStep

__all__ = ["Applied", "Shadows"]

# The gradient of a bias is a sum over all tokens. Where that nearly cancels, what two orders of summing differ by goes
# by what the other elements' sums are like, and Adam enlarges it along with what is left. Partial sums of n terms are
# like the sum, and their n roundings add up at random to some sqrt(n / 3): of thousands of tokens one by one, so many.
_SUM_ROUNDING = 32 * 2.0**-24


# The numbers of a parameter that a step left alone.
_LEFT_ALONE = (math.nan,) * 10


class Applied(NamedTuple):
    """What a step applied to one parameter.

    Attributes:
        parameter: Its index.
        update: As the optimizer told it.
        multiplier: Value of its ``grad_multiplier``.
    """

    parameter: int
    update: ParamStep
    multiplier: float


class Shadows:
    """Exact sums over samples for every owned parameter: three fp32 tensors of its shape.

    Args:
        parameters: The trained parameters.
        infos: Their descriptions; those not owned get only a decay product.

    Attributes:
        decays: Product of all decays of each parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], infos: Sequence[ParameterInfo]) -> None:
        self._names = [info.name for info in infos]
        self._owned = [index for index, info in enumerate(infos) if info.owned]
        self._gradients, self._momenta, self._deltas = (
            {
                index: torch.zeros_like(parameters[index], memory_format=torch.contiguous_format).detach()
                for index in self._owned
            }
            for _ in range(3)
        )
        self._in_order = [list(buffers.values()) for buffers in (self._gradients, self._momenta, self._deltas)]
        self._device = parameters[self._owned[0]].device if self._owned else torch.device("cpu")
        self._smoothed_size = sum(sum(smoothed_sizes(parameters[index].shape)) for index in self._owned)
        self._fresh: set[int] = set()
        self.decays = [1.0] * len(infos)
        # Of each: what rounding can have added to the delta, and to the momentum.
        self._roundings = torch.zeros(len(self._owned), 2, dtype=torch.float64)
        self.drop_gradients()

    @property
    def deltas(self) -> Mapping[int, Tensor]:
        """``D`` of every owned parameter, by index."""
        return self._deltas

    @property
    def roundings(self) -> list[float]:
        """Of each parameter that is a vector, the norm of what rounding its gradients can have added to ``D``."""
        return self._of_all(self._roundings[:, 0])

    def waiting(self, index: int) -> Tensor | None:
        """The captured gradient that waits for the next step; None when nothing was captured."""
        return None if index in self._fresh else self._gradients[index]

    def add_gradients(self, gradients: Sequence[tuple[int, Tensor]]) -> None:
        """Add captured gradients, by index and of the parameter's shape, to what waits for the next step."""
        if not gradients:
            return
        pairs = [(self._to_add_to(index), gradient) for index, gradient in gradients]
        if backend_for("record", self._device) == "native":
            torch.ops.gradkern._add_gradients_(
                [waiting for (waiting, _), _ in pairs],
                [gradient.float().contiguous() for _, gradient in pairs],
                [is_fresh for (_, is_fresh), _ in pairs],
            )
            return
        for (waiting, is_fresh), gradient in pairs:
            (waiting.copy_ if is_fresh else waiting.add_)(gradient.view_as(waiting))

    def _to_add_to(self, index: int) -> tuple[Tensor, bool]:
        """The sum to add captured gradient to, and whether that is to overwrite it, as it is no longer afterwards."""
        is_fresh = index in self._fresh
        self._fresh.discard(index)
        return self._gradients[index], is_fresh

    def missing(self, gradients: Mapping[int, Tensor]) -> list[tuple[int, float, float]]:
        """How far the optimizer's gradients are from what was captured: index, norm of the difference, norm."""
        captured = [
            torch.zeros_like(self._gradients[index]) if index in self._fresh else self._gradients[index]
            for index in gradients
        ]
        dense = [gradient.detach().float().contiguous() for gradient in gradients.values()]
        if backend_for("record", self._device) == "native":
            squares = torch.empty(len(dense), 2, dtype=torch.float64)
            torch.ops.gradkern._compare_gradients_(captured, dense, squares)
        else:
            pairs = [(theirs.double(), ours.double()) for theirs, ours in zip(dense, captured, strict=True)]
            squares = torch.stack(
                [torch.stack([(theirs - ours).square().sum(), theirs.square().sum()]) for theirs, ours in pairs]
            )
        return [(index, *row) for index, row in zip(gradients, squares.sqrt().tolist(), strict=True)]

    def add_gradient_rows(self, index: int, rows: Tensor, values: Tensor) -> None:
        """Add captured gradient of some rows: ``rows`` of shape ``(n,)``, ``values`` ``(n, columns)``."""
        waiting, is_fresh = self._to_add_to(index)
        if is_fresh:
            waiting.zero_()
        waiting.index_add_(0, rows, values)

    def drop_gradients(self) -> None:
        """Forget what waits for the next step."""
        self._fresh = set(self._owned)

    def step(self, applied: Sequence[Applied]) -> Tensor | None:
        """Follow one step of all parameters.

        Args:
            applied: One entry for each parameter that took part, owned or not.

        Returns:
            The smoothed preconditioners of the owned parameters one after the other, bf16, shape
            ``(n,)``; zeros where one did not take part. None, with nothing changed, where a gradient that
            waits is not finite.
        """
        by_index = {each.parameter: each for each in applied}
        taking_part = [by_index.get(index) for index in self._owned]
        backend = backend_for("record", self._device)
        if backend == "native":
            smoothed = self._step_natively(taking_part)
        elif backend == "triton":
            smoothed = self._step_on_device(taking_part)
        else:
            smoothed = self._step_by_torch(taking_part)
        if smoothed is not None:
            for each in applied:
                self.decays[each.parameter] *= each.update.decay
            self.drop_gradients()
        return smoothed

    def _step_natively(self, taking_part: Sequence[Applied | None]) -> Tensor | None:
        numbers = array("d")
        second_moments: list[Tensor] = []
        for index, each in zip(self._owned, taking_part, strict=True):
            moment = None
            if each is None:
                numbers.extend(_LEFT_ALONE)
            else:
                _, _, decay, momentum, grad_weight, lr, step_size, moment, root_scale, eps = each.update
                has_gradient, has_moment = float(index not in self._fresh), float(moment is not None)
                numbers.extend((lr, decay, momentum, grad_weight, each.multiplier))
                numbers.extend((step_size, root_scale, eps, has_gradient, has_moment))
            if moment is None:
                moment = self._momenta[index]
            second_moments.append(moment.float().contiguous())
        smoothed = torch.zeros(self._smoothed_size, dtype=torch.bfloat16)
        is_finite = torch.ops.gradkern._shadow_step_(
            *self._in_order,
            second_moments,
            torch.frombuffer(numbers, dtype=torch.float64),
            self._roundings,
            smoothed,
            _SUM_ROUNDING,
        )
        return smoothed if is_finite else None

    def _step_on_device(self, taking_part: Sequence[Applied | None]) -> Tensor | None:
        """By Triton; the host waits once, for the smoothed preconditioners."""
        from gradkern.ops._record.shadow.triton import Followed, shadow_step  # Triton may not be installed

        smoothed = torch.zeros(self._smoothed_size, dtype=torch.bfloat16, device=self._device)
        followed, rows, first = [], [], 0
        for row, (index, each) in enumerate(zip(self._owned, taking_part, strict=True)):
            momentum, delta = self._momenta[index], self._deltas[index]
            size = sum(smoothed_sizes(momentum.shape))
            first, view = first + size, smoothed[first : first + size]
            if each is None or momentum.numel() == 0:
                continue
            update, moment = each.update, each.update.second_moment
            weight = update.grad_weight * each.multiplier
            numbers = (update.momentum, weight, update.decay, update.step_size, update.root_scale, update.eps)
            gradient = None if index in self._fresh else self._gradients[index]
            moment = None if moment is None else moment.float().contiguous()
            followed.append(Followed(gradient, moment, momentum, delta, numbers, view))
            rows.append((row, index, update, weight))
        squares = torch.zeros(len(followed), 2, dtype=torch.float64, device=self._device)
        bad = torch.zeros(1, dtype=torch.int32, device=self._device)
        if followed:
            shadow_step(followed, squares, bad)
        smoothed, squares, bad = to_host(smoothed, squares, bad)
        if bool(bad):
            return None
        for (row, index, update, weight), sums in zip(rows, squares.tolist(), strict=True):
            if self._momenta[index].dim() == 1:
                self._step_rounding(row, index, update, weight, *map(math.sqrt, sums))
        return smoothed

    def _step_by_torch(self, taking_part: Sequence[Applied | None]) -> Tensor | None:
        pairs = list(zip(self._owned, taking_part, strict=True))
        waiting = [self._gradients[index] for index, each in pairs if each is not None and index not in self._fresh]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in waiting):
            return None
        parts = []
        for row, (index, each) in enumerate(pairs):
            if each is None:
                parts += [part.new_zeros(part.shape) for part in smooth(self._gradients[index])]
            else:
                parts += self._step_one(row, index, each)
        return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.bfloat16)

    def _step_one(self, row: int, index: int, applied: Applied) -> tuple[Tensor, ...]:
        """One parameter; each operation is rounded by itself, in the order of ``csrc/cpu/shadow-inl.h``."""
        update, momentum, delta = applied.update, self._momenta[index], self._deltas[index]
        weight = update.grad_weight * applied.multiplier
        momentum.mul_(update.momentum)
        if index not in self._fresh:
            momentum.add_(self._gradients[index] * weight)
        preconditioner = update.preconditioner()
        delta.mul_(update.decay).sub_(preconditioner * momentum)
        if momentum.dim() == 1:
            # Sums of nothing but zeros have no rounding, and Adam divides them by eps.
            moving = torch.where(momentum != 0, preconditioner, 0.0)
            of_gradient = 0.0 if index in self._fresh else _norm(self._gradients[index])
            self._step_rounding(row, index, update, weight, of_gradient, _norm(moving))
        return smooth(preconditioner)

    def _step_rounding(
        self, row: int, index: int, update: ParamStep, weight: float, of_gradient: float, of_moving: float
    ) -> None:
        """Follow through one step what rounding adds, as if every element had the typical gradient.

        Given are two norms: of the gradient, and of the preconditioner where the momentum is not zero.
        """
        of_delta, of_momentum = self._roundings[row].tolist()
        of_momentum *= update.momentum
        if index not in self._fresh:
            typical = of_gradient / math.sqrt(max(1, self._gradients[index].numel()))
            of_momentum += abs(weight) * _SUM_ROUNDING * typical
        of_delta = abs(update.decay) * of_delta + of_momentum * of_moving
        self._roundings[row] = torch.tensor([of_delta, of_momentum], dtype=torch.float64)

    def _of_all(self, values: Tensor) -> list[float]:
        """Numbers of the owned parameters in the order of all; 0 for the others."""
        found = [0.0] * len(self._names)
        for index, value in zip(self._owned, values.tolist(), strict=True):
            found[index] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that later steps build on; the tensors are those in use."""
        return {
            "momenta": {self._names[index]: momentum for index, momentum in self._momenta.items()},
            "deltas": {self._names[index]: delta for index, delta in self._deltas.items()},
            "decays": list(self.decays),
            "roundings": self.roundings,
            "momentum_roundings": self._of_all(self._roundings[:, 1]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; tensors are copied."""
        for own, given in ((self._momenta, state["momenta"]), (self._deltas, state["deltas"])):
            for index, tensor in own.items():
                tensor.copy_(given[self._names[index]])
        self.decays = list(state["decays"])
        for column, name in enumerate(("roundings", "momentum_roundings")):
            values = [state[name][index] for index in self._owned]
            self._roundings[:, column] = torch.tensor(values, dtype=torch.float64)

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(
            tensor.nbytes for buffers in (self._gradients, self._momenta, self._deltas) for tensor in buffers.values()
        )


def _norm(tensor: Tensor) -> float:
    wide = tensor.double()
    return math.sqrt(float(dot(wide, wide)))
