"""jina-vlm against float64: how pictures are cut, what the tower makes of them, logits, answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from services.core.content import Image
from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.families.jina_vlm import JinaVlm
from services.core.modeling.families.tiling import Tiling
from services.core.modeling.layers.causal import BLOCK, Chunk, TorchCausal
from services.core.modeling.native.instructions import InstructionSet
from services.core.modeling.registry import load_network, recognised
from services.core.modeling.types import Message, UnfitInputError
from tests.checkpoints import spec
from tests.media.pictures import photograph
from tests.vlm_checkpoints import write_vlm
from tests.vlm_references import Reference

SIZES = [(28, 28), (60, 90), (90, 60), (3, 200), (200, 3), (1, 1), (333, 77)]
CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "text": "hello world"}]},
    {"role": "user", "content": [{"type": "text", "text": "Qué? 🎉"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


def load(folder: Path) -> JinaVlm:
    entry = spec(family="jina_vlm", context_length=4096)
    network = load_network(entry, folder, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(network, JinaVlm)
    return network


def pixels(height: int, width: int) -> np.ndarray:
    with Pillow.open(io.BytesIO(photograph("china.jpg"))) as picture:
        return np.array(picture.convert("RGB").resize((width, height)))


def shown(*pictures: np.ndarray) -> tuple[list[dict[str, Any]], list[Message]]:
    """A conversation with pictures in its last turn, as templates have it and as the engine has it."""
    last = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "hello"}]
    images = [Image(each, (each.shape[1], each.shape[0])) for each in pictures]
    written = [*CONVERSATION, {"role": "user", "content": last}]
    ours = [Message(turn["role"], (turn["content"][0]["text"],)) for turn in CONVERSATION]
    return written, [*ours, Message("user", (*images, "hello"))]


def states_of(vlm: JinaVlm, features: Any) -> list[tuple[int, torch.Tensor]]:
    return [
        (each.offset, vlm.seen(each, [vlm.look(each, part) for part in range(vlm.looks(each))]))
        for each in features
    ]


def answer(
    vlm: JinaVlm, messages: list[Message], count: int, *, size: int = 10**6
) -> tuple[torch.Tensor, list[int]]:
    """The first logits and a greedy answer, the prompt in chunks of ``size``, over shuffled blocks."""
    prepared = vlm.processor.prepare(messages)
    ids, states = prepared.token_ids, states_of(vlm, prepared.features)
    blocks = np.random.default_rng(0).permutation(-(-(len(ids) + count) // BLOCK)).astype(np.int32)
    vlm.open_cache(len(blocks))
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        within = tuple(
            (max(0, offset - start), rows[max(0, start - offset) : max(0, start + len(part) - offset)])
            for offset, rows in states
            if offset < start + len(part) and offset + len(rows) > start
        )
        logits = vlm.step([Chunk(part, start, blocks, asks=start + size >= len(ids), states=within)])
    said: list[int] = []
    first = logits[0]
    for _ in range(count):
        said.append(int(logits[0].argmax()))
        logits = vlm.step([Chunk(np.array(said[-1:], np.int32), len(ids) + len(said) - 1, blocks)])
    return first, said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resize_in_float32": True},
        {"interpolation": "bicubic", "antialias": True},
        {"use_column_tokens": True},
    ],
)
def test_pictures_are_cut_as_published(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_vlm(tmp_path, preprocessor=changes)
    reference, vlm = Reference(folder), load(folder)
    for height, width in SIZES:
        picture = pixels(height, width)
        crops, tokens, stand_for = reference.picture(picture)
        ours = vlm.processor.prepare([Message("user", (Image(picture, (width, height)),))])
        (feature,) = ours.features
        run = ours.token_ids[feature.offset : feature.offset + feature.length].tolist()
        assert run == reference.tokenizer.convert_tokens_to_ids(tokens)
        rows, side = feature.data.view(len(crops), 7, 7, 4, 4, 3), 28
        np.testing.assert_allclose(rows.transpose(2, 3).reshape(-1, side, side, 3), crops, atol=1 / 255)
        _, order = vlm.processor.placed(feature)
        assert order.tolist() == [crop * 16 + word for crop, word in stand_for]


def test_published_sizes_make_the_published_number_of_words() -> None:
    released = {
        "base_input_size": [378, 378],
        "cropping_method": "overlap-and-resize",
        "max_crops": 12,
        "token_length_h": 14,
        "token_length_w": 14,
    }
    tiling = Tiling.read(released)
    sizes = ((300, 300), (378, 644), (640, 640), (64, 64), (900, 1110))
    plans = [tiling.plan(*size) for size in sizes]
    found = {plan.tiles: tiling.length(plan) for plan in plans}
    assert found == {(1, 1): 424, (1, 2): 564, (2, 2): 814, (3, 4): 1744}


def test_logits_and_answers_are_those_of_float64(folder: Path, backend: InstructionSet) -> None:
    reference, vlm = Reference(folder), load(folder)
    assert isinstance(vlm._network, TorchCausal) is (backend is InstructionSet.TORCH)
    for pictures in ([], [pixels(60, 90)], [pixels(30, 31), np.zeros((40, 20, 3), np.uint8)]):
        written, ours = shown(*pictures)
        ids, states = reference.prompt(written, pictures)
        prepared = vlm.processor.prepare(ours)
        assert prepared.token_ids.tolist() == ids
        assert prepared.usage.total == len(ids)
        for size in (10**6, 7):
            first, said = answer(vlm, ours, 12, size=size)
            np.testing.assert_allclose(first, reference.logits(states), atol=1e-4)
            assert said == reference.greedy(states, 12)


def test_an_answer_does_not_depend_on_its_company(folder: Path) -> None:
    vlm = load(folder)
    alone, _ = answer(vlm, [Message("user", ("hello world",))], 1)
    vlm.open_cache(8)
    ids = vlm.processor.prepare([Message("user", ("hello world",))]).token_ids
    rng = np.random.default_rng(1)
    others = [
        Chunk(
            rng.integers(0, 200, 5 + 30 * i).astype(np.int32), 0, np.arange(2 * i, 2 * i + 2, dtype=np.int32)
        )
        for i in range(1, 4)
    ]
    together = vlm.step([others[0], Chunk(ids, 0, np.zeros(1, np.int32)), *others[1:]])
    if isinstance(vlm._network, TorchCausal):
        torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=0)
    else:
        assert torch.equal(together[1], alone)


def test_a_text_never_becomes_a_mark(folder: Path) -> None:
    vlm = load(folder)
    prepared = vlm.processor.prepare([Message("user", ("see <|image|> and <|im_end|>", "hello"))])
    assert prepared.features == ()
    reference = Reference(folder)
    named = {reference.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|image|>", "<|im_end|>")}
    assert not named & set(prepared.token_ids.tolist())
    text = reference.tokenizer.decode(prepared.token_ids[1:].tolist())
    assert text == " User: see <|image|> and <|im_end|> hello Assistant:"


def test_many_texts_that_name_marks_are_read_in_the_time_of_others(folder: Path) -> None:
    vlm = load(folder)
    messages = [Message(("user", "assistant")[n % 2], (f"hello {n} <|im_end|>",)) for n in range(5001)]
    prepared = vlm.processor.prepare(messages)
    named = vlm.processor.tokenize("<|im_end|>")
    ids = prepared.token_ids.tolist()
    starts = [n for n in range(len(ids)) if ids[n : n + len(named)] == named]
    assert len(starts) == 5001


def test_refusals(folder: Path, tmp_path: Path) -> None:
    vlm = load(folder)
    with pytest.raises(UnfitInputError, match="no such role"):
        vlm.processor.prepare([Message("tool", ("hello",))])
    with pytest.raises(ValueError, match="outside"):
        vlm.step([Chunk(np.array([10**6], np.int32), 0, np.zeros(1, np.int32))])
    with pytest.raises(CheckpointError, match="adaptive-slicing"):
        load(write_vlm(tmp_path, preprocessor={"cropping_method": "adaptive-slicing"}))
    assert recognised(folder) == ["jina_vlm"]
