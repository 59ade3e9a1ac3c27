"""One line for each call: JSON, or short ones for a terminal."""

from __future__ import annotations

from typing import Any

from gateway.call_kind import is_grpc, is_rest, is_true, is_unread
from gateway.replies import UNREAD_REQUEST_ID
from gateway.topology import LogFormat, LogTarget

Config = dict[str, Any]

_LOGGERS = "type.googleapis.com/envoy.extensions.access_loggers"
_ANY_CALL = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "method": "%REQ(:METHOD)%",
    # Without its query, where some callers put their key.
    "path": "%PATH(NQ:ORIG_OR_PATH)%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "pool": "%UPSTREAM_CLUSTER%",
    "endpoint": "%UPSTREAM_HOST%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "user_agent": "%REQ(USER-AGENT)%",
}
# A REST call has none, though Envoy would make one up from what the transcoder has left.
_GRPC_CALL = _ANY_CALL | {"grpc_status": "%GRPC_STATUS_NUMBER%"}
_UNREAD_CALL = _ANY_CALL | {"request_id": UNREAD_REQUEST_ID}

# What a service has answered stands in its own line already.
_OURS = "response.code_details != 'via_upstream'"
_SHORT = (
    "%START_TIME_LOCAL(%H:%M:%S)%  %REQ(:METHOD)% %PATH(NQ:ORIG_OR_PATH)%  %RESPONSE_CODE%  %DURATION% ms\n"
)


def access_log(target: LogTarget | None, form: LogFormat = "json") -> list[Config]:
    """Envoy's loggers: ``grpc_status`` stands in the lines of gRPC calls only.

    In the form ``text`` only calls that the gateway answered itself have a line.
    """
    if target is None:
        return []
    if target in ("stdout", "stderr"):
        kind = {"@type": f"{_LOGGERS}.stream.v3.{str(target).capitalize()}AccessLog"}
    else:
        kind = {"@type": f"{_LOGGERS}.file.v3.FileAccessLog", "path": str(target)}
    if form == "text":
        short = {"text_format_source": {"inline_string": _SHORT}}
        return [{"name": "short", "filter": is_true(_OURS), "typed_config": kind | {"log_format": short}}]
    return [
        {"name": name, "filter": calls, "typed_config": kind | {"log_format": {"json_format": fields}}}
        for name, calls, fields in (
            ("unread", is_unread(), _UNREAD_CALL),
            ("rest", is_rest(), _ANY_CALL),
            ("grpc", is_grpc(), _GRPC_CALL),
        )
    ]
