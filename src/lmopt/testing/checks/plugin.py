"""Rules about a plug-in that need no model: its spec, its name, its requirements."""

import json
import os
import subprocess
import sys
import unittest
from importlib.metadata import entry_points
from unittest import mock

from lmopt.errors import NotInstalledError
from lmopt.registry import backends, pip_line
from lmopt.spec import API_VERSION
from lmopt.testing.judge import insist, refuses
from lmopt.types import DTYPE_BYTES

HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "tensorrt")
FEATURES = frozenset({"encoder", "taps", "threads", "trust"})
"""Words that a backend may declare, each proved by a check."""

_PROBE = """
import json, sys
import lmopt.registry
before = set(sys.modules)
lmopt.registry.backends.spec(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def check_spec_is_light(backend: str) -> None:
    """Loading a spec imports no framework and none of the modules that the spec requires."""
    if not entry_points(group=backends.group, name=backend):
        raise unittest.SkipTest("registered at run time: there is no entry point to load")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, backend],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    insist(done.returncode == 0, f"the spec cannot be loaded in a fresh process:\n{done.stderr}")
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    forbidden = {*HEAVY, *(need.module for need in backends.spec(backend).requires)}
    heavy = sorted(imported & forbidden)
    insist(
        not heavy,
        f"loading the spec imports {', '.join(heavy)}; a spec module may import the standard library and "
        "lmopt.spec only, and the package above it must be as light",
    )


def check_spec_is_coherent(backend: str) -> None:
    """A spec has the entry point's name, this API version, and capabilities that lmopt knows."""
    spec = backends.spec(backend)
    insist(spec.name == backend, f"the entry point is named {backend!r}, its spec {spec.name!r}")
    insist(spec.name == spec.name.lower(), f"the name {spec.name!r} is not lowercase")
    insist(spec.api == API_VERSION, f"the spec is for API {spec.api}, this lmopt has {API_VERSION}")
    module, colon, attribute = spec.engine.partition(":")
    insist(bool(module and colon and attribute), f"engine is {spec.engine!r}, not 'module:attribute'")
    for what in ("formats", "devices", "dtypes"):
        declared = getattr(spec.can, what)
        insist(
            isinstance(declared, tuple) and bool(declared) and len(set(declared)) == len(declared),
            f"can.{what} is {declared!r}; expected a tuple of distinct names",
        )
    unknown = set(spec.can.dtypes) - set(DTYPE_BYTES)
    insist(not unknown, f"can.dtypes has {sorted(unknown)}, which lmopt.types.DTYPE_BYTES does not know")
    indexed = [device for device in spec.can.devices if ":" in device]
    insist(not indexed, f"can.devices has {indexed}; devices are declared without an index")
    features = set(spec.can.features) - FEATURES
    insist(
        not features, f"can.features has {sorted(features)}, which the kit cannot prove; it knows {FEATURES}"
    )


def check_missing_module_names_the_command(backend: str) -> None:
    """Where a required module is missing, loading raises `NotInstalledError` with the pip line."""
    spec = backends.spec(backend)
    if not spec.requires:
        raise unittest.SkipTest("the backend requires no module")
    for need in spec.requires:
        # None in sys.modules is Python's own way to say "must not be imported".
        with mock.patch.dict(sys.modules, dict.fromkeys((need.module, *need.instead))):
            error = refuses(
                lambda: backends.load(backend),
                NotInstalledError,
                when=f"loading without the module {need.module!r}",
            )
        wanted = pip_line(f'"{need.install}"')
        insist(wanted in str(error), f"the message lacks the command {wanted!r}: {error}")


SPEC_CHECKS = (check_spec_is_light, check_spec_is_coherent, check_missing_module_names_the_command)
