"""What the recorder accepts, what it refuses before touching anything, and how it shuts down."""

from __future__ import annotations

import pytest
import torch
from recorded_models import TokenModel, gpt2, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._reading import read_segments


def start(model, path, **options):
    return gk.rollback.record(model, gk.AdamW(model.parameters()), path, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"steps_per_segment": 0}, ValueError, "steps_per_segment must be at least 1, got 0"),
        ({"unowned": ["no.such*"]}, ValueError, r"unowned pattern 'no\.such\*' matches no parameter"),
        ({"unowned": "embed.weight"}, TypeError, "unowned must be a list of patterns"),
        ({"shared_inputs": ["hidden"]}, ValueError, "'hidden' matches no embedding"),
    ],
)
def test_bad_options_leave_model_and_disk_alone(token_model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        start(token_model, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert all("forward" not in vars(module) for module in token_model.modules())


def test_parameters_that_cannot_be_recorded_are_listed(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"captured for '0\.weight', '0\.bias'.*unowned="):
        start(model, tmp_path / "run")
    start(model, tmp_path / "run", unowned=["0.*"]).close()


def test_layers_whose_weights_others_read_are_not_taken_for_their_base_class(tmp_path):
    class Other(nn.MultiheadAttention):
        pass

    for model, name in ((nn.MultiheadAttention(4, 2).out_proj, "weight"), (Other(4, 2), "in_proj_weight")):
        with pytest.raises(ValueError, match=rf"captured for '{name}'"):
            start(model, tmp_path / "run")


def test_frozen_parameters_and_other_optimizers_parameters_are_left_alone(token_model, tmp_path):
    token_model.hidden.requires_grad_(False)
    data = token_data()
    optimizer = gk.AdamW(
        [p for name, p in token_model.named_parameters() if p.requires_grad and not name.startswith("back")],
        lr=1e-2,
    )
    with gk.rollback.record(token_model, optimizer, tmp_path / "run") as recorder:
        for _ in range(3):
            with recorder.batch(range(24)):
                token_loss(token_model(data), data).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gk.rollback.open(tmp_path / "run").verify(token_model).passed


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_an_embedding_may_be_overwritten_after_backward(dtype, tmp_path):
    """Ascending ones, which need no merging: what is kept must not be the caller's tensor."""
    batches = [torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor([[3, 4, 5], [0, 1, 2]])]
    found = []
    for is_reused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3))
        optimizer = gk.AdamW(model.parameters(), lr=1e-2)
        path, ids = tmp_path / f"{is_reused}", torch.empty(2, 3, dtype=dtype)
        with gk.rollback.record(model, optimizer, path) as recorder:
            for step in range(4):
                ids = ids if is_reused else torch.empty(2, 3, dtype=dtype)
                ids.copy_(batches[step % 2])
                with recorder.batch([2 * (step % 2), 2 * (step % 2) + 1]):
                    nn.functional.cross_entropy(model(ids), torch.tensor([0, 1])).backward()
                optimizer.step()
                optimizer.zero_grad()
        query = batches[0][:1], torch.tensor([0])
        found.append(gk.rollback.open(path).scores(model, query, loss_fn=nn.functional.cross_entropy).scores)
    assert torch.equal(*found)


class PairsBehind(nn.Module):
    """A frozen layer comes last, and sees the pairs of neighbouring samples."""

    def __init__(self):
        super().__init__()
        self.body, self.judge = nn.Linear(4, 3), nn.Linear(6, 5).requires_grad_(requires_grad=False)

    def forward(self, x):
        found = self.body(x)
        return self.judge(torch.cat([found[:-1], found[1:]], dim=1))


def test_a_frozen_last_layer_whose_rows_are_no_samples_is_not_taken_for_the_output(tmp_path):
    torch.manual_seed(0)
    model, inputs = PairsBehind(), torch.randn(6, 4)
    optimizer = gk.AdamW([*model.body.parameters()], lr=1e-2)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(range(6)):
            model(inputs).square().mean().backward()
        optimizer.step()
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.verify(model).passed
    with pytest.raises(LedgerError, match="does not hold the curvature"):
        ledger.scores(model, inputs, loss_fn=lambda output, _: output.square().mean(), estimator="ref")
    optimizer = gk.AdamW([*model.body.parameters()], lr=1e-2)
    model.zero_grad()
    with (
        gk.rollback.record(model, optimizer, tmp_path / "named", output="judge") as recorder,
        pytest.raises(LedgerError, match="'judge' saw rows of shape"),
        recorder.batch(range(6)),
    ):
        model(inputs).square().mean().backward()


