"""Public data sets in the form their publishers give them → the one manifest: `cxr manifest <kind>`.

Each reader yields rows with `image_id, path, label, patient_id, source, split` and what clinical facts there are, `path` being
a file that exists. Where the publisher gives no split, patients are dealt to train and val by a hash of their id, so that a
patient never straddles them and adding data moves nobody.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from cxr_retrieval.cases.features import columns_of
from cxr_retrieval.cases.fields import Doubt, parse_clinical
from cxr_retrieval.cases.labels import SEPARATOR, findings_of
from cxr_retrieval.cases.manifest import REQUIRED_COLUMNS
from cxr_retrieval.errors import InputError, ManifestError

Row = dict[str, str]

_IMAGES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".bmp"})
_FRONTAL: Final = frozenset({"PA", "AP", "AP Supine", "AP Erect"})
_JSRT_SIDE: Final = 2048
_JSRT_WHITE: Final = 4095


class Uncertain(str, Enum):
    """What a −1 of the CheXpert labeller counts as (Irvin et al. 2019: U-Ignore, U-Ones, U-Zeros)."""

    ignore = "ignore"
    positive = "positive"
    negative = "negative"


class Request(NamedTuple):
    """What a reader is given: the data set's folder, where the manifest will lie, and the policies."""

    root: Path
    out: Path
    uncertain: Uncertain
    val_share: float
    findings: bool = False
    """All findings that are stated make the label (`cases/labels.py`), in the place of our classes: of CheXpert, MIMIC-CXR-JPG and NIH."""


def covidx(request: Request) -> Iterator[Row]:
    """COVIDx (Wang et al. 2020): `train*.txt` and `test*.txt` of `patient file class [source]`, images in `train/` and `test/`."""
    labels = {"normal": "control", "pneumonia": "non_covid_pneumonia", "COVID-19": "covid19", "positive": "covid19", "negative": "control"}
    found = False
    for name, split in (("train", "train"), ("val", "val"), ("test", "val")):
        for listing in sorted(request.root.glob(f"{name}*.txt")):
            found = True
            for number, line in enumerate(listing.read_text("utf-8").splitlines(), start=1):
                if not line.strip():
                    continue
                cells = line.split()
                if len(cells) not in (3, 4) or cells[2] not in labels:
                    raise _malformed(listing, number, f"patient, file, one of {', '.join(labels)} and perhaps a source", line)
                yield {
                    "image_id": f"covidx-{Path(cells[1]).stem}",
                    "path": str(_existing(request.root / name / cells[1], listing, number)),
                    "label": labels[cells[2]],
                    "patient_id": cells[0],
                    "source": f"covidx-{cells[3]}" if len(cells) == 4 else "covidx",
                    "split": split,
                }
    if not found:
        raise _missing(request.root, "train*.txt and test*.txt of the COVIDx release")


def ieee8023(request: Request) -> Iterator[Row]:
    """COVID-19 Image Data Collection (Cohen et al. 2020): `metadata.csv` and `images/`; frontal X-rays with a usable finding."""
    table = _table(request.root / "metadata.csv", ("patientid", "finding", "view", "modality", "folder", "filename"))
    renamed = columns_of("ieee8023")
    for number, cells in table:
        label = _finding(cells["finding"])
        if cells["modality"] != "X-ray" or cells["view"] not in _FRONTAL or label is None:
            continue
        path = _existing(request.root / cells["folder"] / cells["filename"], request.root / "metadata.csv", number)
        yield {
            "image_id": f"ieee8023-{path.stem}",
            "path": str(path),
            "label": label,
            "patient_id": cells["patientid"],
            "source": "ieee8023",
            "split": _dealt(cells["patientid"], request.val_share),
            **{ours: cells[theirs] for theirs, ours in renamed.items() if cells.get(theirs)},
        }


def _finding(text: str) -> str | None:
    if "COVID-19" in text:
        return "covid19"
    if text.startswith("Pneumonia"):
        return "non_covid_pneumonia"
    return "control" if text in ("No Finding", "Normal") else None


