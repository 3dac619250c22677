"""From files, base64 and arrays to pixels: what is read, what is refused, and what is never decoded."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile

from models.config import Vision
from models.errors import DataError
from models.images import GOLDEN_IMAGES, ImageEncoder, ImageError, Pixels, golden_image
from models.tokenizer import TextEncoder

GREY = ImageEncoder(Vision(8, 12, 4, 1, (0.5,), (0.5,)), 7)
COLOUR = ImageEncoder(Vision(8, 12, 4, 3, (0.5,) * 3, (0.5,) * 3), 7)
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def file(image: Any, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def pixels(encoder: ImageEncoder, source: object) -> npt.NDArray[np.uint8]:
    return encoder.encode(source).ids.value_HWc


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_lossless_files_come_back_as_they_were(options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(pixels(COLOUR, file(PICTURE, **options)), PICTURE)


def test_an_item_is_as_long_as_its_tokens() -> None:
    encoded = GREY.encode(PICTURE[:, :, 0])
    assert (len(encoded.ids), encoded.length, encoded.truncated) == (7, 7, False)
    assert encoded.ids.value_HWc.shape == (8, 12, 1)


def test_the_same_pixels_by_every_way_in() -> None:
    data = file(PICTURE)
    text = base64.b64encode(data).decode()
    wanted = pixels(COLOUR, PICTURE)
    for source in (data, text, f"data:image/png;base64,{text}", f"DATA:image/webp;base64,{text}"):
        np.testing.assert_array_equal(pixels(COLOUR, source), wanted)


def test_grey_of_colour_is_luma_and_colour_of_grey_repeats_it() -> None:
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B, rounded."""
    luma = np.rint(PICTURE @ np.array([0.299, 0.587, 0.114]))
    assert np.abs(pixels(GREY, PICTURE)[:, :, 0] - luma).max() <= 1
    grey = PICTURE[:, :, 1]
    np.testing.assert_array_equal(pixels(COLOUR, grey), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(pixels(GREY, grey[:, :, None])[:, :, 0], grey)


def test_sizes_are_fitted_without_keeping_the_aspect() -> None:
    halves = np.zeros((40, 40), dtype=np.uint8)
    halves[:, 20:] = 200
    got = pixels(GREY, file(halves))[:, :, 0]
    assert got.shape == (8, 12)
    assert (got[:, :5] == 0).all()
    assert (got[:, 7:] == 200).all()


def test_odd_modes() -> None:
    image = Image.fromarray(PICTURE)
    alpha = Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 7)))
    np.testing.assert_array_equal(pixels(COLOUR, file(alpha)), PICTURE)  # alpha is dropped, not blended
    for mode in ("P", "1", "LA", "L"):
        np.testing.assert_array_equal(
            pixels(COLOUR, file(image.convert(mode))), np.array(image.convert(mode).convert("RGB"))
        )
    deep = (PICTURE[:, :, 0].astype(np.uint16) << 8) + 255
    np.testing.assert_array_equal(pixels(GREY, file(deep))[:, :, 0], PICTURE[:, :, 0])
    assert pixels(COLOUR, file(image.convert("CMYK"), "JPEG", quality=95)).shape == (8, 12, 3)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, 270), (8, 90)])
