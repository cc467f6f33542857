"""What samples completions for an algorithm: the policy itself, or an engine that has its weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.generation.sampling import Completion, Sampling, generate
from lightning_rlhf.models import LanguageModel


class Generator(ABC):
    """Samples completions of prompts from a policy, as it is and in the role that it has while they are asked for."""

    @abstractmethod
    def generate(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Completion]]:
        """Sample completions, prompt after prompt.

        Args:
            model: The policy, in the role that is to sample until the last completion is taken; left as it was.
            tokenizer: Of the policy.
            prompts: Token ids; any lengths, at least one token each.
            sampling: How completions are drawn.
            seeds: One per prompt; by default drawn from torch's global random state, once for all prompts.

        Yields:
            The completions of one prompt after the other.
        """


class HFGenerator(Generator):
    """Transformers' ``generate`` on the policy itself: see :func:`~lightning_rlhf.generation.generate`."""

    def generate(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Completion]]:
        """Sample with the policy."""
        return generate(model, tokenizer, prompts, sampling, seeds=seeds)
