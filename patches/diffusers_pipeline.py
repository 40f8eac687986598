"""Enable Chipmunk on the FLUX pipelines of diffusers that a script or a server loads.

Where diffusers is installed and only called, there is no code to patch: one line, `chipmunk.enable(pipe)`, after the
pipeline is made lets Chipmunk work in its transformer at run time, through diffusers' own attention processors. It
stands behind the statements that go on setting the pipeline up (`pipe.to(…)`, offloading, LoRA weights,
`torch.compile`). Without a configuration it does nothing.

A pipeline is known by its class, `Flux…Pipeline`; one of the repository's own by what it inherits from, or by the
transformer that its constructor takes; for `DiffusionPipeline`, `AutoPipelineFor…` and `ModularPipeline` the
id of the model has to say FLUX. Left alone: pipelines of other models, `from_pipe`, which shares the transformer of
another pipeline, and pipelines that are returned without having a name, which are enabled where they get one.
"""

from __future__ import annotations

from dataclasses import replace

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import variant
from chipmunk.rewrite.pipelines import Made, last_of_setup, made_pipelines, running_blocks
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.rewrite.values import Place

NAME = "diffusers-pipeline"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    if _holds_diffusers(context):
        return  # its transformers are patched
    made = made_pipelines(context)
    for pipeline in made:
        _enable(context, pipeline)
    for function in running_blocks(context) if made else ():
        reason = (
            "it runs the blocks of a transformer that it is given itself: Chipmunk works in the transformer's forward"
        )
        context.left_dense(function.source, function.node.name, reason, matched=function.name)


def _holds_diffusers(context: Context) -> bool:
    """Whether diffusers itself is in the repository, not just a folder of that name."""
    found = {context.repository.find_module("diffusers", path) for path in context.repository.files}
    folders = [path.removesuffix("__init__.py") for path in found if path is not None and path.endswith("__init__.py")]
    return any(path.startswith(f"{folder}pipelines/") for folder in folders for path in context.repository.files)


def _enable(context: Context, made: Made) -> None:
    source = made.place.module.source
    if not isinstance(made.target, (cst.Name, cst.Attribute, cst.Subscript)):
        context.left_dense(source, made.step.node, "the pipeline is unpacked into several names")
        return
    name = source.code(made.target)
    _know(context, made.family)
    if _is_enabled(context, made.place, name):
        context.already(source, made.step.node, "Chipmunk is enabled on the pipeline")
        return
    last = last_of_setup(context, made, name)
    if not isinstance(last, cst.SimpleStatementLine):
        context.left_dense(source, made.step.node, "it shares its line with other code")
        return
    end = source.span(last)[1]
    text = source.text
    while end > 0 and text[end - 1 : end] in (b"\n", b"\r"):
        end -= 1
    end = max(end, _line_end(text, end))
    indentation = source.indentation(last)
    context.edit(source, end, end, f"\n{indentation}{context.runtime(source)}.enable({name})")
    context.patched(source, made.step.node, f"a {made.family} pipeline of diffusers")


def _line_end(text: bytes, at: int) -> int:
    """The end of the line, before its line break: a comment may follow the statement."""
    stop = text.find(b"\n", at)
    stop = len(text) if stop < 0 else stop
    return stop - (text[stop - 1 : stop] == b"\r")


def _is_enabled(context: Context, place: Place, name: str) -> bool:
    """Whether `enable` is called on the pipeline, or on its transformer."""
    given = [
        place.module.source.code(call.args[0].value)
        for call, step in place.scope.calls
        if call.args and context.runtime_call(call, place.names, step) == "enable"
    ]
    return any(code == name or code.startswith(name + ".") for code in given)


def _know(context: Context, family: str) -> None:
    """Note the transformer that verify and bench are to run, once."""
    file = f"diffusers/models/transformers/transformer_{family.lower()}.py"
    if any(facts.file == file for facts in context.installed):
        return
    double = f"{family}ModeTransformerBlock" if family == "Flux3" else f"{family}TransformerBlock"
    single = BlockFacts(file, f"{family}SingleTransformerBlock", True, gated=family != "Flux")
    if family == "Flux":
        single = replace(single, linear_in="proj_mlp", linear_out="proj_out")
    elif family == "Flux2":
        single = replace(single, linear_in="attn.to_qkv_mlp_proj", linear_out="attn.to_out")
    else:
        single = replace(single, mlp="ff")
    context.installed.append(
        ModelFacts(
            file=file,
            name=f"{family}Transformer2DModel",
            double="mode_blocks.image" if family == "Flux3" else "transformer_blocks",
            single="single_transformer_blocks",
            image="hidden_states",
            ids="img_ids",
            double_block=BlockFacts(file, double, True, mlp="ff", gated=family != "Flux"),
            single_block=single,
            installed=True,
        )
    )


