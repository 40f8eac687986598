"""Selection under Triton's interpreter makes exactly the reference's choice; the table of launch parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from poison import poisoned_memory, test_the_poison_works  # noqa: F401
from torch import Tensor

from chipmunk import ops
from chipmunk.ops import balance, tuning
from chipmunk.ops.select_columns.triton import pieces


def _scores(kind: str, shape: tuple[int, ...]) -> Tensor:
    uniform = torch.rand(shape)
    return {
        "uniform": uniform,
        "few values": (uniform * 9).round(),
        "all equal": torch.zeros(shape),
        "negative and tiny": -uniform * 1e-30,
        "both signs, and both zeros": torch.randn(shape).round() * 0.5,
        "wide range": torch.exp(30 * torch.randn(shape)),
        "one far off": uniform + 1e30 * (uniform == uniform.max()),
        "infinite": torch.where(uniform > 0.9, torch.inf, uniform),
        "bfloat16 differences": (uniform.bfloat16().float() - torch.rand(shape).bfloat16().float()).abs(),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "uniform",
        "few values",
        "all equal",
        "negative and tiny",
        "both signs, and both zeros",
        "wide range",
        "one far off",
        "infinite",
        "bfloat16 differences",
    ],
)
@pytest.mark.parametrize("shape", [(1, 2, 2, 100), (2, 1, 257), (1, 1, 1300)])
def test_the_choice_is_the_references(kind: str, shape: tuple[int, ...]) -> None:
    scores, columns = _scores(kind, shape), shape[-1]
    for keep, random in ((20, 0), (columns, 0), (20, 9), (0, 1), (columns - 5, 5)):
        seed = torch.randint(0, 2**40, (3,))
        chosen = ops.select_columns(scores, seed, keep, random, "triton")
        assert torch.equal(chosen, ops.select_columns(scores, seed, keep, random, "reference")), (keep, random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("parts", "rows"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_neurons_are_chosen_and_refreshed_as_by_the_reference(parts: int, rows: int, dtype: torch.dtype) -> None:
    for neurons, keep, random in ((100, 20, 9), (33, 33, 0), (257, 0, 40)):
        new, means = (torch.randn(2, 3, parts, rows * neurons).to(dtype) for _ in range(2))
        seed, expected = torch.randint(0, 2**40, (3,)), means.clone()
        chosen = ops.select_neurons(new, means, seed, neurons, keep, random, "triton")
        assert torch.equal(chosen, ops.select_neurons(new, expected, seed, neurons, keep, random, "reference"))
        assert torch.equal(means, expected)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 64, 4352, 12288, 16896, 131072])
def test_two_pieces_hold_a_row_and_waste_little(columns: int) -> None:
    for rows in (1, 10000):
        head, tail, threads = pieces(columns, rows)
        assert head + tail >= columns
        assert all(n & (n - 1) == 0 for n in (head, tail, threads))
        assert tail <= head
        assert head + tail < 1.5 * max(columns, 32) or tail == min(head, 4 * threads)


def test_one_column() -> None:
    assert ops.select_columns(torch.rand(2, 3, 1), torch.zeros(3, dtype=torch.int64), 1, 0, "triton").sum() == 0


def test_a_row_too_long_says_so() -> None:
    scores = torch.zeros(1, 1, 131073)
    with pytest.raises(NotImplementedError, match="rows longer than 131072"):
        ops.select_columns(scores, torch.zeros(3, dtype=torch.int64), 1, 0, "triton")


@pytest.mark.parametrize(
    ("row_tiles", "megabytes", "expected"),
    [(1, 1, 1), (34, 27, 34), (34, 53, 34), (132, 104, 44), (400, 315, 50)],
)
def test_bands_are_cut_where_l2_would_not_keep_them(row_tiles: int, megabytes: int, expected: int) -> None:
    assert balance.band(row_tiles, megabytes * 10**6 // row_tiles) == expected


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{"])
def test_a_damaged_tuning_file_is_forgotten(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "chipmunk").mkdir()
    (tmp_path / "chipmunk" / "tuning.json").write_text(content)
    assert tuning._read() == {}


def test_the_tuning_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {"some GPU, triton 3.6.0, sparse_mlp_in": {"rows": 128, "warps": 8}}
    tuning._write(found)
    assert tuning._read() == found
    assert [path.name for path in (tmp_path / "chipmunk").iterdir()] == ["tuning.json"]


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tuning._write({})
    assert tuning._read() == {}
