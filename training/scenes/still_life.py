"""Still lifes: one to three things on a table before a wall."""

from __future__ import annotations

import torch
from torch import Tensor

from training.scenes.paint import NAMES, Canvas, Dice, box, ellipse, smooth, triangle, turn

SHAPES = ("ball", "cube", "cone", "vase", "apple")
TABLES = ("wooden", "white", "checked")
WALLS = ("plain", "striped", "dotted")
COUNTS = ("", "a", "two", "three")
SIZES = ("small", "big")


def still_life(dice: Dice, canvas: Canvas) -> list[list[str]]:
    """Paint one still life on every canvas; returns their captions, in phrases."""
    n = dice.n
    wall, wall_colour, table = dice.choice(0.5, 0.25, 0.25), dice.colour(), dice.choice(0.5, 0.25, 0.25)
    edge = dice.number(0.56, 0.62)
    _room(dice, canvas, wall, dice.paint(wall_colour), table, edge)

    count = dice.choice(0.3, 0.4, 0.3)
    alike = dice.chance(0.3)
    shapes: list[Tensor] = []
    colours: list[Tensor] = []
    sizes: list[Tensor] = []
    for i in range(3):
        same = alike & (i > 0)
        shapes.append(torch.where(same, shapes[0], dice.choice(*[1.0] * 5)) if i else dice.choice(*[1.0] * 5))
        colours.append(torch.where(same, colours[0], dice.colour()) if i else dice.colour())
        sizes.append(torch.where(same, sizes[0], dice.choice(1, 1)) if i else dice.choice(1, 1))
    for i in range(3):
        spot = dice.of(3 * count + i, (0.5, 0, 0, 0.32, 0.68, 0, 0.2, 0.5, 0.8)) + dice.number(-0.03, 0.03)
        scale = dice.of(sizes[i], (0.66, 1.05))
        base = edge + dice.number(0.16, 0.24)
        there = dice.on(count >= i)
        dx, dy = (canvas.x - spot) / scale, (canvas.y - base) / scale
        _thing(dice, canvas, dx, dy, shapes[i], dice.paint(colours[i]), there)

    captions = []
    for k in range(n):
        many = int(count[k]) + 1
        names = [f"{SIZES[sizes[i][k]]} {NAMES[colours[i][k]]} {SHAPES[shapes[i][k]]}" for i in range(many)]
        if many > 1 and alike[k]:
            things = f"{COUNTS[many]} {names[0]}s"
        else:
            things = " and ".join(f"a {name}" for name in names)
        cloth = f"on a {TABLES[table[k]]} table"
        pattern = "" if wall[k] == 0 else f"{WALLS[wall[k]]} "
        captions.append([things, cloth, f"before a {pattern}{NAMES[wall_colour[k]]} wall"])
    return captions


def _room(dice: Dice, canvas: Canvas, wall: Tensor, paint: Tensor, table: Tensor, edge: Tensor) -> None:
    """Wall and table, lit from the left."""
    x, y = canvas.x, canvas.y
    paint = torch.lerp(paint, torch.full_like(paint, 0.9), 0.15)
    stripes = 1 - 0.16 * dice.on(wall == 1) * smooth(4 * torch.sin(2 * torch.pi * x * 11) + 0.5)
    dots = (torch.sin(2 * torch.pi * (x + y) * 7) * torch.sin(2 * torch.pi * (x - y) * 7)).abs()
    spots = 0.30 * dice.on(wall == 2) * smooth(8 * (dots - 0.72))
    light = 1.12 - 0.55 * ((x - 0.25) ** 2 + (y - 0.2) ** 2)
    canvas.pixels = (torch.lerp(paint, torch.ones_like(paint), spots[:, None]) * (light * stripes)[:, None]).clamp(0, 1)

    depth = ((y - edge) / (1 - edge)).clamp(0, 1)
    across = (x - 0.5) / (0.75 + 0.6 * depth)
    grain = dice.noise(canvas.size, 90, 3, octaves=2)
    planks = smooth(30 * ((across * 7) % 1.0 - 0.04))
    wood = dice.of(table * 0, ((0.60, 0.38, 0.21),)) * ((0.95 + 0.10 * grain) * (0.72 + 0.28 * planks))[:, None]
    white = dice.of(table * 0, ((0.93, 0.92, 0.90),)) * (1 + 0.03 * dice.noise(canvas.size, 6, 9, octaves=2))[:, None]
    squares = torch.sign(torch.sin(across * 42) * torch.sin(85 / (1.25 + depth)))
    red = dice.paint(dice.colour(("red", "blue", "green")))
    checks = torch.lerp(red, white, smooth(0.5 + squares)[:, None])
    chosen = torch.where(
        dice.on(table == 0)[:, None] > 0, wood, torch.where(dice.on(table == 1)[:, None] > 0, white, checks)
    )
    chosen = chosen * (0.80 + 0.25 * depth - 0.18 * (x - 0.3))[:, None]
    canvas.shape(edge - y + 0 * x, chosen.clamp(0, 1))
    canvas.shade(0.82 + 0.18 * smooth((y - edge).abs() / 0.02))


