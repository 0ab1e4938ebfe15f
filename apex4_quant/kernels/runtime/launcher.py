"""Cubins loaded on a device and launched on a stream, through the driver API. Knows no torch.

Everything happens in the device's primary context, which is the one torch uses. A launch allocates nothing on the device
and waits for nothing, so it can be captured into a CUDA graph; load and launch once before a capture, as loading may wait.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar, overload

from ...errors import Apex4Error
from .bindings import Driver, Handle, LaunchAttribute, LaunchConfig, Status
from .compiler import INSTALL, arch_of, compile_cubin

Dim3 = tuple[int, int, int]
_T = TypeVar("_T")
_CONFIGS_KEPT = 64
_kernels: dict[tuple[object, ...], Kernel] = {}
_loading = threading.Lock()


class Number(Protocol):
    """A ctypes value: c_int, c_float, c_int64, ..."""

    @property
    def value(self) -> int | float: ...


class Shape(NamedTuple):
    """How a kernel is launched, but for the stream. `shared_bytes` is the dynamic shared memory of a block."""

    grid: int | Dim3
    block: int | Dim3
    shared_bytes: int
    cluster: int | Dim3
    programmatic: bool


# One set of a kernel's parameters: their memory, the array of their addresses, and the address of that.
_Parameters = tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_void_p], int]


def kernel(source: str, entry: str, defines: Mapping[str, int | str], device: int) -> Kernel:
    """The kernel `entry` of `source` under these macros on the device of this ordinal; compiled and loaded once."""
    key = (source, entry, device, *sorted(defines.items()))
    found = _kernels.get(key)
    if found is None:
        with _loading:
            found = _kernels.get(key)
            if found is None:
                cubin = compile_cubin(source, defines, device_arch(device))
                found = _kernels[key] = Kernel(f"{entry} of {source}", cubin, entry, device)
    return found


class Kernel:
    """One entry of one cubin, on one device."""

    def __init__(self, name: str, cubin: bytes, entry: str, device: int) -> None:
        self.name = name
        self.device = device
        self._driver = _driver()
        self._context, self._context_address = primary_context(device)
        self._shared_bytes = 0  # the dynamic shared memory allowed so far
        with _Current(self._context, self._context_address):
            self._module = _check(f"loading {name}", self._driver.cuModuleLoadData(cubin))
            self._function = _check(f"finding {name}", self._driver.cuModuleGetFunction(self._module, entry.encode()))

    def bind(
        self,
        grid: int | Dim3,
        block: int | Dim3,
        pointers: int,
        numbers: Sequence[Number],
        *,
        shared_bytes: int = 0,
        cluster: int | Dim3 = 1,
        programmatic: bool = False,
    ) -> Launch:
        """The kernel with all that is the same in every call: `numbers` are ctypes values, the parameters behind its
        `pointers` pointers.

        `programmatic` lets it start before the kernel in front of it on the stream has ended (the kernel then waits
        with griddepcontrol.wait). Raises Apex4Error with the kernel's name for what the driver refuses.
        """
        if shared_bytes > self._shared_bytes:
            # More than 48 KiB has to be allowed, and allowing what is needed is never wrong.
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            with _Current(self._context, self._context_address):
                _check(
                    f"allowing {self.name} {shared_bytes} bytes of dynamic shared memory",
                    self._driver.cuFuncSetAttribute(self._function, attribute, shared_bytes),
                )
            self._shared_bytes = shared_bytes
        shape = Shape(grid, block, shared_bytes, cluster, programmatic)
        return Launch(self, shape, pointers, numbers)


class Launch:
    """A kernel that is ready to be launched: called with a stream and its pointers. From several threads, too.

    A model's linears are launched thousands of times a second, and what Python does for each is time in which a GPU with
    little to do waits. So a launch writes pointers into parameters that stand there already, and calls the driver directly.
    """

    def __init__(self, kernel: Kernel, shape: Shape, pointers: int, numbers: Sequence[Number]) -> None:
        self.kernel = kernel
        self._shape = shape
        self._library = _library()
        self._function = int(kernel._function)
        kinds = [*[ctypes.c_void_p] * pointers, *map(type, numbers)]
        fields = [(f"parameter_{index}", kind) for index, kind in enumerate(kinds)]
        layout = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
        self._template = bytes(layout(*[None] * pointers, *(number.value for number in numbers)))
        self._offsets = [getattr(layout, name).offset for name, _ in fields]
        self._write = struct.Struct(f"{pointers}P").pack_into
        self._free: list[_Parameters] = []  # sets of parameters that no thread is launching with
        self._configs: dict[int, tuple[LaunchConfig, int]] = {}  # by stream; the structure and its address

    def __call__(self, stream: int, *pointers: int) -> None:
        """Enqueue on `stream` (a CUstream as an integer). Pointers are addresses, 0 where there is none.

        Raises Apex4Error with the kernel's name for what the driver refuses.
        """
        config = self._configs.get(stream) or self._configure(stream)
        # The driver has read the parameters when it returns.
        try:
            parameters = self._free.pop()
        except IndexError:
            parameters = self._parameters()
        self._write(parameters[0], 0, *pointers)
        current = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(current))
        if current.value == self.kernel._context_address:
            status = self._library.cuLaunchKernelEx(config[1], self._function, parameters[2], None)
        else:
            with _Current(self.kernel._context, self.kernel._context_address):
                status = self._library.cuLaunchKernelEx(config[1], self._function, parameters[2], None)
        self._free.append(parameters)
        if status != 0:
            grid, block, shared_bytes, *_ = self._shape
            _check(
                f"launching {self.kernel.name} (grid {grid}, block {block}, {shared_bytes} bytes of shared memory)",
                (_driver().CUresult(status),),
            )

    def _parameters(self) -> _Parameters:
        memory = ctypes.create_string_buffer(self._template, len(self._template))
        start = ctypes.addressof(memory)
        addresses = (ctypes.c_void_p * len(self._offsets))(*(start + offset for offset in self._offsets))
        return memory, addresses, ctypes.addressof(addresses)

    def _configure(self, stream: int) -> tuple[LaunchConfig, int]:
        grid, block, shared_bytes, cluster, programmatic = self._shape
        if len(self._configs) >= _CONFIGS_KEPT:  # streams come and go in a long-lived process
            self._configs.clear()
        config = launch_config(grid, block, shared_bytes, cluster, stream, programmatic)
        self._configs[stream] = config, config.getPtr()
        return self._configs[stream]


def launch_config(
    grid: int | Dim3, block: int | Dim3, shared_bytes: int, cluster: int | Dim3, stream: int, programmatic: bool
) -> LaunchConfig:
    """A CUlaunchConfig. An attribute is set only where it asks for something: GPUs before sm_90 know neither."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = _dim3(grid)
    config.blockDimX, config.blockDimY, config.blockDimZ = _dim3(block)
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    attributes: list[LaunchAttribute] = []
    if _dim3(cluster) != (1, 1, 1):
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = _dim3(cluster)
        attributes.append(attribute)
    if programmatic:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def _dim3(size: int | Dim3) -> Dim3:
    return (size, 1, 1) if isinstance(size, int) else size


