"""What is searched: recipes, ways to run them, threads."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmopt.compression import GPTQ, HQQ, Cast, Quantize, load_recipe
from lmopt.compression.recipe import step_from_dict
from lmopt.compression.step import Step
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.platform import usable_cpus
from lmopt.registry import backends, exporters

FLOAT: Final = "float"
_GROUP_SIZES: Final = (32, 64, 128)

# Options of exporters that trade exactness for speed; a trial without them is always in the space, too.
_VARIANTS: Final[Mapping[tuple[str, str], tuple[Mapping[str, Any], ...]]] = {
    ("onnx", "onnxruntime"): ({"accuracy_level": 4},)
}

Suggest = Callable[[str, Sequence[Any]], Any]
"""Gives one of the choices of a parameter: a sampler's word."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to make the model smaller.

    Attributes:
        name: For people, and what tells recipes apart.
        steps: Steps as plain data; empty for the model as it is.
        knobs: Parameter to value, by which a sampler finds its way to it.
        stored: Whether the codes of a GGUF file are kept as they are.
        calibrated: Whether a step must see the model read text.
    """

    name: str
    steps: tuple[Mapping[str, Any], ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict, compare=False)
    stored: bool = False
    calibrated: bool = field(default=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether it is the model as it was given."""
        return not self.steps and not self.stored

    def made(self) -> list[Step]:
        """Give the steps as objects."""
        return [step_from_dict(one) for one in self.steps]

    @property
    def bits(self) -> float:
        """Narrowest weights that it makes, 32 for none."""
        widths = [float(one["bits"]) for one in self.steps if "bits" in one]
        widths += [16.0 for one in self.steps if one["step"] == "cast"]
        return min(widths, default=8.0 if self.stored else 32.0)


@dataclass(frozen=True, slots=True)
class Route:
    """A way to run a model: an engine, and how the model is written for it.

    Attributes:
        backend: Engine.
        exporter: Exporter that writes what it reads; `None` for engines that take the model as it is saved.
        target: Dialect.
        options: Options of the exporter.
        takes_threads: Whether the engine can be given a number of threads.
        dtypes: Types that it computes in.
    """

    backend: str
    exporter: str | None = None
    target: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_threads: bool = field(default=True, compare=False)
    dtypes: tuple[str, ...] = field(default=("float32",), compare=False)

    def __hash__(self) -> int:
        """By the name, which says everything."""
        return hash(self.name)

    @property
    def name(self) -> str:
        """For people, and what tells routes apart."""
        words = [] if self.target is None else [f"{self.target} dialect"]
        words += [f"{name}={value}" for name, value in sorted(self.options.items())]
        return self.backend + (f" ({', '.join(words)})" if words else "")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of the space."""

    recipe: Recipe
    route: Route
    threads: int

    @property
    def name(self) -> str:
        """For people, and what tells candidates apart."""
        return f"{self.recipe.name} on {self.route.name}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def simplicity(self) -> tuple[float, ...]:
        """Less is simpler: fewer bits lost first, then fewer steps, then fewer options, then fewer threads."""
        calibrated = float(self.recipe.calibrated)
        steps = len(self.recipe.steps)
        return (-self.recipe.bits, len(self.route.options), steps, calibrated, self.threads)


@dataclass(frozen=True, slots=True)
class Space:
    """Everything that may be tried.

    Attributes:
        recipes: The model as it is comes first.
        routes: The engines that take it as it is saved come first.
        threads: Numbers of threads, the largest first.
    """

    recipes: tuple[Recipe, ...]
    routes: tuple[Route, ...]
    threads: tuple[int, ...]

    def allows(self, recipe: Recipe, route: Route, threads: int | None = None) -> bool:
        """Say whether these go together.

        Options that only mean something for quantized weights need some, and an engine that sets no threads has them
        all.
        """
        if route.options and (recipe.is_float or recipe.bits >= 16):
            return False
        if threads not in (None, self.threads[0]) and not route.takes_threads:
            return False
        cast = next((one["dtype"] for one in recipe.steps if one["step"] == "cast"), None)
        return cast is None or cast in route.dtypes

    def candidates(self) -> Iterator[Candidate]:
        """List every point."""
        for recipe, route, threads in itertools.product(self.recipes, self.routes, self.threads):
            if self.allows(recipe, route, threads):
                yield Candidate(recipe, route, threads)

    def suggest(self, ask: Suggest) -> Candidate | None:
        """Build a point of a sampler's answers; `None` where they do not go together."""
        left = list(self.recipes)
        knobs = list(dict.fromkeys(name for one in left for name in one.knobs))
        for knob in knobs:
            choices = sorted({one.knobs[knob] for one in self.recipes if knob in one.knobs}, key=str)
            # A knob that the recipes left do not have, or agree on, is not asked for.
            values = {one.knobs.get(knob) for one in left}
            if len(values) > 1 and len(choices) > 1:
                wanted = ask(knob, choices)
                left = [one for one in left if one.knobs.get(knob) == wanted] or left[:0]
            if not left:
                return None
        route = next(
            one for one in self.routes if one.name == ask("route", [one.name for one in self.routes])
        )
        threads = ask("threads", list(self.threads)) if len(self.threads) > 1 else self.threads[0]
        return Candidate(left[0], route, threads) if self.allows(left[0], route, threads) else None

    def answers(self, candidate: Candidate) -> dict[str, Any]:
        """Give the answers that lead to a point."""
        found: dict[str, Any] = {}

        def ask(name: str, choices: Sequence[Any]) -> Any:
            known = {**candidate.recipe.knobs, "route": candidate.route.name, "threads": candidate.threads}
            found[name] = known[name]
            return known[name]

        self.suggest(ask)
        return found


