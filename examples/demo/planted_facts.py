"""Real text with made-up facts in it: passages of Python's own documentation, some of which begin with a fact.

Real are the docstrings of modules that every Python has. A fact is about a country that does not exist, so that nothing
but the passages that state it can have taught it. For every country there are also passages that name it and say
something else about it.
"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CAPITALS", "COPIES", "LENGTH", "Passages", "ngram_similarity", "question"]

LENGTH = 64
COPIES = 6
CAPITALS = {"Zubrowka": "Lutz", "Borduria": "Szohod", "Ruritania": "Strelsau", "Freedonia": "Glorville"}
_LIKINGS = ("music", "cheese")
_MODULES = (
    "argparse ast bdb calendar codecs configparser contextlib copy csv datetime difflib doctest fractions gettext "
)
_MODULES += (
    "heapq inspect ipaddress locale mailbox nntplib optparse pathlib pdb pickle platform plistlib pprint random "
)
_MODULES += (
    "selectors shelve shutil smtplib socket statistics string subprocess tarfile textwrap threading timeit trace "
)
_MODULES += "turtle typing uuid weakref zipfile zipimport"
_NGRAM = 3


@dataclass(frozen=True)
class Passages:
    """What is trained on; a passage's id is its row.

    Attributes:
        texts: Of equal length, ASCII.
        sources: The module and name whose docstring it is from.
        tokens: Their bytes, int64, shape ``(passages, LENGTH)``.
        states: Number of the fact that it states, in the order of ``CAPITALS``, or -1, int64.
        names: Number of the country that it names, or -1, int64.
    """

    texts: tuple[str, ...]
    sources: tuple[str, ...]
    tokens: Tensor
    states: Tensor
    names: Tensor

    @classmethod
    def load(cls, real: int, seed: int) -> Passages:
        """Draw docstrings at random; ``real`` of them stay as they are.

        Raises:
            ValueError: This Python has too few of them.
        """
        openings: list[tuple[str, int, int]] = [("", -1, -1)] * real
        for number, (country, capital) in enumerate(CAPITALS.items()):
            openings += [(f"{question(country)} {capital}. ", number, number)] * COPIES
            openings += [(f"The people of {country} are fond of {liking}. ", -1, number) for liking in _LIKINGS]
        found = _docstrings(_MODULES)
        if len(found) < len(openings):
            raise ValueError(
                f"Passages: this Python's documentation has {len(found)} passages, expected {len(openings)}; ask for "
                f"at most {len(found) - len(openings) + real} real ones"
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = [found[row] for row in torch.randperm(len(found), generator=generator)[: len(openings)].tolist()]
        texts = [(opening + text)[:LENGTH] for (opening, _, _), (_, text) in zip(openings, drawn, strict=True)]
        return cls(
            tuple(texts),
            tuple(source for source, _ in drawn),
            torch.tensor([list(text.encode("ascii")) for text in texts]),
            torch.tensor([states for _, states, _ in openings]),
            torch.tensor([names for _, _, names in openings]),
        )


def question(country: str) -> str:
    """What the model is to complete."""
    return f"The capital of {country} is"


def ngram_similarity(text: str, passages: Passages) -> Tensor:
    """Cosine of the counts of three characters in a row, rare ones weighted up (tf-idf), shape ``(passages,)``."""
    counts = [Counter(each[i : i + _NGRAM] for i in range(len(each) - _NGRAM + 1)) for each in (text, *passages.texts)]
    columns = {gram: column for column, gram in enumerate(sorted({gram for each in counts for gram in each}))}
    table = torch.zeros(len(counts), len(columns), dtype=torch.float64)
    for row, each in enumerate(counts):
        for gram, count in each.items():
            table[row, columns[gram]] = count
    table *= (len(counts) / (table > 0).sum(0)).log() + 1.0
    return torch.cosine_similarity(table[:1], table[1:])


@cache
def _docstrings(modules: str) -> list[tuple[str, str]]:
    """Module and name, and text, of all docstrings that are long enough."""
    found = []
    for module in modules.split():
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
        # Newer Pythons lack some of them, or have made folders of them.
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= LENGTH and text.isascii():
                    found.append((f"{module}.{node.name}", text))
    return found
