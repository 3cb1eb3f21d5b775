import json

import pytest
from PIL import Image

IMAGES = (".jpg", ".png", ".jpeg")


@pytest.fixture
def write(tmp_path):
    """``write({"a.jpg": None, "x/b.json": content})``: images of 80 x 60, JSON content and texts; returns the folder."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in IMAGES:
                Image.new("RGB", (80, 60), "grey").save(path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write
