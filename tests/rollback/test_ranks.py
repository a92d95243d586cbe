"""Recording under DistributedDataParallel, in real processes: the shards of all ranks are the ledger of one run."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sqlite3
from contextlib import closing

import pytest
import torch
from recorded_models import TokenModel, token_loss
from recording_ranks import (
    DATA,
    STEPS,
    backward,
    even_rows,
    in_one_process,
    in_ranks,
    made,
    make_steps,
    uneven_rows,
    wrapped,
)
from torch import nn
from typer.testing import CliRunner

import gradkern as gk
from gradkern.command_line import app
from gradkern.errors import LedgerError
from gradkern.rollback._reading import read_segments
from gradkern.rollback._shards import open_store
from gradkern.rollback._store import StoreReader, StoreWriter
from gradkern.testing import same_bits

QUERY = DATA[:2]


def told(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def segment_files(path, rank):
    return [(entry.name, entry.sha256) for entry in StoreReader(path / f"rank-{rank:05d}").segments]


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def plain_runs(rank, folder):
    """Recorded through the wrapper, through what it wraps, and not at all; in three ways of DDP."""
    results = {}
    for name, options, once, kinds in (
        ("once", {}, True, ("none", "wrapper", "module")),
        ("always", {"gradient_as_bucket_view": True}, False, ("none", "module")),
        ("unused", {"find_unused_parameters": True}, True, ("none", "wrapper")),
    ):
        for kind in kinds:
            model, optimizer = made()
            ddp = wrapped(model, **options)
            recorder = None
            if kind != "none":
                given = ddp if kind == "wrapper" else model
                recorder = gk.rollback.record(given, optimizer, folder / f"{name} {kind}", steps_per_segment=4)
            gradients = make_steps(ddp, optimizer, recorder, rank, range(STEPS), syncs_once=once)
            if recorder is not None:
                recorder.close()
            results[name, kind] = gradients, parameters_of(model)
    return results


def run(rank, path, *, rows=even_rows, **options):
    model, optimizer = made()
    ddp = wrapped(model)
    with gk.rollback.record(ddp, optimizer, path, **options) as recorder:
        make_steps(ddp, optimizer, recorder, rank, range(STEPS), rows=rows)
    return model


def resumed(rank, folder):
    """Unbroken to the end with a checkpoint on the way, then once more from there; by states kept in memory, too."""
    path, half = folder / "resumed", STEPS // 2
    model, optimizer = made()
    ddp = wrapped(model)
    with gk.rollback.record(ddp, optimizer, path) as recorder:
        make_steps(ddp, optimizer, recorder, rank, range(half))
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), recorder.state_dict()))
        make_steps(ddp, optimizer, recorder, rank, range(half, STEPS))
    files, parameters = segment_files(path, rank), parameters_of(model)
    model, optimizer = made(seed=1)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    ddp = wrapped(model)
    torch.distributed.barrier()  # or one rank would change its shard while another still reads it
    with gk.rollback.record(ddp, optimizer, path, resume=state[2]) as recorder:
        make_steps(ddp, optimizer, recorder, rank, range(half, STEPS))
    from_checkpoint = segment_files(path, rank), parameters_of(model)

    model, optimizer = made()
    ddp = wrapped(model)
    with gk.rollback.record(ddp, optimizer, folder / "rewound", rewind=2) as recorder:
        make_steps(ddp, optimizer, recorder, rank, range(half + 2))
        went_back_to = recorder.rewind(steps=2)
        make_steps(ddp, optimizer, recorder, rank, range(half, STEPS))
    return {
        "unbroken": (files, parameters),
        "from checkpoint": from_checkpoint,
        "went back to": went_back_to,
        "rewound": parameters_of(model),
        "state": state,
    }


class Half(nn.Module):
    """Of which DDP wraps one layer only."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = TokenModel(), nn.Linear(11, 11)


