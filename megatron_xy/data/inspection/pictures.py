"""What a manifest says of a data set, as pictures: document lengths, tokens a bucket, and the ratios of its packing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_xy.data.inspection.alternatives import BIN_STARTS, fixed_length_alternatives
from megatron_xy.data.manifest import Manifest, read_manifest
from megatron_xy.errors import ConfigError
from megatron_xy.fonts import fonts_for_names
from megatron_xy.storage import storage_errors, write_bytes

RATIOS = {
    "padding_ratio": "padding / all tokens",
    "truncation_ratio": "documents cut / documents",
    "concatenation_ratio": "documents a sample",
}


def draw_statistics(directory: Path, folder: Path) -> list[Path]:
    """Write document_lengths.png, buckets.png and ratios.png of the data folder `directory` into `folder`.

    Returns their paths. Raises ConfigError, DataError as `read_manifest`, ConfigError where the data set was built
    without its lengths, StorageError.
    """
    manifest = read_manifest(directory)
    if any(source.lengths is None for source in manifest.sources.values()):
        raise ConfigError(f"{directory} was built without its documents' lengths; build it again to draw them")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with fonts_for_names():
        figures = {
            "document_lengths.png": _document_lengths(manifest),
            "buckets.png": _buckets(manifest),
            "ratios.png": _ratios(manifest),
        }
        return [_write(figure, folder / name) for name, figure in figures.items()]


def _document_lengths(manifest: Manifest) -> Figure:
    """A line a source: how many documents have how many tokens, with the buckets' borders."""
    figure, axes = _figure("documents by length")
    edges = [*BIN_STARTS.tolist(), 2 * int(BIN_STARTS[-1])]
    for name, source in manifest.sources.items():
        assert source.lengths is not None, "looked at before"
        counts = [source.lengths.histogram.get(str(start), 0) for start in edges[:-1]]
        axes.stairs(counts, edges, label=name)
    for bucket in manifest.buckets:
        axes.axvline(bucket, color="grey", linewidth=0.8, linestyle="--")
    longest = max(source.lengths.longest for source in manifest.sources.values() if source.lengths is not None)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, 2 * max(longest, manifest.buckets[-1]))
    axes.set_xlabel("tokens (dashed: the buckets)")
    axes.set_ylabel("documents")
    axes.legend(fontsize="small")
    return figure


def _buckets(manifest: Manifest) -> Figure:
    """A bar a bucket, sources stacked: tokens of its samples, and on top their padding."""
    figure, axes = _figure("tokens by bucket")
    sizes = [str(bucket) for bucket in manifest.buckets]
    below = [0] * len(sizes)
    padding = [0] * len(sizes)
    for name, source in manifest.sources.items():
        tokens = [source.buckets[size].tokens if size in source.buckets else 0 for size in sizes]
        axes.bar(sizes, tokens, bottom=below, label=name)
        below = [a + b for a, b in zip(below, tokens, strict=True)]
        lengths = [int(size) * source.buckets[size].samples if size in source.buckets else 0 for size in sizes]
        padding = [a + b - c for a, b, c in zip(padding, lengths, tokens, strict=True)]
    axes.bar(sizes, padding, bottom=below, label="padding", color="lightgrey")
    axes.set_xlabel("bucket")
    axes.set_ylabel("tokens")
    axes.legend(fontsize="small")
    return figure


def _ratios(manifest: Manifest) -> Figure:
    """The three ratios of the data set beside those of fixed-length samples of the same documents."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    alternatives: dict[str, dict[str, Any]] = {
        "this": manifest.statistics.model_dump(),
        **{f"fixed {size}": ratios for size, ratios in fixed_length_alternatives(manifest).items()},
    }
    for axes, (ratio, label) in zip(figure.subplots(1, len(RATIOS)), RATIOS.items(), strict=True):
        values = [entry[ratio] for entry in alternatives.values()]
        bars = axes.bar(list(alternatives), values, color=["tab:blue", *["lightgrey"] * (len(values) - 1)])
        axes.bar_label(bars, [f"{value:.2f}" if ratio == "concatenation_ratio" else f"{value:.2%}" for value in values])
        axes.set_title(label, fontsize="medium")
        axes.margins(y=0.12)
        axes.tick_params(axis="x", rotation=45)
    return figure


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _write(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue(), durable=False)
    return path
