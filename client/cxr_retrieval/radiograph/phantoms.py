"""Synthetic frontal chest radiographs with exact lung and lesion masks, and invented clinical facts. No patient is shown.

The picture is built the way a radiograph is: tissue thickness adds up along the beam (trunk, heart, mediastinum, spine,
ribs, clavicles, vessels, opacity), air in the lungs takes away, and the film darkens where little tissue lies. Everything
follows from one seed.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PhantomLabel = Literal["control", "non_covid_pneumonia", "covid19"]
PHANTOM_LABELS: Final[tuple[PhantomLabel, ...]] = ("control", "non_covid_pneumonia", "covid19")
SITES: Final = ("north", "south")
PHANTOM_FINDINGS: Final = ("cardiomegaly", "consolidation", "effusion", "ground_glass", "nodule", "pneumothorax")
"""What `make_findings` draws, each whether or not the others are there."""
Side = Literal["left", "right", "bilateral"]
Zone = Literal["upper", "middle", "lower", ""]
Extent = Literal["small", "moderate", "large"]
_SIZE: Final = 512
_AIR: Final = 0.74
"""Thickness of tissue that a full depth of air takes the place of."""

Field = NDArray[np.float64]


@dataclass(frozen=True)
class Phantom:
    """A made-up radiograph. `pixels` `[512, 448…512]` uint8; masks of the same shape, 0 or 255; facts as manifest text."""

    image_id: str
    label: str
    site: str
    pixels: NDArray[np.uint8]
    lung_mask: NDArray[np.uint8]
    lesion_mask: NDArray[np.uint8]
    facts: dict[str, str]


@dataclass(frozen=True)
class Shown:
    """One finding that a phantom shows. `side` is the patient's; `zone` of the lung, "" where it has none to speak of."""

    finding: str
    side: Side
    zone: Zone
    extent: Extent


def make_phantom(seed: int, label: PhantomLabel, patches: tuple[int, int] = (6, 8)) -> Phantom:
    """One phantom. Control: clear lungs; non_covid_pneumonia: one consolidation, whose air is gone, so that heart and diaphragm lose
    their edge beside it; covid19: bilateral, peripheral, mostly basal ground-glass, half to three quarters of whose air is gone (the
    patterns of Jacobi et al. 2020), in so many `patches` in each lung, from the least to the most.
    """
    random = np.random.default_rng([seed, PHANTOM_LABELS.index(label)])
    site = SITES[int(random.integers(len(SITES)))]
    x, y = _plane(random)
    right, left, depth = _lungs(x, y, random)
    lungs = right | left
    thickness = _trunk(x, y, random) - _AIR * depth + _middle(x, y, random) + _ribs(x, y, lungs, random) + _vessels(x, y, depth, random)
    opacity, lesion = _opacity(x, y, right, left, depth, label, patches, random)
    pixels = _exposed(thickness + opacity, random)
    return Phantom(
        f"phantom-{label}-{seed:04d}",
        label,
        site,
        _marked(pixels, site, random),
        (255 * lungs).astype(np.uint8),
        (255 * lesion).astype(np.uint8),
        _facts(label, random),
    )


