"""Give the repository's own command line the option `--chipmunk-config`.

Every function that a command line runs and that loads the model gets the option, and enables Chipmunk on the model once
it is loaded: functions handed to Fire, commands of typer and click, and code that holds the result of argparse's
`parse_args()`. Elsewhere `CHIPMUNK_CONFIG` or a `chipmunk-config.yml` in the working directory do the same.
"""

from __future__ import annotations

import ast

from chipmunk.registry import Example
from chipmunk.rewrite.ast_nodes import arguments, dotted, elements, last_name
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import COMMAND, variant
from chipmunk.rewrite.repository import External, Function
from chipmunk.rewrite.statements import Assignment, Statement
from chipmunk.rewrite.values import ARGS, PARSING, Place, args_label, flat

NAME = "command-line"
API = 1
VERSION = "1"

OPTION = "chipmunk_config"
HELP = "Chipmunk configuration file"


def rule(context: Context) -> None:
    commands = _commands(context)
    used: set[str] = set()
    for place in context.values.places:
        loads = _loads(context, place) if context.values.is_hot(place) else []
        if not loads:
            continue
        source = place.module.source
        kind = commands.get(id(place.function)) if place.function is not None else None
        parsed = _arguments_name(context, place, loads[0].step)
        if kind is not None and place.function is not None:
            done = _add_option(context, place.function, kind)
            _enable(context, place, loads, OPTION, done, f"the command line runs {place.name}, which loads the model")
        elif parsed is not None:
            used |= parsed[1]
            _enable(
                context,
                place,
                loads,
                f"{parsed[0]}.{OPTION}",
                True,
                f"{place.name} loads the model and has the parsed arguments",
            )
        elif not _hands_on(context, place):
            reason = "the command line's options do not reach this place: set CHIPMUNK_CONFIG instead"
            context.left_dense(source, loads[0].step.node, reason)
    _add_arguments(context, used)


# Finding


def _loads(context: Context, place: Place) -> list[Assignment]:
    """Assignments that get the model from a call: of its constructor, or of a function that returns one."""
    return [
        binding
        for bindings in place.statements.bindings.values()
        for binding in bindings
        if isinstance(binding.value, ast.Call)
        and binding.name != "_"
        and context.values.model_of(context.values.assigned(binding, place)) is not None
        and not _same_name(binding.name, binding.value)
        and not _is_given_it(context, binding.value, binding.step, place)
    ]


def _same_name(name: str, call: ast.Call) -> bool:
    """`model = model.to(device)` loads nothing."""
    return any(dotted(node) == name for node in ast.walk(call))


def _is_given_it(context: Context, call: ast.Call, step: Statement, place: Place) -> bool:
    """`model = unwrap(self.model)` loads nothing either: what is called is given the model."""
    found = (flat(context.values.value(arg, step, place)) for arg in arguments(call))
    return any(context.values.model_of(labels) is not None for labels in found)


def _hands_on(context: Context, place: Place) -> bool:
    """Whether the function returns the model: then its callers are the ones to enable it."""
    return place.function is not None and id(place.function) in context.values.returns


def _commands(context: Context) -> dict[int, str]:
    """Functions that a command-line library runs: function (`id`) → `fire`, `typer` or `click`."""
    found: dict[int, str] = {}
    repository = context.repository
    for path in repository.files_with("Fire("):
        if b"fire" in repository.files[path]:
            for place in _places(context, path):
                for call, step in place.statements.calls if "Fire" in place.words else ():
                    name = last_name(call.func)
                    if "Fire" not in (name, place.module.aliases.get(name)):
                        continue
                    meaning, given = repository.resolve(dotted(call.func), place.names, step), arguments(call)
                    if isinstance(meaning, External) and meaning.name in ("fire.Fire", "fire.core.Fire") and given:
                        for function in _components(context, given[0], step, place):
                            found[id(function)] = "fire"
    for place in context.values.places:
        if place.function is None or not place.function.outline.decorator_list or "command" not in place.words:
            continue
        for decorator in place.function.outline.decorator_list:
            library = _library(context, decorator.func if isinstance(decorator, ast.Call) else decorator, place)
            if library is not None:
                found[id(place.function)] = library
    return found


def _places(context: Context, path: str) -> list[Place]:
    module = context.repository.module(path)
    if module is None:
        return []
    return [Place(module, None), *(Place(module, function) for function in module.all_functions())]


