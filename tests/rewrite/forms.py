"""Small FLUX repositories of other forms: where attention hides in processors, helpers and blocks that join streams.

Each is the minimal repository with some files written otherwise, and the number of attention sites expected in it.
"""

from __future__ import annotations

from chipmunk.rewrite.minimal import DOUBLE, FILES, MODEL, SAMPLING, SINGLE, variant

Files = dict[str, str]

_MIX = (
    "        image_q, image_k, image_v = self.split(self.image_qkv(image))\n"
    "        text_q, text_k, text_v = self.split(self.text_qkv(text))\n"
    "        q = torch.cat((text_q, image_q), dim=2)\n"
    "        k = torch.cat((text_k, image_k), dim=2)\n"
    "        v = torch.cat((text_v, image_v), dim=2)\n"
    "        x = attend(q, k, v, rotation)\n"
)
_WORK = DOUBLE[DOUBLE.index(_MIX) :]
_IN_PROCESSOR = _WORK.replace("self.", "block.")

_ADAPTED = _IN_PROCESSOR.replace(
    "        return image, text\n",
    "        hint = self.key(hint).unflatten(-1, (block.heads, -1)).transpose(1, 2)\n"
    "        extra = torch.nn.functional.scaled_dot_product_attention(image_q, hint, hint)\n"
    "        return image + extra.transpose(1, 2).flatten(2), text\n",
)
_CLASSES = (
    "class Plain:\n    def __call__(self, block, image, text, rotation):\n" + _IN_PROCESSOR,
    "class Adapter(nn.Module):\n"
    "    def __init__(self, width):\n        super().__init__()\n        self.key = nn.Linear(width, width)\n\n"
    "    def forward(self, block, image, text, rotation, hint=None):\n" + _ADAPTED,
    "class Unlike:\n    def __call__(self, block, x, rotation):\n        return attend(x, x, x, rotation)\n",
)
PROCESSORS = variant(
    DOUBLE.replace(_WORK, "        return self.processor(self, image, text, rotation)\n"),
    ("class PairBlock", "\n\n".join(_CLASSES) + "\n\nclass PairBlock"),
    ("        self.heads = heads\n", "        self.heads = heads\n        self.put(Plain())\n"),
    ("    def split(self", "    def put(self, processor):\n        self.processor = processor\n\n    def split(self"),
)
"""The block's work in a processor, which is given the block; one for adapters, with cross-attention, beside it."""

FAST = """\
import torch


def fast(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **more):
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x if skip_output_reshape else x.transpose(1, 2).flatten(2)
"""

HELPER = variant(
    SINGLE,
    ("from flow.attention import attend\n", "from flow.fast import fast\n\nchosen = fast\n"),
    (
        "class JointBlock",
        "class Mix:\n    def __call__(self, mixer, x, rotation):\n"
        "        q, k, v = x.chunk(3, dim=-1)\n"
        "        q, k = mixer.turn(q, rotation), mixer.turn(k, rotation)\n"
        "        return chosen(q, k, v, mixer.heads, mask=None)\n\n\n"
        "class Mixer(nn.Module):\n    usual = Mix\n\n"
        "    def __init__(self, heads, processor=None):\n        super().__init__()\n        self.heads = heads\n"
        "        if processor is None:\n            processor = self.usual()\n        self.put(processor)\n\n"
        "    def put(self, processor):\n        self.processor = processor\n\n"
        "    def turn(self, x, rotation):\n"
        "        return (x.unflatten(2, (self.heads, -1)) * rotation.transpose(1, 2)).flatten(2)\n\n"
        "    def forward(self, x, rotation):\n        return self.processor(self, x, rotation)\n\n\nclass JointBlock",
    ),
    ("self.act = nn", "self.mixer = Mixer(heads)\n        self.act = nn"),
    ("        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)\n", ""),
    ("attend(q, k, v, rotation)", "self.mixer(qkv, rotation)"),
)
"""A module below the block that leaves its work to a processor, which takes no further keyword."""

JOINS_INSIDE = variant(
    SINGLE,
    (
        "forward(self, x, rotation):\n",
        "forward(self, image, text, rotation):\n        x = torch.cat((text, image), 1)\n",
    ),
    ("        return x + self", "        x = x + self"),
    (
        "mixed, self.act(hidden)), 2))\n",
        "mixed, self.act(hidden)), 2))\n        return x[:, text.shape[1] :], x[:, : text.shape[1]]\n",
    ),
)
MODEL_INSIDE = variant(
    MODEL,
    ("text_ids, time):", "text_ids, time, control=None):"),
    ("        x = torch.cat((text, image), dim=1)\n", ""),
    (
        "            x = block(x, rotation)\n",
        "            image, text = block(image, text, rotation)\n"
        "            if control is not None:\n                image = image + control\n",
    ),
    ("        x = x[:, text.shape[1] :]\n        return self.out(x)\n", "        return self.out(image)\n"),
)
"""The blocks of the second list take both streams, and give them back."""

