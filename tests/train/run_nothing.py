"""One of two processes that join, meet and end, while it asks for failures without pause."""

from jax.experimental import multihost_utils

from jdl.train import distributed

distributed._POLL_SECONDS = 0.0005
distributed.initialize(expected=2)
multihost_utils.sync_global_devices("all are here")
