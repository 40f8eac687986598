"""A repository of no known family, verified by the names in its signatures alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk import registry
from chipmunk.apply import carry_out, plan_update
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import ATTENTION, FILES, MODEL, variant
from chipmunk.verify import VerifyError, VerifyOptions, run

NORMED = variant(
    ATTENTION,
    (
        "q, k = q * rotation, k * rotation",
        "q, k = (8 * torch.nn.functional.normalize(x, dim=-1) * rotation for x in (q, k))",
    ),
)
"""Else the softmax is a choice of one key, which rounding decides."""

SIZES = "self, channels=16, width=3072, num_heads=24, depth=3, single_depth=1, flavour=None"


def repository(folder: Path, model: str) -> Path:
    for path, text in {**FILES, "flow/attention.py": NORMED, "flow/model.py": model}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    known = registry.load()
    carry_out(plan_update(folder, lambda files: plan_repository(files, known)))
    return folder


def with_defaults(*changes: tuple[str, str]) -> str:
    return variant(
        MODEL,
        ("self, channels, width, heads, pairs, joints", SIZES),
        ("width // heads", "width // num_heads"),
        ("PairBlock(width, heads) for _ in range(pairs)", "PairBlock(width, num_heads) for _ in range(depth)"),
        (
            "JointBlock(width, heads) for _ in range(joints)",
            "JointBlock(width, num_heads) for _ in range(single_depth)",
        ),
        (
            "self.rotate(torch.cat((text_ids, image_ids), dim=1))",
            "self.rotate(torch.cat((text_ids, image_ids), 1)).tanh()",
        ),
        *changes,
    )


def test_the_target_for_all_recognises_nothing_by_itself() -> None:
    targets = registry.load().targets
    assert not targets["by-signature"].recognise([], {})
    files = {path: text.encode() for path, text in FILES.items()}
    plan = plan_repository(files, registry.load())
    assert plan.models
    assert plan.target is None


@pytest.mark.slow
def test_a_model_with_defaults_is_verified(tmp_path: Path) -> None:
    root = repository(tmp_path / "mine", with_defaults())
    report = run(root, VerifyOptions(only=("own loop",)))
    assert {check.name: check.says for check in report.checks if not check.holds} == {}
    assert any("sample" in note and "was not run" in note for note in report.notes)


@pytest.mark.slow
def test_an_argument_that_no_name_tells_gets_a_file_that_builds_and_calls_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_defaults(
        ("text_ids, time):\n", "text_ids, time, flavour):\n"),
        ("self.image_in(image) +", "self.image_in(image) * flavour +"),
    )
    root = repository(tmp_path / "mine", model)
    with pytest.raises(VerifyError, match=r"Painter.forward\(\) needs 'flavour'") as refused:
        run(root)
    assert refused.value.next_command == f"chipmunk verify {root} --factory verify_factory:build"
    text = refused.value.message.partition("\n\n")[2]
    assert text.count("...") == 3  # the rest, positions too, is filled in
    text = text.replace("noise(batch, height * width, ...)", "noise(batch, height * width, 16)")
    text = text.replace("noise(batch, text_tokens, ...)", "noise(batch, text_tokens, 16)")
    text = text.replace('"flavour": ...', '"flavour": 1.5')
    monkeypatch.chdir(tmp_path)
    Path("verify_factory.py").write_text(text)
    report = run(root, VerifyOptions(factory="verify_factory:build", only=("own loop",)))
    assert {check.name: check.says for check in report.checks if not check.holds} == {}
