"""The tokenizer's wrapper: specials kept, nothing padded, long texts cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers

from services.core.modeling.checkpoints.tokenizer import Tokenizer
from tests.checkpoints import WORDS, minilm_directory, word_pieces
from tests.decoder_checkpoints import qwen_tokenizer
from tests.text_checkpoints import byte_pairs, sentence_pieces

CLS, SEP, UNK = 2, 3, 1
ID = {word: 5 + i for i, word in enumerate(WORDS)}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(word_pieces())


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return Tokenizer.load(minilm_directory())


def test_specials_are_added_and_padding_of_the_file_is_not(tokenizer: Tokenizer) -> None:
    hello, empty = tokenizer.encode_batch(["Hello worlds", ""])
    assert hello.ids.tolist() == [CLS, ID["hello"], ID["world"], ID["##s"], SEP]
    assert hello.ids.dtype == np.int32
    assert (hello.length, hello.truncated) == (5, False)
    assert empty.ids.tolist() == [CLS, SEP]


def test_the_prompt_comes_before_each_text(tokenizer: Tokenizer) -> None:
    prompted = tokenizer.encode_batch(["fox", ""], prompt="the quick ")
    whole = tokenizer.encode_batch(["the quick fox", "the quick "])
    assert [t.ids.tolist() for t in prompted] == [t.ids.tolist() for t in whole]


def test_a_cut_keeps_the_specials_and_tells_the_true_length(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenizer.encode_batch(["the quick brown fox"], truncate_to=4)
    assert tokens.ids.tolist() == [CLS, ID["the"], ID["quick"], SEP]
    assert (tokens.length, tokens.truncated) == (6, True)


def test_a_text_that_just_fits_is_not_cut(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenizer.encode_batch(["the quick brown fox"], truncate_to=6)
    assert (len(tokens.ids), tokens.length, tokens.truncated) == (6, 6, False)


def test_cutting_agrees_with_the_rust_side(minilm: Tokenizer) -> None:
    rust = RustTokenizer.from_file(str(minilm_directory() / "tokenizer.json"))
    rust.no_padding()
    rust.enable_truncation(40)
    texts = ["Résumé: " + "naïve café 東京 🦊 e.g. don't " * n for n in (1, 3, 10, 500)]
    ours = minilm.encode_batch(texts, truncate_to=40)
    assert [t.ids.tolist() for t in ours] == [e.ids for e in rust.encode_batch(texts)]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_cut_without_room_for_text_is_refused(tokenizer: Tokenizer, limit: int) -> None:
    with pytest.raises(ValueError, match="above the 2 special tokens"):
        tokenizer.encode_batch(["fox"], truncate_to=limit)


@pytest.mark.parametrize("text", ["the quick brown fox, ", "敏捷的棕色狐狸"])
def test_of_a_huge_text_only_the_head_is_read(minilm: Tokenizer, text: str) -> None:
    (tokens,) = minilm.encode_batch([text * 300_000], truncate_to=512)
    (head,) = minilm.encode_batch([text * 1000], truncate_to=512)
    assert tokens.ids.tolist() == head.ids.tolist()
    assert tokens.truncated
    assert 512 < tokens.length < 20_000


@pytest.mark.parametrize("text", [" " * 32_000 + "fox", "\x00" * 32_000 + " fox", "a" * 32_000 + " fox"])
def test_a_long_text_of_few_tokens_is_read_whole(minilm: Tokenizer, text: str) -> None:
    (tokens,) = minilm.encode_batch([text], truncate_to=64)
    (whole,) = minilm.encode_batch([text])
    assert tokens.ids.tolist() == whole.ids.tolist()
    assert not tokens.truncated


LONG = {
    "one letter": "a",
    "one word": "hello",
    "words": "hello world, the quick brown fox! ",
    "lines": "hello\n\n\tworld;\r\n",
    "no spaces": "hello,world.",
    "symbols": "é漢🦊",
    "ideographs": "敏捷的棕色狐狸",
    "points": ".",
    "accents": "e\u0301",
    "spaces": " " * 40 + "fox",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("kind", [word_pieces, byte_pairs, sentence_pieces, qwen_tokenizer])
@pytest.mark.parametrize("limit", [16, 600])
def test_the_kept_tokens_are_those_of_the_whole_text(
    kind: Callable[[], RustTokenizer], text: str, limit: int
) -> None:
    tokenizer = Tokenizer(kind())
    long = text * (70_000 // len(text))
    (whole,) = tokenizer.encode_batch([long])
    (tokens,) = tokenizer.encode_batch([long], truncate_to=limit)
    kept = limit - tokenizer.suffix_length
    assert tokens.ids[:kept].tolist() == whole.ids[:kept].tolist()
    assert tokens.truncated == (len(whole.ids) > limit or len(long) > 64 * max(512, limit))


class Counting:
    """The Rust side; counts the characters that it is given."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rust, name)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._rust.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("limit", [16, 600])
def test_no_more_is_read_than_the_limit_asks_for(text: str, limit: int) -> None:
    counting = Counting(byte_pairs())
    tokenizer = Tokenizer(counting)  # type: ignore[arg-type]
    (tokens,) = tokenizer.encode_batch([text * (3_000_000 // len(text))], "hello ", truncate_to=limit)
    assert tokens.truncated
    assert counting.characters <= 2 * 64 * max(512, limit) + 100


def test_a_text_that_is_cut_before_its_tokens_are_counted_says_so(minilm: Tokenizer) -> None:
    (tokens,) = minilm.encode_batch(["a" * 40_000], truncate_to=64)
    assert (len(tokens.ids), tokens.truncated) == (3, True)


def test_threads_do_not_disturb_one_another(minilm: Tokenizer) -> None:
    texts = [f"text number {i} " * (i % 50 + 1) for i in range(200)]
    wanted = [minilm.encode_batch([text], truncate_to=5 + i % 30)[0].ids for i, text in enumerate(texts)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(minilm.encode_batch, [t], "", 5 + i % 30) for i, t in enumerate(texts)]
        for job, ids in zip(jobs, wanted, strict=True):
            assert job.result()[0].ids.tolist() == ids.tolist()


def test_a_tokenizer_without_specials() -> None:
    rust = RustTokenizer(models.WordLevel({"?": 0, "fox": 1}, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(rust)
    assert tokenizer.special_length == 0
    (tokens,) = tokenizer.encode_batch(["fox fox fox"], truncate_to=2)
    assert tokens.ids.tolist() == [1, 1]
    assert tokens.truncated


def test_facts_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocabulary_size == 5 + len(WORDS)
    assert tokenizer.token_id("fox") == ID["fox"]
    assert tokenizer.token_id("cat") is None
    assert (tokenizer.prefix_length, tokenizer.suffix_length) == (1, 1)


def test_loading_reads_the_directory(tmp_path: Path) -> None:
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    (tokens,) = Tokenizer.load(tmp_path).encode_batch(["fox"])
    assert tokens.ids.tolist() == [CLS, ID["fox"], SEP]
