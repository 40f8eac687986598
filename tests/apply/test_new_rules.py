"""Patching again with other rules: what changes, what the user's edits become, what is taken out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, MATH, edit, make, rules, rules_2, snapshot

from chipmunk.apply import Conflict, Refused, State, Store, Update, carry_out, plan_update, revert, status
from chipmunk.rewrite.plan import FileChange, Plan, Site, SiteStatus


def test_new_rules_replace_old_ones_and_the_originals_stay(patched: Path) -> None:
    update = plan_update(patched, rules_2)
    carry_out(update)
    fresh = rules_2({path: data for path, data in FILES.items() if path.endswith(".py")})
    assert {c.path: (patched / c.path).read_bytes() for c in fresh.changes} == {c.path: c.after for c in fresh.changes}
    journal = Store(patched).load()
    assert journal is not None
    assert journal.patches == {"attention": "2"}
    assert {file.path: file.original for file in journal.files} == {c.path: c.before for c in fresh.changes}
    assert journal.file("src/flux/math.py").mode == 0o755  # type: ignore[union-attr]
    assert len(list((patched / ".chipmunk").glob("changes-*.diff"))) == 1
    assert len(list((patched / ".chipmunk/objects").iterdir())) == 8
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_new_rules_after_edits_keep_the_edits_even_through_a_revert(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"# both at once", b"# twice")
    carry_out(plan_update(patched, rules_2))
    assert b"chipmunk.sdpa(None, q, k, v)" in (patched / "src/flux/math.py").read_bytes()
    assert status(patched).state is State.PATCHED
    revert(patched)
    assert (patched / "src/flux/math.py").read_bytes() == MATH.replace(b"# both at once", b"# twice")


def test_rules_that_leave_a_file_alone_now_give_its_original_back(patched: Path) -> None:
    def fewer(files: dict[str, bytes]) -> Plan:
        plan = rules(files)
        return replace(plan, changes=tuple(change for change in plan.changes if "layers" not in change.path))

    carry_out(plan_update(patched, fewer))
    assert (patched / "src/flux/layers.py").read_bytes() == LAYERS
    assert b"chipmunk" in (patched / "src/flux/math.py").read_bytes()


def elsewhere(files: dict[str, bytes], version: int = 1) -> Plan:
    """The attention of another file, which is none of the plan's to change, is told of by what changes in math.py."""
    plan = rules(files, version)
    site = Site("src/flux/loop.py", 1, "clock", SiteStatus.PATCHED, "while True", "told by what math.py calls")
    return replace(plan, sites=(*plan.sites, site), patches={**plan.patches, "clock": "1"})


def test_what_another_file_does_for_a_place_is_patched_once(patched: Path) -> None:
    def of_loop(update: Update) -> list[SiteStatus]:
        return [site.status for site in update.plan.sites if site.file == "src/flux/loop.py"]

    loop = patched / "src/flux/loop.py"
    loop.write_text("while True: pass\n")
    first = plan_update(patched, lambda files: elsewhere(files, 2))
    assert of_loop(first) == [SiteStatus.PATCHED]
    carry_out(first)
    again = plan_update(patched, lambda files: elsewhere(files, 2))
    assert again.changes == ()
    assert of_loop(again) == [SiteStatus.ALREADY]
    loop.write_text("# moved\nwhile True: pass\n")
    assert of_loop(plan_update(patched, lambda files: elsewhere(files, 2))) == [SiteStatus.ALREADY]
    revert(patched)
    assert of_loop(plan_update(patched, lambda files: elsewhere(files, 2))) == [SiteStatus.PATCHED]


def test_rules_that_find_nothing_at_all_take_nothing_out(patched: Path) -> None:
    before = snapshot(patched)
    update = plan_update(patched, lambda files: Plan(None, (), ()))
    carry_out(update)
    assert update.changes == ()
    assert snapshot(patched) == before


def test_new_rules_on_overlapping_edits_are_a_conflict_only_if_they_want_that_file(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"x = chipmunk.sdpa(q, k, v)", b"x = chipmunk.sdpa(q, k, v, 0.5)")
    assert plan_update(patched, rules).changes == ()  # they find it patched already
    with (patched / "src/flux/math.py").open("ab") as file:
        file.write(b"\n\nz = sdpa(1)\n")
    before = snapshot(patched)
    with pytest.raises(Conflict, match=r"src/flux/math.py:7") as caught:
        plan_update(patched, rules)
    assert caught.value.exit_code == 3
    assert snapshot(patched) == before