def make_findings(seed: int, findings: Collection[str]) -> tuple[Phantom, tuple[Shown, ...]]:
    """One phantom with just these of PHANTOM_FINDINGS, and where each is; its label are their names with | between, `control` of none.

    cardiomegaly: a heart a third to three fifths wider. consolidation: one place without air. effusion: fluid from the base up, highest
    beside the chest wall. ground_glass: patches in both lungs with a third to three fifths of their air gone. nodule: one round shadow.
    pneumothorax: a lung that has come away from the chest wall, a line where it ends and no vessels beyond.
    """
    random = np.random.default_rng([seed, 6])
    site = SITES[int(random.integers(len(SITES)))]
    x, y = _plane(random)
    right, left, depth = _lungs(x, y, random)
    vessels = _vessels(x, y, depth, random)
    chest = _Chest(x, y, right, left, depth, vessels)
    width = random.uniform(1.35, 1.6) if "cardiomegaly" in findings else 1.0
    middle = _middle(x, y, random, width)
    shown = tuple(_DRAWN[name](chest, width, random) for name in PHANTOM_FINDINGS if name in findings)
    filled = _blur(np.clip(chest.filled, 0, 1), 2.0)
    lungs = right | left
    thickness = _trunk(x, y, random) - _AIR * chest.depth * (1 - filled) + middle + _ribs(x, y, lungs, random) + chest.vessels + chest.added
    pixels = _exposed(thickness, random)
    label = "|".join(one.finding for one in shown) or "control"
    phantom = Phantom(
        f"phantom-findings-{seed:05d}",
        label,
        site,
        _marked(pixels, site, random),
        (255 * lungs).astype(np.uint8),
        (255 * ((filled > 0.1) & lungs)).astype(np.uint8),
        {"raw_finding": f"synthetic {label}", "view": "PA"},
    )
    return phantom, shown


def write_gallery(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Writes `per_class` phantoms of each label as PNG, their lung masks, and a manifest whose path is returned."""
    return write_phantoms(folder, [make_phantom(seed + i, label) for label in PHANTOM_LABELS for i in range(per_class)])


def write_phantoms(folder: Path, phantoms: Sequence[Phantom], split: str = "train") -> Path:
    """Writes images, masks and `manifest.csv`, in the form of any user's own folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for phantom in phantoms:
        Image.fromarray(phantom.pixels).save(folder / "images" / f"{phantom.image_id}.png")
        Image.fromarray(phantom.lung_mask).save(folder / "masks" / f"{phantom.image_id}.png")
        rows.append(
            {
                "image_id": phantom.image_id,
                "path": f"images/{phantom.image_id}.png",
                "label": phantom.label,
                "patient_id": f"synthetic-{phantom.image_id}",
                "source": f"phantom-{phantom.site}",
                "split": split,
                "lung_mask_path": f"masks/{phantom.image_id}.png",
                **phantom.facts,
            }
        )
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dicom(phantom: Phantom, path: Path) -> None:
    """Writes a phantom as a 12-bit MONOCHROME1 Digital X-Ray image with a window, as a detector would (PS3.3 A.26); an archive files it."""
    import pydicom  # here, because whoever draws one for a server to look at writes none
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    made = {level: generate_uid(entropy_srcs=[f"{level} {phantom.image_id}"]) for level in ("instance", "series", "study")}
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = made["instance"], made["series"], made["study"]
    dataset.PatientName, dataset.PatientID, dataset.PatientSex, dataset.PatientBirthDate = "SYNTHETIC^PHANTOM", phantom.image_id, "O", ""
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20200101", "120000", "1", ""
    dataset.ReferringPhysicianName, dataset.SeriesNumber, dataset.InstanceNumber = "", 1, 1
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "DX", "CHEST", "PA"
    dataset.Rows, dataset.Columns = phantom.pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = ((255 - phantom.pixels).astype(np.uint16) * 16).tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


# ------------------------------------------------------------------------------------------------------ anatomy


def _plane(random: np.random.Generator) -> tuple[Field, Field]:
    """Coordinates of every pixel, the midline at x = 0 and the greater side in −1…1; the patient a little aside and turned."""
    width = int(random.integers(440, _SIZE + 1))
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, _SIZE))
    x = x * (width / _SIZE) + random.normal(0, 0.015)
    turned = random.normal(0, 0.02)
    return x + turned * y, y - turned * x


