"""Clips to train on show what they are said to show, in words that the model knows."""

import itertools
import random

import numpy as np
import pytest

from support.checkpoints import WAN_SHAPES
from wan_dist.shapes.captions import caption, training_caption, vocabulary
from wan_dist.shapes.clips import coverage, draw_clip, paint, place, recoloured, render
from wan_dist.shapes.meaning import describe
from wan_dist.shapes.outlines import EXTENT
from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene

SIZES = [(64, 64, 9), (64, 64, 17), (64, 96, 17), (96, 64, 9)]  # height, width, frames


def scenes() -> list[Scene]:
    """Every shape in every direction, and in turn every colour and background that can be told apart."""
    shown = [(c, b) for c, b in itertools.product(COLOURS, BACKGROUNDS) if c != b]
    pairs = itertools.product(SHAPES, DIRECTIONS)
    return [Scene(c, shape, way, b) for (shape, way), (c, b) in zip(pairs, itertools.cycle(shown), strict=False)]


def frames_of(clip, height=64, width=64, frames=17) -> np.ndarray:
    return np.round((render(clip, height, width, frames) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: scene.prompt)
def test_clips_are_seen_as_what_they_were_drawn_as(scene):
    rng = random.Random(scene.prompt)
    height, width, frames = rng.choice(SIZES)
    answers = describe(frames_of(place(scene, rng, height, width, frames), height, width, frames)).answers(scene)
    assert all(answers.values()), answers


def test_frames_are_of_eight_bits_and_the_object_stays_inside():
    rng = random.Random(1)
    for _ in range(50):
        height, width, frames = rng.choice(SIZES)
        clip = draw_clip(rng, height, width, frames)
        pixels = render(clip, height, width, frames)
        assert pixels.shape == (3, frames, height, width) and pixels.dtype == np.float32
        levels = (pixels + 1) * 127.5
        assert np.abs(levels - np.round(levels)).max() < 1e-4 and pixels.min() >= -1 and pixels.max() <= 1
        covered = coverage(clip, height, width, frames)
        assert not covered[:, [0, -1]].any() and not covered[:, :, [0, -1]].any()
        widest = (covered.max(axis=(0, 1)) > 0).sum() - abs(clip.speed[0]) * (frames - 1)
        assert widest <= 2 * EXTENT[clip.scene.shape] * clip.radius + 3


def test_one_seed_is_one_clip_and_a_crop_is_a_part_of_it():
    clip = draw_clip(random.Random(3))
    assert clip == draw_clip(random.Random(3)) != draw_clip(random.Random(4))
    whole, crop = coverage(clip), coverage(clip, 32, 24, 9, corner=(20.0, 16.0))
    assert np.allclose(crop, whole[:9, 16:48, 20:44], atol=1e-5)


def test_other_colours_change_nothing_else():
    clip = draw_clip(random.Random(5))
    other = recoloured(clip, random.Random(6))
    covered = coverage(clip)
    assert (coverage(other) == covered).all() and not np.allclose(paint(other, covered), paint(clip, covered))


def test_captions_are_of_words_that_the_shipped_tokenizer_knows():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WAN_SHAPES / "tokenizer")
    rng, clips = random.Random(7), [draw_clip(random.Random(n)) for n in range(400)]
    captions = [caption(clip, rng) for clip in clips] + [clip.scene.prompt for clip in clips]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(captions).input_ids)
    assert sorted(set(tokenizer.get_vocab()) - {"<pad>", "</s>", "<unk>"}) == vocabulary()


def test_captions_name_the_colour_and_some_are_missing_or_foreign():
    rng, clips = random.Random(8), [draw_clip(random.Random(n)) for n in range(1000)]
    assert all(clip.scene.colour in caption(clip, rng).lower() for clip in clips)
    captions = [training_caption(clip, rng) for clip in clips]
    assert 40 < captions.count("") < 110
    assert 40 < sum("unknown" in text for text in captions) < 140
