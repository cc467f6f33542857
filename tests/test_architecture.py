"""A line of code lives in the lowest layer where it can be tested without a mock; layers import only downwards."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_rlhf"
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# Low to high: a layer may import itself and those before it.
LAYERS = (
    "functional",
    "objectives",
    "metrics",
    "data",
    "models",
    "generation",
    "rewards",
    "feedback",
    "algorithms",
    "sandbox",
    "callbacks",
    "cli",
)
# The only third-party packages of the layers that are pure.
ONLY = {"functional": {"torch"}, "objectives": {"torch"}, "metrics": {"torch", "torchmetrics"}}
# Optional, slow or for development: a function that needs one imports it itself; the tests' oracle nobody does.
NEVER_AT_MODULE_LEVEL = {"vllm", "matplotlib"}
NEVER = {"trl"}
# What `import lightning_rlhf` and `lightning-rlhf --help` must do without.
HEAVY = ("trl", "vllm", "matplotlib", "bitsandbytes", "peft", "transformers", "datasets", "lightning")


class _Checker(ast.NodeVisitor):
    """Collects what one module does against the rules.

    Args:
        module: Its dotted name, such as ``lightning_rlhf.data.packing``.
        is_package: Whether the file is an ``__init__.py``, which relative imports count from.
    """

    def __init__(self, module: str, *, is_package: bool) -> None:
        parts = module.split(".")
        self.package = parts if is_package else parts[:-1]
        self.layer = _layer(parts)
        self.depth = 0
        self.found: list[str] = []

    def complain(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:  # noqa: N802
        self._visit_function(node)

    def _visit_function(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_If(self, node: ast.If) -> None:  # noqa: N802
        """`if TYPE_CHECKING:` runs never: its imports keep to the layers, but weigh nothing."""
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
        if name == "TYPE_CHECKING":
            self._visit_function(ast.Module(body=node.body, type_ignores=[]))
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:  # noqa: N802
        for alias in node.names:
            self.check_import(node, alias.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:  # noqa: N802
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        target = [*base, *(node.module.split(".") if node.module else [])]
        if target == [PACKAGE]:
            for alias in node.names:
                self.check_import(node, [PACKAGE, alias.name])
        else:
            self.check_import(node, target)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:  # noqa: N802
        if node.type is None:
            self.complain(node, "a bare except also swallows KeyboardInterrupt: name the exception")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        if isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            self.complain(node, "hasattr() guesses at a type: use isinstance, a protocol or a default")
        self.generic_visit(node)

    def check_import(self, node: ast.AST, target: list[str]) -> None:
        if target[0] == PACKAGE:
            self.check_layer(node, target)
            return
        name = target[0]
        if name in NEVER:
            self.complain(node, f"{name} is for tests only")
        if name in NEVER_AT_MODULE_LEVEL and self.depth == 0:
            self.complain(node, f"{name} at module level: import it in the function that needs it")
        allowed = ONLY.get(self.layer)
        if allowed is not None and name not in allowed and name not in sys.stdlib_module_names:
            if name in NEVER_AT_MODULE_LEVEL and self.depth and self.layer != "functional":
                return  # a metric's plot
            self.complain(
                node,
                f"{self.layer} imports {name}: only {', '.join(sorted(allowed))} and the standard library",
            )

    def check_layer(self, node: ast.AST, target: list[str]) -> None:
        if self.layer == "":
            if self.depth == 0:
                self.complain(node, "the package's __init__ imports lazily (__getattr__)")
            return
        other = _layer(target)
        if other not in LAYERS:
            self.complain(node, f"{'.'.join(target)} is in no layer: import it from where it lives")
        elif self.layer in LAYERS and LAYERS.index(other) > LAYERS.index(self.layer):
            self.complain(node, f"{self.layer} imports {other}, which lies above it")


def _layer(parts: list[str]) -> str:
    """The layer that a dotted name belongs to: "" for the package itself."""
    name = parts[1] if len(parts) > 1 else ""
    return "cli" if name == "__main__" else name


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module does against the rules, one sentence each."""
    checker = _Checker(module, is_package=is_package)
    if checker.layer and checker.layer not in LAYERS:
        checker.found.append(f"line 0: {module} is in no layer")
    checker.visit(ast.parse(source))
    return checker.found


def _module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / PACKAGE)))
def test_module_keeps_to_its_layer(file):
    found = violations(file.read_text(), _module_name(file), is_package=file.name == "__init__.py")
    assert not found, f"{file.relative_to(ROOT)}:\n  " + "\n  ".join(found)


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda folder: folder.name)
def test_every_folder_is_a_package(folder):
    assert (folder / "__init__.py").is_file(), f"{folder} would be left out of an installed package"


