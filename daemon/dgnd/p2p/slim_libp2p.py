"""Imports of py-libp2p without what its packages pull in: QUIC, WebSocket, DHT, mDNS, relays, HTTP clients.

`libp2p/__init__.py` and two packages below it import everything that a host could have; nothing of that is
used here, and their submodules import fine without it. So these packages are put in place empty, and run
their own code only when something asks for a name that they don't have yet: whoever writes
`from libp2p import new_host` still gets it. Of those used, `libp2p.custom_types` names a class of QUIC in
a type, and would bring aioquic with it: it is imported first, while there seems to be no aioquic. Measured:
a third of the daemon's start and of its memory, and more by the latter (docs/performance.md).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_HEAVY = ("libp2p", "libp2p.transport", "libp2p.network")  #: a parent before its child
_AIOQUIC, _OF_AIOQUIC = "aioquic.quic.connection", "libp2p.transport.quic.stream"


class _Postponed(ModuleType):
    """A package whose own code has not run yet."""

    def __init__(self, spec: importlib.machinery.ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__package__ = spec, spec.loader, spec.name
        self.__file__ = spec.origin
        self.__path__ = list(spec.submodule_search_locations or ())

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":  # the import system asks for such names
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]  # Python allows it for modules
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(self)
        return getattr(self, name)


def postpone() -> None:
    """Puts the packages in place, those that nobody has imported already."""
    for name in _HEAVY:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None, f"{name} is not installed"
            package = sys.modules[name] = _Postponed(spec)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, package)
    if _OF_AIOQUIC not in sys.modules and _AIOQUIC not in sys.modules:
        _import_without_aioquic()


def _import_without_aioquic() -> None:
    """Imports what names a class of QUIC; whoever wants QUIC later imports that class's module anew."""
    sys.modules[_AIOQUIC] = None  # type: ignore[assignment]  # Python says ImportError then
    try:
        importlib.import_module("libp2p.custom_types")
    finally:
        del sys.modules[_AIOQUIC]
        sys.modules.pop(_OF_AIOQUIC, None)
