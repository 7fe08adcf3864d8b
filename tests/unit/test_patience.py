"""How long a phase may go on without progress: by the user's word, or by the plan's estimate."""

import pytest

from support.plans import checkpoint_of, config_of, cpu, degrees_of, gpu
from wan_dist.output.pulse import STAGES
from wan_dist.planning.patience import phase_seconds, stall_limits
from wan_dist.planning.room import place_or_refuse
from wan_dist.planning.survey import Place, survey
from wan_dist.planning.workload import Task, work_of


def expected(model, machine, *, decode_only=False, video="480p", **degrees):
    """`phase_seconds` of a request, as a rank asks for it; and the request."""
    checkpoint, mesh = checkpoint_of(model), degrees_of(**degrees)
    dtype = "float32" if machine.device == "cpu" else "bfloat16"
    config = config_of(model, video, **{"runtime.device": machine.device, "runtime.dtype": dtype})
    config.parallelism.vae = "on" if degrees else "off"
    for axis, degree in mesh.items():
        setattr(config.parallelism, axis, degree)
    task = Task.of_decoding(config) if decode_only else Task.of_request(config, checkpoint, guided=True)

    def work_for(config):
        return work_of(
            config,
            checkpoint,
            task,
            degrees=mesh,
            device=machine.device,
            local_ranks=machine.local_ranks,
            threads=1,
        )

    plan = place_or_refuse(config, work_for, machine)
    seconds = phase_seconds(config, checkpoint, task, machine, degrees=mesh, work=work_for(config), plan=plan)
    return seconds, (config, checkpoint, task)


def test_what_the_user_says_holds_for_every_phase_in_which_ranks_work_together():
    limits = stall_limits(20.0, seconds={"denoise": 1e6})
    assert {limit for phase, limit in limits.items() if phase != "start"} == {20.0}
    assert limits["start"] > 60
    assert set(stall_limits(1e6, seconds={}).values()) == {1e6}
    assert set(limits) == set(STAGES)


def test_estimates_lengthen_the_minimum_and_never_shorten_it():
    short, long = stall_limits(None, seconds=dict.fromkeys(STAGES, 1e-3)), stall_limits(None, seconds={"load": 3600.0})
    assert short == stall_limits(None, seconds={})
    assert min(short.values()) >= 300 and short["load"] > short["denoise"]
    assert long["load"] >= 10 * 3600 and long["denoise"] == short["denoise"]


def test_a_large_model_on_a_cpu_gets_hours_and_on_gpus_the_minimum():
    """14B at 480p: 2 forwards of 0.6 PFLOP each a step."""
    slow, _ = expected("14b", cpu(400))
    fast, _ = expected("14b", gpu(141, local_ranks=8), cfg=2, ulysses=4)
    assert 3600 < slow["denoise"] < 1e6 and stall_limits(None, seconds=slow)["denoise"] > 10 * 3600
    assert slow["decode"] > 60 and slow["encode"] > 60
    assert stall_limits(None, seconds=fast) == stall_limits(None, seconds={})
    assert all(seconds > 0 for estimate in (slow, fast) for seconds in estimate.values())


@pytest.mark.parametrize("degrees", [{}, {"cfg": 2, "ulysses": 2}])
def test_a_step_is_what_the_survey_of_meshes_says(degrees):
    ranks = 4 if degrees else 1
    machine = gpu(80, local_ranks=ranks)
    seconds, (config, checkpoint, task) = expected("a14b", machine, **degrees)
    place = Place(ranks, 1, "cuda", machine.device_bytes, None)
    (candidate,) = survey(config, checkpoint, task, place)
    assert candidate.cost is not None
    assert seconds["denoise"] == candidate.cost.step_s
    assert 21 * seconds["decode"] == pytest.approx(candidate.cost.decode_s)
    assert 0 < seconds["load"] < candidate.cost.load_s


def test_images_are_encoded_besides_text_and_decoding_alone_knows_no_step():
    text, _ = expected("14b", gpu(141))
    images, _ = expected("i2v 14b", gpu(141))
    assert images["encode"] > text["encode"] + 20 * images["decode"]
    alone, _ = expected("14b", gpu(141), decode_only=True)
    assert set(alone) == {"load", "decode", "write"} and alone["decode"] == text["decode"]
