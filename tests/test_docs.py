"""The documentation is true: its Python runs, its commands exist, its lists are complete.

A Python block that cannot run in a test has a comment directly above its fence, ``<!-- not executed: reason -->``.
"""

import importlib
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.is_file()]
NOT_EXECUTED = re.compile(r"<!--\s*not executed:\s*(.+?)\s*-->")
LIGHTNING_COMMANDS = {"fit", "validate", "test", "predict"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its first line of code, ``skipped`` the reason not to run it."""

    page: Path
    line: int
    language: str
    code: str
    skipped: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"
        )


def blocks(page: Path, text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    index, above = 0, ""
    while index < len(lines):
        fence = re.match(r"^(\s*)(`{3,}|~{3,})\s*(\S*)", lines[index])
        if not fence:
            above = lines[index].strip() or above
            index += 1
            continue
        start = index + 1
        index = start
        while index < len(lines) and lines[index].strip() != fence[2]:
            index += 1
        code = "\n".join(line.removeprefix(fence[1]) for line in lines[start:index])
        skipped = NOT_EXECUTED.fullmatch(above)
        found.append(Block(page, start + 1, fence[3], code, skipped[1] if skipped else None))
        index, above = index + 1, ""
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block; continued lines are one, comments and prompts are dropped."""
    joined = re.sub(r"\\\n\s*", " ", block.code)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _of_language(*languages: str) -> list[Block]:
    return [b for page in PAGES for b in blocks(page, page.read_text()) if b.language in languages]


def execute(page: list[Block]) -> None:
    """Run the Python blocks of one page, one after the other, as one program."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in page:
        padded = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's line
        exec(compile(padded, str(block.page), "exec"), namespace)


PYTHON = _of_language("python")
SHELL = _of_language("bash", "sh", "shell", "console")
RUN = {page: [b for b in PYTHON if b.page == page and not b.skipped] for page in PAGES}


@pytest.mark.parametrize("page", [p for p in PAGES if RUN[p]], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(RUN[page])


@pytest.mark.parametrize("block", [b for b in PYTHON if b.skipped], ids=str)
def test_python_block_not_executed(block):
    compile(block.code, str(block), "exec")
    pytest.skip(f"not executed: {block.skipped}")


def _known_commands() -> set[str]:
    if not (ROOT / "lightning_rlhf" / "cli" / "main.py").is_file():
        pytest.skip("lightning_rlhf/cli/main.py does not exist yet")
    return LIGHTNING_COMMANDS | set(importlib.import_module("lightning_rlhf.cli.main").COMMANDS)


def unknown(words: list[str], known: set[str]) -> list[str]:
    """What a documented command names that does not exist: a sub-command, a make target, a recipe."""
    problems = []
    for program, name in zip(words, [*words[1:], ""], strict=True):
        if Path(program).name == "lightning-rlhf" and not name.startswith("-") and name not in known:
            problems.append(f"lightning-rlhf has no command {name!r}")
        if program == "make" and name and "=" not in name:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            if name not in targets:
                problems.append(f"make has no target {name!r}")
    problems += [f"{w} does not exist" for w in words if w.startswith("recipes/") and not (ROOT / w).exists()]
    return problems


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block):
    known = _known_commands()
    problems = [f"{shlex.join(words)}: {p}" for words in commands(block) for p in unknown(words, known)]
    assert not problems, problems


def test_every_command_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text()
    missing = [name for name in sorted(_known_commands()) if f"`lightning-rlhf {name}" not in page]
    assert not missing, f"docs/cli.md says nothing of {missing}"


# The reference is generated from ``__all__`` when the docs are built, and the build fails where a name is left out
# (docs/conf.py). Here is what that rests on: each public module is on the page, each name resolves and is documented.
PUBLIC_MODULES = [
    "lightning_rlhf",
    "lightning_rlhf.functional",
    "lightning_rlhf.objectives",
    "lightning_rlhf.metrics",
    "lightning_rlhf.metrics.hacking",
    "lightning_rlhf.data",
    "lightning_rlhf.models",
    "lightning_rlhf.generation",
    "lightning_rlhf.rewards",
    "lightning_rlhf.callbacks",
    "lightning_rlhf.sandbox",
]


def _exported(module: str) -> list[str]:
    path = ROOT / module.replace(".", "/")
    if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
        pytest.skip(f"{module} does not exist yet")
    names = getattr(importlib.import_module(module), "__all__", [])
    if not names:
        pytest.skip(f"{module} exports nothing yet (no __all__)")
    return list(names)


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_reference_is_complete(module):
    names = _exported(module)
    listed = re.findall(r"^\.\. public:: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert module in listed
    for name in names:
        thing = getattr(importlib.import_module(module), name)
        if callable(thing):
            assert inspect.getdoc(thing), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_no_name_is_exported_twice(module):
    names = _exported(module)
    assert len(set(names)) == len(names)


def test_versions_agree():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert declared
    assert importlib.import_module("lightning_rlhf").__version__ == declared[1]


# The tests of the tests.

_PAGE = """
text
```python
x = 1
```
<!-- not executed: needs the network -->

```python
import nowhere
```
```python
y = x + 1
assert y == 3
```
~~~bash
$ lightning-rlhf fit --config a.yaml \\
    --model.beta 0.1   # a comment
lightning-rlhf fly
make fly
.venv/bin/lightning-rlhf --help
lightning-rlhf fit --config recipes/nowhere.yaml
~~~
"""


def test_blocks_are_found():
    found = blocks(Path("page.md"), _PAGE)
    assert [(b.language, b.line, b.skipped) for b in found] == [
        ("python", 4, None),
        ("python", 9, "needs the network"),
        ("python", 12, None),
        ("bash", 16, None),
    ]


def test_a_wrong_block_fails_at_its_line():
    found = [b for b in blocks(Path("page.md"), _PAGE) if b.language == "python" and not b.skipped]
    with pytest.raises(AssertionError) as failure:
        execute(found)
    assert failure.traceback[-1].lineno + 1 == 13


def test_an_unknown_command_is_found():
    shell = blocks(Path("page.md"), _PAGE)[-1]
    assert [p for words in commands(shell) for p in unknown(words, {"fit"})] == [
        "lightning-rlhf has no command 'fly'",
        "make has no target 'fly'",
        "recipes/nowhere.yaml does not exist",
    ]