def test_a_stock_optimizer_is_refused_with_the_way_out(token_model, tmp_path):
    optimizer = torch.optim.AdamW(token_model.parameters())
    with pytest.raises(TypeError, match=r"AdamW does not report its steps.*gradkern\.AdamW"):
        gk.rollback.record(token_model, optimizer, tmp_path / "run")


def test_an_optimizer_of_another_model_is_refused(token_model, tmp_path):
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        gk.rollback.record(token_model, gk.AdamW(TokenModel().parameters()), tmp_path / "run")


def test_an_optimizer_with_momentum_is_refused(token_model, tmp_path):
    optimizer = gk.AdamW(token_model.parameters())
    token_loss(token_model(token_data()), token_data()).backward()
    optimizer.step()
    with pytest.raises(LedgerError, match="already made 1 steps"):
        gk.rollback.record(token_model, optimizer, tmp_path / "run")


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'embed\.weight' has dtype torch\.bfloat16"):
        start(TokenModel().bfloat16(), tmp_path / "run")


def test_an_existing_folder_is_never_touched(token_model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(LedgerError, match="exists, expected a new folder"):
        start(token_model, folder)
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_two_recorders_on_one_model_are_refused(token_model, tmp_path):
    with (
        start(token_model, tmp_path / "first"),
        pytest.raises(ValueError, match="'embed' already has a forward of its own"),
    ):
        start(token_model, tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_cannot_be_split_are_refused(tmp_path, option):
    model = nn.Sequential(nn.Embedding(5, 3, **option), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=f"embedding '0' has {next(iter(option))}="):
        start(model, tmp_path / "run")
    start(model, tmp_path / "run", unowned=["0.weight"]).close()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], ValueError, r"got shape \(0,\)"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"got shape \(2, 2\)"),
        (torch.zeros(2), TypeError, r"must be integers, got a tensor of torch\.float32"),
        ([1.5], TypeError, "cannot be interpreted as an integer"),
    ],
)
def test_bad_ids_are_refused(token_model, tmp_path, ids, error, message):
    with start(token_model, tmp_path / "run") as recorder:
        with pytest.raises(error, match=message), recorder.batch(ids):
            pass
        with recorder.batch([1]), pytest.raises(LedgerError, match="already open"), recorder.batch([2]):
            pass
    with pytest.raises(LedgerError, match="is closed"), recorder.batch([1]):
        pass


@pytest.mark.parametrize("count", [1, 5, 23, 25])
def test_a_wrong_number_of_ids_is_refused_by_layer(token_model, tmp_path, count):
    data = token_data()
    with start(token_model, tmp_path / "run") as recorder:
        loss = token_loss(token_model(data), data)
        with (
            recorder.batch(range(count)),
            pytest.raises(LedgerError, match=rf"layer 'head' saw rows .* for {count} sample ids"),
        ):
            loss.backward()


