"""Converting a GGUF file: once, whole or not at all, by one process at a time."""

import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import sys

import forked
import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

import kvloom.convert as module
from kvloom.convert import ModelSource, convert, converted, keep_weights
from kvloom.errors import EngineError, UnsupportedModel
from kvloom.identity import identity_of
from kvloom.models import available, load, resolve

WORDS = ["<s>", "</s>", "a", "b", "c", "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def test_a_gguf_file_is_converted_once_and_listed(tmp_path):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    folder = convert(source)
    written = (folder / "model.safetensors").stat().st_mtime_ns

    assert convert(source) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [(choice.path, choice.kind) for choice in available() if choice.kind != "alias"] == [(folder, "converted")]


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


def test_a_converted_model_is_kept_in_bfloat16_once_it_was_used_so_and_is_the_same_model(tmp_path, cache):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    first = load(source, dtype="bfloat16")
    kept = first.folder / "model.bfloat16.safetensors"
    assert kept.stat().st_mode & 0o777 == 0o600
    second, whole = load(source, dtype="bfloat16"), load(source, dtype="float32")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name].view(torch.int16), tensor.view(torch.int16)), name
        assert torch.equal(whole.model.state_dict()[name].bfloat16(), tensor), name
    assert identity_of(second.model).digest == identity_of(first.model).digest
    assert [(path, size) for path, size in converted()] == [
        (first.folder, sum(path.stat().st_size for path in first.folder.iterdir()))
    ]
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".lock", first.folder.name]

    with safe_open(kept, "pt") as file:  # it is what is read
        other = {name: file.get_tensor(name) + 1 for name in file.keys()}  # noqa: SIM118
    save_file(other, kept, metadata={"format": "pt"})
    assert identity_of(load(source, dtype="bfloat16").model).digest != identity_of(first.model).digest


@pytest.mark.parametrize("busy", [False, True])
def test_where_the_weights_cannot_be_kept_the_model_is_loaded_all_the_same(tmp_path, cache, monkeypatch, busy):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    folder = convert(source)
    if busy:
        holder = (cache / "models" / ".lock").open("wb")
        fcntl.flock(holder, fcntl.LOCK_EX)
    else:

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "replace", full)
    assert load(source, dtype="bfloat16").model.dtype == torch.bfloat16
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".lock", folder.name]
    assert not list(folder.glob("*bfloat16*"))
    if busy:
        holder.close()


def test_weights_that_are_cut_short_by_a_full_disk_are_not_kept(tmp_path, cache):
    source = resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    folder = convert(source)
    model = load(source, dtype="float32").model.bfloat16()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the weights have more, all else less
    try:
        keep_weights(folder, model, "bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.glob("*bfloat16*"))
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".lock", folder.name]
    keep_weights(folder, model, "bfloat16")
    assert (folder / "model.bfloat16.safetensors").stat().st_size > 4096


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_seal", full)
    with pytest.raises(EngineError, match="No space left") as caught:
        convert(resolve(str(write_gguf(tmp_path / "tiny.gguf"))))

    assert "KVLOOM_CACHE" in caught.value.hint
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_swept_by_the_next_one(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    code = (
        "import os, signal, sys; from kvloom import convert, models\n"
        "convert._seal = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.convert(models.resolve(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = forked.run(["-c", code, path], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert {choice.kind for choice in available()} == {"alias"}  # what is half-made is not offered
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
    publish = module._publish

    def late(work, folder):
        shutil.copytree(kept, folder)
        (folder / "winner").touch()
        publish(work, folder)

    monkeypatch.setattr(module, "_publish", late)
    assert convert(source) == winner
    assert (winner / "winner").exists()
    assert {entry.name for entry in (cache / "models").iterdir()} == {".lock", winner.name}


def test_processes_that_convert_the_same_file_at_once_get_one_folder(tmp_path, cache):
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    code = "import sys; from kvloom import convert, models; print(convert.convert(models.resolve(sys.argv[1])))"
    both = [forked.start(["-c", code, path], strict=False) for _ in range(2)]
    folders = [program.finished().stdout.strip() for program in both]

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
