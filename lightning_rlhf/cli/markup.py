"""HTML and SVG as trees, so that no text can become a tag."""

import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

# What HTML does not allow in a text, and what UTF-8 cannot write.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

Child = str | Element | None | Iterable["Child"]


def element(name: str, /, *children: Child, **attributes: object) -> Element:
    """An element.

    Args:
        name: Its tag.
        *children: Texts, elements, or iterables of them; None is nothing.
        **attributes: ``_`` stands for ``-``, and one at the end is dropped: ``class_``.

    Example:
        >>> print(page_text(element("p", "1 < 2 ", element("b", "<script>"), class_="note")))
        <p class="note">1 &lt; 2 <b>&lt;script&gt;</b></p>
    """
    made = Element(name, {key.rstrip("_").replace("_", "-"): clean(str(v)) for key, v in attributes.items()})
    for child in children:
        _append(made, child)
    return made


def _append(parent: Element, child: Child) -> None:
    if isinstance(child, str):
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + clean(child)
        else:
            parent.text = (parent.text or "") + clean(child)
    elif isinstance(child, Element):
        parent.append(child)
    elif child is not None:
        for one in child:
            _append(parent, one)


def clean(text: str) -> str:
    r"""A text without the characters that HTML does not allow; a sign stands for each.

    Example:
        >>> clean("a\x1bb\n") == "a\N{REPLACEMENT CHARACTER}b\n"
        True
    """
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def page_text(root: Element) -> str:
    """The tree as HTML."""
    return tostring(root, encoding="unicode", method="html")
