"""One of several processes that join, meet, and end, the watch being asked for without pause.

python run_nothing.py
"""

from jax.experimental import multihost_utils

from jdl.train import distributed

distributed._POLL_SECONDS = 0.0005
distributed.initialize(expected=2)
multihost_utils.sync_global_devices("all are here")
