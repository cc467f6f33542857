"""Preference objectives: each names a loss of :mod:`lightning_rlhf.functional` and holds its hyperparameters."""

from lightning_rlhf.objectives.base import Margin, Objective, WithReference
from lightning_rlhf.objectives.margin import (
    EXO,
    IPO,
    DiscoPOP,
    Hinge,
    LengthNormalizedSigmoid,
    Robust,
    Sigmoid,
)
from lightning_rlhf.objectives.pairs import Completions, Pairs
from lightning_rlhf.objectives.pointwise import AOT, BCO, NCA, SPPO, AOTUnpaired, APODown, APOZero
from lightning_rlhf.objectives.reference_free import CPO, ORPO, SFTTerm, SimPO
from lightning_rlhf.objectives.weighted import Weighted

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "EXO",
    "IPO",
    "NCA",
    "ORPO",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "Completions",
    "DiscoPOP",
    "Hinge",
    "LengthNormalizedSigmoid",
    "Margin",
    "Objective",
    "Pairs",
    "Robust",
    "SFTTerm",
    "Sigmoid",
    "SimPO",
    "Weighted",
    "WithReference",
]
