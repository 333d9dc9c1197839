"""The wire contract: every model name, tensor name, shape, dtype and label order, in one place.

Client, training, export and serving import these; nothing spells them a second time. Changing a value here
changes what other systems rely on (KServe v2 tensor names, see README "The way of a radiograph").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

IMAGE_SIZE: Final = 256
"""Side of the square radiograph on the wire, in pixels."""
EMBEDDING_SIZE: Final = 64
APPEARANCE_SIZE: Final = 56
FEATURE_SIZE: Final = 2048
FINDING_FEATURE_SIZE: Final = 1024
SUBSPACE_SIZE: Final = 128
TEXT_LENGTH: Final = 128
"""Tokens of a text at most."""
ATTENTION_SIZE: Final = 16

LABELS: Final = ("control", "non_covid_pneumonia", "covid19")
"""Class order of the three-class protocol (Zhong et al. 2020, section 2.4); a store may hold further labels."""

ENSEMBLE: Final = "cxr_retrieval"
LUNG_SEGMENTATION: Final = "lung_segmentation"
EMBEDDER: Final = "embedder"
ATTENTION_MAP_MODEL: Final = "attention_map"
LEAF_MODELS: Final = (LUNG_SEGMENTATION, EMBEDDER, ATTENTION_MAP_MODEL)

OUTCOME_MODEL: Final = "outcome"
"""A further model, where one is served: what becomes of patients. It is no step of the ensemble, which costs what it did."""
OUTCOME_PARTS: Final = ("image", "facts", "both")
"""Last axis of OUTCOME: what a probability rests on."""
CARD_PARAMETER: Final = "card"
"""Key in a further model's parameters under which it says, as JSON, what it was trained on and how well it does."""

MULTILABEL_MODEL: Final = "multilabel"
"""A further model, where one is served: features learnt from several findings of a film (Haq et al. 2020)."""
MULTIMODAL_IMAGE_MODEL: Final = "multimodal_image"
MULTIMODAL_TEXT_MODEL: Final = "multimodal_text"
"""Two further models that bring films and reports into one subspace (Yu et al. 2021)."""
TOKENIZER_PARAMETER: Final = "tokenizer"
"""Key in the latter's parameters under which it says, as JSON, how text becomes TOKENS."""

MODEL_VERSION_PARAMETER: Final = "model_version"
"""Key in the ensemble's `config.pbtxt` parameters under which the server announces its weights."""

STUDENT_VERSION_PARAMETER: Final = "student_model_version"
"""The same for the weights with the segmentation student in the place of the five networks."""
PUBLISHED_VERSION_PARAMETER: Final = "published_model_version"
"""The same with the published embedder in the place of the tuned one."""

