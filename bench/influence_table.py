"""Published datamodeling scores as the Markdown tables of the documentation: ``python -m bench.influence_table``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .table import RESULTS

__all__ = ["BEGIN", "END", "influence_tables", "published_rollback"]

# Around the tables in docs/benchmarks.md.
BEGIN = "<!-- datamodeling scores: begin; from bench/results/rollback.json -->\n"
END = "<!-- datamodeling scores: end -->"

_METRICS = {"lds_drop1": "1 %", "lds_drop10": "10 %", "lds_drop50": "50 %", "trak50": "50 %, other seeds"}


def published_rollback() -> Sequence[dict[str, Any]]:
    """Records of the published run."""
    records: Sequence[dict[str, Any]] = json.loads((RESULTS / "rollback.json").read_text())
    return records


def influence_tables(records: Sequence[dict[str, Any]]) -> str:
    """Rank correlations of predicted and real losses, by setting, system and how much was left out; and query times."""
    values = {(r["case"], r["system"], r["metric"]): r["value"] for r in records}
    tables = []
    alarmed = list(dict.fromkeys(r["case"] for r in records if r["metric"] == "alarm"))
    judged = dict.fromkeys(r["case"] for r in records if r["metric"] in _METRICS)
    for case in (each for each in judged if each not in alarmed):
        systems = dict.fromkeys(r["system"] for r in records if r["case"] == case and r["metric"] in _METRICS)
        metrics = [metric for metric in _METRICS if any((case, system, metric) in values for system in systems)]
        best = {metric: max(values.get((case, system, metric), -1.0) for system in systems) for metric in metrics}
        rows = [
            f"| {case} | " + " | ".join(_METRICS[metric] for metric in metrics) + " |",
            "|---" * (1 + len(metrics)) + "|",
        ]
        for system in systems:
            cells = []
            for metric in metrics:
                value = values.get((case, system, metric))
                interval = values.get((case, system, f"{metric}_interval"))
                text = "" if value is None else f"{value:.3f}" + ("" if interval is None else f" ± {interval:.3f}")
                cells.append(f"**{text}**" if value == best[metric] else text)
            rows.append(f"| {system} | " + " | ".join(cells) + " |")
        tables.append("\n".join(rows))
    tables += [_alarms(values, alarmed)] if alarmed else []
    tables.append(_times(values))
    return "\n\n".join(tables) + "\n"


def _alarms(values: Mapping[tuple[str, str, str], float], cases: Sequence[str]) -> str:
    """Scores with a tenth left out, and whether they are refused, by setting and system."""
    systems = list(dict.fromkeys(system for case, system, metric in values if metric == "alarm"))
    rows = ["| alarm, 10 % | " + " | ".join(systems) + " |", "|---" * (1 + len(systems)) + "|"]
    for case in cases:
        cells = [
            f"{values[case, system, 'lds_drop10']:.3f}" + (", refused" if values[case, system, "alarm"] else "")
            for system in systems
        ]
        rows.append(f"| {case.removeprefix('alarm: ')} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _times(values: Mapping[tuple[str, str, str], float]) -> str:
    """Milliseconds a query by system and setting."""
    timed = [(case, system) for case, system, metric in values if metric == "query_ms"]
    cases, systems = (list(dict.fromkeys(each)) for each in zip(*timed, strict=True))
    rows = ["| ms a query | " + " | ".join(cases) + " |", "|---" * (1 + len(cases)) + "|"]
    for system in systems:
        cells = [f"{values[case, system, 'query_ms']:.1f}" for case in cases]
        rows.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(influence_tables(published_rollback()), end="")
