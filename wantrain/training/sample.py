"""`wantrain generate`: text from a checkpoint, in one process; or the whole model, as others load it."""

from __future__ import annotations

import argparse
import sys

from wantrain.tokenizer import load_tokenizer
from wantrain.training.architecture import architecture_of, parse_model
from wantrain.training.checkpoint import find, load_whole, read_manifest
from wantrain.training.generate import stream


def run(args: argparse.Namespace) -> int:
    """Carry out `wantrain generate`."""
    folder = find(args.checkpoint)
    manifest = read_manifest(folder)
    config = parse_model(manifest.model, str(folder))
    own = architecture_of(config)
    if args.export is not None:
        own.export(folder, args.export)
        print(args.export)
        return 0
    layers = own.build_layers(config, 0, config.num_layers_total, manifest.seed)
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