def refused(rank, folder):
    """What each rank is told of what cannot be."""
    messages = {}
    model, optimizer = made()
    ddp = wrapped(model)

    def record(name, **options):
        return gk.rollback.record(ddp, optimizer, folder / name, **options)

    messages["replayable"] = told(lambda: record("refused", replayable=True))
    messages["stop"] = told(lambda: record("refused", on_write_error="stop"))
    if rank == 1:
        (folder / "in the way").mkdir()
    torch.distributed.barrier()
    messages["exists"] = told(lambda: record("in the way"))
    messages["differ"] = told(lambda: record("refused", rank=1 + rank))
    messages["layouts"] = told(lambda: record("refused", unowned=["norm.*"] if rank else []))
    create = StoreWriter.create
    if rank == 1:

        def full(*_):
            raise OSError("no space left")

        StoreWriter.create = full
    messages["one cannot"] = told(lambda: record("refused"))

    def also_full(path, *_):
        path.parent.mkdir(exist_ok=True)
        raise OSError("no space left")

    StoreWriter.create = also_full
    messages["none can"] = told(lambda: record("refused"))
    StoreWriter.create = create
    half = Half()
    keeps = wrapped(half.inner)
    both = gk.AdamW(half.parameters())
    messages["half"] = told(lambda: gk.rollback.record(half, both, folder / "refused"))
    del keeps
    with record("joined") as recorder, ddp.join():
        messages["join"] = told(lambda: backward(ddp, recorder, DATA[:2, 0]))
    torch.distributed.barrier()
    messages["left"] = sorted(each.name for each in folder.iterdir() if each.name == "refused")
    return messages


def sabotaged(rank, folder):
    """What each rank is told at the first step of a recording that does not get what the optimizer gets."""

    def clip(model):
        gk.clip_grad_norm_(model.parameters(), 1e-3)

    def miss(model):
        del model.hidden.forward

    def nothing(model):
        pass

    messages = {}
    for name, before, after, averages in (
        ("clipped by hand", nothing, clip, True),
        ("missed in one rank", miss if rank else nothing, nothing, True),
        ("never averaged", nothing, nothing, False),
    ):
        model, optimizer = made()
        ddp = wrapped(model)
        with gk.rollback.record(ddp, optimizer, folder / name) as recorder:
            before(model)
            if not averages:
                with ddp.no_sync():
                    backward(ddp, recorder, even_rows(rank, 2, 0, 0))
            else:
                backward(ddp, recorder, even_rows(rank, 2, 0, 0))
            after(model)
            messages[name] = told(optimizer.step)
    # A loss of rank 0 that is not finite: each step of the other rank is made, too.
    model, optimizer = made()
    ddp = wrapped(model)
    steps = []
    with gk.rollback.record(ddp, optimizer, folder / "not finite") as recorder:
        for step in range(5):
            rows = even_rows(rank, 2, step, 0)
            with recorder.batch(rows + 100):
                (token_loss(ddp(DATA[rows]), DATA[rows]) * (float("nan") if (step, rank) == (2, 0) else 1.0)).backward()
            steps.append(told(optimizer.step))
            optimizer.zero_grad()
    return {**messages, "not finite": steps}


def asked(rank, folder):
    """A ledger is not asked through the wrapper."""
    model, _ = made()
    ledger = gk.rollback.open(folder / "once wrapper")
    return told(lambda: ledger.scores(wrapped(model), QUERY, loss_fn=token_loss))


def everything(rank, folder):
    results = {"plain": plain_runs(rank, folder)}
    results["uneven"] = parameters_of(run(rank, folder / "uneven", rows=uneven_rows, output="head"))
    results["files"] = parameters_of(run(rank, folder / "files", steps_per_segment=2 + rank))
    torch.distributed.barrier()
    results["asked"] = asked(rank, folder)
    results["resumed"] = resumed(rank, folder)
    results["refused"] = refused(rank, folder)
    results["sabotaged"] = sabotaged(rank, folder)
    return results


def three(rank, folder):
    return parameters_of(run(rank, folder / "run"))


