"""Let Chipmunk skip the blocks on some steps: wrap what the two loops iterate, and what leaves them.

On a step that step caching skips (`step_caching` in the configuration) both loops iterate nothing, and what was wrapped
after them gives the hidden state, made of those of earlier steps; the final layer runs as ever. The change is made
where nothing but the image stream comes out of the loops: where the text stream, a list of features or the loops'
own variables are used after them as well, the forward is left alone. Where the image stream is cut off in the arms of
an `if`, and each arm does just that, each cut is wrapped: the runtime skips no steps where one takes more off than the
text.
"""

from __future__ import annotations

from chipmunk.registry import Example
from chipmunk.rewrite.block_loops import BlockLoop, DoesNotFit, Hidden, block_loops, hidden_state, image_name
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.left_out import check_left_out
from chipmunk.rewrite.minimal import MODEL, variant
from chipmunk.rewrite.roles import Model

NAME = "step-caching"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    for index, model in enumerate(context.models):
        source, function = model.forward.source, model.forward.node
        try:
            double, single = (block_loops(context, model, attribute) for attribute in (model.double, model.single))
            image = image_name(model, double[0])
            hidden = hidden_state(context, model, single, image)
            done = all(loop.done for loop in (*double, *single)) and all(way.done for way in hidden.exits)
            if not (done and context.again):
                check_left_out(model, [*double, *single], hidden)
        except DoesNotFit as found:
            context.left_dense(source, found.node or function.name, found.reason, matched=None)
            continue
        context.cached_steps.add(index)
        if done:
            context.already(source, function.name, "its steps can be skipped", matched=_name(model))
            continue
        _patch(context, model, double, single, image, hidden)


def _name(model: Model) -> str:
    return f"{model.name}.{model.forward.node.name.value}"


def _patch(
    context: Context, model: Model, double: list[BlockLoop], single: list[BlockLoop], image: str, hidden: Hidden
) -> None:
    source, receiver = model.forward.source, model.forward.scope.receiver
    runtime = context.runtime(source)
    for loops, given in ((double, f", {image}"), (single, "")):
        for loop in loops:
            if not loop.done:
                context.replace(source, loop.blocks, f"{runtime}.blocks({source.code(loop.blocks)}, {receiver}{given})")
    for way in hidden.exits:
        if not way.done and way.cut is not None:
            context.insert_before(source, way.cut, f"{runtime}.hidden({receiver}, ")
            context.insert_after(source, way.cut, ")")
        elif not way.done:
            indentation = source.indentation(way.step.statement)
            line = f"{hidden.name} = {runtime}.hidden({receiver}, {hidden.name})\n{indentation}"
            context.insert_before(source, way.step.statement, line)
    context.patched(
        source,
        model.forward.node.name,
        f"nothing but the image stream comes out of the loops over self.{model.double} and self.{model.single}",
        matched=_name(model),
    )


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
_ARMS = variant(
    MODEL,
    (
        "        x = x[:, text.shape[1] :]\n",
        "        if len(time) > 1:\n            x = x[:, text.shape[1] + 1 :]\n"
        "        else:\n            x = x[:, text.shape[1] :]\n",
    ),
)
_NO_ELSE = variant(_ARMS, ("        else:\n            x = x[:, text.shape[1] :]\n", ""))
_MORE = variant(_ARMS, ("text.shape[1] + 1 :]\n", "text.shape[1] + 1 :]\n            x = x * 2\n"))
_COUNTED = variant(MODEL, ("for block in self.pairs:", "for number, block in enumerate(self.pairs):"))
_MARKED = variant(MODEL, _IMPORT, _MARK)

EXAMPLES = (
    Example("features are collected between the blocks", "flow/model.py", variant(_FEATURES, _IMPORT, _MARK), None),
    Example("the text stream is returned too", "flow/model.py", variant(_TEXT, _IMPORT, _MARK), None),
    Example("the image is cut off in one case alone", "flow/model.py", variant(_NO_ELSE, _IMPORT, _MARK), None),
    Example("an arm does more than cut off the image", "flow/model.py", variant(_MORE, _IMPORT, _MARK), None),
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
    Example(
        "the image is cut off in both arms of an if",
        "flow/model.py",
        variant(_ARMS, _IMPORT, _MARK),
        variant(
            _ARMS,
            _IMPORT,
            _MARK,
            *_LOOPS,
            ("x = x[:, text.shape[1] + 1 :]", "x = chipmunk.hidden(self, x[:, text.shape[1] + 1 :])"),
            _CUT,
        ),
    ),
)