def together(files: dict[str, bytes]) -> Plan:
    """Rules that patch other files only where math.py holds the call that these lead to."""
    plan = rules(files)
    if any(site.file == "src/flux/math.py" for site in plan.sites):
        return plan
    return replace(plan, changes=plan.changes[-1:], sites=plan.sites[-1:])  # of setup.py and its like


@pytest.mark.parametrize("how", ["the call deleted", "the file deleted"])
def test_a_patch_is_not_taken_out_because_lines_of_it_were_deleted_elsewhere(patched: Path, how: str) -> None:
    """As where the attention function goes: the calls in the blocks would silently lose what leads to it."""
    if how == "the call deleted":
        edit(
            patched / "src/flux/math.py",
            b"    x = chipmunk.sdpa(q, k, v)\n    return x\n",
            b"    return flash(q, k, v)\n",
        )
    else:
        (patched / "src/flux/math.py").unlink()
    before = snapshot(patched)
    with pytest.raises(Conflict, match=r"would take attention out of .*src/flux/layers.py") as caught:
        plan_update(patched, together)
    assert [place.file for place in caught.value.places] == ["src/flux/math.py"]
    assert snapshot(patched) == before


def test_a_patch_that_is_no_longer_asked_for_is_taken_out_all_the_same(patched: Path) -> None:
    edit(
        patched / "src/flux/math.py", b"    x = chipmunk.sdpa(q, k, v)\n    return x\n", b"    return flash(q, k, v)\n"
    )
    update = plan_update(patched, lambda files: replace(together(files), patches={"mlp": "1"}))
    assert "src/flux/layers.py" in {change.path for change in update.changes}


def test_what_is_taken_out_is_told(patched: Path) -> None:
    def careful(files: dict[str, bytes]) -> Plan:
        """Rules that leave a call alone where a comment asks for it."""
        plan = rules(files)
        changes = tuple(change for change in plan.changes if b"# dense" not in change.before)
        changed = {change.path for change in changes}
        dense = {"status": SiteStatus.LEFT_DENSE, "reason": "a comment asks for it"}
        return replace(
            plan, changes=changes, sites=tuple(s if s.file in changed else replace(s, **dense) for s in plan.sites)
        )

    edit(patched / "src/flux/layers.py", b"class Block:", b"class Block:  # dense")
    update = plan_update(patched, careful)
    (site,) = [site for site in update.plan.sites if "layers" in site.file]
    assert site.reason == "a comment asks for it; what Chipmunk had changed here is taken out"
    assert (site.status, site.line) == (SiteStatus.LEFT_DENSE, 8)  # a line further down than without the import
    carry_out(update)
    (site,) = [site for site in plan_update(patched, careful).plan.sites if "layers" in site.file]
    assert site.reason == "a comment asks for it"


def test_code_that_moved_to_another_file_keeps_the_patch(patched: Path) -> None:
    edit(
        patched / "src/flux/math.py", b"    x = chipmunk.sdpa(q, k, v)\n    return x\n", b"    return other(q, k, v)\n"
    )
    (patched / "src/flux/other.py").write_bytes(
        b"import chipmunk\n\n\ndef other(q, k, v):\n    return chipmunk.sdpa(q, k, v)\n"
    )
    assert plan_update(patched, rules).changes == ()


def test_a_file_that_came_since_is_patched_and_joins_the_journal(patched: Path) -> None:
    make(patched, {"src/flux/new.py": LAYERS})
    update = plan_update(patched, rules)
    assert [change.path for change in update.changes] == ["src/flux/new.py"]
    carry_out(update)
    revert(patched)
    assert (patched / "src/flux/new.py").read_bytes() == LAYERS
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_two_names_of_a_file_that_would_differ_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "link.py").symlink_to("src/flux/math.py")

    def planner(files: dict[str, bytes]) -> Plan:
        changes = [FileChange(path, files[path], path.encode()) for path in ("link.py", "src/flux/math.py")]
        return Plan(None, tuple(changes), ())

    with pytest.raises(Refused, match="the same file"):
        plan_update(tmp_path, planner)
