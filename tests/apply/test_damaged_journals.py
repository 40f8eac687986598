"""A journal that is damaged, deleted, or a stranger's: noticed, and nothing outside the repository is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, MATH, copy, make, patch, rules, rules_2, snapshot

from chipmunk.apply import (
    JournalDamaged,
    JournalMissing,
    Refused,
    State,
    Store,
    carry_out,
    plan_patch_file,
    plan_update,
    recover,
    revert,
    status,
    unified,
)
from chipmunk.rewrite.plan import FileChange


def _damage(store: Store, how: str) -> None:
    text = store.journal.read_text()
    journal = Store(store.root).load()
    assert journal is not None
    first = next(store.folder.glob("objects/*"))
    match how:
        case "cut short":
            store.journal.write_text(text[: len(text) // 2])
        case "emptied":
            store.journal.write_text("")
        case "not an object":
            store.journal.write_text("[]")
        case "a path altered":
            store.journal.write_text(text.replace("layers.py", "other.py"))
        case "a hash altered":
            store.journal.write_text(text.replace('"original": "', '"original": "0', 1))
        case "journal deleted":
            store.journal.unlink()
        case "object deleted":
            first.unlink()
        case "object altered":
            first.write_bytes(b"x" + first.read_bytes())
        case "object emptied":
            first.write_bytes(b"")
        case "all objects deleted":
            for path in store.folder.glob("objects/*"):
                path.unlink()


@pytest.mark.parametrize(
    "how",
    [
        *["cut short", "emptied", "not an object", "a path altered", "a hash altered", "journal deleted"],
        *["object deleted", "object altered", "object emptied", "all objects deleted"],
    ],
)
@pytest.mark.parametrize("git", [False, True])
def test_a_damaged_journal_is_noticed_and_nothing_is_lost(patched: Path, how: str, git: bool) -> None:
    if git:
        (patched / ".git").mkdir()
    _damage(Store(patched), how)
    before = snapshot(patched)
    found = status(patched)
    assert found.state is State.DAMAGED
    assert found.message is not None
    for action in (revert, patch, recover):
        with pytest.raises(JournalDamaged, match="damaged") as caught:
            action(patched)
        assert caught.value.exit_code == 2
        assert ("checkout" if git else "git apply -R") in str(caught.value.next_command)
        assert {p: e for p, e in snapshot(patched).items() if p != ".chipmunk/lock"} == {
            p: e for p, e in before.items() if p != ".chipmunk/lock"
        }


def test_a_deleted_chipmunk_folder_is_noticed(patched: Path) -> None:
    copy(patched / ".chipmunk", patched / "elsewhere")
    shutil.rmtree(patched / ".chipmunk")
    before = snapshot(patched)
    assert status(patched).state is State.NO_JOURNAL
    with pytest.raises(JournalMissing, match="no journal") as caught:
        revert(patched)
    assert caught.value.exit_code == 2
    assert {place.file for place in caught.value.places} == {path for path in FILES if path.startswith("src")}
    assert "checkout --" in str(caught.value)
    assert snapshot(patched) == before
    assert plan_update(patched, rules).changes == ()
    copy(patched / "elsewhere", patched / ".chipmunk")
    shutil.rmtree(patched / "elsewhere")
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_code_that_only_mentions_chipmunk_is_not_taken_for_patched(tmp_path: Path) -> None:
    make(tmp_path, {"zoo.py": b"# import chipmunk\nimport chipmunks\nx = 'import chipmunk'\n"})
    assert status(tmp_path).state is State.UNPATCHED
    assert revert(tmp_path).changes == ()


def test_somebody_else_s_file_in_the_folder_is_left_alone(patched: Path) -> None:
    for folder in (".chipmunk", ".chipmunk/objects"):
        (patched / folder / ".DS_Store").write_bytes(b"x")
    revert(patched)
    assert status(patched).state is State.UNPATCHED
    assert sorted(str(p.relative_to(patched)) for p in (patched / ".chipmunk").rglob("*")) == [
        ".chipmunk/.DS_Store",
        ".chipmunk/objects",
        ".chipmunk/objects/.DS_Store",
    ]
    patch(patched)
    assert status(patched).state is State.PATCHED
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_a_newer_journal_is_refused(patched: Path) -> None:
    store = Store(patched)
    outer = json.loads(store.journal.read_text())
    store.journal.write_text(json.dumps({**outer, "format": 2}))
    with pytest.raises(Refused, match="newer Chipmunk") as caught:
        revert(patched)
    assert "pip install --upgrade" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../victim.py", "/tmp/victim.py", ".git/config", "a/../../victim.py", ".chipmunk/lock"]
)
def test_a_stranger_s_journal_cannot_reach_outside(tmp_path: Path, path: str) -> None:
    """A repository may be cloned together with a `.chipmunk` folder made to do harm: sums right, paths wrong."""
    from chipmunk.apply.journal import Journal, JournalFile, journal_document, transaction_document

    root = make(tmp_path / "root")
    patch(root)
    store = Store(root)
    journal = store.load()
    assert journal is not None
    hostile = replace(journal, files=(JournalFile(path, MATH, MATH + b"#\n", 0o644), *journal.files))
    store.journal.write_bytes(journal_document(hostile))
    with pytest.raises(JournalDamaged, match="outside the repository"):
        revert(root)
    store.journal.write_bytes(journal_document(Journal()))
    store.underway.write_bytes(transaction_document("0" * 16, [FileChange(path, MATH, LAYERS)]))
    with pytest.raises(JournalDamaged, match="outside the repository"):
        recover(root)


@pytest.mark.parametrize("through", ["a folder", "the objects"])
def test_a_stranger_s_links_cannot_reach_outside(tmp_path: Path, through: str) -> None:
    from chipmunk.apply.journal import transaction_document

    root, outside = make(tmp_path / "root"), make(tmp_path / "outside", {"victim.py": MATH, "a" * 64: b"dear"})
    patch(root)
    before = snapshot(outside)
    store = Store(root)
    if through == "a folder":
        (root / "link").symlink_to(outside)
        store.underway.write_bytes(transaction_document("0" * 16, [FileChange("link/victim.py", LAYERS, MATH)]))
        for data in (MATH, LAYERS):
            store.object(hashlib.sha256(data).hexdigest()).write_bytes(data)
    else:
        shutil.rmtree(store.folder / "objects")
        (store.folder / "objects").symlink_to(outside)
    for action in (recover, revert, patch):
        with pytest.raises(JournalDamaged):
            action(root)
    assert snapshot(outside) == before


def test_sites_in_the_journal_are_told_from_the_originals(patched: Path) -> None:
    first = Store(patched).load()
    assert first is not None
    carry_out(plan_update(patched, rules_2))
    second = Store(patched).load()
    assert second is not None
    assert second.sites == first.sites
    for site in second.sites:
        assert b"sdpa(" in FILES[site.file].split(b"\n")[site.line - 1]
    layers = (patched / "src/flux/layers.py").read_bytes()
    saved = unified([FileChange("src/flux/layers.py", layers, layers.replace(b"class Block", b"class Blocks"))])
    carry_out(plan_patch_file(patched, saved))
    third = Store(patched).load()
    assert third is not None
    assert [site.line for site in third.sites if site.patch == "apply"] == [5]
    assert LAYERS.split(b"\n")[4] == b"class Block:"
