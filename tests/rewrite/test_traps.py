"""What has gone wrong in real repositories, and near misses that must be left alone."""

from __future__ import annotations

import re

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, Site, plan_repository
from chipmunk.rewrite.minimal import ATTENTION, COMMAND, DOUBLE, FILES, MODEL, SAMPLING, SINGLE, variant

REGISTRY = load()
SDPA = "torch.nn.functional.scaled_dot_product_attention"


def plan_of(*, without: str = "", **files: str) -> Plan:
    """The plan for the minimal repository with some files replaced: `double=...` is `flow/double.py`."""
    paths = {name.replace("__", "/") if "__" in name else f"flow/{name}": text for name, text in files.items()}
    texts = {**FILES, **{f"{path}.py": text for path, text in paths.items()}}
    texts.pop(without, None)
    return plan_repository({path: text.encode() for path, text in texts.items()}, REGISTRY)


def after(plan: Plan, path: str) -> str:
    return next((change.after.decode() for change in plan.changes if change.path == path), "")


def sites(plan: Plan, patch: str, status: str) -> list[Site]:
    return [site for site in plan.sites if site.patch == patch and site.status.value == status]


# Attention


def test_vae_attention_and_dead_code_stay() -> None:
    dead = (
        "\n\nclass SelfAttention:\n    def forward(self, x, rotation):\n        q, k, v = x\n"
        "        return attend(q, k, v, rotation)\n"
        f"\n\nclass Decoder:\n    def attention(self, h):\n        return {SDPA}(h, h, h)\n"
    )
    text = after(plan_of(double=DOUBLE + dead), "flow/double.py")
    assert text.endswith(dead)
    assert text.count("chipmunk.layer(self)") == 1


def test_cross_attention_beside_the_joint_one_stays() -> None:
    extra = "        image_x = image_x + attend(image_q, self.split(rotation)[0], self.split(rotation)[1], 1)\n"
    plan = plan_of(
        double=variant(
            DOUBLE, ("        image = image + self.image_out", extra + "        image = image + self.image_out")
        )
    )
    assert extra in after(plan, "flow/double.py")
    assert "attend(q, k, v, rotation, **chipmunk.layer(self))" in after(plan, "flow/double.py")


def test_a_local_import_hides_the_module_level_function() -> None:
    local = variant(
        DOUBLE,
        ("        x = attend(", "        from flow.other import attend\n\n        x = attend("),
    )
    other = "def attend(q, k, v, rotation):\n    return (q + k + v).transpose(1, 2).flatten(2)\n"
    plan = plan_of(double=local, other=other)
    assert "chipmunk.layer" not in after(plan, "flow/double.py")
    assert [site.matched for site in sites(plan, "attention", "left dense")] == ["PairBlock.forward"]
    plan = plan_of(double=local, other=ATTENTION, attention=other)
    assert "chipmunk.layer(self)" in after(plan, "flow/double.py")
    assert "chipmunk_layer=None" in after(plan, "flow/other.py")
    assert after(plan, "flow/attention.py") == ""


def test_a_module_called_math_beside_import_math() -> None:
    files = {
        "double": variant(
            DOUBLE, ("import torch\nfrom", "import math\n\nimport torch\nfrom"), ("flow.attention", "flow.math")
        ),
        "single": variant(SINGLE, ("flow.attention", "flow.math")),
        "math": "import math\n\n" + ATTENTION,
    }
    plan = plan_of(without="flow/attention.py", **files)
    assert "chipmunk_layer=None" in after(plan, "flow/math.py")
    assert len(sites(plan, "attention", "patched")) == 3


def test_attention_in_a_submodule() -> None:
    mixer = (
        "class Mixer(nn.Module):\n    def forward(self, *, q, k, v, rotation):\n"
        "        return self.run(q, k, v, rotation)\n\n"
        "    def run(self, q, k, v, rotation, **options):\n"
        "        return attend(q, k, v, rotation)\n\n\nclass PairBlock"
    )
    text = after(
        plan_of(
            double=variant(
                DOUBLE,
                ("class PairBlock", mixer),
                ("self.heads = heads\n", "self.heads = heads\n        self.mixer = Mixer()\n"),
                ("        x = attend(q, k, v, rotation)", "        x = self.mixer(q=q, k=k, v=v, rotation=rotation)"),
            )
        ),
        "flow/double.py",
    )
    assert "self.mixer(q=q, k=k, v=v, rotation=rotation, **chipmunk.layer(self))" in text
    assert "def forward(self, *, q, k, v, rotation, chipmunk_layer=None):" in text
    assert "self.run(q, k, v, rotation, chipmunk_layer=chipmunk_layer)" in text
    assert "def run(self, q, k, v, rotation, chipmunk_layer=None, **options):" in text
    assert "return attend(q, k, v, rotation, chipmunk_layer=chipmunk_layer)" in text


