"""Nobody's body keeps the event loop, so that nobody waits for another's."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from searchfoundation.v1 import embed_pb2, embed_pb2_grpc
from searchfoundation.v1.common_pb2 import Content

from tests.e2e.worst import MIB, Worst, calls, many_texts
from tests.gateway.client import call
from tests.stack import MODEL, Stack

CAPABILITIES = ("embed", "rerank", "classify", "batch")
MOST_UNITS = 2.0
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def send(channel: grpc.Channel, worst: Worst, key: str = "") -> grpc.StatusCode:
    """Make the call at a door of gRPC, and tell how it ended."""
    method = channel.unary_unary(
        worst.method,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=Empty.FromString,
    )
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    try:
        method(worst.message, timeout=120, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined]
    return grpc.StatusCode.OK


def test_no_step_of_the_event_loop_is_long(tmp_path: Path) -> None:
    """In CPU, and against a piece of work of the same process: not in time, which is the machine's."""
    report = tmp_path / "steps"
    with Stack(tmp_path, {"SF_AUTH": "false", "SF_PROBE_FILE": str(report)}) as stack:
        services = stack.serve(*CAPABILITIES, module="tests.e2e.loop_probe")
        taken: dict[str, float] = {}
        with grpc.insecure_channel(services.address, UNBOUNDED) as channel, report.open() as lines:
            unit = float(lines.readline())
            kinds = [*calls(4 * MIB), many_texts()]
            assert send(channel, kinds[0]) is grpc.StatusCode.OK
            lines.read()  # what the start took, and the first call
            for worst in kinds:
                for _ in range(3):  # what a body costs, it costs each time
                    code = send(channel, worst)
                    assert code is grpc.StatusCode.OK or code in REFUSED, (worst.name, code)
                    steps = max(map(float, lines), default=0.0) / unit
                    taken[worst.name] = min(steps, taken.get(worst.name, steps))
                    if steps < MOST_UNITS:
                        break
    assert taken
    longest = max(taken, key=lambda name: taken[name])
    print(f"unit {unit * 1e3:.1f} ms; longest step {taken[longest]:.2f} units: {longest}")
    assert taken[longest] < MOST_UNITS, sorted(taken.items(), key=lambda item: -item[1])[:8]


@dataclass
class Light:
    """Somebody else's short calls, over REST and gRPC by turns: when each began, and how long it took."""

    stack: Stack
    key: str
    taken: list[float] = field(default_factory=list)
    failures: list[Any] = field(default_factory=list)

    def __enter__(self) -> Light:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def p95(self) -> float:
        """Of the calls since it was asked last."""
        taken, self.taken = self.taken, []
        return statistics.quantiles(taken, n=20)[-1]

    def _run(self) -> None:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        body = b'{"model":"%s","input":"hello"}' % MODEL.encode()
        request = embed_pb2.EmbedRequest(model=MODEL, inputs=[Content(text="hello")])
        with grpc.insecure_channel(f"127.0.0.1:{self.stack.grpc_port}") as channel:
            typed = embed_pb2_grpc.EmbedServiceStub(channel)
            while not self._stop.is_set():
                began = time.monotonic()
                answer = call(self.stack.http_port, "POST", "/v1/embeddings", body, headers)
                if answer.status != 200:
                    self.failures.append(answer)
                self.taken.append(time.monotonic() - began)
                began = time.monotonic()
                try:
                    typed.Embed(request, timeout=120, metadata=(("authorization", f"Bearer {self.key}"),))
                except grpc.RpcError as error:
                    self.failures.append(error)
                self.taken.append(time.monotonic() - began)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as own:
        own.serve(*CAPABILITIES)
        own.gateway()
        yield own


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_others_hardly_feel_the_worst_bodies(stack: Stack) -> None:
    """Two callers send each of them for some seconds; the idle time before and after each is what counts."""
    heavy, light = (stack.create_key("--name", name) for name in ("heavy", "light"))
    over: list[str] = []
    with (
        Light(stack, light) as other,
        grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port}", UNBOUNDED) as door,
    ):
        time.sleep(3)
        other.p95()
        for worst in calls(15 * MIB):
            time.sleep(2)  # of the other's calls alone
            idle = other.p95()
            end = time.monotonic() + 5

            def attack(worst: Worst = worst, end: float = end) -> None:
                headers = {"authorization": f"Bearer {heavy}", "content-type": "application/json"}
                while time.monotonic() < end:
                    if worst.path:
                        call(stack.http_port, "POST", worst.path, worst.body, headers, timeout=300)
                    else:
                        send(door, worst, heavy)

            attackers = [threading.Thread(target=attack) for _ in range(2)]
            for attacker in attackers:
                attacker.start()
            for attacker in attackers:
                attacker.join()
            beside = other.p95()
            line = f"{worst.name:40} p95 {idle * 1e3:6.0f} ms idle {beside * 1e3:6.0f} ms beside it"
            print(line, flush=True)
            if beside > 3 * idle or beside > idle + 0.1:
                over.append(line)
    assert not other.failures, other.failures[:3]
    assert not over
