"""A hospital that was never seen: one source after another is left out of training, then asked about (`cxr train unseen`).

The gallery holds the other sources' train films, and so many of the source's own, drawn at random from its train rows; asked about are all
films of the source of patients who have lent none. Adapted (`retrieval/site.py`) is what other films of it, without their labels, have
taught; which labels it sees is told, and in which shares, as a hospital knows it, or only which.

Of a source in folds, only a quarter of its patients is left out of training and asked about, four times: a hospital that has sent films to
be learnt from, and has new patients. The others' films are in the gallery; adapted is by the other patients of the same quarter.

Nothing is chosen by the source that is left out: neither the iteration nor the length of training, nor anything of adapting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import LABELS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import RESAMPLES
from cxr_retrieval.evaluation.metrics import LabelledSet, balanced_accuracy, balanced_interval
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.site import BALANCE, NEAREST, deviation_of, fitted, normalised
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval_training.config import EmbedderConfig
from cxr_retrieval_training.embedding.train_embedder import left_out, train_embedder
from cxr_retrieval_training.report.balance import Described
from cxr_retrieval_training.report.figures import draw_unseen
from cxr_retrieval_training.report.page import table, with_interval
from cxr_retrieval_training.report.results import write_json

OWN: Final = (0, 5, 10, 30, 100, 300)
"""Labelled films of its own in the gallery, of each label."""
UNLABELLED: Final = 200
"""Described that adapting learns from, at most: half of what there is."""
DRAWS: Final = 5
FOLDS: Final = 4
LEAST: Final = 20
"""Described of a label that a source needs to be asked about it."""
_ASKED: Final = 10
"""Described of each label that must be left to ask about."""
WAYS: Final = ("as_it_is", "adapted", "adapted_to_labels")
IN_SOURCE: Final = "all-sources"


def leave_sources_out(
    config: EmbedderConfig,
    manifest: Manifest,
    segmenter: Path,
    out: Path,
    device: torch.device,
    sources: Sequence[str] = (),
    in_folds: Sequence[str] = (),
) -> Path:
    """Trains what is not trained yet, into a folder for each source and one for all; measures; writes unseen.json, unseen.md, unseen.png.

    Args:
        config: How each is trained; compares embedding and appearance.
        sources: Only these; by default every one of train with two labels that it has LEAST films of.
        in_folds: Of these, patients in FOLDS folds, too.

    Raises:
        UsageError: A source that cannot be asked about; a config that leaves something out itself, or has no appearance.
    """
    if config.leave_out_source is not None or not config.appearance_size or config.retrieve_with != "embedding":
        raise UsageError(
            "this config cannot be used here",
            expected="one that leaves no source out, and compares embedding and appearance",
            next_step="use the one that ships, `unseen`",
        )
    possible = askable(manifest)
    if wrong := [source for source in (*sources, *in_folds) if source not in possible]:
        raise UsageError(
            f"{wrong[0]} cannot be asked about",
            expected=f"a source of train with two labels of {LEAST} films each: {', '.join(possible) or 'there is none'}",
            next_step="name another",
        )

    def trained(name: str, how: EmbedderConfig) -> tuple[Described, Described]:
        if not (out / name / "embedder.pt").exists():
            train_embedder(how, manifest, segmenter, out / name, device)
        return described(out / name, manifest)

    found: dict[str, Any] = {"manifest_sha256": manifest.sha256, "config": config.model_dump(mode="json"), "sources": {}, "folds": {}}
    for source in sources or possible:
        without = config.model_copy(update={"leave_out_source": source})
        found["sources"][source] = asked_about(source, *trained(f"without-{source}", without))
        write_json(found, out / "unseen.json")
    for source in in_folds:
        folds = [config.model_copy(update={"leave_out_source": source, "leave_out_fold": (number, FOLDS)}) for number in range(FOLDS)]
        runs = [trained(f"{source}-fold-{number}", fold) for number, fold in enumerate(folds)]
        found["folds"][source] = asked_about_in_folds(source, runs, [_unseen(manifest, fold) for fold in folds])
        write_json(found, out / "unseen.json")
    found["in_source"] = in_source(*trained(IN_SOURCE, config))
    write_json(found, out / "unseen.json")
    draw_unseen(found, out / "unseen.png")
    page = out / "unseen.md"
    page.write_text(markdown(found), "utf-8")
    return page


def _unseen(manifest: Manifest, config: EmbedderConfig) -> set[str]:
    """The image_ids that a config leaves out of training."""
    rows = manifest.rows
    return {row.image_id for row, out in zip(rows, left_out(config, rows), strict=True) if out}


def askable(manifest: Manifest) -> list[str]:
    """Sources of train that hold LEAST films of two labels or more, in order of name."""
    rows = manifest.require(split="train", labels=LABELS)
    labels, sources = [row.label for row in rows], [row.source or "" for row in rows]
    return [source for source in sorted(set(sources)) if len(_labels_of(labels, sources, source)) > 1]


def described(folder: Path, manifest: Manifest) -> tuple[Described, Described]:
    """The films of train and val with the vectors of a finished run."""
    rows = {row.image_id: row for row in manifest.rows}
    found: list[Described] = []
    for split in ("train", "val"):
        with np.load(folder / f"vectors-{split}.npz") as stored:
            mine = [rows[image_id] for image_id in stored["image_ids"].tolist()]
            known = LabelledSet(
                [row.image_id for row in mine],
                stored["embedding"],
                [row.label for row in mine],
                [row.patient for row in mine],
                [row.source or "" for row in mine],
            )
            found.append(Described(known, stored["embedding"], stored["appearance"]))
    return found[0], found[1]


def in_source(train: Described, val: Described) -> dict[str, Any]:
    """Balanced accuracy on val where every source was trained on: whether the training was long enough to say something."""
    truth = np.array(val.known.labels)
    right = (_voted(_similarity(val, train, DEFAULT_BALANCE), train) == truth).astype(np.float64)
    return {"n": len(right), **_told("balanced_accuracy", right, truth, np.array(val.known.patients))}


def asked_about(source: str, train: Described, val: Described) -> dict[str, Any]:
    """One source, by a network that never saw it.

    Returns:
        `labels` with the `shares` that are told; `own`, for each number of films of its own a row: `n`, films asked about; for each of WAYS
        its balanced accuracy (a vote for another label is wrong), a film being right in as many of the draws as it was, with `_ci` over
        patients, and `_draws`, of each draw.
    """
    theirs = np.array(train.known.sources) == source
    others, lending = train[~theirs], train[theirs]
    labels = _labels_of(train.known.labels, train.known.sources, source)
    asked = lending.beside(val[np.array(val.known.sources) == source])
    asked = asked[np.isin(asked.known.labels, labels)]
    counts = {label: float(asked.known.labels.count(label)) for label in labels}
    rows: list[dict[str, Any]] = []
    for own in track(OWN, f"asked about {source}"):
        if all(counts[label] >= own + _ASKED and lending.known.labels.count(label) >= own for label in labels):
            rows.append(_row(own, others, lending, asked, counts))
    return {"labels": labels, "shares": normalised(counts), "own": rows}


def asked_about_in_folds(source: str, runs: Sequence[tuple[Described, Described]], unseen: Sequence[Collection[str]]) -> dict[str, Any]:
    """One source in folds: each film is asked about by the run (train and val) that left its patient's fold out.

    Args:
        unseen: Of each run, the image_ids of that fold.

    Returns:
        `labels`, `shares`, `n`; for each of WAYS its balanced accuracy, with `_ci` over patients.
    """
    first = runs[0][0].known.beside(runs[0][1].known)
    labels = _labels_of(runs[0][0].known.labels, runs[0][0].known.sources, source)
    counts = {label: float(sum(one == (label, source) for one in zip(first.labels, first.sources, strict=True))) for label in labels}
    right: dict[str, list[float]] = {way: [] for way in WAYS}
    truth: list[str] = []
    patients: list[str] = []
    for (train, val), names in zip(track(runs, f"{source} in folds"), unseen, strict=True):
        everything = train.beside(val)
        mine = np.array([name in names for name in everything.known.image_ids])
        gallery, fold = everything[~mine], everything[mine & np.isin(everything.known.labels, labels)]
        for patient in sorted(set(fold.known.patients)):
            chosen = np.array(fold.known.patients) == patient
            asked, others = fold[chosen], fold[~chosen]
            for way, voted in votes(gallery.beside(others), others, asked, counts).items():
                right[way] += (voted == np.array(asked.known.labels)).astype(np.float64).tolist()
            truth += asked.known.labels
            patients += asked.known.patients
    told: dict[str, Any] = {"labels": labels, "shares": normalised(counts), "n": len(truth)}
    for way, hits in right.items():
        told |= _told(way, np.array(hits), np.array(truth), np.array(patients))
    return told


def _row(own: int, others: Described, lending: Described, asked: Described, counts: Mapping[str, float]) -> dict[str, Any]:
    right: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    draws: dict[str, list[float]] = {way: [] for way in WAYS}
    known = {name: place for place, name in enumerate(asked.known.image_ids)}
    labels, patients = np.array(lending.known.labels), np.array(lending.known.patients)
    for number in range(DRAWS):
        random = np.random.default_rng([number, own])
        lent = np.concatenate([random.choice(np.flatnonzero(labels == label), own, replace=False) for label in counts])
        free = np.setdiff1d(np.flatnonzero(np.isin(labels, list(counts))), lent)
        free = free[~np.isin(patients[free], patients[lent])]
        unlabelled = random.choice(free, min(UNLABELLED, len(free) // 2), replace=False)
        strangers = asked[~np.isin(asked.known.patients, patients[np.concatenate([lent, unlabelled])])]
        truth = np.array(strangers.known.labels)
        for way, voted in votes(others.beside(lending[lent]), lending[unlabelled], strangers, counts).items():
            hits = (voted == truth).astype(np.float64)
            for name, hit in zip(strangers.known.image_ids, hits.tolist(), strict=True):
                right[way].setdefault(name, []).append(hit)
            draws[way].append(balanced_accuracy(hits, truth))
    told: dict[str, Any] = {"own": own, "n": len(right[WAYS[0]])}
    for way in WAYS:
        some = asked[np.array([known[name] for name in right[way]])].known
        values = np.array([np.mean(hits) for hits in right[way].values()])
        told |= {**_told(way, values, np.array(some.labels), np.array(some.patients)), f"{way}_draws": draws[way]}
    return told


def votes(gallery: Described, unlabelled: Described, asked: Described, shares: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """What is voted on each film, by each of WAYS; `shares` of the labels that the source holds."""
    said = {"adapted": normalised(shares), "adapted_to_labels": normalised(dict.fromkeys(shares, 1.0))}
    labels = sorted(shares)
    learnt, seen = _evidence(gallery, unlabelled, labels), _evidence(gallery, asked, labels)
    found = {"as_it_is": _voted(_similarity(asked, gallery, DEFAULT_BALANCE), gallery)}
    for way, wanted in said.items():
        offsets = fitted(learnt, np.array([wanted[label] for label in labels]), deviation_of(learnt))
        found[way] = np.array(labels)[(seen + offsets).argmax(axis=1)]
    return found


def _evidence(gallery: Described, films: Described, labels: Sequence[str]) -> NDArray[np.float64]:
    similarity = _similarity(films, gallery, BALANCE).astype(np.float64)
    columns = []
    for label in labels:
        mine = similarity[:, np.array(gallery.known.labels) == label]
        nearest = -np.sort(-mine, axis=1)[:, : min(NEAREST, mine.shape[1])]
        columns.append(np.ma.masked_less(nearest, -1.5).mean(axis=1).filled(-1.0))
    return np.stack(columns, axis=1)


def _similarity(asked: Described, gallery: Described, balance: float) -> NDArray[np.float32]:
    """`[asked, gallery]`, below all others where both films are of one patient. All at once: `Ranking` sorts a gallery for each film."""
    similarity = asked.at(balance).embeddings @ gallery.at(balance).embeddings.T
    similarity[np.equal.outer(np.array(asked.known.patients), np.array(gallery.known.patients))] = -2.0
    return similarity


def _voted(similarity: NDArray[np.float32], gallery: Described) -> NDArray[Any]:
    labels = gallery.known.labels
    top: list[list[int]] = np.argpartition(-similarity, min(DEFAULT_K, len(labels) - 1), axis=1)[:, :DEFAULT_K].tolist()
    return np.array(
        [weighted_vote([(labels[i], float(row[i])) for i in nearest]).label for row, nearest in zip(similarity, top, strict=True)]
    )


def _labels_of(labels: Sequence[str], sources: Sequence[str], source: str) -> list[str]:
    held = Counter(label for label, other in zip(labels, sources, strict=True) if other == source)
    return [label for label in LABELS if held[label] >= LEAST]


def _told(name: str, right: NDArray[np.float64], truth: NDArray[Any], patients: NDArray[Any]) -> dict[str, Any]:
    return {name: balanced_accuracy(right, truth), f"{name}_ci": balanced_interval(right, truth, patients)[0]}


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each source."""
    whole, iterations = found["in_source"], [sum(stage["iterations"] for stage in one["stages"]) for one in found["config"]["members"]]
    parts = [
        "# Hospitals never seen",
        f"Balanced accuracy, mean of {DRAWS} draws; brackets: 95 % intervals over patients ({RESAMPLES} resamples); after ± the deviation "
        f"of the draws. Trained without the source for {' and '.join(map(str, iterations))} iterations; the same training on all sources "
        f"reaches {with_interval(whole, 'balanced_accuracy')} on val. Research use only, not for diagnosis.",
    ]
    head = ["films asked about", "as it is", "adapted, shares told", "adapted, labels told"]
    for source, one in found["sources"].items():
        shares = ", ".join(f"{label} {share:.2f}" for label, share in one["shares"].items())
        lines = [
            [str(row["own"]), str(row["n"])] + [f"{with_interval(row, way)} ± {float(np.std(row[f'{way}_draws'])):.3f}" for way in WAYS]
            for row in one["own"]
        ]
        parts += [f"## {source} ({shares})", table(["own labelled films, of each label", *head], lines)]
    for source, one in found["folds"].items():
        line = [str(one["n"]), *(with_interval(one, way) for way in WAYS)]
        parts += [f"## {source}, {FOLDS} folds: other patients of it were learnt from", table(head, [line])]
    return "\n\n".join([*parts, "![The same as curves](unseen.png)"]) + "\n"
