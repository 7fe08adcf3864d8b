"""What a user may want to know before a run that can run: words that the default model has never seen."""

import json
import re
import unicodedata
from pathlib import Path

from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

_MODEL = Path(__file__).resolve().parents[1] / "assets" / "wan_shapes"
_WORDS = re.compile(r"\w+|[^\w\s]+")  # as its tokenizer splits a text, lower-cased and in NFKC


def vocabulary_hint(prompt: str | None, checkpoint: Path) -> str | None:
    """What `wan_shapes` does not know of a prompt, and what it does; None where there is nothing to say, as of any
    other checkpoint."""
    if prompt is None or checkpoint.resolve() != _MODEL.resolve():
        return None
    known = json.loads((_MODEL / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    words = _WORDS.findall(unicodedata.normalize("NFKC", prompt).lower())
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if not unknown and words:
        return None
    what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "was given no words"
    colours, shapes, directions, backgrounds = (
        ", ".join(names) for names in (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    )
    return (
        f"wan_shapes {what}; it draws one shape, such as 'a red circle moving right on a black background'\n"
        f"  colours: {colours}\n  shapes: {shapes}\n  moving: {directions}\n  backgrounds: {backgrounds}"
    )
