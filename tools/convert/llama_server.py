"""llama.cpp's own server in a child process, to run a GGUF file and compare. Needs xllamacpp (extra `parity`).

The native library prints, and an unusable file can take its process down: neither happens to the program that uses this module.
`python llama_server.py FILE CONTEXT` is the child: it serves on a free local port until its standard input closes.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

END_TIMEOUT, REQUEST_TIMEOUT = 30, 600  # seconds


def installed() -> str | None:
    """Name and version of the runtime; None where it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    from importlib.metadata import version

    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


class LlamaServer:
    """A context manager: `with LlamaServer(file, context) as server: server.tokenize("...")`.

    fp32 cache and no flash attention, so that an F32 file gives fp32 results. ValueError with the library's last words when the
    file cannot be loaded.
    """

    def __init__(self, file: str | Path, context: int) -> None:
        self.file, self.context = Path(file).resolve(), context
        self._letter: int | None = None

    def __enter__(self) -> LlamaServer:
        self._noise = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self.file), str(self.context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
        )
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(b"serving "):
                self._port = int(line.split()[1])
                return self
        self._child.wait(END_TIMEOUT)
        error = ValueError(f"llama.cpp cannot load {self.file}: {self._last_words()}")
        self._close()
        raise error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._noise.close()

    def _last_words(self) -> str:
        self._noise.seek(0)
        lines = self._noise.read().decode("utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
        return " | ".join(errors[:2] or lines[-2:]) or f"the process ended with code {self._child.returncode}"

    def post(self, path: str, data: dict[str, Any]) -> dict[str, Any]:
        """One request. ValueError with the server's answer when it refuses, or when the process is gone."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(data), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read().decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"llama.cpp broke down while running {self.file}: {self._last_words()}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"llama.cpp refused {path} for {self.file}: {body[:300]}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text, without BOS."""
        return list(self.post("/tokenize", {"content": text, "add_special": False, "parse_special": parse_special})["tokens"])

    def next_log_probs(self, ids: list[int], count: int) -> dict[int, float]:
        """The `count` most likely tokens after `ids` with their log-probabilities in nats; count = vocabulary gives all."""
        # A sampled token that ends the reply, or part of a character, would leave the answer without probabilities: a plain letter
        # is forced. The probabilities themselves are those before any sampling.
        if self._letter is None:
            self._letter = self.tokenize("a")[-1]
        answer = self._complete(ids, 1, n_probs=count, logit_bias=[[self._letter, 1e6]])
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """At most `count` most likely next tokens; a stop token of the file ends them, as the last one."""
        return [int(token) for token in self._complete(ids, count, return_tokens=True)["tokens"]]

    def _complete(self, ids: list[int], tokens: int, **settings: Any) -> dict[str, Any]:
        return self.post("/completion", {"prompt": ids, "n_predict": tokens, "temperature": 0, "top_k": 1, **settings})

    def apply_template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any) -> str:
        """The prompt that the file's chat template makes of a conversation, opened for the assistant's answer."""
        data: dict[str, Any] = {"messages": messages, "chat_template_kwargs": variables}
        return str(self.post("/apply-template", {**data, "tools": tools} if tools else data)["prompt"])


def serve(file: str, context: int) -> None:
    """Load the file, print `serving PORT`, and answer until standard input closes."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library itself prints must not fill the pipe that only our line is read from
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = context, 1
    params.warmup, params.fit_params, params.ui = False, False, False
    params.n_gpu_layers = 0
    # Its threads wait for each other by spinning: more of them than idle cores are many times slower than one.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print("serving", server.listening_address.rsplit(":", 1)[1], file=answer, flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
