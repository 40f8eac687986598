"""What a benchmark worker tells its parent when it ends without a result."""

from __future__ import annotations

import json
import sys

import pytest

from chipmunk.bench.device import CannotTime
from chipmunk.bench.spec import Event
from chipmunk.bench.worker import explain
from chipmunk.verify.checkout import CheckoutError
from chipmunk.verify.order import PROGRESS
from chipmunk.verify.placeholders import PlaceholderUsed

PIP = f"{sys.executable} -m pip install"


def missing(package: str) -> PlaceholderUsed:
    return PlaceholderUsed(f"{package} is used", name=package)


@pytest.mark.parametrize(
    ("error", "kind", "message", "next_command"),
    [
        (CannotTime("device", "no GPU", "buy one"), "device", "no GPU", "buy one"),
        (missing("einops"), "import", "einops is used", f"{PIP} einops"),
        (missing("cv2.dnn"), "import", "cv2.dnn is used", f"{PIP} cv2"),
        (missing("comfy.ops"), "import", "comfy.ops is used", "export PYTHONPATH=/path/to/ComfyUI  # "),
        (CheckoutError("no module named x", "install x"), "import", "no module named x", "install x"),
        (ValueError("shapes"), "crash", "ValueError: shapes", None),
    ],
)
def test_what_the_parent_is_told(
    error: Exception, kind: str, message: str, next_command: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    explain(error)
    event: Event = json.loads(capsys.readouterr().out.removeprefix(PROGRESS))
    assert (event["event"], event["kind"], event["message"]) == ("error", kind, message)
    assert event["next"] is None if next_command is None else event["next"].startswith(next_command)
    assert type(error).__name__ in event["trace"]
