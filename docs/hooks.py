"""What mkdocs does not do by itself: links from pages to files of the repository.

On a code host `../examples/custom_pass.py` leads to the file; the site gets a copy of each such
file, and the link leads to that.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for page in pages for path in LINK.findall(page)}):
        name = f"repository/{path}.txt"
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead the links there."""
    return LINK.sub(r"](repository/\1.txt)", markdown)
