"""Pictures that are no upright frontal chest radiograph, as they might reach a query. Drawn from seeds; none of them was the gate fitted on.

The gate learns from cruder ones (`cxr_retrieval_training.gate.outliers`). What it can only meet as one thing (a film turned, inverted, cut)
has the same kind there, of other films and other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Picture = NDArray[np.uint8]
"""`[height, width]` uint8."""
Field = NDArray[np.float64]

_WORDS: Final = tuple(
    word
    for line in (
        "patient was seen in the clinic and reports no fever since the last visit",
        "the lungs are clear on auscultation and percussion please send the films",
        "to the department of radiology before noon on friday invoice number",
        "total amount due within thirty days of receipt",
    )
    for word in line.split(" ")
)

# ------------------------------------------------------------------------------------------------- never a film


def landscape(random: np.random.Generator) -> Picture:
    """Sky, hills behind one another, a sun, trees: what a telephone's camera would send."""
    height, width = 480, 640
    sky = np.linspace(random.uniform(140, 200), random.uniform(200, 250), height)[:, None] + 12 * _cloud(height, width, 1.6, random)
    image = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    sun, radius = (random.uniform(0, width), random.uniform(0, height / 3)), random.uniform(15, 45)
    draw.ellipse((sun[0] - radius, sun[1] - radius, sun[0] + radius, sun[1] + radius), fill=255)
    for layer in range(4):
        base, grey = height * (0.45 + 0.14 * layer), int(150 - 32 * layer + random.integers(-10, 10))
        x = np.arange(width)
        line = np.full(width, base)
        for k in range(1, 9):
            line += random.normal(0, 40 / k) * np.sin(2 * np.pi * k * x / width + random.uniform(0, 6))
        draw.polygon([(0, height), *zip(x.tolist(), line.tolist(), strict=True), (width, height)], fill=grey)
        for _ in range(int(random.integers(0, 12)) if layer > 1 else 0):
            px, size = int(random.integers(width)), random.uniform(14, 60)
            draw.rectangle((px - 2, line[px] - size, px + 2, line[px]), fill=30)
            draw.ellipse((px - size / 2, line[px] - 1.6 * size, px + size / 2, line[px] - 0.5 * size), fill=int(random.integers(30, 80)))
    return _grained(image, 4, random)


def face(random: np.random.Generator) -> Picture:
    """A portrait: symmetrical, upright, two dark ovals side by side, as lungs are."""
    image = Image.new("L", (420, 520), int(random.integers(60, 220)))
    draw = ImageDraw.Draw(image)
    cx, cy, skin = 210 + random.normal(0, 12), 240 + random.normal(0, 12), int(random.integers(90, 220))
    draw.ellipse((cx - 240, cy + 150, cx + 240, cy + 500), fill=int(random.integers(20, 200)))
    draw.rectangle((cx - 45, cy + 80, cx + 45, cy + 200), fill=skin - 20)
    draw.ellipse((cx - 125, cy - 190, cx + 125, cy + 110), fill=int(random.integers(10, 90)))
    draw.ellipse((cx - 105, cy - 150, cx + 105, cy + 140), fill=skin)
    for side in (-1, 1):
        ex, ey = cx + 42 * side, cy - 20
        draw.ellipse((ex - 22, ey - 11, ex + 22, ey + 11), fill=240)
        draw.ellipse((ex - 10, ey - 10, ex + 10, ey + 10), fill=30)
        draw.line((ex - 26, ey - 26, ex + 26, ey - 28), fill=40, width=6)
    draw.line((cx, cy - 10, cx + 10, cy + 40, cx - 8, cy + 44), fill=skin - 40, width=5)
    draw.ellipse((cx - 38, cy + 66, cx + 38, cy + 86), fill=max(0, skin - 80))
    return _grained(image.filter(ImageFilter.GaussianBlur(2)), 5, random)


