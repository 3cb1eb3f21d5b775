import json

import pytest


@pytest.fixture
def broken(coco_folder):
    """``broken(change)``: a sound folder whose train file ``change`` has altered, given the file's content and the image folder."""

    def make(change, **settings):
        root = coco_folder(**settings)
        file = root / "annotations" / "custom_train.json"
        coco = json.loads(file.read_text())
        change(coco, root / "train2017")
        file.write_text(json.dumps(coco))
        return root

    return make
