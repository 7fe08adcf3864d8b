"""One rank, from a frozen config to its exit.

`python -m wan_dist.worker CONFIG AGENT_PID` is what the agent starts; under a hand-typed torchrun the ranks are here
already and call `run_rank`. Whatever happens, a rank ends here: output flushed, failure on record, a code.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.log import log_to_file, logger, rank_log_path, silence
from wan_dist.output.pulse import pulse_store, stacks_on_signal
from wan_dist.planning.patience import stall_limits
from wan_dist.stop import StoppedError, StopRequest
from wan_dist.topology import EXIT_STOPPED, RankEnv, rank_env

_PR_SET_PDEATHSIG = 1
_WAIT_FOR_AGENT_S = 4.0  # on several nodes no agent ends this rank: they should be gone within 15 s
_CONNECT_S = 60.0
_SCHEDULERS = {"unipc": "unipc_multistep", "euler": "flow_match_euler_discrete", "dpm++": "dpmsolver_multistep"}


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this rank when its agent dies, however it dies (Linux; elsewhere nothing is done).

    parent: the agent's process id, where it is known: it may have died before this rank could ask.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def run_rank(config_path: Path, env: RankEnv, agent: int | None = None, stop: StopRequest | None = None) -> NoReturn:
    """Run this rank's part of the frozen config's task and leave the process. agent: our own; under torchrun None, and
    `stop` listens already."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every rank; each just goes
    run_dir = config_path.parent
    log = rank_log_path(run_dir, env.rank)
    if env.rank != 0:
        silence(log)
    log_to_file(log, env.rank)
    stacks_on_signal(log)
    stop = stop or StopRequest()
    if agent is not None:
        stop.listen(agent)
    state: dict[str, Any] = {"phase": "import", "stop": stop, "agent": agent, "run_dir": run_dir}
    code = 0
    gc.disable()  # imports make a million objects that stay: looking through them takes a tenth of the time
    try:
        _run_task(freeze.load(config_path), env, state)
    except BaseException as error:
        code = _record_end(error, env, config_path, log, state)
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        _try(stream.flush)
    os._exit(code)  # past the interpreter's teardown, where a process group's threads can abort


def _run_task(config: Config, env: RankEnv, state: dict[str, Any]) -> None:
    logger.info("rank %d of %d on %s, pid %d", env.rank, env.world_size, env.host, os.getpid())
    import torch

    from wan_dist.distributed.process_group import agent_store

    if config.runtime.device == "cuda":
        device = torch.device("cuda", env.local_rank)  # the local index, never the global one
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    from wan_dist import bench
    from wan_dist.output.memory import return_large_tensors_at_once
    from wan_dist.output.pulse import Pulse
    from wan_dist.output.record import RankReport
    from wan_dist.pipeline.decode import decode
    from wan_dist.pipeline.generate import generate

    pulse = Pulse(pulse_store(agent_store(_CONNECT_S), env.run_id), env.rank)
    if config.task == "bench":
        _collect_from_here_on()
        pulse.close()  # it is not judged: each kind has a progress of its own
        bench.run(config, env, device)
        return
    pulse.allow(stall_limits(config.runtime.stall_timeout_s, seconds={}))
    _import_the_rest(config, env)
    _collect_from_here_on()
    state["stop"].begin(lambda: another_failed(state["run_dir"]))
    if device.type == "cpu":
        return_large_tensors_at_once()
    state["config"] = config
    state["report"] = report = RankReport(env, device, pulse)
    if config.task == "decode":
        outputs = decode(config, env, device, report)
    else:
        outputs = generate(config, env, device, report, state["stop"])
    paths = [outputs[kind] for kind in sorted(outputs, key=lambda kind: kind == "mp4")]  # the video's path last
    _try(lambda: print("\n".join(paths), flush=True) if paths else None)
    logger.info("done: %s", outputs)
    pulse.close()


def _collect_from_here_on() -> None:
    """Have the garbage collector begin, and leave alone what was imported by now: nearly all of it stays, and going
    through it is a third of a second at each collection (ranks collect where memory is handed on)."""
    gc.freeze()
    gc.enable()


def _import_the_rest(config: Config, env: RankEnv) -> None:
    """Import what this rank's part of the task would import in its middle, where diffusers and transformers load a
    class when it is first asked for: what a rank takes is counted from here on, and that is to be its tensors."""
    if config.task == "bench":
        return  # each measures its own work
    first, names = env.rank == 0, []
    if config.task == "generate":
        names.append(f"diffusers.schedulers.scheduling_{_SCHEDULERS[str(config.sampler.solver)]}")
    if config.task == "generate" and first:
        names += ["transformers.models.umt5.modeling_umt5", "diffusers.pipelines.wan.pipeline_wan"]
    if config.image is not None and first:
        names += ["transformers.models.clip.modeling_clip", "diffusers.pipelines.wan.pipeline_wan_i2v"]
    if "mp4" in config.output.formats and first:
        names.append("av")
    if not names:
        return
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # without torchvision it says so; diffusers would then use the same
    for name in names:
        import_module(name)
    transformers.logging.set_verbosity(level)


