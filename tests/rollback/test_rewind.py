"""Going back some steps leaves everything as if they had never been made, to the last bit, on disk too."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import threading
import time

import pytest
import torch
from recorded_models import PRELOADED, TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import _store
from gradkern.rollback._segment import Segment, StepRecord
from gradkern.rollback._store import StoreReader, StoreWriter
from gradkern.testing import same_bits

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)

STEPS = 8
IMAGES = ("images", "rare momentum")


class Images(nn.Module):
    """A convolution, a BatchNorm with its buffers, a frozen layer, and a layer that gets a gradient now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.rare = nn.Linear(16, 3)
        self.head = nn.Linear(16, 3)
        self.register_buffer("table", torch.zeros(2))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # As tables of positions do: another tensor, of another shape.
        self.seen += 1
        self.table = torch.full((self.seen % 3 + 1,), float(self.seen))
        hidden = self.frozen(torch.relu(self.bn(self.conv(images))).flatten(1))
        return self.head(hidden) + (self.rare(hidden) if float(images[0, 0, 0, 0]) > 0.5 else 0.0)


def image_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 1, 4, 4, generator=generator)
    images[0, 0, 0, 0] = 1.0 if step % 3 == 2 else 0.0
    return images, torch.randint(0, 3, (6,), generator=generator)


def image_loss(model: nn.Module, step: int) -> torch.Tensor:
    images, labels = image_batch(step)
    return nn.functional.cross_entropy(model(images), labels)


def token_step_loss(model: nn.Module, step: int) -> torch.Tensor:
    # Samples of other lengths and with other tokens from step to step: files are padded to the widest of them.
    rows = (torch.arange(6) + 6 * step) % 24
    data = token_data()[rows][:, : 4 + step % 5]
    return token_loss(model(data), data)


