"""Models of transformers in wantrain's pipelines, and back: the real libraries, tiny random weights, no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wantrain as wt
from tests.integrations.hf_folders import (
    FAMILIES,
    NUM_BLOCKS,
    SEQ_LEN,
    TEXT,
    VOCABULARY,
    logits,
    whole,
    write_model,
    write_tokenizer,
)
from tests.jobs import flat_topology, run_ranks
from wantrain import cli
from wantrain.comm.loopback import LoopbackJob
from wantrain.config import RunConfig
from wantrain.errors import CheckpointError, ConfigError, DataError, PlanError, UserError
from wantrain.hf_model import load_model
from wantrain.integrations import huggingface as hf
from wantrain.run_directory import RunDirectory
from wantrain.training.checkpoint import load_whole
from wantrain.training.job import load_config, resolve
from wantrain.training.loop import make_optimizer
from wantrain.training.loop import train as train_run

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
TOTAL = NUM_BLOCKS + 2
BATCH = 8

# transformers asks peft's mixin, which asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's folder for each family; Llama's has a tokenizer too."""
    root = tmp_path_factory.mktemp("models")
    found = {family: write_model(root / family, family) for family in FAMILIES}
    write_tokenizer(found["llama"])
    return found


def open_model(folder: Path, **choices: Any) -> hf.HuggingFaceModel:
    return hf.HuggingFaceModel.open(folder, **{"seq_len": SEQ_LEN} | choices)


def some_tokens(num_samples: int = BATCH) -> Tensor:
    return torch.randint(VOCABULARY, (num_samples, SEQ_LEN + 1), generator=torch.Generator().manual_seed(2))


def run_layers(layers: Sequence[nn.Module], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in layers:
            tokens = layer(tokens)
    return tokens


def plan_of(model: hf.HuggingFaceModel, stages: int, replicas: int = 1, **choices: Any) -> wt.Plan:
    profile = hf.hf_profile(model, 2)
    shape = {"batch_size": BATCH, "num_stages": stages, "num_replicas": replicas, "num_lanes": replicas}
    return wt.make_plan(flat_topology(stages * replicas), profile, **shape | choices)


def train(
    model: hf.HuggingFaceModel, plan: wt.Plan, steps: int, then: Callable[[wt.Trainer], Any] = lambda _: None
) -> tuple[list[float], list[Any]]:
    """Train a job of threads over loopback; return its losses and what `then` gave on each rank."""
    job, tokens = LoopbackJob(plan.world_size), some_tokens()

    def body(rank: int) -> tuple[list[float], Any]:
        trainer = wt.Trainer(
            partial(hf.build_layers, model),
            plan,
            loss=hf.loss,
            optimizer=partial(torch.optim.AdamW, lr=1e-2),
            worker=plan.workers[rank],
            tied=hf.tied_parameters,
            before_forward=lambda layers, step, samples: hf.set_dropout_keys(layers, 0, step, samples),
            membership=job.member(rank),
            timeout_s=TIMEOUT_S,
        )
        share = BATCH // len(plan.replicas)
        own = range(trainer.replica * share, (trainer.replica + 1) * share)
        batch = wt.Batch(own, tokens[own.start : own.stop, :-1], tokens[own.start : own.stop, 1:])
        losses = [trainer.step(batch).loss for _ in range(steps)]
        given = then(trainer)
        trainer.close()
        return losses, given

    torch.set_num_threads(1)
    done = run_ranks(plan.world_size, body, TIMEOUT_S)
    return done[0][0], [given for _, given in done]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_give_the_whole_models_logits_bit_for_bit(folders: dict[str, Path], family: str, attention: Any) -> None:
    model, tokens = open_model(folders[family], attention=attention), some_tokens(3)[:, :-1]
    parts = [hf.build_layers(model, first, end) for first, end in ((0, 2), (2, 3), (3, TOTAL))]
    layers = [layer.eval() for part in parts for layer in part]
    assert len(layers) == model.num_layers_total == TOTAL
    assert torch.equal(run_layers(layers, tokens), logits(whole(folders[family], attention), tokens))
    assert torch.equal(run_layers(layers, tokens[:1, :7]), logits(whole(folders[family], attention), tokens[:1, :7]))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_unchanged_is_the_same_model(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    model, tokens = open_model(folders[family]), some_tokens(3)[:, :-1]
    train(model, plan_of(model, 2), 0, lambda trainer: hf.save(trainer, model, tmp_path / "saved"))
    before, after = whole(folders[family]), whole(tmp_path / "saved")
    assert torch.equal(logits(before, tokens), logits(after, tokens))
    assert {name for name, _ in before.named_parameters()} == {name for name, _ in after.named_parameters()}
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(("family", "is_lora"), [("gpt2", False), ("gpt2", True), ("llama", False), ("qwen3", True)])
def test_a_split_backward_changes_no_bit(folders: dict[str, Path], family: str, is_lora: bool) -> None:
    if is_lora:
        pytest.importorskip("peft")
    model = open_model(folders[family], lora=hf.Lora() if is_lora else None)
    split, whole_one = (plan_of(model, 2, schedule=schedule) for schedule in ("zero_bubble", "1f1b"))
    assert train(model, split, 3)[0] == train(model, whole_one, 3)[0]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])  # tied and not
