"""jina-embeddings-v4: texts, pictures and pages to one vector each, or to one for each token.

Qwen2.5-VL with a task adapter of low rank, beside which the tower stays as it is. Source: Günther et al.,
arXiv 2506.18902; the tensors, configuration and published code of the released checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Image, Input, Usage
from services.core.modeling.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Config,
    Shape,
    require,
)
from services.core.modeling.checkpoints.peft import PeftAdapters
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.decoder import Decoder, linear_sizes
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.families.qwen_vl import (
    PICTURE,
    PictureReader,
    VisionLanguageConfig,
    load_parts,
)
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.layers.lora import LoraLinear, lora_linear
from services.core.modeling.layers.packed import Limits, PackedBatch
from services.core.modeling.layers.pooling import mean, span_means
from services.core.modeling.layers.reading import Layers, linear_shapes
from services.core.modeling.types import (
    EncodeItem,
    Encoding,
    Prepared,
    PrepareOptions,
    UnfitInputError,
)

PROJECTOR = "multi_vector_projector"
TEMPLATE = f"<|im_start|>user\n{PICTURE}Describe the image.<|im_end|>\n"
"""What stands around a picture."""


def is_jina_v4(config: Config) -> bool:
    """Whether config.json is that of jina-embeddings-v4."""
    return "JinaEmbeddingsV4Model" in (config.get("architectures") or ()) or (
        "multi_vector_projector_dim" in config
    )


def v4_shapes(config: VisionLanguageConfig, dimensions: int) -> dict[str, Shape]:
    """Names and shapes of the projector to one vector for each token."""
    return linear_shapes(PROJECTOR, dimensions, config.text.width)


def load_jina_v4(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Encoder:
    """Load jina-embeddings-v4 with its task adapters.

    CheckpointError also for an adapter that the catalogue names and the checkpoint has not.
    """
    refuse_unless(checkpoint.config, "single_vector_pool_strategy", "mean", default="mean")
    config = VisionLanguageConfig.read(checkpoint.config, newer=True)
    dimensions = require({"multi_vector_projector_dim": 128, **checkpoint.config}, _DIMENSIONS, int)
    if dimensions < 1:
        raise CheckpointError(f"config.json: '{_DIMENSIONS}' must be at least 1")
    sizes = {**linear_sizes(config.text), PROJECTOR: (dimensions, config.text.width)}
    wanted = sorted(set(spec.adapters.values()))
    adapters = PeftAdapters.read(checkpoint.directory / "adapters", sizes, wanted)
    extra = v4_shapes(config, dimensions)
    parts = load_parts(spec, checkpoint, device, dtype, newer=True, extra=extra, adapters=adapters)
    merges = parts.network.merges if isinstance(parts.network, Decoder) else None
    layers = Layers(checkpoint, device, dtype)
    projector = lora_linear(layers, adapters, [PROJECTOR], bias=True, merges=merges)
    processor = V4Processor(spec, parts.tokenizer, parts.pictures)
    return Encoder(
        spec,
        parts.tokenizer,
        parts.network,
        V4Head(projector, dimensions),
        device=device,
        limits=Limits(config.text.vocabulary, config.text.positions, adapters.names),
        width=config.text.width,
        merges=merges,
        sees=parts.sight,
        processor=processor,
        warm=processor.samples(),
    )


_DIMENSIONS = "multi_vector_projector_dim"


class V4Processor(TextProcessor):
    """Texts behind their task's prompt, pictures inside the template; see ``types.Processor``."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, pictures: PictureReader | None) -> None:
        """``pictures`` is None where none are offered."""
        super().__init__(spec, tokenizer)
        self._model = spec
        self._pictures = pictures
        if pictures is not None:
            self.fit = pictures.scaling
            self._template = tokenizer.encode_batch([TEMPLATE])[0].ids
            (self._place,) = pictures.places(self._template).tolist()

    def expected(self, kind: Modality) -> int:
        """Return what a large picture costs; of a PDF it is not known how many it is."""
        if self._pictures is None or kind not in (Modality.IMAGE, Modality.PDF):
            return super().expected(kind)
        states = self._pictures.most_states
        return len(self._template) + states * (1 + self._pictures.patches_of_state)

    def prepare(self, inputs: Sequence[Input], options: PrepareOptions) -> list[Prepared]:
        """Make one item of each text and of each picture, which is refused where it is too long."""
        texts = iter(super().prepare([each for each in inputs if isinstance(each, str)], options))
        found = [next(texts) if isinstance(each, str) else self._picture(each, options) for each in inputs]
        if not options.multivector:
            return found
        return [each._replace(item=each.item._replace(multivector=True)) for each in found]

    def samples(self) -> list[EncodeItem]:
        """Return items for the warm-up."""
        if self._pictures is None:
            return []
        width, height = self._pictures.scaling.size(100, 100)
        picture = Image(np.zeros((height, width, 3), np.uint8), (100, 100))
        return [self._picture(picture, PrepareOptions()).item]

    def _picture(self, picture: Input, options: PrepareOptions) -> Prepared:
        if self._pictures is None or not isinstance(picture, Image):
            what = "no images" if self._pictures is None else "no groups"
            raise UnfitInputError(f"Model '{self._model.id}' takes {what}.")
        feature = self._pictures.feature(picture)
        item = self._pictures.expand(self._template, [self._place], [feature])
        tokens, limit = len(item.token_ids), self.limit(options)
        if tokens > limit:
            raise UnfitInputError(f"The image has {tokens} tokens, {limit} are allowed.")
        usage = Usage(text=tokens - feature.length, image=feature.length)
        item = item._replace(adapter=self._model.adapter(options.task))
        return Prepared(item, usage, patches=feature.data.shape[0])


