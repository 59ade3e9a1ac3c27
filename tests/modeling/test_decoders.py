"""jina-embeddings-v5-text and jina-code-embeddings, against transformers' own classes in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from services.core.catalog import Catalog
from services.core.modeling.checkpoints.checkpoint import Checkpoint, CheckpointError
from services.core.modeling.families.decoder import decoder_shapes, linear_sizes, load_decoder
from services.core.modeling.families.decoder_config import EUROBERT, QWEN2, QWEN3, DecoderConfig, Form
from services.core.modeling.layers.packed import Inserted, Limits, lay_out
from services.core.modeling.layers.rotary import Rotation
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import Backbone, EncodeItem, TextEncoder
from tests.checkpoints import Random, spec
from tests.decoder_checkpoints import (
    MARKERS,
    V5_TASKS,
    code_config,
    nano_config,
    qwen_tokenizer,
    small_config,
    write_adapter,
    write_code,
    write_v5,
)
from tests.modeling.stock import last_state
from tests.modeling.support import LONG, config_of, cosine, random_ids

VOCABULARY = qwen_tokenizer(*MARKERS).get_vocab_size()
LENGTHS = (1, 2, 63, 64, 65, 513)
EVERY_TASK = (None, *V5_TASKS)
KINDS = ("nano", "small", "code")
CASES = [("code", None), *((size, task) for size in ("nano", "small") for task in EVERY_TASK)]


def write(directory: Path, kind: str, **changes: Any) -> Path:
    if kind == "code":
        return write_code(directory, **changes)
    return write_v5(directory, kind, **changes)


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    width: int = 32,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (a constant)
) -> TextEncoder:
    code = config_of(directory)["model_type"] == "qwen2"
    tasks = () if code else V5_TASKS
    entry = spec(
        family="jina_code" if code else "jina_v5_text",
        dimensions=width,
        context_length=4096,
        tasks=tasks,
        adapters={task: task for task in tasks},
    )
    return load_text_encoder(entry, directory, device=device, dtype=dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_vectors_are_those_of_transformers(tmp_path: Path, kind: str, task: str | None) -> None:
    write(tmp_path, kind)
    encoder = load(tmp_path)
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids, task)])
        np.testing.assert_allclose(vector, last_state(tmp_path, kind, ids, task), atol=2e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 1), (6, 3)])
def test_any_number_of_heads(tmp_path: Path, kind: str, heads: int, key_heads: int) -> None:
    write(tmp_path, kind, hidden_size=24, num_attention_heads=heads, num_key_value_heads=key_heads)
    ids = random_ids(70, VOCABULARY)
    (vector,) = load(tmp_path, width=24).forward([EncodeItem(ids)])
    np.testing.assert_allclose(vector, last_state(tmp_path, kind, ids), atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_close_to_float64(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, hidden_size=96, intermediate_size=208, random=Random(gain=1.0))
    encoder = load(tmp_path, torch.bfloat16, 96)
    tasks = (None,) if kind == "code" else EVERY_TASK
    for length in LENGTHS:
        ids = random_ids(length, VOCABULARY)
        task = tasks[length % len(tasks)]
        (vector,) = encoder.forward([EncodeItem(ids, task)])
        assert cosine(vector, last_state(tmp_path, kind, ids, task)) > 0.9995


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999999), (torch.bfloat16, 0.9995)])
def test_on_cuda_tasks_and_lengths_may_be_mixed(
    tmp_path: Path, kind: str, dtype: torch.dtype, least: float
) -> None:
    write(tmp_path, kind, hidden_size=96, intermediate_size=208, random=Random(gain=1.0))
    encoder = load(tmp_path, dtype, 96, torch.device("cuda"))
    tasks = (None,) if kind == "code" else EVERY_TASK
    items = [
        EncodeItem(random_ids(length, VOCABULARY, seed=i), tasks[i % len(tasks)])
        for i, length in enumerate((*LENGTHS, LONG))
    ]
    for item, vector in zip(items, encoder.forward(items), strict=True):
        assert cosine(vector, last_state(tmp_path, kind, item.token_ids, item.adapter)) > least


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_right_in_both_number_formats(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, num_hidden_layers=1, max_window_layers=1, random=Random(gain=1.0))
    ids = random_ids(LONG, VOCABULARY)
    wanted = last_state(tmp_path, kind, ids)
    (vector,) = load(tmp_path).forward([EncodeItem(ids)])
    np.testing.assert_allclose(vector, wanted, atol=1e-4)
    (vector,) = load(tmp_path, torch.bfloat16).forward([EncodeItem(ids)])
    assert cosine(vector, wanted) > 0.9995


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", ["nano", "small"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999999), (torch.bfloat16, 0.999)])
def test_tasks_and_lengths_may_be_mixed_in_a_batch(
    tmp_path: Path, size: str, dtype: torch.dtype, least: float
) -> None:
    write_v5(tmp_path, size, random=Random(gain=1.0))
    encoder = load(tmp_path, dtype)
    mix = [(length, task) for length in (1, 7, 64, 600) for task in EVERY_TASK]
    items = [EncodeItem(random_ids(length, VOCABULARY, seed=i), task) for i, (length, task) in enumerate(mix)]
    together = encoder.forward(items)
    for item, vector in zip(items, together, strict=True):
        (alone,) = encoder.forward([item])
        assert cosine(vector, alone) > least
        others = [encoder.forward([EncodeItem(item.token_ids, task)])[0] for task in EVERY_TASK]
        assert sum(cosine(vector, other) > 0.999 for other in others) == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_nobody_reads_are_left_out_without_a_trace(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, random=Random(gain=1.0))
    encoder = load(tmp_path, torch.bfloat16)
    tasks = (None,) if kind == "code" else EVERY_TASK
    items = [
        EncodeItem(random_ids(length, VOCABULARY, seed=i), tasks[i % len(tasks)])
        for i, length in enumerate((1, 5, 5, 90, 200, 7, 300))
    ]
    whole = [
        EncodeItem(i.token_ids, i.adapter, spans=((len(i.token_ids) - 1, len(i.token_ids)),)) for i in items
    ]
    for vector, span in zip(encoder.forward(items), encoder.forward(whole), strict=True):
        assert cosine(vector, span[0]) > 0.99999


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing_in_the_result(tmp_path: Path, kind: str) -> None:
    encoder = load(write(tmp_path, kind), torch.bfloat16)
    tasks = (None,) if kind == "code" else EVERY_TASK
    items = [
        EncodeItem(random_ids(length, VOCABULARY, seed=i), tasks[i % len(tasks)])
        for i, length in enumerate((1, 5, 5, 90, 200, 7, 700, 130))
    ]
    torch.set_num_threads(1)
    alone = np.stack(encoder.forward(items))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        np.testing.assert_allclose(np.stack(encoder.forward(items)), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_nano_reads_backwards(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    encoder = load(tmp_path)
    head = random_ids(20, VOCABULARY)
    spans = ((0, 20),)
    mean, longer = encoder.forward(
        [EncodeItem(head, spans=spans), EncodeItem(np.append(head, head[:5]), spans=spans)]
    )
    assert np.allclose(mean, longer, atol=1e-5) == (kind != "nano")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["small", "code"])
@pytest.mark.parametrize(
    "window",
    [
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"max_window_layers": 0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_may_see_a_window_only(
    tmp_path: Path, kind: str, window: dict[str, Any], dtype: torch.dtype
) -> None:
    write(tmp_path, kind, use_sliding_window=True, sliding_window=24, random=Random(gain=1.0), **window)
    encoder = load(tmp_path, dtype)
    for length in (1, 23, 24, 25, 100, 700):
        ids = random_ids(length, VOCABULARY)
        (vector,) = encoder.forward([EncodeItem(ids)])
        assert cosine(vector, last_state(tmp_path, kind, ids)) > (
            0.999999 if dtype == torch.float32 else 0.9995
        )


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_may_have_a_prefix(tmp_path: Path, prefix: str) -> None:
    write_v5(tmp_path, "small", prefix=prefix)
    ids = random_ids(9, VOCABULARY)
    (vector,) = load(tmp_path).forward([EncodeItem(ids)])
    np.testing.assert_allclose(vector, last_state(tmp_path, "small", ids), atol=1e-5)


@pytest.mark.parametrize(
    "style",
    [
        {"prefix": "base_model.model.model."},
        {"prefix": ""},
        {"slot": ".default"},
        {"slot": ".clustering"},
        {"rank": 3, "alpha": 5},
        {"modules": ["q_proj", "v_proj", "down_proj"]},
    ],
)
def test_adapters_are_found_by_pattern(tmp_path: Path, style: dict[str, Any]) -> None:
    write_v5(tmp_path, "small")
    write_adapter(tmp_path, "clustering", DecoderConfig.read(config_of(tmp_path), QWEN3), **style)
    ids = random_ids(33, VOCABULARY)
    (vector,) = load(tmp_path).forward([EncodeItem(ids, "clustering")])
    np.testing.assert_allclose(vector, last_state(tmp_path, "small", ids, "clustering"), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "'r'"),
        ({"r": 5}, "lora_A of layers.0.mlp.down_proj"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": ["q_proj"]}, "has for no layer"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    write_v5(tmp_path, "nano")
    path = tmp_path / "adapters" / "retrieval" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=reason) as refused:
        load(tmp_path)
    assert "adapters/retrieval" in str(refused.value)


def test_every_tensor_of_an_adapter_is_accounted_for(tmp_path: Path) -> None:
    write_v5(tmp_path, "nano")
    path = tmp_path / "adapters" / "clustering" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = "base_model.model.layers.1.mlp.up_proj.lora_B.weight"
    left = tensors.pop(lost)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lacks: layers\.1\.mlp\.up_proj\.lora_B"):
        load(tmp_path)
    for strange, reason in (
        ("base_model.model.layers.2.mlp.up_proj.lora_B.weight", "no layer"),
        ("base_model.model.norm.weight", "no tensor of this adapter"),
        (lost.replace("lora_B", "lora_B.retrieval"), "no tensor of this adapter"),
        (lost.replace("lora_B", "lora_B.default"), "twice"),
    ):
        save_file(tensors | {lost: left, strange: left.clone()}, path)
        with pytest.raises(CheckpointError, match=reason):
            load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(tmp_path)
    (path.parent / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="no adapters clustering"):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_network_is_accounted_for(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind) / "model.safetensors"
    tensors = load_file(path)
    name = next(each for each in tensors if "layers.1.mlp.gate_proj" in each)
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, path)
    with pytest.raises(CheckpointError, match=r"missing tensors: layers\.1\.mlp\.gate_proj\.weight"):
        load(tmp_path)
    strange = name.replace("gate_proj.weight", "gate_proj.bias")
    save_file(tensors | {strange: tensors[name][:, 0].clone()}, path)
    with pytest.raises(CheckpointError, match=r"does not know: layers\.1\.mlp\.gate_proj\.bias"):
        load(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors[name].clone()}, path)
    load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"num_key_value_heads": 3}, "key heads"),
        ({"head_dim": 7}, "even"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"max_position_embeddings": 512}, "512 positions"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"model_type": "qwen3"}, "'qwen3'"),
    ],
)
def test_a_foreign_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_v5(tmp_path, "small") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def test_the_newer_spelling_of_rotary_positions_is_read(tmp_path: Path) -> None:
    write_v5(tmp_path, "nano")
    ids = random_ids(40, VOCABULARY)
    (wanted,) = load(tmp_path).forward([EncodeItem(ids)])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    path.write_text(json.dumps(config))
    (vector,) = load(tmp_path).forward([EncodeItem(ids)])
    np.testing.assert_array_equal(vector, wanted)


_QWEN3_SIZE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
}
SIZES: list[tuple[dict[str, Any], Form, str, int]] = [
    (
        nano_config(
            vocab_size=128256,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
            intermediate_size=3072,
        ),
        EUROBERT,
        "jina-embeddings-v5-text-nano",
        211_766_016,
    ),
    (small_config(**_QWEN3_SIZE), QWEN3, "jina-embeddings-v5-text-small", 596_049_920),
    (
        code_config(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
        ),
        QWEN2,
        "jina-code-embeddings-0.5b",
        494_032_768,
    ),
    (
        code_config(
            vocab_size=151936,
            hidden_size=1536,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            intermediate_size=8960,
        ),
        QWEN2,
        "jina-code-embeddings-1.5b",
        1_543_714_304,
    ),
]


@pytest.mark.parametrize(("config", "form", "model", "total"), SIZES)
def test_the_published_sizes_add_up(config: dict[str, Any], form: Form, model: str, total: int) -> None:
    parsed = DecoderConfig.read(config, form)
    assert sum(map(prod, decoder_shapes(parsed).values())) == total
    entry = Catalog.load().require(model)
    adapters = len(set(entry.adapters.values()))
    adapter = sum(32 * (out + into) for out, into in linear_sizes(parsed).values())
    assert entry.parameters == total + adapters * adapter
    assert entry.dimensions == parsed.width


SECTIONS = (1, 2, 1)
"""Frequencies of the three axes in the tiny networks, of heads of 8."""


def _decoder(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Backbone, DecoderConfig]:
    write_code(directory)
    checkpoint = Checkpoint(directory)
    config = DecoderConfig.read(checkpoint.config, QWEN2)
    return load_decoder(checkpoint, config, torch.device("cpu"), dtype), config


def _turns(config: DecoderConfig, positions: torch.Tensor) -> Rotation:
    table = Rotation(torch.arange(int(positions.max()) + 1), config.head_dim, config.rotary_base)
    return table.sections(positions, SECTIONS)


@pytest.mark.usefixtures("backend")
def test_inserted_states_and_three_axes_are_those_of_transformers(tmp_path: Path) -> None:
    network, config = _decoder(tmp_path)
    limits, random = Limits(config.vocabulary, config.positions), np.random.default_rng(5)
    items = [EncodeItem(random_ids(length, VOCABULARY)) for length in (9, 70, 33)]
    batch = lay_out(items, limits)
    places = torch.tensor([0, 1, 4, 20, 21, 22, batch.tokens - 1])
    states = torch.from_numpy(random.standard_normal((len(places), config.width), np.float32))
    positions = torch.from_numpy(random.integers(0, 900, (3, batch.tokens)))
    given = replace(batch, inserted=Inserted(places, states), rotation=_turns(config, positions))
    with torch.inference_mode():
        hidden = network(given)
    stock = _three_axes(tmp_path).requires_grad_(False)
    embedded = stock.embed_tokens(batch.token_ids.long())
    embedded[places] = states.double()
    for start, end in pairwise(batch.cu_lengths.tolist()):
        wanted = stock(
            inputs_embeds=embedded[None, start:end], position_ids=positions[:, None, start:end]
        ).last_hidden_state[0]
        np.testing.assert_allclose(hidden[start:end], wanted, atol=2e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_is_bit_for_bit_the_same_where_its_turns_and_states_are_given(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    network, config = _decoder(tmp_path, dtype)
    limits = Limits(config.vocabulary, config.positions)
    batch = lay_out([EncodeItem(random_ids(length, VOCABULARY)) for length in (5, 130, 700)], limits)
    places = torch.arange(3, batch.tokens, 2)
    words = Checkpoint(tmp_path).tensor("model.embed_tokens.weight", dtype)
    inserted = Inserted(places, words[batch.token_ids[places].long()])
    turns = _turns(config, batch.positions().expand(3, -1))
    with torch.inference_mode():
        plain = network(batch)
        assert torch.equal(network(replace(batch, inserted=inserted, rotation=turns)), plain)


def _three_axes(directory: Path) -> Any:
    """Load a checkpoint of Qwen2 as the text network of Qwen2-VL, in float64."""
    fields = {name: value for name, value in config_of(directory).items() if name in _NUMBERS}
    turns = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": list(SECTIONS)}
    config = Qwen2VLTextConfig(**fields, rope_parameters=turns, attn_implementation="eager")
    model = Qwen2VLTextModel(config).double().eval()
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): t.double() for name, t in tensors.items()})
    return model


_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
