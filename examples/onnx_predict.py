"""Detect objects with a model exported by ``raydetr export --to onnx``: onnxruntime, NumPy and Pillow are all it needs.

    python onnx_predict.py model.onnx photograph.jpg ... --threshold 0.7

Prints a JSON line for each detection: file, category, score and box (x, y, width, height in pixels of the upright image), and for a model
with masks the mask as COCO's uncompressed RLE (``segmentation``).
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized_size(width: int, height: int, val_size: int, max_size: int) -> tuple[int, int]:
    """Width and height once the short side is ``val_size``, smaller where the long side would exceed ``max_size``."""
    short, long = min(width, height), max(width, height)
    side = max(1, round(max_size * short / long)) if long / short * val_size > max_size else val_size
    if short == side:
        return width, height
    return (side, int(side * height / width)) if width < height else (int(side * width / height), side)


def prepare(image: Image.Image, about: dict[str, str]) -> np.ndarray:
    """An RGB image as the model's input, float32 [1, 3, height, width]."""
    size = resized_size(*image.size, int(about["val_size"]), int(about["max_size"]))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) / 255
    normalized = (pixels - np.array(json.loads(about["mean"]))) / np.array(json.loads(about["std"]))
    return normalized.transpose(2, 0, 1)[None].astype(np.float32)


def detect(session: onnxruntime.InferenceSession, image: Image.Image, threshold: float | None = None) -> list[dict]:
    """The detections in an RGB image with a score of ``threshold`` or more (None: the model's own thresholds, else 0.7), best first."""
    about = session.get_modelmeta().custom_metadata_map
    categories = json.loads(about["categories"])
    own = json.loads(about.get("thresholds", "[]")) or [None] * len(categories)
    thresholds = [0.7 if each is None else each for each in own] if threshold is None else [threshold] * len(categories)
    images = prepare(image, about)
    mask = np.zeros((1, *images.shape[-2:]), bool)  # nothing is padded
    logits, boxes, *masks = session.run(None, {"images": images, "mask": mask})
    exponentials = np.exp(logits[0] - logits[0].max(-1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(-1, keepdims=True))[:, :-1]  # the last class is no-object
    labels, scores = probabilities.argmax(-1), probabilities.max(-1)
    width, height = image.size
    found = []
    for query in np.argsort(-scores, kind="stable"):
        if scores[query] >= thresholds[labels[query]]:
            cx, cy, w, h = boxes[0, query].astype(float)
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            category = categories[int(labels[query])]
            found.append({"category_id": category["id"], "category": category["name"], "score": float(scores[query]), "bbox": box})
            if masks:
                found[-1]["segmentation"] = mask_rle(masks[0][0, query], (images.shape[-2], images.shape[-1]), (height, width))
    return found


def mask_rle(logits: np.ndarray, resized: tuple[int, int], size: tuple[int, int]) -> dict:
    """The mask of a detection as COCO's uncompressed RLE, from its logits at a quarter of the resized image (sizes: height, width)."""
    enlarged = np.asarray(Image.fromarray(logits).resize(resized[::-1], Image.Resampling.BILINEAR))
    rows, columns = (np.arange(side) * pixels // side for side, pixels in zip(size, resized, strict=True))
    inside = (enlarged > 0)[rows[:, None], columns].ravel(order="F")  # COCO counts down the columns
    ends = np.flatnonzero(np.diff(inside, prepend=False))  # where a run ends; the first run is of pixels outside the mask
    counts = np.diff(ends, prepend=0, append=inside.size)
    return {"size": list(size), "counts": counts.tolist()}


def main() -> None:
    """Print the detections in the images named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--threshold", type=float, help="lowest score (default: the thresholds stored in the model, else 0.7)")
    arguments = parser.parse_args()
    session = onnxruntime.InferenceSession(arguments.model, providers=onnxruntime.get_available_providers())
    for name in arguments.images:
        with Image.open(name) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        for detection in detect(session, image, arguments.threshold):
            print(json.dumps({"file": name, **detection}))


if __name__ == "__main__":
    main()
