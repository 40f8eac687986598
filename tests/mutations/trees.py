"""Questions to a function's tree, and changes of it, that the rewritings share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial

import libcst as cst
import libcst.matchers as m

from .names import Rewriting
from .program import Files, Place, Program, edit

_EMPTY = cst.Module([])


def code(node: cst.CSTNode) -> str:
    return _EMPTY.code_for_node(node)


def statement(text: str) -> cst.BaseStatement:
    return cst.parse_module(text).body[0]


def each(places: Callable[[Program], Iterable[Place]], change: Callable[..., cst.FunctionDef | None]) -> Rewriting:
    """A rewriting that changes functions one by one; `change` gets the function, its place and the program."""

    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = dict(program.files)
        done = [edit(files, place, partial(change, place=place, program=program)) for place in places(program)]
        return files if any(done) else None

    return rewriting


def on_statements(
    function: cst.FunctionDef, change: Callable[[cst.SimpleStatementLine], list[cst.BaseStatement] | None]
) -> cst.FunctionDef | None:
    """Replace statements at any depth of a function."""
    done: list[object] = []

    class Change(cst.CSTTransformer):
        def leave_SimpleStatementLine(
            self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
        ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
            new = change(updated_node)
            if new is None:
                return updated_node
            done.append(new)
            return cst.FlattenSentinel(new)

    changed = function.visit(Change())
    assert isinstance(changed, cst.FunctionDef)
    return changed if done else None


def calls_in(node: cst.CSTNode, names: Iterable[str]) -> list[cst.Call]:
    """Calls in a node whose function reads as one of `names`, or ends with it after a dot."""
    wanted = set(names)
    found = []
    for call in m.findall(node, m.Call()):
        assert isinstance(call, cst.Call)
        text = code(call.func)
        if text in wanted or text.rpartition(".")[2] in {w for w in wanted if "." not in w}:
            found.append(call)
    return found


def parts_of(program: Program, place: Place, function: cst.FunctionDef, kind: str) -> list[str]:
    """`self.img_mlp`, or the linears, of a block as a method of its own calls them; `attn.img_mlp` in a processor's."""
    names = [p.name.value for p in function.params.params]
    own = (place.path, place.owner) in program.blocks
    found: list[str] = []
    for model in program.models:
        for block in (model.double_block, model.single_block):
            if own and (block.file, block.name) != (place.path, place.owner):
                continue
            parts = {"mlp": [block.mlp], "out": [block.linear_out], "in": [block.linear_in]}[kind]
            for name in (part for part in parts if part):
                found += [f"self.{name}"] if own else [f"{given}.{name.split('.')[-1]}" for given in names[:2]]
    return found


def kernel_names(program: Program) -> list[str]:
    return [place.name for place in program.kernels]


def attention_calls(program: Program, place: Place, function: cst.FunctionDef) -> list[cst.Call]:
    return calls_in(function.body, kernel_names(program))


def mlp_calls(program: Program, place: Place, function: cst.FunctionDef) -> list[cst.Call]:
    return calls_in(function.body, parts_of(program, place, function, "mlp"))


def out_calls(program: Program, place: Place, function: cst.FunctionDef) -> list[cst.Call]:
    return calls_in(function.body, parts_of(program, place, function, "out"))


def in_calls(program: Program, place: Place, function: cst.FunctionDef) -> list[cst.Call]:
    return calls_in(function.body, parts_of(program, place, function, "in"))
