"""A served reward model: JSON over HTTP, with time limits, retries and one clear error after the last."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lightning_rlhf.rewards.base import Reward
from lightning_rlhf.rewards.samples import Samples

WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that may be another one the next time."""


class EndpointError(RuntimeError):
    """A reward endpoint did not give rewards; the message names its address, the attempts and the last error."""


class EndpointReward(Reward):
    """Rewards from a server that answers JSON over HTTP.

    It is sent ``POST url`` with the body ``{"prompts": […], "completions": […], "columns": {name: […]}}``, lists of
    one length, at most ``batch_size``: prompts are texts or lists of messages, completions are texts. It answers with
    status 200 and ``{"scores": […]}``, one finite number per completion in the same order.

    A connection that is refused, breaks or takes too long, an answer that is no JSON (cut short) and the statuses 408,
    425, 429, 500, 502, 503 and 504 are tried again after 1, 2, 4, … times ``backoff`` seconds. Every other status and
    an answer of another form are errors at once: they would not change. Batches that were answered are not sent again.

    Args:
        url: ``http://…`` or ``https://…``.
        batch_size: Completions a request.
        timeout: Seconds that a connection may be silent.
        max_attempts: How often a batch is sent before it is an error.
        backoff: Seconds before the second attempt.
        max_backoff: Seconds between attempts at most.
        num_connections: Requests at a time.
        columns: Which columns of the data are sent; all by default.
        token_env: The environment variable that holds a bearer token, for the ``Authorization`` header.
        name: What its values are logged under.

    Raises:
        ValueError: If a setting is out of range, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        timeout: float = 60.0,
        max_attempts: int = 6,
        backoff: float = 1.0,
        max_backoff: float = 60.0,
        num_connections: int = 4,
        columns: list[str] | None = None,
        token_env: str | None = None,
        name: str = "endpoint",
    ) -> None:
        super().__init__(name)
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url {url!r} must begin with http:// or https://")
        for setting, value in {
            "batch_size": batch_size,
            "max_attempts": max_attempts,
            "num_connections": num_connections,
        }.items():
            if value < 1:
                raise ValueError(f"{setting} must be at least 1, got {value}")
        if timeout <= 0 or backoff < 0 or max_backoff < 0:
            raise ValueError("timeout must be positive, and backoff and max_backoff at least 0")
        if token_env is not None and token_env not in os.environ:
            raise ValueError(f"token_env names {token_env!r}, and there is no such environment variable")
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.max_attempts, self.backoff, self.max_backoff = max_attempts, backoff, max_backoff
        self.num_connections, self.columns, self.token_env = num_connections, columns, token_env

    def start(self, samples: Samples) -> Callable[[], Tensor]:
        """Send the first requests; the result is waited for later."""
        bodies = [self._body(samples.select(chunk)) for chunk in _chunks(len(samples), self.batch_size)]
        pool = futures.ThreadPoolExecutor(self.num_connections, thread_name_prefix="reward-endpoint")
        stop = threading.Event()
        answers = [pool.submit(self._scores, *body, stop) for body in bodies]
        pool.shutdown(wait=False)

        def wait() -> Tensor:
            try:
                done, _ = futures.wait(answers, return_when=futures.FIRST_EXCEPTION)
                for answer in done:
                    answer.result()  # raises what it raised
                return torch.tensor(list(chain.from_iterable(answer.result() for answer in answers)))
            finally:
                stop.set()  # after an error of one batch the others are neither sent nor tried again
                for answer in answers:
                    answer.cancel()

        return wait

    def forward(self, samples: Samples) -> Tensor:
        """The server's rewards, ``(N,)``."""
        return self.start(samples)()

    def _body(self, samples: Samples) -> tuple[bytes, int]:
        names = list(samples.columns) if self.columns is None else self.columns
        absent = [name for name in names if name not in samples.columns]
        if absent:
            raise ValueError(
                f"the data has no column {absent[0]!r}; it has {', '.join(samples.columns) or 'none'}"
            )
        body = {
            "prompts": list(samples.prompts),
            "completions": list(samples.completions),
            "columns": {name: list(samples.columns[name]) for name in names},
        }
        try:
            return json.dumps(body).encode(), len(samples)
        except TypeError as error:
            raise ValueError(
                f"the data's columns cannot be sent as JSON ({error}): list those to send in columns"
            ) from error

    def _scores(self, body: bytes, count: int, stop: threading.Event) -> list[float]:
        """The rewards of one batch, after as many attempts as it takes or may take."""
        began = time.monotonic()
        last = ""
        waits = delays(self.backoff, self.max_backoff)
        for attempt in range(1, self.max_attempts + 1):
            if stop.is_set():
                return []  # the error of another batch is what is told
            try:
                return read_scores(self._post(body), count, self.url)
            except urllib.error.HTTPError as error:
                last = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
                if error.code not in WORTH_A_RETRY:
                    stop.set()
                    raise EndpointError(
                        f"the reward endpoint {self.url} refused the request: {last}"
                    ) from error
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                last = f"{type(error).__name__}: {error}"
            if attempt < self.max_attempts and stop.wait(next(waits)):
                break
        stop.set()
        raise EndpointError(
            f"the reward endpoint {self.url} failed {attempt} times in {time.monotonic() - began:.1f} s; "
            f"the last error is {last}. Is it running? timeout, max_attempts and backoff say how long it is waited for"
        )

    def _post(self, body: bytes) -> Any:  # noqa: ANN401 - any JSON
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return json.loads(answer.read().decode())


def delays(backoff: float, longest: float) -> Iterator[float]:
    """Seconds to wait after the first attempt, the second, …: doubled each time.

    Example:
        >>> waits = delays(1.0, 3.0)
        >>> [next(waits) for _ in range(4)]
        [1.0, 2.0, 3.0, 3.0]
    """
    wait = min(backoff, longest)
    while True:
        yield wait
        wait = min(2 * wait, longest)


def read_scores(answer: Any, count: int, url: str) -> list[float]:  # noqa: ANN401 - any JSON
    """The rewards in a server's answer.

    Args:
        answer: What it answered, parsed.
        count: How many there must be.
        url: Its address, for messages.

    Returns:
        One number per completion.

    Raises:
        EndpointError: If the answer is of another form.

    Example:
        >>> read_scores({"scores": [0.5, -1]}, 2, "http://localhost")
        [0.5, -1.0]
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise EndpointError(
            f'the reward endpoint {url} answered {json.dumps(answer)[:80]}, and must answer {{"scores": […]}}'
        )
    if len(scores) != count:
        raise EndpointError(
            f"the reward endpoint {url} answered {len(scores)} scores for {count} completions"
        )
    wrong = [s for s in scores if not isinstance(s, int | float) or isinstance(s, bool)]
    if wrong:
        raise EndpointError(
            f"the reward endpoint {url} answered the score {json.dumps(wrong[0])}, which is no number"
        )
    return [float(s) for s in scores]


def _chunks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