def building(random: np.random.Generator) -> Picture:
    """A house front: rows of windows, doors, a road."""
    image = Image.new("L", (560, 440), int(random.integers(150, 240)))
    draw = ImageDraw.Draw(image)
    left = 0.0
    while left < 560:
        wide, high, grey = random.uniform(90, 220), random.uniform(180, 400), int(random.integers(50, 180))
        draw.rectangle((left, 420 - high, left + wide, 420), fill=grey)
        pitch = random.uniform(22, 44)
        for y in np.arange(420 - high + 12, 400, pitch * 1.2):
            for x in np.arange(left + 8, left + wide - pitch * 0.7, pitch):
                draw.rectangle((x, y, x + pitch * 0.5, y + pitch * 0.7), fill=int(random.choice([20, 60, 230])))
        left += wide
    draw.rectangle((0, 420, 560, 440), fill=40)
    return _grained(image, 5, random)


def page_of_text(random: np.random.Generator) -> Picture:
    """A letter, scanned: a heading, paragraphs, perhaps a table or a signature; black on white or white on black."""
    image = Image.new("L", (620, 877), 250)
    draw = ImageDraw.Draw(image)
    size, margin, y = float(random.integers(11, 24)), 60, 60.0
    font, heading = ImageFont.load_default(size), ImageFont.load_default(size * 1.8)
    draw.text((margin, y), " ".join(random.choice(_WORDS, 3)).title(), fill=10, font=heading)
    y += size * 3.2
    while y < 800:
        if random.random() < 0.12:
            y += size * 1.5
        line = ""
        while draw.textlength(line, font=font) < 480 - (random.random() < 0.12) * 250:
            line += " " + str(random.choice(_WORDS))
        draw.text((margin, y), line.strip(), fill=int(random.integers(10, 60)), font=font)
        y += size * 1.45
    if random.random() < 0.3:
        for row in np.arange(500, 760, 40):
            draw.line((margin, row, 560, row), fill=0, width=2)
    pixels = np.asarray(image.rotate(random.normal(0, 1), fillcolor=250))
    return np.invert(pixels) if random.random() < 0.25 else pixels


def white_noise(random: np.random.Generator) -> Picture:
    """Each pixel by itself: even, normal, or salt and pepper."""
    shape = (int(random.integers(200, 500)), int(random.integers(200, 500)))
    kind = int(random.integers(3))
    if kind == 0:
        return random.integers(0, 256, shape, np.uint8)
    if kind == 1:
        return np.clip(random.normal(128, random.uniform(10, 60), shape), 0, 255).astype(np.uint8)
    return np.where(random.random(shape) < random.uniform(0.02, 0.5), 255 * random.integers(0, 2, shape), 120).astype(np.uint8)


def clouds(random: np.random.Generator) -> Picture:
    """Noise of coarse grain, from sand to mist."""
    return _stretched(_cloud(400, 400, random.uniform(0.6, 1.8), random))


