from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import cnn

from gradkern.checkpoint import Plan, plan


@pytest.fixture(scope="module")
def made():
    case = cnn()
    free = plan(case.model, case.batch, case.loss_fn, budget="1 GiB")
    return plan(case.model, case.batch, case.loss_fn, budget=free.least_feasible_bytes)


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
        (lambda d: d["units"][0].update(option="recompute"), "<stem> is always kept"),
        (lambda d: d["units"][-1].update(option="recompute"), "<head> is always kept"),
        (lambda d: d["units"][1].update(name=3), "field name"),
        (lambda d: d["units"][1]["options"][0].update(saved_bytes="7"), "field saved_bytes"),
        (lambda d: d["units"][1]["options"][0].update(saved_ops=[["aten.mm.default", "0"]]), "field saved_ops"),
        (lambda d: d["units"][1].update(options=[]), "unknown option"),
        (lambda d: d.update(source=1), "field source"),
        (lambda d: d.update(predicted_peak_bytes=-5), "below zero"),
        (lambda d: d.update(gap=-0.5), "field gap"),
        (lambda d: d["units"].pop(0), "<stem> to <head>"),
        (lambda d: d["units"].reverse(), "<stem> to <head>"),
        (lambda d: d["units"][1].update(forward_s=None), "field forward_s"),
        (lambda d: d["units"][1].update(mutated_buffers="1.mean"), "field mutated_buffers"),
        (lambda d: d["units"][1].update(mutated_buffers=[1]), "field mutated_buffers"),
        (lambda d: d["fingerprint"].pop("parameters"), "damaged"),
        (lambda d: d["fingerprint"]["buffers"].append([1, [2], "torch.float32"]), "field buffers"),
        (lambda d: d["fingerprint"].update(modules=[4]), "field modules"),
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


def test_permissions_are_those_of_any_new_file_or_of_the_file_replaced(made, tmp_path):
    path, ordinary = tmp_path / "plan.json", tmp_path / "ordinary"
    ordinary.touch()
    made.save(path)
    assert path.stat().st_mode == ordinary.stat().st_mode
    path.chmod(0o640)
    made.save(path)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("field", ["name", "mutated_buffers"])
def test_a_plan_that_does_not_fit_changes_nothing(made, cnn_case, tmp_path, field):
    path = tmp_path / "plan.json"
    made.save(path)
    document = json.loads(path.read_text())
    unit = [unit for unit in document["units"] if unit["option"] == "recompute"][-1]
    unit[field] = "9.9" if field == "name" else ["1.absent"]
    path.write_text(json.dumps(document))
    before = [dict(vars(module)) for module in cnn_case.model.modules()]
    with pytest.raises(ValueError, match="does not fit this model"):
        Plan.load(path).apply(cnn_case.model)
    assert [dict(vars(module)) for module in cnn_case.model.modules()] == before


def test_other_buffers_or_modules_are_another_model(made, cnn_case):
    cnn_case.model[0][1].register_buffer("extra", torch.zeros(2))
    with pytest.raises(ValueError, match=r"a buffer is 0\.1\.extra \(2,\) torch\.float32"):
        made.apply(cnn_case.model)
    del cnn_case.model[0][1].extra
    cnn_case.model[0].append(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"a module is '0\.6'"):
        made.apply(cnn_case.model)
