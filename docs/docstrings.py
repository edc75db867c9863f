"""Griffe extension: the Sphinx roles of the docstrings become links to the pages of the API reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?\.?([\w.]+)`")
PAGES = sorted((Path(__file__).parent / "api").glob("*.md"))
DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in PAGES
    for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}


def as_markdown(role: re.Match[str]) -> str:
    name = role[1]
    path = DOCUMENTED.get(name.removeprefix("slide_torch.").rpartition(".")[2])
    ours = path is not None and (name.startswith("slide_torch.") or "." not in name)
    return f"[`{name}`][{path}]" if ours else f"`{name}`"


class Roles(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(as_markdown, obj.docstring.value)
