"""Model identity: what makes two models one, what makes them two, and what is read again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from adapters import with_adapters
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvloom import identity, models
from kvloom.errors import UnsupportedModel
from kvloom.identity import Memo, differences, folder_key, forget, identity_of, loaded_from
from kvloom.quiet import quiet, silent


def tiny(seed=0, **changes):
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval().requires_grad_(False)


def tiny_tokenizer(words=("a", "b", "c", "ab")):
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="c")


def changed(one, other):
    return {field for field, _, _ in differences(one.fields, other.fields)}


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)


@pytest.fixture
def counted(monkeypatch):
    """How many times whole weights were hashed."""
    calls = []
    hash_all = identity._tensors_digest

    def spy(tensors):
        if any("embed_tokens" in name for name in tensors):
            calls.append(len(tensors))
        return hash_all(tensors)

    monkeypatch.setattr(identity, "_tensors_digest", spy)
    return calls


# --- one model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_live_model_and_the_folder_it_was_saved_to_are_one_model(tmp_path, tied):
    live = tiny(tie_word_embeddings=tied)
    live.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert identity_of(again).digest == identity_of(live).digest
    assert changed(identity_of(again), identity_of(live)) == set()


def test_where_a_model_lies_and_what_wrote_it_do_not_matter(tmp_path):
    live = tiny()
    live.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one").rename(tmp_path / "two")
    config |= {"transformers_version": "5.0.0", "use_cache": False, "eos_token_id": 7, "architectures": ["X"]}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))

    assert identity_of(AutoModelForCausalLM.from_pretrained(tmp_path / "two")).digest == identity_of(live).digest


def test_attention_implementation_is_provenance_and_not_identity():
    one, other = tiny(), tiny()
    other.set_attn_implementation("eager")

    assert identity_of(one).digest == identity_of(other).digest


def test_a_float32_folder_loaded_in_bfloat16_is_the_model_cast_in_memory_but_for_its_rounded_rope(tmp_path):
    live = tiny()
    live.save_pretrained(tmp_path)
    loaded = identity_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    cast = identity_of(live.to(torch.bfloat16))

    # .to() rounds the rope frequencies, from_pretrained keeps them: these really are two functions
    assert changed(loaded, cast) == {"rope"}
    assert loaded.digest != cast.digest


def test_a_cast_that_leaves_the_rope_frequencies_alone_is_the_model_loaded_in_that_dtype(tmp_path):
    live = tiny()
    live.save_pretrained(tmp_path)
    for parameter in live.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert identity_of(live).digest == identity_of(loaded).digest


def test_the_digest_is_the_same_in_another_process(tmp_path):
    tiny().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM; from kvloom.identity import identity_of\n"
        "from transformers.utils import logging; logging.disable_progress_bar()\n"
        "print(identity_of(AutoModelForCausalLM.from_pretrained(sys.argv[1])).digest.hex())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == identity_of(tiny()).digest.hex()


def test_running_a_model_with_dynamic_rope_does_not_make_it_another():
    model = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    before = identity_of(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(200).remainder(64)[None])

    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert identity_of(model).digest == before.digest


def _moved(folder):
    return folder.rename(folder.with_name("elsewhere"))


def _config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return change


def _generation(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "max_length": 7, "eos_token_id": 3}))
    return folder


def _in_parts(folder):
    tiny().save_pretrained(folder.with_name("parts"), max_shard_size="2KB")
    assert len(list(folder.with_name("parts").glob("*.safetensors"))) > 1
    return folder.with_name("parts")


def _padded(folder):
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"model_max_length": 99, "padding_side": "left", "truncation_side": "left"}))
    return folder


SAME_FUNCTION = {
    "the folder was moved": _moved,
    "the name it was published under": _config(_name_or_path="somebody/else"),
    "the version of transformers that wrote it": _config(transformers_version="5.0.0"),
    "the class that is named in its config": _config(architectures=["X"]),
    "the dtype its config names": _config(dtype="bfloat16"),
    "whether caches are used": _config(use_cache=False),
    "what is returned besides logits": _config(output_attentions=False, output_hidden_states=True),
    "ids of tokens that generation stops or pads at": _config(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0),
    "how weights were drawn before training": _config(initializer_range=0.5),
    "names of the classes of another head": _config(id2label={"0": "a", "1": "b"}),
    "a float written as a whole number": _config(rope_parameters={"rope_type": "default", "rope_theta": 10000}),
    "settings of generation": _generation,
    "weights in several files": _in_parts,
    "sides and lengths that the tokenizer pads to": _padded,
}
"""What changes nothing in how tokens become logits and state, by what is done to a folder."""


@pytest.mark.parametrize("what", SAME_FUNCTION)
def test_nothing_that_does_not_change_the_function_makes_another_model(tmp_path, what):
    for name in ("model", "parts"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    tiny().save_pretrained(tmp_path / "model")
    folder = SAME_FUNCTION[what](tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    again = identity_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    live = identity_of(tiny(), tiny_tokenizer())

    assert changed(again, live) == set()
    assert (again.digest, again.tokenizer) == (live.digest, live.tokenizer)


LIVE_SAME_FUNCTION = {
    "the attention implementation": lambda model: model.set_attn_implementation("eager"),
    "whether gradients are kept": lambda model: model.requires_grad_(True),
    "settings of generation": lambda model: setattr(model.generation_config, "temperature", 0.3),
    "that it has run": lambda model: model(torch.tensor([[1, 2, 3]])),
    "the name it was loaded from": lambda model: setattr(model.config, "_name_or_path", "elsewhere"),
    "where in memory its weights lie": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
}
"""The same of a model in memory."""


@pytest.mark.parametrize("what", LIVE_SAME_FUNCTION)
def test_nothing_that_does_not_change_the_function_makes_a_live_model_another(what):
    model = tiny()
    LIVE_SAME_FUNCTION[what](model)

    assert identity_of(model).digest == identity_of(tiny()).digest


# --- another model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"seed": 1}, {"weights"}),
        ({"rms_norm_eps": 1e-3}, {"config"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope"}),
        ({"tie_word_embeddings": False}, {"weights", "config"}),
        ({"num_hidden_layers": 3}, {"weights", "config", "layers"}),
    ],
)
def test_what_differs_is_named(changes, fields):
    one, other = identity_of(tiny()), identity_of(tiny(**changes))

    assert changed(one, other) == fields
    assert one.digest != other.digest


def test_another_dtype_is_another_model():
    assert "dtype" in changed(identity_of(tiny()), identity_of(tiny().to(torch.bfloat16)))


def test_differences_name_fields_that_only_one_side_has():
    assert differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == [("a", "1", ""), ("b", "2", "3"), ("c", "", "4")]
    assert differences({"a": "1"}, {"a": "1"}) == []


def test_weights_that_are_not_here_are_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny().config)

    with pytest.raises(UnsupportedModel, match="offloaded"):
        identity_of(model)


# --- a live model that changes ----------------------------------------------------------------------


def test_untouched_weights_are_hashed_once(counted):
    model = tiny()
    first = identity_of(model)
    model(torch.tensor([[1, 2, 3]]))

    assert identity_of(model).digest == first.digest
    assert len(counted) == 1


def edit_in_place(model):
    model.model.layers[1].mlp.up_proj.weight[3, 4] += 1


def edit_through_data(model):  # moves neither version counter nor address; PEFT merges adapters like this
    model.model.layers[0].self_attn.q_proj.weight.data += 0.25


def replace_a_parameter(model):
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight + 1, requires_grad=False)


@pytest.mark.parametrize("edit", [edit_in_place, edit_through_data, replace_a_parameter])
def test_an_edit_of_the_weights_is_seen(edit):
    model = tiny()
    before = identity_of(model)
    edit(model)

    assert changed(before, identity_of(model)) == {"weights"}


def test_forget_makes_every_weight_be_read_again(counted):
    model = tiny()
    identity_of(model)
    forget(model)
    identity_of(model)

    assert len(counted) == 2


def test_weights_made_in_inference_mode_are_never_remembered(counted):
    with torch.inference_mode():
        model = tiny()
    assert identity_of(model).digest == identity_of(tiny()).digest
    identity_of(model)

    assert len(counted) == 3  # they have no version counter to watch


# --- adapters ---------------------------------------------------------------------------------------


def test_an_adapter_added_to_an_open_model_changes_adapters_alone():
    model = tiny()
    before = identity_of(model)
    with_adapters(model, style=1)

    assert before.fields["adapters"] == "none"
    assert changed(before, identity_of(model)) == {"adapters"}


def test_an_adapter_switched_rescaled_or_edited_is_seen_at_the_next_call(counted):
    model = tiny()
    layer = with_adapters(model, style=1, tone=2)
    seen = [identity_of(model).digest]
    layer.active_adapter = ["tone"]
    seen.append(identity_of(model).digest)
    layer.scaling["tone"] = 0.5
    seen.append(identity_of(model).digest)
    layer.lora_B["tone"].weight.data[0, 0] += 1  # one element, through .data
    seen.append(identity_of(model).digest)

    assert len(set(seen)) == 4
    assert len(counted) == 1  # the base weights were read once


def test_a_model_whose_adapters_are_switched_off_is_the_model_without_them():
    model = tiny()
    before = identity_of(model)
    layer = with_adapters(model, style=1)
    layer.disable_adapters = True

    assert identity_of(model).digest == before.digest


def test_an_adapter_that_is_loaded_and_not_used_does_not_count():
    one, other = tiny(), tiny()
    with_adapters(one, style=1)
    with_adapters(other, style=1, tone=2)

    assert identity_of(one).digest == identity_of(other).digest


# --- tokenizer and chat template --------------------------------------------------------------------


def test_tokenizer_and_chat_template_are_told_apart_and_leave_the_model_digest_alone():
    model, plain, templated = tiny(), tiny_tokenizer(), tiny_tokenizer()
    templated.chat_template = "{{ messages }}"
    other = tiny_tokenizer(("a", "b", "c", "d", "ab"))
    one, two, three = (identity_of(model, tokenizer) for tokenizer in (plain, templated, other))

    assert one.digest == two.digest == three.digest
    assert one.tokenizer == two.tokenizer != three.tokenizer
    assert one.chat_template == "none" != two.chat_template


def test_padding_and_truncation_left_behind_by_a_call_do_not_change_the_tokenizer():
    tokenizer = tiny_tokenizer()
    before = identity_of(tiny(), tokenizer).tokenizer
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)

    assert identity_of(tiny(), tokenizer).tokenizer == before


def test_an_added_token_changes_the_tokenizer():
    tokenizer = tiny_tokenizer()
    before = identity_of(tiny(), tokenizer).tokenizer
    tokenizer.add_tokens(["<new>"])

    assert identity_of(tiny(), tokenizer).tokenizer != before


def test_a_saved_tokenizer_is_the_same_when_it_is_loaded(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert identity_of(tiny(), again).tokenizer == identity_of(tiny(), tokenizer).tokenizer


# --- memo -------------------------------------------------------------------------------------------


def test_a_memo_saves_the_hashing_of_the_next_load(tmp_path, settled, counted):
    live = tiny()
    live.save_pretrained(tmp_path / "model")
    memo = Memo(tmp_path / "memo.json")
    digests = []
    for _ in range(3):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        loaded_from(model, folder_key(tmp_path / "model", "float32"), memo)
        digests.append(identity_of(model).digest)

    assert set(digests) == {identity_of(live).digest}
    assert len(counted) == 2  # the first load, and the live model just now


def test_a_memo_is_neither_believed_for_nor_written_from_a_model_edited_after_loading(tmp_path):
    memo = Memo(tmp_path / "memo.json")
    memo.put("a folder", "0" * 32)
    model, other = tiny(), tiny()
    loaded_from(model, "a folder", memo)
    loaded_from(other, "another folder", memo)
    for edited in (model, other):
        edit_through_data(edited)

    assert identity_of(model).fields["weights"] not in ("0" * 32, identity_of(tiny()).fields["weights"])
    assert identity_of(other).digest == identity_of(model).digest
    assert memo.get("another folder") is None


def test_a_folder_key_changes_with_any_file_and_with_the_dtype(tmp_path, settled):
    (tmp_path / "config.json").write_text("{}")
    keys = [folder_key(tmp_path, "float32"), folder_key(tmp_path, "bfloat16")]
    (tmp_path / "config.json").write_text("[]")
    os.utime(tmp_path / "config.json", (1, 1))
    keys.append(folder_key(tmp_path, "float32"))
    (tmp_path / "more.json").write_text("{}")
    keys.append(folder_key(tmp_path, "float32"))

    assert None not in keys
    assert len(set(keys)) == 4


def test_a_folder_written_this_moment_has_no_key_yet(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    assert folder_key(tmp_path, "float32") is None
    assert folder_key(tmp_path / "missing", "float32") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b'{"version": 2, "weights": {"k": "00"}}', b'{"version": 1, "weights": {"k": "x"}}'],
)
def test_a_damaged_memo_is_no_memo_and_is_written_anew(tmp_path, content):
    memo = Memo(tmp_path / "memo.json")
    (tmp_path / "memo.json").write_bytes(content)
    assert memo.get("k") is None

    memo.put("k", "a" * 32)
    assert memo.get("k") == "a" * 32
    assert (tmp_path / "memo.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["memo.json"]


def test_a_memo_keeps_the_newest_entries_only(tmp_path):
    memo = Memo(tmp_path / "memo.json")
    for number in range(70):
        memo.put(str(number), f"{number:032x}")

    assert memo.get("0") is None
    assert memo.get("69") == f"{69:032x}"


def test_a_memo_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("")
    memo = Memo(tmp_path / "file" / "memo.json")
    memo.put("k", "a" * 32)

    assert memo.get("k") is None


def test_importing_the_module_imports_no_torch():
    code = "import sys, kvloom.models, kvloom.identity; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# --- the real model ---------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_as_gguf_and_as_converted_folder_is_one_model(tmp_path, monkeypatch):
    from transformers import AutoTokenizer, GgufConfig

    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    source = models.resolve("smollm2")
    converted = models.load(source, dtype="float32")
    where = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    with quiet(silent):
        direct = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)

    assert identity_of(direct, tokenizer) == identity_of(converted.model, converted.tokenizer)
