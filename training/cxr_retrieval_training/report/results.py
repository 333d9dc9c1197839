"""What a sceptic would ask of trained embedders: `cxr train report`.

Reads the vectors that each run of `cxr train embedder` wrote, so any number of runs (recipes, ablations, baselines, sources
left out) are measured alike; the first is the one under report and is looked at more closely.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import EXTRA_SPLIT, Manifest, ManifestRow
from cxr_retrieval.contract import LABELS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import mean_interval
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking, balanced_accuracy, evaluate
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, blended
from cxr_retrieval.progress import track
from cxr_retrieval.radiograph.letterbox import pixel_digest
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval_training.checkpoints import load_checkpoint, on_device
from cxr_retrieval_training.config import EmbedderConfig
from cxr_retrieval_training.data.datasets import Images, load_images, load_lesion_masks
from cxr_retrieval_training.embedding.embedder import AttentionMapHead, Embedder
from cxr_retrieval_training.embedding.train_embedder import SPLITS, build_embedder, embed_all, load_embedder
from cxr_retrieval_training.report.balance import Described, along_the_dial
from cxr_retrieval_training.segmentation.lungs import find_lungs
from cxr_retrieval_training.segmentation.metrics import centre_prior, extent_correlation, pixel_auroc, pointing_hit, source_probe

LARGEST_K: Final = 30
"""Section 3.3.3 looks at k up to 30."""
NEAR_DUPLICATE: Final = 0.95
"""Correlation of 32×32 thumbnails above which two films are shown as a pair to look at."""
HALVINGS: Final = 5
"""Of an added label's patients."""
_THUMBNAIL: Final = 32
_STYLE_GREY: Final = 128
_HALF: Final = 128
"""Counts as lung by half or more."""


@dataclass(frozen=True)
class Run:
    """One finished training run: its config, and its vectors by split with the rows they belong to."""

    name: str
    folder: Path
    config: EmbedderConfig
    sets: Mapping[str, LabelledSet]


@dataclass(frozen=True)
class Pictures:
    """What one look at every film of a manifest leaves: image_ids and thumbnails (unit length) of train and val, and a digest of each
    film by image_id.
    """

    image_ids: Mapping[str, Sequence[str]]
    thumbnails: Mapping[str, NDArray[np.float32]]
    digests: Mapping[str, str]


def look_at(manifest: Manifest) -> Pictures:
    """Reads every film of the protocol, and those of split `extra`."""
    names: dict[str, list[str]] = {}
    thumbnails: dict[str, NDArray[np.float32]] = {}
    digests: dict[str, str] = {}
    for split in ("train", "val", EXTRA_SPLIT):
        rows = manifest.select(split=split, labels=None if split == EXTRA_SPLIT else LABELS)
        if not rows:
            continue
        images = load_images(rows, f"{split} thumbnails")
        names[split] = [row.image_id for row in rows]
        digests |= {row.image_id: pixel_digest(image) for row, image in zip(rows, images, strict=True)}
        small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images).float(), _THUMBNAIL).flatten(1).numpy()
        centred = small - small.mean(axis=1, keepdims=True)
        thumbnails[split] = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    return Pictures(names, thumbnails, digests)


def load_run(folder: Path, manifest: Manifest, pictures: Pictures) -> Run:
    """Raises UsageError when the run is not finished or belongs to another manifest."""
    state = load_checkpoint(folder / "embedder.pt", expected={"data_sha256": manifest.sha256})
    config = EmbedderConfig.model_validate(state["config"])
    rows = {row.image_id: row for row in manifest.rows}
    sets: dict[str, LabelledSet] = {}
    for split in ("train", "val", EXTRA_SPLIT):
        path = folder / f"vectors-{split}.npz"
        if not path.exists():
            if split == EXTRA_SPLIT:
                continue
            raise UsageError(f"{folder}: training is not finished", expected=path.name, got="no such file", next_step="run it to its end")
        with np.load(path) as stored:
            mine = [rows[image_id] for image_id in stored["image_ids"].tolist()]
            vectors = {name: stored[name] for name in stored.files if name != "image_ids"}
            kept = np.array([split == EXTRA_SPLIT or row.label in LABELS for row in mine])
            protocol = [row for row, keep in zip(mine, kept, strict=True) if keep]
            sets[split] = labelled(protocol, retrieved_with(config, vectors)[kept], pictures)
    return Run(folder.name, folder, config, sets)


