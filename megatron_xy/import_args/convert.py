"""From Megatron-LM's flags to a commented RUN.yaml, with a list of what has no counterpart."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.config import InvalidConfig, load_config
from megatron_xy.import_args.shell import UNKNOWN, program_arguments

_TABLE = Path(__file__).with_name("flags.yaml")


@dataclass
class Imported:
    """A RUN.yaml in the making: values by key with where each comes from, and what could not be taken over."""

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # what has no counterpart, with the reason
    problems: list[str] = field(default_factory=list)  # what a run still needs

    def text(self) -> str:
        """As YAML, a comment behind every key; at the end what was left out, as comments."""
        lines = ["task: pretrain"]
        sections: dict[str, list[str]] = {}
        for key, (value, origin) in self.values.items():
            section, _, name = key.rpartition(".")
            written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").rstrip()
            sections.setdefault(section, []).append(f"{name}: {written}  # {origin}")
        lines += sections.pop("", [])
        for section, keys in sections.items():
            lines += [f"{section}:", *(f"  {key}" for key in keys)]
        for title, entries in (("No counterpart", self.left_out), ("Still needed", self.problems)):
            lines += [f"# {title}:", *(f"#   {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"


def import_args(script: Path) -> Imported:
    """What `script` asks of Megatron-LM, in our words. Raises DataError where it starts no Python program."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    flags = _flags(program_arguments(script))
    imported = Imported()
    for key, entry in table["keys"].items():
        _take(imported, key, entry, flags)
    _derive(imported, flags)
    taken = {entry["flag"] for entry in table["keys"].values()} | set(table["derived"])
    for flag, words in flags.items():
        given = " ".join([flag, *words])
        if flag in table["always"]:
            expected = table["always"][flag]
            if expected is not None and not _same(words, expected):
                imported.left_out.append(f"{given}: always {expected} here")
        elif flag not in taken:
            imported.left_out.append(f"{given}: no such choice here")
    missing = [flag for flag in table["needed"] if flag not in flags]
    imported.left_out += [f"{flag} is not given, and is always so here" for flag in missing]
    imported.values = dict(sorted(imported.values.items(), key=lambda item: _place(item[0], table["keys"])))
    imported.problems = _problems(imported)
    return imported


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """{--flag: its values}; the last of two counts, as for argparse."""
    flags: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if re.match(r"--[a-zA-Z]", word):
            flag, equals, value = word.partition("=")
            flags[flag.replace("_", "-")] = current = [value] if equals else []
        else:
            current.append(word)
    return flags


def _take(imported: Imported, key: str, entry: dict[str, Any], flags: dict[str, list[str]]) -> None:
    flag = entry["flag"]
    if flag not in flags:
        if "default" in entry:
            imported.values[key] = (entry["default"], f"{flag} is not given: Megatron's default")
        return
    words = flags[flag]
    if entry["kind"] == "flag":
        imported.values[key] = (True, flag)
    elif len(words) != 1 or UNKNOWN in words[0]:
        imported.left_out.append(
            f"{' '.join([flag, *words])}: its value is not known without running the script; set {key}"
        )
    else:
        imported.values[key] = (_typed(words[0], entry["kind"]), flag)


def _typed(word: str, kind: str) -> Any:
    """As a number where it is one; a text that is none is refused by the config, with its key."""
    if kind == "text" or not re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", word):
        return word
    return int(word) if kind == "int" and word.lstrip("+-").isdigit() else float(word)


def _derive(imported: Imported, flags: dict[str, list[str]]) -> None:
    """What takes several flags, or another unit."""

    def number(flag: str) -> int | None:
        words = flags.get(flag, [])
        return int(words[0]) if len(words) == 1 and words[0].isdigit() else None

    values = imported.values
    length = number("--seq-length")
    for flag, key in (("--micro-batch-size", "micro_batch_tokens"), ("--global-batch-size", "global_batch_tokens")):
        size = number(flag)
        if size is not None and length is not None:
            values[f"training.{key}"] = (size * length, f"{flag} {size} x --seq-length {length}")
    samples, batch = number("--train-samples"), number("--global-batch-size")
    if samples is not None and batch:
        values["training.train_iters"] = (samples // batch, f"--train-samples {samples} / --global-batch-size {batch}")
    layers, stages = number("--num-layers"), number("--pipeline-model-parallel-size")
    chunk = number("--num-layers-per-virtual-pipeline-stage")
    if layers and stages and chunk:
        origin = f"--num-layers-per-virtual-pipeline-stage {chunk}: {layers} layers / {stages} stages / {chunk}"
        values["parallel.virtual_pipeline_model_parallel_size"] = (layers // stages // chunk, origin)
    if "--recompute-activations" in flags:
        values["model.recompute_granularity"] = ("selective", "--recompute-activations")
    if "--bf16" in flags:
        values["model.params_dtype"] = ("bf16", "--bf16")
    if (minutes := number("--distributed-timeout-minutes")) is not None:
        values["runtime.timeout_seconds"] = (60 * minutes, f"--distributed-timeout-minutes {minutes}")
    implementation = {"local": "torch", "transformer_engine": "transformer_engine"}.get(
        "".join(flags.get("--transformer-impl", []))
    )
    if implementation is not None:
        values["model.layer_spec"] = (implementation, "--transformer-impl")
    paths = [word for word in flags.get("--data-path", []) if not re.fullmatch(r"[\d.]+", word)]
    if paths:
        origin = (
            "--data-path: name what `data build` wrote of the same corpus, and the weights by source in data.weights"
        )
        values["data.path"] = (paths if len(paths) > 1 else paths[0], origin)


def _same(words: Sequence[str], expected: str) -> bool:
    if len(words) != 1:
        return False
    try:
        return float(words[0]) == float(expected)
    except ValueError:
        return words[0] == expected


def _place(key: str, keys: dict[str, Any]) -> tuple[int, int]:
    """Sections in the order of the table, keys without a section first."""
    order = list(dict.fromkeys(name.rpartition(".")[0] for name in keys))
    names = list(keys)
    return order.index(key.rpartition(".")[0]), names.index(key) if key in names else len(names)


def _problems(imported: Imported) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(Imported(imported.values).text(), encoding="utf-8")
        try:
            load_config(path)
        except InvalidConfig as error:
            return [re.sub(rf"^{re.escape(str(path))}(:\d+)?: ", "", str(problem)) for problem in error.problems]
    return []