def made(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Images() if kind in IMAGES else TokenModel()
    makers = {
        "images": lambda p: gk.AdamW(p, lr=1e-2, max_norm=1.0),
        "adamw": lambda p: gk.AdamW(p, lr=1e-2, weight_decay=0.1, max_norm=0.5),
        "amsgrad": lambda p: gk.AdamW(p, lr=1e-2, amsgrad=True, state="fp32"),
        "adam": lambda p: gk.Adam(p, lr=1e-2),
        "momentum": lambda p: gk.SGD(p, lr=1e-1, momentum=0.9, dampening=0.5),
        "rare momentum": lambda p: gk.SGD(p, lr=1e-1, momentum=0.9, dampening=0.5, skip_nonfinite=True),
        "sgd": lambda p: gk.SGD(p, lr=1e-1),
        "zclip": lambda p: gk.AdamW(p, lr=1e-2, clip=gk.clip.ZClip(warmup_steps=2, z_threshold=0.1)),
        "autoclip": lambda p: gk.AdamW(p, lr=1e-2, clip=gk.clip.AutoClip(history=4)),
    }
    return model, makers[kind]([p for p in model.parameters() if p.requires_grad])


class Loop:
    """A training that records."""

    def __init__(self, path, kind="adamw", *, rewind=4, **options):
        self.kind, self.path = kind, path
        self.model, self.optimizer = made(kind)
        unowned = ["bn.*"] if kind in IMAGES else []
        self.recorder = gk.rollback.record(
            self.model, self.optimizer, path, steps_per_segment=3, rewind=rewind, unowned=unowned, **options
        )

    def step(self, batch: int, scale: float = 1.0) -> None:
        loss = image_loss if self.kind in IMAGES else token_step_loss
        with self.recorder.batch(torch.arange(6) + 6 * batch):
            (scale * loss(self.model, batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def to(self, end: int, start: int = 0) -> Loop:
        for batch in range(start, end):
            self.step(batch)
        return self


def everything(loop: Loop) -> dict[str, torch.Tensor]:
    """Parameters, buffers, state and the clip policy's memory."""
    names = {parameter: name for name, parameter in loop.model.named_parameters()}
    found = dict(loop.model.state_dict())
    found |= {
        f"{names[parameter]}/{key}": value
        for parameter, state in loop.optimizer.state.items()
        for key, value in state.items()
    }
    if loop.optimizer.clip is not None:
        found |= {f"clip/{key}": value for key, value in loop.optimizer.clip.state_dict().items()}
    return {name: value.clone() for name, value in found.items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not same_bits(value, expected[name])] == []


def contents(path, roles=("initial", "segment", "deltas")):
    store = StoreReader(path)
    files = [entry for entry in store.files if entry.role in roles]
    return {(entry.role, entry.first_step, entry.end_step): (path / entry.name).read_bytes() for entry in files}


def all_files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def unspiked(path, kind: str, at: int, rewind: int = 4) -> Loop:
    """What has to come out: a training that only made a checkpoint where the other went back to."""
    loop = Loop(path, kind, rewind=rewind).to(at)
    loop.recorder.state_dict()
    loop.to(STEPS, at)
    loop.recorder.close()
    return loop


# Of three steps a file: within the file that fills up, to its start, into one that is written, over several.
PLACES = [(5, 1), (6, 0), (6, 2), (8, 4), (4, 4)]


@pytest.mark.parametrize(("spike", "back"), PLACES)
def test_a_spike_leaves_no_trace(tmp_path, spike, back):
    at = spike - back
    expected = unspiked(tmp_path / "expected", "adamw", at)
    loop = Loop(tmp_path / "found").to(at)
    scale = loop.recorder._intake.scale
    for wrong in range(back):
        loop.step(54 + 5 * wrong, scale=100.0)  # the longest samples: what is cut off has to leave no padding
    assert loop.recorder.rewind(steps=back) == at
    assert loop.recorder._intake.scale == scale
    assert gk.rollback.open(loop.path).steps == at
    loop.to(STEPS, at).recorder.close()
    assert_same(everything(loop), everything(expected))
    assert contents(loop.path) == contents(expected.path)
    ledger = gk.rollback.open(loop.path)
    assert ledger.verify(loop.model).passed
    named = {entry.name for entry in StoreReader(loop.path).files}
    files = {file.relative_to(loop.path).as_posix() for file in loop.path.rglob("*.*") if file.is_file()}
    assert files == named | {"catalog.sqlite", "writer.lock"}


@pytest.mark.parametrize("kind", ["images", "amsgrad", "adam", "momentum", "sgd", "zclip", "autoclip"])
@pytest.mark.parametrize("at", [0, 4])
def test_every_optimizer_and_model_goes_back(tmp_path, kind, at):
    expected = unspiked(tmp_path / "expected", kind, at)
    loop = Loop(tmp_path / "found", kind).to(at)
    then = everything(loop)
    for wrong in range(3):
        loop.step(50 + wrong, scale=100.0)
    kept = {name: value.data_ptr() for name, value in state_tensors(loop).items() if at or "/" not in name}
    assert any(not same_bits(value, then[name]) for name, value in everything(loop).items() if name in then)
    loop.recorder.rewind(steps=3)
    assert_same(everything(loop), then)
    now = {name: value.data_ptr() for name, value in state_tensors(loop).items()}
    assert {name: kept[name] for name in now if name in kept} == {name: now[name] for name in now if name in kept}
    if kind == "images":
        loop.model.seen = at
    loop.to(STEPS, at).recorder.close()
    assert_same(everything(loop), everything(expected))
    assert contents(loop.path) == contents(expected.path)
    assert gk.rollback.open(loop.path).verify(loop.model).passed


def state_tensors(loop: Loop) -> dict[str, torch.Tensor]:
    names = {parameter: name for name, parameter in loop.model.named_parameters()}
    found = {name: parameter for parameter, name in names.items()}
    return found | {
        f"{names[p]}/{key}": value for p, state in loop.optimizer.state.items() for key, value in state.items()
    }


def test_going_back_waits_for_the_file_that_is_being_written(tmp_path, monkeypatch):
    expected = unspiked(tmp_path / "expected", "adamw", 2)
    commit, may_go = StoreWriter.commit_segment, threading.Event()

    def slow(self, tensors, steps, visits):
        assert may_go.wait(60)
        commit(self, tensors, steps, visits)

    loop = Loop(tmp_path / "found").to(2)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit_segment", slow)
        loop.step(50)
        loop.step(51)
        threading.Timer(0.2, may_go.set).start()
        loop.recorder.rewind(steps=2)
    loop.to(STEPS, 2).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def test_an_interrupted_commit_afterwards_is_made_once(tmp_path, monkeypatch):
    expected = unspiked(tmp_path / "expected", "adamw", 2)
    loop = Loop(tmp_path / "found").to(5)
    loop.recorder.rewind(steps=3)
    commit = StoreWriter._commit

    def interrupted(self, entry, facts, schema=()):
        commit(self, entry, facts, schema)
        raise sqlite3.OperationalError("disk I/O error")

    loop.to(4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_commit", interrupted)
        loop.step(4)
        with pytest.raises(sqlite3.OperationalError):
            loop.recorder.state_dict()
    loop.to(STEPS, 5).recorder.close()
    ledger = gk.rollback.open(loop.path)
    assert (ledger.steps, ledger.visits) == (STEPS, 6 * STEPS)
    assert ledger.verify(loop.model).passed
    assert_same(everything(loop), everything(expected))


def test_one_can_go_back_again_and_again(tmp_path):
    expected = unspiked(tmp_path / "expected", "adamw", 2)
    loop = Loop(tmp_path / "found").to(4)
    loop.step(50)
    assert loop.recorder.rewind(steps=1) == 4
    loop.step(51)
    assert loop.recorder.rewind(steps=2) == 3
    assert loop.recorder.rewind(steps=1) == 2
    with pytest.raises(LedgerError, match=r"the state 3 steps ago, after step -1, is not kept; steps may be 0, 1\. "):
        loop.recorder.rewind(steps=3)
    loop.to(STEPS, 2).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def test_a_step_that_was_made_but_not_recorded_is_taken_back(tmp_path):
    expected = unspiked(tmp_path / "expected", "adamw", 5)
    loop = Loop(tmp_path / "found").to(5)
    with pytest.raises(LedgerError, match="non-finite"):
        loop.step(5, scale=float("nan"))
    assert not all(parameter.isfinite().all() for parameter in loop.model.parameters())
    with pytest.raises(LedgerError, match="lacks it for good"):
        loop.recorder.state_dict()
    assert loop.recorder.rewind(steps=0) == 5
    loop.to(STEPS, 5).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def test_going_back_past_such_a_step_makes_the_recording_whole_again(tmp_path, monkeypatch):
    expected = unspiked(tmp_path / "expected", "adamw", 2)
    loop = Loop(tmp_path / "found").to(2)
    with monkeypatch.context() as patch:
        patch.setattr(StepRecord, "nbytes", lambda self: interrupt())
        with pytest.raises(KeyboardInterrupt):
            loop.step(2)
    loop.optimizer.zero_grad()
    loop.step(3)
    loop.recorder.rewind(steps=0)
    with pytest.raises(LedgerError, match="lacks it for good"):
        loop.recorder.state_dict()
    assert loop.recorder.rewind(steps=1) == 2
    assert loop.recorder.state_dict()["steps"] == 2
    loop.to(STEPS, 2).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def interrupt():
    raise KeyboardInterrupt


def test_gradients_that_wait_are_dropped(tmp_path):
    expected = unspiked(tmp_path / "expected", "adamw", 4)
    loop = Loop(tmp_path / "found").to(4)
    with loop.recorder.batch(range(6)):
        (100.0 * token_step_loss(loop.model, 50)).backward()
    loop.recorder.rewind(steps=0)
    assert [parameter.grad for parameter in loop.model.parameters()] == [None] * len(list(loop.model.parameters()))
    loop.to(STEPS, 4).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def test_a_momentum_of_skipped_steps_alone_is_none(tmp_path):
    """SGD takes its first gradient whole: dampening begins with the second."""
    expected, loop = Loop(tmp_path / "expected", "rare momentum"), Loop(tmp_path / "found", "rare momentum")
    for each in (expected, loop):
        with each.recorder.batch(range(6)):
            (float("inf") * image_loss(each.model, 2)).backward()
        each.optimizer.step()  # skipped, with gradients of all layers
        each.optimizer.zero_grad()
        each.step(0)  # one layer still waits for its first
    assert "momentum_buffer" in loop.optimizer.state[loop.model.rare.weight]
    assert not loop.optimizer.state[loop.model.rare.weight]["momentum_buffer"].any()
    loop.step(5, scale=100.0)
    loop.recorder.rewind(steps=1)
    loop.model.seen = expected.model.seen
    for each in (expected, loop):
        each.step(2)
        each.step(5)
        each.recorder.close()
    assert_same(everything(loop), everything(expected))


def test_learning_rates_stay_as_they_are(tmp_path):
    loop = Loop(tmp_path / "found").to(3)
    (group,) = loop.optimizer.param_groups
    group["lr"] = 1e-4
    loop.recorder.rewind(steps=2)
    assert loop.optimizer.param_groups == [group]
    assert loop.optimizer.param_groups[0] is group
    assert group["lr"] == 1e-4


def test_what_cannot_be_is_refused_and_nothing_changes(tmp_path):
    loop = Loop(tmp_path / "found", "zclip", rewind=2).to(5)
    loop.recorder.state_dict()  # waits for the thread that writes
    state, files = everything(loop), all_files(loop.path)
    with pytest.raises(LedgerError, match=r"the state 3 steps ago, after step 2, is not kept; steps may be 0, 1, 2\."):
        loop.recorder.rewind(steps=3)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        loop.recorder.rewind(steps=-1)
    with pytest.raises(TypeError):
        loop.recorder.rewind(steps=0.5)
    with loop.recorder.batch(range(6)), pytest.raises(LedgerError, match="a batch is open"):
        loop.recorder.rewind(steps=1)
    policy, loop.optimizer.clip = loop.optimizer.clip, gk.clip.AutoClip()
    with pytest.raises(ValueError, match="the memory of another policy"):
        loop.recorder.rewind(steps=1)
    loop.optimizer.clip = policy
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(LedgerError, match="the optimizer is a AdamW of 8 parameters, expected the AdamW of the 7"):
        loop.recorder.rewind(steps=1)
    del loop.optimizer.param_groups[1]
    assert_same(everything(loop), state)
    assert all_files(loop.path) == files
    loop.recorder.rewind(steps=2)
    loop.recorder.close()
    with pytest.raises(LedgerError, match="the recorder is closed"):
        loop.recorder.rewind(steps=1)


def test_without_states_there_is_no_going_back(tmp_path):
    loop = Loop(tmp_path / "found", rewind=0).to(1)
    with pytest.raises(LedgerError, match=r"no states were kept.*record with rewind="):
        loop.recorder.rewind(steps=1)
    loop.recorder.close()
    with pytest.raises(LedgerError, match="the ledger has no states to go back to"):
        gk.rollback.open(loop.path).rewind(*made("adamw"), steps=0)
    with pytest.raises(ValueError, match="rewind must be at least 0, got -1"):
        gk.rollback.record(*made("adamw"), tmp_path / "other", rewind=-1)


def test_a_damaged_file_is_not_cut(tmp_path):
    loop = Loop(tmp_path / "found").to(4)
    loop.recorder.state_dict()
    file = loop.path / StoreReader(loop.path).segments[0].name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    state, files = everything(loop), all_files(loop.path)
    with pytest.raises(LedgerError, match="is damaged"):
        loop.recorder.rewind(steps=2)
    assert_same(everything(loop), state)
    assert all_files(loop.path) == files
    file.write_bytes(content)
    loop.recorder.state_dict()
    assert loop.recorder.rewind(steps=2) == 2


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt()])
@pytest.mark.parametrize("took_effect", [False, True])
def test_going_back_that_was_interrupted_is_told_and_can_be_repeated(tmp_path, monkeypatch, error, took_effect):
    expected = unspiked(tmp_path / "expected", "adamw", 4)
    loop = Loop(tmp_path / "found").to(4).to(7, 4)
    transact = StoreWriter._transact

    def interrupted(self, statements):
        statements = list(statements)
        if any("DELETE" in statement for statement, _ in statements):
            if took_effect:
                transact(self, statements)
            raise error
        transact(self, statements)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_transact", interrupted)
        with pytest.raises(type(error)):
            loop.recorder.rewind(steps=3)
    with pytest.raises(LedgerError, match="interrupted"):
        loop.recorder.state_dict()
    assert gk.rollback.open(loop.path).steps == (4 if took_effect else 7)
    assert loop.recorder.rewind(steps=3) == 4
    loop.to(STEPS, 4).recorder.close()
    assert contents(loop.path) == contents(expected.path)
    assert_same(everything(loop), everything(expected))


def go_back_forever(path, count) -> None:
    torch.set_num_threads(1)
    loop = Loop(path).to(5)
    while True:
        for batch in (5, 6, 7):
            loop.step(batch)
        loop.recorder.rewind(steps=3)
        count.value += 1


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_while_going_back_leaves_a_ledger_that_is_whole(tmp_path, seed):
    count = PROCESSES.Value("q", 0)
    process = PROCESSES.Process(target=go_back_forever, args=(tmp_path / "ledger", count))
    process.start()
    while count.value < 2 and process.is_alive():
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0.0, 0.1))
    process.kill()
    process.join()
    ledger = gk.rollback.open(tmp_path / "ledger")
    assert 5 <= ledger.steps <= 8
    assert ledger.visits == 6 * ledger.steps
    assert [check.passed for check in ledger.verify(TokenModel()).checks] == [True, True, None]


