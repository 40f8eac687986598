"""Let Chipmunk skip the blocks on some steps: wrap what the two loops iterate, and what leaves them.

On a step that step caching skips (`step_caching` in the configuration) both loops iterate nothing, and what was wrapped
after them gives the hidden state, made of those of earlier steps; the final layer runs as ever. The change is made
where nothing but the image stream comes out of the loops: where the text stream, a list of features or the loops'
own variables are used after them as well, the forward is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.minimal import MODEL, variant
from chipmunk.rewrite.roles import Model
from chipmunk.rewrite.syntax import dotted, self_list, target_names, walk

NAME = "step-caching"
API = 1
VERSION = "1"


class _DoesNotFit(Exception):
    """Why the forward is left alone, and where that shows."""

    def __init__(self, reason: str, node: cst.CSTNode | None = None) -> None:
        super().__init__(reason)
        self.reason = f"steps are not cached: {reason}"
        self.node = node


@dataclass(frozen=True)
class _Loop:
    """A loop over one of the model's lists of blocks."""

    step: Step
    node: cst.For
    blocks: cst.BaseExpression
    """`self.double_blocks` in what it iterates, with the runtime's call around it if there is one."""
    done: bool


@dataclass(frozen=True)
class _Hidden:
    """The image stream after the loops."""

    step: Step
    """The statement that holds it, or before which it has to be asked for."""
    cut: cst.BaseExpression | None
    """`img[:, txt.shape[1] :]`; None where the blocks return the streams apart."""
    name: str
    done: bool


def rule(context: Context) -> None:
    for index, model in enumerate(context.models):
        source, function = model.forward.source, model.forward.node
        try:
            double, single = (_loops(context, model, attribute) for attribute in (model.double, model.single))
            image = _image_name(model, double[0])
            hidden = _hidden(context, model, single, image)
            _check(model, [*double, *single], hidden)
        except _DoesNotFit as found:
            context.left_dense(source, found.node or function.name, found.reason, matched=None)
            continue
        context.cached_steps.add(index)
        if hidden.done and all(loop.done for loop in (*double, *single)):
            context.already(source, function.name, "its steps can be skipped", matched=_name(model))
            continue
        _patch(context, model, double, single, image, hidden)


def _name(model: Model) -> str:
    return f"{model.name}.{model.forward.node.name.value}"


def _patch(
    context: Context, model: Model, double: list[_Loop], single: list[_Loop], image: str, hidden: _Hidden
) -> None:
    source, receiver = model.forward.source, model.forward.scope.receiver
    runtime = context.runtime(source)
    for loops, given in ((double, f", {image}"), (single, "")):
        for loop in loops:
            if not loop.done:
                context.replace(source, loop.blocks, f"{runtime}.blocks({source.code(loop.blocks)}, {receiver}{given})")
    if not hidden.done and hidden.cut is not None:
        context.insert_before(source, hidden.cut, f"{runtime}.hidden({receiver}, ")
        context.insert_after(source, hidden.cut, ")")
    elif not hidden.done:
        indentation = source.indentation(hidden.step.statement)
        line = f"{hidden.name} = {runtime}.hidden({receiver}, {hidden.name})\n{indentation}"
        context.insert_before(source, hidden.step.statement, line)
    context.patched(
        source,
        model.forward.node.name,
        f"nothing but the image stream comes out of the loops over self.{model.double} and self.{model.single}",
        matched=_name(model),
    )


# --- Finding the places ----------------------------------------------------------------------------------------------


def _loops(context: Context, model: Model, attribute: str) -> list[_Loop]:
    """The loops over `self.<attribute>` that run its blocks, in the order of the text."""
    scope = model.forward.scope
    found: list[_Loop] = []
    for step in scope.steps:
        if not isinstance(step.node, cst.For) or not _runs_blocks(scope, step.node):
            continue
        parts = list(walk(step.node.iter))
        for node in parts:
            if not isinstance(node, cst.BaseExpression) or self_list(node, scope.receiver) != attribute:
                continue
            if any(isinstance(parent, cst.Attribute) and parent.value is node for parent in parts):
                raise _DoesNotFit(f"what the loop over self.{attribute} iterates is not understood", step.node)
            calls = [p for p in parts if isinstance(p, cst.Call) and p.args and p.args[0].value is node]
            done = any(context.runtime_call(call, model.forward, step) == "blocks" for call in calls)
            found.append(_Loop(step, step.node, node, done))
    if not found:
        raise _DoesNotFit(f"the loop over self.{attribute} was not found")
    if not _always_runs(found):
        raise _DoesNotFit(f"the forward has a way around self.{attribute}", found[0].node)
    return found


