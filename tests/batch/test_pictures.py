"""Lines with pictures and PDFs: each line's answer is that of a call of its own."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import orjson
from PIL import Image as Pillow

from tests import vision_references as reference
from tests.batch.rig import rig
from tests.media.pictures import A4, noise, pdf, saved
from tests.rig import settings
from tests.vision_checkpoints import MAX_PIXELS, V4, write_served


async def test_every_line_has_its_own_rows(tmp_path: Path) -> None:
    folder = write_served(tmp_path / "models", V4)
    picture = saved(noise(90, 60))
    image = {"image": base64.b64encode(picture).decode()}
    inputs = [
        ["a dog", image],
        {"pdf": base64.b64encode(pdf(A4, A4)).decode()},
        "a dog",
        [{"image": "wrong!"}],
    ]
    lines = [{"custom_id": str(n), "body": {"input": each}} for n, each in enumerate(inputs)]
    chosen = settings(models=(V4,), model_dir=tmp_path / "models", data_dir=tmp_path / "data")
    async with rig(chosen) as up:
        job = await up.create(lines, model=V4)
        status = await up.wait(job)
        assert (status["stats"]["completed"], status["stats"]["failed"]) == (3, 1)
        written = [orjson.loads(line) for line in (await up.download(job)).splitlines()]
    bodies = {each["custom_id"]: each["response"]["body"] for each in written}
    opened = Pillow.open(io.BytesIO(picture)).convert("RGB")
    text, seen = (
        reference.embedding(folder, each, task="text-matching", limits=(3136, MAX_PIXELS))
        for each in ("a dog", opened)
    )
    rows = {name: [item["embedding"] for item in body["data"]] for name, body in bodies.items()}
    np.testing.assert_allclose(rows["0"], [text, seen], atol=1e-5)
    np.testing.assert_allclose(rows["2"], [text], atol=1e-5)
    assert len(rows["1"]) == 2
    assert bodies["0"]["usage"]["image_tokens"] == 6
    assert bodies["1"]["usage"]["image_tokens"] == 2 * 54
    total = sum(body["usage"]["total_tokens"] for body in bodies.values())
    assert status["stats"]["total_tokens"] == total
