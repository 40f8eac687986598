"""Run inside another Python (`python -c`): says what it is and what it would import. Needs nothing but that Python.

Nothing of the repository is executed: its root is on the path only while names are looked up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys


def where(name: str, root: str | None) -> list[str]:
    """Folders (or the file) that `import name` would load from; none if it would fail."""
    if root is not None:
        sys.path.insert(0, root)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    finally:
        if root is not None:
            sys.path.remove(root)
    if spec is None:
        return []
    return list(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))


def version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> dict[str, object]:
    """What torch sees. Imports it: slow."""
    try:
        import torch
    except Exception as error:
        missing = isinstance(error, ImportError) and getattr(error, "name", None) == "torch"
        return {"torch_error": "not installed" if missing else f"{type(error).__name__}: {error}"}
    devices: list[dict[str, object]] = []
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices,
    }
    try:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(index)
                devices.append(
                    {"name": device.name, "capability": [device.major, device.minor], "bytes": device.total_memory}
                )
    except Exception as error:
        facts["device_error"] = f"{type(error).__name__}: {error}"
    try:
        import triton

        facts["triton"] = triton.__version__
    except Exception as error:
        missing = isinstance(error, ImportError) and getattr(error, "name", None) == "triton"
        facts["triton_error"] = "not installed" if missing else f"{type(error).__name__}: {error}"
    return facts


def main(root: str | None, packages: list[str], deep: bool) -> dict[str, object]:
    answer: dict[str, object] = {
        "executable": sys.executable,
        "chipmunk": where("chipmunk", root),
        "packages": {name: where(name, root) for name in packages},
    }
    if deep:
        import platform

        answer.update(python=platform.python_version(), version=version("chipmunk-flux"), **torch_facts())
    return answer


if __name__ == "__main__":
    if sys.path and sys.path[0] == "":  # the working directory, which `-c` puts there
        del sys.path[0]
    # What libraries print while they are imported goes to stderr; stdout holds the answer alone.
    stdout = os.dup(1)
    os.dup2(2, 1)
    answer = json.dumps(main(*json.loads(sys.argv[1])))
    os.write(stdout, answer.encode("ascii"))
