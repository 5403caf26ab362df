"""Models as torch modules: a base loaded in a precision, LoRA attached to train, trained adapters added to serve.

The only user of peft and bitsandbytes. Weights come from safetensors files alone, nothing is fetched, no code of a
model folder runs. Knows nothing of conversations, jobs or where versions are kept.
"""

# ruff: noqa: E402 (bitsandbytes must be told to be quiet before it is imported)

from __future__ import annotations

import errno
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# It warns that it found no package to fetch kernels from the hub with; nothing is ever fetched here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import peft
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from knowledge_engine import devices
from knowledge_engine.bases import Base
from knowledge_engine.core import LoraConfig
from knowledge_engine.errors import IntegrityError, InvalidSpecError, Reason, Violation
from knowledge_engine.files import read_json

FLOAT32, BFLOAT16, NF4, INT8, NF4_INT8 = "float32", "bfloat16", "nf4", "int8", "nf4-int8"
INT8S = frozenset({INT8, NF4_INT8})
"""What the integer kernels serve: weights in eight bits, as they are or as QLoRA trains on them, rounded to NF4."""
INT8_LEVELS = 127
SERVED_BYTES = {INT8: 4 + 1, NF4_INT8: 4 + 1, FLOAT32: 4, BFLOAT16: 2, NF4: 4 + 1}
"""Of a weight on a CPU while a base is made ready to serve: what becomes fewer bits is there in float32 as well."""

_INT8_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2"})
_INT8_CLIPPING = (1.0, 0.94, 0.88)
"""Shares of a row's largest weight that are tried for the largest that eight bits can say."""
_NUMBERS_AT_ONCE = 2**22
"""Rounding takes some copies of what it rounds: these are small."""
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, INT8: torch.float32, NF4_INT8: torch.float32}
_PREFIX = "base_model.model."  # before a module's name, in PEFT's files
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "out of memory",
)
# What an adapter may say; whatever else PEFT knows must stand at its default.
_UNDERSTOOD = frozenset({"r", "lora_alpha", "target_modules", "fan_in_fan_out", "use_rslora", "use_dora"})
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
     "revision", "task_type"}
)  # fmt: skip


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_memory(device: str) -> int:
    """Bytes that this process holds now: of a CUDA device what torch has reserved there, else what is resident."""
    if device.startswith(devices.CUDA):
        return int(torch.cuda.memory_reserved(device))
    return devices.resident_memory()


def peak_device_memory(device: str) -> int:
    """The same, at most so far."""
    if device.startswith(devices.CUDA):
        return int(torch.cuda.max_memory_reserved(device))
    return devices.peak_memory()


def float_precision(device: str) -> str:
    """The precision of an unquantised base."""
    return BFLOAT16 if _has_bfloat16(device) else FLOAT32


def serving_precision(base: Base, device: str, asked: str | None = None) -> str:
    """The precision answers and held-out losses are computed in: the one that is asked for (`settings`), or on a CPU
    `int8` for bases of Llama's shape, else that of an unquantised base.

    Raises:
        InvalidSpecError: SETTINGS_INVALID, what is asked for cannot be had here.
    """
    has_int8 = device == devices.CPU and _is_llama_shaped(base)
    if asked is None:
        return INT8 if has_int8 else float_precision(device)
    if asked in INT8S and not has_int8:
        problem = f"{asked} is for bases of Llama's shape on a CPU"
    elif asked == BFLOAT16 and device != devices.CPU and not _has_bfloat16(device):
        problem = "this GPU has no bfloat16"
    else:
        return asked
    raise InvalidSpecError(f"KNOWLEDGE_SERVING_PRECISION: {problem}", reason=Reason.SETTINGS_INVALID)


def serving_precisions(base: Base, asked: str | None = None) -> tuple[str, ...]:
    """All that some machine serves this base in: the precision of a CPU, of a GPU, and of one older than Ampere; and
    the one that is asked for."""
    asked_too = () if asked is None else (asked,)
    return tuple(dict.fromkeys((serving_precision(base, devices.CPU), BFLOAT16, FLOAT32, *asked_too)))


