"""The engine that embeds whole splits while networks are trained and gates are measured."""

import subprocess
import sys
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from cxr_retrieval_training.cpu_engine import CpuEngine


def doubling() -> Any:
    image: Any = ops.parameter([1, 1, 64, 64], np.uint8)  # OpenVINO's annotations name classes of its own core
    whole: Any = ops.convert(image, "f32")
    model: Any = ov.Model
    return model([ops.multiply(whole, np.float32(2.0)), ops.reduce_max(whole, np.array([1, 2, 3]))], [image], "doubling")


def test_every_image_gets_its_own_outputs_in_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (37, 1, 64, 64), np.uint8)
    doubled, largest = CpuEngine(doubling())(images, "doubling")
    assert np.array_equal(doubled, images * np.float32(2.0))
    assert np.array_equal(largest, images.max(axis=(1, 2, 3)))


def test_an_image_of_another_size_is_refused_and_the_engine_still_works() -> None:
    engine = CpuEngine(doubling())
    with pytest.raises(RuntimeError, match="shape"):
        engine(np.zeros((5, 1, 32, 32), np.uint8))
    assert engine(np.ones((5, 1, 64, 64), np.uint8))[1].tolist() == [1.0] * 5


def test_an_engine_may_be_dropped_as_soon_as_it_has_answered() -> None:
    program = (
        "import numpy as np; from cxr_retrieval_training.cpu_engine import CpuEngine; from test_cpu_engine import doubling\n"
        "model, images = doubling(), np.zeros((24, 1, 64, 64), np.uint8)\n"
        "for _ in range(400): CpuEngine(model)(images)\n"
    )
    folder = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=60)
