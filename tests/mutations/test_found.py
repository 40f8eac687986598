"""Forms that rewritten repositories showed to be missed, each as small as it gets."""

from __future__ import annotations

from chipmunk.rewrite import SiteStatus
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


def test_a_concatenation_outside_the_with_of_its_linear() -> None:
    held = f"both = torch.cat((mixed, self.act(hidden)), 2){LINE}with torch.no_grad():{LINE}    out = self.leave(both)"
    apart = variant(
        FILES["flow/single.py"],
        ("return x + self.leave(torch.cat((mixed, self.act(hidden)), 2))", f"{held}{LINE}return x + out"),
    )
    plan = plan_of({**FILES, "flow/single.py": apart})
    (left,) = [site for site in plan.sites if site.patch == "single-mlp"]
    assert left.status is SiteStatus.LEFT_DENSE
    assert "are in different branches or `with` blocks" in left.reason
    beside = variant(
        apart,
        (f"both = torch.cat((mixed, self.act(hidden)), 2){LINE}", ""),
        ("    out =", "    both = torch.cat((mixed, self.act(hidden)), 2)\n            out ="),
    )
    assert sites({"flow/single.py": beside})["single-mlp"] == 2


def outside(given: str) -> Files:
    """The work of the model in a function of another file."""
    head, work = FILES["flow/model.py"].split("    def forward(self")
    function = ("def forward(self" + work).replace("self.", "painter.").replace("def forward(self", f"def run({given}")
    lines = [line[4:] if line.startswith("    ") else line for line in function.splitlines(keepends=True)]
    return {
        "flow/model.py": head + "    def forward(self, *args, **kwargs):\n        return None\n",
        "flow/run.py": "import torch\n\nfrom flow.model import Painter\n\n\n" + "".join(lines),
    }


def test_a_function_is_given_the_model_without_being_told_its_class() -> None:
    for given in ("painter: Painter", "painter: 'Painter'", "painter: Painter | None", "painter"):
        found = sites(outside(given))
        assert (found["attention"], found["double-mlp"], found["single-mlp"], found["model-forward"]) == (2, 1, 2, 1), (
            given
        )


def test_a_function_that_may_be_given_two_models_says_so() -> None:
    files = outside("painter")
    second = files["flow/model.py"].replace("class Painter", "class Sketcher")
    both = variant(files["flow/run.py"], ("import Painter\n", "import Painter\nfrom flow.other import Sketcher\n"))
    plan = plan_of({**FILES, **files, "flow/run.py": both, "flow/other.py": second})
    assert not plan.models
    (left,) = [site for site in plan.sites if site.patch == "model-forward"]
    assert "which of Painter and Sketcher run in flow/run.py is given is not known" in left.reason


def test_a_processor_in_a_file_that_imports_the_default_one() -> None:
    """And one in a file that does not, which may be another model's."""
    work = (
        FILES["flow/double.py"].split("    def forward(self, image, text, rotation):\n")[1].replace("self.", "block.")
    )
    default = f"class Plain:\n    def __call__(self, block, image, text, rotation):\n{work}"
    double = FILES["flow/double.py"].split("    def forward(self")[0] + (
        "    def forward(self, image, text, rotation):\n        return self.processor(self, image, text, rotation)\n"
    )
    double = variant(double, ("self.heads = heads", "self.heads = heads\n        self.set_processor(Plain())"))
    double = variant(
        double,
        (
            "    def split",
            "    def set_processor(self, processor):\n        self.processor = processor\n\n    def split",
        ),
    )
    scaled = default.replace("class Plain", "class Scaled")
    importing = "import torch\n\nfrom flow.attention import attend\nfrom flow.double import PairBlock\n\n\n" + scaled
    files = {"flow/double.py": variant(double, ("class PairBlock", default + "\n\nclass PairBlock"))}
    alone = sites(files)["double-mlp"]
    assert alone == 1
    assert sites({**files, "flow/adapters.py": importing})["double-mlp"] == 2
    module = variant(importing, ("from flow.double import PairBlock\n", "from . import double\n"))
    assert sites({**files, "flow/adapters.py": module})["double-mlp"] == 2
    stranger = variant(importing, ("from flow.double import PairBlock\n", ""))
    assert sites({**files, "flow/adapters.py": stranger})["double-mlp"] == 1
    other = variant(importing, ("(self, block, image, text, rotation)", "(self, block, image, rotation, text)"))
    assert sites({**files, "flow/adapters.py": other})["double-mlp"] == 1
