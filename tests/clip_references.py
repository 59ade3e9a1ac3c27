"""jina-clip written down slowly, in float64 and one input at a time, from the papers and dossiers.

Nothing here is shared with the code under test but the names of the tensors; the pixels are Pillow's.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.clip_checkpoints import V1
from tests.modeling.reference import Tensors, attend, jina_bert, linear, merged, norm, tensors_of, xlm_rotary

_BASES = {
    "jinaai/jina-bert-flash-implementation": {"layer_norm_eps": 1e-12},
    "jinaai/jina-embeddings-v3": {"layer_norm_eps": 1e-5, "rotary_emb_base": 20000.0},
}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def model_of(folder: Path) -> str:
    base = _json(folder / "config.json")["text_config"]["hf_model_name_or_path"]
    return V1 if "bert" in base else "jina-clip-v2"


_tensors_of = cache(tensors_of)


def text_states(folder: Path, ids: np.ndarray) -> torch.Tensor:
    """Hidden states (tokens, width) of the text tower."""
    text = _json(folder / "config.json")["text_config"]
    config = _BASES[text["hf_model_name_or_path"]] | text["hf_model_config_kwargs"]
    w = _tensors_of(folder, "text_model.transformer.")
    if model_of(folder) == V1:
        return jina_bert(_standard_names(w), config, ids)
    plain = merged({name.removeprefix("roberta."): t for name, t in w.items()}, config, "retrieval.query")
    return xlm_rotary(plain, config, ids)


def _standard_names(w: Tensors) -> dict[str, torch.Tensor]:
    """Rename the flash form to that of jina-embeddings-v2."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in w.items():
        name = name.replace("emb_ln", "embeddings.LayerNorm").replace("encoder.layers.", "encoder.layer.")
        name = name.replace("mixer.out_proj", "attention.output.dense")
        name = name.replace("norm1", "attention.output.LayerNorm").replace("norm2", "mlp.layernorm")
        if "Wqkv" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("mixer.Wqkv", f"attention.self.{part}")] = third
        else:
            renamed[name] = tensor
    return renamed


def token_ids(folder: Path, text: str) -> list[int]:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text)["input_ids"]


def text_vector(folder: Path, text: str, prompt: str = "") -> np.ndarray:
    """The vector (width,) of a text, not normed."""
    return text_states(folder, np.array(token_ids(folder, prompt + text), np.int32)).mean(0).numpy()


def pixels(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8 of the processors' mode ``shortest``."""
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size]


@cache
def image_vector(folder: Path, data: bytes) -> np.ndarray:
    """The vector (width,) of a file, not normed."""
    return vector_of(folder, Image.open(io.BytesIO(data)))


def vector_of(folder: Path, image: Image.Image) -> np.ndarray:
    """The vector (width,) of a picture, not normed."""
    settings = _json(folder / "preprocessor_config.json")
    seen = pixels(image, settings["size"]).astype(np.float64) / 255
    normed = (seen - np.array(settings["mean"])) / np.array(settings["std"])
    return vision(folder, torch.from_numpy(normed).permute(2, 0, 1)).numpy()


def vision(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """The vector of an image (3, side, side) float64 of normed values."""
    config = _json(folder / "config.json")["vision_config"]
    w = {n.removeprefix("vision_model."): t for n, t in _tensors_of(folder).items() if "vision_model." in n}
    width, patch, eps = config["width"], config["patch_size"], 1e-6
    heads = width // config["head_width"]
    grid = config["image_size"] // patch
    rows = torch.nn.functional.conv2d(
        x[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch
    )[0]
    tokens = torch.stack([rows[:, r, c] for r in range(grid) for c in range(grid)])
    h = torch.cat([w["cls_token"][0], tokens]) + w["pos_embed"][0]
    no_bias = torch.zeros(heads, 1, 1, dtype=torch.float64)
    for i in range(config["layers"]):
        name = f"blocks.{i}"
        y = norm(w, f"{name}.norm1", h, eps)
        query = y @ w[f"{name}.attn.q_proj.weight"].T + w[f"{name}.attn.q_bias"]
        key = y @ w[f"{name}.attn.k_proj.weight"].T
        value = y @ w[f"{name}.attn.v_proj.weight"].T + w[f"{name}.attn.v_bias"]
        query, key = (_turned(part, heads, grid, config) for part in (query, key))
        mixed = norm(w, f"{name}.attn.inner_attn_ln", attend(query, key, value, heads, no_bias), eps)
        h = h + linear(w, f"{name}.attn.proj", mixed)
        y = norm(w, f"{name}.norm2", h, eps)
        gate = linear(w, f"{name}.mlp.w1", y)
        inner = gate * torch.sigmoid(gate) * linear(w, f"{name}.mlp.w2", y)
        h = h + linear(w, f"{name}.mlp.w3", norm(w, f"{name}.mlp.ffn_ln", inner, eps))
    return norm(w, "norm", h, eps)[0]


def _turned(x: torch.Tensor, heads: int, grid: int, config: dict[str, Any]) -> torch.Tensor:
    """Turn neighbours (2j, 2j + 1) of each head: half of them by the patch's row, half by its column."""
    size = config["head_width"]
    half = size // 2
    stretch = config["pt_hw_seq_len"] / grid if config["intp_freq"] else 1.0
    angles = np.zeros((1 + grid * grid, half))
    for j in range(half):
        speed = 10000 ** (-2 * (j % (half // 2)) / half)
        for row in range(grid):
            for column in range(grid):
                place = row if j < half // 2 else column
                angles[1 + row * grid + column, j] = place * stretch * speed
    cos, sin = torch.from_numpy(np.cos(angles))[:, None], torch.from_numpy(np.sin(angles))[:, None]
    pairs = x.view(len(x), heads, half, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).view(x.shape)
