"""Landscapes: sky, sun or moon, clouds, mountains or hills, and a house and trees on land, or boats at sea."""

from __future__ import annotations

import torch
from torch import Tensor

from training.scenes.paint import NAMES, Canvas, Dice, box, circle, ellipse, smooth, trapezium, triangle

TIMES = ("day", "sunset", "night", "dawn")
GROUNDS = ("meadow", "desert", "snow", "sea")
RANGES = ("mountains", "snowy mountains", "hills", "")
PLACES = ("on the left", "in the middle", "on the right")
TREES = ("pine", "round")
COUNTS = ("", "a", "two", "three")

TOP = ((0.20, 0.46, 0.83), (0.27, 0.22, 0.50), (0.02, 0.04, 0.14), (0.42, 0.56, 0.82))
BOTTOM = ((0.72, 0.87, 0.97), (0.99, 0.62, 0.30), (0.10, 0.15, 0.34), (0.99, 0.83, 0.78))
LIGHT = ((1.0, 1.0, 1.0), (1.0, 0.80, 0.70), (0.34, 0.40, 0.62), (0.95, 0.88, 0.92))
SUN = ((1.0, 0.96, 0.72), (1.0, 0.72, 0.28), (0.94, 0.95, 0.88), (1.0, 0.90, 0.74))
CLOUD = ((1.0, 1.0, 1.0), (0.98, 0.66, 0.55), (0.22, 0.26, 0.42), (1.0, 0.90, 0.88))
GROUND = ((0.36, 0.60, 0.24), (0.90, 0.75, 0.48), (0.92, 0.95, 0.99), (0.13, 0.40, 0.60))
RANGE = ((0.42, 0.44, 0.52), (0.40, 0.44, 0.54), (0.30, 0.50, 0.26), (0.0, 0.0, 0.0))


def landscape(dice: Dice, canvas: Canvas) -> list[list[str]]:
    """Paint one landscape on every canvas; returns their captions, in phrases."""
    size, x, y = canvas.size, canvas.x, canvas.y
    time = dice.choice(0.35, 0.25, 0.25, 0.15)
    ground = dice.choice(0.36, 0.14, 0.16, 0.34)
    ridge = dice.choice(0.3, 0.25, 0.3, 0.15)
    cloudy = dice.chance(0.45)
    light = dice.of(time, LIGHT)
    horizon = dice.number(0.52, 0.62)

    # the sky with its lights
    top, bottom = dice.of(time, TOP), dice.of(time, BOTTOM)
    canvas.pixels = torch.lerp(top, bottom, smooth(y / horizon)[:, None]).expand(-1, -1, -1, size)
    stars = canvas.dots(dice, 32, 0.22, 0.0045)
    canvas.blend(torch.ones_like(top), stars * dice.on(time == 2) * (1 - y / horizon).clamp(0, 1))
    sun_place = dice.choice(1, 1, 1)
    sun_x = dice.of(sun_place, (0.2, 0.5, 0.8)) + dice.number(-0.06, 0.06)
    sun_y = torch.where(dice.on(time == 1) > 0, horizon - dice.number(0.06, 0.11), dice.number(0.12, 0.22))
    from_sun = ((x - sun_x) ** 2 + (y - sun_y) ** 2).sqrt()
    glow = torch.exp(-from_sun / dice.of(time, (0.10, 0.20, 0.07, 0.14)))
    sun = dice.of(time, SUN)
    canvas.blend(sun, glow * dice.of(time, (0.6, 0.75, 0.35, 0.6)))
    canvas.shape(from_sun - dice.of(time, (0.050, 0.070, 0.048, 0.055)), sun)
    puffs = dice.noise(size, 6, 3, octaves=4)
    heights = smooth(1.3 * puffs - 0.35) * smooth((horizon - y) / 0.12) * dice.on(cloudy)
    canvas.blend(dice.of(time, CLOUD) - 0.06 * smooth(puffs - 1)[:, None], 0.92 * heights)

    _range(dice, canvas, ridge, light, dice.of(time, BOTTOM), horizon)
    _ground(dice, canvas, ground, light, horizon, sun, sun_x)

    sea = ground == 3
    boats, boat_colour = _boats(dice, canvas, sea, light, horizon, bottom)
    trees, kind, house, house_colour, big, place = _on_land(dice, canvas, ~sea, time == 2, light, horizon)

    captions = []
    for i in range(dice.n):
        if sea[i]:
            colour, several = NAMES[boat_colour[i]], int(boats[i]) > 1
            subject = (
                f"{COUNTS[boats[i]]} {colour} {'boats' if several else 'boat'} on the sea" if boats[i] else "the sea"
            )
        else:
            things = []
            if house[i]:
                scale = "big" if big[i] else "small"
                things.append(f"a {scale} {NAMES[house_colour[i]]} house {PLACES[place[i]]}")
            if trees[i]:
                things.append(f"{COUNTS[trees[i]]} {TREES[kind[i]]} {'trees' if trees[i] > 1 else 'tree'}")
            land = GROUNDS[ground[i]]
            field = "in the snow" if land == "snow" else f"in the {land}" if land == "desert" else f"on a {land}"
            subject = f"{' and '.join(things)} {field}" if things else f"a {land} landscape"
        back = f"with {RANGES[ridge[i]]}" if RANGES[ridge[i]] else ""
        when = {0: "by day", 1: "at sunset", 2: "at night", 3: "at dawn"}[int(time[i])]
        sky = "cloudy sky" if cloudy[i] else "clear sky"
        lamp = f"{'the moon' if time[i] == 2 else 'the sun'} {PLACES[sun_place[i]]}"
        captions.append([subject, back, when, sky, lamp])
    return captions


