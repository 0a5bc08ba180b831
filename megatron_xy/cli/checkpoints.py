"""The verbs over a checkpoint's folder: what it holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_xy.cli.options import AsJson, tell_whole

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at and verify checkpoints.")


@checkpoint_app.command("show")
def checkpoint_show(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """What a checkpoint holds: where the run stood, its model and layout, tensors, files."""
    from megatron_xy.checkpoint import files

    manifest = files.read_manifest(directory)
    if as_json:
        print(json.dumps(manifest.to_json()))
        return
    for name, value in manifest.state.items():
        if name != "history":  # of the last steps, for the spikes' sake: long, and only told as JSON
            print(f"{name}: {value}")
    total = sum(facts["bytes"] for facts in manifest.files.values())
    print(f"tensors: {len(manifest.tensors)}\nfiles: {len(manifest.files)}, {total / 1e6:,.1f} MB")


@checkpoint_app.command("verify")
def checkpoint_verify(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Compares every file with its checksum, and the pieces of every tensor with its shape."""
    from megatron_xy.checkpoint import files

    manifest = files.read_manifest(directory)
    files.verify_files(directory, manifest)
    files.verify_coverage(directory, manifest)
    tell_whole(directory, as_json=as_json)


@checkpoint_app.command("hash")
def checkpoint_hash(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """A sha256 for every global tensor: the same for every layout that holds the same values."""
    from megatron_xy.checkpoint import files
    from megatron_xy.tensors.block_reader import tensor_hashes

    manifest = files.read_manifest(directory)
    files.verify_files(directory, manifest)
    hashes = dict(tensor_hashes(directory, manifest))
    if as_json:
        print(json.dumps(hashes))
        return
    for name, facts in hashes.items():
        print(f"{facts['sha256']}  {facts['dtype']:<9} {facts['shape']!s:<16} {name}")
