"""Collects a corpus that every machine already has: the sources and texts of its own Python installation.

From the standard library's folder and the environment's site-packages to DIR/code.jsonl and DIR/prose.jsonl, one
document a line with `text`, `source` and `path`, in the order of their paths. Which documents are taken depends on
their paths alone, so the same installation gives the same corpus, and the lengths keep their long tail.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import statistics
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_xy.errors import DataError, with_exit_code
from megatron_xy.storage import storage_errors, write_text

SMALLEST_CHARACTERS = 64
LARGEST_BYTES = 1_000_000  # what is larger is generated, or data
SOURCES = ("code", "prose")
DEFAULT_MEGABYTES = {"code": 20.0, "prose": 12.0}
PROSE_SUFFIXES = (".md", ".rst", ".txt")
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "pydoc_data"})  # the last: see _offers
SKIPPED_NAMES = frozenset({"CMakeLists.txt", "entry_points.txt", "requirements.txt", "top_level.txt"})
DOCSTRING = re.compile(
    r"(?:\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*(?:#[^\n]*)?\n\s*)"  # the file's head, or a colon that ends a line
    r"""[rRuU]?(?P<quotes>"{3}|'{3})(?P<docstring>.*?)(?P=quotes)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Document:
    """One text, where it comes from and its place in the installation, such as stdlib/json/decoder.py."""

    text: str
    source: str
    path: str


@dataclass(frozen=True)
class Candidate:
    """A file that may be taken; it is read only when its turn comes."""

    file: Path
    path: str
    source: str


@with_exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for code.jsonl and prose.jsonl")
    parser.add_argument(
        "--max-megabytes",
        type=float,
        help="at most this much of each source (code 20, prose 12 unless given)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json)
    limits = DEFAULT_MEGABYTES if options.max_megabytes is None else dict.fromkeys(SOURCES, options.max_megabytes)
    summary = collect(installation_roots(), output=options.output, max_megabytes=limits, console=console)
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        console.print(_table(summary))
        console.print(f"written to {options.output}")


def installation_roots() -> dict[str, Path]:
    """The folders of this interpreter, by the name that begins their documents' paths."""
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    for number, folder in enumerate(sorted(packages), start=1):
        roots["site-packages" if number == 1 else f"site-packages-{number}"] = folder
    return {name: root for name, root in roots.items() if root.is_dir()}


def collect(
    roots: dict[str, Path], *, output: Path, max_megabytes: dict[str, float], console: Console | None = None
) -> dict[str, dict[str, object]]:
    """Writes DIR/code.jsonl and DIR/prose.jsonl and returns {source: what was taken}.

    `max_megabytes` bounds each source's text in UTF-8 megabytes. Raises DataError where a source finds nothing and
    StorageError where the folder cannot be written.
    """
    candidates = list(_candidates(roots))
    seen: set[bytes] = set()
    summary: dict[str, dict[str, object]] = {}
    with Progress(console=console, transient=True) as progress:
        for source in SOURCES:
            limit = int(max_megabytes[source] * 1e6)
            task = progress.add_task(f"collecting {source}", total=limit)
            documents: list[Document] = []
            size = 0
            for document in _offers(source, candidates):
                if not _is_wanted(document, seen):
                    continue
                num_bytes = len(document.text.encode())
                if size + num_bytes > limit:
                    break
                documents.append(document)
                size += num_bytes
                progress.update(task, completed=size)
            if not documents:
                searched = ", ".join(str(root) for root in roots.values())
                raise DataError(f"found no {source} of at most {limit / 1e6:g} MB in {searched}; raise --max-megabytes")
            documents.sort(key=lambda document: document.path)
            file = output / f"{source}.jsonl"
            _write_rows(file, documents)
            summary[source] = _statistics(file, documents)
    return summary


def _candidates(roots: dict[str, Path]) -> Iterator[Candidate]:
    """Every file of the roots that is code or prose by its name."""
    for name, root in roots.items():
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(subfolder for subfolder in subfolders if subfolder not in SKIPPED_FOLDERS)
            for file_name in files:
                file = Path(folder, file_name)
                if file.suffix == ".py":
                    source = "code"
                elif file_name == "METADATA" or (file.suffix in PROSE_SUFFIXES and file_name not in SKIPPED_NAMES):
                    source = "prose"
                else:
                    continue
                yield Candidate(file=file, path=f"{name}/{file.relative_to(root).as_posix()}", source=source)


def _offers(source: str, candidates: list[Candidate]) -> Iterator[Document]:
    """The documents of a source, best first: real files, then Python's help topics, then docstrings.

    Among files the order is that of a hash of the path: wherever the limit cuts, what is taken is a fair sample.
    """
    code, prose = ([c for c in candidates if c.source == name] for name in SOURCES)
    files = sorted(code if source == "code" else prose, key=_hash_of_path)
    for candidate in files:
        text = _read(candidate.file)
        if text is not None:
            body = text.partition("\n\n")[2] if candidate.file.name == "METADATA" else text
            yield Document(text=body, source=source, path=candidate.path)
    if source == "prose":
        for topic, text in sorted(topics.topics.items()):
            yield Document(text=text, source=source, path=f"stdlib/pydoc_data/topics/{topic}")
        for candidate in sorted(code, key=_hash_of_path):
            for number, text in enumerate(_docstrings(candidate.file)):
                yield Document(text=text, source=source, path=f"{candidate.path}/docstrings/{number:04d}")


def _hash_of_path(candidate: Candidate) -> bytes:
    return hashlib.sha256(candidate.path.encode()).digest()


def _read(file: Path) -> str | None:
    """A file's text; None where it is too large, not UTF-8 or not to be read."""
    try:
        if file.stat().st_size > LARGEST_BYTES:
            return None
        return file.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):  # an installation may hold what only root reads: it is not ours to repair
        return None


def _docstrings(file: Path) -> list[str]:
    """Each of the docstrings of a module, its classes and functions, in the order in which they stand.

    A triple-quoted string that opens the file or follows a line's closing colon: on real sources that is what a parser
    finds, at a tenth of its time.
    """
    text = _read(file)
    found = (inspect.cleandoc(match["docstring"]) for match in DOCSTRING.finditer(text or ""))
    return [docstring for docstring in found if docstring]


def _is_wanted(document: Document, seen: set[bytes]) -> bool:
    """Not tiny, no exact duplicate of an earlier one, and prose that is words rather than tables of numbers."""
    text = document.text
    if len(text) < SMALLEST_CHARACTERS or "\0" in text:
        return False
    if document.source == "prose":
        start = text[:20_000]
        if sum(character.isalpha() or character == " " for character in start) < 0.6 * len(start):
            return False
    digest = hashlib.sha256(text.encode()).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _write_rows(file: Path, documents: list[Document]) -> None:
    """One JSON object a line, whole or not at all."""
    with storage_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents))


def _statistics(file: Path, documents: list[Document]) -> dict[str, object]:
    lengths = [len(document.text) for document in documents]
    longest = max(documents, key=lambda document: len(document.text))
    return {
        "file": str(file),
        "num_documents": len(documents),
        "megabytes": sum(len(document.text.encode()) for document in documents) / 1e6,
        "median_characters": statistics.median(lengths),
        "longest_characters": max(lengths),
        "longest_path": longest.path,
    }


def _table(summary: dict[str, dict[str, object]]) -> Table:
    table = Table(title="corpus from this Python installation", title_justify="left")
    for column in ("source", "documents", "MB", "median characters", "longest", "file"):
        table.add_column(column, justify="left" if column in ("source", "file") else "right", overflow="fold")
    for source, taken in summary.items():
        table.add_row(
            source,
            f"{taken['num_documents']:,}",
            f"{taken['megabytes']:.1f}",
            f"{taken['median_characters']:,.0f}",
            f"{taken['longest_characters']:,}",
            Path(str(taken["file"])).name,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
