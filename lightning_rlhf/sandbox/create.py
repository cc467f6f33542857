"""Write a sandbox to a directory: a model, its tokenizer, and data in the formats of every other dataset."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_rlhf.sandbox.annotator import Annotator
from lightning_rlhf.sandbox.gold import FAULT_COST, MALFORMED_COST, TOKEN_BUDGET, TOKEN_COST
from lightning_rlhf.sandbox.world import World
from lightning_rlhf.sandbox.writing import MAX_TOKENS

DESCRIPTION = "sandbox.json"


@dataclass(frozen=True)
class Sandbox:
    """Where the parts of a sandbox lie.

    Attributes:
        directory: What was given to :func:`create_sandbox`.
        model: An untrained model with its tokenizer, for ``from_pretrained``.
        sft_train: Demonstrations (``prompt``, ``completion``).
        sft_val: Demonstrations of held-out questions.
        preferences_train: Annotators' choices (``prompt``, ``chosen``, ``rejected``).
        preferences_val: Choices on held-out questions.
        prompts_val: Held-out questions (``prompt``).
        description: Seed, constants, agreement and best accuracy, as JSON.
    """

    directory: Path
    model: Path
    sft_train: Path
    sft_val: Path
    preferences_train: Path
    preferences_val: Path
    prompts_val: Path
    description: Path

    @classmethod
    def at(cls, directory: str | Path) -> "Sandbox":
        """The paths of a sandbox in a directory, whether it exists or not."""
        root = Path(directory)
        tables = ("sft_train", "sft_val", "preferences_train", "preferences_val", "prompts_val")
        files = {name: root / f"{name}.jsonl" for name in tables}
        return cls(root, root / "model", description=root / DESCRIPTION, **files)


def create_sandbox(
    directory: str | Path,
    *,
    seed: int = 0,
    num_demonstrations: int = 20_000,
    num_pairs: int = 3_400,
    num_val: int = 512,
    num_layers: int = 2,
    overwrite: bool = False,
) -> Sandbox:
    """Write a sandbox: ``model/``, five ``.jsonl`` files and, last, ``sandbox.json``.

    The same arguments write the same rows and weights. Files of other names are left alone.

    Args:
        directory: Where to; made where it does not exist.
        seed: Of the world, its data and the model's weights.
        num_demonstrations: Rows to train SFT on.
        num_pairs: Pairs to train a reward model or DPO on.
        num_val: Rows of each validation file.
        num_layers: Of the model.
        overwrite: Write over what is there.

    Returns:
        The paths of what was written.

    Raises:
        FileExistsError: There is something in the directory, and ``overwrite`` is not set.
    """
    paths = Sandbox.at(directory)
    if not overwrite and paths.directory.exists() and any(paths.directory.iterdir()):
        raise FileExistsError(
            f"{paths.directory} is not empty: choose another directory, or set overwrite to write over it"
        )
    paths.directory.mkdir(parents=True, exist_ok=True)
    paths.description.unlink(missing_ok=True)  # written last: where it is, the sandbox is whole
    world = World(seed)
    annotator = Annotator(world)
    _write_rows(paths.sft_train, world.demonstrations(num_demonstrations))
    _write_rows(paths.sft_val, world.demonstrations(num_val, "val"))
    _write_rows(paths.preferences_train, world.preferences(num_pairs, annotator))
    _write_rows(paths.preferences_val, world.preferences(num_val, annotator, "val"))
    _write_rows(paths.prompts_val, ({"prompt": prompt} for prompt in world.prompts(num_val, "val")))
    _write_model(paths.model, seed, num_layers)
    paths.description.write_text(json.dumps(_describe(world, annotator), indent=2) + "\n")
    return paths


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_model(path: Path, seed: int, num_layers: int) -> None:
    # Here, since Transformers takes seconds to import.
    from lightning_rlhf.sandbox.model import build_policy, build_tokenizer

    tokenizer = build_tokenizer()
    build_policy(tokenizer, seed, num_layers=num_layers).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _describe(world: World, annotator: Annotator) -> dict[str, object]:
    return {
        "seed": world.seed,
        "max_tokens": MAX_TOKENS,
        "gold": {
            "fault_cost": FAULT_COST,
            "malformed_cost": MALFORMED_COST,
            "token_cost": TOKEN_COST,
            "token_budget": TOKEN_BUDGET,
        },
        "annotator": {
            "length_bias": annotator.length_bias,
            "flattery_bias": annotator.flattery_bias,
            "format_bias": annotator.format_bias,
            "temperature": annotator.temperature,
            "agreement": annotator.agreement,
            "best_accuracy": annotator.best_accuracy,
        },
    }
