"""How fast a recurrent layer runs, how near it comes to what the machine can do, and where its time goes.

Measured in one process: runs of the layer alternate with runs in which the engine's calls are timed one by one, and
with runs that leave out a product, which say what it costs inside a fused kernel. The best run of each kind counts,
since on a shared machine noise only ever adds. What the whole takes beyond the engine's calls is torch and Python: so
the parts sum to the whole, and what the watching costs is in none of them. Two limits make the roof (Williams, Waterman
& Patterson 2009): the peak of fused multiply-adds, and the bandwidth of the level of cache that holds the recurrent
weights, which every time step reads.

The engine's functions are replaced while the calls are timed, so nothing else should run layers at that time.
"""

from __future__ import annotations

from .layer import LayerProfile, profile_layer
from .model import Report, Row, profile
from .picture import roofline
from .timing import PARTS, Timing

__all__ = ["PARTS", "LayerProfile", "Report", "Row", "Timing", "profile", "profile_layer", "roofline"]