def _always_runs(loops: list[_Loop]) -> bool:
    """Whether each call of the forward goes through one of the loops: no other arm does something in their place.

    A forward that leaves its blocks out itself, as caches do, would be told of a step that it never comes to.
    """
    chains = {tuple((n, b) for n, b in loop.step.chain if not isinstance(n, (cst.With, cst.Try))) for loop in loops}
    for chain in sorted(chains, key=len, reverse=True):
        while chain and isinstance(chain[-1][0], cst.If):
            *around, (node, branch) = chain
            other = (*around, (node, "orelse" if branch == "body" else "body"))
            if other not in chains and (branch == "orelse" or getattr(node, "orelse", None) is not None):
                break
            chain = tuple(around)
            chains.add(chain)
    return () in chains


def _runs_blocks(scope: Scope, loop: cst.For) -> bool:
    """Whether its body calls what the loop iterates: `block(…)`, `block.run(…)`, `run(block, …)`, `run(x=block)`."""
    names = {name for name, _ in target_names(loop.target)}
    for call, step in scope.calls:
        if loop in step.loops:
            named = [arg.value for arg in call.args if arg.keyword is not None and isinstance(arg.value, cst.Name)]
            parts = [call.func, *(arg.value for arg in call.args[:1]), *named]
            if any((dotted(part) or "").partition(".")[0] in names for part in parts):
                return True
    return False


def _image_name(model: Model, loop: _Loop) -> str:
    """The variable with the image stream, which enters the first block and is what it returns."""
    scope = model.forward.scope
    names = {
        name
        for name, bindings in scope.bindings.items()
        if any(loop.node in binding.step.loops and not binding.augmented for binding in bindings)
        and model.image in scope.roots(cst.Name(name), loop.step)
    }
    if model.image in names:
        return model.image
    if len(names) != 1:
        raise _DoesNotFit("which variable holds the image stream is not understood", loop.node)
    return names.pop()


def _hidden(context: Context, model: Model, single: list[_Loop], image: str) -> _Hidden:
    """Where the image stream leaves the loops: cut off the joint stream, or as it is."""
    scope = model.forward.scope
    loops = [loop.node for loop in single]
    made = set(_bound(scope, loops))
    # where they leave apart, a slice of the image stream takes something else off: frames of before, say
    apart = "text" in model.single_block.streams.values() and image in made
    after = [step for step in scope.steps if step.index > single[-1].step.index and not _inside(step, loops)]
    for step in after:
        for expression in step.expressions:
            for node in walk(expression):
                done = context.runtime_call(node, model.forward, step) == "hidden"
                cut = node.args[1].value if done and isinstance(node, cst.Call) and len(node.args) == 2 else node
                cuts = isinstance(cut, cst.Subscript) and dotted(cut.value) in made and _is_cut(cut)
                if isinstance(cut, cst.Subscript) and cuts and not (apart and dotted(cut.value) == image):
                    return _Hidden(step, cut, dotted(cut.value) or "", done)
                if done:
                    return _Hidden(step, None, image, True)
    if image not in made or not after:
        raise _DoesNotFit("where the image stream leaves the blocks is not understood", loops[-1])
    first = next((step for step in after if step.chain == single[-1].step.chain), None)
    if first is None or first.statement is single[-1].step.statement:
        raise _DoesNotFit("where the image stream leaves the blocks is not understood", loops[-1])
    return _Hidden(first, None, image, False)


def _is_cut(node: cst.Subscript) -> bool:
    """Whether this is `x[:, a:]` or `x[:, :b]`."""
    if len(node.slice) < 2 or not isinstance(node.slice[1].slice, cst.Slice):
        return False
    cut = node.slice[1].slice
    return (cut.lower is None) != (cut.upper is None)


# --- Whether the loops can be left out -------------------------------------------------------------------------------


