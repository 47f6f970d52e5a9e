"""What works on this machine: one list of checks, each with a finding and a remedy."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.embedded_weights import lite0_weights_path, minilm_folder
from data_contracts.errors import MedMicnError
from data_contracts.manifest import installed_versions
from flows.settings import Settings, api_key, prefect_api_url, resolve

_ENOUGH_DISK_GB = 2.0


class Check(NamedTuple):
    """One finding."""

    name: str
    works: bool
    finding: str
    remedy: str = ""
    needed: bool = True
    """Whether nothing configured needs it; optional parts never make `doctor` fail."""


def examine(config: Path | None, flags: dict[str, Any]) -> list[Check]:
    """Every check, in the order people should mend them."""
    settings = resolve(config, flags)
    return [*_ground(), *_weights(), *_endpoint(settings), *_optional(settings)]


def _ground() -> Iterator[Check]:
    version = sys.version.split()[0]
    yield Check("python", sys.version_info >= (3, 11), version, "medmicn needs Python 3.11 or newer.")
    missing = [name for name, found in installed_versions().items() if found == "not installed"]
    shown = ", ".join(missing) if missing else "all installed"
    yield Check("packages", not missing, shown, "pip install medmicn")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Check("disk", free_gb > _ENOUGH_DISK_GB, f"{free_gb:.0f} GB free here", "Free some space, or use --run DIR.")


def _weights() -> Iterator[Check]:
    yield _tried("embedded backbone", lambda: lite0_weights_path().name)
    yield _tried("embedded text model", lambda: minilm_folder().parent.name)


def _endpoint(settings: Settings) -> Iterator[Check]:
    vlm = settings.vlm
    if vlm.is_embedded:
        yield Check("vision-language", True, "embedded (image measurements, no network)")
        return
    has_key = api_key(settings) is not None
    yield Check(
        "key", has_key, f"{vlm.api_key_env} is {'set' if has_key else 'not set'}", f"export {vlm.api_key_env}=…", False
    )
    yield _tried("vision-language", lambda: _models(settings))


def _models(settings: Settings) -> str:
    import openai

    key = api_key(settings)
    client = openai.OpenAI(
        base_url=settings.vlm.base_url,
        api_key=key.get_secret_value() if key else "none",
        timeout=10.0,
        max_retries=0,
    )
    try:
        names = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        # The type is enough: the text of an authentication error may repeat part of the key.
        raise RuntimeError(f"{settings.vlm.base_url} did not answer as expected ({type(error).__name__})") from error
    if settings.vlm.model not in names:
        raise RuntimeError(
            f"{settings.vlm.base_url} has no model {settings.vlm.model!r}; it has {', '.join(names[:5])}"
        )
    return f"{settings.vlm.model} at {settings.vlm.base_url}"


def _optional(settings: Settings) -> Iterator[Check]:
    import torch

    gpu = torch.cuda.is_available()
    shown = torch.cuda.get_device_name() if gpu else "none; a CPU is enough with a frozen backbone"
    yield Check("GPU", gpu, shown, needed=False)
    server = prefect_api_url()
    yield Check(
        "Prefect server",
        bool(server),
        server or "none configured; `run` starts a temporary one",
        "For `schedule`: prefect server start, then export PREFECT_API_URL=http://127.0.0.1:4200/api",
        needed=False,
    )
    plugins = importlib.util.find_spec("pylibjpeg") is not None
    yield Check(
        "compressed DICOM",
        plugins,
        "pylibjpeg" if plugins else "uncompressed only",
        "pip install medmicn[dicom]",
        needed=False,
    )
    runner = settings.flow.task_runner
    if runner != "threads":
        module = f"prefect_{runner}"
        there = importlib.util.find_spec(module) is not None
        yield Check(f"{runner} runner", there, module, f"pip install medmicn[{runner}]")


def _tried(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, True, find())
    except MedMicnError as error:
        return Check(name, False, error.message, error.remedy or "")
    except (RuntimeError, OSError) as error:
        return Check(name, False, str(error), "Check the address, the key and the model's name.")
