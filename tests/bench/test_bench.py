"""The benchmarks measure what they say and the README shows what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bench import accumulate, cycle, peers, policies, state8, state8_loss, step, train
from bench.cases import CASES
from bench.harness import Report, Triad, interleave
from bench.influence_table import BEGIN, END, influence_tables, published_rollback
from bench.state8 import held_bytes
from bench.table import published, readme_table

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"suite", "case", "system", "metric", "value", "unit", "env"}


def test_every_system_has_its_turn_in_every_round_and_the_order_rotates():
    calls = []
    systems = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(systems, torch.device("cpu"), rounds=7, warm_up=2)
    assert {name: len(seconds) for name, seconds in timings.items()} == dict.fromkeys("abc", 7)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_very_slow_system_has_fewer_rounds():
    systems = dict.fromkeys("abc", lambda: None)
    timings = interleave(systems, torch.device("cpu"), rounds=7, warm_up=1, fewer={"b": 3})
    assert {name: len(seconds) for name, seconds in timings.items()} == {"a": 7, "b": 3, "c": 7}


def test_cases_are_what_they_say():
    sizes = {name: [torch.Size(shape).numel() for shape in shapes()] for name, shapes in CASES.items()}
    assert len(sizes["gpt2_124m"]) == 148
    assert sum(sizes["gpt2_124m"]) == 124_439_808
    assert len(sizes["small_1500"]) == 1500
    assert 2.2e6 < sum(sizes["small_1500"]) < 2.4e6
    assert sum(sizes["large_8x4096x4096"]) == 8 * 4096**2
    assert {name: [tuple(shape) for shape in shapes()] for name, shapes in state8.CASES.items()} == {
        "large_6x4096x4096": [(4096, 4096)] * 6
    }


@pytest.mark.parametrize("suite", [step, cycle, accumulate, policies, state8], ids=lambda suite: suite.__name__)
def test_a_suite_runs_and_writes_records(suite, monkeypatch, tmp_path, capsys):
    # Peers warn and log on import, and import far more than themselves: they have tests in processes of their own.
    monkeypatch.setattr(peers, "usable", lambda makers, device: {})
    monkeypatch.setattr(suite, "CASES", {"tiny": lambda: [(100,), (5000, 3)]})
    if hasattr(suite, "Triad"):
        monkeypatch.setattr(suite, "Triad", lambda device: Triad(device, 1 << 14))
    report = Report(suite.__name__, torch.device("cpu"))
    suite.run(report, rounds=7)
    file = tmp_path / "new" / "records.json"
    report.write(str(file))
    records = json.loads(file.read_text())
    assert records
    assert all(set(record) == KEYS and record["value"] > 0 for record in records)
    assert capsys.readouterr().out.count("\n") == len(records)


def test_records_replace_their_namesakes_alone(tmp_path, capsys):
    file = str(tmp_path / "records.json")
    for first, second in ((1.0, 2.0), (3.0, None)):
        report = Report("rollback", torch.device("cpu"))
        report.add("case", "gradkern", "overhead", first, "x")
        if second is not None:
            report.add("case", "peer", "overhead", second, "x")
        report.write_into(file)
    records = json.loads(Path(file).read_text())
    assert {record["system"]: record["value"] for record in records} == {"peer": 2.0, "gradkern": 3.0}
    capsys.readouterr()


def test_a_training_step_is_timed_on_parameters_that_all_systems_share(monkeypatch, capsys):
    model = torch.nn.Linear(600, 600)
    made = train.Training(model, lambda x: model(x).square().mean(), [torch.randn(2, 600)] * 2)
    monkeypatch.setattr(train, "CASES", {"tiny": lambda device: made})
    report = Report("train", torch.device("cpu"))
    train.run(report, rounds=7)
    assert capsys.readouterr().out.count("\n") == len(report.records) == 10


def test_losses_are_compared_seed_by_seed(monkeypatch, capsys):
    tiny = state8_loss.Size(layers=1, width=32, length=16, steps=3, held_out_rows=4)
    monkeypatch.setattr(state8_loss, "CASES", {"tiny": tiny})
    report = Report("state8_loss", torch.device("cpu"))
    state8_loss.run(report, rounds=7)
    found = {(record["system"], record["metric"]): record["value"] for record in report.records}
    assert len(found) == len(report.records) == 2 * (state8_loss.SEEDS + 1) + 3
    fp32, int8 = (
        [found[f"gradkern {state}", f"held_out_loss_seed_{seed}"] for seed in range(state8_loss.SEEDS)]
        for state in ("fp32", "int8")
    )
    assert len(set(fp32)) == state8_loss.SEEDS  # every seed is another run
    assert fp32 != int8
    differences = torch.tensor([100 * (b / a - 1) for a, b in zip(fp32, int8, strict=True)], dtype=torch.float64)
    pair = "gradkern int8 / gradkern fp32"
    assert found[pair, "loss_difference"] == pytest.approx(differences.mean().item())
    width = found[pair, "loss_difference_high"] - found[pair, "loss_difference_low"]
    # Of Student's t with 4 degrees of freedom, 97.5 % lie below 2.776.
    assert width == pytest.approx(2 * 2.776 * differences.std().item() / 5**0.5, rel=1e-3)
    # Three steps from the same weights over the same rows.
    assert differences.abs().max() < 1.0


def test_held_bytes_opens_wrappers_and_counts_shared_storage_once():
    params = [torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(10))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    assert held_bytes(optimizer) == 440
    table = torch.zeros(256)
    optimizer.state[params[0]] = {"codes": torch.zeros(100, dtype=torch.uint8), "table": table, "step": 3}
    optimizer.state[params[1]] = {"halves": [torch.zeros(10, dtype=torch.bfloat16)], "table": table[:5]}
    assert held_bytes(optimizer) == 440 + 100 + 20 + 1024
    wrapped = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=torch.jagged)
    inside = [getattr(wrapped, name) for name in wrapped.__tensor_flatten__()[0]]
    optimizer.state[params[1]] = {"wrapped": wrapped}
    assert held_bytes(optimizer) == 440 + 100 + 1024 + sum(t.untyped_storage().nbytes() for t in inside)


def test_peers_that_are_not_installed_give_a_reason_and_no_records():
    program = textwrap.dedent(
        """
        import importlib.abc, sys

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"deepspeed", "bitsandbytes", "torchao", "optimi"}:
                    raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
                return None

        sys.meta_path.insert(0, Blocker())

        import json
        import torch
        from bench import cycle, peers, step
        from bench.harness import Report, Triad

        for suite in (step, cycle):
            suite.CASES = {"tiny": lambda: [(100,)], "small": lambda: [(50, 3)]}
            suite.Triad = lambda device: Triad(device, 1 << 14)
            report = Report("tiny", torch.device("cpu"))
            suite.run(report, rounds=7)
            names = " ".join(record["system"] for record in report.records)
            assert not [peer for peer in peers.FP32 if peer in names], names
        print(json.dumps(peers.available()))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reasons = json.loads(done.stdout.splitlines()[-1])
    assert reasons.keys() == peers.FP32.keys() | peers.LOW_BIT.keys()
    for reason in reasons.values():
        assert reason.startswith("No module named ")
        assert reason.endswith("(blocked); try `make bench-peers`")
    for name in peers.FP32:  # two suites of two cases each, and yet
        assert done.stderr.count(f"without {name}: ") == 1


