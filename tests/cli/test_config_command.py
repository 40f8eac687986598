"""config init, check, show and schema."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from command_line import ROOT, chipmunk

from chipmunk.config import Config, load


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)


def test_init_writes_the_file_that_ships_and_keeps_what_is_there(tmp_path: Path) -> None:
    done = chipmunk("config", "init")
    assert done.code == 0
    path = tmp_path / "chipmunk-config.yml"
    assert path.read_bytes() == (ROOT / "chipmunk-config.yml").read_bytes()
    path.write_text("min_steps: 4\n")
    refused = chipmunk("config", "init", tmp_path)
    assert refused.code == 2
    assert "is there already; nothing was written" in refused.err
    assert path.read_text() == "min_steps: 4\n"
    assert chipmunk("config", "init", "--force").code == 0
    assert load(path).min_steps == Config().min_steps
    assert chipmunk("config", "init", tmp_path / "other.yml").code == 0
    assert (tmp_path / "other.yml").exists()
    assert chipmunk("config", "init", tmp_path / "no" / "folder.yml").code == 2


def test_init_says_what_it_turns_on(patched: Path, starter: Path) -> None:
    assert "runs with it from now on" in chipmunk("config", "init", patched).out
    assert "runs with it" not in chipmunk("config", "init", starter).out
    assert "runs with it" not in chipmunk("config", "init", "elsewhere.yml").out


def test_check_lists_each_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("mlp:\n  top_keys: 30\nattn:\n  top_kys: [str]\n")
    done = chipmunk("config", "check", "bad.yml")
    assert (done.code, done.out) == (1, "")
    assert "bad.yml:2: mlp.top_keys is 30; it must be a number from 0 to 1 (30 % is written 0.3)" in done.err
    assert "bad.yml:4: attn.top_kys is not a known key; the nearest is attn.top_keys" in done.err
    found = json.loads(chipmunk("config", "check", "bad.yml", "--json").out)
    assert found["status"] == "check failed"
    assert [(problem["line"], problem["key"]) for problem in found["problems"]] == [
        (2, "mlp.top_keys"),
        (4, "attn.top_kys"),
    ]


def test_check_of_a_valid_file_lists_what_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "chipmunk-config.yml").write_text("steps: 50\n")
    done = chipmunk("config", "check")
    assert done.code == 0
    assert "steps has no effect: the number of steps is that of the sampling loop" in done.out
    found = json.loads(chipmunk("config", "check", ".", "--json").out)
    assert (found["status"], [note["key"] for note in found["notes"]]) == ("valid", ["steps"])


def test_check_without_a_file_is_refused() -> None:
    assert chipmunk("config", "check").code == 2
    done = chipmunk("config", "check", "none.yml")
    assert done.code == 2
    assert "none.yml: cannot be read" in done.err


def test_show_fills_the_defaults_in_and_says_where_the_rest_is_from(tmp_path: Path) -> None:
    defaults = chipmunk("config", "show")
    assert defaults.lines[0] == "# no file applies here: these are the defaults"
    (tmp_path / "chipmunk-config.yml").write_text("attn:\n  full_step_schedule: !!set {0, 7}\n")
    shown = chipmunk("config", "show")
    assert shown.lines[0] == f"# {tmp_path / 'chipmunk-config.yml'}"
    values = yaml.safe_load(shown.out)
    assert values["attn"]["full_step_schedule"] == [0, 7]
    assert values["mlp"] == yaml.safe_load(defaults.out)["mlp"]
    (tmp_path / "shown.yml").write_text(shown.out)
    assert load(tmp_path / "shown.yml") == load(tmp_path / "chipmunk-config.yml")
    assert json.loads(chipmunk("config", "show", "--json").out)["config"] == values


def test_schema_is_one_that_editors_take(tmp_path: Path) -> None:
    schema = json.loads(chipmunk("config", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert chipmunk("config", "schema", "-o", tmp_path / "schema.json").code == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == schema
    shipped = yaml.safe_load((ROOT / "chipmunk-config.yml").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(shipped)


def test_each_refusal_names_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("attn: {}\nattn: {}\n")
    assert "Next   chipmunk config check bad.yml" in chipmunk("config", "check", "bad.yml").err
    assert "Next   chipmunk config init none.yml" in chipmunk("config", "check", "none.yml").err
    assert "Next   ls -ld none.patch" in chipmunk("apply", "none.patch", tmp_path).err


def test_on_a_full_disk_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty configuration would be a valid one, and turn Chipmunk on."""

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "chipmunk-config.yml"
    with monkeypatch.context() as patched:
        patched.setattr("chipmunk.apply.disk.os.write", full)
        done = chipmunk("config", "init", str(tmp_path))
        assert done.code == 2
        assert f"{path}: No space left on device" in done.err
        assert f"Next   df -h {tmp_path}" in done.err
        assert list(tmp_path.iterdir()) == []
        path.write_text("steps: 50\n")
        assert chipmunk("config", "init", "--force", str(tmp_path)).code == 2
    assert [file.read_text() for file in tmp_path.iterdir()] == ["steps: 50\n"]
