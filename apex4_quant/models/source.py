"""The model to quantize: where its files are, what is in them, read tensor by tensor.

Nothing here holds more than the tensors asked for: shards are opened, read with plain reads (no memory map, whose
pages would count as resident) and closed again.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..calib.finite import all_finite
from ..errors import Apex4Error, UsageError
from ..format.storage import format_bytes, read_json, sha256
from ..format.tensor_info import TensorInfo
from .expert_tensors import in_model, published_name, unfused
from .families import FAMILIES, RECOMPUTED_SUFFIXES, Family, family_of
from .foreign_formats import foreign_format
from .place import MODEL, Kind, local_or_hub_id
from .weight_files import read_tensor_infos
from .xet_failure import WITHOUT_XET, xet_failure

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADAPTER_NAME = "adapter_config.json"  # of peft
CHECKSUMS_NAME = "checksums.json"  # {file name: sha256}, optional beside any model


def resolve_model(model: str, kind: Kind = MODEL) -> Path:
    """The folder of `demo`, of a local path, or of a Hub id, ORG/NAME or ORG/NAME@REVISION (downloaded once; a revision
    is a branch, a tag or a commit). Raises UsageError."""
    found = local_or_hub_id(model, kind)
    return found if isinstance(found, Path) else _download(*found)


def hub_revision(folder: Path) -> str | None:
    """The commit of a model in the Hub's cache (.../models--ORG--NAME/snapshots/COMMIT), None for another folder."""
    known = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if known else None


def _why_not_fetched(error: BaseException) -> str:
    """The end of the sentence. What huggingface_hub says itself is a paragraph with URLs and request ids."""
    chain: list[BaseException] = []
    while error is not None and len(chain) < 8:  # it wraps what happened: "not in the cache" may mean "no network"
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    xet = next((found for each in chain if (found := xet_failure(each)) is not None), None)
    if xet is not None:
        return f"{xet.reason} over Xet, try again later, or set {WITHOUT_XET}, which fetches without Xet"
    names = {type(each).__name__ for each in chain}
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
    status = next((status for status in statuses if isinstance(status, int)), None)
    if "GatedRepoError" in names:
        return "it is gated, accept its terms on its page and give the access token (hf auth login)"
    if "RepositoryNotFoundError" in names or status in (401, 403, 404):
        return "it is not there or private, check the id and the access token (hf auth login)"
    if "HFValidationError" in names:
        return "this is no legal id, give ORG/NAME"
    if status is not None:
        return f"it answered with HTTP status {status}, try again later"
    if "OfflineModeIsEnabled" in names or any("offline" in str(each).lower() for each in chain):
        return "offline mode is on (HF_HUB_OFFLINE) and it is not in the cache, allow the network or give a folder"
    return "it cannot be reached and the model is not in the cache, check the network"


def _download(hub_id: str, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    skipped = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, ignore_patterns=skipped))
    except Exception as error:  # httpx, hub and OS errors: all mean that the model could not be had
        xet = xet_failure(error)
        if (xet.errno if xet is not None else getattr(error, "errno", None)) in NO_SPACE:
            raise UsageError(f"no space left to download model {hub_id!r} into the Hub's cache: free some") from error
        if "RevisionNotFound" in type(error).__name__:
            raise UsageError(f"model {hub_id!r} has no revision {revision!r}: see its branches and tags") from error
        raise UsageError(
            f"model {hub_id!r} is no local folder and cannot be fetched from the Hub: {_why_not_fetched(error)}"
        ) from error