def test_a_processor_gets_the_block_as_an_argument() -> None:
    processor = variant(
        SINGLE,
        (
            "class JointBlock",
            "class Processor:\n    def __call__(self, layer, x, rotation):\n"
            "        return layer.run(x, rotation)\n\n\nclass JointBlock",
        ),
        ("        self.act =", "        self.processor = Processor()\n        self.act ="),
        (
            "    def forward(self, x, rotation):\n",
            "    def forward(self, x, rotation):\n"
            "        return self.processor(self, x, rotation)\n\n    def run(self, x, rotation):\n",
        ),
    )
    inner = variant(
        processor,
        (
            "        return layer.run(x, rotation)\n",
            "        q, k, v = layer.project(x)\n        return x + attend(q, k, v, rotation)\n",
        ),
        (
            "    def run(self, x, rotation):",
            "    def project(self, x):\n        return self.enter(x).chunk(3, -1)\n\n    def run(self, x, rotation):",
        ),
    )
    text = after(plan_of(single=inner), "flow/single.py")
    assert "return x + attend(q, k, v, rotation, **chipmunk.layer(layer))" in text


def test_gradient_checkpointing() -> None:
    text = after(
        plan_of(
            single=variant(
                SINGLE,
                (
                    "    def forward(self, x, rotation):\n",
                    "    def forward(self, x, rotation):\n"
                    "        return torch.utils.checkpoint.checkpoint(self._forward, x, rotation)\n\n"
                    "    def _forward(self, x, rotation):\n",
                ),
            )
        ),
        "flow/single.py",
    )
    assert "checkpoint(self._forward, x, rotation)\n" in text
    assert "attend(q, k, v, rotation, **chipmunk.layer(self))" in text


def with_attention(imported: str, call: str) -> Plan:
    """The plan where both blocks call another library's function."""
    line = ("from flow.attention import attend", imported)
    return plan_of(
        double=variant(DOUBLE, line, ("attend(q, k, v, rotation)", call)),
        single=variant(SINGLE, line, ("attend(q, k, v, rotation)", call)),
    )


@pytest.mark.parametrize(
    ("imported", "call", "why"),
    [
        ("from flash_attn import flash_attn_varlen_func as attend", "attend(q, k, v, 1)", "several sequences in one"),
        (
            "from flash_attn.cute import flash_attn_func as attend",
            "attend(q, k, v)",
            "more than the attention's output",
        ),
        ("import flash_attn_interface", "flash_attn_interface.flash_attn_func(q, k, v)", "more than the attention's"),
        ("from torch.nn.attention.flex_attention import flex_attention", "flex_attention(q, k, v)", "as a program"),
    ],
)
def test_an_attention_function_that_is_not_handled_is_named_in_the_report(imported: str, call: str, why: str) -> None:
    plan = with_attention(imported, call)
    assert "chipmunk.attention" not in after(plan, "flow/double.py")
    assert [site.file for site in sites(plan, "attention", "left dense") if why in site.reason] == [
        "flow/double.py",
        "flow/single.py",
    ]


@pytest.mark.parametrize(
    ("imported", "call"),
    [
        ("from flash_attn import flash_attn_func as attend", "attend(q, k, v, softmax_scale=0.5)"),
        ("import xformers.ops as xops", "xops.memory_efficient_attention(q, k, v, attn_bias=None)"),
        ("from sageattention import sageattn", 'sageattn(q, k, v, tensor_layout="HND")'),
        ("from diffusers.models.attention_dispatch import dispatch_attention_fn", "dispatch_attention_fn(q, k, v)"),
        ("from somewhere import fast", "fast(q, k, v, self.heads, skip_reshape=True, mask=None)"),
    ],
)
def test_attention_functions_of_other_libraries(imported: str, call: str) -> None:
    text = after(with_attention(imported, call), "flow/double.py")
    function, arguments = call.split("(", 1)
    text = re.sub(r"(?<=\() *\n *| *\n *(?=\))", "", text)  # a call on one line
    assert f'chipmunk.attention(chipmunk.layer(self).get("chipmunk_layer"), {function}, {arguments}' in text


