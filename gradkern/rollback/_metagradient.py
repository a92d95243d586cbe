"""The exact derivative of a query's loss by the weight of every row in training, backwards through all of its steps.

Let the loss of a micro-batch of ``B`` samples be ``Σ_i w_i l_i`` with ``w_i = 1``, where ``l_i`` is what the rows of
sample ``i`` in the model's output add to it: ``loss / B`` for a mean. A sample's score is minus the derivative of the
query's loss, at the end of the training, by all of its weights: how much the loss would rise, to first order, with the
sample's terms gone and those of the others as they were (a mean is not taken anew over the rest). Source: Ilyas and
Engstrom, "MAGIC: near-optimal data attribution for deep learning", arXiv 2504.16430. The derivative is that of the
recorded run, through momenta, second moments, bias corrections, decay and clipping.

``λ`` by parameters and ``ν`` by the optimizer's state are carried back through each step, which is a function of
parameters, state and gradients (:mod:`gradkern.rollback._differentiable_step`): one product with its transposed
Jacobian matrix for all queries at once also gives ``u``, by the gradient ``G``. As ``G = Jᵀ (w ⊙ r)`` with the output's
Jacobian matrix ``J`` and ``r`` the loss's gradient by the output, one more product gives what ``u`` adds to ``λ`` (the
Hessian matrix times ``u``) and, by ``w``, to the scores.

In fp32, as training was: the recursion is linear in ``λ`` and ``ν`` and follows a trajectory that is given, so that
rounding is not amplified by more than influence itself is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradkern.errors import LedgerError, UnstableInfluenceError
from gradkern.rollback._differentiable_step import DifferentiableStep, require_same_step
from gradkern.rollback._output import losses_and_outputs, pull, require_output_decides
from gradkern.rollback._replay import Replayer
from gradkern.rollback._sweep import collect_scores, norms
from gradkern.rollback._trajectory import StepStart, Trajectory

__all__ = ["metagradient"]

# Of the Hessian matrix of the loss by the output, what may lie between rows of different samples: rounding.
_MOST_BETWEEN_ROWS = 1e-5


def metagradient(
    model: nn.Module, gradients: Mapping[str, Tensor], replayer: Replayer
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every recorded sample.

    Args:
        model: The trained model.
        gradients: Of the queries' losses, by the name of every trained parameter, shape ``(queries, *parameter)``.
        replayer: Of the training.

    Returns:
        The different sample ids, ascending, scores of shape ``(queries, samples)``, fp64, and their errors, likewise;
        see :func:`gradkern.rollback._sweep.collect_scores`.

    Raises:
        LedgerError: The training cannot be differentiated, or running it again gave something else.
        UnstableInfluenceError: A derivative is not finite.
    """
    begun = replayer.begin()
    step = DifferentiableStep(begun.optimizer, begun.model)
    changed = replayer.changed_buffers()
    if changed:
        raise LedgerError(
            f"training changed the buffers {', '.join(changed)} (running statistics of a BatchNorm?), through which "
            f"estimator='metagradient' does not follow influence; use estimator='gauss_newton'"
        )
    queries = len(next(iter(gradients.values())))
    sweep = _Metagradient(model, gradients, step)
    visits = [part for start in Trajectory(replayer).backwards() for part in sweep.through(start)]
    ids, scores, errors = collect_scores(visits, queries)
    is_finite = scores.isfinite().all(dim=1)
    if not bool(is_finite.all()):
        raise UnstableInfluenceError(
            f"the exact derivative of {int((~is_finite).sum())} of {queries} queries is not finite in fp32: the run is "
            f"too sensitive to its samples' weights; use estimator='gauss_newton'",
            growth=tuple(sweep.growth().tolist()),
        )
    return ids, scores, errors


