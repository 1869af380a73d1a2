"""Spare torch's exporter a second trace of a program that needs none: half of an export's time.

Before it translates a program, `torch.onnx` traces it once more to take apart what it has no translation of. What a
trace holds it can translate but for a few operators (casts, checks, dropout that drops nothing), which are rewritten
here in place, and for programs with anything else it traces as ever.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch

from lmopt.backends.torch.registering import replacing

_NAME: Final = "decompose_with_registry"
_aten: Final = torch.ops.aten
_Rewriting: TypeAlias = Callable[[Any, Any], None]


@contextlib.contextmanager
def decomposed_in_place() -> Iterator[None]:
    """Let torch's exporter trace only what it must while the block runs; where torch has moved the places, all."""
    try:
        from torch._export.utils import _is_cia_op, _is_preservable_cia_op
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        implemented = _decomp.get_onnx_implemented_overloads
    except (ImportError, AttributeError):
        yield
        return

    def in_place(tracing: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def decompose(program: Any, registry: Any) -> Any:
            translated = set(implemented(registry))

            def stays(target: Any) -> bool:
                if target not in translated or not isinstance(target, torch._ops.OpOverload):
                    return target in translated
                return not target._schema.is_mutable and (
                    not _is_cia_op(target) or _is_preservable_cia_op(target)
                )

            return program if rewritten(program.graph_module, stays) else tracing(program, registry)

        return decompose

    with replacing(_fx_passes, _NAME, in_place):
        yield


def rewritten(module: Any, stays: Callable[[Any], bool]) -> bool:
    """Rewrite what has no translation, if it is plain.

    Args:
        module: The graph of an exported program; changed in place, to what computes the same.
        stays: Says of an operator whether it has a translation and a second trace would leave it alone.

    Returns:
        Whether all operators of the graph have one now. Where not, the graph is as it was.
    """
    graph = module.graph
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), torch.nn.Module):
            return False  # a branch or a loop
        if node.op == "call_function" and not (
            node.target in _REWRITINGS
            or node.target in _CHECKS
            or stays(node.target)
            or _changes_its_own(node)
        ):
            return False
    for node in [one for one in graph.nodes if one.target in _IN_PLACE]:
        _compute_anew(node)
    for node in reversed(list(graph.nodes)):
        # What nobody reads goes first, and checks with it, so that nothing is kept for them.
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _REWRITINGS:
            _REWRITINGS[node.target](graph, node)
    module.recompile()
    return True


def _changes_its_own(node: Any) -> bool:
    """Say whether an operator in place changes what another has computed, and nobody looks at that in another shape."""
    if node.target not in _IN_PLACE or node.args[0].op != "call_function":
        return False
    changed = node.args[0].meta["val"].dtype
    operands = [one.meta["val"] for one in node.args[1:] if isinstance(one, torch.fx.Node)]
    if not all(isinstance(one, torch.Tensor) and one.dtype == changed for one in operands):
        return False  # the other form might give another type
    own = [node.args[0], *(one for one in node.args[0].users if one is not node)]
    return all(isinstance(one.target, torch._ops.OpOverload) and not _shows(one.target) for one in own)


def _shows(target: Any) -> bool:
    """Say whether a result of an operator may be the memory of what it was given."""
    if target in _IN_PLACE:
        return False  # it comes to give memory of its own
    return target in _REWRITINGS or any(one.alias_info is not None for one in target._schema.returns)


def _compute_anew(node: Any) -> None:
    """Write an operator in place as one that is not; who comes after it reads its result."""
    changed = node.args[0]
    node.target = _IN_PLACE[node.target]
    nodes = list(node.graph.nodes)
    for other in nodes[nodes.index(node) + 1 :]:
        other.replace_input_with(changed, node)


