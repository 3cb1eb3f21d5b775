import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from raydetr.config import load_config
from raydetr.data.loader import collate
from raydetr.data.transforms import RandomSizeCrop, ResizeShortSide, drawn_from, normalize, resized_size, train_transforms, val_transforms

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def data(**settings):
    small = {"model.preset": "detr_tiny", **{f"data.{name}": value for name, value in settings.items()}}
    return load_config(small).data


def sample(height=90, width=130, boxes=((20, 30, 60, 70),)):
    """A grey picture with a white rectangle in every box (xyxy)."""
    image = torch.full((3, height, width), 60, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 255
    xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.Image(image), tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=(height, width))


def as_bytes(image):
    """A normalized picture back in 0 to 255."""
    return (image * STD + MEAN) * 255


# ------------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut off, not rounded
        ((640, 427), 800, 1333, (1199, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((500, 500), 800, 1333, (800, 800)),
        ((800, 1200), 800, 1333, (800, 1200)),  # it is there already
        ((1200, 800), 800, 1333, (1200, 800)),
        ((1200, 800), 480, None, (720, 480)),
        ((200, 1000), 800, 1333, (267, 1335)),  # 266.6 is rounded, so the long side exceeds the limit by a little
        ((1000, 200), 800, 1333, (1335, 267)),
        ((333, 1000), 800, 1333, (444, 1333)),
        ((1365, 2048), 800, 1333, (800, 1200)),
        ((480, 800), 800, 1333, (800, 1333)),  # 1333.3 exceeds the limit before it is cut off: 799.8 rounds to 800
        ((100, 1000), 600, None, (600, 6000)),
        ((1, 5000), 800, 1333, (32, 1333)),  # 0.27 of a pixel is none: stretched to the stride of the backbones
        ((5000, 1), 800, 1333, (1333, 32)),
        ((4, 3000), 96, 1333, (32, 1333)),
        ((40, 1666), 800, 1333, (32, 1332)),  # the most elongated image that is not stretched
        ((4, 3000), 16, 1333, (16, 1333)),  # where so short a side was asked for
        ((4, 3000), 96, None, (96, 72000)),
    ],
)
def test_resized_size_rounds_as_the_official_code(size, short_side, max_size, expected):
    assert resized_size(*size, short_side, max_size) == expected


@pytest.mark.parametrize("size", [(480, 640), (333, 500), (1, 1), (7, 300), (300, 7)])
def test_evaluation_has_the_official_sizes(size):
    config = load_config({}).data
    image, boxes = val_transforms(config)(*sample(*size, boxes=()))
    expected = resized_size(*size, 800, 1333)
    assert image.shape == (3, *expected)
    assert boxes.canvas_size == expected


