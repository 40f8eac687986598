"""A benchmark that is stopped: what was drawn is told while it runs, and kept however it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from chipmunk.bench.measurement import compare
from chipmunk.bench.process import BenchError
from chipmunk.bench.record import Record
from chipmunk.bench.run import BenchReport
from chipmunk.bench.spec import Event
from chipmunk.bench.tables import PlainLines
from chipmunk.cli import bench as command
from chipmunk.cli.bench import show_report
from chipmunk.cli.failure import stoppable
from tests.bench.runs import dense, report, sparse
from tests.bench.test_run import ATTENTION, MLP, alive, chipmunk, starter  # noqa: F401


def drawn(variant: str, side: str, index: int, seconds: float, size: str = "1280x768", steps: int = 6) -> Event:
    """A worker's event."""
    of = dense if side == "original" else sparse
    one = replace(of(*[seconds] * (index + 1), size=size).images[index], steps=steps)
    config = "" if side == "original" else "defaults"
    about = {"variant": variant, "size": size, "steps": steps, "index": index, "side": side, "config": config}
    return {"event": "image", "seconds": seconds, "image": json.loads(json.dumps(asdict(one))), **about}


def record(*events: Event, images: int = 3) -> Record:
    found = Record(images)
    found({"event": "about", "side": "patched", "config": "defaults", "environment": report().environment})
    for event in events:
        found(event)
    return found


PATCHED = [drawn("chipmunk", "patched", index, seconds) for index, seconds in enumerate((26.0, 5.4, 4.6))]
ORIGINAL = [drawn("dense", "original", index, seconds) for index, seconds in enumerate((19.5, 6.5, 6.6))]


def test_a_size_is_compared_when_both_sides_have_finished_it() -> None:
    assert record().runs == ()
    assert record(*PATCHED).comparisons == ()
    assert record(*PATCHED, *ORIGINAL[:2]).comparisons == (), "its second picture is not a steady one"
    other = [drawn("chipmunk", "patched", 0, 60.0, "2048x2048"), drawn("dense", "original", 0, 70.0, "2048x2048")]
    (row,) = record(*PATCHED, *ORIGINAL, *other).comparisons
    assert [row] == compare(dense(19.5, 6.5, 6.6), sparse(26.0, 5.4, 4.6))
    shorter = drawn("fewer steps", "original", 0, 4.4, steps=4)
    (row,) = record(*PATCHED, *ORIGINAL, shorter).comparisons
    assert row.fewer_steps == (4, 4.4)


def test_the_table_of_what_there_is_says_that_it_is_not_all() -> None:
    events = [*PATCHED, *ORIGINAL[:2], drawn("chipmunk", "patched", 0, 61.25, "2048x2048")]
    so_far = record(*events)
    stopped = replace(report(), runs=so_far.runs, comparisons=so_far.comparisons, interrupted=True)
    assert stopped.exit_code == 130
    assert stopped.to_json()["status"] == "interrupted"
    out = io.StringIO()
    show_report(Console(file=out, width=80), stopped)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["chipmunk", "defaults", "1280x768", "26.00", "5.40", "4.60"] in lines
    assert ["chipmunk", "defaults", "2048x2048", "61.25"] in lines
    assert ["dense", "1280x768", "19.50", "6.50"] in lines
    assert "speed-up" not in out.getvalue()
    assert "then stopped" in out.getvalue()


def test_plain_lines_follow_the_events() -> None:
    said: list[str] = []
    lines = PlainLines(3, said.append)
    common = {"side": "patched", "config": "few"}
    lines({"event": "start", **common})
    lines({"event": "build", **common})
    lines({"event": "about", "environment": report().environment, **common})
    lines({**drawn("chipmunk", "patched", 0, 61.5), "event": "begin"})
    assert len(said) == 3, "a line for what is done, and for what takes long before anything is"
    lines(drawn("chipmunk", "patched", 0, 61.5))
    lines({"event": "start", "side": "original", "config": ""})
    lines(drawn("fewer steps", "original", 1, 21.0, steps=4))
    lines({"event": "operators", **common})
    assert said == [
        "starting the process of the patched code (few)",
        "building the model of the patched code (few)",
        "built Flux of src/flux/model.py, 11.9 billion parameters",
        "chipmunk (defaults) at 1280x768: picture 1 of 3: 61.50 s",
        "starting the process of the original",
        "4 dense steps at 1280x768: picture 2: 21.00 s",
        "timing the operators",
    ]


def test_what_was_drawn_before_a_failure_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original does not fit any more, say: the patched code's pictures were not drawn for nothing."""
    from chipmunk.bench import run as running_it

    so_far = record(*PATCHED)
    left = replace(report(), runs=so_far.runs, comparisons=(), interrupted=True)

    def fails(root: Path, options: object, progress: object, keep: object) -> BenchReport:
        assert callable(keep)
        keep(left)
        raise BenchError("no memory for the original")

    monkeypatch.setattr(running_it, "run", fails)
    with pytest.raises(BenchError):
        command._watched(tmp_path, running_it.BenchOptions(), tmp_path)
    assert "26.00  5.40  4.60" in capsys.readouterr().err
    assert json.loads((tmp_path / "bench.json").read_text())["runs"][0]["images"][0]["seconds"] == 26.0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_as_ctrl_c_does(name: str) -> None:
    number = getattr(signal, name)

    def waits() -> None:
        with stoppable():
            os.kill(os.getpid(), number)
            threading.Event().wait(5)

    with pytest.raises(KeyboardInterrupt):
        waits()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    """`nohup chipmunk bench`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
