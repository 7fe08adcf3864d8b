"""Decoding as a part of a generation: by all ranks or by one, by fewer than there are, when the experts are gone."""

import gc
import time
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from support.ranks import frozen, generate_all, run_cases, run_generation
from support.tiers import named_in_all
from wan_dist.pipeline import generate as screen
from wan_dist.pipeline import video

FRAMES = {"output.formats": ["frames"]}
TWO_ROWS = {"video.height": 16, "video.width": 48, "video.num_frames": 5, **FRAMES}
SIZE_OF_THE_LATENTS = {"video.height": None, "video.width": None, "video.num_frames": None}
FOUR_ROWS = {"video.height": 32, "video.num_frames": 13, **FRAMES}


def test_all_ranks_or_one_draw_the_same_frames(tmp_path, tiny):
    cases = {
        "one rank": FOUR_ROWS,
        "alone of three": {**FOUR_ROWS, "parallelism.ulysses": 3, "parallelism.vae": "off"},
        "three": {**FOUR_ROWS, "parallelism.ulysses": 3, "parallelism.vae": "on"},
        **named_in_all(
            {"channels last": {**FOUR_ROWS, "parallelism.ring": 3, "runtime.vae_channels_last": "on"}},
        ),
        "cfg and tp too": {**FOUR_ROWS, "parallelism.cfg": 2, "parallelism.tp": 2},
    }
    results = dict(zip(cases, generate_all(tmp_path, [(tiny, case) for case in cases.values()]), strict=True))
    whole = results["one rank"]["frames"].int()
    for name, result in results.items():
        assert (result["frames"].int() - whole).abs().max() <= 1, name
    ranks = {
        name: [rank["bytes_read"].get("vae", 0) > 0 for rank in r["record"]["ranks"]] for name, r in results.items()
    }
    assert ranks["alone of three"] == [True, False, False] and ranks["three"] == [True] * 3
    assert ranks["cfg and tp too"] == [True] * 4
    placements = {row["component"]: row["reason"] for row in results["three"]["record"]["plan"]}
    assert "on 3 ranks" in placements["vae"]


def test_ranks_without_rows_leave_the_others_to_it(tmp_path, tiny):
    one, four = generate_all(tmp_path, [(tiny, TWO_ROWS), (tiny, {**TWO_ROWS, "parallelism.ulysses": 4})])
    assert (one["frames"].int() - four["frames"].int()).abs().max() <= 1
    assert [rank["bytes_read"].get("vae", 0) > 0 for rank in four["record"]["ranks"]] == [True, True, False, False]


def test_latents_are_decoded_on_any_mesh(tmp_path, tiny):
    request = {**FOUR_ROWS, "output.formats": ["frames", "latents"], "parallelism.ulysses": 2}
    (whole,) = generate_all(tmp_path, [(tiny, request)])
    latents = {"task": "decode", "latents": whole["record"]["outputs"]["latents"], "output.formats": ["frames"]}
    cases = {
        "one rank": latents,
        "heads do not matter": {**latents, "parallelism.tp": 3},
        "alone of two": {**latents, "parallelism.tp": 2, "parallelism.vae": "off"},
        **named_in_all({"five": {**latents, "parallelism.ring": 5}}),  # one has no rows
    }
    again = [
        (tiny, {**SIZE_OF_THE_LATENTS, "output.name": f"again{n}", **case}) for n, case in enumerate(cases.values())
    ]
    for name, result in zip(cases, generate_all(tmp_path, again), strict=True):
        assert (result["frames"].int() - whole["frames"].int()).abs().max() <= 1, name
        assert result["record"]["outputs"].keys() == {"frames"}, name
    assert Path(latents["latents"]).is_file()


def test_a_vae_in_bfloat16_is_close(tmp_path, tiny):
    half = {**FOUR_ROWS, "runtime.vae_dtype": "bfloat16"}
    whole, *halves = generate_all(
        tmp_path, [(tiny, FOUR_ROWS), (tiny, half), (tiny, {**half, "parallelism.ulysses": 2})]
    )
    for result in halves:
        difference = (result["frames"].int() - whole["frames"].int()).abs().float()
        assert 0 < difference.mean() < 3


def generate_with_a_slow_decoder(env, config) -> bool:
    """Whether the files were written, though decoding takes longer than any collective may wait."""
    decode_frames = video.decode_frames

    def slow(*args):
        time.sleep(2)
        yield from decode_frames(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "decode_frames", slow)
        return bool(run_generation(env, config))


def test_ranks_with_nothing_to_decode_wait_as_long_as_it_takes(tmp_path, tiny):
    alone = {**TWO_ROWS, "parallelism.ulysses": 2, "parallelism.vae": "off", "runtime.timeout_s": 1.0}
    assert run_cases(2, generate_with_a_slow_decoder, [(frozen(tmp_path, tiny, **alone),)]) == [[True, False]]


def transformers_while_decoding(env, config) -> int:
    """How many transformers are there when decoding begins, more than before the run."""
    seen, write_video = [-_transformers()], screen.write_video

    def watched(*args):
        seen.append(_transformers())
        write_video(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "write_video", watched)
        run_generation(env, config)
    return sum(seen)


def _transformers() -> int:
    return sum(isinstance(thing, WanTransformer3DModel) for thing in gc.get_objects())


def test_the_experts_are_gone_when_decoding_begins_unless_they_are_resident(tmp_path, checkpoints):
    path = checkpoints(experts=2, boundary_ratio=0.9)
    expected = {"resident": 2, "component": 0, "layerwise": 0, "fsdp": 0}
    configs = []
    for how in expected:
        order = {"parallelism.fsdp.enabled": "on"} if how == "fsdp" else {"offload.transformer": how}
        configs.append(frozen(tmp_path, path, **TWO_ROWS, **order, **{"parallelism.ulysses": 2, "output.name": how}))
    found = run_cases(2, transformers_while_decoding, [(config,) for config in configs])
    assert found == [[count, count] for count in expected.values()]
