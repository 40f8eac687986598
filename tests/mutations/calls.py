"""Other forms of calls: helpers extracted, values named or inlined, branches around them, other arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import libcst as cst
import libcst.matchers as m

from .names import Rewriting, fresh
from .program import Files, Place, Program, add_method, edit, function_of, insert_top
from .trees import (
    attention_calls,
    calls_in,
    code,
    each,
    in_calls,
    mlp_calls,
    on_statements,
    out_calls,
    statement,
)

# Helpers


def _extracted(place: Place, files: Files, function: cst.FunctionDef, call: cst.Call, name: str, prefix: str) -> None:
    """Put a call into a method beside the one that holds it: its arguments become the method's."""
    names = [arg.keyword.value if arg.keyword else f"{prefix}{i}" for i, arg in enumerate(call.args)]
    inner = ", ".join(f"{arg.keyword.value}={n}" if arg.keyword else n for arg, n in zip(call.args, names, strict=True))
    root = code(call.func).split(".")[0]  # the block, in a processor
    given = [root] if root in [p.name.value for p in function.params.params[1:]] else []
    method = f"\ndef {name}(self, {', '.join([*given, *names])}):\n    return {code(call.func)}({inner})\n"
    new = cst.parse_expression(f"self.{name}({', '.join([*given, *(code(arg.value) for arg in call.args)])})")

    def change(function: cst.FunctionDef) -> cst.FunctionDef:
        changed = function.deep_replace(next(c for c in m.findall(function, m.Call()) if code(c) == code(call)), new)
        assert isinstance(changed, cst.FunctionDef)
        return changed

    edit(files, place, change)
    assert place.owner is not None
    files[place.path] = add_method(files[place.path], place.owner, method)


def helper_for(find: Callable[[Program, Place, cst.FunctionDef], list[cst.Call]], prefix: str) -> Rewriting:
    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = dict(program.files)
        done = False
        for place in program.forwards:
            function = function_of(files, place)
            calls = find(program, place, function) if function is not None else []
            if function is not None and len(calls) == 1 and not any(arg.star for arg in calls[0].args):
                _extracted(place, files, function, calls[0], fresh(rng, "x"), prefix)
                done = True
        return files if done else None

    return rewriting


def residual_helper(program: Program, rng: random.Random) -> Files | None:
    """`img = img + gate * f(x)` becomes `img = add(img, gate, f(x))`."""
    files = dict(program.files)
    name = fresh(rng, "x")
    pattern = m.Assign(
        targets=[m.AssignTarget(m.Name())],
        value=m.BinaryOperation(
            left=m.Name(), operator=m.Add(), right=m.BinaryOperation(operator=m.Multiply(), right=m.Call())
        ),
    )

    def change(line: cst.SimpleStatementLine) -> list[cst.BaseStatement] | None:
        found = line.body[0]
        if not m.matches(found, pattern):
            return None
        value = cst.ensure_type(cst.ensure_type(found, cst.Assign).value, cst.BinaryOperation)
        right = cst.ensure_type(value.right, cst.BinaryOperation)
        if any("chunk" in code(part) for part in (right.left, right.right)):
            return None
        target = code(cst.ensure_type(found, cst.Assign).targets[0].target)
        text = f"{target} = {name}({code(value.left)}, {code(right.left)}, {code(right.right)})\n"
        return [statement(text)]

    done: set[str] = set()
    for place in program.forwards:
        if edit(files, place, lambda node: on_statements(node, change)):
            done.add(place.path)
    for path in done:
        files[path] = insert_top(
            files[path], f"\n\ndef {name}(stream, gate, update):\n    return stream + gate * update\n"
        )
    return files if done else None


# Temporaries and inlining


