"""Fine-tuning; see `job.py` for the order of things and `loop.py` for the loop."""
