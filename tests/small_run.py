"""A run file for tests that launch whole jobs: its model is so small that starting takes longer than training."""

from pathlib import Path

_MODEL = """
name = "{name}"
[model]
num_layers = 2
hidden = 32
num_heads = 2
seq_len = 32
[data]
source = "{text}"
"""


def write_run(path: Path, sections: str, name: str = "mini") -> Path:
    """Write a run file, and beside it what it trains on; `sections` are the run file's others, in TOML."""
    text = path.with_name("text.txt")
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    path.write_text(_MODEL.format(name=name, text=text) + sections)
    return path
