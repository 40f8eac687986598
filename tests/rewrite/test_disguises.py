"""The same program, written otherwise, gives the same sites; a second run changes nothing; results compile."""

from __future__ import annotations

import ast
import difflib

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES

from .sources import REWRITES, Rewrite, disguises, encode, found, rename, rewrite

REGISTRY = load()
PLAIN = {"crlf": False, "bom": False, "tabs": False, "no_final_newline": False, "latin": False}
EXPECTED = found(plan_repository(encode(FILES, **PLAIN), REGISTRY))
SLOW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a plan takes a tenth of a second: shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)


def after(files: dict[str, bytes], plan: Plan) -> dict[str, bytes]:
    return {**files, **{change.path: change.after for change in plan.changes}}


def check(files: dict[str, bytes]) -> None:
    plan = plan_repository(files, REGISTRY)
    assert found(plan) == EXPECTED, [f"{s.file}:{s.line} {s.patch} {s.status.value}: {s.reason}" for s in plan.sites]
    result = after(files, plan)
    for path, content in result.items():
        ast.parse(content, path)
    again = plan_repository(result, REGISTRY)
    assert not again.changes
    assert {site.status.value for site in again.sites} == {"already patched"}


def test_the_plain_repository_is_patched_in_full() -> None:
    assert EXPECTED == {
        ("flow/attention.py", "attention", "patched"): 1,
        ("flow/command.py", "command-line", "patched"): 1,
        ("flow/double.py", "attention", "patched"): 1,
        ("flow/double.py", "double-mlp", "patched"): 1,
        ("flow/model.py", "model-forward", "patched"): 1,
        ("flow/model.py", "step-caching", "patched"): 1,
        ("flow/sampling.py", "step-clock", "patched"): 1,
        ("flow/single.py", "attention", "patched"): 1,
        ("flow/single.py", "single-mlp", "patched"): 2,
    }


@pytest.mark.parametrize("change", REWRITES, ids=lambda r: f"{r.path}: {r.new.strip()[:50]!r}")
def test_each_rewrite(change: Rewrite) -> None:
    assert change.old in FILES[change.path]
    check(encode(rewrite(FILES, [change]), **PLAIN))


@pytest.mark.parametrize("form", list(PLAIN))
def test_each_form(form: str) -> None:
    files = encode(FILES, **{**PLAIN, form: True})
    check(files)


@SLOW
@given(disguises())
def test_any_disguise(files: dict[str, bytes]) -> None:
    check(files)


@SLOW
@given(disguises())
def test_what_is_not_patched_stays(files: dict[str, bytes]) -> None:
    """Where lines differ, something of Chipmunk's was put there; line ends, marks and the last newline stay."""
    for change in plan_repository(files, REGISTRY).changes:
        before, after = change.before.splitlines(keepends=True), change.after.splitlines(keepends=True)
        for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            assert kind in ("equal", "insert", "replace")
            assert kind == "equal" or b"chipmunk" in b"".join(after[start:end]), after[start:end]
        assert change.after.startswith(b"\xef\xbb\xbf") == change.before.startswith(b"\xef\xbb\xbf")
        assert change.after.endswith(b"\n") == change.before.endswith(b"\n")
        if b"\r\n" in change.before:
            assert change.after.count(b"\n") == change.after.count(b"\r\n")


def test_renaming_is_not_recognising() -> None:
    """No rule goes by a name of the repository's own."""
    names = {
        name: f"n{i}"
        for i, name in enumerate(("PairBlock", "JointBlock", "Painter", "pairs", "joints", "attend", "sample"))
    }
    check(encode(rename(FILES, names), **PLAIN))
