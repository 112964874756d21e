"""Systems for the benchmark's own tests: one that answers with the reference's logits and tells round times,
one whose logits are wrong, one that fails while it is timed.
"""

from __future__ import annotations

import numpy as np


class System:
    """Right logits; a decode step takes half a second and a prefill two, or so it says."""

    def __init__(self, folder, dimensions, workload, threads, settings):
        stored = np.load(folder / "reference.npz")
        self.decode_logits, self.last_logits = stored["decode"], stored["prefill"]
        self.kind = settings.get("kind", "right")
        self.num_prompts = 0

    def fill(self, prompts):
        self.num_prompts = len(prompts)

    def logits_after(self, batch):
        # Rows in the wrong order: each is a right answer to another's question.
        rows = self.decode_logits[: self.num_prompts]
        return (rows[::-1] if self.kind == "wrong" else rows)[:batch]

    def prefill_logits(self, prompt):
        return self.last_logits

    def decode(self, batch, warm_steps, steps):
        if self.kind == "failing":
            raise ValueError("no memory\nfor this")
        return 0.5 * steps

    def prefill(self, prompt):
        return 2.0

    def facts(self):
        return {"version": "1", "weights": "none", "weight_bytes": 1 << 20, "token_bytes": 1000}
