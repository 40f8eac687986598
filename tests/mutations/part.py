"""The part of a large repository that a mutant holds: some files, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from chipmunk.rewrite.repository import Repository

from .program import Files


def part_of(files: Files, roots: Iterable[str]) -> Files:
    """`roots` (files, or folders that end in a slash), what they import, and the packages around all of these.

    What a package's own `__init__.py` imports is followed only for the names that are asked of it: such a file names
    everything that there is. Everything else is followed to the end.
    """
    repository = Repository({path: text.encode() for path, text in files.items()})
    imports: dict[str, list[tuple[str, str | None]]] = {}
    wanted = [
        (path, None) for path in files if any(path == r or (r.endswith("/") and path.startswith(r)) for r in roots)
    ]
    if not wanted:
        raise ValueError(f"none of {', '.join(roots)} is in the repository")
    seen: set[tuple[str, str | None]] = set()
    while wanted:
        path, name = wanted.pop()
        if (path, name) in seen:
            continue
        seen.add((path, name))
        if path not in imports:
            imports[path] = list(_imports(files[path]))
        for module, imported in imports[path]:
            if name is not None and imported not in (name, "*"):
                continue
            # `from package import module` means the module's file, if there is one.
            inner = f"{module}{imported}" if not module.strip(".") else f"{module}.{imported}"
            if imported not in (None, "*") and (found := repository.find_module(inner, path)) is not None:
                wanted.append((found, None))
            elif (found := repository.find_module(module, path)) is not None:
                asked = name if imported == "*" else imported
                wanted.append((found, asked if found.endswith("__init__.py") else None))
    kept = {path for path, _ in seen}
    for path in list(kept):
        folders = path.split("/")[:-1]
        kept.update("/".join([*folders[: i + 1], "__init__.py"]) for i in range(len(folders)))
    return {path: text for path, text in files.items() if path in kept}


def _imports(text: str) -> Iterator[tuple[str, str | None]]:
    """Module and name of every import outside functions; no name for `import module`."""
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))
