"""Pictures that are no upright frontal chest radiograph, for the gate to learn from: films spoilt, and pictures that never were films.

They vary as widely as a few lines allow; that a picture looks like nothing anybody would send does no harm. What the gate is measured on
is drawn by other means (`tests/hostile_pictures.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
"""`[height, width]` uint8."""
Spoil = Callable[[Picture, np.random.Generator], Picture]
Draw = Callable[[np.random.Generator], Picture]

_SIDE: Final = 320


def turned_left(film: Picture, random: np.random.Generator) -> Picture:
    """By a right angle."""
    return np.rot90(film, 1)


def turned_right(film: Picture, random: np.random.Generator) -> Picture:
    """By a right angle."""
    return np.rot90(film, -1)


def upside_down(film: Picture, random: np.random.Generator) -> Picture:
    """Turned by two right angles, or mirrored top to bottom."""
    return film[::-1, :: int(random.choice([-1, 1]))]


def inverted(film: Picture, random: np.random.Generator) -> Picture:
    """Air bright."""
    return np.invert(film)


def one_side(film: Picture, random: np.random.Generator) -> Picture:
    """A part that holds one lung at most, left or right, or only the top or the bottom."""
    height, width = film.shape
    if random.random() < 0.75:
        share = random.uniform(0.32, 0.5)
        columns = slice(0, int(share * width)) if random.random() < 0.5 else slice(int((1 - share) * width), width)
        top = int(random.uniform(0, 0.25) * height)
        return film[top : top + int(random.uniform(0.6, 0.75) * height), columns]
    share = random.uniform(0.3, 0.45)
    rows = slice(0, int(share * height)) if random.random() < 0.5 else slice(int((1 - share) * height), height)
    return film[rows, int(0.1 * width) : int(0.9 * width)]


def small_in_a_frame(film: Picture, random: np.random.Generator) -> Picture:
    """The film somewhere in a larger picture, with bars and boxes around it."""
    canvas = np.full((_SIDE, int(_SIDE * random.uniform(1.0, 1.7))), int(random.integers(0, 256)), np.uint8)
    height, width = canvas.shape
    for _ in range(int(random.integers(2, 9))):
        top, left = int(random.integers(0, height - 8)), int(random.integers(0, width - 8))
        down, right = int(random.integers(4, height // 2)), int(random.integers(4, width // 2))
        canvas[top : top + down, left : left + right] = int(random.integers(0, 256))
    side = int(random.uniform(0.3, 0.55) * height)
    small = _resized(film, side, side)
    top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
    canvas[top : top + side, left : left + side] = small
    return canvas


def several_films(film: Picture, random: np.random.Generator) -> Picture:
    """The same film in each of several places."""
    rows, columns = ((1, 2), (2, 1), (2, 2), (2, 3), (3, 3))[int(random.integers(5))]
    tile = _resized(film, _SIDE // rows, _SIDE // max(columns, 2))
    return np.tile(tile, (rows, columns))


def shuffled(film: Picture, random: np.random.Generator) -> Picture:
    """Cut into tiles and put together in another order: a film's own texture, without its anatomy."""
    parts = int(random.choice([2, 3, 4, 6]))
    tiles = _resized(film, 60 * parts // 10 * 10, 60 * parts // 10 * 10)
    side = len(tiles) // parts
    order = random.permutation(parts * parts)
    if (order == np.arange(parts * parts)).all():
        order = order[::-1]
    out = np.empty((side * parts, side * parts), np.uint8)
    for place, tile in enumerate(order):
        y, x, v, u = *divmod(place, parts), *divmod(int(tile), parts)
        out[y * side : (y + 1) * side, x * side : (x + 1) * side] = tiles[v * side : (v + 1) * side, u * side : (u + 1) * side]
    return out


def tilted(film: Picture, random: np.random.Generator) -> Picture:
    """Turned by something between 45 and 315 degrees."""
    return np.asarray(Image.fromarray(film).rotate(random.uniform(45, 315), Image.Resampling.BILINEAR, expand=True))


def blended(film: Picture, random: np.random.Generator) -> Picture:
    """Two exposures on one plate: the film, and the same turned, upside down or moved half across."""
    first = _resized(film, _SIDE, _SIDE).astype(np.float64)
    second = (np.rot90(first, 1), np.rot90(first, -1), first[::-1], np.roll(first, _SIDE // 2, axis=1))[int(random.integers(4))]
    share = random.uniform(0.35, 0.65)
    return np.clip(share * first + (1 - share) * second, 0, 255).astype(np.uint8)


SPOILT: Final[tuple[Spoil, ...]] = (
    turned_left,
    turned_right,
    upside_down,
    inverted,
    one_side,
    small_in_a_frame,
    several_films,
    shuffled,
    tilted,
    blended,
)


def noise(random: np.random.Generator) -> Picture:
    """Gaussian noise whose power falls with frequency^−2a; a from white (0) to cloud (2)."""
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(random.normal(size=(_SIDE, _SIDE))) * frequency ** -random.uniform(0, 2)
    return _stretched(np.fft.irfft2(spectrum, s=(_SIDE, _SIDE)), random)


def leaves(random: np.random.Generator) -> Picture:
    """Shapes of all sizes over one another, the smaller the more (the "dead leaves" that have the statistics of photographs)."""
    image = Image.new("L", (_SIDE, int(_SIDE * random.uniform(0.7, 1.4))), int(random.integers(0, 256)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.choice([5, 20, 80, 300]))):
        radius = min(8 / random.random() ** 0.7, _SIDE / 2)
        x, y = random.uniform(0, image.width), random.uniform(0, image.height)
        grey = int(random.integers(0, 256))
        if random.random() < 0.5:
            flat = random.uniform(0.3, 1)
            draw.ellipse((x - radius, y - flat * radius, x + radius, y + flat * radius), fill=grey)
        else:
            corners = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(3, 7))))
            draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in corners], fill=grey)
    shaded = np.asarray(image) + random.normal(0, 60) * _ramp(image.height, image.width, random)
    return _stretched(_softened(shaded, random.choice([0.0, 1.0, 3.0])) + random.normal(0, random.uniform(0, 8), shaded.shape), random)


