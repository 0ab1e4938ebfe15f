"""`vllm serve` as a process, asked over loopback by the openai client."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .serving import Server

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")
openai = pytest.importorskip("openai", reason="needs vLLM: scripts/test-vllm")


ON_GPU = torch.cuda.is_available()
DEVICE_OPTIONS = (
    ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**28))
    if ON_GPU
    else ("--dtype", "float32")
)


@pytest.fixture(scope="module")
def server(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    line = shlex.join(["vllm", "serve", str(quantized("demo", "gptq"))])
    log = tmp_path_factory.mktemp("server") / "log"
    running = Server(line, log, {"HF_HUB_OFFLINE": "1"}, *DEVICE_OPTIONS)
    yield running
    running.process.kill()
    running.process.wait()


def test_the_log_says_what_computes(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "apex4 computes" in line]
    assert len(lines) == 1 and ("its s8 kernels" if ON_GPU else "PyTorch operations on cpu") in lines[0]


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
