"""Sampling with a vLLM server."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.generation.adapter_files import written_adapter
from lightning_rlhf.generation.generators import Generator
from lightning_rlhf.generation.sampling import Completion, Sampling, check_prompts, end_ids
from lightning_rlhf.generation.vllm_engine import sampling_arguments
from lightning_rlhf.models import LanguageModel


class VLLMServerGenerator(Generator):
    """A vLLM server that has the policy's base, and reads the policy's LoRA adapter from a directory it shares.

    Start it with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 64
    --logprobs-mode processed_logprobs --generation-config vllm``, for the trainer alone: it loads adapters from any
    path. The adapter is handed over before every call. Completions have the log-probabilities that it sampled with, as
    those of :class:`VLLMGenerator`.

    Args:
        url: Of the server, without ``/v1``.
        base: The name that the server gives the base.
        shared_dir: A directory that both can read under the same path; the system's temporary one by default.
        timeout: Seconds that a request may take.
        concurrency: Requests, each of one prompt, at a time.
    """

    def __init__(
        self,
        url: str,
        base: str,
        *,
        shared_dir: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 64,
    ) -> None:
        self.url, self.base, self.shared_dir = url.rstrip("/"), base, shared_dir
        self.timeout, self.concurrency = timeout, concurrency
        self._adapters = 0

    def generate(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Completion]]:
        """Hand over the adapter, sample, and read the answers.

        Raises:
            ConnectionError: If the server cannot be reached or refuses.
            ValueError: If the policy has no adapters.
        """
        seeds = check_prompts(prompts, seeds)
        common = sampling_arguments(sampling, end_ids(model, tokenizer)) | {"return_token_ids": True}
        with written_adapter(model, self.shared_dir) as folder:
            name = self.base if folder is None else self._load(folder)
            bodies = [
                common | {"model": name, "prompt": list(prompt), "seed": seed}
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            try:
                with ThreadPoolExecutor(self.concurrency) as pool:
                    answers = list(pool.map(lambda body: self._post("/v1/completions", body), bodies))
            finally:
                if folder is not None:
                    self._post("/v1/unload_lora_adapter", {"lora_name": name})
        for prompt, answer in zip(prompts, answers, strict=True):
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            yield [_completion(list(prompt), choice) for choice in choices]

    def _load(self, folder: str) -> str:
        self._adapters += 1
        name = f"policy-{self._adapters}"
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        return name

    def _post(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise ConnectionError(
                f"the vLLM server answered {error.code} to {self.url}{path}: {detail}"
            ) from error
        except OSError as error:
            raise ConnectionError(
                f"no vLLM server at {self.url} ({error}): start it, or correct url"
            ) from error
        return json.loads(text) if text.startswith("{") else None  # adapters are answered in plain text


def _completion(prompt: list[int], choice: dict[str, Any]) -> Completion:
    return Completion(
        prompt,
        list(choice["token_ids"]),
        choice["text"],
        choice["finish_reason"] == "length",
        list(choice["logprobs"]["token_logprobs"]),
    )
