"""What a user is told where verify cannot run the original: where it failed, what to write, and what to run next."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chipmunk.rewrite.plan import Plan
from chipmunk.verify.report import Check
from chipmunk.verify.run import HINT, _refusal
from chipmunk.verify.spec import Spec
from tests.verify.test_checks import FACTS

verifying = importlib.import_module("chipmunk.verify.run")  # `chipmunk.verify.run` is a function too

THEIRS = Spec("original", Path("/tmp/verify/original-repository"), Path("/tmp/verify/original"), FACTS, Path("flux.py"))
OURS = replace(THEIRS, side="patched", root=Path("/home/me/flux"), out=Path("/tmp/verify/patched"))
TRACE = "Traceback (most recent call last):\n" + "".join(
    f'  File "{THEIRS.root}/model.py", line {line}, in forward\n    y = f{line}(x)\n        ^^^^^\n'
    for line in range(40)
)


def error(kind: str, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "message": "TypeError: no", "next_command": None, "trace": TRACE, **more}


def test_code_that_fails_is_shown_where_it_fails_and_no_more() -> None:
    told = _refusal(error("crash"), replace(THEIRS, factory="verify_factory:build"), OURS)
    first, _, rest = told.message.partition("\n\n")
    assert first == "`verify_factory` fails: TypeError: no"
    lines = rest.splitlines()
    assert len(lines) == 8
    assert lines[-2:] == ['  File "/home/me/flux/model.py", line 39, in forward', "    y = f39(x)"]
    placed = error("crash", place="at model.py:39: ", skeleton="def build(): ...")
    told = _refusal(placed, replace(THEIRS, factory="verify_factory:build"), OURS)
    assert told.message.startswith("the original code fails at model.py:39: TypeError: no\n\n")
    assert HINT not in told.message, "the file is there, and what is wrong in it is said"
    assert _refusal(error("crash"), THEIRS, OURS).message.startswith("the original code fails: TypeError: no\n\n")


def test_a_file_to_complete_is_saved_where_it_is_found() -> None:
    told = _refusal(error("build", skeleton="def build(): ..."), THEIRS, OURS)
    assert "save it here as `verify_factory.py`" in told.message
    assert told.message.endswith("\n\ndef build(): ...")
    assert told.next_command == "chipmunk verify /home/me/flux --factory verify_factory:build"


def test_a_factory_that_builds_is_asked_for_the_call_alone() -> None:
    with_mine = replace(THEIRS, factory="mine.small:build")
    told = _refusal(error("build", skeleton="def inputs(): ..."), with_mine, OURS)
    assert "Complete this and add it to `mine.small`, whose build works" in told.message
    assert told.next_command == "chipmunk verify /home/me/flux --factory mine.small:build"


def test_an_interruption_keeps_the_models_that_were_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three models the second one is at work."""
    plan = Plan("flux", (), (), tuple(replace(FACTS, name=name) for name in ("First", "Second", "Third")))
    asked = []

    def checks(base: Spec, *rest: Any) -> list[tuple[str, list[Check], dict[str, Any]]]:
        asked.append(base.facts.name)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return [("", [Check("off", True, "the same bits")], {})]

    monkeypatch.setattr(verifying, "_checks", checks)
    report = verifying.verify(tmp_path, tmp_path, plan, verifying.VerifyOptions(), tmp_path)
    assert asked == ["First", "Second"]
    assert [check.name for check in report.checks] == ["off, First"]
    assert [(each.model, each.reason) for each in report.unverified] == [
        ("Second", "interrupted"),
        ("Third", "interrupted"),
    ]
    assert report.unverified[1].next_command == f"chipmunk verify {tmp_path} --model Third"
    assert (report.exit_code, report.to_json()["status"]) == (130, "interrupted")
    asked.append("so that the first one is interrupted")
    with pytest.raises(KeyboardInterrupt):
        verifying.verify(tmp_path, tmp_path, plan, verifying.VerifyOptions(), tmp_path)