Dtype = Literal["UINT8", "INT32", "FP32"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor on the wire: KServe name, datatype, and shape without the batch dimension."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


IMAGE: Final = TensorSpec("IMAGE", "UINT8", (1, IMAGE_SIZE, IMAGE_SIZE))
LUNGS: Final = TensorSpec("LUNGS", "UINT8", (2, IMAGE_SIZE, IMAGE_SIZE))
"""Between the first two steps only: the radiograph, 0 outside the lungs, and how much each pixel counts as lung, 0…255 for 0…1.

Soft at the outline, where LUNG_MASK is cut: what a runtime rounds there moves the second by a little, and flips whole pixels of the first.
"""
LUNG_MASK: Final = TensorSpec("LUNG_MASK", "UINT8", (1, IMAGE_SIZE, IMAGE_SIZE))
"""0 outside, 255 inside the lungs."""
LUNG_AGREEMENT: Final = TensorSpec("LUNG_AGREEMENT", "FP32", (1,))
"""Mean Dice coefficient of the segmentation networks' own masks with the ensemble's, in [0, 1]: how far to trust LUNG_MASK."""
MASK: Final = TensorSpec("MASK", "UINT8", (1, IMAGE_SIZE, IMAGE_SIZE))
"""LUNG_MASK as the last step receives it (a graph cannot call its input and its output the same)."""
EMBEDDING: Final = TensorSpec("EMBEDDING", "FP32", (EMBEDDING_SIZE,))
"""What was learnt from labels: the metric embedding, of unit length (L2)."""
APPEARANCE: Final = TensorSpec("APPEARANCE", "FP32", (APPEARANCE_SIZE,))
"""What the lungs look like, of unit length (L2); no label was looked at to find it."""
FEATURES: Final = TensorSpec("FEATURES", "FP32", (FEATURE_SIZE,))
ATTENTION: Final = TensorSpec("ATTENTION", "FP32", (1, ATTENTION_SIZE, ATTENTION_SIZE))
"""The embedder's attention mask in [0, 1] over the lungs' bounding box (between the last two steps only).

Each film's own scale: 0.5 is the average over this film's box, 0.73 about one standard deviation above it. It says which places of a film
stand out from the rest of that film; the values of two films do not compare, and a healthy film's greatest is as great as a sick one's.
"""
ATTENTION_MAP: Final = TensorSpec("ATTENTION_MAP", "FP32", (1, IMAGE_SIZE, IMAGE_SIZE))
"""ATTENTION at image size, on its scale, 0 outside the lungs."""

FINDING_FEATURES: Final = TensorSpec("FINDING_FEATURES", "FP32", (FINDING_FEATURE_SIZE,))
"""What a film shows, by a network that learnt several findings at once; of unit length (L2)."""
IMAGE_VECTOR: Final = TensorSpec("IMAGE_VECTOR", "FP32", (SUBSPACE_SIZE,))
"""A film in the subspace that it shares with reports; of unit length (L2)."""
TEXT_VECTOR: Final = TensorSpec("TEXT_VECTOR", "FP32", (SUBSPACE_SIZE,))
"""A text there; of unit length (L2)."""
TOKENS: Final = TensorSpec("TOKENS", "INT32", (TEXT_LENGTH,))
"""Numbers of a text's subwords, 0 after its end."""

ENSEMBLE_OUTPUTS: Final = (EMBEDDING, APPEARANCE, LUNG_MASK, ATTENTION_MAP, FEATURES, LUNG_AGREEMENT)


@dataclass(frozen=True)
class LeafSpec:
    """Inputs and outputs of one exported graph, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def outcome_leaf(facts: int, outcomes: int) -> LeafSpec:
    """The outcome model's tensors: FEATURES, FACTS and whether each is KNOWN (0 or 1) → OUTCOME, probabilities for each of OUTCOME_PARTS.

    Which facts and outcomes they are, and in what order, its card says.
    """
    given = (FEATURES, TensorSpec("FACTS", "FP32", (facts,)), TensorSpec("KNOWN", "FP32", (facts,)))
    return LeafSpec(OUTCOME_MODEL, given, (TensorSpec("OUTCOME", "FP32", (outcomes, len(OUTCOME_PARTS))),))


MULTILABEL_LEAF: Final = LeafSpec(MULTILABEL_MODEL, (IMAGE,), (FINDING_FEATURES,))
MULTIMODAL_IMAGE_LEAF: Final = LeafSpec(MULTIMODAL_IMAGE_MODEL, (IMAGE,), (IMAGE_VECTOR,))
MULTIMODAL_TEXT_LEAF: Final = LeafSpec(MULTIMODAL_TEXT_MODEL, (TOKENS,), (TEXT_VECTOR,))
BESIDE_ENSEMBLE: Final = (MULTILABEL_LEAF, MULTIMODAL_IMAGE_LEAF)
"""Further models that are asked about a film itself."""

LEAVES: Final = (
    LeafSpec(LUNG_SEGMENTATION, (IMAGE,), (LUNG_MASK, LUNGS, LUNG_AGREEMENT)),
    LeafSpec(EMBEDDER, (LUNGS,), (EMBEDDING, APPEARANCE, FEATURES, ATTENTION)),
    LeafSpec(ATTENTION_MAP_MODEL, (ATTENTION, MASK), (ATTENTION_MAP, LUNG_MASK)),
)
