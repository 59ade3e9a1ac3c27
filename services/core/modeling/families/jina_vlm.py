"""jina-vlm: Qwen3's decoder that answers, with pictures among its words.

Sources: jina-vlm, arXiv 2512.04032; Deitke et al., arXiv 2409.17146; the tensors and configuration of the
released checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Image, Usage
from services.core.modeling.checkpoints.chat_template import ChatTemplate
from services.core.modeling.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Config,
    Shape,
    read_json,
    require,
)
from services.core.modeling.checkpoints.tokenizer import Tokenizer
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.families.siglip import (
    Siglip,
    SiglipConfig,
    inner_size,
    refuse_attention,
    refuse_blocks,
    section,
    siglip_shapes,
)
from services.core.modeling.families.tiling import Tiling
from services.core.modeling.layers.causal import (
    BLOCK,
    CausalForm,
    CausalLayer,
    CausalNetwork,
    CausalWeights,
    Chunk,
    Dense,
)
from services.core.modeling.layers.reading import Layers
from services.core.modeling.native.causal import causal_network
from services.core.modeling.types import (
    Feature,
    Message,
    PreparedChat,
    UnfitInputError,
)

_TEXT, _VISION = "model.language_model.", "model.vision_model."
DECODER = (_TEXT, "lm_head.")
"""What the names of the decoder's tensors begin with."""

_MARK = "<|image|>"
_WORDS = ("<im_start>", "<im_patch>", "<im_col>", "<im_end>")
_PLACE = re.compile("\ue000(\\d+)\ue001")
"""Where a text stands in a conversation that is written without its texts."""

_CPU_CROPS, _CUDA_CROPS = 1, 16
"""Crops of one call of the tower: on a CPU one of the published size takes seconds."""


