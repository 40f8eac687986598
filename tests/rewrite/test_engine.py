"""What the engine promises whatever the rules do: all or nothing, proven, and the rest goes on without a bad file."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from chipmunk.registry import Patch, load
from chipmunk.rewrite import Plan, SelectionError, SiteStatus, engine, plan_repository, roles
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import FILES, MODEL, SINGLE
from chipmunk.rewrite.repository import Function, Repository
from chipmunk.rewrite.token_order import Order

REGISTRY = load()
SOURCES = {path: text.encode() for path, text in FILES.items()}


def after(files: dict[str, bytes], plan: Plan) -> dict[str, bytes]:
    return {**files, **{change.path: change.after for change in plan.changes}}


FULL = after(SOURCES, plan_repository(SOURCES, REGISTRY))


def refused(plan: Plan) -> list[tuple[str, str]]:
    return [(site.file, site.patch) for site in plan.sites if site.status is SiteStatus.REFUSED]


# Nothing to find


def test_no_files() -> None:
    assert plan_repository({}, REGISTRY).sites == ()


def test_not_a_flux_repository() -> None:
    plan = plan_repository({"a.py": b"print('hello')\n", "b/c.py": b"class A:\n    pass\n"}, REGISTRY)
    assert (plan.changes, plan.sites, plan.models, plan.target) == ((), (), (), None)


# Bad files


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (SINGLE.encode() + b"def broken(:\n", "parse"),
        (b"# -*- coding: nonsense -*-\n" + SINGLE.encode(), "read"),
        (SINGLE.encode() + b"# \xff\xfe\n", "read"),
        (SINGLE.encode() + b"x = '\x00'\n", "parse"),
        (SINGLE.encode().replace(b"        mixed =", b"\\\n        mixed ="), "parse"),
        (
            SINGLE.encode().replace(
                b"        mixed =", b"        if x:\n            \\\n            x += 1\n        mixed ="
            ),
            "parse",
        ),
        (b"x = " + b"(" * 500 + b")" * 500 + b"\n" + SINGLE.encode(), "parse"),
    ],
    ids=["syntax", "encoding", "not utf-8", "null", "no round trip", "LibCST cannot", "too deep"],
)
def test_a_bad_file_is_refused_and_stays(content: bytes, step: str) -> None:
    plan = plan_repository({**SOURCES, "flow/single.py": content}, REGISTRY)
    assert ("flow/single.py", step) in refused(plan)
    assert "flow/single.py" not in {change.path for change in plan.changes}
    assert any("flow/single.py" in site.reason for site in plan.sites if site.file == "flow/model.py")


def test_a_bad_file_beside_the_model_changes_nothing_else() -> None:
    plan = plan_repository({**SOURCES, "flow/other.py": MODEL.encode() + b"def broken(:\n"}, REGISTRY)
    assert refused(plan) == [("flow/other.py", "parse")]
    reason = next(site.reason for site in plan.sites if site.file == "flow/other.py")
    assert "may hold the model" in reason
    version = f"Python {sys.version_info[0]}.{sys.version_info[1]}"  # a newer one may read it
    assert f"{version}, which chipmunk runs on, cannot read it: " in reason
    assert after(SOURCES, plan) == FULL


def test_files_that_cannot_matter_are_not_even_parsed() -> None:
    plan = plan_repository({**SOURCES, "broken.py": b"def broken(:\n"}, REGISTRY)
    assert refused(plan) == []


# Selection


def test_attention_and_mlps_bring_the_models_forward() -> None:
    assert set(plan_repository(SOURCES, REGISTRY, only=["attention"]).patches) == {"attention", "model-forward"}
    assert set(plan_repository(SOURCES, REGISTRY, only=["mlp"]).patches) == {
        "double-mlp",
        "single-mlp",
        "model-forward",
    }
    assert set(plan_repository(SOURCES, REGISTRY, only=["command-line"]).patches) == {"command-line"}


@pytest.mark.parametrize("names", [["attentoin"], ["attention", ""]])
def test_an_unknown_patch_is_an_error_that_names_the_known_ones(names: list[str]) -> None:
    with pytest.raises(SelectionError, match="double-mlp"):
        plan_repository(SOURCES, REGISTRY, only=names)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(SelectionError, match="no target called nonsense"):
        plan_repository(SOURCES, REGISTRY, target="nonsense")


def test_one_patch_after_the_other_is_all_at_once() -> None:
    files = SOURCES
    for name in ("single-mlp", "command-line", "attention", "step-clock", "double-mlp", "step-caching"):
        plan = plan_repository(files, REGISTRY, only=[name])
        assert plan.changes
        files = after(files, plan)
    assert files == FULL


@pytest.mark.parametrize("path", [path for path in SOURCES if FULL[path] != SOURCES[path]])
def test_a_half_patched_repository_is_completed(path: str) -> None:
    half = {**FULL, path: SOURCES[path]}
    plan = plan_repository(half, REGISTRY)
    assert [change.path for change in plan.changes] == [path]
    assert after(half, plan) == FULL


@pytest.mark.parametrize("lost", ["**chipmunk.layer(self)", "chipmunk_layer=None", "@chipmunk.model_forward"])
def test_a_single_site_that_was_taken_out_is_put_back(lost: str) -> None:
    path, text = next((p, t.decode()) for p, t in FULL.items() if lost in t.decode())
    if lost.startswith("@"):
        start = text.index("    @chipmunk")
        damaged = text[:start] + text[text.index("    def forward", start) :]
    else:
        damaged = text.replace(", " + lost, "")
    half = {**FULL, path: damaged.encode()}
    assert after(half, plan_repository(half, REGISTRY)) == FULL


# Proof


def with_rule(rule: Callable[[Context], None]) -> Plan:
    extra = Patch("extra", "1", "A rule of a third party", "", (), "test", rule)
    return plan_repository(SOURCES, replace(REGISTRY, patches={**REGISTRY.patches, "extra": extra}))


def test_another_package_of_our_name_is_in_the_way() -> None:
    files = {f"src/{path}": text for path, text in SOURCES.items()}
    plan = plan_repository({**files, "src/chipmunk/__init__.py": b"from .sparse import SparseAttention\n"}, REGISTRY)
    assert plan.changes == ()
    assert {site.status for site in plan.sites} == {SiteStatus.REFUSED}
    assert "import chipmunk means src/chipmunk/__init__.py there" in plan.sites[0].reason
    # A copy of this package is not in the way, nor is a module that is imported by a longer name.
    for path, text in (("src/chipmunk/__init__.py", b"model_forward = 1\n"), ("src/more/chipmunk.py", b"")):
        assert plan_repository({**files, path: text, "src/more/__init__.py": b""}, REGISTRY).changes


def test_a_rule_that_never_ends_is_refused() -> None:
    def rule(context: Context) -> None:
        model = context.models[0]
        context.insert_before(model.owner.source, model.owner.node, "# again\n")
        context.patched(model.owner.source, model.owner.node, "a comment each time")

    plan = with_rule(rule)
    assert plan.changes == ()
    assert all("a second run would change" in site.reason for site in plan.sites)
    assert {site.status for site in plan.sites} == {SiteStatus.REFUSED}


def test_the_second_run_asks_for_no_reasons_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What speaks against another order of tokens decides what is written, not whether it stands there."""
    asked: list[str] = []

    def order_of(repository: Repository, method: Function, *given: Any) -> Order:
        asked.append(method.name)
        return found(repository, method, *given)

    found = roles.order_of
    monkeypatch.setattr(roles, "order_of", order_of)
    assert plan_repository(SOURCES, REGISTRY).changes
    assert asked == ["Painter.forward"]


