"""jina-embeddings-v4 and jina-reranker-m0 by transformers' own classes, in float64."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import interpolate, normalize
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tests.vision_checkpoints import V4

_NOT_OF_THE_NETWORK = ("architectures", "auto_map", "model_type", "torch_dtype", "task_names")
_TEMPLATE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def stock(directory: Path, model: str, task: str | None = None) -> Any:
    """Load the backbone, with the adapter of ``task`` in its weights."""
    return _stock(directory, model, task)[0]


@cache
def _stock(directory: Path, model: str, task: str | None) -> tuple[Any, dict[str, torch.Tensor]]:
    config = json.loads((directory / "config.json").read_text())
    fields = {name: value for name, value in config.items() if name not in _NOT_OF_THE_NETWORK}
    make_config, make = (Qwen2_5_VLConfig, Qwen2_5_VLModel) if model == V4 else (Qwen2VLConfig, Qwen2VLModel)
    made = make_config(**fields, attn_implementation="eager")
    for part in (made, made.text_config, made.vision_config):
        part._attn_implementation = "eager"
    network = make(made).double().eval()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.startswith("lm_head."):
            continue
        name = re.sub(r"^model\.(language_model|visual)\.", r"\1.", name)
        tensors[re.sub(r"^model\.", "language_model.", name)] = tensor.double()
    if task is not None:
        _merge(tensors, directory / "adapters", task)
    own = network.state_dict().keys()
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own}, strict=True)
    return network, {name: tensor for name, tensor in tensors.items() if name not in own}


def _merge(tensors: dict[str, torch.Tensor], adapters: Path, task: str) -> None:
    config = json.loads((adapters / "adapter_config.json").read_text())
    stored = load_file(adapters / "adapter_model.safetensors")
    for name, down in stored.items():
        match = re.fullmatch(r"base_model\.model\.(?:model\.)?(.+)\.lora_A(?:\.default)?\.(.+)\.weight", name)
        if match is not None and match[2] == task:
            up = stored[name.replace("lora_A", "lora_B")]
            change = config["lora_alpha"] / config["r"] * up.double() @ down.double()
            tensors[f"{match[1]}.weight"] += change


def pixels(picture: Pillow.Image, least: int, most: int) -> tuple[torch.Tensor, list[int]]:
    """Return the rows and the grid of a picture: torch's filter, then transformers' processor."""
    planes = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    size = smart_resize(picture.height, picture.width, 28, least, most)
    if size != (picture.height, picture.width):
        planes = interpolate(planes, size=size, mode="bicubic", antialias=True)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    made = processor(Pillow.fromarray(planes[0].permute(1, 2, 0).numpy()), return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


def states(
    directory: Path,
    model: str,
    text: str,
    pictures: list[Pillow.Image],
    *,
    task: str | None = None,
    limits: tuple[int, int],
    added: tuple[int, ...] = (),
) -> tuple[torch.Tensor, list[int]]:
    """Return the last states of ``text``, in which each pad becomes a picture, and the ids."""
    network = stock(directory, model, task)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    pad = tokenizer.token_to_id("<|image_pad|>")
    found = [pixels(picture, *limits) for picture in pictures]
    grids = iter(grid for _, grid in found)
    ids: list[int] = []
    for id in [*tokenizer.encode(text).ids, *added]:
        if id != pad:
            ids.append(id)
        else:
            _, rows, columns = next(grids)
            ids += [pad] * (rows * columns // 4)
    given: dict[str, Any] = {}
    if pictures:
        given = {
            "pixel_values": torch.cat([rows for rows, _ in found]).double(),
            "image_grid_thw": torch.tensor([grid for _, grid in found]),
            "mm_token_type_ids": (torch.tensor([ids]) == pad).int(),
        }
    with torch.inference_mode():
        made = network(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **given)
    return made.last_hidden_state[0], ids


def embedding(
    directory: Path,
    what: str | Pillow.Image,
    *,
    task: str | None,
    limits: tuple[int, int],
    prompt: str = "Query: ",
    multivector: bool = False,
) -> np.ndarray:
    """Return v4's vector of a text or a picture, or one of each of its tokens; of length 1."""
    is_text = isinstance(what, str)
    text, pictures = (prompt + what, []) if is_text else (_TEMPLATE, [what])
    hidden, ids = states(directory, V4, text, pictures, task=task, limits=limits)
    if multivector:
        left = _stock(directory, V4, task)[1]
        weight, bias = left["multi_vector_projector.weight"], left["multi_vector_projector.bias"]
        return normalize(hidden @ weight.T + bias, dim=1).numpy()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if not is_text:
        first, last = (ids.index(tokenizer.token_to_id(f"<|vision_{end}|>")) for end in ("start", "end"))
        hidden = hidden[first : last + 1]
    return normalize(hidden.mean(0), dim=0).numpy()


def score(
    directory: Path, query: str | Pillow.Image, document: str | Pillow.Image, *, limits: tuple[int, int]
) -> float:
    """Return m0's score of a document."""
    sides = [each if isinstance(each, str) else PICTURE for each in (document, query)]
    pictures = [each for each in (document, query) if not isinstance(each, str)]
    text = f"**Document**:\n{sides[0]}\n**Query**:\n{sides[1]}"
    hidden, _ = states(directory, "m0", text, pictures, limits=limits, added=(100,))
    left = _stock(directory, "m0", None)[1]
    inner = (left["score.0.weight"] @ hidden[-1] + left["score.0.bias"]).relu()
    logit = left["score.2.weight"] @ inner + left["score.2.bias"]
    return float(torch.sigmoid(logit - 2.65))
