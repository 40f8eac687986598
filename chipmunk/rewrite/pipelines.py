"""Pipelines of diffusers that a repository's code loads: where, of which model, and how far their setting up goes.

What cannot be known is reported as left dense. Used by the patch `diffusers-pipeline`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.repository import Class, External, Function, Meaning
from chipmunk.rewrite.syntax import argument, dotted, parameters, text_of_string, walk
from chipmunk.rewrite.values import Place

_LOADERS = ("from_pretrained", "from_single_file")
_SAME_OBJECT = {"to", "cuda", "cpu"}
_ANY_MODEL = re.compile(r"DiffusionPipeline|ModularPipeline|AutoPipelineFor\w+")
_FLUX = re.compile(r"Flux(?!Prior)\w*Pipeline")
_TRANSFORMER = re.compile(r"(Flux[23]?)Transformer2DModel")
_BLOCKS = "single_transformer_blocks"
_ID = ("pretrained_model_name_or_path", "pretrained_model_or_path", "pretrained_model_link_or_path_or_dict")


@dataclass(frozen=True, eq=False)
class Made:
    """A statement that makes a pipeline and assigns it to `target`."""

    place: Place
    step: Step
    target: cst.BaseExpression
    family: str
    """`Flux`, `Flux2` or `Flux3`."""


def made_pipelines(context: Context) -> list[Made]:
    """Every place where a pipeline of FLUX gets a name."""
    made, returning = _directly_made(context)
    return [*made, *_made_by_functions(context, returning)]


def _directly_made(context: Context) -> tuple[list[Made], dict[Function, str]]:
    """Pipelines that get a name where they are loaded, and functions that return one without: its family."""
    found: list[Made] = []
    returning: dict[Function, str] = {}
    for place in _places(context, ["diffusers", *(f"Pipeline.{name}" for name in _LOADERS)], [*_LOADERS, "from_pipe"]):
        if not _may_load(context, place):
            continue
        named: set[int] = set()
        for step, target, value in _values(place):
            call = _innermost(value)
            if call is None or not isinstance(call.func, cst.Attribute):
                continue
            if call.func.attr.value == "from_pipe" and _class_name(context, call, step, place):
                reason = "it shares the transformer of another pipeline: Chipmunk is enabled where that is loaded"
                context.left_dense(place.module.source, step.node, reason)
                continue
            family = _family(context, call, step, place)
            if family is None:
                continue
            named.add(id(call))
            if _has_patched_transformer(context, call, step, place):
                continue  # which finds its configuration itself
            if _is_without_transformer(call, target, place):
                reason = "it is loaded without its transformer (transformer=None)"
                context.left_dense(place.module.source, step.node, reason)
            elif target is None and place.function is not None:
                returning[place.function] = family
            elif target is not None:
                found.append(Made(place, step, target, family))
        for call, step in place.scope.calls:
            loads = isinstance(call.func, cst.Attribute) and call.func.attr.value in _LOADERS
            if loads and id(call) not in named and _family(context, call, step, place) is not None:
                reason = "the pipeline has no name here: give it one, and chipmunk.enable(…) can stand behind it"
                context.left_dense(place.module.source, call, reason)
    return found, returning


def _is_without_transformer(call: cst.Call, target: cst.BaseExpression | None, place: Place) -> bool:
    """Whether the pipeline is loaded for its other parts, its encoders, say, and given no transformer here later."""
    if not any(a.keyword and a.keyword.value == "transformer" and dotted(a.value) == "None" for a in call.args):
        return False
    later = f"{place.module.source.code(target)}.transformer" if target is not None else None
    return all(dotted(made) != later for step in place.scope.steps for made in _targets(step.node))


def _has_patched_transformer(context: Context, call: cst.Call, step: Step, place: Place) -> bool:
    """Whether the transformer that the pipeline is given is made here, of a class that is patched."""
    given = next((a.value for a in call.args if a.keyword and a.keyword.value == "transformer"), None)
    patched = {model.owner for model in context.models}
    for binding in place.scope.reaching(dotted(given) or "", step) if given is not None and patched else ():
        made = None if binding.value is None else _innermost(binding.value)
        if made is not None:
            loads = isinstance(made.func, cst.Attribute) and made.func.attr.value in _LOADERS
            kind = made.func.value if loads and isinstance(made.func, cst.Attribute) else made.func
            if context.repository.resolve(kind, place.names, binding.step) in patched:
                return True
    return False


def _targets(node: cst.CSTNode) -> list[cst.BaseExpression]:
    return [each.target for each in node.targets] if isinstance(node, cst.Assign) else []


def _may_load(context: Context, place: Place) -> bool:
    """Whether the place may load a pipeline of FLUX, or makes one from another; told without its tree."""
    for call, step in place.statements.calls:
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in (*_LOADERS, "from_pipe"):
            continue
        meaning = context.repository.resolve(ast_nodes.dotted(call.func.value), place.names, step)
        name = _class_of_diffusers(context, meaning)
        if name is not None and (call.func.attr == "from_pipe" or _FLUX.fullmatch(name) or _ANY_MODEL.fullmatch(name)):
            return True
    return False


def _made_by_functions(context: Context, returning: dict[Function, str]) -> Iterator[Made]:
    """Places that give a name to what those functions return."""
    seen: set[Function] = set()
    while returning:
        names = [function.outline.name for function in returning]
        more: dict[Function, str] = {}
        for place in _places(context, names, names):
            for step, target, value in _values(place):
                call = _innermost(value)
                meaning = None if call is None else context.repository.resolve(call.func, place.names, step)
                if call is None or not isinstance(meaning, Function) or meaning not in returning:
                    continue
                if target is not None:
                    yield Made(place, step, target, returning[meaning])
                elif place.function is not None and place.function not in seen:
                    more[place.function] = returning[meaning]
        seen |= returning.keys()
        returning = {function: family for function, family in more.items() if function not in seen}


def _places(context: Context, in_file: Sequence[str], words: Sequence[str]) -> list[Place]:
    """The functions, and the module's own statements, that say one of the words, in files with one of those."""
    found: list[Place] = []
    for path in sorted({path for word in in_file for path in context.repository.files_with(word)}):
        module = context.repository.module(path)
        if module is not None:
            found += [Place(module, None), *(Place(module, function) for function in module.all_functions())]
    return [place for place in found if place.says(words)]


