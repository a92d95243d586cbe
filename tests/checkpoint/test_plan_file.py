from __future__ import annotations

import json

import pytest

from gradkern.checkpoint import Plan, plan


@pytest.fixture
def made(cnn_case):
    free = plan(cnn_case.model, cnn_case.batch, cnn_case.loss_fn, budget="1 GiB")
    return plan(cnn_case.model, cnn_case.batch, cnn_case.loss_fn, budget=free.least_feasible_bytes)


def test_round_trip_is_the_same_plan(made, cnn_case, tmp_path):
    path = tmp_path / "plan.json"
    made.save(path)
    loaded = Plan.load(path)
    assert loaded == made
    made.apply(cnn_case.model)
    loaded.remove(cnn_case.model)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_every_truncation_is_refused(made, tmp_path):
    path = tmp_path / "plan.json"
    made.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete JSON file"):
            Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(format="something"), "not a checkpoint plan"),
        (lambda d: d.pop("units"), "damaged.*units"),
        (lambda d: d.update(budget_bytes="much"), "budget_bytes"),
        (lambda d: d.update(gap=True), "gap"),
        (lambda d: d["units"][1].update(option="guess"), "unknown option 'guess'"),
        (lambda d: d["units"][1].pop("name"), "damaged"),
        (lambda d: d["units"].append(3), "damaged"),
        (lambda d: d["fingerprint"].pop("parameters"), "damaged"),
    ],
)
def test_foreign_and_damaged_files_are_named(made, tmp_path, change, message):
    path = tmp_path / "plan.json"
    made.save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_binary_and_missing_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(ValueError, match="not a complete JSON"):
        Plan.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a checkpoint plan"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent.json")


def test_failed_save_leaves_nothing_behind(made, tmp_path):
    path = tmp_path / "plan.json"
    made.save(path)
    before = path.read_bytes()
    blocked = tmp_path / "folder"
    blocked.mkdir()
    (blocked / "child").touch()
    with pytest.raises(OSError, match="folder"):
        made.save(blocked)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "plan.json"]
    assert path.read_bytes() == before
