"""A model on disk: a folder with a sealed manifest, written whole or not at all.

`publish` writes one, `Artifact` reads one, `cached` builds one once for all processes.
"""

from lmopt.artifact.cache import cache_folder, cached
from lmopt.artifact.folder import Artifact, is_artifact
from lmopt.artifact.manifest import MANIFEST
from lmopt.artifact.publish import Staging, publish
from lmopt.artifact.space import require_space

__all__ = [
    "MANIFEST",
    "Artifact",
    "Staging",
    "cache_folder",
    "cached",
    "is_artifact",
    "publish",
    "require_space",
]
