"""An optimizer's step as a function of parameters, state and gradients that can be differentiated.

The rules are the references of :mod:`gradkern.ops`, the very arithmetic of the steps. The clip coefficient is a
function of all gradients. The root of a second moment has no derivative at zero; there, where a gradient has been zero
ever since the first step, it is taken to be flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.clip import GlobalNorm
from gradkern.errors import LedgerError
from gradkern.ops.adamw_step.reference import AMSGRAD, adamw_scalars, adamw_update
from gradkern.ops.sgd_step.reference import MOMENTUM, sgd_scalars, sgd_update
from gradkern.step_event import StepEvent

__all__ = ["DifferentiableStep", "States", "require_same_step"]

States = Mapping[str, Mapping[str, Tensor]]
"""What an optimizer keeps, by parameter and by its name for it."""

# Of a second moment: less than any that makes a difference beside eps, and its root is far from fp32's least number.
_TINY = 1e-36

# Of a recomputed step, relative to how far it went, and to where it went.
_STEP_ERROR, _ROUNDING = 1e-3, 1e-6


class DifferentiableStep:
    """The step of an optimizer.

    Args:
        optimizer: gradkern's Adam, AdamW or SGD, clipping by the norm of all of its gradients or not at all.
        model: Whose parameters it trains.

    Raises:
        LedgerError: It is another one, clips otherwise, or does more than its rule says.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._max_norm = _require_known(optimizer)
        self._is_adam = isinstance(optimizer, torch.optim.Adam)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]

    def state_names(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """What it keeps of each parameter of a group with these options, besides the number of steps."""
        if not self._is_adam:
            return ("momentum_buffer",) if options["momentum"] != 0 else ()
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if options["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def leaves(self, groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, Tensor], states: States) -> States:
        """The state of each of some parameters before a step, to differentiate by; zeros before its first.

        Args:
            groups: Options of every parameter group at the step.
            parameters: Some, by name.
            states: What the optimizer kept.
        """
        found = {}
        for name, options in self._with_options(groups, parameters):
            kept = states.get(name, {})
            found[name] = {
                key: (kept[key].detach().clone() if key in kept else torch.zeros_like(parameters[name])).detach()
                for key in self.state_names(options)
            }
            for key, value in found[name].items():
                if key.endswith("_sq"):
                    value.clamp_(min=_TINY)
                value.requires_grad_()
        return found

    def apply(
        self,
        groups: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Tensor],
        leaves: States,
        gradients: Mapping[str, Tensor],
        states: States,
    ) -> tuple[dict[str, Tensor], States]:
        """Make a step.

        Args:
            groups: Options of every parameter group.
            parameters: Those that have a gradient, by name.
            leaves: What :meth:`leaves` gave.
            gradients: As the optimizer sees them.
            states: What the optimizer kept, for the number of steps made.

        Returns:
            Parameters and state after the step, with graphs.
        """
        coefficient = self._clip_coefficient(gradients)
        after: dict[str, Tensor] = {}
        states_after: dict[str, dict[str, Tensor]] = {}
        for name, options in self._with_options(groups, parameters):
            sign = -1.0 if options["maximize"] else 1.0
            kept = list(leaves[name].values())
            made = states.get(name, {})
            if self._is_adam:
                step = int(made["step"]) + 1 if "step" in made else 1
                variant = AMSGRAD if options["amsgrad"] else 0
                decay = options["weight_decay"]
                numbers = (options["lr"], *options["betas"], options["eps"], decay, sign)
                _, *others = adamw_scalars(numbers, 1.0, step, variant)
                rule: Any = adamw_update
            else:
                variant = MOMENTUM if options["momentum"] != 0 else 0
                numbers = (options["lr"], options["momentum"], options["dampening"], options["weight_decay"], sign)
                _, *others = sgd_scalars(numbers, 1.0, 2 if "momentum_buffer" in made else 1, variant)
                rule = sgd_update
            scalars = (coefficient * sign, *others)
            after[name], found = rule(parameters[name], gradients[name], kept, scalars, variant)
            states_after[name] = dict(zip(leaves[name], found, strict=True))
        return after, states_after

    def _with_options(
        self, groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, Tensor]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        pairs = zip(self._groups, groups, strict=True)
        return [(name, options) for names, options in pairs for name in names if name in parameters]

    def _clip_coefficient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``min(1, max_norm / (norm + 1e-6))``, fp32; a constant where nothing is clipped."""
        if self._max_norm is not None:
            norm = torch.stack([each.double().square().sum() for each in gradients.values()]).sum().sqrt()
            coefficient = self._max_norm / (norm + 1e-6)
            if bool(coefficient < 1.0):
                return coefficient.float()
        return torch.ones(())


def require_same_step(
    number: int, start: Mapping[str, Tensor], made: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> None:
    """Make sure that a step made here is the one that was recorded.

    Args:
        number: Of the step, from 0.
        start: Parameters before it.
        made: After it, by the rule.
        end: After it, as recorded.

    Raises:
        LedgerError: It is another one.
    """
    for name, parameter in made.items():
        far = float((end[name] - start[name].detach()).double().norm())
        off = float((parameter.detach() - end[name]).double().norm())
        if not off <= _STEP_ERROR * far + _ROUNDING * float(end[name].double().norm()):
            raise LedgerError(
                f"step {number + 1} moved {name!r} by {far:.3g}, and by the optimizer's rule it ends {off:.3g} from "
                f"there: something besides the rule changes parameters or gradients (a hook of the optimizer, weights "
                f"that are clamped), which estimator='metagradient' cannot differentiate; use estimator='gauss_newton'"
            )


def _require_known(optimizer: torch.optim.Optimizer) -> float | None:
    """The threshold of the norm, if there is one."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)) or not hasattr(
        optimizer, "register_step_event_hook"
    ):
        raise LedgerError(
            f"estimator='metagradient' differentiates the steps of gradkern's Adam, AdamW and SGD, got {name}; use "
            f"estimator='gauss_newton', which takes any optimizer that can be recorded"
        )
    try:
        optimizer.register_step_event_hook(_ignore).remove()
    except ValueError as error:
        raise LedgerError(f"estimator='metagradient' cannot differentiate these steps: {error}") from error
    clip = getattr(optimizer, "clip", None)
    if clip is None:
        return None
    if type(clip) is not GlobalNorm or clip.norm_type != 2.0 or clip.together(optimizer) != [optimizer]:
        raise LedgerError(
            f"estimator='metagradient' differentiates clipping by the 2-norm of all gradients of one optimizer "
            f"(max_norm=), got {clip!r}; use estimator='gauss_newton', which takes any clip policy that can be recorded"
        )
    return clip.max_norm


def _ignore(event: StepEvent) -> None:
    """Told of no step: none is made while this is registered."""