def test_a_rule_that_breaks_the_syntax_is_refused() -> None:
    def rule(context: Context) -> None:
        model = context.models[0]
        context.insert_before(model.owner.source, model.owner.node, "def broken(:\n")

    plan = with_rule(rule)
    assert plan.changes == ()
    assert all("would not compile" in site.reason for site in plan.sites)


def test_edits_that_overlap_are_refused() -> None:
    def rule(context: Context) -> None:
        block = context.models[0].double_block
        call = next(c for c, _ in block.forward.scope.calls if block.forward.source.code(c.func) == "attend")
        context.replace(block.forward.source, call, "None")

    plan = with_rule(rule)
    assert plan.changes == ()
    assert all("two edits" in site.reason for site in plan.sites)


# Facts, progress, time


def test_facts_of_the_model() -> None:
    model = plan_repository(SOURCES, REGISTRY).models[0]
    assert (model.file, model.name, model.double, model.single) == ("flow/model.py", "Painter", "pairs", "joints")
    assert (model.image, model.ids) == ("image", "image_ids")
    assert (model.double_block.name, model.double_block.mlp) == ("PairBlock", "image_mlp")
    assert (model.single_block.linear_in, model.single_block.linear_out) == ("enter", "leave")
    assert model.double_block.attention
    assert model.single_block.attention
    loop = model.loops[0]
    assert (loop.file, loop.function, loop.model_parameter, loop.slots) == (
        "flow/sampling.py",
        "sample",
        "model",
        ("velocity",),
    )


