"""What counts as the repository's source, and what is said about the rest."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
from apply_toys import FILES, MATH, make, patch, snapshot

from chipmunk.apply import Refused, locate, read
from chipmunk.rewrite.plan import SiteStatus


def test_all_python_files_exactly_as_they_are(tmp_path: Path) -> None:
    make(tmp_path)
    repository = read(tmp_path)
    assert repository.files == {path: data for path, data in FILES.items() if path.endswith(".py")}
    assert list(repository.files) == sorted(repository.files)
    assert repository.problems == ()
    assert repository.root == tmp_path.resolve()


@pytest.mark.parametrize(
    "path",
    [
        ".git/hooks/x.py",
        ".chipmunk/x.py",
        "node_modules/a/x.py",
        "build/lib/x.py",
        "dist/x.py",
        "flux.egg-info/x.py",
        "src/__pycache__/x.py",
        "lib/site-packages/torch/x.py",
        ".tox/py311/x.py",
    ],
)
def test_what_is_not_source_is_left_out(tmp_path: Path, path: str) -> None:
    make(tmp_path, {path: MATH, "src/x.py": MATH, "builder/x.py": MATH, "src/dist.py": MATH})
    assert list(read(tmp_path).files) == ["builder/x.py", "src/dist.py", "src/x.py"]
    assert read(tmp_path).problems == ()


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history"])
def test_virtual_environments_are_left_out_whatever_their_name(tmp_path: Path, mark: str) -> None:
    make(tmp_path, {f"my env/{mark}": b"", "my env/bin/x.py": MATH, "x.py": MATH})
    assert list(read(tmp_path).files) == ["x.py"]


def test_an_environment_around_the_repository_does_not_hide_it(tmp_path: Path) -> None:
    make(tmp_path, {"pyvenv.cfg": b"", "x.py": MATH})
    assert list(read(tmp_path).files) == ["x.py"]


def test_nothing_in_the_repository_is_run(tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\nsdpa(1)\n".encode()
    names = ("conftest.py", "setup.py", "sitecustomize.py", "__init__.py", "chipmunk.py", "torch.py")
    make(tmp_path, dict.fromkeys(names, trap))
    patch(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_links(tmp_path: Path) -> None:
    root, outside = make(tmp_path / "root"), make(tmp_path / "outside", {"o.py": MATH, "weights.bin": b""})
    (tmp_path / "data").mkdir()
    (root / "inside.py").symlink_to("src/flux/math.py")
    (root / "outside.py").symlink_to(outside / "o.py")
    (root / "nowhere.py").symlink_to("gone.py")
    (root / "self.py").symlink_to("self.py")
    (root / "folder").symlink_to("src")
    (root / "loop").symlink_to(".")
    (root / "src/up").symlink_to("../src")
    (root / "others").symlink_to(outside)
    (root / "data").symlink_to(tmp_path / "data")
    (root / "readme.txt").symlink_to(outside / "weights.bin")
    repository = read(root)
    assert repository.links == {"inside.py": "src/flux/math.py"}
    assert repository.files["inside.py"] == MATH
    assert {path for path in repository.files if path not in FILES} == {"inside.py"}
    reasons = {site.file: site.reason for site in repository.problems}
    assert {path: reason.split()[3:5] for path, reason in reasons.items() if path.endswith(".py")} == {
        "outside.py": ["outside", "the"],
        "nowhere.py": ["nowhere"],
        "self.py": ["nowhere"],
    }
    assert "leads back" in reasons["loop"]
    assert "leads back" in reasons["src/up"]
    assert "outside the repository" in reasons["others"]
    assert set(reasons) == {"outside.py", "nowhere.py", "self.py", "loop", "src/up", "others"}
    assert {site.status for site in repository.problems} == {SiteStatus.REFUSED}
    assert {site.patch for site in repository.problems} == {"read"}


def test_a_linked_file_is_patched_once_and_stays_a_link(tmp_path: Path) -> None:
    root, outside = make(tmp_path / "root"), make(tmp_path / "outside", {"o.py": MATH})
    (root / "inside.py").symlink_to("src/flux/math.py")
    (root / "outside.py").symlink_to(outside / "o.py")
    make(root, {"build/generated.txt": MATH})
    (root / "generated.py").symlink_to("build/generated.txt")
    update = patch(root)
    assert [change.path for change in update.changes] == [
        "build/generated.txt",
        "src/flux/dos.py",
        "src/flux/layers.py",
        "src/flux/math.py",
        "src/flux/no_end.py",
    ]
    assert (root / "inside.py").is_symlink()
    assert b"chipmunk" in (root / "inside.py").read_bytes()
    assert b"chipmunk" in (root / "generated.py").read_bytes()
    assert (outside / "o.py").read_bytes() == MATH


def test_what_cannot_be_read_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    make(tmp_path, {"x.py": MATH})
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    repository = read(tmp_path)
    assert list(repository.files) == ["x.py"]
    assert [(site.file, site.reason) for site in repository.problems] == [("pipe.py", "not a regular file")]


def test_files_and_folders_without_permission_are_reported() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder).resolve(), {"x.py": MATH, "closed.py": MATH, "closed/y.py": MATH})
        root.chmod(0o755)
        (root / "closed.py").chmod(0)
        (root / "closed").chmod(0)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                if os.geteuid() == 0:  # root may read everything: be somebody else
                    os.setuid(65534)
                code = int([site.file for site in read(root).problems] != ["closed", "closed.py"])
            finally:
                os._exit(code)
        result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (root / "closed").chmod(0o755)
        assert result == 0


@pytest.mark.parametrize(("make_it", "why"), [(False, "no such folder"), (True, "is a file")])
def test_a_root_that_is_no_folder(tmp_path: Path, make_it: bool, why: str) -> None:
    if make_it:
        (tmp_path / "x.py").write_bytes(b"")
    with pytest.raises(Refused, match=why) as caught:
        read(tmp_path / "x.py")
    assert caught.value.exit_code == 2
    assert "chipmunk patch" in (caught.value.next_command or "")


def test_a_part_of_a_patched_repository_is_refused(tmp_path: Path) -> None:
    patch(make(tmp_path))
    with pytest.raises(Refused, match="patched as a whole") as caught:
        locate(tmp_path / "src" / "flux")
    assert str(tmp_path.resolve()) in str(caught.value)


def test_a_folder_around_a_patched_repository_is_refused(tmp_path: Path) -> None:
    patch(make(tmp_path / "part"))
    before = snapshot(tmp_path)
    with pytest.raises(Refused, match="patched on its own") as caught:
        patch(tmp_path)
    assert "chipmunk revert" in (caught.value.next_command or "")
    assert snapshot(tmp_path) == before


def test_a_thousand_files_are_read_and_patched_quickly(tmp_path: Path) -> None:
    make(tmp_path, {f"p{n % 40}/q{n % 7}/m{n}.py": MATH * 5 if n % 100 == 0 else b"x = 1\n" * 300 for n in range(1000)})
    start = time.process_time()
    update = patch(tmp_path)
    assert len(update.repository.files) == 1000
    assert len(update.changes) == 10
    assert time.process_time() - start < 3
