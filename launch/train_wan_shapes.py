"""Train the small model `wan_shapes`: `python launch/train_wan_shapes.py --output outputs/wan_shapes --fraction 0.1`.

SIGTERM or SIGUSR1 has it save its state and end with 75; the same command goes on from there. JSON lines on stdout,
progress on stderr; the path of the checkpoint, a folder in diffusers format, is printed last.
"""

import argparse
import math
import os
import sys
import warnings
from pathlib import Path

# A checkout's launcher runs the checkout's package, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan_dist.stop import StoppedError, StopRequest
from wan_dist.topology import EXIT_STOPPED


def parser() -> argparse.ArgumentParser:
    typed = argparse.ArgumentParser(description="Train the small model wan_shapes.", allow_abbrev=False)
    typed.add_argument("--output", type=Path, required=True, help="folder for the state and the checkpoint")
    typed.add_argument("--fraction", type=positive, default=1.0, help="of all steps (default 1.0)")
    typed.add_argument("--batch", type=positive, default=1.0, help="of the batch sizes (default 1.0)")
    typed.add_argument("--seed", type=natural, default=0, help="of weights, clips and noise (default 0)")
    typed.add_argument(
        "--finetune",
        type=Path,
        help="checkpoint whose denoiser is trained on, its VAE as it is (default: from nothing)",
    )
    typed.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    typed.add_argument("--threads", type=counting, help="on the CPU (default: torch's)")
    typed.add_argument("--evaluate", type=counting, default=24, help="scenes in an evaluation (default 24)")
    return typed


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def counting(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def chosen_device(name):
    """Raises ValueError where it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; auto, cpu, cuda and cuda:N are") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: auto, cpu, cuda and cuda:N can be used")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def main(arguments=None) -> int:
    command = parser()
    typed = command.parse_args(arguments)
    request = StopRequest()
    request.hold()  # a request is noted, and looked at between two steps
    request.begin()
    request.listen(agent=None)  # before the imports, which start threads

    def pause():
        request.release()
        request.hold()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    import torch
    import transformers

    from wan_dist.shapes.training_run import Settings, TrainingRun

    transformers.logging.disable_progress_bar()
    # Of diffusers' norms under autocast, which are right all the same.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    if typed.threads is not None:
        torch.set_num_threads(typed.threads)
    try:
        settings = Settings(
            output=typed.output,
            fraction=typed.fraction,
            batch=typed.batch,
            seed=typed.seed,
            device=chosen_device(typed.device),
            evaluate=typed.evaluate,
            finetune=typed.finetune,
        )
        run = TrainingRun(settings, pause)
        typed.output.mkdir(parents=True, exist_ok=True)  # not for what is refused
    except (OSError, ValueError) as error:
        command.exit(2, f"{command.prog}: {error}\n")
    try:
        print(run.train())
    except StoppedError as stop:
        after = f"after step {stop.saved} of {stop.steps} of the {run.stage}; its state is saved"
        print(
            f"{command.prog}: stopped by {stop.signal} {after}, the same command goes on from there",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