@pytest.mark.parametrize(("kind", "back"), [("images", 3), ("adamw", 0), ("momentum", 4), ("zclip", 2)])
def test_a_closed_ledger_goes_back_in_a_new_model(tmp_path, kind, back):
    """And what is recorded from there on is what a checkpoint of that step would have given."""
    at = 6 - back
    expected = unspiked(tmp_path / "expected", kind, at, rewind=0)
    loop = Loop(tmp_path / "found", kind).to(6)
    loop.recorder.close()
    files = all_files(loop.path)
    new = Loop.__new__(Loop)
    new.kind, new.path = kind, loop.path
    new.model, new.optimizer = made(kind)
    resume = gk.rollback.open(loop.path).rewind(new.model, new.optimizer, steps=back)
    assert all_files(loop.path) == files
    assert resume["steps"] == at
    new.recorder = gk.rollback.record(
        new.model,
        new.optimizer,
        loop.path,
        steps_per_segment=3,
        resume=resume,
        unowned=["bn.*"] if kind == "images" else [],
    )
    if kind == "images":
        new.model.seen = at
    new.to(STEPS, at).recorder.close()
    assert_same(everything(new), everything(expected))
    assert contents(new.path) == contents(expected.path)
    assert contents(new.path, ["state"]) == {}
    assert gk.rollback.open(new.path).verify(new.model).passed


