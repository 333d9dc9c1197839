"""What the tests of the archive share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


@pytest.fixture
def films(squares: NDArray[np.uint8], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path, square in zip(paths, squares[:, 0], strict=True):
        Image.fromarray(square).save(path)
    return paths
