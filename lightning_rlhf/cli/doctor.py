"""lightning-rlhf doctor: show, before a long run, what will happen."""

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_rlhf.algorithms import DPO
from lightning_rlhf.algorithms.base import Algorithm
from lightning_rlhf.algorithms.online import Online
from lightning_rlhf.cli.doctor_rollout import SHOWN, prompt_tables, prompt_tokens, rollout_facts
from lightning_rlhf.cli.doctor_tables import data_tables, facts_table, plain_table, roles_table
from lightning_rlhf.cli.tokens import first_example, render
from lightning_rlhf.cli.training import RLHFCLI
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.data.packing import PackedBatch
from lightning_rlhf.objectives import Sigmoid

LEGEND = "[ ] and green: learned from; dim: prompt; yellow: not learned from; magenta: special token; | between tokens"

NOTES = {"objective/kl": " nats a completion: KL at step 0, 0 unless another reference was given"}


class DoctorCLI(RLHFCLI):
    """The configuration of a training, built for one optimizer step that leaves nothing behind."""

    def __init__(self, arguments: list[str]) -> None:
        self.examination = Examination()
        super().__init__(arguments, run=False)

    def before_instantiate_classes(self) -> None:
        """Compute the reference of one batch instead of that of all data."""
        settings = self.config.model.get("init_args", {})
        self.examination.precomputes = bool(settings.get("precompute_reference", False))
        if self.examination.precomputes:
            settings["precompute_reference"] = False

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401 - Trainer's own arguments
        """The configured Trainer, cut down to one step."""
        self.save_config_callback = None
        one_step = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
            "max_steps": 1,
            "max_time": None,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "callbacks": [self.examination],
        }
        return super().instantiate_trainer(**{**one_step, **kwargs})


class Examination(Callback):
    """Look at the first batch and the untrained policy, then let one optimizer step run.

    Attributes:
        precomputes: Whether the training would compute the reference once; here it does not.
        parts: What was seen, to be printed.
    """

    def __init__(self) -> None:
        self.precomputes = False
        self.parts: list[Any] = []
        self._start = 0.0
        self._steps: list[float] = []

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: PackedBatch | PromptBatch,
        batch_idx: int,
    ) -> None:
        """Examine everything once, before anything is trained."""
        assert isinstance(pl_module, Algorithm)
        if not self.parts:
            tokens, tables, facts = self._look(trainer, pl_module, batch)
            title = f"row {batch.row_ids[0]} as the model sees it"
            panel = Panel(Group(tokens, "", LEGEND), title=title, title_align="left")
            self.parts = [panel, *tables, roles_table(pl_module), facts]
        self._start = time.perf_counter()

    def _look(
        self, trainer: L.Trainer, module: Algorithm, batch: PackedBatch | PromptBatch
    ) -> tuple[Text, list[Table], Table]:
        if isinstance(batch, PromptBatch):
            assert isinstance(module, Online)
            facts = rollout_facts(trainer, module, batch)
            return prompt_tokens(batch, module), prompt_tables(trainer, batch), facts
        facts = facts_table(trainer, module, batch, precomputes=self.precomputes)
        return render(first_example(batch), module.tokenizer), data_tables(trainer, batch), facts

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: PackedBatch | PromptBatch,
        batch_idx: int,
    ) -> None:
        """Note how long a micro-batch took."""
        self._steps.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what the step cost."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        samples = isinstance(pl_module, Online)
        table = plain_table(f"one {'rollout' if samples else 'optimizer step'} (thrown away)")
        for name in SHOWN if samples else ("loss", "mean_token_accuracy", "entropy", "rewards/margins"):
            if f"train/{name}" in values:
                table.add_row(name, f"{values[f'train/{name}']:.4f}{NOTES.get(name, '')}")
        if isinstance(pl_module, DPO) and isinstance(pl_module.objective, Sigmoid):
            table.add_row("", f"the sigmoid loss of an untrained policy is ln 2 = {math.log(2):.4f}")
        what = "rollout" if samples else "micro-batch"
        table.add_row(f"seconds a {what}", f"{min(self._steps):.2f} ({len(self._steps)} ran)")
        if torch.cuda.is_available():
            table.add_row("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        self.parts.append(table)


def main(arguments: list[str]) -> None:
    """Build what ``fit`` would build, run one step, and print what was seen."""
    cli = DoctorCLI(arguments)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    console = Console()
    for part in cli.examination.parts:
        console.print(part)
    console.print("Nothing was saved. `lightning-rlhf fit` with the same arguments trains.")
