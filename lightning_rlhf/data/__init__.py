"""Data: sources, formats, tokenisation, packing, and datamodules."""

from lightning_rlhf.data.collate import PackCollator
from lightning_rlhf.data.datamodules import PreferenceDataModule, SFTDataModule, UnpairedDataModule
from lightning_rlhf.data.mix import PretrainingMix
from lightning_rlhf.data.packing import PackedBatch, PromptGroup, pack
from lightning_rlhf.data.prompt_batch import PromptBatch, PromptCollator
from lightning_rlhf.data.prompt_datamodule import PromptDataModule
from lightning_rlhf.data.prompt_only import tokenize_prompts
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
    "PretrainingMix",
    "PromptBatch",
    "PromptCollator",
    "PromptDataModule",
    "PromptGroup",
    "SFTDataModule",
    "SplitReport",
    "UnpairedDataModule",
    "load_rows",
    "pack",
    "tokenize_preference",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenize_unpaired",
]
