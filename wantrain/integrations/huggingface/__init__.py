"""Hugging Face models in wantrain's pipelines, and back: transformers, peft, datasets and tokenizers.

    from wantrain.integrations import huggingface as hf

    model = hf.HuggingFaceModel.open("models/my-llama", seq_len=512, lora=hf.Lora(rank=8))
    plan = wt.make_plan(topology, hf.hf_profile(model, 2), batch_size=16, num_stages=2)
    trainer = wt.Trainer(partial(hf.build_layers, model), plan, loss=hf.loss, tied=hf.tied_parameters, worker=worker)
    hf.save(trainer, model, "trained")           # from_pretrained loads it; with LoRA, peft does

    layers.py     the model's own modules as a list of layers, each called as the model calls it
    weights.py    the weights of some layers, out of the model's safetensors files, and their names
    lora.py       adapters, by peft
    saving.py     a folder for from_pretrained, from a trainer or from a checkpoint
    samples.py    a `datasets` data set as samples

The frameworks are imported when they are first used.
"""

from wantrain.hf_model import HuggingFaceModel, Lora
from wantrain.hf_profile import hf_profile
from wantrain.integrations.huggingface.layers import build_layers, loss, set_dropout_keys, tied_parameters
from wantrain.integrations.huggingface.samples import samples, write_texts
from wantrain.integrations.huggingface.saving import export, finish, save

__all__ = [
    "HuggingFaceModel",
    "Lora",
    "build_layers",
    "export",
    "finish",
    "hf_profile",
    "loss",
    "samples",
    "save",
    "set_dropout_keys",
    "tied_parameters",
    "write_texts",
]
