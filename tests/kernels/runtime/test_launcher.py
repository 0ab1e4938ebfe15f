"""Loading and launching, with a driver that is not there: what it is asked, in which order, and what is said if it refuses."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cuda.bindings import driver as real

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.runtime import launcher

OK = real.CUresult.CUDA_SUCCESS
REFUSED = real.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
SIGNATURE = (ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64)
POINTER = 0x7F0000000010
launch_config = launcher.launch_config


class FakeDriver:
    """cuda.bindings.driver with its own structures and enumerations, and functions that write down their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stack = [0]  # addresses of contexts
        self.refuse: str | None = None
        self.capability = (9, 0)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)  # structures, enumerations

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.refuse:
                return (REFUSED,) if name == "cuFuncSetAttribute" else (REFUSED, None)
            return (OK, *getattr(self, f"do_{name}", lambda *_: ())(*arguments))

        return call

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return OK, b"too many resources requested for launch"

    def do_cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (100 + ordinal,)

    def do_cuDeviceGetAttribute(self, attribute: Any, handle: int) -> tuple[int]:
        major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return (self.capability[0] if attribute == major else self.capability[1],)

    def do_cuDevicePrimaryCtxRetain(self, handle: int) -> tuple[Any]:
        return (real.CUcontext(0x1000 + handle),)

    def do_cuCtxGetCurrent(self) -> tuple[Any]:
        return (real.CUcontext(self.stack[-1]),)

    def do_cuCtxPushCurrent(self, context: Any) -> tuple[()]:
        self.stack.append(int(context))
        return ()

    def do_cuCtxPopCurrent(self) -> tuple[Any]:
        return (real.CUcontext(self.stack.pop()),)

    def do_cuModuleLoadData(self, cubin: bytes) -> tuple[Any]:
        return (real.CUmodule(0x2000),)

    def do_cuModuleGetFunction(self, module: Any, entry: bytes) -> tuple[Any]:
        return (real.CUfunction(0x3000),)


class FakeLibrary:
    """libcuda as ctypes has it, beside a FakeDriver."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.configs: dict[int, Any] = {}  # by address: a structure read back from memory has no attributes

    def config(self, *given: Any) -> Any:
        """Stands for `launch_config`."""
        made = launch_config(*given)
        self.configs[made.getPtr()] = made
        return made

    def cuCtxGetCurrent(self, found: Any) -> int:
        self.driver.calls.append(("current",))
        found._obj.value = self.driver.stack[-1]
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, parameters: int, extra: None) -> int:
        addresses = (ctypes.c_void_p * len(SIGNATURE)).from_address(parameters)
        values = [kind.from_address(address).value for kind, address in zip(SIGNATURE, addresses, strict=True)]
        self.driver.calls.append(("cuLaunchKernelEx", self.configs[config], function, values, extra))
        if self.driver.refuse == "cuLaunchKernelEx":
            return int(REFUSED)
        assert self.driver.stack[-1] == 0x1000 + 100 + 1, "launched in another context"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = FakeDriver()
    monkeypatch.setattr(launcher, "_driver", lambda: fake)
    library = FakeLibrary(fake)
    monkeypatch.setattr(launcher, "_library", lambda: library)
    monkeypatch.setattr(launcher, "launch_config", library.config)
    monkeypatch.setattr(launcher, "_kernels", {})
    cached = (launcher.device_arch, launcher.primary_context)
    for function in cached:
        function.cache_clear()
    yield fake
    for function in cached:
        function.cache_clear()


@pytest.fixture
def kernel(driver: FakeDriver) -> launcher.Kernel:
    return launcher.Kernel("entry of some.cu", b"cubin", "entry", 1)


def bound(kernel: launcher.Kernel, grid: Any = 8, block: int = 128, **rest: Any) -> launcher.Launch:
    return kernel.bind(grid, block, 1, [ctypes.c_int(-3), ctypes.c_float(0.5), ctypes.c_int64(1 << 40)], **rest)


def test_a_kernel_is_compiled_and_loaded_once_for_a_device(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_cubin(*given: Any) -> bytes:
        compiled.append(given)
        return b"cubin"

    monkeypatch.setattr(launcher, "compile_cubin", compile_cubin)
    first = launcher.kernel("some.cu", "entry", {"A": 1, "B": 2}, 1)
    assert launcher.kernel("some.cu", "entry", {"B": 2, "A": 1}, 1) is first
    assert first.name == "entry of some.cu"
    assert compiled == [("some.cu", {"A": 1, "B": 2}, "sm_90a")]
    assert ("cuModuleLoadData", b"cubin") in driver.calls
    assert [call[2] for call in driver.calls if call[0] == "cuModuleGetFunction"] == [b"entry"]
    others = [
        launcher.kernel("some.cu", "entry", {"A": 1}, 1),
        launcher.kernel("some.cu", "entry", {"A": 1, "B": 2}, 0),
        launcher.kernel("some.cu", "other", {"A": 1, "B": 2}, 1),
    ]
    assert len({id(each) for each in (first, *others)}) == 4
    assert driver.stack == [0], "the caller's context is current again"


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")])
def test_device_arch(driver: FakeDriver, capability: tuple[int, int], arch: str) -> None:
    driver.capability = capability
    assert launcher.device_arch(0) == arch


def test_launch_hands_over_values_and_configuration(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    launch = bound(kernel, (2, 3, 4), 256, shared_bytes=1024, cluster=2, programmatic=True)
    launch(0x55, POINTER)
    (launched,) = [call for call in driver.calls if call[0] == "cuLaunchKernelEx"]
    _, config, function, values, extra = launched
    assert (function, values, extra) == (0x3000, [POINTER, -3, 0.5, 1 << 40], None)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (2, 3, 4)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (256, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (1024, 0x55, 2)
    cluster, programmatic = config.attrs
    ids = real.CUlaunchAttributeID
    assert int(cluster.id) == ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = cluster.value.clusterDim
    assert (size.x, size.y, size.z) == (2, 1, 1)
    assert int(programmatic.id) == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert programmatic.value.programmaticStreamSerializationAllowed == 1
    assert driver.stack == [0]


def test_every_call_has_its_own_pointers_and_stream(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    launch = bound(kernel)
    for stream, pointer in ((7, POINTER), (0, 0), (7, POINTER + 8)):
        launch(stream, pointer)
    launched = [(int(call[1].hStream), *call[3]) for call in driver.calls if call[0] == "cuLaunchKernelEx"]
    same = (-3, 0.5, 1 << 40)
    assert launched == [(7, POINTER, *same), (0, None, *same), (7, POINTER + 8, *same)]


def test_threads_do_not_share_parameters(
    driver: FakeDriver, kernel: launcher.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch in the middle of another one, as another thread may make it."""
    launch = bound(kernel)
    seen = []
    driven = FakeLibrary.cuLaunchKernelEx

    def slow(self: FakeLibrary, config: int, function: int, parameters: int, extra: None) -> int:
        if not seen:
            seen.append(parameters)
            launch(0, POINTER + 1)
        return driven(self, config, function, parameters, extra)

    monkeypatch.setattr(FakeLibrary, "cuLaunchKernelEx", slow)
    driver.stack = [0x1000 + 100 + 1]
    launch(0, POINTER)
    assert [call[3][0] for call in driver.calls if call[0] == "cuLaunchKernelEx"] == [POINTER + 1, POINTER]


