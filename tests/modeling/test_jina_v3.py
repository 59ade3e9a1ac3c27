"""jina-embeddings-v3: five task adapters over one base, against float64 and transformers' own class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from services.core.modeling.checkpoints.checkpoint import CheckpointError
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem, TextEncoder
from tests.checkpoints import Random, spec
from tests.modeling.reference import merged, tensors_of, xlm_rotary
from tests.modeling.support import LENGTHS, LONG, config_of, cosine, random_ids
from tests.text_checkpoints import TASKS, sentence_pieces, write_v3

VOCABULARY = sentence_pieces().get_vocab_size()
EVERY_TASK = (None, *TASKS)


def load(directory: Path, dtype: torch.dtype, width: int = 32) -> TextEncoder:
    entry = spec(
        family="jina_v3",
        dimensions=width,
        context_length=2048,
        sequence_length=2050,
        tasks=TASKS,
        adapters={task: task for task in TASKS},
    )
    return load_text_encoder(entry, directory, device=torch.device("cpu"), dtype=dtype)


def expected(directory: Path, ids: np.ndarray, task: str | None) -> np.ndarray:
    config = config_of(directory)
    plain = merged(tensors_of(directory, "roberta."), config, task)
    return xlm_rotary(plain, config, ids).mean(0).numpy()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("task", EVERY_TASK)
@pytest.mark.parametrize(("heads", "width"), [(3, 24), (4, 32), (12, 96)])
def test_each_task_is_that_of_float64(tmp_path: Path, heads: int, width: int, task: str | None) -> None:
    write_v3(tmp_path, hidden_size=width, num_attention_heads=heads)
    encoder = load(tmp_path, torch.float32, width)
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids, task)])
        np.testing.assert_allclose(vector, expected(tmp_path, ids, task), atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_a_scale_that_bf16_does_not_hold(tmp_path: Path) -> None:
    write_v3(tmp_path, lora_rank=3, lora_alpha=2)
    ids = random_ids(40, VOCABULARY)
    (vector,) = load(tmp_path, torch.float32).forward([EncodeItem(ids, "separation")])
    np.testing.assert_allclose(vector, expected(tmp_path, ids, "separation"), atol=1e-5)


@pytest.mark.parametrize("task", [None, "retrieval.query", "text-matching"])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, task: str | None) -> None:
    write_v3(tmp_path)
    config = config_of(tmp_path)
    known = JinaEmbeddingsV3Config().to_dict().keys()
    stock = JinaEmbeddingsV3Model(
        JinaEmbeddingsV3Config(
            **{name: value for name, value in config.items() if name in known},
            rope_parameters={"rope_type": "default", "rope_theta": config["rotary_emb_base"]},
        )
    ).eval()
    plain = merged(tensors_of(tmp_path, "roberta."), config, task)
    stock.load_state_dict(in_transformers_names(plain), strict=True)
    encoder = load(tmp_path, torch.float32)
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        with torch.inference_mode():
            states = stock(torch.from_numpy(ids).long()[None]).last_hidden_state[0]
        (vector,) = encoder.forward([EncodeItem(ids, task)])
        np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-5)


def in_transformers_names(plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        for ours, theirs in (
            (r"^encoder\.", ""),
            (r"^emb_ln", "embeddings.LayerNorm"),
            (r"mixer\.out_proj", "self_attn.o_proj"),
            (r"norm1", "post_attention_layernorm"),
            (r"norm2", "post_mlp_layernorm"),
        ):
            name = re.sub(ours, theirs, name)
        if "mixer.Wqkv" in name:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("mixer.Wqkv", f"self_attn.{part}_proj")] = chunk
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (12, 192)])
def test_bf16_stays_close_to_float64(tmp_path: Path, heads: int, width: int) -> None:
    write_v3(
        tmp_path,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=2 * width + 16,
        random=Random(gain=1.0),
    )
    encoder = load(tmp_path, torch.bfloat16, width)
    for length, task in zip(LENGTHS, EVERY_TASK, strict=True):
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids, task)])
        assert cosine(vector, expected(tmp_path, ids, task)) > 0.9999


@pytest.mark.usefixtures("backend")
def test_a_long_text_is_right_in_both_number_formats(tmp_path: Path) -> None:
    write_v3(tmp_path, hidden_size=96, num_attention_heads=12, num_hidden_layers=1, random=Random(gain=1.0))
    ids = random_ids(LONG, VOCABULARY)
    wanted = expected(tmp_path, ids, "retrieval.passage")
    item = EncodeItem(ids, "retrieval.passage")
    (vector,) = load(tmp_path, torch.float32, 96).forward([item])
    np.testing.assert_allclose(vector, wanted, atol=1e-5)
    (vector,) = load(tmp_path, torch.bfloat16, 96).forward([item])
    assert cosine(vector, wanted) > 0.9999


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999999), (torch.bfloat16, 0.9999)])
def test_tasks_and_lengths_may_be_mixed_in_a_batch(tmp_path: Path, dtype: torch.dtype, least: float) -> None:
    write_v3(tmp_path)
    encoder = load(tmp_path, dtype)
    mix = [(length, task) for length in (1, 7, 64, 200) for task in EVERY_TASK]
    items = [EncodeItem(random_ids(length, VOCABULARY, seed=i), task) for i, (length, task) in enumerate(mix)]
    together = encoder.forward(items)
    for item, vector in zip(items, together, strict=True):
        (alone,) = encoder.forward([item])
        assert cosine(vector, alone) > least
        others = [encoder.forward([EncodeItem(item.token_ids, task)])[0] for task in EVERY_TASK]
        assert sum(cosine(vector, other) > 0.999 for other in others) == 1


def test_late_chunks_are_means_of_one_forward(tmp_path: Path) -> None:
    write_v3(tmp_path)
    ids = random_ids(70, VOCABULARY)
    spans = ((0, 20), (20, 21), (21, 70))
    config = config_of(tmp_path)
    states = xlm_rotary(merged(tensors_of(tmp_path, "roberta."), config, "separation"), config, ids)
    item = EncodeItem(ids, "separation", spans)
    plain = EncodeItem(random_ids(5, VOCABULARY))
    chunks, _ = load(tmp_path, torch.float32).forward([item, plain])
    wanted = np.stack([states[a:b].mean(0).numpy() for a, b in spans])
    np.testing.assert_allclose(chunks, wanted, atol=1e-5)


def test_an_adapter_the_checkpoint_has_not_is_refused(tmp_path: Path) -> None:
    write_v3(tmp_path)
    encoder = load(tmp_path, torch.float32)
    with pytest.raises(ValueError, match="no adapter 'clustering'"):
        encoder.forward([EncodeItem(random_ids(4, VOCABULARY), "clustering")])
    write_v3(tmp_path, lora_adaptations=list(TASKS[:3]))
    with pytest.raises(CheckpointError, match="no adapters classification, text-matching"):
        load(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_adaptations": ["a", "a"]}, "lora_adaptations"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"position_embedding_type": "absolute"}, "jina_v3"),
    ],
)
def test_a_foreign_configuration_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    directory = write_v3(tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps(config_of(directory) | changes))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc2.parametrizations.weight.0.lora_B", "emb_ln.bias"])
def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = write_v3(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(f"roberta.{name}")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"missing tensors: {re.escape(name)}"):
        load(tmp_path, torch.float32)
    save_file(tensors | {f"roberta.{name}": tensor[..., :-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=f"wrong kind: {re.escape(name)}"):
        load(tmp_path, torch.float32)
    save_file(tensors | {f"roberta.{name}": tensor, "roberta.extra": tensor.clone()}, path)
    with pytest.raises(CheckpointError, match="does not know: extra"):
        load(tmp_path, torch.float32)
