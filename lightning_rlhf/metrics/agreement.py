"""Whether annotators say the same."""

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rlhf.functional.annotators import agreement_of_confusion, confusion, kappa_of_confusion
from lightning_rlhf.metrics.aggregation import _Float64States

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AnnotatorAgreement"]


class AnnotatorAgreement(_Float64States):
    """Agreement and Cohen's kappa of every two of m annotators who labelled the same rows.

    Twin of :func:`lightning_rlhf.functional.agreement` and :func:`lightning_rlhf.functional.cohen_kappa`. For two
    annotators kappa is that of ``torchmetrics.CohenKappa`` without weights, in float64.

    Args:
        num_annotators: m, at least 2.
        num_classes: Classes that a label can be, at least 2; they have no order.

    Raises:
        ValueError: If there are fewer than two of either.

    Example:
        >>> metric = AnnotatorAgreement(num_annotators=2, num_classes=2)
        >>> metric.update(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1]]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'agreement': 0.75, 'kappa': 0.5, 'agreement_0_1': 0.75, 'kappa_0_1': 0.5}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    tables: Tensor

    def __init__(self, num_annotators: int, num_classes: int) -> None:
        super().__init__()
        if num_annotators < 2 or num_classes < 2:
            raise ValueError(
                f"agreement needs at least two annotators and two classes, got {num_annotators} and {num_classes}"
            )
        self.num_annotators = num_annotators
        self.num_classes = num_classes
        self.pairs = tuple(combinations(range(num_annotators), 2))
        zeros = torch.zeros(len(self.pairs), num_classes, num_classes, dtype=torch.float64)
        self.add_state("tables", zeros, dist_reduce_fx="sum")

    def update(self, labels: Tensor) -> None:
        """Add rows. Checks the labels' values, so it waits for the device.

        Args:
            labels: Classes from 0, integers, ``(N, num_annotators)``: one column per annotator.

        Raises:
            ValueError: If the shape is another, labels are not integers, or one is not below ``num_classes``.
        """
        if labels.ndim != 2 or labels.shape[1] != self.num_annotators:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: give (N, {self.num_annotators}), a column per annotator"
            )
        columns = labels.unbind(1)
        new = [confusion(columns[a], columns[b], num_classes=self.num_classes) for a, b in self.pairs]
        self.tables = self.tables + torch.stack(new)

    def compute(self) -> dict[str, Tensor]:
        """``agreement`` and ``kappa``, means over the pairs of annotators, then each pair's as ``kappa_0_1``."""
        agreements, kappas = agreement_of_confusion(self.tables), kappa_of_confusion(self.tables)
        values = {"agreement": agreements.mean(), "kappa": kappas.mean()}
        for (a, b), agreed, kappa in zip(self.pairs, agreements, kappas, strict=True):
            values |= {f"agreement_{a}_{b}": agreed, f"kappa_{a}_{b}": kappa}
        return values

    def plot(
        self, values: dict[str, Tensor] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw the table of kappas, annotator against annotator, with the agreement below each.

        Args:
            values: What to draw; by default :meth:`compute`.
            ax: Where to draw it; by default a figure of its own.

        Returns:
            The figure, which is None where ``ax`` was given, and the axes.
        """
        import matplotlib.pyplot as plt

        values = self.compute() if values is None else values
        figure, axes = (None, ax) if ax is not None else plt.subplots()
        table = torch.full((self.num_annotators, self.num_annotators), torch.nan)
        for a, b in self.pairs:
            table[a, b] = table[b, a] = values[f"kappa_{a}_{b}"]
            text = f"κ {values[f'kappa_{a}_{b}']:.2f}\n{values[f'agreement_{a}_{b}']:.0%} agree"
            for x, y in ((a, b), (b, a)):
                axes.text(x, y, text, ha="center", va="center")
        axes.imshow(
            table.numpy(), vmin=-1.0, vmax=1.0, cmap="PiYG", alpha=0.6
        )  # pale, so that the text can be read
        axes.set(xticks=range(self.num_annotators), yticks=range(self.num_annotators))
        axes.set(xlabel="annotator", ylabel="annotator", title=f"mean kappa {values['kappa']:.2f}")
        return figure, axes
