"""Which gallery is which: one collection for each model version, and the aliases that say what they are for.

The alias `cxr` points to *the* gallery, for tools that look at it from outside and for what is to be copied from it. A client never
asks through it: it opens the collection of the version that its Triton announces. The alias `filling_<collection>` marks one that
`cxr reindex` has begun and not ended: nobody is answered from half a gallery.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Final

from pymilvus.exceptions import MilvusException

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.milvus import connected, silent
from cxr_retrieval.settings import MilvusSettings, SpaceName

ALIAS: Final = "cxr"
PREFIX: Final = "cxr_"
"""Of every gallery's collection; its model version follows."""


def collection_of(model_version: str) -> str:
    """The name of a model version's collection."""
    return f"{PREFIX}{re.sub(r'[^0-9A-Za-z_]', '_', model_version)}"


def galleries(client: Any, timeout_s: float) -> dict[str, list[str]]:
    """Collection → its aliases, in order of name."""
    return {name: aliases_of(client, name, timeout_s) for name in gallery_names(client, timeout_s)}


def gallery_names(client: Any, timeout_s: float) -> list[str]:
    """The galleries' collections, in order of name."""
    return sorted(name for name in client.list_collections(timeout=timeout_s) if name.startswith(PREFIX))


def aliases_of(client: Any, collection: str, timeout_s: float) -> list[str]:
    """What points to it."""
    return list(client.list_aliases(collection, timeout=timeout_s)["aliases"])


def the_gallery(client: Any, timeout_s: float) -> str | None:
    """Where the alias `cxr` points; None without one."""
    return next((name for name, aliases in galleries(client, timeout_s).items() if ALIAS in aliases), None)


def point(client: Any, collection: str, timeout_s: float) -> None:
    """Points the alias `cxr` at a collection, at once: whoever asks through it meets the former or this one."""
    if the_gallery(client, timeout_s) is None:
        with suppress(MilvusException), silent("pymilvus.decorators"):  # another client may have been first
            client.create_alias(collection, ALIAS, timeout=timeout_s)
            return
    client.alter_alias(collection, ALIAS, timeout=timeout_s)


def is_filling(client: Any, collection: str, timeout_s: float) -> bool:
    """Whether a reindex has begun it and not ended."""
    return filling(collection) in aliases_of(client, collection, timeout_s)


def filling(collection: str) -> str:
    """The mark."""
    return f"filling_{collection}"


def list_galleries(settings: MilvusSettings) -> dict[str, list[str]]:
    """As `galleries`.

    Raises:
        StoreError: As `connect`.
    """
    with connected(settings) as client:
        return galleries(client, settings.timeout_s)


def the_version(settings: MilvusSettings, space: SpaceName = SpaceName.film) -> str:
    """The model version of the gallery that the alias `cxr` points to; in another space, that of the only gallery there.

    Raises:
        UsageError: It points to none; in that space there is none, or more than one.
        StoreError: Not reachable.
    """
    known = list_galleries(settings)
    if space is not SpaceName.film:
        there = [name for name in known if name.startswith(f"{PREFIX}{space.value}_")]
        if len(there) == 1:
            return there[0].removeprefix(PREFIX)
        raise UsageError(
            f"{'no' if not there else 'more than one'} gallery of the space {space.value}",
            expected="one",
            got=", ".join(there) or ", ".join(known) or "no gallery at all",
            next_step="`cxr gallery drop` the former ones" if there else f"`cxr ingest --space {space.value}`",
        )
    found = next((name for name, aliases in known.items() if ALIAS in aliases), None)
    if found is None:
        raise UsageError(
            f"which gallery? The alias {ALIAS} points to none",
            expected=", ".join(name.removeprefix(PREFIX) for name in known) or "a gallery; there is none",
            next_step="name the model version, or choose one by `cxr gallery use`",
        )
    return found.removeprefix(PREFIX)


def use_gallery(settings: MilvusSettings, model_version: str) -> str | None:
    """Makes a version's collection the one that the alias `cxr` points to; returns which it was before.

    Raises:
        UsageError: There is none of that version, or it is not filled yet.
        StoreError: Not reachable.
    """
    collection = collection_of(model_version)
    with connected(settings) as client:
        known = galleries(client, settings.timeout_s)
        if collection not in known:
            raise UsageError(
                f"no gallery for model version {model_version}",
                expected=", ".join(name.removeprefix(PREFIX) for name in known) or "a gallery; there is none",
                next_step="correct the version",
            )
        if filling(collection) in known[collection]:
            raise UsageError(f"{collection} is not filled yet", next_step="end the `cxr reindex` that fills it")
        point(client, collection, settings.timeout_s)
        return next((name for name, aliases in known.items() if ALIAS in aliases), None)
