"""Other packages' estimators are asked in processes of their own, and what goes wrong there is told by name."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import nn

from bench import attribution, influence
from bench.attribution import SYSTEMS, System, make_job, run_trials, tune
from bench.attribution_peers import install
from bench.attribution_peers.job import Trial, load, save
from bench.harness import Report
from bench.influence import Setting, record_run

SAMPLES, QUERIES = 40, 6


def small():
    """Points of two classes."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(SAMPLES + QUERIES, 4, generator=generator)
    labels = (points.sum(1) > 0).long()
    return Setting(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        points[:SAMPLES],
        labels[:SAMPLES],
        points[SAMPLES:],
        labels[SAMPLES:],
        epochs=5,
        batch_size=10,
    )


def peer(tmp_path, body: str):
    """A peer's module, run by this interpreter; ``body`` defines its methods, in the dictionary ``METHODS``."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import os, time, torch\nfrom bench.attribution_peers.job import run\n"
        + textwrap.dedent(body)
        + "run(METHODS)\n"
    )
    # Like `-m`, which puts the repository's root on the path.
    root = attribution._ROOT
    return [sys.executable, "-c", f"import sys; sys.path[0] = {str(root)!r}; exec(open({str(script)!r}).read())"]


DOTS = """
def dots(job, *, factor):
    return factor * (job.test_inputs @ job.inputs.t())