def test_a_pipeline_trains_as_transformers_does_and_gives_it_back(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model, tokens = open_model(folders[family]), some_tokens()
    plain = whole(folders[family]).train()
    optimizer, expected = torch.optim.AdamW(plain.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = plain(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    def keep(trainer: wt.Trainer) -> dict[int, nn.Module]:
        hf.save(trainer, model, tmp_path / "saved")
        return trainer.layers

    losses, layers = train(model, plan_of(model, 2), 3, keep)
    assert losses == pytest.approx(expected, rel=1e-4)
    trained = [layer.eval() for part in layers for layer in part.values()]
    given = logits(whole(tmp_path / "saved"), tokens[:, :-1])
    assert torch.equal(run_layers(trained, tokens[:, :-1]), given)
    torch.testing.assert_close(given, logits(plain.eval(), tokens[:, :-1]), rtol=2e-2, atol=2e-2)


def test_where_it_is_cut_changes_no_bit_even_with_dropout(tmp_path: Path) -> None:
    dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.2)
    model = open_model(write_model(tmp_path / "m", "gpt2", **dropout), lora=hf.Lora(dropout=0.3))
    tokens = some_tokens(2)[:, :-1]

    def outputs(*cuts: int) -> Tensor:
        parts = [hf.build_layers(model, first, end) for first, end in pairwise(cuts)]
        for part in parts:
            hf.set_dropout_keys(part, seed=0, step=4, sample_ids=[7, 9])
        return run_layers([layer for part in parts for layer in part], tokens)

    state = torch.get_rng_state()
    assert torch.equal(outputs(0, TOTAL), outputs(0, 1, 3, TOTAL))
    assert torch.equal(torch.get_rng_state(), state)
    layers = hf.build_layers(model, 0, TOTAL)
    with pytest.raises(ConfigError, match="set_dropout_keys"):
        run_layers(layers, tokens)
    assert not torch.equal(outputs(0, TOTAL), run_layers([layer.eval() for layer in layers], tokens))


def test_a_worker_reads_only_the_files_of_its_own_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "llama", shard_size="20KB")
    model, places = open_model(folder), json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    own = {file for name, file in places.items() if name.startswith(("model.embed", "model.layers.0."))}
    others = set(places.values()) - own
    assert others
    for file in others:
        (folder / file).unlink()
    first = hf.build_layers(model, 0, 2)
    assert not any(tensor.is_meta for layer in first for tensor in layer.state_dict().values())
    with pytest.raises(CheckpointError, match=r"lacks the file model-\d+-of-\d+\.safetensors"):
        hf.build_layers(model, 2, TOTAL)


def test_files_of_the_backbone_alone_and_of_half_precision_load(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(folders["gpt2"], folder)
    old = load_file(folder / "model.safetensors")
    halves = {name.removeprefix("transformer."): tensor.to(torch.bfloat16) for name, tensor in old.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model, tokens = open_model(folder), some_tokens(2)[:, :-1]
    layers = [layer.eval() for layer in hf.build_layers(model, 0, TOTAL)]
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(run_layers(layers, tokens), logits(expected, tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), [
    ("gpt2", {}), ("gpt2", dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.1)), ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}),
    ("qwen3", {"max_window_layers": 0}), ("mistral", {}), ("mistral", {"sliding_window": None}),
])  # fmt: skip
def test_the_profile_counts_what_the_layers_have(
    family: str, changes: dict[str, Any], attention: Any, tmp_path: Path
) -> None:
    model = open_model(write_model(tmp_path / "m", family, **changes), attention=attention)
    layers, tokens = hf.build_layers(model, 0, TOTAL), some_tokens(3)
    hf.set_dropout_keys(layers, 0, 0, [1, 2, 3])
    x = tokens[:, :-1]
    for layer, counted in zip(layers, hf.hf_profile(model, 3).layers, strict=True):
        assert counted.parameter_bytes == sum(parameter.nbytes for parameter in layer.parameters())
        kept, output = kept_bytes(layer, x, tokens[:, 1:] if counted.name == "head" else None)
        assert counted.activation_elements == output.numel()
        assert counted.stored_bytes == pytest.approx(kept, rel=0.1, abs=300), counted.name
        x = output.detach().requires_grad_()