ONE_STREAM = variant(
    SINGLE,
    ("class JointBlock", "class OwnBlock"),
    ("def forward(self, x, rotation)", "def forward(self, stream, rotation)"),
    ("self.enter(x)", "self.enter(stream)"),
    ("return x + ", "return stream + "),
)
OWN_LISTS = variant(
    MODEL_INSIDE,
    ("from flow.double import PairBlock", "from flow.own import OwnBlock"),
    (
        "nn.ModuleList([PairBlock(width, heads) for _ in range(pairs)])\n",
        "nn.ModuleDict(\n            {\n"
        "                name: nn.ModuleList([OwnBlock(width, heads) for _ in range(pairs)])\n"
        '                for name in ("image", "more")\n            }\n        )\n'
        "        self.text_pairs = nn.ModuleList([OwnBlock(width, heads) for _ in range(pairs)])\n",
    ),
    ("time, control=None):", "time, control=None, more=None, more_ids=None):"),
    (
        "        rotation = self.rotate(torch.cat((text_ids, image_ids), dim=1)).unsqueeze(1)\n"
        "        for block in self.pairs:\n            image, text = block(image, text, rotation)\n",
        "        text_rotation, image_rotation = self.rotate(text_ids), self.rotate(image_ids)\n"
        "        for block in self.text_pairs:\n            text = block(text, text_rotation.unsqueeze(1))\n"
        '        for block in self.pairs["image"]:\n            image = block(image, image_rotation.unsqueeze(1))\n'
        "        size = image.shape[1]\n"
        "        if more is not None:\n            more = self.image_in(more)\n"
        "            more_rotation = self.rotate(more_ids)\n"
        '            for block in self.pairs["more"]:\n'
        "                more = block(more, more_rotation.unsqueeze(1))\n"
        "            content = torch.cat([image, more], dim=1)\n"
        "            rotation = torch.cat([text_rotation, image_rotation, more_rotation], dim=1).unsqueeze(1)\n"
        "        else:\n            content = image\n"
        "            rotation = torch.cat([text_rotation, image_rotation], dim=1).unsqueeze(1)\n",
    ),
    (
        "            image, text = block(image, text, rotation)\n",
        "            content, text = block(content, text, rotation)\n",
    ),
    (
        "            if control is not None:\n                image = image + control\n"
        "        return self.out(image)\n",
        "        image = content[:, :size]\n        return self.out(image)\n",
    ),
)
"""A list of blocks for each stream, then joint blocks of two streams; reference tokens behind the image's."""

_FORWARD = MODEL[MODEL.index("    def forward(") :]
FUNCTION = variant(
    MODEL.replace(_FORWARD, "    def forward(self, image):\n        return None\n"),
    ("class Painter", "def run(block, slow, *given, **named):\n    return block(*given, **named)\n\n\nclass Painter"),
) + variant(
    "\n\n" + _FORWARD.replace("\n    ", "\n").replace("    def", "def", 1).replace("self", "painter"),
    ("def forward(painter, image,", "def paint(painter: Painter, image,"),
    ("block(image, text, rotation)", "run(block, False, image, text, rotation)"),
    ("block(x, rotation)", "run(block, slow=False, x=x, rotation=rotation)"),
)
"""The model's work is done in a function that is given the model, and runs blocks through another."""

FORMS: dict[str, tuple[Files, int]] = {
    "processors": ({**FILES, "flow/double.py": PROCESSORS}, 4),
    "a processor below a module": ({**FILES, "flow/single.py": HELPER, "flow/fast.py": FAST}, 3),
    "streams joined inside": ({**FILES, "flow/single.py": JOINS_INSIDE, "flow/model.py": MODEL_INSIDE}, 3),
    "a list for each stream": (
        {**FILES, "flow/own.py": ONE_STREAM, "flow/single.py": JOINS_INSIDE, "flow/model.py": OWN_LISTS},
        3,
    ),
    "a function of the model": (
        {
            **FILES,
            "flow/model.py": FUNCTION,
            "flow/sampling.py": variant(
                SAMPLING,
                ("import Painter", "import Painter, paint"),
                ("velocity = model(", "velocity = paint(painter=model, "),
            ),
        },
        3,
    ),
}
"""Name → the repository, and how many attention sites are patched in it."""
