"""The hint about words that the default model has never seen."""

import shutil

import pytest

from support.checkpoints import WAN_SHAPES
from wan_dist.agent.hints import vocabulary_hint
from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_said_of_what_it_knows(shape):
    for direction in DIRECTIONS:
        for background in BACKGROUNDS:
            for colour in COLOURS:
                assert vocabulary_hint(Scene(colour, shape, direction, background).prompt, WAN_SHAPES) is None


@pytest.mark.parametrize(
    "prompt", ["A Red CIRCLE, moving right on a black background.", "a ｒed ball moving up on gray"]
)
def test_words_are_seen_as_the_tokenizer_sees_them(prompt):
    assert vocabulary_hint(prompt, WAN_SHAPES) is None


def test_unknown_words_are_named_once_and_known_ones_listed():
    hint = vocabulary_hint("a cat, a Cat and a red dog!", WAN_SHAPES)
    assert "wan_shapes does not know 'cat', 'dog', '!'" in hint
    for word in (*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS):
        assert word in hint


def test_the_words_are_the_tokenizers_own():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WAN_SHAPES / "tokenizer")
    for prompt in ("a red circle-moving (right)", "don't: a_b 海 café", "blue,square.", "a\u00a0star\n up"):
        tokens = tokenizer(prompt).input_ids[:-1]
        hint = vocabulary_hint(prompt, WAN_SHAPES)
        assert (tokenizer.unk_token_id in tokens) == (hint is not None), prompt


def test_other_models_are_left_alone(tmp_path):
    copy = shutil.copytree(WAN_SHAPES, tmp_path / "copy")
    assert vocabulary_hint("a cat", copy) is None
    link = tmp_path / "link"
    link.symlink_to(WAN_SHAPES)
    assert vocabulary_hint("a cat", link) is not None
    assert vocabulary_hint(None, WAN_SHAPES) is None