def _imports() -> Iterator[tuple[str, str, str]]:
    """(module, source, part of what must be said) of modules that break one rule each."""
    yield "functional.x", "import numpy", "functional imports numpy"
    yield "functional.x", "from lightning_rlhf.data.packing import PackedBatch", "which lies above it"
    yield "functional.x", "def f():\n    from ..models import attention", "which lies above it"
    yield "objectives", "from torchmetrics import Metric", "objectives imports torchmetrics"
    yield "metrics.x", "import transformers", "metrics imports transformers"
    yield "data.packing", "from lightning_rlhf.models import attention", "data imports models"
    yield "data.packing", "from ..models.attention import plan", "data imports models"
    yield "data.packing", "from lightning_rlhf import models", "data imports models"
    yield "data.packing", "import lightning_rlhf.models.attention", "data imports models"
    yield "data.packing", "if TYPE_CHECKING:\n    from ..models import attention", "data imports models"
    yield "algorithms.dpo", "from lightning_rlhf.callbacks import ExactResume", "algorithms imports callbacks"
    yield "algorithms.dpo", "def f():\n    import lightning_rlhf.callbacks", "algorithms imports callbacks"
    yield "algorithms.dpo", "from lightning_rlhf import DPO", "is in no layer"
    yield "helpers", "import torch", "is in no layer"
    yield "cli.main", "import matplotlib.pyplot as plt", "matplotlib at module level"
    yield "cli.main", "try:\n    import vllm\nexcept ImportError:\n    vllm = None", "vllm at module level"
    yield "cli.main", "class A:\n    import vllm", "vllm at module level"
    yield "cli.main", "def f():\n    from trl import DPOTrainer", "trl is for tests only"
    yield "models.x", "try:\n    pass\nexcept:\n    pass", "bare except"
    yield "models.x", "def f(model):\n    return hasattr(model, 'config')", "hasattr"


@pytest.mark.parametrize(("module", "source", "said"), list(_imports()))
def test_a_broken_rule_is_found(module, source, said):
    found = violations(source, f"{PACKAGE}.{module}")
    assert len(found) == 1, found
    assert said in found[0]


def test_an_eager_package_is_found():
    assert violations("from lightning_rlhf.algorithms.dpo import DPO", PACKAGE, is_package=True)
    lazy = "if TYPE_CHECKING:\n    from .algorithms.dpo import DPO\ndef __getattr__(name):\n    from . import data"
    assert not violations(lazy, PACKAGE, is_package=True)


def test_what_is_allowed_is_not_found():
    for module, source in [
        (
            "functional.kl",
            "import math\nfrom collections.abc import Callable\nimport torch.nn.functional as F",
        ),
        ("functional", "from lightning_rlhf.functional.kl import kl_k1"),
        ("objectives", "from lightning_rlhf import functional as RF"),
        ("metrics.accuracy", "def plot(self):\n    import matplotlib.pyplot as plt"),
        ("models.attention", "from lightning_rlhf.data.packing import PackedBatch\nimport transformers"),
        (
            "cli.report",
            "def draw():\n    import matplotlib.pyplot as plt\ntry:\n    pass\nexcept OSError:\n    pass",
        ),
    ]:
        assert not violations(source, f"{PACKAGE}.{module}"), module


def _loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the named packages a fresh interpreter has loaded after running the code."""
    ending = f"\nimport sys\nprint('LOADED', *[n for n in {names!r} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code + ending],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1].split()[1:]


def test_the_subprocess_probe_can_fail():
    assert _loaded_after("import json", ("json", "trl")) == ["json"]


def test_importing_the_package_loads_nothing_heavy():
    assert _loaded_after(f"import {PACKAGE}", HEAVY) == []


def test_help_loads_no_torch():
    if not (ROOT / PACKAGE / "cli" / "main.py").is_file():
        pytest.skip("lightning_rlhf/cli/main.py does not exist yet")
    code = "\n".join(
        [
            "import sys",
            "sys.argv = ['lightning-rlhf', '--help']",
            f"from {PACKAGE}.cli.main import main",
            "try:",
            "    code = main()",
            "except SystemExit as stop:",
            "    code = stop.code",
            "assert not code, code",
        ]
    )
    assert _loaded_after(code, ("torch", *HEAVY)) == []
