"""OL-AUX on raw gradients: Lin et al., NeurIPS 2019, Adaptive Auxiliary Task Weighting for RL, Algorithm 1."""

from __future__ import annotations


class OLAux:
    """w_i grows by rate times the sum, over `horizon` steps, of <g_main, g_i>; then the sum starts again.

    The paper's loop steps first and then changes the weights. `early` lets the step that completes a sum have the
    new weights already, as they are known before it.
    """

    def __init__(self, rate, horizon, initial, *, relative, anchor=0, early=True):
        self.rate, self.horizon, self.initial, self.relative = rate, horizon, initial, relative
        self.anchor, self.early = anchor, early
        self.weights, self.sums, self.calls = None, None, 0

    def __call__(self, J):
        main = J[self.anchor]
        if self.weights is None:
            self.weights, self.sums = [self.initial] * len(J), [0.0] * len(J)
        old = list(self.weights)
        for k, g in enumerate(J):
            product = float(g @ main)
            if self.relative:
                product = product / float(main @ main) if float(main @ main) > 0 else 0.0
            self.sums[k] += product
        self.calls += 1
        if self.calls % self.horizon == 0:
            self.weights = [w + self.rate * s for w, s in zip(self.weights, self.sums, strict=True)]
            self.sums = [0.0] * len(J)
        used = self.weights if self.early else old
        return main + sum(w * g for k, (w, g) in enumerate(zip(used, J, strict=True)) if k != self.anchor) + 0 * main