def _values(place: Place) -> Iterator[tuple[Step, cst.BaseExpression | None, cst.BaseExpression]]:
    """What is assigned to something, or returned."""
    for step in place.scope.steps:
        node = step.node
        if isinstance(node, cst.Assign) and len(node.targets) == 1:
            yield step, node.targets[0].target, node.value
        elif isinstance(node, cst.AnnAssign) and node.value is not None:
            yield step, node.target, node.value
        elif isinstance(node, cst.Return) and node.value is not None:
            yield step, None, node.value


def _innermost(value: cst.BaseExpression) -> cst.Call | None:
    """`Class.from_pretrained(…)` of `Class.from_pretrained(…).to(device)`."""
    while isinstance(value, cst.Call):
        func = value.func
        if not (isinstance(func, cst.Attribute) and func.attr.value in _SAME_OBJECT):
            return value
        value = func.value
    return None


def _class_name(context: Context, call: cst.Call, step: Step, place: Place) -> str | None:
    """The class of diffusers whose method is called."""
    assert isinstance(call.func, cst.Attribute)
    return _class_of_diffusers(context, context.repository.resolve(call.func.value, place.names, step))


def _class_of_diffusers(context: Context, meaning: Meaning | None) -> str | None:
    """The class of diffusers that is meant, or that the repository's own class inherits from."""
    repository, found = context.repository, [meaning]
    if isinstance(meaning, Class):
        found = [
            repository.resolve(ast_nodes.dotted(base), owner.module)
            for owner in repository.bases(meaning)
            for base in owner.outline.bases
        ]
        inherits = any(isinstance(each, External) and each.name.split(".")[0] == "diffusers" for each in found)
        found = [each for each in found if isinstance(each, External) and _FLUX.fullmatch(each.name.split(".")[-1])]
        if inherits and not found:
            return _by_transformer(context, meaning)
    for each in found:
        if isinstance(each, External) and each.name.split(".")[0] == "diffusers":
            return each.name.split(".")[-1]
    return None


