"""The audio tower of Qwen2.5-Omni: Whisper's encoder over log-mel spectra, in chunks of two seconds.

Two convolutions halve the time, sinusoids say the place in a chunk, each chunk sees itself only, and pairs
of states are averaged: 25 states a second. Sources: Radford et al., arXiv 2212.04356; Xu et al., arXiv
2503.20215; the tensors of the released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.core.content import SOUND_RATE, SOUND_SECONDS
from services.core.modeling.checkpoints.checkpoint import CheckpointError, Config, Shape, positive
from services.core.modeling.families.encoder_config import refuse_unless
from services.core.modeling.layers.packed import pinned, segments
from services.core.modeling.layers.reading import Layers, linear_shapes, norm_shapes
from services.core.modeling.layers.tower import TowerBlock
from services.core.modeling.types import Feature

_EPSILON = 1e-5
_WINDOW = 400
_HOP = 160
_FRAMES = SOUND_RATE * SOUND_SECONDS // _HOP
_HIGHEST_HERTZ = 8000.0


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The numbers of ``audio_config`` that fix the network; ``chunk`` frames are seen together."""

    width: int
    layers: int
    heads: int
    inner: int
    bands: int
    chunk: int
    positions: int

    @classmethod
    def read(cls, config: Config) -> AudioConfig:
        """Parse ``audio_config``; what it leaves out has the default of transformers' own class.

        CheckpointError for a number that does not fit and for what is not served.
        """
        refuse_unless(config, "activation_function", "gelu", default="gelu")
        refuse_unless(config, "scale_embedding", False, default=False)
        parsed = cls(
            width=positive(config, "d_model", 1280),
            layers=positive(config, "encoder_layers", 32),
            heads=positive(config, "encoder_attention_heads", 20),
            inner=positive(config, "encoder_ffn_dim", 5120),
            bands=positive(config, "num_mel_bins", 128),
            chunk=2 * positive(config, "n_window", 100),
            positions=positive(config, "max_source_positions", 1500),
        )
        if parsed.width % parsed.heads or parsed.width % 2:
            raise CheckpointError(f"config.json: {parsed.width} numbers do not make {parsed.heads} heads")
        if parsed.chunk % 4 or parsed.chunk // 2 > parsed.positions:
            raise CheckpointError(f"config.json: chunks of {parsed.chunk} frames are not served")
        return parsed


def audio_shapes(config: AudioConfig, prefix: str) -> dict[str, Shape]:
    """Names and shapes of all tensors of the tower."""
    width = config.width
    shapes: dict[str, Shape] = {
        f"{prefix}conv1.weight": (width, config.bands, 3),
        f"{prefix}conv1.bias": (width,),
        f"{prefix}conv2.weight": (width, width, 3),
        f"{prefix}conv2.bias": (width,),
        **norm_shapes(f"{prefix}ln_post", width),
    }
    for i in range(config.layers):
        name = f"{prefix}layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{name}.self_attn.{part}", width, width, bias=part != "k_proj")
        shapes |= norm_shapes(f"{name}.self_attn_layer_norm", width)
        shapes |= linear_shapes(f"{name}.fc1", config.inner, width)
        shapes |= linear_shapes(f"{name}.fc2", width, config.inner)
        shapes |= norm_shapes(f"{name}.final_layer_norm", width)
    return shapes


