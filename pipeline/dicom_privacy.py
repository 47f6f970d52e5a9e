"""What a DICOM file says about text in its picture: no re-encoding removes a name that is part of the pixels."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom import config as pydicom_config


def text_is_burnt_in(path: Path) -> bool:
    """Whether the header says that the pixels hold text that identifies the patient (0028,0301).

    False where the header is silent, as most are: a picture then has to be looked at by a person. True where the
    header cannot be read: what is not known to be safe is not drawn.
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["BurnedInAnnotation"])
    except Exception:  # decoders of hostile bytes raise anything
        return True
    return str(header.get("BurnedInAnnotation") or "NO").strip().upper() == "YES"
