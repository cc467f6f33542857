"""Data: sources, formats, tokenisation, packing, and datamodules."""

from lightning_rlhf.data.collate import PackCollator
from lightning_rlhf.data.datamodules import PreferenceDataModule, SFTDataModule, UnpairedDataModule
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.data.report import SplitReport
from lightning_rlhf.data.sampler import GroupBatchSampler
from lightning_rlhf.data.sources import load_rows
from lightning_rlhf.data.tokenized import tokenize_preference, tokenize_sft
from lightning_rlhf.data.unpaired import tokenize_unpaired

__all__ = [
    "GroupBatchSampler",
    "PackCollator",
    "PackedBatch",
    "PreferenceDataModule",
    "PromptGroup",
    "SFTDataModule",
    "SplitReport",
    "UnpairedDataModule",
    "load_rows",
    "pack",
    "tokenize_preference",
    "tokenize_sft",
    "tokenize_unpaired",
]
