"""What a rank imports before its memory is counted: what its task needs, without a word on the terminal."""

import pytest
import transformers

from wan_dist import worker
from wan_dist.config.schema import Config
from wan_dist.topology import RankEnv


@pytest.mark.parametrize(("image", "rank", "pipelines"), [("a.png", 0, 2), (None, 0, 1), ("a.png", 1, 0)])
def test_modules_of_the_task_come_quietly(monkeypatch, image, rank, pipelines):
    seen = []
    monkeypatch.setattr(worker, "import_module", lambda name: seen.append((name, transformers.logging.get_verbosity())))
    config, level = Config(prompt="a cat", image=image), transformers.logging.get_verbosity()
    config.sampler.solver = "unipc"
    worker._import_the_rest(config, RankEnv(rank, rank, 2, 2, 0, "test", "localhost"))
    assert sum("pipelines.wan" in name for name, _ in seen) == pipelines
    assert {verbosity for _, verbosity in seen} == {transformers.logging.ERROR}
    assert transformers.logging.get_verbosity() == level
