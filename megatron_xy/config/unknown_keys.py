"""A key that no section has, and what is said of it: the nearest one, its own section, or the tool that has it."""

from __future__ import annotations

import difflib
import re

from megatron_xy.config.fields import Section
from megatron_xy.config.sections import SECTIONS, Phase, RoleConfig, RunConfig

UNKNOWN_KEY = "unknown key"

# What stays outside this project, and a tool that has it.
OUT_OF_SCOPE = {
    r"num_experts|moe.*|expert_model_parallel_size": (
        "mixture of experts is not part of megatron_xy; Megatron-LM has it"
    ),
    r"multi_latent_attention|q_lora_rank|kv_lora_rank": (
        "latent attention is not part of megatron_xy; Megatron-LM has it"
    ),
    r"lora.*|peft.*|adapter.*": (
        "adapters are not part of megatron_xy, all weights train; PEFT and LLaMA-Factory have them"
    ),
    r"(dpo|grpo).*": (
        "DPO and GRPO are not part of megatron_xy, which learns preferences by tasks reward and ppo; TRL has them"
    ),
    r"fp8.*": "FP8 is not part of megatron_xy; Megatron-LM has it",
}

# Megatron's and HF's spellings of what is called otherwise here.
OTHER_SPELLINGS = {
    "seq_length": "training.micro_batch_tokens (a sample's length comes from the data's buckets)",
    "micro_batch_size": "training.micro_batch_tokens (tokens, not sequences)",
    "global_batch_size": "training.global_batch_tokens (tokens, not sequences)",
    "data_path": "data.path",
    "tokenizer_model": "data.tokenizer",
    "save": "run_dir",
    "tensorboard_dir": "run_dir (TensorBoard files lie in it)",
    "hidden_dim": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "group_query_attention": "model.num_query_groups",
    "rope_theta": "model.rotary_base",
    "rms_norm_eps": "model.norm_epsilon",
    "tie_word_embeddings": "model.untie_embeddings_and_output_weights",
    "bf16": "model.params_dtype: bf16",
    "warmup_iters": "optimizer.lr_warmup_iters",
    "learning_rate": "optimizer.lr",
    "distributed_timeout_minutes": "runtime.timeout_seconds",
}


def unknown_key(location: list[str]) -> str:
    """Names the nearest key, the section that has this one, or the tool that has what we leave out."""
    *sections, key = location
    key = key.replace("-", "_").removeprefix("__")
    for pattern, text in OUT_OF_SCOPE.items():
        if re.fullmatch(pattern, key):
            return text
    if key in OTHER_SPELLINGS:
        return f"unknown key; here it is {OTHER_SPELLINGS[key]}"
    section = _section_of(sections)
    elsewhere = [name for name, model in SECTIONS.items() if key in model.model_fields and [name] != sections]
    if key in RunConfig.model_fields and sections:
        return f"unknown key here; {key} stands at the top level"
    if elsewhere:
        return f"unknown key here; {key} belongs to section {' or '.join(elsewhere)}"
    known = list(section.model_fields) if section else []
    if section and key in known:
        return f"unknown key; it is spelled {key}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    everywhere = {field: name for name, model in SECTIONS.items() for field in model.model_fields}
    near = difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.75)
    if near:
        return f"unknown key; did you mean {everywhere[near[0]]}.{near[0]}?"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def _section_of(sections: list[str]) -> type[Section] | None:
    """The model of the section that lies at this path."""
    if not sections:
        return RunConfig
    if sections[:2] == ["training", "phases"]:
        return Phase
    return RoleConfig if sections[0] == "roles" and len(sections) == 2 else SECTIONS.get(sections[-1])
