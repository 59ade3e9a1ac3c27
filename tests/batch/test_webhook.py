"""Deliveries to a receiver that checks signatures by itself."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from services.batch.webhook import Outcome, Webhooks
from services.core.media.fetching import Limits
from services.core.settings import ConfigurationError, Settings
from tests.media.web import Request, answer, head, web

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NOW = 1_700_000_000.9
PAYLOAD = '{"batch_id": "batch_1", "status": "completed", "model": "é"}'.encode()

Make = Callable[..., Webhooks]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Webhooks] = []

    def webhooks(
        secret: str | None = SECRET, networks: tuple[str, ...] = ("127.0.0.1/32",), **how: Any
    ) -> Webhooks:
        settings = Settings(webhook_secret=secret, fetch_allow_networks=networks)  # type: ignore[arg-type]
        made.append(Webhooks(settings, clock=lambda: NOW, **how))
        return made[-1]

    yield webhooks
    for one in made:
        await one.close()


def expected(key: bytes, request: Request) -> str:
    """The signature as the convention has it, put together from what was received."""
    signed = (
        f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    )
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


async def test_a_delivery_is_signed(make: Make) -> None:
    async with web(answer(b"thanks")) as site:
        assert await make().deliver(site.url("/hook?x=1"), PAYLOAD, "evt_1_completed") is Outcome.DELIVERED
    (request,) = site.requests
    assert (request.method, request.target, request.body) == ("POST", "/hook?x=1", PAYLOAD)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == "evt_1_completed"
    assert request.headers["webhook-timestamp"] == "1700000000"
    assert request.headers["webhook-signature"] == expected(KEY, request)


def test_the_published_example_of_the_convention() -> None:
    """Secret, id, time, body and signature as the Standard Webhooks libraries test themselves with."""
    settings = Settings(webhook_secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")  # type: ignore[arg-type]
    webhooks = Webhooks(settings, clock=lambda: 1614265330.0)
    headers = webhooks._headers(b'{"test": 2432232314}', "msg_p5jXN8AQM9LWM0D4loKWxJek")
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_two_secrets_give_two_signatures(make: Make) -> None:
    async with web(answer(b"")) as site:
        await make(secret=f"{SECRET} plain-words").deliver(site.url(), PAYLOAD, "evt")
    (request,) = site.requests
    both = f"{expected(KEY, request)} {expected(b'plain-words', request)}"
    assert request.headers["webhook-signature"] == both


async def test_no_secret_no_signature(make: Make) -> None:
    async with web(answer(b"")) as site:
        assert await make(secret=None).deliver(site.url(), PAYLOAD, "evt") is Outcome.DELIVERED
    assert "webhook-signature" not in site.requests[0].headers
    assert "webhook-id" in site.requests[0].headers


def test_a_secret_that_is_no_base64_stops_the_start() -> None:
    with pytest.raises(ConfigurationError, match="SF_WEBHOOK_SECRET"):
        Webhooks(Settings(webhook_secret="whsec_%%%"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(status, Outcome.DELIVERED) for status in (200, 201, 202, 204)]
    + [(status, Outcome.RETRY) for status in (404, 408, 409, 425, 429, 500, 502, 503, 504)]
    + [(status, Outcome.REFUSED) for status in (301, 307, 400, 401, 403, 405, 410, 413, 422)],
)
async def test_statuses(make: Make, status: int, outcome: Outcome) -> None:
    async with web(answer(b"", status, Location="/elsewhere")) as site:
        assert await make().deliver(site.url(), PAYLOAD, "evt") is outcome
        assert len(site.requests) == 1


async def test_a_receiver_down_then_up(make: Make) -> None:
    webhooks = make()
    async with web(answer(b"")) as site:
        url, port = site.url(), site.port
    assert await webhooks.deliver(url, PAYLOAD, "evt_9") is Outcome.RETRY
    async with web(answer(b""), port=port) as site:
        assert await webhooks.deliver(url, PAYLOAD, "evt_9") is Outcome.DELIVERED
    assert [request.headers["webhook-id"] for request in site.requests] == ["evt_9"]


async def test_a_receiver_that_hangs_up_or_hangs(make: Make) -> None:
    async def rude(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/silent":
            await asyncio.sleep(3600)
        writer.close()

    webhooks = make(limits=Limits(idle_seconds=0.2, total_seconds=5.0))
    async with web(rude) as site:
        assert await webhooks.deliver(site.url("/rude"), PAYLOAD, "evt") is Outcome.RETRY
        assert await webhooks.deliver(site.url("/silent"), PAYLOAD, "evt") is Outcome.RETRY


async def test_a_receiver_that_answers_without_end_is_left(make: Make) -> None:
    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, None))
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with web(endless) as site:
        assert await make().deliver(site.url(), PAYLOAD, "evt") is Outcome.DELIVERED
        await site.gone.wait()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:{port}/",
        "http://localhost.:{port}/",
        "http://169.254.169.254/",
        "http://[::ffff:10.0.0.1]/",
        "http://10.0.0.1/",
        "ftp://example.org/",
        "http://user:hidden@127.0.0.1:{port}/",
        "nonsense",
    ],
)
async def test_private_and_odd_urls_are_refused(make: Make, url: str) -> None:
    webhooks = make(networks=())
    async with web(answer(b"")) as site:
        said = await webhooks.check_url(url.format(port=site.port))
        assert said is not None
        assert "hidden" not in said
        assert await webhooks.deliver(url.format(port=site.port), PAYLOAD, "evt") is Outcome.REFUSED
        assert not site.requests


async def test_a_good_url_passes_the_check(make: Make) -> None:
    assert await make().check_url("http://127.0.0.1:9/hook") is None


async def test_a_name_that_turns_inside_after_the_check(make: Make) -> None:
    addresses = iter([["127.0.0.1"], ["127.0.0.9"]])

    async def turning(host: str, port: int) -> list[str]:
        return next(addresses)

    webhooks = make(resolver=turning)
    async with web(answer(b""), "127.0.0.9") as inner:
        url = inner.url(host="turns.example")
        assert await webhooks.check_url(url) is None
        assert await webhooks.deliver(url, PAYLOAD, "evt") is Outcome.REFUSED
        assert not inner.requests