def _check(model: Model, loops: list[_Loop], hidden: _Hidden) -> None:
    """Raise _DoesNotFit if anything but the hidden state is missing, or wrong, where the loops iterate nothing."""
    branches = [node for node, _ in hidden.step.chain if isinstance(node, cst.If)]
    if any(node is branch for loop in loops for node, _ in loop.step.chain for branch in branches):
        raise _DoesNotFit("the forward has a way around its blocks", hidden.step.node)
    if branches:
        raise _DoesNotFit("where the image stream is cut off hangs on a condition", hidden.step.node)
    scope = model.forward.scope
    nodes = [loop.node for loop in loops]
    start = min(loop.step.index for loop in loops)
    made = set(_bound(scope, nodes))
    between = {
        b.name for name in scope.bindings for b in scope.bindings[name] if start < b.step.index < hidden.step.index
    }
    for name in sorted(made | between):
        if name.startswith(f"{scope.receiver}."):
            raise _DoesNotFit(f"{name} is assigned between the blocks")
    for step in scope.steps:
        if start < step.index < hidden.step.index and isinstance(step.node, cst.Return) and not _nested(step):
            raise _DoesNotFit("the forward returns from between the blocks", step.node)
        if step.index <= start or _inside(step, nodes):
            continue
        for name in {node.value for e in _read(step) for node in walk(e) if isinstance(node, cst.Name)} & made:
            before = [b for b in scope.reaching(name, step) if not _made_by(b.step, nodes)]
            if not before and name not in scope.parameters:
                raise _DoesNotFit(f"{name} is known only once a block has run", step.node)
    for step in scope.steps:
        if start < step.index < hidden.step.index and not _nested(step):
            _check_kept(model, step, nodes, made)
    grown = set(_grown(scope, nodes, start, hidden.step.index))
    for step in scope.steps:
        if step.index < hidden.step.index or _inside(step, nodes) or isinstance(step.node, cst.Del):
            continue
        used: Counter[str] = Counter(name for e in _read(step) for name in value_names(e))
        if step is hidden.step and hidden.cut is not None:
            used -= Counter(value_names(hidden.cut))
        found = _from_blocks(scope, used, step, nodes, grown, hidden)
        if found is not None:
            raise _DoesNotFit(f"{found} comes out of the blocks too, and is used after them", step.node)
    if model.order.kept:
        raise _DoesNotFit(model.order.kept)


def _check_kept(model: Model, step: Step, loops: list[cst.For], made: set[str]) -> None:
    """Raise _DoesNotFit where what the blocks compute is kept or handed on, elsewhere than to the hidden state.

    A list or dictionary that the forward makes itself counts where it is used after the blocks (`_grown`).
    """
    scope = model.forward.scope

    def holds(node: cst.CSTNode) -> bool:
        """Whether the value is the blocks', on the way to the hidden state."""
        names = set(value_names(node)) & made
        return any(_made_by(b.step, loops) for name in names for b in scope.reaching(name, step)) and (
            model.image in scope.roots(node, step)
        )

    def is_local(node: cst.BaseExpression) -> bool:
        name = dotted(node)
        if name in made:  # the stream itself
            return True
        if name is None or "." in name or name in scope.parameters:
            return False
        values = [binding.value for binding in scope.reaching(name, step)]
        return all(isinstance(value, (cst.List, cst.Dict)) for value in values if value is not None)

    if isinstance(step.node, cst.Assign):
        for target in step.node.targets:
            place: cst.BaseExpression = target.target
            while isinstance(place, cst.Subscript):
                place = place.value
            if place is not target.target and not is_local(place) and holds(step.node.value):
                raise _DoesNotFit(f"what the blocks compute is kept in {dotted(place)}", step.node)
    if isinstance(step.node, cst.Expr) and isinstance(step.node.value, cst.Call):
        call = step.node.value
        subject = call.func.value if isinstance(call.func, cst.Attribute) else None
        told = dotted(call.func) or ""
        if (
            told != "print"
            and (subject is None or not is_local(subject))
            and any(holds(arg.value) for arg in call.args)
        ):
            raise _DoesNotFit(f"what the blocks compute is given to {told}", step.node)


def _nested(step: Step) -> bool:
    return any(isinstance(node, cst.FunctionDef) for node, _ in step.chain)


def _from_blocks(
    scope: Scope, used: Iterable[str], step: Step, loops: list[cst.For], grown: set[str], hidden: _Hidden
) -> str | None:
    """The first of the names whose value may be made by the blocks other than through the hidden state."""
    pending = [(name, step) for name in used]
    seen: set[tuple[str, int]] = set()
    while pending:
        name, at = pending.pop()
        if (name, at.index) in seen:
            continue
        seen.add((name, at.index))
        asked = hidden.cut is None and name == hidden.name and at.index >= hidden.step.index
        if asked and not any(hidden.step.index <= b.step.index < at.index for b in scope.bindings.get(name, ())):
            continue  # asked for in a statement of its own before this one
        if name in grown and not _renewed(scope, name, at, hidden):
            return name
        for binding in scope.reaching(name, at):
            if _made_by(binding.step, loops):
                return name
            if binding.step is hidden.step and hidden.cut is not None:
                inner = Counter(value_names(binding.value)) if binding.value is not None else Counter[str]()
                pending += [(other, binding.step) for other in inner - Counter(value_names(hidden.cut))]
            elif binding.value is not None:
                pending += [(other, binding.step) for other in value_names(binding.value)]
    return None


