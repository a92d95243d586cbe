"""Find the wrong labels in a training set by what every sample did to the model.

A small network is trained on handwritten digits of which some have a wrong label, while gradkern records it. Then its
training samples are ranked by how suspect their labels are, in several ways, and each way is held against the truth.
Writes ``OUT/mislabelled_digits.png`` and ``OUT/mislabelled_digits.json``; and ``OUT/mislabelled_digits.html``, on who
taught the model its worst mistakes.
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
from demo.digit_report import write_report
from demo.digit_sheet import draw_sheet
from demo.digits import NoisyDigits
from demo.noisy_labels import CHOSEN, WAYS, Run, suspicions

_SHOWN = 40
_FEW = 50


@dataclass(frozen=True)
class Quality:
    """How well a ranking finds wrong labels.

    Attributes:
        precision: Share of wrong labels among as many samples as there are wrong labels, most suspect first; the
            share of all wrong labels that is found (recall) is then the same.
        precision_at_50: The same among the first 50.
        recall_at_twice: Share of all wrong labels among twice as many samples as there are.
    """

    precision: float
    precision_at_50: float
    recall_at_twice: float

    @classmethod
    def of(cls, order: torch.Tensor, wrong: torch.Tensor) -> Quality:
        """Hold a ranking, most suspect first, against which labels are wrong."""
        count = int(wrong.sum())
        hits = wrong[order].double()
        return cls(float(hits[:count].mean()), float(hits[:_FEW].mean()), float(hits[: 2 * count].sum() / count))


@dataclass(frozen=True)
class Outcome:
    """What one seed came to; accuracies and shares in 0 to 1."""

    seed: int
    samples: int
    wrong_labels: int
    test_accuracy: float
    fitted: float
    memorised: float
    ledger_bytes: int
    ways: dict[str, Quality]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse_arguments(argv)
    # Matrices are so small that threads would wait for one another; and so the figures do not depend on their number.
    torch.set_num_threads(1)
    try:
        digits = [NoisyDigits.load(args.share, seed) for seed in args.seeds]
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for seed, each in zip(args.seeds, digits, strict=True):
        page = None if outcomes else args.out / "mislabelled_digits.html"
        outcome, order = run_once(each, args.epochs, seed, page)
        print_outcome(outcome)
        if not outcomes:
            title = f"The {_SHOWN} most suspect of {outcome.samples} training samples, by {CHOSEN!r} (seed {seed})"
            draw_sheet(args.out / "mislabelled_digits.png", each, order[:_SHOWN], title=title)
        outcomes.append(outcome)
    print_table(outcomes)
    figures = {"epochs": args.epochs, "chosen": CHOSEN, "runs": [asdict(outcome) for outcome in outcomes]}
    (args.out / "mislabelled_digits.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"\nThe most suspect digits: {args.out / 'mislabelled_digits.png'}")
    print(f"Who taught the model its worst mistakes: {args.out / 'mislabelled_digits.html'}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="for what it writes (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[3], help="of split, wrong labels, weights and order (default: 3)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="visits to every sample (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.1, help="of wrong labels (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 0.01 <= args.share <= 0.5:
        parser.error(f"--share must be between 0.01 and 0.5, got {args.share:g}")
    return args


def run_once(digits: NoisyDigits, epochs: int, seed: int, page: Path | None = None) -> tuple[Outcome, torch.Tensor]:
    """Train, rank in every way and count; also return the chosen way's order, most suspect first.

    With a ``page`` also write the report of the run there.
    """
    wrong = digits.mislabelled
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(digits, Path(folder) / "ledger", epochs=epochs, seed=seed)
        orders = {name: each.argsort(descending=True, stable=True) for name, each in suspicions(run).items()}
        with torch.no_grad():
            fits = run.model(digits.images).argmax(1) == digits.given
            is_right = run.model(digits.test_images).argmax(1) == digits.test_labels
        outcome = Outcome(
            seed=seed,
            samples=len(wrong),
            wrong_labels=int(wrong.sum()),
            test_accuracy=float(is_right.double().mean()),
            fitted=float(fits.double().mean()),
            memorised=float(fits[wrong].double().mean()),
            ledger_bytes=run.ledger.nbytes,
            ways={way.name: Quality.of(orders[way.name], wrong) for way in WAYS if way.name in orders},
        )
        if page is not None:
            write_report(page, run)
    return outcome, orders[CHOSEN]


def print_outcome(outcome: Outcome) -> None:
    """Print what was trained."""
    print(
        f"seed {outcome.seed}: {outcome.wrong_labels} of {outcome.samples} training labels are wrong; the model gives "
        f"{outcome.memorised:.0%} of them back and {outcome.fitted:.0%} of all, and is right on "
        f"{outcome.test_accuracy:.1%} of the test digits; ledger {outcome.ledger_bytes / 1e6:.1f} MB",
        flush=True,
    )


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Print how well each way found the wrong labels, seed by seed and on average."""
    first = outcomes[0]
    print(
        f"\nWrong labels among the {first.wrong_labels} most suspect samples (precision, and recall too), among the "
        f"{_FEW}\nmost suspect, and found by looking at twice as many as there are. "
        f"By chance: {first.wrong_labels / first.samples:.2f}, {first.wrong_labels / first.samples:.2f}, "
        f"{2 * first.wrong_labels / first.samples:.2f}.\n"
    )
    seeds = "".join(f"{f'seed {outcome.seed}':>8}" for outcome in outcomes)
    print(f"{'':30}{seeds}{'mean':>8}{'at 50':>8}{'twice':>8}  needs")
    for way in WAYS:
        found = [outcome.ways[way.name] for outcome in outcomes if way.name in outcome.ways]
        if len(found) < len(outcomes):
            print(f"{way.name:30}  influence grew on its way back through training: no scores")
            continue
        cells = [each.precision for each in found]
        means = (
            fmean(cells),
            fmean(each.precision_at_50 for each in found),
            fmean(each.recall_at_twice for each in found),
        )
        print(f"{way.name:30}" + "".join(f"{cell:8.3f}" for cell in (*cells, *means)) + f"  {way.needs}")


if __name__ == "__main__":
    sys.exit(main())
