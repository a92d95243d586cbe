"""The commands of ``gradkern``: needs the extra ``cli`` (typer and rich)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from gradkern._import_path import import_function
from gradkern.checkpoint import Plan, plan
from gradkern.info import report
from gradkern.ledger_commands import ledger
from gradkern.loss import Batch, LossFn

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What happens between backward and forward.")

app.add_typer(ledger, name="ledger")

# Passes over a model that most searches take.
_USUAL_PASSES = 7

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
)


@app.command()
def info() -> None:
    """Versions, instruction set, and each backend with the reason where it is off."""
    typer.echo(report())


@app.command("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A transformers config (JSON file, folder, model type such as llama, or name on the hub), or "
            "module:function that returns (model, batch) or (model, batch, loss_fn).",
        ),
    ],
    budget: Annotated[str, typer.Option(help="Bytes for the whole step, such as 20GiB.")],
    gpu: Annotated[str, typer.Option(help="A100-40, A100-80, H100, H200, B200, RTX4090 or MI300X; need not be here.")],
    batch: Annotated[str, typer.Option(help="Micro-batch of a config: sequences x tokens such as 8x4096.")] = "1x1024",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or none.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="Of the parameters of a config: bf16, fp16 or fp32.")] = "bf16",
    shards: Annotated[int, typer.Option(help="Processes that FSDP spreads parameters over.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    offload: Annotated[bool, typer.Option("--offload", help="What units save may wait in the host's memory.")] = False,
    units: Annotated[list[str] | None, typer.Option(help="Pattern over module names; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the memory of a step and what budgets cost.")] = None,
) -> None:
    """Plan what to recompute so that a training step fits a budget, without weights and without the GPU."""
    try:
        for path in (out, plot):
            if path is not None and not path.parent.is_dir():
                raise FileNotFoundError(f"the folder of {path} does not exist; make it first")
        made = _planned(model, budget, gpu, batch, optimizer, dtype, shards, accumulate, offload, units or [])
        typer.echo(str(made))
        if out is not None:
            made.save(out)
        if plot is not None:
            made.plot(plot)
    except (RuntimeError, ValueError, TypeError, ImportError, OSError, AttributeError) as error:
        typer.echo(f"gradkern plan: {error}", err=True)
        raise typer.Exit(1) from error


def _planned(
    source: str,
    budget: str,
    gpu: str,
    batch: str,
    optimizer: str,
    dtype: str,
    shards: int,
    accumulate: int,
    offload: bool,
    units: list[str],
) -> Plan:
    if optimizer not in (*_OPTIMIZERS, "none"):
        raise ValueError(f"--optimizer must be one of {', '.join(_OPTIMIZERS)} or none, got {optimizer!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building the model", total=_USUAL_PASSES)
        model, inputs, loss_fn = _built(source, batch, _DTYPES[dtype])
        made = None if optimizer == "none" else _OPTIMIZERS[optimizer](model.parameters())
        return plan(
            model,
            inputs,
            loss_fn,
            budget=budget,
            optimizer=made,
            accumulate=accumulate,
            units=units,
            gpu=gpu,
            shards=shards,
            offload=offload,
            progress=lambda text: bar.update(task, advance=1, description=text),
        )


def _built(source: str, batch: str, dtype: torch.dtype) -> tuple[nn.Module, Batch, LossFn | None]:
    """A model on the meta device, with a batch and a loss."""
    if ":" in source:
        return _imported(source)
    from transformers import AutoConfig  # lazy: an extra, and slow to import

    config = _config(source, AutoConfig)
    with torch.device("meta"):
        model = _model_of(config, dtype)
        inputs = _batch_of(config, model, batch, dtype)
    return model, inputs, None


def _imported(source: str) -> tuple[nn.Module, Batch, LossFn | None]:
    """What ``module:function`` returns."""
    function = import_function(source)
    with torch.device("meta"):
        made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise TypeError(f"{source} must return (model, batch) or (model, batch, loss_fn), got {type(made).__name__}")
    return made if len(made) == 3 else (*made, None)


def _config(source: str, auto: Any) -> Any:
    """A transformers config by file, folder, model type or name."""
    from transformers import CONFIG_MAPPING  # lazy, as above

    path = Path(source)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or "model_type" not in stored:
            raise ValueError(f"{source} is not the config of a transformers model: it has no model_type")
        return auto.for_model(**stored)
    if source in CONFIG_MAPPING:
        return auto.for_model(source)
    return auto.from_pretrained(source)


def _model_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model with a loss for a config."""
    import transformers  # lazy, as above

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            model: nn.Module = auto.from_config(config, dtype=dtype)
            return model
    raise ValueError(
        f"no model with a loss is known for the model type {config.model_type!r}; pass module:function, a function "
        "that returns (model, batch)"
    )


def _batch_of(config: Any, model: nn.Module, batch: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch of the model's kind."""
    parts = batch.lower().split("x")
    sizes = [int(part) if part.isascii() and part.isdigit() else 0 for part in parts]
    is_image = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    if len(sizes) != (1 if is_image else 2) or min(sizes) < 1:
        expected = "a number of images such as 32" if is_image else "sequences x tokens such as 8x4096"
        raise ValueError(f"--batch must be {expected} for a {config.model_type} model, got {batch!r}")
    if is_image:
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.empty(sizes[0], config.num_channels, side, side, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(sizes[0], dtype=torch.long)}
    ids = torch.zeros(sizes, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}