def training_precision(device: str, *, use_qlora: bool) -> str:
    """The precision of the frozen base during training."""
    return NF4 if use_qlora else float_precision(device)


def load_base(base: Base, precision: str, device: str, *, is_shared_out: bool = False) -> PreTrainedModel:
    """The frozen base in evaluation mode. `nf4` is double-quantised and computes in bfloat16 where the device has it;
    `int8` has weights rounded as those of the integer kernels are, and computes in float32; `nf4-int8` the same of
    weights that, all but the head, were rounded to NF4 before: eight bits say nearly what a QLoRA was trained on.

    FSDP leaves whole on every device what is no floating point number: weights that shall be shared out say their four
    bits as such, of the type that is computed in.

    Raises:
        IntegrityError: BASE_MODEL_CORRUPT, the files cannot be read as a model.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    compute = torch.bfloat16 if _has_bfloat16(device) else torch.float32
    options: dict[str, Any] = {"dtype": compute if precision == NF4 else _DTYPES[precision]}
    if precision == NF4:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=compute if is_shared_out else torch.uint8,
        )
    load = _load_unmapped if precision == BFLOAT16 and device == devices.CPU else _load
    try:
        model = load(base.folder, device, options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise IntegrityError(
            f"the base model {base.name!r} cannot be loaded: {str(error)[:300]}",
            reason=Reason.BASE_MODEL_CORRUPT,
            base_model=base.name,
        ) from error
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first evaluation would repack the weights for a bfloat16 kernel, and training go on with those.
            module.support_avx512bf16_for_cpu = False
    if precision == NF4_INT8:
        for module in _all_linears(model):
            if module is not model.get_output_embeddings():  # type: ignore[no-untyped-call]
                module.weight.data.copy_(_rounded_to_nf4(module.weight.data))  # else mapped files would stay beside it
    if precision in INT8S:
        for weight in {id(module.weight): module.weight for module in _all_linears(model)}.values():
            rounded, scales = round_to_int8(weight)
            torch.mul(rounded, scales[:, None], out=weight.data)
    model.requires_grad_(False)
    model.train(False)
    return model


def _load(folder: Path, device: str, options: Mapping[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    return model


def _load_unmapped(folder: Path, device: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The same model, its tensors read and converted one by one: of files in float32 that are mapped, all pages stay
    resident until the last is, twice what the model takes."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt", backend="pread"))
            for path in sorted(folder.glob("*.safetensors"))
        ]
        tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        model: PreTrainedModel = kind.from_pretrained(
            None, config=config, state_dict=tensors, device_map={"": device}, **options
        )
    return model


def _rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """As `nf4` has it."""
    return dequantize_4bit(*quantize_4bit(weight, quant_type=NF4, compress_statistics=True))


@torch.no_grad()
def round_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (O, I) as whole numbers of eight bits and a scale (O,) for each output, of a few the one with the least
    squared error. A weight that was rounded so before comes out as it is."""
    at_once = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    parts = [_round_rows(weight[first : first + at_once]) for first in range(0, len(weight), at_once)]
    rounded, scales = zip(*parts, strict=True)
    return torch.cat(rounded), torch.cat(scales)


def _round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top = weight.abs().amax(1).clamp_min(1e-30)
    scales, least = top / INT8_LEVELS, torch.full_like(top, math.inf)
    for share in _INT8_CLIPPING:
        tried = top * (share / INT8_LEVELS)
        error = _rounded(weight, tried).mul_(tried[:, None]).sub_(weight).square_().sum(1)
        is_better = error < least
        scales, least = torch.where(is_better, tried, scales), torch.where(is_better, error, least)
    return _rounded(weight, scales).to(torch.int8), scales


