"""Fine-tuning; see `job.py` for the order of things and `loop.py` for the loop."""

import os

# OpenMP's threads spin while they wait. Beside other busy processes (engine, gateway, whatever shares the cores) they
# take those very cores from the threads they wait for: on two cores at load 5, loading a base cost 14 s of CPU time
# spinning and 5 s passive. Read once, when torch is loaded, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
