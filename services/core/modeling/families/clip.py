"""jina-clip-v1 and -v2: a text tower and a vision tower that write into one space.

Sources: Koukounas et al., arXiv 2405.20204 and 2412.08802; the tensors and configurations of the released
checkpoints. The text towers are those of jina-embeddings-v2 and of jina-embeddings-v3, the latter with one
adapter that is always on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from services.core.catalog.types import ImageRules, Modality, ModelSpec
from services.core.content import Image, Input, Square, Usage
from services.core.modeling.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Config,
    Shape,
    read_json,
    require,
)
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.encoder import DenseHead, Encoder, Fetched
from services.core.modeling.families.encoder_config import EncoderConfig, refuse_short, refuse_unless
from services.core.modeling.families.eva import Eva, EvaConfig, eva_shapes
from services.core.modeling.families.jina_bert import flash_shapes, read_flash
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.families.xlm_rotary import read_xlm_rotary, rotary_base, xlm_rotary_shapes
from services.core.modeling.layers.lora import Adapters
from services.core.modeling.layers.packed import Limits
from services.core.modeling.layers.pooling import POOLINGS
from services.core.modeling.layers.reading import Layers
from services.core.modeling.types import (
    Backbone,
    EncodeItem,
    Encoding,
    Feature,
    Prepared,
    PrepareOptions,
    UnfitInputError,
)

_VISION = "vision_model."
_UNUSED = ("vision_model.*rope.*",)
"""Tables of angles that some files carry; they follow from the configuration."""

_CPU_PASS_TOKENS = 512
_FILTERS = frozenset({"bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"})
_MODES = frozenset({"shortest", "longest", "squash"})


@dataclass(frozen=True, slots=True)
class _TextTower:
    """One of the two text towers: where its tensors are, what config.json leaves to its base model."""

    prefix: str
    base: Mapping[str, Any]
    shapes: Callable[[EncoderConfig, Config], dict[str, Shape]]
    read: Callable[[Layers, EncoderConfig, Config], Backbone]


def _adapters(config: Config) -> Adapters:
    """The one adapter, which every text has."""
    adapters = Adapters.read(config)
    return replace(adapters, merged=adapters.names[0])


_V1 = _TextTower(
    prefix="text_model.transformer.",
    base={
        "vocab_size": 30528,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "mlp_type": "glu",
        "use_qk_norm": False,
    },
    shapes=lambda size, config: flash_shapes(size),
    read=lambda layers, size, config: read_flash(layers, size),
)
_V2 = _TextTower(
    prefix="text_model.transformer.roberta.",
    base={
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "rotary_emb_base": 20000.0,
        "position_embedding_type": "rotary",
    },
    shapes=lambda size, config: xlm_rotary_shapes(size, _adapters(config)),
    read=lambda layers, size, config: read_xlm_rotary(layers, size, _adapters(config), rotary_base(config)),
)
_TEXT_TOWERS = {
    "jinaai/jina-bert-flash-implementation": _V1,
    "jinaai/jina-bert-v2-base-en-flash": _V1,
    "jinaai/jina-embeddings-v3": _V2,
}
"""By the model that ``text_config`` starts from; what it says of it wins."""


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """What config.json says of the two towers; ``text_fields`` are all fields of the text tower."""

    tower: _TextTower
    text: EncoderConfig
    text_fields: Config
    vision: EvaConfig

    @classmethod
    def read(cls, config: Config) -> ClipConfig:
        """Parse config.json. CheckpointError for anything that these networks do not do."""
        refuse_unless(config, "add_projections", False, default=False)
        text = cast(Config, require(config, "text_config", dict))
        refuse_unless(text, "pooler_type", "mean_pooler", default="mean_pooler")
        refuse_unless(text, "proj_type", None, default=None)
        base = require(text, "hf_model_name_or_path", str)
        if base not in _TEXT_TOWERS:
            raise CheckpointError(f"config.json: no text tower '{base}'; there are {', '.join(_TEXT_TOWERS)}")
        tower = _TEXT_TOWERS[base]
        fields = {**tower.base, **cast(Config, text.get("hf_model_config_kwargs") or {})}
        for name in ("hidden_act", "mlp_type", "use_qk_norm", "position_embedding_type"):
            if name in tower.base:
                refuse_unless(fields, name, tower.base[name], default=None)
        if tower is _V2:
            always = text.get("default_lora_task")
            if fields.get("lora_adaptations") != [always]:
                raise CheckpointError(
                    f"config.json: the adapters are {fields.get('lora_adaptations')}, served is the one that "
                    f"'default_lora_task' names ({always!r})"
                )
        parsed = cls(
            tower,
            EncoderConfig.read(fields),
            fields,
            EvaConfig.read(cast(Config, require(config, "vision_config", dict))),
        )
        if parsed.text.width != parsed.vision.width:
            raise CheckpointError(
                f"config.json: text of {parsed.text.width} numbers, images of {parsed.vision.width}"
            )
        return parsed

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of all tensors, those of the text tower without their prefix."""
        text = self.tower.shapes(self.text, self.text_fields)
        # The temperature of training, which vectors do not need.
        return {**text, **eva_shapes(self.vision, _VISION), "logit_scale": ()}


