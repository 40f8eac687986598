"""Importing a checkout by its files: the right root, the right copy, and stand-ins for what is not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chipmunk.verify.checkout import Checkout, CheckoutError, import_root
from chipmunk.verify.original import rebuild
from chipmunk.verify.placeholders import PlaceholderUsed, missing_base, to_install
from chipmunk.verify.worker import require_device


@pytest.fixture(autouse=True)
def _own_imports() -> Iterator[None]:
    """Leave this process's import system as it was."""
    path, finders, modules, bytecode = list(sys.path), list(sys.meta_path), set(sys.modules), sys.dont_write_bytecode
    yield
    sys.path[:], sys.meta_path[:], sys.dont_write_bytecode = path, finders, bytecode
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(root: Path, **files: str) -> Path:
    """Files by path, with `__` for `/` and no `.py`."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


PACKAGES: list[tuple[dict[str, str], str, str]] = [
    ({"net__model": "", "net/_i": ""}, "net/model.py", "net"),
    ({"net__model": "from net.layers import x"}, "net/model.py", ""),
    ({"net__model": "from .layers import x"}, "net/model.py", ""),
    ({"net__model": "import math"}, "net/model.py", "net"),
    ({"src__a__b__model": "from ..c import x"}, "src/a/b/model.py", "src"),
    ({"src__a__b__model": "from a.b import x"}, "src/a/b/model.py", "src"),
    ({"model": "from layers import x"}, "model.py", ""),
]


@pytest.mark.parametrize(("files", "file", "root"), PACKAGES)
def test_import_root_of_plain_folders_follows_the_files_own_imports(
    tmp_path: Path, files: dict[str, str], file: str, root: str
) -> None:
    write(tmp_path, **files)
    assert import_root(tmp_path, tmp_path / file) == tmp_path / root


def test_import_root_of_packages_is_above_the_outermost_one(tmp_path: Path) -> None:
    """Official FLUX: a package in `src` whose subfolder has no `__init__.py`, and a file that imports nothing of it."""
    write(tmp_path, src__net____init__="", src__net__parts__lora="import torch")
    (tmp_path / "src/net/__init__.py").write_text("")
    assert import_root(tmp_path, tmp_path / "src/net/parts/lora.py") == tmp_path / "src"


def test_a_file_called_math_beside_the_model_does_not_hide_pythons(tmp_path: Path) -> None:
    write(tmp_path, netm__math="pi = 3", netm__model="import math\nfrom netm.math import pi\nfound = math.tau, pi")
    assert Checkout(tmp_path).load("netm/model.py").found[1] == 3


def test_nothing_is_written_into_the_checkout(tmp_path: Path) -> None:
    write(tmp_path, neta__model="from neta.layers import x", neta__layers="x = 1")
    Checkout(tmp_path).load("neta/model.py")
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_package_that_python_finds_elsewhere_is_an_error(tmp_path: Path) -> None:
    """A folder without `__init__.py` loses against an installed package of the same name."""
    installed = tmp_path / "site-packages"
    write(installed, netb__model="")
    (installed / "netb/__init__.py").write_text("")
    sys.path.append(str(installed))
    checkout = write(tmp_path / "checkout", netb__model="from netb import layers", netb__layers="")
    with pytest.raises(CheckoutError, match=f"'netb.model' gave {installed}.*Uninstall"):
        Checkout(checkout).load("netb/model.py")


def test_a_package_that_would_be_run_instead_is_noted(tmp_path: Path) -> None:
    for folder in ("site-packages", "checkout/src"):
        write(tmp_path / folder, netc__model="")
        (tmp_path / folder / "netc/__init__.py").write_text("")
    sys.path.append(str(tmp_path / "site-packages"))
    checkout = Checkout(tmp_path / "checkout")
    assert Path(str(checkout.load("src/netc/model.py").__file__)).is_relative_to(tmp_path / "checkout")
    assert "site-packages/netc: Python runs that one instead" in checkout.notes[0]


def test_an_import_error_says_where(tmp_path: Path) -> None:
    write(tmp_path, netd__model="import sys\nfrom netd.layers import Block", netd__layers="\n\nBlock = 1 / 0")
    with pytest.raises(CheckoutError, match=r"netd/model.py cannot be .*: at netd/layers.py:3: ZeroDivisionError"):
        Checkout(tmp_path).load("netd/model.py")


# Placeholders.


def test_missing_packages_bear_what_module_level_code_does_and_raise_when_used(tmp_path: Path) -> None:
    source = """
