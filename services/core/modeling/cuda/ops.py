"""What of a pass runs in kernels of our own on CUDA; where Triton is not there, torch does it.

Each function says what it computes; the plain forms stand in ``layers`` beside the calls.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

_log = logging.getLogger(__name__)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets the kernels on a CPU: for tests, thousands of times slower."""


SHORT = 64
"""Tokens up to which items are short: several share a tile of an attention kernel."""

LONG = 256
"""Tokens in the mean from which on items are long, so that tiles of more rows pay."""


class Rows(NamedTuple):
    """What each row of a packed batch knows of its item, (tokens,) int32 each on the device.

    ``positions`` is the place in the item, from 0; the row may attend to the rows from ``first`` to before
    ``last``. All of them may lie in a buffer that is longer than the batch.
    """

    positions: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


class Tile(NamedTuple):
    """How an attention kernel cuts its work: rows and keys of a step, warps, and loads in flight.

    With ``bulk`` keys and values are read by the unit that copies whole blocks, from Hopper on.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    bulk: bool = False


@cache
def available() -> bool:
    """Whether Triton is installed; if not, the log says so once."""
    if find_spec("triton") is None:
        _log.warning("triton is not installed: on CUDA all models run on torch alone, which is slower")
        return False
    return True


def describe(device: torch.device) -> str:
    """Say in words what runs networks on ``device``, a CUDA one."""
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    if not available():
        kernels = "no triton: attention is torch's, dense with ALiBi, flash without where it serves"
    else:
        import triton

        kernels = (
            f"attention and what lies between products in kernels of our own, triton {triton.__version__}"
        )
    return f"{name}, torch {torch.__version__}; {kernels}"


def serves_device(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: layers and batches are made for them there."""
    return (device.type == "cuda" or INTERPRETED) and available()


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels take ``x``."""
    return (x.is_cuda or INTERPRETED) and available()


def tile(head_dim: int, shortest: bool, mean: float, dtype: torch.dtype, *, bulk: bool = False) -> Tile:
    """Choose the tile for heads of ``head_dim`` and items of ``mean`` tokens, ``shortest`` if all are short.

    For 16-bit heads of up to 128 the fastest, or within a few per cent of it, of four to eight tiles on an
    H200, with bulk copies and without, for texts of 16 to 8,192 tokens, alike or mixed; for others of eleven
    on an H100. ``bulk`` says whether bulk copies can be had.
    """
    if INTERPRETED:
        return Tile(64, 64, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if head_dim > 64 else Tile(64, 32, 4, 2)
    if head_dim > 128:
        return Tile(64, 32, 4, 2)
    if head_dim > 64:
        return Tile(64, 64 if mean >= 4 * LONG else 32, 4, 3, bulk)
    if head_dim <= 32:
        return Tile(64, 64, 4, 3, bulk and mean >= LONG)
    return Tile(128, 64, 8, 3, bulk) if mean >= LONG else Tile(64, 32, 4, 3, bulk and not shortest)


@cache
def _copies_in_bulk(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _reads_in_bulk(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether bulk copies can be had, and heads of these lie as they need them."""
    head_dim = key.shape[2]
    if not _copies_in_bulk(key.device) or head_dim < 16 or head_dim != _power(head_dim):
        return False
    return all(
        part.data_ptr() % 16 == 0 and part.stride(0) * part.itemsize % 16 == 0 for part in (key, value)
    )


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    *,
    longest: int,
    items: int = 1,
    causal: bool = False,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    scale: float | None = None,
    cut: Tile | None = None,
) -> torch.Tensor:
    """Attend in a packed batch; tensors, ``slopes`` and ``scale`` as of ``layers.attention``.

    ``window`` lets a row see itself and so many less one before it. ``longest`` and the number of ``items``
    only choose the tile.
    """
    kernels = _kernels()
    tokens, heads, head_dim = query.shape
    cut = cut or tile(
        head_dim, longest <= SHORT, tokens / items, query.dtype, bulk=_reads_in_bulk(key, value)
    )
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    assert all(part.stride()[1:] == (head_dim, 1) for part in (query, key, value))
    keys, values = (
        (_blocks(part.flatten(1), cut.keys, head_dim) if cut.bulk else part) for part in (key, value)
    )
    kernels.attention[(-(-tokens // cut.rows) * heads,)](
        query,
        keys,
        values,
        out,
        rows.first,
        rows.last,
        slopes,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        head_dim**-0.5 if scale is None else scale,
        tokens,
        HEADS=heads,
        GROUP=heads // key.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, _power(head_dim)),
        BLOCK_M=cut.rows,
        BLOCK_N=cut.keys,
        BULK=cut.bulk,
        CAUSAL=causal,
        WINDOW=window or 0,
        ALIBI=slopes is not None,
        UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
        PRECISION="ieee",
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the layer norm of ``x`` plus ``residual``, both (..., width)."""
    return _norm(x, residual, weight, bias, epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the RMS norm of ``x`` (..., width)."""
    return _norm(x, None, weight, None, epsilon)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    block = _power(width)
    together = 64 if INTERPRETED else min(4, max(1, 4096 // block))
    _kernels().norm[(-(-rows // together),)](
        x,
        None if residual is None else residual.contiguous(),
        weight,
        bias,
        out,
        rows,
        epsilon,
        WIDTH=width,
        BLOCK=block,
        ROWS=together,
        ADDS=residual is not None,
        CENTRED=bias is not None,
        num_warps=8,
    )
    return out


def norm_rope(
    joined: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    queries: int,
    keys: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    epsilon: float = 0.0,
) -> None:
    """Turn the first ``queries + keys`` heads of ``joined`` (tokens, heads, head_dim) in place.

    The angles are (tokens, head_dim / 2) fp32. ``norms``, the weights of an RMS norm of each query head and
    of each key head, come before.
    """
    tokens, _, head_dim = joined.shape
    assert joined.stride()[1:] == (head_dim, 1)
    together = 16 if INTERPRETED else 1
    _kernels().norm_rope[(-(-tokens // together),)](
        joined,
        cosines,
        sines,
        None if norms is None else norms[0],
        None if norms is None else norms[1],
        joined.stride(0),
        tokens,
        epsilon,
        QUERIES=queries,
        KEYS=keys,
        HEAD_DIM=head_dim,
        TOKENS=together,
        BLOCK_HEADS=_power(queries + keys),
        BLOCK_HALF=_power(head_dim // 2),
        NORMS=norms is not None,
        num_warps=4,
    )


def gate(x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """Return ``activation(a) * b`` of ``x`` = [a b], (rows, 2 inner) contiguous; SiLU or erf GELU."""
    rows, inner = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    rows_at_once, block = _step(inner)
    _kernels().gate[(-(-rows // rows_at_once), -(-inner // block))](
        x, out, rows, INNER=inner, ROWS=rows_at_once, BLOCK=block, GELU=gelu, num_warps=4
    )
    return out


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """Take the erf form of GELU of ``x`` (..., width), contiguous, in place, and return it."""
    width = x.shape[-1]
    rows = x.numel() // width
    rows_at_once, block = _step(width)
    _kernels().gelu[(-(-rows // rows_at_once), -(-width // block))](
        x, rows, WIDTH=width, ROWS=rows_at_once, BLOCK=block, num_warps=4
    )
    return x


_JOINED_ROWS = 2048
_GATED_ROWS = 256
"""Rows from which on ``product`` is the faster on an H200, for layers of 384 to 1,024 times two to four."""


def joins(x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> bool:
    """Whether ``product`` takes ``x`` (rows, in), and less time than a product and a kernel behind it."""
    enough = x.shape[0] >= (_GATED_ROWS if gated else _JOINED_ROWS)
    aligned = all(width % 16 == 0 for width in weight.shape) and x.is_contiguous()
    return enough and aligned and x.dtype != torch.float32 and _copies_in_bulk(x.device)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool, gated: bool
) -> torch.Tensor:
    """Return ``activation(x weight^T + bias)``, (rows, out); SiLU or the erf form of GELU.

    If ``gated`` it is ``activation(a) * b`` of the product [a b], and ``weight`` (2 out, in). All is
    contiguous, and rows are multiples of 16 bytes.
    """
    rows, width = x.shape
    inner = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    if INTERPRETED:
        high, wide, deep, warps = 32, 32, 32, 4
    else:
        high, wide, deep, warps = (128, 64, 64, 4) if gated else (128, 256, 64, 8)
    tiles = -(-rows // high) * -(-inner // wide)
    # Tiles so wide that one fills a multiprocessor follow one another in programs that stay.
    stays = not gated
    programs = min(tiles, _processors(x.device)) if stays else tiles
    _kernels().product[(programs,)](
        _blocks(x, high, deep),
        _blocks(weight, wide, deep),
        _blocks(out, high, wide),
        bias,
        rows,
        WIDTH=width,
        OUT=inner,
        BLOCK_M=high,
        BLOCK_N=wide,
        BLOCK_K=deep,
        BAND=8,
        STAYS=stays,
        GATED=gated,
        GELU=gelu,
        BIAS=bias is not None,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION="ieee",
        num_warps=warps,
        num_stages=3,
    )
    return out


def mean(hidden: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Average the rows ``[starts[i], starts[i + 1])`` of ``hidden`` (rows, width); (items, width) fp32."""
    items, width = starts.shape[0] - 1, hidden.shape[1]
    out = torch.empty(items, width, dtype=torch.float32, device=hidden.device)
    block = min(128, _power(width))
    _kernels().mean[(items, -(-width // block))](
        hidden.contiguous(), starts, out, WIDTH=width, BLOCK=block, ROWS=16, num_warps=4
    )
    return out


def merge(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``base + up down`` to ``out``: (out, in), of ``up`` (out, rank) and ``down`` (rank, in).

    Reads and writes the weights once: a product that adds in place would copy ``base`` before.
    """
    assert all(part.is_contiguous() for part in (base, down, up, out))
    outs, ins = base.shape
    rows, columns = (64, 64) if INTERPRETED else (32, 128)
    _kernels().merge[(-(-outs // rows), -(-ins // columns))](
        base,
        down,
        up,
        out,
        outs,
        ins,
        RANK=len(down),
        BLOCK_OUT=rows,
        BLOCK_IN=columns,
        BLOCK_RANK=_ranks(len(down)),
        UPCAST=INTERPRETED and base.dtype == torch.bfloat16,
        PRECISION="ieee",
        num_warps=4,
    )


def add_low_rank(
    x: torch.Tensor, downs: torch.Tensor, ups: torch.Tensor, tags: torch.Tensor, y: torch.Tensor
) -> None:
    """Add to each row of ``y`` (rows, out), in place, what its task makes of that of ``x`` (rows, in).

    ``tags`` (rows,) int32 are the tasks, -1 for none: places in ``downs`` (tasks, rank, in) and ``ups``
    (tasks, out, rank). Any order is right; of neighbours that share a task few programs see more than one.
    """
    rows, width = x.shape
    rank = downs.shape[1]
    assert all(part.is_contiguous() for part in (x, downs))
    z = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    together, ranks = _rows_of_tasks(rows), _ranks(rank)
    _kernels().shrink[(-(-rows // together), -(-rank // ranks))](
        x,
        tags,
        downs,
        z,
        rows,
        WIDTH=width,
        RANK=rank,
        BLOCK_M=together,
        BLOCK_R=ranks,
        BLOCK_K=256 if INTERPRETED else 64 if x.dtype == torch.float32 else 128,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION="ieee",
        num_warps=4,
    )
    expand_(z, ups, tags, y)


def expand_(z: torch.Tensor, ups: torch.Tensor, tags: torch.Tensor, y: torch.Tensor) -> None:
    """Do the second half of ``add_low_rank``, from ``z`` (rows, rank)."""
    rows, width = y.shape
    rank = z.shape[1]
    assert all(part.is_contiguous() for part in (z, ups, y))
    together, columns = _rows_of_tasks(rows), 256 if INTERPRETED else 128
    _kernels().expand[(-(-rows // together), -(-width // columns))](
        z,
        tags,
        ups,
        y,
        rows,
        WIDTH=width,
        RANK=rank,
        BLOCK_M=together,
        BLOCK_N=columns,
        BLOCK_R=_ranks(rank),
        UPCAST=INTERPRETED and y.dtype == torch.bfloat16,
        PRECISION="ieee",
        num_warps=4,
    )


def _rows_of_tasks(rows: int) -> int:
    """Rows of a program: few where few programs would leave most of the device idle."""
    return 64 if INTERPRETED or rows > 512 else 16


def _ranks(rank: int) -> int:
    return min(32, max(16, _power(rank)))


@cache
def _processors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    """Return a descriptor of ``tensor`` (rows, columns) that is read or written in such blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@cache
def _kernels() -> Any:
    from services.core.modeling.cuda import kernels

    return kernels


def _step(width: int) -> tuple[int, int]:
    """Rows and columns of one program of what goes number by number."""
    block = min(1024, _power(width))
    return (32 if INTERPRETED else max(1, 1024 // block)), block


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
