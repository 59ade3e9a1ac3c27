"""What the bodies of OpenAI's batches may hold, for the gateway, too, which needs nothing of the adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

ENDPOINT = "/v1/embeddings"
"""What a line calls."""

WINDOW = "24h"

_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class BatchBody(BaseModel):
    """Body of ``POST /openai/v1/batches``."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input_file_id: str = Field(description="Id of an uploaded file of lines.")
    endpoint: Literal["/v1/embeddings"] = Field(description="What the lines call.")
    completion_window: Literal["24h"] = Field(description="In which the batch is done, or expires.")
    metadata: dict[_Key, _Value] | None = Field(None, max_length=16, description="Told again with the batch.")