def named(find: Callable[[Program, Place, cst.FunctionDef], list[cst.Call]], *, argument: bool) -> Rewriting:
    """Give the call's value a name before it is used, or its first argument."""

    def change(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
        calls = [code(call) for call in find(program, place, function)]

        def line(node: cst.SimpleStatementLine) -> list[cst.BaseStatement] | None:
            inside = [c for c in m.findall(node, m.Call()) if code(c) in calls]
            if len(inside) != 1:
                return None
            call = cst.ensure_type(inside[0], cst.Call)
            value: cst.CSTNode = call.args[0].value if argument else call
            if argument and isinstance(value, cst.Name):
                return None
            assert isinstance(value, cst.BaseExpression)
            new = node.deep_replace(value, cst.Name("named_value"))
            assert isinstance(new, cst.SimpleStatementLine)
            bare = value.with_changes(lpar=[], rpar=[]) if "\n" not in code(value) else value
            text = code(bare)
            text = f"({text})" if "\n" in text else text
            return [statement(f"named_value = {text}\n"), new]

        return on_statements(function, line)

    return each(lambda program: program.forwards, change)


def inlined(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
    """A variable that is assigned once and used once, in the next statement, is replaced by its value there."""
    if not isinstance(function.body, cst.IndentedBlock):
        return None
    body = list(function.body.body)
    uses = [code(n) for n in m.findall(function, m.Name())]
    done = False
    at = 0
    while at + 1 < len(body):
        small = body[at].body[0] if isinstance(body[at], cst.SimpleStatementLine) else None
        if m.matches(small, m.Assign(targets=[m.AssignTarget(m.Name())])):
            assign = cst.ensure_type(small, cst.Assign)
            name = code(assign.targets[0].target)
            following = m.findall(body[at + 1], m.Name(name))
            if uses.count(name) == 2 and len(following) == 1 and isinstance(body[at + 1], cst.SimpleStatementLine):
                value = assign.value
                if not value.lpar and not isinstance(value, cst.Call | cst.Name):
                    value = value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
                new = body[at + 1].deep_replace(following[0], value)
                body[at : at + 2] = [cst.ensure_type(new, cst.SimpleStatementLine)]
                done = True
                continue
        at += 1
    return function.with_changes(body=function.body.with_changes(body=body)) if done else None


# Branches


def wrapped(find: Callable[[Program, Place, cst.FunctionDef], list[cst.Call]], head: str, tail: str = "") -> Rewriting:
    """Put the statement that holds the call under `head`."""

    def change(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
        calls = [code(call) for call in find(program, place, function)]

        def line(node: cst.SimpleStatementLine) -> list[cst.BaseStatement] | None:
            if not any(code(c) in calls for c in m.findall(node, m.Call())) or isinstance(node.body[0], cst.Return):
                return None
            compound = statement(f"{head}:\n    pass\n{tail}")
            block = cst.ensure_type(compound.body, cst.IndentedBlock)
            return [compound.with_changes(body=block.with_changes(body=[node.with_changes(leading_lines=[])]))]

        return on_statements(function, line)

    return each(lambda program: program.forwards, change)


class _Loops(cst.CSTTransformer):
    def __init__(self, change: Callable[[cst.For], cst.For | None]) -> None:
        super().__init__()
        self.change, self.done = change, False

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.For:
        new = self.change(updated_node)
        self.done = self.done or new is not None
        return new if new is not None else updated_node


def loops(places: Callable[[Program], Iterable[Place]], change: Callable[[cst.For], cst.For | None]) -> Rewriting:
    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = dict(program.files)
        done = False
        for place in places(program):

            def visit(node: cst.FunctionDef) -> cst.FunctionDef | None:
                visitor = _Loops(change)
                new = node.visit(visitor)
                assert isinstance(new, cst.FunctionDef)
                return new if visitor.done else None

            done |= edit(files, place, visit)
        return files if done else None

    return rewriting


def enumerated(loop: cst.For) -> cst.For | None:
    if code(loop.iter).startswith("enumerate("):
        return None
    target = code(loop.target.with_changes(lpar=[], rpar=[]))
    head = statement(f"for number, ({target}) in enumerate({code(loop.iter)}):\n    pass\n")
    new = cst.ensure_type(head, cst.For)
    return loop.with_changes(target=new.target, iter=new.iter)


def in_list(loop: cst.For) -> cst.For | None:
    if not isinstance(loop.iter, cst.Call):
        return None
    return loop.with_changes(iter=cst.parse_expression(f"list({code(loop.iter)})"))


def under_with(loop: cst.For) -> cst.For | None:
    if not isinstance(loop.body, cst.IndentedBlock):
        return None
    # `break` and `continue` stay in the loop's own body all the same.
    block = statement("with torch.no_grad():\n    pass\n")
    inner = cst.ensure_type(block.body, cst.IndentedBlock).with_changes(body=loop.body.body)
    return loop.with_changes(body=loop.body.with_changes(body=[block.with_changes(body=inner)]))


def under_if(loop: cst.For) -> cst.For | None:
    if not isinstance(loop.body, cst.IndentedBlock):
        return None
    block = statement("if torch.is_tensor(torch.ones(())):\n    pass\n")
    inner = cst.ensure_type(block.body, cst.IndentedBlock).with_changes(body=loop.body.body)
    return loop.with_changes(body=loop.body.with_changes(body=[block.with_changes(body=inner)]))


# Arguments


def _with_parameter(text: str) -> Callable[..., cst.FunctionDef | None]:
    def change(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
        new = cst.ensure_type(statement(f"def f({text}): pass\n"), cst.FunctionDef).params
        params = function.params
        if new.star_kwarg is not None:
            return (
                None
                if params.star_kwarg
                else function.with_changes(params=params.with_changes(star_kwarg=new.star_kwarg))
            )
        if params.star_kwarg is not None or params.kwonly_params or isinstance(params.star_arg, cst.Param):
            return None
        return function.with_changes(params=params.with_changes(params=[*params.params, *new.params]))

    return change


def _positional_first(function: cst.FunctionDef, skip: int) -> list[str]:
    return [p.name.value for p in function.params.params][skip:]


def restyled_calls(*, keywords: bool) -> Rewriting:
    """Calls of the attention functions with every argument by keyword, or by position where that is possible."""

    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = dict(program.files)
        done = False
        for kernel in program.kernels:
            definition = function_of(files, kernel)
            names = _positional_first(definition, 0) if definition is not None else []
            for place in program.forwards:

                def change(
                    node: cst.FunctionDef, kernel: Place = kernel, names: list[str] = names
                ) -> cst.FunctionDef | None:
                    new = node
                    for call in calls_in(node.body, [kernel.name]):
                        if any(arg.star for arg in call.args) or len(call.args) > len(names):
                            continue
                        given = {
                            a.keyword.value if a.keyword else n: code(a.value)
                            for a, n in zip(call.args, names, strict=False)
                        }
                        if not keywords and list(given) != names[: len(given)]:
                            continue
                        parts = [f"{n}={v}" if keywords else v for n, v in given.items()]
                        styled = cst.parse_expression(f"{code(call.func)}({', '.join(parts)})")
                        if code(styled) != code(call):
                            new = cst.ensure_type(new.deep_replace(call, styled), cst.FunctionDef)
                    return new if new is not node else None

                done |= edit(files, place, change)
        return files if done else None

    return rewriting


def block_calls_by_keyword(program: Program, rng: random.Random) -> Files | None:
    """The model calls its blocks with every argument by keyword."""
    files = dict(program.files)
    done = False
    for model, place in zip(program.models, program.model_forwards, strict=False):
        for attribute, block in ((model.double, model.double_block), (model.single, model.single_block)):
            definition = function_of(files, Place(block.file, block.name, "forward"))
            if definition is None:
                continue
            names = _positional_first(definition, 1)

            def change(
                node: cst.FunctionDef, attribute: str = attribute, names: list[str] = names
            ) -> cst.FunctionDef | None:
                new = node
                for loop in m.findall(node, m.For()):
                    loop = cst.ensure_type(loop, cst.For)
                    if f"self.{attribute}" not in code(loop.iter):
                        continue
                    for call in calls_in(loop.body, ["block"]):
                        if (
                            any(a.star for a in call.args)
                            or all(a.keyword for a in call.args)
                            or len(call.args) > len(names)
                        ):
                            continue
                        given = [
                            f"{a.keyword.value if a.keyword else n}={code(a.value)}"
                            for a, n in zip(call.args, names, strict=False)
                        ]
                        styled = cst.parse_expression(f"{code(call.func)}({', '.join(given)})")
                        new = cst.ensure_type(new.deep_replace(call, styled), cst.FunctionDef)
                return new if new is not node else None

            done |= edit(files, place, change)
    return files if done else None


def concatenations(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
    """`torch.cat((a, b), 1)` becomes `torch.concat([a, b], dim=1)`."""
    done: list[int] = []

    class Change(cst.CSTTransformer):
        def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
            if code(updated_node.func) != "torch.cat" or len(updated_node.args) != 2:
                return updated_node
            first, second = updated_node.args
            if not isinstance(first.value, cst.Tuple):
                return updated_node
            done.append(1)
            parts = ", ".join(code(e.value) for e in first.value.elements)
            return cst.parse_expression(f"torch.concat([{parts}], dim={code(second.value)})")

    new = function.visit(Change())
    return cst.ensure_type(new, cst.FunctionDef) if done else None


def returned_by_name(function: cst.FunctionDef, place: Place, program: Program) -> cst.FunctionDef | None:
    """`return f(x)` becomes `result = f(x)`, `return result`."""

    def change(line: cst.SimpleStatementLine) -> list[cst.BaseStatement] | None:
        small = line.body[0]
        if not isinstance(small, cst.Return) or small.value is None or isinstance(small.value, cst.Name):
            return None
        text = code(small.value)
        text = f"({text})" if "\n" in text else text
        return [statement(f"result = {text}\n"), statement("return result\n")]

    return on_statements(function, change)


REWRITINGS: dict[str, Rewriting] = {
    "helper for attention": helper_for(attention_calls, "part"),
    "helper for the MLP": helper_for(mlp_calls, "x"),
    "helper for the residual": residual_helper,
    "name for the attention's value": named(attention_calls, argument=False),
    "name for the MLP's value": named(mlp_calls, argument=False),
    "name for the MLP's input": named(mlp_calls, argument=True),
    "name for the last linear's input": named(out_calls, argument=True),
    "name for the first linear's value": named(in_calls, argument=False),
    "variables inlined in the blocks": each(lambda program: program.forwards, inlined),
    "variables inlined in attention": each(lambda program: program.kernels, inlined),
    "attention under `if`": wrapped(attention_calls, "if self is not None"),
    "attention under `if`, else an error": wrapped(
        attention_calls, "if isinstance(self, object)", 'else:\n    raise TypeError("no object")\n'
    ),
    "MLP under `with`": wrapped(mlp_calls, 'with torch.profiler.record_function("mlp")'),
    "last linear under `with`": wrapped(out_calls, 'with torch.profiler.record_function("out")'),
    "steps enumerated": loops(lambda program: program.loops, enumerated),
    "steps in a list": loops(lambda program: program.loops, in_list),
    "steps under `with`": loops(lambda program: program.loops, under_with),
    "steps under `if`": loops(lambda program: program.loops, under_if),
    "blocks enumerated": loops(lambda program: program.model_forwards, enumerated),
    "blocks under `if`": loops(lambda program: program.model_forwards, under_if),
    "extra argument of attention": each(lambda program: program.kernels, _with_parameter("note=None")),
    "extra argument of the blocks": each(lambda program: program.forwards, _with_parameter("note=None")),
    "extra argument of the model": each(lambda program: program.model_forwards, _with_parameter("note=None")),
    "any keywords for the blocks": each(lambda program: program.forwards, _with_parameter("**others")),
    "attention called by keywords": restyled_calls(keywords=True),
    "attention called by position": restyled_calls(keywords=False),
    "blocks called by keywords": block_calls_by_keyword,
    "concat, lists and dim": each(lambda program: [*program.forwards, *program.model_forwards], concatenations),
    "values returned by name": each(lambda program: [*program.forwards, *program.kernels], returned_by_name),
}
