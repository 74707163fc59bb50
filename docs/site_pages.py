"""What the site has beside the pages in this folder: the README and two pages beside the code, and the API reference.

mkdocs calls these functions (mkdocs.yml, `hooks`). The reference is written from what the package says of itself, its
public names and its rooms, so that it can't fall behind.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import wantrain

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "kernels/README.md": "kernels.md"}
"""Pages that stand beside what they speak of, and where the site has them."""

ROOMS = {
    "facts": ("topology", "profile", "model_config", "plan", "schedule", "timeline", "wire", "config", "codec_spec"),
    "scheduler": ("scheduler.solve", "scheduler.simulator", "scheduler.replan", "scheduler.cost_model"),
    "codecs": ("codecs.codec", "codecs.aqsgd", "codecs.error_feedback", "codecs.message_buffer"),
    "comm": ("comm.channel", "comm.torch_channel", "comm.loopback", "comm.allreduce", "comm.sender"),
    "pipeline": ("pipeline.executor", "pipeline.stage", "pipeline.boundary", "pipeline.guard"),
    "training": ("training.trainer", "training.checkpoint", "training.quantized_adam", "models.gpt", "data"),
    "netem": ("netem.emulate", "netem.check", "netem.commands"),
    "errors": ("errors", "units", "fact", "run_directory"),
}
"""The main modules of each room."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of this folder."""
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for target, text in reference_pages().items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    target = page.file.src_uri
    source = next((name for name, moved in ELSEWHERE.items() if moved == target), f"docs/{target}")
    link = re.compile(r"\]\(([^)#:]+\.md)(#[^)]*)?\)")
    return link.sub(lambda found: f"]({_moved(found[1], source)}{found[2] or ''})", markdown)


def _moved(link: str, source: str) -> str:
    """Return where a link from a file of the repository leads on the site; no page lies in a folder but references."""
    if source.startswith("docs/reference/"):
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return ELSEWHERE.get(path, path.removeprefix("docs/"))


def reference_pages() -> dict[str, str]:
    """Return the pages of the reference by their place."""
    homes = sorted((name, f"wantrain.{wantrain._HOMES[name]}.{name}") for name in wantrain.__all__)
    pages = {"reference/index.md": _page("Reference: `import wantrain as wt`", [home for _, home in homes])}
    for room, modules in ROOMS.items():
        pages[f"reference/{room}.md"] = _page(f"Reference: {room}", [f"wantrain.{module}" for module in modules])
    return pages


def _page(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"
