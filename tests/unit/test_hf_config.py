"""config.json both ways: what each transformers version reads, and what is refused by name."""

import contextlib
import json

import pytest

from megatron_xy.config import InvalidConfig, ModelConfig
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.config import complete_model, hf_config, read_hf_config, read_model_type, read_token_ids
from megatron_xy.model.source import changes_to_source, resolve_model

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=503,
    max_position_embeddings=128,
    rotary_base=500000.0,
    norm_epsilon=1e-6,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def written(folder, **changes):
    """The folder with MODEL's config.json and `changes` in it; None removes a key."""
    values = {**hf_config(MODEL, dtype="float32", token_ids={}), **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_a_model_comes_back_as_it_was(tmp_path, scaling, tied):
    changes = {"rope_scaling": scaling, "untie_embeddings_and_output_weights": not tied}
    model = MODEL.model_copy(update=changes)
    values = hf_config(model, dtype="bfloat16", token_ids={"bos_token_id": 1, "eos_token_id": [2, 3]})
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_hf_config(tmp_path).model_dump() == model.model_dump()
    assert read_token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert values["vocab_size"] == 503 and values["torch_dtype"] == values["dtype"] == "bfloat16"


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LLAMA3])
def test_theta_and_scaling_stand_there_for_version_4_and_for_version_5(tmp_path, scaling):
    values = hf_config(MODEL.model_copy(update={"rope_scaling": scaling}), dtype="float32", token_ids={})
    kind = scaling.get("rope_type", "linear") if scaling else "default"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500000.0
    assert values["rope_parameters"]["rope_type"] == kind
    if scaling is None:
        assert values["rope_scaling"] is None
    else:
        assert values["rope_scaling"]["type"] == values["rope_scaling"]["rope_type"] == kind
        for name in scaling.keys() - {"type", "rope_type"}:
            assert values["rope_scaling"][name] == values["rope_parameters"][name] == scaling[name]


@pytest.mark.parametrize("kept", ["version 4", "version 5"])
def test_each_style_alone_is_read(tmp_path, kept):
    values = hf_config(MODEL.model_copy(update={"rope_scaling": LLAMA3}), dtype="float32", token_ids={})
    for name in {"version 4": ["rope_parameters"], "version 5": ["rope_theta", "rope_scaling"]}[kept]:
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = read_hf_config(tmp_path)
    assert (model.rotary_base, model.rope_scaling) == (500000.0, LLAMA3)


def test_what_transformers_leaves_out_has_its_defaults(tmp_path):
    missing = dict.fromkeys(
        ["rope_theta", "rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings",
         "max_position_embeddings"]
    )  # fmt: skip
    model = read_hf_config(written(tmp_path, **missing))
    assert (model.rotary_base, model.rope_scaling, model.norm_epsilon) == (10000.0, None, 1e-6)
    assert (model.num_query_groups, model.max_position_embeddings) == (4, 2048)
    assert model.untie_embeddings_and_output_weights


def test_a_window_as_long_as_the_context_cuts_nothing(tmp_path):
    model = read_hf_config(written(tmp_path, model_type="mistral", sliding_window=128, max_position_embeddings=128))
    assert model.max_position_embeddings == 128


