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
    "training": (
        *("training.trainer", "training.metrics", "training.checkpoint", "training.quantized_adam"),
        *("models.gpt", "data"),
    ),
    "netem": ("netem.emulate", "netem.check", "netem.commands"),
    "errors": ("errors", "units", "fact", "run_directory"),
}
"""The main modules of each room."""

_LINK = re.compile(r"(?<!!)\[([^]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of this folder."""
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for target, text in reference_pages().items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that hold in the repository into links that hold on the site; of what it lacks the name stays."""
    target = page.file.src_uri
    folder = posixpath.dirname(next((name for name, moved in ELSEWHERE.items() if moved == target), f"docs/{target}"))

    def on_site(found: re.Match[str]) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(folder, link))
        if path in ELSEWHERE or path.startswith("docs/"):
            return f"[{text}]({ELSEWHERE.get(path, path.removeprefix('docs/'))}{anchor})"
        return text if (ROOT / path).exists() else found[0]

    return markdown if target.startswith("reference/") else _LINK.sub(on_site, markdown)


def reference_pages() -> dict[str, str]:
    """Return the pages of the reference by their place."""
    homes = sorted((name, f"wantrain.{wantrain._HOMES[name]}.{name}") for name in wantrain.__all__)
    pages = {"reference/index.md": _page("Reference: `import wantrain as wt`", [home for _, home in homes])}
    for room, modules in ROOMS.items():
        pages[f"reference/{room}.md"] = _page(f"Reference: {room}", [f"wantrain.{module}" for module in modules])
    return pages


def _page(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"
