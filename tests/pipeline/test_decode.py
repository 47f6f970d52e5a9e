from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_contracts.errors import ImageRejected, RejectReason
from pipeline.decode import FORMATS, ImageReader, probe, read_pixels, sniff

PILLOW_NAMES = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "bmp": "BMP", "webp": "WEBP", "gif": "GIF"}


def picture(height: int = 40, width: int = 50, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def written(folder: Path, data: bytes, name: str = "a.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def reason_of(read: Callable[[Path], object], path: Path) -> RejectReason | None:
    try:
        read(path)
    except ImageRejected as error:
        return error.reason
    return None


def rejected(path: Path) -> RejectReason | None:
    """The reason. The header alone may not show it, but must not show another one."""
    reason = reason_of(read_pixels, path)
    assert reason_of(probe, path) in {None, reason}
    return reason


@pytest.mark.parametrize("kind", PILLOW_NAMES)
def test_every_format_is_read_whatever_its_name(tmp_path: Path, kind: str) -> None:
    image = picture()
    path = written(tmp_path, encoded(image, PILLOW_NAMES[kind]), "named_wrongly.xyz")
    header = probe(path)
    assert (header.format, header.width_px, header.height_px, header.n_frames) == (kind, 50, 40, 1)
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (40, 50, 3)
    if kind in {"png", "tiff", "bmp"}:
        np.testing.assert_array_equal(pixels, np.asarray(image))


def test_registry_sniffs_what_it_names() -> None:
    assert set(FORMATS) == {*PILLOW_NAMES, "dicom"}
    assert sniff(b"") is None


@given(st.binary(max_size=600))
def test_any_bytes_are_an_image_or_a_rejection(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = written(tmp_path_factory.mktemp("any"), data)
    with pytest.raises(ImageRejected):
        read_pixels(path)


@given(
    kind=st.sampled_from(sorted(PILLOW_NAMES)), at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans()
)
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: int, byte: int, cut: bool
) -> None:
    data = bytearray(encoded(picture(8, 9), PILLOW_NAMES[kind]))
    place = at % len(data)
    data[place] = byte
    path = written(tmp_path_factory.mktemp("damaged"), bytes(data[:place] if cut else data))
    try:
        pixels = read_pixels(path)
    except ImageRejected:
        return
    assert pixels.ndim == 3


@pytest.mark.parametrize("kind", sorted(PILLOW_NAMES))
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_files_say_so(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(picture(), PILLOW_NAMES[kind])
    assert rejected(written(tmp_path, data[: int(len(data) * share)])) is RejectReason.TRUNCATED


def test_broken_but_complete_file_is_unreadable(tmp_path: Path) -> None:
    data = bytearray(encoded(picture(), "PNG"))
    at = data.index(b"IDAT") + 10
    data[at : at + 50] = bytes(50)
    assert rejected(written(tmp_path, bytes(data))) is RejectReason.UNREADABLE


def test_what_is_no_image_says_what_it_is(tmp_path: Path) -> None:
    assert rejected(written(tmp_path, b"")) is RejectReason.EMPTY_FILE
    assert rejected(written(tmp_path, b"BM is how this plain text of a note begins.")) is RejectReason.NOT_AN_IMAGE
    assert rejected(written(tmp_path, b"\0\0\0\x18ftypheic" + bytes(30))) is RejectReason.UNSUPPORTED_FORMAT
    assert rejected(tmp_path / "nowhere.png") is RejectReason.MISSING_FILE
    assert rejected(tmp_path / ("x" * 300)) is RejectReason.MISSING_FILE
    (tmp_path / "folder.png").mkdir()
    assert rejected(tmp_path / "folder.png") is RejectReason.NOT_AN_IMAGE


def test_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert rejected(tmp_path / "pipe.png") is RejectReason.NOT_AN_IMAGE


@pytest.mark.parametrize(("kind", "at", "size"), [("PNG", 16, 4), ("BMP", 18, 4)])
def test_no_width_is_zero_size(tmp_path: Path, kind: str, at: int, size: int) -> None:
    data = bytearray(encoded(picture(), kind))
    data[at : at + size] = bytes(size)
    if kind == "PNG":
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    assert rejected(written(tmp_path, bytes(data))) is RejectReason.ZERO_SIZE


def test_bomb_is_rejected_by_its_header(tmp_path: Path) -> None:
    path = written(tmp_path, encoded(Image.new("1", (20_000, 10_000)), "PNG"))
    assert path.stat().st_size < 100_000
    assert rejected(path) is RejectReason.TOO_MANY_PIXELS


def test_limit_is_the_callers(tmp_path: Path) -> None:
    path = written(tmp_path, encoded(Image.new("1", (10_000, 9_500)), "PNG"))
    assert probe(path).width_px == 10_000, "95 megapixels: above Pillow's own limit, below ours"
    with pytest.raises(ImageRejected, match="at most 1,999"):
        read_pixels(written(tmp_path, encoded(picture(), "PNG")), max_pixels=1_999)
    assert read_pixels(written(tmp_path, encoded(picture(), "PNG")), max_pixels=2_000).shape == (40, 50, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_stacks_are_rejected(tmp_path: Path, kind: str) -> None:
    data = encoded(picture(), kind, save_all=True, append_images=[picture(seed=1)])
    assert rejected(written(tmp_path, data)) is RejectReason.ANIMATED


def test_phone_jpeg_with_a_preview_is_its_photograph(tmp_path: Path) -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (5, 4))])
    assert read_pixels(written(tmp_path, data)).shape == (40, 50, 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),
        (np.array([[0, 7, 255]], np.uint16), [0, 7, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, np.nan, 3.0]], np.float32), [0, 0, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[9.0, 9.0, 9.0]], np.float32), [9, 9, 9]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(tmp_path: Path, values: npt.NDArray[Any], expected: list[int]) -> None:
    path = written(tmp_path, encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(read_pixels(path)[0, :, 0], expected)


def test_sixteen_bit_png_is_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    shown = read_pixels(written(tmp_path, encoded(Image.fromarray(ramp), "PNG")))
    np.testing.assert_array_equal(shown[..., 0].ravel(), np.arange(256))


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    shown = read_pixels(written(tmp_path, encoded(rgba, "PNG")))
    np.testing.assert_array_equal(shown, [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(
        read_pixels(written(tmp_path, encoded(palette, "PNG", transparency=0))), [[[255, 255, 255], [40, 50, 60]]]
    )
    np.testing.assert_array_equal(
        read_pixels(written(tmp_path, encoded(palette, "PNG"))), [[[10, 20, 30], [40, 50, 60]]]
    )


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    for kind in ("JPEG", "TIFF"):
        shown = read_pixels(written(tmp_path, encoded(flat.convert("CMYK"), kind)))
        np.testing.assert_allclose(shown[8, 8].astype(int), [200, 100, 50], atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = picture(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(tmp_path, encoded(image, "PNG", exif=exif))
    pixels = read_pixels(path)
    header = probe(path)
    assert (header.height_px, header.width_px) == pixels.shape[:2]
    # The definition of the tag: where row 0 and column 0 of the stored image lie in the shown one.
    shown = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation](np.asarray(image))
    np.testing.assert_array_equal(pixels, shown)


def test_broken_metadata_does_not_cost_the_pixels(tmp_path: Path) -> None:
    image = picture()
    path = written(tmp_path, encoded(image, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"))
    np.testing.assert_array_equal(read_pixels(path), np.asarray(image))


def table(*rows: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["image_id", "path"]).assign(rejected=None, frame=None)


def test_reader_reads_by_id_and_travels_to_workers(tmp_path: Path) -> None:
    data = encoded(picture(), "PNG")
    name = 'odd 100% "name"\nwith newline.png'
    written(tmp_path, data, name)
    image_id = hashlib.sha256(data).hexdigest()
    reader = pickle.loads(pickle.dumps(ImageReader(tmp_path, table((image_id, name)))))
    np.testing.assert_array_equal(reader(image_id), np.asarray(picture()))
    with pytest.raises(ImageRejected, match="not in the images table"):
        reader("0" * 64)


def test_reader_refuses_a_file_that_changed(tmp_path: Path) -> None:
    path = written(tmp_path, encoded(picture(), "PNG"))
    image_id = hashlib.sha256(path.read_bytes()).hexdigest()
    reader = ImageReader(tmp_path, table((image_id, "a.png")))
    path.write_bytes(encoded(picture(seed=5), "PNG"))
    with pytest.raises(ImageRejected, match="changed since ingest"):
        reader(image_id)
    path.unlink()
    with pytest.raises(ImageRejected) as caught:
        reader(image_id)
    assert caught.value.reason is RejectReason.MISSING_FILE
