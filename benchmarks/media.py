"""Pictures, sounds and films: each stage of jina-embeddings-v5-omni, and all of them through the engine.

    python -m benchmarks.media [--size nano] [--size small] [--layers 2] [--calls 3] [--only pictures ...]

Widths are the published ones, weights random, towers and decoder shallower so that all takes three minutes of
a small machine (``--layers 0`` for all layers). The picture is a photograph of 1 megapixel, the sound a
minute of it at 44.1 kHz in FLAC, of which 30 seconds are heard, the film 10 seconds of 720p in H.264 with
AAC. Rates are of what was sent: pictures a second, and seconds of sound or film a second. transformers' own
classes run the same weights in the same format of numbers with sdpa, from the opened input as ours do from
preparing on: "times" are theirs over ours. Through the engine several calls of one input each are under way
at a time, so decoding overlaps with the network. The last line is of texts alone, beside the text model with
the same weights.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import soundfile
import torch
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.catalog.types import Modality, ModelSpec
from services.core.content import Fit, Media, Opened
from services.core.inference import EmbeddingModel, EmbedOptions, Engine
from services.core.media.room import MediaRoom
from services.core.modeling.families.encoder import Encoder
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, PrepareOptions
from services.core.settings import Settings
from tests.omni_checkpoints import write_omni, write_text_of
from tests.omni_references import Omni

T = TypeVar("T")

_TEXT = {
    "nano": {"hidden_size": 768, "layers": 12, "heads": 12, "key_heads": 12, "head_dim": 64, "context": 8192},
    "small": {
        "hidden_size": 1024,
        "layers": 28,
        "heads": 16,
        "key_heads": 8,
        "head_dim": 128,
        "context": 32768,
    },
}
_VISION = {
    "nano": {"hidden_size": 768, "depth": 12, "num_heads": 12, "intermediate_size": 3072},
    "small": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "intermediate_size": 4096},
}
_AUDIO = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
_FILM_SECONDS, _FILM_RATE = 10, 24
_SOUND_SECONDS = 60


def photograph() -> bytes:
    """A JPEG of 1280 x 854."""
    source = Pillow.fromarray(load_sample_images().images[0])
    file = io.BytesIO()
    source.resize((source.width * 2, source.height * 2)).save(file, "JPEG", quality=90)
    return file.getvalue()


def sound() -> bytes:
    """A minute of noise that fades in and out, in stereo."""
    random = np.random.default_rng(0)
    count = _SOUND_SECONDS * 44_100
    loudness = 0.5 + 0.4 * np.sin(np.arange(count) / 44_100)
    file = io.BytesIO()
    soundfile.write(file, random.normal(0, 0.1, (count, 2)) * loudness[:, None], 44_100, format="FLAC")
    return file.getvalue()


def film(height: int) -> bytes:
    """A photograph that moves, with a tone."""
    source = load_sample_images().images[1]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=_FILM_RATE)
        width = height * 16 // 9 // 2 * 2
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        audio = target.add_stream("aac", rate=48_000, layout="mono")
        whole = np.asarray(Pillow.fromarray(source).resize((1600, 1067)))
        for number in range(_FILM_SECONDS * _FILM_RATE):
            view = np.ascontiguousarray(whole[number : number + height, number : number + width])
            target.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        target.mux(stream.encode(None))
        tone = np.sin(np.arange(_FILM_SECONDS * 48_000) / 20).astype(np.float32)[None] / 2
        for start in range(0, tone.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(tone[:, start : start + 1024].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = 48_000, start
            target.mux(audio.encode(frame))
        target.mux(audio.encode(None))
    return file.getvalue()


INPUTS = {
    "pictures": (Modality.IMAGE, photograph, 1),
    "seconds of sound": (Modality.AUDIO, sound, _SOUND_SECONDS),
    "seconds of film": (Modality.VIDEO, partial(film, 720), _FILM_SECONDS),
}


def write_model(folder: Path, size: str, layers: int | None) -> Path:
    """Write a checkpoint of the published size."""
    text, vision, audio = _TEXT[size], dict(_VISION[size]), dict(_AUDIO)
    if layers:
        vision["depth"] = audio["encoder_layers"] = layers
    vision |= {"num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"]}
    return write_omni(
        folder / f"jina-embeddings-v5-omni-{size}",
        size,
        towers={"vision_config": vision, "audio_config": audio},
        hidden_size=text["hidden_size"],
        num_hidden_layers=layers or text["layers"],
        max_window_layers=layers or text["layers"],
        num_attention_heads=text["heads"],
        num_key_value_heads=text["key_heads"],
        head_dim=text["head_dim"],
        intermediate_size=3072,
        max_position_embeddings=text["context"],
    )


async def opened(room: MediaRoom, fit: Fit | None, kind: Modality, data: bytes) -> Opened:
    async with room.open([("input 0", Media(kind, data))], fit, Call("benchmark")) as opening:
        (one,) = opening.take()
        return one


async def measure(size: str, chosen: argparse.Namespace) -> None:
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = f"jina-embeddings-v5-omni-{size}"
    stages = (
        "opening, one process",
        "preparing, one thread",
        "network",
        "transformers",
        "times",
        f"engine, {chosen.calls} calls at a time",
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder), size, chosen.layers)
        catalog = Catalog.load()
        network = load_network(catalog.require(name), directory, device=device, dtype=dtype)
        assert isinstance(network, Encoder)
        settings = Settings(models=(name,), model_dir=Path(folder), device=chosen.device, workers=1)
        room = MediaRoom(settings)
        stock = Omni(directory, "text-matching", dtype, "sdpa") if device.type == "cpu" else None
        engine = await Engine.start(settings, catalog, load=lambda *_: network, opener=room)
        layers = f"{chosen.layers} layers each" if chosen.layers else "all layers"
        print(f"{name}, {layers}, {dtype}, {torch.get_num_threads()} threads\n")
        print(
            f"| a second | tokens | {' | '.join(stages)} |\n| --- |{' --- |' * (1 + len(stages))}", flush=True
        )
        for what in chosen.only or INPUTS:
            kind, make, amount = INPUTS[what]
            data = film(chosen.height) if kind is Modality.VIDEO else make()
            tokens, times = await stage_seconds(
                network, engine.embedder(name), room, Media(kind, data), stock, chosen.calls
            )
            opening, preparing, forward, theirs, engined = times
            rates = [f"{amount / each:,.2f}" for each in (opening, preparing, forward, theirs)]
            beside = f"{theirs / (preparing + forward):.2f}"
            shown = " | ".join([*rates, beside, f"{chosen.calls * amount / engined:,.2f}"])
            print(f"| {what} | {tokens:,} | {shown} |", flush=True)
        if device.type == "cpu":
            mine, other = texts_seconds(network, directory, catalog.require(name.replace("omni", "text")))
            print(f"\ntexts: {mine:.3f} s, by the text model {other:.3f} s: {mine / other:.2f} times")
        print()
        await engine.stop(5.0)
        await room.aclose()


async def stage_seconds(
    network: Encoder, model: EmbeddingModel, room: MediaRoom, sent: Media, stock: Omni | None, calls: int
) -> tuple[int, list[float]]:
    """Return the tokens of an input, and the seconds of each stage; nan for ``stock`` where there is none."""
    found: list[float] = []

    def timed(work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - began)
        return result

    async def call() -> None:
        await model.embed([sent], EmbedOptions(), Call("benchmark"))

    assert isinstance(sent.source, bytes)
    await opened(room, network.processor.fit, sent.kind, sent.source)
    began = time.perf_counter()
    one = await opened(room, network.processor.fit, sent.kind, sent.source)
    found.append(time.perf_counter() - began)
    (prepared,) = timed(lambda: network.processor.prepare([one], PrepareOptions()))
    timed(lambda: network.forward([prepared.item]))
    if stock is None:
        found.append(float("nan"))
    else:
        timed(lambda: stock.vector([one]))
    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(calls)))
    found.append(time.perf_counter() - began)
    return len(prepared.item.token_ids), found


def texts_seconds(network: Encoder, directory: Path, text: ModelSpec) -> tuple[float, float]:
    """Return the best seconds of a batch of texts, by ``network`` and by the text model of its weights."""
    target = write_text_of(directory, directory.with_name(text.id))
    alone = load_network(text, target, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(alone, Encoder)
    items = [EncodeItem(np.full(128, 5, np.int32), adapter="text-matching")] * 16
    best = [float("inf"), float("inf")]
    for _ in range(7):
        for i, each in enumerate((network, alone)):
            began = time.perf_counter()
            results = each.forward(items)
            best[i] = min(best[i], time.perf_counter() - began)
            assert len(results) == len(items)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", action="append", choices=list(_TEXT))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", type=int, default=3, help="at a time through the engine")
    parser.add_argument("--height", type=int, default=720, help="of the film, in pixels")
    parser.add_argument("--only", action="append", choices=list(INPUTS))
    parser.add_argument("--layers", type=int, default=2, help="of towers and decoder, 0 for the published")
    chosen = parser.parse_args()
    for size in chosen.size or ["nano"]:
        asyncio.run(measure(size, chosen))


if __name__ == "__main__":
    main()
