"""`vllm serve` as a process of its own, and the openai client that asks it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

PROMPT = "The module defines a class that"
START_SECONDS = 600  # a limit for a server that never comes up, not a measure
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


class Server:
    """A running `vllm serve MODEL`, given as a line of a shell."""

    def __init__(self, line: str, log: Path, environment: dict[str, str], *options: str) -> None:
        import openai

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program, *words = shlex.split(line)
        self.model, self.log = words[1], log
        command = [str(Path(sys.executable).with_name(program)), *words, "--host", "127.0.0.1", "--port", str(port)]
        usual = ["--max-model-len", "128", "--enforce-eager"]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [*command, *usual, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **SMALL, **environment},
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
