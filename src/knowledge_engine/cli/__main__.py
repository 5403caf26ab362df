"""`python -m knowledge_engine.cli`: the same as `knowledge-engine`."""

from knowledge_engine.cli import main

if __name__ == "__main__":
    main()
