"""Planners of other packages as ways to choose what to recompute, fed with our profile; see ``bench.planners``.

What they measure by themselves needs a GPU, and would not be what the laboratory runs: they get our bytes and seconds
in the form of their own statistics, and decide by their own code. As in ``bench.peers`` a package is imported when it
is first asked for.
"""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, compress
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from gradkern.checkpoint._native_solver import fastest_chain
from gradkern.checkpoint._operators import Operator, UnitOperators
from gradkern.checkpoint._profile import Span
from gradkern.checkpoint._recompute import OpCall, Recompute

from .peers import _lazy
from .profiled import Choice, Profiled

__all__ = ["ckptplan", "sac_milp"]

BUDGETS = 10
TARGETS = 20
SOLVE_S = 10

# The sizes that models are shown to solvers in. CBC's tolerances are absolute, in GiB and in milliseconds, and the DP
# of ckptplan counts in MiB: what is small enough for a laboratory is rounding to them.
_SHOWN_PEAK_BYTES = 16 * 2**30
_SHOWN_STEP_MS = 1e3

_ROOT = "model"


def sac_milp(profiled: Profiled) -> list[Choice]:
    """Torch's ``torch.distributed._tools.sac_ilp``: units and shares by one MILP, their operators by one a unit.

    Raises:
        ImportError: ``pulp`` or ``pwlf`` is not installed.
    """
    measured = profiled.measured
    natural = measured.kept.peak_bytes
    least = fastest_chain()(measured.costs).least_capacity()[0]
    per_byte = _SHOWN_PEAK_BYTES / natural
    per_second = _SHOWN_STEP_MS / measured.step_s
    choices = []
    with _sac() as tools:
        statistics: dict[object, _SacUnit | None] = {}
        units: dict[str, _SacUnit] = {}
        for name, ran in profiled.operators.items():
            if ran.signature not in statistics:
                statistics[ran.signature] = _sac_unit(tools, ran, per_byte, per_second)
            unit = statistics[ran.signature]
            if unit is not None:
                units[f"{_ROOT}.{name}"] = unit
        graph = _sac_graph(tools, profiled, units, per_byte)
        policies: dict[tuple[int, float], tuple[OpCall, ...]] = {}
        for step in range(BUDGETS):
            budget = least + (natural - least) * step // (BUDGETS - 1)
            discarded, _, peak = tools.ilp.sac_milp(graph, budget * per_byte / 2**30, ac_units=list(units))
            if peak == -1:
                continue
            choice = {}
            for path, share in discarded.items():
                unit, name = units[path], path.removeprefix(f"{_ROOT}.")
                if (id(unit), share) not in policies:
                    saves = tools.ilp.get_optimal_checkpointing_policy_per_module(unit.statistics, 1 - share)
                    held = compress(unit.calls, saves)
                    policies[id(unit), share] = tuple(call for call in held if call is not None)
                choice[name] = Recompute(measured.buffers[name], policies[id(unit), share])
            choices.append(choice)
    return choices


