"""Whether two annotators say the same, and how much of that is chance."""

import torch
from torch import Tensor

from lightning_rlhf.functional.checks import require_same_shape

__all__ = ["agreement", "agreement_of_confusion", "cohen_kappa", "confusion", "kappa_of_confusion"]


def confusion(labels_a: Tensor, labels_b: Tensor, *, num_classes: int) -> Tensor:
    """How often one annotator said i where the other said j; the tables of two batches add up.

    Args:
        labels_a: Classes that one annotator chose, from 0, ``(N,)``.
        labels_b: Those of the other, for the same rows, ``(N,)``.
        num_classes: How many classes there are.

    Returns:
        Counts, ``(num_classes, num_classes)``, float64; a's classes are the rows.

    Raises:
        ValueError: If shapes differ, labels are not integers, or one is not below ``num_classes``.

    Example:
        >>> confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), num_classes=2)
        tensor([[1., 1.],
                [0., 1.]], dtype=torch.float64)
    """
    require_same_shape("labels_a", labels_a, "labels_b", labels_b)
    for name, labels in (("labels_a", labels_a), ("labels_b", labels_b)):
        _require_classes(name, labels, num_classes)
    pairs = labels_a.reshape(-1).long() * num_classes + labels_b.reshape(-1).long()
    return torch.bincount(pairs, minlength=num_classes**2).double().reshape(num_classes, num_classes)


def agreement_of_confusion(table: Tensor) -> Tensor:
    """Share of the rows on the diagonal.

    Args:
        table: Counts as :func:`confusion` returns them, ``(..., C, C)``.

    Returns:
        The share, ``(...)``; nan for an empty table.

    Example:
        >>> agreement_of_confusion(torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
        tensor(0.7500)
    """
    return table.diagonal(dim1=-2, dim2=-1).sum(-1) / table.sum((-2, -1))


def kappa_of_confusion(table: Tensor) -> Tensor:
    """Cohen's kappa of tables of counts.

    Args:
        table: Counts as :func:`confusion` returns them, ``(..., C, C)``.

    Returns:
        Kappa, ``(...)``; nan for an empty table and where both said the same one class throughout.

    Example:
        >>> kappa_of_confusion(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor(0.5000)
    """
    total = table.sum((-2, -1))
    by_chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
    return (agreement_of_confusion(table) - by_chance) / (1.0 - by_chance)


def agreement(labels_a: Tensor, labels_b: Tensor) -> Tensor:
    """Share of the rows on which two annotators say the same.

    Args:
        labels_a: Classes that one annotator chose, integers from 0, ``(N,)``.
        labels_b: Those of the other, for the same rows, ``(N,)``.

    Returns:
        The share, a scalar, float64; nan without rows.

    Raises:
        ValueError: If shapes differ, or labels are not integers from 0.

    Example:
        >>> agreement(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    return agreement_of_confusion(confusion(labels_a, labels_b, num_classes=_classes(labels_a, labels_b)))


def cohen_kappa(labels_a: Tensor, labels_b: Tensor) -> Tensor:
    r"""Cohen's kappa: agreement beyond what each annotator's habits alone would give.

    $\kappa = (p_o - p_e) / (1 - p_e)$, with $p_o$ the share of rows agreed on and
    $p_e = \sum_c p_a(c)\, p_b(c)$ what independent annotators of these habits would agree on: Cohen (1960), "A
    Coefficient of Agreement for Nominal Scales". 1 is full agreement, 0 is chance.

    Args:
        labels_a: Classes that one annotator chose, integers from 0, ``(N,)``. They have no order: a tie in a
            comparison is a class like the others.
        labels_b: Those of the other, for the same rows, ``(N,)``.

    Returns:
        Kappa, a scalar in [-1, 1], float64; nan where both chose the same one class throughout.

    Raises:
        ValueError: If shapes differ, or labels are not integers from 0.

    Example:
        They agree on three of four, by chance they would on two: (3/4 − 1/2) / (1 − 1/2).

        >>> cohen_kappa(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
        tensor(0.5000, dtype=torch.float64)
    """
    return kappa_of_confusion(confusion(labels_a, labels_b, num_classes=_classes(labels_a, labels_b)))


def _classes(labels_a: Tensor, labels_b: Tensor) -> int:
    """The fewest classes that hold all labels: unused ones change neither agreement nor kappa."""
    return max((int(labels.max()) + 1 for labels in (labels_a, labels_b) if labels.numel()), default=1)


def _require_classes(name: str, labels: Tensor, num_classes: int) -> None:
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} must be integers, one class per row, got {labels.dtype}: convert with .long()"
        )
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.reshape(-1).nonzero()[0])
        raise ValueError(
            f"{name} is {labels.reshape(-1)[row].item()} in row {row}, but classes go from 0 to {num_classes - 1}: "
            "leave out rows that an annotator did not label"
        )
