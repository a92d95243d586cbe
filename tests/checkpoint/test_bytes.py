from __future__ import annotations

import pytest

from gradkern.checkpoint import parse_bytes
from gradkern.checkpoint._bytes import format_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512 MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("0.1 kB", 100),
        ("4096", 4096),
        ("7 B", 7),
        ("1TiB", 2**40),
        (12345, 12345),
    ],
)
def test_reads_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "12 parsecs",
        "-1 GB",
        "1e9",
        "1,5 GiB",
        "nan",
        "inf GB",
        "2 G",
        "0",
        "0.4 B",
        "1 2 MB",
        0,
        -1,
    ],
)
def test_refuses_what_is_not_a_positive_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [True, False, 1.5, float("nan"), None, b"1 MB"])
def test_refuses_other_types(size):
    with pytest.raises(TypeError, match="int"):
        parse_bytes(size)


def test_writes_sizes_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]