def _range(dice: Dice, canvas: Canvas, kind: Tensor, light: Tensor, haze: Tensor, horizon: Tensor) -> None:
    """Two ridges behind one another, the farther one in the haze."""
    hills = dice.on(kind == 2)
    present = dice.on(kind < 3)
    texture = dice.noise(canvas.size, 24, 16, octaves=3)
    for far in (True, False):
        rough, round_ = dice.ridge(canvas.size, 6, 5), dice.ridge(canvas.size, 3, 1)
        height = torch.where(hills > 0, 0.07 + 0.035 * round_, 0.15 + 0.055 * rough)
        height = height.clamp(min=0.01) * (1.25 if far else 0.75)
        line = horizon - height
        slope = (
            torch.gradient(torch.nn.functional.avg_pool1d(line, 15, 1, 7, count_include_pad=False), dim=2)[0]
            * canvas.size
        )
        lit = 0.82 + 0.22 * torch.tanh(1.5 * slope) + 0.09 * texture
        paint = dice.of(kind, RANGE)[..., 0, 0][:, :, None, None] * lit[:, None] * light
        snow = dice.on(kind == 1) * smooth((0.075 + 0.03 * texture - (canvas.y - line)) * 22)
        paint = torch.lerp(paint, (0.97 * lit.clamp(0.75, 1.05))[:, None] * light, snow[:, None])
        paint = torch.lerp(paint, haze, 0.45 if far else 0.15)
        canvas.shape(line - canvas.y, paint.clamp(0, 1), present)


def _ground(
    dice: Dice, canvas: Canvas, kind: Tensor, light: Tensor, horizon: Tensor, sun: Tensor, sun_x: Tensor
) -> None:
    """Land with its texture, or the sea with waves and the sun's reflection; both coarser towards the viewer."""
    x, y = canvas.x, canvas.y
    depth = ((y - horizon) / (1 - horizon)).clamp(0, 1)
    grain = dice.noise(canvas.size, 64, 64, octaves=2)
    patches = dice.noise(canvas.size, 7, 4, octaves=3)
    paint = dice.of(kind, GROUND) * light
    phase = 6.0 / (depth + 0.12) + 0.5 * patches
    waves = torch.sin(9.0 * phase + 3 * torch.sin(14 * x + patches)) * (0.3 + 0.7 * depth)
    dunes = torch.sin(2.2 * phase + 5 * x) * depth
    strength = dice.of(kind, (0.07, 0.03, 0.02, 0.05)) * grain + dice.of(kind, (0.08, 0.05, 0.04, 0.0)) * patches
    strength = strength + dice.of(kind, (0.0, 0.06, 0.015, 0.10)) * torch.where(dice.on(kind == 3) > 0, waves, dunes)
    strength = strength - 0.14 * (depth - 0.5)
    paint = paint * (1 + strength * (0.4 + 0.8 * depth))[:, None]
    sea = dice.on(kind == 3)
    reach = torch.exp(-(((x - sun_x) / (0.05 + 0.07 * depth)) ** 2)) * (0.35 + 0.5 * waves).clamp(0, 1)
    paint = torch.lerp(paint, sun.expand_as(paint), (0.85 * reach * sea)[:, None])
    flowers = canvas.dots(dice, 40, 0.10, 0.006) * dice.on((kind == 0) & dice.chance(0.5)) * smooth(3 * depth - 0.6)
    paint = torch.lerp(paint, dice.paint(dice.colour(("white", "yellow", "pink", "red"))) * light, flowers[:, None])
    canvas.shape(horizon - y + 0 * x, paint.clamp(0, 1))