class _Metagradient:
    """``λ`` and ``ν`` on their way back."""

    def __init__(self, model: nn.Module, gradients: Mapping[str, Tensor], step: DifferentiableStep) -> None:
        self._step = step
        self._of_parameters = {name: each.clone() for name, each in gradients.items()}
        self._of_states: dict[tuple[str, str], Tensor] = {}
        self._start_norms = norms(self._of_parameters.values())
        self._end = {name: each.detach() for name, each in model.named_parameters() if name in gradients}
        self._has_checked_output = self._has_checked_rows = False

    def growth(self) -> Tensor:
        """``‖λ‖`` now over that at the end of the training, shape ``(queries,)``."""
        return norms(self._of_parameters.values()) / self._start_norms

    def through(self, start: StepStart) -> list[tuple[Tensor, Tensor]]:
        """Go back through a step: of every micro-batch its samples and their scores, ``(queries, samples)``, fp64."""
        named = dict(start.training.model.named_parameters())
        parameters = {name: named[name] for name in self._of_parameters}
        with start.as_recorded():
            directions = self._through_step(start, parameters)
            parts = self._through_losses(start, {name: parameters[name] for name in directions}, directions)
        self._end = {name: each.detach().clone() for name, each in parameters.items()}
        return parts

    def _through_step(self, start: StepStart, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go back through the optimizer's step; what the queries gain by its gradients, by parameter."""
        gradients = _batch_gradients(start, parameters)
        if not gradients:
            return {}
        stepped = {name: parameters[name].detach().requires_grad_() for name in gradients}
        groups = start.step.log.options["groups"]
        leaves = self._step.leaves(groups, stepped, start.state)
        after, states_after = self._step.apply(groups, stepped, leaves, gradients, start.state)
        require_same_step(start.step.number, parameters, after, self._end)
        keys = [(name, key) for name, kept in leaves.items() for key in kept]
        outputs = [*after.values(), *(states_after[name][key] for name, key in keys)]
        gains = [self._of_parameters[name] for name in after]
        gains += [self._of_state(name, key, states_after[name][key]) for name, key in keys]
        inputs = [*stepped.values(), *(leaves[name][key] for name, key in keys), *gradients.values()]
        found = iter(pull(outputs, inputs, gains, keep=False))
        for name in stepped:
            self._of_parameters[name] = next(found)
        for name, key in keys:
            self._of_states[name, key] = next(found)
        return {name: next(found) for name in gradients}

    def _of_state(self, name: str, key: str, like: Tensor) -> Tensor:
        """``ν`` of one state; zero at first, for no query depends on the state that training ended with."""
        found = self._of_states.get((name, key))
        return torch.zeros(len(self._start_norms), *like.shape) if found is None else found

    def _through_losses(
        self, start: StepStart, parameters: Mapping[str, Tensor], directions: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Go back through the gradients of the micro-batches."""
        parts = []
        batches = [ids for ids in start.step.ids if len(ids)]
        for ids, (loss, output) in zip(batches, losses_and_outputs(start, "metagradient"), strict=True):
            if not self._has_checked_output:
                require_output_decides(loss, output, list(parameters.values()))
                self._has_checked_output = True
            (residual,) = torch.autograd.grad(loss, output, create_graph=True)
            if not self._has_checked_rows and len(ids) > 1:
                _require_sum_over_rows(residual, output, len(ids))
                self._has_checked_rows = True
            weights = torch.ones(len(ids), requires_grad=True)
            weighted = _spread(weights, output) * residual
            pulled = torch.autograd.grad(
                output, list(parameters.values()), weighted, create_graph=True, allow_unused=True
            )
            pairs = [
                (each, directions[name]) for name, each in zip(parameters, pulled, strict=True) if each is not None
            ]
            *by_parameter, by_weight = pull(
                [each for each, _ in pairs], [*parameters.values(), weights], [along for _, along in pairs], keep=False
            )
            for name, gain in zip(parameters, by_parameter, strict=True):
                self._of_parameters[name] += gain
            parts.append((ids, -by_weight.double()))
        return parts


def _batch_gradients(start: StepStart, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer saw: the sum over the micro-batches; parameters that none of them reached are missing."""
    sums: dict[str, Tensor] = {}
    for loss in start.losses():
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[name] = gradient if name not in sums else sums[name] + gradient
    return {name: gradient.detach().requires_grad_() for name, gradient in sums.items()}


def _spread(of_samples: Tensor, output: Tensor) -> Tensor:
    """A number for every sample as one for every row of the output, fit to be multiplied with it.

    Raises:
        LedgerError: The rows are not as many for each sample.
    """
    samples = len(of_samples)
    if output.dim() == 0 or output.shape[0] == 0 or output.shape[0] % samples:
        raise LedgerError(
            f"the model's output has shape {tuple(output.shape)} for {samples} samples, expected equally many rows for "
            f"each, those of the first sample first; estimator='metagradient' cannot tell whose they are: use "
            f"estimator='gauss_newton'"
        )
    return of_samples.repeat_interleave(output.shape[0] // samples).reshape(-1, *[1] * (output.dim() - 1))


def _require_sum_over_rows(residual: Tensor, output: Tensor, samples: int) -> None:
    """Make sure that the loss is a sum of one term for each sample: its Hessian matrix has nothing between two of them.

    Samples are split in two in as many ways as their numbers have bits, so that any two are apart in one of them.
    """
    if not residual.requires_grad:
        return
    numbers = torch.arange(samples)
    halves = [_spread((numbers >> bit & 1).float(), output) for bit in range((samples - 1).bit_length())]
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (bent,) = pull([residual], [output], [torch.stack([half * probe for half in halves])], keep=True)
    between = torch.stack([((1.0 - half) * each).abs().max() for half, each in zip(halves, bent, strict=True)])
    if not bool((between <= _MOST_BETWEEN_ROWS * bent.abs().max()).all()):
        raise LedgerError(
            "the loss of a batch is not a sum of one term for each sample (the second derivative by the outputs of two "
            "different samples is not zero), so that no sample has a weight of its own in it, as "
            "estimator='metagradient' takes for granted; use estimator='gauss_newton'"
        )
