from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from data_contracts.errors import ImageRejected, RejectReason
from pipeline import ingest as module
from pipeline.decode import ImageReader, probe, read_pixels, sniff
from pipeline.dicom import window
from pipeline.ingest import ingest

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64  # 0 … 4032, 12 bits


def data_set(
    stored: npt.NDArray[np.generic], *, bits: int, photometric: str = "MONOCHROME2", frames: int = 1
) -> Dataset:
    """A small but complete DICOM object around stored values, (frames,) rows, columns(, samples)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID = generate_uid()
    ds.PatientID, ds.PatientName = "MRN-00042", "Doe^Jane"
    shape = stored.shape[1:] if frames > 1 else stored.shape
    ds.Rows, ds.Columns = shape[0], shape[1]
    ds.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    if ds.SamplesPerPixel == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = stored.dtype.itemsize * 8
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(np.issubdtype(stored.dtype, np.signedinteger))
    if frames > 1:
        ds.NumberOfFrames = frames
    ds.PixelData = stored.tobytes()
    return ds


def saved(ds: Dataset, folder: Path, name: str = "a.dcm") -> Path:
    path = folder / name
    ds.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, frame: int | None = None) -> npt.NDArray[np.uint8]:
    pixels = read_pixels(path, frame)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[..., :1]).all(), "a grey frame must come out grey"
    return pixels[..., 0]


def rejected(path: Path) -> RejectReason:
    with pytest.raises(ImageRejected) as caught:
        read_pixels(path)
    return caught.value.reason


@given(
    center=st.floats(-1000, 1000),
    width=st.floats(2, 4000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
def test_window_agrees_with_pydicom(center: float, width: float, function: str) -> None:
    values = np.linspace(-2048, 2047, 333)
    ds = Dataset()
    ds.PhotometricInterpretation, ds.PixelRepresentation, ds.BitsStored = "MONOCHROME2", 0, 8
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = float(f"{center:.6g}"), float(f"{width:.6g}"), function
    with np.errstate(over="ignore"):
        expected = apply_windowing(values, ds) / 255
    np.testing.assert_allclose(window(values, ds.WindowCenter, ds.WindowWidth, function), expected, rtol=0, atol=1e-9)


def test_rescale_and_first_window_give_what_a_viewer_shows(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.WindowCenter, ds.WindowWidth = [40, 1000], [400, 10]
    shown = grey(saved(ds, tmp_path))
    expected = np.rint(np.clip((RAMP - 1024.0 - 39.5) / 399 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(shown, expected)
    assert 0 < (shown == 0).sum() < 64, "the window must clip the dark end only"


def test_window_of_width_one_is_a_threshold(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    ds.WindowCenter, ds.WindowWidth = 2000, 1
    np.testing.assert_array_equal(grey(saved(ds, tmp_path)), np.where(RAMP > 1999.5, 255, 0))


def test_without_a_window_the_full_range_is_shown_and_padding_does_not_count(tmp_path: Path) -> None:
    stored = RAMP.astype(np.int16) + 1000
    stored[0, :4] = -2000
    ds = data_set(stored, bits=16)
    ds.PixelPaddingValue = -2000
    shown = grey(saved(ds, tmp_path))
    assert shown[0, 4] == 0
    assert shown[7, 7] == 255
    assert (shown[0, :4] == 0).all()


def test_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    stored = np.arange(20, 84, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(grey(saved(data_set(stored, bits=8), tmp_path)), stored)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = saved(data_set(stored, bits=8, photometric="MONOCHROME1"), tmp_path)
    np.testing.assert_array_equal(grey(path), 255 - stored)


def test_signed_values_keep_their_sign(tmp_path: Path) -> None:
    stored = (np.arange(64) - 32).astype(np.int16).reshape(8, 8)
    shown = grey(saved(data_set(stored, bits=16), tmp_path))
    assert shown[0, 0] == 0
    assert shown[7, 7] == 255
    assert (np.diff(shown.ravel().astype(int)) > 0).all()


def test_lookup_table_of_interest_wins_over_the_window(tmp_path: Path) -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    ds = data_set(stored, bits=8)
    item = Dataset()
    item.LUTDescriptor = [4, 10, 12]
    item.LUTData = [0, 1365, 2730, 4095]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    ds.VOILUTSequence = Sequence([item])
    ds.WindowCenter, ds.WindowWidth = 5, 2
    np.testing.assert_array_equal(grey(saved(ds, tmp_path)), np.clip(stored.astype(int) - 10, 0, 3) * 85)


def test_palette_colour_is_looked_up(tmp_path: Path) -> None:
    stored = np.array([[0, 1], [2, 3]], np.uint8)
    ds = data_set(stored, bits=8, photometric="PALETTE COLOR")
    colours = {"Red": [65535, 0, 0, 257], "Green": [0, 65535, 0, 514], "Blue": [0, 0, 65535, 771]}
    for name, values in colours.items():
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        ds[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(ds, f"{name}PaletteColorLookupTableData", np.array(values, "<u2").tobytes())
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [1, 2, 3]]]
    np.testing.assert_array_equal(read_pixels(saved(ds, tmp_path)), expected)


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    # Pure red in ITU-R BT.601, as PS3.3 C.7.6.3.1.2 defines YBR_FULL.
    stored = np.tile(np.array([76, 85, 255], np.uint8), (2, 2, 1))
    shown = read_pixels(saved(data_set(stored, bits=8, photometric="YBR_FULL"), tmp_path))
    np.testing.assert_allclose(shown.reshape(-1, 3).astype(int), np.tile([255, 0, 0], (4, 1)), atol=2)


def test_rgb_of_sixteen_bits_is_scaled(tmp_path: Path) -> None:
    stored = np.array([[[0, 65535, 257 * 7]]], np.uint16)
    ds = data_set(stored, bits=16, photometric="RGB")
    np.testing.assert_array_equal(read_pixels(saved(ds, tmp_path)), [[[0, 255, 7]]])


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_frames_equal_the_uncompressed(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    stored = np.tile(RAMP, (8, 8))
    plain, packed = data_set(stored, bits=12), data_set(stored, bits=12)
    packed.compress(syntax)
    np.testing.assert_array_equal(grey(saved(packed, tmp_path, "b.dcm")), grey(saved(plain, tmp_path)))


def test_missing_decoder_is_rejected_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = data_set(np.tile(RAMP, (8, 8)), bits=12)
    ds.compress(JPEG2000Lossless)
    path = saved(ds, tmp_path)
    monkeypatch.setattr(type(pydicom.pixels.get_decoder(JPEG2000Lossless)), "is_available", False)
    with pytest.raises(ImageRejected, match=r"JPEG 2000.*medmicn\[dicom\]") as caught:
        read_pixels(path)
    assert caught.value.reason is RejectReason.DICOM_NEEDS_PLUGIN


def test_video_is_unsupported_not_a_missing_plugin(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    ds.compress(RLELossless)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    assert rejected(saved(ds, tmp_path)) is RejectReason.UNSUPPORTED_FORMAT


def test_multi_frame_files_are_several_images_of_one_group(tmp_path: Path) -> None:
    frames = np.stack([np.random.default_rng(i).integers(0, 255, (32, 32)).astype(np.uint8) for i in range(3)])
    path = saved(data_set(frames, bits=8, frames=3), tmp_path)
    assert probe(path).n_frames == 3
    for i in range(3):
        np.testing.assert_array_equal(grey(path, i), frames[i])
    images = ingest(tmp_path).images
    assert [i.partition("#")[2] for i in images["image_id"]] == ["0", "1", "2"]
    assert images["frame"].tolist() == [0, 1, 2]
    assert images["group_id"].nunique() == images["split"].nunique() == 1
    reader = ImageReader(tmp_path, images)
    np.testing.assert_array_equal(reader(images["image_id"].iloc[2])[..., 0], frames[2])


def test_file_of_which_one_frame_failed_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.stack([np.random.default_rng(i).integers(0, 255, (32, 32)).astype(np.uint8) for i in range(3)])
    saved(data_set(frames, bits=8, frames=3), tmp_path)
    real = module.read_pixels

    def failing(path: Path, frame: int | None, *, max_pixels: int) -> object:
        if frame == 1:
            raise ImageRejected(RejectReason.DICOM_NEEDS_PLUGIN, "as if a decoder were missing")
        return real(path, frame, max_pixels=max_pixels)

    with monkeypatch.context() as patched:
        patched.setattr(module, "read_pixels", failing)
        first = ingest(tmp_path).images
    assert first["rejected"].fillna("").tolist() == ["", "dicom_needs_plugin", ""]
    again = ingest(tmp_path, known=first)
    assert (len(again.images), again.n_reused) == (3, 0)
    assert again.images["rejected"].isna().all()
    assert ingest(tmp_path, known=again.images).n_reused == 1


def test_frame_that_is_not_there_is_rejected(tmp_path: Path) -> None:
    path = saved(data_set(RAMP, bits=12), tmp_path)
    with pytest.raises(ImageRejected, match="frame 3 of 1"):
        read_pixels(path, 3)


def test_window_and_rescale_of_enhanced_files_come_from_the_frame(tmp_path: Path) -> None:
    ds = data_set(np.stack([RAMP, RAMP]), bits=12, frames=2)
    shared, transform = Dataset(), Dataset()
    transform.RescaleSlope, transform.RescaleIntercept = 2, -100
    shared.PixelValueTransformationSequence = Sequence([transform])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    own = []
    for center in (1000, 5000):
        group, voi = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 2001
        group.FrameVOILUTSequence = Sequence([voi])
        own.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(own)
    path = saved(ds, tmp_path)
    for frame, center in enumerate((1000, 5000)):
        expected = np.rint(np.clip((RAMP * 2.0 - 100 - center + 0.5) / 2000 + 0.5, 0, 1) * 255)
        np.testing.assert_array_equal(grey(path, frame), expected)


def test_report_without_pixels_is_named_as_such(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    del ds.PixelData
    assert rejected(saved(ds, tmp_path)) is RejectReason.DICOM_WITHOUT_PIXELS


def test_truncated_pixels_are_rejected(tmp_path: Path) -> None:
    path = saved(data_set(np.zeros((64, 64), np.uint16), bits=12), tmp_path)
    path.write_bytes(path.read_bytes()[:-4000])
    assert rejected(path) is RejectReason.TRUNCATED


def test_forged_sizes_are_rejected_before_any_pixel(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    ds.Rows = ds.Columns = 60_000
    assert rejected(saved(ds, tmp_path)) is RejectReason.TOO_MANY_PIXELS
    ds.Rows = 0
    assert rejected(saved(ds, tmp_path)) is RejectReason.ZERO_SIZE
    ds.Rows = ds.Columns = 8
    ds.NumberOfFrames = 2**31 - 1
    assert rejected(saved(ds, tmp_path)) is RejectReason.TRUNCATED


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_old_files_without_a_preamble_are_read(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    ds = data_set(RAMP, bits=12)
    path = tmp_path / "IM00001"
    implicit = syntax is ImplicitVRLittleEndian
    del ds.file_meta
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert sniff(path.read_bytes()[:512]) == "dicom"
    assert grey(path)[7, 7] == 255


def test_no_patient_data_leaves_the_header(tmp_path: Path) -> None:
    ds = data_set(RAMP, bits=12)
    first = probe(saved(ds, tmp_path)).group_id
    assert first is not None
    assert "00042" not in first
    other = data_set(RAMP, bits=12)
    assert probe(saved(other, tmp_path)).group_id == first, "the same patient must be the same group"
    other.PatientID = "Anonymous"
    by_study = probe(saved(other, tmp_path)).group_id
    assert by_study is not None
    assert by_study.startswith("dicom-study-")


def test_header_that_breaks_its_own_rules_is_read_in_silence(tmp_path: Path) -> None:
    # Warnings are errors here: pydicom's would print the offending value.
    ds = data_set(RAMP, bits=12)
    path = saved(ds, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"MRN-00042 ", b"MRN\\00\\42 "))
    assert grey(path)[7, 7] == 255
