"""Batches of images: which images a batch has, how it is padded, and the processes that load it."""

import functools
import itertools
import math
import os
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from raydetr.data.coco import CocoImages
from raydetr.data.shared_memory import as_arrays, as_tensors, fits_shared_memory, free_shared_memory
from raydetr.errors import UserError

MOST_EPOCHS = 10**6  # of a run
PREFETCH = 2  # batches that each loading process prepares in advance: the default of torch's DataLoader
DEAD_PROCESS_S = 5.0  # how soon a killed loading process is noticed


def collate(batch: list[tuple], pad_to: int = 1, share: bool = False) -> tuple[torch.Tensor, torch.Tensor | None, list[dict]]:
    """Pad the images of a batch to the largest height and width, with 0 at the right and the bottom.

    Args:
        batch: Images float32 [3, h, w] with their targets, as :class:`raydetr.data.coco.CocoImages` returns them; with sizes, which the
            batch then has at least.
        pad_to: Height and width of the batch are rounded up to multiples of it.
        share: Whether to make the batch in shared memory, from where a loading process hands it over without a copy.

    Returns:
        The images float32 [B, 3, H, W]; the padding mask bool [B, H, W], True where padded, or None where nothing is; the targets, whose
        ``masks``, if there are any, are padded like the images.
    """
    images, targets, *sizes = zip(*batch, strict=True)
    sizes = [image.shape[1:] for image in images] + [size for column in sizes for size in column]
    height, width = (_rounded_up(max(side), pad_to) for side in zip(*sizes, strict=True))
    padded = _full((len(images), 3, height, width), 0, images[0].dtype, share)
    mask = _full((len(images), height, width), True, torch.bool, share)
    for image, target_image, target_mask in zip(images, padded, mask, strict=True):
        target_image[:, : image.shape[1], : image.shape[2]] = image
        target_mask[: image.shape[1], : image.shape[2]] = False
    return padded, mask if mask.any() else None, [_with_padded_masks(target, height, width) for target in targets]


