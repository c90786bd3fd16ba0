"""The Python that README and documentation show, to be run on tiny models in place of real ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_blocks(page: str, heading: str | None = None) -> list[str]:
    """The code blocks of a page, or of the section under one of its headings, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading is not None:
        section = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
        assert section, f"{page} has no heading '{heading}'"
        text = section[2]
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def in_small(code: str, model_directory: Path) -> str:
    """The same code on a tiny model with few and short sequences."""
    replacements: Mapping[str, str] = {
        '"smollm2-135m"': repr(str(model_directory)),
        "steps=100": "steps=2, num_sequences=4, seq_len=32",
    }
    for written, small in replacements.items():
        code = code.replace(written, small)
    return code