METHODS = {"dots": dots}
"""


def test_a_job_is_read_as_it_was_written(tmp_path):
    job = make_job(small(), 3, [Trial("dots", {"factor": 2.0, "among": [1, 2]})])
    save(job, tmp_path / "job.pt")
    found = load(tmp_path / "job.pt")
    assert found.trials == job.trials
    assert [found.lr, found.weight_decay, found.max_norm] == [job.lr, job.weight_decay, job.max_norm]
    for name in ("inputs", "labels", "test_inputs", "test_labels"):
        assert torch.equal(getattr(found, name), getattr(job, name))
    assert all(torch.equal(a, b) for a, b in zip(found.batches, job.batches, strict=True))
    states = zip([*found.checkpoints, *found.ensemble], [*job.checkpoints, *job.ensemble], strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in states for name in b)
    assert torch.equal(found.model(job.inputs), job.model(job.inputs))


def test_the_last_checkpoint_is_the_recorded_run_and_the_first_model_its_start(tmp_path):
    setting = small()
    job = make_job(setting, 3, [])
    model, _ = record_run(setting, 3, tmp_path / "run")
    assert len(job.checkpoints) == 10
    assert len(job.ensemble) == 5
    for name, value in model.state_dict().items():
        torch.testing.assert_close(job.checkpoints[-1][name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(job.ensemble[0][name], job.checkpoints[-1][name])
    for name, value in setting.model(3).state_dict().items():
        assert torch.equal(job.model.state_dict()[name], value)


def test_scores_come_back_trial_by_trial(tmp_path):
    setting = small()
    job = make_job(setting, 0, [Trial("dots", {"factor": 1.0}), Trial("dots", {"factor": -2.0})])
    once, twice = run_trials(peer(tmp_path, DOTS), job)
    expected = (setting.test_inputs @ setting.inputs.t()).double()
    torch.testing.assert_close(once, expected)
    torch.testing.assert_close(twice, -2 * expected)


def test_trials_that_fail_say_why_and_spare_the_others(tmp_path):
    body = """
    def fine(job):
        return torch.ones(len(job.test_inputs), len(job.inputs))
    def raises(job):
        raise ValueError("too few samples\\nand more")
    def turned(job):
        return fine(job).t()
    def undefined(job):
        scores = fine(job)
        scores[0, 0] = float("nan")
        return scores
    METHODS = {"fine": fine, "raises": raises, "turned": turned, "undefined": undefined}
    """
    job = make_job(small(), 0, [Trial(name, {}) for name in ("raises", "turned", "undefined", "fine")])
    *reasons, scores = run_trials(peer(tmp_path, body), job)
    assert reasons == [
        "ValueError: too few samples",
        f"scores have shape ({SAMPLES}, {QUERIES}), expected ({QUERIES}, {SAMPLES})",
        f"1 of {SAMPLES * QUERIES} scores are not finite",
    ]
    assert torch.equal(scores, torch.ones(QUERIES, SAMPLES, dtype=torch.float64))


def test_a_process_that_dies_keeps_what_it_had_scored(tmp_path):
    body = """
    def fine(job):
        return torch.ones(len(job.test_inputs), len(job.inputs))
    def dies(job):
        os.write(2, b"out of memory\\n")
        os._exit(9)
    METHODS = {"fine": fine, "dies": dies}
    """
    job = make_job(small(), 0, [Trial(name, {}) for name in ("fine", "dies", "fine")])
    scores, *reasons = run_trials(peer(tmp_path, body), job)
    assert torch.equal(scores, torch.ones(QUERIES, SAMPLES, dtype=torch.float64))
    assert reasons == ["exit status 9: out of memory"] * 2


def test_a_process_that_hangs_is_ended(tmp_path):
    body = """
    def hangs(job):
        time.sleep(600)
    METHODS = {"hangs": hangs}
    """
    job = make_job(small(), 0, [Trial("hangs", {})] * 2)
    assert run_trials(peer(tmp_path, body), job, timeout_s=2) == ["not done after 2 s"] * 2


def test_a_peer_that_cannot_be_imported_is_named():
    found = run_trials([sys.executable, "-c", "import no_such_package"], make_job(small(), 0, [Trial("any", {})]))
    assert found == ["exit status 1: ModuleNotFoundError: No module named 'no_such_package'"]


@pytest.fixture
def fake_peers(monkeypatch, tmp_path):
    """Two systems of a peer that is there, one of a peer that is not."""
    trials = tuple({"factor": factor} for factor in (-1.0, 1.0))
    systems = {
        "fake dots": System("fake", "dots", trials),
        "fake missing": System("fake", "no such method", trials),
        "absent dots": System("absent", "dots", trials),
    }
    monkeypatch.setattr(influence, "SUBSETS", 20)
    monkeypatch.setattr(attribution, "SYSTEMS", systems)
    monkeypatch.setattr(attribution, "_absent", {"fake": None, "absent": "not installed"}.__getitem__)
    monkeypatch.setattr(attribution, "_command", lambda name: peer(tmp_path, DOTS))


def test_tuning_takes_the_best_trial_and_names_what_has_none(fake_peers, capsys):
    setting = small()
    report = Report("rollback", torch.device("cpu"))
    chosen = tune(report, "small", setting)
    assert set(chosen) == {"fake dots"}
    values = {(each["system"], each["metric"]): each["value"] for each in report.records}
    # Of a score and its negative, one agrees with the losses.
    assert values["fake dots", "tuned_lds_drop10"] >= 0
    assert chosen["fake dots"] == attribution.SYSTEMS["fake dots"].trials[values["fake dots", "tuned_trial"]]
    failed = {system: value for (system, metric), value in values.items() if metric == "trials_failed"}
    assert failed == {"fake dots": 0, "fake missing": 2, "absent dots": 2}
    said = capsys.readouterr().err
    assert "without absent dots: not installed (2 of 2 trials)" in said
    assert "without fake missing: KeyError: 'no such method' (2 of 2 trials)" in said

    found = attribution.scores(setting, 0, {**chosen, "absent dots": {"factor": 1.0}})
    torch.testing.assert_close(
        found["fake dots"], chosen["fake dots"]["factor"] * (setting.test_inputs @ setting.inputs.t()).double()
    )
    assert set(found) == {"fake dots"}
    assert "without absent dots: not installed" in capsys.readouterr().err


def test_every_system_has_six_trials_and_a_pinned_peer_with_a_module():
    for system in SYSTEMS.values():
        assert len(system.trials) == 6
        assert len({str(trial) for trial in system.trials}) == 6
        pins = [
            line
            for line in (install.REQUIREMENTS / f"{system.peer}.txt").read_text().splitlines()
            if not line.startswith("#")
        ]
        assert pins
        assert all("==" in pin for pin in pins)
        assert not any(pin.startswith("torch==") for pin in pins)
        assert (install.REQUIREMENTS.parent / f"{system.peer}.py").exists()


def test_a_peer_that_is_not_installed_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "VENVS", tmp_path)
    reasons = attribution.available()
    assert set(reasons) == {system.peer for system in SYSTEMS.values()}
    assert set(reasons.values()) == {"not installed; try `make bench-attribution`"}
