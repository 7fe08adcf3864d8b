"""Where a checkpoint comes from: a folder, a hub id, a model carried in the package, or a tiny one built here.

Two steps, so that a config is refused before gigabytes are fetched: `configs` gives a folder whose JSON files can be
read, `complete` one whose weights are there too. Imports no torch (building the tiny model does, when it is needed).
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from wan_dist.loading.tensor_files import CheckpointError

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_CONFIG_FILES = ["*.json", "tokenizer/*"]
_WEIGHT_FILES = ["*/*.safetensors", "*/*.safetensors.index.json"]


@dataclass(frozen=True)
class Source:
    """A checkpoint by the name the user or the recipe gave it."""

    name: str

    def configs(self) -> Path:
        """A folder with the JSON files. Raises CheckpointError with what was tried."""
        kind, _, rest = self.name.partition(":")
        if kind in ("asset", "built") and (_ASSETS / rest).is_dir():
            return _ASSETS / rest
        return self._folder_or_hub(_CONFIG_FILES)

    def complete(self) -> Path:
        """A folder with the weights too; from the hub, fetched once per node into its cache."""
        kind, _, rest = self.name.partition(":")
        if kind == "built" and (_ASSETS / rest).is_dir():
            return _built(rest)
        if kind == "asset" and (_ASSETS / rest).is_dir():
            return _ASSETS / rest
        return self._folder_or_hub(_CONFIG_FILES + _WEIGHT_FILES)

    def _folder_or_hub(self, patterns: list[str]) -> Path:
        path = Path(self.name)
        try:
            if path.exists():
                return path.absolute()
        except OSError as error:
            raise CheckpointError(f"{self.name}: cannot be looked up ({error.strerror})") from error
        if not _HUB_ID.fullmatch(self.name):
            why = "no such folder, and not of the form of a hub id (owner/name)"
            if self.name.startswith("~"):
                why += "; ~ is the shell's to expand, and it does so only at the start of a word"
            raise CheckpointError(f"{self.name}: {why}")
        # A hub that cannot be reached must not hold up the refusal: one short try instead of the default's several.
        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "3")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, allow_patterns=patterns))
        except Exception as error:  # the hub's client raises its own, requests', httpx's and OS errors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{self.name}: no such folder here, and as a hub id it is neither in the cache nor to be had "
                f"({type(error).__name__}: {reason})"
            ) from error


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/wan_dist`, by default `~/.cache/wan_dist`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "wan_dist"


def _built(name: str) -> Path:
    """The random checkpoint made from the configs in `assets/NAME`, built on first use and then kept.

    Its folder carries the version, since another version may build other weights; the rename makes a second process
    that builds at the same time harmless.
    """
    from wan_dist import __version__

    target = cache_dir() / f"{name}-{__version__}"
    if not (target / "model_index.json").is_file():
        from wan_dist.models.random_weights import save_random_checkpoint

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            save_random_checkpoint(_ASSETS / name, Path(scratch) / name)
            try:
                (Path(scratch) / name).rename(target)
            except OSError:
                if not (target / "model_index.json").is_file():
                    raise
    return target
