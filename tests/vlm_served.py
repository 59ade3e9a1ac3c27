"""Catalogue and weights of tiny models that answer, as a server finds them."""

from __future__ import annotations

from pathlib import Path

from tests.vlm_checkpoints import write_parrot, write_vlm

RANDOM, PARROT, ENDLESS = "tiny-vlm", "parrot", "endless"
SAID = "Hi 🎉é,you!"
FOR_EVER = "abcdefg"
CACHE_BYTES = 64 << 20
"""For the keys and values of each of them: what is usual would be most of a small machine's memory."""

_ENTRY = """
  - id: {name}
    name: {name}
    owner: acme
    family: jina_vlm
    licence: Apache-2.0
    released: 2026-01-02
    description: A network of the tests.
    capabilities: [chat]
    modalities: [text, image]
    outputs: [text]
    context_length: 4096
    parameters: 20000
    images: {{tile_pixels: 8, min_pixels: 64, max_pixels: 4096}}
"""


def write_answering(folder: Path) -> Path:
    """Write one of random weights, one that says ``SAID``, and one that says ``FOR_EVER`` for ever."""
    write_vlm(folder / RANDOM)
    write_parrot(folder / PARROT, SAID)
    write_parrot(folder / ENDLESS, "<", then=FOR_EVER)
    entries = "".join(_ENTRY.format(name=name) for name in (RANDOM, PARROT, ENDLESS))
    (folder / "catalog.yaml").write_text(f"models:{entries}")
    return folder
