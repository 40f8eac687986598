"""Portraits of animals: a chipmunk, cat, bear, rabbit or fox, with a scarf, a hat or glasses."""

from __future__ import annotations

import torch
from torch import Tensor

from training.scenes.paint import NAMES, Canvas, Dice, box, circle, ellipse, smooth, triangle, turn

ANIMALS = ("chipmunk", "cat", "bear", "rabbit", "fox")
FUR = ((0.72, 0.45, 0.24), (0.56, 0.56, 0.60), (0.42, 0.27, 0.17), (0.84, 0.78, 0.72), (0.88, 0.44, 0.15))
PALE = ((0.97, 0.89, 0.76), (0.93, 0.93, 0.93), (0.80, 0.64, 0.46), (0.99, 0.97, 0.95), (0.98, 0.95, 0.91))
PLACES = ("on a meadow", "in the snow", "at night", "before a {} wall")
MOODS = ("happy", "sleepy", "surprised")


def portrait(dice: Dice, canvas: Canvas) -> list[list[str]]:
    """Paint one animal on every canvas; returns their captions, in phrases."""
    kind = dice.choice(0.32, 0.17, 0.17, 0.17, 0.17)
    mood = dice.choice(0.6, 0.2, 0.2)
    scarf, hat, glasses = dice.chance(0.6), dice.chance(0.35), dice.chance(0.25)
    scarf_colour, hat_colour, wall_colour = dice.colour(), dice.colour(), dice.colour()
    place = dice.choice(0.25, 0.2, 0.2, 0.35)
    _background(dice, canvas, place, dice.paint(wall_colour))

    scale = dice.number(0.92, 1.12)
    dx = (canvas.x - 0.5 - dice.number(-0.06, 0.06)) / scale
    dy = (canvas.y - dice.number(0.46, 0.52)) / scale
    dim = dice.of(place, ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.62, 0.66, 0.85), (1.0, 1.0, 1.0)))
    fur, pale = dice.of(kind, FUR) * dim, dice.of(kind, PALE) * dim
    fur = (fur * (1 + 0.10 * (dice.number(-1, 1))[:, None])).clamp(0, 1)
    strands = dice.noise(canvas.size, 70, 50, octaves=2)
    light = (1.05 - 0.5 * dx - 0.42 * dy + 0.05 * strands)[:, None]

    _body(canvas, dx, dy, fur, pale, light, dice.on(scarf), dice.paint(scarf_colour) * dim)
    _ears(dice, canvas, dx, dy, kind, fur, pale, light)
    _head(dice, canvas, dx, dy, kind, fur, pale, light)
    _face(dice, canvas, dx, dy, mood, dice.on(kind == 1) + dice.on(kind == 3))
    _dress(dice, canvas, dx, dy, dice.on(hat), dice.paint(hat_colour) * dim, dice.on(glasses))

    captions = []
    for i in range(dice.n):
        wears = [f"a {NAMES[scarf_colour[i]]} scarf"] if scarf[i] else []
        wears += [f"a {NAMES[hat_colour[i]]} hat"] if hat[i] else []
        wears += ["glasses"] if glasses[i] else []
        dress = f"with {' and '.join(wears)}" if wears else ""
        where = PLACES[place[i]].format(NAMES[wall_colour[i]])
        captions.append([f"a {MOODS[mood[i]]} {ANIMALS[kind[i]]}", dress, where])
    return captions


def _background(dice: Dice, canvas: Canvas, place: Tensor, wall: Tensor) -> None:
    x, y = canvas.x, canvas.y
    top = dice.of(place, ((0.45, 0.70, 0.94), (0.74, 0.82, 0.91), (0.03, 0.05, 0.17), (0, 0, 0)))
    low = dice.of(place, ((0.83, 0.93, 0.97), (0.93, 0.95, 0.98), (0.13, 0.17, 0.38), (0, 0, 0)))
    sky = torch.lerp(top, low, y[:, None])
    plain = wall * (1.08 - 0.6 * ((x - 0.4) ** 2 + (y - 0.35) ** 2))[:, None]
    canvas.pixels = torch.where(dice.on(place == 3)[:, None] > 0, plain, sky).clamp(0, 1)
    canvas.blend(torch.ones_like(top), canvas.dots(dice, 26, 0.2, 0.005) * dice.on(place == 2))
    grass = dice.noise(canvas.size, 60, 60, octaves=2)
    hill = 0.62 + 0.05 * torch.sin(3 * x + dice.number(0, 6))
    green = dice.of(place * 0, ((0.37, 0.62, 0.26),)) * (1 + 0.10 * grass - 0.5 * (y - 0.8))[:, None]
    canvas.shape(hill - y, green.clamp(0, 1), dice.on(place == 0))
    canvas.shape(
        hill + 0.08 - y, torch.ones_like(top) * (0.97 + 0.02 * grass)[:, None].clamp(0, 1), dice.on(place == 1)
    )
    flakes = canvas.dots(dice, 18, 0.3, 0.009)
    canvas.blend(torch.ones_like(top), 0.95 * flakes * dice.on(place == 1))
    flowers = canvas.dots(dice, 20, 0.25, 0.011) * smooth(12 * (y - hill) - 0.5) * dice.on(place == 0)
    canvas.blend(dice.paint(dice.colour(("white", "yellow", "pink"))), flowers)


