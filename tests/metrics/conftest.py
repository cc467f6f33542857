"""Every metric over pairs or annotators with a batch for it, for the tests that hold for all of them."""

import torch

from lightning_rlhf.metrics import (
    AnnotatorAgreement,
    CalibrationError,
    LengthCorrelation,
    LongerWins,
    Margins,
    PairwiseAccuracy,
)

NAMES = (
    "PairwiseAccuracy",
    "CalibrationError",
    "Margins",
    "LengthCorrelation",
    "LongerWins",
    "AnnotatorAgreement",
)


def make(name):
    """A metric by its class's name."""
    return {
        "PairwiseAccuracy": PairwiseAccuracy,
        "CalibrationError": CalibrationError,
        "Margins": Margins,
        "LengthCorrelation": LengthCorrelation,
        "LongerWins": LongerWins,
        "AnnotatorAgreement": lambda: AnnotatorAgreement(num_annotators=3, num_classes=3),
    }[name]()


def batch(name, rows=101, seed=0):
    """What the metric's update takes: reproducible, with ties, length bias and annotators who mostly agree."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, rows, generator=generator) + torch.tensor([[0.5], [0.0]])
    rejected = torch.where(torch.arange(rows) % 10 == 0, chosen, rejected)
    lengths, others = torch.randint(1, 9, (2, rows), generator=generator)
    truth = torch.randint(0, 3, (rows, 1), generator=generator)
    noise = torch.randint(0, 3, (rows, 3), generator=generator)
    labels = torch.where(torch.rand(rows, 3, generator=generator) < 0.7, truth, noise)
    if name == "AnnotatorAgreement":
        return (labels,)
    if name == "LongerWins":
        return lengths, others
    if name == "LengthCorrelation":
        return chosen + 0.2 * lengths, lengths
    return chosen, rejected


def numbers(result):
    """The values of a metric as plain floats by name."""
    values = result if isinstance(result, dict) else {"value": result}
    return {key: value.item() for key, value in values.items()}


def goodhart_rows(size=48, seed=0):
    """Evaluations of a run whose gold rises and then falls: step, KL, proxy and gold of the samples of each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(12):
        d = 0.3 * index
        noise = torch.randn(3, size, generator=generator, dtype=torch.float64)
        kl = d**2 + 0.1 * d * noise[2]
        rows.append(
            (10 * index, kl, 3 + d + noise[0], -1 + d * (1.2 - 0.6 * d) + 0.6 * noise[0] + 0.8 * noise[1])
        )
    return rows