def test_a_function_of_a_known_name_that_is_something_else_is_looked_into() -> None:
    own = ATTENTION.replace("attend", "sageattn")
    plan = plan_of(
        attention=own,
        double=variant(DOUBLE, ("import attend", "import sageattn"), ("attend(q", "sageattn(q")),
        single=variant(SINGLE, ("import attend", "import sageattn"), ("attend(q", "sageattn(q")),
    )
    assert "sageattn(q, k, v, rotation, **chipmunk.layer(self))" in after(plan, "flow/double.py")


def test_attention_in_pieces_stays() -> None:
    pieces = f"x = torch.stack([{SDPA}(q[i], k[i], v[i]) for i in range(len(q))])"
    plan = plan_of(attention=variant(ATTENTION, (f"x = {SDPA}(q, k, v)", pieces)))
    assert "chipmunk.layer" not in after(plan, "flow/double.py")
    assert "in a loop" in sites(plan, "attention", "left dense")[0].reason


def test_two_joint_attentions_in_one_call_stay() -> None:
    twice = ("x = attend(q, k, v, rotation)", "x = attend(q, k, v, rotation) + attend(q, k, v.flip(2), rotation)")
    plan = plan_of(double=variant(DOUBLE, twice))
    assert "chipmunk.layer" not in after(plan, "flow/double.py")
    assert any("several places" in site.reason for site in sites(plan, "attention", "left dense"))


def test_attention_in_either_branch_is_patched_in_both() -> None:
    call = f"    x = {SDPA}(q, k, v)\n"
    early = f"    if q.is_cuda:\n        return {SDPA}(q, k, v).transpose(1, 2).flatten(2)\n"
    plan = plan_of(attention=variant(ATTENTION, (call, early + call)))
    assert after(plan, "flow/attention.py").count(f"chipmunk.attention(chipmunk_layer, {SDPA}, q, k, v)") == 2


# Models


def test_a_model_none_of_whose_parts_can_be_sparse_is_left_alone() -> None:
    opaque = {"attention": variant(ATTENTION, (f"{SDPA}(q, k, v)", "mystery(q, k, v)"))}
    for name, text in (("double", DOUBLE), ("single", SINGLE)):
        opaque[name] = variant(text, ('nn.GELU(approximate="tanh")', "nn.SiLU()"))
    plan = plan_of(**opaque)
    assert plan.changes == ()
    assert [(site.file, site.status.value) for site in plan.sites] == [("flow/model.py", "left dense")]


def test_a_controlnet_that_shares_the_blocks_stays() -> None:
    control = variant(MODEL, ("class Painter", "class Control"), ("        x = x[:, text.shape[1] :]\n", ""))
    plan = plan_of(control=control)
    assert after(plan, "flow/control.py") == ""
    left = sites(plan, "model-forward", "left dense")
    assert [(site.file, site.matched) for site in left] == [("flow/control.py", "class Control")]
    assert "Control shares the class" in sites(plan, "attention", "patched")[1].reason


def test_a_class_that_a_later_one_replaces_stays() -> None:
    first = MODEL.split("class Painter")[1]
    plan = plan_of(model=MODEL + "\n\nclass Painter" + first)
    text = after(plan, "flow/model.py")
    assert text.count("@chipmunk.model_forward") == 1
    assert text.index("@chipmunk.model_forward") > text.rindex("class Painter")
    assert "replaces this one" in sites(plan, "model-forward", "left dense")[0].reason


def test_two_copies_of_the_repository_are_two_models() -> None:
    files = {f"{root}{path}": text.encode() for root in ("", "vendor/") for path, text in FILES.items()}
    plan = plan_repository(files, REGISTRY)
    assert [model.file for model in plan.models] == ["flow/model.py", "vendor/flow/model.py"]
    assert [loop.file for model in plan.models for loop in model.loops] == [
        "flow/sampling.py",
        "vendor/flow/sampling.py",
    ]
    assert len(plan.changes) == 12


