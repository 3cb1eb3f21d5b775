"""A checkpoint that answers uploads, with the steps of ``raydetr predict``: the same decoding, resizing, network and results."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raydetr.config import load_config
from raydetr.data.images import TooLarge, read_image
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.memory import kept_memory
from raydetr.predict.predict import ImagePrediction, collate_views, image_views, lowest_scores, merge_views, predict_views, results_of
from raydetr.predict.score import trained_with
from raydetr.predict.tiles import Tiles, parse_tiles
from raydetr.serving.options import Options
from raydetr.serving.uploads import Upload
from raydetr.training.engine import choose_device, choose_dtype
from raydetr.weights.fitting import load

View = tuple[torch.Tensor, dict[str, Any]]  # what the network takes, and its original size and place in the image


@dataclass
class Answer:
    """What is answered to one image.

    Attributes:
        name: The name of its file.
        size: Width and height in pixels; None if it cannot be read.
        results: COCO results without their ``image_id``.
        error: Why it cannot be read, or None.
        status: The HTTP status of that error.
    """

    name: str
    size: tuple[int, int] | None = None
    results: list[dict] = field(default_factory=list)
    error: str | None = None
    status: int = 200


class Predictor:
    """The model of a checkpoint, ready on its device.

    Args:
        options: What the server is started with.

    Attributes:
        at_a_time: Number of batches that are best predicted at a time, each in a thread of its own.

    Raises:
        UserError: The checkpoint or another option is wrong.
    """

    def __init__(self, options: Options):
        self.options = options
        self.tiles = parse_tiles(options.tiles, options.overlap) or Tiles(1, 1)
        self.model = load(options.checkpoint)
        config = load_config(trained_with(options.checkpoint, self.model), {"speed.device": options.device})
        self.device = choose_device(config.speed)
        self.dtype = choose_dtype(config.speed, self.device)
        self.model.to(self.device).eval()
        self.transforms = val_transforms(config.data)
        self.read = partial(read_image, exif=config.data.exif, max_megapixels=options.max_megapixels)
        self.at_a_time = 1 if self.device.type == "cuda" else 2
        self._cores = torch.get_num_threads()
        self._memory = ExitStack()  # never closed: memory is kept for as long as the process lives
        self._memory.enter_context(kept_memory(self.device.type))

    def describe(self) -> dict[str, Any]:
        """Return the model's categories and the lowest scores of detections, for pages and messages."""
        lowest = lowest_scores(self.model, self.options.threshold)
        categories = [{"id": each["id"], "name": each["name"]} for each in self.model.categories]
        return {"categories": categories, "thresholds": lowest, "device": self.device.type}

    def warm_up(self) -> None:
        """Predict on a blank image, because the first prediction of a process takes much longer than the others."""
        self.predict(image_views(torch.zeros(3, 48, 64, dtype=torch.uint8), self.transforms, self.tiles))

    def views(self, upload: Upload) -> list[View] | Answer:
        """Return the parts of an image that are predicted, or the answer to an image that cannot be read."""
        with tempfile.NamedTemporaryFile(prefix="raydetr-") as file:
            file.write(upload.content)
            file.flush()
            try:
                return image_views(self.read(Path(file.name)), self.transforms, self.tiles)
            except TooLarge:
                most = self.options.max_megapixels
                error = f"{upload.name}: too large, more than the {most} megapixels that this server takes"
                return Answer(upload.name, error=error, status=413)
            except UserError as error:
                return Answer(upload.name, error=str(error).replace(file.name, upload.name), status=415)

    def predict(self, views: Sequence[View], alone: bool = True) -> list[ImagePrediction]:
        """Return the predictions on parts of any images. Parts of one size are predicted together, so that nothing is padded.

        Args:
            views: The parts, of :meth:`views`.
            alone: Whether the CPU has nothing else to do. Otherwise the batches that are predicted at a time (``at_a_time``) share its
                cores, because two batches on a core each are done sooner than one after the other on both.
        """
        torch.set_num_threads(self._cores if alone else max(1, self._cores // self.at_a_time))  # those of this thread
        numbered = [(image, {**target, "number": number}) for number, (image, target) in enumerate(views)]
        batches, _ = collate_views([numbered], self.options.batch_size)
        found: dict[int, ImagePrediction] = {}
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for images, mask, targets in batches:
                predictions = predict_views(self.model, self.options.checkpoint, images, mask, targets, self.device)
                found |= {target["number"]: prediction for target, prediction in zip(targets, predictions, strict=True)}
        return [found[number] for number in range(len(views))]

    def answer(self, upload: Upload, views: Sequence[View], predictions: Sequence[ImagePrediction], threshold: float | None) -> Answer:
        """Return the answer to an image.

        Args:
            upload: The image.
            views: Its parts, of :meth:`views`.
            predictions: The predictions on each of them.
            threshold: Lowest score of a detection; None: as the server was started.
        """
        merged = merge_views([(prediction, target["view"]) for prediction, (_, target) in zip(predictions, views, strict=True)])
        lowest = lowest_scores(self.model, self.options.threshold if threshold is None else threshold)
        kept = zip(results_of(0, merged, self.model.categories), merged.labels, merged.scores, strict=True)
        results = [result for result, label, score in kept if score >= lowest[label]]
        return Answer(upload.name, merged.size, [{name: each for name, each in result.items() if name != "image_id"} for result in results])
