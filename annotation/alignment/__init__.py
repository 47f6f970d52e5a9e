"""Concept maps and scores from vision-language towers: semantic alignment, honest about what it cannot see."""
