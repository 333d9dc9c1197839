"""The page of `cxr train multimodal`: what is found for what, in four directions, and what reports that are missing cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxr_retrieval.evaluation.gains import gains_of_each
from cxr_retrieval.evaluation.intervals import in_brackets, weighted_interval, weights_of
from cxr_retrieval_training.multimodal.cases import Cases

mpl.use("Agg")

AT: Final = (1, 5, 10)
_FOUND_FOR: Final = 10
"""Cases of which ACGp is the mean."""
_SAID: Final = {
    "features": "film → film, by features as they came",
    "image_image": "film → film",
    "image_text": "film → report",
    "text_image": "text → film",
    "text_text": "text → report",
    "both_image": "film and text → film",
    "chance": "by chance",
}

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Direction:
    """What was found for each question in one direction.

    Attributes:
        recall: `[q, 3]`: whether a case with just the same labels is among the first of AT.
        precision: `[q]` average precision of those cases. acg_p: `[q]` of the first ten.
    """

    name: str
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    acg_p: NDArray[np.float64]
    patients: NDArray[np.generic]

    @staticmethod
    def joined(parts: Sequence[Direction]) -> Direction:
        """The same direction of several folds."""
        return Direction(
            parts[0].name, *(np.concatenate([getattr(one, name) for one in parts]) for name in ("recall", "precision", "acg_p", "patients"))
        )


def retrieved(
    gallery: Cases, queries: Cases, images: Callable[[Floats], Floats], texts: Callable[[Sequence[str]], Floats]
) -> list[Direction]:
    """What is found for each query, all of which have a report, in a gallery, none of the query's own patient. Where reports are sought,
    only cases that have one.
    """
    told = np.array([bool(text) for text in gallery.texts])
    found = {"image": images(gallery.features), "text": texts(gallery.texts)}
    asked = {"image": images(queries.features), "text": texts(queries.texts)}
    both = 0.5 * (asked["image"] + asked["text"])
    similarities: dict[str, NDArray[np.floating[Any]]] = {
        "features": queries.features @ gallery.features.T,
        "image_image": asked["image"] @ found["image"].T,
        "image_text": np.where(told, asked["image"] @ found["text"].T, -np.inf),
        "text_image": asked["text"] @ found["image"].T,
        "text_text": np.where(told, asked["text"] @ found["text"].T, -np.inf),
        "both_image": both @ found["image"].T,
        "chance": np.random.default_rng(0).random((len(queries.rows), len(gallery.rows))),
    }
    if not told.any():
        del similarities["image_text"], similarities["text_text"]
    own = np.equal.outer(queries.patients, gallery.patients)
    return [_direction(name, np.where(own, -np.inf, similarity), gallery, queries) for name, similarity in similarities.items()]


def _direction(name: str, similarity: NDArray[np.floating[Any]], gallery: Cases, queries: Cases) -> Direction:
    order = np.argsort(-similarity, axis=1, kind="stable")
    reach = np.isfinite(np.take_along_axis(similarity, order, axis=1))
    same = (queries.truth[:, None, :] == gallery.truth[None, :, :]).all(axis=2)
    hits = np.take_along_axis(same, order, axis=1) & reach
    ranks = np.arange(1, hits.shape[1] + 1)
    total = hits.sum(axis=1)
    precision = (hits * (np.cumsum(hits, axis=1) / ranks)).sum(axis=1) / np.maximum(total, 1)
    recall = np.stack([hits[:, :k].any(axis=1) for k in AT], axis=1)
    first = [row[there][:_FOUND_FOR] for row, there in zip(order, reach, strict=True)]
    gains = gains_of_each(queries.truth, [gallery.truth[one] for one in first])
    return Direction(name, recall.astype(np.float64), precision, gains[:, 1], queries.patients)


def figures(directions: Sequence[Direction]) -> list[dict[str, Any]]:
    """Means of each direction, with 95 % intervals over patients; keys as in `multimodal.json`."""
    found = []
    for one in directions:
        weights = weights_of(one.patients)
        values = {**{f"recall_at_{k}": one.recall[:, number] for number, k in enumerate(AT)}, "map": one.precision, "acg_p": one.acg_p}
        means = {name: float(value.mean()) for name, value in values.items()}
        cis = {f"{name}_ci": weighted_interval(value, weights) for name, value in values.items()}
        found.append({"direction": one.name, "n": len(one.precision), **means, **cis})
    return found


def draw_shares(told: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """MAP of each direction against the share of films whose report is there."""
    figure = Figure((6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(("image_image", "image_text", "text_image", "both_image")):
        rows = [(float(share), next(one for one in found if one["direction"] == name)) for share, found in told.items()]
        rows = [row for row in rows if row[0] > 0 or name == "image_image"]
        shares, values = [100 * share for share, _ in rows], [one["map"] for _, one in rows]
        axes.plot(shares, values, marker="o", label=_SAID[name], color=f"C{number}")
        if all(one["map_ci"] for _, one in rows):
            low, high = zip(*(one["map_ci"] for _, one in rows), strict=True)
            axes.fill_between(shares, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
    axes.set(xlabel="films with a report, %", ylabel="mAP", title="what missing reports cost")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def markdown(about: Mapping[str, Any], told: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        about: What the checkpoint says of itself. told: Share of the reports → `figures`.
    """
    folds = about["config"]["folds"]
    how = (
        f"All films with a report were asked about in {folds} folds, whole patients each, by networks that learnt without them"
        if folds
        else f"Asked about: the {about['with_report']['val']} val films with a report, once"
    )
    films, reports = about["films"], about["with_report"]
    words = ", ".join(about["config"]["hidden"])
    hidden = f"Words that were hidden: {words}." if words else "No word was hidden."
    shares = [f"| {100 * float(share):.0f} % | {_cells(_of(found, 'image_image'))} |" for share, found in told.items()]
    return (
        "\n\n".join(
            [
                "# Films and reports",
                f"Research use only, not for diagnosis. {films['train']} train films, {reports['train']} of them with a report "
                f"(column {about['text_column']}), {about['reports_alone']} reports without a film; labels of column {about['column']}. "
                f"{how}; relevant is a case with just the same labels of column {about['judged_by']}, ACGp is of the first {_FOUND_FOR}. "
                f"In brackets 95 % by bootstrap over patients. {hidden}",
                retrieval_table(told["1.0"]),
                "## Reports that are missing",
                "![mAP against the share of reports](shares.png)",
                "Film → film, by the share of train films whose report was learnt from:",
                "\n".join([f"| reports | {_HEAD} |", f"|---|{'---|' * 5}", *shares]),
            ]
        )
        + "\n"
    )


_HEAD: Final = "recall@1 | recall@5 | recall@10 | mAP | ACGp"


def retrieval_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of `figures`."""
    lines = [f"| direction | {_HEAD} |", f"|---|{'---|' * 5}"]
    return "\n".join([*lines, *(f"| {_SAID[one['direction']]} | {_cells(one)} |" for one in found)])


def _of(found: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(one for one in found if one["direction"] == name)


def _cells(one: Mapping[str, Any]) -> str:
    names = (*(f"recall_at_{k}" for k in AT), "map", "acg_p")
    return " | ".join(f"{one[name]:.3f}{in_brackets(one[f'{name}_ci'])}" for name in names)
