"""One model at a time is built in a process.

While transformers builds a model it swaps a method of its base class (the tying of weights) and
torch's default dtype, and puts them back. Two threads that do so at once can put back the other's:
every later model of the process is then built without tied weights, and no error says so.
"""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
"""To be held wherever a model is built or loaded."""
