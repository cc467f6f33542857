"""How the next token is chosen, and when a completion has ended: handed to Transformers' ``generate``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria


def uniform_numbers(seeds: Sequence[int], num_samples: int, length: int) -> Tensor:
    """Numbers in [0, 1) that belong to a prompt, whatever stands beside it in a batch.

    Args:
        seeds: One per prompt.
        num_samples: Samples a prompt.
        length: Numbers a sample, one for each token.

    Returns:
        ``(prompts · num_samples, length)``, float64.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(num_samples, length, dtype=torch.float64, generator=generator))
    return torch.cat(rows)


class SeededChoice(LogitsProcessor):
    """Sample by inverting the cumulative distribution at given numbers, instead of drawing for the whole batch.

    Greedy search over what it returns takes the token sampled. Put it behind everything that changes the logits.

    Args:
        numbers: In [0, 1), ``(rows, max_new_tokens)``.
        prompt_length: Columns before the first new token.
    """

    def __init__(self, numbers: Tensor, prompt_length: int) -> None:
        self.numbers, self.prompt_length = numbers, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with all but the sampled token at −infinity."""
        cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length, None]
        # Strictly below the total, and right of equal sums: a token of probability 0 is never taken.
        aim = (number * cumulative[:, -1:]).clamp(
            max=torch.nextafter(cumulative[:, -1:], -cumulative[:, -1:])
        )
        chosen = torch.searchsorted(cumulative, aim, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class StopStrings(StoppingCriteria):
    """End a completion at the token that completes one of some strings. Prompts are not looked at.

    Args:
        stop: The strings.
        tokenizer: Decodes.
        prompt_length: Columns before the first new token.

    Attributes:
        lengths: Tokens of each completion that has ended so, by row.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop, self.tokenizer, self.prompt_length = stop, tokenizer, prompt_length
        # A token has a byte or more, so that a string ends within as many; a character may have begun before.
        self.tail = max(len(each.encode()) for each in stop) + 4
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Which rows have ended."""
        length = input_ids.shape[1]
        tails = input_ids[:, max(self.prompt_length, length - self.tail) :].tolist()
        for row, ids in enumerate(tails):
            if row not in self.lengths:
                text = str(self.tokenizer.decode(ids))
                if any(each in text for each in self.stop):
                    self.lengths[row] = length - self.prompt_length
        return torch.tensor([row in self.lengths for row in range(len(tails))], device=input_ids.device)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some strings.

    Example:
        >>> before_stop("4. Next: 5", (" Next", "."))
        '4'
    """
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]