def kept_bytes(layer: nn.Module, x: Tensor, targets: Tensor | None) -> tuple[int, Tensor]:
    """Return the bytes that autograd keeps, weights left out, and the layer's output."""
    own = {one.untyped_storage().data_ptr() for one in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
        result = output if targets is None else hf.loss(output, targets)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    del result
    return found, output


@pytest.mark.parametrize(("family", "targets"), [
    ("gpt2", ()), ("llama", ()), ("qwen2", ("q_proj", "down_proj")), ("qwen3", ()), ("mistral", ("gate_proj",)),
])  # fmt: skip
def test_lora_trains_its_adapters_alone_and_peft_loads_them(
    folders: dict[str, Path], family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    model = open_model(folders[family], lora=hf.Lora(rank=4, alpha=8, targets=targets))
    profile, tokens = hf.hf_profile(model, 2), some_tokens()[:, :-1]
    built = dict(enumerate(hf.build_layers(model, 0, TOTAL)))
    fresh = {f"{number}.{name}": p.clone() for number, layer in built.items() for name, p in layer.named_parameters()}
    given = run_layers([layer.eval() for layer in built.values()], tokens)
    assert torch.equal(given, logits(whole(folders[family]), tokens))

    def keep(trainer: wt.Trainer) -> tuple[dict[int, nn.Module], int]:
        hf.save(trainer, model, tmp_path / "adapter")
        return trainer.layers, sum(sum(buckets.bucket_sizes_bytes) for buckets in trainer.buckets)

    losses, kept = train(model, plan_of(model, 2, 2), 4, keep)
    assert losses[-1] < losses[0]
    trained = {number: layer.eval() for layers, _ in kept[:2] for number, layer in layers.items()}
    for number, layer in trained.items():
        for name, parameter in layer.named_parameters():
            is_same = torch.equal(parameter, fresh[f"{number}.{name}"])
            assert is_same == ("lora_" not in name), name
            assert parameter.requires_grad == ("lora_" in name)
    adapters = sum(p.nbytes for layer in trained.values() for p in layer.parameters() if p.requires_grad)
    assert profile.parameter_bytes == adapters
    assert adapters <= sum(size for _, size in kept[:2]) < 1.5 * adapters + 4096  # padding, no bucket for the rest
    loaded = peft.PeftModel.from_pretrained(whole(folders[family]), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), run_layers(list(trained.values()), tokens))
    assert not torch.equal(logits(loaded, tokens), logits(whole(folders[family]), tokens))


def test_a_stage_without_adapters_only_hands_on(folders: dict[str, Path]) -> None:
    model = open_model(folders["llama"], lora=hf.Lora())
    planned = plan_of(model, 3)
    stages = [{**stage.model_dump(), "first_layer": first, "end_layer": end}
              for stage, (first, end) in zip(planned.stages, ((0, 1), (1, 4), (4, 5)), strict=True)]  # fmt: skip
    plan = wt.Plan.parse(planned.model_dump() | {"stages": stages}, PlanError, "plan")
    losses, counts = train(model, plan, 3, lambda trainer: len(trainer.parameters))
    alone, _ = train(model, plan_of(model, 1), 3)
    assert counts[0] == counts[2] == 0 < counts[1]
    assert losses == alone


def test_frozen_weights_take_their_own_memory_and_no_more(folders: dict[str, Path]) -> None:
    full, small = (open_model(folders["llama"], lora=lora) for lora in (None, hf.Lora(rank=1)))
    weights = hf.hf_profile(full, 2).parameter_bytes
    profile = hf.hf_profile(small, 2)
    assert sum(layer.frozen_bytes for layer in profile.layers) == weights
    needed = {model: plan_of(model, 1).prediction.memory_bytes["w-0"] for model in (full, small)}  # type: ignore[union-attr]
    assert needed[full] - needed[small] == 3 * weights - 4 * profile.parameter_bytes


def test_a_data_set_and_a_tokenizer_are_samples(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXT.splitlines(), "number": list(range(400))})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    found = hf.samples(rows, tokenizer, SEQ_LEN)
    inputs, targets = found.batch([0, 1])
    assert (inputs[0, 1:] == targets[0, :-1]).all()
    assert inputs[1, 0] == targets[0, -1]
    lines = TEXT.splitlines()
    assert tokenizer.decode(found.tokens[:60]).startswith(f"{lines[0]}<end>{lines[1]}<end>")
    streamed = hf.samples(rows.to_iterable_dataset(), tokenizer.backend_tokenizer, SEQ_LEN, end_of_text="<end>")
    assert (streamed.tokens == found.tokens).all()
    assert hf.write_texts(rows, tmp_path / "text.txt") == len(lines)
    assert (tmp_path / "text.txt").read_text().split("\n\n")[:-1] == lines
    with pytest.raises(ConfigError, match=r"no column 'story' \(it has text, number\)"):
        hf.samples(rows, tokenizer, SEQ_LEN, column="story")
    with pytest.raises(ConfigError, match="no token '<stop>'"):
        hf.samples(rows, tokenizer, SEQ_LEN, end_of_text="<stop>")
    with pytest.raises(DataError, match="shorter than a sample"):
        hf.samples(rows.select([0]), tokenizer, 60)
    with pytest.raises(ConfigError, match="got str"):
        hf.samples(rows, "llama", SEQ_LEN)


