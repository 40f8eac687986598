"""Mark the model's forward, which opens and closes Chipmunk's work on each call.

The model is found by what it does: it runs a list of blocks that turn an image and a text stream into two, joins the
streams, runs a second list of blocks on the joint stream, and slices the image off again. The decorator names the two
lists, the parameter with the image tokens and the one with their positions. Where the forward adds something else
with one row for each image token (a ControlNet's residual, say), `ids` is left out: image tokens then keep their order.
"""

from __future__ import annotations

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.loops import timestep_parameter
from chipmunk.rewrite.minimal import MODEL, variant
from chipmunk.rewrite.roles import Model

NAME = "model-forward"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    for found in context.roles.lookalikes:
        context.left_dense(found.owner.source, found.node, found.reason, matched=f"class {found.owner.name}")
    for index, model in enumerate(context.models):
        timesteps = None
        if context.sampling.leaves_calls(index):
            timesteps = timestep_parameter(context.repository, model)
        _mark(context, model, timesteps)


def _mark(context: Context, model: Model, timesteps: str | None) -> None:
    source, function = model.owner.source, model.forward.node
    matched = f"{model.name}.{function.name.value}"
    for decorator in function.decorators:
        if context.runtime_call(decorator.decorator, model.owner.module) == "model_forward":
            context.already(source, function.name, "its forward is marked", matched=matched)
            return
    runtime = context.runtime(source)
    options = [f'double="{model.double}"', f'single="{model.single}"', f'image="{model.image}"']
    if model.ids is not None:
        options.append(f'ids="{model.ids}"')
    if timesteps is not None:
        options.append(f'timesteps="{timesteps}"')
    first: cst.CSTNode = function.decorators[0] if function.decorators else function
    start = source.span(first)[0]
    indentation = source.indentation(first)
    line = f"@{runtime}.model_forward({', '.join(options)})"
    if len(indentation.expandtabs(4) + line) > max(88, _longest_line(source.text)):
        inner = f"\n{indentation}" + ("\t" if "\t" in indentation else "    ")
        line = f"@{runtime}.model_forward({inner}{', '.join(options)}\n{indentation})"
    context.edit(source, start, start, f"{line}\n{indentation}")
    reason = f"its forward runs self.{model.double} on two streams and self.{model.single} on the joint one"
    context.patched(
        source,
        function.name,
        f"{reason}; {model.order_off or 'token order follows ' + str(model.ids)}",
        matched=matched,
    )


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
_RESIDUAL = variant(
    MODEL,
    ("text_ids, time):", "text_ids, time, control):"),
    (
        "image, text = block(image, text, rotation)",
        "image, text = block(image, text, rotation)\n            image = image + control",
    ),
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
    Example("a model", "flow/model.py", MODEL, variant(MODEL, _IMPORT, (_FORWARD, _MARK + _FORWARD))),
    Example(
        "no loop in the repository calls the model: its timestep counts the steps",
        "flow/model.py",
        MODEL,
        variant(MODEL, _IMPORT, (_FORWARD, _MARK.replace("\n    )", ', timesteps="time"\n    )') + _FORWARD)),
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
