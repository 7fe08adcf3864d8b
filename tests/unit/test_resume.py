"""Whose state it is: what decides the result of denoising, and how a state of another run is refused, by name."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from support.commands import run
from wan_dist.agent.prepare import Invocation, check
from wan_dist.agent.resume import resume_refusals, state_file
from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import fingerprint, open_checkpoint
from wan_dist.output.identity import differences, run_identity
from wan_dist.output.state import DenoisingState, write_state


@pytest.fixture
def config(tmp_path, tiny) -> Config:
    """A resolved one."""
    given = Config(prompt="a cat")
    given.model.path, given.output.dir, given.output.name = str(tiny), str(tmp_path), "a clip"
    resolved = check(given, Invocation(recipe_named=False, default_dir=tmp_path)).config
    resolved.output.resume = "auto"
    return resolved


def saved(config: Config, model: Path) -> Path:
    """The state that a run of this config leaves."""
    identity = run_identity(config, fingerprint(open_checkpoint(model)))
    file = state_file(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    state = DenoisingState(steps_done=1, steps=3, latents=torch.zeros(1, 16, 1, 2, 2), tensors={}, numbers={})
    write_state(file, state, identity)
    return file


def changed(config: Config, **values) -> Config:
    other = deepcopy(config)
    for key, value in values.items():
        *group, name = key.split("__")
        setattr(getattr(other, group[0]) if group else other, name, value)
    return other


def whys(config: Config, model: Path) -> list[str]:
    found = resume_refusals(config, open_checkpoint(model))
    assert all((refusal.key, refusal.value) == ("output.resume", "auto") for refusal in found)
    assert all(str(state_file(config)) in refusal.remedy for refusal in found)
    return [refusal.why for refusal in found]


def test_the_same_run_goes_on(config, tiny):
    assert whys(config, tiny) == []
    file = saved(config, tiny)
    assert file == Path(str(config.output.dir)) / ".run" / "a clip" / "state.safetensors"
    assert whys(config, tiny) == []


@pytest.mark.parametrize(
    "values",
    [
        {"parallelism__cfg": 2, "parallelism__ulysses": 3, "runtime__ranks": 6},
        {"parallelism__vae": "on", "offload__transformer": "layerwise", "runtime__attention": "math"},
        {"video__fps": 7.0, "output__formats": ["latents"], "output__checkpoint_every": 3},
        {"runtime__vae_dtype": "bfloat16", "negative_prompt": ""},
        {"sampler__flow_shift": 3},
    ],
)
def test_what_does_not_decide_the_result_may_change(config, tiny, values):
    saved(config, tiny)
    assert whys(changed(config, **values), tiny) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"sampler__seed": 2}, "sampler.seed was 0 and is 2"),
        ({"sampler__solver": "euler"}, "sampler.solver was unipc and is euler"),
        ({"sampler__flow_shift": 3.5}, "sampler.flow_shift was 3.0 and is 3.5"),
        ({"sampler__boundary_ratio": 0.5}, "sampler.boundary_ratio was null and is 0.5"),
        ({"prompt": "a dog"}, "prompt was 'a cat' and is 'a dog'"),
        ({"negative_prompt": "rain"}, "negative_prompt was '' and is 'rain'"),
        ({"runtime__dtype": "bfloat16"}, "runtime.dtype was float32 and is bfloat16"),
        ({"video__fps": 3.0, "video__width": 64, "video__num_frames": 5, "video__height": 16}, None),
    ],
)
def test_another_request_is_refused_by_name(config, tiny, values, why):
    saved(config, tiny)
    other, before = changed(config, **values), config.video
    why = why or (
        f"video.height was {before.height} and is 16, video.width was {before.width} and is 64, "
        f"video.num_frames was {before.num_frames} and is 5"
    )
    assert whys(other, tiny) == [f"the saved state is that of another run: {why}"]
    for settings in ({"output__resume": "off"}, {"task": "plan"}, {"output__name": "another"}):
        assert whys(changed(other, **settings), tiny) == []


def test_another_model_is_refused_by_name(config, tiny, checkpoints):
    saved(config, tiny)
    (why,) = whys(config, checkpoints(heads=3))
    assert why.endswith(": the model is another one (its files differ)")


def test_a_damaged_state_is_refused(config, tiny):
    file = saved(config, tiny)
    file.write_bytes(file.read_bytes()[:-1])
    (why,) = whys(config, tiny)
    assert why.startswith("the saved state cannot be used: truncated: tensor 'latents' ends at byte")
    file.unlink()
    file.mkdir()
    assert whys(config, tiny) == ["the saved state cannot be used: cannot be read (Is a directory)"]


def test_a_picture_is_what_its_file_holds(config, tmp_path):
    first, second, third = tmp_path / "a \udcff.png", tmp_path / "b.png", tmp_path / "c.png"
    first.write_bytes(b"picture")
    second.write_bytes(b"picture")
    third.write_bytes(b"another")

    def told(was: Path | None, now: Path | None) -> list[str]:
        one, other = (changed(config, image=path and str(path)) for path in (was, now))
        return differences(run_identity(one, "x"), run_identity(other, "x"))

    assert told(first, second) == []
    assert told(first, third) == ["image is another picture"]
    assert told(None, third) == ["image was null and is a picture"]
    assert told(first, None) == ["image was a picture and is null"]
    other_vae = changed(config, image=str(second), runtime__vae_dtype="bfloat16")
    found = differences(run_identity(changed(config, image=str(first)), "x"), run_identity(other_vae, "x"))
    assert found == ["runtime.vae_dtype was float32 and is bfloat16"]
    with pytest.raises(FileNotFoundError):
        run_identity(changed(config, image=str(tmp_path / "gone")), "x")


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ("x" * 5000 + " red " + "y" * 5000, "x" * 5000 + " blue " + "y" * 5000, ("red yy", "blue yy")),
        ("a" * 300, "a" * 301, ("aaa'", "aaa'")),
        ("short", "s" + "z" * 1000, ("short", "szzz")),
        ("one\nline \udcff 猫", "one\nline \udcff 犬", (r"one\nline \udcff 猫", r"one\nline \udcff 犬")),
    ],
)
def test_long_and_odd_prompts_are_shown_where_they_differ(was, now, shown):
    (told,) = differences({"prompt": was}, {"prompt": now})
    before, after = told.removeprefix("prompt was ").split(" and is ")
    assert before != after and all(part in text for part, text in zip(shown, (before, after), strict=True))
    assert len(told) < 160 and told.isprintable()


def test_any_text_survives_the_header(config, tiny):
    odd = changed(config, prompt="猫 🏄 \udcff ' \" \\ \n \x00 \u2028 ${x}" * 10_000, negative_prompt="\x85")
    saved(odd, tiny)
    assert whys(odd, tiny) == []


def test_the_identity_is_plain_json_and_complete(config):
    identity = run_identity(config, "x")
    assert json.loads(json.dumps(identity)) == identity
    assert differences({}, identity) and differences(identity, {}) and not differences(identity, identity)
    samplers = {key for key in identity if key.startswith("sampler.")}
    assert samplers == {f"sampler.{name}" for name in vars(config.sampler)}


def test_asking_takes_no_torch(tmp_path):
    script = "import sys, wan_dist.agent.resume; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = run(["python", "-c", script], tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"torch", "diffusers", "transformers", "safetensors", "av", "hydra"}
