"""The towers of jina-clip-v1 and -v2 against float64, from tiny checkpoints in the published form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.core.media.pictures import Fit, fitted
from services.core.modeling.checkpoints.checkpoint import Checkpoint
from services.core.modeling.families.encoder_config import EncoderConfig
from services.core.modeling.families.eva import Eva, EvaConfig, eva_shapes
from services.core.modeling.families.jina_bert import flash_shapes, read_flash
from services.core.modeling.families.xlm_rotary import XlmRotary, xlm_rotary_shapes
from services.core.modeling.layers.lora import Adapters
from services.core.modeling.layers.packed import Limits, pack
from services.core.modeling.layers.pooling import mean
from services.core.modeling.layers.reading import Layers
from services.core.modeling.types import EncodeItem
from tests import clip_references as reference
from tests.clip_checkpoints import MEAN, STD, TASK, V1, V2, tokenizer_of, write_clip
from tests.media.pictures import noise, photograph
from tests.modeling.support import LENGTHS, cosine, random_ids

MODELS = (V1, V2)
CPU = torch.device("cpu")


def vision(folder: Path, dtype: torch.dtype = torch.float32) -> Eva:
    checkpoint = Checkpoint(folder)
    config = EvaConfig.read(checkpoint.config["vision_config"])
    names = {name for name in checkpoint.names if name.startswith("vision_model.")}
    assert eva_shapes(config, "vision_model.").keys() == names
    return Eva(Layers(checkpoint, CPU, dtype), config, "vision_model.", MEAN, STD)


def pixels(tower: Eva, *pictures: Image.Image) -> torch.Tensor:
    fit = Fit(tower.config.image, "shortest", "bicubic", 0)
    return torch.from_numpy(np.stack([np.asarray(fitted(each, fit)) for each in pictures]))


def photographs() -> list[Image.Image]:
    return [Image.open(io.BytesIO(photograph(name))) for name in ("china.jpg", "flower.jpg")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("width", "head"), [(32, 16), (48, 8), (64, 64)])
def test_pictures_are_those_of_float64(tmp_path: Path, model: str, width: int, head: int) -> None:
    tower = vision(write_clip(tmp_path, model, width=width, head_width=head))
    found = tower(pixels(tower, *photographs())).numpy()
    wanted = [reference.vector_of(tmp_path, each) for each in photographs()]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_gives_what_each_picture_gives_alone(tmp_path: Path, model: str) -> None:
    tower = vision(write_clip(tmp_path, model))
    batch = pixels(tower, *(noise(*size) for size in ((46, 46), (7, 9), (100, 700), (1, 1), (513, 512))))
    alone = torch.cat([tower(each[None]) for each in batch])
    np.testing.assert_allclose(tower(batch), alone, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near(tmp_path: Path, model: str) -> None:
    tower = vision(write_clip(tmp_path, model, width=64), torch.bfloat16)
    (found, _) = tower(pixels(tower, *photographs())).numpy()
    assert cosine(found, reference.vector_of(tmp_path, photographs()[0])) > 0.9995


@pytest.mark.parametrize("model", MODELS)
def test_text_is_that_of_float64(tmp_path: Path, model: str) -> None:
    write_clip(tmp_path, model)
    checkpoint = Checkpoint(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["text_config"]["hf_model_config_kwargs"]
    rest = {"max_position_embeddings": 8192, "type_vocab_size": 2 if model == V1 else 1}
    fields = {**rest, "layer_norm_eps": 1e-12 if model == V1 else 1e-5, **own}
    config = EncoderConfig.read(fields)
    layers = Layers(checkpoint, CPU, torch.float32, config.epsilon)
    if model == V1:
        checkpoint.strip_prefix("text_model.transformer.")
        assert flash_shapes(config).keys() <= checkpoint.names
        network = read_flash(layers, config)
    else:
        checkpoint.strip_prefix("text_model.transformer.roberta.")
        adapters = Adapters((TASK,), rank=4, scale=1.0, merged=TASK)
        assert xlm_rotary_shapes(config, adapters).keys() <= checkpoint.names
        network = XlmRotary(layers, config, adapters, 20000.0)
    limits = Limits(config.vocabulary, config.positions)
    for length in LENGTHS:
        ids = random_ids(length, tokenizer_of(model).get_vocab_size())
        batch = pack([EncodeItem(ids)], CPU, limits)
        with torch.inference_mode():
            found = mean(network(batch), batch)[0].numpy()
        np.testing.assert_allclose(found, reference.text_states(tmp_path, ids).mean(0), atol=1e-5)


@pytest.mark.parametrize("size", [(640, 427), (100, 700), (7, 9), (513, 512), (367, 267), (1920, 1081)])
@pytest.mark.parametrize("side", [46, 224])
def test_any_size_becomes_the_very_pixels_of_the_reference(size: tuple[int, int], side: int) -> None:
    picture = noise(*size)
    made = np.asarray(fitted(picture, Fit(side, "shortest", "bicubic", 0)))
    assert np.array_equal(made, reference.pixels(picture, side))