def test_a_closed_ledger_refuses_what_does_not_fit(tmp_path):
    loop = Loop(tmp_path / "found", rewind=2).to(5)
    loop.recorder.close()
    ledger = gk.rollback.open(loop.path)
    assert ledger.verify(loop.model).passed
    assert sorted(key[2] for key in contents(loop.path, ["state"])) == [3, 4, 5]
    model, optimizer = made("adamw")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LedgerError, match="after step 2, is not kept; steps may be 0, 1, 2"):
        ledger.rewind(model, optimizer, steps=3)
    with pytest.raises(LedgerError, match="the optimizer is a SGD of 7 parameters, expected the AdamW of the 7"):
        ledger.rewind(model, gk.SGD(model.parameters()), steps=1)
    with pytest.raises(LedgerError, match="another model"):
        ledger.rewind(*made("images"), steps=1)
    (loop.path / "state-000004.safetensors").write_bytes(b"")
    with pytest.raises(LedgerError, match="has 0 bytes"):
        ledger.rewind(model, optimizer, steps=1)
    assert_same(model.state_dict(), before)
    assert optimizer.state == {}


def test_what_a_step_left_alone_is_held_once(tmp_path):
    loop = Loop(tmp_path / "found", "images", rewind=4)
    states = {name: value for name, value in everything(loop).items() if name != "table"}
    trained = sum(parameter.nbytes for parameter in loop.model.parameters() if parameter.requires_grad)
    before = loop.recorder.held_bytes()
    loop.to(4)
    held = loop.recorder.held_bytes() - before
    assert "frozen.weight" in states
    # A parameter, two moments and two sums of each of four steps, at most; "rare" stepped once.
    assert 4 * trained < held < 4 * 5 * trained + 40_000
    rare = {
        id(state.tensors[name])
        for state in loop.recorder._states
        for name in state.tensors
        if name.endswith("rare.weight")
    }
    assert len(rare) <= 2 * 5


