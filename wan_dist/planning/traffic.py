"""What rank 0 of a mesh sends in a denoising step, to the byte: every collective of the parallel model as arithmetic.

`bench=scale` counts the same bytes where they are sent; a test holds the two equal. Imports no torch.

Legend: L all tokens, l rank 0's, r the rows it computes with (l, on a CPU padded), G tokens of its Ulysses group,
H heads of its tp rank, h those it attends with, D head dim, d the model's width (all heads x D), S text tokens,
P ranks of the collective's axis, b bytes of an element.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd, prod

from wan_dist.layers.cpu_rows import cpu_rows
from wan_dist.layers.sequence import split_sizes
from wan_dist.planning.cost import TEXT_TOKENS

_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What decides a step's traffic, in the schema's names.

    tokens: of the whole video, L. out_features: of `proj_out`, latent channels x patch volume; so the prediction has
    `tokens * out_features` elements. image_tokens: of an image encoder, which cross-attention sees besides the text;
    0 where the model has no branch for them.
    """

    blocks: int
    heads: int
    head_dim: int
    ffn: int
    tokens: int
    out_features: int
    text_tokens: int = TEXT_TOKENS
    image_tokens: int = 0


@dataclass(frozen=True)
class Share:
    """Rank 0's part of tokens and heads, the largest of all: l, G of each rank of the ring (its own first), H and h."""

    tokens: int
    groups: tuple[int, ...]
    tp_heads: int
    heads: int


def first_rank_share(tokens: int, heads: int, degrees: Mapping[str, int]) -> Share:
    """Tokens are split over ring x ulysses, heads over tp (which divides them) and then over ulysses."""
    ring, ulysses, tp_heads = degrees["ring"], degrees["ulysses"], heads // degrees["tp"]
    sizes = split_sizes(tokens, ring * ulysses)
    groups = tuple(sum(sizes[first : first + ulysses]) for first in range(0, len(sizes), ulysses))
    return Share(sizes[0], groups, tp_heads, split_sizes(tp_heads, ulysses)[0])


def forwards_per_step(degrees: Mapping[str, int], *, guided: bool) -> int:
    """Both branches of guidance, unless the other half of the cfg axis computes one."""
    return 2 if guided and degrees["cfg"] == 1 else 1


def bytes_sent(
    shape: StepShape,
    degrees: Mapping[str, int],
    *,
    dtype_bytes: int,
    guided: bool,
    device: str,
    first: bool = False,
    streamed_blocks: int = 0,
    gather_bytes: int = 0,
    reshard_after_forward: bool = True,
) -> dict[str, int]:
    """Bytes by collective that rank 0 sends to others in one step; a collective that does not run has no key.

    degrees: of cfg, ring, ulysses and tp (dp exchanges nothing). device: "cpu" pads rows. first: whether this step is
    the first of its prompt on its expert, so that the text's keys are computed and, where FSDP keeps what it gathered,
    the weights are gathered. streamed_blocks: how many do not stay on the device; those compute the text's keys in
    every step. gather_bytes: of all FSDP units, once (`gather_bytes_sent`); 0 without FSDP.
    """
    forwards = forwards_per_step(degrees, guided=guided)
    share = first_rank_share(shape.tokens, shape.heads, degrees)
    blocks = forwards * shape.blocks
    sent: dict[str, int] = {}
    if degrees["ulysses"] > 1:
        sent["all_to_all"] = blocks * _ulysses_elements(share, shape.head_dim) * dtype_bytes
    if degrees["ring"] > 1:
        sent["p2p"] = blocks * _ring_elements(share, shape.head_dim) * dtype_bytes
    if degrees["tp"] > 1:
        rows = _rows(shape.ffn, share.tokens, degrees["tp"], device)
        key_blocks = forwards * (shape.blocks if first else streamed_blocks)
        sent["all_reduce"] = blocks * _block_reduces(shape, rows, degrees["tp"], dtype_bytes)
        sent["all_reduce"] += key_blocks * _key_reduces(shape, degrees["tp"])
    sp, halves = degrees["ring"] * degrees["ulysses"], degrees["cfg"] if guided else 1
    if sp > 1 or halves > 1:
        elements = forwards * (sp - 1) * share.tokens + (halves - 1) * shape.tokens
        sent["all_gather"] = elements * shape.out_features * dtype_bytes
    gathers = forwards if reshard_after_forward else int(first)
    if gather_bytes and gathers:
        sent["fsdp_all_gather"] = gathers * gather_bytes
    return sent


