"""RolloutSource: batches that the policy writes itself. The loop asks for a batch as from any source; when the buffer is used up,
new answers are generated with the current weights, judged, and measured.

Log-probabilities come from the training forward over the same packed rows that the first update sees: at that update every ratio is
exactly 1. The whole buffer is part of the cursor, so that a run that was killed goes on bit for bit.

Shapes: S answers of a rollout or batch, N their tokens (those of an answer together), L tokens of the longest answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import Completion, Engine, SamplingSettings
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train import parallel
from train.config import RolloutConfig
from train.data import Batch, Row, collate
from train.log_probs import LogProbs, completion_log_probs, pad_sequences
from train.memory import out_of_memory, reason_of, release
from train.packing import fit_rows
from train.prompts import Prompt, fingerprint
from train.rewards import Judge
from train.runtime import Precision
from train.sharding import whole

REWARD = "reward"  # the sum that is learned from, among the parts of an answer's reward
LOGGED = "log/"  # extra entries of a batch that only say how its rollout went
FEWER = "fewer_at_once"  # alarm: memory did not suffice, prompts are answered in smaller batches from now on
COUNTERS = ("epoch", "offset", "round", "served", "first_step", "position", "update_kl", "update_tokens", "at_once")
RATIO_TOLERANCE = 1e-3  # beyond it the first update does not start from the policy that wrote the answers
Alarm = Callable[[int, str, dict[str, Any]], None]
ReferenceLogProbs = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Sampled:
    """One answer of a rollout, as JSON values."""

    prompt: int
    """Number of its prompt."""
    start: int
    """Where the answer begins in `ids`."""
    ids: list[int]
    """Prompt and answer."""
    finished: bool
    parts: dict[str, float] = field(default_factory=dict)
    """What rules and reward model gave, and their sum under "reward"."""
    tokens: dict[str, list[float]] = field(default_factory=dict)
    """Values of each token of the answer: old, reference, values, advantages ..."""

    @property
    def length(self) -> int:
        return len(self.ids) - self.start


class RolloutSource:
    """The base of PPO's and GRPO's sources, which say in `finish_rollout` what the loss needs of each answer."""

    def __init__(
        self,
        tokenizer: BPETokenizer,
        prompts: Sequence[Prompt],
        judge: Judge,
        settings: RolloutConfig,
        *,
        row_length: int,
        batch_size: int,
        accumulation_steps: int = 1,
        passes: int = 1,
        seed: int = 0,
        alarm: Alarm | None = None,
    ) -> None:
        """batch_size: answers of a micro-batch, packed into rows of row_length tokens. passes: how often a rollout is gone through.
        alarm(step, kind, details) is told of trouble. The policy comes by `attach`, before the first batch."""
        self.policy: SmartHaoAI
        self.tokenizer, self.prompts, self.judge, self.settings = tokenizer, prompts, judge, settings
        self.row_length, self.batch_size, self.accumulation_steps = row_length, batch_size, accumulation_steps
        self.passes, self.seed = passes, seed
        self.reference: ReferenceLogProbs | None = None
        """Log-probabilities (N,) under the frozen model for a batch's inputs, when there is one."""
        self.alarm: Alarm = alarm or (lambda step, kind, details: None)
        self.precision: Precision | None = None
        """Set when the run's precision is known."""
        self.fingerprint = fingerprint(prompts)
        self.epoch = self.offset = self.round = self.served = self.first_step = self.position = 0
        self.samples: list[Sampled] = []
        self.diagnostics: dict[str, float] = {}
        self.update_kl, self.update_tokens = 0.0, 0.0
        self.stop_kl = 0.0
        """Nats per token that an update may move the policy before new answers are asked for; 0: no limit."""
        self.alarm_kl = math.inf
        """Nats per token from the reference beyond which there is an alarm."""
        self.learning = False
        """Whether the batches served since the state was set are learned from: not before the first, nor in a trial that was taken back."""
        self.trouble: list[tuple[str, dict[str, Any]]] = []
        """What the next update is alarmed of."""
        self.at_once = max(1, settings.batch_size // settings.samples)
        """Prompts that are answered together; fewer where memory asks for it."""
        self.parts: Callable[[Batch], list[Batch]] = lambda batch: [batch]
        """The passes that a batch is learned in. The loop sets it."""
        self._generated: dict[tuple[int, int], list[tuple[int, Completion]]] = {}

    def attach(self, policy: SmartHaoAI) -> None:
        """Give the source the model that answers and learns."""
        self.policy = policy

    # ------------------------------------------------------------------ what the loop calls

    def next_batch(self, progress: float) -> Batch:
        """`progress` changes nothing here."""
        if self.served % self.accumulation_steps == 0:
            self._stop_early()
        if self.position >= self.passes * self._batches_per_pass():
            self._new_rollout()
        number, place = divmod(self.position, self._batches_per_pass())
        batch = self.make_batch(self._layout(number, place))
        self.position += 1
        self.served += 1
        self.learning = True
        return batch

    def rows_per_epoch(self) -> float:
        """Answers in one pass over the prompts, each counted as often as it is learned from."""
        return float(len(self.prompts) * self.settings.samples * self.passes)

    def state_dict(self) -> dict[str, Any]:
        self._moved()
        kept = {name: getattr(self, name) for name in (*COUNTERS, "diagnostics", "fingerprint")}
        return {**kept, "samples": [dict(vars(sample)) for sample in self.samples]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the prompts are not those of the run."""
        state = dict(state)
        if state.pop("fingerprint") != self.fingerprint:
            raise ValueError("the prompts are not those that this run began with: put data.prompt_file back, or start a new out_dir")
        self.samples = [Sampled(**sample) for sample in state.pop("samples")]
        self.at_once = min(self.at_once, state.pop("at_once", self.at_once))  # what memory does not allow stays so
        vars(self).update(state)
        self._moved(counted=parallel.is_first())
        self.learning = False
        self._forget_trouble()

    def renew(self) -> None:
        """The policy has changed in another way than by learning: what it wrote is not learned from any more."""
        self.position = self.passes * self._batches_per_pass()
        self.update_kl = self.update_tokens = 0.0

    # ------------------------------------------------------------------ what the losses call

    @property
    def step(self) -> int:
        """Number of the optimiser step that is being prepared or taken, from 1."""
        return max(self.served - 1, 0) // self.accumulation_steps + 1

    def note_update(self, log_probs: Tensor, old_log_probs: Tensor, first: bool) -> Tensor:
        """The probability ratios (N,) of an update, watched: alarm where the first one is not 1, and the distance for `stop_kl`.

        The rollout's own trouble is told here, too: of a trial of the loop that is taken back, nothing must be heard."""
        with torch.no_grad():
            log_ratio = log_probs.detach() - old_log_probs
            ratio = log_ratio.exp()
            self.update_kl += float((ratio - 1 - log_ratio).sum())
            self.update_tokens += len(ratio)
            worst = float((ratio - 1).abs().max()) if first and len(ratio) else 0.0
            if worst > RATIO_TOLERANCE:
                self.trouble.append(("ratio", {"largest_deviation": worst}))
        if self.learning:
            for kind, details in self.trouble:
                self.alarm(self.step, kind, details)
            self.trouble.clear()
        self._forget_trouble()
        return ratio

    def _forget_trouble(self) -> None:
        """What a trial met is not told, unless it lasts."""
        self.trouble = [(kind, details) for kind, details in self.trouble if kind == FEWER]

    # ------------------------------------------------------------------ rollouts

    def finish_rollout(self) -> None:
        """Put into each answer's `tokens` what the loss needs; the `old` (and `reference`) log-probabilities are there, as are the
        diagnostics."""
        raise NotImplementedError

    def collect(self) -> list[Sampled]:
        """Judged answers for one rollout."""
        return self.answer(self.take_prompts(self.settings.prompts), 0)

    def measure(self, samples: list[Sampled], result: LogProbs) -> None:
        """Keep more of the forward pass that measured these answers; nothing here."""

    def _new_rollout(self) -> None:
        with whole(self.policy):
            self._fill_buffer()

    def _fill_buffer(self) -> None:
        self.round += bool(self.samples)
        self.samples = []  # the old rollout is not kept beside the new one
        self.samples = self.collect()
        self.position, self.first_step = 0, self.served // self.accumulation_steps
        self.policy.train()  # the mode of the update: some kernels are chosen by it
        with torch.no_grad(), self._autocast():
            for place in range(self._batches_per_pass()):
                self._measure(self._layout(0, place))
        self._share_measured()
        self.policy.take_expert_load()  # measuring is not learning
        self.diagnostics = self._diagnostics()
        self.finish_rollout()
        per_token = self.diagnostics.get("kl", 0.0) / max(self.diagnostics["length"], 1.0)
        if per_token > self.alarm_kl:
            self.trouble.append(("kl_runaway", {"kl_per_token": per_token, "limit": self.alarm_kl}))
        rewards = [sample.parts[REWARD] for sample in self.samples]
        if len(rewards) > 1 and min(rewards) == max(rewards):
            self.trouble.append(("rewards_collapsed", {"reward": rewards[0]}))

    def take_prompts(self, count: int) -> list[int]:
        """The next `count` prompts of the shuffled order, different ones as long as there are as many."""
        taken: list[int] = []
        while len(taken) < count:
            order = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch])).permutation(len(self.prompts))
            more = order[self.offset : self.offset + count - len(taken)].tolist()
            taken += more
            self.offset += len(more)
            if self.offset >= len(order):
                self.epoch, self.offset = self.epoch + 1, 0
        return taken

    def answer(self, numbers: Sequence[int], attempt: int) -> list[Sampled]:
        """`samples` judged answers to each of these prompts, those to one prompt together."""
        # Kept for the case that the loop tries a batch and then begins anew: generating is the dear part.
        kept = {key: pairs for key, pairs in self._generated.items() if key[0] == self.round}
        pairs = kept.get((self.round, attempt)) or self._generate(numbers, attempt)
        self._generated = {**kept, (self.round, attempt): pairs}
        samples = [
            Sampled(number, len(self.prompts[number].ids), [*self.prompts[number].ids, *reply.ids], reply.finish_reason == "stop")
            for number, reply in pairs
        ]
        scores = self.judge([(self.prompts[number], reply) for number, reply in pairs])
        for sample, parts in zip(samples, scores, strict=True):
            sample.parts = parts
        return samples

    def _generate(self, numbers: Sequence[int], attempt: int) -> list[tuple[int, Completion]]:
        repeats = self.settings.samples
        # Every answer of the run has a random stream of its own: (seed, rollout, attempt) here, place and sample in the engine.
        seed = int(np.random.Philox(key=[self.seed + 1, self.round * 64 + attempt]).random_raw() >> np.uint64(2))
        sampling = SamplingSettings(
            self.settings.max_new_tokens, self.settings.temperature, top_k=0, top_p=1.0, n=repeats, seed=seed
        )  # a cut distribution would not be the one whose log-probabilities are learned from
        asked = [self.prompts[number].ids for number in numbers]
        answers = self._answers(asked, sampling)
        # Batches are dealt to the processes as they are: answers are the same, whatever the number of processes.
        groups = {place: [Completion(**reply) for reply in replies] for part in parallel.gathered(answers) for place, replies in part}
        return [(number, reply) for place, number in enumerate(numbers) for reply in groups[place]]

    def _answers(self, asked: Sequence[Sequence[int]], sampling: SamplingSettings) -> list[list[Any]]:
        """This process's answers: place in `asked`, and the completions' fields. Where memory asks for it fewer prompts are answered at
        once, which changes no answer but for rounding."""
        own = parallel.rank(), parallel.size()
        while True:
            try:
                with self._autocast():
                    batches = Engine(self.policy, self.tokenizer).generate_many(asked, sampling, self.at_once, own)
                    return [[place, [vars(reply) for reply in replies]] for batch in batches for place, replies in batch]
            except (RuntimeError, MemoryError) as error:
                # Several processes deal prompts by their number at once, which has to be the same in all.
                if not out_of_memory(error) or self.at_once == 1 or parallel.size() > 1:
                    raise
                reason = reason_of(error)
            release(str(self.policy.device))  # here, not above: the error holds what the attempt computed
            self.trouble.append((FEWER, {"prompts": self.at_once // 2, "before": self.at_once, "reason": reason}))
            self.at_once //= 2

    def _measure(self, layout: list[list[int]]) -> None:
        """Old and reference log-probabilities of these answers, by the forward pass that the update will make."""
        batch = self._pack(layout)
        batch.entries, batch.cuts = {"rows": [1] * len(layout)}, self.cuts(layout)
        batch.extra["rows"] = torch.arange(len(layout))
        own = parallel.share(batch, parallel.rank(), parallel.size())  # the rows of this process in the first update, in the same shape
        if own is None:
            return
        for part in self.parts(own):
            samples = [self.samples[number] for row in part.extra["rows"].tolist() for number in layout[row]]
            inputs = part.to(str(self.policy.device)).inputs
            result = completion_log_probs(self.policy, inputs, self.settings.temperature, entropy=True)
            self.store(samples, "old", result.values)
            assert result.entropy is not None
            self.store(samples, "entropy", result.entropy)
            if self.reference is not None:
                self.store(samples, "reference", self.reference(inputs))
            self.measure(samples, result)

    def _share_measured(self) -> None:
        """Every process gets what the others have measured."""
        if parallel.size() > 1:
            for part in parallel.gathered([[number, sample.tokens] for number, sample in enumerate(self.samples) if sample.tokens]):
                for number, tokens in part:
                    self.samples[number].tokens = tokens

    @staticmethod
    def store(samples: Sequence[Sampled], name: str, values: Tensor) -> None:
        """Give each answer its part of values (N,)."""
        pieces = values.float().cpu().split([sample.length for sample in samples])
        for sample, piece in zip(samples, pieces, strict=True):
            sample.tokens[name] = piece.tolist()

    @staticmethod
    def padded(samples: Sequence[Sampled], name: str) -> tuple[Tensor, Tensor]:
        """A token value of all answers as rows (S, L) with zeros behind, and the mask (S, L) of what is real."""
        flat = torch.tensor([value for sample in samples for value in sample.tokens[name]])
        return pad_sequences(flat, torch.tensor([sample.length for sample in samples]))

    # ------------------------------------------------------------------ batches

    def _batches_per_pass(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def _layout(self, number: int, place: int) -> list[list[int]]:
        """The rows of micro-batch `place` in pass `number`: numbers of the answers that are packed into each."""
        random = np.random.Generator(np.random.Philox(key=[self.seed + 2, self.round * 1_000_003 + number]))
        chosen = random.permutation(len(self.samples))[place * self.batch_size : (place + 1) * self.batch_size]
        pieces = [(int(sample), 0, len(self.samples[sample].ids)) for sample in chosen]
        return [[sample for sample, _, _ in row] for row in fit_rows(pieces, self.row_length, len(pieces), random)]

    def _pack(self, layout: list[list[int]]) -> Batch:
        rows = []
        for numbers in layout:
            row = Row()
            for sample in (self.samples[number] for number in numbers):
                row.add(np.asarray(sample.ids), np.arange(len(sample.ids)) >= sample.start)
            rows.append(row)
        return collate(rows, self.tokenizer.pad_token_id, limit=self.row_length)

    def make_batch(self, layout: list[list[int]]) -> Batch:
        """The micro-batch of these rows, with the answers' token values (N,) in `extra` and whether they belong to the first update."""
        samples = [self.samples[number] for row in layout for number in row]
        batch = self._pack(layout)
        batch.weights["sequences"] = float(len(samples))
        lengths = [sum(self.samples[number].length for number in row) for row in layout]
        for name in samples[0].tokens:
            batch.extra[name] = torch.tensor([value for sample in samples for value in sample.tokens[name]])
            batch.entries[name] = lengths
        batch.cuts = self.cuts(layout)
        batch.extra["first"] = torch.tensor(self.served // self.accumulation_steps == self.first_step)
        batch.extra.update({LOGGED + name: torch.tensor(value) for name, value in self.diagnostics.items()})
        return batch

    def cuts(self, layout: list[list[int]]) -> list[int]:
        """As `Batch.cuts`: rows stand for themselves."""
        return list(range(1, len(layout)))

    # ------------------------------------------------------------------ watching

    def _stop_early(self) -> None:
        """Leave the rest of a rollout when the last update has moved too far from the policy that wrote it."""
        kl, tokens = self._moved()
        moved = kl / tokens if tokens else 0.0
        self.update_kl = self.update_tokens = 0.0
        end = self.passes * self._batches_per_pass()
        if self.stop_kl and moved > self.stop_kl and self.position < end:
            self.trouble.append(("kl_stop", {"update_kl": moved, "left_out": end - self.position}))
            self.position = end

    def _moved(self, counted: bool = True) -> list[float]:
        """`update_kl` and `update_tokens` over all processes, which rank 0 then holds for all. counted: whether this process's count."""
        sums = parallel.summed([self.update_kl, self.update_tokens] if counted else [0.0, 0.0])
        self.update_kl, self.update_tokens = sums if parallel.is_first() else (0.0, 0.0)
        return sums

    def _diagnostics(self) -> dict[str, float]:
        """Means over the answers; `kl` is the sum over an answer of log p - log p_reference (k1), `entropy` the mean over tokens."""
        samples = self.samples
        found = {REWARD: [sample.parts[REWARD] for sample in samples], "length": [float(sample.length) for sample in samples]}
        for name in samples[0].parts:
            if name != REWARD:
                found[f"reward_{name}"] = [sample.parts[name] for sample in samples]
        found["finished"] = [float(sample.finished) for sample in samples]
        found["entropy"] = [value for sample in samples for value in sample.tokens["entropy"]]
        if self.reference is not None:
            found["kl"] = [
                sum(old - ref for old, ref in zip(sample.tokens["old"], sample.tokens["reference"], strict=True)) for sample in samples
            ]
        means = {name: sum(values) / len(values) for name, values in found.items()}
        means["reward_std"] = float(np.std(found[REWARD]))
        for sample in samples:
            del sample.tokens["entropy"]  # the loss computes its own
        return means

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.precision is None else self.precision.autocast()
