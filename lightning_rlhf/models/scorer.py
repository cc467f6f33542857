"""A scalar head on a language model: what scores completions, alone or as a role on a base that others share."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rlhf import functional as RF
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.models.language_model import LanguageModel, Places


class Head(nn.Module):
    """One number from a hidden state. Its weights stay float32 whatever the precision of the model.

    Args:
        hidden_size: Of the model.
        std: Standard deviation of the weights at the start; 0 for a head that starts at 0 everywhere.
        bias: Whether it has one.

    Example:
        >>> Head(2, std=0.0, bias=True)(torch.ones(3, 2)).tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, hidden_size: int, *, std: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))
        if std:
            nn.init.normal_(self.weight, std=std)
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """One number each, ``(N,)``, of hidden states ``(N, d)``; in float32 under any autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            # DeepSpeed keeps its float32 weights elsewhere, and puts them here in half precision.
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.weight.float(), bias).squeeze(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> "Head":  # noqa: ANN401 - as in nn.Module
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


class ScoreHead(Head):
    r"""A linear map from a hidden state to a score, $w \cdot h$, without bias: differences are what counts.

    The weights start normal with standard deviation $1/\sqrt{d + 1}$ (Stiennon et al., 2020). The head remembers mean
    and standard deviation of its scores on reference samples, in float64.

    Args:
        hidden_size: d.

    Example:
        >>> head = ScoreHead(2)
        >>> _ = torch.nn.init.ones_(head.weight)
        >>> head(torch.tensor([[1.0, 2.0]]))
        tensor([3.], grad_fn=<SqueezeBackward1>)
        >>> head.mean, head.std = 2.0, 1.0
        >>> head.normalized(torch.tensor([3.0]))
        tensor([1.])
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, std=1 / math.sqrt(hidden_size + 1), bias=False)
        self.mean, self.std = 0.0, 1.0

    def normalized(self, scores: Tensor) -> Tensor:
        """Raw scores in units of the reference samples: mean 0, standard deviation 1 there."""
        return (scores - self.mean) / self.std

    @property
    def is_normalized(self) -> bool:
        """Whether its scale was set on reference samples."""
        return (self.mean, self.std) != (0.0, 1.0)

    def normalize_by(self, mean: float, std: float) -> None:
        """Remember mean and standard deviation of raw scores on reference samples.

        Raises:
            ValueError: If the standard deviation is not positive: there is nothing to divide by.
        """
        if not (std > 0.0 and math.isfinite(std) and math.isfinite(mean)):
            raise ValueError(
                f"scores of the reference samples have mean {mean} and standard deviation {std}: they have no spread "
                "to normalise by"
            )
        self.mean, self.std = mean, std

    def get_extra_state(self) -> dict[str, float]:
        """The normalisation, as plain numbers that no precision plugin casts."""
        return {"mean": self.mean, "std": self.std}

    def set_extra_state(self, state: Mapping[str, float]) -> None:
        """Take the normalisation of a checkpoint.

        A strategy that loads parameters one by one has a placeholder in its place, and hands it over later.
        """
        if isinstance(state, Mapping):
            self.mean, self.std = state["mean"], state["std"]


class Scorer(nn.Module):
    """Scores of completions: a head over the last hidden state at each completion's last token.

    Args:
        model: The language model. Its vocabulary projection is not used.
        head: The scalar head.
        adapter: Score with the adapter of this name, and leave the model's active one as it was: several scorers,
            a policy and a reference then share one base.
        owns: Whether the model is a part of this module; else it is only seen.

    Raises:
        ValueError: If the head is of another width than the model, and so was trained on another base.
    """

    def __init__(
        self, model: LanguageModel, head: ScoreHead, adapter: str | None = None, *, owns: bool = True
    ) -> None:
        super().__init__()
        width = model.config.get_text_config().hidden_size
        if head.weight.shape[1] != width:
            raise ValueError(
                f"the score head has width {head.weight.shape[1]}, the model {width}: it was trained on another base"
            )
        self.head = head
        self.adapter = adapter
        if owns:
            self.model = model
        self._seen = (model,)

    @property
    def language_model(self) -> LanguageModel:
        """The model under the head."""
        return self._seen[0]

    def ends(self, batch: PackedBatch) -> Tensor:
        """The last hidden state at each completion's last token, ``(N, d)``."""
        return self._hidden(batch, "ends")

    def tokens(self, batch: PackedBatch) -> Tensor:
        """The last hidden state at each token of each completion, one completion after the other."""
        return self._hidden(batch, "completions")

    def _hidden(self, batch: PackedBatch, at: Places) -> Tensor:
        model = self.language_model
        with nullcontext() if self.adapter is None else model.role(self.adapter):
            return model.hidden_states(batch, at)

    def raw(self, batch: PackedBatch) -> Tensor:
        """Scores as the head gives them, ``(N,)``."""
        scores: Tensor = self.head(self.ends(batch))
        return scores

    def forward(self, batch: PackedBatch) -> Tensor:
        """Normalised scores, ``(N,)``."""
        return self.head.normalized(self.raw(batch))


@dataclass(frozen=True)
class Aggregation:
    """How the scores of an ensemble's members become one.

    Attributes:
        how: ``mean``, ``worst_case`` (the lowest), or ``uncertainty_weighted`` (mean − coef · variance).
        coef: λ of ``uncertainty_weighted``.
    """

    how: Literal["mean", "worst_case", "uncertainty_weighted"] = "mean"
    coef: float = 0.5

    def __call__(self, scores: Tensor) -> Tensor:
        """One score per completion, ``(N,)``, from those of all members, ``(members, N)``.

        Example:
            >>> Aggregation("worst_case")(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
            tensor([1., 2.])
        """
        aggregated: Tensor = {
            "mean": RF.ensemble_mean,
            "worst_case": RF.ensemble_worst_case,
            "uncertainty_weighted": lambda s: RF.ensemble_uncertainty_weighted(s, coef=self.coef),
        }[self.how](scores)
        return aggregated


class Ensemble(nn.Module):
    """Several scorers of the same completions; one is an ensemble as well.

    Args:
        scorers: The members.
        aggregation: How their normalised scores become one.
    """

    def __init__(self, scorers: Sequence[Scorer], aggregation: Aggregation | None = None) -> None:
        super().__init__()
        self.scorers = nn.ModuleList(scorers)
        self.aggregation = aggregation or Aggregation()

    @property
    def members(self) -> list[Scorer]:
        """The members."""
        return list(self.scorers)  # type: ignore[arg-type]

    @property
    def heads(self) -> list[ScoreHead]:
        """The members' heads."""
        return [scorer.head for scorer in self.members]

    def of_ends(self, ends: Sequence[Tensor]) -> Tensor:
        """Scores as the heads give them, ``(members, N)``, of each member's :meth:`Scorer.ends`."""
        return torch.stack([head(end) for head, end in zip(self.heads, ends, strict=True)])

    def raw(self, batch: PackedBatch) -> Tensor:
        """Scores as the heads give them, ``(members, N)``."""
        return self.of_ends([scorer.ends(batch) for scorer in self.members])

    def normalized(self, raw: Tensor) -> Tensor:
        """Every member's scores in units of its own reference samples, ``(members, N)``."""
        return torch.stack([head.normalized(r) for head, r in zip(self.heads, raw, strict=True)])

    def forward(self, batch: PackedBatch) -> Tensor:
        """One normalised score per completion, ``(N,)``."""
        return self.aggregation(self.normalized(self.raw(batch)))
