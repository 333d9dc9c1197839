"""A hospital that was never seen: one source after another is left out of training, then asked about (`cxr train unseen`).

The gallery holds the other sources' train films, and so many of the source's own, drawn at random from its train rows; asked about are all
films of the source of patients who have lent none. Adapted (`retrieval/site.py`) is what other films of it, without their labels, have
taught; which labels it sees is told, and in which shares, as a hospital knows it, or only which.

Of a source in folds, only a quarter of its patients is left out of training and asked about, four times: a hospital that has sent films to
be learnt from, and has new patients. The others' films are in the gallery; adapted is by the other patients of the same quarter.

Nothing is chosen by the source that is left out: neither the iteration nor the length of training, nor anything of adapting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.contract import LABELS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import RESAMPLES
from cxr_retrieval.evaluation.metrics import balanced_interval
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, blended
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.site import BALANCE, NEAREST, deviation_of, fitted, normalised
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval_training.config import EmbedderConfig
from cxr_retrieval_training.embedding.ablations import FOLDS
from cxr_retrieval_training.embedding.train_embedder import left_out, train_embedder
from cxr_retrieval_training.report.figures import draw_unseen
from cxr_retrieval_training.report.results import write_json

OWN: Final = (0, 5, 10, 30, 100, 300)
"""Labelled films of its own in the gallery, of each label."""
UNLABELLED: Final = 200
"""Films that adapting learns from, at most: half of what there is."""
DRAWS: Final = 5
LEAST: Final = 20
"""Films of a label that a source needs to be asked about it."""
_ASKED: Final = 10
"""Films of each label that must be left to ask about."""
WAYS: Final = ("as_it_is", "adapted", "adapted_to_labels")
IN_SOURCE: Final = "all-sources"

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Films:
    """Rows with their EMBEDDING `[n, e]` and APPEARANCE `[n, a]`."""

    rows: Sequence[ManifestRow]
    embeddings: Vectors
    appearances: Vectors

    @property
    def labels(self) -> NDArray[Any]:
        """`[n]`."""
        return np.array([row.label for row in self.rows])

    @property
    def patients(self) -> NDArray[Any]:
        """`[n]`, as keys that are equal for one patient."""
        return np.array([row.patient for row in self.rows])

    def at(self, balance: float) -> Vectors:
        """As they are compared at a balance."""
        return blended(self.embeddings, self.appearances, balance)

    def __getitem__(self, chosen: NDArray[Any]) -> Films:
        """Some of them, by index."""
        index: list[int] = chosen.tolist()
        return Films([self.rows[i] for i in index], self.embeddings[chosen], self.appearances[chosen])


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

    def trained(name: str, how: EmbedderConfig) -> tuple[Films, Films]:
        if not (out / name / "embedder.pt").exists():
            train_embedder(how, manifest, segmenter, out / name, device)
        return described(out / name, manifest)

    found: dict[str, Any] = {"manifest_sha256": manifest.sha256, "config": config.model_dump(mode="json"), "sources": {}, "folds": {}}
    for source in sources or possible:
        found["sources"][source] = asked_about(
            source, *trained(f"without-{source}", config.model_copy(update={"leave_out_source": source}))
        )
        write_json(found, out / "unseen.json")
    for source in in_folds:
        runs = [trained(f"{source}-fold-{number}", _in_fold(config, source, number)) for number in range(FOLDS)]
        found["folds"][source] = asked_about_in_folds(source, config, runs)
        write_json(found, out / "unseen.json")
    found["in_source"] = in_source(*trained(IN_SOURCE, config))
    write_json(found, out / "unseen.json")
    draw_unseen(found, out / "unseen.png")
    page = out / "unseen.md"
    page.write_text(markdown(found), "utf-8")
    return page


def _in_fold(config: EmbedderConfig, source: str, number: int) -> EmbedderConfig:
    return config.model_copy(update={"leave_out_source": source, "leave_out_fold": (number, FOLDS)})


def askable(manifest: Manifest) -> list[str]:
    """Sources of train that hold LEAST films of two labels or more, in order of name."""
    rows = manifest.require(split="train", labels=LABELS)
    return [source for source in sorted({row.source or "" for row in rows}) if len(_labels_of(rows, source)) > 1]


def described(folder: Path, manifest: Manifest) -> tuple[Films, Films]:
    """The films of train and val with the vectors of a finished run."""
    rows = {row.image_id: row for row in manifest.rows}
    found: list[Films] = []
    for split in ("train", "val"):
        with np.load(folder / f"vectors-{split}.npz") as stored:
            mine = [rows[image_id] for image_id in stored["image_ids"].tolist()]
            found.append(Films(mine, stored["embedding"], stored["appearance"]))
    return found[0], found[1]


def in_source(train: Films, val: Films) -> dict[str, Any]:
    """Balanced accuracy on val where every source was trained on: whether the training was long enough to say something."""
    similarity = _unrelated(val.at(DEFAULT_BALANCE) @ train.at(DEFAULT_BALANCE).T, val, train)
    right = (_voted(similarity, train.labels) == val.labels).astype(np.float64)
    return {"n": len(right), **_told(right, val.labels, val.patients)}


def asked_about(source: str, train: Films, val: Films) -> dict[str, Any]:
    """One source, by a network that never saw it.

    Returns:
        `labels` with the `shares` that are told; `own`, for each number of films of its own a row: `n`, films asked about; for each of WAYS
        its balanced accuracy (a vote for another label is wrong), a film being right in as many of the draws as it was, with `_ci` over
        patients, and `_draws`, of each draw.
    """
    theirs = [row.source == source for row in train.rows]
    others, lending = train[np.flatnonzero(~np.array(theirs))], train[np.flatnonzero(theirs)]
    labels = _labels_of(train.rows, source)
    asked = _joined(lending, val[np.flatnonzero([row.source == source for row in val.rows])])
    asked = asked[np.flatnonzero(np.isin(asked.labels, labels))]
    counts = {label: float((asked.labels == label).sum()) for label in labels}
    rows: list[dict[str, Any]] = []
    for own in track(OWN, f"asked about {source}"):
        if all(counts[label] >= own + _ASKED and (lending.labels == label).sum() >= own for label in labels):
            rows.append(_row(own, others, lending, asked, counts))
    return {"labels": labels, "shares": normalised(counts), "own": rows}


def asked_about_in_folds(source: str, config: EmbedderConfig, runs: Sequence[tuple[Films, Films]]) -> dict[str, Any]:
    """One source in folds: each film is asked about by the run (train and val) that left its patient's fold out.

    Returns:
        `labels`, `shares`, `n`; for each of WAYS its balanced accuracy, with `_ci` over patients.
    """
    labels = _labels_of(runs[0][0].rows, source)
    theirs = [row.label for films in runs[0] for row in films.rows if row.source == source]
    counts = {label: float(theirs.count(label)) for label in labels}
    right: dict[str, list[float]] = {way: [] for way in WAYS}
    asked_rows: list[ManifestRow] = []
    for number, (train, val) in enumerate(track(runs, f"{source} in folds")):
        everything = _joined(train, val)
        mine = left_out(_in_fold(config, source, number), everything.rows)
        gallery, fold = everything[np.flatnonzero(~mine)], everything[np.flatnonzero(mine & np.isin(everything.labels, labels))]
        for patient in sorted(set(fold.patients.tolist())):
            chosen = fold.patients == patient
            asked, others = fold[np.flatnonzero(chosen)], fold[np.flatnonzero(~chosen)]
            for way, voted in votes(_joined(gallery, others), others, asked, counts).items():
                right[way] += (voted == asked.labels).astype(np.float64).tolist()
            asked_rows += asked.rows
    truth, patients = np.array([row.label for row in asked_rows]), np.array([row.patient for row in asked_rows])
    told: dict[str, Any] = {"labels": labels, "shares": normalised(counts), "n": len(truth)}
    for way, hits in right.items():
        told[way] = _balanced(np.array(hits), truth)
        told[f"{way}_ci"] = balanced_interval(np.array(hits), truth, patients)[0]
    return told


def _row(own: int, others: Films, lending: Films, asked: Films, counts: Mapping[str, float]) -> dict[str, Any]:
    right: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    draws: dict[str, list[float]] = {way: [] for way in WAYS}
    known = {row.image_id: (row.label, row.patient) for row in asked.rows}
    for number in range(DRAWS):
        random = np.random.default_rng([number, own])
        lent = _drawn(lending, list(counts), own, random)
        free = np.setdiff1d(np.flatnonzero(np.isin(lending.labels, list(counts))), lent)
        free = free[~np.isin(lending.patients[free], lending.patients[lent])]
        unlabelled = random.choice(free, min(UNLABELLED, len(free) // 2), replace=False)
        lenders = set(lending.patients[np.concatenate([lent, unlabelled])].tolist())
        strangers = asked[np.flatnonzero([patient not in lenders for patient in asked.patients.tolist()])]
        gallery = _joined(others, lending[lent])
        for way, voted in votes(gallery, lending[unlabelled], strangers, counts).items():
            hits = (voted == strangers.labels).astype(np.float64)
            for row, hit in zip(strangers.rows, hits.tolist(), strict=True):
                right[way].setdefault(row.image_id, []).append(hit)
            draws[way].append(_balanced(hits, strangers.labels))
    told: dict[str, Any] = {"own": own, "n": len(right[WAYS[0]])}
    for way in WAYS:
        values = np.array([np.mean(hits) for hits in right[way].values()])
        truth, patients = (np.array([known[name][i] for name in right[way]]) for i in (0, 1))
        told[way] = _balanced(values, truth)
        told[f"{way}_ci"], told[f"{way}_draws"] = balanced_interval(values, truth, patients)[0], draws[way]
    return told


def votes(gallery: Films, unlabelled: Films, asked: Films, shares: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    """What is voted on each film, by each of WAYS; `shares` of the labels that the source holds."""
    similarity = _unrelated(asked.at(DEFAULT_BALANCE) @ gallery.at(DEFAULT_BALANCE).T, asked, gallery)
    said = {"adapted": normalised(shares), "adapted_to_labels": normalised(dict.fromkeys(shares, 1.0))}
    return {
        "as_it_is": _voted(similarity, gallery.labels),
        **{way: _adapted(gallery, unlabelled, asked, wanted) for way, wanted in said.items()},
    }


def _adapted(gallery: Films, unlabelled: Films, asked: Films, shares: Mapping[str, float]) -> NDArray[Any]:
    labels = sorted(shares)
    learnt, seen = _evidence(gallery, unlabelled, labels), _evidence(gallery, asked, labels)
    offsets = fitted(learnt, np.array([shares[label] for label in labels]), deviation_of(learnt))
    return np.array(labels)[(seen + offsets).argmax(axis=1)]


def _evidence(gallery: Films, films: Films, labels: Sequence[str]) -> NDArray[np.float64]:
    similarity = _unrelated(films.at(BALANCE) @ gallery.at(BALANCE).T, films, gallery).astype(np.float64)
    columns = []
    for label in labels:
        mine = similarity[:, gallery.labels == label]
        nearest = -np.sort(-mine, axis=1)[:, : min(NEAREST, mine.shape[1])]
        columns.append(np.ma.masked_less(nearest, -1.5).mean(axis=1).filled(-1.0))
    return np.stack(columns, axis=1)


def _unrelated(similarity: Vectors, asked: Films, gallery: Films) -> Vectors:
    """Similarities `[asked, gallery]`, beyond all others where both films are of one patient."""
    similarity[np.equal.outer(asked.patients, gallery.patients)] = -2.0
    return similarity


def _voted(similarity: Vectors, labels: NDArray[Any]) -> NDArray[Any]:
    top = np.argpartition(-similarity, min(DEFAULT_K, len(labels) - 1), axis=1)[:, :DEFAULT_K]
    return np.array(
        [weighted_vote([(str(labels[i]), float(row[i])) for i in nearest]).label for row, nearest in zip(similarity, top, strict=True)]
    )


def _drawn(lending: Films, labels: Sequence[str], own: int, random: np.random.Generator) -> NDArray[np.int64]:
    some = [random.choice(np.flatnonzero(lending.labels == label), own, replace=False) for label in labels]
    return np.concatenate(some)


def _labels_of(rows: Sequence[ManifestRow], source: str) -> list[str]:
    mine = [row.label for row in rows if row.source == source]
    return [label for label in LABELS if mine.count(label) >= LEAST]


def _joined(a: Films, b: Films) -> Films:
    return Films([*a.rows, *b.rows], np.concatenate([a.embeddings, b.embeddings]), np.concatenate([a.appearances, b.appearances]))


def _balanced(hits: NDArray[np.float64], truth: NDArray[Any]) -> float:
    return float(np.mean([hits[truth == label].mean() for label in np.unique(truth)]))


def _told(right: NDArray[np.float64], truth: NDArray[Any], patients: NDArray[Any]) -> dict[str, Any]:
    return {"balanced_accuracy": _balanced(right, truth), "balanced_accuracy_ci": balanced_interval(right, truth, patients)[0]}


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each source."""
    whole, iterations = found["in_source"], [sum(stage["iterations"] for stage in one["stages"]) for one in found["config"]["members"]]
    parts = [
        "# Hospitals never seen",
        f"Balanced accuracy, mean of {DRAWS} draws; brackets: 95 % intervals over patients ({RESAMPLES} resamples); after ± the deviation "
        f"of the draws. Trained without the source for {' and '.join(map(str, iterations))} iterations; the same training on all sources "
        f"reaches {_figure(whole['balanced_accuracy'], whole['balanced_accuracy_ci'])} on val. Research use only, not for diagnosis.",
    ]
    for source, one in found["sources"].items():
        shares = ", ".join(f"{label} {share:.2f}" for label, share in one["shares"].items())
        lines = [
            [str(row["own"]), str(row["n"])]
            + [f"{_figure(row[way], row[f'{way}_ci'])} ± {float(np.std(row[f'{way}_draws'])):.3f}" for way in WAYS]
            for row in one["own"]
        ]
        head = ["own labelled films, of each label", "films asked about", "as it is", "adapted, shares told", "adapted, labels told"]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
        parts += [f"## {source} ({shares})", table]
    for source, one in found["folds"].items():
        cells = [str(one["n"]), *(_figure(one[way], one[f"{way}_ci"]) for way in WAYS)]
        head = ["films asked about", "as it is", "adapted, shares told", "adapted, labels told"]
        table = "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), cells))
        parts += [f"## {source}, {FOLDS} folds: other patients of it were learnt from", table]
    return "\n\n".join([*parts, "![The same as curves](unseen.png)"]) + "\n"


def _figure(value: float, bounds: Sequence[float] | None) -> str:
    return f"{value:.3f} " + ("–" if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]")
