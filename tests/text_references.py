"""What each text model answers for a text, from its folder: stock tokenizers and the networks in float64.

Nothing of the code under test is used, from the text to the last number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from tests.modeling.reference import jina_bert, merged, tensors_of, xlm_rotary
from tests.modeling.support import config_of
from tests.modeling.test_colbert import reference as token_vectors
from tests.modeling.test_colbert import written_document, written_query
from tests.modeling.test_cross_encoders import v1_reference, v2_reference, v2_score
from tests.modeling.test_sparse import reference as vocabulary_weights

COLBERT_FAMILIES = {"jina-colbert-v1-en": "colbert_v1", "jina-colbert-v2": "colbert_v2"}
WINDOW, OVERLAP = 1024, 80
"""Tokens of a sequence of jina-reranker-v2 and, at most, those that two windows share."""


def tokens(folder: Path, text: str, *, specials: bool = True) -> list[int]:
    """The ids of a text, uncut."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return tokenizer(text, add_special_tokens=specials, padding=False, truncation=False)["input_ids"]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def states_v2(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Hidden states of a jina-embeddings-v2-base-*, (tokens, width)."""
    return jina_bert(tensors_of(folder), config_of(folder), np.array(ids, np.int32)).numpy()


def states_v3(folder: Path, ids: Sequence[int], task: str | None) -> np.ndarray:
    """Hidden states of jina-embeddings-v3, (tokens, width)."""
    config = config_of(folder)
    plain = merged(tensors_of(folder, "roberta."), config, task)
    return xlm_rotary(plain, config, np.array(ids, np.int32)).numpy()


def prompted(folder: Path, text: str, task: str | None) -> str:
    """A text behind the instruction that the checkpoint gives its task."""
    return config_of(folder)["task_instructions"].get(task, "") + text


def late_chunks(folder: Path, texts: Sequence[str], task: str | None) -> np.ndarray:
    """A unit vector for each of ``texts``, from one pass over all of them."""
    first = tokens(folder, prompted(folder, texts[0], task), specials=False)
    parts = [first, *(tokens(folder, text, specials=False) for text in texts[1:])]
    start, *_, end = tokens(folder, "")
    states = states_v3(folder, [start, *(id for part in parts for id in part), end], task)
    ends = 1 + np.cumsum([len(part) for part in parts])
    spans = zip([0, *ends[:-1]], [*ends[:-1], len(states)], strict=True)
    return unit(np.stack([states[a:b].mean(0) for a, b in spans]))


def colbert_query(folder: Path, text: str) -> np.ndarray:
    """Unit vectors (32, dimensions) of a query."""
    family = COLBERT_FAMILIES[folder.name]
    ids, shown = written_query(folder, family, text)
    return unit(token_vectors(folder, family, ids, shown))


def colbert_document(folder: Path, text: str) -> np.ndarray:
    """Unit vectors (kept tokens, dimensions) of a document."""
    family = COLBERT_FAMILIES[folder.name]
    ids, kept = written_document(folder, family, text)
    return unit(token_vectors(folder, family, ids)[kept])


def sparse_weights(folder: Path, text: str) -> dict[str, float]:
    """Weights above zero by their token, the largest first."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    weights = vocabulary_weights(folder, np.array(tokens(folder, text), np.int32))
    order = [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
    return {tokenizer.convert_ids_to_tokens(i): float(weights[i]) for i in order}


def scorer(folder: Path) -> Callable[[str, str], float]:
    """What scores a query and a document with the reranker in ``folder``."""
    if folder.name in COLBERT_FAMILIES:
        return lambda query, document: float(
            (colbert_query(folder, query) @ colbert_document(folder, document).T).max(1).sum()
        )
    if folder.name.startswith("jina-reranker-v1"):
        return lambda query, document: v1_reference(folder, np.array(pair(folder, query, document), np.int32))
    model = v2_reference(folder)
    return lambda query, document: max(
        v2_score(model, np.array(ids, np.int32)) for ids in windows(folder, query, document)
    )


def pair(folder: Path, query: str, document: str) -> list[int]:
    """The ids of a pair, uncut. A stock tokenizer takes an empty document for none; here it is one."""
    asked, read = tokens(folder, query), tokens(folder, document, specials=False)
    end = asked[-1]
    return [*asked, end, *read, end]


def windows(folder: Path, query: str, document: str) -> list[list[int]]:
    """The sequences that jina-reranker-v2 reads of a document, as its published code cuts them."""
    asked, read = tokens(folder, query), tokens(folder, document, specials=False)
    end = asked[-1]
    room = WINDOW - len(asked) - 2
    if len(read) <= room:
        return [[*asked, end, *read, end]]
    step = room - min(OVERLAP, room // 4)
    parts: list[list[int]] = []
    for start in range(0, len(read), step):
        if start + room >= len(read):
            parts.append(read[-room:])
            break
        parts.append(read[start : start + room])
    return [[*asked, end, *part, end] for part in parts]
