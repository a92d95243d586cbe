"""The command ``gradkern``, as people run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gradkern.checkpoint import Plan
from gradkern.command_line import app

pytest.importorskip("transformers", reason="the models are those of transformers")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}

MODULE = """
from torch import nn
import torch

def make():
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    return nn.Sequential(*blocks), (torch.zeros(128, 64), torch.zeros(128, 64)), nn.functional.mse_loss

def wrong():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_plan_of_a_config_file_is_printed_written_and_drawn(config, tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--gpu", "H100", "--batch", "2x512", "--dtype", "fp32")
    free = run("plan", config, "--budget", "10GiB", *options, "--out", str(out))
    assert free.exit_code == 0, free.output
    least, natural = Plan.load(out).least_feasible_bytes, Plan.load(out).natural_peak_bytes
    budget = str((least + natural) // 2)
    result = run("plan", config, "--budget", budget, *options, "--out", str(out), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    made = Plan.load(out)
    assert str(made) in result.output
    assert made.source == "simulated H100"
    assert [unit.name for unit in made.units][1:-1] == [f"model.layers.{at}" for at in range(4)]
    assert made.predicted_peak_bytes <= made.budget_bytes < natural
    assert any(unit.option != "keep" for unit in made.units)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "none"])
def test_plan_of_a_function(optimizer, tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_model", None)
    out = tmp_path / "plan.json"
    result = run(
        "plan", "my_model:make", "--budget", "1GiB", "--gpu", "A100-40", "--optimizer", optimizer, "--out", "plan.json"
    )
    assert result.exit_code == 0, result.output
    params = 4 * (2 * 64 * 256 + 64 + 256) * 4
    held = {"adamw": 3, "sgd": 1, "none": 1}[optimizer] * params
    workspace, batch = 8_519_680, 2 * 128 * 64 * 4
    assert Plan.load(out).fixed_bytes - workspace - batch == pytest.approx(held, rel=0.05)
    wrong = run("plan", "my_model:wrong", "--budget", "1GiB", "--gpu", "H100")
    assert wrong.exit_code == 1
    assert "must return (model, batch)" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "10GiB", "--gpu", "H1"], "no data sheet"),
        (["--budget", "much", "--gpu", "H100"], "cannot read 'much'"),
        (["--budget", "1MiB", "--gpu", "H100"], "least feasible budget is"),
        (["--budget", "10GiB", "--gpu", "H100", "--batch", "8"], "sequences x tokens"),
        (["--budget", "10GiB", "--gpu", "H100", "--batch", "0x8"], "sequences x tokens"),
        (["--budget", "10GiB", "--gpu", "H100", "--batch", "2xfoox64"], "sequences x tokens"),
        (["--budget", "10GiB", "--gpu", "H100", "--out", "nowhere/plan.json"], "does not exist"),
        (["--budget", "10GiB", "--gpu", "H100", "--optimizer", "magic"], "--optimizer must be one of"),
        (["--budget", "10GiB", "--gpu", "H100", "--dtype", "fp8"], "--dtype must be one of"),
        (["--budget", "10GiB", "--gpu", "H100", "--units", "layers.*"], "no module of this"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(config, arguments, message):
    result = run("plan", config, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_file_that_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    result = run("plan", str(path), "--budget", "1GiB", "--gpu", "H100")
    assert result.exit_code == 1
    assert "no model_type" in result.stderr


@pytest.mark.parametrize("kind", ["vit", "bert", "t5"])
def test_other_kinds_of_models(kind, tmp_path):
    sizes = {
        "vit": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "decoder_start_token_id": 0},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **sizes[kind]}))
    batch = "4" if kind == "vit" else "4x32"
    result = run("plan", str(path), "--budget", "10GiB", "--gpu", "H100", "--batch", batch)
    assert result.exit_code == 0, result.output
    assert result.output.count("keep") >= 4


def test_module_and_command_are_one():
    for command in ([sys.executable, "-m", "gradkern"], ["gradkern"]):
        path = [sys.executable.rsplit("/", 1)[0] + "/gradkern"] if command == ["gradkern"] else command
        result = subprocess.run([*path, "info"], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("gradkern ")


def test_without_the_extra_info_works_and_the_rest_says_what_is_missing():
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'typer' else find(name, *rest); "
        "sys.argv = ['gradkern', {!r}]; from gradkern.__main__ import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code.format("info")], capture_output=True, text=True)
    assert shown.returncode == 0
    assert shown.stdout.startswith("gradkern ")
    refused = subprocess.run([sys.executable, "-c", code.format("plan")], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "pip install 'gradkern[cli]'" in refused.stderr
