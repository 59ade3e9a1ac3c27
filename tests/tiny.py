"""Three tiny encoders with a catalogue of their own: models that load in milliseconds, all of one size."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import write_bert

NAMES = ("tiny-one", "tiny-two", "tiny-three")

_ENTRY = """
  - id: {name}
    name: {name}
    owner: acme
    family: bert
    licence: Apache-2.0
    released: 2026-01-02
    description: An encoder of the tests.
    capabilities: [embed, rerank, classify, batch]
    modalities: [text]
    outputs: [dense]
    context_length: 64
    parameters: 20000
    dimensions: 32
    rerank: cosine
    classify_inputs: [text]
    train_inputs: [text]
"""


def write_catalog(directory: Path) -> Path:
    """Write the catalogue file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "catalog.yaml"
    path.write_text("models:" + "".join(_ENTRY.format(name=name) for name in NAMES))
    return path


def write_weights(models: Path, *names: str) -> None:
    """Write the weights of ``names``, all by default, into the folder of models."""
    for name in names or NAMES:
        write_bert(models / name, seed=NAMES.index(name))
