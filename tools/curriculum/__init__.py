"""A small bilingual curriculum that the program writes itself, and held-out probes that measure what was learned.

    from tools.curriculum import conversations, pretrain_documents, probes, score

Everything is standard library, deterministic from a seed, and needs no network. What the probes ask never occurs in
the rows of any seed: their wordings are reserved, and the number pairs and story casts are held out by a fixed hash.
"""

from __future__ import annotations

from tools.curriculum.arithmetic import held_out_sums
from tools.curriculum.generate import conversations, pretrain_documents
from tools.curriculum.probe_set import Probe, probes, score
from tools.curriculum.stories import held_out_casts

__all__ = ["Probe", "conversations", "held_out_casts", "held_out_sums", "pretrain_documents", "probes", "score"]
