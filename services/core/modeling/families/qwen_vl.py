"""What the vision-language models over Qwen2-VL and Qwen2.5-VL share: a tower, a decoder, and their joint.

The states that the tower makes of a picture stand for tokens of the sequence, and positions have three axes:
time, row and column. A text takes one position on all of them for each token; the states of a picture share
their time and differ by row and column; what follows goes on behind the largest of them. Source: Wang et al.,
arXiv 2409.12191.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Image
from services.core.modeling.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Config,
    Shape,
    read_json,
    require,
)
from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.decoder import load_decoder
from services.core.modeling.families.decoder_config import QWEN2, DecoderConfig
from services.core.modeling.families.qwen_vision import (
    Pictures,
    Vision,
    VisionConfig,
    patch_rows,
    vision_shapes,
)
from services.core.modeling.layers.packed import Inserted, PackedBatch
from services.core.modeling.layers.reading import Layers
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.native.angles import Angles
from services.core.modeling.types import Backbone, EncodeItem, Feature, TokenIds

VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
PICTURE = VISION_START + IMAGE_PAD + VISION_END
"""What a picture is in a text, before the one pad becomes as many as it has states."""

_VISION = "visual."
_LAYOUTS = {
    "model.visual.": _VISION,
    "model.language_model.": "",
    "language_model.model.": "",
    "language_model.": "",
    "model.": "",
}
"""Beginnings of names, of older and newer files, and what stands here in their place."""


@dataclass(frozen=True, slots=True)
class VisionLanguageConfig:
    """What config.json says: the decoder, how many frequencies each axis of positions has, the tower."""

    text: DecoderConfig
    sections: tuple[int, ...]
    vision: VisionConfig

    @classmethod
    def read(cls, config: Config, *, newer: bool) -> VisionLanguageConfig:
        """Parse config.json, flat or with a ``text_config``. CheckpointError for what is not served."""
        fields = cast(Config, config.get("text_config") or config)
        turning = cast("Mapping[str, Any]", fields.get("rope_parameters") or fields.get("rope_scaling") or {})
        kind = turning.get("rope_type", turning.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise CheckpointError(f"config.json: rotary positions of the kind {kind!r} are not served")
        base = turning.get("rope_theta", fields.get("rope_theta", 1_000_000.0))
        plain = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, **fields, "rope_theta": base}
        text = DecoderConfig.read({**plain, "rope_parameters": None, "rope_scaling": None}, QWEN2)
        sections = cast("list[Any]", require(turning, "mrope_section", list))
        if len(sections) != 3 or not all(type(each) is int and each >= 0 for each in sections):
            raise CheckpointError(f"config.json: 'mrope_section' must be three numbers, found {sections!r}")
        if sum(sections) != text.head_dim // 2:
            raise CheckpointError(
                f"config.json: 'mrope_section' has not the {text.head_dim // 2} frequencies"
            )
        vision = VisionConfig.read(cast(Config, require(config, "vision_config", dict)), newer=newer)
        if vision.out != text.width:
            raise CheckpointError(
                f"config.json: states of {vision.out} numbers, the decoder has {text.width}"
            )
        return cls(text, tuple(sections), vision)


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded network: ``sight`` and ``pictures`` are None where the catalogue's entry offers no images."""

    config: VisionLanguageConfig
    tokenizer: Tokenizer
    network: Backbone
    sight: Sight
    pictures: PictureReader | None


def load_parts(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    newer: bool,
    extra: Mapping[str, Shape],
    adapters: PeftAdapters | None = None,
    limits: tuple[int, int] | None = None,
) -> Parts:
    """Read decoder and tower, and the tower only if the catalogue's entry offers images.

    ``newer`` is Qwen2.5-VL; ``extra`` are tensors that the caller will read; ``limits`` are those of a
    picture's pixels, None those of the checkpoint. CheckpointError as ``load_decoder``.
    """
    config = VisionLanguageConfig.read(checkpoint.config, newer=newer)
    config.text.refuse_short(spec, checkpoint)
    checkpoint.rename(_LAYOUTS)
    seeing = Modality.IMAGE in spec.modalities
    tower = vision_shapes(config.vision, _VISION)
    network = load_decoder(
        checkpoint,
        config.text,
        device,
        dtype,
        adapters=adapters,
        extra={**extra, **(tower if seeing else {})},
        unused=() if seeing else (f"{_VISION}*",),
    )
    tokenizer = Tokenizer.load(checkpoint.directory)
    vision = pictures = None
    if seeing:
        said = read_json(checkpoint.directory / "preprocessor_config.json")
        rules = Pictures.read(said, config.vision, limits=limits)
        vision = Vision(Layers(checkpoint, device, dtype), config.vision, _VISION, rules)
        pictures = PictureReader(config.vision, rules, tokenizer)
    return Parts(config, tokenizer, network, Sight(config, vision, device), pictures)


