"""Null prompts: what an honest concept map must beat."""

from __future__ import annotations

NULL_PROMPTS = ("an image", "a picture of something", "blorptic vantrule", "quibbet of the sarnile", "text on a page")
"""Prompts that name nothing visible in a medical image: the empty, the nonsensical and the irrelevant."""