def strokes(random: np.random.Generator) -> Picture:
    """Lines of short dark strokes, or bright ones on dark, with a margin: from afar, writing."""
    paper, ink = (245, 20) if random.random() < 0.7 else (15, 230)
    image = Image.new("L", (int(_SIDE * random.uniform(0.7, 1.4)), _SIDE), paper)
    draw = ImageDraw.Draw(image)
    pitch, margin = int(random.integers(7, 28)), int(random.integers(0, 40))
    for y in range(margin, _SIDE - margin - pitch, pitch):
        x = float(margin)
        end = image.width - margin - (random.uniform(0, image.width / 2) if random.random() < 0.2 else 0)
        while x < end:
            length = pitch * random.uniform(0.15, 0.5)
            if random.random() < 0.82:
                draw.line(
                    (x, y + pitch * random.uniform(0, 0.5), x + length, y + pitch * random.uniform(0.1, 0.6)), ink, max(1, pitch // 8)
                )
            x += length
    return np.asarray(image)


def ramps(random: np.random.Generator) -> Picture:
    """Hardly anything: a gradient or a few soft spots."""
    field = _ramp(_SIDE, _SIDE, random)
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    for _ in range(int(random.integers(0, 5))):
        spot = np.hypot((x - random.uniform(-1, 1)) / random.uniform(0.2, 1), (y - random.uniform(-1, 1)) / random.uniform(0.2, 1))
        field = field + random.normal(0, 1) * np.exp(-(spot**2))
    return _stretched(field + random.normal(0, random.uniform(0, 0.05), field.shape), random)


def bodies(random: np.random.Generator) -> Picture:
    """Bright tubes and rounds that add up on dark, as any other part of a body does under X-rays."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    thickness = np.zeros((_SIDE, _SIDE))
    for _ in range(int(random.integers(1, 14))):
        cx, cy, turn = random.uniform(-0.8, 0.8), random.uniform(-0.8, 0.8), random.uniform(0, np.pi)
        u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        solid = np.clip(1 - (u / random.uniform(0.15, 1.5)) ** 2 - (v / random.uniform(0.05, 0.8)) ** 2, 0, None)
        thickness += random.uniform(-0.4, 1) * solid ** random.choice([0.15, 0.5, 1])
    film = 1 / (1 + np.exp(-3 * (thickness - thickness.mean())))
    return _stretched(_softened(film * 255, 1.0) + random.normal(0, random.uniform(0, 6), film.shape), random)


def waves(random: np.random.Generator) -> Picture:
    """Stripes, rings and checks."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    turn, pitch = random.uniform(0, np.pi), random.uniform(3, 60)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    kind = int(random.integers(3))
    field = np.sin(pitch * (u, np.hypot(u, v), u)[kind]) * (1, 1, np.sin(pitch * v))[kind]
    return _stretched(np.sign(field) if random.random() < 0.5 else field, random)


DRAWN: Final[tuple[Draw, ...]] = (noise, leaves, strokes, ramps, bodies, waves)


def still_a_film(film: Picture, random: np.random.Generator) -> Picture:
    """What other hospitals' machines and habits make of a film, and the gate must let pass: tilted a little, framed, cut closer, mirrored,
    another curve of grey, sharper or softer, noisier.
    """
    image = Image.fromarray(film)
    if random.random() < 0.5:
        image = image.rotate(random.normal(0, 4), Image.Resampling.BILINEAR)
    width, height = image.size
    if random.random() < 0.5:  # cut closer, each side by itself
        left, top, right, bottom = random.uniform(0, 0.07, 4)
        image = image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))
    if random.random() < 0.3:  # a frame
        frame = random.uniform(0, 0.12, 4)
        width, height = image.size
        size = (int(width * (1 + frame[0] + frame[1])), int(height * (1 + frame[2] + frame[3])))
        canvas = Image.new("L", size, int(random.choice([0, 0, 0, 30, 255])))
        canvas.paste(image, (int(frame[0] * width), int(frame[2] * height)))
        image = canvas
    if random.random() < 0.3:  # another aspect
        image = image.resize((max(64, int(image.width * random.uniform(0.85, 1.15))), image.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float64) / 255
    pixels = pixels ** np.exp(random.normal(0, 0.3))
    pixels = _softened(pixels, float(random.choice([0, 0, 0.7, 1.5])))
    pixels = random.uniform(0, 0.12) + pixels * random.uniform(0.75, 1) + random.normal(0, random.uniform(0, 0.03), pixels.shape)
    return np.clip(255 * pixels, 0, 255).astype(np.uint8)


def _ramp(height: int, width: int, random: np.random.Generator) -> NDArray[np.float64]:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    turn = random.uniform(0, 2 * np.pi)
    return x * np.cos(turn) + y * np.sin(turn)


def _stretched(field: NDArray[np.float64], random: np.random.Generator) -> Picture:
    """To 8 bits, with some contrast and brightness."""
    low, high = np.percentile(field, (0.5, 99.5))
    bottom, top = np.sort(random.uniform(0, 255, 2))
    if top - bottom < 40:
        bottom, top = 0, 255
    return np.clip(bottom + (field - low) / (high - low + 1e-9) * (top - bottom), 0, 255).astype(np.uint8)


def _softened(field: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    if not radius:
        return field
    y, x = np.fft.fftfreq(field.shape[0])[:, None], np.fft.rfftfreq(field.shape[1])[None]
    return np.fft.irfft2(np.fft.rfft2(field) * np.exp(-2 * (np.pi * radius) ** 2 * (y**2 + x**2)), s=field.shape)


def _resized(film: Picture, height: int, width: int) -> Picture:
    return np.asarray(Image.fromarray(film).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0))
