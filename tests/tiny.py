"""Tiny random models of the four families, and adapters for them, built in place: no network, no torch import.

Each is a plain model folder (config, float32 safetensors, byte-level BPE, ChatML-like template) that transformers,
PEFT and `KNOWLEDGE_BASE_MODEL` take as they take a real one. Widths are multiples of NF4's block of 64 weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH = 64
INNER = 128
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
HEAD_WIDTH = WIDTH // HEADS
CONTEXT = 1024
VOCABULARY = 384
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = ("gpt2", "llama", "mistral", "qwen2")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For a base that takes tools; `<tool_call>` is no token of the tiny tokenizer's."""

_CORPUS = [
    "system user assistant\nYou are a helpful shopping assistant.",
    "I am looking for running shoes under 100 EUR. Which kettle would you recommend?",
    "The trail shoe costs 89.95 EUR and is in stock; the espresso machine is out of stock.",
    "Do you have a black backpack with a laptop sleeve? Yes, the Nordic Daypack by Fjell fits a 15 inch laptop.",
]


def build_tiny_base(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Writes a random model of fewer than a million weights into `folder` (created) and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    random = np.random.default_rng(seed)
    tensors = {name: _random_weight(name, shape, random) for name, shape in _shapes(family).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(family))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    return folder


def build_random_llama(
    folder: Path, *, width: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int
) -> Path:
    """Writes a random Llama-shaped model of any size into `folder` (created), with the tiny tokenizer, and returns it.

    Only its size is like a real one's: most of its vocabulary is never used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    random = np.random.default_rng(0)
    keys = width // heads * key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for index in range(layers):
        layer = f"model.layers.{index}"
        for projection, outputs in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (outputs, width)
        for projection in ("gate", "up"):
            shapes[f"{layer}.mlp.{projection}_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    tensors = {
        name: 0.02 * random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2
        else np.ones(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = _config("llama") | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    return folder


def build_tiny_adapter(base: Path, folder: Path, seed: int, rank: int = 8, scale: float = 0.5) -> Path:
    """Writes a PEFT folder over all linear layers of `base` whose random A and B clearly change its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    is_gpt2 = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    tensors: dict[str, Any] = {}
    targets = set()
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        if weight.ndim != 2 or not name.endswith(".weight") or name.split(".")[-2] in _NOT_ADAPTED:
            continue
        inputs, outputs = weight.shape if is_gpt2 else weight.shape[::-1]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a = random.normal(0, inputs**-0.5, (rank, inputs))
        b = random.normal(0, scale * rank**-0.5, (outputs, rank))
        tensors[f"{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = b.astype(np.float32)
        targets.add(name.split(".")[-2])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_gpt2,
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", config)
    return folder


_NOT_ADAPTED = frozenset({"wte", "wpe", "embed_tokens", "lm_head"})


def _random_weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Any:
    """Wide enough that the likeliest token leads clearly, so that greedy answers survive another summation order."""
    if len(shape) == 1:
        return random.normal(1.0 if name.endswith(".weight") else 0.0, 0.1, shape).astype(np.float32)
    spread = 0.3 if name.split(".")[-2] in _NOT_ADAPTED else WIDTH**-0.5
    return random.normal(0, spread, shape).astype(np.float32)


def _shapes(family: str) -> dict[str, tuple[int, ...]]:
    if family == "gpt2":
        return _gpt2_shapes()
    keys = KEY_VALUE_HEADS * HEAD_WIDTH
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for projection, outputs in (("q", WIDTH), ("k", keys), ("v", keys), ("o", WIDTH)):
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (outputs, WIDTH)
            if family == "qwen2" and projection != "o":
                shapes[f"{layer}.self_attn.{projection}_proj.bias"] = (outputs,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}.mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[f"{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (WIDTH,)
    shapes["model.norm.weight"] = (WIDTH,)
    if family == "mistral":  # the one without tied embeddings
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    return shapes


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCABULARY, WIDTH),
        "transformer.wpe.weight": (CONTEXT, WIDTH),
    }
    for index in range(LAYERS):
        layer = f"transformer.h.{index}"
        # Conv1D keeps its weight as (inputs, outputs).
        for module, inputs, outputs in (
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, INNER),
            ("mlp.c_proj", INNER, WIDTH),
        ):
            shapes[f"{layer}.{module}.weight"] = (inputs, outputs)
            shapes[f"{layer}.{module}.bias"] = (outputs,)
        for norm in ("ln_1", "ln_2"):
            shapes[f"{layer}.{norm}.weight"] = (WIDTH,)
            shapes[f"{layer}.{norm}.bias"] = (WIDTH,)
    shapes["transformer.ln_f.weight"] = (WIDTH,)
    shapes["transformer.ln_f.bias"] = (WIDTH,)
    return shapes


def _config(family: str) -> dict[str, Any]:
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "dtype": "float32"}
    if family == "gpt2":
        return shared | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": WIDTH,
            "n_inner": INNER,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": True,
        }
    class_name = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
    return shared | {
        "model_type": family,
        "architectures": [class_name],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": family != "mistral",
    }


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise AssertionError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, the models have {VOCABULARY} rows")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