def _exposed(thickness: Field, random: np.random.Generator) -> NDArray[np.uint8]:
    """Tissue as the film shows it."""
    film = 1 / (1 + np.exp(-(thickness - random.normal(0.62, 0.02)) * random.normal(4.1, 0.25)))
    film += random.normal(0, 0.012, film.shape) * (1.2 - film)
    film = np.clip(_blur(film, 0.7), 0, 1) ** random.normal(1.0, 0.06)
    return np.clip(8 + 236 * film, 0, 255).astype(np.uint8)


def _lungs(x: Field, y: Field, random: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Field]:
    """Masks of the patient's right lung (left of the picture) and left lung, and the depth of air in 0…1."""
    size = random.uniform(0.88, 1.08)
    top, bottom = -0.76 * size, 0.56 * size + random.normal(0, 0.04)
    masks = []
    for side in (-1, 1):
        u = side * x  # away from the midline
        outer = 0.72 * size * random.uniform(0.96, 1.04)
        inner = 0.115 + 0.03 * np.clip((y - top) / (bottom - top), 0, 1)
        if side == 1:  # the heart takes from the left lung
            inner = inner + 0.20 * np.exp(-(((y - 0.36) / 0.26) ** 2))
        else:
            inner = inner + 0.06 * np.exp(-(((y - 0.30) / 0.26) ** 2))
        v = np.clip((y - top) / (bottom + 0.25 - top), 0, 1)
        wall = outer * (0.30 + 0.70 * np.sin(np.pi / 2 * np.clip(v * 1.45, 0, 1)) ** 0.8)
        middle = 0.5 * (outer + 0.12)
        dome = bottom + (0.03 if side == 1 else -0.02) - 0.10 + 0.75 * np.abs(u - middle + 0.04) ** 2.0
        apex = top + 1.1 * np.abs(u - 0.27) ** 2
        masks.append((u > inner) & (u < wall) & (y < dome) & (y > apex))
    right, left = masks
    air = _blur((right | left).astype(float), 9)
    depth = np.clip((air - 0.35) / 0.65, 0, 1) * (0.86 + 0.10 * np.clip(y + 0.2, -0.6, 0.6))
    return right, left, _blur(np.where(right | left, np.maximum(depth, 0.25), 0), 2.4)


def _trunk(x: Field, y: Field, random: np.random.Generator) -> Field:
    half = 0.94 + 0.06 * np.tanh((y + 0.3) * 2) + random.normal(0, 0.015)
    neck = np.clip((-0.80 - y) / 0.2, 0, 1)
    body = np.sqrt(np.clip(1 - (x / (half * (1 - 0.62 * neck))) ** 2, 0, None))
    belly = 0.30 / (1 + np.exp(-(y - 0.55) * 14))
    shoulders = 0.16 * np.exp(-(((np.abs(x) - 0.80) / 0.22) ** 2) - ((y + 0.72) / 0.22) ** 2)
    return _blur(0.86 * body**0.6 + belly * (body > 0) + shoulders * (body > 0), 3)


def _middle(x: Field, y: Field, random: np.random.Generator, heart_width: float = 1.0) -> Field:
    """Mediastinum, spine with its discs, heart, aortic knob, hila, trachea."""
    spine = 0.20 * np.exp(-((x / 0.075) ** 2)) * (1 + 0.10 * np.sin(y * 44 + random.uniform(0, 6)))
    upper = 0.22 * np.exp(-(((x / 0.13) ** 2) ** 2))
    size = random.uniform(0.92, 1.10)
    heart = 0.34 * _ellipse(x, y, 0.13 * size, 0.30, 0.30 * size * heart_width, 0.29, 0.35)
    knob = 0.16 * _ellipse(x, y, 0.11, -0.22, 0.085, 0.10, 0)
    hila = sum(0.11 * np.exp(-(((x - s * 0.19) / 0.075) ** 2) - ((y + 0.02 + 0.03 * s) / 0.15) ** 2) for s in (-1, 1))
    trachea = -0.16 * np.exp(-((((x - 0.01) / 0.04) ** 2) ** 2)) / (1 + np.exp((y + 0.28) * 22))
    return _blur(spine + upper + heart + knob, 3.0) + hila + trachea


