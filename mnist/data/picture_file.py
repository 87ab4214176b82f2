"""Picture files -> pictures, of any kind that a person has, within bounds of time and memory.

In: a file. Out: a picture, upright, without transparency, in mode L or RGB, or one line that says why there is none;
and from it an image for a network. Only the named formats are opened: Pillow starts other programs for some others.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist.system.files import RecordError, read_regular

MAX_BYTES = 256 << 20  # of a file
MAX_PIXELS = 2**26  # larger pictures are refused before they are decoded; cameras reach 50 million
MAX_SCANS = 40  # of a progressive JPEG, each of which costs as much time as the whole picture; encoders write 10 to 20
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
CONVERTERS = {
    **dict.fromkeys((".heic", ".heif"), "heif-convert (package libheif-examples)"),
    **dict.fromkeys((".pdf", ".ps", ".eps", ".ai"), "ghostscript or pdftoppm (package poppler-utils)"),
    **dict.fromkeys((".svg", ".svgz"), "rsvg-convert (package librsvg2-bin)"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"), "dcraw_emu (package libraw-bin)"),
    **dict.fromkeys((".ico", ".psd", ".xcf", ".tga", ".jxl", ".icns"), "magick (package imagemagick)"),
}  # suffixes of pictures that are not read here, and what makes a PNG of them
IGNORED = (".", "__MACOSX")  # how names begin of what a system or an editor keeps in a folder
REDUCED = 4  # a picture is decoded to this many times the side that is wanted, where its format can do so

Pixels = npt.NDArray[np.uint8]


class PictureError(ValueError):
    """A file that is no picture, or a picture in which nothing can be seen: one line for people."""


def is_picture_name(name: str) -> bool:
    """Whether the suffix is that of a picture; also of a kind that is not read here: that is an error."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a folder may have 200,000 files
    return suffix in CONVERTERS or Image.registered_extensions().get(suffix) in FORMATS


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        PictureError: no regular file, or larger than 256 MiB, also where it has no end.
        OSError: missing, or not readable.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except RecordError as error:
        raise PictureError(str(error).removeprefix(f"{path}: ")) from error


def on_plain_ground(image: Image.Image) -> Image.Image:
    """Mode L or RGB: transparent pixels become white, or black where what is drawn is light; 16 bits become 8."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits, whatever part of the range they use
        values = np.nan_to_num(np.asarray(image, np.float32))
        values = values - min(0.0, values.min())
        return Image.fromarray((values * (255 / max(values.max(), 1e-9))).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    rgba = image.convert("RGBA")
    drawn = np.asarray(rgba.convert("L"))[np.asarray(rgba.getchannel("A")) > 127]
    ground = Image.new("RGBA", rgba.size, "black" if drawn.size and drawn.mean() > 191 else "white")
    return Image.alpha_composite(ground, rgba).convert("RGB")


def decode(
    content: bytes,
    suffix: str,
    max_side: int,
    without_transparency: Callable[[Image.Image], Image.Image] = on_plain_ground,
) -> Image.Image:
    """The picture in a file, upright, without transparency, in mode L or RGB. Pillow may warn of it.

    Args:
        content: of the file.
        suffix: of its name; says what a file may be that is not read here.
        max_side: larger pictures are reduced to it.
        without_transparency: brings a picture to mode L or RGB.

    Raises:
        PictureError: not a picture, damaged, cut short, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_cost(image, content)
            image.draft("RGB", (max_side, max_side))  # a JPEG is decoded to a smaller size at once
            picture = without_transparency(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(f"too large: at most {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        reason = f"not a picture, or none of {', '.join(FORMATS)}"
        if suffix.lower() in CONVERTERS:
            reason = f"{suffix} files are not read; make a PNG of it, for example with {CONVERTERS[suffix.lower()]}"
        raise PictureError(reason) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PictureError(f"cannot be read ({' '.join(reason.split()) or type(error).__name__})") from error
    picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return picture


def _check_cost(image: Image.Image, content: bytes) -> None:
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise PictureError(f"too large: {num_pixels / 1e6:,.0f} million pixels, at most {MAX_PIXELS / 1e6:.0f}")
    num_scans = content.count(b"\xff\xda") if image.info.get("progressive") else 1
    if num_scans > MAX_SCANS:
        raise PictureError(f"a progressive JPEG of {num_scans} scans, at most {MAX_SCANS}; save it anew")


def to_image(content: bytes, suffix: str, num_channels: int, size: int) -> Pixels:
    """The picture in a file as uint8 (C, size, size), whole: its sides keep their ratio.

    What is missing of a square is filled with the colour of the picture's edge.

    Raises:
        PictureError: as `decode`.
    """
    picture = decode(content, suffix, REDUCED * size).convert("RGB" if num_channels == 3 else "L")
    if picture.width != picture.height:
        pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = tuple(int(value) for value in np.median(edge, axis=0))
        side = max(picture.size)
        square = Image.new(picture.mode, (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    if picture.width != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture).reshape(size, size, num_channels).transpose(2, 0, 1))
