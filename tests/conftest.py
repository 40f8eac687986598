"""One thread a process: the models are tiny, and threads that wait for one another cost several times the work.

Set before anything imports torch, and in the environment, so that processes started by tests have it too.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