def _ribs(x: Field, y: Field, lungs: NDArray[np.bool_], random: np.random.Generator) -> Field:
    total = np.zeros_like(x)
    spacing = random.uniform(0.148, 0.162)
    u = np.abs(x)
    cage = np.clip((0.92 - u) / 0.06, 0, 1)
    arch, flank = 0.10 * np.sin(np.clip(u / 0.5, 0, 1) * np.pi / 2), np.clip(u - 0.30, 0, None) ** 1.5
    behind, before = np.clip((u - 0.07) / 0.05, 0, 1), np.clip((u - 0.30) / 0.16, 0, 1)
    for rib in range(10):
        start = -0.86 + spacing * rib
        back = start - arch + (0.20 + 0.02 * rib) * flank * 2.0
        front = start + 0.34 - 0.30 * (u - 0.25)
        total += _band(y - back, 0.030) * behind * 0.105 * cage
        if rib < 7:
            total += _band(y - front, 0.036) * before * 0.050 * cage
    for side in (-1, 1):
        u = side * x
        line = -0.66 + 0.07 * np.sin((u - 0.1) * 4.2) - 0.13 * u
        total += _band(y - line, 0.034) * np.clip((u - 0.06) / 0.05, 0, 1) * np.clip((0.84 - u) / 0.06, 0, 1) * 0.17
        blade = _ellipse(u, y, 0.80, -0.45, 0.13, 0.34, 0.18)
        total += 0.07 * blade
    return _blur(total, 1.1) * (0.75 + 0.25 * lungs)


def _band(distance: Field, half: float) -> Field:
    """A flat tube seen from the side: denser at its two cortical edges."""
    away = np.abs(distance)
    tube = np.zeros_like(away)
    within = away < half
    away = away[within]
    tube[within] = np.clip((half - away) / 0.008, 0, 1) * (0.75 + 0.45 * np.exp(-(((away - half * 0.8) / 0.009) ** 2)))
    return tube


def _vessels(x: Field, y: Field, depth: Field, random: np.random.Generator) -> Field:
    """Branching markings that leave the hila and thin out towards the periphery."""
    height, width = x.shape
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)

    def branch(px: float, py: float, angle: float, length: float, calibre: float) -> None:
        if calibre < 0.7 or length < 6:
            return
        steps = max(2, int(length / 7))
        for _ in range(steps):
            nx, ny = px + 7 * np.cos(angle), py + 7 * np.sin(angle)
            draw.line((px, py, nx, ny), fill=int(min(255, 60 * calibre)), width=max(1, round(calibre)))
            px, py, angle, calibre = nx, ny, angle + random.normal(0, 0.13), calibre * 0.975
        for turn in (-1, 1):
            branch(px, py, angle + turn * random.uniform(0.25, 0.6), length * random.uniform(0.6, 0.85), calibre * 0.72)

    for side in (-1, 1):
        row, column = np.unravel_index(np.argmin((x - side * 0.20) ** 2 + y**2), x.shape)
        for angle in np.linspace(-1.25, 1.25, 7):
            branch(float(column), float(row), (angle if side == 1 else np.pi - angle) + random.normal(0, 0.1), 46, 3.4)
    return 0.26 * _blur(np.asarray(canvas) / 255.0, 1.1) * np.clip(depth * 1.3, 0, 1)