def default_recipes(*, stored: bool, quantized: bool, calibrated: bool) -> list[Recipe]:
    """List the recipes that are tried for every model.

    Args:
        stored: Whether the model is a GGUF file whose codes can be kept.
        quantized: Whether its weights are quantized already: then they are left as they are.
        calibrated: Whether steps that need calibration texts may be tried.
    """
    found = [Recipe(FLOAT if not quantized else "as given", knobs={"method": FLOAT})]
    if stored:
        found.append(Recipe("codes of the file", knobs={"method": "stored"}, stored=True))
    if quantized:
        return found
    casts = (Cast(dtype="bfloat16"), Cast(dtype="float16"))
    found += [_recipe(one.dtype, one, method="cast", dtype=one.dtype) for one in casts]
    forms = list(itertools.product((True, False), _GROUP_SIZES))
    found += [_quantized(Quantize, "rtn", 8, group_size, symmetric, 8) for symmetric, group_size in forms]
    methods: list[tuple[str, type[Quantize]]] = [("rtn", Quantize)]
    methods += [("gptq", GPTQ)] if calibrated else []
    for (method, kind), head, symmetric, group_size in itertools.product(
        methods, (8, 4), (True, False), _GROUP_SIZES
    ):
        found.append(_quantized(kind, method, 4, group_size, symmetric, head))
    return [*found, *(_quantized(HQQ, "hqq", 4, 64, False, head) for head in (8, 4))]


def _quantized(
    kind: type[Quantize], method: str, bits: int, group_size: int, symmetric: bool, head: int
) -> Recipe:
    step = kind(bits=bits, group_size=group_size, symmetric=symmetric, embedding=head, head=head)
    zero = "symmetric" if symmetric else "asymmetric"
    name = f"{method} {bits}-bit g{group_size} {zero}" + (f", head {head}-bit" if head != bits else "")
    return _recipe(name, step, method=method, bits=bits, head=head, zero=zero, group_size=group_size)


def _recipe(name: str, *steps: Step, **knobs: Any) -> Recipe:
    calibrated = any(step.needs_texts for step in steps)
    return Recipe(name, tuple(step.to_dict() for step in steps), knobs, calibrated=calibrated)