def ckptplan(profiled: Profiled) -> list[Choice]:
    """PyPI's ``ckptplan``, with each of its strategies that aims at a target.

    Raises:
        ImportError: It is not installed.
    """
    planner, types = _peer("ckptplan.planning.planner"), _peer("ckptplan.types")
    per_byte = _SHOWN_PEAK_BYTES / profiled.measured.kept.peak_bytes
    profiles, blocks = [], []
    for order, name in enumerate(profiled.names):
        kept = profiled.measured.options[1 + profiled.measured.names.index(name)][0]
        again_ms = 1e3 * profiled.again_s(name)
        profiles.append(
            types.BlockProfile(
                block_id=name,
                order=order,
                device="cpu",
                dtype="torch.float32",
                input_shape_signature="",
                output_shape_signature="",
                param_count=0,
                trainable_param_count=0,
                timing_only=False,
                activation_bytes_estimate=round(max(0, kept.saved_bytes) * per_byte),
                activation_bytes_method="isolated_forward_delta",
                forward_time_ms_mean=again_ms,
                forward_time_ms_std=0.0,
                recompute_time_upper_bound_ms_mean=again_ms,
                recompute_time_upper_bound_ms_std=0.0,
                recompute_time_source="measured_full_recompute_early_stop_disabled",
                num_warmup=0,
                num_trials=1,
                is_stochastic=None,
                is_stateful=None,
                stochastic_submodules=(),
                stateful_submodules=(),
                eligible_for_checkpoint=True,
                exclusion_reason=None,
                warnings=(),
                pytorch_version=torch.__version__,
                profiler_version="",
            )
        )
        # The module is only looked at to write down whom the plan is for.
        blocks.append(types.CheckpointableBlock(name, order, nn.Identity()))
    choices = []
    for strategy in ("dynamic_programming", "greedy", "uniform"):
        for target in range(1, TARGETS + 1):
            plan = planner.plan_checkpoints(
                profiles,
                blocks,
                target_kind="activation_saving_fraction",
                target_value=target / TARGETS,
                planner=strategy,
            )
            choices.append(profiled.recomputed([each.block_id for each in plan.decisions if each.checkpointed]))
    return choices


def _peer(module: str) -> Any:
    """Import a peer's module.

    Raises:
        ImportError: It, or what it needs, is not installed.
    """
    try:
        return _lazy(module)
    except ImportError as missing:
        raise ImportError(f"{missing}; try `make bench-peers`") from missing


@contextmanager
def _sac() -> Iterator[Any]:
    """The modules of torch's planner, for as long as the block runs with our limits.

    Neither limit is an argument: CBC would get 180 seconds, and the fit of the trade-off curves starts anywhere.
    """
    pwlf, ilp = _peer("pwlf"), _peer("torch.distributed._tools.sac_ilp")
    graphs, estimator = _peer("torch.distributed._tools.ilp_utils"), _peer("torch.distributed._tools.sac_estimator")
    logging.getLogger(ilp.__name__).setLevel(logging.CRITICAL)  # an error for every budget that is not feasible
    cbc, fit = ilp.PULP_CBC_CMD, pwlf.PiecewiseLinFit

    def limited(**options: Any) -> Any:
        return cbc(**{**options, "timeLimit": SOLVE_S})

    with (
        warnings.catch_warnings(),
        patch.object(ilp, "PULP_CBC_CMD", limited),
        patch.object(pwlf, "PiecewiseLinFit", partial(fit, seed=1)),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch calls in PuLP
        yield SimpleNamespace(ilp=ilp, graphs=graphs, estimator=estimator)


@dataclass(frozen=True)
class _SacUnit:
    """A unit's operators as torch's planner sees them.

    Attributes:
        calls: Of the operators in ``statistics``, those whose outputs we can hold; None for the others.
        statistics: Its ``SACStats``.
        trade_off: Its ``SACTradeOffStats``.
    """

    calls: tuple[OpCall | None, ...]
    statistics: Any
    trade_off: Any


def _sac_unit(tools: Any, ran: UnitOperators, per_byte: float, per_second: float) -> _SacUnit | None:
    """Statistics of a unit by torch's own code from its operators; None where none of them has bytes to discard."""
    estimator = tools.estimator
    calls: list[OpCall | None] = []
    data = []
    for at, op in enumerate(ran.operators):
        func = operator.attrgetter(op.call[0])(torch.ops)
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        # Draws of a unit are all held or none, so that none follows that would find the generator elsewhere. What takes
        # no time is of no use held, and a variable that is in no term gets no value from the solver.
        can_be_held = op.seconds > 0 and (op.held_bytes is not None or (is_draw and not func._schema.is_mutable))
        makes = not (estimator.is_view_fn(func) or func._schema.is_mutable)
        data.append(
            estimator._SACMetadata(
                func=func,
                time_taken=op.seconds * per_second,
                memory_used=round(_output_bytes(op) * per_byte) if makes else 0,
                curr_idx=at,
                output_ids=(),
                # What is written in place cannot be held (torch refuses at the recomputation), so that nobody need
                # know by whom: it always runs again, as views do.
                inplace_info=(),
                is_view_like=not can_be_held,
                is_rand_op=is_draw,
            )
        )
        if func not in estimator.OPS_TO_ALWAYS_SKIP:
            calls.append(op.call if can_be_held else None)
    if not calls:
        return None
    sac = estimator.SACEstimator()
    statistics = sac._get_sac_stats(data, force_store_random=False)
    if not sum(statistics.memory) or not sum(statistics.runtimes):
        return None
    trade_off = sac._get_sac_tradeoff_pwlf_stats(statistics, sac._get_greedy_order_meta(statistics))
    return _SacUnit(tuple(calls), statistics, trade_off)


def _output_bytes(op: Operator) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in op.outputs)


