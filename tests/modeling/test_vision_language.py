"""jina-embeddings-v4 and jina-reranker-m0 against transformers in float64, on tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from services.core.catalog import Catalog
from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Image, Input, Scaling
from services.core.media.scaling import scale
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.decoder import decoder_shapes, linear_sizes
from services.core.modeling.families.jina_v4 import v4_shapes
from services.core.modeling.families.qwen_vision import Layout, patch_rows, vision_shapes
from services.core.modeling.families.qwen_vl import VisionLanguageConfig, three_axes
from services.core.modeling.families.reranker_m0 import m0_shapes
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, Feature, PrepareOptions, UnfitInputError
from tests import vision_references as reference
from tests.media.pictures import noise
from tests.modeling.support import cosine
from tests.vision_checkpoints import (
    M0,
    MAX_PIXELS,
    V4,
    m0_config,
    v4_config,
    vision_tokenizer,
    write_m0,
    write_v4,
)

CATALOG = Catalog.load()
CPU = torch.device("cpu")
V4_LIMITS, M0_LIMITS = (3136, MAX_PIXELS), (3136, 602_112)
SIZES = [(56, 56), (100, 77), (300, 40), (33, 190), (260, 230), (29, 29)]
TEXTS = ["hello world", "", "the quick brown fox", "a <|vision_start|><|image_pad|><|vision_end|> b"]


def entry(model: str, **changes: Any) -> ModelSpec:
    return replace(CATALOG.require(model), **changes)


def load(directory: Path, model: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    own = {"dimensions": 32} if model == V4 else {}
    return load_network(entry(model, **own, **changes), directory, device=CPU, dtype=dtype)


@pytest.fixture(scope="module")
def v4_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v4(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def m0_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_m0(tmp_path_factory.mktemp("m0"))


@cache
def pictures() -> list[Pillow.Image]:
    return [noise(*size, seed) for seed, size in enumerate(SIZES)]


def opened(picture: Pillow.Image, scaling: Scaling) -> Image:
    return Image(scale(np.array(picture), scaling.size(*picture.size)), picture.size)


def inputs(model: Any, *given: str | Pillow.Image) -> list[Input]:
    return [each if isinstance(each, str) else opened(each, model.processor.fit) for each in given]


def vectors(model: Any, *given: str | Pillow.Image, **options: Any) -> list[np.ndarray]:
    prepared = model.processor.prepare(inputs(model, *given), PrepareOptions(**options))
    found = [np.asarray(each) for each in model.forward([each.item for each in prepared])]
    return [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in found]


def scores(model: Any, query: str | Pillow.Image, *documents: str | Pillow.Image) -> list[float]:
    asked = model.processor.query(inputs(model, query)[0])
    pairs = model.processor.pairs(asked, inputs(model, *documents), 0)
    return model.forward([pair.windows[0].item for pair in pairs])


@pytest.mark.parametrize("task", ["text-matching", "retrieval.passage", "code.query"])
def test_vectors_are_those_of_transformers_in_a_mixed_batch(v4_directory: Path, task: str) -> None:
    model = load(v4_directory, V4)
    given = [*TEXTS, *pictures()]
    prompt, adapter = CATALOG.require(V4).prompt(task), CATALOG.require(V4).adapter(task)
    for multivector in (False, True):
        found = vectors(model, *given, task=task, multivector=multivector)
        for one, vector in zip(given, found, strict=True):
            if one == TEXTS[3]:
                continue  # the reference takes what a caller wrote for a picture
            wanted = reference.embedding(
                v4_directory, one, task=adapter, limits=V4_LIMITS, prompt=prompt, multivector=multivector
            )
            np.testing.assert_allclose(vector, wanted, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_every_set_of_instructions_gives_the_same(v4_directory: Path, m0_directory: Path) -> None:
    model, given = load(v4_directory, V4), [TEXTS[2], pictures()[1], pictures()[2]]
    for one, vector in zip(given, vectors(model, *given), strict=True):
        wanted = reference.embedding(v4_directory, one, task="text-matching", limits=V4_LIMITS)
        np.testing.assert_allclose(vector, wanted, atol=1e-5)
    expected = [reference.score(m0_directory, "quick fox", each, limits=M0_LIMITS) for each in given]
    np.testing.assert_allclose(scores(load(m0_directory, M0), "quick fox", *given), expected, atol=2e-5)


def test_what_shares_the_batch_changes_nothing(v4_directory: Path) -> None:
    model = load(v4_directory, V4)
    given = [*pictures(), *TEXTS]
    items: list[EncodeItem] = []
    for i, each in enumerate(inputs(model, *given)):
        task = ("text-matching", "retrieval.query", "code.passage")[i % 3]
        (one,) = model.processor.prepare([each], PrepareOptions(task, multivector=i % 2 == 1))
        items.append(one.item)
    for item, vector in zip(items, model.forward(items), strict=True):
        np.testing.assert_allclose(vector, model.forward([item])[0], atol=2e-6)


def test_a_text_is_bit_for_bit_the_same_beside_pictures(v4_directory: Path, m0_directory: Path) -> None:
    model = load(v4_directory, V4)
    alone, beside = vectors(model, TEXTS[0]), vectors(model, TEXTS[0], *pictures())
    np.testing.assert_array_equal(alone[0], beside[0])
    ranker = load(m0_directory, M0)
    assert scores(ranker, "fox", *TEXTS) == scores(ranker, "fox", *TEXTS, *pictures())[: len(TEXTS)]


def test_chunks_are_means_of_one_text(v4_directory: Path) -> None:
    model = load(v4_directory, V4)
    (prepared,) = model.processor.prepare(["hello world the quick brown fox"], PrepareOptions())
    spans = ((0, 3), (3, len(prepared.item.token_ids)))
    (found,) = model.forward([prepared.item._replace(spans=spans)])
    adapter = CATALOG.require(V4).adapter(None)
    hidden, _ = reference.states(
        v4_directory, V4, "Query: hello world the quick brown fox", [], task=adapter, limits=V4_LIMITS
    )
    wanted = np.stack([hidden[start:end].mean(0).numpy() for start, end in spans])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_scores_are_those_of_transformers(m0_directory: Path) -> None:
    model = load(m0_directory, M0)
    documents = [*TEXTS[:3], *pictures()]
    for query in ("quick fox", pictures()[3]):
        found = scores(model, query, *documents)
        wanted = [reference.score(m0_directory, query, each, limits=M0_LIMITS) for each in documents]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        assert max(wanted) - min(wanted) > 1e-3


def test_the_newer_layouts_of_keys_are_read(tmp_path: Path, v4_directory: Path, m0_directory: Path) -> None:
    newer = write_v4(tmp_path / "v4", newer=True, slot=".default")
    config = v4_config()
    names = [name for name in config if name not in ("vision_config", "architectures", "task_names")]
    nested = {"text_config": {name: config[name] for name in names}, **config}
    (newer / "config.json").write_text(json.dumps(nested))
    given = [TEXTS[0], pictures()[1]]
    for one, other in zip(
        vectors(load(newer, V4), *given), vectors(load(v4_directory, V4), *given), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    other_m0 = load(write_m0(tmp_path / "m0", newer=True), M0)
    assert scores(other_m0, *given) == scores(load(m0_directory, M0), *given)


@pytest.mark.parametrize("model", [V4, M0])
def test_bf16_stays_near(v4_directory: Path, m0_directory: Path, model: str) -> None:
    if model == V4:
        network = load(v4_directory, V4, torch.bfloat16)
        for one, vector in zip(
            [TEXTS[2], pictures()[4]], vectors(network, TEXTS[2], pictures()[4]), strict=True
        ):
            wanted = reference.embedding(v4_directory, one, task="text-matching", limits=V4_LIMITS)
            assert cosine(vector, wanted) > 0.9995
    else:
        network = load(m0_directory, M0, torch.bfloat16)
        found = scores(network, "quick fox", *pictures())
        wanted = [reference.score(m0_directory, "quick fox", each, limits=M0_LIMITS) for each in pictures()]
        # Where the processor multiplies bf16 single scores are further off than elsewhere, their mean is not.
        np.testing.assert_allclose(found, wanted, atol=1e-2)
        assert np.abs(np.subtract(found, wanted)).mean() < 2e-3


@pytest.mark.parametrize("model", [V4, M0])
def test_the_tower_is_read_only_where_images_are_offered(
    v4_directory: Path, m0_directory: Path, model: str
) -> None:
    directory = v4_directory if model == V4 else m0_directory
    network = load(directory, model, modalities=(Modality.TEXT,))
    assert network.processor.fit is None
    picture = Image(np.zeros((56, 56, 3), np.uint8), (56, 56))
    with pytest.raises(UnfitInputError):
        if model == V4:
            network.processor.prepare([picture], PrepareOptions())
        else:
            network.processor.query(picture)


def test_patches_and_places_are_those_of_the_published_processor() -> None:
    for picture in pictures():
        scaling = Scaling(28, *V4_LIMITS)
        made = opened(picture, scaling).pixels
        wanted, grid = reference.pixels(picture, *V4_LIMITS)
        rows = patch_rows(made, 14, 2)
        assert (1, made.shape[0] // 14, made.shape[1] // 14) == tuple(grid)
        mean, std = (torch.tensor(each).view(3, 1) * 255.0 for each in (reference_mean(), reference_std()))
        normed = (rows.float().view(len(rows), 3, -1) - mean) / std
        twice = normed.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)
        np.testing.assert_allclose(twice, wanted, atol=2e-6)


def reference_mean() -> list[float]:
    return [0.48145466, 0.4578275, 0.40821073]


def reference_std() -> list[float]:
    return [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("grids", [[(1, 2, 2)], [(1, 8, 8)], [(1, 10, 6), (1, 18, 4), (1, 2, 30)]])
def test_positions_are_those_of_transformers(v4_directory: Path, grids: list[tuple[int, int, int]]) -> None:
    network = reference.stock(v4_directory, V4)
    pad = vision_tokenizer().token_to_id("<|image_pad|>")
    features, ids = [], [5, 6]
    for grid in grids:
        features.append(Feature(Modality.IMAGE, torch.empty(0), len(ids), prod(grid) // 4, grid))
        ids += [pad] * (prod(grid) // 4) + [7] * 3
    kinds = (torch.tensor([ids]) == pad).int()
    wanted, _ = network.get_rope_index(
        torch.tensor([ids]), kinds, image_grid_thw=torch.tensor(grids), attention_mask=torch.ones(1, len(ids))
    )
    np.testing.assert_array_equal(three_axes(len(ids), features, 2), wanted[:, 0])


def test_every_window_holds_what_lies_in_it() -> None:
    grids = [(1, 10, 26), (2, 4, 4), (1, 16, 2)]
    layout = Layout.of(grids, merge=2, window=4)
    ends = np.cumsum(layout.windows)
    for start, end in zip(ends - layout.windows, ends, strict=True):
        inside = layout.places[start:end] // 8
        assert (inside == inside[0]).all()
    assert sorted(layout.order.tolist()) == list(range(sum(map(prod, grids)) // 4))
    assert layout.wholes.tolist() == [260, 16, 16, 32]


def test_a_document_is_cut_before_the_pair(m0_directory: Path) -> None:
    model = load(m0_directory, M0)
    long = "quick brown fox " * 8000
    asked = model.processor.query("lazy dog")
    first, second = model.processor.pairs(asked, [long, "fox"], 0)
    assert (first.truncated, second.truncated) == (True, False)
    assert first.usage.total == 9728
    tail = model.processor._tokenizer.encode_batch(["\n**Query**:\nlazy dog"])[0].ids
    np.testing.assert_array_equal(first.windows[0].item.token_ids[-1 - len(tail) : -1], tail)
    # A query may take nearly all: then the document gives way.
    asked = model.processor.query(long)
    (pair,) = model.processor.pairs(asked, [long], 0)
    assert asked.usage.total == 9728
    assert pair.truncated
    assert len(pair.windows[0].item.token_ids) <= 10240
    assert 400 < pair.usage.total < 512
    (pair,) = model.processor.pairs(asked, inputs(model, noise(900, 700)), 0)
    assert len(pair.windows[0].item.token_ids) <= 10240


def test_parameters_of_the_published_sizes() -> None:
    wide = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "vocab_size": 151936}
    turning = {"rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}}
    v4 = VisionLanguageConfig.read(
        v4_config(
            intermediate_size=11008,
            multi_vector_projector_dim=128,
            vision={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "window_size": 112,
            },
            **wide,
            **turning,
        ),
        newer=True,
    )
    assert (v4.vision.window, v4.vision.whole) == (4, {7, 15, 23, 31})
    adapters = sum(32 * sum(size) for size in [*linear_sizes(v4.text).values(), (128, 2048)])
    assert _count(v4, v4_shapes(v4, 128)) + 3 * adapters == 3_934_695_552
    m0 = VisionLanguageConfig.read(
        m0_config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            vocab_size=151936,
            vision={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
            **turning,
        ),
        newer=False,
    )
    assert _count(m0, {}) == 2_208_985_600
    assert _count(m0, m0_shapes(m0)) + 1536 * 151936 == 2_444_721_665


def _count(config: VisionLanguageConfig, extra: dict[str, Sequence[int]]) -> int:
    shapes = {**decoder_shapes(config.text), **vision_shapes(config.vision, "visual."), **extra}
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 1, 1]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope_section"),
        ({"single_vector_pool_strategy": "last"}, "single_vector_pool_strategy"),
        ({"vision": {"out_hidden_size": 30}}, "states of 30"),
        ({"vision": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"vision": {"fullatt_block_indexes": [9]}}, "fullatt_block_indexes"),
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, v4_directory: Path, change: dict[str, Any], says: str
) -> None:
    for file in v4_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(v4_config(**change)))
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path, V4)


def test_parts_that_are_missing_are_named(tmp_path: Path, v4_directory: Path) -> None:
    for file in v4_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load(tmp_path, V4)
    with pytest.raises(CheckpointError, match="no adapters"):
        load(v4_directory, V4, adapters={"text-matching": "elsewhere"})