def test_facts_are_the_same_once_patched() -> None:
    before, patched = plan_repository(SOURCES, REGISTRY).models[0], plan_repository(FULL, REGISTRY).models[0]
    assert replace(before, loops=()) == replace(patched, loops=())
    assert before.loops[0].slots == patched.loops[0].slots


def test_progress_counts_up_to_its_total() -> None:
    calls: list[tuple[str, int, int]] = []
    plan_repository(SOURCES, REGISTRY, progress=lambda what, done, total: calls.append((what, done, total)))
    assert [done for _, done, _ in calls] == list(range(len(calls)))
    assert {total for _, _, total in calls} == {len(calls)}


def test_a_thousand_files() -> None:
    """Ten seconds is what a user was promised, on a slow machine."""
    body = SINGLE.encode() + FILES["flow/attention.py"].encode() * 20
    tree = {f"package{i % 40}/module{i}.py": body for i in range(1000)}
    start = time.process_time()
    plan = plan_repository({**SOURCES, **tree}, REGISTRY)
    assert time.process_time() - start < 10
    assert len(plan.changes) == 6


def test_planning_needs_neither_torch_nor_the_disk() -> None:
    program = (
        "import sys, builtins\n"
        "from chipmunk.registry import load\n"
        "from chipmunk.rewrite import plan_repository\n"
        "from chipmunk.rewrite.minimal import FILES\n"
        "registry = load()\n"
        "def forbidden(*_, **__): raise AssertionError('the disk was touched')\n"
        "builtins.open = forbidden\n"
        "plan = plan_repository({p: t.encode() for p, t in FILES.items()}, registry)\n"
        "assert len(plan.changes) == 6, plan\n"
        "assert not {'torch', 'triton', 'typer', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_checking_run_sees_what_a_run_from_nothing_sees(newline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with trees of the first run, and must not be mistaken for it."""
    contexts: list[Context] = []
    run = engine._run

    def remember(*given: Any, **named: Any) -> Any:
        found = run(*given, **named)
        contexts.append(found[1])
        return found

    monkeypatch.setattr(engine, "_run", remember)
    files = {path: content.replace(b"\n", newline.encode()) for path, content in SOURCES.items()}
    changed = after(files, plan_repository(files, REGISTRY))
    checking = contexts[-1]
    assert len(contexts) == 2
    fresh = run(changed, REGISTRY, [*REGISTRY.patches], {}, None)[1]

    def told(context: Context) -> set[tuple[str, str, SiteStatus]]:
        return {(site.file, site.patch, site.status) for site in context.sites.values()}

    assert told(checking) == told(fresh) != set()
    assert not checking.edits
    for path in changed:
        module, anew = (context.repository.module(path) for context in (checking, fresh))
        assert module is not None
        assert anew is not None
        for one, other in zip(module.all_functions(), anew.all_functions(), strict=True):
            assert one.node.deep_equals(other.node)
