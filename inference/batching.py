"""Continuous batching: requests from any thread join and leave the running batch between two steps.

    with Batcher(Engine(model, tokenizer)) as batcher:          # a thread steps while there is work
        request = batcher.submit(ids, SamplingSettings())
        for piece in request.stream(): print(piece.text, end="")

One step prefills at most `prefill_block` tokens of the requests that wait and writes one token of every reply, so that a long prompt
does not hold up the replies of others. Without `start`, whoever reads a request steps by himself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Condition, Lock, Thread

import torch

from inference.decoding import Batch, Completion, Piece, Prefill, Row, rest
from inference.engine import Engine, token_ids
from inference.prefixes import Prefix, PromptCache
from inference.sampling import SamplingSettings
from model.device import total_memory

PATIENCE = 32
"""After so many later requests were taken before it, a request is the next one, whatever its priority."""
UNKNOWN_MEMORY = 8 * 2**30  # assumed where the system does not tell


class QueueFull(RuntimeError):
    """Too many requests wait already: try again later."""


class RequestFailed(RuntimeError):
    """A step that this request took part in went wrong; `__cause__` is the error itself."""


@dataclass
class Usage:
    """What a request took so far."""

    prompt_tokens: int
    reused_tokens: int = 0
    """Prompt tokens that were not computed, as their keys and values were there."""
    completion_tokens: int = 0
    """Of all samples together."""
    queue_seconds: float | None = None
    """Until the prompt was begun."""
    first_token_seconds: float | None = None


class Request:
    """One prompt and its settings.n replies. Read it once: with `stream` or `result`."""

    def __init__(self, batcher: Batcher, number: int, rows: list[Row], priority: int) -> None:
        self.id, self.rows, self.priority = number, rows, priority
        self.usage = Usage(len(rows[0].prompt))
        self.error: Exception | None = None
        self.done = False
        """All replies have ended, in whatever way; nothing is computed for it any more."""
        self.cancelled = False
        self.overtaken = 0
        """Later requests that were taken before this one."""
        self.epoch = 0
        """That of the batcher's prefixes when its prompt was begun."""
        self._batcher = batcher
        self._open_replies = len(rows)
        self._begun = time.perf_counter()
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()

    @property
    def columns(self) -> int:
        """Most tokens that a reply and its prompt may reach."""
        return len(self.rows[0].prompt) + self.rows[0].limit

    def stream(self) -> Iterator[Piece]:
        """The replies as they come, pieces of different samples in turns (`Piece.sample`). Closing the iterator cancels the request.

        Raises RequestFailed when a step went wrong.
        """
        try:
            while (piece := self._next()) is not None:
                yield piece
            if self.error is not None:
                raise self.error
        finally:
            self._batcher.cancel(self)

    def result(self) -> list[Completion]:
        """Wait for the end; returns the replies. Raises like `stream`."""
        for _ in self.stream():
            pass
        return [row.completion for row in self.rows]

    def _next(self) -> Piece | None:
        while True:
            try:
                piece = self._pieces.get(block=self._batcher.started)
            except Empty:
                self._batcher.step()
                continue
            if piece is None:
                self._pieces.put(None)  # for whoever reads again
            return piece

    def begin(self, reused: int, epoch: int) -> None:
        """The prompt is being computed from now on."""
        self.usage.reused_tokens, self.usage.queue_seconds = reused, time.perf_counter() - self._begun
        self.epoch = epoch

    def deliver(self, pieces: Sequence[Piece]) -> None:
        """Hand pieces to the reader; after the last reply's last one the request is done."""
        if self.usage.first_token_seconds is None:
            self.usage.first_token_seconds = time.perf_counter() - self._begun
        for piece in pieces:
            self.usage.completion_tokens += len(piece.ids)
            self._pieces.put(piece)
            self._open_replies -= piece.finish_reason is not None
        if not self._open_replies:
            self._close()

    def end(self, error: BaseException | None = None) -> None:
        """End what is not done yet: cancelled, or failed with an error."""
        if self.done:
            return
        if error is not None:
            self.error = RequestFailed(f"request {self.id} was given up: {error}")
            self.error.__cause__ = error
        for row in self.rows:
            if not row.done:
                channel, words = (row.finish("cancelled") or [(row.channel, "")])[-1]
                if error is None:
                    self._pieces.put(Piece(words, channel, [], "cancelled", sample=row.sample))
        self._close()

    def _close(self) -> None:
        self.done = True
        self._pieces.put(None)


