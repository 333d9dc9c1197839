"""The paper's comparisons and ours as changes to one config, each one command: `cxr train ablation NAME`.

All share the schedule of `configs/short.toml`, so that they differ in what they are named for and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cxr_retrieval.errors import UsageError
from cxr_retrieval_training.config import EmbedderConfig, config_path, load_config

_CROSS_ENTROPY: Final = {
    "attention": False,
    "retrieve_with": "features",
    "losses": {"cross_entropy": 1.0},
    "appearance_size": 0,
    "lesion_weight": 0.0,
}

ABLATIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "shipped-recipe": {},
    # Table 3 and 4, right: the usual classifier, and retrieval with its pooled features
    "cross-entropy": _CROSS_ENTROPY,
    "cross-entropy-resnet50": {**_CROSS_ENTROPY, "backbone": "resnet50", "frozen_layers": 0},
    # 3.3.1 attention, 3.3.2 loss, 3.3.4 size (3.3.3, k from 1 to 30, is in every report)
    "no-attention": {"attention": False, "lesion_weight": 0.0},
    "multi-similarity": {"losses": {"multi_similarity": 1.0}},
    "info-nce": {"losses": {"info_nce": 1.0}},
    **{f"size-{size}": {"learned_size": size, "appearance_size": 0} for size in (32, 64, 128, 256, 512)},
    # what each of our own parts gives
    "not-mirrored": {"mirrored": False},
    "two-members": {"copies": 2},
    "attention-unsupervised": {"lesion_weight": 0.0},
    "from-random-weights": {"init": "random", "frozen_layers": 0},
    "whole-radiograph": {"lungs_only": False},
    "ensemble-lungs": {"lungs_from": None},
    # trained without one source, then asked about it
    **{f"without-{source}": {"leave_out_source": source} for source in ("kermany", "radiography", "ieee8023")},
    **{
        f"cross-entropy-without-{source}": {**_CROSS_ENTROPY, "leave_out_source": source}
        for source in ("kermany", "radiography", "ieee8023")
    },
}


def ablation_config(name: str, base: str = "short") -> EmbedderConfig:
    """The config of one comparison; `losses` replaces those of every stage, `copies` trains each member so many times.

    Raises:
        UsageError: No such comparison.
    """
    if name not in ABLATIONS:
        raise UsageError(f"no ablation {name}", expected=", ".join(ABLATIONS), next_step="choose one of these")
    settings = load_config(config_path(base), EmbedderConfig).model_dump()
    changes = dict(ABLATIONS[name])
    losses = changes.pop("losses", None)
    members = settings["members"] * changes.pop("copies", 1)
    if losses is not None:
        members = [{"stages": [{**stage, "losses": losses} for stage in member["stages"]]} for member in members]
    settings["members"] = members
    return EmbedderConfig.model_validate({**settings, **changes})
