"""Imports point one way, facts need no torch, and importing a module does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wantrain

ROOT = Path(__file__).resolve().parent.parent

FLOORS: list[dict[str, str]] = [
    {"errors": "", "units": ""},
    dict.fromkeys(
        (
            *("fact", "model_config", "topology", "profile", "schedule", "plan", "timeline", "wire", "config"),
            *("run_directory", "resources", "codec_spec", "device_speed", "overrides", "run_file"),
            *("hf_shape", "hf_model", "hf_profile"),
        ),
        "",
    ),
    # Within a floor a room opens only to those that it names.
    {
        "scheduler": "",
        "codecs": "kernels",
        "comm": "codecs",
        "netem": "",
        "probe": "netem",
        "models": "",
        "tokenizer": "",
        "data": "tokenizer",
        "trigram": "data tokenizer",
    },
    {"pipeline": ""},
    {"training": ""},
    {
        "report": "",
        "integrations": "",
        "launch": "report",
        "planning": "launch report",
        "simulating": "report",
        "benching": "",
        "configuring": "",
        "profiling": "",
        "doctor": "launch",
        "watching": "launch report",
    },
    {"cli": "", "__main__": "cli", "completion": "cli"},
]
"""The house from the ground up: a room imports itself and what lies below."""

TORCHLESS = (
    *("errors", "units", *FLOORS[1], "scheduler", "netem", "probe", "tokenizer"),
    *("cli", "completion", "doctor", "launch", "watching", "__main__"),
)
"""What users wait for before anything happens, and what an emulated network's many small processes would pay again."""

MODULES = sorted(
    path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for root in (ROOT, ROOT / "kernels")
    for name in ("wantrain", "wantrain_kernels")
    for path in (root / name).rglob("*.py")
)


def room_of(module: str) -> str:
    """Return "comm" for wantrain.comm.sender, "kernels" for all of wantrain_kernels, "" for the package itself."""
    return "kernels" if module.startswith("wantrain_kernels") else module.partition(".")[2].partition(".")[0]


def path_of(module: str) -> Path:
    below = (ROOT / "kernels" if room_of(module) == "kernels" else ROOT).joinpath(*module.split("."))
    return below / "__init__.py" if below.is_dir() else below.with_suffix(".py")


def imported_by(module: str) -> Iterator[str]:
    """Yield every module that the source names, wherever in it: on top, in functions, for type checkers."""
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides where it points"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed_rooms(room: str) -> set[str]:
    """Return the rooms that `room` may import from."""
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    same = set(FLOORS[floor]) if floor < 2 else set(FLOORS[floor][room].split())
    return {room} | same | {below for rooms in FLOORS[:floor] for below in rooms}


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) not in ("", "kernels")])
def test_imports_point_down(module: str) -> None:
    rooms = {room_of(name) for name in imported_by(module) if name.startswith("wantrain")} - {""}
    assert rooms <= allowed_rooms(room_of(module))


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "kernels"])
def test_the_kernels_are_a_leaf(module: str) -> None:
    assert not [name for name in imported_by(module) if name.startswith("wantrain.")]


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in TORCHLESS])
def test_facts_scheduler_and_netem_need_no_torch(module: str) -> None:
    """The source may name torch only inside a function that says what torch can do here (doctor)."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    on_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in on_top for alias in node.names} | {
        node.module or "" for node in on_top if isinstance(node, ast.ImportFrom)
    }
    assert not {name for name in names if name.partition(".")[0] in ("torch", "wantrain_kernels")}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_planning_emulating_and_launching_load_neither_torch_nor_matplotlib() -> None:
    wanted = [name for name in MODULES if room_of(name) in TORCHLESS and not name.endswith("__main__")]
    code = (
        f"import importlib, sys\n[importlib.import_module(one) for one in {wanted}]\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


IMPORT = """
import sys, time
began = time.process_time()
import wantrain
print(time.process_time() - began)
assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
"""


def test_importing_the_package_takes_next_to_nothing_and_loads_no_torch() -> None:
    """Of processor time, and the best of several: what else the machine does only ever adds."""
    done = [run_python(IMPORT) for _ in range(3)]
    assert [one.stderr for one in done] == ["", "", ""]
    assert min(float(one.stdout) for one in done) < 0.15


SILENCE = """
import importlib, logging, os, signal, sys, threading
sys.path.insert(0, "kernels")
import numpy, pydantic, rich.console, torch, torch.distributed  # what these do on import is theirs

class Watched(type(os.environ)):
    def __getitem__(self, key):
        caller = sys._getframe(1)
        while caller.f_globals.get("__name__") in ("os", "collections.abc", "_collections_abc"):
            caller = caller.f_back
        if caller.f_globals.get("__name__", "").startswith("wantrain"):
            raise AssertionError(f"{caller.f_globals['__name__']} reads {key} from the environment")
        return super().__getitem__(key)

os.environ.__class__ = Watched
def state():
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    return signals, threading.active_count(), logging.root.handlers[:], torch.get_num_threads(), os.getcwd()
before = state()
for name in %r:
    importlib.import_module(name)
    assert state() == before, name
assert not torch.cuda.is_initialized()
"""


def test_importing_a_module_does_nothing_else() -> None:
    done = run_python(SILENCE % [name for name in MODULES if not name.endswith("__main__")])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", wantrain.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert getattr(wantrain, name).__module__.startswith("wantrain.")
    assert name in dir(wantrain)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Topologi'"):
        _ = wantrain.Topologi