def test_a_family_that_is_known_is_written_again(tmp_path):
    values = hf_config(MODEL, dtype="float32", token_ids={}, model_type="mistral")
    assert (values["architectures"], values["sliding_window"]) == (["MistralForCausalLM"], None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_hf_config(tmp_path).model_dump() == MODEL.model_dump() and read_model_type(tmp_path) == "mistral"


LLAMA3_ORDER = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gemma"}, r"model_type \(gemma\) is not supported; llama, mistral, qwen2 are"),
        (
            {"model_type": "gemma", "quantization_config": {"quant_method": "bitsandbytes"}},
            "is quantised, by bitsandbytes .quantization_config., .* compare hf:... hf:.* --tasks",
        ),
        ({"attention_bias": True}, "attention_bias .true. is not supported"),
        ({"mlp_bias": True}, "mlp_bias .true. is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act \(gelu\) is not supported; silu is"),
        ({"head_dim": 32}, r"head_dim \(32\) x num_attention_heads \(4\) must be hidden_size \(64\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        (
            {"num_hidden_layers": None, "vocab_size": 0},
            r"num_hidden_layers \(missing or null\) must be a positive integer",
        ),
        ({"hidden_size": "64"}, r"hidden_size \('64'\) must be a positive integer"),
        ({"vocab_size": True}, r"vocab_size \(True\) must be a positive integer"),
        ({"num_key_value_heads": "2"}, r"num_key_value_heads \('2'\) must be a positive integer"),
        ({"head_dim": [16]}, r"head_dim \(\[16\]\) must be a positive integer"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings \('false'\) must be true or false"),
        ({"model_type": ["llama"]}, r"model_type \(\['llama'\]\) must be a string"),
        ({"architectures": "LlamaForSequenceClassification"}, r"architectures \(.*\) must be a list of strings"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": 1}, r"id2label \(1\) must be an object"),
        ({"rope_theta": [1e4]}, r"rope_theta \(\[10000.0\]\) must be a positive number"),
        ({"rope_theta": float("inf")}, r"rope_theta \(inf\) must be a positive number"),
        ({"rope_theta": 1e4}, "rope_theta is given as 500000 and 10000"),
        ({"rope_parameters": [1]}, r"rope_parameters \(\[1\]\) must be an object"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_scaling.type \(\['linear'\]\) must be a string"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"rope_scaling.factor \('2'\) must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters differ"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters differ between full_attention, sliding_attention",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "rope_type": "default"}},
            r"rope_parameters.rope_type \('default'\) must be an object",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \(sliding_attention\) are not"),
        ({"model_type": "mistral", "sliding_window": "64"}, r"sliding_window \('64'\) must be a positive integer"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "kind 'yarn' is not supported; linear and llama3 are"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "kind llama3 lacks low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor \(0.5\) is not supported"),
        (
            {"rope_scaling": {**LLAMA3_ORDER, "low_freq_factor": 4.0}},
            r"high_freq_factor \(4.0\) must be above low_freq_factor \(4.0\)",
        ),
        (
            {"model_type": "mistral", "sliding_window": 64},
            r"sliding_window \(64\) below max_position_embeddings \(128\)",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window \(true\) is not supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"num_labels \(2\) is not supported; a value head has 1",
        ),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps \('small'\) must be a positive number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, text):
    with pytest.raises(DataError, match=text):
        read_hf_config(written(tmp_path, **changes))


def test_theta_that_is_null_is_not_taken_for_the_default(tmp_path):
    values = json.loads((written(tmp_path, rope_parameters=None) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_theta": None}))
    with pytest.raises(DataError, match=r"rope_theta \(missing or null\) must be a positive number"):
        read_hf_config(tmp_path)


def test_rope_by_type_of_layer_is_read_where_all_agree(tmp_path):
    rope = {**LLAMA3, "rope_theta": 2e6}
    by_type = {"full_attention": rope, "sliding_attention": dict(reversed(rope.items()))}
    model = read_hf_config(written(tmp_path, rope_parameters=by_type, rope_theta=None))
    assert (model.rotary_base, model.rope_scaling) == (2e6, LLAMA3)


def test_no_value_of_any_type_is_our_bug(tmp_path):
    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    values = {**hf_config(MODEL, dtype="float32", token_ids={}), "sliding_window": 512, "num_labels": 1}
    values |= {
        "model_type": "mistral",
        "rope_scaling": rope,
        "rope_parameters": rope,
        "partial_rotary_factor": 1.0,
        "layer_types": [],
    }
    places = [(values, name) for name in values] + [(rope, name) for name in rope]
    for place, name in places:
        before = place[name]
        for value in (None, "x", "\ud800", [], {}, [{}], {"a": [1]}, True, 0, -1, 1.5, 10**40, 1e400, float("nan")):
            place[name] = value
            (tmp_path / "config.json").write_text(json.dumps(values))
            with contextlib.suppress(DataError):
                read_hf_config(tmp_path)
                read_token_ids(tmp_path)
        place[name] = before


@pytest.mark.parametrize("value", ["2", {"a": 1}, [1, "2"], 1.5, True])
def test_token_ids_of_a_wrong_type_are_bad_data(tmp_path, value):
    with pytest.raises(DataError, match=r"eos_token_id \(.*\) must be a token id or a list of them"):
        read_token_ids(written(tmp_path, eos_token_id=value))


@pytest.mark.parametrize(
    ("content", "text"),
    [("{", "is damaged"), ("[" * 10**5, "is damaged"), ("[]", "holds a list"), (None, "holds no config")],
)
def test_a_damaged_config_is_bad_data(tmp_path, content, text):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=text):
        read_hf_config(tmp_path)


def test_a_missing_folder_is_bad_config(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder") as caught:
        resolve_model(ModelConfig(load=f"hf:{tmp_path / 'none'}"))
    assert caught.value.exit_code == 78


def test_shape_keys_that_contradict_the_folder_are_named_with_both_values(tmp_path):
    folder = written(tmp_path / "hf")
    with pytest.raises(InvalidConfig) as caught:
        resolve_model(ModelConfig(load=f"hf:{folder}", num_layers=3, vocab_size=512, hidden_size=64))
    assert [problem.text for problem in caught.value.problems] == [
        f"model.num_layers (3) is 2 in {folder}/config.json; leave it out or correct it",
        f"model.vocab_size (512) is 503 in {folder}/config.json; leave it out or correct it",
    ]
    tied = ModelConfig(load=f"hf:{folder}", untie_embeddings_and_output_weights=False)
    with pytest.raises(InvalidConfig, match=r"untie_embeddings_and_output_weights \(False\) is True"):
        resolve_model(tied)


def test_what_the_run_says_of_numerics_counts_and_the_rest_comes_from_the_folder(tmp_path):
    load = f"hf:{written(tmp_path / 'hf')}"
    model = resolve_model(ModelConfig(load=load, rotary_base=2e6, max_position_embeddings=4096, params_dtype="bf16"))
    assert model.load == load
    assert (model.rotary_base, model.max_position_embeddings, model.params_dtype) == (2e6, 4096, "bf16")
    assert (model.num_layers, model.norm_epsilon) == (2, 1e-6)
    assert complete_model(model, MODEL, origin="a resumed run's own section") == model


def test_rope_scaling_null_takes_the_folders_scaling_away_and_left_out_keeps_it(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    load = f"hf:{written(tmp_path / 'hf', rope_scaling=scaling, rope_parameters=None)}"
    kept = resolve_model(ModelConfig(load=load, num_query_groups=None))
    assert (kept.rope_scaling, changes_to_source(kept)) == (scaling, {})
    without = resolve_model(ModelConfig(load=load, rope_scaling=None))
    assert without.rope_scaling is None
    assert changes_to_source(without) == {"rope_scaling": [scaling, None]}
