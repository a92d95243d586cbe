"""Find the poisoned training samples behind one misclassified digit, and take them back.

A small network is trained, recorded, on handwritten digits of which a few have a bright patch in a corner and the label
7. Then it says 7 to whatever has the patch. One such digit is asked about; the training samples most to blame for it
are taken back, and the models that come out are compared with trainings without them.
Writes ``OUT/poisoned_sample.png`` and ``OUT/poisoned_sample.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from demo.console import open_console
from demo.poison import TARGET, PoisonedDigits, make_optimizer, rankings, stamp, train
from demo.poison_sheet import draw_poison
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import gradkern as gk
from gradkern.errors import UndoRefusedError

# The better of the two estimators on seeds 0 to 3; figures are reported of other seeds.
CHOSEN = "explain, direct"
AS_TRAINED = "as trained"
EXACT = "undo, exact"
RETRAINED = "trained without these"
CLEAN = "trained without any poison"


@dataclass(frozen=True)
class Outcome:
    """What one seed came to; shares in 0 to 1.

    Attributes:
        seed: Of split, poison, weights and order.
        poisoned: Number of poisoned training samples.
        removed: Number of samples taken back.
        removed_poisoned: How many of those are poisoned.
        precision: By the way of ranking, the share of poisoned samples among as many as there are, most suspect first.
        models: By model, attack success and accuracy; None where undoing was refused.
        exact_is_retraining: Whether the exact undo has the bits of the training without these.
    """

    seed: int
    poisoned: int
    removed: int
    removed_poisoned: int
    precision: dict[str, float]
    models: dict[str, tuple[float, float] | None]
    exact_is_retraining: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse_arguments(argv)
    # Matrices are so small that threads would wait for one another; and so the figures do not depend on their number.
    torch.set_num_threads(1)
    console = open_console()
    try:
        loaded = [PoisonedDigits.load(args.poisoned, seed) for seed in args.seeds]
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "poisoned_sample.png"
    outcomes: list[Outcome] = []
    for seed, data in zip(args.seeds, loaded, strict=True):
        outcome = run_once(data, args.epochs, args.remove, seed, console, None if outcomes else picture)
        if outcome is None:
            print(
                f"seed {seed}: the model has not learned the backdoor, there is no digit to ask about; raise --epochs "
                "or --poisoned",
                file=sys.stderr,
            )
            return 1
        outcomes.append(outcome)
    print_outcomes(console, outcomes)
    figures = {"epochs": args.epochs, "chosen": CHOSEN, "runs": [asdict(outcome) for outcome in outcomes]}
    (args.out / "poisoned_sample.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"\nThe picture: [bold]{picture}[/]")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="for picture and figures (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[4], help="of split, poison, weights and order (default: 4)"
    )
    parser.add_argument("--epochs", type=int, default=16, help="visits to every sample (default: %(default)s)")
    parser.add_argument("--poisoned", type=int, default=12, help="of 600 training samples (default: %(default)s)")
    parser.add_argument("--remove", type=int, default=20, help="most suspect, to take back (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    for name in ("poisoned", "remove"):
        if not 1 <= getattr(args, name) <= 100:
            parser.error(f"--{name} must be between 1 and 100, got {getattr(args, name)}")
    return args


def run_once(
    data: PoisonedDigits, epochs: int, remove: int, seed: int, console: Console, picture: Path | None
) -> Outcome | None:
    """Train, ask about one digit, take back and compare; None if no digit falls for the backdoor."""
    digits = data.digits
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        phase = progress.add_task(f"seed {seed}: train", total=None)
        model = train(digits, epochs=epochs, seed=seed, ledger=Path(folder) / "ledger")
        asked = data.misclassified(model)
        if asked is None:
            return None
        query, shows = stamp(data.victims[asked : asked + 1]), int(data.victim_labels[asked])
        ledger = gk.rollback.open(Path(folder) / "ledger")
        progress.update(phase, description=f"seed {seed}: explain")
        orders = rankings(ledger, model, digits, query)
        suspects = orders[CHOSEN][:remove]
        models: dict[str, nn.Module | None] = {AS_TRAINED: model}
        for share in (0.5, 1.0):
            models[f"undo, fast, share {share}"] = undo_fast(ledger, model, suspects, data, share)
        exact = ledger.undo(
            model,
            suspects,
            replay=gk.rollback.Replay(
                lambda ids: (digits.images[ids], digits.given[ids]), make_optimizer, nn.functional.cross_entropy
            ),
            progress=lambda step, total: progress.update(
                phase, completed=step, total=total, description=f"seed {seed}: undo"
            ),
        ).model
    again = train(digits, epochs=epochs, seed=seed, without=suspects)
    models |= {
        EXACT: exact,
        RETRAINED: again,
        CLEAN: train(digits, epochs=epochs, seed=seed, without=data.is_poisoned.nonzero()[:, 0]),
    }
    shares = {
        name: None if each is None else (data.attack_success(each), data.accuracy(each))
        for name, each in models.items()
    }
    if picture is not None:
        drawn = {name: each for name, each in shares.items() if each is not None}
        draw_poison(picture, digits, query, suspects, drawn, shows=shows)
    count = int(data.is_poisoned.sum())
    return Outcome(
        seed=seed,
        poisoned=count,
        removed=len(suspects),
        removed_poisoned=int(data.is_poisoned[suspects].sum()),
        precision={name: float(data.is_poisoned[order[:count]].double().mean()) for name, order in orders.items()},
        models=shares,
        exact_is_retraining=all(
            torch.equal(one, other) for one, other in zip(exact.parameters(), again.parameters(), strict=True)
        ),
    )


def undo_fast(
    ledger: gk.rollback.Ledger, model: nn.Module, suspects: Tensor, data: PoisonedDigits, share: float
) -> nn.Module | None:
    """Without training data or retraining; None where it is refused because the change cannot be foretold."""
    probe = torch.cat([data.digits.clean_images, stamp(data.digits.clean_images)])
    try:
        return ledger.undo(model, suspects, method="fast", probe=probe, share=share).model
    except UndoRefusedError:
        return None


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print how well each way finds the poison, and what taking back does, seed by seed and on average."""
    first = outcomes[0]
    seeds = [f"seed {outcome.seed}" for outcome in outcomes]
    found = _table(f"Poison among the {first.poisoned} most suspect, of one digit taken for a {TARGET}", *seeds, "mean")
    for way in first.precision:
        cells = [outcome.precision[way] for outcome in outcomes]
        found.add_row(way, *(f"{cell:.2f}" for cell in (*cells, fmean(cells))))
    console.print(found)
    for part, title in enumerate((f"Share of patched digits taken for a {TARGET}", "Share right without a patch")):
        after = _table(title, *seeds, "mean")
        for name in first.models:
            shares = [outcome.models[name] for outcome in outcomes]
            made = [each[part] for each in shares if each is not None]
            cells = ["refused" if each is None else f"{each[part]:.1%}" for each in shares]
            after.add_row(name, *cells, f"{fmean(made):.1%}" if len(made) == len(shares) else "")
        console.print(after)
    poison = ", ".join(f"{outcome.removed_poisoned} of {outcome.removed}" for outcome in outcomes)
    same = sum(outcome.exact_is_retraining for outcome in outcomes)
    console.print(
        f"Taken back were the most suspect by {CHOSEN!r}; poisoned are {poison} of them, of {first.poisoned} in all.\n"
        f"{EXACT!r} has the bits of {RETRAINED!r} in {same} of {len(outcomes)} runs.",
        highlight=False,
    )


def _table(title: str, *figures: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main())
