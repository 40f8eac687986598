"""What is counted of torch.compile, on modules of which one knows what has to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from chipmunk.bench.compile_counts import CompileCounts


class Block(nn.Module):
    kind = "plain"

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        if self.kind == "sine":
            x = x.sin()
        if self.kind == "torn":
            torch._dynamo.graph_break()
            x = x.cos()
        return x


@pytest.fixture
def blocks() -> Iterator[list[Block]]:
    torch._dynamo.reset()
    made = [Block() for _ in range(3)]
    for block in made:
        block.compile(backend="aot_eager", dynamic=False)
    yield made
    torch._dynamo.reset()


def run(blocks: list[Block], kind: str, rows: int = 2) -> None:
    with torch.no_grad():
        for block in blocks:
            block.kind = kind
            block(torch.ones(rows, 4))


def limit(count: int) -> Any:
    """Compilations of the same code that are allowed."""
    config = torch._dynamo.config
    return config.patch({"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": count})


def counted(graphs: int, breaks: int = 0, recompiles: int = 0, failures: int = 0) -> dict[str, int]:
    return {"graphs": graphs, "breaks": breaks, "recompiles": recompiles, "failures": failures}


def test_three_pictures_in_a_row(blocks: list[Block]) -> None:
    counts = CompileCounts()
    assert counts.since() == counted(0)
    run(blocks, "plain")
    assert counts.since() == counted(1)  # one graph serves all blocks of a class
    run(blocks, "sine")
    assert counts.since() == counted(1, recompiles=1)
    run(blocks, "sine")
    run(blocks, "plain")
    assert counts.since() == counted(0)


def test_a_new_size_is_a_recompilation(blocks: list[Block]) -> None:
    run(blocks, "plain")
    counts = CompileCounts()
    run(blocks, "plain", rows=3)
    assert counts.since() == counted(1, recompiles=1)


def test_a_break_makes_two_graphs(blocks: list[Block]) -> None:
    counts = CompileCounts()
    run(blocks, "torn")
    assert counts.since() == counted(2, breaks=1)
    run(blocks, "torn")
    assert counts.since() == counted(0)


def test_what_the_compiler_gave_up_on_is_no_recompilation(blocks: list[Block]) -> None:
    with limit(2):
        counts = CompileCounts()
        for rows in (2, 3, 4):
            run(blocks, "plain", rows)
        assert counts.since() == counted(2, recompiles=1, failures=1)


def test_the_compiler_is_made_to_remember_more_than_it_does_by_itself(blocks: list[Block]) -> None:
    torch._dynamo.utils.set_compilation_metrics_limit(2)
    counts = CompileCounts()
    for rows in (2, 3, 4, 5, 6):
        run(blocks[:1], "plain", rows)
    assert counts.since() == counted(5, recompiles=4)