def _renewed(scope: Scope, name: str, at: Step, hidden: _Hidden) -> bool:
    """Whether a name has another value by then: `x[:, n:] += y` among the blocks is gone after `x = x[:, n:]`."""
    bindings = scope.reaching(name, at)
    later = all(binding.step.index >= hidden.step.index and not binding.augmented for binding in bindings)
    return later and scope.is_definite(bindings, at)


def _bound(scope: Scope, loops: list[cst.For]) -> Iterator[str]:
    """Names that get a value in the loops."""
    for name, bindings in scope.bindings.items():
        if any(_made_by(binding.step, loops) for binding in bindings):
            yield name


def _grown(scope: Scope, loops: list[cst.For], start: int, end: int) -> Iterator[str]:
    """Local names whose value is changed in place while the blocks run: `features.append(img)`, `features[i] = img`."""
    for step in scope.steps:
        if not start < step.index < end:
            continue
        if isinstance(step.node, cst.Expr) and isinstance(step.node.value, cst.Call):
            function = step.node.value.func
            changed = dotted(function.value) if isinstance(function, cst.Attribute) else None
            if changed is not None and changed != scope.receiver and not changed.startswith(f"{scope.receiver}."):
                yield changed
        for target in step.node.targets if isinstance(step.node, cst.Assign) else ():
            if isinstance(target.target, cst.Subscript):
                changed = dotted(target.target.value)
                if changed is not None and not changed.startswith(f"{scope.receiver}."):
                    yield changed


def _read(step: Step) -> tuple[cst.CSTNode, ...]:
    """The expressions of a statement whose values it uses: all but the names that an assignment gives a value to."""
    if isinstance(step.node, (cst.Assign, cst.AnnAssign)):
        return () if step.node.value is None else (step.node.value,)
    return step.expressions


def _made_by(step: Step, loops: list[cst.For]) -> bool:
    """Whether a value that a name gets here is the loops'."""
    return step.node in loops or _inside(step, loops)


def _inside(step: Step, loops: list[cst.For]) -> bool:
    return any(loop in step.loops for loop in loops)


_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_MARK = (
    "    def forward(self, image, image_ids, text, text_ids, time):\n",
    '    @chipmunk.model_forward(\n        double="pairs", single="joints", image="image", ids="image_ids"\n    )\n'
    "    def forward(self, image, image_ids, text, text_ids, time):\n",
)
_LOOPS = (
    ("in self.pairs:", "in chipmunk.blocks(self.pairs, self, image):"),
    ("in self.joints:", "in chipmunk.blocks(self.joints, self):"),
)
_CUT = ("x = x[:, text.shape[1] :]", "x = chipmunk.hidden(self, x[:, text.shape[1] :])")
_FEATURES = variant(
    MODEL,
    (
        "        x = torch.cat((text, image), dim=1)\n",
        "        x = torch.cat((text, image), dim=1)\n        kept = []\n",
    ),
    ("            x = block(x, rotation)\n", "            x = block(x, rotation)\n            kept.append(x)\n"),
    ("        return self.out(x)\n", "        return self.out(x), kept\n"),
)
_TEXT = variant(
    MODEL,
    ("        x = x[:, text.shape[1] :]\n", "        image = x[:, text.shape[1] :]\n"),
    ("        return self.out(x)\n", "        return self.out(image), x[:, : text.shape[1]]\n"),
)
_COUNTED = variant(MODEL, ("for block in self.pairs:", "for number, block in enumerate(self.pairs):"))
_MARKED = variant(MODEL, _IMPORT, _MARK)

EXAMPLES = (
    Example("features are collected between the blocks", "flow/model.py", variant(_FEATURES, _IMPORT, _MARK), None),
    Example("the text stream is returned too", "flow/model.py", variant(_TEXT, _IMPORT, _MARK), None),
    Example("a model", "flow/model.py", _MARKED, variant(_MARKED, *_LOOPS, _CUT)),
    Example(
        "blocks that are numbered",
        "flow/model.py",
        variant(_COUNTED, _IMPORT, _MARK),
        variant(
            _COUNTED,
            _IMPORT,
            _MARK,
            ("enumerate(self.pairs)", "enumerate(chipmunk.blocks(self.pairs, self, image))"),
            _LOOPS[1],
            _CUT,
        ),
    ),
)