def test_a_name_is_found_as_from_pretrained_finds_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "constants", huggingface_hub.constants)
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(folders["llama"], cached / "snapshots" / "0123456789")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789")
    model, tokens = open_model(Path("someone/tiny")), some_tokens(2)[:, :-1]
    assert model.hf == "someone/tiny"
    layers = [layer.eval() for layer in hf.build_layers(model, 0, TOTAL)]
    assert torch.equal(run_layers(layers, tokens), logits(whole(folders["llama"]), tokens))
    with pytest.raises(ConfigError, match="there is no folder 'someone/else', and no model of that name") as caught:
        open_model(Path("someone/else"))
    assert "\n" not in str(caught.value)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("changes", "choices", "said"), [
    ({"model_type": "bert"}, {}, "can't cut a model of type 'bert' .*expected one of gpt2, llama, qwen2, qwen3"),
    ({"quantization_config": {"bits": 4}}, {}, "can't train a model with quantization_config"),
    ({"hidden_size": None}, {}, "missing key 'hidden'"),
    ({}, {"seq_len": 65}, r"seq_len is more than the model can take \(got 65, expected at most 64\)"),
    ({}, {"lora": hf.Lora(targets=("q_prj",))}, r"no target 'q_prj' in llama \(did you mean 'q_proj'\?\)"),
    ({"vocab_size": 299}, {}, "don't fit its config.json"),
    ({"num_hidden_layers": 4}, {}, "lacks the weight 'model.layers.3."),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], choices: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    change_config(folder, **changes)

    def build() -> None:
        model = open_model(folder, **choices)
        hf.build_layers(model, 0, model.num_layers_total)

    with pytest.raises(UserError, match=said) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_in_use_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    (folder / "model.safetensors").unlink()
    model = open_model(folder)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        hf.build_layers(model, 0, 1)
    with pytest.raises(CheckpointError, match="holds something already"):
        hf.export(tmp_path, folder)
    (tmp_path / "half").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "half" / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors; copy"):
        hf.finish(model, tmp_path / "half", 2)


def test_run_files_and_the_planner_know_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        f'[model]\nhf = "{os.path.relpath(folders["llama"], tmp_path)}"\n[model.lora]\nrank = 2\n'
        "[training]\nsteps = 1\nbatch_size = 2\n"
    )
    config = RunConfig.load(run)
    assert isinstance(config.model, hf.HuggingFaceModel)
    assert (config.model.hf, config.model.seq_len) == (str(folders["llama"]), 64)
    assert config.data.tokenizer == str(folders["llama"] / "tokenizer.json")
    assert RunConfig.parse(json.loads(config.model_dump_json()), ConfigError, "again") == config
    run.write_text(run.read_text().replace("rank", "rnak"))
    with pytest.raises(ConfigError, match=r"unknown key 'model\.lora\.rnak' \(did you mean 'rank'"):
        RunConfig.load(run)
    (folders["llama"].parent / "m.toml").write_text('hf = "gpt2"\nseq_len = 16\n')
    assert load_model(str(folders["llama"].parent / "m.toml")).seq_len == 16
    assert load_model(str(folders["llama"])).seq_len == 64
    run.write_text(f'[model]\nhf = "{folders["gpt2"]}"\n[training]\nsteps = 1\nbatch_size = 2\n')
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; name one"):
        RunConfig.load(run)


RUN = """
[model]
hf = "{model}"
seq_len = 16
[model.lora]
rank = 2
[data]
source = "{text}"
[training]
steps = 4
batch_size = 4
num_lanes = 2
learning_rate = 1e-2
validation_samples = 4
[parallel]
topology = "two_sites"
num_stages = 2
num_replicas = 2
[checkpoint]
every = 2
"""


