"""Find plug-ins by name through entry points, importing only the one that is asked for."""

import difflib
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lmopt.errors import (
    AmbiguousPluginError,
    BrokenPluginError,
    NotInstalledError,
    UnknownPluginError,
)
from lmopt.spec import API_VERSION, BackendSpec, ExporterSpec, Requirement, StepSpec

Spec = TypeVar("Spec", bound=BackendSpec | ExporterSpec | StepSpec)


@dataclass(frozen=True, slots=True)
class PluginStatus(Generic[Spec]):
    """One plug-in as `lmopt doctor` lists it.

    Attributes:
        name: Name of the plug-in.
        distribution: Distribution that offers it, `""` for one registered at run time.
        spec: The spec, or `None` where it cannot be loaded.
        problem: Why it cannot be used, `""` where it can.
    """

    name: str
    distribution: str
    spec: Spec | None
    problem: str = ""


class Registry(Generic[Spec]):
    """The plug-ins of one entry-point group.

    Args:
        group: Entry-point group, such as `"lmopt.backends"`.
        kind: Word for people, such as `"backend"`.
        spec_type: Class that an entry point of the group must name an instance of.
    """

    def __init__(self, group: str, kind: str, spec_type: type[Spec]) -> None:
        self.group = group
        self.kind = kind
        self._spec_type = spec_type
        self._registered: dict[str, Spec] = {}

    def register(self, spec: Spec) -> None:
        """Add a plug-in to this process only, for notebooks and tests; the last one wins.

        Raises:
            BrokenPluginError: The spec was written for other contracts.
        """
        if spec.api != API_VERSION:
            raise BrokenPluginError(
                f"{self.kind} {spec.name!r} was written for version {spec.api} of lmopt's contracts; this lmopt "
                f"has version {API_VERSION}"
            )
        self._registered[spec.name] = spec

    def unregister(self, name: str) -> None:
        """Take back a `register`."""
        self._registered.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """List known names, reading metadata only."""
        return tuple(sorted({*self._registered, *(ep.name for ep in entry_points(group=self.group))}))

    def spec(self, name: str) -> Spec:
        """Load the light spec of one plug-in.

        Raises:
            UnknownPluginError: No such name; a near one is suggested.
            AmbiguousPluginError: Two distributions claim the name with different targets.
            BrokenPluginError: The spec cannot be imported or was written for other contracts.
        """
        if name in self._registered:
            return self._registered[name]
        entry_point = self._entry_point(name)
        owner = entry_point.dist.name if entry_point.dist else "an unknown distribution"
        try:
            spec: object = entry_point.load()
        except Exception as error:
            raise BrokenPluginError(
                f"{self.kind} {name!r} of {owner} cannot be imported ({type(error).__name__}: {error}). "
                f"Repair it: {pip_line(owner)}  or remove it: {sys.executable} -m pip uninstall {owner}"
            ) from error
        if not isinstance(spec, self._spec_type):
            raise BrokenPluginError(
                f"{self.kind} {name!r} of {owner}: {entry_point.value} is a {type(spec).__name__}, "
                f"not a {self._spec_type.__name__}. Ask its author, or uninstall {owner}."
            )
        if spec.api != API_VERSION:
            raise BrokenPluginError(
                f"{self.kind} {name!r} of {owner} was written for version {spec.api} of lmopt's contracts; "
                f"this lmopt has version {API_VERSION}. Update it: {pip_line('--upgrade ' + owner)}"
            )
        return spec

    def require(self, name: str) -> Spec:
        """Give a plug-in's spec if the modules that it needs are there; none is imported.

        Raises:
            NotInstalledError: A required module is missing; the message has the pip line.
        """
        spec = self.spec(name)
        missing = [need for need in spec.requires if not need.is_met()]
        if missing:
            raise NotInstalledError(self._missing_message(name, missing))
        return spec

    def load(self, name: str, target: str | None = None) -> Any:
        """Import what a plug-in points to: an engine factory, an export function or a step.

        Args:
            name: Name of the plug-in.
            target: `"module:attribute"`; the spec's own where `None`.

        Raises:
            NotInstalledError: A required module is missing; the message has the pip line.
            BrokenPluginError: It is installed but cannot be imported.
        """
        spec = self.require(name)
        path = target or spec.entry
        module, _, attribute = path.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise BrokenPluginError(
                f"{self.kind} {name!r} is installed but cannot be imported from {path} "
                f"({type(error).__name__}: {error}). "
                f"Run `lmopt doctor` for the state of every engine."
            ) from error

    def status(self) -> list[PluginStatus[Spec]]:
        """Examine every plug-in; one that is broken does not hide the others."""
        found: list[PluginStatus[Spec]] = []
        for name in self.names():
            owners = {ep.dist.name for ep in entry_points(group=self.group, name=name) if ep.dist}
            owner = "" if name in self._registered else ", ".join(sorted(owners))
            try:
                spec = self.spec(name)
            except (AmbiguousPluginError, BrokenPluginError) as error:
                found.append(PluginStatus(name, owner, None, str(error)))
                continue
            missing = [need for need in spec.requires if not need.is_met()]
            problem = self._missing_message(name, missing) if missing else ""
            found.append(PluginStatus(name, owner, spec, problem))
        return found

    def ready(self) -> tuple[str, ...]:
        """Names of the plug-ins whose spec loads and whose requirements are found."""
        return tuple(one.name for one in self.status() if not one.problem)

    def _entry_point(self, name: str) -> EntryPoint:
        """Find the one entry point called `name`, importing nothing."""
        # An editable install can list one entry point twice: identical ones are folded.
        found = {ep.value: ep for ep in entry_points(group=self.group, name=name)}
        if len(found) == 1:
            return found.popitem()[1]
        if found:
            owners = ", ".join(sorted(ep.dist.name for ep in found.values() if ep.dist))
            raise AmbiguousPluginError(
                f"{self.kind} {name!r} is claimed by {owners}, with different code. Uninstall one of them."
            )
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownPluginError(
            f"no {self.kind} is named {name!r}.{hint} Installed: {', '.join(self.names()) or 'none'}."
        )

    def _missing_message(self, name: str, missing: list[Requirement]) -> str:
        modules = ", ".join(repr(need.module) for need in missing)
        installs = " ".join(f'"{install}"' for install in dict.fromkeys(need.install for need in missing))
        return (
            f"{self.kind} {name!r} needs the module {modules}, which this Python lacks.\n"
            f"  Install it:   {pip_line(installs)}\n"
            f"  This Python:  {sys.executable}"
        )


def pip_line(what: str) -> str:
    """Write the exact command that installs `what` into the running Python."""
    return f"{sys.executable} -m pip install {what}"


backends: Registry[BackendSpec] = Registry("lmopt.backends", "backend", BackendSpec)
exporters: Registry[ExporterSpec] = Registry("lmopt.exporters", "exporter", ExporterSpec)
steps: Registry[StepSpec] = Registry("lmopt.compressors", "compression step", StepSpec)