def _ulysses_elements(share: Share, head_dim: int) -> int:
    """Of a block's two all-to-alls (DeepSpeed-Ulysses, arXiv:2309.14509): q, k and v of the other ranks' heads,
    `3 l (H - h) D`, and the result for the other ranks' tokens, `(G - l) h D`. Where all divides: `4 l d (P-1)/P`."""
    heads_away, tokens_away = share.tp_heads - share.heads, share.groups[0] - share.tokens
    return (3 * share.tokens * heads_away + tokens_away * share.heads) * head_dim


def _ring_elements(share: Share, head_dim: int) -> int:
    """Of a block's ring (arXiv:2310.01889): in each of P-1 rounds the keys and values held, `2 G h D`: its own first,
    then those of the ranks before it, last first; those of the rank after it never pass here."""
    return 2 * (sum(share.groups) - share.groups[1]) * share.heads * head_dim


def _rows(ffn: int, tokens: int, tp: int, device: str) -> int:
    """Rows that all linears of a block compute with. All of tp pad alike: to what suits every rank's features."""
    return cpu_rows(tokens, gcd(*split_sizes(ffn, tp))) if device == "cpu" else tokens


def _block_reduces(shape: StepShape, rows: int, tp: int, dtype_bytes: int) -> int:
    """Of a block's all-reduces (Megatron-LM, arXiv:1909.08053): `r d b` out of self-attention, cross-attention and the
    feed-forward; `r` mean squares in fp32 for the norms of q and k in self-attention and of q in cross-attention."""
    return 3 * _reduced(rows * shape.heads * shape.head_dim * dtype_bytes, tp) + 3 * _reduced(rows * _FP32_BYTES, tp)


def _key_reduces(shape: StepShape, tp: int) -> int:
    """Of the norms of a block's cross-attention keys, once a prompt: `S` mean squares in fp32, and the image's."""
    return sum(_reduced(tokens * _FP32_BYTES, tp) for tokens in (shape.text_tokens, shape.image_tokens))


def _reduced(nbytes: int, ranks: int) -> int:
    """Bytes that an all-reduce sends as a ring does it: `2 (P-1)/P` of its tensor, rounded down for each."""
    return 2 * (ranks - 1) * nbytes // ranks


def gather_bytes_sent(tensors: Iterable[tuple[tuple[int, ...], int]], shards: int) -> int:
    """Bytes that each rank sends when FSDP gathers units (or a whole model, each unit once) of these parameters.

    tensors: shape on this tp rank and bytes of an element. FSDP2 cuts dim 0 as `torch.chunk` does and pads every shard
    to the longest, `ceil(rows / shards)`; it goes to each of the other `shards - 1`.
    """
    padded = (-(-shape[0] // shards) * prod(shape[1:]) * element for shape, element in tensors)
    return (shards - 1) * sum(padded)


def crossing_warning(degrees: Mapping[str, int], ranks_per_node: int) -> str | None:
    """A sentence where the axes that belong inside a node (Ulysses, tensor parallelism) do not fit one."""
    tp, ulysses = degrees["tp"], degrees["ulysses"]
    inner = tp * ulysses
    if inner == 1 or ranks_per_node % inner == 0:
        return None
    shown = " x ".join(f"{axis} {degrees[axis]}" for axis in ("ulysses", "tp") if degrees[axis] > 1)
    why = f"{shown} takes {inner} neighbouring ranks, which the {ranks_per_node} of a node do not divide into"
    return f"{why}: every layer's messages cross nodes; cfg and ring are what may"


def crosses_nodes(degrees: Mapping[str, int], ranks_per_node: int, *, fsdp_shards: int = 1) -> dict[str, bool]:
    """By collective, whether rank 0's group has ranks on another node. Ranks are numbered with tp fastest, then
    ulysses, ring, cfg and dp, so the last one of an axis is `(P - 1) x` the product of the faster degrees.

    `all_gather` is judged by the sequence's axis, and by cfg where that is alone: beside it the two guidance halves
    are a thousandth.
    """
    tp, ulysses, ring, cfg = (degrees[axis] for axis in ("tp", "ulysses", "ring", "cfg"))
    sequence = ring * ulysses
    last_rank = {
        "all_reduce": tp - 1,
        "all_to_all": (ulysses - 1) * tp,
        "p2p": (ring - 1) * ulysses * tp,
        "all_gather": (sequence - 1 if sequence > 1 else cfg - 1) * tp,
        "fsdp_all_gather": (fsdp_shards - 1) * tp,
    }
    return {name: rank >= ranks_per_node for name, rank in last_rank.items()}
