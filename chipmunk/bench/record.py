"""What the workers of a benchmark have drawn so far, picture by picture: all that is left when it is stopped."""

from __future__ import annotations

from dataclasses import replace

from chipmunk.bench.measurement import Comparison, Image, Run, compare
from chipmunk.bench.spec import Event


class Record:
    """The pictures of each side and configuration, gathered from the workers' events."""

    def __init__(self, images: int) -> None:
        """images: pictures of a size; with fewer, a size is not compared."""
        self._of_size = images
        self._images: dict[tuple[str, str], list[Image]] = {}
        self.environment: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event["event"] == "about":
            self.environment = event["environment"]
        elif event["event"] == "image":
            self._images.setdefault((event["variant"], event["config"]), []).append(Image.from_json(event["image"]))

    @property
    def runs(self) -> tuple[Run, ...]:
        """What each side drew, the pictures of sizes that it has not finished too."""
        return tuple(
            Run(variant, tuple(images), self.environment, config) for (variant, config), images in self._images.items()
        )

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of the sizes that both sides have finished: the first pictures alone would say something else."""
        whole = {(run.variant, run.config): self._whole(run) for run in self.runs}
        dense, fewer = whole.get(("dense", "")), whole.get(("fewer steps", ""))
        if dense is None:
            return ()
        return tuple(row for run in whole.values() if run.variant == "chipmunk" for row in compare(dense, run, fewer))

    def _whole(self, run: Run) -> Run:
        if run.variant == "fewer steps":
            return run
        whole = [size for size in run.sizes if len(run.of_size(size)) == self._of_size]
        return replace(run, images=tuple(image for image in run.images if image.size in whole))
