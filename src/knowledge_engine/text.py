"""The only renderer of conversations: context into the system message, chat template, encoding, trained-token mask.

Training and serving both go through here, so they cannot drift. Imports `tokenizers` and `jinja2`, never torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from knowledge_engine.core import Message

DEFAULT_SYSTEM = "You are a helpful shopping assistant."


def with_context(messages: Sequence[Message], context: Mapping[str, Any] | None) -> tuple[Message, ...]:
    """The conversation with every key of `context` rendered into its system message.

    `products`, a list of maps, becomes one line each; every other key one `key: value` line. Without a system message
    one is put first. An empty context changes nothing.
    """
    if not context:
        return tuple(messages)
    lines: list[str] = []
    for key, value in context.items():
        if key == "products" and isinstance(value, Sequence) and not isinstance(value, str):
            lines.append("Products:" if value else "Products: none")
            lines.extend(f"- {_product_line(product)}" for product in value)
        else:
            lines.append(f"{key}: {_plain(value)}")
    system = messages[0].content if messages and messages[0].role == "system" else DEFAULT_SYSTEM
    rest = messages[1:] if messages and messages[0].role == "system" else messages
    return (Message(role="system", content="\n".join([system, *lines])), *rest)


def _product_line(product: Any) -> str:
    """One product as a short line: title, brand and price first, then whatever else it has."""
    if not isinstance(product, Mapping):
        return _plain(product)
    left = dict(product)
    head = str(left.pop("title", None) or left.pop("name", None) or left.pop("id", "unnamed"))
    if brand := left.pop("brand", None):
        head += f" by {_plain(brand)}"
    parts = [head]
    if (price := left.pop("price", None)) is not None:
        amount = f"{price:.2f}" if isinstance(price, int | float) and not isinstance(price, bool) else _plain(price)
        currency = left.pop("currency", None)
        parts.append(f"{amount} {currency}" if currency else amount)
    if (in_stock := left.pop("in_stock", None)) is not None:
        parts.append({True: "in stock", False: "out of stock"}.get(in_stock, f"in_stock: {_plain(in_stock)}"))
    attributes = left.pop("attributes", None)
    if isinstance(attributes, Mapping):
        left.update(attributes)
    elif attributes is not None:
        left["attributes"] = attributes
    parts.extend(f"{key}: {_plain(value)}" for key, value in left.items())
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
