"""The original that is timed has its blocks compiled, whatever runs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.bench.worker import compile_blocks


class RunByMethod(nn.Module):
    def forward_plain(self, x: Tensor) -> Tensor:
        return x + 1


def test_blocks_are_compiled_and_so_are_methods_that_run_them() -> None:
    model = nn.Module()
    by_method, plain = RunByMethod(), nn.Linear(2, 2)
    model.doubles, model.singles = nn.ModuleList([by_method]), nn.ModuleList([plain])
    method = by_method.forward_plain
    spec: Any = SimpleNamespace(facts=SimpleNamespace(double="doubles", single="singles"))
    before = torch._dynamo.config.recompile_limit
    try:
        compile_blocks(model, spec)
    finally:
        torch._dynamo.config.recompile_limit = before
    assert by_method.__dict__["forward_plain"]._torchdynamo_orig_callable == method
    assert plain._compiled_call_impl is not None
