"""Every rewriting on the smallest repository: the same sites, and the same numbers, rewritten and patched."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from chipmunk.rewrite.minimal import FILES, variant

from .judge import (
    BROKEN,
    DENSE,
    KINDS,
    NOT_HERE,
    REWRITINGS,
    SAME,
    Outcome,
    combined,
    covered,
    drawn,
    expected,
    judge,
    read,
    rewritten,
    write,
)
from .part import part_of
from .program import Files, Program

ROOT = Path(__file__).parents[2]
NOT_IN_THIS_ONE = {
    "ruff format": "it is formatted",
    "helper for the residual": "it has no gates",
    "last linear under `with`": "it is in the `return`",
    "attention called by position": "it is",
}
WANTED = {
    "attention": 2,
    "command-line": 1,
    "double-mlp": 1,
    "model-forward": 1,
    "single-mlp": 2,
    "step-caching": 1,
    "step-clock": 1,
}


def merged() -> Files:
    """The minimal repository with attention and both blocks in one file, which can be taken apart."""
    own = "from flow.attention import attend\n"
    double = variant(FILES["flow/double.py"], (own, ""), ("import torch\nfrom torch import nn\n", ""))
    single = variant(FILES["flow/single.py"], (own, ""), ("import torch\nfrom torch import nn\n", ""))
    attention = variant(FILES["flow/attention.py"], ("import torch\n", "import torch\nfrom torch import nn\n"))
    model = variant(
        FILES["flow/model.py"],
        (
            "from flow.double import PairBlock\nfrom flow.single import JointBlock",
            "from flow.layers import JointBlock, PairBlock",
        ),
        ("class Painter", "SCALE = 1.0\n\n\nclass Scaled(nn.Module):\n    pass\n\n\nclass Painter"),
    )
    kept = {
        path: text
        for path, text in FILES.items()
        if path.split("/")[1] not in ("attention.py", "double.py", "single.py")
    }
    layers = attention + "\n\ndef unrelated(x):\n    return x\n" + double + single
    sampling = FILES["flow/sampling.py"] + "\n\ndef unrelated(x):\n    return x\n"
    return {**kept, "flow/layers.py": layers, "flow/model.py": model, "flow/sampling.py": sampling}


PROGRAM = Program.of(merged())


def output(root: Path, file: str, name: str) -> torch.Tensor:
    """What the model computes, from the code under `root`."""
    sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        torch.manual_seed(0)
        model = getattr(module, name)(4, 32, 4, 2, 2)
        image, text = torch.randn(1, 6, 4), torch.randn(1, 3, 4)
        result: torch.Tensor = model(image, torch.ones(1, 6, 3), text, torch.ones(1, 3, 3), torch.ones(1))
        return result
    finally:
        sys.path.remove(str(root))
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "flow"]:
            del sys.modules[loaded]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    root = tmp_path_factory.mktemp("original")
    write(root, {path: text.encode() for path, text in PROGRAM.files.items()})
    return output(root, "flow/model.py", "Painter")


def check(outcome: Outcome, files: Files | None, original: torch.Tensor, root: Path) -> None:
    assert outcome.kind == SAME, outcome
    assert files is not None
    assert outcome.plan is not None
    facts = outcome.plan.models[0]
    before = {path: text.encode() for path, text in files.items()}
    write(root / "rewritten", before)
    write(root / "patched", {**before, **{change.path: change.after for change in outcome.plan.changes}})
    for side in ("rewritten", "patched"):
        assert torch.equal(output(root / side, facts.file, facts.name), original), side


@pytest.mark.parametrize("name", REWRITINGS)
def test_each_rewriting(name: str, original: torch.Tensor, tmp_path: Path) -> None:
    files = rewritten(PROGRAM, name, seed=0)
    outcome = judge(name, files, WANTED)
    if outcome.kind == NOT_HERE:
        assert name in NOT_IN_THIS_ONE
        return
    check(outcome, files, original, tmp_path)


def test_some_together(original: torch.Tensor, tmp_path: Path) -> None:
    for number in range(3):
        label, files = combined(PROGRAM, list(REWRITINGS), number, seed=0)
        check(judge(label, files, WANTED), files, original, tmp_path / str(number))


def test_a_file_with_the_name_of_a_folder_keeps_it(original: torch.Tensor, tmp_path: Path) -> None:
    inner = {"flow/attention/attention.py": FILES["flow/attention.py"], "flow/attention/__init__.py": ""}
    inner["flow/attention/__init__.py"] = "from .attention import attend\n"
    others = {path: text for path, text in FILES.items() if path != "flow/attention.py"}
    files = rewritten(Program.of({**others, **inner}), "rename the files", seed=0)
    check(judge("rename the files", files, WANTED), files, original, tmp_path)


def test_the_judge_sees_what_is_missing() -> None:
    lost = variant(
        PROGRAM.files["flow/layers.py"], ("self.image_mlp(self.image_norm(image))", "self.image_norm(image)")
    )
    outcome = judge("lost", {**PROGRAM.files, "flow/layers.py": lost}, WANTED)
    assert outcome.kind == DENSE
    assert outcome.why[0] == "double-mlp 0 of 1"
    assert judge("bad", {**PROGRAM.files, "flow/model.py": "def f(:\n"}, WANTED).kind == BROKEN
    assert judge("none", None, WANTED).kind == NOT_HERE


def test_the_starter_is_as_written_down() -> None:
    program = Program.of(read(ROOT / "templates/flux-starter"))
    assert covered(program.plan) == expected()["flux-starter"].sites


def test_a_part_holds_what_its_files_import() -> None:
    files = {
        "pack/__init__.py": "from .model import Model\nfrom .unused import Other\nfrom .stars import *\n",
        "pack/model.py": "import torch\nfrom .layers import Block\n\n\ndef load():\n    import pack.lazy\n",
        "pack/layers.py": "",
        "pack/stars.py": "from .helper import attend\n",
        "pack/helper.py": "",
        "pack/lazy.py": "",
        "pack/unused.py": "",
        "run/loop.py": "from pack import Model, attend\n",
        "run/other.py": "",
    }
    kept = part_of(files, ["run/loop.py"])
    wanted = {"run/loop.py", "pack/__init__.py", "pack/model.py", "pack/layers.py", "pack/stars.py", "pack/helper.py"}
    assert kept.keys() == wanted
    assert part_of(files, ["run/"]).keys() == wanted | {"run/other.py"}
    with pytest.raises(ValueError, match="nowhere"):
        part_of(files, ["nowhere.py"])


def test_a_draw_has_every_kind_in_its_proportion() -> None:
    names = drawn(34, seed=0)
    assert len(names) == 34
    assert names == drawn(34, seed=0) != drawn(34, seed=1)
    for kind in KINDS:
        assert abs(len(kind.keys() & names) - 34 * len(kind) / len(REWRITINGS)) <= 1
    assert drawn(1000, seed=0) == list(REWRITINGS)