def _by_transformer(context: Context, owner: Class) -> str | None:
    """What diffusers would call the pipeline, a copy of one, say, going by what its constructor takes."""
    maker = context.repository.method(owner, "__init__")
    given = () if maker is None else (*maker.outline.args.args, *maker.outline.args.kwonlyargs)
    for parameter in given:
        if maker is None or parameter.arg != "transformer" or parameter.annotation is None:
            continue
        meaning = context.repository.resolve(ast_nodes.dotted(parameter.annotation), maker.module)
        if isinstance(meaning, External) and meaning.name.split(".")[0] == "diffusers":
            kind = _TRANSFORMER.fullmatch(meaning.name.split(".")[-1])
            return f"{kind[1]}Pipeline" if kind else None
    return None


def _family(context: Context, call: cst.Call, step: Step, place: Place) -> str | None:
    """`Flux`, `Flux2` or `Flux3`, if the call loads a pipeline of it; what is not known is reported."""
    assert isinstance(call.func, cst.Attribute)
    name = _class_name(context, call, step, place)
    if name is None or call.func.attr.value not in _LOADERS:
        return None
    if _FLUX.fullmatch(name):
        return name[:5] if name[4:5] in ("2", "3") else "Flux"
    if not _ANY_MODEL.fullmatch(name):
        return None
    model = _text(argument(call, 0, *_ID), step, place)
    if model is None:
        reason = "which model it is shows only when it runs: for FLUX, write chipmunk.enable(…) after it yourself"
        context.left_dense(place.module.source, step.node, reason)
        return None
    if "flux" not in model.lower():
        return None
    generation = re.search(r"flux[-_. ]?([23])\b", model.lower())
    return f"Flux{generation[1]}" if generation else "Flux"


def _text(node: cst.CSTNode | None, step: Step, place: Place) -> str | None:
    """The text that an expression stands for: a literal, a name bound to one, or a parameter whose default is one."""
    if not isinstance(node, cst.Name):
        return text_of_string(node)
    scopes = [(place.scope, place.scope.reaching(node.value, step))]
    scopes.append((place.module.scope, place.module.scope.bindings.get(node.value, [])))
    for scope, bindings in scopes:
        if bindings:
            texts = {text_of_string(binding.value) for binding in bindings if binding.path == ()}
            return texts.pop() if len(texts) == 1 else None
        for parameter in parameters(scope.node) if isinstance(scope.node, cst.FunctionDef) else ():
            if parameter.name.value == node.value:
                return text_of_string(parameter.default)
    return None


# Setting up


def last_of_setup(context: Context, made: Made, name: str) -> cst.CSTNode:
    """The last of the statements right behind the one that makes the pipeline which only set it up."""
    last = made.step.statement
    lines = _suite_of(made)
    if made.step.statement not in lines:
        return last
    for statement in lines[lines.index(made.step.statement) + 1 :]:
        if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
            break
        later = lines[lines.index(statement) + 1 :]
        if _sets_up(statement.body[0], name, made) or _is_given(context, statement.body[0], name, made, later):
            last = statement
        elif not _prepares(statement.body[0], name):
            break
    return last


def _suite_of(made: Made) -> list[cst.CSTNode]:
    """The statements among which the pipeline is made."""
    top = made.place.scope.node
    body = top.body if isinstance(top, cst.Module) else top.body.body
    suites: list[list[cst.CSTNode]] = [list(body)]
    for node, _ in made.step.chain:
        suites += [list(part.body) for part in walk(node) if isinstance(part, cst.IndentedBlock)]
    return next((suite for suite in suites if made.step.statement in suite), [])