@pytest.mark.parametrize(("height", "width", "short_side"), [(240, 320, 60), (320, 240, 75), (90, 130, 200)])
def test_resizing_a_generated_image_is_pillows(height, width, short_side):
    """Without antialiasing a shrunken pattern differs from Pillow's by far more than the rounding of one level."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    pixels = np.stack([255 * ((rows // 3 + columns // 2) % 2), 200 * (columns % 3 == 0) + noise, rows * 255 // height], -1).astype(np.uint8)
    size = resized_size(height, width, short_side)
    expected = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    resized = (
        ResizeShortSide([short_side])(tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))).permute(1, 2, 0).numpy().astype(int)
    )
    assert abs(resized - expected).max() <= 1


def test_resizing_is_pillows(shared_data):
    with Image.open(next((shared_data("balloon") / "val").glob("*.jpg"))) as photograph:
        pixels = np.array(photograph)
        height, width = resized_size(*pixels.shape[:2], 480)
        expected = np.array(photograph.resize((width, height), Image.Resampling.BILINEAR))
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    resized = ResizeShortSide([480])(image).permute(1, 2, 0).numpy()
    assert resized.shape == expected.shape
    assert np.abs(resized.astype(int) - expected.astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_normalizes_with_imagenets_mean_and_deviation():
    image = torch.stack([torch.full((144, 150), value, dtype=torch.uint8) for value in (0, 128, 255)])
    out, _ = val_transforms(data())(tv_tensors.Image(image), sample(144, 150, ())[1])
    expected = (torch.tensor([0, 128 / 255, 1]) - MEAN.flatten()) / STD.flatten()
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    torch.testing.assert_close(out[:, 77, 33].as_subclass(torch.Tensor), expected, rtol=1e-6, atol=1e-6)


def test_evaluation_scales_boxes_with_the_picture():
    image, boxes = val_transforms(data(val_size=180, max_size=400))(*sample(90, 130))
    assert image.shape == (3, 180, 260)
    assert boxes.tolist() == [[40, 60, 120, 140]]


def test_evaluation_draws_nothing():
    before = torch.get_rng_state()
    val_transforms(data())(*sample())
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("settings", [{"crop": 0.0}, {"crop": 1.0}, {"crop": 0.5}], ids=["whole", "cropped", "both"])
def test_boxes_follow_the_pixels_through_every_draw(settings):
    transforms = train_transforms(data(**settings))
    kept, emptied = 0, 0
    for number in range(200):
        with drawn_from(1, number):
            image, boxes = transforms(*sample(150, 240, ((40, 30, 110, 100),)))
        white = as_bytes(image).mean(0) > 160
        x1, y1, x2, y2 = boxes[0].tolist()
        if x2 <= x1 or y2 <= y1:
            emptied += 1
            assert white.float().mean() < 0.02
            continue
        if min(x2 - x1, y2 - y1) < 2:
            continue  # less than a pixel before resizing: too little of it to be seen
        kept += 1
        rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (found - torch.tensor([x1, y1, x2, y2])).abs().max() <= 1.5
        assert x1 >= 0 <= y1
        assert x2 <= image.shape[2]
        assert y2 <= image.shape[1]
    assert kept > 100
    assert bool(emptied) == (settings["crop"] > 0)


def test_whole_pictures_take_every_training_size_and_are_flipped_half_of_the_time():
    config = data(crop=0.0, train_sizes=[32, 40, 48, 56], max_size=80)
    transforms, sizes, flips = train_transforms(config), set(), 0
    for number in range(400):
        with drawn_from(number):
            image, boxes = transforms(*sample(50, 100, ((0, 0, 20, 20),)))
        sizes.add(tuple(image.shape[1:]))
        flips += int(boxes[0, 0] > 1)
    assert sizes == {(32, 64), (40, 80)}  # 48 and 56 would make the long side exceed 80
    assert 160 < flips < 240


@pytest.mark.parametrize(("flip", "expected"), [(0.0, [0, 0, 20, 20]), (1.0, [80, 0, 100, 20])])
def test_flip_probability(flip, expected):
    transforms = train_transforms(data(crop=0.0, flip=flip, train_sizes=[50]))
    assert all(transforms(*sample(50, 100, ((0, 0, 20, 20),)))[1][0].tolist() == expected for _ in range(10))


def test_crops_have_every_size_and_place():
    rows = torch.arange(60, dtype=torch.uint8).view(1, 60, 1)
    columns = torch.arange(90, dtype=torch.uint8).view(1, 1, 90)
    places = tv_tensors.Image(torch.cat([rows.expand(1, 60, 90), columns.expand(1, 60, 90), rows.expand(1, 60, 90)]))
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[30.0, 20, 50, 40]]), format="XYXY", canvas_size=(60, 90))
    crop, seen = RandomSizeCrop(20, 40), []
    with drawn_from(3):
        for _ in range(3000):
            image, cropped = crop(places, boxes)
            top, left = image[0, 0, 0].item(), image[1, 0, 0].item()
            height, width = image.shape[1:]
            x1, y1, x2, y2 = (
                max(0, min(at, end)) for at, end in zip((30 - left, 20 - top, 50 - left, 40 - top), (width, height) * 2, strict=True)
            )
            assert cropped[0].tolist() == [x1, y1, x2, y2]
            assert cropped.canvas_size == (height, width)
            seen.append((height, width, top, left, top + height, left + width))
    heights, widths, tops, lefts, bottoms, rights = map(set, zip(*seen, strict=True))
    assert heights == widths == set(range(20, 41))
    assert (min(tops), min(lefts), max(bottoms), max(rights)) == (0, 0, 60, 90)


def test_a_picture_smaller_than_a_crop_stays_whole():
    image, boxes = RandomSizeCrop(384, 600)(*sample(50, 400))
    assert image.shape[1] == 50
    assert 384 <= image.shape[2] <= 400
    assert boxes.canvas_size == tuple(image.shape[1:])


def test_a_first_resize_keeps_a_crop_small_enough_for_any_shape():
    transforms = train_transforms(load_config({"data.crop": 1.0}).data)
    for size in ((1, 1), (1, 3000), (3000, 1), (20, 30)):
        image, _ = transforms(*sample(*size, boxes=()))
        assert image.numel() < 3 * 1500 * 4000


def test_pictures_without_boxes():
    for number in range(20):
        with drawn_from(number):
            image, boxes = train_transforms(data())(*sample(boxes=()))
        assert boxes.shape == (0, 4)
        assert torch.isfinite(image).all()


def test_transforms_can_be_sent_to_another_process():
    transforms = pickle.loads(pickle.dumps(train_transforms(data())))
    with drawn_from(5):
        image, _ = transforms(*sample())
    with drawn_from(5):
        assert torch.equal(image, train_transforms(data())(*sample())[0])


# ------------------------------------------------------------------------------------------------------------------ draws


def test_draws_follow_from_the_numbers_alone():
    def draws(*numbers):
        torch.rand(7)
        with drawn_from(*numbers):
            return torch.rand(20).tolist()

    assert draws(0, 1, 2) == draws(0, 1, 2)
    others = [(0, 1, 3), (0, 2, 2), (1, 1, 2), (0, 12), (2, 1, 0), (0, 1)]
    assert len({tuple(draws(*numbers)) for numbers in [(0, 1, 2), *others]}) == 7


def test_the_process_draws_on_as_if_nothing_had_happened():
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    with drawn_from(3):
        torch.rand(100)
    with pytest.raises(RuntimeError), drawn_from(4):
        torch.rand(100) @ torch.rand(99)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("transforms", [train_transforms, val_transforms])
def test_bytes_that_are_normalized_as_a_batch_are_the_same_numbers(transforms):
    """Also in the padding, which is 0 either way."""
    batches = []
    for normalized in (True, False):
        prepare, images = transforms(data(train_sizes=[48], val_size=48, crop=0.0), normalized), []
        for number, size in enumerate([(90, 130), (130, 90)]):
            with drawn_from(number):
                images.append((prepare(*sample(*size))[0].as_subclass(torch.Tensor), {}))
        batches.append(collate(images, 64)[:2])
    (expected, mask), (pixels, mask_of_bytes) = batches
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(mask, mask_of_bytes)
    assert torch.equal(normalize(pixels, mask), expected)
    assert pixels.dtype == torch.uint8


# ---------------------------------------------------------------------------------------------------------- off by default


def drawn_with(seed=1, pictures=8, **settings):
    """Pictures and boxes after the training transforms, each of another seed."""
    transforms, results = train_transforms(data(**settings)), []
    for number in range(pictures):
        with drawn_from(seed, number):
            image, boxes = transforms(*sample())
        results.append((as_bytes(image.as_subclass(torch.Tensor)), boxes.as_subclass(torch.Tensor), image.shape[-2:]))
    return results


def test_colors_change_and_boxes_do_not():
    plain, colored = drawn_with(), drawn_with(color=1.0)
    assert not any(torch.allclose(one[0], other[0], atol=1) for one, other in zip(plain, colored, strict=True))
    for (_, boxes, size), (_, other, other_size) in zip(plain, colored, strict=True):
        assert size == other_size
        assert torch.equal(boxes, other)
    some = drawn_with(color=0.5, pictures=20)
    changed = sum(not torch.allclose(one[0], other[0], atol=1) for one, other in zip(drawn_with(pictures=20), some, strict=True))
    assert 4 <= changed <= 16


def test_zooming_out_makes_objects_smaller_on_gray():
    shares = []
    for image, boxes, (height, width) in drawn_with(zoom_out=1.0, flip=0.0):
        x1, y1, x2, y2 = boxes[0].tolist()
        shares.append((x2 - x1) * (y2 - y1) / (height * width))
        inside = image[:, int(y1) + 3 : int(y2) - 3, int(x1) + 3 : int(x2) - 3]
        assert inside.mean() > 240, "the box is still around its rectangle"
        assert height == 96
        assert width == pytest.approx(138, abs=2), "the canvas has the shape of the picture, in whole pixels"
    assert max(shares) <= 0.14 + 1e-3, "as much as without"
    assert min(shares) < 0.07
    gray = drawn_with(zoom_out=1.0, flip=0.0, pictures=30)
    assert any((image[:, 0, 0] - torch.tensor([124.0, 116.0, 104.0])).abs().max() < 2 for image, *_ in gray)


def test_masks_follow_boxes_through_everything():
    transforms = train_transforms(data(color=1.0, zoom_out=1.0))
    for number in range(6):
        image, boxes = sample()
        x1, y1, x2, y2 = boxes[0].int().tolist()
        mask = torch.zeros(1, *image.shape[-2:], dtype=torch.uint8)
        mask[0, y1:y2, x1:x2] = 1
        with drawn_from(number):
            _, moved, masks = transforms(image, boxes, tv_tensors.Mask(mask))
        rows, columns = torch.nonzero(masks[0], as_tuple=True)
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(moved[0].as_subclass(torch.Tensor), seen.float(), atol=1.5, rtol=0)


def test_the_size_of_a_picture_without_pixels_is_that_of_the_picture():
    transforms = train_transforms(data(color=1.0, zoom_out=0.7, crop=0.5, crop_resize=[60, 90], crop_min=30, crop_max=60))
    for number in range(6):
        image, boxes = sample()
        sizes = []
        for pixels in (image, tv_tensors.Image(torch.empty(image.shape, dtype=torch.uint8, device="meta"))):
            with drawn_from(number):
                changed, moved = transforms(pixels, boxes)
            sizes.append((changed.shape, moved.tolist()))
        assert sizes[0] == sizes[1]


def test_what_is_off_draws_nothing():
    kinds = [type(each).__name__ for each in train_transforms(data()).transforms]
    assert kinds == ["RandomApply", "ResizeShortSide", "RandomHorizontalFlip", "Lambda", "Normalize"]
