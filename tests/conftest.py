"""What every test stands on: no network, few threads, fixed seeds, and skips that say why."""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports these libraries: they read their environment once.
_CACHE = tempfile.mkdtemp(prefix="lightning-rlhf-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_CACHE=str(Path(_CACHE) / "datasets"),
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("LIGHTNING_RLHF_ASSETS") or REPOSITORY.parent / "shared" / "assets").resolve()

collect_ignore_glob = ["benchmarks/*"]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def _missing_assets() -> str | None:
    if ASSETS.is_dir():
        return None
    return f"no real models and data at {ASSETS} (LIGHTNING_RLHF_ASSETS or ../shared/assets)"


def pytest_report_header() -> str:
    """Say at the top what this run will be able to test."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    threads = torch.get_num_threads()
    return f"assets: {_missing_assets() or ASSETS}; gpu: {gpu}; torch {torch.__version__}, {threads} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the ``assets`` fixture, and skip, with the reason, what this machine cannot run."""
    missing = _missing_assets()
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.assets)
        if missing and item.get_closest_marker("assets"):
            item.add_marker(pytest.mark.skip(reason=missing))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; a test that asks for it is marked ``assets``."""
    missing = _missing_assets()
    if missing:
        pytest.skip(missing)
    return ASSETS


@pytest.fixture(autouse=True)
def _seeded() -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test; Lightning seeds processes that it starts by it
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama on disk, with a tokenizer of single letters."""
    from tests.models.families import tiny
    from tests.tokenizers import letters

    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("LlamaConfig").save_pretrained(path)
    letters().save_pretrained(path)
    return str(path)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """A stock Trainer on the CPU that logs to memory only."""
    import lightning as L

    def make(**settings: Any) -> L.Trainer:  # noqa: ANN401
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **settings})

    return make


@pytest.fixture
def tokenizer() -> Any:  # noqa: ANN401
    """A tokenizer of single letters."""
    from tests.tokenizers import letters

    return letters()


@pytest.fixture
def llama() -> Any:  # noqa: ANN401
    """A tiny random Llama."""
    from tests.models.families import tiny

    return tiny("LlamaConfig")
