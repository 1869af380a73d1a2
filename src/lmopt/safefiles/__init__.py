"""Bounded readers of untrusted model files.

A length that a file states is a claim: it is compared with what the file can hold before a byte is
allocated for it. Everything here runs nothing, reads headers only (and tensors by them), and raises
`CorruptArtifactError` or `UnsafeArtifactError` with the file and the fault in the message.
"""

from lmopt.safefiles.gguf import GgufArray, GgufHeader, GgufTensor, check_gguf, read_tensor
from lmopt.safefiles.onnx import ExternalData, check_onnx_external_data, onnx_boundary
from lmopt.safefiles.paths import contained, hub_blobs, open_regular
from lmopt.safefiles.safetensors import SafetensorsHeader, StoredTensor, check_safetensors, check_shard_index
from lmopt.safefiles.strictjson import parse_json, read_json

__all__ = [
    "ExternalData",
    "GgufArray",
    "GgufHeader",
    "GgufTensor",
    "SafetensorsHeader",
    "StoredTensor",
    "check_gguf",
    "check_onnx_external_data",
    "check_safetensors",
    "check_shard_index",
    "contained",
    "hub_blobs",
    "onnx_boundary",
    "open_regular",
    "parse_json",
    "read_json",
    "read_tensor",
]
