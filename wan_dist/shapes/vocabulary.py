"""What `wan_shapes` draws: one shape of one colour that moves over a plain background. Imports no torch."""

import random
from dataclasses import dataclass

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (225, 35, 35),
    "green": (30, 170, 60),
    "blue": (45, 85, 240),
    "yellow": (245, 220, 40),
    "cyan": (40, 215, 225),
    "magenta": (215, 50, 205),
    "orange": (250, 135, 25),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (10, 10, 10),
    "white": (242, 242, 242),
    "gray": (120, 120, 120),
    "navy": (18, 22, 72),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS: dict[str, tuple[int, int]] = {  # signs of x and y; y points down
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
    "up and right": (1, -1),
    "up and left": (-1, -1),
    "down and right": (1, 1),
    "down and left": (-1, 1),
}


@dataclass(frozen=True)
class Scene:
    """What a video is asked to show, in the words of the tables above."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def prompt(self) -> str:
        """The plainest sentence for it."""
        motion = "standing still" if self.direction == "still" else f"moving {self.direction}"
        return f"a {self.colour} {self.shape} {motion} on a {self.background} background"


def random_scene(rng: random.Random) -> Scene:
    """Every scene that can be seen, alike often: none is white on white."""
    background = rng.choice(list(BACKGROUNDS))
    colour = rng.choice([name for name in COLOURS if name != background])
    return Scene(colour, rng.choice(SHAPES), rng.choice(list(DIRECTIONS)), background)
