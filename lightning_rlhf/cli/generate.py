"""lightning-rlhf generate: completions of prompts, as JSON lines."""

import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import track

from lightning_rlhf.cli.plain import run_function
from lightning_rlhf.data.prompts import prompt_ids
from lightning_rlhf.generation import Sampling
from lightning_rlhf.generation import generate as sample
from lightning_rlhf.models import LanguageModel, Policy, load_language_model, load_tokenizer
from lightning_rlhf.models.export import export_checkpoint, refuse_existing


def generate(
    model: str,
    output: Path | None = None,
    prompts: Path | None = None,
    prompt: str | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Sample completions of prompts.

    Args:
        model: A Hub id, a model or adapter directory, or a checkpoint of a training.
        output: A JSON lines file to write: prompt, completion, truncated. Without it, completions are printed.
        prompts: A file of prompts: .jsonl or .jsonl.gz with a column "prompt" (text, or messages), or text with one
            prompt a line.
        prompt: One prompt, instead of a file.
        sampling: How completions are drawn.
        seed: Of the random numbers.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace the output where it exists.
    """
    if (prompts is None) == (prompt is None):
        raise ValueError("give either --prompts FILE or --prompt TEXT")
    if output is not None:
        refuse_existing(output, overwrite=overwrite)
    asked = [prompt or ""] if prompts is None else list(read_prompts(prompts))
    if not asked:
        raise ValueError(f"{prompts} holds no prompt")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    language_model, tokenizer = load(model, trust_remote_code=trust_remote_code)
    language_model.to(place)
    L.seed_everything(seed, verbose=False)
    ids = [prompt_ids(tokenizer, text) for text in asked]
    completions = sample(language_model, tokenizer, ids, sampling)
    shown = track(completions, "sampling", total=len(ids), disable=output is None)
    rows = (
        {"prompt": text, "completion": one.text, "truncated": one.truncated}
        for text, several in zip(asked, shown, strict=True)
        for one in several
    )
    if output is None:
        for row in rows:
            print(row["completion"], end="\n\n" if len(ids) * sampling.num_samples > 1 else "\n")
    else:
        print(f"wrote {write_rows(rows, output)} completions to {output}")


def load(model: str, *, trust_remote_code: bool = False) -> tuple[LanguageModel, Any]:
    """A model ready to sample from, and its tokenizer.

    Args:
        model: A Hub id, a directory, or a checkpoint file.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model in eval mode, in the dtype of its weights, and the tokenizer.
    """
    if Path(model).is_file():
        with tempfile.TemporaryDirectory() as folder:
            export_checkpoint(Path(model), Path(folder) / "model", merge=True)
            return load(f"{folder}/model", trust_remote_code=trust_remote_code)
    # Nothing is trained here, so the layout of training does not matter and needs no probe.
    settings = Policy(model, layout="padded", trust_remote_code=trust_remote_code)
    language_model = load_language_model(
        replace(settings, dtype="bfloat16") if torch.cuda.is_available() else settings
    )
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return language_model.eval(), tokenizer


def read_prompts(path: Path) -> Iterator[str | list[dict[str, str]]]:
    """The prompts of a file, in order.

    Args:
        path: ``.jsonl``, ``.jsonl.gz``, or text.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a line of JSON is not valid or has no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    json_lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _prompt_of(line, f"{path}, line {number}") if json_lines else line.rstrip("\n")


def _prompt_of(line: str, where: str) -> str | list[dict[str, str]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
        raise ValueError(f'{where}: no column "prompt" with text or messages')
    return row["prompt"]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write JSON lines, whole or not at all.

    Returns:
        How many.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with partial.open("w") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def main(arguments: list[str]) -> None:
    """Run :func:`generate` with arguments of the command line."""
    run_function(generate, arguments)
