"""Two worker processes side by side, each with its own copy of the repository's modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import chipmunk
from chipmunk.apply.errors import quoted
from chipmunk.verify.order import PROGRESS, write_order
from chipmunk.verify.report import VerifyError

Progress = Callable[[str, int, int], None]
"""Called with what was done last, how much is done, and how much there is."""


class Order(Protocol):
    """What a worker is told, as far as it matters here."""

    @property
    def side(self) -> str: ...
    @property
    def out(self) -> Path: ...
    @property
    def weights(self) -> Path | None: ...


def run_workers(
    specs: Sequence[Order],
    python: str,
    progress: Progress | None,
    timeout: float,
    module: str = "chipmunk.verify.worker",
) -> list[dict[str, Any]]:
    """Run one worker, `module`, for each spec; returns their results, which may hold an `error`.

    At the same time, unless they hold a model of the user's size.

    Raises VerifyError where a worker cannot start, dies, or takes longer than `timeout` seconds.
    """
    done = [[0, 1] for _ in specs]
    lock = threading.Lock()
    workers: list[subprocess.Popen[str]] = []
    threads = []

    def follow(number: int, output: IO[str]) -> None:
        for line in output:
            if not line.startswith(PROGRESS):
                continue  # the repository's own prints
            current, total, what = json.loads(line.removeprefix(PROGRESS))
            with lock:
                done[number][:] = [current, total]
                if progress is not None:
                    progress(what, sum(part[0] for part in done), sum(part[1] for part in done))

    try:
        for number, spec in enumerate(specs):
            spec.out.mkdir(parents=True, exist_ok=True)
            write_order(spec, spec.out / "spec.json")
            workers.append(worker := _start(spec, python, module))
            assert worker.stdout is not None
            threads.append(threading.Thread(target=follow, args=(number, worker.stdout), daemon=True))
            threads[-1].start()
            if spec.weights is not None:
                worker.wait(timeout)
        codes = [worker.wait(timeout) for worker in workers]
    except subprocess.TimeoutExpired as error:
        raise VerifyError(f"it took longer than {timeout:.0f} s and was stopped") from error
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for thread in threads:
        thread.join()
    return [_result(spec, python, code) for spec, code in zip(specs, codes, strict=True)]


def _start(spec: Order, python: str, module: str) -> subprocess.Popen[str]:
    with open(spec.out / "stderr.txt", "w") as errors:
        try:
            return subprocess.Popen(
                [python, "-m", module, str(spec.out / "spec.json")],
                cwd=spec.out,
                env=environment(python),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        except OSError as error:
            raise VerifyError(f"{python} cannot be run: {error.strerror}") from error


def _result(spec: Order, python: str, code: int) -> dict[str, Any]:
    path = spec.out / "result.json"
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    said = (spec.out / "stderr.txt").read_text().strip()
    last = said.splitlines()[-1] if said else f"exit code {code}"
    if "No module named" in last:
        why = last.rpartition(":")[2].strip(" )")
        if "'chipmunk." in why:
            why = "another package called chipmunk is installed there"
        raise VerifyError(
            f"the runtime cannot be imported by {python}: {why}",
            next_command=f"chipmunk doctor --python {quoted(Path(python))}",
        )
    if code < 0:
        last = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    raise VerifyError(f"the process that runs the {spec.side} code ended without a result: {last}")


def environment(python: str) -> dict[str, str]:
    """The user's, less what would switch Chipmunk on or write beside the user's files."""
    found = {name: value for name, value in os.environ.items() if name != "CHIPMUNK_CONFIG"}
    found["PYTHONDONTWRITEBYTECODE"] = "1"
    if python == sys.executable:
        # this very Chipmunk, however it was found
        package = str(Path(chipmunk.__file__).parent.parent)
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (package, found.get("PYTHONPATH"))))
    return found
