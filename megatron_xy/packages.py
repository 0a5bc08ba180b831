"""The packages that decide what a run computes: which versions are accepted, and which is here; none is imported."""

from __future__ import annotations

import importlib.metadata
from typing import NamedTuple


class Accepted(NamedTuple):
    """Versions from `lowest` on, below `limit`; any where both are None."""

    lowest: str | None = None
    limit: str | None = None
    is_needed: bool = False
    note: str = ""

    @property
    def specifier(self) -> str:
        """As pip has it."""
        return ",".join(f"{sign}{version}" for sign, version in ((">=", self.lowest), ("<", self.limit)) if version)


# As in pyproject.toml where that names a limit.
PACKAGES = {
    "torch": Accepted("2.6", is_needed=True, note="tested: 2.13"),
    "megatron-core": Accepted("0.16.1", "0.20", is_needed=True, note="0.17 and later want Python 3.12"),
    "numpy": Accepted("1.26", is_needed=True),
    "safetensors": Accepted("0.4.5", is_needed=True),
    "sentencepiece": Accepted("0.2.0", is_needed=True),
    "pydantic": Accepted("2.10", is_needed=True),
    "jinja2": Accepted("3.1.6", is_needed=True),
    "transformers": Accepted("4.50", note="for exports and their check"),
    "transformer-engine": Accepted("1.13", note="optional: layer_spec transformer_engine, and its attention"),
    "flash-attn": Accepted("2.5", note="optional: attention"),
    "flash-attn-3": Accepted("3.0", note="flash_attn_interface, optional: attention on Hopper"),
    "apex": Accepted(note="optional and not used: AdamW and the sums of weight gradients are torch's"),
    "triton": Accepted(note="optional: what torch compiles to"),
    "tensorboard": Accepted(note="for RUN/tensorboard"),
}


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """{package: version} of those that are here."""
    return {name: found for name in PACKAGES if (found := version_of(name)) is not None}