def given_recipes(given: Mapping[str, Any] | Sequence[Any] | None) -> list[Recipe]:
    """Take recipes of the user's: lists of steps by name, or files.

    Args:
        given: Name to a list of steps (or one step), or paths of recipe files.

    Raises:
        InputError: A file is no recipe.
        UnsupportedOptionError: Something is neither steps nor a file.
    """
    if given is None:
        return []
    named = given.items() if isinstance(given, Mapping) else ((_stem(one), one) for one in given)
    found = []
    for name, content in named:
        if isinstance(content, str | os.PathLike):
            steps = load_recipe(content)
        else:
            steps = [content] if isinstance(content, Step) else list(content)
        if not steps or any(isinstance(step, type) or not isinstance(step, Step) for step in steps):
            raise UnsupportedOptionError(
                f"recipe {name!r} is {content!r}; expected steps of lmopt.compression, or the path of a recipe file"
            )
        found.append(_recipe(str(name), *steps, method=f"recipe {name}"))
    return found


def _stem(one: Any) -> str:
    if not isinstance(one, str | os.PathLike):
        raise UnsupportedOptionError(
            f"recipes are given by name, recipes={{'mine': [step, ...]}}, or as paths of files; given: {one!r}"
        )
    return Path(one).stem


def find_routes(
    *, device: str, formats: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> tuple[list[Route], dict[str, str]]:
    """List the ways to run a model on the engines that are installed.

    Args:
        device: Where it is to run.
        formats: Formats of an artefact whose weights cannot be loaded, which is run as it is; `None` for a model.
        only: Names of backends; `None` takes all that are ready.

    Returns:
        The routes, and the reasons of engines that have none, by name.

    Raises:
        UnknownPluginError: A name is not known.
        NotInstalledError: A backend that was named lacks a module.
        UnsupportedError: There is no route.
    """
    for name in only or ():
        backends.require(name)
    routes: list[Route] = []
    without: dict[str, str] = {}
    for status in sorted(backends.status(), key=lambda one: (one.name != "torch", one.name)):
        name, spec = status.name, status.spec
        if only and name not in only:
            continue
        if spec is None or status.problem:
            without[name] = status.problem.splitlines()[0]
            continue
        support = spec.supports(formats=spec.can.formats, device=device, dtype="auto")
        if not support.ok:
            without[name] = "; ".join(support.reasons)
            continue
        own = len(routes)
        facts: dict[str, Any] = {"takes_threads": "threads" in spec.can.features, "dtypes": spec.can.dtypes}
        if formats is not None:
            routes += [Route(name, **facts)] if set(formats) & set(spec.can.formats) else []
        else:
            if "module" in spec.can.formats:
                routes.append(Route(name, **facts))
            # A format that runs code when it is opened is no deployment to hand on.
            elif "trust" not in spec.can.features:
                routes += _exported(name, spec.can.formats, device, facts)
        if len(routes) == own:
            without[name] = f"it reads {', '.join(spec.can.formats)}, which nothing here gives it"
    if not routes:
        raise UnsupportedError(
            f"no engine can run this model on {device}: "
            + ("; ".join(f"{name}: {why}" for name, why in without.items()) or "none is installed")
        )
    return routes, without


def _exported(name: str, formats: Sequence[str], device: str, facts: Mapping[str, Any]) -> list[Route]:
    found = []
    for status in exporters.status():
        spec = status.spec
        if spec is None or status.problem or spec.format not in formats:
            continue
        # The common dialect, and the one that is made for this engine, which so far serves CPUs.
        targets = [spec.targets[0]]
        targets += [one for one in spec.targets[1:] if one == name and device == "cpu"]
        for target in targets:
            found.append(Route(name, spec.name, target, **facts))
            found += [
                Route(name, spec.name, target, some, **facts)
                for some in _VARIANTS.get((spec.name, target), ())
            ]
    return found


def thread_counts(given: Sequence[int] | None) -> tuple[int, ...]:
    """Take or choose numbers of threads, the largest first.

    Raises:
        UnsupportedOptionError: One is below 1.
    """
    if given is not None:
        if not given or any(type(one) is not int or one < 1 for one in given):
            raise UnsupportedOptionError(f"threads are {list(given)!r}; expected whole numbers from 1")
        return tuple(sorted(set(given), reverse=True))
    all_of_them = usable_cpus()
    return tuple(sorted({all_of_them, max(1, all_of_them // 2)}, reverse=True))
