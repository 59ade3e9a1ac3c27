"""jina-vlm written down slowly, in float64 and token by token without a cache, from papers and dossiers.

Nothing here is shared with the code under test but the names of the tensors; the pixels are scaled by torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedTokenizerFast


class Reference:
    """One checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.config = self._json(folder / "config.json")
        self.cutting = self._json(folder / "preprocessor_config.json")
        self.w = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.template = self._json(folder / "chat_template.json")["chat_template"]

    @staticmethod
    def _json(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text())

    # Pictures

    def _scaled(self, picture: np.ndarray, height: int, width: int) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        eight = x.dtype == torch.uint8
        in_float = self.cutting["resize_in_float32"]
        x = x.float() / 255 if eight and in_float else x.float()
        mode, smooth = self.cutting["interpolation"], self.cutting["antialias"]
        if x.shape[1:] != (height, width):
            x = functional.interpolate(x[None], (height, width), mode=mode, antialias=smooth)[0]
        x = torch.round(torch.clamp(x, 0, 255)) / 255 if eight and not in_float else torch.clamp(x, 0, 1)
        return x.numpy().transpose(1, 2, 0)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        f, least, most = (self.cutting[name] for name in ("patch_size", "min_pixels", "max_pixels"))
        h, w = round(height / f) * f, round(width / f) * f
        if h * w > most:
            beta = math.sqrt(height * width / most)
            h, w = max(f, math.floor(height / beta / f) * f), max(f, math.floor(width / beta / f) * f)
        elif h * w < least:
            beta = math.sqrt(least / (height * width))
            h, w = math.ceil(height * beta / f) * f, math.ceil(width * beta / f) * f
        return h, w

    def picture(self, pixels: np.ndarray) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
        """Crops (crops, side, side, 3), the tokens, and the (crop, word) that each patch token stands for."""
        c = self.cutting
        side, patch, pool, (before, behind) = (
            c["base_input_size"][0],
            c["patch_size"],
            2,
            c["overlap_margins"],
        )
        picture = self._scaled(pixels, *self._size(*pixels.shape[:2]))
        window, margin = side - (before + behind) * patch, (before + behind) * patch
        best: tuple[float, tuple[int, int]] | None = None
        options = sorted(
            ((i, j) for i in range(1, 99) for j in range(1, 99) if i * j <= c["max_crops"]),
            key=lambda p: (p[0] * p[1], p[0]),
        )
        scales = []
        for i, j in options:
            with np.errstate(divide="ignore"):
                sides = np.float32([i * window, j * window]) / np.float32(
                    [picture.shape[0] - margin, picture.shape[1] - margin]
                )
            scales.append(float(min(sides)))
        if max(scales) < 1:
            best = max(zip(scales, options, strict=True), key=lambda s: s[0])
        else:
            best = min(((s, o) for s, o in zip(scales, options, strict=True) if s >= 1), key=lambda s: s[0])
        rows, columns = best[1]
        tiled = self._scaled(picture, rows * window + margin, columns * window + margin)
        crops = [self._scaled(picture, side, side)]
        words = -(-(side // patch) // pool)
        stitched: dict[tuple[int, int], tuple[int, int]] = {}

        def kept(i: int, count: int) -> range:
            patches = (
                side // patch
                - before
                - behind
                + (before if i == 0 else 0)
                + (behind if i == count - 1 else 0)
            )
            first = 0 if i == 0 else before // pool
            return range(first, first + -(-patches // pool))

        y = 0
        for i in range(rows):
            x = 0
            for j in range(columns):
                crops.append(tiled[i * window : i * window + side, j * window : j * window + side])
                for dy, word_row in enumerate(kept(i, rows)):
                    for dx, word_column in enumerate(kept(j, columns)):
                        stitched[y + dy, x + dx] = (len(crops) - 1, word_row * words + word_column)
                x += len(kept(j, columns))
            y += len(kept(i, rows))
        tokens = ["<im_start>", *(["<im_patch>"] * words + ["<im_col>"]) * words, "<im_end>", "<im_start>"]
        tokens += (["<im_patch>"] * x + ["<im_col>"]) * y + ["<im_end>"]
        stand_for = [(0, n) for n in range(words**2)] + [stitched[key] for key in sorted(stitched)]
        low, high = c["image_min"], c["image_max"]
        return low + np.stack(crops) * np.float32(high - low), tokens, stand_for

    def words_of(self, crops: np.ndarray) -> torch.Tensor:
        """(crops, words, width): tower and connector."""
        v, patch = self.config["vision_config"], self.cutting["patch_size"]
        w = {k.removeprefix("model.vision_model."): t for k, t in self.w.items()}
        heads = v["block_config"]["attn_config"]["n_heads"]
        out = []
        for number, crop in enumerate(torch.from_numpy(crops).double()):
            n = crop.shape[0] // patch
            rows = [
                crop[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].reshape(-1)
                for y in range(n)
                for x in range(n)
            ]
            x = self._linear(w, "patch_embed.proj", torch.stack(rows)) + w["pos_embed"]
            states = []
            for i in range(v["n_layers"]):
                name = f"layers.{i}"
                y = self._norm(w, f"{name}.attn_lnorm", x)
                q, k, value = (y @ w[f"{name}.attn.qkv_w.weight"].T).chunk(3, dim=1)
                q, k, value = (t + w[f"{name}.attn.{p}_b"] for t, p in ((q, "q"), (k, "k"), (value, "v")))
                x = x + self._linear(w, f"{name}.attn.out", self._attend(q, k, value, heads, heads))
                y = self._linear(w, f"{name}.ffn.up", self._norm(w, f"{name}.ffn_lnorm", x))
                x = x + self._linear(w, f"{name}.ffn.down", functional.gelu(y, approximate="tanh"))
                states.append(x)
            states.append(self._norm(w, "post_lnorm", x))
            features = torch.cat([states[i] for i in v["vit_layers"]], dim=1)
            if bool((crop == -1).all()):
                features = features * 0
            if number == len(crops) - 1:
                features = features + w["vl_connector.pad_embed"][1]
            out.append(self._connect(w, features, n))
        return torch.stack(out)

    def _connect(self, w: dict[str, torch.Tensor], features: torch.Tensor, n: int) -> torch.Tensor:
        heads = self.config["vision_config"]["vl_connector_config"]["attn_pooling_config"]["n_heads"]
        grid = torch.zeros(n + n % 2, n + n % 2, features.shape[1], dtype=torch.float64)
        grid[:n, :n] = features.view(n, n, -1)
        words = []
        for y in range(0, len(grid), 2):
            for x in range(0, len(grid), 2):
                four = grid[y : y + 2, x : x + 2].reshape(4, -1)
                q = (
                    four.mean(0, keepdim=True) @ w["vl_connector.pooling.q_w.weight"].T
                    + w["vl_connector.pooling.q_b"]
                )
                k, value = (four @ w["vl_connector.pooling.kv_w.weight"].T).chunk(2, dim=1)
                k, value = k + w["vl_connector.pooling.k_b"], value + w["vl_connector.pooling.v_b"]
                words.append(
                    self._linear(w, "vl_connector.pooling.out", self._attend(q, k, value, heads, heads))[0]
                )
        y, gate = (torch.stack(words) @ w["vl_connector.projector.up.weight"].T).chunk(2, dim=1)
        return (functional.silu(gate) * y) @ w["vl_connector.projector.down.weight"].T

    # Words

    def prompt(
        self, messages: list[dict[str, Any]], pictures: list[np.ndarray]
    ) -> tuple[list[int], torch.Tensor]:
        """The ids of a conversation, and their states (tokens, width)."""
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
            always_start_with_space=True,
            image_prompt_token="<|image|>",
        )
        ids = [self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        places: list[tuple[int, torch.Tensor]] = []
        left = list(pictures)
        for id in self.tokenizer.encode(text, add_special_tokens=False):
            if id != self.tokenizer.convert_tokens_to_ids("<|image|>"):
                ids.append(id)
                continue
            crops, tokens, stand_for = self.picture(left.pop(0))
            words = self.words_of(crops)
            patches = iter(words[crop, word] for crop, word in stand_for)
            for token in tokens:
                if token == "<im_patch>":
                    places.append((len(ids), next(patches)))
                ids.append(self.tokenizer.convert_tokens_to_ids(token))
        states = self._words(ids)
        for place, word in places:
            states[place] += word
        return ids, states

    def _words(self, ids: list[int]) -> torch.Tensor:
        names = ("embedding", "new_embedding")
        return torch.cat([self.w[f"model.language_model.embedding.{name}"] for name in names])[ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits behind the last of states (tokens, width)."""
        t = self.config["text_config"]
        a, inner = t["block_config"]["attn_config"], t["block_config"]["ffn_config"]["size"]
        w = {k.removeprefix("model.language_model."): v for k, v in self.w.items()}
        heads, key_heads, size = a["n_heads"], a["n_kv_heads"], a["head_dim"]
        for i in range(t["n_layers"]):
            name = f"layers.{i}"
            y = self._rms(w, f"{name}.attn_lnorm", x) @ w[f"{name}.attn.qkv_w.weight"].T
            q, k, value = y.split((heads * size, key_heads * size, key_heads * size), dim=1)
            q, k = (
                self._turn(
                    self._rms(w, f"{name}.attn.{p}_lnorm", each.view(len(x), -1, size)), t["rope_theta"]
                )
                for p, each in (("q", q), ("k", k))
            )
            attended = self._attend(q.flatten(1), k.flatten(1), value, heads, key_heads, causal=True)
            x = x + attended @ w[f"{name}.attn.out.weight"].T
            y = self._rms(w, f"{name}.ffn_lnorm", x) @ w[f"{name}.ffn.up.weight"].T
            x = x + (functional.silu(y[:, inner:]) * y[:, :inner]) @ w[f"{name}.ffn.down.weight"].T
        return self.w["lm_head.weight"] @ self._rms(w, "ln_f", x[-1])

    def greedy(self, states: torch.Tensor, count: int) -> list[int]:
        """The first ``count`` ids of the answer, whatever they are."""
        said: list[int] = []
        for _ in range(count):
            said.append(int(self.logits(states).argmax()))
            states = torch.cat([states, self._words(said[-1:])])
        return said

    @staticmethod
    def _attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, key_heads: int, *, causal: bool = False
    ) -> torch.Tensor:
        size = q.shape[1] // heads
        out = []
        for head in range(heads):
            mine, theirs = slice(head * size, (head + 1) * size), head // (heads // key_heads)
            other = slice(theirs * size, (theirs + 1) * size)
            scores = q[:, mine] @ k[:, other].T / size**0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(1) @ v[:, other])
        return torch.cat(out, dim=1)

    @staticmethod
    def _turn(x: torch.Tensor, base: float) -> torch.Tensor:
        half = x.shape[2] // 2
        angles = torch.arange(len(x))[:, None] * base ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=2)

    @staticmethod
    def _rms(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    @staticmethod
    def _norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    @staticmethod
    def _linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