def _opacity(
    x: Field,
    y: Field,
    right: NDArray[np.bool_],
    left: NDArray[np.bool_],
    depth: Field,
    label: PhantomLabel,
    patches: tuple[int, int],
    random: np.random.Generator,
) -> tuple[Field, NDArray[np.bool_]]:
    """Added tissue and the exact lesion mask: a share of the air, which fluid takes the place of."""
    filled = np.zeros_like(x)
    texture = _noise(x.shape, 11, random)
    if label == "non_covid_pneumonia":
        lung = (right, left)[int(random.integers(2))]
        rows, columns = np.nonzero(lung & (y > -0.15) & (depth > 0.5))
        pick = int(random.integers(len(rows)))
        cx, cy = x[rows[pick], columns[pick]], y[rows[pick], columns[pick]]
        radius = random.uniform(0.34, 0.48)
        blob = 1.1 - np.hypot((x - cx) / radius, (y - cy) / (radius * random.uniform(0.8, 1.1))) + 0.12 * texture
        filled = random.uniform(0.95, 1.0) * np.clip(blob * 1.8, 0, 1) * (1 + 0.04 * _noise(x.shape, 5, random)) * lung
    elif label == "covid19":
        grade = random.uniform(0.5, 0.75)
        for lung in (right, left):
            edge = 1 - np.clip(_blur(lung.astype(float), 26) * 1.75 - 0.55, 0, 1)  # high near the pleura
            box = np.ix_(lung.any(axis=1), lung.any(axis=0))
            inside, near, across, down, uneven = lung[box], edge[box], x[box], y[box], 0.45 * texture[box]
            added = filled[box]
            for _ in range(int(random.integers(patches[0], patches[1] + 1))):
                rows, columns = np.nonzero(inside & (near > 0.35) & (down > random.uniform(-0.5, 0.1)))
                pick = int(random.integers(len(rows)))
                cx, cy = across[rows[pick], columns[pick]], down[rows[pick], columns[pick]]
                patch = 1.1 - np.hypot((across - cx) / random.uniform(0.18, 0.30), (down - cy) / random.uniform(0.22, 0.40)) + uneven
                added = np.maximum(added, grade * np.clip(patch * 1.4, 0, 1) * (0.55 + 0.45 * near) * inside)
            filled[box] = added
        filled *= 1 + 0.5 * _noise(x.shape, 3, random)
    filled = _blur(np.clip(filled, 0, 1), 3.0)
    return _AIR * depth * filled, (filled > 0.1) & (right | left)


# ---------------------------------------------------------------------------------------------- findings


@dataclass
class _Chest:
    """What findings change: `filled`, the share of the air that fluid takes the place of; `added` tissue; `depth` of air; `vessels`."""

    x: Field
    y: Field
    right: NDArray[np.bool_]
    left: NDArray[np.bool_]
    depth: Field
    vessels: Field

    def __post_init__(self) -> None:
        self.filled, self.added = np.zeros_like(self.x), np.zeros_like(self.x)

    def lung(self, random: np.random.Generator) -> tuple[Side, int, NDArray[np.bool_]]:
        """One of both, by chance: the patient's side, which way it lies in the picture, its mask."""
        return ("right", -1, self.right) if random.integers(2) else ("left", 1, self.left)

    def place(self, lung: NDArray[np.bool_], random: np.random.Generator, among: NDArray[np.bool_] | None = None) -> tuple[float, float]:
        """A point well inside that lung."""
        rows, columns = np.nonzero(lung & (self.depth > 0.5) if among is None else lung & (self.depth > 0.5) & among)
        pick = int(random.integers(len(rows)))
        return float(self.x[rows[pick], columns[pick]]), float(self.y[rows[pick], columns[pick]])

    def fill(self, share: Field) -> None:
        """So much of the air there, unless more of it is gone already."""
        self.filled = np.maximum(self.filled, share)


def _zone(y: float) -> Zone:
    return "upper" if y < -0.3 else "middle" if y < 0.08 else "lower"


def _cardiomegaly(chest: _Chest, width: float, _: np.random.Generator) -> Shown:
    """The heart itself is drawn wider by `_middle`; here it takes the place of the lung beside it."""
    beside = np.clip(4 * _ellipse(chest.x, chest.y, 0.13, 0.30, 0.30 * width, 0.29, 0.35), 0, 1)
    chest.depth = chest.depth * (1 - 0.8 * beside)
    chest.vessels = chest.vessels * (1 - beside)
    return Shown("cardiomegaly", "bilateral", "", "moderate" if width < 1.48 else "large")


