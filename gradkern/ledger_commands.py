"""The commands ``gradkern ledger``: what a recorded run holds, whether it is sound, fewer files of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from gradkern import rollback
from gradkern._import_path import import_function
from gradkern.errors import LedgerError

__all__ = ["ledger"]

ledger = typer.Typer(no_args_is_help=True, help="What training samples did: ledgers of gradkern.rollback.")

_FOLDER = Annotated[Path, typer.Argument(help="The folder given to record().")]
_EXPECTED = (LedgerError, ValueError, TypeError, ImportError, OSError, AttributeError, sqlite3.Error)


@ledger.command()
def info(path: _FOLDER) -> None:
    """Steps, visits, and where the bytes are. Reads no records."""
    try:
        found = rollback.open(path)
        sizes = found.layer_bytes()
    except _EXPECTED as error:
        raise _failed("info", error) from error
    state = "complete" if found.complete else "ends without close()"
    per_visit = f", {found.nbytes / found.visits:,.0f} a visit" if found.visits else ""
    typer.echo(f"{path}: {found.steps:,} steps, {found.visits:,} visits, {state}")
    shards = f", in shards of {found.shards} processes" if found.shards > 1 else ""
    typer.echo(f"{found.nbytes:,} bytes{per_visit}; rank {found.rank}{shards}")
    table = Table("layer", "parameter")
    for title in ("bytes", "a visit", "share"):
        table.add_column(title, justify="right")
    total = sum(sizes.values())
    for (layer, parameter), nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        each = f"{nbytes / found.visits:,.0f}" if found.visits else ""
        share = f"{nbytes / total:.1%}" if total else ""
        table.add_row(layer or "(the model)", parameter, f"{nbytes:,}", each, share)
    Console().print(table)


@ledger.command()
def verify(
    path: _FOLDER,
    model: Annotated[
        str | None,
        typer.Option(
            help="module:function that returns the trained model; without it the conservation law is left out."
        ),
    ] = None,
) -> None:
    """Check every byte of the files, and with a model the conservation law. Exit code 1 where a check fails."""
    try:
        report = rollback.open(path).verify(None if model is None else _trained(model))
    except _EXPECTED as error:
        raise _failed("verify", error) from error
    typer.echo(str(report))
    if any(check.passed is False for check in report.checks):
        raise typer.Exit(1)


@ledger.command()
def compact(
    path: _FOLDER,
    segment_mib: Annotated[int, typer.Option(help="Files are joined up to so many MiB.", min=1)] = 64,
) -> None:
    """Join short files into longer ones, and remove what a killed recorder left."""
    try:
        before = rollback.open(path).nbytes
        files = rollback.compact(path, segment_bytes=segment_mib << 20)
        after = rollback.open(path).nbytes
    except _EXPECTED as error:
        raise _failed("compact", error) from error
    typer.echo(f"{path}: {files} files of records, {after:,} bytes (were {before:,})")


def _trained(source: str) -> nn.Module:
    made = import_function(source)()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{source} must return the trained model, got {type(made).__name__}")
    return made


def _failed(command: str, error: Exception) -> typer.Exit:
    typer.echo(f"gradkern ledger {command}: {error}", err=True)
    return typer.Exit(1)
