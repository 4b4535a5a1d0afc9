"""What all tests share: a tiny random model with its tokenizer, canonical rows, and one local Ray for the whole session."""

from __future__ import annotations

import gc
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(
    # For a server of the tests' own, and never anybody's real credentials.
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_EC2_METADATA_DISABLED="true",
    PHARMACIST_SCRATCH=tempfile.mkdtemp(prefix="pharmacist-scratch-"),
    RAY_AUTH_MODE="disabled",  # nobody else can reach a test's private Ray
    RAY_USAGE_STATS_ENABLED="0",
    RAY_LOG_MONITOR_MANY_FILES_THRESHOLD="1",  # a session has hundreds of workers' logs, which nobody follows
    RAY_enable_worker_prestart="0",  # most tests need fewer workers than there are CPUs
    RAY_prestart_worker_first_driver="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_worker_niceness="0",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from xdist.scheduler import LoadScopeScheduling

from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.data.render import Batch, Rendered, Renderer
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.runtime.ranks import stay_on_cpu
from tests.endpoint_server import Server, served
from tests.families import FAMILIES
from tests.two_workers import TwoWorkers

torch.set_num_threads(1)

SHARED = "what shares the two workers, or the world of faults"

LONGEST = (
    SHARED, "search/test_search.py", "cluster/test_jobs.py", "pipeline/test_push.py", "curation/test_score.py", "report/test_page.py",
    "pipeline/test_stages.py", "search/test_redteam.py", "tests/test_api.py", "curation/test_ingest.py", "cluster/test_slurm.py",
    "cluster/test_slurm_real.py", "pipeline/test_defences.py",
)  # fmt: skip
"""What takes minutes, for `make test` to begin with; the rest then fills both processes to the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the machine's GPUs: all tests but those that `pytest -m gpu` runs compare with what a CPU computes."""
    if config.option.markexpr != "gpu":
        stay_on_cpu()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage, of which training makes many."""
    gc.freeze()


@cache
def group_of(file: Path) -> str:
    """Return what a process takes as a whole: a file, or all files that use what takes long to start, which is then started once."""
    shares = file.parent.name == "faults" or re.search(r"\btwo_workers\b", file.read_text(encoding="utf-8"))
    return SHARED if shares else f"{file.parent.name}/{file.name}"


class Groups(LoadScopeScheduling):
    """Gives processes one group of tests after the other. (Marks for `--dist loadgroup` are not seen by pytest-xdist 3.8 with pytest 9.)"""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(self.config.rootpath / nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    return Groups(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest groups where several processes share the tests."""

    def place(item: pytest.Item) -> int:
        group = group_of(item.path)
        return LONGEST.index(group) if group in LONGEST else len(LONGEST)

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=place)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["PHARMACIST_SCRATCH"], ignore_errors=True)


LINEAR = torch.nn.functional.linear
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *[f"w{i}" for i in range(44)]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """Return a maker of tiny random Llamas: tiny(seed=0, **what the configuration should have otherwise)."""

    def make(seed: int = 0, **settings: object) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, **settings,
            }
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def batch_of(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Batch]:
    """Return a maker of random batches: batch_of(8, padded=True)."""

    def make(size: int, *, padded: bool = True, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        samples = []
        for _ in range(size):
            prompt, answer = (draw(1, 8), draw(1, 9)) if padded else (5, 6)
            samples.append(Rendered([draw(3, len(WORDS)) for _ in range(prompt + answer - 1)] + [2], prompt))
        return Renderer(tokenizer, "plain").collate(samples)

    return make


@pytest.fixture(scope="session")
def model_folder(
    tiny: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with a tiny model and its tokenizer, as from_pretrained reads it."""
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moderator(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Return a maker of a tiny random classifier with the labels fine, theft and violence."""

    def make(problem: str | None) -> Path:
        folder = tmp_path_factory.mktemp("moderator")
        names: dict[str, Any] = {
            "id2label": {0: "fine", 1: "theft", 2: "violence"},
            "label2id": {"fine": 0, "theft": 1, "violence": 2},
        }
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, problem_type=problem, initializer_range=0.3, **names,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForSequenceClassification(config)
            torch.nn.init.normal_(model.score.weight, std=0.7)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of folders with a family's tiny model: family_folder('Qwen3')."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            family, folders[name] = FAMILIES[name], tmp_path_factory.mktemp("family")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = getattr(transformers, family.config)(**family.settings)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        return folders[name]

    return make


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[Row]]:
    """Return a maker of random canonical rows: rows_of(20, seed=1)."""

    def make(count: int, *, seed: int = 0) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for number in range(count):
            lengths = torch.randint(2, 7, (2,), generator=generator).tolist()
            prompt, response = (
                " ".join(f"w{word}" for word in torch.randint(0, 44, (length,), generator=generator).tolist())
                for length in lengths
            )
            id = row_id(prompt, response)
            raw = f'{{"prompt":"{prompt}","response":"{response}","quality":"{number % 2}"}}'
            rows.append(Row(id, prompt, response, source=f"made:{number}", raw=raw))
        return rows

    return make


@dataclass
class Bucket:
    """A bucket of a real S3 server on loopback."""

    port: int
    client: Any
    refusing: threading.Event = field(default_factory=threading.Event)
    """While set, every request is answered with 503."""
    refused: list[str] = field(default_factory=list)
    """The requests that were."""

    def uri(self, path: str) -> str:
        """Return a path of the bucket as a user would write it."""
        return f"s3://bucket/{path}?endpoint_override=127.0.0.1%3A{self.port}&region=us-east-1&scheme=http"

    def keys(self, prefix: str = "") -> list[str]:
        """Return the names of the objects below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]


@pytest.fixture(scope="session")
def s3() -> Iterator[Bucket]:
    """Run moto's S3 server, and let tests make it refuse."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    inner = DomainDispatcherApplication(create_backend_app)
    found: list[Bucket] = []

    def gate(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if found and found[0].refusing.is_set():
            found[0].refused.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            start("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"slow down"]
        return inner(environ, start)

    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    found.append(Bucket(server.port, client))
    yield found[0]
    server.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def _torchs_own_linear() -> None:
    """After ZeRO 3 DeepSpeed leaves its own ``linear`` in torch; no test may see what one before it left."""
    torch.nn.functional.linear = LINEAR


@pytest.fixture
def placed_example(tmp_path: Path) -> dict[str, Any]:
    """Return the configuration that `init` writes, as plain values, with a run directory and data that are absolute paths."""

    def placed(values: Any) -> Any:
        if isinstance(values, list):
            return [placed(value) for value in values]
        if isinstance(values, dict):
            return {key: str(tmp_path / value) if key == "path" else placed(value) for key, value in values.items()}
        return values

    return placed(EXAMPLE) | {"run_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Run a private Ray on this machine for the whole session; more logical CPUs than cores, so that nothing waits for itself."""
    import ray

    from pharmacist_ray.runtime.private_ray import start_ray

    start_ray(cpus=6, store_bytes=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    """Serve an OpenAI-compatible endpoint on loopback."""
    with served() as state:
        yield state


@pytest.fixture(scope="session")
def two_workers(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    """Return what calls work(payload, ranks) on two workers that the session shares."""
    shared = TwoWorkers(tmp_path_factory.mktemp("two-workers"))
    yield shared
    shared.end()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; `make setup-browser` installs it (apt-get install chromium, as root)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root, which containers do.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser) -> Iterator[Any]:
    """Return an opener of pages: opened(file, width=…, color_scheme=…); the page has `said` and `asked`."""
    contexts = []

    def open_page(file: Path, width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: page.said.append(dialog.message))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
