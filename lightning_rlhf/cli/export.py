"""lightning-rlhf export: a checkpoint as an adapter or model directory."""

from pathlib import Path

from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.models.export import export_checkpoint
from lightning_rlhf.models.settings import Dtype


def export(
    checkpoint: Path, output: Path, merge: bool = False, dtype: Dtype = "auto", overwrite: bool = False
) -> None:
    """Write the policy of a checkpoint as a directory that transformers, peft and vLLM load unchanged.

    Args:
        checkpoint: A checkpoint file of a training.
        output: The directory to make; it appears whole or not at all.
        merge: Add a LoRA adapter to its base's weights, instead of writing the adapter alone. From a 4-bit base it
            is merged onto the base in bfloat16.
        dtype: Of merged or full weights; auto keeps the training's, bfloat16 for a quantised base.
        overwrite: Replace the directory where it exists.
    """
    written = export_checkpoint(checkpoint, output, merge=merge, dtype=dtype, overwrite=overwrite)
    print(f"wrote {output}: {written}, with its tokenizer")


def main(arguments: list[str]) -> None:
    """Run :func:`export` with arguments of the command line."""
    run_function(export, arguments, positional="checkpoint")
