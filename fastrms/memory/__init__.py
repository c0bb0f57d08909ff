"""Where numbers lie: arrays of the host (host) and of a GPU (device), named arrays in one buffer (flat), where buffers start
(placement), and the shapes that params and grads may have (tree)."""
