"""Pictures: images/s of decoding, scaling, the vision tower, and of the engine over all of them.

    python -m benchmarks.images [--network v1|v2] [--device cuda] [--layers N] [--images N] [--rounds 2]

The tower has the published size and random weights; the pictures are photographs of 1 to 4 megapixels, in
JPEG, scaled from those that scikit-learn carries. The plain way is a loop as one writes it with Pillow and
torch modules: open, convert, scale, norm, run four at a time, in one thread of Python. Through the engine
several calls of one picture each are under way at a time, so decoding overlaps with the tower. The share of
the ceiling counts the tower's products, attention included, against bare ones of its shapes.

On two cores with AVX2 both networks take some three minutes, most of them v2, whose tower needs a tera
operation for a picture: how many pictures there are follows from the time of one. Rounds of tower, loop and
engine take turns, so that they share whatever else the machine does; the least of each counts. Of v2's tower
96 % are products and attention (profiled on AVX2 in fp32), which the loop has as well, and decoding is a
hundredth of it: where the processor is what is short, little is left to overlap.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.catalog.types import Modality
from services.core.content import Media
from services.core.inference import EmbedOptions, Engine
from services.core.media.pictures import Fit, fitted
from services.core.media.room import MediaRoom
from services.core.modeling.families.clip import Clip
from services.core.modeling.families.eva import EvaConfig
from services.core.modeling.registry import load_network
from services.core.modeling.types import EncodeItem, Feature
from services.core.settings import Settings
from tests.clip_checkpoints import MEAN, STD, write_clip

NAMES = {"v1": "jina-clip-v1", "v2": "jina-clip-v2"}
TOWERS = {
    "v1": {"width": 768, "layers": 12, "image_size": 224, "patch_size": 16, "pt_hw_seq_len": 14},
    "v2": {"width": 1024, "layers": 24, "image_size": 512, "patch_size": 14, "pt_hw_seq_len": 16},
}
_CALLS = 4
_TOWER, _LOOP = "vision tower", "plain loop, all of it"
_ENGINE = f"engine, all of it, {_CALLS} calls at a time"
_MOST_IMAGES = 8
_SECONDS = 60.0
"""About how long the rounds of one network may take."""


def photographs(count: int) -> list[bytes]:
    """JPEGs of 1 to 4 megapixels."""
    sources = [Pillow.fromarray(image) for image in load_sample_images().images]
    files: list[bytes] = []
    for number in range(count):
        source, scale = sources[number % 2], (2, 3, 4)[number % 3]
        file = io.BytesIO()
        source.resize((source.width * scale, source.height * scale)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


class Plain(nn.Module):
    """The tower as torch modules, one operation after the other; random weights."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width, inner = config.width, config.inner
        self.config = config
        self.cut = nn.Conv2d(3, width, config.patch, config.patch)
        self.places = nn.Parameter(torch.zeros(config.tokens, width))
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.turns = nn.Parameter(torch.zeros(config.tokens, width // config.heads))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("q", "k", "v", "out")},
                    **{name: nn.LayerNorm(width) for name in ("norm1", "norm2", "inner")},
                    **{name: nn.Linear(width, inner) for name in ("gate", "up")},
                    "middle": nn.LayerNorm(inner),
                    "down": nn.Linear(inner, width),
                }
            )
            for _ in range(config.layers)
        )

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.turns.cos() + pairs * self.turns.sin()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.cut(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        form = (len(x), self.config.tokens, self.config.heads, -1)
        for block in self.blocks:
            y = block["norm1"](x)
            q, k, v = (block[name](y).view(form).transpose(1, 2) for name in "qkv")
            mixed = scaled_dot_product_attention(self.turned(q), self.turned(k), v)
            x = x + block["out"](block["inner"](mixed.transpose(1, 2).flatten(2)))
            y = block["norm2"](x)
            x = x + block["down"](block["middle"](silu(block["gate"](y)) * block["up"](y)))
        return x[:, 0]


def fit_of(files: Sequence[bytes], side: int) -> list[np.ndarray]:
    fit = Fit(side, "shortest", "bicubic", 0)
    return [np.asarray(fitted(Pillow.open(io.BytesIO(data)).convert("RGB"), fit)) for data in files]


def plain_loop(
    model: Plain, files: Sequence[bytes], side: int, device: torch.device, dtype: torch.dtype
) -> None:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.inference_mode():
        for start in range(0, len(files), 4):
            pictures = [torch.from_numpy(each.copy()) for each in fit_of(files[start : start + 4], side)]
            normed = [(each.permute(2, 0, 1).float() / 255 - mean) / std for each in pictures]
            model(torch.stack(normed).to(device, dtype)).cpu()


def operations(config: EvaConfig) -> float:
    """Multiplications and additions of the tower for one picture."""
    width, tokens = config.width, config.tokens
    products = 4 * width * width + 3 * width * config.inner
    return 2.0 * config.layers * tokens * (products + 2 * tokens * width)


def ceiling(config: EvaConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the bare products of one block."""
    rows = config.tokens if device.type == "cpu" else 8 * config.tokens
    shapes = [(3 * config.width, config.width), (config.width, config.width)]
    shapes += [(2 * config.inner, config.width), (config.width, config.inner)]
    work = seconds = 0.0
    for out, into in shapes:
        x = torch.randn(rows, into, device=device, dtype=dtype)
        weight = torch.randn(out, into, device=device, dtype=dtype)
        seconds += least(lambda x=x, weight=weight: linear(x, weight), device, 5)
        work += 2.0 * rows * out * into
    return work / seconds


def least(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Least seconds of some runs, after one that does not count."""
    times: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


async def take_turns(
    folder: Path,
    network: str,
    files: Sequence[bytes],
    device: str,
    others: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, float]:
    """Least seconds of each of ``others``, and for all files through room and engine, in turns.

    ``_CALLS`` calls of one file are under way at a time.
    """
    # In float32, as the others: the share of its stages is asked for, not that of a number format.
    dtype = "auto" if device == "cuda" else "float32"
    settings = Settings(models=(NAMES[network],), model_dir=folder, device=device, dtype=dtype)
    room = MediaRoom(settings)
    engine = await Engine.start(settings, Catalog.load(), opener=room)
    model = engine.embedder(NAMES[network])
    turns = asyncio.Semaphore(_CALLS)
    times: dict[str, list[float]] = {name: [] for name in (*others, _ENGINE)}

    async def call(data: bytes) -> None:
        async with turns:
            await model.embed([Media(Modality.IMAGE, data)], EmbedOptions(), Call("benchmark"))

    try:
        await call(files[0])  # which starts a decoding process
        for _ in range(rounds):
            for name, run in others.items():
                began = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            await asyncio.gather(*map(call, files))
            times[_ENGINE].append(time.perf_counter() - began)
    finally:
        await engine.stop(5.0)
        await room.aclose()
    return {name: min(taken) for name, taken in times.items()}


def count_of(one: float, chosen: argparse.Namespace) -> int:
    """How many pictures keep the rounds within ``_SECONDS``; an even number, for as many workers."""
    return chosen.images or max(2, min(_MOST_IMAGES, 2 * int(_SECONDS / (6 * chosen.rounds * one))))


def measure(network: str, chosen: argparse.Namespace) -> None:
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower = {**TOWERS[network], "head_width": 64}
    tower["layers"] = chosen.layers or tower["layers"]
    width = tower.pop("width")
    files = photographs(chosen.images or _MOST_IMAGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder / NAMES[network], NAMES[network], width=width, heads=width // 64, **tower)
        spec = Catalog.load().require(NAMES[network])
        clip = load_network(spec, folder / NAMES[network], device=device, dtype=dtype)
        assert isinstance(clip, Clip)
        config = clip._vision.config
        side = config.image
        fits = fit_of(files, side)
        features = [Feature(Modality.IMAGE, torch.from_numpy(each.copy())) for each in fits]
        items = [EncodeItem(np.empty(0, np.int32), features=(each,)) for each in features]
        count = count_of(least(lambda: clip.forward(items[:1]), device, 1), chosen)
        files, items = files[:count], items[:count]
        model = Plain(config).to(device, dtype).eval()
        opened = [Pillow.open(io.BytesIO(data)).convert("RGB") for data in files]
        fit = Fit(side, "shortest", "bicubic", 0)
        seconds = {
            "decoding, one process": least(
                lambda: [Pillow.open(io.BytesIO(data)).convert("RGB") for data in files], device, 1
            ),
            "scaling, one process": least(lambda: [fitted(each, fit) for each in opened], device, 1),
        }
        in_turn = {
            _TOWER: lambda: clip.forward(items),
            _LOOP: lambda: plain_loop(model, files, side, device, dtype),
        }
        seconds |= asyncio.run(take_turns(folder, network, files, chosen.device, in_turn, chosen.rounds))
    limit = ceiling(config, device, dtype)
    share = operations(config) * len(files) / seconds[_TOWER] / limit
    print(
        f"{NAMES[network]}, {config.layers} layers, {dtype}, {torch.get_num_threads()} threads, "
        f"{len(files)} pictures\n"
    )
    print("| stage | images/s |\n| --- | --- |")
    for stage, taken in seconds.items():
        print(f"| {stage} | {len(files) / taken:,.2f} |")
    print(f"\nThe engine is {seconds[_LOOP] / seconds[_ENGINE]:.2f} times as fast as the loop; ", end="")
    print(f"the tower has {share:.0%} of {limit / 1e9:,.0f} Gop/s of bare products.\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", action="append", choices=list(NAMES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, help="how many pictures, else by the time of one")
    parser.add_argument("--layers", type=int, help="fewer than published, for a quick look")
    chosen = parser.parse_args()
    for network in chosen.network or list(NAMES):
        measure(network, chosen)


if __name__ == "__main__":
    main()
