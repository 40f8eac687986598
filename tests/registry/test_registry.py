"""Plug-ins are found where they should be, and unusable ones are named."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from chipmunk.registry import Registry, RegistryError, data_path, load

PATCH = (
    '"""Do nothing at all."""\n\nNAME = "nothing"\nAPI = 1\nVERSION = "3"\n'
    "EXAMPLES = ()\n\n\ndef rule(context):\n    pass\n"
)
TARGET = (
    '"""A family of one."""\n\nNAME = "lonely"\nAPI = 1\n\n\ndef recognise(models, files):\n'
    '    return "lonely" in files\n'
)


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_built_in() -> None:
    registry = load()
    assert list(registry.patches) == [
        "attention",
        "command-line",
        "constant-copies",
        "diffusers-pipeline",
        "double-mlp",
        "model-forward",
        "single-mlp",
        "step-caching",
        "step-clock",
    ]
    assert "flux" in registry.targets
    assert registry.targets["flux"].origin == "targets/flux.py"
    for name, patch in registry.patches.items():
        assert patch.name == name
        assert patch.version


def test_a_folder_of_the_users(tmp_path: Path) -> None:
    write(tmp_path / "patches", "nothing.py", PATCH)
    write(tmp_path / "targets", "lonely.py", TARGET)
    write(tmp_path / "targets", "_helper.py", "raise RuntimeError('not a plug-in')\n")
    registry = load([tmp_path])
    patch, target = registry.patches["nothing"], registry.targets["lonely"]
    assert (patch.summary, patch.version, patch.origin) == (
        "Do nothing at all",
        "3",
        str(tmp_path / "patches" / "nothing.py"),
    )
    assert target.recognise([], {"lonely": b""})
    assert "nothing" not in load().patches


def test_a_folder_that_holds_the_files_themselves(tmp_path: Path) -> None:
    assert "nothing" in load([write(tmp_path, "nothing.py", PATCH)]).patches


def refusal(folder: Path) -> str:
    with pytest.raises(RegistryError) as caught:
        load([folder])
    return str(caught.value)


def test_a_duplicate_names_both_origins(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "mine.py", PATCH.replace('"nothing"', '"attention"')))
    assert "patches/attention.py" in message
    assert str(tmp_path / "mine.py") in message


def test_another_version_of_the_interface(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "future.py", PATCH.replace("API = 1", "API = 2")))
    assert "interface 2" in message
    assert str(tmp_path / "future.py") in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PATCH.replace('NAME = "nothing"\n', ""), "NAME"),
        (PATCH.replace("API = 1\n", ""), "API"),
        (PATCH.replace('VERSION = "3"', "VERSION = 3"), "VERSION"),
        (PATCH.replace("EXAMPLES = ()\n", ""), "EXAMPLES"),
        (PATCH.replace('"""Do nothing at all."""', ""), "docstring"),
        (PATCH.split("def rule")[0], "no plug-in"),
        ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
        ("def broken(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(write(tmp_path, "odd.py", text))
    assert says in message
    assert str(tmp_path / "odd.py") in message


def test_a_missing_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Registry:
    """Install a distribution with an entry point, as pip lays it out."""
    write(tmp_path, "third_party_patch.py", text)
    info = tmp_path / "third_party-1.0.dist-info"
    write(info, "METADATA", "Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    write(info, "entry_points.txt", "[chipmunk.patches]\nnothing = third_party_patch\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "third_party_patch", raising=False)
    importlib.invalidate_caches()
    return load()


def test_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = installed(tmp_path, monkeypatch, PATCH).patches["nothing"]
    assert patch.origin == "entry point nothing = third_party_patch of third-party"


def test_an_entry_point_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="third-party cannot be loaded: ZeroDivisionError"):
        installed(tmp_path, monkeypatch, "1 / 0\n")


@pytest.mark.parametrize("name", ["patches", "targets", "templates", "chipmunk-config.yml"])
def test_data_is_found(name: str) -> None:
    assert data_path(name).exists()


def test_data_that_is_missing() -> None:
    with pytest.raises(FileNotFoundError, match="reinstall"):
        data_path("nonsense")
