"""Knowledge Engine: from a shop's catalogue to a fine-tuned shopping assistant that answers token by token."""

__version__ = "0.1.0"
