"""What the scenes are painted with: a batch of canvases, and dice that fall the same on every device.

Everything is batched: `n` pictures are painted at once, layer by layer, each with its own shapes and colours. Shapes
are signed distances (negative inside) in units of the picture's side, so that edges are smooth at any resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.83, 0.16, 0.15),
    "orange": (0.95, 0.55, 0.13),
    "yellow": (0.97, 0.84, 0.22),
    "green": (0.25, 0.62, 0.27),
    "blue": (0.18, 0.39, 0.82),
    "purple": (0.51, 0.27, 0.68),
    "pink": (0.96, 0.56, 0.70),
    "white": (0.95, 0.95, 0.93),
    "brown": (0.48, 0.30, 0.17),
    "grey": (0.55, 0.56, 0.58),
}
NAMES = tuple(COLOURS)


class Dice:
    """Random numbers for `n` pictures, drawn on the CPU so that a seed means the same pictures on every device."""

    def __init__(self, n: int, seed: int, device: torch.device):
        self.n = n
        self.device = device
        self.rng = torch.Generator("cpu").manual_seed(seed)

    def number(self, low: float, high: float) -> Tensor:
        """(n, 1, 1), uniform."""
        return (low + (high - low) * torch.rand(self.n, 1, 1, generator=self.rng)).to(self.device)

    def choice(self, *weights: float) -> Tensor:
        """(n,) indices on the CPU, index i with probability proportional to `weights[i]`."""
        return torch.multinomial(
            torch.tensor(weights, dtype=torch.float32), self.n, replacement=True, generator=self.rng
        )

    def chance(self, probability: float) -> Tensor:
        """(n,) booleans on the CPU."""
        return torch.rand(self.n, generator=self.rng) < probability

    def colour(self, names: Sequence[str] = NAMES) -> Tensor:
        """(n,) indices into NAMES on the CPU, of the given colours."""
        return torch.tensor([NAMES.index(name) for name in names])[self.choice(*[1.0] * len(names))]

    def paint(self, colour: Tensor, spread: float = 0.035) -> Tensor:
        """Paint (n, 3, 1, 1) of named colours (n,), no two quite the same."""
        jitter = spread * torch.randn(self.n, 3, 1, 1, generator=self.rng)
        return (torch.tensor(list(COLOURS.values()))[colour, :, None, None] + jitter).clamp(0, 1).to(self.device)

    def of(self, indices: Tensor, values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """What `values` says at `indices` (n,): (n, 1, 1), or (n, 3, 1, 1) where the values are colours."""
        chosen = torch.tensor(values)[indices]
        return chosen.reshape(self.n, *chosen.shape[1:], 1, 1).to(self.device)

    def on(self, mask: Tensor) -> Tensor:
        """A mask (n,) as (n, 1, 1) numbers on the device."""
        return mask.float().reshape(self.n, 1, 1).to(self.device)

    def normal(self, rows: int, columns: int) -> Tensor:
        """(n, 1, rows, columns), normal. Many numbers, so they are hashed on the device from one seed a picture."""
        seed = torch.randint(1 << 31, (self.n, 1, 1, 1), generator=self.rng).to(self.device)
        mixed = seed + 0x9E3779B1 * torch.arange(1, rows * columns + 1, device=self.device).reshape(rows, columns)
        for _ in range(3):
            mixed = mixed & 0xFFFFFFFF
            mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B
        first, second = ((part & 0xFFFF).float() + 0.5 for part in (mixed >> 8, mixed >> 28))
        return (-2 * (first / 65536).log()).sqrt() * torch.cos(second * (2 * torch.pi / 65536))

    def noise(self, size: int, rows: int, columns: int, octaves: int = 1) -> Tensor:
        """Smooth noise (n, size, size) of about unit variance; finer octaves have half the height."""
        total = torch.zeros(self.n, 1, size, size, device=self.device)
        for octave in range(octaves):
            grid = self.normal(rows << octave, columns << octave)
            total += 0.5**octave * torch.nn.functional.interpolate(grid, (size, size), mode="bilinear")
        return 1.3 * total[:, 0]

    def ridge(self, size: int, points: int, octaves: int = 4) -> Tensor:
        """The outline of a mountain range: noise (n, 1, size) along x; finer octaves have under half the height."""
        total = torch.zeros(self.n, 1, size, device=self.device)
        for octave in range(octaves):
            line = self.normal(1, points << octave)[:, 0]
            total += 0.45**octave * torch.nn.functional.interpolate(line, size, mode="linear")
        return total


class Canvas:
    """`n` pictures (n, 3, size, size) with values in [0, 1]; x runs right and y down, both from 0 to 1."""

    def __init__(self, n: int, size: int, device: torch.device):
        self.n = n
        self.size = size
        self.pixels = torch.zeros(n, 3, size, size, device=device)
        middle = (torch.arange(size, device=device) + 0.5) / size
        self.x = middle.reshape(1, 1, size)
        self.y = middle.reshape(1, size, 1)

    def cover(self, distance: Tensor, blur: float = 0.0) -> Tensor:
        """How much of each pixel (n, size, size) lies inside a shape; `blur` in units of the side softens the edge."""
        return (0.5 - distance / max(blur, 1 / self.size)).clamp(0, 1)

    def blend(self, paint: Tensor, amount: Tensor) -> None:
        """Lay paint (n, 3, 1, 1) or (n, 3, size, size) over the pictures, by `amount` (n, size, size)."""
        self.pixels = torch.lerp(self.pixels, paint.expand_as(self.pixels), amount[:, None].expand_as(self.pixels))

    def shape(self, distance: Tensor, paint: Tensor, present: Tensor | float = 1.0, blur: float = 0.0) -> None:
        """Fill a shape with paint in those pictures where `present` (n, 1, 1) is 1."""
        self.blend(paint, self.cover(distance, blur) * present)

    def shade(self, factor: Tensor, amount: Tensor | float = 1.0) -> None:
        """Multiply the pictures by `factor` (n, size, size), fully where `amount` is 1."""
        self.pixels = self.pixels * (1 + (factor - 1) * amount)[:, None]

    def dots(self, dice: Dice, cells: int, share: float, radius: float) -> Tensor:
        """Soft dots (n, size, size), at most one in each of `cells` x `cells` cells: stars, snow, flowers."""
        place = torch.rand(dice.n, 3, cells, cells, generator=dice.rng).to(dice.device)
        cell = (torch.arange(self.size, device=dice.device) * cells) // self.size
        spread = place[:, :, cell][:, :, :, cell]
        dx = self.x * cells - cell[None, None] - (0.3 + 0.4 * spread[:, 0])
        dy = self.y * cells - cell[None, :, None] - (0.3 + 0.4 * spread[:, 1])
        bright = ((spread[:, 2] - (1 - share)) / share).clamp(min=0)
        size = radius * cells * (0.6 + 0.6 * bright)
        return (1.3 - (dx**2 + dy**2).sqrt() / size).clamp(0, 1) * (bright > 0) * (0.5 + 0.5 * bright)


# Signed distances.


def circle(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return (x**2 + y**2).sqrt() - radius


def ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Half axes a and b; a first-order distance, exact at the edge."""
    x = x + 1e-9  # the middle has a distance too
    reach = ((x / a) ** 2 + (y / b) ** 2).sqrt()
    slope = ((x / a**2) ** 2 + (y / b**2) ** 2).sqrt()
    return reach * (reach - 1) / slope


def box(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Half sides a and b."""
    return torch.maximum(x.abs() - a, y.abs() - b)


def triangle(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Apex at (0, -b), base of half width a at height 0."""
    length = (torch.as_tensor(a) ** 2 + torch.as_tensor(b) ** 2).sqrt()
    return torch.maximum((x.abs() * b - (y + b) * a) / length, y)


def trapezium(x: Tensor, y: Tensor, top: Tensor | float, bottom: Tensor | float, height: Tensor | float) -> Tensor:
    """Half widths at the top (y = 0) and the bottom (y = height)."""
    width = top + (bottom - top) * (y / height).clamp(0, 1)
    return torch.maximum(x.abs() - width, torch.maximum(-y, y - height))


def turn(x: Tensor, y: Tensor, angle: Tensor | float) -> tuple[Tensor, Tensor]:
    """The plane turned clockwise by `angle` radians."""
    angle = torch.as_tensor(angle)
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def smooth(x: Tensor) -> Tensor:
    """From 0 at 0 to 1 at 1, with level ends."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)
