"""Whether a model draws what it is asked for: scenes through diffusers' pipeline, read from their frames."""

import random
from collections.abc import Callable

import numpy as np
import torch

from wan_dist.shapes.checkpoint import Parts
from wan_dist.shapes.meaning import QUESTIONS, describe
from wan_dist.shapes.vocabulary import random_scene

_AT_ONCE = 8  # scenes
_STEPS, _GUIDANCE = 20, 4.0
_HEIGHT, _WIDTH, _FRAMES = 64, 64, 9


def share_drawn_as_asked(parts: Parts, count: int, pause: Callable[[], None]) -> dict[str, float]:
    """Of `count` scenes, always the same, the share that is right in each of QUESTIONS and in `all` of them, and that
    has an object in every frame (`present`). Plain prompts, 64x64 pixels, 9 frames, 20 steps, guidance 4.
    pause: called between batches, may raise."""
    rng = random.Random("scenes to evaluate on")
    scenes = [random_scene(rng) for _ in range(count)]
    pipeline = parts.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    answers: list[dict[str, bool]] = []
    for first in range(0, count, _AT_ONCE):
        pause()
        batch = scenes[first : first + _AT_ONCE]
        clips = pipeline(
            prompt=[scene.prompt for scene in batch],
            height=_HEIGHT,
            width=_WIDTH,
            num_frames=_FRAMES,
            num_inference_steps=_STEPS,
            guidance_scale=_GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(first + index) for index in range(len(batch))],
            output_type="np",
        ).frames
        frames = np.round(clips * 255).astype(np.uint8)
        answers += [describe(clip).answers(scene) for clip, scene in zip(frames, batch, strict=True)]
    shares = {name: sum(answer[name] for answer in answers) / count for name in (*QUESTIONS, "present")}
    return {**shares, "all": sum(all(answer[name] for name in QUESTIONS) for answer in answers) / count}