def retrieved_with(config: EmbedderConfig, vectors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Of `vectors` by name what the config compares: features, or embedding and, where there is one, appearance at the default balance."""
    if config.retrieve_with == "features" or not config.appearance_size:
        return vectors[config.retrieve_with]
    return blended(vectors["embedding"], vectors["appearance"], DEFAULT_BALANCE)


def labelled(rows: Sequence[ManifestRow], vectors: NDArray[np.float32], pictures: Pictures) -> LabelledSet:
    """Vectors with what `evaluate` asks of their rows."""
    return LabelledSet(
        [row.image_id for row in rows],
        vectors,
        [row.label for row in rows],
        [row.patient for row in rows],
        [row.source or "" for row in rows],
        [pictures.digests[row.image_id] for row in rows],
    )


def report(manifest: Manifest, pictures: Pictures, segmenter: Path, folders: Sequence[Path], device: torch.device) -> dict[str, Any]:
    """All figures: `runs` by name, and `closer` for the first."""
    runs = [load_run(folder, manifest, pictures) for folder in folders]
    first = runs[0]
    network = load_embedder(first.folder / "embedder.pt", device)
    alike, unlike_any = near_duplicates(pictures)
    fresh = first.sets["val"][np.array([name in unlike_any for name in first.sets["val"].image_ids])]
    return {
        "manifest_sha256": manifest.sha256,
        "runs": {run.name: measure(run) for run in track(runs, "runs")},
        "closer": {
            "run": first.name,
            "k": k_sweep(first),
            "balance": dial(first, manifest, segmenter, device),
            "style_only": style_only(network, first, manifest, pictures, segmenter, device),
            "attention": attention_on_lesions(network, first.config, manifest, segmenter, device),
            "near_duplicates": {
                **alike,
                "overall_without_them": evaluate(first.sets["train"], fresh, k=DEFAULT_K, model_version=first.name)["overall"]
                if fresh.labels
                else None,
            },
        },
    }


def measure(run: Run) -> dict[str, Any]:
    """One run: retrieval of val from train, tuberculosis added to the gallery, and what the vectors know of the source."""
    train, val = run.sets["train"], run.sets["val"]
    out: dict[str, Any] = {
        "config": run.config.model_dump(mode="json"),
        "evaluation": evaluate(train, val, k=DEFAULT_K, model_version=run.name),
        "source_probe": source_probe((train.embeddings, train.labels, train.sources), (val.embeddings, val.labels, val.sources)),
    }
    if EXTRA_SPLIT in run.sets:
        extra = run.sets[EXTRA_SPLIT]
        added = evaluate(train.beside(extra), extra, k=DEFAULT_K, model_version=run.name)["overall"]
        still = evaluate(train.beside(extra), val, k=DEFAULT_K, model_version=run.name)["overall"]
        out["added_class"] = {
            "labels": sorted(set(extra.labels)),
            "n": added["n"],
            "recall_at": added["recall_at"],
            "recall_at_ci": added["recall_at_ci"],
            "accuracy": added["accuracy"],
            "val_balanced_accuracy_with_it": still["balanced_accuracy"],
            "half_left_out": half_left_out(train, val, extra),
        }
    return out


def half_left_out(train: LabelledSet, val: LabelledSet, extra: LabelledSet) -> dict[str, Any] | None:
    """An added label as it is in another hospital: half of its patients (of tuberculosis, groups of neighbouring files) are in the gallery,
    the other half is asked about; mean and, under `_draws`, each of HALVINGS draws.

    Returns:
        `recall_at_1` and `sensitivity` of what is asked about, and `least_recall_at_1` among the labels of val, asked about in the same
        gallery; none where there are under four patients.
    """
    patients = sorted(set(extra.patients))
    if len(patients) < 4:
        return None
    drawn: list[tuple[float, float, float]] = []
    for number in range(HALVINGS):
        asked = set(np.random.default_rng(number).permutation(patients)[: len(patients) // 2].tolist())
        chosen = np.array([patient in asked for patient in extra.patients])
        gallery = train.beside(extra[~chosen])
        added = evaluate(gallery, extra[chosen], k=DEFAULT_K, model_version="")["overall"]
        known = evaluate(gallery, val, k=DEFAULT_K, model_version="")["per_class"]
        drawn.append((added["recall_at"]["1"], added["accuracy"], min(one["recall_at"]["1"] for one in known.values())))
    names = ("recall_at_1", "sensitivity", "least_recall_at_1")
    values = dict(zip(names, zip(*drawn, strict=True), strict=True))
    return {name: float(np.mean(of)) for name, of in values.items()} | {f"{name}_draws": list(of) for name, of in values.items()}


def k_sweep(run: Run) -> dict[str, list[float]]:
    """Accuracy and balanced accuracy of the vote for k = 1…30 (section 3.3.3)."""
    train, val = run.sets["train"], run.sets["val"]
    truth = np.array(val.labels)
    voted = np.empty((LARGEST_K, len(truth)), dtype=object)
    ranking = Ranking(train, val)
    for query in range(len(truth)):
        order, similarity = ranking.of(query)
        ranked = [(train.labels[int(i)], float(s)) for i, s in zip(order[:LARGEST_K], similarity[:LARGEST_K], strict=True)]
        for k in range(1, LARGEST_K + 1):
            voted[k - 1, query] = weighted_vote(ranked[:k]).label
    correct = voted == truth
    return {
        "accuracy": correct.mean(axis=1).tolist(),
        "balanced_accuracy": [balanced_accuracy(row, truth) for row in correct],
    }


def dial(run: Run, manifest: Manifest, segmenter: Path, device: torch.device) -> dict[str, Any] | None:
    """`along_the_dial`; none of a run that compares something else."""
    if run.config.retrieve_with != "embedding" or not run.config.appearance_size:
        return None
    described: dict[str, Described] = {}
    for split, known in run.sets.items():
        with np.load(run.folder / f"vectors-{split}.npz") as stored:
            place = {name: i for i, name in enumerate(stored["image_ids"].tolist())}
            mine = [place[name] for name in known.image_ids]
            embeddings, appearances = stored["embedding"][mine], stored["appearance"][mine]
        rows = manifest.select(split=split, labels=LABELS) if split != EXTRA_SPLIT else ()
        lungs = find_lungs(segmenter, rows, split, device) if rows else None
        described[split] = Described(known, embeddings, appearances, lungs)
    return along_the_dial(described["train"], described["val"], described.get(EXTRA_SPLIT))


def style_only(
    network: Embedder,
    run: Run,
    manifest: Manifest,
    pictures: Pictures,
    segmenter: Path,
    device: torch.device,
    source: str = "radiography",
) -> dict[str, Any] | None:
    """The same pipeline within one source on lungs without anatomy: every lung pixel set to one grey, which leaves the outline,
    and lung pixels in random order, which leaves the distribution of grey values, too.
    """
    sets: dict[str, dict[str, LabelledSet]] = {name: {} for name in _WITHOUT_ANATOMY}
    for split in ("train", "val"):
        rows = manifest.select(split=split, labels=LABELS)
        mine = np.array([row.source == source for row in rows])
        if not mine.any():
            return None
        lungs = np.asarray(find_lungs(segmenter, rows, split, device)[mine])
        of_source = [row for row, keep in zip(rows, mine, strict=True) if keep]
        for name, change in _WITHOUT_ANATOMY.items():
            vectors = embed_all(network, change(lungs), device, f"{split} lungs {name}")
            sets[name][split] = labelled(of_source, retrieved_with(run.config, vectors), pictures)
    out: dict[str, Any] = {"source": source}
    for name, both in sets.items():
        overall = evaluate(both["train"], both["val"], k=DEFAULT_K, model_version=run.name)["overall"]
        out[name] = {key: overall[key] for key in ("n", "balanced_accuracy", "balanced_accuracy_ci")}
    return out


def blanked(lungs: Images) -> Images:
    """Every lung pixel of one grey."""
    grey = np.where(lungs[:, 1:] > 0, np.uint8(_STYLE_GREY), np.uint8(0))
    return np.concatenate([grey, lungs[:, 1:]], axis=1)


def shuffled(lungs: Images) -> Images:
    """Lung pixels in random order, each image's among themselves; the same order every time."""
    random = np.random.default_rng(0)
    out = lungs.copy()
    for pixels, share in out:
        inside = share > 0
        pixels[inside] = random.permutation(pixels[inside])
    return out


_WITHOUT_ANATOMY: Final[Mapping[str, Callable[[Images], Images]]] = {"blanked": blanked, "shuffled": shuffled}


def attention_on_lesions(
    network: Embedder, config: EmbedderConfig, manifest: Manifest, segmenter: Path, device: torch.device
) -> dict[str, Any] | None:
    """On images with drawn lesions, inside the lungs: pointing game, pixel AUROC, and whether attention covers more where lesions do;
    of ours, of the untrained network, and of the centre prior.

    On val, and on train as well where no lesion was shown in training.
    """
    rows: list[ManifestRow] = []
    found: list[Images] = []
    for split in ("val",) if config.lesion_weight else SPLITS:
        everything = manifest.select(split=split, labels=LABELS)
        chosen = [i for i, row in enumerate(everything) if row.fields.get("lesion_mask_path")]
        if chosen and config.attention:
            rows += [everything[i] for i in chosen]
            found.append(np.asarray(find_lungs(segmenter, everything, split, device)[chosen]))
    if not rows:
        return None
    lungs = np.concatenate(found)
    lesions = load_lesion_masks(rows)[:, 0] > 127
    torch.manual_seed(config.seed)
    untrained = build_embedder(config, [member.size for member in network.each()])
    on_device(untrained, device).eval()
    inside = lungs[:, 1] >= _HALF
    maps = {
        "trained": attention_maps(network, lungs, device),
        "untrained": attention_maps(untrained, lungs, device),
        "centre_prior": np.stack([centre_prior(mask) for mask in inside]),
    }
    patients = np.array([row.patient for row in rows])
    out: dict[str, Any] = {"n": len(rows), "supervised_by_lesions": config.lesion_weight > 0}
    for name, values in maps.items():
        hits = np.array([pointing_hit(one, lesion & mask) for one, lesion, mask in zip(values, lesions, inside, strict=True)])
        auroc = np.array([pixel_auroc(one, lesion, mask) or np.nan for one, lesion, mask in zip(values, lesions, inside, strict=True)])
        out[name] = {
            "hit_rate": _with_interval(hits, patients),
            "pixel_auroc": _with_interval(auroc[~np.isnan(auroc)], patients[~np.isnan(auroc)]),
            "extent": extent_correlation(values, lesions, inside, patients),
        }
    out["lesion_share_of_lung"] = float(np.mean([(lesion & mask).sum() / mask.sum() for lesion, mask in zip(lesions, inside, strict=True)]))
    return out


def _with_interval(values: NDArray[np.float64], patients: NDArray[np.generic]) -> dict[str, Any]:
    return {"mean": float(values.mean()), "ci": mean_interval(values, patients)}


@torch.inference_mode()
def attention_maps(network: Embedder, lungs: Images, device: torch.device) -> NDArray[np.float32]:
    """ATTENTION_MAP `[n, 256, 256]` as the server gives it."""
    head = AttentionMapHead()
    batches = [torch.from_numpy(lungs[start : start + 16]).to(device) for start in range(0, len(lungs), 16)]
    maps = [head(network(batch)[3], (batch[:, 1:] >= _HALF).to(torch.uint8) * 255)[0][:, 0].cpu() for batch in batches]
    return torch.cat(maps).numpy()


def near_duplicates(pictures: Pictures) -> tuple[dict[str, Any], frozenset[str]]:
    """Pairs across train and val whose thumbnails correlate above 0.95, for a person to look at; and the val images in none."""
    thumbnails, names = pictures.thumbnails, pictures.image_ids
    correlation = thumbnails["val"] @ thumbnails["train"].T
    pairs = np.argwhere(correlation > NEAR_DUPLICATE)
    found = sorted(((float(correlation[i, j]), names["val"][i], names["train"][j]) for i, j in pairs), reverse=True)
    doubled = {val for _, val, _ in found}
    summary = {
        "threshold": NEAR_DUPLICATE,
        "n": len(found),
        "val_images": len(doubled),
        "pairs": [{"correlation": round(value, 4), "val": val, "train": train} for value, val, train in found[:50]],
    }
    return summary, frozenset(names["val"]) - doubled


def write_json(figures: Mapping[str, Any], path: Path) -> None:
    """The figures, for machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
