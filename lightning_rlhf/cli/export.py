"""lightning-rlhf export: a checkpoint as an adapter or model directory."""

from pathlib import Path

from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.reward_export import export_reward_model, is_reward_model
from lightning_rlhf.models.settings import Dtype


def export(
    checkpoint: Path,
    output: Path,
    merge: bool = False,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    member: int | None = None,
    average: bool = False,
) -> None:
    """Write the model of a checkpoint as a directory that transformers, peft and vLLM load unchanged.

    A reward model becomes one for AutoModelForSequenceClassification; an ensemble, one directory a member.

    Args:
        checkpoint: A checkpoint of a training: a file, or the directory that FSDP2 made with
            save_distributed_checkpoint.
        output: The directory to make; it appears whole or not at all.
        merge: Add a LoRA adapter to its base's weights, instead of writing the adapter alone. From a 4-bit base it
            is merged onto the base in bfloat16.
        dtype: Of merged or full weights; auto keeps the training's, bfloat16 for a quantised base.
        overwrite: Replace the directory where it exists.
        member: Of an ensemble of reward models, write this one only; the first is 0.
        average: Of an ensemble of reward models, write one with the mean of their weights (WARM).
    """
    if is_reward_model(checkpoint):
        written = export_reward_model(
            checkpoint,
            output,
            merge=merge,
            dtype=dtype,
            overwrite=overwrite,
            member=member,
            average=average,
        )
        print(f"wrote {output}: {written}, with its tokenizer")
        return
    if member is not None or average:
        raise ValueError(
            f"{checkpoint} is no reward model's: --member and --average are for ensembles of them"
        )
    written = export_checkpoint(checkpoint, output, merge=merge, dtype=dtype, overwrite=overwrite)
    print(f"wrote {output}: {written}, with its tokenizer")


def main(arguments: list[str]) -> None:
    """Run :func:`export` with arguments of the command line."""
    run_function(export, arguments, positional="checkpoint")
