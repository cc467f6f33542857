"""lightning-rlhf sandbox: write the embedded task."""

from pathlib import Path

from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.models.export import written_whole
from lightning_rlhf.sandbox.create import create_sandbox


def sandbox(output: Path = Path("sandbox"), seed: int = 0, overwrite: bool = False) -> None:
    """Write the embedded task: an untrained model with its tokenizer, demonstrations, and pairs compared by annotators.

    Args:
        output: The directory to make; it appears whole or not at all.
        seed: Of the task and of the model's weights.
        overwrite: Replace the directory where it exists.
    """
    with written_whole(output, overwrite=overwrite) as folder:
        create_sandbox(folder, seed=seed)
        names = sorted(path.name for path in folder.iterdir())
    print(f"wrote {output}: {', '.join(names)}")


def main(arguments: list[str]) -> None:
    """Run :func:`sandbox` with arguments of the command line."""
    run_function(sandbox, arguments)
