"""Picture files -> pictures, of any kind that a person has, within bounds of time and memory.

In: a file. Out: a picture, upright, without transparency, in mode L or RGB, of working size, or one line that says why
there is none. Only the named formats are opened: Pillow starts other programs for some of the others.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist.system.files import RecordError, read_regular

MAX_BYTES = 2**28  # of a file
MAX_PIXELS = 2**26  # larger pictures are refused before they are decoded; cameras reach 50 million
MAX_SCANS = 40  # of a progressive JPEG, each of which costs as much time as the whole picture; encoders write 10 to 20
MAX_SIDE = 1600  # larger pictures are reduced to it at once
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
CONVERTERS = {
    **dict.fromkeys((".heic", ".heif"), "heif-convert (package libheif-examples)"),
    **dict.fromkeys((".pdf", ".ps", ".eps", ".ai"), "ghostscript or pdftoppm (package poppler-utils)"),
    **dict.fromkeys((".svg", ".svgz"), "rsvg-convert (package librsvg2-bin)"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"), "dcraw_emu (package libraw-bin)"),
    **dict.fromkeys((".ico", ".psd", ".xcf", ".tga", ".jxl", ".icns"), "magick (package imagemagick)"),
}  # suffixes of pictures that are not read here, and what makes a PNG of them


class PictureError(ValueError):
    """A picture in which no digit can be seen, or a file that is no picture: one line for people."""


def is_picture_name(path: Path) -> bool:
    """Whether the suffix is that of a picture, also of one that is not read here, so that it is named as an error."""
    suffix = path.suffix.lower()
    return suffix in CONVERTERS or Image.registered_extensions().get(suffix) in FORMATS


def read_content(file: str) -> bytes:
    """The bytes of a file, or with - of standard input.

    Raises:
        PictureError: no regular file, or larger than 256 MiB, also where it has no end.
        OSError: missing, or not readable.
    """
    if file != "-":
        try:
            return read_regular(Path(file), MAX_BYTES)
        except RecordError as error:
            raise PictureError(str(error).removeprefix(f"{file}: ")) from error
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PictureError(f"too large: more than {MAX_BYTES:,} bytes")
    return content


def read_picture(content: bytes, suffix: str = "") -> Image.Image:
    """The picture in a file, upright, without transparency, in mode L or RGB, of working size.

    Args:
        content: of the file.
        suffix: of its name; says what a file may be that is not read here.

    Raises:
        PictureError: not a picture, damaged, cut short, or too large.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_cost(image, content)
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a JPEG is decoded to a smaller size at once
            picture = _without_transparency(ImageOps.exif_transpose(image))
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
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    return picture


def _check_cost(image: Image.Image, content: bytes) -> None:
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise PictureError(f"too large: {num_pixels / 1e6:,.0f} million pixels, at most {MAX_PIXELS / 1e6:.0f}")
    num_scans = content.count(b"\xff\xda") if image.info.get("progressive") else 1
    if num_scans > MAX_SCANS:
        raise PictureError(f"a progressive JPEG of {num_scans} scans, at most {MAX_SCANS}; save it anew")


def _without_transparency(image: Image.Image) -> Image.Image:
    """Mode L or RGB. What is drawn in the alpha channel alone counts as ink, else transparent pixels become paper."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits, whatever part of the range they use
        values = np.nan_to_num(np.asarray(image, np.float32))
        values = values - min(0.0, values.min())
        return Image.fromarray((values * (255 / max(values.max(), 1e-9))).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A"))
    opaque = np.asarray(rgba.convert("L"))[alpha > 127]
    if opaque.size and np.ptp(np.percentile(opaque, (2, 98))) < 50 and alpha.min() < 128:
        return Image.fromarray(255 - alpha)
    paper = Image.new("RGBA", rgba.size, (int(np.median(opaque)) if opaque.size else 255,) * 3 + (255,))
    return Image.alpha_composite(paper, rgba).convert("RGB")
