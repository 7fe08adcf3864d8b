"""Streamed blocks give the bits of resident ones, whatever runs, fails or is changed between two passes; each block
travels once a pass."""

from collections import Counter
from functools import partial

import pytest
import torch

from support.sharded import load, match, save_transformer
from support.streaming import (
    ALONE,
    BLOCKS,
    FAILING_WHERE,
    FailureError,
    Streamed,
    assert_real,
    assert_right,
    failing,
    is_within,
    match_stack,
    noise,
    requests,
    save_stack,
    stream_all,
    stream_one,
    whole_stack,
)
from wan_dist.loading.checkpoint import open_checkpoint
from wan_dist.loading.components import match_text_encoder
from wan_dist.loading.weights import fill
from wan_dist.models.wan_transformer import forget_block_text
from wan_dist.offload.lockstep import in_lockstep
from wan_dist.offload.slots import SlotRing

CPU = torch.device("cpu")
STATE = whole_stack().state_dict()


@pytest.fixture(autouse=True)
def _without_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stack(tmp_path_factory.mktemp("stacks") / "stack")


@pytest.fixture
def streamed(folder):
    """`streamed(prefetch=..., resident=...)`: the stack with its blocks streamed."""
    return lambda **how: stream_one(match_stack(folder), **how)


@pytest.mark.parametrize("resident", [0, 2, BLOCKS])
@pytest.mark.parametrize("prefetch", [0, 1, 2, BLOCKS])
def test_streamed_is_resident_bit_for_bit(streamed, prefetch, resident):
    it = streamed(prefetch=prefetch, resident=resident)
    assert (it.stream is None) == (resident == BLOCKS)
    if it.stream is not None:
        assert len(it.ring.slots) == min(prefetch + 1, BLOCKS - resident)
        assert len(it.stream._blocks) == BLOCKS - resident
    assert_right(it)
    assert_right(it)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_every_streamed_block_travels_once_a_pass_and_only_the_first_is_late(streamed, prefetch, resident):
    it, count = streamed(prefetch=prefetch, resident=resident), BLOCKS - resident
    nbytes = sum(place.layout.total for place in it.host.blocks)
    memory = [{dtype: buffer.data_ptr() for dtype, buffer in slot.buffers.items()} for slot in it.ring.slots]
    ahead = min(prefetch, count - 1)
    for number, x in enumerate(requests(4)):
        it.model(x)
        if prefetch >= count - 1:  # all of them have a slot
            assert (it.ring.copies, it.ring.late) == (count, 1)
            continue
        assert it.ring.copies == count * (number + 1) + ahead
        assert it.ring.late == (it.ring.copies if prefetch == 0 else 1)
        assert sum(slot.holds is not None for slot in it.ring.slots) == prefetch + 1
        assert not any(slot.in_use for slot in it.ring.slots)
    assert it.ring.copied_bytes * count == it.ring.copies * nbytes  # all blocks of the stack are alike
    now = [{dtype: buffer.data_ptr() for dtype, buffer in slot.buffers.items()} for slot in it.ring.slots]
    assert sorted(map(str, now)) == sorted(map(str, memory))
    assert all(slot.buffers[torch.float32].numel() == nbytes // count for slot in it.ring.slots)


def test_a_ring_with_a_slot_for_every_block_copies_each_once(streamed):
    it = streamed(prefetch=BLOCKS)
    for x in requests(3):
        it.model(x)
    assert (it.ring.copies, it.ring.late) == (BLOCKS, 1)


@pytest.mark.parametrize("order", [(0, 1, 5), (5, 4, 3, 2, 1, 0), (0, 1, 2, 3, 3, 4, 5), (2, 0), (4,), ()], ids=str)
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, BLOCKS])
def test_skipped_reversed_and_repeated_blocks_have_their_own_weights(streamed, prefetch, order):
    it = streamed(prefetch=prefetch)
    assert_right(it)
    assert_right(it, order=order)
    assert_right(it)


@pytest.mark.parametrize(
    ("order", "late"), [(range(BLOCKS), 0), ((0, 1, 2, 3, 3, 4, 5), 0), ((0, 1, 5), 1), ((1, 2, 3, 4, 5), 1)], ids=str
)
def test_only_what_nobody_expected_is_late(streamed, order, late):
    it = streamed(prefetch=1)
    it.model(requests()[0])
    for count, blocks in ((late, order), (0, range(BLOCKS))):
        before = it.ring.late
        it.model(requests()[0], blocks)
        assert it.ring.late - before == count


