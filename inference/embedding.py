"""What the language model itself can do for the memory: vectors of texts, and summaries.

ConversationMemory(path, embed=model_embedder(engine), summarise=model_summariser(engine))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from inference.engine import Engine
from inference.prompts import SmartPromptEngineer
from inference.sampling import SamplingSettings
from model.transformer import pad_left

_BATCH = 16
# Everyday sentences of both languages: what all their vectors share says nothing about any of them.
_ORDINARY = (
    "Hello, how are you today?",
    "The weather is fine this morning.",
    "I bought bread and milk at the market.",
    "What time does the train leave?",
    "She reads a book about the sea.",
    "They are building a new house near the river.",
    "你好，今天过得怎么样？",
    "早上的天气很好。",
    "我在市场买了面包和牛奶。",
    "火车几点出发？",
    "她在看一本关于大海的书。",
    "他们在河边盖新房子。",
)


class ModelEmbedder:
    """Texts to unit vectors (N, C): the mean of the model's final hidden states over the text's tokens, less the mean of ordinary
    sentences, because the vectors of a language model all point nearly the same way (Mu and Viswanath, 2018)."""

    def __init__(self, engine: Engine) -> None:
        if engine.tokenizer is None:
            raise ValueError("embedding texts needs a tokenizer: Engine(model, tokenizer)")
        self._engine = engine
        weights = engine.model.norm.weight.detach().float().cpu().numpy().tobytes()  # type: ignore[union-attr, operator]
        self.name = hashlib.sha256(weights + engine.tokenizer.fingerprint.encode("utf-8")).hexdigest()[:16]
        """Differs from model to model: vectors of another one are not mixed with these."""
        self._common = self._means(_ORDINARY).mean(axis=0)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self._means(texts) - self._common
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _means(self, texts: Sequence[str]) -> np.ndarray:
        rows = [ids[: self._engine.context] for ids in self._engine.tokenizer.encode_batch(list(texts))]
        rows = [row or self._engine.tokenizer.encode("?") for row in rows]
        means = np.zeros((len(rows), self._engine.config.n_embd), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # little padding
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            ids, mask = pad_left([rows[row] for row in batch], 0, self._engine.device)
            with torch.inference_mode():
                states = self._engine.model.hidden_states(ids, attention_mask=mask).float()  # type: ignore[operator]
            weights = mask.unsqueeze(-1).to(states)
            means[batch] = ((states * weights).sum(dim=1) / weights.sum(dim=1)).cpu().numpy()
        return means


def model_embedder(engine: Engine) -> ModelEmbedder:
    """The `embed` of a ConversationMemory from the model that is chatted with."""
    return ModelEmbedder(engine)


def model_summariser(engine: Engine, max_new_tokens: int = 96) -> Callable[[list[str]], str]:
    """The `summarise` of a ConversationMemory from the model that is chatted with: its greedy answer to the summary template. The oldest
    texts are left out where the context cannot hold all. Worth it with a model that was trained to summarise; others make things up."""

    def summarise(texts: list[str]) -> str:
        room = engine.context - max_new_tokens
        for first in range(len(texts)):
            user = SmartPromptEngineer().build("\n".join(texts[first:]), template="summary").user
            prompt = engine.tokenizer.render([{"role": "user", "content": user}], add_generation_prompt=True, enable_thinking=False).ids
            if len(prompt) <= room:
                return engine.generate([prompt], SamplingSettings(temperature=0, max_new_tokens=max_new_tokens))[0][0].text
        return ""

    return summarise
