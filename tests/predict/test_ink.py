"""Files as they come: damaged, gigantic, of foreign kinds, or made to take time."""

from __future__ import annotations

import io
import os
import stat
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mnist.data import picture_file
from mnist.data.picture_file import PictureError, read_file
from mnist.predict import __main__ as command
from mnist.predict.ink import read_picture


def drawing() -> Image.Image:
    picture = Image.new("L", (300, 200), 240)
    ImageDraw.Draw(picture).line((100, 40, 120, 160), fill=20, width=12)
    return picture


def saved(picture: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a picture", "not a picture"),
        (b"", "not a picture"),
        (saved(drawing(), "PNG")[:300], "cannot be read"),
    ],
)
def test_files_that_are_no_pictures_are_one_line(content: bytes, message: str) -> None:
    with pytest.raises(PictureError, match=message) as caught:
        read_picture(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_huge_picture_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(Image.new("1", (side, side)), "PNG")
    monkeypatch.setattr(picture_file.ImageOps, "exif_transpose", lambda image: pytest.fail("decoded"))
    with warnings.catch_warnings(action="error"), pytest.raises(PictureError, match="too large"):
        read_picture(content)


def test_a_postscript_file_called_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(PictureError, match="not a picture, or none of AVIF, BMP"):
        read_picture(content, ".png")
    assert not started.exists()


def test_an_icon_with_a_huge_picture_inside_is_not_opened() -> None:
    with pytest.raises(PictureError, match=r"\.ico files are not read; make a PNG of it"):
        read_picture(saved(drawing(), "ICO"), ".ico")


def test_a_progressive_jpeg_of_300_scans_is_refused_and_a_plain_one_of_10_is_read() -> None:
    content = saved(drawing(), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    assert read_picture(content).size == (300, 200)
    with pytest.raises(PictureError, match=r"a progressive JPEG of 30\d scans, at most 40"):
        read_picture(content[:-2] + 300 * last_scan + content[-2:])


@pytest.mark.parametrize(
    ("suffix", "tool"), [(".HEIC", "heif-convert"), (".pdf", "pdftoppm"), (".svg", "rsvg-convert")]
)
def test_foreign_kinds_are_named_with_what_converts_them(suffix: str, tool: str) -> None:
    with pytest.raises(PictureError, match=f"files are not read; make a PNG of it, for example with .*{tool}"):
        read_picture(b"\0\0\0\x24ftypheic", suffix)


def test_endless_standard_input_is_given_up_at_256_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_BYTES", 1 << 20)
    with Path("/dev/zero").open(encoding="latin-1") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(PictureError, match="too large: more than 1,048,576 bytes"):
            command._standard_input()


def test_a_device_and_a_huge_file_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"^not a regular file$"):
        read_file(Path("/dev/zero"))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PictureError, match="1,099,511,627,776 bytes, expected at most 268,435,456"):
        read_file(tmp_path / "huge.png")