def _record_end(error: BaseException, env: RankEnv, config_path: Path, log: Path, state: dict[str, Any]) -> int:
    """Put why this rank ends where the agent (our own, or torchrun's) finds it, and into this rank's log; returns the
    exit code."""
    stop: StopRequest = state["stop"]
    stop.leave()
    report = state.get("report")
    if report is not None:  # nobody is to wait for a sign from this rank
        report.pulse.close()
    account: dict[str, Any] = {"time": time.time(), "rank": env.rank, "host": env.host, "log": str(log)}
    if isinstance(error, StoppedError):
        logger.info("%s; saved: %s of %s steps", error, error.saved, error.steps)
        account |= {"stopped": True, "signal": error.signal, "saved": error.saved, "steps": error.steps}
        _leave_account(account, config_path.parent, str(error))
        if state["agent"] is None and env.rank == 0:  # torchrun shows its own stack, and nothing else
            told = f"{error}; saved: {error.saved or 0} of {error.steps} steps, for output.resume=auto"
            _try(lambda: print(f"wan-dist: {told}", file=sys.stderr, flush=True))
        return EXIT_STOPPED
    from wan_dist.distributed.collectives import PeerLostError
    from wan_dist.loading.tensor_files import RemoteCheckpointError

    consequence = isinstance(error, (PeerLostError, RemoteCheckpointError))
    if consequence:
        # Another rank failed first; its agent is about to end this one. Only if none does is this the failure.
        logger.error("another rank failed: %s", error)
        stop.ended.wait(_WAIT_FOR_AGENT_S)
    account |= _failure(error, env, config_path, log, state)
    account["consequence"] = consequence
    logger.error("failed in phase %s\n%s", account["phase"], account["traceback"])
    _leave_account(account, config_path.parent, account["message"])
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    _try(lambda: get_error_handler().record_exception(error))
    return 1


def _failure(error: BaseException, env: RankEnv, config_path: Path, log: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the user is to know of an error."""
    from wan_dist.distributed.out_of_memory import is_out_of_memory
    from wan_dist.loading.tensor_files import CheckpointError
    from wan_dist.output.kept_latents import how_to_decode
    from wan_dist.planning.refusal import RefusedError

    error.add_note(f"rank {env.rank} on {env.host}; its log: {log}")
    advice, told = how_to_decode(config_path), list(error.__notes__)
    if advice is not None and advice not in told:
        error.add_note(advice)
    report = state.get("report")
    out_of_memory, of_disk = is_out_of_memory(error), isinstance(error, OSError) and bool(error.filename)
    if out_of_memory and report is not None and report.plan is not None:
        from wan_dist.planning.advice import out_of_memory_note

        error.add_note(out_of_memory_note(report.plan, state["config"], report.phase, env.rank, report.peak_bytes()))
    notes = [note for note in error.__notes__ if str(log) not in note]
    return {
        "phase": report.phase if report else state["phase"],
        "step": report.place if report else "",
        "message": "\n".join([f"{type(error).__name__}: {error}", *notes]),
        "traceback": "".join(traceback.format_exception(error)),
        "expected": (isinstance(error, (CheckpointError, RefusedError)) or of_disk) and not out_of_memory,
        "refused": isinstance(error, RefusedError),
    }


def another_failed(run_dir: Path) -> bool:
    """Whether a rank has left the account of a failure, and not only of a stop or of what another one's led to."""
    for file in run_dir.glob("failure.rank*.json"):
        with suppress(OSError, ValueError):
            account = json.loads(file.read_text())
            if not account.get("stopped") and not account.get("consequence"):
                return True
    return False


def _leave_account(account: dict[str, Any], run_dir: Path, message: str) -> None:
    file = run_dir / f"failure.rank{account['rank']}.json"
    try:
        file.write_text(json.dumps(account))
    except OSError:  # a full disk, most likely, which may be what failed: then only this tells
        with suppress(OSError):
            file.unlink()
        _try(lambda: print(f"wan-dist: rank {account['rank']}: {message}", file=sys.stderr, flush=True))


def _try(action: Callable[[], Any]) -> None:
    """Telling the user must not fail a run: the disk may be full, the terminal or the reader of a pipe gone."""
    try:
        action()
    except OSError as error:
        logger.error("could not be told: %s", error)


def main() -> NoReturn:
    env = rank_env()
    if env is None or len(sys.argv) != 3:
        sys.exit("wan_dist.worker is started by the agent; type: wan-dist prompt=...")
    agent = int(sys.argv[2])
    die_with_parent(agent)
    run_rank(Path(sys.argv[1]), env, agent)


if __name__ == "__main__":
    main()
