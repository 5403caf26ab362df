"""The model that serves a base on this machine: `int8.py` where it can, else `batched.py` or `plain.py`.

Brings torch.
"""

from __future__ import annotations

from collections.abc import Callable

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base
from knowledge_engine.inference.batched import BatchedModel, can_batch
from knowledge_engine.inference.plain import PlainModel
from knowledge_engine.inference.scheduler import Model
from knowledge_engine.settings import Settings


def serving_model(
    loaded: modeling.PreTrainedModel, base: Base, precision: str, settings: Settings, tell: Callable[[str], None]
) -> Model:
    """Ready to answer. `loaded` is the base in this precision, and what is made of it; `tell` is told of what takes
    long."""
    if precision not in modeling.INT8S:
        if can_batch(base):
            return BatchedModel(loaded, base.context_length, settings.kv_cache_bytes, settings.adapter_cache_bytes)
        return PlainModel(loaded, settings.adapter_cache_bytes)
    devices.prepare_compiler(settings)
    from knowledge_engine.inference.int8 import Int8Model

    model = Int8Model(
        loaded,
        base.context_length,
        settings.max_active_streams,
        settings.kv_cache_bytes,
        settings.adapter_cache_bytes,
    )
    tell("compiling for this machine, once")
    model.warm_up()
    return model