def test_a_ring_writes_over_nothing_that_is_in_use_or_needed_sooner(streamed):
    a, b, c, d, *_ = places = streamed().host.blocks
    ring = SlotRing([place.layout for place in places], 2, CPU)

    def held() -> set[int]:
        return {number for number, place in enumerate(places) if any(slot.holds is place for slot in ring.slots)}

    ring.prefetch([a])
    ring.prefetch([b])
    ring.prefetch([a, c])
    assert held() == {0, 2} and ring.copies == 3
    slot = ring.acquire(a)
    ring.prefetch([c, b, d])
    ring.prefetch([b])
    assert held() == {0, 1} and ring.copies == 4
    for tensor, on_host in zip(slot.tensors(a.layout), a.tensors().values(), strict=True):
        assert torch.equal(tensor, on_host)
    other = ring.acquire(d)
    assert other is not slot and held() == {0, 3} and ring.late == 1
    ring.prefetch([b])
    assert held() == {0, 3}
    ring.finish(slot)
    ring.prefetch([b, c])
    assert held() == {1, 3} and ring.copies == 6


def test_between_blocks_a_model_shows_its_real_weights(streamed):
    it, seen = streamed(prefetch=1), []

    def look(block, _args):
        shown = it.model.state_dict()
        seen.append(all(torch.equal(shown[name], tensor) for name, tensor in STATE.items()))
        slots = [buffer for slot in it.ring.slots for buffer in slot.buffers.values()]
        seen.append(all(any(is_within(p, memory) for memory in slots) for p in block.parameters()))

    for block in it.model.blocks:
        block.register_forward_pre_hook(look)
    assert_right(it)
    assert seen == [True] * (2 * 2 * BLOCKS)


@pytest.mark.parametrize("prefetch", [0, 1, BLOCKS])
def test_disabled_it_is_an_ordinary_model_and_streams_again(streamed, prefetch):
    it = streamed(prefetch=prefetch)
    assert_right(it)
    for _ in range(2):
        it.stream.disable()
        it.stream.disable()
        assert not it.stream.is_streaming
        copies = it.ring.copies
        for x in requests(2):
            assert torch.equal(it.model(x), whole_stack()(x))
        assert it.ring.copies == copies
        assert not any(is_within(parameter, it.host.memory) for parameter in it.model.parameters())
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in it.model.blocks)
        it.stream.enable()
        it.stream.enable()
        assert it.stream.is_streaming
        assert_real(it, STATE)
        assert all(len(block._forward_hooks) == len(block._forward_pre_hooks) == 1 for block in it.model.blocks)
        assert_right(it)
        assert it.ring.copies > copies


@pytest.mark.parametrize("resident", [0, 2])
def test_weights_that_are_changed_while_disabled_are_streamed_from_then_on(streamed, resident):
    it, merged = streamed(resident=resident), whole_stack()
    assert_right(it)
    for model in (merged, it.model):
        with it.stream.disabled() if model is it.model else torch.no_grad():
            for number in (0, 3, 4):
                model.blocks[number].linear.weight.add_(noise(24, 1, seed=40 + number) @ noise(1, 24, seed=number))
            if model is it.model:
                assert torch.equal(host_weight(it), STATE["blocks.0.linear.weight"])  # the host's copy is not touched
                assert torch.equal(model(requests()[0]), merged(requests()[0]))
    assert torch.equal(host_weight(it), merged.blocks[0].linear.weight)
    assert not torch.equal(host_weight(it), STATE["blocks.0.linear.weight"])
    assert_right(it, whole=merged)
    with pytest.raises(ValueError, match="on the way"), it.stream.disabled():
        it.model.blocks[1].scale.fill_(3)
        raise ValueError("on the way")
    merged.blocks[1].scale.fill_(3)
    assert_right(it, whole=merged)


def host_weight(it: Streamed) -> torch.Tensor:
    return it.host.blocks[0].tensors()["linear.weight"]


@pytest.mark.parametrize("where", FAILING_WHERE)
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_pass_that_fails_leaves_the_next_ones_right(streamed, prefetch, where):
    it = streamed(prefetch=prefetch)
    assert_right(it)
    failing(it.model, where, times=2)
    for _ in range(2):
        with pytest.raises(FailureError):
            it.model(requests()[0])
        assert_real(it, STATE)
        assert not any(slot.in_use for slot in it.ring.slots)
    assert_right(it)


