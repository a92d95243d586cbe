"""Putting recomputation around units of a model in place: same modules, same classes, same state_dict."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradkern.checkpoint._offload import Link, Offload, OffloadedForward, Route, link_of
from gradkern.checkpoint._recompute import Recompute, RecomputedForward
from gradkern.checkpoint._segments import Nest, SegmentedForward, make_segments
from gradkern.checkpoint._units import unit_module

__all__ = ["applied_within", "apply_recompute", "is_applied", "remove_recompute", "uses_cache"]

_MARKER = "_gradkern_checkpoint"


@dataclass(frozen=True)
class _Applied:
    """What was put around a model; lives in its ``__dict__`` and is copied and pickled with it."""

    plan_id: str
    unit_names: tuple[str, ...]
    hooks: tuple[RemovableHandle, ...]


def apply_recompute(
    model: nn.Module,
    recompute: Mapping[str, Recompute],
    segments: Sequence[Nest] = (),
    offloads: Sequence[Offload] = (),
    *,
    plan_id: str,
    link: Callable[[torch.device], Link | None] = link_of,
) -> None:
    """Make the named units recompute in backward, or have what they save wait on the host.

    Args:
        model: Mutated in place.
        recompute: The units to recompute, and how.
        segments: Of those, units that are recomputed together.
        offloads: Other units, that are offloaded.
        plan_id: Written down with the model, for ``is_applied``.
        link: Of a device to its host.

    Raises:
        ValueError: The model has no unit or no buffer of a given name; nothing is changed then.
    """
    modules = {name: _resolved(model, name, how.mutated_buffers) for name, how in recompute.items()}
    named = [name for each in offloads for name in (each.unit, each.released_at, each.fetched_at)]
    places = {name: _resolved(model, name, ()) for name in named}
    hooks = [
        module.register_forward_pre_hook(partial(_without_cache, position), with_kwargs=True)
        for module in model.modules()
        for position in _cache_positions(module)
    ]
    within = make_segments(segments)
    for name, module in modules.items():
        how = recompute[name]
        vars(module)["forward"] = (
            SegmentedForward(module, how, plan_id, name, within[name])
            if name in within
            else RecomputedForward(module, how, plan_id)
        )
    route = Route(link)
    for each in offloads:
        vars(places[each.unit])["forward"] = OffloadedForward(places[each.unit], plan_id, each.unit, route)
        released = partial(route.release, each.unit)
        hooks.append(places[each.released_at].register_forward_pre_hook(released, prepend=True))
        hooks.append(places[each.fetched_at].register_forward_hook(partial(route.watch, each.unit)))
    units = (*recompute, *(each.unit for each in offloads))
    vars(model)[_MARKER] = _Applied(plan_id, units, tuple(hooks))


def remove_recompute(model: nn.Module) -> None:
    """Undo ``apply_recompute``; the model's modules hold again exactly what they held before.

    Raises:
        RuntimeError: Nothing is applied, or another tool has replaced the forward of a unit since; nothing is
            changed then.
    """
    applied = vars(model).get(_MARKER)
    if applied is None:
        raise RuntimeError("no checkpoint plan is applied to this model; nothing to remove")
    modules = [unit_module(model, name) for name in applied.unit_names]
    for name, module in zip(applied.unit_names, modules, strict=True):
        forward = vars(module).get("forward")
        if not isinstance(forward, RecomputedForward) or forward.plan_id != applied.plan_id:
            raise RuntimeError(
                f"the forward of unit {name!r} was replaced after the plan was applied; undo that first, "
                "then remove the plan"
            )
    for module in modules:
        inner = vars(module)["forward"].inner
        if inner is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = inner
    for hook in applied.hooks:
        hook.remove()
    del vars(model)[_MARKER]


def is_applied(model: nn.Module, plan_id: str | None = None) -> bool:
    """Whether a plan (this plan, if ``plan_id`` is given) is applied to ``model``."""
    applied = vars(model).get(_MARKER)
    return applied is not None and plan_id in (None, applied.plan_id)


def applied_within(model: nn.Module) -> str | None:
    """Name the first module in ``model`` (itself: ``""``) that a plan was applied to or that it wrapped, if any."""
    for name, module in model.named_modules():
        if _MARKER in vars(module) or isinstance(vars(module).get("forward"), RecomputedForward):
            return str(name)
    return None


def uses_cache(model: nn.Module) -> bool:
    """Whether a plan on ``model`` would turn a key/value cache off somewhere."""
    return any(_cache_positions(module) for module in model.modules())


def _resolved(model: nn.Module, name: str, buffers: tuple[str, ...]) -> nn.Module:
    """Return the module of a unit after checking that it and its buffers are there."""
    try:
        module = unit_module(model, name)
        for buffer in buffers:
            module.get_buffer(buffer)
    except AttributeError as error:
        raise ValueError(f"unit {name!r} does not fit this model: {error}; make a plan for this one") from error
    return module


def _cache_positions(module: nn.Module) -> list[int]:
    """Where ``use_cache`` stands among the positional arguments of ``module``'s forward; empty without it.

    A list, of one position at most; one past any call's arguments for a keyword-only argument.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    return [
        sys.maxsize if parameter.kind is inspect.Parameter.KEYWORD_ONLY else position
        for position, parameter in enumerate(parameters)
        if parameter.name == "use_cache"
    ]


def _without_cache(
    position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a key/value cache would be written a second time when a unit is recomputed."""
    if not torch.is_grad_enabled():
        return args, kwargs
    if position < len(args):
        return (*args[:position], False, *args[position + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}
