"""Repositories of other forms are patched, run as before while Chipmunk is off, and the same with everything kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import variant

from .forms import FORMS, Files
from .test_runs import write

REGISTRY = load()
ONLY = ["model-forward", "attention", "step-clock"]
PROGRAM = """
import importlib, json, sys
import torch

KEPT = {
    "attn": {"top_keys": 1.0, "mbm": 8, "counts_multiple_of": 1, "first_n_dense_layers": 0},
    "mlp": {"is_enabled": False},
    "patchify": {"chunk_size_1": 2, "chunk_size_2": 1},
}
results = {}
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "flow"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    torch.manual_seed(0)
    model = importlib.import_module("flow.loading").load_painter("small")
    sample = importlib.import_module("flow.sampling").sample
    image, text = torch.randn(2, 16, 4), torch.randn(2, 5, 4)
    ids = torch.zeros(2, 16, 3)
    ids[..., 1], ids[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
    times = torch.linspace(1, 0, 13).tolist()
    with torch.no_grad():
        run = lambda: sample(model, image, ids, text, torch.zeros(2, 5, 3), times).flatten().tolist()
        found = {"off": run()}
        if folder.endswith("patched"):
            import chipmunk
            chipmunk.enable(model, KEPT)
            found["kept"] = run()
            statistics = chipmunk.statistics(model)
            calls = [layer.attention["main"] for layer in statistics.layers]
            found["calls"] = [call.sparse > 0 and not call.dense for call in calls]
            found["order"] = list(statistics.token_order)
    results[folder] = found
    sys.path.remove(folder)
print(json.dumps(results))
"""


def plan_of(files: Files) -> Plan:
    return plan_repository({path: text.encode() for path, text in files.items()}, REGISTRY, only=ONLY)


def after(files: Files, plan: Plan) -> Files:
    return {**files, **{change.path: change.after.decode() for change in plan.changes}}


def attention(plan: Plan, status: str) -> list[str]:
    return [f"{s.file}: {s.reason}" for s in plan.sites if s.patch == "attention" and s.status.value == status]


@pytest.mark.parametrize("name", FORMS)
def test_sites(name: str) -> None:
    files, expected = FORMS[name]
    plan = plan_of(files)
    assert len(attention(plan, "patched")) == expected, attention(plan, "patched")
    assert len(plan.models) == 1
    assert plan.models[0].ids == "image_ids"
    again = plan_of(after(files, plan))
    assert not again.changes
    assert not attention(again, "patched")


def test_they_run(tmp_path: Path) -> None:
    pairs: dict[str, tuple[str, str]] = {}
    for index, (name, (files, _)) in enumerate(FORMS.items()):
        folders = {"original": files, "patched": after(files, plan_of(files))}
        written = [
            write(tmp_path / f"{index}-{kind}", {p: text.encode() for p, text in texts.items()})
            for kind, texts in folders.items()
        ]
        pairs[name] = (written[0], written[1])
    environment = {k: v for k, v in os.environ.items() if k != "CHIPMUNK_CONFIG"}
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(folder for pair in pairs.values() for folder in pair)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    for name, (original, patched) in pairs.items():
        assert results[original]["off"] == results[patched]["off"], name
        size = max(map(abs, results[original]["off"]))
        kept = zip(results[patched]["kept"], results[original]["off"], strict=True)
        assert max(abs(a - b) for a, b in kept) < 1e-5 * max(size, 1), name
        assert results[patched]["calls"] == [True] * 6, name
        assert results[patched]["order"] == ["reordered"], name


def test_a_processor_finds_its_layer_in_the_block_that_it_is_given() -> None:
    files, _ = FORMS["processors"]
    plan = plan_of(files)
    text = after(files, plan)["flow/double.py"]
    assert "return self.processor(self, image, text, rotation)\n" in text
    assert text.count("attend(q, k, v, rotation, **chipmunk.layer(block))") == 2
    assert "attend(x, x, x, rotation)" in text
    assert [reason for reason in attention(plan, "left dense") if "cross-attention" in reason]


def test_a_processor_of_a_module_finds_its_layer_in_the_module() -> None:
    files, _ = FORMS["a processor below a module"]
    text = after(files, plan_of(files))["flow/single.py"]
    assert 'chipmunk.attention(chipmunk.layer(mixer).get("chipmunk_layer"), chosen, q, k, v' in text
    assert "return self.processor(self, x, rotation)\n" in text
    assert "self.mixer(qkv, rotation)\n" in text


def test_a_processor_that_is_given_nothing_to_find_its_layer_in_stays() -> None:
    files, _ = FORMS["a processor below a module"]
    blind = variant(
        files["flow/single.py"],
        ("def __call__(self, mixer, x, rotation)", "def __call__(self, heads, turn, x, rotation)"),
        ("mixer.turn", "turn"),
        ("mixer.heads", "heads"),
        ("self.processor(self, x, rotation)", "self.processor(self.heads, self.turn, x, rotation)"),
    )
    plan = plan_of({**files, "flow/single.py": blind})
    assert "takes no further keyword" in attention(plan, "left dense")[0]
    assert "flow/single.py" not in {change.path for change in plan.changes}


def test_optional_residuals_keep_the_order_where_they_are_given() -> None:
    files, _ = FORMS["streams joined inside"]
    text = " ".join(after(files, plan_of(files))["flow/model.py"].split())
    assert 'ids="image_ids", per_token=("control",)' in text


def test_a_list_in_a_dictionary_has_a_dotted_name() -> None:
    plan = plan_of(FORMS["a list for each stream"][0])
    assert (plan.models[0].double, plan.models[0].single) == ("pairs.image", "joints")


def test_steps_are_skipped_in_a_list_in_a_dictionary() -> None:
    files, _ = FORMS["a list for each stream"]
    both = [*ONLY, "step-caching"]

    def patched(given: Files) -> str:
        plan = plan_repository({path: text.encode() for path, text in given.items()}, REGISTRY, only=both)
        again = {path: text.encode() for path, text in after(given, plan).items()}
        assert not plan_repository(again, REGISTRY, only=both).changes
        return after(given, plan)["flow/model.py"]

    text = patched(files)
    assert 'in chipmunk.blocks(self.pairs["image"], self, image):' in text
    assert 'in self.pairs["more"]:' in text
    assert "in self.text_pairs:" in text
    assert "in chipmunk.blocks(self.joints, self):" in text
    assert "image = chipmunk.hidden(self, content[:, :size])" in text
    model = files["flow/model.py"]
    some, other = (
        patched(
            {**files, "flow/model.py": variant(model, ('in self.pairs["image"]:', f'in self.pairs["image"]{more}:'))}
        )
        for more in ("[1:]", ".children()")
    )
    assert 'in chipmunk.blocks(self.pairs["image"], self, image)[1:]:' in some
    assert "chipmunk.blocks" not in other


def test_a_function_is_told_which_parameter_is_the_model() -> None:
    files, _ = FORMS["a function of the model"]
    text = " ".join(after(files, plan_of(files))["flow/model.py"].split())
    assert '@chipmunk.model_forward( model="painter", double="pairs", single="joints", image="image"' in text
    silent = files["flow/model.py"].replace("painter: Painter", "painter")
    assert [model.name for model in plan_of({**files, "flow/model.py": silent}).models] == ["Painter"]
    other = silent.replace("painter.pairs", "painter.others")  # a list that no class of the file has
    assert not plan_of({**files, "flow/model.py": other}).models


def test_a_controlnet_of_blocks_that_join_the_streams_stays() -> None:
    files, _ = FORMS["streams joined inside"]
    control = variant(
        files["flow/model.py"],
        ("        for block in self.joints:\n", "        kept = []\n        for block in self.joints:\n"),
        (
            "            if control is not None:\n                image = image + control\n",
            "            kept.append(image)\n",
        ),
        ("        return self.out(image)\n", "        return kept\n"),
    )
    assert not plan_of({**files, "flow/model.py": control}).models


def test_a_model_that_borrows_another_ones_blocks_stays() -> None:
    files = dict(FORMS["streams joined inside"][0])
    files["video/model.py"] = files["flow/model.py"].replace("class Painter", "class Film")
    plan = plan_of(files)
    assert [model.name for model in plan.models] == ["Painter"]
    left = [(s.file, s.reason) for s in plan.sites if s.patch == "model-forward" and s.status.value == "left dense"]
    assert left == [("video/model.py", "it borrows the class PairBlock from Painter, and stays dense")]
