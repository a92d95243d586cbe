from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo.corpus import Corpus, readable
from hypothesis import given
from hypothesis import strategies as st

LENGTH = 256


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(LENGTH)


def test_every_sampled_row_stands_in_its_file_at_its_line(corpus: Corpus) -> None:
    ids = torch.randperm(len(corpus))[:200]
    for sample_id, row in zip(ids.tolist(), corpus.rows(ids), strict=True):
        snippet = corpus.snippet(sample_id)
        content = (corpus.root / snippet.path).read_bytes()
        data = bytes(row.tolist())
        lines_of_matches = {
            content.count(b"\n", 0, start) + 1
            for start in range(0, len(content), LENGTH)
            if content[start : start + LENGTH] == data
        }
        assert snippet.first_line in lines_of_matches
        assert snippet.data == data


def test_held_out_files_are_never_trained_on(corpus: Corpus) -> None:
    trained = {corpus.snippet(sample_id).path for sample_id in range(0, len(corpus), 3)}
    prompt = corpus.held_out_prompt("\n    def ", 64)
    assert prompt.path not in trained
    assert len(trained) > 100


def test_prompt_is_the_text_at_its_line(corpus: Corpus) -> None:
    prompt = corpus.held_out_prompt("\n    def __init__(self", 128)
    content = (corpus.root / prompt.path).read_bytes()
    end = content.index(b"\n    def __init__(self", 128 - 22) + 22
    assert prompt.data == content[end - 128 : end]
    assert prompt.first_line == content.count(b"\n", 0, end - 128) + 1


def test_prompt_marker_that_is_nowhere_says_so(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="pass a more common marker"):
        corpus.held_out_prompt("no file has this \x00 marker", 64)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\tb\n", "a\tb\n"),
        ("µ→".encode(), "µ→"),
        ("µ".encode()[:1], "\ufffd"),
        (b"\x1b[2J\x00\r", "\ufffd[2J\ufffd\ufffd"),
    ],
)
def test_text_is_safe_to_print(data: bytes, expected: str) -> None:
    assert readable(data) == expected


@pytest.mark.parametrize("sample_id", [-1, 10**9])
def test_sample_id_outside_the_corpus(corpus: Corpus, sample_id: int) -> None:
    with pytest.raises(IndexError, match="outside 0"):
        corpus.snippet(sample_id)


def test_folder_without_sources_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 rows of 256 bytes and 0 held-out files"):
        Corpus(LENGTH, tmp_path)


@given(sizes=st.lists(st.integers(0, 40), min_size=2, max_size=8), length=st.integers(1, 9))
def test_rows_are_the_whole_blocks_of_the_trained_files(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int
) -> None:
    root = tmp_path_factory.mktemp("tree")
    contents = [bytes((7 * index + place) % 128 for place in range(size)) for index, size in enumerate(sizes)]
    for index, content in enumerate(contents):
        (root / f"{index:02}.py").write_bytes(content)
    # The first file in order is the one held out.
    expected = [
        content[start : start + length]
        for content in contents[1:]
        for start in range(0, len(content) - length + 1, length)
    ]
    if not expected:
        with pytest.raises(ValueError, match="expected at least one of each"):
            Corpus(length, root)
        return
    corpus = Corpus(length, root)
    rows = corpus.rows(torch.arange(len(corpus)))
    assert [bytes(row) for row in rows.tolist()] == expected
