"""Decide from a backend's declared capabilities which checks run on which cases."""

import fnmatch
import itertools
import unittest
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmopt.errors import UnsupportedOptionError
from lmopt.registry import backends, exporters
from lmopt.testing.case import Case
from lmopt.testing.checks import ENCODER_CHECKS, ENGINE_CHECKS, SPEC_CHECKS, check_name
from lmopt.testing.workshop import ENCODER_MODELS, LIVE, MODELS, Workshop, exporter_for, missing_device


@dataclass(frozen=True, slots=True)
class PlannedCheck:
    """One check, bound to what it examines; call it to run it.

    Attributes:
        name: Name of the check without `check_`.
        case: What it examines, such as `"llama-onnx-cpu-float32"`, or `"spec"`; a dialect that is not the
            format's default follows the format.
        rule: The rule that it proves.
        action: Runs it; raises `unittest.SkipTest` where the rule does not apply.
        expected_failure: Reason why it is expected to fail, `""` where it is not.
    """

    name: str
    case: str
    rule: str
    action: Callable[[], None]
    expected_failure: str = ""

    @property
    def id(self) -> str:
        """`name[case]`, as reports and `expected_failures` write it."""
        return f"{self.name}[{self.case}]"

    def __call__(self) -> None:
        """Run the check."""
        self.action()


def plan(
    backend: str,
    *,
    models: Sequence[str] = (*MODELS, *ENCODER_MODELS),
    devices: Sequence[str] | None = None,
    dialects: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    workshop: Workshop | None = None,
) -> list[PlannedCheck]:
    """List every check that a backend's capabilities call for, building no model yet.

    Args:
        backend: Name of the backend.
        models: Tiny models to run, of `lmopt.testing.models` and `lmopt.testing.seq2seq`; the latter only where the
            backend declares the feature `"encoder"`, and in float32.
        devices: Devices to run on; those declared by the spec where `None`.
        dialects: Dialects to run, of the exporters' targets; all where `None`. To write a model takes longer than all
            its checks, so a backend that reads one dialect only had better say which.
        expected_failures: Check to reason. A key is a check's name (all its cases), an id
            `name[case]`, or a pattern for ids with `*`.
        workshop: Where models are built; its own where `None`.

    Raises:
        UnsupportedOptionError: A model or a dialect is unknown, or a key of `expected_failures` fits no check.
        PluginError: The backend's spec cannot be loaded.
    """
    unknown = set(models) - {*MODELS, *ENCODER_MODELS}
    if unknown:
        known = [*MODELS, *ENCODER_MODELS]
        raise UnsupportedOptionError(f"no tiny model is named {sorted(unknown)}; there are {known}")
    can = backends.spec(backend).can
    if dialects is not None:
        _check_dialects(dialects, can.formats)
    workshop = workshop or Workshop()
    planned = [_of_spec(backend, check) for check in SPEC_CHECKS]
    usable = []
    for device in devices or can.devices:
        if reason := missing_device(device, live=LIVE in can.formats):
            planned.append(PlannedCheck("device", device, reason, _skip(reason)))
        else:
            usable.append(device)
    for model_format in can.formats:
        if model_format != LIVE and not exporter_for(model_format):
            reason = f"no installed exporter writes the format {model_format!r}"
            planned.append(PlannedCheck("format", model_format, reason, _skip(reason)))
            continue
        for model, target, device, dtype in itertools.product(
            models, _dialects(model_format, dialects), usable, can.dtypes
        ):
            encodes = model in ENCODER_MODELS
            # Their graphs are as many again, and their dialects and types no others than those of the rest.
            if encodes and ("encoder" not in can.features or target or dtype != "float32"):
                continue
            make = workshop.case(backend, model, model_format, device, dtype, target)
            case = "-".join(part for part in (model, model_format, target, device, dtype) if part)
            checks = ENCODER_CHECKS if encodes else ENGINE_CHECKS
            planned += [_of_case(check, case, make) for check in checks]
    return _mark(planned, expected_failures or {})


def _dialects(model_format: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Name the dialects of a format that are to be run; the default one is empty."""
    if model_format == LIVE:
        return ("",)
    first, *others = exporters.spec(exporter_for(model_format)).targets
    written = {"": first, **{one: one for one in others}}
    return tuple(key for key, name in written.items() if wanted is None or name in wanted)


def _check_dialects(wanted: Sequence[str], formats: Iterable[str]) -> None:
    """Refuse dialects that no exporter of the formats writes: their checks would be missed by nobody."""
    names = [exporter_for(one) for one in formats if one != LIVE]
    known = {target for name in names if name for target in exporters.spec(name).targets}
    if unknown := set(wanted) - known:
        raise UnsupportedOptionError(
            f"no exporter writes the dialect {min(unknown)!r}; there are {sorted(known)}"
        )


def _of_spec(backend: str, check: Callable[[str], None]) -> PlannedCheck:
    return PlannedCheck(check_name(check), "spec", _rule(check), lambda: check(backend))


def _of_case(check: Callable[[Case], None], name: str, make: Callable[[], Case]) -> PlannedCheck:
    return PlannedCheck(check_name(check), name, _rule(check), lambda: check(make()))


def _rule(check: Callable[..., None]) -> str:
    return (check.__doc__ or "").strip()


def _skip(reason: str) -> Callable[[], None]:
    def action() -> None:
        raise unittest.SkipTest(reason)

    return action


def _mark(planned: Iterable[PlannedCheck], expected: Mapping[str, str]) -> list[PlannedCheck]:
    marked, used = [], set()
    for check in planned:
        keys = [key for key in expected if key in (check.name, check.id) or _fits(check.id, key)]
        used.update(keys)
        reason = expected[keys[0]] if keys else ""
        marked.append(
            PlannedCheck(check.name, check.case, check.rule, check.action, reason) if keys else check
        )
    if unused := sorted(set(expected) - used):
        names = ", ".join(sorted({check.name for check in marked}))
        raise UnsupportedOptionError(
            f"expected_failures names {unused}, which fits no check. Checks: {names}"
        )
    return marked


def _fits(identity: str, pattern: str) -> bool:
    # Brackets are part of an id here, not a set of characters.
    return "*" in pattern and fnmatch.fnmatchcase(identity, pattern.replace("[", "[[]"))
