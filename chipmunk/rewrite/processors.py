"""Processors of the repository's own that users put into attention modules of another package, when they run it.

The blocks of a copied transformer make modules of diffusers' class `Attention`, whose work a processor does. Which one
is decided later: by what a script or a helper sets on the model. What is read here tells what such processors may do.
"""

from __future__ import annotations

import ast
from pathlib import PurePosixPath

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository

_SETTERS = (b"set_attn_processor(", b".set_processor(", b".processor = ")
_CALLED_WITH = ["attn", "hidden_states"]


def set_later(repository: Repository, owner: Class, attribute: str) -> list[Function]:
    """What processors run that may be given to the attention module of another package in `self.<attribute>`.

    Their classes are called like processors, and have objects in a file that sets some: one near the owner's own, or
    one that imports from that.
    """
    made = [
        repository.resolve(ast_nodes.dotted(value.func), maker, at)
        for value, maker, at in repository.assigned(owner, attribute)
        if isinstance(value, ast.Call)
    ]
    if not any(isinstance(meaning, External) and "attention" in meaning.name.lower() for meaning in made):
        return []
    found: list[Function] = []
    for path in repository.files_where(lambda text: any(name in text for name in _SETTERS), _SETTERS):
        module = repository.module(path)
        if module is None:
            continue
        names = [name for name in (*module.imports, *module.classes) if f"{name}(".encode() in repository.files[path]]
        for meaning in [repository.resolve(name, module) for name in names]:
            run = _work(repository, meaning) if isinstance(meaning, Class) else None
            if run is not None and run not in found and _is_near(repository, owner, module, run):
                found.append(run)
    return found


def _work(repository: Repository, owner: Class) -> Function | None:
    methods = (repository.method(owner, name) for name in ("forward", "__call__"))
    return next((m for m in methods if m is not None and m.parameters[1:3] == _CALLED_WITH), None)


def _is_near(repository: Repository, owner: Class, setter: Module, run: Function) -> bool:
    """Whether the file that sets it, or its own, is in the owner's folder or next to it, or imports the owner's."""
    home = PurePosixPath(owner.module.path).parent
    for module in (setter, run.module):
        folder = PurePosixPath(module.path).parent
        if folder == home or folder.parent == home or home.parent == folder:
            return True
        imports = (repository.resolve(name, module) for name in module.imports)
        if any(isinstance(meaning, Class) and meaning.module is owner.module for meaning in imports):
            return True
    return False
