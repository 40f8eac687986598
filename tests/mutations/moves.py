"""Parts moved between files, into other classes, or imported in another way."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable

import libcst as cst
import libcst.matchers as m

from .names import Rewriting, fresh
from .program import Files, Program, add_method, edit, function_of, insert_top
from .trees import code, statement

# Moves


def _moved(program: Program, wanted: dict[str, list[str]], rng: random.Random) -> Files | None:
    """Move functions and classes (path → names) each into a new file beside theirs, which imports them back.

    What a moved part uses of its old file is imported where it is used, as the two files need one another.
    """
    files = dict(program.files)
    for path, names in wanted.items():
        tree = ast.parse(files[path])
        lines = files[path].splitlines(keepends=True)
        top = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        imports = "".join(
            "".join(lines[n.lineno - 1 : n.end_lineno]) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)
        )
        moving = [name for name in names if name in top]
        if not moving or path.endswith("__init__.py"):
            continue
        # What the moved parts need of their file moves with them, and so on.
        needed = list(moving)
        assigned = {
            t.id: n for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        for name in needed:
            node = top.get(name) or assigned[name]
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and part.id in {**top, **assigned} and part.id not in needed:
                    needed.append(part.id)
        if set(needed) >= top.keys():
            continue  # everything would go
        nodes = [node for node in tree.body if any(node is (top.get(n) or assigned.get(n)) for n in needed)]
        stem = fresh(rng, "x")
        module = program.module_of(path)
        new_path = path.rpartition("/")[0] + ("/" if "/" in path else "") + stem + ".py"
        new_module = ".".join([*module.split(".")[:-1], stem])
        moved_text = imports
        gone: set[int] = set()
        for node in nodes:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            assert node.end_lineno is not None
            moved_text += "\n\n" + "".join(lines[first - 1 : node.end_lineno])
            gone.update(range(first - 1, node.end_lineno))
        rest = "".join(line for number, line in enumerate(lines) if number not in gone)
        files[path] = insert_top(rest, f"from {new_module} import {', '.join(sorted(needed))}\n")
        files[new_path] = moved_text
    return files if files != program.files else None


def _by_path(places: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, name in places:
        found.setdefault(path, []).append(name)
    return found


def move_attention(program: Program, rng: random.Random) -> Files | None:
    return _moved(program, _by_path((place.path, place.name) for place in program.kernels), rng)


def move_blocks(program: Program, rng: random.Random) -> Files | None:
    return _moved(program, _by_path(program.blocks), rng)


def move_one_block(program: Program, rng: random.Random) -> Files | None:
    return _moved(program, _by_path([rng.choice(program.blocks)]), rng)


def move_model(program: Program, rng: random.Random) -> Files | None:
    return _moved(program, _by_path((model.file, model.name) for model in program.models), rng)


def move_loops(program: Program, rng: random.Random) -> Files | None:
    return _moved(program, _by_path((p.path, p.owner or p.name) for p in program.loops), rng)


def class_order(program: Program, rng: random.Random) -> Files | None:
    """The blocks' classes at the end of their file, the last of them first."""
    files = dict(program.files)
    for path, names in _by_path(program.blocks).items():
        module = cst.parse_module(files[path])
        blocks = [s for s in module.body if isinstance(s, cst.ClassDef) and s.name.value in names]
        bases = {code(base.value) for s in module.body if isinstance(s, cst.ClassDef) for base in s.bases}
        if len(blocks) < 2 or bases & set(names):
            continue
        others = [s for s in module.body if s not in blocks]
        files[path] = module.with_changes(body=[*others, *reversed(blocks)]).code
        if "from __future__ import annotations" not in files[path]:
            docstring = bool(ast.get_docstring(ast.parse(files[path])))
            if docstring:
                return None
            files[path] = "from __future__ import annotations\n\n" + files[path]
    return files if files != program.files else None


# Classes


def forward_delegates(program: Program, rng: random.Random) -> Files | None:
    """A block's forward hands on to a method that does the work."""
    files = dict(program.files)
    done = False
    for place in program.forwards:
        function = function_of(files, place)
        if function is None or place.name != "forward" or place.owner is None:
            continue
        params = function.params
        if params.star_kwarg or isinstance(params.star_arg, cst.Param) or params.kwonly_params or params.posonly_params:
            continue
        names = [p.name.value for p in params.params]
        edit(files, place, lambda node: node.with_changes(name=cst.Name("_forward_inner")))
        head = code(params)
        method = f"\ndef forward({head}):\n    return {names[0]}._forward_inner({', '.join(names[1:])})\n"
        files[place.path] = add_method(files[place.path], place.owner, method)
        done = True
    return files if done else None


def inherited(program: Program, rng: random.Random) -> Files | None:
    """Everything of a block moves into a base class of its own."""
    files = dict(program.files)
    for path, name in program.blocks:
        base = name + "Base"
        module = cst.parse_module(files[path])
        body: list[cst.BaseStatement | cst.SimpleStatementLine] = []
        for part in module.body:
            if isinstance(part, cst.ClassDef) and part.name.value == name:
                body.append(part.with_changes(name=cst.Name(base)))
                body.append(statement(f"\n\nclass {name}({base}):\n    pass\n"))
            else:
                body.append(part)
        files[path] = module.with_changes(body=body).code
    return files if files != program.files else None


