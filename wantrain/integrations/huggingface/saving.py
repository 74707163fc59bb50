"""What was trained, as a folder that transformers loads with `from_pretrained`; with LoRA, one that peft loads.

Every stage writes a file of its own, as transformers does with large models:

    config.json, tokenizer.json, …      the model's own, but for the type of its weights, which is fp32
    model-00001-of-00002.safetensors    a stage's weights
    model.safetensors.index.json        which weight is in which file; written last

Adapters are small, and peft wants them in one file: rank 0 joins the stages'. Where machines have disks of their own,
the other stages' files must be copied to rank 0's folder first; `finish` then does the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from wantrain.errors import CheckpointError, ConfigError
from wantrain.fact import read_json, unwritable, write_text
from wantrain.hf_model import HuggingFaceModel, find_file
from wantrain.integrations.huggingface.lora import adapter_name, peft_config
from wantrain.integrations.huggingface.weights import INDEX, full_name, is_tied_copy
from wantrain.training.checkpoint import read_layer, read_manifest, weights_of, write_file
from wantrain.training.trainer import Trainer

ADAPTER = "adapter_model.safetensors"

_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""Files of the model's folder that say how text goes in and out."""


def save(trainer: Trainer, model: HuggingFaceModel, folder: str | Path) -> None:
    """Write what the trainer's job has trained; every rank calls it, and it returns when all is written.

    Raises CheckpointError where the folder holds something, or where a stage's file is on another machine's disk.
    """
    folder = _made(folder)
    trainer.gather("made")
    if trainer.replica == 0:
        _write_part(model, folder, trainer.stage_index, trainer.plan.num_stages, _named_of(trainer, model))
    trainer.gather("written")
    problem = ""
    if trainer.rank == 0:
        try:
            finish(model, folder, trainer.plan.num_stages)
        except (CheckpointError, ConfigError) as caught:
            problem = str(caught)
    problem = trainer.gather(problem)[0]
    if problem:
        raise CheckpointError(problem)


def export(checkpoint: str | Path, folder: str | Path) -> None:
    """Write what a run's checkpoint folder holds; raise CheckpointError where it is no Hugging Face model's."""
    checkpoint, folder = Path(checkpoint), _made(folder)
    manifest = read_manifest(checkpoint)
    model = HuggingFaceModel.parse(manifest.model, CheckpointError, str(checkpoint))
    for number in range(manifest.num_layers):
        state = weights_of(read_layer(checkpoint, manifest, number))
        _write_part(model, folder, number, manifest.num_layers, dict(_named(model, number, state)))
    finish(model, folder, manifest.num_layers)


def finish(model: HuggingFaceModel, folder: str | Path, num_parts: int) -> None:
    """Make a folder whole in which all parts are; raise CheckpointError where one is missing."""
    folder = Path(folder)
    parts = [folder / _part_name(model, index, num_parts) for index in range(num_parts)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}; copy them from the workers that wrote them, and call"
            " wantrain.integrations.huggingface.finish"
        )
    if model.lora is not None:
        _join_adapters(model, folder, parts)
    else:
        _write_rest(model, folder, parts)


def _named_of(trainer: Trainer, model: HuggingFaceModel) -> dict[str, Tensor]:
    states = ((number, layer.state_dict()) for number, layer in trainer.layers.items())
    return {full: tensor for number, state in states for full, tensor in _named(model, number, state)}


def _named(model: HuggingFaceModel, layer: int, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's weights by the names that they have in the folder's files; of several copies, one."""
    for name, tensor in state.items():
        full: str | None = full_name(model, layer, name)
        if model.lora is not None:
            full = adapter_name(full_name(model, layer, name))
        elif is_tied_copy(model, layer) and name == "lm_head.weight":
            full = None
        if full is not None:
            yield full, tensor.detach().cpu().contiguous()


def _part_name(model: HuggingFaceModel, index: int, count: int) -> str:
    kind = "model" if model.lora is None else "adapter_model"
    return f"{kind}-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_part(model: HuggingFaceModel, folder: Path, index: int, count: int, tensors: dict[str, Tensor]) -> None:
    write_file(folder / _part_name(model, index, count), to_bytes(tensors, metadata={"format": "pt"}))


def _write_rest(model: HuggingFaceModel, folder: Path, parts: list[Path]) -> None:
    """Write what makes files of weights a model."""
    for name in _COPIED:
        path = find_file(model.hf, name)
        if path is not None:
            shutil.copyfile(path, folder / name)
    source = find_file(model.hf, "config.json")
    if source is None:
        raise CheckpointError(f"model '{model.hf}' has no config.json any more; put it back")
    config = read_json(source, CheckpointError)
    config.pop("torch_dtype", None)
    write_text(folder / "config.json", json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    places: dict[str, str] = {}
    size = 0
    for part in parts:
        with safe_open(part, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), part.name)
        size += part.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _join_adapters(model: HuggingFaceModel, folder: Path, parts: list[Path]) -> None:
    """Write all adapters as the one file that peft reads, and its description of them."""
    joined = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    write_file(folder / ADAPTER, to_bytes(joined, metadata={"format": "pt"}))
    config = peft_config(model)
    config.inference_mode = True
    config.save_pretrained(folder)
    for part in parts:
        part.unlink()


def _made(folder: str | Path) -> Path:
    """Return the folder, made where need be; raise CheckpointError where it holds something already."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder} holds something already; give another folder, or empty it")
    except OSError as caught:
        raise unwritable(folder, caught) from None
    return folder
