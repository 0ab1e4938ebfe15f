"""`vllm serve` as a process, asked over loopback by the openai client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")
openai = pytest.importorskip("openai", reason="needs vLLM: scripts/test-vllm")

PROMPT = "The module defines a class that"
START_SECONDS = 240  # a limit for a server that never comes up, not a measure


class Server:
    """A running `vllm serve FOLDER`."""

    def __init__(self, folder: Path, log: Path, environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.model, self.log = str(folder), log
        command = Path(sys.executable).with_name("vllm")
        options = [
            "--dtype",
            "float32",
            "--max-model-len",
            "128",
            "--enforce-eager",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [command, "serve", folder, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
            )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
            time.sleep(0.25)
        self.process.kill()
        raise AssertionError(log.read_text()[-4000:])

    def complete(self, **options: Any) -> Any:
        usual = {"model": self.model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        return self.client.completions.create(**usual | options)


@pytest.fixture(scope="module")
def server(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **offline, "HF_HUB_OFFLINE": "1"}
    running = Server(quantized("demo", "gptq"), tmp_path_factory.mktemp("server") / "log", environment)
    yield running
    running.process.kill()
    running.process.wait()


def test_the_log_says_what_computes(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "apex4 computes" in line]
    assert len(lines) == 1 and "PyTorch operations on cpu" in lines[0]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    whole = server.complete().choices[0].text
    pieces = [chunk.choices[0].text for chunk in server.complete(stream=True)]
    assert len(pieces) > 8 and "".join(pieces) == whole
    assert len(set(whole.split())) > 4


def test_twenty_requests_at_once(server: Server) -> None:
    lengths = [4 + index % 7 for index in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda length: server.complete(max_tokens=length, seed=length), lengths))
    assert [answer.usage.completion_tokens for answer in answers] == lengths
    longest = max(answers, key=lambda answer: answer.usage.completion_tokens).choices[0].text
    # Greedy and of one prompt: each is the beginning of the longest.
    assert all(longest.startswith(answer.choices[0].text) for answer in answers)


def test_bad_requests_are_refused_and_the_server_goes_on(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="128"):
        server.complete(max_tokens=800)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.complete(model="another")
    assert server.complete(max_tokens=2).usage.completion_tokens == 2


def test_sigterm_ends_it(server: Server) -> None:  # the last of this module
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
