"""Calls of other vendors' own clients, run in an environment of their own; prints one JSON line for each.

A line is ``[name, true, value]`` for an answer and ``[name, false, text of the exception]`` for a refusal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import cohere
import litellm
import voyageai
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI

BASE, KEY, MODEL = os.environ["BASE"], os.environ["API_KEY"], os.environ["MODEL"]
TEXTS = ["a cat purrs", "rain"]
CHAT = os.environ["CHAT_MODEL"]
QUESTION = [{"role": "user", "content": "hello"}]

two = cohere.ClientV2(api_key=KEY, base_url=BASE)
one = cohere.Client(api_key=KEY, base_url=BASE)
voyage = voyageai.Client(api_key=KEY, base_url=f"{BASE}/v1")
chain = ChatOpenAI(model=CHAT, base_url=f"{BASE}/v1", api_key=KEY)
hugging_face = InferenceClient(model=f"{BASE}/embed", token=KEY)


def say(name: str, call: Callable[[], Any]) -> None:
    try:
        value = call()
    except Exception as error:  # noqa: BLE001 - what a client raises is what is looked at
        print(json.dumps([name, False, f"{type(error).__name__}: {error}"]))
    else:
        print(json.dumps([name, True, value]))


def cohere_embed(**fields: Any) -> Any:
    return two.embed(model=MODEL, texts=TEXTS, input_type="search_document", **fields).embeddings


say("cohere embed float", lambda: cohere_embed(embedding_types=["float"]).float_)
say("cohere embed int8", lambda: cohere_embed(embedding_types=["int8"]).int8)
say("cohere embed v1", lambda: one.embed(model=MODEL, texts=TEXTS, input_type="search_query").embeddings)
say(
    "cohere rerank",
    lambda: [
        [each.index, each.relevance_score]
        for each in two.rerank(model=MODEL, query="feline", documents=TEXTS).results
    ],
)
say(
    "cohere rerank v1",
    lambda: [
        [each.index, each.relevance_score]
        for each in one.rerank(model=MODEL, query="feline", documents=TEXTS).results
    ],
)
say("cohere refused", lambda: two.rerank(model="nope", query="a", documents=TEXTS))
say("voyage embed", lambda: voyage.embed(TEXTS, model=MODEL, input_type="document").embeddings)
say(
    "voyage embed int8",
    lambda: voyage.embed(TEXTS, model=MODEL, output_dtype="int8", output_dimension=8).embeddings,
)
say(
    "voyage rerank",
    lambda: [
        [each.index, each.relevance_score] for each in voyage.rerank("feline", TEXTS, model=MODEL).results
    ],
)
say("voyage refused", lambda: voyage.embed(TEXTS, model="nope"))
say("hugging face embed", lambda: hugging_face.feature_extraction(TEXTS[0]).tolist())
say("hugging face refused", lambda: hugging_face.feature_extraction("word " * 900))


def lite(**fields: Any) -> Any:
    return litellm.completion(
        model=f"openai/{CHAT}", api_base=f"{BASE}/v1", api_key=KEY, messages=QUESTION, **fields
    )


say("langchain chat", lambda: chain.invoke("hello").content)
say("langchain stream", lambda: "".join(chunk.content for chunk in chain.stream("hello")))
say("litellm chat", lambda: lite().choices[0].message.content)
say("litellm stream", lambda: "".join(c.choices[0].delta.content or "" for c in lite(stream=True)))
say("litellm refused", lambda: lite(temperature=3))
