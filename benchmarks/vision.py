"""Vision-language models: pictures/s of towers and decoders of true width, beside transformers' own classes.

    python -m benchmarks.vision [--model v4|m0 ...] [--tower-layers 4] [--layers 2] [--pages 4] [--rounds 3]

Widths are the published ones, weights random, layers fewer, so that a model fits a small machine; v4's last
block of the tower sees whole pictures. A batch mixes pages of A4 at 150 dpi with smaller pictures.
transformers runs the same weights in the same number format with its sdpa attention, the batch padded on the
right. The last table is what one pass of the tower adds to the memory of a process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel

from services.core.catalog import Catalog
from services.core.catalog.types import Modality
from services.core.content import Image
from services.core.modeling.checkpoints.checkpoint import Checkpoint
from services.core.modeling.families.qwen_vision import Pictures, Vision, VisionConfig, patch_rows
from services.core.modeling.layers.reading import Layers
from services.core.modeling.registry import load_network
from services.core.modeling.types import Feature, PrepareOptions
from tests.vision_checkpoints import M0, V4, preprocessor_config, write_m0, write_v4

MODELS = {"v4": V4, "m0": M0}
SIZES = [(644, 896), (504, 504), (644, 420), (112, 84)]
"""Width and height of the pictures of a batch, in turn: a page, a square, a photograph, an icon."""

_TURNS = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}


def write(directory: Path, model: str, layers: int, tower_layers: int) -> None:
    """Write random weights of the published widths."""
    if model == "v4":
        tower = {
            "depth": tower_layers,
            "fullatt_block_indexes": [tower_layers - 1],
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
        }
        size = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
        write_v4(
            directory,
            vision=tower,
            num_hidden_layers=layers,
            multi_vector_projector_dim=128,
            **size,
            **_TURNS,
        )
    else:
        tower = {
            "depth": tower_layers,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "mlp_ratio": 4,
            "num_heads": 16,
        }
        size = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
        write_m0(directory, vision=tower, num_hidden_layers=layers, **size, **_TURNS)
    said = preprocessor_config(max_pixels=602_112)
    (directory / "preprocessor_config.json").write_text(json.dumps(said))


def pictures(count: int) -> list[Image]:
    """Make ``count`` pictures of mixed sizes, already scaled."""
    random = np.random.default_rng(1)
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    return [Image(random.integers(0, 256, (h, w, 3), np.uint8), (w, h)) for w, h in sizes]


def tower_of(directory: Path, model: str) -> tuple[Vision, VisionConfig]:
    """Load our tower."""
    checkpoint = Checkpoint(directory)
    config = VisionConfig.read(checkpoint.config["vision_config"], newer=model == "v4")
    rules = Pictures.read(preprocessor_config(max_pixels=602_112), config)
    return Vision(Layers(checkpoint, torch.device("cpu"), torch.float32), config, "visual.", rules), config


def features(config: VisionConfig, images: list[Image]) -> list[Feature]:
    """Make what the tower reads."""
    found: list[Feature] = []
    for image in images:
        grid = config.grid(image.pixels.shape[1], image.pixels.shape[0])
        rows = patch_rows(image.pixels, config.patch, config.merge)
        found.append(Feature(Modality.IMAGE, rows, 0, config.states(grid), grid))
    return found


def stock_of(directory: Path, model: str) -> Any:
    """Load the same weights into transformers' class."""
    config = dict(Checkpoint(directory).config)
    for name in ("architectures", "auto_map", "model_type", "torch_dtype"):
        config.pop(name)
    make_config, make = (
        (Qwen2_5_VLConfig, Qwen2_5_VLModel) if model == "v4" else (Qwen2VLConfig, Qwen2VLModel)
    )
    network = make._from_config(make_config(**config), attn_implementation="sdpa").eval()
    checkpoint = Checkpoint(directory)
    checkpoint.rename({"model.": "language_model."})
    names = [name for name in checkpoint.names if name.startswith(("visual.", "language_model."))]
    network.load_state_dict({name: checkpoint.tensor(name, torch.float32) for name in names}, strict=True)
    return network


