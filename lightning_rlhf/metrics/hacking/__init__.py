"""Detectors of reward hacking: each with its definition, its source and its control.

A detector compares the policy's samples with a control, mostly the starting policy's samples of the same prompts
(``reference=True``), and gives the change with a 95% interval. That the interval excludes 0 says that something
changed, not that it is bad: read samples.
"""

from lightning_rlhf.metrics.hacking.change import MeanChange, ShareChange
from lightning_rlhf.metrics.hacking.detectors import (
    Certainty,
    Diversity,
    EnsembleDisagreement,
    FormatShares,
    RefusalRate,
)
from lightning_rlhf.metrics.hacking.length import LengthDrift
from lightning_rlhf.metrics.hacking.paired import ConfidentNonsense, SycophancyFlipRate
from lightning_rlhf.metrics.hacking.questions import (
    FACTS,
    AnswerPair,
    OpinionPrompts,
    Question,
    answered,
    arithmetic_questions,
    nonsense_answers,
    opinion_prompts,
)
from lightning_rlhf.metrics.hacking.text import (
    distinct_n,
    format_features,
    is_certain,
    is_hedged,
    is_refusal,
    repetition,
    self_bleu,
)

__all__ = [
    "AnswerPair",
    "Certainty",
    "ConfidentNonsense",
    "Diversity",
    "EnsembleDisagreement",
    "FACTS",
    "FormatShares",
    "LengthDrift",
    "MeanChange",
    "OpinionPrompts",
    "Question",
    "RefusalRate",
    "ShareChange",
    "SycophancyFlipRate",
    "answered",
    "arithmetic_questions",
    "distinct_n",
    "format_features",
    "is_certain",
    "is_hedged",
    "is_refusal",
    "nonsense_answers",
    "opinion_prompts",
    "repetition",
    "self_bleu",
]
