import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.data.images import Header, image_path, read_header, read_image
from raydetr.errors import UserError

ORIENTATION = 0x0112


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def gradient(height=6, width=10) -> np.ndarray:
    """RGB pixels of which no two are alike, so that a turned or mirrored picture shows."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 20, rows + columns], -1).astype(np.uint8)


def save(path, pixels, orientation=None, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).save(path, **options)
    return path


def pixels_of(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------ file names


@pytest.mark.parametrize("name", ["a.jpg", "sub/a.jpg", "..a.jpg", "a..b/c.jpg", "Ballon é 3.jpg", "...jpg"])
def test_names_within_the_folder(tmp_path, name):
    assert image_path(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b.jpg",
        "sub/../a.jpg",
        "..",
        "C:\\a.jpg",
        "C:a.jpg",
        "..\\a.jpg",
        "\\\\host\\share\\a.jpg",
    ],
)
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="leads out of the image folder") as error:
        image_path(tmp_path, name)
    assert repr(name) in one_line(error)


@pytest.mark.parametrize("name", [None, 5, "", ".", "/", ["a.jpg"], "a\0.jpg", "a\nb.jpg", "x" * 100000 + "\n"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(UserError, match="is no file name") as error:
        image_path(tmp_path, name)
    assert len(one_line(error)) < 200


def test_a_linked_picture_is_the_users_own(tmp_path):
    save(tmp_path / "elsewhere.png", gradient())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert np.array_equal(pixels_of(read_image(image_path(tmp_path / "images", "a.png"))), gradient())


# ------------------------------------------------------------------------------------------------------- kinds of pictures


def test_rgb_as_it_is(tmp_path):
    assert np.array_equal(pixels_of(read_image(save(tmp_path / "a.png", gradient()))), gradient())


def test_a_read_picture_can_be_written_to(tmp_path):
    image = read_image(save(tmp_path / "a.png", gradient()))
    image += 1
    assert np.array_equal(pixels_of(image), gradient() + 1)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(tmp_path, mode):
    Image.fromarray(gradient()).convert("L").convert(mode).save(tmp_path / "a.png")
    grey = np.array(Image.open(tmp_path / "a.png").convert("L"))
    assert grey.std() > 0
    assert np.array_equal(pixels_of(read_image(tmp_path / "a.png")), np.repeat(grey[..., None], 3, 2))


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([gradient(), np.arange(60, dtype=np.uint8).reshape(6, 10)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(read_image(tmp_path / "a.png")), gradient())


@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 128, 255])}])
def test_palette(tmp_path, options):
    indices = np.arange(60, dtype=np.uint8).reshape(6, 10) % 3
    picture = Image.fromarray(indices).convert("P")
    colours = np.array([[255, 0, 0], [0, 200, 0], [1, 2, 3]], dtype=np.uint8)
    picture.putpalette(colours.tobytes())
    picture.putdata(indices.ravel().tolist())
    picture.save(tmp_path / "a.png", **options)
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert np.array_equal(pixels_of(read_image(tmp_path / "a.png")), colours[indices])


def test_cmyk(tmp_path):
    red = Image.new("CMYK", (8, 4), (0, 255, 255, 0))
    red.save(tmp_path / "a.jpg", quality=100)
    pixels = pixels_of(read_image(tmp_path / "a.jpg"))
    assert pixels.shape == (4, 8, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, suffix):
    values = (np.arange(60, dtype=np.uint16) * 1092).reshape(6, 10)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels_of(read_image(tmp_path / f"a.{suffix}")), np.repeat((values // 256)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("values", "message"), [(np.full((4, 4), 0.5, np.float32), "floating-point"), (np.full((4, 4), 70000, np.int32), "65535")]
)
def test_pixels_without_a_known_range(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message) as error:
        read_image(tmp_path / "a.tif")
    assert str(tmp_path / "a.tif") in one_line(error)


def test_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert pixels_of(read_image(tmp_path / "a.webp"))[0, 0].tolist() == [255, 0, 0]


def test_real_photographs_are_decoded_exactly(shared_data):
    for path in sorted((shared_data("balloon") / "val").glob("*.jpg"))[:3]:
        with Image.open(path) as image:
            expected = np.array(image.convert("RGB"))
        assert np.array_equal(pixels_of(read_image(path)), expected)


# ---------------------------------------------------------------------------------------------------------------- broken


def jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [jpeg()[:2000], jpeg()[:-2], jpeg()[:100], png()[:2000], png()[:60], png()[:3000] + b"x" * 500, b"", b"not a picture", b"GIF89a"],
    ids=["jpeg half", "jpeg end", "jpeg head", "png half", "png head", "png broken chunk", "empty", "text", "gif head"],
)
def test_broken_files_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_image(path)
    assert one_line(error).startswith(f"{path}: ")
    assert "image" in one_line(error)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="No such file"):
        read_header(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="directory"):
        read_image(tmp_path)


def test_a_picture_made_to_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", gradient(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError) as error:
        read_image(path)
    assert one_line(error).startswith(f"{path}: ")


def test_the_largest_image_is_a_setting_that_the_error_names(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (1500, 1000)).save(path)
    assert read_image(path, max_megapixels=2).shape == (3, 1000, 1500)
    for read in (read_image, read_header):
        with pytest.raises(UserError, match=r"too large: 2 megapixels, more than data.max_megapixels \(1\)") as error:
            read(path, max_megapixels=1)
        assert one_line(error).startswith(f"{path}: ")


def test_an_image_beyond_pillows_own_limit_is_read_where_the_setting_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    path = tmp_path / "a.png"
    Image.new("1", (14000, 13500)).save(path)
    with pytest.raises(UserError, match=r"too large: 189 megapixels, more than data.max_megapixels \(178\)"):
        read_header(path)
    assert read_header(path, max_megapixels=190).stored == (14000, 13500)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), r"HEIC image; install .* pip install 'raydetr\[heic\]'"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200), "HEIC image"),
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_image_is_named_for_what_it_is(tmp_path, monkeypatch, content, what):
    monkeypatch.setattr(Image, "OPEN", {name: each for name, each in Image.OPEN.items() if name != "HEIF"})  # as without the extra
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, read_header):
        with pytest.raises(UserError, match=what) as error:
            read(tmp_path / "a.jpg")
        assert one_line(error).startswith(f"{tmp_path / 'a.jpg'}: ")


def test_heic_is_read_where_the_extra_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 64))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name, options in (("a.heic", {}), ("turned.heic", {"exif": exif.tobytes()})):
        image.save(tmp_path / name, quality=95, **options)
        header = read_header(tmp_path / name)
        decoded = pixels_of(read_image(tmp_path / name)).astype(int)
        expected = np.array(image if name == "a.heic" else image.transpose(Image.Transpose.ROTATE_270)).astype(int)
        assert header.upright == expected.shape[1::-1]
        assert abs(decoded - expected).mean() < 6


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for read in (read_image, read_header):
        with pytest.raises(UserError, match=r"a\.jpg: not a regular file"):
            read(tmp_path / "a.jpg")


def test_no_program_is_run_on_a_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UserError, match="EPS is no photograph"):
        read_image(tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------------------------------ orientation

UPRIGHT = {  # what a viewer shows of stored pixels with that tag
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_without_annotation_a_picture_is_turned_upright(tmp_path, orientation):
    path = save(tmp_path / "a.png", gradient(), orientation)
    assert np.array_equal(pixels_of(read_image(path)), UPRIGHT[orientation](gradient()))
    assert read_header(path) == Header(10, 6, orientation)
    assert read_header(path).upright == ((10, 6) if orientation < 5 else (6, 10))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("exif", ["upright", "stored"])
def test_the_annotated_size_says_which_image_was_annotated_where_it_can(tmp_path, orientation, exif):
    path = save(tmp_path / "a.png", gradient(), orientation)
    if orientation >= 5:
        assert np.array_equal(pixels_of(read_image(path, (10, 6), exif)), gradient())
        assert np.array_equal(pixels_of(read_image(path, (6, 10), exif)), UPRIGHT[orientation](gradient()))
    else:
        with pytest.raises(UserError, match="6 x 10"):
            read_image(path, (6, 10), exif)


@pytest.mark.parametrize(("height", "width", "orientations"), [(6, 10, (1, 2, 3, 4)), (8, 8, tuple(UPRIGHT))])
def test_where_the_size_cannot_tell_the_image_is_turned_upright_unless_the_setting_says_stored(tmp_path, height, width, orientations):
    for orientation in orientations:
        path = save(tmp_path / "a.png", gradient(height, width), orientation)
        turned = UPRIGHT[orientation](gradient(height, width))
        assert np.array_equal(pixels_of(read_image(path, (width, height))), turned)
        assert np.array_equal(pixels_of(read_image(path, (width, height), "upright")), turned)
        assert np.array_equal(pixels_of(read_image(path, (width, height), "stored")), gradient(height, width))
        assert read_header(path).is_turned((width, height), "upright") == (orientation != 1)


def test_without_an_annotated_size_the_setting_says_which_size_an_image_has(tmp_path):
    header = read_header(save(tmp_path / "a.png", gradient(), 6))
    assert (header.size("upright"), header.size("stored")) == ((6, 10), (10, 6))


def test_a_jpegs_orientation(tmp_path):
    path = save(tmp_path / "a.jpg", gradient(16, 32), 6)
    assert read_header(path) == Header(32, 16, 6)
    assert read_image(path).shape == (3, 32, 16)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_avifs_orientation(tmp_path, orientation):
    blocks = np.kron(gradient(2, 3) * 2, np.ones((24, 24, 1), np.uint8))  # large enough for a lossy format
    path = save(tmp_path / "a.avif", blocks, orientation, quality=95)
    assert read_header(path).orientation == orientation
    error = pixels_of(read_image(path)).astype(int) - UPRIGHT[orientation](blocks).astype(int)
    assert np.abs(error).mean() < 3
    assert np.abs(pixels_of(read_image(path, exif="stored")).astype(int) - blocks).mean() < 3


def test_a_tiff_that_comes_turned_is_not_turned_again(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(gradient()).save(path, tiffinfo={ORIENTATION: 6})
    assert read_header(path) == Header(6, 10, 1)
    assert np.array_equal(pixels_of(read_image(path)), UPRIGHT[6](gradient()))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"]
)
def test_a_tag_that_makes_no_sense_says_nothing(tmp_path, exif):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg") == Header(10, 6, 1)
    assert read_image(tmp_path / "a.jpg").shape == (3, 6, 10)


def test_a_picture_of_another_size_than_annotated(tmp_path):
    path = save(tmp_path / "a.png", gradient())
    with pytest.raises(UserError, match="10 x 6 pixels, its annotation says 640 x 480") as error:
        read_image(path, (640, 480))
    assert one_line(error).startswith(f"{path}: ")
