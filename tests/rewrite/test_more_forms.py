"""Forms met in repositories that were not looked at when the rules were written."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import DOUBLE, FILES, MODEL, SINGLE, variant

Files = dict[str, str]
REGISTRY = load()


def plan_of(**files: str) -> Plan:
    changed = {name.replace("__", "/") + ".py": text for name, text in files.items()}
    return plan_repository({path: text.encode() for path, text in {**FILES, **changed}.items()}, REGISTRY)


def sites(plan: Plan, status: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in plan.sites:
        if site.status.value == status:
            found.setdefault(site.patch, []).append(site.reason)
    return found


WHOLE = {patch: len(reasons) for patch, reasons in sites(plan_of(), "patched").items()}
"""How many places of each kind the minimal repository has."""


def is_whole(plan: Plan) -> bool:
    return {patch: len(reasons) for patch, reasons in sites(plan, "patched").items()} == WHOLE


GATE = (
    "        return x + self.leave(torch.cat((mixed, self.act(hidden)), 2))\n",
    "        return self.add(x, self.leave(torch.cat((mixed, self.act(hidden)), 2)))\n\n"
    "    def add(self, x, more):\n        return x + more\n",
)


def test_a_helper_that_gets_the_stream_and_what_was_made_of_it_is_not_where_the_work_is() -> None:
    plan = plan_of(flow__single=variant(SINGLE, GATE))
    assert is_whole(plan), sites(plan, "left dense")


CHOSEN = variant(
    MODEL,
    ("pairs, joints):", "pairs, joints, pair=PairBlock, joint=JointBlock):"),
    ("[PairBlock(width, heads) for", "[pair(width, heads) for"),
    ("[JointBlock(width, heads) for", "[joint(width, heads) for"),
)
"""The classes of the blocks are arguments, with defaults."""

OTHER_BLOCK = DOUBLE + "\n\nclass OtherBlock(PairBlock):\n    pass\n"
_SUBCLASS = (
    "\n\nclass Sketcher(Painter):\n"
    "    def __init__(self, *sizes, pair=OtherBlock, joint=JointBlock):\n"
    "        super().__init__({sizes}pair{value}, joint{value})\n\n"
    + MODEL[MODEL.index("    def forward") :].replace("self.out(x)", "self.out(x), None")
)


def test_classes_of_blocks_are_arguments_with_defaults() -> None:
    plan = plan_of(flow__model=CHOSEN)
    assert is_whole(plan), sites(plan, "left dense")


def test_a_constructor_that_gets_another_class_of_block_counts() -> None:
    text = variant(CHOSEN, ("import PairBlock", "import OtherBlock, PairBlock"))
    loading = "from flow.double import OtherBlock\nfrom flow.model import Painter\n\n\ndef load_painter(name):\n"
    both = loading + "    return Painter(4, 32, 4, 3, 3) if name else Painter(4, 32, 4, 3, 3, OtherBlock)\n"
    plan = plan_of(flow__model=text, flow__double=OTHER_BLOCK, flow__loading=both)
    reason = "self.pairs may hold blocks of several classes: PairBlock and OtherBlock"
    assert sites(plan, "left dense")["model-forward"] == [reason]
    only = loading + "    return Painter(4, 32, 4, 3, 3, pair=OtherBlock)\n"
    plan = plan_of(flow__model=text, flow__double=OTHER_BLOCK, flow__loading=only)
    assert plan.models[0].double_block.name == "OtherBlock"


@pytest.mark.parametrize("value", ["=pair", ""])
def test_a_subclass_hands_on_its_own_classes_of_blocks(value: str) -> None:
    end = _SUBCLASS.replace("pair{value}, joint{value}", "pair=pair, joint=joint" if value else "pair, joint")
    end = end.replace("{sizes}", "*sizes, " if value else "4, 32, 4, 3, 3, ")
    text = variant(CHOSEN, ("import PairBlock", "import OtherBlock, PairBlock")) + end
    plan = plan_of(flow__model=text, flow__double=OTHER_BLOCK)
    assert [(m.name, m.double_block.name) for m in plan.models] == [
        ("Painter", "PairBlock"),
        ("Sketcher", "OtherBlock"),
    ]


LIST = "class Blocks(nn.ModuleList):\n    def swap(self, i, block):\n        self[i] = block\n\n\nclass Painter"


def test_a_list_of_modules_of_the_repositorys_own_class() -> None:
    text = variant(MODEL, ("class Painter", LIST), ("nn.ModuleList([", "Blocks(["))
    plan = plan_of(flow__model=text)
    assert is_whole(plan), sites(plan, "left dense")


KEEPING = (
    variant(
        MODEL,
        ("text_ids, time):", "text_ids, time, info):"),
        ("block(image, text, rotation)", "block(image, text, rotation, info)"),
    ),
    variant(
        DOUBLE,
        ("image, text, rotation):", "image, text, rotation, info):"),
        ("        q = torch.cat", "{kept}        q = torch.cat"),
    ),
)
"""Blocks that get a dictionary."""


def test_what_blocks_keep_for_later_would_be_missing_if_they_were_skipped() -> None:
    kept = '        before = info["kept"].get("keys", image_k)\n        info["kept"]["keys"] = image_k - before\n'
    block = KEEPING[1].replace("{kept}", kept)
    plan = plan_of(flow__model=KEEPING[0], flow__double=block)
    assert sites(plan, "left dense")["step-caching"] == [
        "steps are not cached: PairBlock.forward keeps what it computes in info"
    ]
    assert plan.models[0].ids == "image_ids"
    read = KEEPING[1].replace("{kept}", '        image_k = image_k * info["scale"]\n')
    assert is_whole(plan_of(flow__model=KEEPING[0], flow__double=read))


def test_tokens_keep_their_order_where_blocks_are_told_which_ones_to_work_on() -> None:
    places = '        places = info["places"]\n'
    change = '        old = info["keys"].clone()\n        old[:, :, places] = image_k\n        image_k = old\n'
    plan = plan_of(flow__model=KEEPING[0], flow__double=KEEPING[1].replace("{kept}", places + change))
    assert plan.models[0].ids is None
    reason = sites(plan, "patched")["model-forward"][0]
    assert reason.endswith("token order is off: which tokens the blocks work on is told by info")


def test_deleting_a_stream_is_no_use_of_it() -> None:
    plan = plan_of(
        flow__model=variant(MODEL, ("        return self.out(x)", "        del text\n        return self.out(x)"))
    )
    assert is_whole(plan), sites(plan, "left dense")


def test_a_parameter_that_says_something_else_of_time_is_not_the_timestep() -> None:
    wave = "if time_sign is not None:\n            image = image + torch.sin(time_sign)"
    change = (
        "image = self.image_in(image) + time[:, None, None]",
        f"image = self.image_in(image)\n        {wave}\n        image = image + self.embed(time)",
    )
    for given in ("time, time_sign", "time_sign, time"):
        text = variant(MODEL, change, ("text_ids, time):", f"text_ids, {given.replace(',', '=None,')}=None):"))
        plan = plan_of(flow__model=text, flow__sampling="")
        assert 'timesteps="time"' in next(c.after.decode() for c in plan.changes if c.path == "flow/model.py")


RESIDUALS = (
    ("text_ids, time):", "text_ids, time, residuals=None):"),
    (
        "            x = block(x, rotation)\n",
        "            x = block(x, rotation)\n            if residuals is not None:\n"
        "                n = text.shape[1]\n                x[:, n:] = x[:, n:] + residuals[0]\n",
    ),
    ("        for block in self.joints:\n", "        n = text.shape[1]\n        for block in self.joints:\n"),
)
"""A residual is written into the image's part of the joint stream after each block."""