# ---- device and context ---------------------------------------------------------------------------------------------


@cache
def device_arch(device: int) -> str:
    """ "sm_86", "sm_90a": what kernels for the device of this ordinal are compiled for."""
    driver = _driver()
    handle = _check(f"finding CUDA device {device}", driver.cuDeviceGet(device))
    names = driver.CUdevice_attribute
    major, minor = (
        _check(f"asking CUDA device {device} for its architecture", driver.cuDeviceGetAttribute(attribute, handle))
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return arch_of(10 * major + minor)


@cache
def primary_context(device: int) -> tuple[Handle, int]:
    """The primary context of the device and its address. Retained once and never released, as torch does."""
    driver = _driver()
    handle = _check(f"finding CUDA device {device}", driver.cuDeviceGet(device))
    context = _check(f"opening CUDA device {device}", driver.cuDevicePrimaryCtxRetain(handle))
    return context, int(context)


class _Current:
    """Makes the context the calling thread's current one, where it is not already."""

    def __init__(self, context: Handle, address: int) -> None:
        self._context = context
        self._address = address
        self._pushed = False

    def __enter__(self) -> None:
        driver = _driver()
        if int(_check("asking for the current CUDA context", driver.cuCtxGetCurrent())) != self._address:
            _check("switching to the CUDA context of a device", driver.cuCtxPushCurrent(self._context))
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            _check("leaving the CUDA context of a device", _driver().cuCtxPopCurrent())


@cache
def _library() -> ctypes.CDLL:
    """libcuda with the functions of every launch. Through cuda.bindings each call costs several microseconds more."""
    _driver()  # which is loaded, or says what is missing
    # 64-bit Windows has one calling convention, that of CDLL.
    library = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    library.cuCtxGetCurrent.argtypes = (ctypes.c_void_p,)
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    return library


@cache
def _driver() -> Driver:
    """cuda.bindings.driver, initialised. Raises Apex4Error where the package, the driver or a GPU is missing."""
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise Apex4Error(f"cuda-core is needed to launch kernels and is not installed: {INSTALL}") from error
    driver: Driver = bindings
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # a RuntimeError of cuda.bindings or an error of cuda.pathfinder, by version
        raise Apex4Error("the NVIDIA driver (libcuda) is not found: kernels cannot be launched here") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise Apex4Error(f"the NVIDIA driver does not start: {_describe(driver, status)}")
    return driver


@overload
def _check(what: str, result: tuple[Status]) -> None: ...
@overload
def _check(what: str, result: tuple[Status, _T]) -> _T: ...
def _check(what: str, result: tuple[Status] | tuple[Status, _T]) -> _T | None:
    """The value behind the status that every driver call returns first. Raises Apex4Error that says what failed."""
    if int(result[0]) != 0:
        raise Apex4Error(f"{what} failed: {_describe(_driver(), result[0])}")
    return result[1] if len(result) > 1 else None


def _describe(driver: Driver, status: Status) -> str:
    """ "CUDA_ERROR_INVALID_VALUE (invalid argument)" """
    failed, text = driver.cuGetErrorString(status)
    name = getattr(status, "name", f"CUDA error {int(status)}")
    return name if int(failed) != 0 or not text else f"{name} ({text.decode()})"
