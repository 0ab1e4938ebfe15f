"""What scripts/bench/rivals and scripts/bench/quantize share: processes that are measured, and the windows they get.

Importing this imports no torch: on Linux a child's peak resident set starts at that of the process that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ROOT / ".venv-rivals"  # an environment of their own
RIVALS_WORKER = ROOT / "scripts" / "bench" / "rivals_worker.py"
NOTE_WIDTH = 160


def run_process(
    python: Path, *arguments: object, environment: Mapping[str, str], folder: Path | None = None
) -> dict[str, Any]:
    """One process: the JSON of its last line, or the reason why there is none; wall clock and peak memory."""
    started = time.time()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(
                [python, *map(str, arguments)], stdout=out, stderr=err, env=environment, cwd=folder
            )
        except OSError as error:
            return {"error": error.strerror or str(error)}
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.time() - started
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            return {"error": reason(err.read(), process.returncode)}
        result = json.loads(out.read().splitlines()[-1])
    return {"result": result, "started": started, "seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}


def reason(errors: str, code: int) -> str:
    """The line of a failed process's stderr that says most."""
    lines = [line.strip() for line in errors.splitlines() if "Error" in line or line.startswith("apex4: ")]
    return (lines or [f"exit code {code}"])[-1][:NOTE_WIDTH]


def export_windows(
    model: str, file: Path, samples: int, seq_len: int, heldout: bool = True, limit: int | None = None
) -> tuple[Path, int]:
    """Write the token windows of `apex4 quantize` and, if they are wanted, those of `apex4 eval`.

    Returns the model's folder and the number of calibration windows. Imports torch: call it in a process of its own.
    """
    from safetensors.torch import save_file

    from apex4_quant.calib.samples import draw_samples, windows
    from apex4_quant.calib.text import load_text
    from apex4_quant.evaluation.evaluate import EvalSettings
    from apex4_quant.models.source import ModelSource
    from apex4_quant.models.tokenizers import load_tokenizer
    from apex4_quant.quantization.settings import QuantizeSettings

    source = ModelSource(model)
    settings = QuantizeSettings(model=model, samples=samples, seq_len=seq_len, device="cpu").resolve(source)
    encode = load_tokenizer(source.folder).encode
    calibration = draw_samples(
        encode, load_text(settings.calib), settings.samples, settings.seq_len, settings.seed, settings.calib
    )
    tensors = {"calibration": calibration.contiguous()}
    if heldout:
        measured = EvalSettings(model=model)
        length = min(measured.seq_len, source.config.get("max_position_embeddings") or measured.seq_len)
        tensors["heldout"] = windows(encode(load_text(measured.text)), length, measured.text)[:limit].contiguous()
    save_file(tensors, file)
    return source.folder, len(calibration)
