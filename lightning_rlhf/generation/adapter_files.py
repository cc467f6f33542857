"""The policy's adapter as files, for an engine that reads it from disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel

from lightning_rlhf.models import LanguageModel
from lightning_rlhf.models.sharding import gathered
from lightning_rlhf.models.sharding_fsdp1 import unit_of


@contextmanager
def written_adapter(model: LanguageModel, parent: str | None = None) -> Iterator[str | None]:
    """Write the adapter of the role that a model runs as, for as long as the context lasts.

    Args:
        model: A model with adapters.
        parent: Where the temporary directory is made; the system's place by default.

    Yields:
        The directory; None where the model runs as its base alone.

    Raises:
        ValueError: If the model has no adapters, or none that are found: an engine would go on with the weights that it
            started with.
    """
    if not isinstance(model.model, PeftModel):
        raise ValueError(
            "the engine is given LoRA adapters, and this policy has none: train it with lora, or sample with "
            "HFGenerator"
        )
    if unit_of(model) is not None:
        raise ValueError(
            "the engine is given LoRA adapters by PEFT, which finds none under FSDP1 (FSDPStrategy): train under "
            "another strategy, or sample with HFGenerator"
        )
    name = model.active_adapter
    if name is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="adapter-", dir=parent) as folder, gathered(model):
        model.model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        beside = Path(folder) / name  # PEFT puts every adapter but "default" in a directory of its own
        yield str(beside if beside.is_dir() else folder)