def _with_padded_masks(target: dict[str, torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
    if "masks" not in target:
        return target
    right, bottom = width - target["masks"].shape[2], height - target["masks"].shape[1]
    return {**target, "masks": torch.nn.functional.pad(target["masks"], (0, right, 0, bottom))}


def _full(shape: tuple[int, ...], value: float, dtype: torch.dtype, share: bool) -> torch.Tensor:
    if not share:
        return torch.full(shape, value, dtype=dtype)
    # As torch's own default_collate does it.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    full: Any = torch.empty(0, dtype=dtype)  # whose type hints lack a storage without a type
    return full.set_(storage, 0, shape).fill_(value)


def _rounded_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def collate_arrays(batch: list[tuple], pad_to: int = 1) -> tuple[np.ndarray, np.ndarray | None, list[dict]]:
    """Return :func:`collate` of a batch as NumPy arrays, which processes hand over without shared memory."""
    return as_arrays(collate(batch, pad_to))


def build_loader(
    dataset: CocoImages,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    group_sizes: bool = False,
    timeout_s: float = 0.0,
    pad_to: int = 1,
    batch_total: int | None = None,
    weights: np.ndarray | None = None,
) -> DataLoader:
    """Return a loader of the batches of one worker.

    With ``shuffle`` (training) every worker gets the same number of batches of ``batch_size``, in an order that follows from ``seed``
    and the epoch of ``dataset.set_epoch``, the only call needed before an epoch. Images that do not fill a batch are left out as in the
    official code, unless there are no others. Without ``shuffle`` (evaluation) the workers share the batches, each image is loaded once,
    and a batch holds only image files of one size: nothing is padded, so that predictions depend neither on ``batch_size`` nor on
    ``world_size``.

    If the batches of the loading processes do not fit into shared memory, they are sent through pipes, and ``dataset.warnings`` says so.

    Args:
        dataset: The images.
        batch_size: Images per batch.
        rank: The number of this worker, from 0.
        world_size: The number of workers.
        shuffle: True for training, False for evaluation.
        num_workers: Processes that load images; with 0 this process does.
        seed: What the order of the images follows from.
        device: Where the batches will be used; those for a GPU are put into pinned memory.
        group_sizes: Whether training batches are made of images of similar size, see :class:`LikeSizes`.
        timeout_s: The longest wait for a batch of the loading processes, in seconds; 0 waits for ever. A batch that takes longer raises
            UserError while iterating.
        pad_to: The sides of batches are rounded up to multiples of it, so that there are fewer shapes of batches.
        batch_total: Images of one optimizer step over all workers. Training batches then come from :class:`SharedSteps`, which needs at
            least so many images; a smaller data set raises UserError.
        weights: How often each image is drawn in an epoch of training, relative to others; None: once.
    """
    if shuffle and batch_total:
        if len(dataset) < batch_total:
            raise UserError(f"optim.batch_total: {batch_total} images are more than the training set has ({len(dataset)}); lower it")
        sampler = EpochSampler(dataset, weights, num_replicas=1, rank=0, shuffle=True, seed=seed)
        steps = (LikeSizes if group_sizes else BatchSampler)(sampler, batch_total, drop_last=True)
        batches = SharedSteps(steps, dataset, batch_size, rank, world_size)
    elif shuffle:
        sampler = EpochSampler(dataset, weights, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        batches = (LikeSizes if group_sizes else BatchSampler)(sampler, batch_size, drop_last=len(sampler) >= batch_size)
    else:
        batches = _batches_of_one_size(dataset, batch_size)[rank::world_size]
    in_flight = num_workers * PREFETCH * largest_batch(dataset, batch_size, pad_to)
    fits = fits_shared_memory(in_flight * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # which Ray Train and torchrun set
    if num_workers and not fits:
        dataset.warnings.append(
            f"/dev/shm has {(free_shared_memory() or 0) / 1e6:.0f} MB free, too little for the batches on their way: they are sent "
            "through pipes, which is slower; give the container more (docker run --shm-size=2g), or set data.num_workers 0"
        )
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(collate, pad_to=pad_to, share=num_workers > 0)
        if fits
        else functools.partial(collate_arrays, pad_to=pad_to),
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.device(device).type == "cuda",
        timeout=timeout_s if num_workers else 0,
        generator=torch.Generator().manual_seed(seed),  # else every epoch would take a number from the process's own
    )


def largest_batch(dataset: CocoImages, batch_size: int, pad_to: int = 1) -> int:
    """Return an upper bound for the size of a batch in bytes: its images, padded to the largest, its padding mask, its masks.

    The pixels are float32, or bytes if the transforms do not normalize them.

    Args:
        dataset: The images, whose annotated sizes and transforms bound those of the batch.
        batch_size: Images per batch.
        pad_to: Number of pixels that the sides of a batch are a multiple of.
    """
    from torchvision.transforms import v2  # torchvision, see CocoImages._pack

    most_masks = max(map(len, dataset.rles), default=0) if dataset.rles and dataset.target_masks else 0
    most_masks *= 2 if dataset.copy_paste else 1
    floats = any(isinstance(each, v2.Normalize) for each in getattr(dataset.transforms, "transforms", ()))
    pixel = 3 * (torch.float32 if floats else torch.uint8).itemsize
    return batch_size * largest_side(dataset, pad_to) ** 2 * (pixel + (1 + most_masks) * torch.bool.itemsize)


def largest_side(dataset: CocoImages, pad_to: int = 1) -> int:
    """Return an upper bound for the height and width of a batch in pixels; an upright image can be padded beside a wide one.

    Args:
        dataset: The images, whose annotated sizes and transforms bound those of the batch.
        pad_to: Number of pixels that the sides of a batch are a multiple of.
    """
    from torchvision.transforms import v2

    from raydetr.data.transforms import RandomSizeCrop, ResizeShortSide  # torchvision, see CocoImages._pack

    sizes = [size for _, size in dataset.files]
    longest, aspect = max(map(max, sizes)), max(max(size) / min(size) for size in sizes)
    for transform in getattr(dataset.transforms, "transforms", ()):
        for each in transform.transforms if isinstance(transform, v2.RandomApply) else (transform,):
            if isinstance(each, RandomSizeCrop):
                aspect = max(aspect, each.max_size / each.min_size)
            elif isinstance(each, v2.RandomZoomOut):
                aspect *= 1.1  # both sides of its canvas are cut to whole pixels
            elif isinstance(each, ResizeShortSide):
                limit = math.inf if each.max_size is None else each.max_size + aspect  # rounding can exceed it, see resized_size
                longest = min(limit, max(each.sizes) * aspect)
    return _rounded_up(math.ceil(longest), pad_to)


def _batches_of_one_size(dataset: CocoImages, batch_size: int) -> list[list[int]]:
    indices: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(dataset.coco["images"]):
        indices.setdefault((image["width"], image["height"]), []).append(index)
    return [batch for of_one_size in indices.values() for batch in BatchSampler(of_one_size, batch_size, drop_last=False)]


class EpochSampler(DistributedSampler):
    """Yield (epoch, index), by which the epoch reaches loading processes: those keep the copy of the data set they started with.

    Where an epoch has an image several times, the repeats have numbers of epochs that no run reaches, and so other random transforms.

    Args:
        dataset: The images.
        weights: How often each image is drawn, relative to others; an epoch has as many images as without. None: each once.
        **options: Those of torch's DistributedSampler.
    """

    dataset: "CocoImages"

    def __init__(self, dataset: "CocoImages", weights: np.ndarray | None = None, **options: Any):
        super().__init__(dataset, **options)
        self.weights = weights

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        self.set_epoch(epoch)
        if self.weights is None:
            return ((epoch, index) for index in super().__iter__())
        # Systematic sampling: each image as often as its weight says, rounded up or down at random.
        ends = np.cumsum(self.weights) / self.weights.sum() * len(self.weights)
        offset = np.random.default_rng([self.seed, epoch]).random()
        drawn = np.searchsorted(ends, np.arange(len(ends)) + offset).clip(max=len(ends) - 1)
        repeats = np.arange(len(drawn)) - np.searchsorted(drawn, drawn)  # of an image within the epoch, each with other random transforms
        return ((int(epoch + repeats[index] * MOST_EPOCHS), int(drawn[index])) for index in super().__iter__())


def draw_weights(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often to draw each image so that rare categories are seen more often.

    The repeat factors of LVIS (Gupta et al., "LVIS: a dataset for large vocabulary instance segmentation", 2019): a category on a fraction
    f of the images has ``max(1, sqrt(threshold / f))``, and an image the largest of its categories.

    Args:
        counts: Boxes by image and category, int [N, K].
        threshold: The fraction of images below which a category is rare.

    Returns:
        float64 [N].
    """
    fraction = (counts > 0).mean(0)
    factors = np.sqrt(np.maximum(1.0, threshold / np.maximum(fraction, 1 / len(counts))))
    return np.where(counts > 0, factors, 1.0).max(1, initial=1.0)


class LikeSizes(BatchSampler):
    """Make the batches of an :class:`EpochSampler` of images that have a similar shape and size after their transforms.

    The images of every ``window`` batches are sorted by size, divided into batches again, and the batches shuffled: which images an epoch
    has, and which it leaves out, stays as drawn. The workers of a run shuffle alike, so that their images of one step are of similar size.
    """

    sampler: EpochSampler
    window = 64

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        dataset = self.sampler.dataset
        batches = cast(Iterator[list[tuple[int, int]]], super().__iter__())  # torch's annotation knows whole numbers only
        generator = torch.Generator().manual_seed(self.sampler.seed + dataset.epoch)
        while drawn := list(itertools.islice(batches, self.window)):
            alike = sorted(itertools.chain(*drawn), key=lambda image: _likeness(dataset.size_of(*image)))
            made = [alike[start : start + self.batch_size] for start in range(0, len(alike), self.batch_size)]
            yield from (made[number] for number in torch.randperm(len(made), generator=generator).tolist())


class SharedSteps:
    """Yield one worker's batches of optimizer steps that have the same images on any number of workers.

    All batches of a step are padded to the largest of its images, on every worker: what a network makes of an image depends a little on
    the padding beside it.

    Args:
        steps: Yields the images of each step, as (epoch, index).
        dataset: Knows the sizes of the transformed images.
        batch_size: The largest number of images in a batch.
        rank: The number of this worker, from 0.
        world_size: The number of workers, which divides the number of images of a step.
    """

    def __init__(self, steps: BatchSampler, dataset: "CocoImages", batch_size: int, rank: int, world_size: int):
        self.steps, self.dataset, self.batch_size = steps, dataset, batch_size
        share = steps.batch_size // world_size
        self._mine = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return len(self.steps) * math.ceil(len(self._mine) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, tuple[int, int]]]]:
        for step in cast(Iterator[list[tuple[int, int]]], iter(self.steps)):
            heights, widths = zip(*(self.dataset.size_of(*image) for image in step), strict=True)
            size = max(heights), max(widths)
            for start in range(self._mine.start, self._mine.stop, self.batch_size):
                yield [(*step[position], size) for position in range(start, min(start + self.batch_size, self._mine.stop))]


def _likeness(size: tuple[int, int]) -> tuple[bool, int, int]:
    height, width = size
    return width > height, max(size), min(size)


class Loader(DataLoader):
    """A DataLoader that yields tensors also for :func:`collate_arrays`, and whose errors are one line for the user.

    A UserError of a loading process is raised as that line, not as a traceback in a message. A batch that does not arrive within the
    loader's ``timeout`` raises UserError, which says what to do.
    """

    def __iter__(self) -> Iterator:
        try:
            yield from map(as_tensors, self._awaited(super().__iter__()))
        except UserError as error:
            raise UserError(str(error).rstrip().rsplit(f"{UserError.__module__}.{UserError.__qualname__}: ", 1)[-1]) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            free = free_shared_memory()
            memory = "" if free is None else f" (/dev/shm has {free / 1e6:.0f} MB free)"
            raise UserError(
                f"no batch came from the processes that load images within {self.timeout:g} s: shared memory is full{memory}, or the "
                "images' disk does not answer; set data.num_workers 0, give more shared memory, or raise data.batch_timeout_s"
            ) from error

    def _awaited(self, batches: Any) -> Iterator:
        # torch notices a killed process at once in the main thread only, otherwise when its timeout has passed: a short one, repeated.
        batches._timeout = min(self.timeout, DEAD_PROCESS_S)
        began = time.monotonic()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out") or time.monotonic() - began >= self.timeout:
                    raise
            else:
                yield batch
                began = time.monotonic()
