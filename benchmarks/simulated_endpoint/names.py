"""Names and limits that every part of the simulator knows."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]

CHAT = "/v1/chat/completions"
DEFAULT_MODEL = "simulated-vlm"
PROBE_PREFIX = "probe-"
NONE_OF_THEM = "none"
UNCERTAIN = "uncertain"

MAX_BODY_BYTES = 256 * 2**20
MAX_HEAD_BYTES = 2**20
MAX_BATCH_LINES = 50_000
MAX_TOP_LOGPROBS = 20
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 85
TOKENS_PER_TILE = 170
DAY_S = 86_400
