"""Forms that rewritten repositories showed to be missed, each as small as it gets."""

from __future__ import annotations

from chipmunk.rewrite.minimal import FILES, variant

from .judge import covered
from .program import Files, plan_of

LINE = "\n        "
SLICED = variant(
    FILES["flow/single.py"],
    (
        "qkv, hidden = torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)",
        f"both = self.enter(x){LINE}qkv, hidden = both[..., : 3 * self.width], both[..., 3 * self.width :]",
    ),
)


def sites(changed: Files) -> dict[str, int]:
    return covered(plan_of({**FILES, **changed}))


def test_two_slices_are_laid_out_in_two_ways() -> None:
    assert sites({"flow/single.py": SLICED})["single-mlp"] == 2
    broken = variant(SLICED, ("both[..., 3 * self.width :]", f"both[..., 3{LINE}*{LINE}self{LINE}.width :]"))
    assert sites({"flow/single.py": broken})["single-mlp"] == 2
    other = variant(SLICED, ("both[..., 3 * self.width :]", f"both[..., 2{LINE}* self.width :]"))
    assert "single-mlp" not in sites({"flow/single.py": other})