def _rounded(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (weight / scales[:, None]).round_().clamp_(-INT8_LEVELS, INT8_LEVELS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of the device: libraries have several ways to say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError | SafetensorError) and any(
        sign in str(error) for sign in _OUT_OF_MEMORY
    )


def attach_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """A fresh trainable adapter on `lora.target_modules`, by default on all linear modules but the head.

    Raises:
        InvalidSpecError: TARGET_MODULES_UNKNOWN.
    """
    known = linear_modules(model)
    short_names = sorted({name.rpartition(".")[2] for name in known})
    unknown = [target for target in lora.target_modules if not any(_is_target(name, target) for name in known)]
    if unknown:
        raise InvalidSpecError(
            f"no linear module is called {', '.join(unknown)}; this base has {', '.join(short_names)}",
            reason=Reason.TARGET_MODULES_UNKNOWN,
            violations=[Violation("spec.lora.target_modules", f"{target!r} is unknown") for target in unknown],
            known=", ".join(short_names),
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=list(lora.target_modules) or short_names,
        bias="none",
        fan_in_fan_out=_is_transposed(model),
    )
    torch.manual_seed(seed)
    with _quiet_peft():
        return PeftModel(model, config)


def _all_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear modules, and the head."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _is_llama_shaped(base: Base) -> bool:
    """Whether `inference/int8.py` computes this architecture, as its config.json has it."""
    config = read_json(base.folder / "config.json")
    heads = int(config.get("num_attention_heads", 1))
    head_width = config.get("head_dim") or int(config.get("hidden_size", 0)) // heads
    return (
        base.architecture in _INT8_ARCHITECTURES
        and config.get("hidden_act", "silu") == "silu"
        and has_static_rope(base)
        and head_width % 8 == 0
    )


def has_static_rope(base: Base) -> bool:
    """Whether a token's rotation is decided by its position alone, and not by how long its sequence is."""
    config = read_json(base.folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return all(kind.get("rope_type", kind.get("type", "default")) in _STATIC_ROPE for kind in by_layer)


def _is_target(name: str, target: str) -> bool:
    """Whether PEFT takes the module `name` for a target of this name."""
    return name == target or name.endswith(f".{target}")


def linear_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that LoRA can adapt: every linear one but the head, whatever the architecture."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head  # bitsandbytes' are subclasses of nn.Linear
    ]


def frozen_linears(model: nn.Module) -> list[Any]:
    """The linear modules that are not trained, those beneath adapters included."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and not module.weight.requires_grad
    ]


def linear_size(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear module."""
    if isinstance(module, Conv1D):
        num_inputs, num_outputs = module.weight.shape
        return num_outputs, num_inputs
    return module.out_features, module.in_features


def dense_weight(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (O, I) of a linear module, dequantised for this call where it is kept in four bits."""
    if isinstance(module, Linear4bit):
        # The module's own: a weight that was gathered from several devices has lost it.
        return dequantize_4bit(module.weight, module.quant_state).to(dtype)
    weight: torch.Tensor = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return weight.to(dtype)


class AdaptedLinear:
    """A linear module with its adapter, for code that does the arithmetic itself."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.a: torch.Tensor = module.lora_A["default"].weight
        self.b: torch.Tensor = module.lora_B["default"].weight
        self.scaling: float = module.scaling["default"]
        self.is_dora = bool(module.use_dora["default"])
        self.dropout: float = getattr(module.lora_dropout["default"], "p", 0.0)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weight (outputs, inputs), dequantised for this call where it is kept in four bits."""
        return dense_weight(self.module.base_layer, dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.module.base_layer.bias
        return None if bias is None else bias.to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, I) times the transpose of weight (O, I), plus bias (O,): (M, O). No gradient flows through it.

    float32 on a CPU goes through oneDNN, as torch's own compiler has it. On CPUs with AVX2 alone that takes as little
    as 0.6 of the time of the BLAS that `functional.linear` calls, where O is large or tiny.
    """
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype is torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return functional.linear(x, weight, bias)


def adapted_linears(model: PeftModel) -> list[AdaptedLinear]:
    """Every module that `attach_lora` adapted."""
    return [AdaptedLinear(module) for module in model.modules() if isinstance(module, LoraLayer)]


def use_gradient_checkpointing(model: PeftModel, context_fn: Callable[[], Any]) -> None:
    """Lets layers keep their inputs alone while they train, and compute the rest again when it is asked for.
    `context_fn` is that of `torch.utils.checkpoint`."""
    base: Any = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})


