"""Patch the starter, draw with its own command line in every way of turning Chipmunk on, and undo it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from chipmunk.cli.app import app
from tests.end_to_end.starter import STARTER, copy_starter, load

SIZE = ["--name=flux-tiny", "--width=208", "--height=160", "--num-steps=9", "--seed=3", "--device=cpu"]
CONFIG = {
    "compile": False,
    "attn": {"top_keys": 0.2, "mbm": 64, "counts_multiple_of": 16},
    "mlp": {"bm": 64, "mbm": 64, "counts_multiple_of": 32},
}


def command(*arguments: object) -> None:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output


Draw = Callable[..., bytes]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with the patched starter and the configuration file."""
    folder = tmp_path_factory.mktemp("journey")
    root = copy_starter(folder)
    command("patch", root)
    (folder / "mine.yml").write_text(json.dumps(CONFIG))
    return root, folder / "mine.yml"


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Draw]:
    """The picture that a repository's own command line writes, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.delenv("FLUX_TINY", raising=False)

    def of(root: Path) -> Draw:
        main = load(root).modules["flux.cli"].main

        def picture(*options: str) -> bytes:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                (path,) = main([*SIZE, *options])
            finally:
                torch.set_num_threads(threads)
            return Path(path).read_bytes()

        return picture

    return of


def test_without_a_configuration_nothing_changes(roots: tuple[Path, Path], draw: Callable[[Path], Draw]) -> None:
    assert draw(roots[0])() == draw(STARTER)()


def test_every_way_of_turning_it_on_draws_the_same(
    roots: tuple[Path, Path], draw: Callable[[Path], Draw], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root, config), picture = roots, draw(roots[0])
    sparse = picture("--chipmunk-config", str(config))
    assert sparse != picture()
    with monkeypatch.context() as environment:
        environment.setenv("CHIPMUNK_CONFIG", str(config))
        assert picture() == sparse
    Path("chipmunk-config.yml").write_text(config.read_text())
    assert picture() == sparse
    Path("chipmunk-config.yml").unlink()
    (root / "chipmunk-config.yml").write_text(config.read_text())
    assert picture() == sparse
    (root / "chipmunk-config.yml").unlink()


def test_a_wrong_configuration_stops_it_with_file_line_and_nearest_key(
    roots: tuple[Path, Path], draw: Callable[[Path], Draw]
) -> None:
    Path("wrong.yml").write_text("mlp:\n  top_kyes: 0.3\n")
    with pytest.raises(ValueError, match=r"wrong\.yml.*2.*top_keys"):
        draw(roots[0])("--chipmunk-config", "wrong.yml")


def test_the_whole_journey_ends_where_it_began(tmp_path: Path) -> None:
    root = copy_starter(tmp_path)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for step in (["patch", "--dry-run"], ["patch"], ["patch"], ["status"], ["diff"], ["revert"], ["revert"]):
        command(step[0], root, *step[1:])
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