def _consolidation(chest: _Chest, _: float, random: np.random.Generator) -> Shown:
    side, _, lung = chest.lung(random)
    cx, cy = chest.place(lung, random)
    radius = random.uniform(0.16, 0.34)
    blob = (
        1.1
        - np.hypot((chest.x - cx) / radius, (chest.y - cy) / (radius * random.uniform(0.8, 1.1)))
        + 0.12 * _noise(chest.x.shape, 11, random)
    )
    chest.fill(random.uniform(0.85, 1.0) * np.clip(blob * 1.8, 0, 1) * lung)
    return Shown("consolidation", side, _zone(cy), "small" if radius < 0.22 else "moderate" if radius < 0.28 else "large")


def _effusion(chest: _Chest, _: float, random: np.random.Generator) -> Shown:
    side, way, lung = chest.lung(random)
    height = random.uniform(0.14, 0.6)
    base = float(chest.y[lung].max())
    outwards = np.clip((way * chest.x - 0.15) / 0.5, 0, 1.2)
    level = base - height * (0.55 + 0.6 * outwards**2)
    fluid = np.clip((chest.y - level) / 0.03, 0, 1) * lung
    chest.fill(fluid)
    chest.added = chest.added + 0.06 * _blur(fluid, 3.0)
    return Shown("effusion", side, "lower", "small" if height < 0.27 else "moderate" if height < 0.43 else "large")


def _ground_glass(chest: _Chest, _: float, random: np.random.Generator) -> Shown:
    grade, count = random.uniform(0.34, 0.6), int(random.integers(3, 7))
    texture = _noise(chest.x.shape, 11, random)
    heights = []
    for lung in (chest.right, chest.left):
        for _ in range(count):
            cx, cy = chest.place(lung, random)
            heights.append(cy)
            patch = (
                1.1 - np.hypot((chest.x - cx) / random.uniform(0.16, 0.28), (chest.y - cy) / random.uniform(0.18, 0.32)) + 0.45 * texture
            )
            chest.fill(grade * np.clip(patch * 1.4, 0, 1) * lung)
    return Shown(
        "ground_glass", "bilateral", _zone(float(np.mean(heights))), "small" if count < 4 else "moderate" if count < 6 else "large"
    )


def _nodule(chest: _Chest, _: float, random: np.random.Generator) -> Shown:
    side, _, lung = chest.lung(random)
    cx, cy = chest.place(lung, random, chest.filled < 0.3)
    radius = random.uniform(0.045, 0.09)
    chest.added = chest.added + random.uniform(0.24, 0.34) * _ellipse(
        chest.x, chest.y, cx, cy, radius, radius * random.uniform(0.85, 1.1), 0
    )
    return Shown("nodule", side, _zone(cy), "small" if radius < 0.06 else "moderate" if radius < 0.075 else "large")


def _pneumothorax(chest: _Chest, _: float, random: np.random.Generator) -> Shown:
    """The lung shrinks towards its root; beyond it there is air, and nothing else."""
    side, way, lung = chest.lung(random)
    kept = random.uniform(0.55, 0.85)
    root = way * 0.15, 0.42
    rows, columns = np.nonzero(lung)
    x, y = chest.x[rows, columns], chest.y[rows, columns]
    height, width = chest.x.shape
    scale = (width - 1) / (chest.x[0, -1] - chest.x[0, 0])
    there = (
        np.rint(columns + (x - root[0]) * (1 / kept - 1) * scale).astype(int),
        np.rint(rows + (y - root[1]) * (1 / kept - 1) * scale).astype(int),
    )
    within = (there[0] >= 0) & (there[0] < width) & (there[1] >= 0) & (there[1] < height)
    collapsed = np.zeros_like(lung)
    collapsed[rows, columns] = within & lung[np.clip(there[1], 0, height - 1), np.clip(there[0], 0, width - 1)]
    soft = _blur(collapsed.astype(float), 1.2)
    beyond = lung & ~collapsed
    chest.vessels = np.where(beyond, 0.0, chest.vessels)
    chest.depth = chest.depth + 0.10 * _blur(beyond.astype(float), 2.0)
    chest.filled = np.where(beyond, 0.0, np.maximum(chest.filled, 0.14 * (1 - kept) / 0.45 * collapsed))
    chest.added = chest.added + 0.30 * soft * (1 - soft) * lung
    return Shown("pneumothorax", side, "", "small" if kept > 0.75 else "moderate" if kept > 0.65 else "large")


