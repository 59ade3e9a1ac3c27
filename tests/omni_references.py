"""jina-embeddings-v5-omni in transformers' own classes, in float64 or less: one input at a time, nothing
packed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch.nn import functional
from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from services.core.content import Film, Image, Scaling, Sound
from services.core.media.scaling import scale
from tests.media.films import film, frames, sound, tone
from tests.media.pictures import photograph
from tests.modeling.stock import merge

Part = str | Image | Sound | Film

FIT = Scaling(32, 262_144, 1_310_720, 32, 262_144, 12_845_056)
TONE = sound(0.4)
FILM = film("matroska", "ffv1", 3, (64, 64))
"""Without loss in RGB, so that what comes out is what went in."""


def photo() -> Image:
    """What the network sees of ``photograph()``."""
    pixels = np.array(Pillow.open(io.BytesIO(photograph())).convert("RGB"))
    return Image(scale(pixels, FIT.size(640, 427)), (640, 427))


def filmed() -> Film:
    """What the network sees of ``FILM``."""
    size = FIT.frame_size(3, 64, 64)
    return Film(np.stack([scale(frame, size) for frame in frames(3, 64, 64)]))


def heard() -> Sound:
    """What the network hears of ``TONE``."""
    return Sound((np.round(tone(0.4)[:, 0] * 32768) / 32768).astype(np.float32))


class Omni:
    """A checkpoint with one task selected, as the published module does it: rows of the embedding
    overwritten.
    """

    def __init__(
        self, directory: Path, task: str, dtype: torch.dtype = torch.float64, attention: str = "eager"
    ) -> None:
        self.dtype = dtype
        self.config = json.loads((directory / "config.json").read_text())
        self.nano = "image_token_index" in self.config
        tensors = {name: t.to(dtype) for name, t in load_file(directory / "model.safetensors").items()}
        self.tensors = tensors
        self.task = task.replace("-", "_")
        text = self._under("language_model.")
        merge(text, directory / "adapters" / task)
        text = {name: tensor.to(dtype) for name, tensor in text.items()}
        rows = torch.tensor(self.config["special_token_ids"])
        text["embed_tokens.weight"][rows] = tensors[f"task_token_embeddings.{self.task}"]
        make_config, make = (EuroBertConfig, EuroBertModel) if self.nano else (Qwen3Config, Qwen3Model)
        fields = dict(self.config["text_config"])
        if not self.nano:
            fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        self.text: Any = make(make_config(**fields, attn_implementation=attention)).to(dtype).eval()
        self.text.load_state_dict(text, strict=True)
        vision = Qwen3VLVisionConfig(**self.config["vision_config"])
        self.vision: Any = Qwen3VLVisionModel(vision)
        self.vision.merger = torch.nn.Identity()
        self.vision.to(dtype).eval()
        self.vision.load_state_dict(self._under("vision_tower." if self.nano else "visual."), strict=True)
        self.audio: Any = Qwen2_5OmniAudioEncoder(
            Qwen2_5OmniAudioEncoderConfig(**self.config["audio_config"])
        )
        self.audio.proj = torch.nn.Identity()
        self.audio.to(dtype).eval()
        self.audio.load_state_dict(self._under("audio_tower."), strict=True)
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def _under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t.clone() for n, t in self.tensors.items() if n.startswith(prefix)}

    def vector(self, parts: Sequence[Part], prompt: str = "") -> np.ndarray:
        """The last state of a sequence, not normalised."""
        string, features = prompt, []
        for part in parts:
            for text, states in self._written(part):
                string += text
                if states is not None:
                    features.append(states)
        ids = torch.tensor(self.tokenizer.encode(string).ids)
        embedded = self.text.get_input_embeddings()(ids)
        pads = [self.config["audio_token_id"]]
        pads += [
            self.config[n]
            for n in ("image_token_index", "image_token_id", "video_token_id")
            if n in self.config
        ]
        if features:
            embedded[torch.isin(ids, torch.tensor(pads))] = torch.cat(features)
        with torch.inference_mode():
            return self.text(inputs_embeds=embedded[None]).last_hidden_state[0, -1].double().numpy()

    def _written(self, part: Part) -> list[tuple[str, torch.Tensor | None]]:
        if isinstance(part, str):
            return [(part, None)]
        if isinstance(part, Image):
            return [self._seen(np.stack([part.pixels, part.pixels]), "<|image_pad|>")]
        if isinstance(part, Sound):
            states = self.heard(part.samples)
            return [("<|audio_start|>" + "<|audio_pad|>" * len(states) + "<|audio_end|>", states)]
        written: list[tuple[str, torch.Tensor | None]] = []
        if part.sound is not None and len(part.sound.samples) > 320:  # one of 20 ms has no states
            written = self._written(part.sound)
        frames = part.frames
        count = len(frames)
        if count % 2:
            frames = np.concatenate([frames, frames[-1:]])
        if self.nano:
            return [*written, self._seen(frames, "<image>")]
        for first in range(0, len(frames), 2):
            time = (first / 24 + min(first + 1, count - 1) / 24) / 2
            text, states = self._seen(frames[first : first + 2], "<|video_pad|>")
            written.append((f"<{time:.1f} seconds>{text}", states))
        return written

    def _seen(self, frames: np.ndarray, pad: str) -> tuple[str, torch.Tensor]:
        states = self.seen(frames)
        if self.nano:
            return "<image>" * len(states), states
        return f"<|vision_start|>{pad * len(states)}<|vision_end|>", states

    def seen(self, frames: np.ndarray) -> torch.Tensor:
        """The states of frames, through the task's merger."""
        rows, grid = patches(frames)
        with torch.inference_mode():
            states = self.vision(rows.to(self.dtype), grid_thw=grid).last_hidden_state
        return self._merged(states)

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            found = f"mergers.{self.task}.{name}"
            return self.tensors[f"{found}.weight"], self.tensors[f"{found}.bias"]

        x = functional.layer_norm(x, x.shape[-1:], *of("norm"), eps=1e-6).view(-1, 4 * x.shape[-1])
        return functional.linear(functional.gelu(functional.linear(x, *of("linear_fc1"))), *of("linear_fc2"))

    def heard(self, samples: np.ndarray) -> torch.Tensor:
        """The states of a sound, through the task's projector."""
        spectra = torch.from_numpy(mel(samples)).to(self.dtype)
        with torch.inference_mode():
            states = self.audio(spectra, feature_lens=torch.tensor([spectra.shape[1]])).last_hidden_state
        name = f"audio_projectors.{self.task}"
        return functional.linear(states, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])


@cache
def omni(directory: Path, task: str, dtype: torch.dtype = torch.float64) -> Omni:
    """The reference of a checkpoint, made once."""
    return Omni(directory, task, dtype)


def mel(samples: np.ndarray) -> np.ndarray:
    """Whisper's spectra, in numpy."""
    extractor = WhisperFeatureExtractor(feature_size=128)
    found = extractor(samples, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
    return found["input_features"][0][:, : found["attention_mask"][0].sum()]


def patches(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of frames as the processor of transformers lays them out, and their grid."""
    values = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    values = (values - 0.5) / 0.5
    count, channels, height, width = values.shape
    t, h, w = count // 2, height // 16, width // 16
    values = values.view(t, 2, channels, h // 2, 2, 16, w // 2, 2, 16)
    rows = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * 2 * 256)
    return rows, torch.tensor([[t, h, w]])