def _body(
    canvas: Canvas, dx: Tensor, dy: Tensor, fur: Tensor, pale: Tensor, light: Tensor, scarf: Tensor, paint: Tensor
) -> None:
    canvas.shape(ellipse(dx, dy - 0.52, 0.30, 0.36), (0.85 * fur * light).clamp(0, 1))
    canvas.shape(ellipse(dx, dy - 0.58, 0.17, 0.33), (0.95 * pale * light).clamp(0, 1))
    knit = 1 + 0.10 * torch.sin(130 * dx + 40 * dy) * torch.sin(130 * dy)
    folds = (light[:, 0] * knit * (1 - 3.0 * (dy - 0.235).abs()))[:, None]
    tail_x, tail_y = turn(dx - 0.115, dy - 0.36, 0.12)
    fringe = 0.006 * torch.sign(torch.sin(190 * tail_x)) * (tail_y > 0.07)
    canvas.shape(box(tail_x, tail_y, 0.052, 0.13) + fringe, (0.86 * paint * folds.clamp(0.5, 2)).clamp(0, 1), scarf)
    bent = dy - 0.235 + 0.9 * dx**2
    canvas.shape(box(dx, bent, 0.235, 0.052) - 0.012, (paint * folds).clamp(0, 1), scarf)


def _ears(
    dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, kind: Tensor, fur: Tensor, pale: Tensor, light: Tensor
) -> None:
    pink = torch.lerp(pale, torch.tensor((0.93, 0.60, 0.58)).reshape(1, 3, 1, 1).to(pale), 0.6)
    round_ears, pointed, long_ears = (
        dice.on((kind == 0) | (kind == 2)),
        dice.on((kind == 1) | (kind == 4)),
        dice.on(kind == 3),
    )
    for side in (-1, 1):
        ex = dx * side - 0.165
        canvas.shape(circle(ex, dy + 0.205, 0.078), (0.92 * fur * light).clamp(0, 1), round_ears)
        canvas.shape(circle(ex, dy + 0.198, 0.048), (pink * light).clamp(0, 1), round_ears)
        tx, ty = turn(ex + 0.02, dy + 0.13, 0.25)
        canvas.shape(triangle(tx, ty, 0.090, 0.20), (0.95 * fur * light).clamp(0, 1), pointed)
        canvas.shape(triangle(tx, ty + 0.015, 0.052, 0.125), (pink * light).clamp(0, 1), pointed)
        lx, ly = turn(ex + 0.075, dy + 0.31, 0.13)
        canvas.shape(ellipse(lx, ly, 0.056, 0.185), (0.96 * fur * light).clamp(0, 1), long_ears)
        canvas.shape(ellipse(lx, ly - 0.01, 0.029, 0.145), (pink * light).clamp(0, 1), long_ears)


