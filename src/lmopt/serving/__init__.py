"""Serve a model over HTTP by OpenAI's protocol; requests of all clients share one batch.

Public names are loaded on first use: FastAPI and uvicorn come with the extra `serve`.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lmopt.serving.app import create_app as create_app
    from lmopt.serving.limits import ServeLimits as ServeLimits
    from lmopt.serving.replicas import deployment as deployment
    from lmopt.serving.server import serve as serve

_HOME: Final = {
    "ServeLimits": "lmopt.serving.limits",
    "create_app": "lmopt.serving.app",
    "deployment": "lmopt.serving.replicas",
    "serve": "lmopt.serving.server",
}
__all__ = ["ServeLimits", "create_app", "deployment", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
