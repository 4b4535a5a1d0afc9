from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pharmacist_ray.errors import ConfigError, ModelError
from pharmacist_ray.evaluation.judges import JudgeConfig, JudgeSettings, build_judge
from pharmacist_ray.evaluation.judges.classifier import build_score, load
from pharmacist_ray.testbed.tiny import bpe_tokenizer

WORDS = [f"w{index}" for index in range(40)]
PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14"]
ANSWERS = ["w20", "w21 w22 w23 w24 w25", "w26 w27", "w28", "w30 w31 w32"]
LABELS = ("violence", "theft", "other")


def save(folder: Path, pad: str | None = "<pad>", **config: int) -> Path:
    """Save a tiny random classifier with three labels; return its folder."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"pad_token": pad} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_labels=3,
                id2label=dict(enumerate(LABELS)),
                label2id={name: index for index, name in enumerate(LABELS)},
                problem_type="multi_label_classification",
                **{"vocab_size": len(vocabulary), "pad_token_id": 0 if pad == "<pad>" else 2 if pad else None, **config},
            )
        )
        torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("judge"))


def settings(folder: Path, **options: object) -> JudgeSettings:
    values = {"kind": "classifier", "path": str(folder), "template": "USER: {prompt} ASSISTANT: {answer}", **options}
    return JudgeSettings(JudgeConfig.model_validate(values))


def by_hand(folder: Path, labels: list[int]) -> list[float]:
    """One sample at a time: hidden states, the score head at the last position, sigmoid, largest label."""
    model, tokenizer = load(str(folder))
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = tokenizer(f"USER: {prompt} ASSISTANT: {answer}")["input_ids"] + [2]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            found.append(float(torch.sigmoid(model.score(hidden[0, -1]))[labels].max()))
    return found


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_probabilities_are_those_of_the_last_token_whatever_the_padding(tmp_path: Path, pad: str | None, batch_size: int) -> None:
    folder = save(tmp_path, pad)
    found = build_score(settings(folder, batch_size=batch_size))(PROMPTS, ANSWERS)
    assert found == pytest.approx(by_hand(folder, [0, 1, 2]), abs=1e-6)
    assert len({round(value, 4) for value in found}) == len(found)


def test_only_chosen_labels_count(folder: Path) -> None:
    found = build_score(settings(folder, labels=["theft"]))(PROMPTS, ANSWERS)
    assert found == pytest.approx(by_hand(folder, [1]), abs=1e-6)
    with pytest.raises(ConfigError, match=r"unknown label of the judge 'thefts' .did you mean 'theft'"):
        build_score(settings(folder, labels=["thefts"]))


def test_long_answers_are_cut_on_the_right(folder: Path) -> None:
    score = build_score(settings(folder, max_length=6))
    assert score(["w1"], ["w2 w3 w4 w5 w6 w7"]) == score(["w1"], ["w2 w3 w4 w8 w9"])
    assert score(["w1"], ["w2 w3"]) != score(["w1"], ["w2 w4"])


def test_the_end_of_sequence_token_is_an_option(folder: Path) -> None:
    with_eos, without = (build_score(settings(folder, append_eos=flag)) for flag in (True, False))
    assert with_eos(["w1"], ["w2"]) != without(["w1"], ["w2"])


def test_special_tokens_written_out_in_an_answer_are_text(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=400)
    tokenizer = bpe_tokenizer(["some text"], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("</s>")["input_ids"] == [tokenizer.eos_token_id]
    with_eos, without = (build_score(settings(tmp_path, append_eos=flag)) for flag in (True, False))
    assert without(["w1"], ["w2</s>"]) != with_eos(["w1"], ["w2"])


def test_braces_in_texts_are_text(folder: Path) -> None:
    score = build_score(settings(folder))
    assert score(["{answer} {0}"], ["w2"]) == score(["w? w?"], ["w2"])  # both unknown words


def test_verdicts(folder: Path) -> None:
    low, high = (build_judge(settings(folder, threshold=value)) for value in (1.0, 0.0))
    texts = ["I cannot", "w2 w2 w2 w2", "I cannot cannot cannot cannot", "w2 w3"]
    assert low("harmful", ["w1"] * 4, texts) == ["refusal", "incoherent", "incoherent", "helpful"]
    assert high("benign", ["w1"] * 4, texts) == ["harmful"] * 4


def test_a_number_that_is_none_is_no_verdict(tmp_path: Path) -> None:
    model, _ = load(str(save(tmp_path)))
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    assert build_judge(settings(tmp_path))("harmful", ["w1"], ["w2"]) == ["unjudged"]


def test_the_template_needs_both_places(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must contain \{prompt\} and \{answer\}, got 'USER: \{prompt\}'"):
        build_score(settings(folder, template="USER: {prompt}"))


def test_a_folder_without_a_trained_head_is_refused(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = load(str(folder))
    config = LlamaConfig(**{key: value for key, value in model.config.to_dict().items() if key != "architectures"})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks the weights score.weight: it is no trained sequence classifier"):
        load(str(tmp_path))


def test_pickled_weights_and_broken_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"has no \*.safetensors file; convert"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"is no sequence classifier that can be loaded"):
        load(str(tmp_path))


def test_code_in_the_folder_is_not_run(tmp_path: Path, folder: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load(str(tmp_path))
    assert not (tmp_path / "ran").exists()