def _thing(dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, kind: Tensor, paint: Tensor, there: Tensor) -> None:
    """One thing that stands at (0, 0), with its shadow on the table."""
    shadow = ellipse(dx - 0.06, dy - 0.005, 0.165, 0.035)
    canvas.shade(0.55 + 0.45 * smooth((shadow + 0.05) / 0.1), there)
    _ball(dice, canvas, dx, dy, paint, dice.on((kind == 0) | (kind == 4)) * there, dice.on(kind == 4) * there)
    _cube(canvas, dx, dy, paint, dice.on(kind == 1) * there)
    _cone(canvas, dx, dy, paint, dice.on(kind == 2) * there)
    _vase(canvas, dx, dy, paint, dice.on(kind == 3) * there)


def _ball(dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, paint: Tensor, there: Tensor, apple: Tensor) -> None:
    radius = 0.125
    up = dy + radius - 0.01
    dent = 0.035 * apple * torch.exp(-((dx / 0.03) ** 2)) * (up < 0)
    distance = ellipse(dx, up, radius, radius * (1 - 0.08 * apple)) + dent
    nx, ny = dx / radius, up / radius
    nz = (1 - nx**2 - ny**2).clamp(min=0).sqrt()
    light = (-0.5 * nx - 0.62 * ny + 0.6 * nz).clamp(min=0)
    bounce = 0.12 * (ny.clamp(min=0)) * (1 - nz)
    shine = torch.exp(-((nx + 0.42) ** 2 + (ny + 0.48) ** 2) / 0.02) * (0.75 - 0.3 * apple)
    colour = paint * (0.32 + 0.82 * light + bounce)[:, None] + shine[:, None]
    canvas.shape(distance, colour.clamp(0, 1), there)
    sx, sy = turn(dx - 0.008, up + radius, -0.25)
    canvas.shape(box(sx, sy, 0.006, 0.030), paint * 0 + _BARK.to(paint), apple)
    lx, ly = turn(dx - 0.042, up + radius + 0.015, -0.45)
    canvas.shape(ellipse(lx, ly, 0.038, 0.016), (_LEAF.to(paint) * (1 + 5 * ly)[:, None]).clamp(0, 1), apple)


def _cube(canvas: Canvas, dx: Tensor, dy: Tensor, paint: Tensor, there: Tensor) -> None:
    side, slant, rise = 0.105, 0.06, 0.05
    fx, fy = dx + 0.03, dy + side
    # the top and the right face are sheared squares
    lift = -(fy + side)
    top = torch.maximum((fx - lift * slant / rise).abs() - side, torch.maximum(-lift, lift - rise))
    deep = fx - side
    right = torch.maximum((fy + deep * rise / slant).abs() - side, torch.maximum(-deep, deep - slant))
    canvas.shape(top, (1.12 * paint + 0.10).clamp(0, 1), there)
    canvas.shape(right, paint * (0.50 - 0.6 * fy)[:, None].clamp(0.3, 0.7), there)
    canvas.shape(box(fx, fy, side, side), (paint * (0.88 - 0.9 * fy - 0.5 * fx)[:, None]).clamp(0, 1), there)


def _cone(canvas: Canvas, dx: Tensor, dy: Tensor, paint: Tensor, there: Tensor) -> None:
    height, half = 0.27, 0.125
    body = triangle(dx, dy, half, height)
    foot = ellipse(dx, dy, half, 0.03)
    width = (half * (1 + dy / height)).clamp(min=0.01)
    around = (dx / width).clamp(-1, 1)
    light = 0.35 + 0.80 * (1 - (around + 0.45) ** 2 / 2.1).clamp(0, 1)
    canvas.shape(torch.minimum(body, foot), (paint * light[:, None]).clamp(0, 1), there)


def _vase(canvas: Canvas, dx: Tensor, dy: Tensor, paint: Tensor, there: Tensor) -> None:
    height = 0.29
    up = (-dy / height).clamp(0, 1)
    width = 0.052 + 0.062 * torch.sin(torch.pi * (up * 0.93 + 0.10)).clamp(min=0) ** 1.5 + 0.035 * smooth(8 * up - 7)
    body = torch.maximum(0.85 * (dx.abs() - width), torch.maximum(dy, -dy - height))
    foot = ellipse(dx, dy, 0.06, 0.014)
    around = (dx / width).clamp(-1, 1)
    light = (
        0.34 + 0.80 * (1 - (around + 0.42) ** 2 / 2.0).clamp(0, 1) + 0.5 * torch.exp(-((around + 0.45) ** 2) / 0.012)
    )
    band = 1 - 0.35 * smooth(9 - 90 * (up - 0.55).abs())
    canvas.shape(torch.minimum(body, foot), (paint * (light * band)[:, None]).clamp(0, 1), there)
    mouth = ellipse(dx, dy + height, 0.085, 0.016)
    canvas.shape(mouth, (paint * 0.9).clamp(0, 1), there)
    canvas.shape(mouth + 0.006, paint * 0.25, there)


_BARK = torch.tensor((0.30, 0.20, 0.12)).reshape(1, 3, 1, 1)
_LEAF = torch.tensor((0.33, 0.62, 0.22)).reshape(1, 3, 1, 1)