def body_and_head(model: PreTrainedModel | PeftModel) -> tuple[Any, Any]:
    """The part that turns tokens into hidden states, and the one that turns those into logits."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return whole.get_decoder(), whole.get_output_embeddings()


def save_adapter(model: PeftModel, folder: Path, base: Base) -> None:
    """Writes the trained adapter as a PEFT folder; it names its base by source and revision, never by a path."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.source
    config.revision = base.revision or None
    with _quiet_peft():
        # Without embedding layers: the vocabulary is never changed, and PEFT would ask the hub whether it was.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / _CONFIG_FILE
    values = json.loads(path.read_bytes())
    values["target_modules"] = sorted(values["target_modules"])  # a set: else two equal adapters differ in their digest
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    """Adds the adapter in `folder` beside the others, frozen; the first one wraps the base, which is changed in place.

    Which adapter answers is open until `select_adapter`.

    Raises:
        IntegrityError: MODEL_VERSION_CORRUPT naming the file: missing, unreadable, not finite, of other modules or
            shapes than this base has. The model is then as before.
    """
    config = _read_adapter_config(folder)
    config.fan_in_fan_out = _is_transposed(model)  # a matter of how this base lies in memory, not of the adapter
    tensors = _read_adapter_weights(folder)
    wrapped = model if isinstance(model, PeftModel) else None
    tuned = wrapped
    try:
        with _quiet_peft():
            if tuned is None:
                tuned = PeftModel(model, config, adapter_name=name)
            else:
                tuned.add_adapter(name, config)
        expected = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
        problem = _difference(expected, tensors)
    except (ValueError, TypeError, KeyError) as error:
        problem = f"does not fit this base: {str(error)[:200]}"
        raise _corrupt(folder / _CONFIG_FILE, problem) from error
    if problem:
        if wrapped is None:
            unwrap(tuned)
        else:
            wrapped.delete_adapter(name)
        raise _corrupt(folder / _WEIGHTS_FILE, problem)
    set_peft_model_state_dict(tuned, tensors, adapter_name=name)
    tuned.requires_grad_(False)
    tuned.train(False)
    return tuned


def select_adapter(model: PeftModel, name: str | None) -> None:
    """Makes one adapter answer, or with None the bare base."""
    if name is None:
        _tuner(model).disable_adapter_layers()
    else:
        _tuner(model).enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """The bare base in evaluation mode, also of a model that is being trained."""
    was_training = model.training
    model.train(False)
    _tuner(model).disable_adapter_layers()
    try:
        yield
    finally:
        _tuner(model).enable_adapter_layers()
        model.train(was_training)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Puts the weights in `folder` into the adapter that `attach_lora` made.

    Raises:
        IntegrityError: MODEL_VERSION_CORRUPT naming the file: missing, unreadable, not finite, of other modules or
            shapes than this adapter.
    """
    tensors = _read_adapter_weights(folder)
    if problem := _difference(get_peft_model_state_dict(model, save_embedding_layers=False), tensors):
        raise _corrupt(folder / _WEIGHTS_FILE, problem)
    set_peft_model_state_dict(model, tensors)


@dataclass(frozen=True)
class AdapterWeights:
    """What an adapter adds to one linear module: `scaling` B A (O, I), with a `magnitude` (O,) for DoRA."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None