def _boats(
    dice: Dice, canvas: Canvas, present: Tensor, light: Tensor, horizon: Tensor, sky: Tensor
) -> tuple[Tensor, Tensor]:
    """Sailing boats, nearer ones lower and larger. Returns how many (n,), and their colour (n,)."""
    count = torch.where(present, dice.choice(0.1, 0.45, 0.25, 0.2), 0)
    colour = dice.colour()
    hull = dice.paint(colour) * light
    sail = torch.lerp(dice.paint(dice.colour(("white",))), sky, 0.15) * light
    places = torch.stack([torch.randperm(3, generator=dice.rng) for _ in range(dice.n)])
    for i in range(3):
        there = dice.on(count > i)
        place = torch.where(count == 1, torch.ones_like(count), places[:, i])
        near = dice.of(place, (0.16, 0.3, 0.22)) + dice.number(-0.03, 0.03)
        scale = 0.45 + 1.6 * near
        dx = (canvas.x - dice.of(place, (0.21, 0.5, 0.79)) - dice.number(-0.04, 0.04)) / scale
        dy = (canvas.y - horizon - 0.75 * near) / scale
        mirrored = trapezium(dx + 0.006 * torch.sin(90 * dy), dy - 0.0, 0.085, 0.05, 0.10)
        canvas.blend(0.45 * hull, 0.35 * canvas.cover(mirrored, 0.02) * there)
        canvas.shape(box(dx, dy + 0.13, 0.005, 0.13), 0.35 * light, there)
        lean = torch.where(dx > 0, 0.0, 1e3)
        canvas.shape(triangle(dx - 0.004, dy + 0.05, 0.095, 0.20) + lean, sail, there)
        lean = torch.where(dx < 0, 0.0, 1e3)
        canvas.shape(triangle(dx + 0.004, dy + 0.05, 0.06, 0.165) + lean, 0.9 * sail, there)
        body = trapezium(dx, dy + 0.045, 0.105, 0.065, 0.05)
        canvas.shape(body, hull * (1.05 - 5 * (dy + 0.045).clamp(0, 0.06))[:, None], there)
        canvas.shape(box(dx, dy + 0.041, 0.105, 0.006), (1.25 * hull).clamp(0, 1), there)
    return count, colour


