"""A small checkpoint with masks, encoded images, and zips of them."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.config import load_config, to_dict
from raydetr.model.detr import build_model
from raydetr.weights.checkpoint import save_checkpoint

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "</script><b>oblong"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detr_tiny with masks, random weights and a threshold of its own for each category."""
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=2, masks=True)
    model.query_embed.weight.data *= 20  # else the queries of random weights all find the same
    model.class_embed.weight.data *= 2
    settings = to_dict(load_config({"model.preset": "detr_tiny", "model.masks": True, "data.val_size": 64}))
    path = tmp_path_factory.mktemp("model") / "best.pth"
    content = {"model": model.state_dict(), "settings": settings, "categories": CATEGORIES, "epoch": 1, "metrics": {}}
    save_checkpoint(path, content | {"thresholds": [{"score": 0.35}, {"score": 0.5}]})
    return path


@pytest.fixture(scope="session")
def picture():
    """``picture(seed, size=(96, 64), kind="PNG")`` returns an encoded image of noise."""

    def encode(seed=0, size=(96, 64), kind="PNG"):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), kind)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def zipped():
    """``zipped({"a.png": content}, method)`` returns a zip."""

    def pack(files, method=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return file.getvalue()

    return pack
