"""What a patch's rule works with: the repository, the models found in it, and the edits and sites it reports."""

from __future__ import annotations

import ast
from functools import cached_property

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.growth import grow
from chipmunk.rewrite.imports import PACKAGE, import_edit, runtime_name
from chipmunk.rewrite.layout import Bounds, bounds_of, laid_out, limit_of
from chipmunk.rewrite.loops import Loops, find_loops
from chipmunk.rewrite.plan import LoopFacts, ModelFacts, Site, SiteStatus
from chipmunk.rewrite.repository import External, Function, Module, Repository
from chipmunk.rewrite.roles import Model, Roles
from chipmunk.rewrite.source import Edit, Node, Source
from chipmunk.rewrite.statements import Indexed
from chipmunk.rewrite.syntax import dotted, parameters
from chipmunk.rewrite.values import Values

RUNTIME = {
    "activate", "attention", "blocks", "cat_linear", "enable", "gated", "held_linear", "hidden", "layer", "mlp",
    "mlp_linear", "model_forward", "out_linear", "slot", "split_held", "split_linear", "steps",
}  # fmt: skip
"""The runtime's functions that rules insert."""


Matched = str | Node | None


class Context:
    """One run of all rules over a repository. Rules call `replace`, `insert` and their like, then report a site."""

    def __init__(self, repository: Repository, roles: Roles, *, again: bool = False) -> None:
        """`again`: this is the second run, over what the first one made. All that it is asked is what it would change
        once more: what is done needs no reasons, and no site its lines.
        """
        self.again = again
        self.repository = repository
        self.models: list[Model] = roles.models
        self.roles = roles
        self.edits: dict[str, set[Edit]] = {}
        self.sites: dict[tuple[str, int, str, str], Site] = {}
        self.loops: dict[int, list[LoopFacts]] = {}
        """Sampling loops, by the model's place in `models`."""
        self.installed: list[ModelFacts] = []
        """Models of installed packages that the repository's code is told to enable Chipmunk on."""
        self.cached_steps: set[int] = set()
        """Places in `models` of those whose steps can be skipped."""
        self.patch = ""
        """Name of the patch whose rule is running."""
        self._needs_import: set[str] = set()

    @cached_property
    def values(self) -> Values:
        """Where the models go in the repository; worked out when first asked for."""
        return grow(self.repository, self.models)

    @cached_property
    def sampling(self) -> Loops:
        """The loops that call the models; worked out when first asked for."""
        return find_loops(self)

    # Reporting

    def site(self, source: Source, node: Node, status: SiteStatus, reason: str, *, matched: Matched = None) -> None:
        """Report one place. Reported twice, through two models say, it is listed once: patched wins over left dense.

        matched: what was matched there, or the node with its text; without it the text of `node`.
        """
        if self.again:
            self.sites[source.path, id(node), self.patch, ""] = Site(source.path, 0, self.patch, status, "", reason)
            return
        text = matched if isinstance(matched, str) and matched else source.summary(matched or node)
        site = Site(source.path, source.line(node), self.patch, status, text, reason)
        key = (site.file, site.line, site.patch, site.matched)
        ranks = [SiteStatus.LEFT_DENSE, SiteStatus.ALREADY, SiteStatus.REFUSED, SiteStatus.PATCHED]
        known = self.sites.get(key)
        if known is None or ranks.index(known.status) < ranks.index(status):
            self.sites[key] = site

    def patched(self, source: Source, node: Node, reason: str, *, matched: Matched = None) -> None:
        self.site(source, node, SiteStatus.PATCHED, reason, matched=matched)

    def already(self, source: Source, node: Node, reason: str, *, matched: Matched = None) -> None:
        self.site(source, node, SiteStatus.ALREADY, reason, matched=matched)

    def left_dense(self, source: Source, node: Node, reason: str, *, matched: Matched = None) -> None:
        self.site(source, node, SiteStatus.LEFT_DENSE, reason, matched=matched)

    def line(self, source: Source, node: Node) -> int:
        """The line on which the node starts; 0 where lines are not needed."""
        return 0 if self.again else source.line(node)

    # Names

    def runtime(self, source: Source) -> str:
        """The name of the runtime in this file (`chipmunk`), which will be imported if it is not yet."""
        name, imported = runtime_name(source)
        if not imported:
            self._needs_import.add(source.path)
        return name

    def runtime_call(self, node: Node | None, function: Function | Module, step: Indexed | None = None) -> str | None:
        """`attention` if the node calls `chipmunk.attention`, whatever the import is called; None otherwise."""
        if isinstance(node, ast.Call):
            name = ast_nodes.dotted(node.func)
        else:
            name = dotted(node.func) if isinstance(node, cst.Call) else None
        if name is None or name.split(".")[-1] not in RUNTIME:
            return None
        meaning = self.repository.resolve(name, function, step)
        if isinstance(meaning, External) and meaning.name.startswith(PACKAGE + ".") and meaning.name.count(".") == 1:
            return meaning.name.split(".")[1]
        return None

    # Editing

    def edit(self, source: Source, start: int, end: int, text: str) -> None:
        """Replace the bytes `start:end` of the file's text."""
        self.edits.setdefault(source.path, set()).add(Edit(start, end, text.replace("\n", source.newline)))

    def replace(self, source: Source, node: Node, text: str) -> None:
        self.edit(source, *source.span(node), text)

    def insert_before(self, source: Source, node: Node, text: str) -> None:
        start = source.span(node)[0]
        self.edit(source, start, start, text)

    def insert_after(self, source: Source, node: Node, text: str) -> None:
        end = source.span(node)[1]
        self.edit(source, end, end, text)

    def prepend_arguments(
        self, source: Source, call: cst.Call, texts: list[str], *, drop_keyword: bool = False
    ) -> None:
        """Put arguments before the call's first, each on its own line if the first has one.

        drop_keyword: the first, where it is given by its keyword, becomes positional.
        """
        first = call.args[0]
        separator = ", "
        if source.starts_line(first) and self._alone(source, first):
            separator = ",\n" + source.indentation(first)
        start = source.span(first)[0]
        end = source.span(first.value)[0] if drop_keyword else start
        self.edit(source, start, end, "".join(text + separator for text in texts))

    def append_argument(self, source: Source, call: cst.Call, text: str) -> None:
        """Put an argument after the call's last."""
        if call.args:
            self._append(source, call.args[-1], text)
        else:
            at = source.span(call)[1] - 1 - sum(1 for _ in call.rpar)
            self.edit(source, at, at, text)

    def append_parameter(self, source: Source, function: cst.FunctionDef, text: str) -> None:
        """Put a named parameter at the end of the signature, before `**kwargs`."""
        names = function.params
        items: list[cst.CSTNode] = list(parameters(function))
        if isinstance(names.star_arg, cst.Param) and not names.kwonly_params:
            items.append(names.star_arg)
        if (
            not names.params
            and not names.kwonly_params
            and not isinstance(names.star_arg, cst.Param)
            and names.posonly_params
        ):
            assert isinstance(names.posonly_ind, cst.ParamSlash)
            items.append(names.posonly_ind)
        if items:
            self._append(source, items[-1], text)
        elif names.star_kwarg is not None:
            self.insert_before(source, names.star_kwarg, text + ", ")
        else:
            start = source.span(function.name)[1]
            at = source.text.index(b"(", start) + 1
            self.edit(source, at, at, text)

    def _append(self, source: Source, item: cst.CSTNode, text: str) -> None:
        """Put `text` after `item` of a list in parentheses, in the list's own style."""
        end = source.span(item)[1]
        comma = getattr(item, "comma", None)
        has_comma = isinstance(comma, cst.Comma)
        if source.starts_line(item) and self._alone(source, item):
            line_end = source.line_at(end)[1]
            indentation = source.indentation(item)
            if not has_comma and line_end == end:
                self.edit(source, end, end, f",\n{indentation}{text}")
                return
            if not has_comma:
                self.edit(source, end, end, ",")
            self.edit(source, line_end, line_end, f"\n{indentation}{text}" + ("," if has_comma else ""))
        else:
            self.edit(source, end, end, f", {text}")

    @staticmethod
    def _alone(source: Source, item: cst.CSTNode) -> bool:
        """Whether nothing but a comma and a comment follows the item on its line."""
        end = source.span(item)[1]
        rest = source.text[end : source.line_at(end)[1]].decode("utf-8").strip().removeprefix(",").strip()
        return not rest or rest.startswith("#")

    # Results

    def results(self) -> dict[str, Source]:
        """Each changed file, imports added. Raises OverlapError, or SourceError for what is no Python."""
        return {path: self._source(path).edited(self._all_edits(path)) for path in self.edits}

    def _all_edits(self, path: str) -> set[Edit]:
        """The edits of a changed file, the import of the runtime among them."""
        source = self._source(path)
        name, imported = runtime_name(source)
        limit = limit_of(self._line_bounds[path], self._line_bounds.values())
        edits = laid_out(source, self.edits[path], limit) if limit else self.edits[path]
        if path not in self._needs_import or imported:
            return edits
        return edits | {import_edit(source, name, self.repository.own_names)}

    @cached_property
    def _line_bounds(self) -> dict[str, Bounds]:
        return {path: bounds_of(self._source(path)) for path in self.edits}

    def _source(self, path: str) -> Source:
        module = self.repository.module(path)
        assert module is not None
        return module.source