def read_tensors(infos: dict[str, TensorInfo], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The named tensors on the CPU, in their stored dtype; of a part of a tensor, only that part is read.

    Raises Apex4Error for a damaged file.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[infos[name].file].append(name)
    tensors = {}
    for path, wanted in by_file.items():
        try:
            with safe_open(path, "pt", backend="pread") as file:
                for name in wanted:
                    info = infos[name]
                    stored = info.stored or name
                    tensors[name] = (
                        file.get_tensor(stored) if info.part is None else _part(file.get_slice(stored), info)
                    )
        except (SafetensorError, OSError) as error:
            raise Apex4Error(f"{path} cannot be read ({error}): get the file again") from error
    return tensors


def _part(stored: Any, info: TensorInfo) -> torch.Tensor:
    """The part of a tensor that `info` means, from safetensors' slice of it, which takes no steps."""
    assert info.part is not None
    every = [index for index in info.part if isinstance(index, slice) and index.step is not None]
    if not every and not info.transposed:
        return stored[info.part]  # type: ignore[no-any-return]
    # There is one, and it comes last: rows of gate and up in turns.
    tensor: torch.Tensor = stored[tuple(index for index in info.part if index not in every)]
    if every:
        tensor = tensor[..., every[0]]
    return (tensor.t() if info.transposed else tensor).contiguous()


def read_config(folder: Path, kind: Kind = MODEL) -> dict[str, Any]:
    """config.json of a model folder. Raises UsageError if there is none."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_NAME).is_file():
            raise UsageError(_adapter_sentence(folder))
        raise UsageError(f"{folder} has no config.json: give {kind.folder}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise Apex4Error(f"{folder / 'config.json'} is not a JSON object: the file is damaged, get it again")
    if (folder / ADAPTER_NAME).is_file():
        raise UsageError(_adapter_sentence(folder))
    if not isinstance(config.get("quantization_config"), dict | None):
        raise Apex4Error(f"quantization_config in {folder / 'config.json'} is not a JSON object: get the file again")
    context = config.get("max_position_embeddings")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise Apex4Error(f"{folder / 'config.json'} has max_position_embeddings = {context!r}: get the file again")
    return config


MOST_AT_ONCE = 4  # files whose checksums are computed: more are more than a disk gives


class LayerReader:
    """The tensors of one layer after another. `ahead_of`: a device that works on one while those of the next are read, and are there
    beside it; in pinned memory, from which a GPU copies several times as fast."""

    def __init__(self, source: ModelSource, ahead_of: torch.device | None) -> None:
        self._source = source
        on_gpu = ahead_of is not None and ahead_of.type == "cuda"
        self._gpu = torch.cuda.current_device() if on_gpu else None  # another thread would take the first
        self._thread = ThreadPoolExecutor(1, "apex4-read") if ahead_of is not None else None
        self._next: dict[int, Future[dict[str, torch.Tensor]]] = {}

    def take(self, layer: int, then: int | None = None) -> dict[str, torch.Tensor]:
        """`then`: the layer that will be asked for next, if any. Raises Apex4Error for a damaged file."""
        source, found = self._source, self._next.pop(layer, None)
        tensors = source.read(source.layer_tensors(layer)) if found is None else found.result()
        if self._thread is not None and then is not None and 0 <= then < source.num_layers:
            self._next = {then: self._thread.submit(self._read_pinned, then)}
        return tensors

    def _read_pinned(self, layer: int) -> dict[str, torch.Tensor]:
        tensors = self._source.read(self._source.layer_tensors(layer))
        if self._gpu is None:
            return tensors
        with torch.cuda.device(self._gpu), contextlib.suppress(RuntimeError):  # the system may allow no more of it
            for name in tensors:
                tensors[name] = tensors[name].pin_memory()
        return tensors


_LARGEST_SIZE = 2**31  # of any dimension: beyond it, a damaged file would be counted through layer by layer


def _adapter_sentence(folder: Path) -> str:
    """transformers loads a base model and the adapter beside it, or the base model that the adapter names, as one."""
    return (
        f"{folder} holds a LoRA adapter ({ADAPTER_NAME}), which transformers adds to the weights: merge it first "
        "(peft: model.merge_and_unload().save_pretrained(FOLDER)) and give that folder"
    )


def language_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the language model: itself or, where others stand beside that, also what it has in
    `text_config`, and what transformers' class fills in there. Raises Apex4Error if there is nothing of use.
    """
    family = next((f for f in FAMILIES.values() if f.beside and f.model_type == config.get("model_type")), None)
    if family is None:
        return config
    from transformers import AutoConfig

    try:
        inside = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception as error:  # transformers raises whatever the missing or odd field leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Apex4Error(f"{folder / 'config.json'} does not describe a model ({reason})") from error
    settings = {name: value for name, value in inside.to_dict().items() if value is not None or name not in config}
    return config | settings | {name: config[name] for name in _OF_THE_WHOLE if config.get(name) is not None}


_OF_THE_WHOLE = ("architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")


def require_sizes(config: dict[str, Any], folder: Path) -> None:
    """Raise Apex4Error if config.json lacks one of the sizes that every supported architecture has."""
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if type(config.get(name)) is not int or not 1 <= config[name] < _LARGEST_SIZE:
            raise Apex4Error(f"{folder / 'config.json'} has no usable {name}: the file is damaged, get it again")


def _listed_checksums(folder: Path) -> dict[str, str]:
    """What checksums.json says of a model's files; nothing if there is none. Raises Apex4Error."""
    path = folder / CHECKSUMS_NAME
    listed = read_json(path) if path.is_file() else {}
    if not isinstance(listed, dict) or not all(isinstance(value, str) for value in listed.values()):
        raise Apex4Error(f"{path} is not a mapping of file names to SHA-256: the file is damaged, get it again")
    return listed


def _verified(path: Path, known: dict[str, str]) -> str:
    """The SHA-256 of a file. Raises Apex4Error if another is known."""
    digest = sha256(path)
    if known.get(path.name, digest) != digest:
        raise Apex4Error(f"{path} does not have the checksum published with it: get the file again")
    return digest


def verify_listed(folder: Path, files: Iterable[Path]) -> None:
    """Compare those of `files` that the folder's checksums.json names. Raises Apex4Error naming one that differs."""
    known = _listed_checksums(folder)
    for path in sorted(set(files)):
        if path.name in known:
            _verified(path, known)


# Formats in which the original itself is published: transformers' config that turns them into 16 bits.
_PUBLISHED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def _require_original(model: str, quantized_by: str | None) -> None:
    if quantized_by is None:
        return
    advice = "give the original 16-bit model"
    if (published := _PUBLISHED.get(quantized_by.lower())) is not None:
        advice += (
            f", or write it: transformers' from_pretrained(..., dtype='bfloat16', quantization_config={published}"
            "(dequantize=True)) and save_pretrained(FOLDER)"
        )
    raise UsageError(f"{model} is already quantized ({quantized_by}): {advice}")


class ModelSource:
    """An unquantized checkpoint, opened and checked as far as its headers go. Raises UsageError or Apex4Error.

    `infos` has the tensors under the names of the model with its experts unfused, however they are stored; `left_away`
    those that transformers does not load and that are not written either. `config` has the language model's settings,
    `stored_config` is config.json.
    """

    def __init__(self, model: str) -> None:
        self.name = model
        self.folder = resolve_model(model)
        self.stored_config = read_config(self.folder)
        _require_original(model, foreign_format(self.folder, self.stored_config, {}))
        self.family: Family = family_of(self.stored_config, model)
        self.config = language_settings(self.folder, self.stored_config)
        require_sizes(self.config, self.folder)
        found = read_tensor_infos(self.folder)
        _require_original(model, foreign_format(self.folder, self.config, found))
        prefixes = self.family.left_away(self.config)
        self.left_away = {name: info for name, info in found.items() if prefixes and name.startswith(prefixes)}
        stored = {
            name: info
            for name, info in found.items()
            if name not in self.left_away and not name.endswith(RECOMPUTED_SUFFIXES)
        }
        self.stored_names = list(stored)
        self.infos = unfused(in_model(stored, self.family), self.family)
        self.num_layers = int(self.config["num_hidden_layers"])
        for index in range(self.num_layers):
            prefix = self.family.layer_prefix(index)
            for linear in (prefix + part for part in self.family.linears(self.config, index)):
                info = self.infos.get(linear + ".weight")
                if info is None:
                    raise self._missing(published_name(linear + ".weight", stored, self.family))
                if len(info.shape) != 2:
                    raise Apex4Error(
                        f"{linear}.weight in {info.file} has shape {list(info.shape)} and must be a matrix"
                    )
        for name, info in self.infos.items():
            if info.dtype not in ("F64", "F32", "F16", "BF16"):
                raise Apex4Error(f"{name} in {info.file} is {info.dtype}: give the original 16- or 32-bit model")
        beyond = self.family.layer_prefix(self.num_layers)
        if any(name.startswith(beyond) for name in self.infos):
            raise Apex4Error(
                f"{model} holds tensors of layer {self.num_layers}, but its config says {self.num_layers} layers"
            )

    def _missing(self, name: str) -> Apex4Error:
        """The error for a linear that is not there; another class of transformers names it otherwise."""
        tail = name.removeprefix(f"{self.family.layers.partition('.')[0]}.")
        others = (other for other in self.stored_names if other == tail or other.endswith(f".{tail}"))
        if (other := next(others, None)) is not None:
            return Apex4Error(
                f"{self.name} has no tensor {name}, but {other}: another class saved it, load it as "
                f"{self.family.architecture} and save it again"
            )
        return Apex4Error(f"{self.name} has no tensor {name}: the checkpoint is incomplete")

    @property
    def total_bytes(self) -> int:
        return sum(info.bytes for info in self.infos.values())

    def layer_tensors(self, index: int) -> list[str]:
        prefix = self.family.layer_prefix(index)
        return [name for name in self.infos if name.startswith(prefix)]

    @cached_property
    def outer_tensors(self) -> list[str]:
        """Everything outside the decoder layers."""
        return [name for name in self.infos if not name.startswith(self.family.layers + ".")]

    def is_beside(self, name: str) -> bool:
        """Whether a tensor outside the decoder layers is of a model beside the language model."""
        family = self.family
        return bool(family.beside) and not name.startswith((f"{family.language_model}.", f"{family.head}."))

    @property
    def head_tensors(self) -> list[str]:
        """What stands behind the layers; the embedding where it is the head too."""
        head, embedding = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        left = {embedding} if head in self.infos else set()
        return [name for name in self.outer_tensors if name not in left and not self.is_beside(name)]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return read_tensors(self.infos, names)

    def layer_reader(self, ahead_of: torch.device | None) -> LayerReader:
        return LayerReader(self, ahead_of)

    def files(self) -> list[Path]:
        return sorted({info.file for info in self.infos.values()})

    def verify(self, advance: Callable[[int], None]) -> dict[str, str]:
        """Read everything once, before any work is put in: checksums where some are known, NaN and infinity always.

        Returns the SHA-256 of every weight file. `advance` is told the bytes done. Raises Apex4Error naming the file
        or tensor.
        """
        known = _listed_checksums(self.folder) | self._cached_checksums()
        files, threads = self.files(), min(MOST_AT_ONCE, torch.get_num_threads())
        with ThreadPoolExecutor(threads) as pool:
            digests = dict(
                zip([path.name for path in files], pool.map(lambda path: _verified(path, known), files), strict=True)
            )
        for name, info in self.infos.items():
            tensor = self.read([name])[name]
            if tensor.is_floating_point() and not all_finite(tensor):
                raise Apex4Error(
                    f"{info.stored or name} in {info.file} holds NaN or infinity: the model is damaged, get it again"
                )
            advance(info.bytes)
        return digests

    def _cached_checksums(self) -> dict[str, str]:
        """The Hub's cache stores large files under the SHA-256 of their content, behind a link."""
        blobs = {path.name: path.resolve().name for path in self.files() if path.is_symlink()}
        return {name: blob for name, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob)}

    def describe(self) -> str:
        return f"{self.name} ({self.family.architecture}, {self.num_layers} layers, {format_bytes(self.total_bytes)})"
