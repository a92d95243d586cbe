"""What a report says of the ledger itself: its size and settings, the checks, and every layer's share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gradkern._page import Html, cards, mib, section, table
from gradkern.rollback._estimators import Scores
from gradkern.rollback._self_test import SelfTest
from gradkern.rollback._store import StoreReader
from gradkern.rollback._verify import Check, VerifyReport

__all__ = ["headline", "ledger_section"]

_MARKS = {True: ("passed", "passed"), False: ("failed", "failed"), None: ("", "not run")}


@dataclass(slots=True)
class _Layer:
    """Sums over the parameters that the same layers use."""

    parameters: list[str] = field(default_factory=list)
    elements: int = 0
    nbytes: int = 0
    moved_sq: float = 0.0
    cosines: list[float] = field(default_factory=list)


def headline(store: StoreReader, scores: Scores | None, verified: VerifyReport | SelfTest | None) -> str:
    """Return the figures to see first."""
    nbytes, visits = _bytes(store), _visits(store)
    entries = [
        ("steps", f"{store.steps:,}", "of the optimizer" if store.closing else "ends without close()"),
        ("visits", f"{visits:,}", "rows of micro-batches" if scores is None else f"of {len(scores.ids):,} samples"),
        ("ledger", mib(nbytes), f"{nbytes / visits:,.0f} bytes a visit" if visits else "no visits"),
    ]
    if verified is not None:
        failed = [check.name for check in verified.checks if check.passed is not True]
        entries.append(
            ("verification", "passed" if verified.passed else "not passed", ", ".join(failed) or "every check")
        )
    return cards("headline", entries)


def ledger_section(
    store: StoreReader, layer_bytes: Mapping[tuple[str, str], int], verified: VerifyReport | SelfTest | None
) -> str:
    """Return what was recorded, whether it is sound, and how it is spread over the layers."""
    unowned = [info.name for info in store.layout.parameters if not info.owned]
    facts = [
        ("recording", "complete" if store.closing else f"ended without close() after {store.steps:,} committed steps"),
        ("steps, visits", f"{store.steps:,}, {_visits(store):,}"),
        ("files", f"{len(store.files):,}, of {_bytes(store):,} bytes"),
        *([("recorded by", f"{len(store.parts)} processes together")] if len(store.parts) > 1 else []),
        _kept(store.facts),
        ("can be trained again", "yes" if store.facts.get("replayable") == "1" else "no"),
        ("recorded with", f"torch {store.facts.get('torch', '?')}, threads: {store.facts.get('threads', '?')}"),
        ("trained but not recorded", ", ".join(unowned) or "nothing"),
    ]
    checks = [] if verified is None else [_check_row(check) for check in verified.checks]
    return section(
        "ledger",
        "The ledger",
        "What was recorded, and how it is spread over the model.",
        table(("", ""), facts, numbers=()),
        *([f"<h3>Checks</h3>{table(('check', '', 'value', 'limit', ''), checks, numbers={2, 3})}"] if checks else []),
        "<h3>Layers</h3>",
        _layer_table(store, layer_bytes, verified),
    )


def _kept(facts: Mapping[str, str]) -> tuple[str, str]:
    """How much of every visit."""
    if "bytes_per_visit" in facts:
        return "bytes of records a visit, at most", f"{int(facts['bytes_per_visit']):,}"
    return "rank of records", facts["rank"]


def _check_row(check: Check) -> tuple[str, ...]:
    style, word = _MARKS[check.passed]
    value = "" if check.value is None else f"{check.value:.3g}"
    limit = "" if check.limit is None else f"at most {check.limit:.3g}"
    if check.least is not None:
        limit = f"at least {check.least:.3g}"
    return check.name, Html(f'<span class="{style}">{word}</span>'), value, limit, check.detail


def _layer_table(
    store: StoreReader, layer_bytes: Mapping[tuple[str, str], int], verified: VerifyReport | SelfTest | None
) -> str:
    layers = _layers(store, layer_bytes, verified)
    total_sq = sum(layer.moved_sq for layer in layers.values())
    total_bytes = sum(layer.nbytes for layer in layers.values())
    head = ["layer", "parameters", "elements", "of the update", "bytes", "of the bytes"]
    has_cosines = any(layer.cosines for layer in layers.values())
    rows = [
        (
            ", ".join(name or "(the model)" for name in names),
            ", ".join(layer.parameters),
            f"{layer.elements:,}",
            _share(layer.moved_sq, total_sq),
            f"{layer.nbytes:,}",
            _share(layer.nbytes, total_bytes),
            *([f"{min(layer.cosines):.3f}" if layer.cosines else ""] if has_cosines else []),
        )
        for names, layer in layers.items()
    ]
    said = (
        "Of the update: the squared length of what all samples changed in the layer, as a share of that in all "
        "recorded layers"
    )
    said += "." if store.closing else ", which is known only of a recording that ended with close()."
    if has_cosines:
        head.append("cosine")
        said += " Cosine: of records on disk with the exact gradients, mean over samples, the lowest of the parameters."
    return f'<p class="note">{said}</p>{table(head, rows, numbers=set(range(2, len(head))))}'


def _layers(
    store: StoreReader, layer_bytes: Mapping[tuple[str, str], int], verified: VerifyReport | SelfTest | None
) -> dict[tuple[str, ...], _Layer]:
    """By the names of the layers that share the parameters."""
    layout = store.layout
    deltas = store.load_role("deltas") if store.closing else {}
    cosines = {} if verified is None else {(each.layer, each.parameter): each.cosine for each in verified.compression}
    found: dict[tuple[str, ...], _Layer] = {}
    for index, streams in layout.streams_by_parameter(range(len(layout.parameters))).items():
        info = layout.parameters[index]
        names = tuple(layout.streams[stream].layer for stream in streams)
        if not names:
            continue
        layer = found.setdefault(names, _Layer())
        layer.parameters.append(info.name.removeprefix(f"{names[0]}."))
        layer.elements += math.prod(info.shape)
        layer.nbytes += sum(layer_bytes[name, info.name] for name in names)
        layer.moved_sq += float(deltas[info.name].double().square().sum()) if info.name in deltas else 0.0
        layer.cosines += [cosines[name, info.name] for name in names if (name, info.name) in cosines]
    return found


def _share(part: float, total: float) -> str:
    if not 0 < total < math.inf:
        return "–"
    share = f"{part / total:.1%}"
    return Html(f'{share}<span class="bar" aria-hidden="true"><span style="width:{share}"></span></span>')


def _visits(store: StoreReader) -> int:
    return sum(entry.visits for entry in store.segments)


def _bytes(store: StoreReader) -> int:
    return sum(entry.bytes for entry in store.files)
