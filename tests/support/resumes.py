"""What befalls the runs of which tests ask that they go on: models, meshes, the moment of a stop or a failure, and the
mesh on which the next attempt is made."""

import signal
from functools import partial
from typing import Any, NamedTuple

from support.tiers import ALL

STEPS = 4
ONE_EXPERT = {"heads": 4}
TWO_EXPERTS = {"heads": 4, "experts": 2, "boundary_ratio": 0.9, "seed": 2}  # UniPC switches after two steps
TWO_SCALES = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 3.0}
EULER, DPM = {"sampler.solver": "euler"}, {"sampler.solver": "dpm++"}
IMAGE, WIDE = {"image": "picture"}, {"video.width": 64}
FRAMES = {"output.formats": ["latents", "frames"]}

MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "cfg": {"cfg": 2},
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tp": {"tp": 2},
    "halves": {"cfg": 2, "ulysses": 2},
}
SHARDED = {"parallelism.fsdp.enabled": "on"}
LAYERWISE = {"offload.transformer": "layerwise"}
COMPONENT = {"offload.transformer": "component"}
EVERY, EVERY_SECOND = {"output.checkpoint_every": 1}, {"output.checkpoint_every": 2}
START_OVER = {"output.resume": "off"}
OF_ANOTHER = "the saved state is that of another run: "


class Event(NamedTuple):
    """What happens to a rank (None: to each) when it first tells that it is in `phase`, `done` steps done: a signal's
    request, or None for a failure. left: the steps of the state on disk after it, None for no state."""

    rank: int | None
    number: signal.Signals | None
    phase: str
    done: int
    left: int | None


class Refusal(NamedTuple):
    """That nothing runs, and what all ranks say; cut: the state's file is cut short for it."""

    text: str
    left: int = 2
    cut: bool = False


class Attempt(NamedTuple):
    """One generation of those that make a video together; that without a disturbance makes it."""

    mesh: str
    disturbance: Event | Refusal | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012


class Scenario(NamedTuple):
    model: dict[str, Any] | str
    request: dict[str, Any]
    attempts: list[Attempt]


def asked(done: int, rank: int = 0, number: signal.Signals = signal.SIGTERM) -> Event:
    """A stop that one rank is asked for in the step that makes it `done`."""
    return Event(rank, number, "denoise", done, done)


def failed(done: int, left: int) -> Event:
    return Event(None, None, "denoise", done, left)


def stopped_in(mesh: str, *stops: Event, **settings: Any) -> list[Attempt]:
    """On one mesh to the end, stopped on the way."""
    return [Attempt(mesh, stop, settings) for stop in (*stops, None)]


BY_THE_OTHER = partial(asked, rank=1, number=signal.SIGUSR1)
WHILE_DECODING = Event(0, signal.SIGTERM, "decode", STEPS, STEPS)
WHILE_LOADING = Event(0, signal.SIGTERM, "load", 0, 2)
WHILE_ENCODING = Event(0, signal.SIGUSR1, "encode", 0, None)