import nowhere.deep
import nowhere.other as other
from nowhere import Encoder, tool
from elsewhere.images import Image

KEEP = Encoder(bits=3).set("x")[0]
with tool.quiet():
    pass

class Reader(Encoder):
    def read(self): return 7

@tool.fast
def decorated(x: Image.Image | None = None) -> list[Image]: return 8

def uses(): return Encoder(1)
def reads(): return other.thing
"""
    write(tmp_path, nete__model=source)
    checkout = Checkout(tmp_path)
    module = checkout.load("nete/model.py")
    checkout.placeholders.arm()
    assert checkout.placeholders.names == {"nowhere", "elsewhere"}
    assert module.Reader().read() == 7
    assert module.decorated() == 8
    with pytest.raises(PlaceholderUsed, match=r"nowhere\.Encoder is needed, but the package 'nowhere' is"):
        module.uses()
    with pytest.raises(PlaceholderUsed, match=r"nowhere\.other\.thing"):
        module.reads()


def test_a_class_that_inherits_from_a_missing_package_is_told_from_others(tmp_path: Path) -> None:
    text = """
from enum import Enum
import encoderlib.models as models

class Near(Enum):
    A = 1

class Far(models.Mixin, models.deep.Base):
    pass

class Farther(Far):
    pass
"""
    module = Checkout(write(tmp_path, net__model=text)).load("net/model.py")
    assert missing_base(module.Near) is None
    assert missing_base(module.Far) == missing_base(module.Farther) == "encoderlib"


def test_what_only_an_application_holds_is_not_to_be_installed() -> None:
    assert to_install("comfy.utils") == "export PYTHONPATH=/path/to/ComfyUI  # its folder holds the package 'comfy'"
    assert to_install("comfyui_frontend.x").endswith(" -m pip install comfyui_frontend")


def test_what_is_only_tried_stays_missing(tmp_path: Path) -> None:
    source = """
try:
    import nowhere
except ImportError:
    nowhere = None
try:
    from netf._version import version
except ModuleNotFoundError:
    version = "unknown"
"""
    write(tmp_path, netf__model=source)
    checkout = Checkout(tmp_path)
    module = checkout.load("netf/model.py")
    assert module.nowhere is None
    assert module.version == "unknown"
    assert not checkout.placeholders.names


def test_a_module_that_the_checkout_itself_lacks_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, netg__model="from netg.gone import x", netg__layers="")
    with pytest.raises(CheckoutError, match=r"netg/model.py:1: ModuleNotFoundError: No module named 'netg.gone'"):
        Checkout(tmp_path).load("netg/model.py")


def test_a_submodule_that_an_installed_package_lacks_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, neth__model="import yaml.gone")
    with pytest.raises(CheckoutError, match=r"No module named 'yaml.gone'"):
        Checkout(tmp_path).load("neth/model.py")


def test_chipmunk_is_never_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chipmunk", None)
    write(tmp_path, neti__model="import chipmunk")
    with pytest.raises(CheckoutError, match="chipmunk"):
        Checkout(tmp_path).load("neti/model.py")


def test_a_gpu_that_is_not_there_is_an_error_with_a_next_command() -> None:
    require_device("cpu")
    with pytest.raises(CheckoutError, match="no device cuda:99") as missing:
        require_device("cuda:99")
    assert missing.value.next_command == "chipmunk doctor"


# Rebuilding the original.


def test_the_original_is_rebuilt_beside_the_repository_which_is_left_alone(tmp_path: Path) -> None:
    root = write(tmp_path / "root", pkg__deep__model="patched", pkg__deep__other="same", setup="same")
    (root / "weights.bin").write_bytes(b"1")
    (root / "pkg/deep/__pycache__").mkdir()
    (root / ".chipmunk").mkdir()
    copy = rebuild(root, {"pkg/deep/model.py": b"original"}, tmp_path / "copy")
    assert (copy / "pkg/deep/model.py").read_text() == "original"
    assert (copy / "pkg/deep/other.py").read_text() == (copy / "setup.py").read_text() == "same"
    assert (copy / "weights.bin").is_symlink()
    assert not (copy / "pkg/deep/__pycache__").exists()
    assert not (copy / ".chipmunk").exists()
    assert (root / "pkg/deep/model.py").read_text() == "patched"
