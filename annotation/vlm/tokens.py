"""How many tokens a text or an image is billed for: one registry of model families, each with its document.

Nothing is sent and nothing is loaded; a count is arithmetic on the size of the image. Families were checked in
November 2026. A model that no family names gets a high guess, and `is_known_family` says so.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

Size = tuple[int, int]
"""Width and height, in pixels or in tiles."""

_CHARACTERS_PER_TOKEN = 3.5
_GUESS_PATCH_PX = 14
_LOWEST_GUESS = 1024
_HIGHEST_GUESS = 16_384


def text_tokens(n_characters: int) -> int:
    """About how many tokens a text of so many characters has; a little high rather than low."""
    return 1 + int(n_characters / _CHARACTERS_PER_TOKEN)


def image_tokens(model: str, width_px: int, height_px: int) -> int:
    """Tokens of one image as the provider of a model counts them; a high guess if `is_known_family` is false."""
    if min(width_px, height_px) < 1:
        raise ValueError(f"expected an image of at least 1 × 1 px, got {width_px} × {height_px}")
    family = _family(model)
    return (_guess if family is None else family.count)(width_px, height_px)


def family_of(model: str) -> str | None:
    """The name of the family whose rule counts the images of a model; None where none is known."""
    family = _family(model)
    return None if family is None else family.name


def is_known_family(model: str) -> bool:
    """Whether `image_tokens` follows a published rule for this model; false: it guesses, on the high side."""
    return _family(model) is not None


def _openai_tiles(width_px: int, height_px: int, base: int, per_tile: int) -> int:
    """A base and so many for each 512 px tile, after shrinking into 2048 × 2048 and to a short side of 768."""
    short_px, long_px = sorted(_within(width_px, height_px, 2048))
    if short_px > 768:
        short_px, long_px = 768, long_px * 768 // short_px
    return base + per_tile * _cover(short_px, long_px, 512)


def _openai_patches(width_px: int, height_px: int, budget: int, side_px: int, percent: int) -> int:
    """Patches of 32 px, at most the budget, times the multiplier of the model in percent."""
    width_px, height_px = _within(width_px, height_px, side_px)
    n_patches = _cover(width_px, height_px, 32)
    if n_patches > budget:
        width, height = width_px / 32, height_px / 32
        shrink = math.sqrt(budget / (width * height))
        shrink *= min(math.floor(side * shrink) / (side * shrink) for side in (width, height))
        n_patches = min(budget, _cover(int(width_px * shrink), int(height_px * shrink), 32))
    return -(-n_patches * percent // 100)


def _claude_patches(width_px: int, height_px: int, side_px: int, most: int) -> int:
    """Patches of 28 px of the largest size, in whole pixels, that keeps both the longest side and the most tokens."""
    short_px, long_px = sorted((width_px, height_px))

    def shrunk(to_px: int) -> Size:
        return to_px, max(1, round(short_px * to_px / long_px))

    def too_large(to_px: int) -> bool:
        return -(-to_px // 28) * 28 > side_px or _cover(*shrunk(to_px), 28) > most

    return _cover(*shrunk(bisect_left(range(1, long_px + 1), True, key=too_large)), 28)


def _gemini_tiles(width_px: int, height_px: int) -> int:
    """258 for an image up to 384 px, else 258 for each tile; a tile's side is the short side over 1.5, 256 to 768."""
    if max(width_px, height_px) <= 384:
        return 258
    tile_px = min(768, max(256, int(min(width_px, height_px) / 1.5)))
    return 258 * _cover(width_px, height_px, tile_px)


def _qwen_patches(width_px: int, height_px: int, patch_px: int, least: int, most: int) -> int:
    """Patches of the nearest size that divides evenly, scaled so that there are neither too few nor too many."""
    sides = (width_px / patch_px, height_px / patch_px)
    n_patches = math.prod(map(round, sides))
    scale = math.sqrt(math.prod(sides))
    if n_patches > most:
        n_patches = math.prod(max(1, math.floor(side * math.sqrt(most) / scale)) for side in sides)
    elif n_patches < least:
        n_patches = math.prod(math.ceil(side * math.sqrt(least) / scale) for side in sides)
    return min(most, n_patches)


