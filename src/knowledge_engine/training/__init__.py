"""Fine-tuning; see `job.py` for the order of things and `loop.py` for the loop."""

import os

# OpenMP's threads spin while they wait. Beside other busy processes (engine, gateway, whatever shares the cores) that
# doubles the work and takes the cores away from whom the threads wait for: measured 64 against under 30 tokens per
# second. Read once when torch is loaded, so it must stand before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