class V4Head:
    """The mean of a text, a picture or a span, or each token through the projector; fp32, not normalised.

    A picture's mean is that of its states and the two markers around them.
    """

    def __init__(self, projector: LoraLinear, dimensions: int) -> None:
        """The projector makes vectors of ``dimensions``."""
        self._projector = projector
        self._dimensions = dimensions

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, items: Sequence[EncodeItem]) -> torch.Tensor:
        """Return (numbers,) fp32: the means of all items, then item by item its spans or tokens."""
        means = mean(hidden, batch)
        tokens = None
        if any(item.multivector for item in items):
            tokens = self._projector(hidden[: batch.tokens], batch.adapter_runs).float()
        found: list[torch.Tensor] = []
        start = 0
        for i, item in enumerate(items):
            rows = slice(start, start + batch.lengths[i])
            start = rows.stop
            if item.multivector and tokens is not None:
                found.append(tokens[rows].flatten())
            elif item.spans is not None:
                found.append(span_means(hidden[rows], item.spans).flatten())
            elif item.features:
                first, last = item.features[0], item.features[-1]
                span = (first.offset - 1, last.offset + last.length + 1)
                means[i] = span_means(hidden[rows], [span])[0]
        return torch.cat([means.flatten(), *found])

    def results(
        self, rows: NDArray[np.float32], batch: PackedBatch, items: Sequence[EncodeItem]
    ) -> list[Encoding]:
        """Return (width,) fp32 for each item, or (spans, width), or (tokens, dimensions)."""
        several = [len(item.token_ids) * self._dimensions if item.multivector else 0 for item in items]
        spans = sum(len(item.spans) for item in items if item.spans is not None and not item.multivector)
        width = (len(rows) - sum(several)) // (len(items) + spans)
        results: list[Encoding] = list(rows[: len(items) * width].reshape(len(items), width))
        start = len(items) * width
        for i, item in enumerate(items):
            if item.multivector:
                results[i] = rows[start : start + several[i]].reshape(len(item.token_ids), -1)
                start += several[i]
            elif item.spans is not None:
                end = start + len(item.spans) * width
                results[i] = rows[start:end].reshape(-1, width)
                start = end
        return results