def stock_rows(vision: Vision, found: list[Feature]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make what transformers' tower reads of the same pictures: both frames of each, and the grids."""
    rows = torch.cat([each.data for each in found]).float().view(-1, 3, 196)
    rows = (rows - vision._mean) / vision._std
    return rows.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1), torch.tensor([each.grid for each in found])


def seconds(work: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the best CPU-bound times of two pieces of work, taken in turns."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for _ in range(rounds):
            for i, each in enumerate((work, other)):
                began = time.perf_counter()
                each()
                best[i] = min(best[i], time.perf_counter() - began)
    return best[0], best[1]


def measure(model: str, layers: int, tower_layers: int, pages: int, rounds: int) -> list[str]:
    """Return the rows of one model."""
    images = pictures(pages)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory, model, layers, tower_layers)
        vision, config = tower_of(directory, model)
        found = features(config, images)
        stock = stock_of(directory, model)
        rows, grids = stock_rows(vision, found)
        with torch.inference_mode():
            ours, theirs = vision(found), stock.visual(rows, grid_thw=grids).pooler_output
        off = (ours - theirs).abs().max() / theirs.abs().max()
        assert off < 1e-3, f"the towers disagree by {off:.1e}"
        mine, other = seconds(lambda: vision(found), lambda: stock.visual(rows, grid_thw=grids), rounds)
        lines = [
            _row(model, f"tower, {tower_layers} blocks", sum(len(f.data) for f in found), pages, mine, other)
        ]
        whole, items = _whole(directory, model, images)
        given = _padded(items)
        mine, other = seconds(
            lambda: whole.forward(items),
            lambda: stock(**given, pixel_values=rows, image_grid_thw=grids),
            rounds,
        )
        tokens = sum(len(item.token_ids) for item in items)
        lines.append(_row(model, f"with a decoder of {layers} layers", tokens, pages, mine, other))
    return lines


def _row(model: str, what: str, length: int, pages: int, mine: float, other: float) -> str:
    return (
        f"| {model} | {what} | {length:,} | {pages / mine:.2f} | {pages / other:.2f} | {other / mine:.2f} |"
    )


def _whole(directory: Path, model: str, images: list[Image]) -> tuple[Any, list[Any]]:
    entry = Catalog.load().require(MODELS[model])
    network = load_network(entry, directory, device=torch.device("cpu"), dtype=torch.float32)
    if model == "v4":
        return network, [each.item for each in network.processor.prepare(images, PrepareOptions())]
    asked = network.processor.query("which page tells of revenue?")
    pairs = network.processor.pairs(asked, images, 0)
    return network, [pair.windows[0].item for pair in pairs]


def _padded(items: list[Any]) -> dict[str, torch.Tensor]:
    longest = max(len(item.token_ids) for item in items)
    ids, mask, kinds = (torch.zeros(len(items), longest, dtype=torch.long) for _ in range(3))
    for i, item in enumerate(items):
        ids[i, : len(item.token_ids)] = torch.from_numpy(item.token_ids)
        mask[i, : len(item.token_ids)] = 1
        for feature in item.features:
            kinds[i, feature.offset : feature.offset + feature.length] = 1
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}


def memory(model: str, pages: int) -> None:
    """Print by how many MiB one pass of the tower raises the peak of this process."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), model, 1, 2)
        vision, config = tower_of(Path(folder), model)
        with torch.inference_mode():
            vision(features(config, pictures(1)[:1]))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            page = pictures(1) * pages
            vision(features(config, page))
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        memory(given.model[0], given.memory_of)
        return
    print("| model | what | patches or tokens | pictures/s | transformers | times |")
    print("|" + " --- |" * 6)
    for model in given.model:
        for line in measure(model, given.layers, given.tower_layers, given.pages, given.rounds):
            print(line, flush=True)
    print("\n| model | pages in a pass | patches | MiB more |")
    print("|" + " --- |" * 4)
    for model in given.model:
        for pages in (4, 8, 16):
            command = [sys.executable, "-m", "benchmarks.vision", "--model", model, "--memory-of", str(pages)]
            more = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"| {model} | {pages} | {pages * 64 * 46:,} | {float(more):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
