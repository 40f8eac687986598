"""Under the sea: fish, seaweed, bubbles, sand and rays of light."""

from __future__ import annotations

import torch
from torch import Tensor

from training.scenes.paint import NAMES, Canvas, Dice, circle, ellipse, smooth

COUNTS = ("", "a", "two", "three")
SIZES = ("small", "big")


def underwater(dice: Dice, canvas: Canvas) -> list[list[str]]:
    """Paint one piece of sea on every canvas; returns their captions, in phrases."""
    x, y = canvas.x, canvas.y
    deep = dice.chance(0.35)
    top = dice.of(deep.long(), ((0.36, 0.78, 0.88), (0.10, 0.32, 0.55)))
    low = dice.of(deep.long(), ((0.06, 0.36, 0.60), (0.02, 0.08, 0.22)))
    canvas.pixels = torch.lerp(top, low, smooth(y)[:, None]).expand(-1, -1, -1, canvas.size)
    beams = dice.ridge(canvas.size, 9, 2)
    slanted = torch.stack([beams, beams.roll(12, 2)], dim=0).mean(0) * (1 - y)
    canvas.blend(torch.ones_like(top), (0.16 * smooth(slanted) * (1 - y) * (1 + 0 * x)).clamp(0, 1))

    sand = 0.84 + 0.03 * torch.sin(6 * x + dice.number(0, 6)) + 0.01 * dice.ridge(canvas.size, 5, 2)
    grain = dice.noise(canvas.size, 80, 80)
    ripples = torch.sin(70 * (y - sand) / (0.2 + y) + 2 * torch.sin(9 * x))
    paint = dice.of(deep.long(), ((0.88, 0.79, 0.58), (0.30, 0.36, 0.42)))
    canvas.shape(sand - y, (paint * (1 + 0.05 * grain + 0.05 * ripples)[:, None]).clamp(0, 1))

    weeds = dice.chance(0.6)
    _seaweed(dice, canvas, dice.on(weeds), deep)
    count = dice.choice(0.4, 0.35, 0.25) + 1
    colour, big, left, striped = dice.colour(), dice.choice(1, 1), dice.chance(0.5), dice.chance(0.5)
    dim = dice.of(deep.long(), ((1.0, 1.0, 1.0), (0.70, 0.78, 0.92)))
    spots = torch.stack([torch.randperm(3, generator=dice.rng) for _ in range(dice.n)])
    for i in range(3):
        slot = torch.where(count == 1, torch.ones_like(count), spots[:, i])
        fx = x - dice.of(slot, (0.27, 0.5, 0.73)) - dice.number(-0.05, 0.05)
        fy = y - dice.of(slot, (0.24, 0.46, 0.66)) - dice.number(-0.04, 0.04)
        scale = dice.of(big, (0.68, 1.2)) * dice.number(0.92, 1.08)
        fx = torch.where(dice.on(left) > 0, fx, -fx)
        _fish(dice, canvas, fx / scale, fy / scale, dice.paint(colour) * dim, dice.on(striped), dice.on(count > i))
    bubbles = dice.chance(0.5)
    _bubbles(dice, canvas, dice.on(bubbles))

    captions = []
    for k in range(dice.n):
        pattern = "striped " if striped[k] else ""
        fish = f"{COUNTS[count[k]]} {SIZES[big[k]]} {pattern}{NAMES[colour[k]]} fish"
        more = [name for name, there in (("seaweed", weeds[k]), ("bubbles", bubbles[k])) if there]
        extra = f"with {' and '.join(more)}" if more else ""
        place = "in the deep sea" if deep[k] else "in the clear sea"
        side = "swimming left" if left[k] else "swimming right"
        captions.append([fish, side, place, extra])
    return captions


