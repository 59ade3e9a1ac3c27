"""Tiny checkpoints of the BERT-like families, in the on-disk form of the published ones."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.checkpoints import Random, Tensors, bert_config, bert_tensors, word_pieces, write

FAMILIES = (
    "jina-embeddings-v2-base-en",
    "jina-embeddings-v2-base-code",
    "jina-embeddings-v3",
    "jina-colbert-v1-en",
    "jina-colbert-v2",
    "elser-v2",
    "jina-reranker-v1-tiny-en",
    "jina-reranker-v2-base-multilingual",
)
"""A model of each family and form that ``write_model`` writes."""

BYTE_PAIR_MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("r", "l"))

WORDS = ("hello", "world", "the", "quick", "brown", "fox", "dog", "a", "b")
PIECES = ("▁", *(f"▁{word}" for word in WORDS), "s", "ed", ",", ".")


def byte_pairs() -> Tokenizer:
    """Make a byte-level BPE tokenizer as those of v2-base-de, -es, -zh, -code and reranker-v1."""
    vocabulary = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in BYTE_PAIR_MERGES)):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(BYTE_PAIR_MERGES), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    return tokenizer


def sentence_pieces(*added: str) -> Tokenizer:
    """Make a unigram tokenizer as XLM-R's, ``<mask>`` last; ``added`` are further special tokens."""
    scores = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    scores |= {piece: -float(len(PIECES) - i) for i, piece in enumerate(PIECES)}
    scores |= dict.fromkeys("abcdefghijklmnopqrstuvwxyz!?;:'()-", -20.0)
    scores["<mask>"] = 0.0
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def stored_as(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    """Round ``tensors`` to what bf16 holds, so that no test measures that, and to the published dtype."""
    return {name: tensor.bfloat16().to(dtype) for name, tensor in tensors.items()}


def jina_bert_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-embeddings-v2-base-*, tiny unless ``changes`` say otherwise."""
    return {
        "_name_or_path": "jinaai/jina-bert-base-en-v1",
        "architectures": ["JinaBertForMaskedLM"],
        "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": None,
        "emb_pooler": "mean",
        "feed_forward_type": "geglu",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 2048,
        "model_max_length": 2048,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "alibi",
        "torch_dtype": "float16",
        "type_vocab_size": 2,
        "vocab_size": byte_pairs().get_vocab_size(),
    } | changes


def jina_bert_tensors(
    config: Mapping[str, Any], *, query_norm: bool = False, random: Random | None = None
) -> Tensors:
    """Make the tensors of a JinaBERT, its unused pooler included, in one of the two block forms."""
    random = random or Random()
    width = config["hidden_size"]
    tensors = {
        "embeddings.word_embeddings.weight": random.normal(config["vocab_size"], width),
        "embeddings.token_type_embeddings.weight": random.normal(config["type_vocab_size"], width, scale=0.3),
        **random.norm("embeddings.LayerNorm", width),
        **random.linear("pooler.dense", width, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            tensors |= random.linear(f"{layer}.attention.{part}", width, width)
        tensors |= random.norm(f"{layer}.attention.output.LayerNorm", width)
        tensors |= _gated(random, layer, config, query_norm)
    return tensors


def _gated(random: Random, layer: str, config: Mapping[str, Any], query_norm: bool) -> Tensors:
    width, inner = config["hidden_size"], config["intermediate_size"]
    into, out = ("up_gated_layer", "down_layer") if query_norm else ("gated_layers", "wo")
    tensors = {f"{layer}.mlp.{into}.weight": random.matrix(2 * inner, width)}
    tensors |= random.linear(f"{layer}.mlp.{out}", width, inner)
    if not query_norm:
        return tensors | random.norm(f"{layer}.mlp.layernorm", width)
    for name in (
        "attention.self.layer_norm_q",
        "attention.self.layer_norm_k",
        "layer_norm_1",
        "layer_norm_2",
    ):
        tensors |= random.norm(f"{layer}.{name}", width)
    return tensors


def write_jina_bert(
    directory: Path,
    *,
    query_norm: bool = False,
    random: Random | None = None,
    tokenizer: Tokenizer | None = None,
    **changes: Any,
) -> Path:
    """Write a tiny jina-embeddings-v2-base-*; ``changes`` go into its config.json.

    The tokenizer is that of -de, -es, -zh and -code; -en has word pieces.
    """
    tokenizer = tokenizer or byte_pairs()
    config = jina_bert_config(**({"vocab_size": tokenizer.get_vocab_size()} | changes))
    tensors = jina_bert_tensors(config, query_norm=query_norm, random=random)
    return write(directory, config, stored_as(torch.float16, tensors), tokenizer)


TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}


def xlm_rotary_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-colbert-v2's backbone, tiny unless ``changes`` say otherwise."""
    return {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "auto_map": {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_xlm_roberta"},
        "bos_token_id": 0,
        "emb_pooler": None,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2050,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "rotary_emb_base": 10000.0,
        "torch_dtype": "bfloat16",
        "type_vocab_size": 1,
        "use_flash_attn": True,
        "vocab_size": sentence_pieces().get_vocab_size(),
    } | changes


def v3_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-embeddings-v3."""
    own = {
        "load_trained_adapters": True,
        "lora_adaptations": list(TASKS),
        "lora_alpha": 1,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "lora_rank": 4,
        "matryoshka_dimensions": [8, 16, 32],
        "rotary_emb_base": 20000.0,
        "task_instructions": dict.fromkeys(TASKS, "") | INSTRUCTIONS,
        "truncate_dim": None,
    }
    return xlm_rotary_config(**(own | changes))


def xlm_rotary_tensors(config: Mapping[str, Any], *, random: Random | None = None) -> Tensors:
    """Make the tensors of an XLM-R with rotary positions, its pooler and any adapters included."""
    random = random or Random()
    width, inner = config["hidden_size"], config["intermediate_size"]
    adapters = (len(config.get("lora_adaptations", ())), config.get("lora_rank", 0))
    tensors = {
        **_adapted_table(random, "roberta.embeddings.word_embeddings", config["vocab_size"], width, adapters),
        **_adapted_table(
            random, "roberta.embeddings.token_type_embeddings", config["type_vocab_size"], width, adapters
        ),
        **random.norm("roberta.emb_ln", width),
        **_adapted_linear(random, "roberta.pooler.dense", width, width, adapters),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"roberta.encoder.layers.{i}"
        for name, out, into in (
            ("mixer.Wqkv", 3 * width, width),
            ("mixer.out_proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            tensors |= _adapted_linear(random, f"{layer}.{name}", out, into, adapters)
        tensors |= random.norm(f"{layer}.norm1", width) | random.norm(f"{layer}.norm2", width)
    return tensors


def _adapted_linear(random: Random, name: str, out: int, into: int, adapters: tuple[int, int]) -> Tensors:
    tensors = random.linear(name, out, into)
    tasks, rank = adapters
    if not tasks:
        return tensors
    where = f"{name}.parametrizations.weight"
    return {
        f"{name}.bias": tensors[f"{name}.bias"],
        f"{where}.original": tensors[f"{name}.weight"],
        f"{where}.0.lora_A": random.normal(tasks, rank, into, scale=into**-0.5),
        f"{where}.0.lora_B": random.normal(tasks, out, rank),
    }


def _adapted_table(random: Random, name: str, rows: int, width: int, adapters: tuple[int, int]) -> Tensors:
    table = random.normal(rows, width)
    tasks, rank = adapters
    if not tasks:
        return {f"{name}.weight": table}
    where = f"{name}.parametrizations.weight"
    return {
        f"{where}.original": table,
        f"{where}.0.lora_A": random.normal(tasks, rows, rank),
        f"{where}.0.lora_B": random.normal(tasks, rank, width),
    }


def write_v3(directory: Path, *, random: Random | None = None, **changes: Any) -> Path:
    """Write a tiny jina-embeddings-v3; ``changes`` go into its config.json."""
    config = v3_config(**changes)
    tensors = stored_as(torch.bfloat16, xlm_rotary_tensors(config, random=random))
    return write(directory, config, tensors, sentence_pieces())


def reranker_v1_tensors(config: Mapping[str, Any], *, random: Random | None = None) -> Tensors:
    """Make the tensors of a jina-reranker-v1: JinaBERT under a prefix, with a pooler and a classifier."""
    random = random or Random()
    body = {f"bert.{name}": tensor for name, tensor in jina_bert_tensors(config, random=random).items()}
    return body | random.linear("classifier", 1, config["hidden_size"])


def write_reranker_v1(directory: Path, *, random: Random | None = None, **changes: Any) -> Path:
    """Write a tiny jina-reranker-v1-*."""
    config = jina_bert_config(architectures=["JinaBertModel"], **changes)
    tensors = stored_as(torch.float16, reranker_v1_tensors(config, random=random))
    return write(directory, config, tensors, byte_pairs())


def reranker_v2_config(**changes: Any) -> dict[str, Any]:
    """Make the config.json of jina-reranker-v2-base-multilingual, tiny unless ``changes`` say otherwise."""
    own = {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "max_position_embeddings": 66,
        "num_labels": 1,
        "position_embedding_type": "absolute",
    }
    config = xlm_rotary_config(**(own | changes))
    del config["rotary_emb_base"]
    return config


def reranker_v2_tensors(config: Mapping[str, Any], *, random: Random | None = None) -> Tensors:
    """Make the tensors of a jina-reranker-v2: no pooler, a RoBERTa head."""
    random = random or Random()
    width = config["hidden_size"]
    tensors = xlm_rotary_tensors(config, random=random)
    tensors = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    table = random.normal(config["max_position_embeddings"], width, scale=0.5)
    tensors["roberta.embeddings.position_embeddings.weight"] = table
    head = random.linear("classifier.dense", width, width) | random.linear("classifier.out_proj", 1, width)
    return tensors | head


def write_reranker_v2(directory: Path, *, random: Random | None = None, **changes: Any) -> Path:
    """Write a tiny jina-reranker-v2-base-multilingual."""
    config = reranker_v2_config(**changes)
    tensors = stored_as(torch.bfloat16, reranker_v2_tensors(config, random=random))
    return write(directory, config, tensors, sentence_pieces())


def colbert_pieces() -> Tokenizer:
    """Make a WordPiece tokenizer in which BERT's unused tokens are the markers of jina-colbert-v1."""
    words = ("[unused0]", "[unused1]", *WORDS, "##s", "##ed", *string.punctuation)
    return word_pieces(words)


def colbert_v1_tensors(
    config: Mapping[str, Any], dimensions: int = 128, *, random: Random | None = None
) -> Tensors:
    """Make the tensors of jina-colbert-v1-en: JinaBERT under a prefix, and a projection without a bias."""
    random = random or Random()
    body = {f"bert.{name}": tensor for name, tensor in jina_bert_tensors(config, random=random).items()}
    return body | {"linear.weight": random.matrix(dimensions, config["hidden_size"])}


def write_colbert_v1(
    directory: Path, *, dimensions: int = 128, random: Random | None = None, **changes: Any
) -> Path:
    """Write a tiny jina-colbert-v1-en: fp32, with ``artifact.metadata``."""
    tokenizer = colbert_pieces()
    config = jina_bert_config(
        architectures=["HF_ColBERT"], **({"vocab_size": tokenizer.get_vocab_size()} | changes)
    )
    tensors = colbert_v1_tensors(config, dimensions, random=random)
    metadata = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_token": "[Q]",
        "doc_token": "[D]",
        "attend_to_mask_tokens": False,
        "dim": dimensions,
        "doc_maxlen": 160,
        "mask_punctuation": True,
        "query_maxlen": 32,
        "similarity": "cosine",
    }
    return write(
        directory,
        config,
        stored_as(torch.float32, tensors),
        tokenizer,
        files={"artifact.metadata": metadata},
    )


def colbert_v2_tensors(
    config: Mapping[str, Any], dimensions: int = 128, *, random: Random | None = None
) -> Tensors:
    """Make the tensors of jina-colbert-v2: XLM-R with its pooler, and a projection without a bias."""
    random = random or Random()
    body = xlm_rotary_tensors(config, random=random)
    return body | {"linear.weight": random.matrix(dimensions, config["hidden_size"])}


def write_colbert_v2(
    directory: Path, *, dimensions: int = 128, random: Random | None = None, **changes: Any
) -> Path:
    """Write a tiny jina-colbert-v2: bf16, two added markers, ``artifact.metadata``."""
    tokenizer = sentence_pieces("[QueryMarker]", "[DocumentMarker]")
    config = xlm_rotary_config(**({"vocab_size": tokenizer.get_vocab_size()} | changes))
    tensors = colbert_v2_tensors(config, dimensions, random=random)
    metadata = {
        "query_token_id": "[QueryMarker]",
        "doc_token_id": "[DocumentMarker]",
        "attend_to_mask_tokens": True,
        "dim": dimensions,
        "doc_maxlen": 300,
        "mask_punctuation": True,
        "query_maxlen": 32,
        "similarity": "cosine",
    }
    return write(
        directory,
        config,
        stored_as(torch.bfloat16, tensors),
        tokenizer,
        files={"artifact.metadata": metadata},
    )


def masked_language_model_tensors(config: Mapping[str, Any], *, random: Random | None = None) -> Tensors:
    """Make the tensors of a ``BertForMaskedLM`` whose decoder is the table of words."""
    width = config["hidden_size"]
    random = random or Random()
    body = {n: t for n, t in bert_tensors(config).items() if "pooler" not in n and "position_ids" not in n}
    return {
        **{f"bert.{name}": tensor for name, tensor in body.items()},
        **random.linear("cls.predictions.transform.dense", width, width),
        **random.norm("cls.predictions.transform.LayerNorm", width),
        "cls.predictions.bias": random.normal(config["vocab_size"], scale=0.2) - 1.5 * width**0.5,
    }


def write_elser(directory: Path, *, random: Random | None = None, **changes: Any) -> Path:
    """Write a tiny sparse encoder as a SPLADE is published: the head of a masked language model."""
    config = bert_config(architectures=["BertForMaskedLM"], **changes)
    tensors = stored_as(torch.float32, masked_language_model_tensors(config, random=random))
    return write(directory, config, tensors, word_pieces())


_WIDE = {"num_hidden_layers": 1, "intermediate_size": 64}
_V2 = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 8192}


