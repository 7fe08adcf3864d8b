"""What clips are called in training: the plain sentence and other ways to say it, missing words, and foreign ones."""

import random
import re

from wan_dist.shapes.clips import Clip
from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

# Other words for a word, as often as they stand here; what is not here has one name.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": (*["circle"] * 8, "ball", "disc"),
    "square": (*["square"] * 9, "box"),
    "gray": (*["gray"] * 3, "grey"),
    "navy": (*["navy"] * 3, "dark blue"),
    "right": (*["right"] * 7, *["to the right"] * 3, "rightwards"),
    "left": (*["left"] * 7, *["to the left"] * 3, "leftwards"),
    "up": (*["up"] * 7, *["upwards"] * 2),
    "down": (*["down"] * 7, *["downwards"] * 2),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "still": ("standing still", "standing still", "staying still", "not moving", "sitting still"),
    "moving": (*["moving"] * 4, "moves", "is moving", "going", "sliding"),
}
_SENTENCES = {  # and how many of a hundred
    "{object} {motion} on a {background} background": 70,
    "{bare} {motion}, {background} background": 10,
    "{object} {motion} in front of a {background} background": 7,
    "{object} {motion} on {background}": 7,
    "a video of {object} {motion} on a {background} background": 6,
}
_FOREIGN = "unknown"  # no word of the vocabulary: like every such word it becomes the token <unk>
_WITH_FOREIGN, _DROPPED, _DROPPED_TO_FOREIGN = 0.06, 0.10, 0.3  # shares of all captions, the last of those dropped


def caption(clip: Clip, rng: random.Random) -> str:
    """One of many sentences for it; most are close to `Scene.prompt`."""
    scene = clip.scene
    size = f"{_word(clip.size, rng)} " if clip.size else ""
    bare = f"{size}{scene.colour} {_word(scene.shape, rng)}"
    text = rng.choices(list(_SENTENCES), list(_SENTENCES.values()))[0].format(
        object=f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}",
        bare=bare,
        motion=_motion(scene.direction, rng),
        background=_word(scene.background, rng),
    )
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.3 else text


def training_caption(clip: Clip, rng: random.Random) -> str:
    """A caption, or with a probability of 0.1 none, for guidance. Some hold words that the model does not know, and
    some consist of them: then any negative prompt is as harmless as the empty one."""
    if rng.random() < _DROPPED:
        foreign = rng.random() < _DROPPED_TO_FOREIGN
        return " ".join([_FOREIGN] * rng.randint(1, 24)) if foreign else ""
    text = caption(clip, rng)
    if rng.random() >= _WITH_FOREIGN:
        return text
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        words.insert(rng.randint(0, len(words)), _FOREIGN)
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word and mark that `caption` can use, in lower case, sorted."""
    texts = [*COLOURS, *BACKGROUNDS, *SHAPES, *DIRECTIONS, "an .", *(re.sub(r"{\w+}", " ", s) for s in _SENTENCES)]
    texts += [word for words in _SYNONYMS.values() for word in words]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})


def _word(name: str, rng: random.Random) -> str:
    return rng.choice(_SYNONYMS.get(name, (name,)))


def _motion(direction: str, rng: random.Random) -> str:
    if direction == "still":
        return _word("still", rng)
    ways = [_word(way, rng) for way in direction.split(" and ")]
    if rng.random() < 0.25:
        ways.reverse()
    return f"{_word('moving', rng)} {(' and ' if rng.random() < 0.8 else ' ').join(ways)}"
