"""What a rank's memory holds besides weights, phase by phase, as arithmetic: the tensors that are alive at each phase's
peak, and what the CPU's libraries add to them. Imports no torch.

Each function counts one phase by itself; weights are added by the caller, and `process_bytes` once. Sizes of tensors
follow from the code (and are compared with those counted on fake tensors in tests); the few constants say what was
measured, on 2 cores with AVX-512, torch 2.13, glibc 2.36. They hold where the C library returns freed tensors to the
system at once (M_MMAP_THRESHOLD fixed, 128 KiB to 1 MiB): left to itself it keeps up to 32 MiB for later, and one run
takes 190 MB or 262 MB.

Shape legend: l tokens of this rank, L all tokens, d the transformer's width, f its feed-forward's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from wan_dist.layers.sequence import split_sizes

MAX_TEXT_TOKENS = 512
_FP32 = 4
_PROCESS = 3_500_000  # denoising with a tiny model on 1, 2 and 4 ranks, less its tensors and weights: 3 to 4 MB
_THREAD = 6_000_000  # stack, arena and scratch of one more: tiny and wan_shapes decoded by two threads, less by one
_CONV_CODE = 2_500_000  # oneDNN's, made for each shape: decoding with a tiny model on 4 ranks, less the same
_HEAP_SHARE, _HEAP_MOST = 2, 15_000_000  # half of small tensors, freed but kept: the tiny VAE at 96x160
_MP4_BYTES_PER_PIXEL = 230
_LATENTS_HELD = 8  # noise, model input, two predictions, their combination, the solver's last two and its result


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """A transformer's config, as far as it decides what a forward takes. condition_tokens: of text, and of images where
    the model attends to them; outputs: channels of a token's output."""

    width: int
    ffn: int
    blocks: int
    condition_tokens: int = MAX_TEXT_TOKENS
    outputs: int = 64

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, image_tokens: int = 0) -> "TransformerSize":
        """A key that an old config.json lacks takes the default of diffusers' class."""
        patch_t, patch_h, patch_w = config.get("patch_size", (1, 2, 2))
        return cls(
            width=config.get("num_attention_heads", 40) * config.get("attention_head_dim", 128),
            ffn=config.get("ffn_dim", 13824),
            blocks=config.get("num_layers", 40),
            condition_tokens=MAX_TEXT_TOKENS + image_tokens,
            outputs=(config.get("out_channels") or 16) * patch_t * patch_h * patch_w,
        )