def _components(context: Context, value: ast.expr, step: Statement, place: Place) -> list[Function]:
    """The functions that Fire gets: one, or a dictionary or list of them."""
    values = elements(value) or [value]
    if isinstance(value, ast.Dict):
        values = [each for key, each in zip(value.keys, value.values, strict=True) if key is not None]
    found = [context.repository.resolve(dotted(each), place.names, step) for each in values]
    return [f for f in found if isinstance(f, Function)]


def _library(context: Context, callee: ast.expr, place: Place) -> str | None:
    """`click` for `@click.command`, `typer` for `@app.command` where `app = typer.Typer()`."""
    name = dotted(callee)
    if name is None or name.split(".")[-1] != "command":
        return None
    meaning = context.repository.resolve(name, place.module)
    if isinstance(meaning, External):
        return "click" if meaning.name == "click.command" else None
    for binding in place.module.bindings(name.split(".")[0]):
        if isinstance(binding.value, ast.Call):
            made = context.repository.resolve(dotted(binding.value.func), place.module)
            if isinstance(made, External) and made.name == "typer.Typer":
                return "typer"
    for function in place.module.functions.values():  # a click group is a function itself
        if function.outline.name == name.split(".")[0]:
            return "click"
    return None


def _arguments_name(context: Context, place: Place, step: Statement) -> tuple[str, frozenset[str]] | None:
    """The name under which parsed arguments are at hand at `step`, and the labels of the parsers they come from."""
    own = place.function.parameters if place.function is not None else []
    # Not a global: it would be there only when this very file is the program.
    for name in dict.fromkeys([*own, *place.statements.bindings]):
        if "." not in name:
            labels = flat(context.values.value(ast.Name(name), step, place))
            if any(label.startswith(ARGS) for label in labels):
                return name, labels
    return None


# Changing


def _enable(
    context: Context, place: Place, loads: list[Assignment], option: str, option_done: bool, reason: str
) -> None:
    source = place.module.source
    after: dict[ast.stmt, Assignment] = {_after_branches(context, place, load): load for load in reversed(loads)}
    for statement, load in after.items():
        if _is_enabled(context, place, load.name):
            if option_done:
                context.already(source, load.step.node, "Chipmunk is enabled on the model after it is loaded")
            else:
                context.patched(source, load.step.node, reason)
            continue
        indentation = source.indentation(statement)
        at = _end_of(source.text, source.span(statement)[1])
        context.edit(source, at, at, f"\n{indentation}{context.runtime(source)}.enable({load.name}, {option})")
        others = (
            "; where another branch puts an engine in its place, no patched code runs, and giving the option says so"
        )
        context.patched(source, load.step.node, reason + (others if _has_other(context, place, load) else ""))


def _has_other(context: Context, place: Place, load: Assignment) -> bool:
    """Whether another branch gives the name something that is no model."""
    return any(
        other is node and branch != other_branch and context.values.model_of(context.values.assigned(b, place)) is None
        for b in place.statements.bindings.get(load.name, ())
        for other, other_branch in b.step.chain
        for node, branch in load.step.chain
    )


def _end_of(text: bytes, end: int) -> int:
    """The end of the last line of a statement that ends at `end`, a trailing comment included."""
    if text[end - 1 : end] == b"\n":
        end -= 1
    if text[end - 1 : end] == b"\r":
        end -= 1
    stop = text.find(b"\n", end)
    stop = len(text) if stop < 0 else stop
    return stop - (text[stop - 1 : stop] == b"\r")


def _is_enabled(context: Context, place: Place, name: str) -> bool:
    return any(
        context.runtime_call(call, place.names, step) == "enable" and call.args and dotted(call.args[0]) == name
        for call, step in place.statements.calls
    )


def _after_branches(context: Context, place: Place, binding: Assignment) -> ast.stmt:
    """The statement after which the model is there: the assignment, or an `if` whose every branch assigns the name.

    Where a branch assigns something that is no model (a TensorRT engine, say), `enable` says so if the option is given.
    """
    statement = binding.step.line
    for node, _ in reversed(binding.step.chain):
        if not isinstance(node, ast.If):
            break
        if _assigned_in_all(place, node, binding.name):
            statement = node
    return statement


def _assigned_in_all(place: Place, node: ast.If, name: str) -> bool:
    inside = [b for b in place.statements.bindings.get(name, ()) if any(other is node for other, _ in b.step.chain)]
    branches = {branch for b in inside for other, branch in b.step.chain if other is node}
    if branches < {"body", "orelse"}:
        return False
    inner = node.orelse[0]
    return len(node.orelse) > 1 or not isinstance(inner, ast.If) or _assigned_in_all(place, inner, name)


