"""Deliveries, their signatures checked by the library of the convention."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from services.batch.tables import BATCH
from services.batch.webhook import Delivery, Webhooks, WebhookSecrets
from services.core.errors import ServiceError
from services.core.media.fetching import FetchLimits
from services.core.settings import ConfigurationError, Settings
from services.core.storage import Database
from tests.media.web import Request, answer, head, web

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PAYLOAD = '{"batch_id": "batch_1", "status": "completed", "model": "é"}'.encode()

Make = Callable[..., Webhooks]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(Settings(data_dir=tmp_path), BATCH)
    yield database
    await database.close()


@pytest.fixture
async def make(database: Database) -> AsyncIterator[Make]:
    made: list[Webhooks] = []

    def webhooks(
        secret: str | None = SECRET, networks: tuple[str, ...] = ("127.0.0.1/32",), **how: Any
    ) -> Webhooks:
        settings = Settings(webhook_secret=secret, fetch_allow_networks=networks)  # type: ignore[arg-type]
        made.append(Webhooks(settings, WebhookSecrets(settings, database), **how))
        return made[-1]

    yield webhooks
    for one in made:
        await one.close()


def verified(request: Request, secret: str) -> Any:
    """What the library takes the request to say; it raises for a signature that does not fit."""
    return Webhook(secret).verify(request.body, request.headers)


def encoded(word: str) -> str:
    """A secret that is a word, as the library wants it."""
    return base64.b64encode(word.encode()).decode()


async def test_a_delivery_is_signed(make: Make) -> None:
    async with web(answer(b"thanks")) as site:
        assert await make().deliver(site.url("/hook?x=1"), PAYLOAD, "evt_1_completed") is Delivery.DELIVERED
    (request,) = site.requests
    assert (request.method, request.target, request.body) == ("POST", "/hook?x=1", PAYLOAD)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == "evt_1_completed"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 60
    assert verified(request, SECRET) == json.loads(PAYLOAD)
    with pytest.raises(WebhookVerificationError):
        verified(request, "whsec_" + encoded("another"))


async def test_the_published_example_of_the_convention(make: Make) -> None:
    """Secret, id, time, body and signature as the Standard Webhooks libraries test themselves with."""
    webhooks = make(secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", clock=lambda: 1614265330.0)
    async with web(answer(b"")) as site:
        await webhooks.deliver(site.url(), b'{"test": 2432232314}', "msg_p5jXN8AQM9LWM0D4loKWxJek")
    signature = site.requests[0].headers["webhook-signature"]
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_two_secrets_give_two_signatures(make: Make) -> None:
    async with web(answer(b"")) as site:
        await make(secret=f"{SECRET} plain-words").deliver(site.url(), PAYLOAD, "evt")
    (request,) = site.requests
    assert len(request.headers["webhook-signature"].split()) == 2
    assert verified(request, SECRET) == verified(request, encoded("plain-words")) == json.loads(PAYLOAD)


@pytest.mark.parametrize("unset", [None, "", " "])
async def test_without_a_secret_of_the_operator_one_is_made(
    make: Make, database: Database, unset: str | None
) -> None:
    async with web(answer(b"")) as site:
        # Two processes that start together sign with the same one.
        together = (make(secret=unset).deliver(site.url(), PAYLOAD, f"evt_{n}") for n in range(2))
        assert await asyncio.gather(*together) == [Delivery.DELIVERED] * 2
    (secret,) = await WebhookSecrets(Settings(), database).current()
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    for request in site.requests:
        assert verified(request, secret) == json.loads(PAYLOAD)


async def test_a_secret_is_changed_while_receivers_change_over(make: Make, database: Database) -> None:
    secrets = WebhookSecrets(Settings(), database)
    (old,) = await secrets.current()
    new, kept = await secrets.rotate()
    assert kept == old != new
    webhooks = make(secret=None)
    async with web(answer(b"")) as site:
        await webhooks.deliver(site.url(), PAYLOAD, "evt")
        assert await secrets.retire() == (new,)
        await webhooks.deliver(site.url(), PAYLOAD, "evt")
    both, alone = site.requests
    assert verified(both, old) == verified(both, new) == verified(alone, new)
    with pytest.raises(WebhookVerificationError):
        verified(alone, old)
    assert await secrets.rotate() != await secrets.rotate()
    assert len(await secrets.current()) == 2


async def test_nothing_goes_out_unsigned_while_the_secret_cannot_be_read(
    make: Make, database: Database, tmp_path: Path
) -> None:
    await database.close()
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    tmp_path.write_bytes(b"in the way")
    async with web(answer(b"")) as site:
        with pytest.raises(ServiceError):
            await make(secret=None).deliver(site.url(), PAYLOAD, "evt")
        assert not site.requests
        assert await make().deliver(site.url(), PAYLOAD, "evt") is Delivery.DELIVERED


@pytest.mark.parametrize("secret", ["whsec_%%%", "whsec_", f"{SECRET} whsec_x"])
def test_a_secret_that_cannot_sign_stops_the_start(make: Make, secret: str) -> None:
    with pytest.raises(ConfigurationError, match="SF_WEBHOOK_SECRET"):
        make(secret=secret)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(status, Delivery.DELIVERED) for status in (200, 201, 202, 204)]
    + [(status, Delivery.RETRY) for status in (404, 408, 409, 425, 429, 500, 502, 503, 504)]
    + [(status, Delivery.REFUSED) for status in (301, 307, 400, 401, 403, 405, 410, 413, 422)],
)
async def test_statuses(make: Make, status: int, outcome: Delivery) -> None:
    async with web(answer(b"", status, Location="/elsewhere")) as site:
        assert await make().deliver(site.url(), PAYLOAD, "evt") is outcome
        assert len(site.requests) == 1


async def test_a_receiver_down_then_up(make: Make) -> None:
    webhooks = make()
    async with web(answer(b"")) as site:
        url, port = site.url(), site.port
    assert await webhooks.deliver(url, PAYLOAD, "evt_9") is Delivery.RETRY
    async with web(answer(b""), port=port) as site:
        assert await webhooks.deliver(url, PAYLOAD, "evt_9") is Delivery.DELIVERED
    assert [request.headers["webhook-id"] for request in site.requests] == ["evt_9"]


async def test_a_receiver_that_hangs_up_or_hangs(make: Make) -> None:
    async def rude(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/silent":
            await asyncio.sleep(3600)
        writer.close()

    webhooks = make(limits=FetchLimits(idle_seconds=0.2, total_seconds=5.0))
    async with web(rude) as site:
        assert await webhooks.deliver(site.url("/rude"), PAYLOAD, "evt") is Delivery.RETRY
        assert await webhooks.deliver(site.url("/silent"), PAYLOAD, "evt") is Delivery.RETRY


async def test_a_receiver_that_answers_without_end_is_left(make: Make) -> None:
    async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, None))
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with web(endless) as site:
        assert await make().deliver(site.url(), PAYLOAD, "evt") is Delivery.DELIVERED
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
        assert await webhooks.deliver(url.format(port=site.port), PAYLOAD, "evt") is Delivery.REFUSED
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
        assert await webhooks.deliver(url, PAYLOAD, "evt") is Delivery.REFUSED
        assert not inner.requests