def test_a_run_file_trains_resumes_generates_and_exports(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run.toml").write_text(RUN.format(model=folders["llama"], text=tmp_path / "text.txt"))
    job = resolve(load_config(str(tmp_path / "run.toml")))
    model = job.config.model
    assert isinstance(model, hf.HuggingFaceModel)

    def run(name: str, *, stop_after: int = 4, is_resumed: bool = False) -> list[float]:
        directory, loopback = RunDirectory(tmp_path / name), LoopbackJob(job.plan.world_size)

        def body(rank: int) -> None:
            trainer = wt.Trainer(
                partial(hf.build_layers, model, seed=job.config.training.seed),
                job.plan,
                loss=hf.loss,
                optimizer=partial(make_optimizer, job.config.training),
                worker=job.plan.workers[rank],
                membership=loopback.member(rank),
                timeout_s=TIMEOUT_S,
            )
            train_run(trainer, job, directory, is_resumed, lambda: trainer.step_number == stop_after - 1)
            trainer.close()

        run_ranks(job.plan.world_size, body, TIMEOUT_S)
        return [record.loss for record in directory.read_steps(0)]

    torch.set_num_threads(1)
    losses = run("whole")
    assert losses[-1] < losses[0]
    assert len(run("parts", stop_after=2)) == 2
    assert run("parts", is_resumed=True) == losses
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004"
    assert all("lora_" in name for part in checkpoint.glob("layer-*") for name in load_file(part))
    prompt = ["--prompt", "the 7 workers", "--tokens", "5", "--temperature", "0"]
    assert cli.main(["generate", str(tmp_path / "whole"), *prompt]) == 0
    assert capsys.readouterr().out.startswith("the 7 workers")
    assert cli.main(["generate", str(tmp_path / "whole"), "--export", str(tmp_path / "adapter")]) == 0
    layers = hf.build_layers(model, 0, TOTAL, seed=5)
    load_whole(checkpoint, layers)
    loaded = peft.PeftModel.from_pretrained(whole(folders["llama"]), tmp_path / "adapter").eval()
    tokens = some_tokens(2)[:, :-1]
    assert torch.equal(run_layers([layer.eval() for layer in layers], tokens), logits(loaded, tokens))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "hugging-face.md").read_text(), re.DOTALL)


def run_in(folder: Path, *argv: str) -> str:
    """Run a command in a folder, as somebody without a network; return what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=2 * TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the docs' first program has made a model and a text."""
    folder = tmp_path_factory.mktemp("docs")
    make_model, load_adapter, train_all = blocks("python")
    for name, text in (("make", make_model), ("load", load_adapter), ("train", train_all)):
        (folder / f"{name}.py").write_text(text)
    for name, text in zip(("lora", "cities"), blocks("toml"), strict=True):
        (folder / f"{name}.toml").write_text(text)
    run_in(folder, "make.py")
    return folder


def test_the_docs_library_program_trains_and_saves(tried: Path) -> None:
    out = run_in(tried, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    losses = [float(one) for one in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    tokens = torch.arange(1, 33)[None]
    assert not torch.equal(logits(whole(tried / "trained"), tokens), logits(whole(tried / "base"), tokens))
    assert transformers.AutoTokenizer.from_pretrained(tried / "trained").decode([0]) == "<end>"


@pytest.mark.slow  # several processes that each load transformers, over a network that is built and measured
def test_the_docs_lora_run_goes_over_the_emulated_wan(tried: Path) -> None:
    planned = run_in(tried, "-m", "wantrain", "plan", "lora.toml")
    assert "ghent" in planned
    run_in(tried, "-m", "wantrain", "launch", "lora.toml", "--run-dir", "runs/lora", "--rate-tolerance", "99")
    steps = RunDirectory(tried / "runs" / "lora").read_steps(0)
    assert len(steps) == 20
    assert steps[-1].loss < steps[0].loss - 0.1
    prompt = ("--prompt", "worker 7", "--tokens", "20")
    assert run_in(tried, "-m", "wantrain", "generate", "runs/lora", *prompt).startswith("worker 7")
    run_in(tried, "-m", "wantrain", "generate", "runs/lora", "--export", "adapter")
    assert "adapter parameters" in run_in(tried, "load.py")


def test_commands_of_the_docs_are_those_that_ran() -> None:
    text = (ROOT / "docs" / "hugging-face.md").read_text()
    for command in ("plan lora.toml", "launch lora.toml --run-dir runs/lora", "generate runs/lora --export adapter"):
        assert f"wantrain {command}" in text
