"""One row of gradients.py in a process of its own: `python gradients_worker.py NAME JOB.json`."""

from __future__ import annotations

from gradients_methods import METHODS
from gradients_protocol import serve

if __name__ == "__main__":
    serve(METHODS)