def read_adapter(folder: Path, modules: Mapping[str, tuple[int, int]]) -> dict[str, AdapterWeights]:
    """The adapter in `folder` in float32, by the full name of the module it adapts.

    `modules` are all that can be adapted, with their outputs and inputs.

    Raises:
        IntegrityError: MODEL_VERSION_CORRUPT naming the file: missing, unreadable, not finite, of other modules or
            shapes than these.
    """
    config = _read_adapter_config(folder)
    tensors = _read_adapter_weights(folder)
    targets = sorted(config.target_modules or ())
    chosen = [name for name in modules if any(_is_target(name, target) for target in targets)]
    expected: dict[str, torch.Tensor] = {}
    for name in chosen:
        outputs, inputs = modules[name]
        expected[f"{_PREFIX}{name}.lora_A.weight"] = torch.empty(config.r, inputs, device="meta")
        expected[f"{_PREFIX}{name}.lora_B.weight"] = torch.empty(outputs, config.r, device="meta")
        if config.use_dora:
            expected[f"{_PREFIX}{name}.lora_magnitude_vector"] = torch.empty(outputs, device="meta")
    if not chosen:
        raise _corrupt(folder / _CONFIG_FILE, f"does not fit this base: none of {', '.join(targets)} is there")
    if problem := _difference(expected, tensors):
        raise _corrupt(folder / _WEIGHTS_FILE, problem)
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {
        name: AdapterWeights(
            tensors[f"{_PREFIX}{name}.lora_A.weight"].float(),
            tensors[f"{_PREFIX}{name}.lora_B.weight"].float(),
            scaling,
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"].float() if config.use_dora else None,
        )
        for name in chosen
    }


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base with the active adapter's update added to its weights; `model` is used up."""
    with _quiet_peft():
        merged: PreTrainedModel = _tuner(model).merge_and_unload()
    return merged


def unwrap(model: PeftModel) -> None:
    """Leaves the base as it was before its first adapter; `model` is used up."""
    _tuner(model).unload()


def remove_adapter(model: PeftModel, name: str) -> None:
    """Frees an adapter's memory."""
    model.delete_adapter(name)


def _read_adapter_config(folder: Path) -> peft.LoraConfig:
    path = folder / _CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
        asked = peft.LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"})
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            **{key: value for key, value in values.items() if key in _UNDERSTOOD},
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _corrupt(path, f"cannot be read: {str(error)[:200]}") from error
    if values.get("peft_type") != "LORA":
        raise _corrupt(path, "is no LoRA configuration")
    plain, strange = vars(config), vars(asked)
    for key in strange.keys() - _UNDERSTOOD - _WITHOUT_EFFECT:
        if strange[key] != plain.get(key):
            raise _corrupt(path, f"asks for {key}, which is not supported")
    if not isinstance(config.target_modules, set):
        raise _corrupt(path, "names its target_modules in another way than as a list")
    return config


def _read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / _WEIGHTS_FILE
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _corrupt(path, f"cannot be read: {str(error)[:200]}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _corrupt(path, f"holds a value that is not finite, in {name}")
    return tensors


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with the names and shapes of the found ones, in a few words; empty when nothing is."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"lacks {name}"
        if name not in expected:
            return f"holds {name}, for which this base has no place"
        if expected[name].shape != found[name].shape:
            return f"holds {name} of shape {list(found[name].shape)} instead of {list(expected[name].shape)}"
    return ""


def _corrupt(path: Path, problem: str) -> IntegrityError:
    return IntegrityError(
        f"{path.name} of the adapter {problem}", reason=Reason.MODEL_VERSION_CORRUPT, file=path.name, problem=problem
    )


def _tuner(model: PeftModel) -> Any:
    """PEFT's own wrapper inside its model, which torch's typing takes for a tensor."""
    return model.base_model


def _has_bfloat16(device: str) -> bool:
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def _is_transposed(model: nn.Module) -> bool:
    """Whether the weights to adapt lie as (inputs, outputs), as GPT-2's do until they are quantised."""
    return any(isinstance(module, Conv1D) for module in model.modules())


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 still asks transformers 5 under a name that warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


__all__ = [
    "AdaptedLinear",
    "AdapterWeights",
    "PeftModel",
    "PreTrainedModel",
    "adapted_linears",
    "add_adapter",
    "attach_lora",
    "body_and_head",
    "default_device",
    "dense_weight",
    "device_memory",
    "float_precision",
    "frozen_linears",
    "has_static_rope",
    "is_out_of_memory",
    "linear",
    "linear_modules",
    "linear_size",
    "load_adapter",
    "load_base",
    "merge_adapter",
    "peak_device_memory",
    "read_adapter",
    "remove_adapter",
    "round_to_int8",
    "save_adapter",
    "select_adapter",
    "serving_precision",
    "serving_precisions",
    "training_precision",
    "unwrap",
    "use_gradient_checkpointing",
    "without_adapter",
]
