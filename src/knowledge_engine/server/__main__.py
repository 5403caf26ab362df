"""`python -m knowledge_engine.server` runs the control process."""

from knowledge_engine.server.app import main

if __name__ == "__main__":
    main()
