"""jina-embeddings-v5-omni-nano and -small: texts, pictures, sounds, films and groups of them to one vector
each.

The decoder is that of jina-embeddings-v5-text, and so are the vectors of texts. A vision and an audio tower
make states that stand for tokens; what a task changes is four things together: the adapter of the decoder,
the merger behind the vision tower, the projector behind the audio tower, and the embeddings of the marks
around media. Source: arXiv 2605.08384; the tensors and configurations of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Film, Image, Input, Scaling, Sound, Usage
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
from services.core.modeling.families.decoder import Decoder, linear_sizes, load_decoder
from services.core.modeling.families.decoder_config import EUROBERT, QWEN3, DecoderConfig
from services.core.modeling.families.dense_decoder import ends
from services.core.modeling.families.encoder import DenseHead, Encoder
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.families.qwen3_vision import (
    Qwen3Vision,
    Qwen3VisionConfig,
    film_rows,
    qwen3_vision_shapes,
)
from services.core.modeling.families.qwen_audio import (
    AudioConfig,
    Hearing,
    audio_shapes,
    audio_states,
    log_mel,
    mel_frames,
)
from services.core.modeling.families.text import TextProcessor
from services.core.modeling.layers.linear import Linear
from services.core.modeling.layers.packed import Inserted, Limits, PackedBatch
from services.core.modeling.layers.pooling import last as last_state
from services.core.modeling.layers.post_norm import Norm
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.types import (
    EncodeItem,
    Feature,
    Prepared,
    PrepareOptions,
    TooLongError,
    UnfitInputError,
)

_LAYOUTS = {
    "language_model.model.": "",
    "language_model.": "",
    "vision_tower.": "visual.",
    "model.visual.": "visual.",
    "model.audio_tower.": "audio_tower.",
}
"""Beginnings of names, and what stands here in their place."""

_VISION = "visual."
_AUDIO = "audio_tower."
_UNUSED = ("audio_tower.audio_bos_eos_token.*", "audio_tower.positional_embedding.*", "lm_head.*")
_PICTURE_PIXELS = 262_144, 1_310_720
"""The least and the most of a picture: the published module sets them, whatever the files say."""

_FILM_FRAMES, _FILM_PIXELS = 32, (262_144, 12_845_056)
_FRAMES_A_SECOND = 24
"""What times of frames are told by: films come without their rate."""

_SMALL_BASE = 3_500_000.0


@dataclass(frozen=True, slots=True)
class Marks:
    """Ids of the tokens around media and in their place, None where the vocabulary has none.

    ``seen`` stand around pictures, ``picture`` and ``frame`` in the place of a state of one; ``heard`` stand
    around sounds, ``sound`` in the place of a state. With ``timed`` each two frames of a film are told by
    their time.
    """

    picture: int
    frame: int
    seen: tuple[int, int] | None
    heard: tuple[int, int]
    sound: int
    timed: bool

    @classmethod
    def read(cls, config: Config) -> Marks:
        """Read the ids of either size from config.json."""
        heard = require(config, "audio_start_token_id", int), require(config, "audio_end_token_id", int)
        sound = require(config, "audio_token_id", int)
        if "image_token_index" in config:
            pad = require(config, "image_token_index", int)
            return cls(pad, pad, None, heard, sound, timed=False)
        return cls(
            require(config, "image_token_id", int),
            require(config, "video_token_id", int),
            (require(config, "vision_start_token_id", int), require(config, "vision_end_token_id", int)),
            heard,
            sound,
            timed=True,
        )


@dataclass(frozen=True, slots=True)
class OmniConfig:
    """What config.json says; ``specials`` are the tokens that have an embedding for each task."""

    text: DecoderConfig
    vision: Qwen3VisionConfig
    audio: AudioConfig
    marks: Marks
    specials: tuple[int, ...]
    tasks: tuple[str, ...]

    @classmethod
    def read(cls, config: Config) -> OmniConfig:
        """Parse config.json. CheckpointError for what is missing and what is not served."""
        refuse_unless(config, "modality", "omni", default="omni")
        marks = Marks.read(config)
        text = _text_config(cast(Config, require(config, "text_config", dict)), small=marks.timed)
        specials = cast("list[Any]", require(config, "special_token_ids", list))
        tasks = cast("list[Any]", require(config, "task_names", list))
        if not all(type(each) is int and 0 <= each < text.vocabulary for each in specials):
            raise CheckpointError(f"config.json: 'special_token_ids' must be tokens, found {specials!r}")
        if not tasks or not all(isinstance(each, str) for each in tasks):
            raise CheckpointError(f"config.json: 'task_names' must be names, found {tasks!r}")
        return cls(
            text,
            Qwen3VisionConfig.read(cast(Config, require(config, "vision_config", dict))),
            AudioConfig.read(cast(Config, require(config, "audio_config", dict))),
            marks,
            tuple(specials),
            tuple(task.replace("_", "-") for task in tasks),
        )

    def bridge_shapes(self) -> dict[str, Shape]:
        """Names and shapes of what each task has of its own beside the decoder's adapter."""
        merged = self.vision.width * self.vision.merge**2
        shapes: dict[str, Shape] = {}
        for task in self.tasks:
            stored = _stored(task)
            shapes |= norm_shapes(f"mergers.{stored}.norm", self.vision.width)
            shapes |= linear_shapes(f"mergers.{stored}.linear_fc1", merged, merged)
            shapes |= linear_shapes(f"mergers.{stored}.linear_fc2", self.text.width, merged)
            shapes |= linear_shapes(f"audio_projectors.{stored}", self.text.width, self.audio.width)
            shapes[f"task_token_embeddings.{stored}"] = (len(self.specials), self.text.width)
        return shapes


