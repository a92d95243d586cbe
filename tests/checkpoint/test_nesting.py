"""Plans that nest: when they do, what they need, and that they are what they say when read back."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import deep, gpt2

from gradkern.checkpoint import Plan, allocator_unavailable_reason, enforce, plan
from gradkern.checkpoint._nesting import NestedChain
from gradkern.checkpoint._profile import CycleCost, Span, Visit
from gradkern.checkpoint._segments import names_in
from gradkern.errors import PlanInfeasibleError
from gradkern.testing import same_bits

unavailable = allocator_unavailable_reason()
needs_hook = pytest.mark.skipif(unavailable is not None, reason=f"enforce needs the allocator hook: {unavailable}")


def least_of(case, **options):
    with pytest.raises(PlanInfeasibleError) as refused:
        plan(case.model, case.batch, case.loss_fn, budget=1000, **options)
    return refused.value.least_feasible_bytes


@needs_hook
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_deep_chain_fits_where_no_unit_alone_would(accumulate):
    case = deep()
    optimizer = torch.optim.AdamW(case.model.parameters())
    case.cycle(optimizer, accumulate)
    options = {"optimizer": optimizer, "accumulate": accumulate}
    free = plan(case.model, case.batch, case.loss_fn, budget="1 GiB", **options)
    assert free.segments == ()
    least = least_of(case, **options)
    assert least < free.least_feasible_bytes - 4 * case.batch.nbytes
    for budget in (least, (least + free.least_feasible_bytes) // 2):
        made = plan(case.model, case.batch, case.loss_fn, budget=budget, **options)
        assert made.segments
        assert made.predicted_peak_bytes <= budget
        nested = [unit.name for unit in made.units if unit.option == "nested"]
        assert [name for nest in made.segments for name in names_in(nest)] == nested
        assert made.extra_s > 0
        made.apply(case.model)
        with enforce(budget, model=case.model, optimizer=optimizer):
            case.cycle(optimizer, accumulate)
        checked = made.validate(case.model, case.batch, case.loss_fn, **options)
        assert checked.measured_peak_bytes == pytest.approx(made.predicted_peak_bytes, rel=0.1)
        made.remove(case.model)
    assert made.modelled_peak_bytes == pytest.approx(made.predicted_peak_bytes, rel=0.1)


def test_gradients_of_a_nested_plan_are_bit_equal():
    for case in (deep(), gpt2(layers=6)):
        least = least_of(case)
        made = plan(case.model, case.batch, case.loss_fn, budget=least)
        found = []
        for apply in (False, True):
            if apply:
                made.apply(case.model)
            torch.manual_seed(3)
            case.loss().backward()
            found.append([param.grad for param in case.model.parameters()])
            case.model.zero_grad()
        assert all(map(same_bits, *found))


def test_a_nested_plan_is_the_same_when_read_back(tmp_path):
    case = deep()
    made = plan(case.model, case.batch, case.loss_fn, budget=least_of(case))
    assert made.segments
    path = tmp_path / "plan.json"
    made.save(path)
    assert Plan.load(path) == made
    assert "nested" in str(made)
    made.plot(tmp_path / "plan.png")
    assert made.for_budget(made.predicted_peak_bytes + 1) == replace(made, budget_bytes=made.predicted_peak_bytes + 1)
    with pytest.raises(PlanInfeasibleError, match="without nesting"):
        made.for_budget(made.predicted_peak_bytes - 1)
    larger = made.for_budget("1 GiB")
    assert larger.segments == ()
    assert all(unit.option == "keep" for unit in larger.units)
    document = json.loads(path.read_text())
    for change in (
        lambda d: d.update(segments=[]),
        lambda d: d.update(segments=[["0", 1]]),
        lambda d: d["segments"][0].append("nowhere"),
        lambda d: d.update(segments="all"),
    ):
        damaged = json.loads(json.dumps(document))
        change(damaged)
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="segments"):
            Plan.load(path)


def test_with_a_unit_that_must_be_kept_nothing_is_nested():
    case = deep()
    # Drawn from a generator that recomputation does not put back.
    case.model[5].scale = lambda: 1 + random.random()
    made = plan(case.model, case.batch, case.loss_fn, budget=least_of(case))
    assert made.segments == ()
    assert [unit.option for unit in made.units if unit.name == "5"] == ["keep"]


def span(saved, forward, backward, gradients=0, seconds=1.0):
    return Span(saved, (Visit(forward, 0), Visit(backward, gradients)), seconds, 2 * seconds)


def test_a_chain_by_hand():
    """Four units that hold 10 and hand on 1: with room for all, for two at a time, for one, for none."""
    kept = CycleCost((span(1, 1, 1), *(span(10, 10, 11) for _ in range(4)), span(0, 0, 1)), 0, 0, frozenset(), ())
    again = CycleCost((span(1, 1, 1), *(span(1, 2, 11) for _ in range(4)), span(0, 0, 1)), 0, 0, frozenset(), ())
    names = ("a", "b", "c", "d")
    chain = NestedChain.of(names, kept, again)
    assert chain.fastest(45).segments == ()
    assert chain.fastest(45).extra_s == 0.0
    tight = chain.fastest(30)
    assert 0 < tight.extra_s <= 4
    assert tight.peak_bytes <= 30
    least = chain.smallest(45)
    assert chain.fastest(least.peak_bytes - 1) is None
    assert least.extra_s >= tight.extra_s
    assert chain.fastest(1) is None
    # Gradients of later units lie there while earlier ones run backward: three of 100 at the first.
    gradients = (0, 300, 200, 100, 0, 0)
    graded = CycleCost(
        tuple(
            span(each.saved_bytes, each.visits[0].peak_bytes, each.visits[1].peak_bytes, nbytes)
            for each, nbytes in zip(kept.spans, gradients, strict=True)
        ),
        0,
        400,
        frozenset(),
        (),
    )
    assert NestedChain.of(names, graded, again).fastest(10_000).peak_bytes >= 1 + 11 + 300
    freeing = CycleCost((span(1, 1, 1), span(-1, 1, 1), *kept.spans[2:]), 0, 0, frozenset(), ())
    assert NestedChain.of(names, freeing, again) is None