def _on_land(
    dice: Dice, canvas: Canvas, present: Tensor, night: Tensor, light: Tensor, horizon: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A house and trees. Returns trees (n,), their kind, whether there is a house, its colour, if big, its place."""
    house, big = present & dice.chance(0.6), dice.chance(0.5)
    colour = dice.colour()
    place = dice.choice(1, 1, 1)
    trees, kind = torch.where(present, dice.choice(0.2, 0.3, 0.25, 0.25), 0), dice.choice(1, 1)
    places = torch.stack([torch.randperm(3, generator=dice.rng) for _ in range(dice.n)])

    for i in range(3):  # trees stand behind the house, where it is in their place
        there = dice.on(trees > i)
        base = horizon + dice.number(0.05, 0.16)
        scale = dice.number(0.75, 1.15)
        dx = (canvas.x - dice.of(places[:, i], (0.14, 0.46, 0.86)) - dice.number(-0.06, 0.06)) / scale
        _tree(dice, canvas, dx, (canvas.y - base) / scale, kind, light, there)

    scale = dice.of(big.long(), (0.72, 1.25))
    dx = (canvas.x - dice.of(place, (0.24, 0.5, 0.76)) - dice.number(-0.03, 0.03)) / scale
    dy = (canvas.y - horizon - dice.number(0.15, 0.22)) / scale
    _house(dice, canvas, dx, dy, dice.paint(colour), dice.on(night), light, dice.on(house))
    return trees, kind, house, colour, big, place


def _tree(dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, kind: Tensor, light: Tensor, there: Tensor) -> None:
    pine, crown = dice.on(kind == 0) * there, dice.on(kind == 1) * there
    leaves = dice.noise(canvas.size, 48, 48, octaves=2)
    canvas.shade(0.75 + 0.25 * smooth(ellipse(dx - 0.03, dy, 0.10, 0.02) / 0.03), there)
    bark = dice.paint(torch.full((dice.n,), NAMES.index("brown"))) * light
    canvas.shape(box(dx, dy + 0.05, 0.012, 0.05), bark * (1 - 14 * dx.clamp(-0.02, 0.02))[:, None], there)
    green = dice.paint(torch.full((dice.n,), NAMES.index("green"))) * light
    lit = (1 - 2.2 * dx + 0.10 * leaves).clamp(0.4, 1.5)
    for lift, width, height in ((0.05, 0.095, 0.13), (0.11, 0.078, 0.12), (0.17, 0.06, 0.12)):
        ragged = 0.006 * leaves
        under = 1 - 2.5 * (dy + lift + 0.02).clamp(0, 0.1)
        canvas.shape(triangle(dx, dy + lift, width, height) + ragged, 0.62 * green * (lit * under)[:, None], pine)
    for sx, sy, radius in ((-0.05, 0.15, 0.065), (0.05, 0.15, 0.065), (0.0, 0.20, 0.08)):
        ball = circle(dx - sx, dy + sy, radius) + 0.008 * leaves
        canvas.shape(ball, green * (lit - 2.2 * (dy + sy))[:, None].clamp(0.3, 1.6), crown)


def _house(
    dice: Dice, canvas: Canvas, dx: Tensor, dy: Tensor, wall: Tensor, night: Tensor, light: Tensor, there: Tensor
) -> None:
    canvas.shade(0.72 + 0.28 * smooth(box(dx - 0.03, dy, 0.12, 0.012) / 0.03), there)
    boards = 1 + 0.05 * torch.sign(torch.sin(300 * dy)) - 0.7 * dx
    canvas.shape(box(dx, dy + 0.075, 0.105, 0.075), wall * light * boards[:, None], there)
    canvas.shape(box(dx - 0.07, dy + 0.235, 0.015, 0.04), 0.42 * light, there)
    tiles = 1 + 0.10 * torch.sin(260 * dy) - 0.8 * dx
    roof = dice.paint(dice.colour(("red", "brown", "grey"))) * 0.72
    canvas.shape(triangle(dx, dy + 0.145, 0.135, 0.115), roof * light * tiles[:, None], there)
    canvas.shape(box(dx + 0.005, dy + 0.045, 0.022, 0.045), 0.30 * wall * light + 0.05, there)
    glass = torch.lerp(
        dice.of(torch.zeros(dice.n).long(), ((0.62, 0.80, 0.92),)) * light, _LAMP.to(wall), night[:, None]
    )
    for side in (-0.062, 0.062):
        canvas.shape(box(dx - side, dy + 0.082, 0.024, 0.024), 0.95 * light, there)
        canvas.shape(box(dx - side, dy + 0.082, 0.019, 0.019), glass, there)
        cross = torch.minimum((dx - side).abs(), (dy + 0.082).abs()) - 0.002
        canvas.shape(torch.maximum(cross, box(dx - side, dy + 0.082, 0.02, 0.02)), 0.9 * light, there)


_LAMP = torch.tensor((1.0, 0.84, 0.42)).reshape(1, 3, 1, 1)