def _text_config(fields: Config, *, small: bool) -> DecoderConfig:
    """Read the decoder's numbers; the axes that its positions may name are one and the same."""
    turning = cast("Mapping[str, Any]", fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    kind = turning.get("rope_type", turning.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"config.json: rotary positions of the kind {kind!r} are not served")
    if small:
        base = turning.get("rope_theta", _SMALL_BASE)
    else:
        base = turning.get("rope_theta", fields.get("rope_theta"))
    plain = {**fields, "rope_theta": base, "rope_parameters": None, "rope_scaling": None}
    return DecoderConfig.read(plain, QWEN3 if small else EUROBERT)


def _stored(task: str) -> str:
    """The name of a task inside the weights; its adapter's folder keeps the hyphen."""
    return task.replace("-", "_")


def is_jina_v5_omni(config: Config) -> bool:
    """Whether config.json is that of jina-embeddings-v5-omni, in either size."""
    return config.get("model_type") == "jina_embeddings_v5_omni"


def load_jina_v5_omni(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Encoder:
    """Load jina-embeddings-v5-omni-* with all that its tasks have.

    CheckpointError also for a task that the catalogue names and the checkpoint has not.
    """
    config = OmniConfig.read(checkpoint.config)
    config.text.refuse_short(spec, checkpoint)
    wanted = sorted(set(spec.adapters.values()))
    if lacking := [task for task in wanted if task not in config.tasks]:
        raise CheckpointError(f"config.json: 'task_names' lacks {', '.join(lacking)}")
    checkpoint.rename(_LAYOUTS)
    adapters = PeftAdapters.read(checkpoint.directory / "adapters", linear_sizes(config.text), wanted)
    extra = {
        **qwen3_vision_shapes(config.vision, _VISION),
        **audio_shapes(config.audio, _AUDIO),
        **config.bridge_shapes(),
    }
    network = load_decoder(
        checkpoint, config.text, device, dtype, adapters=adapters, extra=extra, unused=_UNUSED
    )
    layers = Layers(checkpoint, device, dtype)
    tokenizer = Tokenizer.load(checkpoint.directory)
    processor = OmniProcessor(spec, tokenizer, config)
    mean, std = _pixel_norms(checkpoint)
    senses = Senses(
        config,
        Qwen3Vision(layers, config.vision, _VISION, mean, std),
        Hearing(layers, config.audio, _AUDIO),
        {task: Bridge.read(layers, task) for task in config.tasks},
        device,
    )
    return Encoder(
        spec,
        tokenizer,
        network,
        DenseHead(last_state),
        device=device,
        limits=Limits(config.text.vocabulary, config.text.positions, adapters.names),
        width=config.text.width,
        wanted=ends,
        merges=network.merges if isinstance(network, Decoder) else None,
        sees=senses,
        processor=processor,
        warm=processor.samples(),
    )


def _pixel_norms(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and deviation of each channel, of values from 0 to 1."""
    said = read_json(checkpoint.directory / "preprocessor_config.json")
    found: list[tuple[float, ...]] = []
    for name in ("image_mean", "image_std"):
        values = cast("list[Any]", require({name: [0.5] * 3, **said}, name, list))
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise CheckpointError(f"preprocessor_config.json: '{name}' must be three numbers")
        found.append(tuple(map(float, values)))
    return found[0], found[1]


_Piece: TypeAlias = str | Sequence[int] | Feature
"""Of a sequence: a text to be tokenised, tokens, or what a tower reads."""


class OmniProcessor(TextProcessor):
    """Texts behind their task's prompt; media and groups as one sequence, in order; see ``types.Processor``.

    A group is tokenised as one text with marks for its media, without a prompt where it has any. A film's
    sound stands before its frames.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, config: OmniConfig) -> None:
        """CheckpointError if a mark lies outside the vocabulary."""
        super().__init__(spec, tokenizer)
        self._model = spec
        self._tokenizer = tokenizer
        self._config = config
        self._marks = config.marks
        self.fit = Scaling(config.vision.multiple, *_PICTURE_PIXELS, _FILM_FRAMES, *_FILM_PIXELS, copies=2)

    def expected(self, kind: Modality) -> int:
        """Return what the largest of a kind costs; of a PDF it is not known how many pictures it is."""
        if kind is Modality.AUDIO:
            frames = mel_frames(1 << 62)
            return frames // 2 + audio_states(frames)
        pixels = _FILM_PIXELS[1] // 2 if kind is Modality.VIDEO else _PICTURE_PIXELS[1]
        states = pixels // self._config.vision.multiple**2
        return states * (1 + self._config.vision.merge**2)

    def prepare(self, inputs: Sequence[Input], options: PrepareOptions) -> list[Prepared]:
        """Make one item of each input; TooLongError for one with media that does not fit the context."""
        texts = iter(super().prepare([each for each in inputs if isinstance(each, str)], options))
        return [next(texts) if isinstance(each, str) else self._joined(each, options) for each in inputs]

    def samples(self) -> list[EncodeItem]:
        """Return items for the warm-up."""
        width, height = cast(Scaling, self.fit).size(512, 512)
        parts = (
            Image(np.zeros((height, width, 3), np.uint8), (width, height)),
            Sound(np.zeros(4000, np.float32)),
        )
        return [self._joined(parts, PrepareOptions()).item]

    def _joined(self, input: Input, options: PrepareOptions) -> Prepared:
        parts = input if isinstance(input, tuple) else (input,)
        prompt = self._model.prompt(options.task) if all(isinstance(part, str) for part in parts) else ""
        pieces = [piece for part in (prompt, *parts) for piece in self._pieces(part)]
        limit = self.limit(options)
        ids, features = self._sequence(pieces, limit)
        if len(ids) > limit:
            raise TooLongError(len(ids), limit)
        if not len(ids):
            raise UnfitInputError("A group of empty texts has no tokens.")
        counts = dict.fromkeys(Modality, 0)
        for feature in features:
            counts[feature.kind] += feature.length
        media = sum(counts.values())
        usage = Usage(
            len(ids) - media, counts[Modality.IMAGE], counts[Modality.AUDIO], counts[Modality.VIDEO]
        )
        item = EncodeItem(ids, self._model.adapter(options.task), features=tuple(features))
        return Prepared(item, usage, patches=sum(map(_patches, features)))

    def _pieces(self, part: str | Image | Sound | Film) -> Iterable[_Piece]:
        match part:
            case str():
                yield part
            case Image():
                frames = np.stack([part.pixels, part.pixels])
                yield from self._seen(self._feature(Modality.IMAGE, frames))
            case Sound():
                if not (states := audio_states(mel_frames(len(part.samples)))):
                    raise UnfitInputError("A sound of 20 ms or less has no tokens.")
                yield from self._heard(part, states)
            case Film():
                yield from self._film(part)

    def _film(self, film: Film) -> Iterable[_Piece]:
        if film.sound is not None and (states := audio_states(mel_frames(len(film.sound.samples)))):
            yield from self._heard(film.sound, states)
        frames = film.frames
        if len(frames) % 2:
            frames = np.concatenate([frames, frames[-1:]])
        if not self._marks.timed:
            yield from self._seen(self._feature(Modality.VIDEO, frames))
            return
        for first in range(0, len(frames), 2):
            last = min(first + 1, len(film.frames) - 1)
            time = (first / _FRAMES_A_SECOND + last / _FRAMES_A_SECOND) / 2
            yield f"<{time:.1f} seconds>"
            yield from self._seen(self._feature(Modality.VIDEO, frames[first : first + 2]))

    def _feature(self, kind: Modality, frames: NDArray[np.uint8]) -> Feature:
        vision = self._config.vision
        count, height, width = frames.shape[:3]
        if height % vision.multiple or width % vision.multiple:
            raise ValueError(f"a picture of {width} x {height} pixels, not scaled")
        grid = count // 2, height // vision.patch, width // vision.patch
        rows = film_rows(frames, vision.patch, vision.merge)
        return Feature(kind, rows, 0, len(rows) // vision.merge**2, grid)

    def _seen(self, feature: Feature) -> Iterable[_Piece]:
        start, end = self._marks.seen or (None, None)
        yield from ([start],) if start is not None else ()
        yield feature
        yield from ([end],) if end is not None else ()

    def _heard(self, sound: Sound, states: int) -> Iterable[_Piece]:
        start, end = self._marks.heard
        yield [start]
        yield Feature(Modality.AUDIO, log_mel(sound.samples, self._config.audio.bands), 0, states)
        yield [end]

    def _sequence(self, pieces: Iterable[_Piece], limit: int) -> tuple[NDArray[np.int32], list[Feature]]:
        """Tokenise texts, neighbours as one, and put pads where features stand.

        Of a text far longer than ``limit`` only the beginning is read: it is refused.
        """
        marks = self._marks
        pads = {Modality.IMAGE: marks.picture, Modality.VIDEO: marks.frame, Modality.AUDIO: marks.sound}
        around = self._tokenizer.encode_batch([""])[0].ids
        before = self._tokenizer.prefix_length
        ids: list[NDArray[np.int32]] = [around[:before]]
        features: list[Feature] = []
        length, text = before, ""

        def flush() -> None:
            nonlocal length, text
            if text:
                most = limit + self._tokenizer.special_length + 1
                found = self._tokenizer.encode_batch([text], truncate_to=most)[0]
                if found.truncated:
                    raise TooLongError(length + found.length, limit)
                ids.append(found.ids[before : len(found.ids) - self._tokenizer.suffix_length])
                length += len(ids[-1])
                text = ""

        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            flush()
            if isinstance(piece, Feature):
                features.append(replace(piece, offset=length))
                ids.append(np.full(piece.length, pads[piece.kind], np.int32))
            else:
                ids.append(np.array(piece, np.int32))
            length += len(ids[-1])
        flush()
        return np.concatenate([*ids, around[before:]]).astype(np.int32), features


def _patches(feature: Feature) -> int:
    if feature.kind is Modality.AUDIO:
        return (feature.data.shape[1] - 1) // 2 + 1
    return feature.data.shape[0]


@dataclass(frozen=True, slots=True)
class Bridge:
    """What one task has between towers and decoder; ``words`` (specials, width) are its embeddings."""

    norm: Norm
    merge: tuple[Linear, Linear]
    project: Linear
    words: torch.Tensor

    @classmethod
    def read(cls, layers: Layers, task: str) -> Bridge:
        """Read what belongs to ``task``."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, 1e-6)
        merger = f"mergers.{_stored(task)}"
        return cls(
            layers.norm(f"{merger}.norm"),
            (layers.linear(f"{merger}.linear_fc1"), layers.linear(f"{merger}.linear_fc2")),
            layers.linear(f"audio_projectors.{_stored(task)}"),
            layers.tensor(f"task_token_embeddings.{_stored(task)}"),
        )

    def merged(self, x: torch.Tensor, patches: int) -> torch.Tensor:
        """Join each ``patches`` neighbours of ``x`` to one state."""
        first, second = self.merge
        return second(first.gelu(self.norm(x).view(-1, patches * x.shape[1])))


class Senses:
    """Runs the towers over the media of a batch and says where what they make belongs; see ``Sees``."""

    def __init__(
        self,
        config: OmniConfig,
        vision: Qwen3Vision,
        hearing: Hearing,
        bridges: Mapping[str, Bridge],
        device: torch.device,
    ) -> None:
        """``bridges`` by task."""
        self._specials = np.array(config.specials, np.int32)
        self._merge = config.vision.merge**2
        self._vision = vision
        self._hearing = hearing
        self._bridges = bridges
        self._device = device

    def __call__(self, batch: PackedBatch, items: Sequence[EncodeItem]) -> PackedBatch:
        """Return ``batch`` with states of media and the task's own embeddings; of plain texts as it is."""
        starts = np.cumsum((0, *batch.lengths[:-1]))
        places: list[NDArray[np.int64]] = []
        states: list[torch.Tensor] = []
        for run in _runs(items):
            bridge = self._bridges.get(run[0][1].adapter or "")
            for kinds, look in (
                ((Modality.IMAGE, Modality.VIDEO), self._looked),
                ((Modality.AUDIO,), self._listened),
            ):
                found = [(i, each) for i, item in run for each in item.features if each.kind in kinds]
                if found:
                    places += [starts[i] + each.offset + np.arange(each.length) for i, each in found]
                    states.append(look([each for _, each in found], _required(bridge)))
            for i, item in run:
                at, which = self._marked(item)
                if len(at):
                    places.append(starts[i] + at)
                    states.append(_required(bridge).words[torch.from_numpy(which).to(self._device)])
        if not places:
            return batch
        all_places = np.concatenate(places)
        order = np.argsort(all_places)
        rows = torch.cat(states)[torch.from_numpy(order).to(self._device)]
        return replace(batch, inserted=Inserted(torch.from_numpy(all_places[order]).to(self._device), rows))

    def _looked(self, features: Sequence[Feature], bridge: Bridge) -> torch.Tensor:
        return bridge.merged(self._vision(features), self._merge)

    def _listened(self, features: Sequence[Feature], bridge: Bridge) -> torch.Tensor:
        return bridge.project(self._hearing(features))

    def _marked(self, item: EncodeItem) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where in an item tokens stand that its task has embeddings for, and which of them."""
        found = item.token_ids[:, None] == self._specials
        for feature in item.features:
            found[feature.offset : feature.offset + feature.length] = False
        at, which = found.nonzero()
        return at, which


def _runs(items: Sequence[EncodeItem]) -> list[list[tuple[int, EncodeItem]]]:
    """Put items of one task together, with their places."""
    runs: dict[str, list[tuple[int, EncodeItem]]] = {}
    for i, item in enumerate(items):
        runs.setdefault(item.adapter or "", []).append((i, item))
    return list(runs.values())


def _required(bridge: Bridge | None) -> Bridge:
    if bridge is None:
        raise ValueError("media without a task")
    return bridge