def test_what_is_written_into_the_stream_between_the_blocks_is_part_of_it() -> None:
    plan = plan_of(
        flow__model=variant(MODEL, *RESIDUALS, ("x = x[:, text.shape[1] :]\n        ", "x = x[:, n:]\n        "))
    )
    assert is_whole(plan), sites(plan, "left dense")
    assert "per_token" in next(c.after.decode() for c in plan.changes if c.path == "flow/model.py")


def test_what_is_written_into_something_else_between_the_blocks_is_not() -> None:
    text = variant(MODEL, *RESIDUALS, ("                x[:, n:] = x", "                image[:] = x"))
    text = variant(text, ("return self.out(x)", "return self.out(x) + image"))
    reason = "steps are not cached: image comes out of the blocks too, and is used after them"
    assert sites(plan_of(flow__model=text), "left dense")["step-caching"] == [reason]


BRANCHES = (
    "        for block in self.joints:\n            scale = rotation[:, :1]\n"
    "            x = block(x, rotation * scale)\n",
    "        if image.ndim == 4:\n            scale = rotation[:, :, -1]\n"
    "        else:\n            scale = rotation[:, -1]\n        return self.out(x)",
)


def test_a_name_that_both_branches_bind_anew_has_its_old_value_no_more() -> None:
    loop = "        for block in self.joints:\n            x = block(x, rotation)\n"
    plan = plan_of(
        flow__model=variant(MODEL, (loop, BRANCHES[0]), ("        return self.out(x)", BRANCHES[1] + " * scale"))
    )
    assert is_whole(plan), sites(plan, "left dense")
    one = BRANCHES[1].replace("        else:\n            scale = rotation[:, -1]\n", "")
    plan = plan_of(flow__model=variant(MODEL, (loop, BRANCHES[0]), ("        return self.out(x)", one + " * scale")))
    assert "step-caching" in sites(plan, "left dense")


