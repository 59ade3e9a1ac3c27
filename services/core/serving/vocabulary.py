"""Numbers of the contract's enums for the words of the catalogue."""

from __future__ import annotations

from searchfoundation.v1 import common_pb2

from services.core.catalog.types import Modality, OutputKind

TASKS = {
    "retrieval.query": common_pb2.TASK_RETRIEVAL_QUERY,
    "retrieval.passage": common_pb2.TASK_RETRIEVAL_PASSAGE,
    "text-matching": common_pb2.TASK_TEXT_MATCHING,
    "classification": common_pb2.TASK_CLASSIFICATION,
    "clustering": common_pb2.TASK_CLUSTERING,
    "separation": common_pb2.TASK_SEPARATION,
    "code.query": common_pb2.TASK_CODE_QUERY,
    "code.passage": common_pb2.TASK_CODE_PASSAGE,
    "nl2code.query": common_pb2.TASK_NL2CODE_QUERY,
    "nl2code.passage": common_pb2.TASK_NL2CODE_PASSAGE,
    "qa.query": common_pb2.TASK_QA_QUERY,
    "qa.passage": common_pb2.TASK_QA_PASSAGE,
    "code2code.query": common_pb2.TASK_CODE2CODE_QUERY,
    "code2code.passage": common_pb2.TASK_CODE2CODE_PASSAGE,
    "code2nl.query": common_pb2.TASK_CODE2NL_QUERY,
    "code2nl.passage": common_pb2.TASK_CODE2NL_PASSAGE,
    "code2completion.query": common_pb2.TASK_CODE2COMPLETION_QUERY,
    "code2completion.passage": common_pb2.TASK_CODE2COMPLETION_PASSAGE,
}

MODALITIES = {
    Modality.TEXT: common_pb2.MODALITY_TEXT,
    Modality.IMAGE: common_pb2.MODALITY_IMAGE,
    Modality.PDF: common_pb2.MODALITY_PDF,
    Modality.AUDIO: common_pb2.MODALITY_AUDIO,
    Modality.VIDEO: common_pb2.MODALITY_VIDEO,
}

OUTPUTS = {
    OutputKind.DENSE: common_pb2.OUTPUT_KIND_DENSE,
    OutputKind.MULTI_VECTOR: common_pb2.OUTPUT_KIND_MULTI_VECTOR,
    OutputKind.SPARSE: common_pb2.OUTPUT_KIND_SPARSE,
    OutputKind.SCORE: common_pb2.OUTPUT_KIND_SCORE,
    OutputKind.TEXT: common_pb2.OUTPUT_KIND_TEXT,
}

_TASK_NAMES = {int(number): task for task, number in TASKS.items()}


def task_name(number: int) -> str:
    """The word for a task; its number, which no model takes, for one added after this server was built."""
    return _TASK_NAMES.get(number, str(number))