def remembered_bytes(size: TransformerSize, *, tp: int, dtype_bytes: int, branches: int) -> int:
    """Keys and values of the text (and image) in every block, for each branch that this rank computes, and the
    embeddings that they are remembered by."""
    tokens = branches * size.condition_tokens * dtype_bytes
    return tokens * (2 * size.blocks * size.width // tp + size.width)


def denoise_bytes(
    size: TransformerSize,
    tokens: int,
    *,
    tp: int = 1,
    ulysses: int = 1,
    ring: int = 1,
    dtype_bytes: int,
    branches: int = 1,
    cpu: bool = False,
    steps: int = 2,
    remembered: bool = True,
    together: bool = False,
    per_token_timesteps: bool = False,
) -> int:
    """The first rank's peak over the denoising loop.

    The largest of three moments, above what is remembered of the prompts and the latents of the loop:

    - the patch embedding: the convolution's output and its copy in token order, `2 L d`;
    - the first block, during which the model still holds the embedding of all tokens, `L d`;
    - any later block, `l d` instead.

    branches: those that this rank computes (1 on a cfg axis of 2). steps: with one, no block but the last meets all
    that is remembered. remembered: false where blocks compute the keys anew (then one block's exist at a time).
    together: both branches pass through each block before the next: hidden states exist twice, temporaries once.
    per_token_timesteps: the modulation is one of each token (an image as first frame, `expand_timesteps`).
    """
    mine = split_sizes(tokens, ring * ulysses)[0]
    block = _block_bytes(size, mine, tp=tp, ulysses=ulysses, ring=ring, dtype_bytes=dtype_bytes, cpu=cpu)
    hidden, everything = (rows * size.width * dtype_bytes for rows in (mine, tokens))
    if per_token_timesteps:  # its six parts, the embedding they are made from, and in a block their sum and one `1 + x`
        block += mine * size.width * (7 * dtype_bytes + 7 * _FP32)
    copies = branches if together else 1
    waiting = (copies - 1) * hidden
    text = remembered_bytes(size, tp=tp, dtype_bytes=dtype_bytes, branches=branches)
    if not remembered:
        text //= size.blocks
    text_at_first_block = text if steps > 1 or not remembered else text * (branches - 1) // branches
    # of all tokens on every rank: gathered, what was received for it and what was sent, and joined in video order
    output = tokens * size.outputs * dtype_bytes * (2 if ring * ulysses == 1 else 4)
    moments = (
        text_at_first_block + waiting + 2 * everything,
        text_at_first_block + waiting + everything + block,
        text + waiting + hidden + block,
        text + waiting + hidden + output,
    )
    return max(moments) + _LATENTS_HELD * tokens * size.outputs * _FP32


def _block_bytes(
    size: TransformerSize, mine: int, *, tp: int, ulysses: int, ring: int, dtype_bytes: int, cpu: bool
) -> int:
    """A block's temporaries beside the hidden states that its caller holds, in units of `l d` elements.

    Self-attention: the normed input, and of this rank's heads q, k, v and the result; Ulysses' received q, k, v
    besides, and as much that is sent or joined; the ring's two buffers of k and v and the fp32 result, merged (from a
    copy, in bf16, of the part's) into a new one; on a CPU, k and v in the kernel's order.
    Feed-forward: hidden states, attention's result, the normed input, the output, and either what is `f` wide or the
    residual's fp32 terms (two of them copies in bf16).
    """
    units = mine * size.width
    exchanged = 5 if ulysses > 1 else 0  # three received; two more that are sent, or k and v in order, or joined
    if ring > 1:
        merge = 3 * _FP32 / dtype_bytes if dtype_bytes < _FP32 else 3 if cpu else 2
        heads = 3 + (3 if ulysses > 1 else 0) + 4 + 1 + merge
    else:
        heads = 3 + 1 + (exchanged or (2 if cpu else 0))
    attention = units * dtype_bytes * (1 + heads / tp)
    wide = mine * size.ffn * dtype_bytes / tp
    residual = units * _FP32 * (3 if dtype_bytes < _FP32 else 2)
    return int(max(attention, 4 * units * dtype_bytes + max(wide, residual)))


def text_encoder_bytes(config: Mapping[str, Any], *, dtype_bytes: int, prompts: int = 2) -> int:
    """A UMT5 encoder's peak: prompts pass one after the other, padded to 512 tokens.

    The largest of: attention (the bias by relative position, its copy with the mask, and one more of
    `[heads, 512, 512]`, beside q, k, v, the normed input, the hidden states and the result), the gated feed-forward
    (four `d_ff` wide, as the activation is made of several operations, and four `d_model` wide), and the table of
    relative positions, int64 and fp32, which is the largest in a small model. Above it: all prompts' embeddings, twice.
    """
    tokens, width = MAX_TEXT_TOKENS, config["d_model"]
    heads, inner = config["num_heads"], config["num_heads"] * config["d_kv"]
    attention = 3 * heads * tokens**2 + tokens * (3 * width + 3 * inner)
    feed_forward = 4 * tokens * (config["d_ff"] + width)
    positions = tokens**2 * (6 * 8 + 4 + 1) + tokens * (width + 3 * inner + width) * dtype_bytes
    embeddings = 2 * prompts * tokens * width * dtype_bytes
    return max(attention * dtype_bytes, feed_forward * dtype_bytes, positions) + tokens**2 + embeddings


def image_encoder_bytes(config: Mapping[str, Any], *, images: int = 1) -> int:
    """CLIP's vision model, fp32, all images at once: the outputs of all layers (the last but one is wanted, all are
    kept), and in a layer two more and three as wide as the feed-forward (quick GELU is two operations)."""
    patches = (config["image_size"] // config["patch_size"]) ** 2 + 1
    width, ffn = config["hidden_size"], config["intermediate_size"]
    pixels = 3 * config["image_size"] ** 2
    return _FP32 * images * (pixels + patches * (width * (config["num_hidden_layers"] + 2) + 3 * ffn))


@dataclass(frozen=True)
class _Conv:
    """A 3x3x3 convolution of a residual block, with what is alive around it, as channels at its own resolution.

    scale: its resolution over the latents', squared. held: of whole tensors beside its input, its output and the time
    cache (the input of its level, of its block, the shortcut).
    """

    inputs: int
    outputs: int
    frames: int
    scale: int
    held: int


def vae_decode_bytes(
    config: Mapping[str, Any],
    *,
    frames: int,
    rows: int,
    columns: int,
    ranks: int = 1,
    dtype_bytes: int = _FP32,
    cpu: bool = False,
) -> int:
    """Decoding latents of `frames x rows x columns`, the rows split over `ranks`: the first rank's peak.

    The peak is at a residual block's convolution: see `_vae_bytes`. Beside it: the latents (as they came, and
    de-normalised), and this rank's rows of the frames that were decoded before these, before and after clamping.
    """
    stride_s, stride_t = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    latents = 2 * config.get("z_dim", 16) * frames * rows * columns * _FP32
    mine = split_sizes(rows, ranks)[0]
    pixels = 3 * (stride_t if frames > 1 else 1) * mine * columns * stride_s**2 * dtype_bytes
    blocks = _decoder(config, 1 if frames == 1 else 2)
    peak = _vae_bytes(config, blocks, frames, rows, columns, ranks, dtype_bytes, cpu, decoder=True)
    return peak + latents + 2 * pixels


def vae_encode_bytes(
    config: Mapping[str, Any],
    *,
    frames: int,
    rows: int,
    columns: int,
    ranks: int = 1,
    dtype_bytes: int = _FP32,
    cpu: bool = False,
) -> int:
    """Encoding a video to latents of `frames x rows x columns`, four frames of pixels at a time: as
    `vae_decode_bytes`, beside the pixels of all frames of this rank's rows (twice, where they are patchified)."""
    stride_s, stride_t = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    mine = split_sizes(rows, ranks)[0]
    pixels = 3 * (stride_t * (frames - 1) + 1) * mine * columns * stride_s**2 * dtype_bytes
    blocks = _encoder(config, 1 if frames == 1 else 2)
    peak = _vae_bytes(config, blocks, frames, rows, columns, ranks, dtype_bytes, cpu, decoder=False)
    return peak + pixels * (2 if config.get("patch_size") else 1)


def _levels(config: Mapping[str, Any], *, decoder: bool) -> list[tuple[int, int, int, int]]:
    """`(inputs, outputs, frames, scale)` of each level, in order: channels that come in and that its blocks give,
    frames of one turn after the first, and its resolution over the latents', squared."""
    base = config.get("decoder_base_dim" if decoder else "base_dim") or config.get("base_dim", 96)
    mult = list(config.get("dim_mult", (1, 2, 4, 4)))
    down = list(config.get("temperal_downsample", (False, True, True)))
    residual = config.get("is_residual", False)
    if decoder:
        mult, times = [mult[-1], *reversed(mult)], [2 if up else 1 for up in reversed(down)]
    else:
        mult, times = [1, *mult], [2 if halved else 1 for halved in down]
    levels, at, scale = [], 1, 1
    for index, (first, then) in enumerate(pairwise(mult)):
        inputs = base * first // (2 if decoder and index and not residual else 1)
        levels.append((inputs, base * then, at, scale))
        if index < len(times):
            at, scale = at * times[index], scale * 4
    if decoder:
        return levels
    # the encoder begins where the decoder ends: with all frames of a turn, at the resolution of its pixels
    return [(inputs, outputs, at // frames, scale // fine) for inputs, outputs, frames, fine in levels]


def _decoder(config: Mapping[str, Any], turns: int) -> Iterator[_Conv]:
    residual = config.get("is_residual", False)
    for inputs, outputs, frames, scale in _levels(config, decoder=True):
        level = inputs * (2 if residual else 1)  # what came in, held by the loop over levels; cloned for its shortcut
        yield from _blocks(
            inputs, outputs, config.get("num_res_blocks", 2) + 1, frames if turns > 1 else 1, scale, level
        )


def _encoder(config: Mapping[str, Any], turns: int) -> Iterator[_Conv]:
    residual = config.get("is_residual", False)
    for inputs, outputs, frames, scale in _levels(config, decoder=False):
        level = 2 * inputs if residual else 0
        yield from _blocks(inputs, outputs, config.get("num_res_blocks", 2), frames if turns > 1 else 1, scale, level)


def _blocks(inputs: int, outputs: int, count: int, frames: int, scale: int, level: int) -> Iterator[_Conv]:
    """The convolutions of `count` residual blocks in a row, of which the first changes the number of channels."""
    for index in range(count):
        begins = inputs if index == 0 else outputs
        block = 0 if index == 0 and level else begins  # the first block's input is the level's
        shortcut = outputs if begins != outputs else 0
        yield _Conv(begins, outputs, frames, scale, level + block + shortcut)
        yield _Conv(outputs, outputs, frames, scale, level + block + shortcut)


def _vae_bytes(
    config: Mapping[str, Any],
    convs: Iterator[_Conv],
    frames: int,
    rows: int,
    columns: int,
    ranks: int,
    dtype_bytes: int,
    cpu: bool,
    *,
    decoder: bool,
) -> int:
    """The largest convolution, with everything that is alive then, above the time cache of all of them.

    At a convolution: what its callers hold, its input, the input's last two frames (which become the cache), the input
    behind the cached two and between halo rows, and the output. On a CPU also what the library makes of it: oneDNN
    copies input and output to its own order, 16 channels at a time; torch leaves images with
    `channels * frames * rows <= 20480` to its own kernel, which writes the input out 27 times (im2col). On a GPU a
    tenth of the tensors stands for cuDNN's workspace, which is not known; on a CPU the C library keeps some of what was
    freed.
    The cache is counted full: two frames of every convolution's input.
    """
    mine, halo = split_sizes(rows, ranks)[0], 2 if ranks > 1 else 0
    past = 2 if frames > 1 else 0
    cached, largest = 0, 0
    for conv in convs:
        area = mine * columns * conv.scale
        cached += max(past, 1) * conv.inputs * area
        height = mine * int(conv.scale**0.5)
        joined = (conv.frames + past) * (area + halo * columns * int(conv.scale**0.5)) if past or halo else 0
        tensors = (
            area * (conv.frames * (conv.held + conv.inputs + conv.outputs) + max(past, 1) * conv.inputs)
            + joined * conv.inputs
        )
        if cpu:
            seen = conv.frames + past
            if conv.inputs * seen * (height + halo) > 20480:
                tensors += (joined or seen * area) * _blocked(conv.inputs) + conv.frames * area * _blocked(conv.outputs)
            else:
                tensors += conv.inputs * (27 if past else 9) * conv.frames * area
        largest = max(largest, tensors)
    if decoder:
        cached += max(past, 1) * conv.outputs * area  # of the last convolution, which makes the pixels
    total = (cached + largest) * dtype_bytes
    return total + (_CONV_CODE + min(total // _HEAP_SHARE, _HEAP_MOST) if cpu else total // 10)


def _blocked(channels: int) -> int:
    return -(-channels // 16) * 16


def process_bytes(*, pixels: int = 0, threads: int = 1) -> int:
    """What a rank's process takes besides weights and tensors, once its modules are imported: meta models, matrix
    products' scratch, thread stacks; gloo's threads on several ranks are too little to show.

    pixels: of one frame, on the rank that writes an mp4: the encoder keeps some 60 frames and their finer planes.
    Measured: x264 takes 229 B a pixel at 256x256, 235 at 480x832 and 228 at 720x1280.
    """
    return _PROCESS + (threads - 1) * _THREAD + _MP4_BYTES_PER_PIXEL * pixels