def test_text_that_a_second_way_of_running_the_blocks_takes_is_nothing_per_image_token() -> None:
    way = "        if self.training:\n            image, text = run_all(self.pairs, image, text)\n"
    loop = "        for block in self.pairs:"
    plan = plan_of(flow__model=variant(MODEL, (loop, way + loop)))
    assert plan.models[0].ids == "image_ids"
    assert "per_token" not in next(c.after.decode() for c in plan.changes if c.path == "flow/model.py")


def test_blocks_of_another_package_are_named() -> None:
    plan = plan_of(flow__model=variant(MODEL, ("from flow.double import", "from package.double import")))
    reason = "the blocks in self.pairs are package.double.PairBlock's, which is no code of this repository"
    assert sites(plan, "left dense")["model-forward"] == [reason]


SERVER = """\
from package import OtherModel, keep
from torch import nn

from flow.loading import load_painter
from flow.model import Painter


class Server:
    def __init__(self):
        self.network = load_painter("small")

    def work(self, image, image_ids, text, text_ids, times):
        network: KIND = self.network
        for time in times:
            image = network(image, image_ids, text, text_ids, time)
        return image
"""


@pytest.mark.parametrize(("kind", "counted"), [("OtherModel", False), ("Painter", True), ("nn.Module", True)])
def test_an_annotation_says_which_model_it_is(kind: str, counted: bool) -> None:
    plan = plan_of(flow__server=SERVER.replace("KIND", kind))
    changed = {change.path: change.after.decode() for change in plan.changes}
    assert ("in chipmunk.steps(network, times):" in changed.get("flow/server.py", "")) is counted


def test_a_loop_over_a_model_that_inherits_from_another_is_its_own() -> None:
    second = "\n\nclass Sketcher(Painter):\n" + MODEL[MODEL.index("    def forward") :].replace("time[:", "2 * time[:")
    used = {path: FILES[path].replace("Painter", "Sketcher") for path in ("flow/sampling.py", "flow/loading.py")}
    plan = plan_of(
        flow__model=MODEL + second, flow__sampling=used["flow/sampling.py"], flow__loading=used["flow/loading.py"]
    )
    assert [(model.name, bool(model.loops)) for model in plan.models] == [("Painter", False), ("Sketcher", True)]


