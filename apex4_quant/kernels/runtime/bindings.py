"""The types of what is used of cuda.bindings, which comes without any: its modules `nvrtc` and `driver`.

Every function returns a tuple, a status first and behind it what it was asked for. Handles are opaque; `int` of one is its
address. Names are those of the libraries, and only what is called here is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Status(Protocol):
    """An nvrtcResult or CUresult: an integer with a name, 0 for success."""

    @property
    def name(self) -> str: ...

    def __int__(self) -> int: ...


class Handle(Protocol):
    """A context, module, function, device or program."""

    def __int__(self) -> int: ...


class _NvrtcResult(Protocol):
    NVRTC_SUCCESS: Status


class Nvrtc(Protocol):
    """cuda.bindings.nvrtc"""

    @property
    def nvrtcResult(self) -> _NvrtcResult: ...

    def nvrtcVersion(self) -> tuple[Status, int, int]: ...

    def nvrtcGetSupportedArchs(self) -> tuple[Status, list[int]]: ...

    def nvrtcCreateProgram(
        self, source: bytes, name: bytes, header_count: int, headers: Sequence[bytes], header_names: Sequence[bytes]
    ) -> tuple[Status, Handle]: ...

    def nvrtcCompileProgram(self, program: Handle, count: int, options: Sequence[bytes]) -> tuple[Status]: ...

    def nvrtcGetProgramLogSize(self, program: Handle) -> tuple[Status, int]: ...

    def nvrtcGetProgramLog(self, program: Handle, log: bytearray) -> tuple[Status]: ...

    def nvrtcGetCUBINSize(self, program: Handle) -> tuple[Status, int]: ...

    def nvrtcGetCUBIN(self, program: Handle, cubin: bytearray) -> tuple[Status]: ...

    def nvrtcDestroyProgram(self, program: Handle) -> tuple[Status]: ...


class _CUresult(Protocol):
    CUDA_SUCCESS: Status

    def __call__(self, value: int) -> Status: ...


class _FunctionAttributes(Protocol):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: int


class _DeviceAttributes(Protocol):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: int
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: int


class _LaunchAttributes(Protocol):
    CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: int
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: int


class _Dimensions(Protocol):
    x: int
    y: int
    z: int


class _LaunchAttributeValue(Protocol):
    programmaticStreamSerializationAllowed: int

    @property
    def clusterDim(self) -> _Dimensions: ...


class LaunchAttribute(Protocol):
    """A CUlaunchAttribute."""

    id: int

    @property
    def value(self) -> _LaunchAttributeValue: ...


class LaunchConfig(Protocol):
    """A CUlaunchConfig. The address of `getPtr` is valid as long as the object lives."""

    gridDimX: int
    gridDimY: int
    gridDimZ: int
    blockDimX: int
    blockDimY: int
    blockDimZ: int
    sharedMemBytes: int
    hStream: int
    attrs: list[LaunchAttribute]
    numAttrs: int

    def getPtr(self) -> int: ...


class Driver(Protocol):
    """cuda.bindings.driver"""

    @property
    def CUresult(self) -> _CUresult: ...

    @property
    def CUfunction_attribute(self) -> _FunctionAttributes: ...

    @property
    def CUdevice_attribute(self) -> _DeviceAttributes: ...

    @property
    def CUlaunchAttributeID(self) -> _LaunchAttributes: ...

    def CUlaunchConfig(self) -> LaunchConfig: ...

    def CUlaunchAttribute(self) -> LaunchAttribute: ...

    def cuInit(self, flags: int) -> tuple[Status]: ...

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes | None]: ...

    def cuDeviceGet(self, ordinal: int) -> tuple[Status, Handle]: ...

    def cuDeviceGetAttribute(self, attribute: int, device: Handle) -> tuple[Status, int]: ...

    def cuDevicePrimaryCtxRetain(self, device: Handle) -> tuple[Status, Handle]: ...

    def cuCtxGetCurrent(self) -> tuple[Status, Handle]: ...

    def cuCtxPushCurrent(self, context: Handle) -> tuple[Status]: ...

    def cuCtxPopCurrent(self) -> tuple[Status, Handle]: ...

    def cuModuleLoadData(self, image: bytes) -> tuple[Status, Handle]: ...

    def cuModuleGetFunction(self, module: Handle, name: bytes) -> tuple[Status, Handle]: ...

    def cuFuncSetAttribute(self, function: Handle, attribute: int, value: int) -> tuple[Status]: ...
