"""Image files in, (H, W, 3) uint8 RGB pixels out.

The format is read from the bytes, never from the name. Whatever is wrong with a file comes out as
`ImageRejected` with a reason code; nothing else leaves this module.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.ports import Pixels
from pipeline import dicom
from pipeline.paths import is_regular_file, os_path
from pipeline.rgb import TURNED_BY_90, as_rgb, orientation, upright

MAX_PIXELS = 100_000_000
"""Default limit of width × height: a few kilobytes can claim to be a 200-megapixel image."""

_HEAD_BYTES = 512


@dataclass(frozen=True)
class ImageFormat:
    """One kind of image file: how its bytes begin and which names it usually has."""

    name: str
    extensions: tuple[str, ...]
    begins: Callable[[bytes], bool]
    pillow: tuple[str, ...] = ()
    """Names of Pillow's decoders that may open it; empty for formats that are not Pillow's."""


def _starts(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(signatures)


def _is_bmp(head: bytes) -> bool:
    # "BM" alone also begins plain text; the size of the second header settles it.
    return head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in {12, 16, 40, 52, 56, 64, 108, 124}


FORMATS: Mapping[str, ImageFormat] = {
    f.name: f
    for f in (
        ImageFormat("png", (".png", ".apng"), _starts(b"\x89PNG\r\n\x1a\n"), ("PNG",)),
        ImageFormat("jpeg", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), _starts(b"\xff\xd8\xff"), ("JPEG", "MPO")),
        ImageFormat("tiff", (".tif", ".tiff"), _starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ("TIFF",)),
        ImageFormat("bmp", (".bmp", ".dib"), _is_bmp, ("BMP",)),
        ImageFormat("webp", (".webp",), lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", ("WEBP",)),
        ImageFormat("gif", (".gif",), _starts(b"GIF87a", b"GIF89a"), ("GIF",)),
        ImageFormat("dicom", (".dcm", ".dicom"), dicom.looks_like_dicom),
    )
}
"""Every format that can be read."""

_FOREIGN: Mapping[str, Callable[[bytes], bool]] = {
    "JPEG 2000": _starts(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "HEIF or AVIF": lambda head: head[4:8] == b"ftyp",
    "Photoshop": _starts(b"8BPS"),
    "PDF": _starts(b"%PDF"),
    "SVG": lambda head: b"<svg" in head[:256],
    "NIfTI": lambda head: head[:4] in {b"\x5c\x01\0\0", b"\0\0\x01\x5c"} or head[344:347] in {b"n+1", b"ni1"},
    "gzip (a compressed volume?)": _starts(b"\x1f\x8b"),
    "NRRD": _starts(b"NRRD"),
}

IMAGE_EXTENSIONS = frozenset(extension for f in FORMATS.values() for extension in f.extensions)
FOREIGN_EXTENSIONS = frozenset(
    {
        ".heic",
        ".heif",
        ".avif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".psd",
        ".svg",
        ".nii",
        ".nii.gz",
        ".nrrd",
        ".mha",
        ".svs",
        ".ndpi",
    }
)
"""Names that say "image" although none of `FORMATS` has them: listed, so that nobody misses them in silence."""


@dataclass(frozen=True)
class Probe:
    """What the header of an image file says."""

    format: str
    width_px: int
    """As shown, after the EXIF orientation."""
    height_px: int
    n_frames: int
    """1 but for multi-frame DICOM, whose frames are images of their own."""
    group_id: str | None = None
    """Patient, as a hash, where the file itself says it (DICOM)."""


def sniff(head: bytes) -> str | None:
    """Name in `FORMATS` of the format that begins with `head` (512 bytes are enough), or None."""
    return next((f.name for f in FORMATS.values() if f.begins(head)), None)


def probe(path: Path, *, max_pixels: int = MAX_PIXELS) -> Probe:
    """Format, size and number of frames, from the header alone; raises `ImageRejected`."""
    kind = _kind_of(path)
    if kind == "dicom":
        header = dicom.probe(path, max_pixels=max_pixels)
        return Probe("dicom", header.width_px, header.height_px, header.n_frames, header.group_id)
    with _opened(path, kind, max_pixels) as image:
        width, height = image.size[::-1] if orientation(image) in TURNED_BY_90 else image.size
    return Probe(kind, width, height, 1)


def read_pixels(path: Path, frame: int | None = None, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB pixels of an image file, upright; `frame` counts from 0 in multi-frame DICOM.

    16-bit and float images are brought to 8 bits by `rgb.to_8_bits`; transparency is composited over white;
    raises `ImageRejected`.
    """
    kind = _kind_of(path)
    if kind == "dicom":
        return dicom.read_frame(path, frame or 0, max_pixels=max_pixels)
    return _pillow_pixels(path, path, kind, max_pixels)


