"""Every override that the schema does not take is refused by name, all of them at once; the rest is Hydra's."""

import pytest

from wan_dist.cli.overrides import check_overrides
from wan_dist.config.store import group_options


def refused(*overrides: str) -> list[str]:
    return [str(refusal) for refusal in check_overrides(overrides)[0]]


def test_good_overrides_pass():
    good = [
        "sampler.steps=30", "sampler.guidance_scale=4", "sampler.guidance_scale=null", "video.fps=23.976",
        "runtime.compile=off", "output.formats=[mp4,latents]", "model=tiny", "parallelism=cfg2_ulysses4",
        "+sampler.seed=-1", "++runtime.ranks=2", "prompt='a, b'", "sampler={steps: 3}", "experiment=null",
        "parallelism.vae=on", "parallelism.fsdp.shard_conditions=[a]",
    ]  # fmt: skip
    assert check_overrides(good) == ([], good)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_mistyped_key_is_refused_with_the_likely_one(prefix):
    (message,) = refused(f"{prefix}parallelism.ulyses=2")
    assert message.startswith("parallelism.ulyses=2: no such key")
    assert "parallelism.ulysses" in message


def test_a_key_in_the_wrong_group_is_found_by_its_last_part():
    (message,) = refused("steps=3")
    assert "sampler.steps" in message


def test_an_unknown_key_without_a_likely_one_points_to_the_help():
    (message,) = refused("zzzz=1")
    assert "wan-dist --help" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampler.steps=many", "a whole number or null"),
        ("sampler.steps=2.5", "a whole number or null"),
        ("video.fps=fast", "a number or null"),
        ("runtime.timeout_s=null", "a number"),
        ("runtime.timeout_s=soon", "a number"),
        ("runtime.compile=maybe", "on, off, true or false"),
        ("output.checkpoint_every=x", "a whole number"),
        ("output.formats=mp4", "use mp4, frames, latents"),
        ("sampler.steps=[1,2]", "a whole number or null"),
        ("parallelism.fsdp.replicate=two", "a whole number"),
    ],
)
def test_a_wrong_type_says_what_the_key_takes(override, words):
    (message,) = refused(override)
    assert message.startswith(override.split("=")[0] + "=")
    assert words in message


@pytest.mark.parametrize("group", ["model", "parallelism", "experiment", "bench", "sampler"])
def test_an_unknown_option_lists_all_options(group):
    (message,) = refused(f"{group}=nonsense")
    assert message.startswith(f"{group}=nonsense: no such option")
    for option in group_options(group):
        assert option in message


def test_several_mistakes_are_all_reported_and_the_good_ones_returned():
    refusals, good = check_overrides(["sampler.steps=x", "video.height=480", "+foo=1", "model=nope", "prompt=a"])
    assert [refusal.key for refusal in refusals] == ["sampler.steps", "foo", "model"]
    assert good == ["video.height=480", "prompt=a"]


def test_every_value_of_a_sweep_is_checked():
    assert refused("sampler.steps=1,2,3", "sampler.steps=choice(4,5)", "sampler.steps=range(1,9)") == []
    messages = refused("sampler.steps=1,two,three", "model=tiny,nope")
    assert [message.split(":")[0] for message in messages] == ["sampler.steps=two", "sampler.steps=three", "model=nope"]


def test_interpolations_are_left_to_composing():
    assert refused("sampler.steps=${video.num_frames}", "video.height=${video.width}") == []


def test_quoted_numbers_are_judged_by_their_text():
    assert refused("sampler.steps='12'") == []
    assert len(refused("sampler.steps='twelve'")) == 1


@pytest.mark.parametrize(
    "override",
    ["hydra.sweep.dir=x", "hydra/launcher=slurm", "hydra/job_logging=none", "~sampler.steps", "model@other=tiny"],
)
def test_hydras_own_business_is_left_alone(override):
    assert refused(override) == []


@pytest.mark.parametrize("override", ["sampler.steps==3", "sampler.steps=3,", "sampler.steps=[1", "a b=1"])
def test_what_hydras_grammar_cannot_read_is_left_for_hydra_to_explain(override):
    assert check_overrides([override]) == ([], [override])
