"""The examples that document each patch hold: before becomes after, and a second run finds nothing to do."""

from __future__ import annotations

import pytest

from chipmunk.registry import Example, Registry, load
from chipmunk.rewrite import Plan, SiteStatus, plan_repository
from chipmunk.rewrite.minimal import FILES

REGISTRY = load()
CASES = [
    pytest.param(name, example, id=f"{name}: {example.title}")
    for name, patch in REGISTRY.patches.items()
    for example in patch.examples
]


def run(example: Example, name: str, registry: Registry = REGISTRY) -> Plan:
    files = {**FILES, **example.others, example.path: example.before}
    return plan_repository({path: text.encode() for path, text in files.items()}, registry, only=[name])


@pytest.mark.parametrize(("name", "example"), CASES)
def test_example(name: str, example: Example) -> None:
    plan = run(example, name)
    changed = {change.path: change.after.decode() for change in plan.changes}
    # The model's forward is marked by a patch of its own, which the others bring along.
    if example.after is None:
        assert changed.get(example.path) is None
    else:
        assert changed[example.path] == example.after
    assert not [site for site in plan.sites if site.status is SiteStatus.REFUSED]


@pytest.mark.parametrize("name", REGISTRY.patches)
def test_near_misses_come_first(name: str) -> None:
    kinds = [example.after is None for example in REGISTRY.patches[name].examples]
    assert any(kinds)
    assert not all(kinds)
    assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize("name", REGISTRY.patches)
def test_documented(name: str) -> None:
    patch = REGISTRY.patches[name]
    assert patch.origin == f"patches/{name.replace('-', '_')}.py"
    assert len(patch.summary) <= 100
    assert len(patch.documentation) > len(patch.summary) + 100
