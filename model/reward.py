"""RewardModel: SmartHaoAI with a score per conversation in place of next-token logits.

    reward = RewardModel.from_pretrained("weight/reward")
    reward.score([[{"role": "user", "content": "3 + 5 = ?"}, {"role": "assistant", "content": "8"}]], tokenizer)

The score is read from the state of the last real token (Stiennon et al., 2020; Ouyang et al., 2022), after the end of the answer. On
disk it is the ForSequenceClassification layout of transformers with one label. Shapes: B rows, T tokens, C channels, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import HaoAIConfig
from model.heads import ScalarHead
from model.transformer import SmartHaoAI

if TYPE_CHECKING:
    from model.checkpoint import WeightSource
    from model.tokenizer import BPETokenizer

SCORE = "score.weight"  # on disk
SCORING_TOKENS = 8192  # positions of a batch in `score`


class RewardModel(SmartHaoAI):
    """A trunk whose head gives one number: higher is better, only differences between answers to one prompt mean something.

    A new head is zero, so that every score is 0 until the model is trained.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__(config)
        self.lm_head = None
        self.score_head = ScalarHead(config.n_embd, bias=False)
        if self.reasoning is not None:
            self.reasoning_halt = 0.0  # the confidence that halts is about next tokens, which this model does not predict
        self._aux_loss: Tensor | None = None

    def forward(  # type: ignore[override]  # a score is no ModelOutput: nothing that asks for logits can use this model
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Scores (S,) fp32 of the sequences of input_ids (B, T): its rows, or with segment_ids (B, T; 0 is padding) its segments, in
        row-major order. attention_mask (B, T): 1 real, 0 padding, on either side."""
        out = super().forward(input_ids, attention_mask, segment_ids=segment_ids, output_hidden_states=True, return_logits=False)
        assert out.hidden_states is not None
        self._aux_loss = out.aux_loss
        return self.score_head(_last_states(out.hidden_states, attention_mask if segment_ids is None else segment_ids))

    def take_aux_loss(self) -> Tensor | None:
        """What a mixture of experts adds to the loss of the last forward pass in training; None otherwise, and when taken again."""
        loss, self._aux_loss = self._aux_loss, None
        return loss

    def forget_pass(self) -> None:
        super().forget_pass()
        self._aux_loss = None

    def score(self, texts: Sequence[str | Sequence[dict[str, Any]]], tokenizer: BPETokenizer) -> Tensor:
        """Scores (N,) on the CPU of conversations (lists of messages that end with the assistant's), or of texts as they stand.

        Of what exceeds the context the beginning is cut. Raises ValueError for an empty text, a conversation that does not end with
        an answer, and a tokenizer with more tokens than the model.
        """
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the reward model only {self.config.vocab_size}")
        rows = [_text_ids(text, number, tokenizer) for number, text in enumerate(texts, start=1)]
        return self.score_ids(rows, tokenizer.pad_token_id)

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]], pad_id: int = 0) -> Tensor:
        """Scores (N,) on the CPU of token rows, each of at least one token, in evaluation mode; rows of like length share a batch."""
        kept = [list(row)[-self.config.max_position_embeddings :] for row in rows]
        scores = torch.zeros(len(kept))
        waiting = sorted(range(len(kept)), key=lambda n: -len(kept[n]))
        training = self.training
        self.eval()
        while waiting:
            T = len(kept[waiting[0]])
            count = max(1, SCORING_TOKENS // T)
            numbers, waiting = waiting[:count], waiting[count:]
            ids = torch.tensor([kept[n] + [pad_id] * (T - len(kept[n])) for n in numbers], device=self.device)
            real = torch.tensor([[1] * len(kept[n]) + [0] * (T - len(kept[n])) for n in numbers], device=self.device)
            scores[numbers] = self(ids, segment_ids=real).cpu()
        self.train(training)
        return scores

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **parts: Any
    ) -> RewardModel:
        """Read a reward model, ours or a ForSequenceClassification folder of transformers with one label; or any language model, whose
        head is then replaced by a score of zero. parts: as in SmartHaoAI.from_pretrained."""
        from model.checkpoint import find_model, load_pretrained, open_weights

        folder = find_model(path)
        model = load_pretrained(folder, device, dtype, make=cls, source=_ScoreWeights(open_weights(folder)), **parts)
        assert isinstance(model, cls)
        return model


create_reward_model = RewardModel.from_pretrained


def check_same_vocabulary(policy: BPETokenizer, reward: BPETokenizer, reward_dir: str | Path = "the reward model") -> None:
    """Raises ValueError unless the reward model reads token ids and conversations as the policy writes them."""
    if different := policy.first_difference(reward):
        raise ValueError(
            f"{reward_dir} has another vocabulary than the policy ({reward.vocab_size:,} tokens against {policy.vocab_size:,}; the first "
            f"difference is id {different[0]}): train a reward model from a checkpoint of the policy's family, "
            "`python -m train.train_reward model_dir=...`"
        )
    if policy.chat_template != reward.chat_template:
        raise ValueError(f"{reward_dir} writes conversations with another chat template than the policy; train it from the policy's family")


class _ScoreWeights:
    """The weights of a checkpoint as those of a reward model: without a language-model head, and with a score of zeros where it has
    none."""

    def __init__(self, source: WeightSource) -> None:
        self._source, self.file = source, source.file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: shape for name, shape in self._source.shapes().items() if name != "lm_head.weight"}
        width = shapes.get("model.embed_tokens.weight", (0, 0))[-1]
        labels = shapes.setdefault(SCORE, (1, width))[0]
        if labels != 1:
            raise ValueError(f"{self.file}: {SCORE} has {labels} rows: a classifier with {labels} labels is no reward model, which has one")
        return shapes

    def tensor(self, name: str) -> Tensor:
        return torch.zeros(self.shapes()[name]) if name == SCORE and SCORE not in self._source.shapes() else self._source.tensor(name)


def _last_states(hidden: Tensor, marks: Tensor | None) -> Tensor:
    """States of the last real token of each sequence: hidden (B, T, C), marks (B, T) segment numbers or None -> (S, C)."""
    if marks is None:
        return hidden[:, -1]
    return hidden[(marks > 0) & (marks != F.pad(marks[:, 1:], (0, 1)))]


def _text_ids(text: str | Sequence[dict[str, Any]], number: int, tokenizer: BPETokenizer) -> list[int]:
    """Ids through the end of the answer, where training reads the score, too."""
    if isinstance(text, str):
        ids = tokenizer.encode(text)
        if not ids:
            raise ValueError(f"text {number} to score is empty")
        return ids
    messages = list(text)
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError(f"conversation {number} to score does not end with the assistant's answer")
    rendered = tokenizer.render(messages)
    return rendered.ids[: rendered.answer_end]
