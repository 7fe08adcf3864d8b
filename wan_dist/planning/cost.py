"""What a denoising step costs: FLOPs by formula, seconds from stated rates. Pure arithmetic.

2 FLOP per multiply-add. Legend: L all tokens, l a rank's tokens, G tokens of its Ulysses group, h its heads, D head
dim, d = all heads x D, f feed-forward features, S text tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Flops:
    """Of one forward on one rank."""

    linear: int
    attention: int


def forward_flops(
    *,
    blocks: int,
    heads: int,
    head_dim: int,
    ffn: int,
    tokens: int,
    rank_tokens: int,
    group_tokens: int,
    group_heads: int,
    tp: int,
) -> Flops:
    """One forward whose text keys and values are remembered; embeddings are left out (0.1 % of the whole).

    A block: linears `l (12 d^2 + 4 d f) / tp` (self q, k, v, out; cross q, out; feed-forward), self-attention
    `4 G L h D`, cross-attention `4 l S d / tp`.
    """
    width = heads * head_dim
    linear = rank_tokens * (12 * width * width + 4 * width * ffn) // tp
    self_attention = 4 * group_tokens * tokens * group_heads * head_dim
    cross_attention = 4 * rank_tokens * TEXT_TOKENS * width // tp
    return Flops(blocks * linear, blocks * (self_attention + cross_attention))


@dataclass(frozen=True)
class Rates:
    """Of one device: FLOP/s of matrix products and of attention, bytes/s inside a node and across nodes, from host
    memory to the device, and from files."""

    matmul: float
    attention: float
    node: float
    network: float
    host: float = 55e9
    disk: float = 3e9


def predicted_step(
    flops: Flops, forwards: int, sent: Mapping[str, int], crosses_nodes: Mapping[str, bool], rates: Rates
) -> dict[str, float]:
    """Seconds of a step by part, and their sum under `total`.

    sent: bytes that the rank sends in a step, by collective; crosses_nodes: whether that one leaves the node.
    The ring's messages hide behind attention and FSDP's gathers behind all computing, as far as they are shorter;
    everything else waits.
    """
    parts = {
        "linear": forwards * flops.linear / rates.matmul,
        "attention": forwards * flops.attention / rates.attention,
    }
    wire = {name: size / (rates.network if crosses_nodes[name] else rates.node) for name, size in sent.items()}
    hiding = {"p2p": parts["attention"], "fsdp_all_gather": parts["attention"] + parts["linear"]}
    parts |= {name: max(0.0, seconds - hiding.get(name, 0.0)) for name, seconds in wire.items()}
    return {**parts, "total": sum(parts.values())}