_DRAWN: Final = {
    "cardiomegaly": _cardiomegaly,
    "consolidation": _consolidation,
    "effusion": _effusion,
    "ground_glass": _ground_glass,
    "nodule": _nodule,
    "pneumothorax": _pneumothorax,
}


# ---------------------------------------------------------------------------------------------- film and facts


def _marked(pixels: NDArray[np.uint8], site: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """Burns in what each "site" burns in: side marker and the word SYNTHETIC, at its own place."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width, height = image.size
    big, small = ImageFont.load_default(26), ImageFont.load_default(19)
    stamp = f"SYNTHETIC · {site.upper()}"
    left = width - 14 - draw.textlength(stamp, font=small)
    if site == "north":
        draw.text((width - 46, 18), "L", fill=245, font=big)
        draw.text((14, height - 32), stamp, fill=235, font=small, stroke_width=1, stroke_fill=40)
    else:
        draw.text((16, 14), "R", fill=235, font=big)
        draw.rectangle((12, 12, 38, 44), outline=235)
        draw.text((left, height - 32), stamp, fill=235, font=small, stroke_width=1, stroke_fill=40)
    return np.asarray(image)


def _facts(label: PhantomLabel, random: np.random.Generator) -> dict[str, str]:
    """Invented, and plainly so: they only show how facts travel."""
    ill = label != "control"
    facts = {
        "raw_finding": f"synthetic {label}",
        "view": "PA",
        "age": str(int(random.integers(22, 86))),
        "sex": str(random.choice(["F", "M"])),
        "temperature": f"{random.normal(38.4 if ill else 36.7, 0.4):.1f}",
        "spo2": str(int(np.clip(random.normal(91 if label == "covid19" else 94 if ill else 98, 2), 70, 100))),
        "went_icu": "Y" if ill and random.random() < 0.3 else "N",
        "clinical_notes": "Invented facts of a synthetic phantom.",
    }
    if ill:
        facts["survival"] = "N" if random.random() < 0.1 else "Y"
    else:
        facts["survival"] = ""
    return facts


def _ellipse(x: Field, y: Field, cx: float, cy: float, a: float, b: float, turn: float) -> Field:
    """A soft-edged solid: thickness of an ellipsoid seen along the beam, in 0…1."""
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    return np.clip(1 - (u / a) ** 2 - (v / b) ** 2, 0, None) ** 0.5


def _noise(shape: tuple[int, ...], grain: float, random: np.random.Generator) -> Field:
    field = _blur(random.normal(size=shape), grain)
    return field / field.std()


def _blur(field: Field, sigma: float) -> Field:
    """Gaussian blur through the Fourier domain, edges mirrored."""
    pad = int(3 * sigma) + 1
    padded = np.pad(field, pad, mode="reflect")
    rows, columns = np.fft.fftfreq(padded.shape[0]), np.fft.rfftfreq(padded.shape[1])
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (rows[:, None] ** 2 + columns[None, :] ** 2))
    return np.fft.irfft2(np.fft.rfft2(padded) * gain, s=padded.shape)[pad:-pad, pad:-pad]