def killed(rank, folder):
    """Rank 1 dies without a word, and rank 0 notices at the next backward pass."""
    model, optimizer = made()
    ddp = wrapped(model)
    with gk.rollback.record(ddp, optimizer, folder / "run", steps_per_segment=2) as recorder:
        make_steps(ddp, optimizer, recorder, rank, range(5))
        recorder.state_dict()  # so many are durable
        make_steps(ddp, optimizer, recorder, rank, range(5, 8))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        make_steps(ddp, optimizer, recorder, rank, range(8, STEPS))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two ranks returned, and the folder with what they recorded; tests change copies of it."""
    folder = tmp_path_factory.mktemp("ranks")
    return in_ranks(2, folder, everything), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training by one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    return in_one_process(path, 2), gk.rollback.open(path)


def with_parameters(parameters) -> nn.Module:
    model, _ = made()
    for parameter, value in zip(model.parameters(), parameters, strict=True):
        parameter.data.copy_(value)
    return model


@pytest.fixture
def recorded(shared, tmp_path):
    """A copy of the ledger of two ranks, and its model."""
    results, folder = shared
    shutil.copytree(folder / "once wrapper", tmp_path / "run")
    return tmp_path / "run", with_parameters(results[0]["plain"]["once", "wrapper"][1])


def assert_agree(found, truth):
    assert found.ids.tolist() == truth.ids.tolist()
    assert torch.allclose(found.scores, truth.scores, rtol=0, atol=1e-3 * float(truth.scores.abs().max()))


def test_training_is_the_same_to_the_bit(shared):
    results, _ = shared
    for result in results:
        for (name, kind), (gradients, parameters) in result["plain"].items():
            expected_gradients, expected = result["plain"][name, "none"]
            assert len(gradients) == STEPS
            for mine, theirs in zip(gradients, expected_gradients, strict=True):
                assert all(map(same_bits, mine, theirs))
            assert all(map(same_bits, parameters, expected))
            assert all(map(same_bits, parameters, results[0]["plain"][name, kind][1]))


@pytest.mark.parametrize(
    ("name", "kind"), [("once", "wrapper"), ("once", "module"), ("always", "module"), ("unused", "wrapper")]
)
def test_the_law_holds_for_all_ranks_together(shared, name, kind):
    results, folder = shared
    model = with_parameters(results[0]["plain"][name, kind][1])
    ledger = gk.rollback.open(folder / f"{name} {kind}")
    assert (ledger.steps, ledger.visits, ledger.shards, ledger.complete) == (STEPS, 2 * 2 * 3 * STEPS, 2, True)
    assert 0 < ledger.conservation(model).error <= 1e-5
    report = ledger.verify(model)
    assert report.passed, str(report)
    assert [check.name for check in report.checks][:3] == ["damaged files", "records", "ranks"]
    assert report.compression


@pytest.mark.parametrize("estimator", ["direct", "ref", "paper"])
def test_scores_are_those_of_one_process_with_all_samples_in_a_batch(shared, alone, recorded, estimator):
    model, truth = alone
    path, trained = recorded
    found = gk.rollback.open(path).scores(trained, QUERY, loss_fn=token_loss, estimator=estimator)
    assert_agree(found, truth.scores(model, QUERY, loss_fn=token_loss, estimator=estimator))
    again = gk.rollback.open(path).scores(trained, QUERY, loss_fn=token_loss, estimator=estimator)
    assert same_bits(found.scores, again.scores)


def test_whatever_else_reads_a_ledger_reads_all_ranks(alone, recorded, tmp_path):
    model, truth = alone
    path, trained = recorded
    ledger = gk.rollback.open(path)
    best = ledger.explain(trained, QUERY, k=3, loss_fn=token_loss)
    assert [each.id for each in best] == [each.id for each in truth.explain(model, QUERY, k=3, loss_fn=token_loss)]
    expected = {"loss_fn": token_loss, "mode": "expected", "estimator": "ref"}
    assert_agree(ledger.scores(trained, QUERY, **expected), truth.scores(model, QUERY, **expected))
    direct = truth.scores(model, QUERY, loss_fn=token_loss, estimator="direct")
    finished = gk.rollback.finish(path, tmp_path / "run.safetensors", rank=6)
    found = finished.scores(trained, QUERY, loss_fn=token_loss)
    assert torch.allclose(found.scores.double(), direct.scores, atol=0.05 * float(direct.scores.abs().max()))
    ledger.sketch(tmp_path / "sketches")
    assert ledger.open_sketches(tmp_path / "sketches").ids.tolist() == direct.ids.tolist()
    mine = ledger.undo(trained, [101], method="fast", probe=DATA).model
    theirs = truth.undo(model, [101], method="fast", probe=DATA).model
    moved = 0.0
    every = (parameters_of(each) for each in (mine, theirs, trained))
    for one, other, start in zip(*every, strict=True):
        moved = max(moved, float((one - start).abs().max()))
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert moved > 1e-4
    assert sum(ledger.layer_bytes().values()) < ledger.nbytes


def test_three_ranks(tmp_path):
    results = in_ranks(3, tmp_path, three)
    model = with_parameters(results[2])
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.shards, ledger.visits) == (3, 3 * 2 * 3 * STEPS)
    assert ledger.verify(model).passed, str(ledger.verify(model))
    other = in_one_process(tmp_path / "alone", 3)
    truth = gk.rollback.open(tmp_path / "alone")
    for estimator in ("direct", "ref"):
        options = {"loss_fn": token_loss, "estimator": estimator}
        assert_agree(ledger.scores(model, QUERY, **options), truth.scores(other, QUERY, **options))


def test_ranks_may_have_the_same_samples_and_fewer_of_them(shared, tmp_path):
    results, folder = shared
    model, ledger = with_parameters(results[0]["uneven"]), gk.rollback.open(folder / "uneven")
    assert ledger.visits == 2 * (3 + 2) * STEPS
    assert ledger.verify(model).passed, str(ledger.verify(model))
    other = in_one_process(tmp_path / "alone", 2, rows=uneven_rows, output="head")
    truth = gk.rollback.open(tmp_path / "alone")
    for estimator in ("direct", "ref"):
        options = {"loss_fn": token_loss, "estimator": estimator}
        assert_agree(ledger.scores(model, QUERY, **options), truth.scores(other, QUERY, **options))


def test_visits_of_a_step_come_rank_by_rank_wherever_files_end(shared):
    results, folder = shared
    store = open_store(folder / "files")
    assert [[entry.end_step for entry in part.segments] for part in store.parts] == [[2, 4, 6, 8, 10], [3, 6, 9, 10]]
    expected = [
        torch.cat([even_rows(rank, 2, step, half) + 100 for rank in range(2) for half in range(2)])
        for step in range(STEPS)
    ]
    forwards = list(read_segments(store))
    assert [segment.steps for segment in forwards] == [2, 1, 1, 2, 2, 1, 1]
    assert torch.cat([segment.visit_ids for segment in forwards]).tolist() == torch.cat(expected).tolist()
    backwards = list(read_segments(store, backwards=True))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one.visit_ids, other.visit_ids)
        for stream, record in one.records.items():
            assert bool((torch.bucketize(record.visit, one.visit_bounds[1:], right=True).diff() >= 0).all())
            assert torch.equal(record.visit, other.records[stream].visit)
    model = with_parameters(results[0]["files"])
    assert gk.rollback.open(folder / "files").verify(model).passed
    options = {"loss_fn": token_loss, "estimator": "direct"}
    found = gk.rollback.open(folder / "files").scores(model, QUERY, **options)
    truth = gk.rollback.open(folder / "once wrapper").scores(model, QUERY, **options)
    assert torch.allclose(found.scores, truth.scores, rtol=0, atol=1e-6 * float(truth.scores.abs().max()))


def test_resumed_and_rewound_runs_record_what_unbroken_ones_do(shared):
    results, folder = shared
    for result in (each["resumed"] for each in results):
        files, parameters = result["unbroken"]
        again_files, again = result["from checkpoint"]
        assert len(files) == 2
        assert [checksum for _, checksum in files] == [checksum for _, checksum in again_files]
        assert all(map(same_bits, parameters, again))
        assert result["went back to"] == STEPS // 2
        assert all(map(same_bits, parameters, result["rewound"]))
    model = with_parameters(results[0]["resumed"]["rewound"])
    scores = []
    for name in ("resumed", "rewound"):
        ledger = gk.rollback.open(folder / name)
        assert ledger.verify(model).passed
        scores.append(ledger.scores(model, QUERY, loss_fn=token_loss).scores)
    assert torch.equal(*scores)


def test_a_shard_is_not_gone_on_with_alone(shared, tmp_path):
    results, folder = shared
    weights, optimizer_state, state = results[0]["resumed"]["state"]
    shutil.copytree(folder / "resumed", tmp_path / "run")
    model, optimizer = made()
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    with pytest.raises(LedgerError, match="by another rank or other ranks"):
        gk.rollback.record(model, optimizer, tmp_path / "run" / "rank-00000", resume=state)
    with pytest.raises(LedgerError, match="was recorded by 2 processes, and 1 would go on with it"):
        gk.rollback.record(model, optimizer, tmp_path / "run", resume=state)
    assert gk.rollback.open(tmp_path / "run").steps == STEPS


def test_what_several_ranks_cannot_do_is_refused_in_all_of_them(shared):
    results, _ = shared
    for rank, messages in enumerate(each["refused"] for each in results):
        assert messages["replayable"].startswith("ValueError: record: replayable=True is for one process")
        assert "undo(method='fast') do without" in messages["replayable"]
        assert messages["stop"].startswith("ValueError: record: on_write_error='stop' is for one process")
        assert messages["exists"].startswith("LedgerError: record: ")
        assert "exists for rank " in messages["exists"]
        assert "rank 1 begins with {'rank': '2', 'steps': 0, 'ledger_id': None}, rank 0 with" in messages["differ"]
        assert "rank 1 trains or records other parameters than rank 0" in messages["layouts"]
        expected = "OSError: no space left" if rank else "LedgerError: record: rank 1 could not open its shard"
        assert messages["one cannot"].startswith(expected)
        assert messages["none can"] == "OSError: no space left"
        assert "averages the gradients of some trained parameters and not of ['outer.weight'" in messages["half"]
        assert messages["join"].startswith("LedgerError: recorder.batch: training runs in DistributedDataParallel.join")
        assert messages["left"] == []
        assert "pass model.module" in results[rank]["asked"]


def test_gradients_that_the_ranks_did_not_record_are_refused_in_all_of_them(shared):
    results, _ = shared
    for messages in (each["sabotaged"] for each in results):
        for name in ("clipped by hand", "missed in one rank", "never averaged"):
            assert "is not what the recorded batches gave it" in messages[name], name


def test_a_loss_that_is_not_finite_ends_the_ledger_before_its_step(shared, tmp_path):
    results, folder = shared
    first, second = (each["sabotaged"]["not finite"] for each in results)
    assert [bool(each) for each in first] == [False, False, True, True, True]
    assert "sample 100 left a non-finite gradient" in first[2]
    assert "its shard of the ledger ends before that" in first[3]
    assert not any(second[:3])
    with pytest.warns(
        UserWarning, match=r"the ranks recorded \[2, \d\] steps, in their order; the ledger ends with st"
    ):
        ledger = gk.rollback.open(folder / "not finite")
    assert (ledger.steps, ledger.visits, ledger.complete) == (2, 2 * 2 * 3, False)


def test_a_killed_rank_ends_the_ledger_with_what_it_committed(tmp_path):
    in_ranks(2, tmp_path, killed)
    with pytest.warns(UserWarning, match="one was killed, or they are still recording"):
        ledger = gk.rollback.open(tmp_path / "run")
    assert 5 <= ledger.steps <= 7
    assert ledger.visits == 2 * 2 * 3 * ledger.steps
    assert not ledger.complete
    model = in_one_process(tmp_path / "alone", 2, ledger.steps)
    truth = gk.rollback.open(tmp_path / "alone")
    for estimator in ("direct", "ref"):
        options = {"loss_fn": token_loss, "estimator": estimator}
        with pytest.warns(UserWarning, match="recording ended without close"):
            found = ledger.scores(model, QUERY, **options)
        assert_agree(found, truth.scores(model, QUERY, **options))
    report = ledger.verify(model)
    assert [check.passed for check in report.checks] == [True, True, True, None]
    assert "without close() in all ranks after the same step" in str(report)
    with pytest.raises(LedgerError, match="conservation cannot be checked"):
        ledger.conservation(model)


def test_what_needs_a_replay_or_states_is_refused(recorded):
    path, model = recorded
    ledger = gk.rollback.open(path)
    replay = gk.rollback.Replay(fetch=lambda ids: DATA[ids - 100], make_optimizer=lambda m: None, loss_fn=token_loss)
    for call in (
        lambda: ledger.undo(model, [101], replay=replay),
        lambda: ledger.scores(model, QUERY, loss_fn=token_loss, estimator="gauss_newton", replay=replay),
        lambda: ledger.scores(model, QUERY, loss_fn=token_loss, estimator="metagradient", replay=replay),
    ):
        with pytest.raises(LedgerError, match=r"2 ranks recorded it together.*use what needs no replay"):
            call()
    with pytest.raises(LedgerError, match=r"call recorder\.rewind\(\) in every rank"):
        ledger.rewind(model, made()[1], steps=1)


def test_shards_are_read_together_or_not_at_all(shared, recorded):
    _, folder = shared
    path, _ = recorded
    with pytest.raises(LedgerError, match=r"holds what rank 1 of 2 recorded.*open the folder that was given to record"):
        gk.rollback.open(path / "rank-00001")
    (path / "rank-00001").rename(path / "elsewhere")
    with pytest.raises(LedgerError, match="lacks rank-00001, the shard of rank 1 of 2"):
        gk.rollback.open(path)
    shutil.copytree(folder / "once module" / "rank-00001", path / "rank-00001")
    with pytest.raises(LedgerError, match="is not the shard of rank 1 that belongs to the others"):
        gk.rollback.open(path)


def change_catalog(path, rank, statement, *values):
    with closing(sqlite3.connect(path / f"rank-{rank:05d}" / "catalog.sqlite")) as catalog, catalog:
        catalog.execute(statement, values)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE meta SET value = 'x' WHERE key = 'parameter_digest'", "ended with different parameters"),
        ("UPDATE files SET sha256 = 'x' WHERE role = 'initial'", "rank 1 recorded from another start than rank 0"),
        ("UPDATE meta SET value = '1' WHERE key = 'format_version'", "format version 1, this gradkern reads version 2"),
    ],
)
def test_shards_of_ranks_that_went_apart_are_refused(recorded, statement, message):
    path, _ = recorded
    change_catalog(path, 1, statement)
    with pytest.raises(LedgerError, match=message):
        gk.rollback.open(path)


def test_a_rank_that_made_other_steps_is_noticed(recorded):
    path, model = recorded
    store, found = StoreWriter.open(path / "rank-00001")
    tensors = {name: tensor.clone() for name, tensor in found.load(found.segments[1]).items()}
    tensors["step/scalars"][0, 0, 0] *= 2
    store.replace([found.segments[1]], tensors)
    store.close()
    ledger = gk.rollback.open(path)
    report = ledger.verify(model)
    assert [check.name for check in report.checks if not check.passed] == ["ranks"]
    with pytest.raises(LedgerError, match="rank 1 recorded other learning rates, decays or clip coefficients"):
        ledger.scores(model, QUERY, loss_fn=token_loss)


def test_a_damaged_shard_fails_the_report(recorded):
    path, model = recorded
    file = path / "rank-00001" / "segments" / "000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    report = gk.rollback.open(path).verify(model)
    assert [check.passed for check in report.checks] == [False, None, None]
    assert str(file) in str(report)


def test_a_shard_without_some_records_fails_the_report(recorded):
    path, model = recorded
    change_catalog(path, 0, "UPDATE files SET visits = visits + 1 WHERE role = 'segment'")
    report = gk.rollback.open(path).verify(model)
    assert "in rank-00000: segments/000000.safetensors bounds" in str(report)
    assert not report.passed


def test_a_report_says_how_many_ranks_there_were(recorded, tmp_path):
    path, _ = recorded
    gk.rollback.open(path).report(tmp_path / "report.html")
    assert "2 processes together" in (tmp_path / "report.html").read_text()


def test_the_commands_take_the_folder_of_all_shards(recorded):
    path, model = recorded
    before = gk.rollback.open(path).scores(model, QUERY, loss_fn=token_loss)
    info = CliRunner().invoke(app, ["ledger", "info", str(path)])
    assert info.exit_code == 0, info.output
    assert f"{STEPS} steps, {12 * STEPS} visits, complete" in info.output
    assert "in shards of 2 processes" in info.output
    verify = CliRunner().invoke(app, ["ledger", "verify", str(path)])
    assert verify.exit_code == 0, verify.output
    assert "[pass] ranks" in verify.output
    compact = CliRunner().invoke(app, ["ledger", "compact", str(path)])
    assert compact.exit_code == 0, compact.output
    assert "2 files of records" in compact.output
    assert [len(part.segments) for part in open_store(path).parts] == [1, 1]
    ledger = gk.rollback.open(path)
    assert ledger.verify(model).passed
    after = ledger.scores(model, QUERY, loss_fn=token_loss)
    assert torch.allclose(after.scores, before.scores, rtol=0, atol=1e-6 * float(before.scores.abs().max()))
