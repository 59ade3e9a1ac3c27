"""Vision-language models: pictures/s of towers and decoders of true width, beside transformers' own classes.

    python -m benchmarks.vision [--model v4|m0 ...] [--tower-layers 2] [--layers 2] [--pages 4] [--rounds 1]
                                [--threads 1]

Widths are the published ones, weights random, layers fewer, so that a model fits a small machine and all
takes three minutes of one; v4's last block of the tower sees whole pictures, the others windows. A batch
mixes pages of A4 at 150 dpi with smaller pictures. transformers runs the same weights in the same format of
numbers with its sdpa attention, the batch padded on the right, without the task's adapter that v4 here has.

Stages are timed apart: the tower; the decoder, over as many tokens as the pictures become; and all of it from
patches to results, in which the joint of the two is what the stages leave over. m0 reads one state of each
item, so of its last layer only attention is whole: of few layers its decoder looks faster than it is of all.
With one thread the time is that of the processor, which other work on the machine does not stretch. The last
table is what one pass of the tower adds to the memory of a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
SIZES = [(644, 896), (644, 420), (252, 336), (112, 84)]
"""Width and height of the pictures of a batch, in turn: a page, a photograph, a thumbnail, an icon."""

PASSES = (2, 4, 8)
"""Photographs in a pass whose memory is measured."""

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


def tower_of(directory: Path, model: str) -> tuple[Vision, VisionConfig, Pictures]:
    """Load our tower."""
    checkpoint = Checkpoint(directory)
    config = VisionConfig.read(checkpoint.config["vision_config"], newer=model == "v4")
    rules = Pictures.read(preprocessor_config(max_pixels=602_112), config)
    layers = Layers(checkpoint, torch.device("cpu"), torch.float32)
    return Vision(layers, config, "visual.", rules), config, rules


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


def stock_rows(rules: Pictures, found: list[Feature]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make what transformers' tower reads of the same pictures: both frames of each, and the grids."""
    rows = torch.cat([each.data for each in found]).float().view(-1, 3, 196) / 255
    rows = (rows - torch.tensor(rules.mean)[:, None]) / torch.tensor(rules.std)[:, None]
    return rows.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1), torch.tensor([each.grid for each in found])


def seconds(work: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the best times of two pieces of work, taken in turns; see the module of what time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for _ in range(rounds):
            for i, each in enumerate((work, other)):
                began = clock()
                each()
                best[i] = min(best[i], clock() - began)
    return best[0], best[1]


def measure(model: str, layers: int, tower_layers: int, pages: int, rounds: int) -> None:
    """Print the rows of one model."""
    images = pictures(pages)

    def row(what: str, length: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        mine, other = seconds(ours, theirs, rounds)
        shown = f"{mine:.2f} | {other:.2f} | {pages / mine:.2f} | {pages / other:.2f} | {other / mine:.2f}"
        print(f"| {model} | {what} | {length:,} | {shown} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory, model, layers, tower_layers)
        vision, config, rules = tower_of(directory, model)
        found = features(config, images)
        stock = stock_of(directory, model)
        rows, grids = stock_rows(rules, found)
        with torch.inference_mode():
            ours, theirs = vision(found), stock.visual(rows, grid_thw=grids).pooler_output
        off = (ours - theirs).abs().max() / theirs.abs().max()
        assert off < 1e-3, f"the towers disagree by {off:.1e}"
        patches = sum(len(each.data) for each in found)
        row(
            f"tower, {tower_layers} blocks",
            patches,
            lambda: vision(found),
            lambda: stock.visual(rows, grid_thw=grids),
        )

        whole, items = _whole(directory, model, images)
        texts = [replace(item, features=(), positions=None) for item in items]
        given = _padded(items)
        words = {name: given[name] for name in ("input_ids", "attention_mask")}
        tokens = sum(len(item.token_ids) for item in items)
        whole.forward(texts[-1:])
        row(
            f"decoder, {layers} layers",
            tokens,
            lambda: whole.forward(texts),
            lambda: stock.language_model(**words),
        )
        row(
            "all of it",
            tokens,
            lambda: whole.forward(items),
            lambda: stock(**given, pixel_values=rows, image_grid_thw=grids),
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


def memory(model: str) -> None:
    """Print rows of by how many MiB passes of the tower, each larger, raise the peak of this process."""
    width, height = SIZES[1]
    photograph = Image(np.zeros((height, width, 3), np.uint8), (width, height))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), model, 1, 1)
        vision, config, _ = tower_of(Path(folder), model)
        with torch.inference_mode():
            vision(features(config, [photograph]))
            # The peak so far is that of the weights as they were written.
            Path("/proc/self/clear_refs").write_text("5")
            before = _peak()
            for count in PASSES:
                given = features(config, [photograph] * count)
                vision(given)
                more = (_peak() - before) / 1024
                patches = sum(len(each.data) for each in given)
                print(f"| {model} | {count} | {patches:,} | {more:,.0f} |", flush=True)


def _peak() -> int:
    """Return the largest memory of this process since its peak was reset, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tower-layers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pages", type=int, default=4, help="pictures of a batch")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=list(MODELS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        memory(given.memory_of)
        return
    columns = (
        "model",
        "what",
        "patches or tokens",
        "s",
        "transformers",
        "pictures/s",
        "transformers",
        "times",
    )
    print(f"{given.threads} threads\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for model in given.model:
        measure(model, given.layers, given.tower_layers, given.pages, given.rounds)
    print(f"\n| model | photographs in a pass | patches | MiB more than one |\n|{' --- |' * 4}", flush=True)
    for model in given.model:
        subprocess.run([sys.executable, "-m", "benchmarks.vision", "--memory-of", model], check=True)


if __name__ == "__main__":
    main()