class Flattened(nn.Module):
    """Folds samples and tokens into one dimension before its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids).flatten(0, 1))).unflatten(0, ids.shape)


def test_flattened_rows_are_taken_sample_by_sample(train):
    torch.manual_seed(0)
    model = Flattened()
    run = train(model, token_data())
    assert run.ledger().verify(model).passed


class WithPositions(nn.Module):
    """Learned positions as nanoGPT adds them: looked up once, added to every sample."""

    def __init__(self, leading: bool) -> None:
        super().__init__()
        self.embed, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(12, 6), nn.Linear(6, 11)
        self.leading = leading

    def forward(self, ids):
        positions = torch.arange(ids.shape[1])
        return self.head(torch.tanh(self.embed(ids) + self.positions(positions[None] if self.leading else positions)))


@pytest.mark.parametrize("leading", [True, False], ids=["(1, T)", "(T,)"])
def test_shared_positions_get_a_gradient_per_sample(train, leading):
    torch.manual_seed(0)
    model = WithPositions(leading)
    options = {} if leading else {"shared_inputs": ["positions"]}
    data = token_data(6, 7)
    run = train(model, data, steps=1, accumulate=1, micro_batch=6, rank=16, max_norm=None, **options)
    ledger = run.ledger()
    assert ledger.verify(model).passed
    (segment,) = read_segments(ledger._store, backwards=True)
    streams = {stream.layer: index for index, stream in enumerate(ledger._layout.streams)}
    record = segment.records[streams["positions"]]
    assert record.visit.tolist() == list(range(6))
    initial = ledger._store.load_role("initial")
    fresh = WithPositions(leading)
    fresh.load_state_dict(initial)
    for row in range(6):
        (expected,) = torch.autograd.grad(
            token_loss(fresh(data[row : row + 1]), data[row : row + 1]) / 6, [fresh.positions.weight]
        )
        basis = torch.eye(expected.numel()).reshape(-1, *expected.shape)
        found = record.inner(basis)[:, row].reshape(expected.shape)
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_positions_without_a_sample_dimension_must_be_named(train):
    model = WithPositions(leading=False)
    with pytest.raises(LedgerError, match=r"'positions' looked up ids of shape \(8,\) for 3 sample ids"):
        train(model, token_data(), name="length differs")
    model.zero_grad()  # of the batch that failed midway
    with pytest.raises(ValueError, match="looked up 3 ids in one dimension for 3 samples"):
        train(model, token_data(length=3), name="length equals samples")


@pytest.mark.parametrize("forward_inside", [True, False])
def test_one_id_per_sample_or_per_position_is_never_guessed(tmp_path, forward_inside):
    """Three ids in one dimension for three samples: any values, and also where only backward is attributed."""
    embedding = nn.Embedding(11, 6)
    model = nn.Sequential(embedding, nn.Linear(6, 11))
    ids = torch.tensor([2, 0, 1])
    refused = pytest.raises(ValueError, match=r"one id per sample, or positions.*shared_inputs=\['0'\].*ids\[:, None\]")
    with start(model, tmp_path / "run") as recorder:
        if forward_inside:
            with recorder.batch(range(3)), refused:
                embedding(ids)
        else:
            loss = embedding(ids).sum()
            with recorder.batch(range(3)), refused:
                loss.backward()


def test_labels_in_a_second_dimension_are_taken_one_per_sample(tmp_path):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.labels, self.head = nn.Embedding(11, 6), nn.Linear(6, 1)

        def forward(self, labels):
            return self.head(self.labels(labels[:, None]).squeeze(1))

    model = Labelled()
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for _ in range(2):
            with recorder.batch(range(3)):
                model(torch.tensor([2, 0, 1])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert gk.rollback.open(tmp_path / "run").verify(model).passed


def test_shared_ids_need_forward_inside_the_batch(tmp_path):
    model = WithPositions(leading=False)
    with (
        start(model, tmp_path / "run", shared_inputs=["positions"]),
        pytest.raises(LedgerError, match="forward must run inside"),
    ):
        model(token_data())


def test_padding_rows_get_no_gradient(train):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 11)

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model = Padded()
    run = train(model, token_data())
    assert run.ledger().verify(model).passed


def interrupted_run(model, path):
    data, optimizer = token_data(), gk.AdamW(model.parameters(), lr=1e-2)
    with gk.rollback.record(model, optimizer, path) as recorder:
        for step in range(5):
            with recorder.batch(range(24)):
                token_loss(model(data), data).backward()
                if step == 3:
                    raise KeyboardInterrupt
            optimizer.step()
            optimizer.zero_grad()


def test_an_exception_in_training_keeps_what_was_recorded(token_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(token_model, tmp_path / "run")
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits) == (3, 72)
    assert ledger.verify(token_model).passed
    assert all("forward" not in vars(module) for module in token_model.modules())


def test_a_paused_recorder_takes_no_notice(token_model, tmp_path):
    data, optimizer = token_data(), gk.AdamW(token_model.parameters(), lr=1e-2)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run") as recorder:
        for _ in range(3):
            with recorder.batch(range(24)):
                token_loss(token_model(data), data).backward()
                with recorder.paused():
                    torch.autograd.grad(token_loss(token_model(data), data), list(token_model.parameters()))
            with recorder.paused():
                plan = gk.checkpoint.plan(token_model, data, token_loss, budget="1 GiB", recorder=recorder)
            optimizer.step()
            optimizer.zero_grad()
    assert plan.natural_peak_bytes > recorder.held_bytes()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits) == (3, 72)
    assert ledger.verify(token_model).passed


def test_a_step_inside_the_batch_is_counted_right(token_model, tmp_path):
    data, optimizer = token_data(), gk.AdamW(token_model.parameters(), lr=1e-2)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(range(24)):
            for _ in range(3):
                token_loss(token_model(data), data).backward()
                optimizer.step()
                optimizer.zero_grad()
        recorder.close()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits) == (3, 72)
    assert ledger.verify(token_model).passed


def test_recording_leaves_the_random_numbers_alone(token_model, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    data = token_data()
    with start(token_model, tmp_path / "run") as recorder, recorder.batch(range(24)):
        token_loss(token_model(data), data).backward()
    assert torch.equal(torch.rand(4), expected)


def test_held_bytes_count_the_shadows_and_what_waits(tmp_path):
    model = gpt2()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    optimizer = gk.AdamW(model.parameters())
    data = token_data(8, 12, 31)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        before = recorder.held_bytes()
        assert 3 * parameters <= before <= 3.2 * parameters
        with recorder.batch(range(8)):
            token_loss(model(data), data).backward()
        optimizer.step()
        assert recorder.held_bytes() > before