def test_a_mask_over_image_tokens_turns_the_order_off() -> None:
    plan = plan_of(
        model=variant(
            MODEL,
            ("text_ids, time):", "text_ids, time, mask):"),
            ("        x = torch.cat", "        image = image * mask\n        x = torch.cat"),
        )
    )
    assert plan.models[0].ids is None
    assert "mask" in sites(plan, "model-forward", "patched")[0].reason


def test_what_only_sizes_the_lists_of_blocks_is_no_block() -> None:
    sizes = "class Sizes:\n    def __init__(self, *sizes):\n        self.pairs, self.joints = sizes\n\n\nclass Painter"
    text = variant(
        MODEL,
        ("class Painter", sizes),
        ("        super().__init__()\n", "        super().__init__()\n        sizes = Sizes(pairs, joints)\n"),
        ("range(pairs)", "range(sizes.pairs)"),
        ("range(joints)", "range(sizes.joints)"),
    )
    assert len(plan_of(model=text).models) == 1


def test_image_first() -> None:
    """The image is what is sliced off, wherever it stands."""
    plan = plan_of(
        model=variant(
            MODEL,
            ("(text, image), dim=1)", "(image, text), dim=1)"),
            ("(text_ids, image_ids)", "(image_ids, text_ids)"),
            ("x[:, text.shape[1] :]", "x[:, : image.shape[1]]"),
        )
    )
    assert (plan.models[0].image, plan.models[0].ids) == ("image", "image_ids")
    plan = plan_of(model=variant(MODEL, ("x[:, text.shape[1] :]", "x[:, : text.shape[1]]")))
    assert (plan.models[0].image, plan.models[0].ids) == ("text", "text_ids")


# Loops


def loop_of(text: str) -> str:
    return after(plan_of(sampling=text), "flow/sampling.py")


def test_slots_have_names_of_their_own() -> None:
    call = "model(image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time)"
    text = variant(
        SAMPLING,
        (
            f"        velocity = {call}\n",
            f"        velocity = {call}\n        velocity = {call}\n        if now < 0.5:\n"
            f"            half, _ = {call}, None\n"
            f"        image = image + {call}\n",
        ),
    )
    plan = plan_of(sampling=text)
    assert plan.models[0].loops[0].slots == ("velocity", "velocity_2", "half", "image")
    result = after(plan, "flow/sampling.py")
    assert [line.split('"')[1] for line in result.splitlines() if "chipmunk.slot" in line] == [
        "velocity_2",
        "half",
        "image",
    ]


def test_a_sampler_object() -> None:
    text = (
        "from flow.model import Painter\n\n\nclass Sampler:\n"
        "    def __init__(self, painter: Painter):\n        self.painter = painter.to('cpu')\n\n"
        "    def run(self, image, times, **more):\n        for time in times:\n"
        "            image = self.step(image, time, more)\n        return image\n\n"
        "    def step(self, image, time, more):\n        return image - self.painter(image=image, time=time, **more)\n"
    )
    plan = plan_of(sampling=text)
    assert "for time in chipmunk.steps(self.painter, times):" in after(plan, "flow/sampling.py")
    assert plan.models[0].loops[0].function == "Sampler.run"
    assert plan.models[0].loops[0].model_parameter is None


def test_only_the_outer_of_two_loops_is_the_steps() -> None:
    text = variant(
        SAMPLING,
        (
            "        image = image + (then",
            "        for _ in range(2):\n"
            "            velocity = model(image, image_ids, text, text_ids, time)\n"
            "        image = image + (then",
        ),
    )
    (again,) = sites(plan_of(sampling=text), "step-clock", "left dense")
    assert (again.file, again.line) == ("flow/sampling.py", 11)
    assert "all but the first run dense" in again.reason
    result = loop_of(text)
    assert result.count("chipmunk.steps") == 1
    assert "for now, then in chipmunk.steps(model, zip" in result
    assert "for _ in range(2):" in result


def test_a_training_loop_is_none_of_denoising_steps() -> None:
    line = "        image = image +"
    text = variant(SAMPLING, (line, "        velocity.sum().backward()\n" + line))
    assert "training" in sites(plan_of(sampling=text), "step-clock", "left dense")[0].reason
    assert loop_of(text) == ""