PIPELINE = """\
from diffusers import FluxPipeline, SanaPipeline


class SketchPipeline(FluxPipeline):
    pass


class WeavePipeline(SanaPipeline):
    pass
"""
LOADED = """\
import torch
from sketch.pipeline import SketchPipeline, WeavePipeline


class Server:
    def __init__(self, folder):
        self.pipe = SketchPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        self.pipe.to("cuda")
        self.other = WeavePipeline.from_pretrained(folder)
"""


def test_a_pipeline_that_inherits_from_one_of_diffusers() -> None:
    files = {"sketch/__init__.py": "", "sketch/pipeline.py": PIPELINE, "server.py": LOADED}
    plan = plan_repository({path: text.encode() for path, text in files.items()}, REGISTRY)
    assert [(change.path, change.after.decode().splitlines()[-3:]) for change in plan.changes] == [
        (
            "server.py",
            [
                '        self.pipe.to("cuda")',
                "        chipmunk.enable(self.pipe)",
                "        self.other = WeavePipeline.from_pretrained(folder)",
            ],
        )
    ]


_BODY = DOUBLE[DOUBLE.index("        image_q, image_k") :]
_OUTSIDE = _BODY.replace("self.", "it.").replace("return image, text", "return image, text, image_q")
HANDED = (
    "import torch\n\nfrom flow.attention import attend\n"
    + f"""

class Runner:
    @staticmethod
    def pair(number, it, image, text, rotation, more):
        image, text, query = Runner._pair(it, image, text, rotation)
        for each in more:
            image = each.add(number, image, query)
        return image, text

    @staticmethod
    def _pair(it, image, text, rotation):
{_OUTSIDE}
"""
)
"""A function that is handed the block does its work."""

_CALLS = (
    ("import JointBlock\n", "import JointBlock\nfrom flow.runner import Runner\n"),
    ("text_ids, time):", "text_ids, time, more=()):"),
    ("for block in self.pairs:", "for number, block in enumerate(self.pairs):"),
    ("block(image, text, rotation)", "Runner.pair(0, image=image, text=text, it=block, more=more, rotation=rotation)"),
)
BY_NAME = variant(MODEL, *_CALLS)


def test_what_a_block_is_handed_to_by_name_is_where_its_work_is() -> None:
    plan = plan_of(flow__model=BY_NAME, flow__runner=HANDED)
    assert is_whole(plan), sites(plan, "left dense")
    changed = next(change.after.decode() for change in plan.changes if change.path == "flow/runner.py")
    assert "attend(q, k, v, rotation, **chipmunk.layer(it))" in changed
    assert "chipmunk.mlp(it, it.image_mlp, it.image_norm(image))" in changed
    assert not any(change.path == "flow/double.py" for change in plan.changes)
    reason = sites(plan, "patched")["model-forward"][0]
    assert "token order is off: Runner.pair, which does the blocks' work, may know where tokens lie" in reason


LEAVING = """\
from torch.utils.checkpoint import checkpoint


class Runner:
    @staticmethod
    def pair(number, it, image, text, rotation, more):
        return """


def test_what_leaves_the_work_to_the_block_is_no_place_of_it() -> None:
    for call in ("it(image, text, rotation)", "checkpoint(it, image, text, rotation)"):
        plan = plan_of(flow__model=BY_NAME, flow__runner=LEAVING + call + "\n")
        assert is_whole(plan), sites(plan, "left dense")
        assert "token order is off" not in sites(plan, "patched")["model-forward"][0]


@pytest.mark.parametrize(
    ("model", "runner"),
    [
        (BY_NAME.replace("it=block", "it=number, other=block"), HANDED),  # another one's name
        (BY_NAME.replace("text=text, ", "text=image, "), HANDED),  # one stream twice
        (BY_NAME.replace("more=more", "**more"), HANDED),
        (
            BY_NAME,
            HANDED.replace("        image, text, query =", "        it = it.inner\n        image, text, query ="),
        ),
        (BY_NAME, HANDED.replace("@staticmethod", "@rewritten\n    @staticmethod", 1)),
        (BY_NAME, "from somewhere import Runner\n"),
    ],
)
def test_what_a_block_is_handed_to_is_not_followed_where_it_is_not_understood(model: str, runner: str) -> None:
    plan = plan_of(flow__model=model, flow__runner=runner)
    reason = "Runner.pair does the work of the blocks in self.pairs: it is not followed"
    assert sites(plan, "left dense")["model-forward"] == [reason]
    assert not plan.changes