def _cast(graph: Any, node: Any) -> None:
    """`to`, in all its forms, is a cast or nothing."""
    source = node.args[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype and not _is_given(node):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    node.target, node.args, node.kwargs = _aten._to_copy.default, (source,), {"dtype": dtype}


def _pass_on(graph: Any, node: Any) -> None:
    """Where nothing is trained, dropout and `detach` give what they get."""
    if node.target is _aten.dropout.default and node.args[2] is not False:
        return
    if _is_given(node):
        node.target, node.args, node.kwargs = _aten.clone.default, node.args[:1], {}
        return
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _lay_in_order(graph: Any, node: Any) -> None:
    """`contiguous` is a copy where memory lies in another order: a view behind it, computed again, wants one."""
    source = node.args[0]
    if source.meta["val"].is_contiguous():
        _pass_on(graph, node)
    else:
        node.target, node.args, node.kwargs = (
            _aten.clone.default,
            (source,),
            {"memory_format": torch.contiguous_format},
        )


def _flatten(graph: Any, node: Any) -> None:
    """Write the sizes that a flattened value has."""
    source, *axes = node.args
    sizes = source.meta["val"].shape
    if not len(sizes):
        node.target, node.args, node.kwargs = _aten.reshape.default, (source, [1]), {}
        return
    first = (axes[0] if axes else 0) % len(sizes)
    last = (axes[1] if len(axes) > 1 else -1) % len(sizes)

    def insert(target: Any, *args: Any, value: Any) -> Any:
        with graph.inserting_before(node):
            found = graph.call_function(target, args)
        found.meta["val"] = value
        return found

    def size(axis: int) -> Any:
        value = sizes[axis]
        return value if isinstance(value, int) else insert(_aten.sym_size.int, source, axis, value=value)

    # A product, and no -1: of a cache that is still empty nothing could tell what that stands for.
    joined, value = size(first), sizes[first]
    for axis in range(first + 1, last + 1):
        value = value * sizes[axis]
        joined = value if isinstance(value, int) else insert(operator.mul, joined, size(axis), value=value)
    written = [*map(size, range(first)), joined, *map(size, range(last + 1, len(sizes)))]
    node.target, node.args, node.kwargs = _aten.reshape.default, (source, written), {}
    _reshape(graph, node)


def _reshape(graph: Any, node: Any) -> None:
    """Write a view of memory that lies in order: in a view a size of 0 is a size, in `reshape` it is the old one."""
    source, sizes = node.args
    shape = node.meta["val"].shape
    known = [
        int(whole) if one == -1 and isinstance(whole, int) else one
        for one, whole in zip(sizes, shape, strict=True)
    ]
    if any(isinstance(one, int) and one < 0 for one in known):
        return
    if not source.meta["val"].is_contiguous():
        with graph.inserting_before(node):
            copy = graph.call_function(
                _aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )
        copy.meta["val"] = source.meta["val"].contiguous()
        source = copy
    node.target, node.args = _aten.view.default, (source, known)


def _plain_operator(target: Any) -> _Rewriting:
    def rewrite(graph: Any, node: Any) -> None:
        node.target = target

    return rewrite


def _is_given(node: Any) -> bool:
    """Say whether a node is a result of the program, which keeps its name."""
    return any(user.op == "output" for user in node.users)


_CHECKS: Final = frozenset(
    {
        _aten._assert_async.default,
        _aten._assert_async.msg,
        _aten._assert_scalar.default,
        _aten._assert_tensor_metadata.default,
        _aten.sym_constrain_range.default,
        _aten.sym_constrain_range_for_size.default,
    }
)
_IN_PLACE: Final = {
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.div_.Tensor: _aten.div.Tensor,
}
_REWRITINGS: Final[dict[Any, _Rewriting]] = {
    _aten.to.dtype: _cast,
    _aten.to.dtype_layout: _cast,
    _aten.to.device: _cast,
    _aten.to.other: _cast,
    _aten.dropout.default: _pass_on,
    _aten.contiguous.default: _lay_in_order,
    _aten.detach.default: _pass_on,
    _aten.detach_.default: _pass_on,
    _aten.lift_fresh_copy.default: _pass_on,
    _aten.reshape.default: _reshape,
    _aten.flatten.using_ints: _flatten,
    _aten.min.other: _plain_operator(_aten.minimum.default),
    _aten.max.other: _plain_operator(_aten.maximum.default),
    _aten.__and__.Tensor: _plain_operator(_aten.bitwise_and.Tensor),
    _aten.__or__.Tensor: _plain_operator(_aten.bitwise_or.Tensor),
}