def is_jina_clip(config: Config) -> bool:
    """Whether config.json is that of a jina-clip."""
    return config.get("model_type") == "jina_clip"


def load_jina_clip(spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Clip:
    """Load jina-clip-v1 or -v2. CheckpointError also for a ``preprocessor_config.json`` of other images."""
    config = ClipConfig.read(checkpoint.config)
    refuse_short(spec, config.text, checkpoint)
    images = read_json(checkpoint.directory / "preprocessor_config.json")
    fit = read_fit(images)
    if fit.side != config.vision.image:
        raise CheckpointError(
            f"{checkpoint.directory}: images are made {fit.side} pixels large, the network sees "
            f"{config.vision.image}"
        )
    checkpoint.strip_prefix(config.tower.prefix)
    checkpoint.verify(config.shapes(), unused=_UNUSED)
    layers = Layers(checkpoint, device, dtype, config.text.epsilon)
    vision = Eva(layers, config.vision, _VISION, _channels(images, "mean"), _channels(images, "std"))
    tokenizer = Tokenizer.load(checkpoint.directory)
    text = Encoder(
        spec,
        tokenizer,
        config.tower.read(layers, config.text, config.text_fields),
        DenseHead(POOLINGS["mean"]),
        device=device,
        limits=Limits(config.text.vocabulary, config.text.positions),
        width=config.text.width,
    )
    return Clip(ClipProcessor(spec, tokenizer, fit, config.vision.tokens), text, vision, device)


def read_fit(config: Config) -> Square:
    """Read from ``preprocessor_config.json`` how pictures are scaled. CheckpointError for another way."""
    source = "preprocessor_config.json"
    size = config.get("size")
    if isinstance(size, list) and len(set(cast("list[Any]", size))) == 1:
        size = cast("list[Any]", size)[0]
    side = require({"size": size}, "size", int, source=source)
    mode, filter = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    fill = config.get("fill_color", 0)
    if side < 1 or mode not in _MODES or filter not in _FILTERS or not isinstance(fill, int):
        raise CheckpointError(f"{source}: 'size', 'resize_mode', 'interpolation' or 'fill_color' not served")
    return Square(side, mode, filter, fill)


def _channels(config: Config, name: str) -> tuple[float, ...]:
    values = cast("list[Any]", require(config, name, list, source="preprocessor_config.json"))
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise CheckpointError(f"preprocessor_config.json: '{name}' must be three numbers")
    return tuple(map(float, values))


class ClipProcessor(TextProcessor):
    """Texts and pictures to items; a picture is an item of its own, billed by its tiles."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, fit: Square, image_tokens: int) -> None:
        """``fit`` is how pictures come; each costs the vision tower ``image_tokens``."""
        super().__init__(spec, tokenizer)
        self._model = spec
        self.fit = fit
        self._side = fit.side
        self._image_tokens = image_tokens

    def expected(self, kind: Modality) -> int:
        """Return what a picture costs; of a PDF it is not known how many it is."""
        if kind not in (Modality.IMAGE, Modality.PDF):
            raise UnfitInputError(f"Model '{self._model.id}' takes text and images, not '{kind}'.")
        return self._image_tokens

    def prepare(self, inputs: Sequence[Input], options: PrepareOptions) -> list[Prepared]:
        """Make one item of each text, behind the task's prompt, and of each picture, which has none."""
        texts = iter(super().prepare([each for each in inputs if isinstance(each, str)], options))
        return [next(texts) if isinstance(each, str) else self._picture(each) for each in inputs]

    def _picture(self, picture: Input) -> Prepared:
        if not isinstance(picture, Image):
            raise UnfitInputError(f"Model '{self._model.id}' takes no groups.")
        if picture.pixels.shape != (self._side, self._side, 3):
            raise ValueError(f"a picture of shape {picture.pixels.shape}, not fitted to {self._side}")
        feature = Feature(Modality.IMAGE, torch.from_numpy(picture.pixels))
        usage = Usage(image=tile_tokens(self._model.images, picture.source_size))
        item = EncodeItem(_NO_TOKENS, features=(feature,))
        return Prepared(item, usage, patches=self._image_tokens)


_NO_TOKENS = np.empty(0, np.int32)


def tile_tokens(rules: ImageRules | None, size: tuple[int, int]) -> int:
    """Return what a picture of this width and height is billed: the tiles that cover it."""
    if rules is None:
        return 0
    across, down = (-(-length // rules.tile_pixels) for length in size)
    return across * down * rules.tile_tokens


class Clip:
    """A model in memory; see ``types.Backend`` for the contract. Results are fp32, not normalised."""

    def __init__(self, processor: ClipProcessor, text: Encoder, vision: Eva, device: torch.device) -> None:
        self.processor = processor
        self.width = vision.config.width
        self._text = text
        self._vision = vision
        self._device = device

    @property
    def batch_tokens(self) -> int:
        """Tokens of a pass of texts; a picture counts as its patches."""
        return self._text.batch_tokens

    def forward(self, batch: Sequence[EncodeItem]) -> list[Encoding]:
        """Run texts and pictures, each through its tower; results in the order of ``batch``."""
        texts = [i for i, item in enumerate(batch) if not item.features]
        pictures = [i for i, item in enumerate(batch) if item.features]
        results: dict[int, Encoding] = {}
        if texts:
            results |= zip(texts, self._text.forward([batch[i] for i in texts]), strict=True)
        size = self._pictures_of_a_pass(len(pictures))
        for start in range(0, len(pictures), size):
            part = pictures[start : start + size]
            results |= zip(part, self._look([batch[i].features[0].data for i in part]), strict=True)
        return [results[i] for i in range(len(batch))]

    def warm_up(self) -> None:
        """Run both towers, which makes the libraries choose and build their kernels."""
        self._text.warm_up()
        side = self._vision.config.image
        self._look([torch.zeros(side, side, 3, dtype=torch.uint8)])

    def _look(self, pictures: Sequence[torch.Tensor]) -> list[Encoding]:
        pixels = torch.stack(list(pictures))
        if self._device.type != "cpu":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        with torch.inference_mode():
            return list(Fetched(self._vision(pixels)).wait())

    def _pictures_of_a_pass(self, count: int) -> int:
        if self._device.type != "cpu":
            return max(1, count)
        return max(1, _CPU_PASS_TOKENS // self._vision.config.tokens)