def _seaweed(dice: Dice, canvas: Canvas, present: Tensor, deep: Tensor) -> None:
    green = dice.of(deep.long(), ((0.20, 0.52, 0.28), (0.08, 0.26, 0.24)))
    for _ in range(5):
        root, height = dice.number(0.04, 0.96), dice.number(0.15, 0.42)
        up = (0.93 - canvas.y) / height
        sway = 0.022 * torch.sin(9 * up + dice.number(0, 6)) * up.clamp(0, 1)
        width = 0.017 * (1 - up.clamp(0, 1) ** 3) + 0.004 * torch.sin(26 * up)
        blade = torch.maximum((canvas.x - root - sway).abs() - width, torch.maximum(-up, up - 1) * height)
        tone = 0.8 + 0.5 * up.clamp(0, 1) - 12 * (canvas.x - root - sway).clamp(-0.03, 0.03)
        canvas.shape(blade, (green * tone[:, None]).clamp(0, 1), present)


def _fish(dice: Dice, canvas: Canvas, fx: Tensor, fy: Tensor, paint: Tensor, striped: Tensor, there: Tensor) -> None:
    """A fish that looks left, about 0.3 long."""
    back = fx - 0.105
    spread = (0.025 + 0.62 * back).clamp(min=0)
    tail = torch.maximum(fy.abs() - spread, torch.maximum(-back, back - 0.085 + 0.35 * (0.05 - fy.abs()).clamp(min=0)))
    rays = 1 + 0.12 * torch.sin(90 * fy / (0.3 + 4 * back.clamp(min=0)))
    canvas.shape(tail, (0.78 * paint * rays[:, None]).clamp(0, 1), there)
    fin = ellipse(fx - 0.01, fy + 0.075, 0.065, 0.045)
    canvas.shape(fin, (0.72 * paint * (1 + 0.12 * torch.sin(160 * fx + 60 * fy))[:, None]).clamp(0, 1), there)
    body = ellipse(fx, fy, 0.135, 0.082)
    scales = 1 + 0.05 * torch.sin(150 * fx) * torch.sin(150 * fy)
    light = (1.0 - 5.0 * fy) * scales
    belly = smooth(0.5 + 14 * (fy - 0.03))
    colour = torch.lerp(paint * light[:, None], torch.lerp(paint, torch.ones_like(paint), 0.55), (0.6 * belly)[:, None])
    canvas.shape(body, colour.clamp(0, 1), there)
    bands = smooth(3 * torch.cos(62 * fx + 1.0) - 0.8) * (fx > -0.06) * striped
    pale = torch.where(paint.mean(dim=1, keepdim=True) > 0.75, 0.25 * paint, torch.ones_like(paint) * 0.95)
    canvas.blend((pale * light.clamp(0.6, 1.05)[:, None]).clamp(0, 1), canvas.cover(body + 0.003) * bands * there)
    side = ellipse(fx - 0.025, fy - 0.012, 0.034, 0.018)
    canvas.shape(side, (0.72 * paint).clamp(0, 1), there)
    canvas.shape(circle(fx + 0.085, fy + 0.018, 0.021), torch.ones_like(paint), there)
    canvas.shape(circle(fx + 0.089, fy + 0.018, 0.012), 0.05 * torch.ones_like(paint), there)
    mouth = torch.maximum(circle(fx + 0.128, fy - 0.012, 0.018).abs() - 0.003, 0.016 - fy)
    canvas.blend(0.35 * paint, canvas.cover(torch.maximum(mouth, body)) * there)


def _bubbles(dice: Dice, canvas: Canvas, present: Tensor) -> None:
    for _ in range(6):
        radius = dice.number(0.008, 0.024)
        bx, by = canvas.x - dice.number(0.06, 0.94), canvas.y - dice.number(0.05, 0.75)
        rim = circle(bx, by, radius)
        canvas.blend(torch.ones_like(canvas.pixels[:, :, :1, :1]), 0.18 * canvas.cover(rim) * present)
        canvas.blend(torch.ones_like(canvas.pixels[:, :, :1, :1]), 0.6 * canvas.cover(rim.abs() - 0.002) * present)
        shine = circle(bx + 0.35 * radius, by + 0.35 * radius, 0.25 * radius)
        canvas.blend(torch.ones_like(canvas.pixels[:, :, :1, :1]), 0.9 * canvas.cover(shine) * present)