class Batcher:
    """Serves many requests with one model. `submit` and `cancel` may be called from any thread.

    max_rows: replies that are written at once. max_tokens: most cells of the cache, its rows times the longest of the rows (prompt and
    max_new_tokens); None: what fits in a quarter of the machine's memory, or in half of an accelerator's free one. max_waiting: requests in
    the queue. kept_prefixes: ended replies whose keys and values stay, for requests that begin with the same tokens; max_tokens of them at
    most.

    Requests are taken in the order of their priority (larger first), then of their arrival; the first one is never passed over for one
    that fits better, and none is overtaken more than PATIENCE times.
    """

    def __init__(
        self,
        engine: Engine,
        max_rows: int = 32,
        max_tokens: int | None = None,
        prefill_block: int = 256,
        max_waiting: int = 256,
        kept_prefixes: int = 8,
    ) -> None:
        lowest = {"max_rows": 1, "prefill_block": 1, "max_waiting": 1, "kept_prefixes": 0, "max_tokens": 1}
        given = {"max_rows": max_rows, "prefill_block": prefill_block, "max_waiting": max_waiting, "kept_prefixes": kept_prefixes}
        for name, value in {**given, "max_tokens": 1 if max_tokens is None else max_tokens}.items():
            if value < lowest[name]:
                raise ValueError(f"{name} must be at least {lowest[name]}, got {value}")
        self.engine, self.max_rows, self.prefill_block, self.max_waiting = engine, max_rows, prefill_block, max_waiting
        self.max_tokens = affordable_tokens(engine) if max_tokens is None else max_tokens
        self.prefixes = PromptCache(kept_prefixes, self.max_tokens)
        self._batch = Batch(engine)
        self._prefill: Prefill | None = None
        self._cohort: list[Request] = []
        """The requests whose prompts are in the prefill."""
        self._owners: dict[Row, Request] = {}
        """Of the rows in the batch."""
        self._waiting: list[Request] = []
        self._count = 0
        self._stepping = Lock()
        self._wake = Condition()
        """Guards the queue and the thread; told when there is something to do."""
        self._thread: Thread | None = None
        self._stopping = False

    # ------------------------------------------------------------------------------------------------------------ from any thread

    def submit(self, ids: Sequence[int], settings: SamplingSettings, priority: int = 0) -> Request:
        """Queue a prompt (token ids). Raises ValueError for one that cannot be answered, QueueFull when too many wait."""
        if settings.num_beams > 1:
            raise ValueError(f"beam search is a batch of its own (num_beams={settings.num_beams}): call Engine.generate")
        prompt = token_ids(ids)
        room = self.engine.room(prompt, settings)
        if settings.n > self.max_rows:
            raise ValueError(f"n={settings.n} replies are more than the batch has rows: ask for at most {self.max_rows}")
        cells = settings.n * (len(prompt) + room)
        if cells > self.max_tokens:
            raise ValueError(
                f"the request needs {cells} tokens of cache ({settings.n} replies of {len(prompt)} + {room}), the batch has "
                f"{self.max_tokens}: lower max_new_tokens or n, or raise the batcher's max_tokens"
            )
        rows = [Row(self.engine, prompt, settings, sample, sample) for sample in range(settings.n)]
        with self._wake:
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already: try again later")
            self._count += 1
            request = Request(self, self._count, rows, priority)
            if rows[0].done:  # the prompt fills the context
                request.deliver([Piece("", row.channel, [], "length", sample=row.sample) for row in rows])
            else:
                self._waiting.append(request)
                self._wake.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request that is not done; its row is free at once, or after the step that is being computed."""
        if request.done:
            return
        request.cancelled = True
        with self._wake:
            if request in self._waiting:
                self._waiting.remove(request)
                request.end()
        if self._stepping.acquire(blocking=False):
            try:
                with torch.inference_mode():
                    self._let_go()
            finally:
                self._stepping.release()

    def start(self) -> Batcher:
        """Step in a thread of its own while there is work."""
        with self._wake:
            if self._thread is None:
                self._stopping = False
                self._thread = Thread(target=self._serve, name="batcher", daemon=True)
                self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread and every request that is open (finish_reason "cancelled")."""
        with self._wake:
            self._stopping, thread = True, self._thread
            self._wake.notify_all()
        if thread is not None:
            thread.join()
        with self._wake:
            self._thread = None
            open_requests = [*self._waiting]
        for request in [*open_requests, *self._cohort, *dict.fromkeys(self._owners.values())]:
            self.cancel(request)

    def __enter__(self) -> Batcher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def started(self) -> bool:
        return self._thread is not None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that are taken, those of prompts in the prefill included."""
        return len(self._batch.rows) + sum(len(request.rows) for request in self._cohort if not request.done)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._cohort or self._batch.rows)

    # -------------------------------------------------------------------------------------------------------- by one thread at a time

    def step(self) -> bool:
        """One block of prefill and one token for every reply. False: there is nothing left to do."""
        with self._stepping, self.engine.evaluating(), torch.inference_mode():
            try:
                self._advance_prefill()
            except BaseException as error:
                self._fail(self._cohort, error)
                self._prefill, self._cohort = None, []
                if not isinstance(error, Exception):
                    raise
            try:
                self._decode()
            except BaseException as error:
                self._fail(list(self._owners.values()), error)
                # Half a step was computed, perhaps for want of memory: begin anew, with nothing held.
                self._batch, self._owners = Batch(self.engine), {}
                self.prefixes.clear()
                if not isinstance(error, Exception):
                    raise
            return self.busy

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self.busy)
                if self._stopping:
                    return
            self.step()

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        for request in requests:
            request.end(error)

    def _advance_prefill(self) -> None:
        if self._prefill is None:
            self._begin_prefill()
        prefill = self._prefill
        if prefill is None or not prefill.advance(max(1, self.prefill_block // len(self._cohort))):
            return
        self._batch.join(prefill, [[] if request.done else request.rows for request in self._cohort])
        self._owners.update((row, request) for request in self._cohort if not request.done for row in request.rows)
        self._prefill, self._cohort = None, []

    def _begin_prefill(self) -> None:
        found = self._next_requests()
        if not found:
            return
        self._cohort = [request for request, _ in found]
        own = False
        for _, prefix in found:
            if prefix is not None:
                own = self.prefixes.use(prefix) and len(found) == 1
        room = max(request.rows[0].limit for request in self._cohort)
        prompts = [request.rows[0].prompt for request in self._cohort]
        self._prefill = Prefill(self.engine, prompts, [prefix for _, prefix in found], room, own)
        for request, reused in zip(self._cohort, self._prefill.reused, strict=True):
            request.begin(reused, self.prefixes.epoch)

    def _next_requests(self) -> list[tuple[Request, Prefix | None]]:
        """Take the first request out of the queue, and with it others with about as much to compute, a block of tokens in all."""
        found: list[tuple[Request, Prefix | None]] = []
        with self._wake:
            line = sorted(self._waiting, key=lambda request: (request.overtaken < PATIENCE, -request.priority, request.id))
            shared = [row for row, request in self._owners.items() if request.epoch == self.prefixes.epoch] if line else []
            running = self._batch.running(shared)
            for request in line[: self.max_rows]:
                if not self._fits([*(other for other, _ in found), request]):
                    break
                prefix = self.prefixes.find(request.rows[0].prompt, self.engine, running)
                if self._alike([*found, (request, prefix)]):
                    found.append((request, prefix))
            for request, _ in found:
                self._waiting.remove(request)
            for request in self._waiting:
                request.overtaken += sum(request.id < other.id for other, _ in found)
        return found

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Whether there are rows and cells for these requests beside those that run."""
        rows = len(self._batch.rows) + sum(len(request.rows) for request in requests)
        columns = max(request.columns for request in [*requests, *self._owners.values()])
        return rows <= self.max_rows and rows * columns <= self.max_tokens

    def _alike(self, found: Sequence[tuple[Request, Prefix | None]]) -> bool:
        """Whether these prompts should be computed together: little of it twice, and no more than one block."""
        if len(found) == 1:
            return True
        prompts = [(request.rows[0].prompt, prefix) for request, prefix in found]
        rests = [rest(*pair) for pair in prompts]
        longest = max(rests)
        if longest * len(found) > self.prefill_block or longest > 2 * min(rests) + 16:
            return False
        # All are fed as many tokens: of the others' prefixes, less is used than there is.
        return all(longest >= len(prompt) or (prefix and prefix.reaches(len(prompt) - longest)) for prompt, prefix in prompts)

    def _decode(self) -> None:
        self._let_go()
        for row, pieces in self._batch.choose():
            request = self._owners[row]
            if row.error is not None:
                request.end(row.error)
            elif not request.done:
                request.deliver(pieces)
        self._let_go()
        self._batch.feed()
        self._let_go()  # whoever was cancelled meanwhile

    def _let_go(self) -> None:
        """Free the rows of replies that have ended, and of requests that were cancelled."""
        for request in [*self._cohort, *self._owners.values()]:
            if request.cancelled:
                request.end()
        if self._cohort and all(request.done for request in self._cohort):
            self._prefill, self._cohort = None, []
        gone = [row for row in self._batch.rows if row.done]
        for row in gone:
            request = self._owners.pop(row)
            kept = self._batch.keep(row) if row.sample == 0 and request.error is None and self.prefixes.size else None
            if kept is not None:
                self.prefixes.put(*kept, request.epoch)
        if gone:
            self._batch.leave(gone)


def affordable_tokens(engine: Engine) -> int:
    """Tokens whose keys and values fill half of an accelerator's free memory, else a quarter of the machine's; one context at least."""
    size = next(engine.model.parameters()).element_size()
    per_token = engine.config.account().kv_cache_bytes(engine.context, bytes_per_value=size) / engine.context
    if engine.device.type == "cuda":
        memory = torch.cuda.mem_get_info(engine.device)[0] / 2
    else:
        memory = (total_memory() or UNKNOWN_MEMORY) / 4
    return max(engine.context, int(memory / per_token))
