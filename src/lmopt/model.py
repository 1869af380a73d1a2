"""A language model in memory: weights, tokenizer and facts."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmopt.artifact import Artifact, is_artifact
from lmopt.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    NotInstalledError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.registry import pip_line
from lmopt.spec import Requirement
from lmopt.tokenizer import Tokenizer
from lmopt.types import ModelFacts, SourceFacts

if TYPE_CHECKING:
    from torch import nn

    from lmopt.backends.torch.description import Loaded
    from lmopt.evaluation.loss import CompressionReport

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NEEDED = ("torch", "transformers")


class Model:
    """Weights, tokenizer and facts of one language model.

    Make one with `from_pretrained` or `from_module`; both leave the module in evaluation mode.
    """

    def __init__(self, loaded: "Loaded", source: str, recipe: Sequence[Mapping[str, Any]] = ()) -> None:
        self._loaded = loaded
        self.source = source
        self.recipe: tuple[Mapping[str, Any], ...] = tuple(recipe)
        """Steps by which the model was compressed, as plain data; empty for one that was not."""
        self.report: CompressionReport | None = None
        """What these steps cost, where this process has measured it."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        trust: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        keep_quantization: bool = False,
        progress: bool = False,
    ) -> "Model":
        """Load a model from disk, or from the Hugging Face hub.

        Args:
            source: A Hugging Face folder, a `.gguf` file, an lmopt artefact, or a hub id such as
                `"HuggingFaceTB/SmolLM2-135M-Instruct"`. What exists on disk comes first. Only a
                hub id opens a connection; the files go to Hugging Face's own cache. `HF_HUB_OFFLINE=1`
                or `local_files_only` keeps it to what is there.
            dtype: Type of the weights: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, their own
                (float32 for quantized GGUF files). Weights that stay quantized keep their float32 scales.
            trust: Whether code and pickled weights that come with the model may run.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Take a hub id from the local cache only.
            keep_quantization: Of a GGUF file: carry its codes, scales and offsets over as they are (types
                Q4_0 to Q8_0 and Q2_K to Q6_K), bit by bit, instead of dequantizing them. A folder whose
                weights are quantized, by lmopt, compressed-tensors, GPTQ or AWQ, is always loaded so.
            progress: Whether to show progress bars.

        Raises:
            ArtifactNotFoundError: There is nothing usable at `source`.
            UnsafeArtifactError: Reading it would run code or leave its folder.
            CorruptArtifactError: A file is damaged, or weights are missing or left over.
            UnsupportedError: It is no language model that writes, has no quantization to keep, or has one that
                lmopt does not know.
            UnsupportedOptionError: `dtype` is unknown, or `keep_quantization` is given for no GGUF file.
            NotInstalledError: torch or transformers is missing.
        """
        path = Path(source).expanduser()
        recipe: Sequence[Mapping[str, Any]] = ()
        if keep_quantization and not path.is_file():
            raise UnsupportedOptionError(
                f"keep_quantization is for .gguf files; {source} is a folder or a hub id. One whose weights are "
                "quantized stays so without it."
            )
        if is_artifact(path):
            artifact = Artifact.open(path)
            _check_artifact(artifact)
            recipe = artifact.manifest["recipe"].get("steps") or ()
        elif path.is_file():
            if not _is_gguf(path):
                raise ArtifactError(
                    f"{path} is a file, but no GGUF file. Give a .gguf file, or the folder that holds "
                    "config.json."
                )
            _require_torch()
            from lmopt.backends.torch.gguf import load_gguf

            loaded = load_gguf(path, dtype=dtype, keep_quantization=keep_quantization, progress=progress)
            return cls(loaded, path.name)
        name = path.name
        if not path.is_dir():
            name = _hub_id(source)
            _require_torch()
            from lmopt.backends.torch.hub import fetch

            path = fetch(name, revision=revision, local_files_only=local_files_only, trust=trust)
        _require_torch()
        from lmopt.backends.torch.loading import load_folder

        return cls(load_folder(path, dtype=dtype, trust=trust, progress=progress), name, recipe)

    @classmethod
    def from_module(
        cls,
        module: "nn.Module",
        tokenizer: Any = None,
        *,
        config: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        source: SourceFacts | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> "Model":
        """Take a module that meets `lmopt.backends.torch.language_model.LanguageModel`.

        Args:
            module: A module that maps ids and a state to logits and a state, one that only maps
                ids to logits, or a transformers model. It is put into evaluation mode.
            tokenizer: A `lmopt.Tokenizer`, a `tokenizers.Tokenizer`, a fast tokenizer of
                transformers, or `None` to work with token ids.
            config: Description of the module to keep with it, as plain data.
            vocab_size: Size of the logits' last axis; found by running the module if omitted.
            context_length: Most positions the module can take; `None` where it has no limit. Taken
                from `config` or the transformers model if omitted.
            source: What the encoder of an own encoder-decoder reads, which meets
                `lmopt.backends.torch.encoder_decoder.EncoderDecoderModel`; `None` for a module without one.
            generation_config: Defaults of generation, by the names of `lmopt.GenerationConfig`.

        Raises:
            UnsupportedError: The module does not map ids to logits, is not causal, answers with NaN, or has
                another vocabulary than `vocab_size`.
            UnsupportedOptionError: `config`, `vocab_size` or `source` for a transformers model, which states them.
            TokenizerError: The tokenizer needs Python code of its own.
        """
        _require_torch()
        from lmopt.backends.torch import description
        from lmopt.backends.torch.language_model import is_transformers
        from lmopt.backends.torch.tokenizer import as_tokenizer

        known = None if tokenizer is None else as_tokenizer(tokenizer)
        if is_transformers(module):
            if config is not None or vocab_size is not None or source is not None:
                raise UnsupportedOptionError(
                    "a transformers model states its own config, vocab_size and source"
                )
            loaded = description.from_transformers(module, known)
            if context_length is not None:
                loaded.facts = replace(loaded.facts, context_length=context_length)
        else:
            module.eval()
            found = description.find_vocab_size(module, source)
            if vocab_size not in (None, found):
                raise UnsupportedError(
                    f"vocab_size is {vocab_size}, but the module's logits have {found} values"
                )
            loaded = description.Loaded(
                module=module,
                facts=ModelFacts(
                    vocab_size=found,
                    context_length=context_length or description.context_length(config or {}),
                    parameters=description.count_parameters(module),
                    architecture=type(module).__name__,
                    source=source,
                ),
                tokenizer=known,
                config=dict(config or {}),
            )
        if generation_config is not None:
            loaded.generation_config = dict(generation_config)
        return cls(loaded, type(module).__name__)

    def with_module(self, module: "nn.Module", *, recipe: Sequence[Mapping[str, Any]] = ()) -> "Model":
        """Make a model of another module with this one's tokenizer.

        Args:
            module: A module that reads and answers as this model's does.
            recipe: Steps by which it was made from this one, added to this model's own.
        """
        from lmopt.backends.torch.description import describe_again

        return Model(describe_again(self._loaded, module), self.source, [*self.recipe, *recipe])

    @property
    def module(self) -> "nn.Module":
        """The live module."""
        return self._loaded.module

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer with its chat template, `None` where it has none."""
        return self._loaded.tokenizer

    @property
    def facts(self) -> ModelFacts:
        """Vocabulary size, context length, number of distinct weights, class."""
        return self._loaded.facts

    @property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`; what `from_module` was given for own modules."""
        return self._loaded.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's defaults of generation that differ from transformers' own."""
        return self._loaded.generation_config

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        quantization_format: str = "lmopt",
        dequantize: bool = False,
    ) -> Artifact:
        """Save as a folder that is an lmopt artefact and a Hugging Face model at once.

        A module of your own is saved as weights and tokenizer only, since its class is code. Read
        it back with `Model.from_module(MyModule(...), tokenizer).load_weights(folder)`.

        Args:
            folder: Folder to create; it appears complete or not at all.
            overwrite: Replace an artefact that is there.
            quantization_format: How quantized weights are stored: `"lmopt"`, which holds all of them, or
                `"compressed-tensors"`, which transformers (with `pip install compressed-tensors`) and vLLM
                read too. Their values are the same bit by bit; lmopt reads both.
            dequantize: With `"compressed-tensors"`: write parts in float that it cannot hold (embeddings,
                heads tied to one, float offsets), instead of refusing.

        Raises:
            UnsupportedOptionError: `quantization_format` is unknown or cannot hold the model; the parts and
                the reason are named, and nothing is written.
            ArtifactExistsError: Something is there that must not be replaced.
            DiskFullError: The disk cannot hold it.
        """
        from lmopt.backends.torch.saving import save

        report = None if self.report is None else self.report.to_dict()
        return save(
            self._loaded,
            Path(folder),
            source=self.source,
            overwrite=overwrite,
            recipe=list(self.recipe),
            report=report,
            quantization_format=quantization_format,
            dequantize=dequantize,
        )

    def load_weights(self, folder: str | os.PathLike[str]) -> "Model":
        """Replace the weights by those of an artefact that a module of this class was saved to.

        Returns:
            This model.

        Raises:
            ArtifactNotFoundError: There is no artefact, or it holds no safetensors weights.
            CorruptArtifactError: It is damaged, or its weights do not fit this module.
        """
        from lmopt.backends.torch.saving import load_weights

        load_weights(self.module, Path(folder))
        return self

    def fingerprint(self) -> str:
        """Hash configuration and weights: 64 hexadecimal digits, equal for equal models.

        Computed anew at each call, since a live module can be trained further.
        """
        from lmopt.backends.torch.saving import fingerprint

        return fingerprint(self.module, self.config)


def _check_artifact(artifact: Artifact) -> None:
    """Refuse artefacts whose weights cannot become a module by themselves."""
    stated = artifact.manifest["formats"].get("safetensors")
    if stated is None:
        raise ArtifactNotFoundError(
            f"{artifact.path} holds {', '.join(artifact.formats) or 'no format'}, but no safetensors "
            "weights, which a "
            f"Model is made of. Run it as it is with lmopt.Runtime({str(artifact.path)!r}), or save the "
            "original: "
            f"lmopt export ORIGINAL --format safetensors OUT"
        )
    if stated.get("library") == "custom":
        raise UnsupportedError(
            f"{artifact.path} holds weights of your own class {stated.get('class')}, whose code it does not "
            "hold. Build "
            "the module first: "
            f"lmopt.Model.from_module({stated.get('class')}(...)).load_weights({str(artifact.path)!r})"
        )


def _hub_id(source: str | os.PathLike[str]) -> str:
    """Take what is not on disk for a hub id, unless it cannot be one."""
    name = os.fspath(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise ArtifactNotFoundError(
            f"{name} does not exist, and it is no Hugging Face hub id either (those look like owner/name). "
            f"Check the path; relative ones start at {Path.cwd()}."
        )
    return name


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def _require_torch() -> None:
    missing = [name for name in _NEEDED if not Requirement(name, "").is_met()]
    if missing:
        extra = '"lmopt[torch]"'
        raise NotInstalledError(
            f"loading weights needs {' and '.join(missing)}, which this Python lacks: {pip_line(extra)}. "
            "An exported artefact runs without: lmopt.Runtime(folder)."
        )
