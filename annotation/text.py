"""Sentence embeddings without a network: the MiniLM encoder that travels as a package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data_contracts.embedded_weights import minilm_folder
from data_contracts.ports import TextEmbedder

_BATCH_SIZE = 64
_MAX_TOKENS = 256
"""What the encoder was trained with; longer texts are cut."""


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bar and loading report, which name weights that are rightly unused."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@cache
def minilm_embedder(device: str = "cpu") -> TextEmbedder:
    """An embedder of texts into 384 dimensions, rows of unit length; loaded once per device.

    Mean of the last hidden states over real tokens, as the encoder was trained. Raises
    `ConfigurationError` when the package with the weights is absent or altered.
    """
    folder = str(minilm_folder())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with quiet_loading():
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).to(device).eval()

    @torch.inference_mode()
    def embed_batch(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt").to(device)
        hidden = encoder(**tokens).last_hidden_state  # (n, L, 384)
        real = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1).cpu()

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        batches = [embed_batch(list(texts[i : i + _BATCH_SIZE])) for i in range(0, len(texts), _BATCH_SIZE)]
        return torch.cat(batches).numpy() if batches else np.zeros((0, encoder.config.hidden_size), np.float32)

    return embed
