"""Mark the model's forward, which opens and closes Chipmunk's work on each call.

The model is found by what it does: it runs a list of blocks that turn an image and a text stream into two, joins the
streams, runs a second list of blocks on the joint stream, and slices the image off again. The decorator names the two
lists, the parameter with the image tokens and the one with their positions. Where the forward adds something else
with one row for each image token (a ControlNet's residual, say), image tokens must keep their order: if it is an
optional parameter, `per_token` names it, and they do where it is given; else `ids` is left out. Where no sampling loop
counts the steps, `timesteps` names the parameter whose changes do.
"""

from __future__ import annotations

from math import isfinite

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.layout import bounds_of, limit_of
from chipmunk.rewrite.minimal import MODEL, SINGLE, variant
from chipmunk.rewrite.roles import Model
from chipmunk.rewrite.timestep import model_mark, timestep_parameter

NAME = "model-forward"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    for found in context.roles.lookalikes:
        context.left_dense(found.at.source, found.at.outline, found.reason, matched=f"class {found.owner.name}")
    for index, model in enumerate(context.models):
        if model_mark(context, model) is not None:
            source, function = model.forward.source, model.forward.outline
            context.already(source, function, "its forward is marked", matched=model.forward.name)
        else:
            counted = context.sampling.leaves_calls(index)
            _mark(context, model, timestep_parameter(context.repository, model) if counted else None)


def _mark(context: Context, model: Model, timesteps: str | None) -> None:
    source, function, order = model.forward.source, model.forward.node, model.order
    runtime = context.runtime(source)
    options = [f'model="{model.forward.scope.receiver}"'] if model.forward.owner is None else []
    options += [f'double="{model.double}"', f'single="{model.single}"', f'image="{model.image}"']
    if order.ids is not None:
        options.append(f'ids="{order.ids}"')
    if timesteps is not None:
        options.append(f'timesteps="{timesteps}"')
    if order.per_token:
        names = [f'"{name}"' for name in order.per_token]
        options.append(f"per_token=({', '.join(names)}{',' if len(names) == 1 else ''})")
    first: cst.CSTNode = function.decorators[0] if function.decorators else function
    start = source.span(first)[0]
    indentation = source.indentation(first)
    line = f"@{runtime}.model_forward({', '.join(options)})"
    bounds = bounds_of(source)
    longest = limit_of(bounds) if isfinite(bounds[1]) else 0
    longest = longest or max(88, _longest_line(source.text))
    if len(indentation.expandtabs(4) + line) > longest:
        inner = f"\n{indentation}" + ("\t" if "\t" in indentation else "    ")
        listed = ", ".join(options)
        if len(inner.expandtabs(4)) - 1 + len(listed) > longest:
            listed = f",{inner}".join(options) + ","
        line = f"@{runtime}.model_forward({inner}{listed}\n{indentation})"
    context.edit(source, start, start, f"{line}\n{indentation}")
    streams = "two streams" if len(model.double_block.streams) > 1 else "the image"
    owner = model.forward.scope.receiver
    reason = f"it runs {owner}.{model.double} on {streams} and {owner}.{model.single} on the joint one"
    reason += f"; {order.off or f'token order follows {order.ids}'}"
    if order.per_token:
        reason += f", unless {' or '.join(order.per_token)} is given"
    context.patched(source, function.name, reason, matched=model.forward.name)


def _longest_line(text: bytes) -> int:
    return min(120, max(len(line) for line in text.split(b"\n")))


_SLICE = "        x = x[:, text.shape[1] :]\n"
_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_FORWARD = "    def forward(self, image, image_ids, text, text_ids, time):\n"
_MARK = """\
    @chipmunk.model_forward(
        double="pairs", single="joints", image="image", ids="image_ids"
    )
"""
_MARK_WITH_CLOCK = """\
    @chipmunk.model_forward(
        double="pairs",
        single="joints",
        image="image",
        ids="image_ids",
        timesteps="time",
    )
"""
_RESIDUAL = variant(
    MODEL,
    ("text_ids, time):", "text_ids, time, control):"),
    (
        "image, text = block(image, text, rotation)",
        "image, text = block(image, text, rotation)\n            image = image + control",
    ),
)
_OPTIONAL = variant(_RESIDUAL, ("time, control):", "time, control=None):"))
_INSIDE = variant(
    MODEL,
    ("        x = torch.cat((text, image), dim=1)\n", ""),
    ("            x = block(x, rotation)\n", "            image, text = block(image, text, rotation)\n"),
    ("        x = x[:, text.shape[1] :]\n        return self.out(x)\n", "        return self.out(image)\n"),
)
_JOINS_INSIDE = variant(
    SINGLE,
    (
        "forward(self, x, rotation):\n",
        "forward(self, image, text, rotation):\n        x = torch.cat((text, image), 1)\n",
    ),
    ("        return x + self", "        x = x + self"),
    ("mixed, self.act(hidden)), 2))\n", "mixed, self.act(hidden)), 2))\n        return x[:, text.shape[1] :], text\n"),
)

EXAMPLES = (
    Example(
        "both kinds of block, but no image stream sliced off: a ControlNet",
        "flow/model.py",
        variant(MODEL, (_SLICE, "")),
        None,
    ),
    Example(
        "one list of blocks only",
        "flow/model.py",
        variant(MODEL, ("        for block in self.joints:\n            x = block(x, rotation)\n", "")),
        None,
    ),
    Example(
        "an optional residual: image tokens keep their order where it is given",
        "flow/model.py",
        _OPTIONAL,
        variant(
            _OPTIONAL,
            _IMPORT,
            (
                "    def forward(",
                "    @chipmunk.model_forward(\n"
                '        double="pairs",\n        single="joints",\n        image="image",\n        ids="image_ids",\n'
                '        per_token=("control",),\n'
                "    )\n    def forward(",
            ),
        ),
    ),
    Example("a model", "flow/model.py", MODEL, variant(MODEL, _IMPORT, (_FORWARD, _MARK + _FORWARD))),
    Example(
        "the blocks of the second list join the streams themselves",
        "flow/model.py",
        _INSIDE,
        variant(_INSIDE, _IMPORT, (_FORWARD, _MARK + _FORWARD)),
        {"flow/single.py": _JOINS_INSIDE},
    ),
    Example(
        "no loop in the repository calls the model: its timestep counts the steps",
        "flow/model.py",
        MODEL,
        variant(MODEL, _IMPORT, (_FORWARD, _MARK_WITH_CLOCK + _FORWARD)),
        {"flow/sampling.py": ""},
    ),
    Example(
        "a residual with one row for each image token: image tokens keep their order",
        "flow/model.py",
        _RESIDUAL,
        variant(
            _RESIDUAL,
            _IMPORT,
            (
                "    def forward(",
                '    @chipmunk.model_forward(double="pairs", single="joints", image="image")\n    def forward(',
            ),
        ),
    ),
)
