"""What is typed wrongly is refused before anything runs, with what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import chipmunk

from chipmunk.cli.failure import Failure
from chipmunk.cli.options import size_of


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a file and a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(
            ([command, "--device", "tpu"], "--device tpu is neither cpu nor cuda")
            for command in ("verify", "bench", "fidelity", "tune", "report")
        ),
        (["verify", "--device", "cuda:x"], "--device cuda:x is neither cpu nor cuda"),
        (["verify", "--weights", "none.safetensors"], "there is no file none.safetensors"),
        (["verify", "--weights", "folder"], "folder is a folder; --weights is a file"),
        (["verify", "--factory", "build"], "--factory build: a factory is MODULE:FUNCTION, verify_factory:build say"),
        (["verify", "--factory", "build.py:make"], "--factory build.py:make: a factory is MODULE:FUNCTION"),
        (["fidelity", "--factory", ":"], "--factory :: a factory is MODULE:FUNCTION"),
        (["bench", "--weights", "none.safetensors"], "there is no file none.safetensors"),
        (["bench", "--output", "file"], "file is a file; --output is a folder"),
        (["fidelity", "--output", "file"], "file is a file; --output is a folder"),
        (["tune", "--output", "none/my.yml"], "there is no folder none"),
        (["report", "--output", "none/page.html"], "there is no folder"),
        (["bench", "--size", "1281x768"], "1280x768 is near"),
        (["fidelity", "--size", "20x768"], "16x768 is near"),
        (["fidelity", "--size", "1280*768"], "1280x768 say"),
        (["bench", "--require", "-1"], "--require"),
        (["patch", "--only", ","], "--only names no patch"),
    ],
)
def test_it_is_refused(wrong: Path, patched: Path, words: list[str], says: str) -> None:
    done = chipmunk(words[0], patched, *words[1:])
    assert done.code == 2, done.out
    assert says in " ".join(done.err.split())
    assert done.out == ""


def test_a_size_is_a_whole_number_of_tokens() -> None:
    assert size_of("1280x768") == (1280, 768)
    assert size_of("16×32") == (16, 32)
    for word in ("", "x", "1280", "1280x", "0x16", "16x0", "1280x768x3", "-16x16", "16.0x16", "999999x16"):
        with pytest.raises(Failure, match="WIDTHxHEIGHT"):
            size_of(word)


def test_with_json_a_refusal_is_an_object_too(wrong: Path, patched: Path) -> None:
    found = json.loads(chipmunk("verify", patched, "--device", "tpu", "--json").out)
    assert found["status"] == "refused"
    assert "tpu" in found["error"]["message"]


def test_a_folder_that_is_not_there_gets_no_configuration_of_its_name(wrong: Path) -> None:
    """`chipmunk config init my-flux-rep`, a slip of the finger."""
    done = chipmunk("config", "init", "no-repo")
    assert done.code == 2
    assert "there is no folder no-repo" in done.err
    assert not (wrong / "no-repo").exists()
    for command in ("check", "show"):
        done = chipmunk("config", command, "no-repo")
        assert done.code == 2
        assert "Next   chipmunk config init\n" in done.err, "the command that would be refused is not suggested"
        done = chipmunk("config", command, "none.yml")
        assert "Next   chipmunk config init none.yml\n" in done.err
    assert chipmunk("config", "init", "folder").code == 0
    assert chipmunk("config", "init", "other.yaml").code == 0
    assert (wrong / "other.yaml").is_file()


def test_a_saved_patch_that_is_none_is_named(wrong: Path, patched: Path) -> None:
    (wrong / "file").write_text("nothing to see\n")
    done = chipmunk("apply", "file", patched)
    assert done.code == 2
    assert "Next   git apply --check file" in done.err
