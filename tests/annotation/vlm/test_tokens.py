"""Counts against the providers' own worked examples, and the bounds that every family keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.tokens import FAMILIES, Family, family_of, image_tokens, is_known_family, text_tokens

NAMES = [
    ("medmicn-embedded-measurements-1", "medmicn embedded"),
    ("openai/gpt-4o-mini", "OpenAI gpt-4o-mini"),
    ("ft:gpt-4o-mini-2024-07-18:org::id", "OpenAI gpt-4o-mini"),
    ("gpt-4o-2024-11-20", "OpenAI gpt-4o and gpt-4.1"),
    ("chatgpt-4o-latest", "OpenAI gpt-4o and gpt-4.1"),
    ("gpt-4.1", "OpenAI gpt-4o and gpt-4.1"),
    ("gpt-4.5-preview", "OpenAI gpt-4o and gpt-4.1"),
    ("gpt-4.1-mini-2025-04-14", "OpenAI gpt-4.1-mini"),
    ("azure/gpt-4.1-nano", "OpenAI gpt-4.1-nano"),
    ("gpt-5", "OpenAI gpt-5"),
    ("gpt-5-2025-08-07", "OpenAI gpt-5"),
    ("gpt-5-chat-latest", "OpenAI gpt-5"),
    ("gpt-5.1-2025-11-13", "OpenAI gpt-5"),
    ("openai/gpt-5-mini", "OpenAI gpt-5-mini"),
    ("gpt-5-nano-2025-08-07", "OpenAI gpt-5-nano"),
    ("gpt-5.2-chat-latest", "OpenAI gpt-5.2"),
    ("gpt-5.4-mini-2026-03-17", "OpenAI gpt-5.4"),
    ("gpt-5.5", "OpenAI gpt-5.5"),
    ("gpt-5.6-sol", "OpenAI gpt-5.6"),
    ("o1", "OpenAI o1 and o3"),
    ("o3-2025-04-16", "OpenAI o1 and o3"),
    ("openai/o4-mini", "OpenAI o4-mini"),
    ("claude-3-5-sonnet-20241022", "Claude before 4.7"),
    ("claude-opus-4-20250514", "Claude before 4.7"),
    ("anthropic/claude-sonnet-4.5", "Claude before 4.7"),
    ("us.anthropic.claude-haiku-4-5-20251001-v1:0", "Claude before 4.7"),
    ("claude-opus-4-7", "Claude 4.7 and later"),
    ("claude-opus-4-10-20270101", "Claude 4.7 and later"),
    ("claude-sonnet-5", "Claude 4.7 and later"),
    ("claude-opus-10", "Claude 4.7 and later"),
    ("google/gemini-2.5-flash", "Gemini 1 and 2"),
    ("models/gemini-1.5-pro", "Gemini 1 and 2"),
    ("gemini-3-pro-preview", "Gemini 3 and later"),
    ("gemini-flash-latest", "Gemini 3 and later"),
    ("gemma3:27b", "Gemma 3 and MedGemma"),
    ("google/medgemma-4b-it", "Gemma 3 and MedGemma"),
    ("hf.co/unsloth/medgemma-4b-it-GGUF:Q4_K_M", "Gemma 3 and MedGemma"),
    ("google/gemma-4-31b-it", "Gemma 4"),
    ("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL and Qwen2.5-VL"),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2-VL and Qwen2.5-VL"),
    ("qwen2.5vl:7b", "Qwen2-VL and Qwen2.5-VL"),
    ("accounts/fireworks/models/qwen2p5-vl-32b-instruct", "Qwen2-VL and Qwen2.5-VL"),
    ("qwen3-vl:8b", "Qwen3-VL"),
    ("/models/Qwen3-VL-8B-Instruct/", "Qwen3-VL"),
    ("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5"),
    ("llava:13b-v1.5-q4_0", "LLaVA-1.5"),
    ("microsoft/llava-med-v1.5-mistral-7b", "LLaVA-1.5"),
    ("llava:13b", "LLaVA-NeXT"),
    ("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT"),
    ("llava-hf/llama3-llava-next-8b-hf", "LLaVA-NeXT"),
    ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "LLaVA-OneVision"),
    ("meta-llama/Llama-3.2-11B-Vision-Instruct", "Llama 3.2 Vision"),
    ("llama3.2-vision:11b", "Llama 3.2 Vision"),
    ("OpenGVLab/InternVL3-8B", "InternVL"),
    ("mistralai/Pixtral-12B-2409", "Pixtral"),
    ("mistral-small-latest", "Mistral 3"),
    ("mistral-small3.2:24b", "Mistral 3"),
    ("HuggingFaceM4/Idefics3-8B-Llama3", "Idefics3"),
    ("HuggingFaceTB/SmolVLM-Instruct", "SmolVLM 2.2B"),
    ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "SmolVLM"),
]
UNKNOWN = ["my-own-vlm", "gpt-oss-20b", "gpt-5.7", "gpt-50", "llama3.2:3b", "o1-mini", "embeddinggemma-300m", "foo1"]
EXAMPLES = {family: model for model, family in NAMES}
SYMMETRICAL = [f for f in EXAMPLES if f.startswith(("OpenAI", "Claude", "Gemini", "Qwen", "Llama 3.2"))]
SIDES = st.integers(1, 9000)


@pytest.mark.parametrize(("model", "family"), NAMES)
def test_a_model_is_found_with_and_without_its_provider(model: str, family: str) -> None:
    assert family_of(model) == family
    assert is_known_family(model)


@pytest.mark.parametrize("model", UNKNOWN)
def test_an_unknown_model_is_said_to_be_unknown_and_guessed_high(model: str) -> None:
    assert (family_of(model), is_known_family(model)) == (None, False)
    assert image_tokens(model, 512, 512) == 37**2  # 36.6 patches of 14 px a side.
    assert image_tokens(model, 64, 64) >= 1000
    assert image_tokens(model, 10_000, 10_000) < 20_000


def test_every_family_has_an_example_and_says_where_its_rule_is_from() -> None:
    assert set(EXAMPLES) == {family.name for family in FAMILIES}
    assert all(len(family.source) > 20 for family in FAMILIES)


@pytest.mark.parametrize(
    ("model", "width_px", "height_px", "n_tokens"),
    [
        # The guide's examples for detail: high.
        ("gpt-4o", 1024, 1024, 765),
        ("gpt-4o", 2048, 4096, 1105),
        # Nothing is enlarged: one tile.
        ("gpt-4o", 512, 512, 85 + 170),
        # As billed: 2049 × 513 shrinks to 2048 × 513, and 2050 × 513 to 2048 × 512.
        ("gpt-4.1", 2049, 513, 85 + 8 * 170),
        ("gpt-4.1", 2050, 513, 85 + 4 * 170),
        ("gpt-4o-mini", 1024, 1024, 2833 + 4 * 5667),
        ("gpt-5", 1024, 1024, 70 + 4 * 140),
        ("o3", 1024, 1024, 75 + 4 * 150),
    ],
)
def test_openai_tiles(model: str, width_px: int, height_px: int, n_tokens: int) -> None:
    assert image_tokens(model, width_px, height_px) == n_tokens


@pytest.mark.parametrize(
    ("model", "width_px", "height_px", "n_tokens"),
    [
        # 32 × 32 patches, below every budget.
        ("gpt-4.1-mini", 1024, 1024, 1659),  # 1024 × 1.62 = 1658.88
        ("o4-mini", 1024, 1024, 1762),  # 1024 × 1.72 = 1761.28
        ("gpt-5.4", 1024, 1024, 1229),  # the guide's example
        # The guide's example of a budget of 1,536: 1800 × 2400 shrinks to 1056 × 1408, 33 × 44 = 1452 patches.
        ("o4-mini", 1800, 2400, 2498),  # 1452 × 1.72 = 2497.44
        ("gpt-4.1-nano", 1800, 2400, 3572),  # 1452 × 2.46 = 3571.92
        # The guide's example of a budget of 2,500: 1600 × 1600, 2500 patches.
        ("gpt-5.4", 2048, 2048, 3000),
        # A longest side of 2048 px and 6,144 patches: 48 × 64.
        ("gpt-4.1-mini", 1800, 2400, 4977),  # 3072 × 1.62 = 4976.64
        # As billed, by users who measured.
        ("gpt-5-mini", 512, 512, 308),
        ("gpt-5-mini", 1280, 720, 1104),
        ("gpt-5-nano", 2048, 768, 2304),
        # Nothing is shrunk: 128 × 128 patches.
        ("gpt-5.6-sol", 4096, 4096, 19_661),
    ],
)
def test_openai_patches(model: str, width_px: int, height_px: int, n_tokens: int) -> None:
    assert image_tokens(model, width_px, height_px) == n_tokens


@pytest.mark.parametrize(
    ("model", "width_px", "height_px", "n_tokens"),
    [
        # The guide's examples.
        ("claude-sonnet-4-5", 200, 200, 64),
        ("claude-sonnet-4-5", 1000, 1000, 1296),
        ("claude-sonnet-4-5", 1092, 1092, 1521),
        ("claude-sonnet-4-5", 1075, 1520, 33 * 47),  # resized to 924 × 1307
        ("claude-sonnet-4-5", 3840, 2160, 1560),
        ("claude-opus-5", 1920, 1080, 2691),
        ("claude-opus-5", 3840, 2160, 4784),
    ],
)
def test_claude(model: str, width_px: int, height_px: int, n_tokens: int) -> None:
    assert image_tokens(model, width_px, height_px) == n_tokens


@pytest.mark.parametrize(
    ("model", "width_px", "height_px", "n_tokens"),
    [
        ("gemini-2.5-flash", 384, 384, 258),
        ("gemini-2.5-flash", 960, 540, 6 * 258),  # the guide's example: a tile of 360 px
        ("gemini-2.5-flash", 3072, 3072, 16 * 258),  # a tile is never larger than 768 px
        ("gemini-3-pro", 50, 50, 1120),
        ("gemini-3-pro", 4000, 4000, 1120),
    ],
)
def test_gemini(model: str, width_px: int, height_px: int, n_tokens: int) -> None:
    assert image_tokens(model, width_px, height_px) == n_tokens


@pytest.mark.parametrize(
    ("model", "width_px", "height_px", "n_tokens"),
    [
        # By hand, and equal to what the processors of transformers count.
        ("qwen2.5vl:7b", 512, 512, 18 * 18),
        ("qwen2.5vl:7b", 20, 20, 4),
        ("qwen2.5vl:7b", 9000, 9000, 128 * 128),
        ("qwen3-vl:8b", 512, 512, 16 * 16),
        ("qwen3-vl:8b", 64, 64, 64),
        ("llava-1.5-7b-hf", 800, 600, 576),
        ("llava:13b", 672, 672, 576 + 48 * 48 + 48),
        ("llava:13b", 300, 300, 576 + 24 * 24 + 24),
        ("llava:13b", 2000, 400, 576 + 14 * 73),  # 72 columns and a break in each of 14 rows
        ("llava-onevision-7b", 384, 384, 729 + 27 * 28),
        ("llama3.2-vision", 512, 512, 1601),
        ("llama3.2-vision", 600, 500, 2 * 1601),
        ("llama3.2-vision", 1000, 1000, 4 * 1601),
        ("InternVL3-8B", 448, 448, 258),
        ("InternVL3-8B", 896, 896, 2 + 5 * 256),
        ("InternVL3-8B", 1344, 448, 2 + 4 * 256),
        ("pixtral-12b-2409", 512, 512, 33 * 32),
        ("pixtral-12b-2409", 4000, 4000, 65 * 64),
        ("mistral-small-latest", 560, 280, 21 * 10),
        ("gemma3:4b", 1234, 567, 256),
        ("idefics3-8b", 500, 500, 173 + 4 * (4 * 171 + 1)),
        ("smolvlm2-256m", 512, 512, 68 + 4 * (4 * 66 + 1)),
        ("smolvlm2-256m", 1000, 500, 68 + 2 * (4 * 66 + 1)),
        ("medmicn-embedded-measurements-1", 256, 256, 255),
    ],
)
def test_open_models(model: str, width_px: int, height_px: int, n_tokens: int) -> None:
    assert image_tokens(model, width_px, height_px) == n_tokens


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(width_px=SIDES, height_px=SIDES)
def test_tokens_are_positive_and_never_above_the_highest(family: Family, width_px: int, height_px: int) -> None:
    n_tokens = image_tokens(EXAMPLES[family.name], width_px, height_px)
    assert n_tokens >= 1
    assert family.highest is None or n_tokens <= family.highest


@pytest.mark.parametrize("family", SYMMETRICAL)
@given(width_px=SIDES, height_px=SIDES)
def test_a_turned_image_costs_the_same(family: str, width_px: int, height_px: int) -> None:
    model = EXAMPLES[family]
    assert image_tokens(model, width_px, height_px) == image_tokens(model, height_px, width_px)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1 × 1 px, got -?\d+ × \d+"):
        image_tokens("gpt-4o", *size)


@given(st.integers(0, 100_000))
def test_text_tokens_never_undercount_plain_english_much(n: int) -> None:
    assert n / 4 <= text_tokens(n) <= n / 3 + 2
