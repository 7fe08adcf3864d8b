"""Where the YAML of the config groups lies, and the registration of their schemas with Hydra."""

from collections.abc import Sequence
from pathlib import Path

from wan_dist.config.schema import GROUPS, Config


def conf_dir() -> Path:
    """The absolute folder of `config.yaml`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if (inside / "config.yaml").is_file() else package.parent / "conf"


def group_options(group: str, more_dirs: Sequence[Path] = ()) -> list[str]:
    """The names that `group=NAME` takes, sorted; `more_dirs` are a user's own config folders."""
    roots = [folder / group for folder in (conf_dir(), *more_dirs)]
    return sorted({str(path.relative_to(root).with_suffix("")) for root in roots for path in root.rglob("*.yaml")})


def register_schemas() -> None:
    """Type `config.yaml` by its dataclass, which holds those of all groups: a key that they lack is refused, whatever
    file sets it. A group's own is there for a user's option that asks for it (`defaults: [base, _self_]`)."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="base", node=Config)
    for group, schema in GROUPS.items():
        store.store(group=group, name="base", node=schema)
