"""Sphinx configuration. The reference is generated: ``.. public:: module`` documents what ``__all__`` exports."""

import importlib
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "lightning-rlhf"
author = "the lightning-rlhf developers"
project_copyright = "the lightning-rlhf developers, Apache-2.0"
try:
    release = importlib.metadata.version("lightning-rlhf")
except importlib.metadata.PackageNotFoundError:
    release = "0.1.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning-rlhf"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an "Attributes" section stays one list: dataclass fields are documented once

LOGGER = getLogger(__name__)


class Public(SphinxDirective):
    """``.. public:: module``: the documentation of every name in the module's ``__all__``, in its order."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # the module is there, something it needs is not
                raise
            return self._parse([f"``{name}`` does not exist in this version."])
        exported = getattr(module, "__all__", [])
        lines = [line for export in exported for line in self._document(module, export)]
        return self._parse(lines or [f"``{name}`` exports nothing in this version."])

    def _document(self, module: ModuleType, export: str) -> list[str]:
        path = f"{module.__name__}.{export}"
        try:
            thing = getattr(module, export)
        except (AttributeError, ImportError) as error:
            LOGGER.warning(
                "%s is in __all__ but cannot be had: %s", path, error, location=self.get_location()
            )
            return []
        if inspect.ismodule(thing):
            return []  # has a section of its own
        documented = self.env.temp_data.setdefault("public", {})
        if callable(thing):
            first = documented.setdefault(id(thing), path)
            if first != path:
                return [f"``{path}`` is :py:obj:`{first}`.", ""]
        if inspect.isclass(thing):
            kind = "autoexception" if issubclass(thing, BaseException) else "autoclass"
            return [f".. {kind}:: {path}", "   :members:", "   :show-inheritance:", ""]
        return [f".. {'autofunction' if callable(thing) else 'autodata'}:: {path}", ""]

    def _parse(self, lines: list[str]) -> list[nodes.Node]:
        content = StringList(lines, source=self.get_source_info()[0])
        parent = nodes.Element()
        self.state.nested_parse(content, self.content_offset, parent)
        return parent.children


def dollars_to_math(_app, _what, _name, _thing, _options, lines: list[str]) -> None:
    """Docstrings write mathematics as ``$…$``, possibly over a line's end; reStructuredText writes it as a role."""
    text = "\n".join(lines)
    parts = re.split(r"(``.*?``|^\s*(?:>>>|\.\.\.) .*$)", text, flags=re.MULTILINE)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(
            r"(?<![\\$\w])\$([^$]+?)\$(?![\w$])",
            lambda found: f":math:`{' '.join(found[1].split())}`",
            parts[index],
        )
    lines[:] = "".join(parts).split("\n")


def skip_tuple_fields(_app, _what, _name, thing, skip: bool, _options) -> bool:
    """The fields of a named tuple are documented in its "Attributes"."""
    return skip or (inspect.getdoc(thing) or "").startswith("Alias for field number")


def returns_as_prose(
    docstring: GoogleDocstring, preprocess_types: bool = False
) -> list[tuple[str, str, list[str]]]:
    """A "Returns" section is a sentence: a colon in it does not end a type, types are in the signature."""
    lines = docstring._dedent(docstring._consume_to_next_section())
    return [("", "", lines)] if lines else []


def setup(app) -> None:
    GoogleDocstring._consume_returns_section = returns_as_prose
    app.add_directive("public", Public)
    app.connect("autodoc-process-docstring", dollars_to_math, priority=400)
    app.connect("autodoc-skip-member", skip_tuple_fields)
