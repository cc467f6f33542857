"""Sampling with vLLM in the training process."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.generation.adapter_files import written_adapter
from lightning_rlhf.generation.generators import Generator
from lightning_rlhf.generation.sampling import Completion, Sampling, check_prompts, end_ids
from lightning_rlhf.models import LanguageModel


class VLLMGenerator(Generator):
    """vLLM beside the policy on the same GPU, with a copy of the base and the policy's LoRA adapter.

    The adapter is handed over before every call, so that an update is never missed. vLLM's kernels are not the
    trainer's: completions have the log-probabilities that it sampled with (after temperature, top-p and top-k), for
    :func:`~lightning_rlhf.functional.truncated_importance_weights`. vLLM batches by itself: ``sampling.batch_size`` is
    not used. Needs the extra ``vllm``.

    Args:
        base: Weights that the engine loads, a Hub id or a directory; those of the policy's base by default.
        dtype: Of the engine's weights.
        quantization: How vLLM quantises them, such as ``"bitsandbytes"``.
        gpu_memory_utilization: Share of the GPU's memory for weights and cache of the engine.
        max_model_len: Tokens of prompt + completion at most; the model's own limit by default.
        max_lora_rank: The largest rank of an adapter.
        tensor_parallel_size: GPUs an engine.
        enforce_eager: Without CUDA graphs: a quicker start, slower steps.
        trust_remote_code: Run code that comes with the model.
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        max_lora_rank: int = 64,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.base = base
        self.settings: dict[str, Any] = {
            "dtype": dtype,
            "quantization": quantization,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "max_lora_rank": max_lora_rank,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            "trust_remote_code": trust_remote_code,
        }
        self._engine: Any = None
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
            ImportError: If vLLM is not installed.
            ValueError: If the policy has no adapters.
        """
        seeds = check_prompts(prompts, seeds)
        end = end_ids(model, tokenizer)
        engine = self._start(model)
        from vllm import SamplingParams

        common = sampling_arguments(sampling, end)
        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        how = [SamplingParams(**common, seed=seed) for seed in seeds]
        with written_adapter(model) as folder:
            answers = engine.generate(asked, how, use_tqdm=False, lora_request=self._request(folder))
        for prompt, answer in zip(prompts, answers, strict=True):
            outputs = sorted(answer.outputs, key=lambda output: output.index)
            yield [_completion(list(prompt), output) for output in outputs]

    def _start(self, model: LanguageModel) -> Any:  # noqa: ANN401 - vLLM is optional
        if self._engine is None:
            try:
                from vllm import LLM
            except ImportError as error:
                raise ImportError(
                    "VLLMGenerator needs vLLM: pip install 'lightning-rlhf[vllm]', or sample with HFGenerator"
                ) from error
            self._engine = LLM(
                model=self.base or model.causal_lm.name_or_path,
                enable_lora=True,
                max_loras=1,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                generation_config="vllm",  # not what comes with the model: only what is asked for
                **self.settings,
            )
        return self._engine

    def _request(self, folder: str | None) -> Any:  # noqa: ANN401 - vLLM is optional
        """A number that is new each time: under a known one vLLM would go on with the weights that it has."""
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        return LoRARequest(f"policy-{self._adapters}", self._adapters, folder)


def sampling_arguments(sampling: Sampling, end: Sequence[int]) -> dict[str, Any]:
    """Settings by the names that vLLM has for them, in Python and over HTTP."""
    return {
        "n": sampling.num_samples,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "stop_token_ids": list(end),
        "logprobs": 0,  # of the sampled token alone
    }


def _completion(prompt: list[int], output: Any) -> Completion:  # noqa: ANN401 - vLLM is optional
    tokens = list(output.token_ids)
    logprobs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(prompt, tokens, output.text, output.finish_reason == "length", logprobs)
