"""Other layouts: formatters, comments, line ends."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections.abc import Callable

import libcst as cst

from .program import Files, Place, Program, edit

Rewriting = Callable[[Program, random.Random], Files | None]


def _core(change: Callable[[str], str]) -> Rewriting:
    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = {path: change(program.files[path]) for path in program.core}
        changed = any(files[path] != program.files[path] for path in files)
        return {**program.files, **files} if changed else None

    return rewriting


def _run(*command: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], input=text, capture_output=True, text=True, check=True)
        return done.stdout

    return change


def _commented(text: str) -> str:
    class Add(cst.CSTTransformer):
        def leave_SimpleStatementLine(
            self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
        ) -> cst.SimpleStatementLine:
            note = cst.EmptyLine(comment=cst.Comment("# as it was: chipmunk, attention(q, k, v)"))
            return updated_node.with_changes(
                leading_lines=[cst.EmptyLine(indent=False), note, *updated_node.leading_lines]
            )

    module = cst.parse_module(text)
    new = module.visit(Add())
    # What has to come first stays first: a docstring may carry comments, `__future__` too.
    return new.code


def _parenthesised(text: str) -> str:
    class Add(cst.CSTTransformer):
        def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
            value = updated_node.value
            if isinstance(value, cst.Call | cst.BinaryOperation) and not value.lpar:
                value = value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
            return updated_node.with_changes(value=value)

    return cst.parse_module(text).visit(Add()).code


def _without_annotations(function: cst.FunctionDef) -> cst.FunctionDef:
    class Drop(cst.CSTTransformer):
        def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
            return updated_node.with_changes(annotation=None)

    changed = function.visit(Drop())
    assert isinstance(changed, cst.FunctionDef)
    return changed.with_changes(returns=None)


def annotations_removed(program: Program, rng: random.Random) -> Files | None:
    files = dict(program.files)
    places: list[Place] = [*program.forwards, *program.kernels, *program.model_forwards, *program.loops]
    done = False
    for place in dict.fromkeys(places):
        done |= edit(files, place, _without_annotations)
    return files if done else None


REWRITINGS: dict[str, Rewriting] = {
    "black": _core(_run("black", "-q", "-")),
    "black, lines of 60": _core(_run("black", "-q", "-l", "60", "-")),
    "ruff format": _core(_run("ruff", "format", "-q", "-")),
    "ruff format, tabs and single quotes": _core(
        _run(
            "ruff",
            "format",
            "-q",
            "--config",
            "format.indent-style='tab'",
            "--config",
            "format.quote-style='single'",
            "--config",
            "line-length=200",
            "-",
        )
    ),
    "yapf": _core(_run("yapf", "--style", "google")),
    "printed from its syntax tree": _core(lambda text: ast.unparse(ast.parse(text)) + "\n"),
    "carriage returns": _core(lambda text: text.replace("\n", "\r\n")),
    "a comment and a blank line above every statement": _core(_commented),
    "parentheses": _core(_parenthesised),
    "two spaces": _core(lambda text: re.sub(r"^(?: {4})+", lambda m: " " * (len(m.group()) // 2), text, flags=re.M)),
    "annotations removed": annotations_removed,
}
