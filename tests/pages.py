"""Runs the Python of a Markdown page as a reader would: block after block, in a folder of its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_page(page: str, folder: Path) -> dict:
    """The names that the page's code blocks define; `page` is a path from the root of the repository."""
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
            exec(compile(block, page, "exec"), namespace)
    return namespace