def write_model(directory: Path, model: str) -> Path:
    """Write tiny weights that fit the catalogue's entry of ``model`` where a process looks for them."""
    folder = directory / model
    match model:
        case (
            "jina-embeddings-v2-base-en"
            | "jina-embeddings-v2-base-zh"
            | "jina-embeddings-v2-base-de"
            | "jina-embeddings-v2-base-es"
        ):
            return write_jina_bert(folder, tokenizer=word_pieces(), **_WIDE, **_V2)
        case "jina-embeddings-v2-base-de" | "jina-embeddings-v2-base-es" | "jina-embeddings-v2-base-zh":
            return write_jina_bert(folder, **_WIDE, **_V2)
        case "jina-embeddings-v2-base-code":
            return write_jina_bert(folder, query_norm=True, **_WIDE, **_V2)
        case "jina-embeddings-v3":
            wide = {"hidden_size": 1024, "num_attention_heads": 16, "max_position_embeddings": 8194}
            return write_v3(folder, **_WIDE, **wide)
        case "jina-colbert-v1-en":
            return write_colbert_v1(folder, max_position_embeddings=8192)
        case "jina-colbert-v2":
            return write_colbert_v2(folder, max_position_embeddings=8194)
        case "elser-v2":
            return write_elser(folder, max_position_embeddings=512)
        case "jina-reranker-v1-tiny-en" | "jina-reranker-v1-turbo-en":
            return write_reranker_v1(folder, max_position_embeddings=8192)
        case "jina-reranker-v2-base-multilingual":
            return write_reranker_v2(folder, max_position_embeddings=1026)
    raise ValueError(f"no tiny form of {model}")