def _add_option(context: Context, function: Function, kind: str) -> bool:
    """Add the parameter `chipmunk_config`; True if it was there."""
    if OPTION in function.parameters:
        return True
    source = function.source
    annotation = _annotation(function)
    context.append_parameter(source, function.node, f"{OPTION}{annotation}{' = ' if annotation else '='}None")
    if kind == "click":
        indentation = source.indentation(function.outline)
        text = f'@click.option("--chipmunk-config", default=None, help="{HELP}.")'
        at = source.line_at(source.span(function.outline.decorator_list[-1])[1] - 1)[1]
        context.edit(source, at, at, f"\n{indentation}{text}")
    _document(context, function)
    return False


def _annotation(function: Function) -> str:
    """`: str | None`, in the file's own way of saying so; nothing where the signature has no annotations."""
    if function.signature and not any(parameter.annotation for parameter in function.signature):
        return ""
    if function.module.imports.get("Optional") == ("typing", "Optional") and b"| None" not in function.source.text:
        return ": Optional[str]"
    return ": str | None"


def _document(context: Context, function: Function) -> None:
    """A line in the docstring's `Args:` section, after its last entry."""
    source, first = function.source, function.outline.body[0]
    if ast.get_docstring(function.outline) is None:
        return
    start, end = source.span(first)
    lines = source.text[start:end].decode("utf-8").splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if line.strip() in ("Args:", "Arguments:")]
    if not heads or len(lines) <= heads[0] + 1:
        return
    entry = lines[heads[0] + 1]
    indentation = entry[: len(entry) - len(entry.lstrip())]
    last = heads[0] + 1
    for index in range(heads[0] + 1, len(lines) - 1):
        if not lines[index].startswith(indentation):
            break
        last = index
    at = start + len("".join(lines[: last + 1]).encode("utf-8"))
    context.edit(source, at, at, f"{indentation}{OPTION}: {HELP}\n")


def _add_arguments(context: Context, used: set[str]) -> None:
    """Add the option to the parsers whose results reach a place that loads the model."""
    for place in context.values.places_with(PARSING) if used else ():
        for call, step in place.statements.calls:
            if not isinstance(call.func, ast.Attribute) or call.func.attr not in PARSING:
                continue
            name = dotted(call.func.value)
            if name is None or args_label(call, step, place) not in used:
                continue
            source = place.module.source
            if b"--chipmunk-config" in source.text:
                context.already(source, call, "the parser has the option")
                continue
            indentation = source.indentation(step.line)
            text = f'{name}.add_argument("--chipmunk-config", default=None, help="{HELP}")'
            context.insert_before(source, step.line, f"{text}\n{indentation}")
            context.patched(source, call, "the parser of the command line that loads the model")


_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_LOAD = "    model = load_painter(name)\n"
_ENABLE = (_LOAD, _LOAD + "    chipmunk.enable(model, chipmunk_config)\n")
_ARGPARSE = variant(
    COMMAND,
    ("from fire import Fire", "from argparse import ArgumentParser"),
    ('def main(name: str = "small", steps: int = 4):\n', "def main(args):\n    name, steps = args.name, args.steps\n"),
    (
        "    Fire(main)\n",
        '    parser = ArgumentParser()\n    parser.add_argument("--name")\n'
        '    parser.add_argument("--steps", type=int)\n    main(parser.parse_args())\n',
    ),
)

EXAMPLES = (
    Example(
        "a function that no command line runs", "flow/command.py", variant(COMMAND, ("Fire(main)", "main()")), None
    ),
    Example(
        "a command that loads no model",
        "flow/command.py",
        variant(COMMAND, ("load_painter(name)", "print(name)")),
        None,
    ),
    Example(
        "a function run by Fire",
        "flow/command.py",
        COMMAND,
        variant(COMMAND, _IMPORT, _ENABLE, ("steps: int = 4)", "steps: int = 4, chipmunk_config: str | None = None)")),
    ),
    Example(
        "argparse",
        "flow/command.py",
        _ARGPARSE,
        variant(
            _ARGPARSE,
            _IMPORT,
            (_LOAD, _LOAD + "    chipmunk.enable(model, args.chipmunk_config)\n"),
            (
                "    main(parser",
                f'    parser.add_argument("--chipmunk-config", default=None, help="{HELP}")\n    main(parser',
            ),
        ),
    ),
)
