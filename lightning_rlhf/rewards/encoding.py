"""Samples as prompt groups of the model that scores them: the sampled ids, or its own tokens of the text."""

import json
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Example
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.data.prompts import Messages
from lightning_rlhf.data.tokenization import Encoder, Limits
from lightning_rlhf.rewards.samples import Samples, shown


class SampleEncoder:
    """Lays samples out for a model that was trained on text of this tokenizer.

    A finished completion is closed as in training: by EOS, or by the chat template. One that was cut off is left open.

    Args:
        tokenizer: The model's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, Limits(None))
        self.as_sampled = False
        self._closing: list[int] | None = None

    def follow(self, sampling: PreTrainedTokenizerBase) -> None:
        """Take sampled ids as they are from now on, where they are of the same tokenizer; else text."""
        self.as_sampled = same_tokenizer(self.tokenizer, sampling)

    def batches(self, samples: Samples, batch_size: int) -> Iterator[tuple[list[int], PackedBatch]]:
        """Samples in batches, those of one prompt together.

        Args:
            samples: Any number.
            batch_size: Completions at a time.

        Yields:
            Where the completions of a batch stand among the samples, and the batch.

        Raises:
            BadRow: If the chat template refuses a prompt.
            ValueError: If there is nothing to score in a sample.
        """
        keys = [self._key(samples, i) for i in range(len(samples))]
        first: dict[Any, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        order = sorted(range(len(samples)), key=lambda i: first[keys[i]])
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            by_prompt: dict[Any, list[int]] = {}
            for place in chunk:
                by_prompt.setdefault(keys[place], []).append(place)
            groups = [group for places in by_prompt.values() for group in self._groups(samples, places)]
            yield chunk, pack(groups)

    def _key(self, samples: Samples, place: int) -> Any:  # noqa: ANN401 - something hashable
        if self.as_sampled:
            return tuple(samples.prompt_ids[place])
        prompt = samples.prompts[place]
        extra = {name: samples.columns[name][place] for name in _TEMPLATE_COLUMNS if name in samples.columns}
        return json.dumps([prompt, extra], sort_keys=True, default=str)

    def _groups(self, samples: Samples, places: Sequence[int]) -> list[PromptGroup]:
        """One group, or several where completions do not share a token with their prompt."""
        if self.as_sampled:
            completions = [self._closed_as_trained(samples, place) for place in places]
            return [PromptGroup(samples.prompt_ids[places[0]], completions, row_id=places[0])]
        prompt = self._prompt(samples, places[0])
        wholes = [self._whole(samples, place) for place in places]
        border = min(len(commonprefix([prompt, *wholes])), *(len(whole) - 1 for whole in wholes))
        if border >= 1:
            return [PromptGroup(wholes[0][:border], [whole[border:] for whole in wholes], row_id=places[0])]
        for place, whole in zip(places, wholes, strict=True):
            if len(whole) < 2:
                raise ValueError(
                    f"sample {place} has nothing to score: its prompt {shown(samples.prompts[place])} and its "
                    f"completion {shown(samples.completions[place])} have {len(whole)} tokens in all"
                )
        return [PromptGroup(w[:1], [w[1:]], row_id=place) for place, w in zip(places, wholes, strict=True)]

    def _example(self, samples: Samples, place: int) -> Example:
        given = {name: samples.columns[name][place] for name in _TEMPLATE_COLUMNS if name in samples.columns}
        return Example(
            samples.prompts[place],
            (),
            tools=given.get("tools"),
            template_kwargs=given.get("chat_template_kwargs") or {},
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prompt(self, samples: Samples, place: int) -> list[int]:
        prompt = samples.prompts[place]
        if isinstance(prompt, str):
            return [*self.encoder.prefix, *self._ids(prompt)]
        return self._ids(self.encoder.template.render(prompt, self._example(samples, place), opening=True))

    def _whole(self, samples: Samples, place: int) -> list[int]:
        prompt, completion = samples.prompts[place], samples.completions[place]
        # An empty completion cannot be left open: there would be nothing to score.
        is_open = bool(samples.truncated[place] and completion)
        if isinstance(prompt, str):
            ids, end = [*self.encoder.prefix, *self._ids(prompt + completion)], self.tokenizer.eos_token_id
            return ids if is_open or end is None or ids[-1:] == [end] else [*ids, end]
        messages = [*prompt, {"role": "assistant", "content": completion}]
        return self._ids(
            self.encoder.template.render(messages, self._example(samples, place), opening=is_open)
        )

    def _closed_as_trained(self, samples: Samples, place: int) -> list[int]:
        r"""Sampled ids, and of a conversation what the chat template writes after the end-of-sequence token.

        A score is read at the last token: where the template ends answers with ``<|im_end|>\n``, a reward model was
        trained to be read at the line's end, which no policy samples.
        """
        ids = list(samples.completion_ids[place])
        if samples.truncated[place] and ids:
            return ids
        if isinstance(samples.prompts[place], str):
            return ids or [self.tokenizer.eos_token_id]
        closing = self._template_closing()
        sampled = next((n for n in range(len(closing), 0, -1) if ids[-n:] == closing[:n]), 0)
        return [*ids, *closing[sampled:]] if sampled or not ids else ids

    def _template_closing(self) -> list[int]:
        if self._closing is None:
            turns: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            example = Example(turns, ())
            whole = self._ids(self.encoder.template.render(turns, example))
            opened = self._ids(self.encoder.template.render(turns, example, opening=True))
            self._closing = whole[len(commonprefix([whole, opened])) :]
        return self._closing


_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ids of one mean the same text to the other, and both write conversations the same.

    Args:
        one: A tokenizer.
        other: Another one.

    Returns:
        True where vocabulary, end-of-sequence token, special tokens around a text and chat template are equal.
    """
    if one is other:
        return True
    probe = "A b, c.\n"
    return (
        one.eos_token_id == other.eos_token_id
        and one.chat_template == other.chat_template
        and one(probe)["input_ids"] == other(probe)["input_ids"]
        and one.get_vocab() == other.get_vocab()
    )
