"""Prompts to sample from beside text to go on modelling: the two streams of PPO-ptx."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import CombinedLoader

from lightning_rlhf.data.datamodules import SFTDataModule
from lightning_rlhf.data.prompt_datamodule import PromptDataModule

PROMPTS, PRETRAIN = "prompts", "pretrain"


class PretrainingMix(L.LightningDataModule):
    """Each training batch is a batch of prompts and one of text, ``{"prompts": …, "pretrain": …}``.

    An epoch is over when all prompts and all text were seen; the shorter of the two begins anew. Validation, test and
    prediction are the prompts'.

    Args:
        prompts: What is sampled from and scored.
        pretrain: What the policy should not unlearn: text, or demonstrations.
    """

    def __init__(self, prompts: PromptDataModule, pretrain: SFTDataModule) -> None:
        super().__init__()
        self.prompts = prompts
        self.pretrain = pretrain

    def _attach(self) -> None:
        for part in (self.prompts, self.pretrain):
            part.trainer = self.trainer

    def prepare_data(self) -> None:
        """Tokenise both in one process of each machine."""
        self._attach()
        self.prompts.prepare_data()
        if self.trainer is None or self.trainer.state.fn == "fit":
            self.pretrain.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Tokenise what a stage needs."""
        self._attach()
        self.prompts.setup(stage)
        if stage in (None, "fit"):
            self.pretrain.setup("fit")

    def train_dataloader(self) -> CombinedLoader:
        """Both streams; their positions are part of a checkpoint."""
        loaders = {PROMPTS: self.prompts.train_dataloader(), PRETRAIN: self.pretrain.train_dataloader()}
        return CombinedLoader(loaders, mode="max_size_cycle")

    def val_dataloader(self) -> Any:  # noqa: ANN401 - a loader, or an empty list
        """Held-out prompts."""
        return self.prompts.val_dataloader()

    def test_dataloader(self) -> Any:  # noqa: ANN401
        """Test prompts."""
        return self.prompts.test_dataloader()

    def predict_dataloader(self) -> Any:  # noqa: ANN401
        """Prompts to answer."""
        return self.prompts.predict_dataloader()