def mosaic(random: np.random.Generator) -> Picture:
    """Blocks of one grey each, as a decoder leaves them that lost its way, some rows torn."""
    side = int(random.choice([8, 16, 32]))
    blocks = random.integers(0, 256, (400 // side, 400 // side), np.uint8)
    pixels = np.kron(blocks, np.ones((side, side), np.uint8))
    for row in range(0, len(pixels), side):
        pixels[row : row + side] = np.roll(pixels[row : row + side], int(random.integers(0, 200)), axis=1)
    return pixels


def gradient(random: np.random.Generator) -> Picture:
    """An exposure of nothing: a ramp or a bright middle, with a little grain."""
    x, y = _grid(360, 300)
    turn, grain = random.uniform(0, 2 * np.pi), random.uniform(0.3, 4)
    field = x * np.cos(turn) + y * np.sin(turn) if random.random() < 0.5 else np.exp(-(x**2 + y**2) / random.uniform(0.3, 2))
    low, span = random.uniform(0, 150), random.uniform(25, 105)
    return np.clip(low + span * field / np.abs(field).max() + random.normal(0, grain, field.shape), 0, 255).astype(np.uint8)


def chart(random: np.random.Generator) -> Picture:
    """An ECG strip or a graph on squared paper."""
    image = Image.new("L", (640, 420), 245)
    draw = ImageDraw.Draw(image)
    for at in range(0, 640, 16):
        draw.line((at, 0, at, 420), fill=205 if at % 80 else 170)
        draw.line((0, at, 640, at), fill=205 if at % 80 else 170)
    for row in range(int(random.integers(1, 6))):
        middle, period, phase = 60 + 75 * row, random.uniform(50, 130), random.uniform(0, 50)
        x = np.arange(640)
        beat = ((x + phase) % period) / period
        y = middle - 45 * np.exp(-(((beat - 0.5) / 0.02) ** 2)) - 9 * np.exp(-(((beat - 0.7) / 0.05) ** 2)) + random.normal(0, 1, 640)
        draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=15, width=2)
    return np.asarray(image)


# ------------------------------------------------------------------------------------- other parts, other machines


def hand(random: np.random.Generator) -> Picture:
    """A hand: five rays of bones in soft tissue, carpals, forearm; dark around it."""
    x, y = _grid(420, 360)
    tissue, bone = np.zeros_like(x), np.zeros_like(x)
    for turn, length in zip((-0.62, -0.25, -0.05, 0.14, 0.36), (0.5, 0.82, 0.9, 0.84, 0.68), strict=True):
        turn += random.normal(0, 0.03)
        at = (turn * 0.45, 0.25)
        for part, (start, end) in enumerate(((0.0, 0.42), (0.46, 0.68), (0.71, 0.85), (0.87, 0.98))):
            middle, half = length * 1.15 * (start + end) / 2, length * 1.15 * (end - start) / 2
            cx, cy = at[0] + middle * np.sin(turn), at[1] - middle * np.cos(turn)
            bone += _rod(x, y, cx, cy, half, 0.042 - 0.005 * part, turn)
            tissue = np.maximum(tissue, _rod(x, y, cx, cy, half + 0.05, 0.10, turn))
    tissue = np.maximum(tissue, _rod(x, y, 0.0, 0.2, 0.34, 0.34, 0))
    for _ in range(8):
        bone += 0.7 * _rod(x, y, random.uniform(-0.2, 0.2), random.uniform(0.3, 0.48), 0.06, 0.06, 0)
    for side in (-0.11, 0.11):
        bone += _rod(x, y, side, 0.85, 0.34, 0.08, 0)
    tissue = np.maximum(tissue, _rod(x, y, 0, 0.85, 0.4, 0.26, 0))
    return _exposed(0.5 * tissue + 0.75 * bone, random)


def knee(random: np.random.Generator) -> Picture:
    """Femur, patella, tibia and fibula in their soft tissue."""
    x, y = _grid(460, 320)
    x = x - random.normal(0, 0.05)
    tissue = _rod(x, y, 0, 0, 1.3, 0.62 + random.normal(0, 0.04), 0)
    bone = _rod(x, y, 0, -0.75, 0.62, 0.2, 0) + 0.9 * _rod(x, y, 0, -0.2, 0.16, 0.42, 0) + _rod(x, y, -0.04, 0.8, 0.62, 0.2, 0)
    bone += 0.9 * _rod(x, y, 0, 0.2, 0.13, 0.42, 0) + 0.6 * _rod(x, y, 0.36, 0.75, 0.5, 0.07, 0) + 0.5 * _rod(x, y, 0, -0.25, 0.13, 0.15, 0)
    return _exposed(0.5 * tissue + 0.6 * bone, random)


def skull(random: np.random.Generator) -> Picture:
    """A skull from the front: a bright shell, two dark orbits, nose, teeth."""
    x, y = _grid(460, 380)
    radius = np.hypot(x / 0.72, (y + 0.1) / 0.85)
    thickness = 0.5 * np.clip(1 - radius**2, 0, None) ** 0.4 + 0.7 * np.exp(-(((radius - 0.93) / 0.05) ** 2))
    for side in (-1, 1):
        thickness -= 0.35 * np.exp(-((((x - 0.28 * side) / 0.17) ** 2 + ((y - 0.02) / 0.14) ** 2) ** 2))
        thickness += 0.3 * np.exp(-(((np.hypot((x - 0.28 * side) / 0.19, (y - 0.02) / 0.16) - 1) / 0.12) ** 2))
    thickness -= 0.3 * np.exp(-((x / 0.09) ** 2) - ((y - 0.28) / 0.16) ** 2)
    thickness += 0.4 * np.exp(-((x / 0.3) ** 4) - ((y - 0.62) / 0.12) ** 4) * (1.2 + np.sin(60 * x))
    thickness += 0.4 * np.exp(-((x / 0.3) ** 4)) * (y > 0.6)
    return _exposed(thickness, random)


def abdomen(random: np.random.Generator) -> Picture:
    """Spine, pelvis, gas in loops of bowel."""
    x, y = _grid(460, 400)
    thickness = 0.9 * np.clip(1 - (x / 0.98) ** 2, 0, None) ** 0.4 + 0.35 * np.exp(-((x / 0.11) ** 2)) * (1 + 0.2 * np.sin(22 * y))
    for side in (-1, 1):
        u = side * x
        thickness += 0.35 * np.exp(-(((np.hypot((u - 0.42) / 0.38, (y - 0.62) / 0.42) - 0.8) / 0.16) ** 2)) * (y > 0.2)
        thickness -= 0.15 * np.exp(-(((u - 0.27) / 0.12) ** 2) - ((y - 0.9) / 0.12) ** 2)
    for _ in range(int(random.integers(5, 16))):
        thickness -= random.uniform(0.15, 0.4) * _rod(
            x,
            y,
            random.uniform(-0.75, 0.75),
            random.uniform(-0.9, 0.6),
            random.uniform(0.05, 0.3),
            random.uniform(0.05, 0.12),
            random.uniform(0, 3),
        )
    return _exposed(thickness, random)


def lateral_chest(random: np.random.Generator) -> Picture:
    """A chest from the side: one lung field, spine behind it, heart and breastbone before it, domes below."""
    x, y = _grid(480, int(random.integers(380, 460)))
    x = x * random.choice([-1, 1])
    trunk = 0.9 * np.clip(1 - (x / 0.92) ** 2, 0, None) ** 0.4
    lung = np.exp(-((((x - 0.05) / 0.52) ** 2 + ((y + 0.1) / 0.62) ** 2) ** 3))
    spine = 0.42 * np.exp(-(((x - 0.52 - 0.12 * np.cos(2.4 * y)) / 0.1) ** 2)) * (1 + 0.25 * np.sin(26 * y + random.uniform(0, 6)))
    heart = 0.45 * _rod(x, y, -0.22, 0.18, 0.3, 0.26, 0.5)
    belly = 0.5 / (1 + np.exp(-(y - 0.5 + 0.35 * (x - 0.1) ** 2 - 0.12 * x) * 16))
    sternum = 0.25 * np.exp(-(((x + 0.62 - 0.1 * y) / 0.05) ** 2))
    shoulder = 0.5 * _rod(x, y, 0.1, -0.92, 0.3, 0.3, 0)
    ribs = sum(0.08 * np.exp(-(((y - at - 0.35 * (x - 0.3)) / 0.025) ** 2)) for at in np.arange(-0.8, 0.7, 0.15))
    return _exposed(trunk - random.uniform(0.55, 0.75) * lung + spine + heart + belly + sternum + shoulder + ribs * lung, random)


def ct_slice(random: np.random.Generator) -> Picture:
    """An axial slice through the chest: a ring of body on black, two dark lungs, vertebra, heart; in a lung or a soft-tissue window."""
    x, y = _grid(400, 400)
    body = (np.hypot(x / 0.88, y / 0.66) < 1).astype(float)
    density = -1000 + 1040 * body
    for side in (-1, 1):
        lung = np.hypot((x - 0.42 * side) / (0.34 + random.normal(0, 0.02)), (y + 0.02) / 0.46) < 1
        density[lung] = -850 + 60 * _cloud(400, 400, 1, random)[lung]
    density[np.hypot((x - 0.08) / 0.3, (y + 0.16) / 0.27) < 1] = 60
    density[np.hypot(x / 0.11, (y - 0.42) / 0.11) < 1] = 450
    for turn in np.linspace(0, 2 * np.pi, 14) + random.uniform(0, 1):
        density[np.hypot(x - 0.8 * np.cos(turn), y - 0.59 * np.sin(turn)) < 0.045] = 500
    density[(np.hypot(x / 1.1, (y - 1.5)) < 0.85) & ~(body > 0) & (y > 0.7)] = -300
    low, wide = ((-1350, 1500), (-160, 400), (-1000, 1500))[int(random.integers(3))]
    return np.clip(255 * (density + random.normal(0, 25, density.shape) - low) / wide, 0, 255).astype(np.uint8)


def ultrasound(random: np.random.Generator) -> Picture:
    """A fan of speckle on black."""
    x, y = _grid(400, 480)
    radius, turn = np.hypot(x, y + 1.2), np.arctan2(x, y + 1.2)
    speckle = random.exponential(1, x.shape) * np.exp(0.5 * _cloud(400, 480, 1.2, random)) * np.exp(-0.4 * radius)
    inside = (np.abs(turn) < random.uniform(0.4, 0.7)) & (radius > 0.35) & (radius < 2.0)
    return np.asarray(Image.fromarray(np.clip(90 * speckle * inside, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1)))


NEVER_FILMS: Final[tuple[Callable[[np.random.Generator], Picture], ...]] = (
    landscape,
    face,
    building,
    page_of_text,
    white_noise,
    clouds,
    mosaic,
    gradient,
    chart,
    hand,
    knee,
    skull,
    abdomen,
    lateral_chest,
    ct_slice,
    ultrasound,
)

# ------------------------------------------------------------------------------------------------ films, spoilt


def turned_left(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    return np.rot90(films[0], 1)


def turned_right(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    return np.rot90(films[0], -1)


def upside_down(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    return np.rot90(films[0], 2)


def inverted(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    return np.invert(films[0])


def one_lung(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    """Cut to one half and its middle rows."""
    film = films[0]
    height, width = film.shape
    left = 0 if random.random() < 0.5 else int(0.54 * width)
    return film[int(0.08 * height) : int(random.uniform(0.75, 0.9) * height), left : left + int(0.46 * width)]


def viewer(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    """A screenshot of a viewer: menu, tool bar, list of patients, and the film in a window of its own."""
    image = Image.new("L", (960, 600), int(random.choice([25, 45, 230])))
    draw = ImageDraw.Draw(image)
    ink, font = 255 - image.getpixel((0, 0)), ImageFont.load_default(15)  # pyright: ignore[reportOperatorIssue]
    draw.text((8, 4), "File  Edit  View  Image  Tools  Window  Help", fill=ink, font=font)
    for icon in range(18):
        draw.rectangle((8 + 34 * icon, 28, 34 + 34 * icon, 54), outline=ink, fill=int(random.integers(60, 200)))
    for row in range(24):
        draw.text((8, 66 + 21 * row), " ".join(random.choice(_WORDS, 3)), fill=ink, font=font)
    side = int(random.integers(280, 430))
    image.paste(
        Image.fromarray(films[0]).resize((side, side)), (int(random.integers(280, 960 - side)), int(random.integers(62, 600 - side)))
    )
    return np.asarray(image)


def collage(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    """Several films side by side, as a figure of a paper shows them."""
    rows, columns = ((1, 2), (2, 1), (2, 2), (2, 3))[int(random.integers(4))]
    gap, side = int(random.integers(0, 12)), 220
    canvas = np.full((rows * (side + gap) + gap, columns * (side + gap) + gap), int(random.choice([0, 255])), np.uint8)
    for place in range(rows * columns):
        top, left = gap + place // columns * (side + gap), gap + place % columns * (side + gap)
        canvas[top : top + side, left : left + side] = np.asarray(Image.fromarray(films[place % len(films)]).resize((side, side)))
    return canvas


def photographed(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    """A film on a light box, photographed askew from afar, the room around it."""
    room = Image.fromarray(np.clip(90 + 40 * _cloud(480, 640, 1.5, random), 0, 255).astype(np.uint8))
    film = Image.fromarray(films[0]).resize((260, 260)).convert("LA").rotate(random.choice([-1, 1]) * random.uniform(12, 30), expand=True)
    room.paste(film.convert("L"), (int(random.integers(20, 260)), int(random.integers(10, 120))), film.getchannel("A"))
    return _grained(room.filter(ImageFilter.GaussianBlur(1)), 3, random)


def double_exposed(films: Sequence[Picture], random: np.random.Generator) -> Picture:
    """Two films on one plate, the second turned by a right angle."""
    first, second = (
        np.asarray(Image.fromarray(film).resize((320, 320)), np.float64) for film in (films[0], np.rot90(films[1 % len(films)]))
    )
    return np.clip((first + second) / 2, 0, 255).astype(np.uint8)


SPOILT_FILMS: Final[tuple[Callable[[Sequence[Picture], np.random.Generator], Picture], ...]] = (
    turned_left,
    turned_right,
    upside_down,
    inverted,
    one_lung,
    viewer,
    collage,
    photographed,
    double_exposed,
)


def hostile_pictures(films: Sequence[Picture], each: int, seed: int) -> list[tuple[str, Picture]]:
    """`each` of every kind, named; those made of films take them in turn."""
    made: list[tuple[str, Picture]] = []
    for number in range(each):
        for kind, draw in enumerate(NEVER_FILMS):
            made.append((draw.__name__, draw(np.random.default_rng([seed, kind, number]))))
        for kind, spoil in enumerate(SPOILT_FILMS):
            some = [films[(number * len(SPOILT_FILMS) + kind + place) % len(films)] for place in range(6)]
            made.append((spoil.__name__, np.ascontiguousarray(spoil(some, np.random.default_rng([seed, 100 + kind, number])))))
    return made


# ------------------------------------------------------------------------------------------------------- helpers


def _grid(height: int, width: int) -> tuple[Field, Field]:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return x, y


def _rod(x: Field, y: Field, cx: float, cy: float, half: float, radius: float, turn: float) -> Field:
    """A round rod seen from the side, its thickness 0…1; its length along the direction `turn` from upright."""
    along = (x - cx) * np.sin(turn) - (y - cy) * np.cos(turn)
    across = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    beyond = np.clip(np.abs(along) - half, 0, None)
    return np.clip(1 - (across**2 + beyond**2) / radius**2, 0, None) ** 0.5


def _cloud(height: int, width: int, fall: float, random: np.random.Generator) -> Field:
    """Noise whose amplitude falls with frequency^−fall; mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * frequency**-fall, s=(height, width))
    return field / field.std()


def _exposed(thickness: Field, random: np.random.Generator) -> Picture:
    """A film of so much tissue, with an exposure and grain of its own."""
    film = 1 / (1 + np.exp(-(thickness - random.normal(0.5, 0.05)) * random.normal(4.5, 0.4)))
    return np.clip(255 * film + random.normal(0, random.uniform(1, 5), film.shape), 0, 255).astype(np.uint8)


def _grained(image: Image.Image, grain: float, random: np.random.Generator) -> Picture:
    return np.clip(np.asarray(image) + random.normal(0, grain, (image.height, image.width)), 0, 255).astype(np.uint8)


def _stretched(field: Field) -> Picture:
    low, high = np.percentile(field, (1, 99))
    return np.clip(255 * (field - low) / (high - low), 0, 255).astype(np.uint8)
