"""Text → TOKENS: subwords as numbers, by Hugging Face's `tokenizers`, in training and in service alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import TEXT_LENGTH
from cxr_retrieval.errors import InferenceError, SetupError


def require_tokenizers() -> None:
    """Whether text can be read at all.

    Raises:
        SetupError: The library is not installed.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise SetupError("reading text is not installed", expected="the extra 'reports'", next_step="pip install 'cxr-retrieval[reports]'")


def read_tokenizer(text: str) -> Any:
    """A `tokenizers.Tokenizer` of its JSON form.

    Raises:
        InferenceError: It is none.
        SetupError: The library is not installed.
    """
    require_tokenizers()
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no other kind
        raise InferenceError(
            "the server's tokenizer cannot be read", got=str(error)[:200], next_step="build the model anew with `cxr build multimodal`"
        ) from error


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> NDArray[np.int32]:
    """`[n, TEXT_LENGTH]`: as many subwords of each text as there is room for, then 0."""
    tokens = np.zeros((len(texts), TEXT_LENGTH), np.int32)
    for row, encoded in zip(tokens, tokenizer.encode_batch(list(texts)), strict=True):
        ids = encoded.ids[:TEXT_LENGTH]
        row[: len(ids)] = ids
    return tokens
