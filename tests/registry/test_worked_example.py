"""The worked example of `docs/adding-a-patch.md` does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chipmunk.registry import Patch, load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope
from chipmunk.rewrite.minimal import FILES
from chipmunk.rewrite.repository import Repository
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.values import Values

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-patch.md"


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert code is not None
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "inference_mode.py").write_text(code.group(1))
    return tmp_path


def plan_with(plugins: Path, texts: dict[str, str], only: list[str] | None) -> Plan:
    return plan_repository({path: text.encode() for path, text in texts.items()}, load([plugins]), only=only)


def test_its_examples_hold(plugins: Path) -> None:
    patch: Patch = load([plugins]).patches["inference-mode"]
    assert [example.after is None for example in patch.examples] == [True, True, False]
    for example in patch.examples:
        plan = plan_with(plugins, {**FILES, example.path: example.before}, ["inference-mode"])
        after = {change.path: change.after.decode() for change in plan.changes}
        assert after == ({} if example.after is None else {example.path: example.after}), example.title


def test_it_works_beside_the_built_in_patches(plugins: Path) -> None:
    plan = plan_with(plugins, FILES, None)
    sampling = next(change.after.decode() for change in plan.changes if change.path == "flow/sampling.py")
    assert "@torch.inference_mode()\ndef sample(" in sampling
    assert "chipmunk.steps(model, " in sampling


def test_what_the_page_says_of_the_context_is_there() -> None:
    page = PAGE.read_text()
    named: list[tuple[type, str]] = [
        (Context, "runtime runtime_call values patched already left_dense edit replace insert_before insert_after"),
        (Context, "prepend_arguments append_argument append_parameter"),
        (Repository, "resolve method values_of"),
        (Scope, "calls reaching roots calls_behind"),
        (Source, "code line span indentation"),
        (Values, "labels"),
    ]
    for owner, names in named:
        for name in names.split():
            assert name in page
            fields = getattr(owner, "__dataclass_fields__", {})
            assert hasattr(owner, name) or name in fields, f"{owner.__name__}.{name}"