class PictureReader:
    """From pictures, scaled as ``scaling`` says, to features, and to tokens among those of a text."""

    def __init__(self, config: VisionConfig, pictures: Pictures, tokenizer: Tokenizer) -> None:
        """CheckpointError if the vocabulary lacks the tokens that stand for pictures."""
        self.scaling = pictures.scaling
        self._config = config
        found = [tokenizer.token_id(token) for token in (VISION_START, IMAGE_PAD, VISION_END)]
        if None in found:
            raise CheckpointError(f"tokenizer.json lacks one of {VISION_START}, {IMAGE_PAD}, {VISION_END}")
        self._tokens = np.array(found, np.int32)

    @property
    def most_states(self) -> int:
        """About how many states the largest picture becomes."""
        return self.scaling.max_pixels // self._config.multiple**2

    @property
    def patches_of_state(self) -> int:
        """Patches of the tower that become one state."""
        return self._config.merge**2

    def feature(self, picture: Image) -> Feature:
        """Return the picture as the tower reads it, not yet placed."""
        height, width = picture.pixels.shape[:2]
        if (width, height) != self.scaling.size(*picture.source_size):
            raise ValueError(f"a picture of {width} x {height} pixels, not scaled")
        grid = self._config.grid(width, height)
        rows = patch_rows(picture.pixels, self._config.patch, self._config.merge)
        return Feature(Modality.IMAGE, rows, 0, self._config.states(grid), grid)

    def places(self, ids: TokenIds) -> NDArray[np.int64]:
        """Return where in ``ids`` pictures stand, as the places of their pads."""
        start, pad, end = self._tokens
        found = (ids[:-2] == start) & (ids[1:-1] == pad) & (ids[2:] == end)
        return np.flatnonzero(found) + 1

    def expand(self, ids: TokenIds, places: Sequence[int], features: Sequence[Feature]) -> EncodeItem:
        """Give each of ``features`` its pads at ``places`` of ``ids``, in rising order, and all positions."""
        copies = np.ones(len(ids), np.int64)
        copies[list(places)] = [feature.length for feature in features]
        offsets = np.cumsum(copies) - copies
        placed = tuple(
            replace(feature, offset=int(offsets[place]))
            for place, feature in zip(places, features, strict=True)
        )
        long = np.repeat(ids, copies)
        return EncodeItem(long, features=placed, positions=three_axes(len(long), placed, self._config.merge))


def three_axes(length: int, features: Sequence[Feature], merge: int) -> NDArray[np.int32] | None:
    """Return the positions (3, length) of tokens with ``features`` among them; None without any."""
    if not features:
        return None
    parts: list[NDArray[np.int64]] = []
    at = next_position = 0

    def text(until: int) -> None:
        nonlocal at, next_position
        parts.append(np.broadcast_to(next_position + np.arange(until - at), (3, until - at)))
        next_position += until - at
        at = until

    for feature in features:
        frames, rows, columns = cast("tuple[int, int, int]", feature.grid)
        text(feature.offset)
        inside = np.indices((frames, rows // merge, columns // merge)).reshape(3, -1)
        parts.append(next_position + inside)
        next_position += int(inside.max()) + 1
        at += feature.length
    text(length)
    return np.concatenate(parts, 1).astype(np.int32)


class Sight:
    """Runs the tower over the pictures of a batch and says where what it makes belongs; see ``Sees``."""

    def __init__(self, config: VisionLanguageConfig, vision: Vision | None, device: torch.device) -> None:
        self._sections = config.sections
        self._angles = Angles(config.text.head_dim, config.text.rotary_base)
        self._vision = vision
        self._device = device

    def __call__(self, batch: PackedBatch, items: Sequence[EncodeItem]) -> PackedBatch:
        """Return ``batch`` with states and turns; one of texts alone as it is."""
        if all(item.positions is None and not item.features for item in items):
            return batch
        starts = np.cumsum((0, *batch.lengths[:-1]))
        return replace(batch, inserted=self._inserted(starts, items), rotation=self._turns(items))

    def _inserted(self, starts: NDArray[np.int64], items: Sequence[EncodeItem]) -> Inserted | None:
        features = [feature for item in items for feature in item.features]
        if not features:
            return None
        if self._vision is None:
            raise ValueError("a picture for a network without a tower")
        first = np.repeat(starts, [len(item.features) for item in items])
        first = first + [feature.offset for feature in features]
        lengths = np.array([feature.length for feature in features])
        places = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return Inserted(torch.from_numpy(places).to(self._device), self._vision(features))

    def _turns(self, items: Sequence[EncodeItem]) -> Rotation:
        positions = np.concatenate([_positions(item) for item in items], 1)
        table = self._angles.up_to(int(positions.max()) + 1)
        return table.sections(torch.from_numpy(positions), self._sections)


def _positions(item: EncodeItem) -> NDArray[np.int32]:
    if item.positions is not None:
        return item.positions
    count = len(item.token_ids)
    return np.broadcast_to(np.arange(count, dtype=np.int32), (3, count))
