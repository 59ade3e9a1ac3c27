"""A small task: 160 questions to a shop, sorted by hand under four labels."""

from __future__ import annotations

import random
from pathlib import Path

_FILE = Path(__file__).with_name("tickets.txt")


def tickets() -> dict[str, list[str]]:
    """The texts of each label, in the order of the file."""
    sorted_texts: dict[str, list[str]] = {}
    label = ""
    for line in _FILE.read_text().splitlines():
        if line.startswith("# "):
            label = line[2:]
            sorted_texts[label] = []
        elif line:
            sorted_texts[label].append(line)
    return sorted_texts


def split(train: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """``train`` (text, label) pairs of each label to learn from, and the rest to be judged by."""
    chance = random.Random(seed)
    learned: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for label, texts in tickets().items():
        pairs = [(text, label) for text in chance.sample(texts, len(texts))]
        learned += pairs[:train]
        held_out += pairs[train:]
    chance.shuffle(learned)
    return learned, held_out
