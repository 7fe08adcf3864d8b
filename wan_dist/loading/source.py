"""Where a checkpoint comes from: a folder, a hub id, a model carried in the package, or a tiny one built here.

Two steps, so that a config is refused before gigabytes are fetched: `configs` gives a folder whose JSON files can be
read, `complete` one whose weights are there too. Imports no torch (building the tiny model does, when it is needed).
"""

import contextlib
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from wan_dist.loading.tensor_files import CheckpointError

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_HUB_TIMEOUT_S = 3.0
_CONFIG_FILES = ["*.json", "tokenizer/*"]
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]  # of a component's folder


@dataclass(frozen=True)
class Source:
    """A checkpoint by the name the user or the recipe gave it."""

    name: str

    def configs(self, *, ask_hub: bool = True) -> Path:
        """A folder with the JSON files. Raises CheckpointError with what was tried. ask_hub: whether the hub is asked
        for what its cache does not hold."""
        kind, _, rest = self.name.partition(":")
        if kind in ("asset", "built") and (_ASSETS / rest).is_dir():
            return _ASSETS / rest
        return self._folder_or_hub(_CONFIG_FILES, ask_hub=ask_hub)

    def complete(self, components: Collection[str] | None = None) -> Path:
        """A folder with the weights too (of `components`, or of all); from the hub, fetched once per node into its
        cache."""
        kind, _, rest = self.name.partition(":")
        if kind == "built" and (_ASSETS / rest).is_dir():
            return _built(rest)
        if kind == "asset" and (_ASSETS / rest).is_dir():
            return _ASSETS / rest
        weights = [f"{name}/{file}" for name in components or ["*"] for file in _WEIGHT_FILES]
        return self._folder_or_hub(_CONFIG_FILES + weights)

    def _folder_or_hub(self, patterns: list[str], *, ask_hub: bool = True) -> Path:
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
        return self._snapshot(patterns, ask_hub=ask_hub)

    def _snapshot(self, patterns: list[str], *, ask_hub: bool) -> Path:
        """The hub's current revision; where the hub cannot be asked (offline, or no answer within seconds), the one in
        its cache."""
        from huggingface_hub import HfApi, snapshot_download

        asked: Exception | None = None
        try:
            # snapshot_download asks the same without a time limit, and a hub that is mute would hang the refusal.
            if not ask_hub:
                raise CheckpointError("the hub was not asked")
            HfApi().model_info(self.name, timeout=_HUB_TIMEOUT_S)
        except Exception as error:  # the hub's client raises its own, httpx's and OS errors
            asked = error
        try:
            return Path(snapshot_download(self.name, allow_patterns=patterns, local_files_only=asked is not None))
        except Exception as error:
            reason = asked or error
            first = next(iter(str(reason).strip().splitlines()), "")
            raise CheckpointError(
                f"{self.name}: no such folder here, and as a hub id it is neither in the cache nor to be had "
                f"({type(reason).__name__}: {first})"
            ) from error


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/wan_dist`, by default `~/.cache/wan_dist`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "wan_dist"


def _built(name: str) -> Path:
    """The random checkpoint made from the configs in `assets/NAME`, built on first use and then kept.

    Its folder carries the version and a digest of the configs, since others may give other weights; the rename makes
    a second process that builds at the same time harmless.
    """
    from wan_dist import __version__

    files = sorted((_ASSETS / name).rglob("*.json"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    target = cache_dir() / f"{name}-{__version__}-{digest}"
    if not (target / "model_index.json").is_file():
        from wan_dist.models.random_weights import save_random_checkpoint

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars over a second's work
                save_random_checkpoint(_ASSETS / name, Path(scratch) / name)
            try:
                (Path(scratch) / name).rename(target)
            except OSError:
                if not (target / "model_index.json").is_file():
                    raise
    return target