def test_two_models_take_turns_on_one_ring(folder, tmp_path):
    other = save_stack(tmp_path / "other", seed=1)
    both = stream_all({"high": match_stack(folder), "low": match_stack(other)}, prefetch=2)
    high, low = both.values()
    wholes = [whole_stack(0), whole_stack(1)]
    assert high.ring is low.ring
    x, ring = requests()[0], high.ring
    for _ in range(2):
        for it, whole, following in ((high, wholes[0], high), (high, wholes[0], low), (low, wholes[1], low)):
            it.stream.next_stream = following.stream
            late = ring.late
            assert torch.equal(it.model(x), whole(x))
            assert ring.late == late + (ring.copies <= BLOCKS + 2)
        low.stream.next_stream = high.stream
        assert torch.equal(low.model(x), wholes[1](x))
        for it, whole in zip((high, low), wholes, strict=True):
            assert_real(it, whole.state_dict())
    assert ring.late == 1
    low.stream.next_stream = None  # back without a word
    assert torch.equal(low.model(x), wholes[1](x))
    assert torch.equal(high.model(x), wholes[0](x))


def test_behind_the_last_pass_nothing_is_prefetched(streamed):
    it = streamed(prefetch=3)
    it.stream.next_stream = None
    it.model(requests()[0])
    assert it.ring.copies == BLOCKS


@pytest.mark.parametrize("widths", [(8, 40), (40, 8)])
def test_a_ring_holds_the_largest_block_of_all_models(tmp_path, widths):
    folders = {width: save_stack(tmp_path / str(width), seed=width, width=width) for width in widths}
    matched = {str(width): match_stack(folder, width=width) for width, folder in folders.items()}
    for width, it in zip(widths, stream_all(matched).values(), strict=True):
        whole, x = whole_stack(width, width=width), noise(3, width)
        assert torch.equal(it.model(x), whole(x))
        assert_real(it, whole.state_dict())


# Real models


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return save_transformer(tmp_path_factory.mktemp("transformers") / "it", num_layers=4)


def forward(model, seed: int, text=None) -> torch.Tensor:
    text = noise(1, 512, 32, seed=seed + 100) if text is None else text
    latents, timestep = noise(1, 16, 2, 6, 8, seed=seed), torch.tensor([900 - seed])
    return model(latents.to(text.dtype), timestep, text, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transformer_with_its_fp32_islands(transformer, dtype):
    whole = load(ALONE, match(ALONE, transformer, dtype))
    it = stream_one(match(ALONE, transformer, dtype), prefetch=1, resident=1, released=forget_block_text)
    dtypes = {parameter.dtype for parameter in it.stream._blocks[0].parameters()}
    assert dtypes == {torch.float32, dtype} and it.ring.slots[0].buffers.keys() == dtypes
    texts = [noise(1, 512, 32, seed=seed).to(dtype) for seed in (1, 2)]
    for step in range(2):
        results = in_lockstep(it.stream, [partial(forward, it.model, step, text) for text in texts])
        for result, text in zip(results, texts, strict=True):
            assert torch.equal(result, forward(it.model, step, text))
            assert torch.equal(result, forward(whole, step, text))
    assert_real(it, whole.state_dict())
    it.stream.disable()
    assert torch.equal(forward(it.model, 1, texts[1]), forward(whole, 1, texts[1]))


def test_keys_of_a_prompt_are_remembered_where_the_block_stays_alone(transformer):
    it = stream_one(match(ALONE, transformer), prefetch=1, resident=2, released=forget_block_text)
    calls: Counter[int] = Counter()
    for number, block in enumerate(it.model.blocks):
        block.attn2.to_k.register_forward_hook(lambda *_args, number=number: calls.update([number]))
    streamed = [number for number, block in enumerate(it.model.blocks) if block in it.stream._blocks]
    assert len(streamed) == 2
    texts = [noise(1, 512, 32, seed=seed) for seed in (1, 2)]
    for step in range(3):
        in_lockstep(it.stream, [partial(forward, it.model, step, text) for text in texts])
        for number, block in enumerate(it.model.blocks):
            assert bool(block.attn2.processor.text_kv._entries) == (number not in streamed)
    assert calls == {number: 6 if number in streamed else 2 for number in range(4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_text_encoder(tiny, dtype, prefetch):
    checkpoint = open_checkpoint(tiny)
    whole = fill(match_text_encoder(checkpoint, dtype=dtype), device=CPU)
    it = stream_one(match_text_encoder(checkpoint, dtype=dtype), prefetch=prefetch, block_list="encoder.block")
    assert len(it.stream._blocks) == len(whole.encoder.block) > 1
    for length in (7, 3):
        ids = torch.arange(2, 2 + 12).view(1, 12)
        mask = (torch.arange(12) < length).long().view(1, 12)
        assert torch.equal(it.model(ids, mask).last_hidden_state, whole(ids, mask).last_hidden_state)
    assert_real(it, whole.state_dict())
