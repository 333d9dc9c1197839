"""`cxr manifest`: reads its options, calls the library, prints."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cxr_retrieval.cli.console import print_doubts, talk
from cxr_retrieval.errors import UsageError


class Kind(str, Enum):
    """Data sets that are read (`public_sets.READERS`)."""

    covidx = "covidx"
    ieee8023 = "ieee8023"
    folders = "folders"
    chexpert = "chexpert"
    mimic_cxr_jpg = "mimic-cxr-jpg"
    nih = "nih"
    montgomery = "montgomery"
    shenzhen = "shenzhen"
    jsrt = "jsrt"


class UncertainLabel(str, Enum):
    """What a -1 counts as (`public_sets.Uncertain`)."""

    ignore = "ignore"
    positive = "positive"
    negative = "negative"


def manifest(
    kind: Annotated[Kind, typer.Argument(help="The data set's publisher's form; folders: one folder for each label.")],
    root: Annotated[Path, typer.Argument(help="The release's top folder.")],
    out: Annotated[Path, typer.Option(help="CSV to write; images are named relative to its folder.")],
    uncertain: Annotated[UncertainLabel, typer.Option(help="What CheXpert's -1 counts as.")] = UncertainLabel.ignore,
    findings: Annotated[
        bool,
        typer.Option("--findings", help="Of chexpert, mimic-cxr-jpg and nih: label films with all their findings, 'edema|pneumonia'."),
    ] = False,
    val_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of patients for val, where the publisher gives no split.")
    ] = 0.15,
) -> None:
    """Turn folders of images, or a public data set as its publisher releases it, into the one manifest."""
    from cxr_retrieval.cases.public_sets import Request, Uncertain, write_manifest

    if findings and kind not in (Kind.chexpert, Kind.mimic_cxr_jpg, Kind.nih):
        raise UsageError(
            f"--findings with {kind.value}",
            expected="a data set whose films have several: chexpert, mimic-cxr-jpg, nih",
            next_step="leave it out",
        )
    counts, doubts = write_manifest(kind.value, Request(root, out, Uncertain(uncertain.value), val_share, findings))
    talk().print("\n".join(f"{count:7d}  {name}" for name, count in counts.items()))
    print_doubts(doubts, len(doubts))
    typer.echo(out)