def folders(request: Request) -> Iterator[Row]:
    """One folder per class, `<label>/…` or `<split>/<label>/…` with splits train, val, test; every image its own patient."""
    splits = {"train": "train", "val": "val", "valid": "val", "test": "val"}
    top = sorted(path for path in request.root.iterdir() if path.is_dir()) if request.root.is_dir() else []
    by_split = [path for path in top if path.name in splits]
    classes = [(splits[path.name], label) for path in by_split for label in sorted(path.iterdir()) if label.is_dir()] or [
        ("", path) for path in top
    ]
    if not classes:
        raise _missing(request.root, "a folder per class, such as control/ and covid19/")
    for split, folder in classes:
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES):
            image_id = "-".join(path.relative_to(request.root).with_suffix("").parts)
            yield {
                "image_id": image_id,
                "path": str(path),
                "label": folder.name,
                "patient_id": image_id,
                "source": request.root.name,
                "split": split or _dealt(image_id, request.val_share),
            }


def chexpert(request: Request) -> Iterator[Row]:
    """CheXpert (Irvin et al. 2019): `train.csv` and `valid.csv` whose `Path` begins with the release's own folder name."""
    found = False
    for name, split in (("train", "train"), ("valid", "val")):
        listing = request.root / f"{name}.csv"
        if not listing.exists():
            continue
        found = True
        for number, cells in _table(listing, ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Pneumonia")):
            label = _label(cells, request)
            if cells["Frontal/Lateral"] != "Frontal" or label is None:
                continue
            inside = Path(*Path(cells["Path"]).parts[1:])
            patient = next((part for part in inside.parts if part.startswith("patient")), "")
            if not patient:
                raise _malformed(listing, number, "a Path with patientNNNNN in it", cells["Path"])
            yield {
                "image_id": "chexpert-" + "-".join(inside.with_suffix("").parts[1:]),
                "path": str(_existing(request.root / inside, listing, number)),
                "label": label,
                "patient_id": patient,
                "source": "chexpert",
                "split": split,
                "sex": cells["Sex"][:1],
                "age": cells["Age"],
                "view": cells["AP/PA"],
                **_uncertain(cells, request),
            }
    if not found:
        raise _missing(request.root, "train.csv or valid.csv of the CheXpert release")


def mimic_cxr_jpg(request: Request) -> Iterator[Row]:
    """MIMIC-CXR-JPG 2 (Johnson et al. 2019): the CSVs `…-chexpert`, `…-split`, `…-metadata` (.csv or .csv.gz) and `files/`."""
    studies = {
        cells["study_id"]: (_label(cells, request), _uncertain(cells, request))
        for _, cells in _table(_one(request.root, "*-chexpert.csv*"), ("subject_id", "study_id", "No Finding", "Pneumonia"))
    }
    listing = _one(request.root, "*-split.csv*")
    splits = {cells["dicom_id"]: cells["split"] for _, cells in _table(listing, ("dicom_id", "study_id", "subject_id", "split"))}
    metadata = _one(request.root, "*-metadata.csv*")
    for number, cells in _table(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        label, uncertain = studies.get(cells["study_id"], (None, {}))
        if cells["ViewPosition"] not in ("PA", "AP") or label is None:
            continue
        dicom, subject = cells["dicom_id"], cells["subject_id"]
        if dicom not in splits:
            raise _malformed(metadata, number, f"a dicom_id that {listing.name} knows", dicom)
        path = request.root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{cells['study_id']}" / f"{dicom}.jpg"
        yield {
            "image_id": f"mimic-{dicom}",
            "path": str(_existing(path, metadata, number)),
            "label": label,
            "patient_id": subject,
            "source": "mimic-cxr",
            "split": "train" if splits[dicom] == "train" else "val",
            "view": cells["ViewPosition"],
            **uncertain,
        }


def nih(request: Request) -> Iterator[Row]:
    """NIH ChestX-ray14 (Wang et al. 2017): `Data_Entry_2017*.csv`, images in `images*/` or below, `test_list.txt` if it is there."""
    listing = _one(request.root, "Data_Entry_2017*.csv")
    films = {path.name: path for path in sorted(request.root.glob("images*/**/*.png"))}
    held_out = request.root / "test_list.txt"
    test = set(held_out.read_text("utf-8").split()) if held_out.is_file() else None
    columns = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
    for number, cells in _table(listing, columns):
        name, patient = cells["Image Index"], cells["Patient ID"]
        label = _label(dict.fromkeys(cells["Finding Labels"].replace("_", " ").split(SEPARATOR), "1"), request)
        if cells["View Position"] not in ("PA", "AP") or label is None:
            continue
        if name not in films:
            raise _malformed(listing, number, f"the name of an image in {request.root.name}/images*", name)
        yield {
            "image_id": f"nih-{Path(name).stem}",
            "path": str(films[name]),
            "label": label,
            "patient_id": patient,
            "source": "nih",
            "split": _dealt(patient, request.val_share) if test is None else "val" if name in test else "train",
            "sex": cells["Patient Gender"],
            "age": cells["Patient Age"].lstrip("0").rstrip("Y"),
            "view": cells["View Position"],
        }


_NO_FINDING: Final = "No Finding"
_STATED: Final = {"1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": "?", "-1.0": "?"}
"""As the CheXpert labeller writes it → present, absent, uncertain; anything else is not stated."""
_LABELLED: Final = frozenset(
    {
        "Atelectasis",
        "Cardiomegaly",
        "Consolidation",
        "Edema",
        "Effusion",
        "Emphysema",
        "Enlarged Cardiomediastinum",
        "Fibrosis",
        "Fracture",
        "Hernia",
        "Infiltration",
        "Lung Lesion",
        "Lung Opacity",
        "Mass",
        "Nodule",
        "Pleural Effusion",
        "Pleural Other",
        "Pleural Thickening",
        "Pneumonia",
        "Pneumothorax",
        "Support Devices",
    }
)
"""Findings of the CheXpert labeller (Irvin et al. 2019) and of ChestX-ray14."""


def _label(cells: Mapping[str, str], request: Request) -> str | None:
    """No Finding → control, Pneumonia → non_covid_pneumonia, or all findings that are present; None where nothing is stated, or it is
    uncertain and ignored.
    """
    decided = {Uncertain.ignore: "", Uncertain.positive: "1", Uncertain.negative: "0"}[request.uncertain]
    stated = {name: _STATED.get(text, "").replace("?", decided) for name, text in cells.items() if name in _LABELLED or name == _NO_FINDING}
    if request.findings:
        present = sorted(name for name, one in stated.items() if one == "1" and name != _NO_FINDING)
        if not present and stated.get(_NO_FINDING) != "1":
            return None
        return _joined(present or [_NO_FINDING])
    if stated.get("Pneumonia") == "1":
        return "non_covid_pneumonia"
    return "control" if stated.get(_NO_FINDING) == "1" else None


def _uncertain(cells: Mapping[str, str], request: Request) -> Row:
    """Where all findings are kept, those that are uncertain, whatever they count as: `cxr train multilabel` learns nothing from these."""
    if not request.findings:
        return {}
    return {"uncertain": _joined(sorted(name for name, text in cells.items() if name in _LABELLED and _STATED.get(text) == "?"))}


def _joined(names: Sequence[str]) -> str:
    return SEPARATOR.join(name.lower().replace(" ", "_") for name in names)


def montgomery(request: Request) -> Iterator[Row]:
    """Montgomery County (Jaeger et al. 2014): `CXR_png/`, `ManualMask/leftMask` and `rightMask`, `ClinicalReadings/`."""
    for path in _films(request.root / "CXR_png", "MCUCXR_*.png"):
        halves = [request.root / "ManualMask" / f"{side}Mask" / path.name for side in ("left", "right")]
        facts = _reading(request.root / "ClinicalReadings" / f"{path.stem}.txt")
        sex, age = re.search(r"Sex:\s*([MF])", facts), re.search(r"Age:\s*0*(\d+)", facts)
        yield {
            **_tuberculosis_row(request, path, "montgomery"),
            "lung_mask_path": str(_joined_mask(halves, request.out, path.stem)),
            "mask_source": "montgomery",
            "sex": sex[1] if sex else "",
            "age": age[1] if age else "",
        }


def shenzhen(request: Request) -> Iterator[Row]:
    """Shenzhen (Jaeger et al. 2014): `CXR_png/`, `ClinicalReadings/`, and masks `mask/<name>_mask.png` (Stirenko et al. 2018)."""
    for path in _films(request.root / "CXR_png", "CHNCXR_*.png"):
        mask = request.root / "mask" / f"{path.stem}_mask.png"
        facts = _reading(request.root / "ClinicalReadings" / f"{path.stem}.txt").lower()
        age = re.search(r"(\d+)\s*y", facts)
        row = _tuberculosis_row(request, path, "shenzhen")
        row |= {"sex": "F" if "female" in facts else "M" if "male" in facts else "", "age": age[1] if age else ""}
        if mask.exists():  # a hundred films have none
            row |= {"lung_mask_path": str(mask), "mask_source": "shenzhen"}
        yield row


def _tuberculosis_row(request: Request, path: Path, source: str) -> Row:
    ill = {"0": "control", "1": "tuberculosis"}.get(path.stem[-1])
    if ill is None:
        raise ManifestError(f"{path.name}: neither _0 nor _1", expected="NAME_0.png (normal) or NAME_1.png (tuberculosis)", got=path.name)
    split = "extra" if ill == "tuberculosis" else _dealt(path.stem, request.val_share)
    return {"image_id": f"{source}-{path.stem}", "path": str(path), "label": ill, "patient_id": path.stem, "source": source, "split": split}


def jsrt(request: Request) -> Iterator[Row]:
    """JSRT (Shiraishi et al. 2000) `*.IMG` with the SCR masks (van Ginneken et al. 2006) `fold*/masks/{left,right} lung/*.gif`.

    The films, 2048×2048 big-endian 16-bit with low values white, become 8-bit PNG beside the manifest. A nodule is none
    of our classes: those films (JPCLN) go to the split `extra`, for segmentation.
    """
    for path in _films(request.root, "**/*.IMG"):
        raw = np.fromfile(path, dtype=">u2")
        if raw.size != _JSRT_SIDE**2:
            raise ManifestError(
                f"{path.name}: not a JSRT film", expected=f"{_JSRT_SIDE**2} 16-bit values", got=str(raw.size), next_step="fetch it again"
            )
        grey = 255.0 * (1.0 - np.minimum(raw, _JSRT_WHITE).astype(np.float32) / _JSRT_WHITE)
        png = _written(request.out.parent / "jsrt-images" / f"{path.stem}.png", grey.reshape(_JSRT_SIDE, _JSRT_SIDE).astype(np.uint8))
        halves = [next(iter(request.root.glob(f"fold*/masks/{side} lung/{path.stem}.gif")), Path()) for side in ("left", "right")]
        row = {
            "image_id": f"jsrt-{path.stem}",
            "path": str(png),
            "label": "control" if path.stem.startswith("JPCNN") else "nodule",
            "patient_id": path.stem,
            "source": "jsrt",
            "split": _dealt(path.stem, request.val_share) if path.stem.startswith("JPCNN") else "extra",
        }
        if all(half.is_file() for half in halves):
            row |= {"lung_mask_path": str(_joined_mask(halves, request.out, path.stem)), "mask_source": "scr"}
        yield row


READERS: Final[Mapping[str, Callable[[Request], Iterator[Row]]]] = {
    "covidx": covidx,
    "ieee8023": ieee8023,
    "folders": folders,
    "chexpert": chexpert,
    "mimic-cxr-jpg": mimic_cxr_jpg,
    "nih": nih,
    "montgomery": montgomery,
    "shenzhen": shenzhen,
    "jsrt": jsrt,
}


class Written(NamedTuple):
    """How many rows of each `split/label`, or `split/finding`, a manifest has, and which of its values are not plausible, or none that an
    ingest takes.
    """

    counts: dict[str, int]
    doubts: tuple[Doubt, ...]


def write_manifest(kind: str, request: Request) -> Written:
    """Writes the manifest, paths relative to its folder; nothing is written when anything is wrong.

    Raises:
        ManifestError: What the data set lacks, or a line that is not as its publisher describes.
    """
    rows = list(READERS[kind](request))
    if not rows:
        raise ManifestError(
            f"{request.root.name}: no usable radiograph",
            expected=(READERS[kind].__doc__ or kind).splitlines()[0],
            got="only rows without a frontal view or without a label of ours",
            next_step="check the folder" + ("; --uncertain says what a −1 counts as" if kind in ("chexpert", "mimic-cxr-jpg") else ""),
        )
    _refuse_straddlers(rows)
    here = request.out.resolve().parent
    for row in rows:
        for column in ("path", "lung_mask_path"):
            if row.get(column):
                row[column] = os.path.relpath(Path(row[column]).resolve(), here)
    columns = [*REQUIRED_COLUMNS, "patient_id", "source", "split"]
    columns += sorted({name for row in rows for name in row} - set(columns))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    here.mkdir(parents=True, exist_ok=True)
    request.out.write_text(text.getvalue(), "utf-8")
    kinds = [f"{row['split']}/{finding}" for row in rows for finding in findings_of(row["label"])]
    return Written({kind: kinds.count(kind) for kind in sorted(set(kinds))}, tuple(doubt for row in rows for doubt in _doubts(row)))


def _doubts(row: Row) -> list[Doubt]:
    try:
        words = parse_clinical({name: text for name, text in row.items() if text}).doubts
    except InputError as error:
        words = (str(error),)
    return [Doubt(row["image_id"], one) for one in words]


def _refuse_straddlers(rows: Sequence[Row]) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        splits.setdefault((row["source"], row["patient_id"]), set()).add(row["split"])
    both = sorted(patient for (_, patient), where in splits.items() if len(where) > 1)
    if both:
        raise ManifestError(
            "patients in more than one split",
            expected="each patient in one split only",
            got=", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else ""),
            next_step="correct the publisher's split files",
        )


def _dealt(patient: str, val_share: float) -> str:
    """Train or val by a hash of the patient's id."""
    return "val" if int(hashlib.sha256(patient.encode()).hexdigest()[:8], 16) < val_share * 0x1_0000_0000 else "train"


def _table(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row of a CSV, plain or gzipped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _missing(path.parent, path.name) from error
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text))
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if lacking:
        raise ManifestError(
            f"{path.name}: column {', '.join(lacking)} missing",
            expected=", ".join(columns),
            got=", ".join((reader.fieldnames or ())[:12]) or "an empty file",
            next_step="give the file as its publisher released it",
        )
    for cells in reader:
        yield reader.line_num, {name: (value or "").strip() for name, value in cells.items() if name}


def _one(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if not found:
        raise _missing(root, pattern)
    return found[0]


def _films(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise _missing(folder, pattern)
    return found


def _reading(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _joined_mask(halves: Sequence[Path], out: Path, name: str) -> Path:
    """Left and right lung as one mask, written beside the manifest."""
    masks = []
    for half in halves:
        if not half.is_file():
            raise _missing(half.parent, half.name)
        with Image.open(half) as image:
            masks.append(np.asarray(image.convert("L")) > 0)
    return _written(out.parent / "lung-masks" / f"{name}.png", np.where(np.logical_or(*masks), 255, 0).astype(np.uint8))


def _written(path: Path, grey: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(path)
    return path


def _existing(path: Path, listing: Path, number: int) -> Path:
    if path.is_file():
        return path
    raise ManifestError(
        f"{listing.name}, line {number}: names a file that is not there",
        expected=str(path),
        got="no such file",
        next_step="fetch the images, or give the release's top folder",
    )


def _missing(folder: Path, what: str) -> ManifestError:
    there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    return ManifestError(
        f"{folder}: {what} missing", expected=what, got=", ".join(there) or "nothing there", next_step="give the release's top folder"
    )


def _malformed(listing: Path, number: int, expected: str, got: str) -> ManifestError:
    return ManifestError(f"{listing.name}, line {number}: not understood", expected=expected, got=got[:120], next_step="correct that line")
