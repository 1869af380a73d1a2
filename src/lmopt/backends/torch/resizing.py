"""Parts of another size than a model's code and configuration give them: how they are cut, told and rebuilt.

transformers builds all layers alike. Where layers differ in width, `config.json` says so in its field
`lmopt_widths`, path of a linear to `[outputs, inputs]`; a module of one's own has it, and the blocks that
were kept, in the attribute `lmopt_structure` and in the artefact's manifest.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantizing import is_conv1d, matrix_of, set_matrix, set_part
from lmopt.errors import CorruptArtifactError

Blocks: TypeAlias = nn.ModuleList | nn.Sequential
"""A list of blocks."""
WIDTHS: Final = "lmopt_widths"
"""Field of `config.json` with the size of each linear that has another one than the configuration says."""
_STRUCTURE: Final = "lmopt_structure"


def cut(part: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep some outputs and inputs of a linear, in place.

    Args:
        part: A linear, or GPT-2's `Conv1D`.
        rows: `(kept,)` int64 outputs, all where `None`.
        columns: `(kept,)` int64 inputs, all where `None`.
    """
    linear: Any = part
    matrix = matrix_of(linear).detach()
    if columns is not None:
        matrix = matrix[:, columns]
    if rows is not None:
        matrix = matrix[rows]
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[rows], linear.bias.requires_grad)
    set_matrix(linear, matrix.contiguous())
    tell_size(linear)


def tell_size(part: nn.Module) -> None:
    """Let a linear's own figures say how large its weight is."""
    linear: Any = part
    outputs, inputs = matrix_of(linear).shape
    if is_conv1d(linear):
        linear.nf, linear.nx = outputs, inputs
    else:
        linear.out_features, linear.in_features = outputs, inputs


def stated_widths(module: nn.Module) -> dict[str, list[int]]:
    """Sizes that a transformers model's `lmopt_widths` gives; none for a module of one's own."""
    config = getattr(module, "config", None) if is_transformers(module) else None
    found: dict[str, list[int]] = dict(getattr(config, WIDTHS, None) or {})
    return found


def structure_of(module: nn.Module) -> dict[str, Any]:
    """Give what is to be told of a module of one's own: `{"blocks": {path: kept}, "widths": {path: sizes}}`."""
    found: dict[str, Any] = getattr(module, _STRUCTURE, {})
    return {} if is_transformers(module) else dict(found)


def tell_structure(
    module: nn.Module,
    *,
    blocks: Mapping[str, list[int]] | None = None,
    widths: Mapping[str, list[int]] | None = None,
) -> None:
    """Note on a module of one's own what was cut out of it, after what was noted before."""
    # Any: nn.Module's attributes are tensors or modules to a type checker.
    noted: Any = module
    before = structure_of(module)
    kept = dict(before.get("blocks", {}))
    for path, places in (blocks or {}).items():
        # Places are those of the module as it was written.
        kept[path] = [kept[path][place] for place in places] if path in kept else list(places)
    found = {"blocks": kept, "widths": {**before.get("widths", {}), **(widths or {})}}
    noted.lmopt_structure = {name: one for name, one in found.items() if one}


def apply_structure(module: nn.Module, structure: Any, name: str) -> None:
    """Bring a freshly built module into the form in which weights were saved.

    A module that has this form already is left as it is.

    Args:
        module: The module.
        structure: From `structure_of`.
        name: What is loaded, for messages.

    Raises:
        CorruptArtifactError: It is malformed, or does not fit the module.
    """
    if not isinstance(structure, Mapping):
        raise CorruptArtifactError(f"the structure of {name} must be a mapping")
    if structure_of(module) == structure:
        return
    for path, kept in _mapping(structure.get("blocks", {}), "blocks", name):
        blocks = _part(module, path, name)
        if not isinstance(blocks, Blocks) or not _whole_numbers(kept, 0, len(blocks)):
            raise CorruptArtifactError(
                f"{name} keeps the blocks {kept} of {path}, which {type(module).__name__} does not have. Build the "
                "module as it was before blocks were dropped"
            )
        set_part(module, path, some_blocks(blocks, kept))
        reindex(blocks, kept)
    apply_widths(module, structure.get("widths", {}), name)
    tell_structure(module, blocks=structure.get("blocks"), widths=structure.get("widths"))


def apply_widths(module: nn.Module, widths: Any, name: str) -> None:
    """Give linears the sizes that they were saved with; their weights are then undefined.

    Args:
        module: The module.
        widths: Path to `[outputs, inputs]`, neither larger than it is.
        name: What is loaded, for messages.

    Raises:
        CorruptArtifactError: It is malformed, or does not fit the module.
    """
    for path, sizes in _mapping(widths, WIDTHS, name):
        part: Any = _part(module, path, name)
        if type(part) is not nn.Linear and not is_conv1d(part):
            raise CorruptArtifactError(
                f"{name} states the size of {path}, which is a {type(part).__name__}, no linear"
            )
        outputs, inputs = matrix_of(part).shape
        fits = (
            isinstance(sizes, list | tuple)
            and len(sizes) == 2
            and _whole_numbers(sizes, 1, max(outputs, inputs) + 1)
        )
        if not fits or sizes[0] > outputs or sizes[1] > inputs:
            raise CorruptArtifactError(
                f"{name} states the size {sizes} of {path}, which is cut out of {outputs, inputs}"
            )
        with torch.no_grad():
            set_matrix(part, matrix_of(part).new_empty(tuple(sizes)))
            if part.bias is not None:
                part.bias = nn.Parameter(part.bias.new_empty(sizes[0]), part.bias.requires_grad)
        tell_size(part)


def some_blocks(blocks: Blocks, kept: list[int]) -> Blocks:
    """Make a list, of the same kind, of some of its blocks."""
    some = [blocks[place] for place in kept]
    return nn.ModuleList(some) if isinstance(blocks, nn.ModuleList) else nn.Sequential(*some)


def reindex(blocks: Blocks, kept: list[int]) -> None:
    """Let kept blocks, by their own count of themselves, say where they stand now.

    What counts blocks is found by its value: a whole number, on the same part of every block, that is the
    block's place.

    Args:
        blocks: All blocks.
        kept: Places of those that are kept, in order.
    """
    for path, part in blocks[0].named_modules():
        for field, value in list(vars(part).items()):
            if type(value) is not int:
                continue
            owners = [block.get_submodule(path) for block in blocks]
            if all(vars(owner).get(field) == place for place, owner in enumerate(owners)):
                for place, old in enumerate(kept):
                    setattr(owners[old], field, place)


def _mapping(found: Any, what: str, name: str) -> list[tuple[str, Any]]:
    if not isinstance(found, Mapping) or not all(isinstance(path, str) for path in found):
        raise CorruptArtifactError(f"{what} of {name} must map paths of parts")
    return list(found.items())


def _part(module: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise CorruptArtifactError(f"{name} tells of {path}, which {type(module).__name__} lacks") from None


def _whole_numbers(values: Any, least: int, end: int) -> bool:
    return isinstance(values, list | tuple) and all(type(one) is int and least <= one < end for one in values)
