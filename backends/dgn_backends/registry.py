"""Which backends are installed, and loading one by name: the entry-point group `dgn.backends`.

Listing reads metadata alone; only the backend that is asked for is ever imported. The built-in backends use
the same door. Knows nothing of what a backend computes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

from dgn_backends.api import ENTRY_POINT_GROUP, Backend
from dgn_backends.errors import BackendUnavailable
from dgn_backends.foreign import raised

#: The module that must be importable for a built-in backend.
_NEEDS = {"torch": "torch", "onnx": "onnxruntime", "reference": "numpy"}
#: What "auto" tries in turn, the fastest first (docs/performance.md, "Against llama.cpp"): torch computes in
#: bf16 where onnx has to compute in f32, onnx has the faster kernels for quantised weights on a CPU.
_UNQUANTISED = ("torch", "onnx", "reference")
_QUANTISED = ("onnx", "torch", "reference")
_NVIDIA = Path("/dev/nvidiactl")  # there with the driver

_UNKNOWN = "unknown"
_REQUIRED_METHODS = ("devices", "load")


@dataclass(frozen=True, slots=True, order=True)
class BackendEntry:
    """One installed entry: its name, the distribution that brought it, and `module:class`."""

    name: str
    distribution: str
    version: str
    target: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f'backend "{self.name}" of {self.distribution} {self.version}'

    def __str__(self) -> str:
        return f"{self.label} ({self.target})"


def list_backends() -> list[BackendEntry]:
    """Every installed entry, sorted by name, without importing any; a name that two distributions claim is
    there twice (see `duplicates`)."""
    return sorted(entry for entry, _ in _entries())


def duplicates(entries: Sequence[BackendEntry]) -> dict[str, list[BackendEntry]]:
    """The names that more than one entry claims, with those entries."""
    names = {entry.name for entry in entries}
    claims = {name: [entry for entry in entries if entry.name == name] for name in sorted(names)}
    return {name: claimants for name, claimants in claims.items() if len(claimants) > 1}


def claimed_by(claimants: Sequence[BackendEntry]) -> str:
    """Why a name that more than one entry claims can't be used."""
    owners = ", ".join(f"{entry.distribution} {entry.version}" for entry in sorted(claimants))
    return f"is claimed by more than one distribution: {owners}; uninstall all but one"


def label_of(name: str) -> str:
    """How messages call the backend `name`: with its distribution, where that is known. Imports nothing."""
    found = [entry for entry in list_backends() if entry.name == name]
    return found[0].label if len(found) == 1 else f'backend "{name}"'


def choose_backend(setting: str = "auto", quant: str = "none", device: str = "auto") -> str:
    """The backend's name that a setting stands for: "auto" takes the fastest one for `quant` and `device`
    that is listed and whose library is installed. Imports nothing.

    Raises BackendUnavailable when there is none, or when the named one is not installed.
    """
    entries = list_backends()
    names = {entry.name for entry in entries}
    if setting != "auto":
        if setting not in names:
            raise _not_installed(setting, entries)
        for entry in entries:
            _refuse_without_library(entry, setting)
        return setting
    on_gpu = device.startswith("cuda") or (device == "auto" and _NVIDIA.exists())
    for name in _UNQUANTISED if quant == "none" or on_gpu else _QUANTISED:
        if name in names and importlib.util.find_spec(_NEEDS[name]) is not None:
            return name
    raise BackendUnavailable(
        f"no usable backend is installed ({_listing(entries)}); "
        "install one: pip install 'distributed-gpt-node[onnx]'"
    )


def _refuse_without_library(entry: BackendEntry, wanted: str) -> None:
    """As importing it would, as far as that is known beforehand."""
    module = _NEEDS.get(entry.name)
    if entry.name == wanted and module is not None and importlib.util.find_spec(module) is None:
        why = f"it needs the Python module {module}, which is not installed"
        raise _unavailable(entry, why, _install(entry, module))