class ImageReader:
    """A `PixelReader` over a SOURCE folder and its `images` table; can be pickled to workers.

    A file whose bytes changed since the table was made is rejected: an `image_id` names bytes, not a path.
    """

    def __init__(self, root: Path, images: pd.DataFrame, *, max_pixels: int = MAX_PIXELS) -> None:
        self.root = root
        self.max_pixels = max_pixels
        usable = images[images["rejected"].isna()] if "rejected" in images else images
        frames = usable["frame"] if "frame" in usable else pd.Series(pd.NA, index=usable.index)
        self._places = {
            image_id: (path, None if pd.isna(frame) else int(frame))
            for image_id, path, frame in zip(usable["image_id"], usable["path"], frames, strict=True)
        }

    def __call__(self, image_id: str) -> Pixels:
        """The image's pixels; raises `ImageRejected`, also for an id that the table does not hold."""
        if image_id not in self._places:
            raise ImageRejected(RejectReason.MISSING_FILE, f"image {image_id[:12]}…: not in the images table.")
        text, frame = self._places[image_id]
        path = self.root / os_path(text)
        if frame is not None:
            return read_pixels(path, frame, max_pixels=self.max_pixels)
        kind = _kind_of(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _rejected(RejectReason.UNREADABLE, f"could not be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != image_id:
            raise ImageRejected(
                RejectReason.UNREADABLE, f"image {image_id[:12]}…: the file's bytes changed since ingest; ingest again."
            )
        if kind == "dicom":
            return dicom.read_frame(io.BytesIO(data), 0, max_pixels=self.max_pixels)
        return _pillow_pixels(io.BytesIO(data), path, kind, self.max_pixels)


def _kind_of(path: Path) -> str:
    """Name of the file's format; raises `ImageRejected` for everything that is no readable image."""
    if not is_regular_file(path):
        if os.path.exists(path):
            raise _rejected(RejectReason.NOT_AN_IMAGE, "not a file")
        raise _rejected(RejectReason.MISSING_FILE, "the file does not exist")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise _rejected(RejectReason.UNREADABLE, f"could not be opened ({error.strerror})") from error
    if not head:
        raise _rejected(RejectReason.EMPTY_FILE, "the file has no bytes")
    kind = sniff(head)
    if kind is not None:
        return kind
    foreign = next((name for name, begins in _FOREIGN.items() if begins(head)), None)
    if foreign is not None:
        raise _rejected(RejectReason.UNSUPPORTED_FORMAT, f"{foreign} is not among {', '.join(FORMATS)}")
    raise _rejected(RejectReason.NOT_AN_IMAGE, f"the bytes are none of {', '.join(FORMATS)}")


def _opened(source: Path | io.BytesIO, kind: str, max_pixels: int) -> Image.Image:
    """Pillow's image with its header read and checked; the pixels are not decoded yet."""
    # Pillow's own limit is one number for the whole process, and only warns; ours is per call and is checked below.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(source, formats=FORMATS[kind].pillow)
    except Exception as error:  # decoders of hostile bytes raise anything
        _raise_for(source, kind, error)
    problem = _header_problem(image, max_pixels)
    if problem is not None:
        image.close()
        raise problem
    return image


def _header_problem(image: Image.Image, max_pixels: int) -> ImageRejected | None:
    width, height = image.size
    if width < 1 or height < 1:
        return _rejected(RejectReason.ZERO_SIZE, f"{width} × {height} px")
    if width * height > max_pixels:
        return _rejected(RejectReason.TOO_MANY_PIXELS, f"{width} × {height} px; at most {max_pixels:,} pixels are read")
    # A phone's "multi picture" JPEG holds the photograph first and previews after it: not an animation.
    n_frames = 1 if image.format in {"JPEG", "MPO"} else getattr(image, "n_frames", 1)
    if n_frames > 1:
        return _rejected(RejectReason.ANIMATED, f"{n_frames} frames or pages; one image a file is read")
    return None


def _pillow_pixels(source: Path | io.BytesIO, path: Path, kind: str, max_pixels: int) -> Pixels:
    with _opened(source, kind, max_pixels) as image:
        try:
            image.load()
            pixels = np.asarray(as_rgb(upright(image)))
        except Exception as error:  # decoders of hostile bytes raise anything
            _raise_for(path, kind, error)
    return pixels


def _raise_for(source: Path | io.BytesIO, kind: str, error: Exception) -> NoReturn:
    """Turn a decoder's exception into the rejection that says the most."""
    data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
    if _says_zero(data, kind):
        raise _rejected(RejectReason.ZERO_SIZE, "the header says 0 px") from error
    if _is_cut(data, kind) or "truncated" in str(error).lower():
        raise _rejected(RejectReason.TRUNCATED, f"the {kind} file ends too early") from error
    shown = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else type(error).__name__
    raise _rejected(RejectReason.UNREADABLE, f"the {kind} file cannot be decoded ({shown})") from error


def _says_zero(data: bytes, kind: str) -> bool:
    """True if a header that Pillow refuses holds a width or height of 0."""
    fields = {"png": (16, 20, 4), "gif": (6, 8, 2), "bmp": (18, 22, 4)}.get(kind)
    if fields is None or len(data) < fields[1] + fields[2]:
        return False
    width_at, height_at, size = fields
    return not (any(data[width_at : width_at + size]) and any(data[height_at : height_at + size]))


def _is_cut(data: bytes, kind: str) -> bool:
    """True if the file lacks what its format ends with."""
    if kind == "png":
        return b"IEND" not in data[-64:]
    if kind == "jpeg":
        return b"\xff\xd9" not in data[-1024:]
    if kind == "webp":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "bmp":
        return int.from_bytes(data[2:6], "little") > len(data)
    return kind == "gif" and not data.endswith(b";")


def _rejected(reason: RejectReason, detail: str) -> ImageRejected:
    return ImageRejected(reason, f"{reason.value}: {detail}.")