_SCRIPT = """\
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()

image = pipe("a chipmunk", num_inference_steps=50).images[0]
image.save("chipmunk.png")
"""
_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_LOAD = 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)'
_OFFLOAD = "pipe.enable_model_cpu_offload()\n"
_ENABLED = (_OFFLOAD, _OFFLOAD + "chipmunk.enable(pipe)\n")
_OWN = """\
from diffusers import DiffusionPipeline, FluxTransformer2DModel


class FluxPipeline(DiffusionPipeline):
    def __init__(self, scheduler, transformer: FluxTransformer2DModel):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)

    def __call__(self, latents, timesteps):
        for t in timesteps:
            latents = self.scheduler.step(self.transformer(latents, timestep=t)[0], t, latents)[0]
        return latents
"""
_PICTURE = """\
image = pipe("a chipmunk", num_inference_steps=50).images[0]
image.save("chipmunk.png")
"""

EXAMPLES = (
    Example(
        "a pipeline of another model",
        "draw.py",
        variant(
            _SCRIPT,
            ("import FluxPipeline", "import StableDiffusion3Pipeline"),
            (_LOAD, 'StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium")'),
        ),
        None,
    ),
    Example(
        "any pipeline, of another model",
        "draw.py",
        variant(
            _SCRIPT,
            ("import FluxPipeline", "import DiffusionPipeline"),
            (_LOAD, 'DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")'),
        ),
        None,
    ),
    Example(
        "any pipeline, of a model that shows when it runs",
        "draw.py",
        variant(
            _SCRIPT,
            ("import torch\n", "import sys\n\nimport torch\n"),
            ("import FluxPipeline", "import DiffusionPipeline"),
            (_LOAD, "DiffusionPipeline.from_pretrained(sys.argv[1])"),
        ),
        None,
    ),
    Example(
        "a class of the user's own with that name",
        "draw.py",
        variant(_SCRIPT, ("from diffusers import", "from mine import")),
        None,
    ),
    Example(
        "a pipeline without a transformer",
        "draw.py",
        variant(
            _SCRIPT,
            ("import FluxPipeline", "import FluxPriorReduxPipeline"),
            ("= FluxPipeline.", "= FluxPriorReduxPipeline."),
        ),
        None,
    ),
    Example(
        "a pipeline that shares another one's transformer",
        "draw.py",
        variant(
            _SCRIPT,
            ("import FluxPipeline\n", "import FluxImg2ImgPipeline\n\nfrom mine import base\n"),
            (_LOAD, "FluxImg2ImgPipeline.from_pipe(base)"),
        ),
        None,
    ),
    Example(
        "a script that enables Chipmunk already",
        "draw.py",
        variant(_SCRIPT, _IMPORT, (_OFFLOAD, _OFFLOAD + 'chipmunk.enable(pipe, "fast.yml")\n')),
        None,
    ),
    Example(
        "a script that enables Chipmunk on the transformer",
        "draw.py",
        variant(_SCRIPT, _IMPORT, (_OFFLOAD, _OFFLOAD + "chipmunk.enable(pipe.transformer)\n")),
        None,
    ),
    Example(
        "a pipeline without a name",
        "draw.py",
        variant(_SCRIPT, (f"pipe = {_LOAD}\n{_OFFLOAD}", ""), ("image = pipe(", f"image = {_LOAD}(")),
        None,
    ),
    Example(
        "a pipeline that is loaded without its transformer",
        "draw.py",
        variant(_SCRIPT, ("torch.bfloat16)", "torch.bfloat16, transformer=None)"), ("pipe(", "pipe.encode_prompt(")),
        None,
    ),
    Example(
        "a pipeline of the user's own, around another model",
        "draw.py",
        variant(_SCRIPT, ("from diffusers import FluxPipeline", "from mine import FluxPipeline")),
        None,
        {"mine.py": variant(_OWN, ("FluxTransformer2DModel", "SD3Transformer2DModel"))},
    ),
    Example("a script", "draw.py", _SCRIPT, variant(_SCRIPT, _IMPORT, _ENABLED)),
    Example(
        "a folder of the user's own that is called diffusers",
        "draw.py",
        _SCRIPT,
        variant(_SCRIPT, _IMPORT, _ENABLED),
        {"mine/diffusers/__init__.py": "", "mine/diffusers/flux.py": "import diffusers\n", "mine/__init__.py": ""},
    ),
    Example(
        "a transformer that is given to it later",
        "draw.py",
        variant(
            _SCRIPT,
            ("torch.bfloat16)", "torch.bfloat16, transformer=None)"),
            (_OFFLOAD, 'pipe.transformer = torch.load("mine.pt")\n' + _OFFLOAD),
        ),
        variant(
            _SCRIPT,
            _IMPORT,
            ("torch.bfloat16)", "torch.bfloat16, transformer=None)"),
            (_OFFLOAD, 'pipe.transformer = torch.load("mine.pt")\n' + _OFFLOAD + "chipmunk.enable(pipe)\n"),
        ),
    ),
    Example(
        "a copy of a pipeline, with a loop of its own",
        "draw.py",
        variant(_SCRIPT, ("from diffusers import FluxPipeline", "from mine import FluxPipeline")),
        variant(_SCRIPT, ("from diffusers import FluxPipeline", "from mine import FluxPipeline"), _IMPORT, _ENABLED),
        {"mine.py": _OWN},
    ),
    Example(
        "a function that changes it and gives it back",
        "draw.py",
        variant(_SCRIPT, (_OFFLOAD, _OFFLOAD + "pipe = observed(pipe)\n"), ("import FluxP", "import observed, FluxP")),
        variant(
            _SCRIPT,
            ("import FluxP", "import observed, FluxP"),
            _IMPORT,
            (_OFFLOAD, _OFFLOAD + "pipe = observed(pipe)\nchipmunk.enable(pipe)\n"),
        ),
    ),
    Example(
        "everything that sets it up comes first",
        "draw.py",
        variant(
            _SCRIPT,
            (_LOAD, _LOAD + '.to("cuda")  # 24 GB'),
            (
                _OFFLOAD,
                'pipe.load_lora_weights("mine")\npipe.transformer = torch.compile(pipe.transformer)\n'
                "pipe = pipe.to(torch.bfloat16)  # again\n",
            ),
        ),
        variant(
            _SCRIPT,
            _IMPORT,
            (_LOAD, _LOAD + '.to("cuda")  # 24 GB'),
            (
                _OFFLOAD,
                'pipe.load_lora_weights("mine")\npipe.transformer = torch.compile(pipe.transformer)\n'
                "pipe = pipe.to(torch.bfloat16)  # again\nchipmunk.enable(pipe)\n",
            ),
        ),
    ),
    Example(
        "any pipeline, of FLUX",
        "draw.py",
        variant(
            _SCRIPT,
            ("import FluxPipeline\n", 'import DiffusionPipeline\n\nMODEL = "black-forest-labs/FLUX.2-dev"\n'),
            (_LOAD, "DiffusionPipeline.from_pretrained(MODEL)"),
        ),
        variant(
            _SCRIPT,
            _IMPORT,
            ("import FluxPipeline\n", 'import DiffusionPipeline\n\nMODEL = "black-forest-labs/FLUX.2-dev"\n'),
            (_LOAD, "DiffusionPipeline.from_pretrained(MODEL)"),
            _ENABLED,
        ),
    ),
    Example(
        "in one branch",
        "draw.py",
        variant(
            _SCRIPT,
            (f"pipe = {_LOAD}\n", f"pipe = None\nif torch.cuda.is_available():\n    pipe = {_LOAD}\n"),
            (_OFFLOAD, "    " + _OFFLOAD),
        ),
        variant(
            _SCRIPT,
            _IMPORT,
            (f"pipe = {_LOAD}\n", f"pipe = None\nif torch.cuda.is_available():\n    pipe = {_LOAD}\n"),
            (_OFFLOAD, f"    {_OFFLOAD}    chipmunk.enable(pipe)\n"),
        ),
    ),
    Example(
        "a server",
        "serve.py",
        variant(
            _SCRIPT,
            (
                f"pipe = {_LOAD}\n{_OFFLOAD}",
                f"\nclass Server:\n    def __init__(self):\n        self.pipe = {_LOAD}\n        self.{_OFFLOAD}",
            ),
            (_PICTURE, "    def draw(self, prompt):\n        return self.pipe(prompt).images[0]\n"),
        ),
        variant(
            _SCRIPT,
            _IMPORT,
            (
                f"pipe = {_LOAD}\n{_OFFLOAD}",
                f"\nclass Server:\n    def __init__(self):\n        self.pipe = {_LOAD}\n        self.{_OFFLOAD}"
                "        chipmunk.enable(self.pipe)\n",
            ),
            (_PICTURE, "    def draw(self, prompt):\n        return self.pipe(prompt).images[0]\n"),
        ),
    ),
    Example(
        "a function that returns it",
        "draw.py",
        variant(_SCRIPT, (f"pipe = {_LOAD}\n", f"\ndef load():\n    return {_LOAD}\n\n\npipe = load()\n")),
        variant(
            _SCRIPT,
            _IMPORT,
            (f"pipe = {_LOAD}\n", f"\ndef load():\n    return {_LOAD}\n\n\npipe = load()\n"),
            _ENABLED,
        ),
    ),
)