# Worlds of fewer ranks run after those of more, so that no scenario goes on in a larger one.
SCENARIOS: dict[str, Scenario] = {
    "first and third step": Scenario(ONE_EXPERT, FRAMES, stopped_in("one", asked(1), asked(3))),
    "second step": Scenario(ONE_EXPERT, {}, stopped_in("one", asked(2))),
    "last step": Scenario(ONE_EXPERT, FRAMES, stopped_in("one", asked(STEPS))),
    "decoding": Scenario(ONE_EXPERT, {"output.formats": ["frames"]}, stopped_in("one", WHILE_DECODING)),
    "decoding twice, of two experts": Scenario(
        TWO_EXPERTS, {**TWO_SCALES, **FRAMES}, stopped_in("one", WHILE_DECODING, WHILE_DECODING, **EVERY)
    ),
    "euler": Scenario(ONE_EXPERT, EULER, stopped_in("one", asked(2))),
    "dpm++": Scenario(ONE_EXPERT, DPM, stopped_in("one", asked(1), asked(3))),
    "before the switch": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("one", asked(1))),
    "at the switch": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("one", asked(2))),
    "after the switch": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("one", asked(3))),
    "placements": Scenario(
        TWO_EXPERTS,
        TWO_SCALES,
        [
            Attempt("one", asked(1), LAYERWISE),
            Attempt("one", asked(2), COMPONENT),
            Attempt("one", asked(3), LAYERWISE),
            Attempt("one", None, COMPONENT),
        ],
    ),
    "ti2v": Scenario("wan2.2 ti2v", {**IMAGE, **WIDE}, stopped_in("one", asked(2), asked(STEPS))),
    "wan2.1 i2v": Scenario("wan2.1", IMAGE, stopped_in("one", asked(2))),
    "while loading": Scenario(ONE_EXPERT, {}, stopped_in("one", asked(2), WHILE_LOADING)),
    "while encoding": Scenario(ONE_EXPERT, {}, stopped_in("one", WHILE_ENCODING)),
    "started over": Scenario(ONE_EXPERT, {}, [Attempt("one", asked(STEPS)), Attempt("one", None, START_OVER)]),
    "a failure": Scenario(ONE_EXPERT, {}, stopped_in("one", failed(3, left=2), **EVERY_SECOND)),
    "a failure without a state": Scenario(ONE_EXPERT, {}, stopped_in("one", failed(1, None), **EVERY_SECOND)),
    "cfg": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("cfg", BY_THE_OTHER(2), **EVERY)),
    "cfg, last step": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("cfg", BY_THE_OTHER(STEPS))),
    "cfg, a failure": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("cfg", failed(3, left=2), **EVERY_SECOND)),
    "ulysses": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("ulysses", BY_THE_OTHER(1), asked(3))),
    "ulysses, FSDP": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("ulysses", BY_THE_OTHER(2), **SHARDED)),
    "ring": Scenario("wan2.2 ti2v", {**IMAGE, **WIDE}, stopped_in("ring", BY_THE_OTHER(2))),
    "tp": Scenario(TWO_EXPERTS, {**TWO_SCALES, **DPM}, stopped_in("tp", BY_THE_OTHER(3))),
    "halves, FSDP": Scenario(TWO_EXPERTS, TWO_SCALES, stopped_in("halves", asked(2, rank=3), **SHARDED)),
    "from mesh to mesh": Scenario(
        ONE_EXPERT,
        {},
        [Attempt("cfg", BY_THE_OTHER(1)), Attempt("ulysses", asked(3)), Attempt("one")],
    ),
    "from mesh to mesh, two experts": Scenario(
        TWO_EXPERTS,
        TWO_SCALES,
        [Attempt("cfg", asked(2)), Attempt("ulysses", BY_THE_OTHER(3)), Attempt("one")],
    ),
    "refused": Scenario(
        TWO_EXPERTS,
        TWO_SCALES,
        [
            Attempt("cfg", BY_THE_OTHER(2)),
            Attempt("cfg", Refusal(OF_ANOTHER + "sampler.seed was 0 and is 1"), {"sampler.seed": 1}),
            Attempt("cfg", Refusal(OF_ANOTHER + "sampler.solver was unipc and is euler"), EULER),
            Attempt("cfg", Refusal(OF_ANOTHER + "the model is another one"), {"model.path": "another"}),
            Attempt("cfg", Refusal("truncated: tensor 'solver.", cut=True)),
            Attempt("cfg"),
        ],
    ),
}
MORE = {
    *("second step", "euler", "before the switch", "after the switch", "wan2.1 i2v", "cfg, last step"),
    *("cfg, a failure", "from mesh to mesh", "halves, FSDP"),
}
assert SCENARIOS.keys() > MORE
NAMES = [name for name in SCENARIOS if ALL or name not in MORE]
