"""What is drawn of a plan: the numbers behind the lines, and a file of the right kind."""

from __future__ import annotations

import itertools

import pytest
from checkpoint_cases import mlp

from gradkern.checkpoint import measure_peak, plan
from gradkern.checkpoint._timeline import timeline


@pytest.fixture(scope="module")
def free():
    case = mlp()
    return plan(case.model, case.batch, case.loss_fn, budget="1 GiB")


def test_pareto_trades_bytes_for_time(free):
    found = free.pareto()
    assert len(found) > 3
    for (less, slower), (more, faster) in itertools.pairwise(found):
        assert less < more
        assert slower > faster
    assert found[-1][1] == 0.0
    assert found[-1][0] == pytest.approx(free.natural_peak_bytes, rel=0.02)
    assert found[0][0] == pytest.approx(free.least_feasible_bytes, rel=0.02)
    assert free.pareto(2) == [found[0], found[-1]]
    with pytest.raises(ValueError, match="at least 2"):
        free.pareto(1)


def test_the_line_is_that_of_a_step(free, mlp_case):
    for made in (free, free.for_budget((free.least_feasible_bytes + free.natural_peak_bytes) // 2)):
        points = timeline(made.units, [unit.chosen for unit in made.units], made.fixed_bytes, made.floor_bytes)
        assert max(nbytes for _, nbytes in points) == made.modelled_peak_bytes
        assert points[0] == (0.0, made.fixed_bytes)
        assert points[-1][1] == made.fixed_bytes + made.floor_bytes
        assert points[-1][0] == pytest.approx(made.step_s + made.extra_s)
        seconds = [at for at, _ in points]
        assert seconds == sorted(seconds)
        made.apply(mlp_case.model)
        peak = measure_peak(lambda: mlp_case.loss().backward(), model=mlp_case.model).peak_bytes
        made.remove(mlp_case.model)
        mlp_case.model.zero_grad()
        # That peak does not count the batch and other tensors of the test as the plan does.
        assert max(nbytes for _, nbytes in points) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(("name", "start"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml"), ("plan.pdf", b"%PDF")])
def test_files_by_their_ending(free, tmp_path, name, start):
    free.plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_an_unknown_ending_is_refused(free, tmp_path):
    with pytest.raises(ValueError, match="format"):
        free.plot(tmp_path / "plan.xyz")
    assert list(tmp_path.iterdir()) == []
