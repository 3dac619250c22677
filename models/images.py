"""Images to pixels: from the bytes of a file, or an array of values, to what a vision model reads.

Legend: H height, W width, c channels.
"""

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from models.config import Vision
from models.errors import DataError
from models.tokenizer import Encoded

PixelArray = npt.NDArray[np.uint8]
MAX_PIXELS = 25_000_000
DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
MODES = {1: "L", 3: "RGB"}


class ImageError(DataError):
    """Bytes that are no image we read. problem: what is wrong, to be put behind a name for the input.

    is_too_large: it has too many pixels, and nothing was decoded.
    """

    def __init__(self, problem: str, is_too_large: bool = False) -> None:
        super().__init__(f"the input {problem}, and this model reads images")
        self.problem = problem
        self.is_too_large = is_too_large


@dataclass(frozen=True, eq=False)
class Pixels:
    """One image as the model reads it. value_HWc: uint8 [H, W, c]; its length is the tokens it becomes."""

    value_HWc: PixelArray
    tokens: int

    def __len__(self) -> int:
        return self.tokens

    @classmethod
    def blank(cls, vision: Vision, tokens: int) -> "Pixels":
        return cls(np.zeros((vision.height, vision.width, vision.channels), dtype=np.uint8), tokens)


class ImageEncoder:
    """Turns images into a model's pixels: the first frame, upright, in its colours (alpha is dropped), at its size.

    Resized bilinearly and without keeping the aspect, as the config says. Thread-safe: nothing is shared.
    """

    reads: Literal["image"] = "image"

    def __init__(self, vision: Vision, tokens: int) -> None:
        self.vision = vision
        self.max_tokens = tokens

    def encode(self, source: object, max_pixels: int | None = None) -> Encoded[Pixels]:
        """source: the bytes of a PNG, JPEG or WebP file, base64 of them (a data: URI or bare), or uint8 [H, W] or
        [H, W, c].

        Raises ImageError, DataError for what is neither.
        """
        if isinstance(source, np.ndarray):
            image = _from_array(source)
        elif isinstance(source, bytes | str):
            data = source if isinstance(source, bytes) else from_base64(source)
            image = _decode(data, max_pixels or MAX_PIXELS, self._size, MODES[self.vision.channels])
        else:
            raise DataError(f"this model reads images, not {type(source).__name__}")
        if image.mode.startswith("I"):  # 16 bits a pixel, of which `convert` would keep the low ones
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        image = image.convert(MODES[self.vision.channels])
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BILINEAR)
        value_HWc = np.array(image, dtype=np.uint8).reshape(self.vision.height, self.vision.width, -1)
        return Encoded(Pixels(value_HWc, self.max_tokens), self.max_tokens)

    @property
    def _size(self) -> tuple[int, int]:
        return self.vision.width, self.vision.height


def from_base64(text: str) -> bytes:
    """The bytes that a data: URI or bare base64 stands for. Raises ImageError; the message never holds the text."""
    prefix = DATA_URI.match(text)
    try:
        return base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (ValueError, binascii.Error):
        raise ImageError("is not base64 of an image") from None


def _from_array(value: npt.NDArray[Any]) -> Image.Image:
    value = value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value
    if value.dtype != np.uint8 or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] != 3):
        raise DataError(f"an image is {value.dtype} {list(value.shape)}, must be uint8 [H, W], [H, W, 1] or [H, W, 3]")
    return Image.fromarray(value)


def _decode(data: bytes, max_pixels: int, size: tuple[int, int], mode: str) -> Image.Image:
    """The first frame, upright. Nothing is decoded before the size in the header is known to be small enough.

    The formats' own classes, not Image.open: it would choose by more formats than ours and warn of sizes by itself.
    """
    if not data:
        raise ImageError("is empty")
    kind = next((format for format in FORMATS if format.starts(data)), None)
    if kind is None:
        raise ImageError("is no PNG, JPEG or WebP image")
    try:
        if kind.size_before is not None:
            _check_size(kind.size_before(data), max_pixels)
        with kind.open(io.BytesIO(data)) as image:
            _check_size(image.size, max_pixels)
            image.draft(mode, size)  # lets a JPEG decoder skip detail that resizing would throw away
            image.load()
            return ImageOps.exif_transpose(image)
    except (ImageError, MemoryError):
        raise
    except Exception:  # decoders of hostile bytes raise whatever they run into: OSError, SyntaxError, struct.error, ...
        raise ImageError("cannot be decoded") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"has more than {max_pixels} pixels", is_too_large=True)
    if not size[0] or not size[1]:
        raise ImageError("has no pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """From the first chunk, by RFC 9649: libwebp allocates a canvas as soon as it sees the file."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ImageError("cannot be decoded")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


@dataclass(frozen=True)
class Format:
    """magic: (offset, bytes) pairs that a file begins with. size_before: its size without its decoder."""

    magic: tuple[tuple[int, bytes], ...]
    open: Callable[[io.BytesIO], ImageFile.ImageFile]
    size_before: Callable[[bytes], tuple[int, int]] | None = None

    def starts(self, data: bytes) -> bool:
        return all(data[at : at + len(value)] == value for at, value in self.magic)


FORMATS = (
    Format(((0, b"\x89PNG\r\n\x1a\n"),), PngImagePlugin.PngImageFile),
    Format(((0, b"\xff\xd8\xff"),), JpegImagePlugin.JpegImageFile),
    Format(((0, b"RIFF"), (8, b"WEBP")), WebPImagePlugin.WebPImageFile, _webp_size),
)


def _ramp(y: PixelArray, x: PixelArray) -> PixelArray:
    return np.asarray(x * 8 + y * 3)


def _checks(y: PixelArray, x: PixelArray) -> PixelArray:
    return np.asarray((x // 4 + y // 4) % 2 * 200)


def _rings(y: PixelArray, x: PixelArray) -> PixelArray:
    return np.asarray(((x - 14) ** 2 + (y - 14) ** 2) // 2)


# Golden inputs are drawn, never a user's: whole-number arithmetic, the same on every machine and at every size.
GOLDEN_IMAGES: Mapping[str, Callable[[Any, Any], Any]] = {"ramp": _ramp, "checks": _checks, "rings": _rings}


def golden_image(name: str, vision: Vision) -> PixelArray:
    """uint8 [H, W, c]; each channel shows the pattern turned a little further."""
    y_HW, x_HW = np.mgrid[: vision.height, : vision.width]
    channels = [GOLDEN_IMAGES[name](y_HW + 5 * c, x_HW) % 256 for c in range(vision.channels)]
    return np.stack(channels, axis=2).astype(np.uint8)
