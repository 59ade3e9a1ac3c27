"""Calls of the clients of ``make soak``, which take long to install; see ``told.py`` for what is printed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from told import BASE, CLIP, KEY, MODEL, NOPE, PICTURE, QUERY, TEXTS, V1, call, main, ranked

# Cohere's SDK as it is today


def cohere_client() -> Any:
    import cohere

    return cohere.ClientV2(api_key=KEY, base_url=BASE)


@call
def cohere_embed() -> Any:
    answer = cohere_client().embed(
        model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["float"]
    )
    return answer.embeddings.float_


@call
def cohere_rerank() -> Any:
    return ranked(cohere_client().rerank(model=MODEL, query=QUERY, documents=TEXTS).results)


@call
def cohere_refused() -> Any:
    return cohere_client().rerank(model=NOPE, query=QUERY, documents=TEXTS)


# Chroma, whose function has no argument for the address


def chroma(model: str) -> Any:
    from chromadb.utils.embedding_functions import JinaEmbeddingFunction

    function = JinaEmbeddingFunction(api_key=KEY, model_name=model)
    function._api_url = f"{V1}/embeddings"
    return function


@call
def chroma_embed() -> Any:
    return [each.tolist() for each in chroma(MODEL)(TEXTS)]


@call
def chroma_pictures() -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(PICTURE) as picture:
        pixels = np.asarray(picture)
    return [each.tolist() for each in chroma(CLIP)([pixels])]


@call
def chroma_collection() -> Any:
    import chromadb

    collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=chroma(MODEL))
    collection.add(ids=["0", "1"], documents=TEXTS)
    return collection.query(query_texts=[TEXTS[1]], n_results=1)["documents"]


@call
def chroma_refused() -> Any:
    return chroma(NOPE)(TEXTS)


# LanceDB


def lance(model: str) -> Any:
    from lancedb.embeddings import jinaai

    jinaai.API_URL = f"{V1}/embeddings"
    return jinaai.JinaEmbeddings(name=model, api_key=KEY)


@call
def lance_embed() -> Any:
    return lance(MODEL).compute_source_embeddings(TEXTS)


@call
def lance_pictures() -> Any:
    return lance(CLIP).compute_source_embeddings([Path(PICTURE).read_bytes()])


@call
def lance_rerank() -> Any:
    import pyarrow as pa
    from lancedb.rerankers import JinaReranker
    from lancedb.rerankers import jinaai as module

    module.API_URL = f"{V1}/rerank"
    table = pa.table({"text": TEXTS, "at": [0, 1], "_distance": [0.0, 0.0]})
    found = JinaReranker(model_name=MODEL, api_key=KEY).rerank_vector(QUERY, table)
    return [[each["at"], each["_relevance_score"]] for each in found.to_pylist()]


@call
def lance_refused() -> Any:
    return lance(NOPE).compute_source_embeddings(TEXTS)


# Milvus, whose modules are loaded when they are used


def milvus(kind: str, path: str) -> Any:
    module = import_module(f"milvus_model.{kind}.jinaai")
    module.API_URL = f"{V1}/{path}"
    return module


@call
def milvus_embed() -> Any:
    function = milvus("dense", "embeddings").JinaEmbeddingFunction(model_name=MODEL, api_key=KEY)
    assert function.dim == len(function.encode_queries(TEXTS)[0])
    return [each.tolist() for each in function.encode_documents(TEXTS)]


@call
def milvus_rerank() -> Any:
    found = milvus("reranker", "rerank").JinaRerankFunction(model_name=MODEL, api_key=KEY)(QUERY, TEXTS)
    return [[each.index, each.score] for each in found]


@call
def milvus_refused() -> Any:
    return milvus("dense", "embeddings").JinaEmbeddingFunction(model_name=NOPE, api_key=KEY)(TEXTS)


# LightRAG


@call
async def lightrag_embed() -> Any:
    from lightrag.llm.jina import jina_embed

    found = await jina_embed.func(
        TEXTS, model=MODEL, embedding_dim=384, base_url=f"{V1}/embeddings", api_key=KEY
    )
    return found.tolist()


@call
async def lightrag_rerank() -> Any:
    from lightrag.rerank import jina_rerank

    found = await jina_rerank(QUERY, TEXTS, model=MODEL, base_url=f"{V1}/rerank", api_key=KEY)
    return [[each["index"], each["relevance_score"]] for each in found]


@call
async def lightrag_refused() -> Any:
    from lightrag.rerank import jina_rerank
    from tenacity import RetryError

    try:
        return await jina_rerank(QUERY, TEXTS, model=NOPE, base_url=f"{V1}/rerank", api_key=KEY)
    except RetryError as error:
        # It tries again whatever the reason, and logs that each time.
        raise error.last_attempt.exception() from None


# mem0, agno and rerankers


def mem0(model: str) -> Any:
    from mem0.configs.embeddings.base import BaseEmbedderConfig
    from mem0.embeddings.openai import OpenAIEmbedding

    return OpenAIEmbedding(BaseEmbedderConfig(model=model, api_key=KEY, openai_base_url=V1))


@call
def mem0_embed() -> Any:
    return mem0(MODEL).embed_batch(TEXTS)


@call
def mem0_refused() -> Any:
    return mem0(NOPE).embed_batch(TEXTS)


def agno(model: str) -> Any:
    from agno.knowledge.embedder.jina import JinaEmbedder

    return JinaEmbedder(id=model, api_key=KEY, base_url=f"{V1}/embeddings", dimensions=384)


@call
def agno_embed() -> Any:
    return [agno(MODEL).get_embedding(text) for text in TEXTS]


@call
def rerankers_rerank() -> Any:
    from rerankers import Reranker

    reranker = Reranker(MODEL, model_type="jina", api_key=KEY, url=f"{V1}/rerank")
    results = reranker.rank(query=QUERY, docs=TEXTS, doc_ids=[0, 1]).results
    return [[each.document.doc_id, each.score] for each in results]


if __name__ == "__main__":
    main()