def _pixtral_patches(width_px: int, height_px: int, patch_px: int, side_px: int) -> int:
    """Patches of an image shrunk to a longest side, and one break after each row."""
    shrink = min(1.0, side_px / max(width_px, height_px))
    columns, rows = (max(1, -(-int(side * shrink) // patch_px)) for side in (width_px, height_px))
    return (columns + 1) * rows


def _llava_tiles(
    width_px: int, height_px: int, tile_px: int, patches: int, grids: tuple[Size, ...], most_tiles: int
) -> int:
    """The whole image as one tile, and again over the best grid of tiles, without padding, with a break after each row.

    Args:
        width_px: Width of the image.
        height_px: Height of the image.
        tile_px: Side of one tile.
        patches: Patches along one side of a tile.
        grids: Grids to choose from: the one that keeps most pixels, and then wastes least.
        most_tiles: Tiles above which the grid's patches are pooled.
    """

    def kept_and_wasted(grid: Size) -> tuple[int, int]:
        scale = min(grid[0] * tile_px / width_px, grid[1] * tile_px / height_px)
        kept = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
        return kept, kept - grid[0] * grid[1] * tile_px**2

    columns, rows = (patches * n for n in max(grids, key=kept_and_wasted))
    if width_px * rows > height_px * columns:
        rows -= (rows - int(round(height_px * columns / width_px, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width_px * rows / height_px, 7))) // 2 * 2
    ratio = math.sqrt(columns * rows / (most_tiles * patches**2))
    if ratio > 1.1:
        columns, rows = int(columns // ratio), int(rows // ratio)
    return patches**2 + (columns + 1) * rows


def _llama_tiles(width_px: int, height_px: int, per_tile: int, tile_px: int, most: int) -> int:
    """So many for each tile of the smallest canvas that holds the image, or else of the one that shrinks it least."""

    def scale(grid: Size) -> float:
        return min(grid[0] * tile_px / width_px, grid[1] * tile_px / height_px)

    grids = _grids(most)
    large_enough = [grid for grid in grids if scale(grid) >= 1]
    chosen = min(map(scale, large_enough)) if large_enough else max(map(scale, grids))
    return per_tile * min(grid[0] * grid[1] for grid in grids if scale(grid) == chosen)


def _internvl_tiles(width_px: int, height_px: int) -> int:
    """256 for each 448 px tile of the grid nearest in shape, at most 12, and for a thumbnail beside several."""
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(_grids(12), key=math.prod):
        difference = abs(width_px / height_px - columns / rows)
        finer = difference == nearest and width_px * height_px > 0.5 * 448**2 * columns * rows
        if difference < nearest or finer:
            best, nearest = (columns, rows), difference
    n_tiles = math.prod(best)
    return 2 + 256 * (n_tiles + 1 if n_tiles > 1 else 1)


def _idefics_tiles(width_px: int, height_px: int, per_tile: int) -> int:
    """So many for the whole image and for each tile, four along the long side, with marks between them."""
    short_px, long_px = sorted((width_px, height_px))
    n_short = max(1, -(-4 * short_px // long_px))
    columns, rows = (4, n_short) if width_px >= height_px else (n_short, 4)
    return per_tile + 4 + rows * (columns * (per_tile + 2) + 1)


def _always(_width_px: int, _height_px: int, n_tokens: int) -> int:
    return n_tokens


def _guess(width_px: int, height_px: int) -> int:
    """Patches of 14 px, the finest in use, within the bounds that most models keep."""
    return min(_HIGHEST_GUESS, max(_LOWEST_GUESS, _cover(width_px, height_px, _GUESS_PATCH_PX)))


def _cover(width_px: int, height_px: int, tile_px: int) -> int:
    """Tiles that cover an image of at least one pixel."""
    return max(1, -(-width_px // tile_px)) * max(1, -(-height_px // tile_px))


def _within(width_px: int, height_px: int, side_px: int) -> Size:
    """An image's size, shrunk to a longest side."""
    long_px = max(width_px, height_px)
    if long_px <= side_px:
        return width_px, height_px
    return max(1, round(width_px * side_px / long_px)), max(1, round(height_px * side_px / long_px))


def _grids(most: int) -> list[Size]:
    """All grids of at most so many tiles."""
    return [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]


@dataclass(frozen=True)
class Family:
    """Models whose images are counted by one rule."""

    name: str
    """The family as people call it."""
    pattern: str
    """Regular expression, searched in the lower-case model name without its path, at the start of a word."""
    count: Callable[[int, int], int]
    """Tokens of an image of this width and height, in pixels."""
    highest: int | None
    """Most tokens of one image, however large; None: the rule has no such limit."""
    source: str
    """The document the rule comes from, and what of it could not be verified."""


_OPENAI = "OpenAI, guide 'Images and vision', section 'Calculating costs'"
_OLD_BUDGET = "the budget is from the edition of early 2026, later ones state none for this model"
_ANTHROPIC = "Anthropic, guide 'Vision', section 'Resolution and token cost'"
_TRANSFORMERS = "Hugging Face transformers 5.23, the processor of"


def _tile_family(name: str, pattern: str, base: int, per_tile: int, note: str = "") -> Family:
    """An OpenAI family of tiles; the largest image is covered by 2 × 4 of them."""
    count = partial(_openai_tiles, base=base, per_tile=per_tile)
    return Family(name, pattern, count, base + 8 * per_tile, f"{_OPENAI}, tiles" + (note and f"; {note}"))


def _patch_family(name: str, pattern: str, budget: int, side_px: int, percent: int, note: str = "") -> Family:
    """An OpenAI family of patches."""
    count = partial(_openai_patches, budget=budget, side_px=side_px, percent=percent)
    return Family(name, pattern, count, -(-budget * percent // 100), f"{_OPENAI}, patches" + (note and f"; {note}"))


_LLAVA_NEXT_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
_ONEVISION_GRIDS = tuple((columns, rows) for rows in range(1, 7) for columns in range(1, 7))

FAMILIES: tuple[Family, ...] = (
    Family(
        "medmicn embedded",
        "medmicn-embedded",
        partial(_always, n_tokens=255),
        255,
        "this project: 85 + 170 for one tile of 512 px, whatever the size",
    ),
    _tile_family("OpenAI gpt-4o-mini", "gpt-4o-mini", 2833, 5667),
    _patch_family("OpenAI gpt-4.1-mini", r"gpt-4[.-]?1-mini", 6144, 2048, 162),
    _patch_family("OpenAI gpt-4.1-nano", r"gpt-4[.-]?1-nano", 1536, 2048, 246, _OLD_BUDGET),
    _patch_family("OpenAI gpt-5-nano", "gpt-5-nano", 1536, 2048, 150, _OLD_BUDGET),
    _patch_family("OpenAI gpt-5-mini", r"gpt-5(?:[.-]1)?(?:-codex)?-mini", 1536, 2048, 120, _OLD_BUDGET),
    _patch_family("OpenAI o4-mini", "o4-mini", 1536, 2048, 172, _OLD_BUDGET),
    _patch_family(
        "OpenAI gpt-5.2",
        r"gpt-5[.-][23](?!\d)",
        6144,
        2048,
        120,
        "gpt-5.3 not verified, counted as gpt-5.2",
    ),
    _patch_family("OpenAI gpt-5.4", r"gpt-5[.-]4(?!\d)", 2500, 2048, 120),
    _patch_family("OpenAI gpt-5.5", r"gpt-5[.-]5(?!\d)", 10_000, 6000, 120),
    _patch_family("OpenAI gpt-5.6", r"gpt-5[.-]6(?!\d)", 30_000, 65_535, 120, "larger images are refused, not shrunk"),
    _tile_family(
        "OpenAI gpt-5",
        r"gpt-5(?:[.-]1)?(?![.\d])(?!-\d(?!\d))",
        70,
        140,
        "gpt-5-pro and -codex not verified",
    ),
    _tile_family(
        "OpenAI gpt-4o and gpt-4.1",
        r"(?:chat)?gpt-4o|gpt-4[.-]?[15](?!\d)|gpt-4-(?:turbo|vision)",
        85,
        170,
        "gpt-4-turbo and gpt-4.5 from earlier editions",
    ),
    _tile_family("OpenAI o1 and o3", r"o[13](?:-pro)?(?!-mini|\w)", 75, 150),
    Family(
        "Claude before 4.7",
        r"claude-(?:[a-z]+-)?(?:[0-3](?!\d)|4(?!\d|[.-](?:[7-9]|\d\d)(?!\d)))",
        partial(_claude_patches, side_px=1568, most=1568),
        1568,
        f"{_ANTHROPIC}: 28 px patches, standard resolution; it replaces the older width × height / 750",
    ),
    Family(
        "Claude 4.7 and later",
        "claude",
        partial(_claude_patches, side_px=2576, most=4784),
        4784,
        f"{_ANTHROPIC}: 28 px patches, high resolution; a name without a version is counted as a late one",
    ),
    Family(
        "Gemini 1 and 2",
        r"gemini-[12](?!\d)",
        _gemini_tiles,
        None,
        "Google, Gemini API guide 'Image understanding', section 'Token calculation'; the bounds of a tile from the "
        "Vertex AI guide; users have seen as little as 258 billed",
    ),
    Family(
        "Gemini 3 and later",
        "gemini",
        partial(_always, n_tokens=1120),
        1120,
        "Google, Gemini API guide 'Media resolution': the default for images of Gemini 3; Gemini 4 and names without a "
        "version not verified",
    ),
    Family(
        "Gemma 4",
        r"gemma-?4",
        partial(_always, n_tokens=280),
        280,
        f"{_TRANSFORMERS} Gemma4: at most 280 soft tokens by default",
    ),
    Family(
        "Gemma 3 and MedGemma",
        r"(?:med)?gemma-?3n?(?![\d.])|medgemma",
        partial(_always, n_tokens=256),
        256,
        f"{_TRANSFORMERS} Gemma3, without pan and scan; MedGemma as the Gemma 3 it is built on",
    ),
    Family(
        "Qwen3-VL",
        r"qwen-?3(?:[.p]\d)?-?(?:vl|omni)|qwen-?3[.p][5-9]",
        partial(_qwen_patches, patch_px=32, least=64, most=16_384),
        16_384,
        f"{_TRANSFORMERS} Qwen2VL with the configuration of Qwen3-VL and 3.5; Qwen3-Omni and later ones not verified",
    ),
    Family(
        "Qwen2-VL and Qwen2.5-VL",
        r"qwen-?2(?:[.p]5)?-?(?:vl|omni)|qvq|qwen-vl",
        partial(_qwen_patches, patch_px=28, least=4, most=16_384),
        16_384,
        f"{_TRANSFORMERS} Qwen2VL, at most 16,384 by the model card; Qwen2.5-Omni, QVQ and hosted qwen-vl not verified",
    ),
    Family(
        "LLaVA-OneVision",
        r"llava-?(?:onevision|ov)",
        partial(_llava_tiles, tile_px=384, patches=27, grids=_ONEVISION_GRIDS, most_tiles=9),
        8829,
        f"{_TRANSFORMERS} LlavaOnevision",
    ),
    Family(
        "LLaVA-1.5",
        r"llava[-:](?:.*1\.5|med|llama-?3|phi-?3)|bakllava",
        partial(_always, n_tokens=576),
        576,
        f"{_TRANSFORMERS} Llava, one tile of 336 px; LLaVA-Med, llava-llama3, llava-phi3 and BakLLaVA not verified",
    ),
    Family(
        "LLaVA-NeXT",
        r"llava(?:[-:]?(?:v?1\.6|next)|:|$)",
        partial(_llava_tiles, tile_px=336, patches=24, grids=_LLAVA_NEXT_GRIDS, most_tiles=4),
        2928,
        f"{_TRANSFORMERS} LlavaNext; plain 'llava' is what Ollama calls LLaVA 1.6",
    ),
    Family(
        "Llama 3.2 Vision",
        r"llama-?v?3[.p-]2-?(?:.*vision|(?:11|90)b)",
        partial(_llama_tiles, per_tile=1601, tile_px=560, most=4),
        4 * 1601,
        f"{_TRANSFORMERS} Mllama, and Together AI, guide 'Vision'",
    ),
    Family(
        "InternVL",
        r"internvl",
        _internvl_tiles,
        2 + 13 * 256,
        f"{_TRANSFORMERS} InternVL, 1 to 12 tiles of 448 px; the configurations of single models not verified",
    ),
    Family(
        "Pixtral",
        r"pixtral",
        partial(_pixtral_patches, patch_px=16, side_px=1024),
        65 * 64,
        f"{_TRANSFORMERS} Pixtral; for Pixtral Large not verified",
    ),
    Family(
        "Mistral 3",
        r"(?:mistral|magistral)-?(?:small|medium|large)|ministral",
        partial(_pixtral_patches, patch_px=28, side_px=1540),
        56 * 55,
        f"{_TRANSFORMERS} Pixtral with the configuration of Mistral3; for models that Mistral hosts not verified",
    ),
    Family(
        "Idefics3",
        r"idefics-?3",
        partial(_idefics_tiles, per_tile=169),
        173 + 4 * (4 * 171 + 1),
        f"{_TRANSFORMERS} Idefics3",
    ),
    Family(
        "SmolVLM 2.2B",
        r"smolvlm2?-(?:2\.2b|instruct|base|synthetic)",
        partial(_idefics_tiles, per_tile=81),
        85 + 4 * (4 * 83 + 1),
        f"{_TRANSFORMERS} Idefics3 with the preprocessor configuration of SmolVLM-Instruct: 81 a tile of 384 px",
    ),
    Family(
        "SmolVLM",
        r"smolvlm",
        partial(_idefics_tiles, per_tile=64),
        68 + 4 * (4 * 66 + 1),
        f"{_TRANSFORMERS} SmolVLM with the preprocessor configuration of SmolVLM2-256M: 64 a tile of 512 px",
    ),
)
"""All families; the first whose pattern is found in the name of a model counts its images."""


def _family(model: str) -> Family | None:
    name = model.strip().rstrip("/").lower().rpartition("/")[2]
    return next((family for family in FAMILIES if re.search(rf"(?<![a-z0-9])(?:{family.pattern})", name)), None)