def _sets_up(small: cst.CSTNode, name: str, made: Made) -> bool:
    """Whether a statement does something to the pipeline without drawing: `pipe.to(…)`, `pipe.scheduler = …`."""
    code = made.place.module.source.code
    if isinstance(small, cst.Assign) and len(small.targets) == 1:
        target = small.targets[0].target
        if code(target) == name:
            return code(small.value).startswith(name + ".")
        return code(target).startswith(name + ".")
    if isinstance(small, cst.Expr) and isinstance(small.value, cst.Call):
        return code(small.value.func).startswith(name + ".") and dotted(small.value.func) is not None
    return False


def _is_given(context: Context, small: cst.CSTNode, name: str, made: Made, later: list[cst.CSTNode]) -> bool:
    """Whether a statement hands the pipeline to a function that changes it, `apply_cache(pipe)`, and draws no picture.

    Or gives it back, `pipe = prepared(pipe)`. A function of the repository that calls what it is given draws, and so
    may one that nothing comes after.
    """
    code = made.place.module.source.code
    call = small.value if isinstance(small, cst.Expr) else None
    if isinstance(small, cst.Assign) and len(small.targets) == 1 and code(small.targets[0].target) == name:
        call = small.value
    if not isinstance(call, cst.Call) or dotted(call.func) in (None, "print") or not call.args:
        return False
    if code(call.args[0].value) not in (name, f"{name}.transformer") or not any(name in code(node) for node in later):
        return False
    meaning = context.repository.resolve(call.func, made.place.names, made.step)
    if isinstance(meaning, Function):
        given = set(meaning.scope.parameters)
        return all(dotted(inner.func) not in given for inner, _ in meaning.scope.calls)
    return isinstance(meaning, External)


def _prepares(small: cst.CSTNode, name: str) -> bool:
    """Whether a statement between them only imports or makes something that the pipeline has no part in."""
    if isinstance(small, (cst.Import, cst.ImportFrom)):
        return True
    if not isinstance(small, cst.Assign) or (dotted(small.value) or "").startswith(name.split(".")[0]):
        return False
    calls = [node for node in walk(small.value) if isinstance(node, cst.Call)]
    used = [dotted(part) or "" for call in calls for part in (call.func, *(arg.value for arg in call.args))]
    mentioned = any(isinstance(node, cst.Name) and node.value == name.split(".")[0] for node in walk(small.value))
    reads = [part for part in used if part.startswith(name + ".")]  # mesh_of(pipe.device.type)
    drawn = any((dotted(call.func) or "").startswith(name) for call in calls) or name in used
    return not mentioned or (bool(reads) and not drawn)


# Transformers


def running_blocks(context: Context) -> Iterator[Function]:
    """Functions that do the work of a transformer's forward, told by the loop over its last blocks.

    Those whose first parameter is `self` are put in the place of the forward, where Chipmunk finds them.
    """
    for path in sorted(context.repository.files_with(_BLOCKS)):
        module = context.repository.module(path)
        for function in module.all_functions() if module is not None else ():
            given = function.owner is None and function.parameters[:1] not in ([], ["self"])
            if given and _BLOCKS in function.words and any(map(_runs_them, _own_statements(function.outline.body))):
                yield function


def _own_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements, but those of functions that are defined among them."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for name in ("body", "orelse", "finalbody"):
                yield from _own_statements(getattr(statement, name, []))


def _runs_them(node: ast.stmt) -> bool:
    """Whether it is `for block in model.single_transformer_blocks` with `x = block(x)` or `x = run(block, x)` in it.

    Or with `given = {"self": block, "x": x}`, to be given to a function.
    """
    if not isinstance(node, ast.For) or not any(
        isinstance(part, ast.Attribute) and part.attr == _BLOCKS for part in ast.walk(node.iter)
    ):
        return False
    elements = {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
    for inner in _own_statements(node.body):
        if isinstance(inner, ast.Assign) and not isinstance(inner.targets[0], ast.Attribute):
            value, called = inner.value, list[ast.expr]()
            if isinstance(value, ast.Call):
                called = [value.func, *value.args[:1], *(k.value for k in value.keywords[:1])]
            elif isinstance(value, ast.Dict) and len(value.values) > 1:
                called = value.values[:1]
            if any(isinstance(part, ast.Name) and part.id in elements for part in called):
                return True
    return False
