"""DICOM frames in, (H, W, 3) uint8 RGB pixels out, as a viewer would first show them.

Grey frames go stored value → modality (rescale or table) → values of interest (table, else the first window,
else the full range) → inverted for MONOCHROME1, after PS3.3 C.11.1 and C.11.2. Colour frames go palette or
YBR → RGB. Names of patients, and values from the header, never reach a message.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import config as pydicom_config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder, pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from data_contracts.errors import ImageRejected, RejectReason
from data_contracts.ports import Pixels

_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
_LAST_FIRST_ELEMENT = 0x18
"""Files without a preamble begin with one of (0008,0000) … (0008,0018), the SOP instance."""
_EXPLICIT_VRS = frozenset({b"UL", b"UI", b"CS", b"DA", b"SH", b"OB"})
_PLACEHOLDER_PATIENTS = frozenset(
    {"", "0", "anon", "anonymous", "anonymized", "anonymised", "unknown", "none", "na", "n/a", "removed"}
)

_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Header:
    """Size of a frame, number of frames, and the patient as a hash (None where the file does not say)."""

    width_px: int
    height_px: int
    n_frames: int
    group_id: str | None


def looks_like_dicom(head: bytes) -> bool:
    """True for the `DICM` mark, and for old files that begin with their first data element."""
    if head[128:132] == b"DICM":
        return True
    if head[:2] not in _FIRST_GROUPS or len(head) < 16:
        return False
    if head[4:6] in _EXPLICIT_VRS:
        return True
    element, length = int.from_bytes(head[2:4], "little"), int.from_bytes(head[4:8], "little")
    return element <= _LAST_FIRST_ELEMENT and 0 < length <= 64  # implicit: no type, only a length


def probe(path: Path, *, max_pixels: int) -> Header:
    """What the header says, checked; raises `ImageRejected`."""
    return _header(_open(path), _size_of(path), max_pixels)


def read_frame(source: Path | io.BytesIO, frame: int, *, max_pixels: int) -> Pixels:
    """(H, W, 3) uint8 RGB pixels of one frame, counted from 0; raises `ImageRejected`."""
    dataset = _open(source)
    header = _header(dataset, _size_of(source), max_pixels)
    if not 0 <= frame < header.n_frames:
        raise _rejected(RejectReason.UNREADABLE, f"frame {frame} of {header.n_frames} was asked for")
    try:
        return _as_rgb(dataset, frame)
    except Exception as error:  # decoders of hostile bytes raise anything
        too_short = isinstance(error, EOFError) or "less than" in str(error) or "frames could be" in str(error)
        reason = RejectReason.TRUNCATED if too_short else RejectReason.UNREADABLE
        raise _rejected(reason, f"frame {frame} cannot be decoded ({type(error).__name__})") from error


def window(values: _Numbers, center: float, width: float, function: str = "LINEAR") -> _Numbers:
    """Values of interest in [0, 1]: PS3.3 C.11.2.1.2.1 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / max(width, 1e-6), -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    # A width of 0 (LINEAR: 1) is a threshold; the smallest float keeps the formula and does that.
    return np.clip((values - center) / max(width, 1e-9) + 0.5, 0.0, 1.0)


def _open(source: Path | io.BytesIO) -> Dataset:
    """The data set, pixels not read yet where the source is a file."""
    # Values that break their own rules are common, and pydicom's warnings would print them: patient data.
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    try:
        if isinstance(source, Path):
            dataset: Dataset = pydicom.dcmread(source, force=True, defer_size=1 << 16)
        else:
            dataset = pydicom.dcmread(source, force=True)
    except Exception as error:  # decoders of hostile bytes raise anything
        raise _rejected(RejectReason.UNREADABLE, f"the header cannot be read ({type(error).__name__})") from error
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = _syntax_of(dataset)
    return dataset


def _syntax_of(dataset: Dataset) -> UID:
    """The transfer syntax of a data set that came without its file header."""
    implicit, little_endian = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian


def _header(dataset: Dataset, n_bytes: int, max_pixels: int) -> Header:
    if not any(keyword in dataset for keyword in _PIXEL_KEYWORDS):
        raise _rejected(RejectReason.DICOM_WITHOUT_PIXELS, "it holds no image (a report, a plan, a structured note?)")
    try:
        width, height = int(dataset.Columns), int(dataset.Rows)
        n_frames = max(1, int(dataset.get("NumberOfFrames") or 1))
    except Exception as error:
        raise _rejected(RejectReason.UNREADABLE, "rows, columns or number of frames cannot be read") from error
    if width < 1 or height < 1:
        raise _rejected(RejectReason.ZERO_SIZE, f"{width} × {height} px")
    if width * height > max_pixels:
        raise _rejected(RejectReason.TOO_MANY_PIXELS, f"{width} × {height} px; at most {max_pixels:,} pixels are read")
    _check_decodable(dataset)
    # A forged number of frames would be a bomb of rows: each frame takes at least an 8-byte item.
    if n_frames > max(1, n_bytes // 8):
        raise _rejected(RejectReason.TRUNCATED, f"{n_frames} frames do not fit into {n_bytes} bytes")
    return Header(width, height, n_frames, _group_id(dataset))


def _check_decodable(dataset: Dataset) -> None:
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise _rejected(RejectReason.UNSUPPORTED_FORMAT, f"transfer syntax {syntax.name} is no still image") from error
    if not available:
        raise _rejected(
            RejectReason.DICOM_NEEDS_PLUGIN,
            f"transfer syntax {syntax.name} needs a decoder; install it with: pip install 'medmicn[dicom]'",
        )


def _group_id(dataset: Dataset) -> str | None:
    """The patient, else the study, as a hash: enough to keep a patient in one split, and no name."""
    patient = str(dataset.get("PatientID") or "").strip()
    if patient.lower() not in _PLACEHOLDER_PATIENTS:
        return "dicom-patient-" + _short_hash(patient)
    study = str(dataset.get("StudyInstanceUID") or "").strip()
    return "dicom-study-" + _short_hash(study) if study else None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _as_rgb(dataset: Dataset, frame: int) -> Pixels:
    stored = pixel_array(dataset, index=frame)  # YBR comes as RGB
    interpretation = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if interpretation == "PALETTE COLOR":
        return _colour_to_8_bits(apply_color_lut(stored, dataset)[..., :3])
    if stored.ndim == 3:
        return _colour_to_8_bits(stored[..., :3], int(dataset.BitsStored))
    shown = _values_of_interest(_modality_values(stored, dataset, frame), dataset, frame)
    if interpretation == "MONOCHROME1":
        shown = 1.0 - shown
    grey = np.rint(np.nan_to_num(shown) * 255.0).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _colour_to_8_bits(colours: npt.NDArray[np.generic], bits: int | None = None) -> Pixels:
    highest = 2 ** (bits or 8 * colours.dtype.itemsize) - 1
    if highest == 255:
        return np.ascontiguousarray(colours, dtype=np.uint8)
    return np.rint(np.asarray(colours, np.float64) * (255.0 / highest)).clip(0, 255).astype(np.uint8)


def _modality_values(stored: npt.NDArray[np.generic], dataset: Dataset, frame: int) -> _Numbers:
    """Stored values in the modality's units, such as Hounsfield units."""
    if dataset.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset), np.float64)
    slope = _first_number(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _first_number(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")
    return np.asarray(stored, np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _values_of_interest(values: _Numbers, dataset: Dataset, frame: int) -> _Numbers:
    """Modality values in [0, 1]: through the table, else the first window, else the full range."""
    table = dataset.get("VOILUTSequence")
    if table:
        return _looked_up(values, table[0])
    center = _first_number(dataset, frame, "FrameVOILUTSequence", "WindowCenter")
    width = _first_number(dataset, frame, "FrameVOILUTSequence", "WindowWidth")
    if center is not None and width is not None and width > 0:
        function = _shared_or_own(dataset, frame, "FrameVOILUTSequence", "VOILUTFunction")
        return window(values, center, width, str(function or "LINEAR").upper())
    return _full_range(values, dataset)


def _looked_up(values: _Numbers, item: Dataset) -> _Numbers:
    n_entries, first, bits = (int(v) for v in item.LUTDescriptor)
    n_entries = n_entries or 2**16
    data = item.LUTData
    entries = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
    index = np.clip(np.rint(values) - first, 0, min(n_entries, len(entries)) - 1).astype(np.int64)
    return np.clip(entries[index] / (2.0**bits - 1.0), 0.0, 1.0)


def _full_range(values: _Numbers, dataset: Dataset) -> _Numbers:
    """8-bit frames as they are; deeper ones from their darkest to their brightest pixel, padding left out."""
    integers = "PixelData" in dataset and int(dataset.get("PixelRepresentation") or 0) == 0
    if integers and int(dataset.get("BitsStored") or 16) <= 8 and "RescaleSlope" not in dataset:
        return values / (2.0 ** int(dataset.BitsStored) - 1.0)
    inside = np.isfinite(values)
    padding = dataset.get("PixelPaddingValue")
    if isinstance(padding, int):
        slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
        inside &= values != padding * slope + intercept
    if not inside.any():
        return np.zeros_like(values)
    low, high = float(values[inside].min()), float(values[inside].max())
    return np.clip((np.where(np.isfinite(values), values, low) - low) / ((high - low) or 1.0), 0.0, 1.0)


def _first_number(dataset: Dataset, frame: int, sequence: str, keyword: str) -> float | None:
    """The (first) number of an element, from the functional groups of this frame or from the top level."""
    value = _shared_or_own(dataset, frame, sequence, keyword)
    if isinstance(value, str | bytes | int | float):
        return float(value)
    return float(value[0]) if value else None  # type: ignore[index]


def _shared_or_own(dataset: Dataset, frame: int, sequence: str, keyword: str) -> object:
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*own[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])]
    items = [group[sequence].value[0] for group in groups if sequence in group and group[sequence].value]
    return next((item.get(keyword) for item in [*items, dataset] if item.get(keyword) is not None), None)


def _size_of(source: Path | io.BytesIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes


def _rejected(reason: RejectReason, detail: str) -> ImageRejected:
    return ImageRejected(reason, f"{reason.value}: {detail}.")
