"""From Megatron-LM's flags to a commented RUN.yaml, with a list of what has no counterpart."""

from __future__ import annotations

import fnmatch
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.config import InvalidConfig, load_config
from megatron_xy.import_args.program import UNKNOWN, program_arguments

SEVERAL = ("--data-path",)  # flags with more than one value
_TABLE = Path(__file__).with_name("flags.yaml")
_WHOLE = re.compile(r"[0-9]{1,18}")
_FRACTION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?")


@dataclass
class Imported:
    """A RUN.yaml in the making: values by key with where each comes from, and what could not be taken over."""

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # what has no counterpart, with the reason
    problems: list[str] = field(default_factory=list)  # what a run still needs, or cannot be

    def text(self) -> str:
        """As YAML, a comment behind every key; at the end what was left out, as comments."""
        lines = ["task: pretrain"]
        sections: dict[str, list[str]] = {}
        for key, (value, origin) in self.values.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name}: {_on_one_line(value)}  # {origin}")
        lines += sections.pop("", [])
        for section, keys in sections.items():
            lines += [f"{section}:", *(f"  {key}" for key in keys)]
        for title, entries in (("No counterpart", self.left_out), ("Still needed", self.problems)):
            lines += [f"# {title}:", *(f"#   {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"


def import_args(script: Path) -> Imported:
    """What `script` asks of Megatron-LM, in our words. Raises DataError where it starts no Python program."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    program = program_arguments(script)
    flags, stray = _flags(program.arguments)
    imported = Imported(left_out=[*program.notes, *(f"{word}: may be more flags" for word in stray)])
    for key, entry in table["keys"].items():
        _take(imported, key, entry, flags)
    _Derivation(imported, flags).run()
    _judge_given(imported, flags, table)
    _judge_missing(imported, flags, table)
    imported.values = dict(sorted(imported.values.items(), key=lambda item: _place(item[0], table["keys"])))
    imported.problems += _problems(imported)
    if "--global-batch-size" not in flags:
        imported.problems.append(
            "training.global_batch_tokens: --global-batch-size is not given, which is --micro-batch-size x data "
            "parallel size in Megatron; set it to training.micro_batch_tokens x data parallel size"
        )
    for entries in (imported.left_out, imported.problems):
        entries[:] = [" ".join(entry.split()) for entry in entries]  # each is a comment of one line
    return imported


def _judge_given(imported: Imported, flags: dict[str, list[str]], table: dict[str, Any]) -> None:
    """What of the flags has no counterpart, or is another model."""
    taken = {entry["flag"] for entry in table["keys"].values()} | set(table["derived"])
    alone = {*table["alone"], *(entry["flag"] for entry in table["keys"].values() if entry["kind"] == "flag")}
    for flag, words in flags.items():
        given = " ".join([flag, *words])
        if flag in alone and words:
            imported.left_out.append(
                f"{' '.join(words)}: stands behind {flag}, which takes no value; may be more flags"
            )
        if flag in table["always"]:
            expected = table["always"][flag]
            choices = expected if isinstance(expected, list) else [expected]
            if expected is not None and not any(_same(words, choice) for choice in choices):
                entries = imported.problems if flag in table["shaping"] else imported.left_out
                entries.append(f"{given}: always {' or '.join(choices)} here")
        elif words != ["0"] and (why := _reason(table["another"], flag)):
            imported.problems.append(f"{given}: {why}")
        elif flag not in taken:
            imported.left_out.append(f"{given}: {_reason(table['reasons'], flag) or 'no such choice here'}")


def _judge_missing(imported: Imported, flags: dict[str, list[str]], table: dict[str, Any]) -> None:
    """What flags would have had to say of what is always so here."""
    missing = [flag for flag in table["needed"] if flag not in flags]
    if not any(flag in flags for flag in table["rope"]):
        missing.append(" or ".join(table["rope"]))
    imported.left_out += [f"{flag} is not given, and is always so here" for flag in missing]
    for flag, default in table["unlike"].items():
        if flag not in flags:
            always = table["always"][flag]
            imported.left_out.append(f"{flag} is not given, which is {default} in Megatron: always {always} here")


def _on_one_line(value: Any) -> str:
    """As YAML, which has line breaks only in double quotes."""
    for style in (None, '"'):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, default_style=style)
        text = text.removesuffix("...\n").rstrip()
        if len(text.splitlines()) == 1:
            break
    return text


def _flags(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({--flag: its values}, words that belong to none, or may not); the last of two counts, as for argparse."""
    flags: dict[str, list[str]] = {}
    current: list[str] = []
    stray = current
    for word in words:
        if re.match(r"--[a-zA-Z]", word):
            flag, equals, value = word.partition("=")
            flags[flag.replace("_", "-")] = current = [value] if equals else []
        else:
            current.append(word)
    for flag, values in flags.items():
        if flag not in SEVERAL and len(values) > 1 and values[-1] == UNKNOWN:
            stray.append(f"{values.pop()} behind {flag}")
    return flags, stray


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
    unsigned = word.removeprefix("-")
    if kind == "text" or not _FRACTION.fullmatch(unsigned):
        return word
    return int(word) if kind == "int" and _WHOLE.fullmatch(unsigned) else float(word)


@dataclass(frozen=True)
class _Derivation:
    """Keys that take several flags, or another unit."""

    imported: Imported
    flags: dict[str, list[str]]

    def run(self) -> None:
        """Adds to the values, and to what is left out, in this order."""
        self._batch()
        self._schedule()
        self._shape()
        self._rope_scaling()
        self._parallel()
        self._layers()
        self._data()

    def _batch(self) -> None:
        length = self._number("--seq-length")
        for flag, key in (("--micro-batch-size", "micro_batch_tokens"), ("--global-batch-size", "global_batch_tokens")):
            size = self._number(flag)
            if size is not None and length is not None:
                self._set(f"training.{key}", size * length, f"{flag} {size} x --seq-length {length}")
            else:
                why = f"it or --seq-length is not known without running the script; set training.{key}"
                self._leave_out(flag, why)
        samples, batch = self._number("--train-samples"), self._number("--global-batch-size")
        if samples is not None and batch:
            origin = f"--train-samples {samples} / --global-batch-size {batch}"
            self._set("training.train_iters", samples // batch, origin)
        else:
            self._leave_out("--train-samples", "not known without running the script; set training.train_iters")

    def _schedule(self) -> None:
        """A schedule in samples is one in tokens here; a warm-up in parts of the decay is one in iterations."""
        values, length = self.imported.values, self._number("--seq-length")
        for name in ("warmup", "decay", "wsd_decay"):
            flag = f"--lr-{name.replace('_', '-')}-samples"
            samples = self._number(flag)
            if samples is not None and length is not None:
                self._set(f"optimizer.lr_{name}_tokens", samples * length, f"{flag} {samples} x --seq-length {length}")
                values.pop(f"optimizer.lr_{name}_iters", None)
            else:
                self._leave_out(flag, f"not known; set optimizer.lr_{name}_tokens")
        whole_run = self._number("--train-samples")
        if "optimizer.lr_warmup_tokens" in values and whole_run is not None and length is not None:
            origin = "--lr-decay-samples is not given: Megatron's default, --train-samples x --seq-length"
            values.setdefault("optimizer.lr_decay_tokens", (whole_run * length, origin))
        flag = "--lr-warmup-fraction"
        share = self._fraction(flag)
        whole, _ = values.get("optimizer.lr_decay_iters") or values.get("training.train_iters") or (None, "")
        if isinstance(whole, int) and share is not None:
            steps = round(share * whole)
            self._set("optimizer.lr_warmup_iters", steps, f"{flag} {share} of {whole} iterations")
        else:
            self._leave_out(flag, "it or the iterations are not known; set optimizer.lr_warmup_iters")

    def _shape(self) -> None:
        hidden, heads = self._number("--hidden-size"), self._number("--num-attention-heads")
        width = self._number("--kv-channels")
        if "--kv-channels" in self.flags and (width is None or not heads or width * heads != hidden):
            given = " ".join(["--kv-channels", *self.flags["--kv-channels"]])
            self.imported.problems.append(f"{given}: heads are as wide as hidden_size / num_attention_heads here")
        if "--num-query-groups" in self.flags and "--group-query-attention" not in self.flags:
            self.imported.values.pop("model.num_query_groups", None)
            self._leave_out("--num-query-groups", "Megatron ignores it without --group-query-attention")
        elif "--group-query-attention" in self.flags and "--num-query-groups" not in self.flags:
            self._set("model.num_query_groups", 1, "--num-query-groups is not given: Megatron's default")
        if "--swiglu" in self.flags and "--ffn-hidden-size" not in self.flags and hidden is not None:
            size = int(4 * hidden * 2 / 3) // 64 * 64
            origin = "--ffn-hidden-size is not given: Megatron's default with --swiglu"
            self._set("model.ffn_hidden_size", size, origin)

    def _rope_scaling(self) -> None:
        """Llama 3's, of which Megatron has all but the factor fixed, or a linear one; both at once are not here."""
        llama3, factor, linear = "--use-rope-scaling", "--rope-scaling-factor", "--rotary-seq-len-interpolation-factor"
        key, unknown = "model.rope_scaling", "not known without running the script; set model.rope_scaling"
        if llama3 not in self.flags:
            self._leave_out(factor, f"Megatron ignores it without {llama3}")
            if (value := self._fraction(linear)) is not None:
                self._set(key, {"rope_type": "linear", "factor": value}, linear)
            else:
                self._leave_out(linear, unknown)
            return
        self._leave_out(linear, f"one scaling at a time here, and {llama3} is given")
        value = self._fraction(factor) if factor in self.flags else 8.0
        if value is None:
            self._leave_out(llama3, unknown)
            self._leave_out(factor, unknown)
            return
        scaling = {"rope_type": "llama3", "factor": value, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 8192
        told = factor if factor in self.flags else f"{factor} is not given: Megatron's default"
        self._set(key, scaling, f"{llama3}, {told}")

    def _parallel(self) -> None:
        flag = "--num-layers-per-virtual-pipeline-stage"
        layers, stages = self._number("--num-layers"), self._number("--pipeline-model-parallel-size")
        chunk = self._number(flag)
        if layers and stages and chunk:
            origin = f"{flag} {chunk}: {layers} layers / {stages} stages / {chunk}"
            self._set("parallel.virtual_pipeline_model_parallel_size", layers // stages // chunk, origin)
        else:
            self._leave_out(flag, "it, the layers or the stages are not known")
        if (minutes := self._number("--distributed-timeout-minutes")) is not None:
            self._set("runtime.timeout_seconds", 60 * minutes, f"--distributed-timeout-minutes {minutes}")

    def _layers(self) -> None:
        granularity = "model.recompute_granularity"
        if "--recompute-activations" in self.flags:
            self._set(granularity, "selective", "--recompute-activations")
        kind, origin = self.imported.values.get(granularity, ("", ""))
        if kind == "selective":
            self._set(granularity, kind, f"{origin}: the MLP here, as attention kernels recompute by themselves")
        if "--bf16" in self.flags:
            self._set("model.params_dtype", "bf16", "--bf16")
        flag = "--transformer-impl"
        implementations = {"local": "torch", "transformer_engine": "transformer_engine"}
        implementation = implementations.get("".join(self.flags.get(flag, [])))
        if implementation is not None:
            self._set("model.layer_spec", implementation, flag)
        else:
            self._leave_out(flag, "local or transformer_engine here, model.layer_spec")

    def _data(self) -> None:
        flag = "--data-path"
        words = self.flags.get(flag, [])
        weights = [word for word in words if _FRACTION.fullmatch(word)]
        paths = [word for word in words if word not in weights and UNKNOWN not in word]
        if any(UNKNOWN in word for word in words):
            self._leave_out(flag, "not known without running the script; set data.path")
        if paths:
            origin = f"{flag}: name what `data build` wrote of the same corpus"
            if weights:
                origin += f", of each with a --source of its own for data.weights: {' '.join(weights)}"
            self._set("data.path", paths if len(paths) > 1 else paths[0], origin)

    def _number(self, flag: str) -> int | None:
        words = self.flags.get(flag, [])
        return int(words[0]) if len(words) == 1 and _WHOLE.fullmatch(words[0]) else None

    def _fraction(self, flag: str) -> float | None:
        words = self.flags.get(flag, [])
        share = float(words[0]) if len(words) == 1 and _FRACTION.fullmatch(words[0]) else math.inf
        return share if math.isfinite(share) else None

    def _set(self, key: str, value: Any, origin: str) -> None:
        self.imported.values[key] = (value, origin)

    def _leave_out(self, flag: str, why: str) -> None:
        if flag in self.flags:
            self.imported.left_out.append(f"{' '.join([flag, *self.flags[flag]])}: {why}")


def _reason(reasons: dict[str, str], flag: str) -> str | None:
    return next((why for pattern, why in reasons.items() if fnmatch.fnmatchcase(flag, pattern)), None)


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
