"""One side of a benchmark at a time, in a process of its own with compile caches of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from chipmunk.apply.errors import Refused, quoted
from chipmunk.bench.measurement import Run
from chipmunk.bench.spec import Event, Spec
from chipmunk.verify.order import PROGRESS, write_order
from chipmunk.verify.process import environment

Progress = Callable[[Event], None]

LAST_LINES = 8
"""Of what a worker that died has written, shown to the user."""


class BenchError(Refused):
    """Nothing could be measured: no GPU, not enough memory, code that does not run (exit code 2)."""


def run_worker(
    spec: Spec, root: Path, python: str, progress: Progress, label: str = "", keep_caches: bool = False
) -> list[Run]:
    """Run one worker in the folder of `spec.out` and return what it measured.

    root: the user's repository, for messages. label: the configuration's name, added to every event. Raises BenchError
    where the worker ends without a result. The worker and all that it has started are gone when this returns, however
    it does.
    """
    folder = spec.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    order, errors = folder / "spec.json", folder / "stderr.txt"
    write_order(spec, order)
    failure: Event | None = None
    progress({"event": "start", "side": spec.side, "config": label})
    with errors.open("w") as stderr:
        try:
            worker = subprocess.Popen(
                [python, "-m", "chipmunk.bench.worker", str(order)],
                cwd=folder,
                env={**environment(python), **({} if keep_caches else _caches(folder))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise BenchError(f"{python} cannot be run: {error.strerror}") from error
    try:
        assert worker.stdout is not None
        for line in worker.stdout:
            # the rest are the repository's own prints
            if line.startswith(PROGRESS):
                event: Event = json.loads(line.removeprefix(PROGRESS))
                if event["event"] == "error":
                    failure = event
                progress({**event, "side": spec.side, "config": label})
        code = worker.wait()
    finally:
        # the compiler's own processes too
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    if failure is None and code == 0 and spec.out.exists():
        return [Run.from_json(json.loads(line)) for line in spec.out.read_text().splitlines()]
    raise _died(spec, root, python, code, failure, errors.read_text(errors="replace"))


def _caches(folder: Path) -> dict[str, str]:
    """Empty ones, so that the first picture pays for everything."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor-cache"),
        "TRITON_CACHE_DIR": str(folder / "triton-cache"),
    }


def _died(spec: Spec, root: Path, python: str, code: int, failure: Event | None, written: str) -> BenchError:
    """Say what happened to a worker, why, and what to run next."""
    side = f"the {spec.side} code"
    verify = f"chipmunk verify {quoted(root)}"

    def told(text: str) -> str:
        return text.replace(str(spec.root), str(root))  # the original lies in a folder that is gone by now

    if failure is None:
        last = told(_last(written))
        if "No module named 'chipmunk" in last:
            return BenchError(
                f"Chipmunk's benchmark cannot be imported by {python}\n\n{last}",
                next_command=f"chipmunk doctor --python {quoted(Path(python))}",
            )
        why = f"exit code {code}"
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}"
            why += ": did the machine run out of memory?" if -code == signal.SIGKILL else ""
        message = f"the process that ran {side} ended without a result ({why})\n\n{last}".rstrip()
        return BenchError(message, next_command=verify)
    kind, message, next_command = failure["kind"], told(failure["message"]), failure["next"]
    if kind == "device":
        return BenchError(message, next_command=f"chipmunk doctor --python {quoted(Path(python))} {quoted(root)}")
    if kind in ("import", "build", "result"):
        return BenchError(f"{side} cannot be timed: {message}", next_command=next_command or verify)
    if kind == "weights":
        smaller = ", or --model with a smaller model of the family (docs/benchmarks.md)" if spec.weights is None else ""
        return BenchError(f"the GPU's memory does not suffice for {side}: {message}{smaller}")
    if kind == "memory":
        width, height = min(spec.sizes)
        smaller = f"{max(width // 32, 1) * 16}x{max(height // 32, 1) * 16}"
        return BenchError(
            f"the GPU's memory does not suffice for {side} (nvidia-smi shows what else uses it): {message}",
            next_command=f"chipmunk bench {quoted(root)} --size {smaller}",
        )
    return BenchError(
        f"{side} fails while it is timed: {message}\n\n{told(_last(failure['trace']))}", next_command=verify
    )


def _last(text: str) -> str:
    lines = [line for line in text.rstrip().splitlines() if line.strip(" ^~")]
    return "\n".join(lines[-LAST_LINES:])
