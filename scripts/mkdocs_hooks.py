"""For mkdocs: links that leave docs/ work in the repository; on the site, which has no such files, they become code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces each link whose target exists outside of docs/; one that exists nowhere stays, and the build fails."""
    docs = Path(config["docs_dir"])

    def plain(link: re.Match[str]) -> str:
        target = (docs / page.file.src_path).parent.joinpath(link[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]
        path, text = f"`{target.relative_to(docs.parent)}`", link[1].strip("`")
        return path if text in path else f"{text} ({path})"

    return _LINK.sub(plain, markdown)