def _head(
    dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, kind: Tensor, fur: Tensor, pale: Tensor, light: Tensor
) -> None:
    chipmunk, fox = dice.on(kind == 0), dice.on(kind == 4)
    wide = 0.235 + 0.02 * chipmunk
    head = ellipse(dx, dy, wide, 0.215)
    canvas.shade(0.78 + 0.22 * smooth((ellipse(dx, dy - 0.03, wide, 0.22)) / 0.05))
    canvas.shape(head, (fur * light).clamp(0, 1))
    inside = canvas.cover(head)
    cheeks = torch.minimum(ellipse(dx.abs() - 0.125, dy - 0.09, 0.105, 0.085), ellipse(dx, dy - 0.12, 0.10, 0.09))
    canvas.blend((pale * light).clamp(0, 1), canvas.cover(cheeks, 0.03) * inside * torch.maximum(chipmunk, fox))
    canvas.shape(ellipse(dx, dy - 0.105, 0.105, 0.078), (pale * light).clamp(0, 1), blur=0.012)

    # the chipmunk's stripes: dark, pale, dark over the forehead, and one from the eye to the back of each cheek
    dark = torch.tensor((0.22, 0.13, 0.09)).reshape(1, 3, 1, 1).to(fur) * fur.mean(dim=1, keepdim=True) / 0.45
    for shift, width, paint in ((0.0, 0.017, dark), (0.040, 0.016, pale), (0.074, 0.014, dark)):
        stripe = ellipse(dx.abs() - shift - 0.25 * (dy + 0.13).clamp(min=0), dy + 0.145, width, 0.075)
        canvas.blend((paint * light).clamp(0, 1), canvas.cover(stripe, 0.01) * inside * chipmunk)
    for drop, paint in ((0.012, pale), (0.047, dark), (-0.022, dark)):
        stripe = ellipse(dx.abs() - 0.165, dy + 0.01 - drop - 0.25 * (dx.abs() - 0.12), 0.075, 0.015)
        canvas.blend((paint * light).clamp(0, 1), canvas.cover(stripe, 0.01) * inside * chipmunk)


def _face(dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, mood: Tensor, whiskers: Tensor) -> None:
    ink = torch.tensor((0.09, 0.06, 0.06)).reshape(1, 3, 1, 1).to(dx)
    white = torch.ones_like(ink)
    blush = torch.tensor((0.95, 0.50, 0.45)).reshape(1, 3, 1, 1).to(dx)
    awake, wide = dice.on(mood != 1), dice.on(mood == 2)
    canvas.blend(blush, 0.35 * canvas.cover(circle(dx.abs() - 0.145, dy - 0.085, 0.02), 0.06))
    eye_x, eye_y = dx.abs() - 0.095, dy + 0.02
    canvas.shape(ellipse(eye_x, eye_y, 0.036 + 0.006 * wide, 0.042 + 0.008 * wide), white, wide)
    canvas.shape(ellipse(eye_x, eye_y, 0.030, 0.036), ink, awake)
    for side in (-1, 1):
        canvas.shape(circle(dx - 0.095 * side + 0.010, dy + 0.033, 0.011), white, awake)
    lid = torch.maximum((circle(eye_x, eye_y + 0.008, 0.031)).abs() - 0.006, -(eye_y + 0.006))
    canvas.shape(lid, ink, 1 - awake)
    canvas.shape(ellipse(dx, dy - 0.062 - 0.1 * dx.abs(), 0.028, 0.020), ink)
    canvas.shape(ellipse(dx + 0.008, dy - 0.055, 0.008, 0.005), white * 0.8)
    canvas.shape(box(dx, dy - 0.092, 0.0035, 0.018), ink)
    smile = torch.maximum(circle(dx.abs() - 0.030, dy - 0.108, 0.030).abs() - 0.0045, 0.108 - dy)
    canvas.shape(smile, ink, 1 - wide)
    canvas.shape(ellipse(dx, dy - 0.128, 0.020, 0.024), ink, wide)
    for tilt in (-0.18, 0.0, 0.18):
        line = torch.maximum((dy - 0.10 - tilt * (dx.abs() - 0.08)).abs() - 0.0022, (dx.abs() - 0.19).abs() - 0.085)
        canvas.shape(line, 0.9 * white, whiskers)


def _dress(dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, hat: Tensor, paint: Tensor, glasses: Tensor) -> None:
    shade = (1.05 - 1.6 * dx - 0.5 * (dy + 0.3))[:, None]
    canvas.shape(box(dx, dy + 0.285, 0.105, 0.088), (paint * shade).clamp(0, 1), hat)
    canvas.shape(box(dx, dy + 0.222, 0.105, 0.018), 0.35 * paint, hat)
    canvas.shape(ellipse(dx, dy + 0.195, 0.185, 0.026), (0.92 * paint * shade).clamp(0, 1), hat)
    rim = torch.tensor((0.12, 0.12, 0.14)).reshape(1, 3, 1, 1).to(dx)
    lens = circle(dx.abs() - 0.095, dy + 0.018, 0.062)
    canvas.blend(torch.ones_like(rim), 0.22 * canvas.cover(lens) * glasses)
    bridge = torch.maximum((dy + 0.03).abs() - 0.006, dx.abs() - 0.035)
    canvas.shape(torch.minimum(lens.abs() - 0.007, bridge), rim, glasses)
