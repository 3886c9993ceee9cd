"""The running average of the dense weights: what scores and serves where a recipe asks for it.

Dense weights that learn at a useful rate from small batches swing about the best ones; their average stays near them.

    mean += (1 - d) (weights - mean),  d = min(dense_average, n / (n + 9)) at the n-th step

The second bound lets the first steps, far from where they go, be forgotten soon.

Source: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992; exponential as in Tarvainen,
Valpola, "Mean teachers", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from headrace.trainer.model.scoring import Float32s

_EARLY = 9


class Average:
    """Means of dense weights by name. Begins as the first weights."""

    def __init__(self, decay: float, weights: Mapping[str, Float32s]) -> None:
        self.decay, self.steps = decay, 0
        self._means = {name: weight.copy() for name, weight in weights.items()}

    def add(self, weights: Mapping[str, Float32s]) -> None:
        """Take in the weights after a step, of the names and shapes of the first ones."""
        self.steps += 1
        fresh = np.float32(1 - min(self.decay, self.steps / (self.steps + _EARLY)))
        for name, mean in self._means.items():
            mean += fresh * (weights[name] - mean)

    def means(self) -> dict[str, Float32s]:
        """Return copies, in the order of the first weights."""
        return {name: mean.copy() for name, mean in self._means.items()}

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of everything; `load` reads them."""
        return {"steps": np.array([self.steps], np.int64), **self.means()}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.steps = int(state["steps"][0])
        self._means = {name: np.array(state[name], np.float32) for name in self._means}
