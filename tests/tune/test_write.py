"""The commented configuration that tune writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk.config import FILE_NAME, Config, load
from chipmunk.registry import data_path
from chipmunk.tune.search import LADDERS, changed
from chipmunk.tune.write import THE_DEFAULTS, rendered

BASE = data_path(FILE_NAME).read_text()


def read(text: str, folder: Path) -> Config:
    path = folder / FILE_NAME
    path.write_text(text)
    return load(path)


def test_values_are_replaced_where_they_stand_and_comments_stay(tmp_path: Path) -> None:
    text = rendered(BASE, {"mlp": {"top_keys": 0.15}, "attn": {"recompute_mask": False}}, ["Found today."])
    assert text.startswith("# Found today.\n#\n")
    changed_lines = [(a, b) for a, b in zip(BASE.splitlines(), text.splitlines()[2:], strict=True) if a != b]
    assert changed_lines[1:] == [
        ("  top_keys: 0.3", "  top_keys: 0.15"),
        ("  recompute_mask: true", "  recompute_mask: false"),
    ]
    assert changed_lines[0][0].endswith(THE_DEFAULTS), "the one comment that is no longer true"
    config = read(text, tmp_path)
    assert (config.mlp.top_keys, config.attn.top_keys, config.attn.recompute_mask) == (0.15, 0.165, False)


def test_a_key_that_the_file_does_not_name_is_added_in_its_section(tmp_path: Path) -> None:
    base = "mlp:\n  top_keys: 0.3\n"
    config = {"mlp": {"random_keys": 0.0}, "attn": {"top_keys": 0.1, "random_keys": 0.03}, "min_steps": 2}
    found = read(rendered(base, config, []), tmp_path)
    assert (found.mlp.top_keys, found.mlp.random_keys) == (0.3, 0.0)
    assert (found.attn.top_keys, found.attn.random_keys, found.min_steps) == (0.1, 0.03, 2)


def test_a_configuration_of_the_users_keeps_its_keys(tmp_path: Path) -> None:
    base = "# mine\nmlp:\n  bm: 64 # groups\n  mbm: 64\nattn:\n  top_keys: 0.2\n"
    text = rendered(base, {"mlp": {"bm": 64, "mbm": 64, "top_keys": 0.5}, "attn": {"top_keys": 0.1}}, [])
    found = read(text, tmp_path)
    assert "# mine" in text
    assert (found.mlp.bm, found.mlp.top_keys, found.attn.top_keys) == (64, 0.5, 0.1)


@pytest.mark.parametrize("base", [BASE, "", "mlp:\nattn:\n  top_keys: 0.2\n"])
@given(picks=st.fixed_dictionaries({name: st.integers(0, 100) for name in LADDERS}))
def test_what_is_written_is_what_was_found(
    base: str, picks: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config: dict[str, Any] = {}
    for name, ladder in LADDERS.items():
        config = changed(config, ladder[picks[name] % len(ladder)])
    found = read(rendered(base, config, ["about"]), tmp_path_factory.getbasetemp())
    wanted = Config.model_validate_json(json.dumps(config))
    for part in ("mlp", "attn", "patchify", "step_caching"):
        assert getattr(found, part) == getattr(wanted, part)


def test_what_was_found_is_not_said_to_be_the_defaults() -> None:
    """A key that is deleted from a tuned file goes back to its default, not to the value that was found."""
    assert THE_DEFAULTS in BASE
    assert "These are the defaults" not in rendered(BASE, {"mlp": {"top_keys": 0.2}}, ["Found by: x"])
    assert rendered("# mine\n", {}, []) == "# mine\n"
