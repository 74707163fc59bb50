"""What the layers of a Hugging Face model cost, counted from its shape as `profile.gpt_profile` counts a GPT's.

With LoRA the model's own weights are `frozen_bytes`: they take their own memory, but no gradient, no optimizer state
and no traffic; a backward through them costs one product, not two.

Stored values per token of a block, with hidden size h, q = heads × head size, k likewise of keys and values, width i of
the MLP, s tokens a sample; the test counts them with saved-tensor hooks:

    norms        gpt2 4 h + 4: their inputs, outputs, means and deviations; others 6 h + 2: input, normalized, scaled
                 qwen3 also 2 q + 2 k and one for each head: the norms of queries and keys
    attention    4 q: queries, keys, values, output; 2 q + 2 k where a fused kernel takes fewer keys and values
                 a value for each head; where it is not fused (eager, dropout) s for each, three times with dropout
                 s for the mask of a window that is shorter than the sample
    MLP          gpt2 5 i: before, within (tanh's polynomial) and after its activation; others 4 i
    dropout      2 h
"""

from __future__ import annotations

from wantrain.hf_model import HuggingFaceModel, Model, lora_parameters
from wantrain.model_config import ModelConfig
from wantrain.profile import BYTES_PER_ELEMENT, LayerProfile, ModelProfile, gpt_profile


def counted_profile(model: Model, microbatch_size: int) -> ModelProfile:
    """Count what each layer of a model costs for a microbatch."""
    if isinstance(model, ModelConfig):
        return gpt_profile(model, microbatch_size)
    return hf_profile(model, microbatch_size)


def hf_profile(model: HuggingFaceModel, microbatch_size: int) -> ModelProfile:
    """Count what each layer of a Hugging Face model costs for a microbatch of samples of `model.seq_len` tokens."""
    tokens = microbatch_size * model.seq_len
    block = _block(model, tokens)
    blocks = [block.model_copy(update={"name": f"block {layer}"}) for layer in range(1, model.num_layers + 1)]
    return ModelProfile(
        microbatch_size=microbatch_size, layers=(_embedding(model, tokens), *blocks, _head(model, tokens))
    )


def _weights(model: HuggingFaceModel, own: int, adapters: int = 0) -> dict[str, int]:
    """Return a layer's weights in bytes, those that are trained and those that are not."""
    if model.lora is None:
        return {"parameter_bytes": own * BYTES_PER_ELEMENT}
    return {"parameter_bytes": adapters * BYTES_PER_ELEMENT, "frozen_bytes": own * BYTES_PER_ELEMENT}


def _norm_size(model: HuggingFaceModel) -> int:
    return model.hidden * (2 if model.shape.family == "gpt2" else 1)


def _embedding(model: HuggingFaceModel, tokens: int) -> LayerProfile:
    shape = model.shape
    rows = shape.vocab_size + (shape.max_positions if shape.family == "gpt2" else 0)
    return LayerProfile(
        name="embedding",
        forward_flops=0.0,
        backward_flops=0.0,
        activation_elements=tokens * shape.hidden,
        stored_bytes=tokens * (2 + (shape.hidden if shape.embedding_dropout else 0)) * BYTES_PER_ELEMENT,
        **_weights(model, rows * shape.hidden),
    )


def _block(model: HuggingFaceModel, tokens: int) -> LayerProfile:
    shape = model.shape
    products = sum(one.inputs * one.outputs for one in shape.linears)
    biases = sum(one.outputs for one in shape.linears if one.has_bias)
    head_norms = 2 * shape.head_size if shape.family == "qwen3" else 0
    adapters = lora_parameters(model, shape.linears)
    scores = 2 * model.seq_len * shape.num_heads * shape.head_size
    trained = scores + (adapters if model.lora is not None else products)
    frozen = products if model.lora is not None else 0
    return LayerProfile(
        name="block",
        forward_flops=2.0 * tokens * (trained + frozen),
        backward_flops=2.0 * tokens * (2 * trained + frozen),
        weight_flops=2.0 * tokens * (trained - scores),
        activation_elements=tokens * shape.hidden,
        stored_bytes=tokens * _stored_values(model) * BYTES_PER_ELEMENT,
        **_weights(model, products + biases + 2 * _norm_size(model) + head_norms, adapters),
    )


def _stored_values(model: HuggingFaceModel) -> int:
    """Return the values that a block keeps per token (see above)."""
    shape = model.shape
    hidden, query, key = shape.hidden, shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    kept = 4 * hidden + 4 + 5 * shape.inner if shape.family == "gpt2" else 6 * hidden + 2 + 4 * shape.inner
    if shape.family == "qwen3":
        kept += 2 * query + 2 * key + shape.num_heads + shape.num_key_value_heads
    return kept + _stored_by_attention(model, query, key) + (2 * hidden if shape.block_dropout else 0)


def _stored_by_attention(model: HuggingFaceModel, query: int, key: int) -> int:
    shape = model.shape
    if model.attention == "eager" or shape.attention_dropout:
        return 4 * query + model.seq_len * shape.num_heads * (3 if shape.attention_dropout else 1)
    is_masked = shape.sliding_window is not None and shape.sliding_window < model.seq_len
    own = 2 * query + 2 * (query if is_masked or shape.family == "gpt2" else key)
    return own + shape.num_heads + (model.seq_len if is_masked else 0)


def _head(model: HuggingFaceModel, tokens: int) -> LayerProfile:
    hidden, vocab_size = model.hidden, model.vocab_size
    forward, is_gpt2 = 2.0 * tokens * vocab_size * hidden, model.shape.family == "gpt2"
    return LayerProfile(
        name="head",
        forward_flops=forward,
        backward_flops=(2 if model.lora is None else 1) * forward,
        weight_flops=forward if model.lora is None else 0.0,
        activation_elements=tokens * vocab_size,
        stored_bytes=tokens * ((2 if is_gpt2 else 3) * hidden + vocab_size + 4) * BYTES_PER_ELEMENT,
        **_weights(model, vocab_size * hidden + _norm_size(model)),
    )
