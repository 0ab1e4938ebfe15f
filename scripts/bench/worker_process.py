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
    python: Path, *arguments: object, environment: Mapping[str, str], folder: Path | None = None, whole: bool = False
) -> dict[str, Any]:
    """One process: the JSON of its last line (`whole`: of all it prints), or the reason why there is none; wall clock and
    peak memory."""
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
        result = json.loads(out.read() if whole else out.read().splitlines()[-1])
    return {"result": result, "started": started, "seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}


def reason(errors: str, code: int) -> str:
    """The line of a failed process's stderr that says most."""
    lines = [line.strip() for line in errors.splitlines() if "Error" in line or line.startswith("apex4: ")]
    return (lines or [f"exit code {code}"])[-1][:NOTE_WIDTH]


def export_windows(
    model: str,
    file: Path,
    samples: int,
    seq_len: int,
    heldout: bool = True,
    limit: int | None = None,
    calib: str = "bundled",
    text: str = "heldout",
    seed: int = 0,
    measured_len: int | None = None,
) -> tuple[Path, int]:
    """Write the token windows of `apex4 quantize` and, if they are wanted, those of `apex4 eval` (of `measured_len`).

    Returns the model's folder and the number of calibration windows. Imports torch: call it in a process of its own.
    """
    from safetensors.torch import save_file

    from apex4_quant.calib.samples import windows
    from apex4_quant.calib.text import load_text
    from apex4_quant.evaluation.evaluate import EvalSettings
    from apex4_quant.models.source import ModelSource
    from apex4_quant.models.tokenizers import beginning_of, encode_text, load_tokenizer
    from apex4_quant.progress import Progress
    from apex4_quant.quantization.calibration import draw_calibration
    from apex4_quant.quantization.settings import QuantizeSettings

    source = ModelSource(model)
    asked = QuantizeSettings(model=model, samples=samples, seq_len=seq_len, calib=calib, seed=seed, device="cpu")
    settings = asked.resolve(source)
    calibration = draw_calibration(source, settings, settings.seq_len, Progress()).windows
    tensors = {"calibration": calibration.contiguous()}
    if heldout:
        tokenizer = load_tokenizer(source.folder)
        length = measured_len or EvalSettings(model=model).seq_len
        length = min(length, source.config.get("max_position_embeddings") or length)
        ids = windows(encode_text(tokenizer, load_text(text)), length, text, beginning_of(tokenizer, settings.bos))
        tensors["heldout"] = ids[:limit].contiguous()
    save_file(tensors, file)
    return source.folder, len(calibration)
