"""What a PPO run is given is looked at whole before anything starts, by `check --paths` as well.

No model of a wrong kind or vocabulary gets through, no prompt or answer that does not fit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_xy.checkpoint.continuation import FIXED_MODEL_KEYS
from megatron_xy.checkpoint.files import Manifest, read_manifest, write_manifest
from megatron_xy.checkpoint.folders import iteration_folder
from megatron_xy.config import TRAINED_ROLES, InvalidConfig, ModelConfig, RunConfig, load_config, placed_roles
from megatron_xy.errors import ConfigError, DataError, MegatronXYError
from megatron_xy.model.source import resolve_model
from megatron_xy.plan.overview import Plan
from megatron_xy.plan.verb import plan
from megatron_xy.ppo.facts import facts, fingerprints
from megatron_xy.ppo.material import look_at
from megatron_xy.ppo.rollouts import AnswersFromFile
from megatron_xy.ppo.run import told
from megatron_xy.preflight import check_paths
from tests.unit.hollow_weights import hf_folder
from tests.unit.small_corpus import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from toy_files import write_rows, write_tokenizer

WORDS = [f"w{number:02d}" for number in range(16)]  # and 3 special tokens


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "language": hf_folder(folder / "language", architecture="LlamaForCausalLM"),
        "value": hf_folder(folder / "value", architecture="LlamaForSequenceClassification"),
        "wide": hf_folder(folder / "wide", architecture="LlamaForSequenceClassification", vocab_size=24),
        "huge": hf_folder(folder / "huge", architecture="LlamaForCausalLM", num_hidden_layers=200, hidden_size=2**16),
        "short": hf_folder(folder / "short", architecture="LlamaForCausalLM", max_position_embeddings=8),
        "narrow": hf_folder(folder / "narrow", architecture="LlamaForCausalLM", vocab_size=18),
    }


def look(tmp_path: Path, loads: dict[str, str], *overrides: str, **kinds: str) -> None:
    """`check --paths` of a run whose roles begin as these kinds of folder."""
    check_paths(load_config(written(tmp_path, loads, **kinds), overrides=overrides))


def written(tmp_path: Path, loads: dict[str, str], **kinds: str) -> Path:
    """Its RUN.yaml, with all that it names."""
    write_tokenizer(tmp_path, WORDS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w00"}, {"prompt": " ".join(WORDS)}])
    write_rows(tmp_path / "responses.jsonl", [{"response_tokens": [3, 4, 18]}] * 8)
    kinds = {"actor": "language", "critic": "value", "reference": "language", "reward": "value", **kinds}
    config: dict[str, Any] = {
        "task": "ppo",
        "run_dir": str(tmp_path / "run"),
        "data": {"tokenizer": str(tmp_path / "tokenizer.json")},
        "training": {"micro_batch_tokens": 64, "train_iters": 2},
        "roles": {name: {"share": 0.25, "model": {"load": loads[kind]}} for name, kind in kinds.items()},
        "ppo": {
            "prompts": str(tmp_path / "prompts.jsonl"), "responses": str(tmp_path / "responses.jsonl"),
            "rollout_batch_size": 4, "mini_batch_size": 4, "max_response_length": 8,
        },
    }  # fmt: skip
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "ppo.yaml"


def test_a_critic_may_begin_as_a_reward_or_a_language_model(tmp_path: Path, loads: dict[str, str]) -> None:
    look(tmp_path, loads)
    look(tmp_path, loads, critic="language")


@pytest.mark.parametrize(
    ("kinds", "override", "code", "text"),
    [
        ({"reward": "language"}, "seed=1", 78, "roles.reward.model.load (hf:{}) is a language model, which gives no"),
        ({"actor": "value"}, "seed=1", 78, "roles.actor.model.load (hf:{}) is a reward model or critic, which says"),
        ({"reference": "value"}, "seed=1", 78, "roles.reference.model.load (hf:{}) is a reward model or critic"),
        ({"critic": "wide"}, "seed=1", 78, "roles.critic has a vocabulary of 24, the actor one of 20"),
        (dict.fromkeys(("actor", "reference", "critic"), "narrow"), "seed=1", 78, "roles.reward has a vocabulary of"),
        ({}, "roles.critic.parallel.tensor_model_parallel_size=3", 78, "model.num_attention_heads (4) must be"),
        ({"reference": "short"}, "seed=1", 78, "leaves no room for a prompt: the reference has 8 tokens"),
        ({}, "ppo.max_response_length=64", 78, "ppo.max_response_length (64) leaves no room for a prompt"),
        ({}, "roles.reward.micro_batch_tokens=24", 65, "prompts.jsonl:2: the prompt has 17 tokens, must have 1 to 16"),
        ({}, "training.train_iters=3", 65, "responses.jsonl holds 8 answers, and place 12 is drawn"),
        ({"critic": "huge"}, "seed=1", 74, " needed, for 1 of"),
        ({}, "ppo.reward_normalization=stored", 78, "keeps mean and deviation of its scores"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, loads: dict[str, str], kinds: dict[str, str], override: str, code: int, text: str
) -> None:
    with pytest.raises(MegatronXYError) as caught:
        look(tmp_path, loads, override, **kinds)
    folder = loads[next(iter(kinds.values()))].removeprefix("hf:") if kinds else ""
    assert caught.value.exit_code == code
    assert text.format(folder) in str(caught.value)


def test_weights_that_are_not_there_are_named_role_by_role(tmp_path: Path, loads: dict[str, str]) -> None:
    cut, gone = (
        Path(hf_folder(tmp_path / name, architecture="LlamaForSequenceClassification").removeprefix("hf:"))
        for name in ("cut", "gone")
    )
    os.truncate(cut / "model.safetensors", 2000)
    (gone / "model.safetensors").unlink()
    with pytest.raises(DataError) as caught:
        look(tmp_path, {**loads, "cut": f"hf:{cut}", "gone": f"hf:{gone}"}, critic="cut", reward="gone")
    assert re.findall(r"roles\.\w+\.model\.load: \S+ (?:is damaged|holds neither)", str(caught.value)) == [
        f"roles.critic.model.load: {cut}/model.safetensors is damaged",
        f"roles.reward.model.load: {gone} holds neither",
    ]


def test_hf_folders_that_could_not_have_the_tokenizer_are_refused(tmp_path: Path, loads: dict[str, str]) -> None:
    tokenizer = train_tokenizer(tmp_path / "squeezed.model", remove_extra_whitespaces=True)
    wide = hf_folder(tmp_path / "wide", architecture="LlamaForCausalLM", vocab_size=300)
    kinds = dict.fromkeys(("actor", "critic", "reference"), "language") | {"reward": "value"}
    options = [f"data.tokenizer={tokenizer}", "checkpoint.hf_interval=50"]
    value = hf_folder(tmp_path / "value", architecture="LlamaForSequenceClassification", vocab_size=300)
    with pytest.raises(
        InvalidConfig, match=r"checkpoint\.hf_interval \(50\): no HF folder can be made .* removes extra"
    ):
        look(tmp_path, {**loads, "language": wide, "value": value}, *options, **kinds)


def test_a_reward_function_that_is_not_there_is_named(tmp_path: Path, loads: dict[str, str]) -> None:
    text = r"ppo\.reward_function \(gone\.py:score\): gone\.py is not there; name FILE\.py:FUNCTION"
    path = written(tmp_path, loads)
    config = yaml.safe_load(path.read_text())
    del config["roles"]["reward"]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(InvalidConfig, match=text):
        check_paths(load_config(path, overrides=["ppo.reward_function=gone.py:score"]))
    rules = tmp_path / "rules.py"
    for source, named in {
        "def score(): raise SystemExit": None,
        "if True:\n    import math as score": None,
        "raise SystemExit\nscore = lambda *_: [1.0]": None,
        "from os.path import *": None,
        "globals()['score'] = len": None,
        "class Rules:\n    def scores(self): pass": r"rules\.py has no function score; name one that it has",
        "def score(:": r"rules\.py is no Python: .*; mend it",
    }.items():
        rules.write_text(source)
        config = load_config(path, overrides=[f"ppo.reward_function={rules}:score"])
        with contextlib.nullcontext() if named is None else pytest.raises(InvalidConfig, match=named):
            check_paths(config)


def planned(path: Path, *overrides: str) -> Plan:
    return plan(
        path, overrides=overrides, num_nodes=1, gpus_per_node=4, gpu="h100", tokens=None, do_search=False,
        calibrate_by=None, as_json=True,
    )  # fmt: skip


def test_a_plan_takes_shapes_from_what_the_roles_load(tmp_path: Path, loads: dict[str, str]) -> None:
    path = written(tmp_path, loads)
    roles = {role.job.role: role.job.model for role in planned(path).roles}
    assert {name: (model.num_layers, model.vocab_size, model.head) for name, model in roles.items()} == {
        "actor": (4, 20, "language_model"),
        "critic": (4, 20, "value"),
        "reference": (4, 20, "language_model"),
        "reward": (4, 20, "value"),
    }
    uneven = ("roles.actor.ranks=0-2", "roles.actor.parallel.tensor_model_parallel_size=3", "roles.critic.ranks=3")
    with pytest.raises(InvalidConfig, match=r"roles.actor: model.num_attention_heads \(4\) must be a multiple of"):
        planned(path, *uneven, "roles.reference.ranks=0", "roles.reward.ranks=0")
    with pytest.raises(ConfigError, match="is not here to tell; give the shape keys in the config beside load"):
        planned(path, "roles.reference.model.load=hf:nowhere")


def test_an_answer_ends_as_generate_ends_it(tmp_path: Path, loads: dict[str, str]) -> None:
    """By the tokenizer's end token, and by those that the actor's folder names."""
    named = Path(hf_folder(tmp_path / "named", architecture="LlamaForCausalLM").removeprefix("hf:"))
    (named / "generation_config.json").write_text(json.dumps({"eos_token_id": [18, 5]}))
    path = written(tmp_path, {**loads, "named": f"hf:{named}"})

    def stop_ids(*overrides: str) -> tuple[int, ...]:
        config = load_config(path, overrides=overrides)
        return look_at(config, placed_roles(config, world_size=4)).stop_ids

    assert stop_ids() == (18,)
    assert stop_ids(f"roles.actor.model.load=hf:{named}") == (5, 18)
    assert stop_ids(f"roles.critic.model.load=hf:{named}") == (18,), "only what the actor says counts"


def test_other_weights_of_a_frozen_role_are_told_by_their_contents(tmp_path: Path, loads: dict[str, str]) -> None:
    """Of the same shape and size, in a folder of the same name: two epochs of one model, say."""
    reference = Path(hf_folder(tmp_path / "reference", architecture="LlamaForCausalLM").removeprefix("hf:"))
    config = load_config(written(tmp_path, loads), overrides=[f"roles.reference.model.load=hf:{reference}"])
    material = look_at(config, placed_roles(config, world_size=4))
    found = []
    for seed in (0, 1, 0):
        (reference / "model.safetensors").write_bytes(random.Random(seed).randbytes(3_000_001))
        found.append(fingerprints(config, material)["roles.reference.model.load"])
    assert found[0] == found[2] != found[1]


def test_fresh_weights_beside_an_actor_that_loads_some_are_told(tmp_path: Path, loads: dict[str, str]) -> None:
    config = load_config(written(tmp_path, loads))
    material = look_at(config, placed_roles(config, world_size=4))
    assert not any("warning" in line for line in told(material, world_size=4))
    reference = material.roles["reference"]
    fresh = replace(reference, model=reference.model.model_copy(update={"load": None}))
    (line,) = (
        line
        for line in told(replace(material, roles={**material.roles, "reference": fresh}), world_size=4)
        if "warning" in line
    )
    assert f"reference: fresh weights, though the actor starts from {loads['language']}" in line


def checkpoint_of(config: RunConfig) -> list[Path]:
    """The manifests of a checkpoint that a run of this config has written."""
    material = look_at(config, placed_roles(config, world_size=4))
    found = []
    for name in TRAINED_ROLES:
        said = facts(config, material.roles, of=name, fingerprints=fingerprints(config, material))
        place = {"iteration": 1, "data_step": 1, "consumed_samples": 4, "consumed_tokens": 0, "optimizer_steps": 1}
        folder = iteration_folder(config.run_dir / "checkpoints", 1) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, Manifest({**place, **said, "world_size": 1}, tensors={}, files={}))
        found.append(folder)
    return found


@pytest.mark.parametrize(
    ("then", "now", "told", "may_be_allowed"),
    [
        ("seed=1", "seed=2", r"seed \(2\) is 1 in .*iter_0000001/actor: samples would be", True),
        ("seed=1", "roles.actor.model.norm_epsilon=0.1", r"model\.norm_epsilon \(0.1\) is .*iter_0000001/actor", False),
        ("seed=1", "roles.critic.model.load={deep}", r"model\.num_layers \(5\) is 4 in .*iter_0000001/critic", False),
        (
            "roles.reward.model.norm_epsilon=0.1",
            "roles.reward.model.norm_epsilon=0.2",
            r"roles\.reward\.model\.norm_epsilon \(0\.2\) is 0\.1 in .*: another model would judge",
            True,
        ),
        ("ppo.responses=null", "ppo.responses={responses}", r"ppo\.responses \(\w+\) is None in", True),
        ("seed=1", "ppo.responses=null", r"ppo\.responses \(None\) is \w+ in", True),
        (
            "roles.reference.model={shape}",
            "roles.reference.model.load={language}",
            r"roles\.reference\.model\.load \(\w+\) is None in .*: another model would judge",
            True,
        ),
    ],
)
def test_what_the_run_would_not_go_on_with_is_found_before_it(
    tmp_path: Path, loads: dict[str, str], then: str, now: str, told: str, may_be_allowed: bool
) -> None:
    deep = hf_folder(tmp_path / "deep", architecture="LlamaForSequenceClassification", num_hidden_layers=5)
    path = written(tmp_path, loads)
    language = resolve_model(ModelConfig(load=loads["language"]))
    shape = json.dumps({name: getattr(language, name) for name in FIXED_MODEL_KEYS})
    names = {**loads, "deep": deep, "responses": tmp_path / "responses.jsonl", "shape": shape}
    then, now = then.format(**names), now.format(**names)
    checkpoint_of(load_config(path, overrides=[then]))
    check_paths(load_config(path, overrides=[then]))
    with pytest.raises(InvalidConfig, match=told):
        check_paths(load_config(path, overrides=[then, now]))
    allowed = load_config(path, overrides=[then, now, "checkpoint.allow_changes=true"])
    with contextlib.nullcontext() if may_be_allowed else pytest.raises(InvalidConfig, match=told):
        check_paths(allowed)


def test_a_checkpoint_written_before_a_key_goes_on(tmp_path: Path, loads: dict[str, str]) -> None:
    config = load_config(written(tmp_path, loads), overrides=["ppo.responses=null"])
    for folder in checkpoint_of(config):
        manifest = read_manifest(folder)
        order, settings = manifest.state["data_order"], manifest.state["settings"]
        kept = {key: value for key, value in order.items() if value is not None and ".model." not in key}
        loaded = {key: value for key, value in order.items() if key.endswith(".load")}
        manifest.state |= {"data_order": kept | loaded, "settings": {**settings, "ppo.responses": None}}
        write_manifest(folder, manifest)
    check_paths(config)


def test_a_given_answer_ends_with_its_first_end_token() -> None:
    rows = [[3, 18, 5, 6], [3, 18, 18], [18, 3], [3, 4]]
    given = SimpleNamespace(of=lambda first, count: rows[first : first + count])
    answers = AnswersFromFile(given, stop_tokens=(18,)).answers([], [[1]] * 4, first=0)  # type: ignore[arg-type]
    assert [(answer.tokens, answer.has_ended) for answer in answers] == [
        ([3, 18], True), ([3, 18], True), ([18], True), ([3, 4], False),
    ]  # fmt: skip


def test_a_role_of_another_tokenizer_is_refused_where_that_is_there_to_tell(
    tmp_path: Path, loads: dict[str, str]
) -> None:
    reward = Path(hf_folder(tmp_path / "reward", architecture="LlamaForSequenceClassification").removeprefix("hf:"))
    given = f"roles.reward.model.load=hf:{reward}"
    look(tmp_path, loads, given)
    write_tokenizer(reward, WORDS)
    look(tmp_path, loads, given)
    write_tokenizer(reward, [*WORDS[1:], WORDS[0]])
    text = r"roles.reward.model.load .* reads other token ids .* 16 of 19 differ, 1 is 'w01' and not 'w00'; take"
    with pytest.raises(InvalidConfig, match=text):
        look(tmp_path, loads, given)
