"""What is said where a target's way from a prompt to a picture cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chipmunk.fidelity.studio import BuildError, Studio


def broken(load: Any, file: str, autoencoder: str | None) -> Any:
    raise KeyError("decoder.weight")


@pytest.mark.parametrize(
    ("given", "named"), [(Path("ae.safetensors"), "ae.safetensors"), (None, "what target 'family' decodes with")]
)
def test_a_decoder_that_does_not_load_is_named(given: Path | None, named: str) -> None:
    studio: Any = object.__new__(Studio)  # without the checkout that a whole one imports
    studio.order = SimpleNamespace(weights=None, factory=None, autoencoder=given)
    studio.target = SimpleNamespace(NAME="family", pipeline=broken)
    studio.checkout = SimpleNamespace(load=None)
    studio.facts = SimpleNamespace(file="model.py", installed=False)
    with pytest.raises(BuildError, match=f"^{named} cannot be used to decode: KeyError"):
        studio._build("model")
