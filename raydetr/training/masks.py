"""The masks of detections: computed in chunks under a memory bound, and encoded."""

from collections.abc import Callable

import torch
from torch import Tensor

from raydetr.data.masks import RLE, encode_masks
from raydetr.model.masks import MaskFeatures, postprocess_masks

MOST_BYTES = 256 * 2**20  # of the tensors of a chunk
Predict = Callable[[MaskFeatures, Tensor, Tensor], Tensor]  # DETR.predict_masks


def logits_in_chunks(predict: Predict, features: MaskFeatures, image: Tensor, query: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Return the mask logits of M queries, float [M, h, w]; the arguments are those of :meth:`raydetr.model.detr.DETR.predict_masks`."""
    most = chunk_size(padded_size)
    return torch.cat([predict(features, *part) for part in zip(image.split(most), query.split(most), strict=True)])


def detected_masks(
    predict: Predict,
    features: MaskFeatures,
    chosen: list[list[int]],
    padded_size: tuple[int, int],
    image_sizes: Tensor,
    sizes: Tensor,
) -> list[list[RLE]]:
    """Return the masks of detections at the size of the original images.

    Args:
        predict: :meth:`raydetr.model.detr.DETR.predict_masks` of the network.
        features: What it takes.
        chosen: For each image of the batch the queries whose masks are wanted.
        padded_size: Height and width of the batch.
        image_sizes: Height and width of each image inside of the padding, int64 [B, 2].
        sizes: Height and width of the original images, int64 [B, 2].

    Returns:
        For each image the RLE of each chosen query.
    """
    rles: list[list[RLE]] = []
    device = features.projected.device
    for number, queries in enumerate(chosen):
        height, width = sizes[number].tolist()
        most, of_image = chunk_size(padded_size, (height, width)), []
        for start in range(0, len(queries), most):
            query = torch.tensor(queries[start : start + most], device=device)
            logits = predict(features, torch.full_like(query, number), query)
            (masks,) = postprocess_masks(logits[None], padded_size, image_sizes[number : number + 1], sizes[number : number + 1])
            of_image += encode_masks(masks.cpu().numpy())
        rles.append(of_image)
    return rles


def chunk_size(padded_size: tuple[int, int], size: tuple[int, int] = (0, 0)) -> int:
    """Return how many masks are worked on at a time.

    Args:
        padded_size: Height and width of the batch.
        size: Height and width of the original image, if masks are brought to it.
    """
    # Of each mask, the segmentation head holds up to 144 channels of float32 at a quarter of the resolution; the post-processing holds
    # two float32 numbers and a byte for each pixel.
    pixels, original = padded_size[0] * padded_size[1], size[0] * size[1]
    return max(1, MOST_BYTES // (4 * 144 * pixels // 16 + 9 * pixels + 9 * original + 1))


def counted_queries(scores: Tensor, labels: Tensor, most: int) -> list[list[int]]:
    """Return for each image the queries whose detections can count: the ``most`` with the highest scores of each category.

    Args:
        scores: float [B, Q].
        labels: int64 [B, Q].
        most: COCO counts 100 detections of a category in an image.
    """
    batch, queries = scores.shape
    if queries <= most:
        return [list(range(queries))] * batch
    chosen = []
    for of_image, labels_of_image in zip(scores.cpu(), labels.cpu(), strict=True):
        seen: dict[int, int] = {}
        kept = []
        for query in of_image.sort(descending=True, stable=True).indices.tolist():
            label = int(labels_of_image[query])
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= most:
                kept.append(query)
        chosen.append(sorted(kept))
    return chosen
