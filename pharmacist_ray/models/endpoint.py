"""A model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a service.

What it replied is kept by a hash of the whole request, so a rerun asks nothing twice. An endpoint that is busy, fails or is silent is
asked again for a while; then the run ends with one line, and goes on where it stopped. What a service's own filter refuses to read has
no reply.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import orjson
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    wait_exponential_jitter,
)

from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.errors import ConfigError, PharmacistError, ResourceError
from pharmacist_ray.storage import StoragePath, json_of, matching, write_text

PIECE = 32
"""Replies that are written to the cache together (ours): so many are asked again at most, where a process dies."""
LONGEST_WAIT_S = 60.0
"""The longest wait that an endpoint may ask for by Retry-After and get (ours)."""
Reply = str | None
"""What an endpoint replied; None where a filter of the service refused the question."""


class Busy(Exception):
    """The endpoint may answer if it is asked again."""

    def __init__(self, why: str, after: float | None = None) -> None:
        """Say why, and for how many seconds it asked to be left alone."""
        super().__init__(why)
        self.after = after


def request_of(config: EndpointConfig, new: int) -> dict[str, Any]:
    """Return what all requests to an endpoint have besides their messages: greedy, where ``parameters`` say nothing else.

    Args:
        config: The endpoint.
        new: Longest reply in tokens.
    """
    fixed: dict[str, Any] = {"model": config.model, "temperature": 0, "max_tokens": new} | config.parameters
    return {name: value for name, value in fixed.items() if value is not None}


@dataclass
class Cache:
    """Replies by the hash of their request, in files of a folder that several processes add to."""

    folder: StoragePath | None
    known: dict[str, Reply] | None = None

    def through(
        self, requests: Sequence[dict[str, Any]], ask_all: Callable[[Sequence[dict[str, Any]]], Iterator[tuple[int, Reply]]]
    ) -> list[Reply]:
        """Return the reply to each request; those that are not known are asked, each once, and kept, also if some fail.

        Args:
            requests: What is posted.
            ask_all: Asks requests and yields the place and the reply of each, in any order.
        """
        if self.known is None:
            files = matching(self.folder, "*.json") if self.folder is not None and self.folder.exists() else []
            self.known = {key: reply for file in files for key, reply in json_of(file).items()}
        keys = [hashlib.blake2b(orjson.dumps(one, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest() for one in requests]
        missing = {key: one for key, one in zip(keys, requests, strict=True) if key not in self.known}
        new: dict[str, Reply] = {}
        names = list(missing)
        try:
            for place, reply in ask_all(list(missing.values())):
                new[names[place]] = reply
                if len(new) >= PIECE:
                    self._keep(new)
                    new = {}
        finally:
            self._keep(new)
        return [self.known[key] for key in keys]

    def _keep(self, new: dict[str, Reply]) -> None:
        assert self.known is not None
        self.known |= new
        if new and self.folder is not None:
            name = hashlib.blake2b("".join(sorted(new)).encode(), digest_size=12).hexdigest()
            write_text(orjson.dumps(new).decode(), self.folder / f"{name}.json")


class Endpoint:
    """Asks one endpoint, several requests at a time."""

    def __init__(
        self,
        config: EndpointConfig,
        what: str,
        share: int = 1,
        *,
        path: str = "/chat/completions",
        read: Callable[[httpx2.Response], Reply] | None = None,
    ) -> None:
        """Check what can be checked without a request.

        Args:
            config: Where it is and how it is asked.
            what: What it is here, for errors: ``judge 'strict'``.
            share: Processes that ask it at the same time.
            path: What requests are posted to, below its address.
            read: Returns what a response says; by default the first choice of a chat completion, or of a completion.

        Raises:
            ConfigError: There is no address, or it is none; the key is not set.
        """
        if not config.url or not config.model:
            raise ConfigError(f"{what} needs url (up to and with /v1) and model (the endpoint's name for it)")
        if not config.url.startswith(("http://", "https://")) or "?" in config.url:
            raise ConfigError(f"{what}: url must be http(s)://host/…/v1 without a query, got '{config.url}'")
        name = config.key_variable
        if name is not None and not os.environ.get(name):
            raise ConfigError(f"{what}: its key_variable {name} is not set in the environment; export it (on every node)")
        self.config, self.what, self.url = config, what, config.url.rstrip("/") + path
        self.key = os.environ[name] if name else ""
        self.width, self.read = max(1, config.concurrency // share), read or _first_choice

    def ask_all(self, requests: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Reply]]:
        """Yield place and reply of each request, as they come; the first that cannot be had ends the others.

        Raises:
            ConfigError: The endpoint refuses the key, the model or the request.
            ResourceError: It did not answer for ``patience_s``.
        """
        if not requests:
            return
        over = threading.Event()
        with self._client() as client, ThreadPoolExecutor(self.width) as pool:
            places = {pool.submit(self._ask, client, one, over): place for place, one in enumerate(requests)}
            failed: PharmacistError | None = None
            for future in as_completed(places):
                try:
                    reply = future.result()
                except CancelledError:
                    continue
                except PharmacistError as error:
                    failed = failed or error
                    continue
                yield places[future], reply
            if failed:
                raise failed

    @contextmanager
    def _client(self) -> Iterator[httpx2.Client]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with httpx2.Client(headers=headers, timeout=self.config.timeout_s) as client:
            yield client

    def _ask(self, client: httpx2.Client, request: dict[str, Any], over: threading.Event) -> Reply:
        """Return the reply to one request; the first failure sets ``over``, and then nobody begins or waits any longer."""
        if over.is_set():
            raise CancelledError
        try:
            return self._patiently(client, request, over)
        except PharmacistError:
            over.set()
            raise

    def _patiently(self, client: httpx2.Client, request: dict[str, Any], over: threading.Event) -> Reply:
        limit = stop_after_delay(self.config.patience_s)
        asked = Retrying(
            retry=retry_if_exception_type(Busy),
            wait=_wait,
            stop=lambda state: over.is_set() or limit(state),
            sleep=sleep_using_event(over),
            reraise=True,
        )
        try:
            return asked(self._once, client, request)
        except Busy as error:
            raise ResourceError(
                f"{self.what} at {self.config.url} could not be asked for {self.config.patience_s:g} s: {error}; "
                "run the same again when it answers: what it has replied is kept"
            ) from None

    def _once(self, client: httpx2.Client, request: dict[str, Any]) -> Reply:
        try:
            response = client.post(self.url, json=request)
        except httpx2.TransportError as error:
            raise Busy(f"{type(error).__name__} {self._plain(str(error))}".strip()) from None
        status, text = response.status_code, self._plain(response.text)
        if status in (408, 409, 425, 429) or status >= 500:
            raise Busy(f"status {status} {text}".strip(), _after(response.headers.get("Retry-After")))
        if status in (400, 403, 422) and "content_filter" in response.text:
            return None
        if status in (401, 403):
            name = self.config.key_variable
            raise ConfigError(
                f"{self.what} at {self.config.url} refuses {f'the key in {name}' if name else 'a request without a key'} ({status}): {text}"
            )
        if status != 200:
            raise ConfigError(
                f"{self.what} at {self.config.url} refuses model '{self.config.model}' or what it is asked ({status}): {text}"
            )
        try:
            return self.read(response)
        except (ValueError, KeyError, IndexError, TypeError):
            raise Busy(f"no chat completion but {text}") from None

    def _plain(self, text: str) -> str:
        """Return the beginning of a text on one line, without the key."""
        shown = " ".join(text.split())
        return (shown.replace(self.key, "***") if self.key else shown)[:200]


def _first_choice(response: httpx2.Response) -> Reply:
    choice = response.json()["choices"][0]
    content = choice["message"]["content"] if "message" in choice else choice["text"]
    return None if choice.get("finish_reason") == "content_filter" or content is None else str(content)


_backoff = wait_exponential_jitter(multiplier=0.5, max=30)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    after = error.after if isinstance(error, Busy) else None
    return _backoff(state) if after is None else min(after, LONGEST_WAIT_S)


def _after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has a number or a date; None if it has neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp())
