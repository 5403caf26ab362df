"""Generated from `protos/knowledge_engine/v1` by `scripts/protos.py`; never edited."""
