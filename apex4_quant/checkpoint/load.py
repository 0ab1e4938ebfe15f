"""A model folder, quantized or not, to a model that runs. Nothing is filled in: a missing tensor is an error."""

from __future__ import annotations

import gc
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Apex4Error, UsageError, shown
from ..format.quant_config import QUANT_METHOD, QuantConfig
from ..format.storage import REPORT_NAME, read_json, sha256
from ..hardware.devices import DISK, DeviceMap, multiplies_fast, multiply_in_float32
from ..models.families import auto_class_of
from ..models.foreign_formats import foreign_format
from ..models.source import read_config, verify_listed
from ..models.weight_files import read_tensor_infos

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quant_config_of(config: dict[str, Any]) -> QuantConfig | None:
    """The checked apex4 section of a config.json, or None for a model that is not quantized. Raises Apex4Error."""
    section = config.get("quantization_config")
    if not section:  # an empty one is what some tools leave of a model that they made whole again
        return None
    if section.get("quant_method") != QUANT_METHOD:
        method = shown(section.get("quant_method"))
        raise UsageError(f"the model is quantized by {method}, not by apex4: give its original, or quantize that")
    return QuantConfig.from_dict(section)


def read_report(folder: Path) -> dict[str, Any] | None:
    """apex4_report.json, or None where there is none (saved by another tool). Raises Apex4Error."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    report = read_json(path)
    if not isinstance(report, dict) or not _is_report(report):
        raise Apex4Error(f"{path} is not the report of a run: the file is damaged, get it again")
    return report


def _is_report(report: Any) -> bool:
    """Whether a report has what is read of it, of the right types."""
    if not isinstance(report, dict) or not {"files", "quantized", "kept"} <= set(report):
        return False
    named = [report["quantized"], report["kept"]]
    if not all(isinstance(entries, list) for entries in named) or not isinstance(report["files"], dict):
        return False
    entries = [entry for entries in named for entry in entries]
    files = report["files"].values()
    return (
        all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries)
        and all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in files)
        and all(Path(name).name == name for name in report["files"])
        and all(isinstance(entry.get("error", 0.0), int | float | None) for entry in entries)
        and all(isinstance(entry.get("calibration_tokens", 0), int) for entry in entries)
        and isinstance(report.get("settings") or {}, dict)
    )


def verify_checksums(folder: Path) -> bool:
    """Compare every weight file with the report's SHA-256. False if the folder has no report (saved by another tool).

    Raises Apex4Error naming the first file that differs.
    """
    report = read_report(folder)
    if report is None:
        return False
    for name, entry in report["files"].items():
        if not (folder / name).is_file():
            raise Apex4Error(f"{folder / name} is missing: the checkpoint is incomplete, get it again")
        if sha256(folder / name) != entry["sha256"]:
            raise Apex4Error(f"{folder / name} does not have its recorded checksum: the file is damaged, get it again")
    return True


def load_model(
    folder: Path, device: str, dtype: torch.dtype, as_it_is: bool = False, device_map: DeviceMap | None = None
) -> PreTrainedModel:
    """Load for inference. Raises UsageError or Apex4Error, with one sentence, before and instead of a bad model.

    A `device_map` spreads the model over devices and the disk, in the place of `device`: accelerate brings what a module
    needs to where it is computed.
    On a CPU without 16-bit products its 16-bit linears multiply in float32 (devices.py), unless it is wanted `as_it_is`.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    config = read_config(folder)
    quantized = quant_config_of(config) is not None
    infos = read_tensor_infos(folder)
    if quantized:
        verify_checksums(folder)
    elif (other := foreign_format(folder, config, infos)) is not None:
        raise UsageError(f"{folder} is quantized ({other}) and its config.json does not say how: get the model again")
    else:
        verify_listed(folder, (info.file for info in infos.values()))
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the missing or odd field leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Apex4Error(f"{folder / 'config.json'} does not describe a model ({reason})") from error
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # For tensors that are stored in another form than the model's; others stay in their files.
    offloaded = None if device_map is None else tempfile.mkdtemp(prefix="apex4-offload-")
    try:
        with warnings.catch_warnings():
            if device_map is not None:  # accelerate only warns of names that the model does not have
                warnings.filterwarnings("error", "The following device_map keys")
            # A pair with output_loading_info, which the annotation of from_pretrained does not say.
            loaded: Any = getattr(transformers, auto_class_of(config)).from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device} if device_map is None else device_map,
                offload_folder=offloaded,
                local_files_only=True,
                trust_remote_code=False,  # else transformers may ask on the terminal
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except BaseException as error:
        if offloaded is None:
            raise
        shutil.rmtree(offloaded)
        if not isinstance(error, ValueError | KeyError | UserWarning):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--device-map cannot be followed for {folder} ({reason}): place every module of the model, those with "
            "tied weights together, or give auto"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model: PreTrainedModel = loaded[0]
    if offloaded is not None:
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
        _require_tied_together(model, folder)
    info: dict[str, Any] = loaded[1]
    for name, stored, needed in sorted(info["mismatched_keys"]):
        raise Apex4Error(f"{name} in {folder} has shape {list(stored)} and config.json implies {list(needed)}")
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise Apex4Error(f"{folder} has no tensor {name}: the checkpoint is incomplete, get it again")
    computing = [place for place in places_of(model) if place not in ("cpu", DISK)] or ["cpu"]
    if not as_it_is and not multiplies_fast(torch.device(computing[0]), dtype):
        multiply_in_float32(model)
    model.eval()
    return model


def _require_tied_together(model: PreTrainedModel, folder: Path) -> None:
    """Raise UsageError where the map tears apart two names of one tensor: accelerate would not find the other."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}

    def place(name: str) -> Any:
        return next((places[part] for part in _and_parents(name) if part in places), None)

    for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if place(one) != place(other):
            raise UsageError(
                f"--device-map cannot be followed for {folder}: {one} and {other} are one tensor, place them together"
            )


def _and_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def places_of(model: PreTrainedModel) -> list[str]:
    """Where a model's modules are: devices, as "cuda:0", and "disk"."""
    found: dict[str, int | str | torch.device] = getattr(model, "hf_device_map", None) or {"": model.device}
    return list(dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in found.values()))


def entered_on(model: PreTrainedModel) -> torch.device:
    """Where its tokens are expected: accelerate moves those of a model whose first tensors are on the disk."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def release_memory() -> None:
    """Give back to the GPU what a model that is gone has used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
