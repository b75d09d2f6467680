"""What users may name on a command line, apart from what does it, which is slow to import."""

from __future__ import annotations

THINKING: dict[str, bool | None] = {"auto": None, "on": True, "off": False}
"""Before an answer: left to the model, wanted, or closed before it starts."""
WEIGHT_KINDS = ("fp32", "bf16", "int8", "int4")
"""Forms of the weights for a CPU."""
QUANTIZE = ("none", "auto", *WEIGHT_KINDS)
"""none leaves the model as it is, auto takes the faster of fp32 and bf16."""