class _Config(NamedTuple):
    """What config.json says; ``more_words`` are rows of the second table of embeddings."""

    form: CausalForm
    more_words: int
    vision: SiglipConfig

    @classmethod
    def read(cls, config: Config) -> _Config:
        """Parse config.json. CheckpointError for anything that these networks do not do."""
        refuse_unless(config, "tie_word_embeddings", False, default=False)
        text = section(config, "text_config")
        for name, served in (
            ("normalize_input_embeds", False),
            ("partial_rotary_factor", 1.0),
            ("rope_scaling", None),
        ):
            refuse_unless(text, name, served, default=served)
        refuse_unless(text, "rope", True, default=False)
        block = section(text, "block_config")
        attention, feed = section(block, "attn_config"), section(block, "ffn_config")
        norm = section(block, "lnorm_config")
        refuse_blocks(block)
        refuse_attention(attention, output_bias=False, head_norms=True)
        refuse_unless(feed, "activation_type", "silu", default="silu")
        refuse_unless(feed, "gated_activation", True, default=True)
        refuse_unless(feed, "bias", False, default=False)
        for each in (norm, section(attention, "lnorm_config")):
            refuse_unless(each, "type", "rms", default="default")
            if each.get("bias"):
                raise CheckpointError("config.json: RMS norms with a bias are not served")
        epsilon = float(norm.get("eps") or 1e-5)
        refuse_unless(section(attention, "lnorm_config"), "eps", epsilon, default=epsilon)
        width, heads = require(text, "hidden_size", int), require(attention, "n_heads", int)
        form = CausalForm(
            width=width,
            layers=require(text, "n_layers", int),
            heads=heads,
            key_heads=attention.get("n_kv_heads") or heads,
            head_dim=attention.get("head_dim") or width // max(1, heads),
            inner=inner_size(feed, width),
            vocabulary=text.get("embedding_size") or require(text, "vocab_size", int),
            positions=text.get("max_position_embeddings") or require(text, "max_sequence_length", int),
            epsilon=epsilon,
            rotary_base=float(require(text, "rope_theta", float)),
        )
        if min(form.width, form.layers, form.heads, form.key_heads) < 1 or form.heads % form.key_heads:
            raise CheckpointError(f"config.json: {form.heads} heads over {form.key_heads} of keys")
        vision = SiglipConfig.parse(section(config, "vision_config"))
        if vision.out != width:
            raise CheckpointError(f"config.json: pictures become {vision.out} numbers, words have {width}")
        return cls(form, require(text, "additional_vocab_size", int), vision)

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of all tensors."""
        form = self.form
        queries, keys = form.heads * form.head_dim, form.key_heads * form.head_dim
        shapes: dict[str, Shape] = {
            f"{_TEXT}embedding.embedding": (form.vocabulary, form.width),
            f"{_TEXT}embedding.new_embedding": (self.more_words, form.width),
            f"{_TEXT}ln_f.weight": (form.width,),
            "lm_head.weight": (form.vocabulary, form.width),
        }
        for i in range(form.layers):
            name = f"{_TEXT}layers.{i}"
            shapes |= {
                f"{name}.attn_lnorm.weight": (form.width,),
                f"{name}.ffn_lnorm.weight": (form.width,),
                f"{name}.attn.qkv_w.weight": (queries + 2 * keys, form.width),
                f"{name}.attn.out.weight": (form.width, queries),
                f"{name}.attn.q_lnorm.weight": (form.head_dim,),
                f"{name}.attn.k_lnorm.weight": (form.head_dim,),
                f"{name}.attn.q_b": (queries,),
                f"{name}.attn.k_b": (keys,),
                f"{name}.attn.v_b": (keys,),
                f"{name}.ffn.up.weight": (2 * form.inner, form.width),
                f"{name}.ffn.down.weight": (form.width, form.inner),
            }
        return shapes | siglip_shapes(self.vision, _VISION)


def is_jina_vlm(config: Config) -> bool:
    """Whether config.json is that of jina-vlm."""
    return config.get("model_type") == "jvlm" and "vision_config" in config


def load_jina_vlm(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> JinaVlm:
    """Load jina-vlm. CheckpointError also for files beside the weights that say what is not served."""
    config = _Config.read(checkpoint.config)
    if spec.max_tokens > config.form.positions:
        raise CheckpointError(
            f"{checkpoint.directory}: {spec.id} is to take {spec.max_tokens} tokens, "
            f"the network has {config.form.positions} positions"
        )
    tiling = Tiling.read(read_json(checkpoint.directory / "preprocessor_config.json"))
    if (tiling.side, tiling.patch, tiling.pool) != (
        config.vision.side,
        config.vision.patch,
        config.vision.pool,
    ):
        raise CheckpointError(
            f"{checkpoint.directory}: pictures are cut otherwise than the network reads them"
        )
    checkpoint.verify(config.shapes())
    processor = JinaVlmProcessor.load(spec, checkpoint, tiling, config.form.vocabulary, config.more_words)
    layers = Layers(checkpoint, device, dtype)
    network = causal_network(_weights(checkpoint, config.form), device, dtype)
    return JinaVlm(processor, network, Siglip(layers, config.vision, _VISION), device)


def _weights(checkpoint: Checkpoint, form: CausalForm) -> CausalWeights:
    read = checkpoint.tensor
    words = [read(f"{_TEXT}embedding.{name}") for name in ("embedding", "new_embedding")]
    layers = (_layer(checkpoint, f"{_TEXT}layers.{i}") for i in range(form.layers))
    return CausalWeights(form, torch.cat(words), layers, read(f"{_TEXT}ln_f.weight"), read("lm_head.weight"))


def _layer(checkpoint: Checkpoint, name: str) -> CausalLayer:
    read = checkpoint.tensor
    bias = torch.cat([read(f"{name}.attn.{part}_b") for part in "qkv"])
    up, gate = read(f"{name}.ffn.up.weight").chunk(2)
    return CausalLayer(
        attention_norm=read(f"{name}.attn_lnorm.weight"),
        joined=Dense(read(f"{name}.attn.qkv_w.weight"), bias if bias.any() else None),
        query_norm=read(f"{name}.attn.q_lnorm.weight"),
        key_norm=read(f"{name}.attn.k_lnorm.weight"),
        attended=Dense(read(f"{name}.attn.out.weight")),
        inner_norm=read(f"{name}.ffn_lnorm.weight"),
        gate=gate,
        up=up,
        down=read(f"{name}.ffn.down.weight"),
    )


class JinaVlmProcessor:
    """See ``types.ChatProcessor``; pictures are read where they stand among the words of their message."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tiling: Tiling,
        *,
        vocabulary: int,
        first: int,
        ends: frozenset[int],
    ) -> None:
        """``first`` is put before every conversation; ``vocabulary`` counts the ids of answers."""
        self.fit = None
        self.ends = ends
        self.pieces = tokenizer.pieces(vocabulary)
        self._spec = spec
        self._tokenizer = tokenizer
        self._plain = tokenizer.reading_marks_as_text()
        self._marks = tuple(tokenizer.marks().values())
        self._template = template
        self._tiling = tiling
        self._first = first
        self._mark = _id(tokenizer, _MARK)
        self._start, self._patch, self._column, self._end = (_id(tokenizer, word) for word in _WORDS)

    @classmethod
    def load(
        cls, spec: ModelSpec, checkpoint: Checkpoint, tiling: Tiling, vocabulary: int, more: int
    ) -> JinaVlmProcessor:
        """Read what stands beside the weights. CheckpointError for what is missing or does not fit."""
        directory = checkpoint.directory
        tokenizer = Tokenizer.load(directory)
        known = [_id(tokenizer, word) for word in (_MARK, *_WORDS)]
        if max(known) >= vocabulary + more:
            raise CheckpointError(f"{directory}: the marks of pictures lie outside the network's words")
        settings = _optional(checkpoint, "tokenizer_config.json")
        bos, eos = (_token(settings.get(f"{name}_token")) for name in ("bos", "eos"))
        first = bos or eos
        if first is None:
            raise CheckpointError(f"{directory}/tokenizer_config.json: neither 'bos_token' nor 'eos_token'")
        ends = _ends(checkpoint, None if eos is None else _id(tokenizer, eos))
        spaced = _optional(checkpoint, "processor_config.json").get("always_start_with_space", False)
        variables = {
            "bos_token": bos or "",
            "eos_token": eos or "",
            "image_prompt_token": _MARK,
            "always_start_with_space": bool(spaced),
        }
        template = ChatTemplate.load(directory, variables)
        return cls(
            spec, tokenizer, template, tiling, vocabulary=vocabulary, first=_id(tokenizer, first), ends=ends
        )

    def expected(self, kind: Modality) -> int:
        """Return about what a picture costs: that of the largest."""
        if kind is not Modality.IMAGE:
            raise UnfitInputError(f"Model '{self._spec.id}' takes text and images, not '{kind}'.")
        return self._tiling.length(self._tiling.plan(1 << 10, 1 << 10))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a plain text, without specials."""
        return self._plain.plain_ids(text)

    def prepare(self, messages: Sequence[Message]) -> PreparedChat:
        """Write a conversation: ids, with each picture's words in place of its mark, and the pictures."""
        pictures = [part for message in messages for part in message.parts if isinstance(part, Image)]
        ids = self._ids(messages)
        if len(ids) and ids[-1] in self.ends:
            ids = ids[:-1]
        places = np.flatnonzero(ids == self._mark)
        if not len(places):
            places = np.zeros(len(pictures), np.int64)
            behind = places
        else:
            behind = places + 1
        if len(places) != len(pictures):
            raise UnfitInputError(
                f"The model's template has {len(places)} places for {len(pictures)} images."
            )
        runs: list[np.ndarray] = [np.array([self._first])]
        features: list[Feature] = []
        length, at = 1, 0
        for picture, place, next_at in zip(pictures, places.tolist(), behind.tolist(), strict=True):
            runs.append(ids[at:place])
            length += place - at
            feature, run = self._picture(picture, length)
            features.append(feature)
            runs.append(run)
            length += len(run)
            at = next_at
        runs.append(ids[at:])
        whole = np.concatenate(runs).astype(np.int32)
        seen = sum(feature.length for feature in features)
        return PreparedChat(whole, tuple(features), Usage(text=len(whole) - seen, image=seen))

    def _ids(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the ids of the written conversation, with one mark for each picture.

        What a caller writes never becomes a mark: a text that names one is read letter by letter.
        """
        named = any(
            mark in part
            for message in messages
            for part in message.parts
            if isinstance(part, str)
            for mark in self._marks
        )
        if not named:
            return np.array(self._tokenizer.plain_ids(self._template.render(_written(messages))))
        texts: list[str] = []
        # A template may leave a text out, or write it twice, but writes each in one piece.
        pieces = _PLACE.split(self._template.render(_written(messages, texts)))
        ids = self._tokenizer.plain_ids(pieces[0])
        for number, between in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self._plain.plain_ids(texts[int(number)])
            ids += self._tokenizer.plain_ids(between)
        return np.array(ids)

    def _picture(self, picture: Image, offset: int) -> tuple[Feature, np.ndarray]:
        plan = self._tiling.plan(*picture.pixels.shape[:2])
        more = [self._column] if self._tiling.column_words else []
        words = self._tiling.words
        run = np.array(
            [
                self._start,
                *([self._patch] * words + more) * words,
                self._end,
                self._start,
                *([self._patch] * plan.columns + more) * plan.rows,
                self._end,
            ]
        )
        height, width = picture.pixels.shape[:2]
        digest = hashlib.blake2b(
            b"%dx%d" % (height, width) + picture.pixels.tobytes(), digest_size=16
        ).digest()
        grid = (1, height, width)
        crops = self._tiling.crops(picture.pixels, plan)
        return Feature(Modality.IMAGE, crops, offset, len(run), grid, digest), run

    def placed(self, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
        """Return each word's place among the tokens of a picture, and among the words of its crops."""
        assert feature.grid is not None
        plan = self._tiling.plan(*feature.grid[1:])
        more, words = int(self._tiling.column_words), self._tiling.words
        whole = 1 + np.arange(words)[:, None] * (words + more) + np.arange(words)
        start = 3 + words * (words + more)
        tiles = start + np.arange(plan.rows)[:, None] * (plan.columns + more) + np.arange(plan.columns)
        return np.concatenate([whole.ravel(), tiles.ravel()]), plan.order


class JinaVlm:
    """A model in memory; see ``types.Generator`` for the contract."""

    def __init__(
        self, processor: JinaVlmProcessor, network: CausalNetwork, tower: Siglip, device: torch.device
    ) -> None:
        self.processor = processor
        self.width = 0
        self.batch_tokens = 0
        self.block_bytes = network.block_bytes
        self.open_cache = network.open_cache
        self.step = network.step
        self._network = network
        self._tower = tower
        self._crops = _CPU_CROPS if device.type == "cpu" else _CUDA_CROPS

    def looks(self, feature: Feature) -> int:
        """See ``types.Generator``."""
        return -(-len(feature.data) // self._crops)

    def look(self, feature: Feature, part: int) -> torch.Tensor:
        """Run the tower on some crops of a picture: (crops, words of a crop, width)."""
        crops = feature.data[part * self._crops : (part + 1) * self._crops]
        first = part * self._crops
        with torch.inference_mode():
            return self._tower(crops, [first + i == len(feature.data) - 1 for i in range(len(crops))])

    def seen(self, feature: Feature, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put the words of all crops where they stand in the sequence; zeros for the marks around them."""
        words = torch.cat(list(parts)).flatten(0, 1)
        places, order = (torch.from_numpy(each).to(words.device) for each in self.processor.placed(feature))
        states = words.new_zeros(feature.length, words.shape[1])
        states[places] = words[order]
        return states

    def warm_up(self) -> None:
        """Run decoder and tower once."""
        config = self._tower.config
        self._network.open_cache(1)
        self.step([Chunk(np.zeros(min(4, BLOCK), np.int32), 0, np.zeros(1, np.int32))])
        with torch.inference_mode():
            self._tower(torch.zeros(1, config.grid**2, 3 * config.patch**2), [True])


def _written(messages: Sequence[Message], texts: list[str] | None = None) -> list[dict[str, Any]]:
    """Return messages as templates take them; with ``texts`` those get the texts, and ``_PLACE`` stands for
    each."""

    def parts(message: Message) -> Iterator[dict[str, str]]:
        for part in message.parts:
            if isinstance(part, Image):
                yield {"type": "image"}
            elif texts is None:
                yield {"type": "text", "text": part}
            else:
                yield {"type": "text", "text": f"\ue000{len(texts)}\ue001"}
                texts.append(part)

    return [{"role": message.role, "content": list(parts(message))} for message in messages]


def _id(tokenizer: Tokenizer, token: str) -> int:
    id = tokenizer.token_id(token)
    if id is None:
        raise CheckpointError(f"tokenizer.json: no token '{token}'")
    return id


def _optional(checkpoint: Checkpoint, name: str) -> Config:
    path = checkpoint.directory / name
    return read_json(path) if path.is_file() else {}


def _token(written: Any) -> str | None:
    """Return a token as tokenizer_config.json writes it: a text, or an object with one."""
    if isinstance(written, dict):
        written = cast("dict[str, Any]", written).get("content")
    return written if isinstance(written, str) else None


def _ends(checkpoint: Checkpoint, eos: int | None) -> frozenset[int]:
    """Return the ids that end an answer: what generation_config.json says, one or several."""
    ids: Any = _optional(checkpoint, "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = checkpoint.config.get("eos_token_id", eos)
    listed = cast("list[Any]", ids) if isinstance(ids, list) else [ids]
    if not listed or not all(isinstance(id, int) for id in listed):
        raise CheckpointError(f"{checkpoint.directory}: nothing says which token ends an answer")
    return frozenset(listed) | ({eos} if eos is not None else set())