def decorated(program: Program, rng: random.Random) -> Files | None:
    """A decorator that changes nothing on forwards, attention and loops."""
    files = dict(program.files)
    name = fresh(rng, "x")
    decorator = cst.Decorator(cst.Name(name))
    changed: set[str] = set()
    for place in dict.fromkeys([*program.forwards, *program.kernels, *program.loops, *program.model_forwards]):
        if edit(files, place, lambda node: node.with_changes(decorators=[decorator, *node.decorators])):
            changed.add(place.path)
    for path in changed:
        files[path] = insert_top(files[path], f"\n\ndef {name}(function):\n    return function\n")
    return files


def lookalikes(program: Program, rng: random.Random) -> Files | None:
    """Unused classes and functions of like names beside the real ones."""
    files = dict(program.files)
    for path in program.core:
        files[path] = files[path].rstrip("\n") + (
            "\n\n\nclass AttentionMlpBlock:\n    def forward(self, img, txt):\n"
            "        for block in self.double_blocks:\n"
            "            img = block(img)\n        return img\n\n\n"
            "def attention_of(q, k, v):\n    return (q @ k.transpose(-1, -2)).softmax(-1) @ v\n"
        )
    return files


# Imports


def _aliased(program: Program, *, module: bool) -> Files | None:
    """`from a.b import c` of the repository's own becomes `… as c_`, or `import a.b as b_` with `b_.c`."""
    files = dict(program.files)
    own = {program.module_of(path) for path in files}
    for path in program.core:
        tree = cst.parse_module(files[path])
        names: dict[str, cst.BaseExpression] = {}

        class Change(cst.CSTTransformer):
            depth = 0

            def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
                self.depth += 1

            def leave_FunctionDef(
                self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
            ) -> cst.FunctionDef:
                self.depth -= 1
                return updated_node

            def leave_SimpleStatementLine(
                self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
            ) -> cst.SimpleStatementLine:
                small = updated_node.body[0]
                if self.depth or not isinstance(small, cst.ImportFrom) or isinstance(small.names, cst.ImportStar):
                    return updated_node
                name = "." * len(small.relative) + (code(small.module) if small.module else "")
                if name not in own or any(alias.asname for alias in small.names):
                    return updated_node
                given = [alias.evaluated_name for alias in small.names]
                if module:
                    short = name.split(".")[-1] + "_module"
                    names.update({n: cst.parse_expression(f"{short}.{n}") for n in given})  # noqa: B023
                    return cst.ensure_type(statement(f"import {name} as {short}\n"), cst.SimpleStatementLine)
                names.update({n: cst.Name(n + "_") for n in given})  # noqa: B023
                parts = ", ".join(f"{n} as {n}_" for n in given)
                return cst.ensure_type(statement(f"from {name} import {parts}\n"), cst.SimpleStatementLine)

        class Use(cst.CSTTransformer):
            def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
                return False

            def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
                return updated_node.with_changes(attr=original_node.attr)

            def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
                return updated_node.with_changes(keyword=original_node.keyword)

            def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
                return names.get(updated_node.value, updated_node)  # noqa: B023

        changed = tree.visit(Change())
        bound = {code(n.target) for n in m.findall(changed, m.AssignTarget())} | {
            cst.ensure_type(n, cst.Param).name.value for n in m.findall(changed, m.Param())
        }
        if names and not bound & names.keys():
            files[path] = changed.visit(Use()).code
    return files if files != program.files else None


def import_aliases(program: Program, rng: random.Random) -> Files | None:
    return _aliased(program, module=False)


def import_modules(program: Program, rng: random.Random) -> Files | None:
    return _aliased(program, module=True)


def functional_alias(program: Program, rng: random.Random) -> Files | None:
    """`torch.nn.functional.f` becomes `functional_.f`."""
    files = dict(program.files)
    for path in program.core:
        if "torch.nn.functional.s" in files[path]:
            text = files[path].replace("torch.nn.functional.s", "functional_.s")
            files[path] = insert_top(text, "import torch.nn.functional as functional_\n")
    return files if files != program.files else None


def sdpa_by_name(program: Program, rng: random.Random) -> Files | None:
    """The attention function gets a name of its own."""
    files = dict(program.files)
    name = "scaled_dot_product_attention"
    for path in program.core:
        for prefix in ("torch.nn.functional.", "F."):
            if prefix + name + "(" in files[path]:
                text = files[path].replace(prefix + name + "(", "attend_exactly(")
                files[path] = insert_top(text, f"from torch.nn.functional import {name} as attend_exactly\n")
                break
    return files if files != program.files else None


REWRITINGS: dict[str, Rewriting] = {
    "attention moved to a file": move_attention,
    "blocks moved to a file": move_blocks,
    "one block moved to a file": move_one_block,
    "model moved to a file": move_model,
    "loops moved to a file": move_loops,
    "blocks in another order": class_order,
    "forward hands on": forward_delegates,
    "blocks inherit everything": inherited,
    "decorators": decorated,
    "lookalikes": lookalikes,
    "imports with aliases": import_aliases,
    "modules imported": import_modules,
    "functional with an alias": functional_alias,
    "SDPA with a name": sdpa_by_name,
}
