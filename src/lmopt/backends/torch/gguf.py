"""Load a GGUF file as a plain float model, or with its quantized weights as they are.

transformers reads GGUF itself, but for most architectures parses the file three times, builds its
table of names once for every submodule, and leaves a model that cannot be saved. Here its parts
run once each, on a file whose header `lmopt.safefiles` has checked.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as reader
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lmopt.backends.torch.description import Loaded, from_transformers
from lmopt.backends.torch.gguf_grids import keep_grids
from lmopt.backends.torch.loading import check_dtype, quiet, require_complete, require_language_model
from lmopt.backends.torch.tokenizer import as_tokenizer
from lmopt.errors import CorruptArtifactError, LmoptError, NotInstalledError, UnsupportedError
from lmopt.registry import pip_line
from lmopt.safefiles import check_gguf

# Types of GGUF that hold plain numbers, largest first.
_PLAIN_TYPES: Final = {0: "float32", 30: "bfloat16", 1: "float16"}

_lock = threading.Lock()


def load_gguf(
    path: Path, *, dtype: str = "auto", keep_quantization: bool = False, progress: bool = False
) -> Loaded:
    """Load a GGUF file, dequantized.

    Args:
        path: The file.
        dtype: `"auto"` gives float32, or the file's own type where it is not quantized.
        keep_quantization: Carry codes, scales and offsets of linears and embeddings over as they are
            in the file, instead of dequantizing them.
        progress: Whether to show progress bars.

    Raises:
        CorruptArtifactError: The file is truncated or malformed, or weights are missing.
        UnsupportedError: transformers cannot read this architecture from GGUF, or the file holds no
            grid that could be kept.
        NotInstalledError: The `gguf` package is missing.
    """
    check_dtype(dtype)
    header = check_gguf(path)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(f"GGUF files need the gguf package: {pip_line('lmopt[gguf]')}") from error
    if dtype == "auto":
        types = {tensor.type for tensor in header.tensors.values()}
        half = [name for kind, name in _PLAIN_TYPES.items() if kind in types and kind]
        dtype = half[0] if half and types <= _PLAIN_TYPES.keys() else "float32"
    # A grid is recognised by its float32 values.
    first = "float32" if keep_quantization else dtype
    with quiet(progress), _parsed_once(path, progress):
        try:
            module, tokenizer = _load(path, getattr(torch, first))
        except (LmoptError, MemoryError):
            raise
        except (NotImplementedError, ValueError, KeyError) as error:
            architecture = header.metadata.get("general.architecture")
            raise UnsupportedError(
                f"{path}: transformers {transformers.__version__} cannot read this {architecture} model "
                "from GGUF "
                f"({type(error).__name__}: {error}). Use the model's Hugging Face folder instead."
            ) from error
        except Exception as error:
            raise CorruptArtifactError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    settings = module.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # transformers leaves these to whoever converts the file.
        found = getattr(tokenizer, name)
        if getattr(settings, name) is None and found is not None:
            setattr(settings, name, found)
    if keep_quantization:
        module = keep_grids(path, header, module).to(getattr(torch, dtype))
    return from_transformers(module, as_tokenizer(tokenizer))


def _load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    folder, name = str(path.parent.absolute()), path.name
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)
    require_language_model(config, str(path))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{path} holds an encoder-decoder; lmopt reads those from Hugging Face folders, not from .gguf files"
        )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if _has_own_path(path):
        module, report = kind.from_pretrained(
            folder,
            gguf_file=name,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
        )
    else:
        with torch.device("meta"):
            shell = kind._from_config(config)
        tensors = reader.load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=_Names(shell), torch_dtype=dtype
        )["tensors"]
        module, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    require_complete(report, str(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    return module, tokenizer


def _has_own_path(path: Path) -> bool:
    """Say whether transformers has its newer reader for the architecture, which is quick already."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # before transformers 5.20
        return False
    supported: bool = is_gguf_arch_supported(check_gguf(path).metadata.get("general.architecture"))
    return supported


class _Names:
    """What transformers' table of GGUF names needs of a model, without its 400 submodules.

    The table is rebuilt for every submodule it is shown; only the inner model, whose names some
    files use, can add anything to it.
    """

    def __init__(self, model: Any, *, depth: int = 1) -> None:
        self.config = model.config
        self.state_dict = model.state_dict
        self._children = [
            (name, _Names(child, depth=depth - 1))
            for name, child in (model.named_children() if depth else ())
            if isinstance(child, transformers.PreTrainedModel)
        ]

    def named_children(self) -> list[tuple[str, "_Names"]]:
        return self._children


@contextmanager
def _parsed_once(path: Path, progress: bool) -> Iterator[None]:
    """Let all of transformers' readers of this file share one parse, which takes seconds each."""
    import gguf

    parse, checkpoint, bar = gguf.GGUFReader, reader.load_gguf_checkpoint, reader.tqdm
    wanted = path.absolute()
    parsed: dict[str, Any] = {}

    def shared_reader(name: Any, *args: Any, **options: Any) -> Any:
        if Path(name).absolute() != wanted or args or options:
            return parse(name, *args, **options)
        if "reader" not in parsed:
            parsed["reader"] = parse(name)
        return parsed["reader"]

    def shared_checkpoint(name: Any, return_tensors: bool = False, **options: Any) -> Any:
        if Path(name).absolute() != wanted or return_tensors:
            return checkpoint(name, return_tensors, **options)
        if "checkpoint" not in parsed:
            parsed["checkpoint"] = checkpoint(name, **options)
        return copy.deepcopy(parsed["checkpoint"])

    def silent(*args: Any, **options: Any) -> Any:
        return bar(*args, **{**options, "disable": not progress})

    with _lock:
        gguf.GGUFReader, reader.load_gguf_checkpoint, reader.tqdm = shared_reader, shared_checkpoint, silent
        try:
            yield
        finally:
            gguf.GGUFReader, reader.load_gguf_checkpoint, reader.tqdm = parse, checkpoint, bar
