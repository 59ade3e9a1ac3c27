"""jina-embeddings-v5-omni in both sizes beside transformers' own classes in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.content import Film, Image, Input, Sound
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.families.jina_v5_omni import OmniConfig
from services.core.modeling.families.qwen_audio import audio_states, log_mel, mel_filters, mel_frames
from services.core.modeling.registry import load_network, recognised
from services.core.modeling.types import PrepareOptions, TooLongError, UnfitInputError
from tests.decoder_checkpoints import V5_TASKS
from tests.media.films import tone
from tests.modeling.support import cosine
from tests.omni_checkpoints import NANO, SMALL, omni_config, write_omni, write_text_of
from tests.omni_references import mel, omni

CATALOG = Catalog.load()
MODELS = (NANO, SMALL)


def entry(model: str, **changes: Any) -> ModelSpec:
    return replace(CATALOG.require(model), dimensions=32, context_length=4096, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("omni")
    for model in MODELS:
        write_omni(folder / model, model.rsplit("-", 1)[1])
    return folder


def load(folder: Path, model: str, dtype: torch.dtype = torch.float32) -> Encoder:
    network = load_network(entry(model), folder / model, device=torch.device("cpu"), dtype=dtype)
    assert isinstance(network, Encoder)
    return network


@pytest.fixture(scope="module")
def networks(folder: Path) -> dict[str, Encoder]:
    return {model: load(folder, model) for model in MODELS}


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(pixels, (width, height))


def sound(seconds: float = 0.3, hertz: float = 440.0) -> Sound:
    return Sound(tone(seconds, hertz=hertz)[:, 0])


def film(count: int = 3, heard: Sound | None = None) -> Film:
    return Film(np.stack([picture(64, 64, seed).pixels for seed in range(count)]), heard)


def vectors(network: Encoder, *inputs: Input, task: str = "retrieval.query") -> list[np.ndarray]:
    prepared = network.processor.prepare(inputs, PrepareOptions(task))
    return [np.asarray(each) for each in network.forward([each.item for each in prepared])]


INPUTS: dict[str, Input] = {
    "picture": picture(),
    "wide picture": picture(352, 32, 1),
    "sound": sound(),
    "long sound": sound(4.13, 700.0),
    "film": film(4),
    "film of one frame": film(1),
    "film of three frames with sound": film(3, sound(0.5)),
    "film whose sound is too short": film(2, sound(0.02)),
    "text, picture": ("a dog ", picture()),
    "picture, text": (picture(), " a dog"),
    "all": ("the ", "fox", picture(32, 32, 2), film(2, sound()), " over ", sound(0.1), picture(), "dog"),
    "film before picture": (film(2), picture()),
    "texts": ("the quick", " brown fox"),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_is_that_of_the_reference(folder: Path, networks: dict[str, Encoder], model: str) -> None:
    inputs = list(INPUTS.values())
    found = vectors(networks[model], *inputs)
    reference = omni(folder / model, "retrieval")
    for name, input, vector in zip(INPUTS, inputs, found, strict=True):
        parts = input if isinstance(input, tuple) else (input,)
        prompt = "Query: " if all(isinstance(part, str) for part in parts) else ""
        wanted = reference.vector(parts, prompt)
        np.testing.assert_allclose(vector, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
        assert np.abs(vector / np.linalg.norm(vector) - wanted / np.linalg.norm(wanted)).max() < 1e-5, name


@pytest.mark.parametrize("model", MODELS)
def test_tasks_keep_apart_in_one_batch(folder: Path, networks: dict[str, Encoder], model: str) -> None:
    network = networks[model]
    input = ("see ", picture(32, 32), sound(0.1))
    items = [
        network.processor.prepare([input], PrepareOptions(task))[0].item
        for task in ("retrieval.query", "text-matching", "clustering", "classification", "text-matching")
    ]
    found = [np.asarray(each) for each in network.forward(items)]
    for vector, item in zip(found, items, strict=True):
        assert item.adapter in V5_TASKS
        wanted = omni(folder / model, item.adapter).vector(input)
        np.testing.assert_allclose(vector, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.array_equal(found[1], found[4])
    assert max(cosine(found[0], each) for each in found[1:]) < 0.999


@pytest.mark.parametrize("model", MODELS)
def test_bf16_is_as_close_as_the_references_own(folder: Path, model: str) -> None:
    """Of media in bf16 transformers' classes come to 0.9997 of their float64, which is what bf16 leaves.

    Of texts too where the processor multiplies bf16; elsewhere only weights and states are rounded.
    """
    texts = ("hello world", "the quick brown fox", "the quick brown fox jumps over the lazy dog" * 3)
    for prompt, inputs in (
        ("", [input for name, input in INPUTS.items() if name != "texts"]),
        ("Query: ", texts),
    ):
        found = vectors(load(folder, model, torch.bfloat16), *inputs)
        exact, rounded = omni(folder / model, "retrieval"), omni(folder / model, "retrieval", torch.bfloat16)
        ours, theirs = [], []
        for vector, input in zip(found, inputs, strict=True):
            parts = input if isinstance(input, tuple) else (input,)
            wanted = exact.vector(parts, prompt)
            ours.append(1 - cosine(wanted, vector))
            theirs.append(1 - cosine(wanted, rounded.vector(parts, prompt)))
        assert max(ours) < 5e-4
        assert np.mean(ours) <= 1.25 * np.mean(theirs)


@pytest.mark.parametrize("model", MODELS)
def test_texts_are_those_of_the_text_model_to_the_bit(
    folder: Path, networks: dict[str, Encoder], model: str, tmp_path: Path
) -> None:
    target = write_text_of(folder / model, tmp_path / "text")
    text_entry = replace(CATALOG.require(model.replace("omni", "text")), dimensions=32, context_length=4096)
    other = load_network(text_entry, target, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(other, Encoder)
    texts = ("hello world", "the quick brown fox", "", "a " * 300)
    for task in ("retrieval.query", "retrieval.passage", "clustering"):
        for one, two in zip(
            vectors(networks[model], *texts, task=task), vectors(other, *texts, task=task), strict=True
        ):
            assert np.array_equal(one, two)


def test_order_matters_and_neighbouring_texts_are_one(networks: dict[str, Encoder]) -> None:
    for network in networks.values():
        one, two, split, joined = vectors(
            network,
            ("a dog", picture()),
            (picture(), "a dog"),
            (picture(), "hel", "lo wor", "ld"),
            (picture(), "hello world"),
        )
        assert cosine(one, two) < 0.999
        assert np.array_equal(split, joined)


def test_marks_that_a_caller_writes_are_words_of_the_task(folder: Path, networks: dict[str, Encoder]) -> None:
    for model, network in networks.items():
        mark = "<image>" if model == NANO else "<|vision_start|>"
        (found,) = vectors(network, f"a {mark} dog")
        reference = omni(folder / model, "retrieval")
        ids = torch.tensor(reference.tokenizer.encode(f"Query: a {mark} dog").ids)
        with torch.inference_mode():
            wanted = reference.text(input_ids=ids[None]).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("model", "name", "usage"),
    [
        # 96 x 64 are six states, 0.3 s are 30 spectra and seven states.
        (NANO, "picture", (1, 6, 0, 0)),
        (SMALL, "picture", (2, 6, 0, 0)),
        (NANO, "sound", (3, 0, 7, 0)),
        (NANO, "film", (1, 0, 0, 8)),
        (NANO, "film of three frames with sound", (3, 0, 12, 8)),
    ],
)
def test_tokens_are_counted_by_kind(
    networks: dict[str, Encoder], model: str, name: str, usage: tuple[int, ...]
) -> None:
    (prepared,) = networks[model].processor.prepare([INPUTS[name]], PrepareOptions())
    assert prepared.usage == usage
    assert sum(usage) == len(prepared.item.token_ids)
    assert prepared.patches > 0


def test_what_does_not_fit_is_refused(networks: dict[str, Encoder]) -> None:
    processor = networks[SMALL].processor
    with pytest.raises(TooLongError) as told:
        processor.prepare([("a", picture(320, 320))], PrepareOptions(limit=50))
    assert (told.value.tokens, told.value.limit) == (103, 50)
    with pytest.raises(TooLongError):
        processor.prepare([("a dog " * 500_000, picture())], PrepareOptions())
    with pytest.raises(UnfitInputError, match="20 ms or less"):
        processor.prepare([Sound(np.zeros(320, np.float32))], PrepareOptions())
    assert len(processor.prepare([Sound(np.zeros(321, np.float32))], PrepareOptions())) == 1
    with pytest.raises(ValueError, match="not scaled"):
        processor.prepare([picture(33, 32)], PrepareOptions())


@pytest.mark.parametrize("samples", [1, 159, 321, 4000, 16_000, 66_001, 479_900, 480_000, 500_000])
def test_spectra_are_those_of_whisper(samples: int) -> None:
    random = np.random.default_rng(samples)
    values = tone(samples / 16_000)[:, 0] + random.normal(0, 0.01, samples).astype(np.float32)
    values = values[:samples].astype(np.float32)
    wanted = mel(values)
    found = log_mel(values, 128)
    assert found.shape == wanted.shape == (128, mel_frames(samples))
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-4)


def test_silence_is_as_quiet_as_there_is() -> None:
    np.testing.assert_allclose(
        log_mel(np.zeros(1600, np.float32), 128).numpy(), mel(np.zeros(1600)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("frames", "states"), [(1, 0), (2, 0), (3, 1), (100, 25), (101, 25), (1100, 275), (3000, 750)]
)
def test_states_of_a_sound(frames: int, states: int) -> None:
    assert audio_states(frames) == states


def test_filters_are_those_of_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    wanted = WhisperFeatureExtractor(feature_size=128).mel_filters.T
    np.testing.assert_allclose(mel_filters(128).numpy(), wanted, atol=1e-7)


@pytest.mark.parametrize("size", ["nano", "small"])
def test_a_checkpoint_is_recognised_and_its_faults_are_told(size: str, tmp_path: Path) -> None:
    config = omni_config(size)
    assert recognised(write_omni(tmp_path / "whole", size)) == ["jina_v5_omni"]
    for changes, says in (
        ({"modality": "vision"}, "modality"),
        ({"special_token_ids": [10**6]}, "special_token_ids"),
        ({"vision_config": {**config["vision_config"], "deepstack_visual_indexes": [1]}}, "deepstack"),
        ({"vision_config": {**config["vision_config"], "num_position_embeddings": 35}}, "square"),
        ({"audio_config": {**config["audio_config"], "scale_embedding": True}}, "scale_embedding"),
    ):
        with pytest.raises(CheckpointError, match=says):
            OmniConfig.read({**config, **changes})
    directory = write_omni(tmp_path / "omni", size)
    tensors = load_file(directory / "model.safetensors")
    del tensors["mergers.clustering.linear_fc1.bias"]
    save_file(tensors, directory / "model.safetensors")
    model = f"jina-embeddings-v5-omni-{size}"
    with pytest.raises(CheckpointError, match=r"missing tensors: mergers\.clustering\.linear_fc1\.bias"):
        load_network(entry(model), directory, device=torch.device("cpu"), dtype=torch.float32)
