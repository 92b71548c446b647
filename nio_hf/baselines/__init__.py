"""Other methods of initialisation, each a [`Method`], to compare NIO with.

    initialize(model, batches, loss_fn, config, method=METHODS["lsuv"], options={"tolerance": 0.05})

All of them treat every trainable tensor by itself. They are written from the papers.
"""

from nio_hf.baselines.architecture_aware import ARCHITECTURE_AWARE
from nio_hf.baselines.emergence import EMERGENCE
from nio_hf.baselines.gradinit import GRADINIT
from nio_hf.baselines.lsuv import LSUV
from nio_hf.baselines.mimetic import MIMETIC
from nio_hf.baselines.none import NONE
from nio_hf.baselines.structured import STRUCTURED
from nio_hf.baselines.weight_range import RANGE
from nio_hf.baselines.xavier import XAVIER
from nio_hf.core.method import Method

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (NONE, GRADINIT, LSUV, EMERGENCE, ARCHITECTURE_AWARE, RANGE, XAVIER, MIMETIC, STRUCTURED)
}
"""{name: method}."""