def test_a_call_that_gets_the_block_by_name_beside_its_own_changes_nothing() -> None:
    beside = "block(image, text, rotation)\n            seen, how = note(block=block, image=image, text=text)"
    assert is_whole(plan_of(flow__model=variant(MODEL, ("block(image, text, rotation)", beside))))


ELSEWHERE = variant(
    SINGLE,
    ("from flow.attention import attend\n", "from diffusers.models.attention_processor import Attention, JointNorm\n"),
    (
        "self.width, self.heads = width, heads\n",
        "self.width, self.heads = width, heads\n        self.norm = JointNorm()\n",
    ),
    ("        self.act =", "        self.mix = Attention(width, heads)\n        self.act ="),
    ("        qkv, hidden =", "        x = self.norm(x)\n        qkv, hidden ="),
    ("attend(q, k, v, rotation)", "self.mix(x, rotation)"),
)


def test_attention_in_another_package_is_said_to_be_there() -> None:
    reason = "it lies in Attention of diffusers, outside this repository, or in what processor that is given"
    assert sites(plan_of(flow__single=ELSEWHERE), "left dense")["attention"] == [reason]
    unknown = ELSEWHERE.replace("self.mix = Attention(", "self.mix = JointNorm(")
    (reason,) = sites(plan_of(flow__single=unknown), "left dense")["attention"]
    assert reason.startswith("no attention function that is known")


def test_arguments_in_a_list_are_said_not_to_be_followed() -> None:
    change = (
        "image, text = block(image, text, rotation)",
        "given = [image, text, rotation]\n            image, text = block(*given)",
    )
    plan = plan_of(flow__model=variant(MODEL, change))
    assert sites(plan, "left dense")["model-forward"] == ["what PairBlock is given, *given, is not followed"]


SETUP = """\
import torch
from diffusers import FluxPipeline
from package.cache import cached


def draw(model, prompt):
    model(prompt).images[0].save("picture.png")


def tune(model, value):
    model.transformer.value = value


pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev").to("cuda")
from package.parallel import mesh_of, spread

mesh = mesh_of(pipe.device.type, size=2)
spread(pipe, mesh=mesh)
MORE
"""
_DRAWN = '\nimage = pipe("a chipmunk").images[0]'


@pytest.mark.parametrize(
    ("more", "before"),
    [
        ("cached(pipe.transformer, 0.1)" + _DRAWN, "cached(pipe.transformer, 0.1)"),
        ("tune(pipe, 1)" + _DRAWN, "tune(pipe, 1)"),
        ("draw(pipe, 'one')" + _DRAWN, "spread(pipe, mesh=mesh)"),
        ("cached(pipe)", "spread(pipe, mesh=mesh)"),
        ("show(1)" + _DRAWN, "spread(pipe, mesh=mesh)"),
        ("name = pipe.name\ncached(pipe)" + _DRAWN, "spread(pipe, mesh=mesh)"),
        ("seen = pipe('first')\ncached(pipe)" + _DRAWN, "spread(pipe, mesh=mesh)"),
        ("seen = call(pipe, 2)\ncached(pipe)" + _DRAWN, "spread(pipe, mesh=mesh)"),
        ("print(pipe)" + _DRAWN, "spread(pipe, mesh=mesh)"),
    ],
)
def test_functions_that_change_the_pipeline_come_before_it_is_enabled(more: str, before: str) -> None:
    plan = plan_repository({"draw.py": SETUP.replace("MORE", more).encode()}, REGISTRY)
    lines = plan.changes[0].after.decode().splitlines()
    assert lines[lines.index("chipmunk.enable(pipe)") - 1] == before


