"""`wantrain generate`: text from a checkpoint, in one process; or the whole model as one file."""

from __future__ import annotations

import argparse
import sys

from wantrain.errors import CheckpointError
from wantrain.model_config import ModelConfig
from wantrain.models.gpt import build_layers
from wantrain.tokenizer import load_tokenizer
from wantrain.training.checkpoint import export, find, load_whole, read_manifest
from wantrain.training.generate import stream


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain generate`."""
    folder = find(args.checkpoint)
    if args.export is not None:
        export(folder, args.export)
        print(args.export)
        return 0
    manifest = read_manifest(folder)
    config = ModelConfig.parse(manifest.model, CheckpointError, str(folder))
    layers = build_layers(config, 0, config.num_layers_total, manifest.seed)
    load_whole(folder, layers)
    tokenizer = load_tokenizer(manifest.tokenizer)
    prompt = tokenizer.encode(args.prompt.encode()).tolist()
    chosen = stream(
        layers, prompt, seq_len=config.seq_len, temperature=args.temperature, top_k=args.top_k, seed=args.seed
    )
    tokens = [*prompt, *(token for _, token in zip(range(args.tokens), chosen, strict=False))]
    print(tokenizer.decode(tokens))
    sys.stdout.flush()
    return 0