def test_a_peer_that_cannot_be_built_says_why(monkeypatch):
    def broken(params, lr):
        raise RuntimeError("no operator") from OSError("libfoo.so is missing\nand more")

    monkeypatch.setitem(peers.FP32, "optimi AdamW", broken)
    assert peers.available(among=["optimi AdamW"]) == {"optimi AdamW": "OSError: libfoo.so is missing"}


def test_every_installed_peer_steps_and_the_fp32_ones_as_torch_does():
    program = textwrap.dedent(
        """
        import torch
        from bench import peers
        from bench.systems import Replica

        device = torch.device("cpu")
        shapes = [(64, 128), (100,)]  # quantized states begin at 4,096 elements

        def after_three_steps(make):
            replica = Replica(shapes, device)
            start = [p.detach().clone() for p in replica.params]
            optimizer = make(replica.params, 1e-2)
            for _ in range(3):
                optimizer.step()
            return [p.detach() - s for p, s in zip(replica.params, start, strict=True)]

        want = after_three_steps(lambda params, lr: torch.optim.AdamW(params, lr=lr))
        for name, make in peers.usable({**peers.FP32, **peers.LOW_BIT}, device).items():
            for got, expected in zip(after_three_steps(make), want, strict=True):
                assert (got != 0).float().mean() > 0.9, name
                error = ((got - expected).norm() / expected.norm()).item()
                assert error < (1e-4 if name in peers.FP32 else 0.1 if "8bit" in name else 0.5), (name, error)
            print(f"stepped {name}")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stepped = {line.removeprefix("stepped ") for line in done.stdout.splitlines() if line.startswith("stepped ")}
    silent = {name for name in (*peers.FP32, *peers.LOW_BIT) if f"without {name}: " in done.stderr}
    assert stepped | silent == peers.FP32.keys() | peers.LOW_BIT.keys()
    assert not stepped & silent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cycle", "--rounds", "3"], "--rounds is 3, expected at least 7"),
        (["nothing"], "invalid choice: 'nothing'"),
        pytest.param(
            ["step", "--device", "cuda"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_bad_arguments(arguments, message):
    run = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert message in run.stderr


def test_readme_shows_the_published_runs():
    readme = (ROOT / "README.md").read_text()
    begin = "<!-- benchmark figures: begin; from bench/results -->\n"
    shown = readme.partition(begin)[2].partition("<!-- benchmark figures: end -->")[0]
    assert shown == readme_table(published())


def test_the_docs_show_the_published_datamodeling_scores():
    shown = (ROOT / "docs" / "benchmarks.md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == influence_tables(published_rollback())


def test_the_best_of_a_column_stands_out():
    record = {"case": "small", "unit": "", "suite": "rollback", "env": {}}
    found = influence_tables(
        [
            {**record, "system": "ours", "metric": "lds_drop1", "value": 0.5},
            {**record, "system": "ours", "metric": "lds_drop1_interval", "value": 0.25},
            {**record, "system": "theirs", "metric": "lds_drop1", "value": 0.75},
            {**record, "system": "theirs", "metric": "query_ms", "value": 1.0},
            {**record, "case": "alarm: wild", "system": "ours", "metric": "lds_drop10", "value": 0.25},
            {**record, "case": "alarm: wild", "system": "ours", "metric": "alarm", "value": 1},
        ]
    )
    scores = "| small | 1 % |\n|---|---|\n| ours | 0.500 ± 0.250 |\n| theirs | **0.750** |\n"
    alarms = "| alarm, 10 % | ours |\n|---|---|\n| wild | 0.250, refused |\n"
    assert found == f"{scores}\n{alarms}\n| ms a query | small |\n|---|---|\n| theirs | 1.0 |\n"