@pytest.mark.parametrize(("given", "counted"), [("self.model", False), ("3", True)])
def test_what_is_given_the_model_does_not_load_it(given: str, counted: bool) -> None:
    trainer = f"""\
from flow.model import Painter


def bare(model):
    return Painter(4, 32, 4, 3, 3) if model == 3 else model


class Trainer:
    def __init__(self):
        self.model = Painter(4, 32, 4, 3, 3)

    def look(self):
        inner = bare({given})
        print(inner.out)
"""
    dense = [site for site in plan_of(flow__trainer=trainer).sites if site.patch == "command-line"]
    assert any("bare" in site.matched for site in dense if site.status.value == "left dense") is counted


RUN = variant(DOUBLE, ("def forward(self, image, text", "def run(self, image, text"))


def test_blocks_without_a_forward_are_run_by_another_method() -> None:
    model = variant(MODEL, ("image, text = block(", "image, text = block.run("))
    plan = plan_of(flow__double=RUN, flow__model=model)
    assert is_whole(plan), sites(plan, "left dense")


def test_blocks_that_do_not_have_what_runs_them_are_said_not_to() -> None:
    reason = "the blocks in self.pairs are PairBlock's, which has no {}"
    for name in ("forward", "work"):
        model = variant(MODEL, ("image, text = block(", f"image, text = block{'' if name == 'forward' else '.work'}("))
        plan = plan_of(flow__double=RUN, flow__model=model)
        assert sites(plan, "left dense")["model-forward"] == [reason.format(name)]
        assert not plan.changes


def test_a_model_whose_streams_are_joined_out_of_sight_is_said_to_be_one() -> None:
    """The names in a function inside the forward are its own: here they are the other way round."""
    inner = "        def join(image, text):\n            return torch.cat((image, text), 1)\n\n"
    join = inner + "        x = join(text, image)\n"
    plan = plan_of(flow__model=variant(MODEL, ("        x = torch.cat((text, image), dim=1)\n", join)))
    reason = (
        "it goes through self.pairs, and then through self.joints; how the streams are joined, or which is the image"
    )
    assert sites(plan, "left dense")["model-forward"] == [f"{reason}, is not understood"]
    assert not plan.changes


def test_a_model_that_draws_a_second_picture_in_the_same_loops_is_said_to() -> None:
    model = variant(
        MODEL,
        ("text_ids, time):", "text_ids, time, other):"),
        (
            "            image, text = block(",
            '            other["image"], other["text"] = block(other["image"], other["text"], rotation)\n'
            "            image, text = block(",
        ),
        (
            "            x = block(",
            '            y = torch.cat((other["text"], other["image"]), 1)\n            z = block(y, rotation)\n'
            '            other["image"] = z[:, text.shape[1] :]\n            x = block(',
        ),
    )
    found = sites(plan_of(flow__model=model), "left dense")["model-forward"]
    assert found == ["each block in self.joints is called at several places, one after the other"]


def test_tokens_along_the_first_axis_are_said_to_be_there() -> None:
    model = variant(
        MODEL,
        ("(text, image), dim=1)\n", "(text, image), dim=0)\n"),
        ("x[:, text", "x[text"),
        ("shape[1] :]", "shape[0] :]"),
    )
    plan = plan_of(flow__model=model)
    assert sites(plan, "left dense")["model-forward"] == ["its tokens lie along the first axis, (L, B, C): not handled"]
    assert not plan.changes


def test_what_may_belong_to_image_tokens_is_named_alone() -> None:
    """The image itself, and what the blocks are given beside the streams, are in what is written there as well."""
    model = variant(
        MODEL,
        *RESIDUALS,
        ("residuals=None):", "regions):"),
        ("if residuals is not None:", "if regions:"),
        ("x[:, n:] = x[:, n:] + residuals[0]\n", "y = self.put(x, regions)\n                x[:, n:] = y[:, n:]\n"),
        ("    def forward", "    def put(self, x, regions):\n        return x * regions\n\n    def forward"),
    )
    (site,) = [site for site in plan_of(flow__model=model).sites if site.patch == "model-forward"]
    assert "token order is off: regions, time may hold one row for each image token" in site.reason