def mel_frames(samples: int) -> int:
    """Return how many spectra are kept of so many samples."""
    return min(-(-samples // _HOP), _FRAMES)


def audio_states(frames: int) -> int:
    """Return how many states the tower makes of so many spectra; none of one or two."""
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1)


def log_mel(samples: NDArray[np.float32], bands: int) -> torch.Tensor:
    """Return the spectra of a sound at 16 kHz, (bands, frames) fp32, as Whisper's feature extractor.

    The sound is filled with silence to 30 seconds: of those the loudest value is taken, though only its own
    spectra are kept. What the silence adds is known, so it is not computed.
    """
    count = len(samples)
    frames = mel_frames(count)
    # Spectra that see nothing of the sound are those of silence, which is as quiet as there is.
    whole = torch.zeros(min(SOUND_RATE * SOUND_SECONDS, count + _WINDOW))
    whole[:count] = torch.from_numpy(samples[: len(whole)])
    left = whole[1 : _WINDOW // 2 + 1].flip(0)
    right = (
        whole[-_WINDOW // 2 - 1 : -1].flip(0)
        if len(whole) == SOUND_RATE * SOUND_SECONDS
        else torch.zeros(_WINDOW // 2)
    )
    padded = torch.cat([left, whole, right])
    spectra = torch.stft(
        padded, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), center=False, return_complex=True
    )
    power = spectra.real.square() + spectra.imag.square()
    mel = (mel_filters(bands) @ power[:, : min(_FRAMES, power.shape[1])]).clamp_(min=1e-10).log10_()
    mel = torch.maximum(mel, mel.max() - 8.0)
    return ((mel + 4.0) / 4.0)[:, :frames].contiguous()


@cache
def mel_filters(bands: int) -> torch.Tensor:
    """Return Slaney's triangles to 8 kHz, each of area 1, (bands, frequencies) fp32."""
    edges = _hertz(np.linspace(0.0, _mel(_HIGHEST_HERTZ), bands + 2))
    frequencies = np.linspace(0, SOUND_RATE // 2, _WINDOW // 2 + 1)
    slopes = edges[:, None] - frequencies
    widths = np.diff(edges)[:, None]
    triangles = np.maximum(0.0, np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]))
    triangles *= 2.0 / (edges[2:] - edges[:-2])[:, None]
    return torch.from_numpy(triangles.astype(np.float32))


_STEP = math.log(6.4) / 27.0


def _mel(hertz: float) -> float:
    """Slaney's scale: even to 1 kHz, logarithmic above."""
    return 3.0 * hertz / 200.0 if hertz < 1000.0 else 15.0 + math.log(hertz / 1000.0) / _STEP


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * np.exp(_STEP * (mel - 15.0)))


class Hearing:
    """The network."""

    def __init__(self, layers: Layers, config: AudioConfig, prefix: str) -> None:
        """Read the weights."""
        layers = Layers(layers.checkpoint, layers.device, layers.dtype, _EPSILON)
        self.config = config
        self._device, self._dtype = layers.device, layers.dtype
        self._convolutions = [
            layers.joined(
                layers.checkpoint.tensor(f"{prefix}{name}.weight").flatten(1),
                layers.checkpoint.tensor(f"{prefix}{name}.bias"),
            )
            for name in ("conv1", "conv2")
        ]
        self._positions = layers.place(_sinusoids(config.chunk // 2, config.width))
        self._blocks = [_block(layers, config, f"{prefix}layers.{i}") for i in range(config.layers)]
        self._norm = layers.norm(f"{prefix}ln_post")

    def __call__(self, sounds: Sequence[Feature]) -> torch.Tensor:
        """From ``log_mel`` of ``sounds`` to their states behind one another, (states, width)."""
        frames = np.array([each.data.shape[1] for each in sounds], np.int64)
        chunks = np.concatenate([_chunks(int(count), self.config.chunk) for count in frames])
        x = self._convolved([each.data for each in sounds], chunks)
        halved = (chunks - 1) // 2 + 1
        seen = segments(halved, self._device)
        for block in self._blocks:
            x = block(x, seen)
        first = torch.from_numpy(_pairs(frames)).to(self._device)
        return self._norm((x[first] + x[first + 1]) / 2)

    def _convolved(self, sounds: Sequence[torch.Tensor], chunks: NDArray[np.int64]) -> torch.Tensor:
        """Run the convolutions as products over each chunk by itself; the first states, (states, width)."""
        first, second = self._convolutions
        spectra = pinned(torch.cat([sound.T for sound in sounds])).to(self._device, self._dtype)
        found: list[torch.Tensor] = []
        for chunk in spectra.split(chunks.tolist()):
            x = first.gelu(_unfolded(chunk, 1))
            x = second.gelu(_unfolded(x, 2))
            found.append(x + self._positions[: len(x)])
        return found[0] if len(found) == 1 else torch.cat(found)


def _unfolded(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """Lay each row (rows, channels) out with its neighbours, silence at the ends, (rows / stride, channels
    * 3).
    """
    return functional.pad(rows, (0, 0, 1, 1)).unfold(0, 3, stride).flatten(1)


def _chunks(frames: int, chunk: int) -> NDArray[np.int64]:
    full, rest = divmod(frames, chunk)
    return np.array([chunk] * full + [rest] * (rest > 0), np.int64)


def _pairs(frames: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first of each two states that are averaged; one that is left over at an end is dropped."""
    halved = (frames - 1) // 2 + 1
    starts = np.cumsum(halved) - halved
    return np.concatenate(
        [start + 2 * np.arange(count // 2) for start, count in zip(starts, halved, strict=True)]
    )


def _sinusoids(length: int, width: int) -> torch.Tensor:
    step = math.log(10000.0) / (width // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2).float())
    return torch.cat([angles.sin(), angles.cos()], 1)


def _block(layers: Layers, config: AudioConfig, name: str) -> TowerBlock:
    """Read block ``name``."""
    read, own = layers.checkpoint.tensor, f"{name}.self_attn"
    parts = ("q_proj", "k_proj", "v_proj")
    query_bias, value_bias = read(f"{own}.q_proj.bias"), read(f"{own}.v_proj.bias")
    return TowerBlock(
        heads=config.heads,
        norm=layers.norm(f"{own}_layer_norm"),
        query_key_value=layers.joined(
            torch.cat([read(f"{own}.{part}.weight") for part in parts]),
            torch.cat([query_bias, torch.zeros_like(query_bias), value_bias]),
        ),
        attended=layers.linear(f"{own}.out_proj"),
        inner_norm=layers.norm(f"{name}.final_layer_norm"),
        inner=layers.linear(f"{name}.fc1").gelu,
        down=layers.linear(f"{name}.fc2"),
    )
