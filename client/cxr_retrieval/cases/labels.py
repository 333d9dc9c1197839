"""A case's label: one finding, or several in one text, as `effusion|consolidation`, for a film may show more (Haq et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

SEPARATOR: Final = "|"


def findings_of(label: str) -> tuple[str, ...]:
    """Each once, in the order in which they stand."""
    return tuple(dict.fromkeys(one.strip() for one in label.split(SEPARATOR) if one.strip()))


def of_several(labels: Iterable[str]) -> bool:
    """Whether any of these labels holds more than one finding."""
    return any(len(findings_of(label)) > 1 for label in labels)


def shares_of_findings(shares: Mapping[str, float]) -> dict[str, float]:
    """Label → share, to finding → sum of the shares of the labels that hold it, the greatest first. In all they may come to more than 1."""
    found: dict[str, float] = {}
    for label, share in shares.items():
        for finding in findings_of(label):
            found[finding] = found.get(finding, 0.0) + share
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))