def _sac_graph(tools: Any, profiled: Profiled, units: dict[str, _SacUnit], per_byte: float) -> Any:
    """The model as torch's planner sees it: a root, and below it stem, units and head.

    Bytes are chosen so that with everything kept its peak at every span is the one measured. Parameters are alive
    all the time and are in no peak here.
    """
    measured = profiled.measured
    names = ("<stem>", *measured.names, "<head>")
    paths = [f"{_ROOT}.{name}" for name in names]
    spans = measured.kept.spans
    totals = list(accumulate(span.saved_bytes for span in spans))
    # Not to be recomputed, and with no peak of its own: of the head's, which it cannot exceed, the planner knows.
    nodes = [_node(_ROOT, per_byte, total=totals[-1])]
    for name, path, span, total in zip(names, paths, spans, totals, strict=True):
        gradients, peak = _backward(span)
        spared = profiled.spared_bytes(name) if path in units else 0
        nodes.append(
            _node(
                path,
                per_byte,
                total=total,
                spared=spared,
                gradients=gradients,
                # Besides what is saved: of activations and of these parameters the gradients, and scratch memory.
                transient=peak - span.saved_bytes,
                unit=units.get(path),
            )
        )
    order = {
        "fw_pre_order": [_ROOT, *paths],
        "fw_post_order": [*paths, _ROOT],
        "bw_pre_order": [_ROOT, *reversed(paths)],
        "bw_post_order": [*reversed(paths), _ROOT],
    }
    return tools.graphs.parse_module_info({"mod_order": order, "mod_stats": nodes})


def _backward(span: Span) -> tuple[int, int]:
    """Gradients of parameters there when a span's backward begins, and most bytes besides them while it runs."""
    # One that has no backward of its own has freed nothing by the time that its successor's is over.
    visits = [(visit.gradient_bytes, visit.peak_bytes) for visit in span.visits[1:]]
    return max(visits, key=sum, default=(0, span.saved_bytes))


def _node(
    path: str,
    per_byte: float,
    *,
    total: int,
    spared: int = 0,
    gradients: int = 0,
    transient: int = 0,
    unit: _SacUnit | None = None,
) -> dict[str, Any]:
    """A ``ModStats``: of its fields those that the MILP reads."""
    fit = None if unit is None else unit.trade_off
    return {
        "fqn": path,
        "param_per_module": 0,
        "grad_total": gradients * per_byte,
        "act_fw_per_module": spared * per_byte,
        "act_grad_per_module": transient * per_byte,
        "act_total": total * per_byte,
        "is_leaf": fit is None,
        "sac_runtime": 0.0 if fit is None else fit.sac_runtime,
        "sac_memory": 0 if fit is None else fit.sac_memory,
        "n_segments": 0 if fit is None else fit.n_segments,
        "slopes": [] if fit is None else fit.slopes,
        "intercepts": [] if fit is None else fit.intercepts,
    }