def test_cameras_that_lie_on_their_side(orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = Image.fromarray(PICTURE).resize((12, 8) if turn % 180 == 0 else (8, 12))
    wanted = np.array(big.rotate(turn, expand=True))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(pixels(COLOUR, file(big, format, exif=exif, **options)), wanted)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_the_first_frame_of_a_moving_image(format: str) -> None:
    first, second = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue"))
    data = file(
        first,
        format,
        save_all=True,
        append_images=[second],
        duration=50,
        **({"lossless": True} if format == "WEBP" else {}),
    )
    assert (pixels(COLOUR, data) == [255, 0, 0]).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def webp(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


JPEG = file(PICTURE, "JPEG")
BOMBS = {
    "png": png_header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(b"")),
    "png, small data": png_header(5001, 5000) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""),
    "jpeg": JPEG.replace(struct.pack(">HH", 8, 12), struct.pack(">HH", 60_000, 60_000), 1),
    "webp, extended": webp(b"VP8X", bytes(4) + b"\xff\xff\x00\xff\xff\x00" + bytes(8)),
    "webp, lossless": webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20)),
    "webp, lossy": webp(b"VP8 ", b"\x00\x00\x00\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(image: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    with pytest.raises(ImageError, match="has more than 25000000 pixels") as caught:
        GREY.encode(BOMBS[name])
    assert caught.value.is_too_large


def test_the_limit_is_inclusive_and_the_callers() -> None:
    data = file(np.zeros((10, 10), dtype=np.uint8))
    assert len(GREY.encode(data, 100).ids) == 7
    with pytest.raises(ImageError, match="more than 99 pixels"):
        GREY.encode(data, 99)


WHOLE = file(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BROKEN: dict[str, tuple[object, str]] = {
    "nothing": (b"", "is empty"),
    "no image": (b"hello, this is not an image", "is no PNG, JPEG or WebP"),
    "another format": (file(PICTURE, "GIF"), "is no PNG, JPEG or WebP"),
    "a page that says it is svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no PNG"),
    "half a png": (WHOLE[: len(WHOLE) // 2], "cannot be decoded"),
    "a png with spoiled data": (WHOLE[:60] + bytes(200) + WHOLE[260:], "cannot be decoded"),
    "png magic alone": (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
    "png of no pixels": (png_header(0, 5), "cannot be decoded|has no pixels"),
    "half a jpeg": (JPEG[:200], "cannot be decoded"),
    "jpeg magic alone": (b"\xff\xd8\xff", "cannot be decoded"),
    "webp magic alone": (b"RIFF\x04\x00\x00\x00WEBP", "cannot be decoded"),
    "half a webp": (file(PICTURE, "WEBP")[:40], "cannot be decoded"),
    "no base64": ("what a lovely day", "is not base64"),
    "base64 of text": (base64.b64encode(b"what a lovely day").decode(), "is no PNG"),
    "bad padding": ("abc", "is not base64"),
    "not ascii": ("é" * 8, "is not base64"),
    "a URL": ("https://example.org/cat.png", "is not base64"),
    "a data URI of text": ("data:text/plain;base64,aGVsbG8=", "is not base64"),
    "an empty data URI": ("data:image/png;base64,", "is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_refused(name: str) -> None:
    source, problem = BROKEN[name]
    with pytest.raises(ImageError, match=problem) as caught:
        GREY.encode(source)
    assert not caught.value.is_too_large
    if isinstance(source, str) and len(source) > 4:
        assert source not in str(caught.value)


def test_memory_that_runs_out_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(MemoryError):
        GREY.encode(WHOLE)


@pytest.mark.parametrize("source", [None, 5, ["a"], np.zeros((2, 2)), np.zeros((2, 2, 2), dtype=np.uint8)])
def test_other_things_are_refused(source: object) -> None:
    with pytest.raises(DataError):
        GREY.encode(source)


def test_texts_and_images_are_told_apart(tokenizer_file: Any) -> None:
    with pytest.raises(DataError, match="reads text, not images"):
        TextEncoder(tokenizer_file, 8, 64).encode(PICTURE)


def test_many_threads_share_an_encoder() -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (40, 30, 30, 3), dtype=np.uint8)
    files = [file(picture) for picture in pictures]
    alone = [pixels(COLOUR, data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: pixels(COLOUR, data), files))
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_golden_images_are_drawn_the_same_everywhere(name: str) -> None:
    values: Callable[[int, int], int] = {
        "ramp": lambda y, x: x * 8 + y * 3,
        "checks": lambda y, x: (x // 4 + y // 4) % 2 * 200,
        "rings": lambda y, x: ((x - 14) ** 2 + (y - 14) ** 2) // 2,
    }[name]
    image = golden_image(name, COLOUR.vision)
    assert image.shape == (8, 12, 3)
    for channel in range(3):
        for y, x in ((0, 0), (7, 11), (3, 8)):
            assert image[y, x, channel] == values(y + 5 * channel, x) % 256


def test_a_blank_is_black() -> None:
    blank = Pixels.blank(COLOUR.vision, 7)
    assert blank.value_HWc.shape == (8, 12, 3)
    assert not blank.value_HWc.any()
