"""Image files of strangers: where they may lie (`names.py`), how large they may be, and decoding them. No torch.

Formats are those of photographs and drawings that Pillow decodes by itself; EPS, which it gives to Ghostscript, and the
rest are refused.
"""

from PIL import Image

from hydra_vlm.errors import DataError
from hydra_vlm.names import link_fault
from hydra_vlm.reading import file_fault

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485
"""Pixels of the largest image by default: above it Pillow warns of a bomb."""

LONGEST_SIDE = 200
"""Times that an image's longer side may be its shorter one, as Qwen's processors want it. Processors that bring the
shorter side to a length would make a line of one pixel an image of gigabytes."""


def image_fault(path: str, folder: str | None, max_pixels: int) -> str:
    """What is wrong with an image file, which must lie in the resolved `folder` (None: anywhere); "" for nothing.

    Decodes it whole.
    """
    return place_fault(path, folder) or examine(path, max_pixels)[1]


def place_fault(path: str, folder: str | None) -> str:
    """Whether the file is missing, or a link leads out of the resolved `folder` (None: anywhere); "" if neither."""
    if fault := file_fault(path):
        return f"image {path} {fault}"
    if folder is not None and (fault := link_fault(path, folder, "the image folder")):
        return f"image {path} {fault}"
    return ""


def examine(path: str, max_pixels: int) -> tuple[tuple[int, int] | None, str]:
    """(width, height) and what is wrong ("" for nothing) with an image; decoded whole unless it is too large."""
    size = None
    try:
        size = header_size(path)
        fault = size_fault(path, size, max_pixels)
        if not fault:
            decode(path)
    except DataError as problem:
        return size, str(problem)
    return size, fault


def size_fault(path: str, size: tuple[int, int], max_pixels: int) -> str:
    """Whether an image of this (width, height) has more pixels than allowed once it is made square; "" if not."""
    width, height = size
    pixels = max(width, height) ** 2
    if pixels <= max_pixels:
        return _shape_fault(path, size)
    return (
        f"image {path} has {width} x {height} pixels; made square that is {pixels:,}, more than "
        f"data.max_image_pixels {max_pixels:,}: make it smaller or raise the limit"
    )


def header_size(path: str) -> tuple[int, int]:
    """(width, height) as the file's header has it.

    Raises:
        DataError: naming the file and the reason.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as problem:  # decoders raise whatever a broken file makes them stumble over
        raise _unreadable(path, problem) from None


def decode(path: str) -> Image.Image:
    """Open and fully decode an image as RGB.

    Raises:
        DataError: naming the file and the reason.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if fault := _shape_fault(path, image.size):
                raise DataError(fault)
            return image.convert("RGB")
    except DataError:
        raise
    except Exception as problem:  # decoders raise whatever a broken file makes them stumble over
        raise _unreadable(path, problem) from None


def _shape_fault(path: str, size: tuple[int, int]) -> str:
    width, height = size
    if max(size) <= LONGEST_SIDE * min(size):
        return ""
    return (
        f"image {path} has {width} x {height} pixels: one side is more than {LONGEST_SIDE} times the other, and no "
        "model reads such strips: cut it into pieces or leave it out"
    )


def _unreadable(path: str, problem: Exception) -> DataError:
    return DataError(f"image {path} cannot be read ({str(problem) or type(problem).__name__})")