def test_what_is_not_asked_for_is_no_attribute(driver: FakeDriver) -> None:
    """sm_80 and sm_86 refuse cluster sizes and programmatic launches, also those that ask for nothing."""
    config = launch_config((5, 1, 1), (32, 4, 1), 0, 1, 0, False)
    assert (config.numAttrs, config.attrs, config.blockDimY) == (0, [], 4)
    config = launch_config(5, 32, 0, (1, 2, 1), 0, False)
    assert config.numAttrs == 1 and config.attrs[0].value.clusterDim.y == 2


def test_a_second_launch_asks_the_driver_for_nothing_else(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    driver.stack = [0x1000 + 100 + 1]  # as torch leaves it
    launch = bound(kernel, shared_bytes=70000)
    launch(7, POINTER)
    driver.calls.clear()
    launch(7, POINTER)
    assert driver.names() == ["current", "cuLaunchKernelEx"]


def test_shared_memory_is_allowed_once_and_never_lowered(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    for shared_bytes in (70000, 70000, 0, 80000, 70000):
        for grid in (1, 2):
            bound(kernel, grid, shared_bytes=shared_bytes)(0, POINTER)
    attribute = real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    allowed = [call[2:] for call in driver.calls if call[0] == "cuFuncSetAttribute"]
    assert allowed == [(attribute, 70000), (attribute, 80000)]


def test_configurations_do_not_pile_up(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    launch = bound(kernel)
    for stream in range(1, 1000):
        launch(stream, POINTER)
    assert len(launch._configs) <= launcher._CONFIGS_KEPT and len(launch._free) == 1


REFUSALS = {
    "cuDeviceGet": "finding CUDA device 1",
    "cuDevicePrimaryCtxRetain": "opening CUDA device 1",
    "cuModuleLoadData": "loading entry of some.cu",
    "cuModuleGetFunction": "finding entry of some.cu",
    "cuFuncSetAttribute": "allowing entry of some.cu 70000 bytes of dynamic shared memory",
    "cuLaunchKernelEx": "launching entry of some.cu (grid (8, 2, 1), block 128, 70000 bytes of shared memory)",
}


@pytest.mark.parametrize("function", REFUSALS)
def test_a_refusal_names_the_kernel_and_the_error(driver: FakeDriver, function: str) -> None:
    driver.refuse = function
    with pytest.raises(Apex4Error) as caught:
        bound(launcher.Kernel("entry of some.cu", b"cubin", "entry", 1), (8, 2, 1), shared_bytes=70000)(0, POINTER)
    why = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (too many resources requested for launch)"
    assert str(caught.value) == f"{REFUSALS[function]} failed: {why}"
    assert driver.stack == [0], "the caller's context is current again"


def test_a_refused_shared_memory_limit_is_asked_for_again(driver: FakeDriver, kernel: launcher.Kernel) -> None:
    driver.refuse = "cuFuncSetAttribute"
    for _ in range(2):
        with pytest.raises(Apex4Error, match="dynamic shared memory"):
            bound(kernel, shared_bytes=70000)
    assert "cuLaunchKernelEx" not in driver.names()


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    launcher._driver.cache_clear()
    with pytest.raises(Apex4Error, match=r"cuda-core is needed to launch .*apex4-quant\[cuda13\]"):
        launcher.device_arch(0)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:
        raise RuntimeError("libcuda.so.1 is not found")

    monkeypatch.setattr(real, "cuInit", missing)
    launcher._driver.cache_clear()
    with pytest.raises(Apex4Error, match=r"the NVIDIA driver .* is not found"):
        launcher.device_arch(0)


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "cuInit", lambda _: (real.CUresult.CUDA_ERROR_NO_DEVICE,))
    monkeypatch.setattr(real, "cuGetErrorString", lambda _: (OK, b"no CUDA-capable device is detected"))
    launcher._driver.cache_clear()
    with pytest.raises(Apex4Error, match=r"does not start: CUDA_ERROR_NO_DEVICE \(no CUDA-capable device"):
        launcher.device_arch(0)
