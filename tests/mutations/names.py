"""Other names: classes, functions, attributes, parameters, variables and files, the same ones in all files."""

from __future__ import annotations

import ast
import builtins
import keyword
import random
import re
from collections.abc import Callable, Iterable
from functools import cache

import libcst as cst

from .program import Files, Place, Program, edit, function_of

Rewriting = Callable[[Program, random.Random], Files | None]

_MEANT = re.compile(r"(?!__)[A-Za-z_]\w+")


def fresh(rng: random.Random, like: str) -> str:
    """A name that no repository has, in the style of `like`."""
    text = "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
    return text.capitalize() + "X" if like[:1].isupper() else f"{text}_{rng.randrange(100)}"


def rename_words(program: Program, words: Iterable[str], rng: random.Random) -> Files | None:
    """Each word replaced wherever it stands by itself. Words that are not the repository's own stay."""
    taken = _taken(program)
    names = {word: fresh(rng, word) for word in sorted(set(words)) if _MEANT.fullmatch(word) and word not in taken}
    if not names:
        return None
    pattern = re.compile(r"(?<![\w])(?:" + "|".join(sorted(names, key=len, reverse=True)) + r")(?!\w)")
    files = {path: pattern.sub(lambda m: names[m.group()], text) for path, text in program.files.items()}
    return files if files != program.files else None


def _taken(program: Program) -> set[str]:
    """Names with a meaning outside the repository, and those of its files."""
    taken = {*dir(builtins), *keyword.kwlist, "forward", "self", "cls", "dtype", "device", "weight", "bias", "scale"}
    taken |= {
        "dim",
        "shape",
        "norm",
        "proj",
        "heads",
        "name",
        "model",
        "args",
        "kwargs",
        "theta",
        "eps",
        "train",
        "main",
    }
    own = {program.module_of(path) for path in program.files}
    for path, text in program.files.items():
        taken.update(path.removesuffix(".py").split("/"))
        for module, level, names in _imports(text):
            taken.update(module.split("."))
            if level == 0 and module not in own:
                taken.update(part for name in names for part in name.split("."))
    return taken