def test_bits_are_compared_not_numbers(tmp_path):
    loop = Loop(tmp_path / "found", "images", rewind=2)
    for value in (-0.0, 0.0):
        loop.model.bn.running_mean.fill_(value)
        loop.recorder._keep_state(())
    kept = [state.tensors["buffer/bn.running_mean"] for state in loop.recorder._states]
    assert [bool(each.signbit().all()) for each in kept] == [False, True, False]


def test_a_replayable_run_can_go_back(tmp_path):
    loop = Loop(tmp_path / "found", replayable=True).to(5)
    loop.recorder.rewind(steps=3)
    loop.to(5, 2).recorder.close()
    expected = Loop(tmp_path / "expected", replayable=True).to(2)
    expected.recorder.state_dict()
    expected.to(5, 2).recorder.close()
    assert contents(loop.path) == contents(expected.path)


def test_a_ledger_begun_before_there_were_states_takes_them(tmp_path, monkeypatch):
    older = _store._FILES.replace(", 'state'", "")
    monkeypatch.setattr(_store, "_SCHEMA", (_store._SCHEMA[0], older))
    loop = Loop(tmp_path / "found").to(2)
    loop.recorder.close()
    ledger = gk.rollback.open(loop.path)
    assert ledger.verify(loop.model).passed
    resume = ledger.rewind(loop.model, loop.optimizer, steps=1)
    loop.recorder = gk.rollback.record(loop.model, loop.optimizer, loop.path, rewind=1, resume=resume)
    loop.to(3, 1).recorder.close()
    assert gk.rollback.open(loop.path).verify(loop.model).passed


def test_a_file_from_before_comparisons_were_counted_is_not_cut(tmp_path, monkeypatch):
    tensors = Segment.tensors
    with monkeypatch.context() as patch:
        patch.setattr(
            Segment, "tensors", lambda self: {k: v for k, v in tensors(self).items() if k != "step/comparisons"}
        )
        loop = Loop(tmp_path / "found").to(4)
        loop.recorder.state_dict()
    with pytest.raises(LedgerError, match="a segment cannot be cut"):
        loop.recorder.rewind(steps=2)
    assert loop.recorder.rewind(steps=1) == 3
    loop.to(5, 3).recorder.close()
    assert gk.rollback.open(loop.path).verify(loop.model).passed
    assert gk.rollback.compact(loop.path) == 1
