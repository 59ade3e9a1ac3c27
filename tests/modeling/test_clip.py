"""jina-clip-v1 and -v2: both towers against float64, their published form, their pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from services.core.catalog import Catalog
from services.core.catalog.types import Modality
from services.core.content import Image
from services.core.media.pictures import Fit, fitted
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.clip import Clip, ClipConfig, tile_tokens
from services.core.modeling.native.encoder import FusedPostNorm
from services.core.modeling.native.instructions import InstructionSet
from services.core.modeling.registry import load_network, recognised
from services.core.modeling.types import EncodeItem, PrepareOptions, UnfitInputError
from tests import clip_references as reference
from tests.checkpoints import spec
from tests.clip_checkpoints import TASK, V1, V2, preprocessor_config, text_config, tokenizer_of, write_clip
from tests.media.pictures import noise, photograph
from tests.modeling.support import LENGTHS, cosine, random_ids
from tests.text_checkpoints import INSTRUCTIONS

MODELS = (V1, V2)
CATALOG = Catalog.load()
TEXTS = ["hello world", "the quick brown fox", "", "a dog"]
SIZES = [(46, 46), (32, 32), (7, 9), (100, 700), (1000, 333), (1, 1), (513, 512)]


def load(directory: Path, model: str, dtype: torch.dtype = torch.float32, width: int = 32) -> Clip:
    entry = spec(
        family="jina_clip",
        modalities=(Modality.TEXT, Modality.IMAGE),
        dimensions=width,
        context_length=8192,
        tasks=(TASK,) if model == V2 else (),
        prompts={TASK: INSTRUCTIONS[TASK]} if model == V2 else {},
        images=CATALOG.require(model).images,
    )
    network = load_network(entry, directory, device=torch.device("cpu"), dtype=dtype)
    assert isinstance(network, Clip)
    return network


def fit(clip: Clip, picture: Pillow.Image) -> Image:
    side, mode, filter, fill = (getattr(clip.processor.fit, name) for name in Fit._fields)
    made = fitted(picture.convert("RGB"), Fit(side, mode, filter, fill))
    return Image(np.array(made), picture.size)


def vectors(clip: Clip, *inputs: str | Pillow.Image, task: str | None = None) -> list[np.ndarray]:
    ready = [each if isinstance(each, str) else fit(clip, each) for each in inputs]
    prepared = clip.processor.prepare(ready, PrepareOptions(task))
    return [np.asarray(vector) for vector in clip.forward([each.item for each in prepared])]


@pytest.mark.parametrize("model", MODELS)
def test_text_is_that_of_float64(tmp_path: Path, model: str, backend: InstructionSet) -> None:
    write_clip(tmp_path, model)
    clip = load(tmp_path, model)
    assert isinstance(clip._text._backbone, FusedPostNorm) == (backend != InstructionSet.TORCH)
    for length in LENGTHS:
        ids = random_ids(length, tokenizer_of(model).get_vocab_size())
        (vector,) = clip.forward([EncodeItem(ids)])
        np.testing.assert_allclose(vector, reference.text_states(tmp_path, ids).mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("width", "head"), [(32, 16), (48, 8), (64, 64)])
def test_pictures_are_those_of_float64(tmp_path: Path, model: str, width: int, head: int) -> None:
    write_clip(tmp_path, model, width=width, head_width=head)
    clip = load(tmp_path, model, width=width)
    for name in ("china.jpg", "flower.jpg"):
        picture = Pillow.open(io.BytesIO(photograph(name)))
        (vector,) = vectors(clip, picture)
        np.testing.assert_allclose(vector, reference.vector_of(tmp_path, picture), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_gives_what_each_gives_alone(tmp_path: Path, model: str) -> None:
    write_clip(tmp_path, model)
    clip = load(tmp_path, model)
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    mixed = [each for pair in zip(pictures, TEXTS * 2, strict=False) for each in pair]
    together = vectors(clip, *mixed)
    for one, vector in zip(mixed, together, strict=True):
        np.testing.assert_allclose(vector, vectors(clip, one)[0], atol=1e-6)
        wanted = reference.text_vector if isinstance(one, str) else reference.vector_of
        np.testing.assert_allclose(vector, wanted(tmp_path, one), atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near(tmp_path: Path, model: str) -> None:
    write_clip(tmp_path, model, width=64)
    clip = load(tmp_path, model, torch.bfloat16, width=64)
    picture = Pillow.open(io.BytesIO(photograph()))
    of_picture, of_text = vectors(clip, picture, TEXTS[1])
    assert cosine(of_picture, reference.vector_of(tmp_path, picture)) > 0.9995
    assert cosine(of_text, reference.text_vector(tmp_path, TEXTS[1])) > 0.9995


def test_the_query_task_writes_its_prompt_before_texts_only(tmp_path: Path) -> None:
    write_clip(tmp_path, V2)
    clip = load(tmp_path, V2)
    picture = noise(60, 50)
    query, plain = vectors(clip, TEXTS[1], picture, task=TASK), vectors(clip, TEXTS[1], picture)
    wanted = reference.text_vector(tmp_path, TEXTS[1], INSTRUCTIONS[TASK])
    np.testing.assert_allclose(query[0], wanted, atol=1e-5)
    np.testing.assert_array_equal(query[1], plain[1])
    assert cosine(query[0], plain[0]) < 0.999


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [224, 512])
def test_photographs_become_the_very_pixels_of_the_reference(name: str, size: int) -> None:
    picture = Pillow.open(io.BytesIO(photograph(name)))
    for image in (picture, picture.rotate(90, expand=True), picture.crop((0, 0, 333, 427))):
        made = np.asarray(fitted(image, Fit(size, "shortest", "bicubic", 0)))
        assert np.array_equal(made, reference.pixels(image, size))


@pytest.mark.parametrize("size", [*SIZES, (367, 267), (1920, 1081)])
def test_any_size_becomes_the_very_pixels_of_the_reference(size: tuple[int, int]) -> None:
    picture = noise(*size)
    made = np.asarray(fitted(picture, Fit(46, "shortest", "bicubic", 0)))
    assert np.array_equal(made, reference.pixels(picture, 46))


def test_the_other_modes_scale_all_of_the_picture() -> None:
    picture = Pillow.new("RGB", (40, 20), (200, 100, 50))
    whole = np.asarray(fitted(picture, Fit(16, "squash", "bilinear", 0)))
    assert (whole == (200, 100, 50)).all()
    padded = np.asarray(fitted(picture, Fit(16, "longest", "bicubic", 7)))
    assert (padded[4:12] == (200, 100, 50)).all()
    assert (padded[:4] == 7).all()
    assert (padded[12:] == 7).all()


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        (V1, (367, 267), 4000),
        (V1, (224, 224), 1000),
        (V1, (225, 1), 2000),
        (V2, (333, 333), 4000),
        (V2, (513, 512), 8000),
        (V2, (1, 1), 4000),
    ],
)
def test_a_picture_is_billed_by_the_tiles_of_its_own_size(
    model: str, size: tuple[int, int], tokens: int
) -> None:
    assert tile_tokens(CATALOG.require(model).images, size) == tokens


def test_usage_and_cost_tell_text_from_pictures(tmp_path: Path) -> None:
    write_clip(tmp_path, V2)
    clip = load(tmp_path, V2)
    text, picture = clip.processor.prepare(["hello world", fit(clip, noise(600, 40))], PrepareOptions())
    assert text.usage.image == picture.usage.text == 0
    assert (text.usage.text, len(text.item.token_ids), text.patches) == (4, 4, 0)
    assert (picture.usage.image, len(picture.item.token_ids), picture.patches) == (8000, 0, 37)
    assert clip.processor.expected(Modality.IMAGE) == 37


def test_what_a_clip_does_not_take_is_refused_in_words(tmp_path: Path) -> None:
    write_clip(tmp_path, V1)
    processor = load(tmp_path, V1).processor
    with pytest.raises(UnfitInputError, match="takes no groups"):
        processor.prepare([("hello", "world")], PrepareOptions())
    with pytest.raises(UnfitInputError, match="text and images, not 'audio'"):
        processor.expected(Modality.AUDIO)


PUBLISHED = {V1: (222_647_041, 4), V2: (865_278_477, 2)}


def published_config(model: str) -> dict[str, Any]:
    """The configuration of the released checkpoint, as far as it fixes the network."""
    text = text_config(model, tokenizer_of(model))
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ):
        del text["hf_model_config_kwargs"][name]
    vision = {"head_width": 64, "mlp_ratio": 2.6667, "intp_freq": model == V2}
    vision |= (
        {"width": 768, "layers": 12, "image_size": 224, "patch_size": 16, "pt_hw_seq_len": 14}
        if model == V1
        else {"width": 1024, "layers": 24, "image_size": 512, "patch_size": 14, "pt_hw_seq_len": 16}
    )
    return {"model_type": "jina_clip", "text_config": text, "vision_config": vision}


@pytest.mark.parametrize("model", MODELS)
def test_the_published_size_has_the_published_number_of_parameters(model: str) -> None:
    shapes = ClipConfig.read(published_config(model)).shapes()
    assert sum(map(prod, shapes.values())) == PUBLISHED[model][0] == CATALOG.require(model).parameters


def test_names_and_shapes_of_v2_make_a_file_of_the_published_length() -> None:
    config = ClipConfig.read(published_config(V2))
    text = config.tower.shapes(config.text, config.text_fields)
    names = {(config.tower.prefix + name if name in text else name): s for name, s in config.shapes().items()}
    assert len(names) == 999
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names):
        start, end = end, end + 2 * prod(names[name])
        head[name] = {"dtype": "F16", "shape": list(names[name]), "data_offsets": [start, end]}
    length = len(json.dumps(head, separators=(",", ":")))
    assert 8 + -(-length // 8) * 8 + end == 1_730_688_642


@pytest.mark.parametrize("model", MODELS)
def test_tables_of_angles_in_the_file_are_passed_over(tmp_path: Path, model: str) -> None:
    write_clip(tmp_path, model, rope_tables=True)
    (vector,) = vectors(load(tmp_path, model), TEXTS[0])
    np.testing.assert_allclose(vector, reference.text_vector(tmp_path, TEXTS[0]), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_family_is_recognised(tmp_path: Path, model: str) -> None:
    write_clip(tmp_path, model)
    assert recognised(tmp_path) == ["jina_clip"]


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(add_projections=True), "'add_projections' is True"),
        (lambda c: c["text_config"].update(hf_model_name_or_path="someone/else"), "no text tower"),
        (lambda c: c["text_config"].update(pooler_type="cls_pooler"), "'pooler_type'"),
        (lambda c: c["text_config"].update(default_lora_task=None), "'default_lora_task'"),
        (lambda c: c["vision_config"].update(subln=False), "'subln' is False"),
        (lambda c: c["vision_config"].update(layers=3), "missing tensors"),
        (lambda c: c["vision_config"].update(layers=1), "does not know"),
        (lambda c: c["vision_config"].update(image_size=64), "the network sees 64"),
        (lambda c: c["vision_config"].update(head_width=10), "does not make heads of 10"),
    ],
)
def test_what_is_not_served_is_refused_at_load(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    write_clip(tmp_path, V2)
    changed(tmp_path / "config.json", change)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path, V2)


def test_pictures_scaled_in_an_unknown_way_are_refused_at_load(tmp_path: Path) -> None:
    write_clip(tmp_path, V1)
    path = tmp_path / "preprocessor_config.json"
    for change in ({"resize_mode": "stretch"}, {"interpolation": "magic"}, {"size": 0}):
        path.write_text(json.dumps(preprocessor_config(32) | change))
        with pytest.raises(CheckpointError, match="not served"):
            load(tmp_path, V1)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path, V1)
