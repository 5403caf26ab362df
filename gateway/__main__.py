"""`python -m gateway`: serves the gateway on `KNOWLEDGE_HTTP_ADDRESS` until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import sys

from gateway.serving import serve
from knowledge_engine.errors import KnowledgeEngineError
from knowledge_engine.settings import load_settings

_BAD_SETTINGS = 2


def main() -> int:
    """Exit code 0 after a clean stop, 1 when the address is taken, 2 for settings that cannot be."""
    try:
        settings = load_settings()
    except KnowledgeEngineError as error:
        sys.stderr.write(f"gateway: {error.message}\n")
        return _BAD_SETTINGS
    # uvicorn repeats the signal once it has stopped; the default action would make a clean stop look like a kill.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
