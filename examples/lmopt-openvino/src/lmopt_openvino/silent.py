"""Import OpenVINO without what it reports home.

`import openvino` imports `openvino_telemetry`, its own dependency, writes an identifier of the user to
`~/intel` and sends an event to an analytics service, before anybody is asked. Where that package is missing
OpenVINO does without, so it is made to look missing while OpenVINO is imported.
"""

import sys
from typing import Any

_TELEMETRY = "openvino_telemetry"


def _import() -> Any:
    before = sys.modules.get(_TELEMETRY)
    # None is Python's own word for "must not be imported".
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before
    return openvino


# The other modules take `ov` from here.
ov = _import()
