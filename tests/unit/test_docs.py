"""Every command in a README composes, runs elsewhere in the tests, or is a make target; every key is documented."""

import re
import shlex
from pathlib import Path

import pytest

from support.commands import REPO, load_script
from wan_dist.cli.free_text import is_multirun, literal_overrides
from wan_dist.cli.overrides import check_overrides
from wan_dist.cli.slurm_launcher import register_launcher
from wan_dist.config.schema import GROUPS, Config, leaves
from wan_dist.config.store import conf_dir, group_options, register_schemas

READMES = [REPO / "README.md", *sorted(REPO.glob("[!.]*/README.md"))]


def documented_commands() -> list[str]:
    blocks = [block for path in READMES for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)]
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", documented_commands())
def test_command_composes(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert (REPO / parsed.training_script).is_file()
        arguments = parsed.training_script_args
    elif words[0] == "python":
        script = load_script(REPO / words[1])
        assert script.parser().parse_args(words[2:]).output
        return
    elif words[0] in ("scontrol", "scancel"):
        assert words[-1] == "JOB"  # the tests of Slurm do the same to jobs of theirs
        return
    elif words[0] == "sbatch":
        script = words.index("slurm/generate.sbatch")
        assert (REPO / words[script]).is_file() and all(word.startswith("--") for word in words[1:script])
        arguments = words[script + 1 :]
    else:
        assert words[0] == "wan-dist"
        arguments = words[1:]
    compose(arguments)


def compose(arguments: list[str]) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    multirun = is_multirun(arguments)
    overrides = [o for o in literal_overrides(arguments, multirun=multirun) if not o.startswith("-")]
    assert check_overrides(overrides) == ([], overrides)
    register_schemas()
    register_launcher()
    single = [o for o in overrides if not OverridesParser.create().parse_override(o).is_sweep_override()]
    assert len(single) == len(overrides) or multirun
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("config", overrides=single).task in ("generate", "decode", "plan")


def test_every_key_and_option_is_documented():
    text = (conf_dir() / "README.md").read_text()
    for braces in re.findall(r"`([\w.]*)\{([\w,]+)\}`", text):
        text += "".join(f"`{braces[0]}{name}`" for name in braces[1].split(","))
    missing = [key for key, _, _ in leaves(Config()) if f"`{key}`" not in text]
    missing += [f"{g}={o}" for g in GROUPS for o in group_options(g) if o not in ("default",) and f"`{o}`" not in text]
    missing += [o for o in group_options("experiment") if f"`{o}`" not in text]
    assert not missing


def test_links_between_readmes_lead_somewhere():
    for path in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / Path(target)).exists(), (path, target)