def load_backend(name: str) -> Backend:
    """Imports the backend `name`, and only that one, and makes an instance.

    Raises BackendUnavailable, one line saying which entry of which distribution, why, and what to do.
    """
    found = [(entry, point) for entry, point in _entries() if entry.name == name]
    if not found:
        raise _not_installed(name, list_backends())
    if len(found) > 1:
        raise BackendUnavailable(
            f'backend "{name}" {claimed_by([entry for entry, _ in found])}', backend=name
        )
    entry, point = found[0]
    return _instance(entry, _import(entry, point))


def _entries() -> list[tuple[BackendEntry, EntryPoint]]:
    """A distribution whose metadata is damaged is passed over or called unknown: it hurts no other."""
    entries: list[tuple[BackendEntry, EntryPoint]] = []
    seen: set[str] = set()
    for owner in importlib.metadata.distributions():
        try:
            points = owner.entry_points.select(group=ENTRY_POINT_GROUP)
        except (OSError, ValueError):
            continue
        if not points:
            continue
        distribution, version = _owner(owner)
        if distribution in seen and distribution != _UNKNOWN:
            continue  # further down sys.path, and so never imported
        seen.add(distribution)
        entries += [(BackendEntry(point.name, distribution, version, point.value), point) for point in points]
    return entries


def _owner(owner: importlib.metadata.Distribution) -> tuple[str, str]:
    try:
        return str(owner.metadata["Name"] or _UNKNOWN), str(owner.metadata["Version"] or _UNKNOWN)
    except (OSError, ValueError, LookupError):
        return _UNKNOWN, _UNKNOWN


def _import(entry: BackendEntry, point: EntryPoint) -> object:
    try:
        return point.load()
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if entry.target.startswith(missing):
            raise _unavailable(entry, f"its module {missing} is missing", _reinstall(entry)) from error
        raise _unavailable(
            entry, f"it needs the Python module {missing}, which is not installed", _install(entry, missing)
        ) from error
    except AttributeError as error:
        raise _unavailable(entry, f"it can't be loaded: {raised(error)}", _reinstall(entry)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # importing runs foreign code, which may raise anything
        raise _unavailable(entry, f"importing it raised {raised(error)}", _reinstall(entry)) from error


def _instance(entry: BackendEntry, target: object) -> Backend:
    if not isinstance(target, type):
        raise _unavailable(entry, "its entry point does not name a class", _reinstall(entry))
    if getattr(target, "name", None) != entry.name:
        found = getattr(target, "name", None)
        raise _unavailable(entry, f'its class says name = {found!r}, not "{entry.name}"', _reinstall(entry))
    for method in _REQUIRED_METHODS:
        if not callable(getattr(target, method, None)):
            raise _unavailable(entry, f"its class has no method {method}", _reinstall(entry))
    try:
        backend: Backend = target()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the constructor is foreign code, which may raise anything
        raise _unavailable(entry, f"making it raised {raised(error)}", _reinstall(entry)) from error
    return backend


def _not_installed(name: str, entries: Sequence[BackendEntry]) -> BackendUnavailable:
    return BackendUnavailable(
        f'no backend "{name}" is installed ({_listing(entries)}); '
        "choose one of these, or pip install the distribution that brings it",
        backend=name,
    )


def _listing(entries: Sequence[BackendEntry]) -> str:
    return "installed: " + (", ".join(sorted({entry.name for entry in entries})) or "none")


def _unavailable(entry: BackendEntry, why: str, remedy: str) -> BackendUnavailable:
    line = " ".join(f"{entry}: {why}; {remedy}".split())
    return BackendUnavailable(line, backend=entry.name, distribution=entry.distribution)


def _install(entry: BackendEntry, module: str) -> str:
    """What to run: the distribution's extra of the backend's name where it has one, else the module's
    name."""
    try:
        extras = importlib.metadata.metadata(entry.distribution).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        extras = []
    if entry.name in extras:
        return f"pip install '{entry.distribution}[{entry.name}]'"
    package = re.split(r"\W", module, maxsplit=1)[0]
    return f"pip install {package}"


def _reinstall(entry: BackendEntry) -> str:
    return f"reinstall or update {entry.distribution}, or choose another backend"