def test_a_loop_over_a_bare_tuple() -> None:
    assert "in chipmunk.steps(model, (times[:-1], times[1:])):" in loop_of(
        variant(SAMPLING, ("zip(times[:-1], times[1:])", "times[:-1], times[1:]"))
    )


def test_a_model_that_nothing_names_is_known_by_its_keywords() -> None:
    text = variant(
        SAMPLING,
        ("from flow.model import Painter\n\n\n", ""),
        ("model: Painter", "network"),
        ("= model(", "= network("),
    )
    plan = plan_of(
        sampling=text, command=variant(COMMAND, ("print(sample(model,", "print({'one': sample}['one'](model,"))
    )
    assert "chipmunk.steps(network," in after(plan, "flow/sampling.py")


# Command lines


def command(text: str) -> str:
    return after(plan_of(command=text), "flow/command.py")


def test_fire_with_a_dictionary_in_another_file() -> None:
    main = "from fire import Fire\n\nfrom .command import main as paint\n\n\ndef app():\n    Fire({'paint': paint})\n"
    files = {path: text.encode() for path, text in FILES.items()}
    files["flow/command.py"] = COMMAND.split("\n\nif __name__")[0].replace("from fire import Fire\n", "").encode()
    files["flow/__main__.py"] = main.encode()
    plan = plan_repository(files, REGISTRY)
    assert "chipmunk_config: str | None = None):" in after(plan, "flow/command.py")
    assert after(plan, "flow/__main__.py") == ""


@pytest.mark.parametrize("library", ["typer", "click"])
def test_decorated_commands(library: str) -> None:
    decorator = "@app.command()" if library == "typer" else '@click.command()\n@click.option("--name", default="small")'
    text = variant(
        COMMAND,
        ("from fire import Fire\n", f"import {library}\n"),
        ("def main(", ("app = typer.Typer()\n\n\n" if library == "typer" else "") + decorator + "\ndef main("),
        ("Fire(main)", "main()"),
    )
    result = command(text)
    assert "chipmunk_config: str | None = None):" in result
    assert ('@click.option("--chipmunk-config"' in result) == (library == "click")
    assert "    chipmunk.enable(model, chipmunk_config)\n" in result


def test_signatures_and_docstrings() -> None:
    text = variant(
        COMMAND,
        (
            '(name: str = "small", steps: int = 4):\n',
            '(\n    name: str = "small",\n    steps: int = 4,  # enough\n    **more: int,\n):\n'
            '    """Paint.\n\n    Args:\n        name: which\n        steps: how many,\n'
            '            at least one\n\n    More text.\n    """\n',
        ),
    )
    result = command(text)
    assert "    steps: int = 4,  # enough\n    chipmunk_config: str | None = None,\n    **more: int,\n" in result
    assert "            at least one\n        chipmunk_config: Chipmunk configuration file" in result


def test_where_another_branch_has_an_engine_enable_comes_after_both_and_can_tell() -> None:
    text = variant(
        COMMAND,
        (
            "    model = load_painter(name)\n",
            "    if steps:\n        model = load_painter(name)\n    else:\n        model = engines[name]\n",
        ),
    )
    assert "        model = engines[name]\n    chipmunk.enable(model, chipmunk_config)\n" in command(text)


def test_a_branch_without_a_model_keeps_enable_inside_the_other() -> None:
    text = variant(COMMAND, ("    model = load_painter(name)\n", "    if steps:\n        model = load_painter(name)\n"))
    assert "        model = load_painter(name)\n        chipmunk.enable(model, chipmunk_config)\n" in command(text)


PROGRAM = """\
import argparse
import os

from flow.loading import load_painter as load


def parse_args(parser):
    return parser.parse_args()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    args = parser.parse_args()

    name, model = args.name, load(args.name).to("cpu")  # loaded
    print(model)
"""


def test_a_program_without_functions() -> None:
    result = command(PROGRAM)
    assert '    parser.add_argument("--chipmunk-config", default=None' in result
    assert "  # loaded\n    chipmunk.enable(model, args.chipmunk_config)\n" in result


def test_a_model_loaded_out_of_reach_of_the_options() -> None:
    plan = plan_of(command=variant(COMMAND, ("Fire(main)", "main()")))
    assert "CHIPMUNK_CONFIG" in sites(plan, "command-line", "left dense")[0].reason
