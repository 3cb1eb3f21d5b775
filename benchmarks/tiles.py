"""Measure what tiles gain for small objects: ``python -m benchmarks.tiles``.

The bundled ``detr_tiny`` is evaluated on drawn images that are far larger than those of its training and hold things of a few pixels: as
they are, and with ``--tiles``. The images are drawn from a seed, so the numbers repeat. ``--large`` draws things of the sizes of the
training instead, for which tiles should not cost anything.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import machine, options, table
from raydetr.demo.pretrain_tiny import NAMES
from raydetr.demo.scenes import Scene, place
from raydetr.demo.things import KINDS
from raydetr.predict.score import score_checkpoint
from raydetr.predict.tiled_score import score_with_tiles
from raydetr.predict.tiles import Tiles
from raydetr.weights.official import BUNDLED

WIDTH, HEIGHT = 640, 480  # pixels of the drawn images
SMALL, LARGE = (0.012, 0.05), (0.05, 0.25)  # from a thing's center to its top, as fractions of the image's height
TILES = (None, Tiles(2, 2), Tiles(3, 3), Tiles(4, 4))


def draw(rng: np.random.Generator, sizes: tuple[float, float]) -> tuple[np.ndarray, list[tuple[list[float], int]]]:
    """Draw an image.

    Args:
        rng: What everything random is drawn from.
        sizes: Smallest and largest size of a thing, see ``SMALL``.

    Returns:
        The image, uint8 [HEIGHT, WIDTH, 3], and for each thing of which half is visible its box (xywh, pixels) and its label.
    """
    scene, areas = Scene(rng, WIDTH, HEIGHT), []
    labels = rng.integers(len(NAMES), size=int(rng.integers(8, 17)))
    for number, label in enumerate(labels, 1):
        size = HEIGHT * np.exp(rng.uniform(*np.log(sizes)))
        x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
        scene.add(place(KINDS[NAMES[label]](rng), x, y, size, rng.normal() * 0.35, rng.uniform(0.8, 1.25)), number)
        areas.append((scene.numbers == number).sum())
    scale, things = scene.numbers.shape[1] / WIDTH, []
    for number, (label, area) in enumerate(zip(labels, areas, strict=True), 1):
        rows, columns = np.nonzero(scene.numbers == number)
        if len(rows) > max(0.5 * area, 60):
            x, y = columns.min() / scale, rows.min() / scale
            things.append(([x, y, (columns.max() + 1) / scale - x, (rows.max() + 1) / scale - y], int(label)))
    return scene.finish(), things


def write(folder: Path, images: int, sizes: tuple[float, float], seed: int = 0) -> None:
    """Write images as the validation set of a COCO folder."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    entries, annotations = [], []
    for image_id in range(1, images + 1):
        pixels, things = draw(np.random.default_rng((seed, image_id)), sizes)
        Image.fromarray(pixels).save(folder / "val2017" / f"{image_id:03}.png")
        entries.append({"id": image_id, "file_name": f"{image_id:03}.png", "width": WIDTH, "height": HEIGHT})
        for box_xywh, label in things:
            known = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "iscrowd": 0}
            annotations.append({**known, "bbox": box_xywh, "area": box_xywh[2] * box_xywh[3]})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "custom_val.json").write_text(json.dumps(content))


def main() -> None:
    """Measure and print the table."""
    parser = options(__doc__, repeats=60)
    parser.add_argument("--large", action="store_true", help="draw larger things")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write(data, 2 if chosen.quick else chosen.repeats, LARGE if chosen.large else SMALL)
        layer = {"data.path": str(data), "data.num_workers": 0}
        for tiles in TILES:
            began = time.perf_counter()
            metrics = score_with_tiles(BUNDLED, tiles, layer) if tiles else score_checkpoint(BUNDLED, layer)
            took = time.perf_counter() - began
            low, high = metrics["AP_interval"] or (float("nan"),) * 2
            name = f"--tiles {tiles.columns}x{tiles.rows}" if tiles else "the image alone"
            rows.append([name, f"{metrics['AP']:.3f} ({low:.3f} to {high:.3f})", f"{metrics['AP50']:.3f}", f"{took:.1f} s"])
    print(machine(), "\n", sep="")
    print(table(rows, ["predicted on", "AP (95 % interval)", "AP50", "time"]))


if __name__ == "__main__":
    main()
