"""Loading a Hugging Face vision-language model: safetensors only, none of its own code, a remedy for every failure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from annotation.text import quiet_loading
from annotation.vlm.local_jobs import NoAnswer, first_line, is_out_of_memory
from annotation.vlm.local_model import LocalModel
from data_contracts.errors import ConfigurationError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SYSTEM_MARK, _USER_MARK = "the system speaks", "the user speaks"
_NO_ROOM = (
    "Choose a smaller model, or device = 'cpu'; vlm.local_batch_size, vlm.concurrency and vlm.image_side_px only help "
    "once the weights fit."
)
_FROM_HERE = (
    "A model needs all its files on this machine: config.json, weights as .safetensors, the processor, the tokenizer "
    "and the chat template."
)
_FROM_HUB = (
    "Correct vlm.model (ORG/NAME), or download it once with a network and point vlm.model to the folder; the weights "
    "must be .safetensors, and models that bring their own code are refused."
)


def load(name: str, device_name: str, offline: bool) -> LocalModel:
    """The model of that name, ready to generate; raises `ConfigurationError`."""
    device = _device(device_name)
    if not _HUB_NAME.fullmatch(name) and not Path(name).is_dir():
        raise _unusable(name, "there is no such folder", "Correct vlm.model: a hub name (ORG/NAME) or a folder.")
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    is_here = offline or Path(name).is_dir()
    # A download of gigabytes shows its progress.
    with _explained(name, device, is_here), quiet_loading() if is_here else nullcontext():
        config = AutoConfig.from_pretrained(name, **options)
        _require_vlm(name, config)
        processor = AutoProcessor.from_pretrained(name, **options)
        vlm = _with_chat(name, processor)
        model: Any
        model, report = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        _require_complete(name, report)
        vlm = replace(vlm, model=model.to(device).eval())
    _pad_left(processor.tokenizer)
    return vlm


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device: {name!r} cannot be used ({first_line(error)}).", remedy="Use device = 'auto' or 'cpu'."
        ) from error
    return device


@contextmanager
def _explained(name: str, device: torch.device, is_here: bool) -> Iterator[None]:
    """Inside, whatever a model's files make its loader raise becomes a `ConfigurationError` with a remedy."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            what, remedy = f"its weights do not fit into the memory of {device}", _NO_ROOM
        else:
            what = f"could not be loaded ({first_line(error)})"
            remedy = _FROM_HERE if is_here else _FROM_HUB
        raise _unusable(name, what, remedy) from error


def _require_vlm(name: str, config: Any) -> None:
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _unusable(
            name,
            f"expected an image-text-to-text model, got one of type {config.model_type!r}",
            "Choose a model that takes images and text and answers in text.",
        )


def _require_complete(name: str, report: Any) -> None:
    """Raise `ConfigurationError` when weights are missing: random ones in their place would answer all the same."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise _unusable(
            name,
            f"its files lack {len(missing)} weights of the model (first: {missing[0]!r})",
            "Download the model again, complete.",
        )


def _with_chat(name: str, processor: Any) -> LocalModel:
    """The model without its weights, and where its chat template wants the system; raises `ConfigurationError`."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise _unusable(name, "its files lack the processor of images and text", _FROM_HERE)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if template is None:
        raise _unusable(
            name, "has no chat template", "Choose a model that was tuned for chat (often named -it, -chat)."
        )
    for vlm in (LocalModel(name, processor, template, True), LocalModel(name, processor, template, False)):
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _USER_MARK}]}]
        try:
            prompt = vlm.render(vlm.with_system(_SYSTEM_MARK, turns))
        except NoAnswer:
            continue
        # A template that expects plain strings writes a list as Python shows it.
        if _SYSTEM_MARK in prompt and _USER_MARK in prompt and "'type'" not in prompt:
            return vlm
    raise _unusable(
        name, "its chat template takes no images beside text", "Choose a model that was tuned for chat about images."
    )


def _pad_left(tokenizer: Any) -> None:
    """Let every prompt of a batch end where its answer begins."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _unusable(name: str, what: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"vlm.model {name!r}: {what}.", remedy=remedy)