@cache
def _imports(text: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """Module, number of leading dots, and names of each import; mutants share most of their files."""
    return [
        (getattr(node, "module", None) or "", getattr(node, "level", 0), tuple(alias.name for alias in node.names))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def model_class(program: Program, rng: random.Random) -> Files | None:
    return rename_words(program, {model.name for model in program.models}, rng)


def block_classes(program: Program, rng: random.Random) -> Files | None:
    return rename_words(program, {name for _, name in program.blocks}, rng)


def all_classes(program: Program, rng: random.Random) -> Files | None:
    names = {
        node.name
        for path in program.core
        for node in ast.walk(ast.parse(program.files[path]))
        if isinstance(node, ast.ClassDef)
    }
    return rename_words(program, names, rng)


def attention_functions(program: Program, rng: random.Random) -> Files | None:
    return rename_words(program, {place.name for place in program.kernels}, rng)


def block_lists(program: Program, rng: random.Random) -> Files | None:
    return rename_words(program, {name for m in program.models for name in (m.double, m.single)}, rng)


def mlp_attributes(program: Program, rng: random.Random) -> Files | None:
    blocks = [b for m in program.models for b in (m.double_block, m.single_block)]
    return rename_words(program, {n for b in blocks for n in (b.mlp, b.linear_in, b.linear_out) if n}, rng)


def block_attributes(program: Program, rng: random.Random) -> Files | None:
    names: set[str] = set()
    for path, name in program.blocks:
        for node in ast.walk(ast.parse(program.files[path])):
            if isinstance(node, ast.ClassDef) and node.name == name:
                for part in ast.walk(node):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        names.add(part.attr)
    return rename_words(program, names, rng)


def model_parameters(program: Program, rng: random.Random) -> Files | None:
    names = {name for m in program.models for name in (m.image, m.ids) if name}
    return rename_words(program, names | {"txt", "txt_ids", "timesteps", "guidance"}, rng)


def loop_functions(program: Program, rng: random.Random) -> Files | None:
    return rename_words(program, {place.name for place in program.loops}, rng)


def locals_of(places: Callable[[Program], list[Place]]) -> Rewriting:
    """Local variables (no parameters) of some functions."""

    def rewriting(program: Program, rng: random.Random) -> Files | None:
        files = dict(program.files)
        done = False
        for place in places(program):
            done |= edit(files, place, lambda node: _renamed_locals(node, rng))
        return files if done else None

    return rewriting


def _renamed_locals(function: cst.FunctionDef, rng: random.Random) -> cst.FunctionDef | None:
    tree = ast.parse(cst.Module([]).code_for_node(function).lstrip())
    node = tree.body[0]
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    given = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    given |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    inner = {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
    inner |= {n.arg for part in ast.walk(node) if isinstance(part, ast.Lambda) for n in part.args.args}
    shared = {n for part in ast.walk(node) if isinstance(part, ast.Nonlocal | ast.Global) for n in part.names}
    imported = {
        (a.asname or a.name) for p in ast.walk(node) if isinstance(p, ast.Import | ast.ImportFrom) for a in p.names
    }
    bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = {name: fresh(rng, "x") for name in sorted(bound - given - inner - shared - imported) if name != "_"}
    if not names:
        return None

    class Rename(cst.CSTTransformer):
        def visit_Attribute_attr(self, node: cst.Attribute) -> None:
            self.skipped = node.attr

        def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.Attribute:
            return updated_node.with_changes(attr=original_node.attr)

        def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
            return updated_node.with_changes(keyword=original_node.keyword)

        def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
            return updated_node.with_changes(value=names.get(updated_node.value, updated_node.value))

    changed = function.visit(Rename())
    assert isinstance(changed, cst.FunctionDef)
    return changed


def files_of_core(program: Program, rng: random.Random) -> Files | None:
    """Other names for the files that hold models, blocks and attention, where no `__init__.py` is among them."""
    moved = {path: path for path in program.core if not path.endswith("__init__.py") and "/" in path}
    words: dict[str, str] = {}
    own = [part for path in program.files for part in path.removesuffix(".py").split("/")[:-1]]
    stems = [path.removesuffix(".py").split("/")[-1] for path in program.files]
    for path in list(moved):
        stem = path.removesuffix(".py").split("/")[-1]
        if stems.count(stem) > 1 or stem in own:  # what an import means by the name is not seen in its text
            continue
        words[stem] = fresh(rng, "x")
        moved[path] = path.removesuffix(stem + ".py") + words[stem] + ".py"
    if not words:
        return None
    files: Files = {}
    imports = re.compile(r"^([ \t]*(?:from[ \t].*?[ \t]import|import)\b)(.*)$", re.MULTILINE)
    paths = re.compile(r"(?<=[ .])(?:" + "|".join(words) + r")(?=[ .\n]|$)")
    own += stems

    def line(match: re.Match[str]) -> str:
        head, rest = match.groups()
        module = head.split()[1] if head.split()[0] == "from" else rest.split()[0]
        if not (module.startswith(".") or module.split(".")[0] in own):
            return match.group()
        head = paths.sub(lambda m: words[m.group()], head)
        relative = head.split()[0] == "from" and (module.strip(".") == "" or module.split(".")[-1] not in words)
        is_package = any(
            path.endswith("/".join([*module.strip(".").split("."), "__init__.py"])) for path in program.files
        )
        if head.split()[0] == "import" or (relative and (is_package or module.strip(".") == "")):
            rest = re.sub(r"\b(" + "|".join(words) + r")\b", lambda m: f"{words[m.group()]} as {m.group()}", rest)
        return head + rest

    for path, text in program.files.items():
        files[moved.get(path, path)] = imports.sub(line, text)
    return files


REWRITINGS: dict[str, Rewriting] = {
    "rename the model's class": model_class,
    "rename the blocks' classes": block_classes,
    "rename every class of the model's files": all_classes,
    "rename the attention functions": attention_functions,
    "rename the lists of blocks": block_lists,
    "rename the MLPs and linears": mlp_attributes,
    "rename every attribute of the blocks": block_attributes,
    "rename the model's parameters": model_parameters,
    "rename the loops": loop_functions,
    "rename variables of the blocks": locals_of(lambda program: program.forwards),
    "rename variables of the model": locals_of(lambda program: program.model_forwards),
    "rename variables of the loops": locals_of(lambda program: program.loops),
    "rename variables of attention": locals_of(lambda program: program.kernels),
    "rename the files": files_of_core,
}

__all__ = ["REWRITINGS", "fresh", "function_of", "rename_words"]
