"""`lmopt.tune`: from a model and limits to the deployment that keeps them and does best."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from lmopt.artifact import MANIFEST, Artifact, is_artifact
from lmopt.artifact.hashing import file_hash
from lmopt.errors import ArtifactError, InputError, LockTimeoutError, UnsupportedError, UnsupportedOptionError
from lmopt.model import Model
from lmopt.platform import machine, memory_available_bytes
from lmopt.scaling.source import resolve
from lmopt.tuning.choosing import choose
from lmopt.tuning.limits import DEFAULT_OBJECTIVES, Constraints, check_objectives
from lmopt.tuning.plan import Plan
from lmopt.tuning.probe import measure_machine
from lmopt.tuning.publishing import measured_record, publish_copy, write_json
from lmopt.tuning.replaying import HOLDS
from lmopt.tuning.report import write_report
from lmopt.tuning.result import MODEL, RESULT, TuneResult
from lmopt.tuning.search import Search
from lmopt.tuning.space import Recipe, Space, default_recipes, find_routes, given_recipes, thread_counts
from lmopt.tuning.study import Memory, require_optuna
from lmopt.tuning.texts import Text, Texts, lay_out
from lmopt.tuning.weights import ModelShape, read_shape
from lmopt.tuning.work import InProcess, Progress, Runner
from lmopt.tuning.workload import Workload

_DISTRIBUTIONS: Final = ("lmopt", "torch", "transformers", "onnx", "onnxruntime", "numpy", "optuna")
_MEMORY_SHARE: Final = 0.9


def tune(
    model: str | Path | Model | Artifact,
    *,
    output: str | Path = "lmopt-tune",
    text: Text | None = None,
    calibration: Text | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    budget: float = 1800.0,
    recipes: Mapping[str, Any] | Sequence[Any] | None = None,
    only_recipes: bool = False,
    backends: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    trust: bool = False,
    workload: Workload | None = None,
    trial_seconds: float = 900.0,
    memory_bytes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    runner: Runner | None = None,
) -> TuneResult:
    """Search for the best deployment of a model on this machine, by measuring.

    Engines, dialects, precisions, compression recipes and threads are searched with optuna. What the shapes of the
    weights or a few hundred tokens rule out is not measured; what is, is measured in a process of its own, so that a
    crash, a lack of memory or a timeout is a trial with its reason. The float model is measured on every engine, and
    a compressed model that is slower than it is never recommended. What cannot be told apart within the noise counts
    as equal, and the simpler wins.

    The study in `output/study` is written as it grows: after Ctrl-C, or with a new budget, the same call goes on from
    there. At the end the recommended deployment is published as an artefact in `output/model`.

    Args:
        model: A Hugging Face folder or hub id, a `.gguf` file, an artefact, or a `Model` of a transformers class. An
            exported artefact without weights is searched for engine and threads only.
        output: Folder of the results.
        text: Text that quality is measured on: a file or texts, some 10,000 characters of the kind that the model
            will meet. `None` takes Python's own reference, and says so.
        calibration: Text that calibrated recipes read; not `text`. Where it is `None`, the second half of a long
            `text` (then only the first is scored), else what the model writes.
        constraints: Limits, as an object or by name. Where neither `perplexity_ratio` nor `kl_mean` is among them,
            the ratio is limited to 1.05.
        objectives: Some of `"latency"`, `"size"`, `"quality"`, `"memory"`, `"first_token"`, the one that counts most
            first.
        budget: Seconds for this call, about a sixth of which is kept to measure the best once more.
        recipes: Recipes of your own, tried first: name to steps, or paths of recipe files.
        only_recipes: Whether to try these only, beside the float model.
        backends: Names of engines; `None` takes every one that is ready, plug-ins included.
        threads: Numbers of threads; `None` takes all CPUs and half of them.
        device: As for `lmopt.Runtime`.
        dtype: Type that weights are loaded in; casts to 16 bits are recipes.
        trust: As for `lmopt.Runtime`.
        workload: The request that is measured, and how often.
        trial_seconds: Most seconds of one piece of work.
        memory_bytes: Most memory of one piece of work; `None` takes 90 % of what is free.
        seed: Of the sampler.
        progress: Called with the stage's name, the steps done and their total.
        runner: In place of fresh processes; for tests.

    Raises:
        NotInstalledError: optuna or matplotlib is missing; the message has the pip line.
        UnsupportedOptionError: A limit, objective or other option is impossible.
        UnsupportedError: No engine can run the model, or its class is code that other processes do not have.
        InputError: A text cannot be read, or is too short.
        JobMismatchError: `output` holds another search.
        LockTimeoutError: Another process searches in `output`.
        EngineError: The float model cannot be read.
    """
    require_optuna()
    began = time.monotonic()
    limits, names = Constraints.of(constraints), check_objectives(objectives)
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not budget > 0:
        raise UnsupportedOptionError(f"budget is {budget!r}; expected seconds above 0")
    given, counts = given_recipes(recipes), thread_counts(threads)
    tell = progress or (lambda stage, done, total: None)
    output = Path(output).absolute()
    study = output / "study"
    study.mkdir(parents=True, exist_ok=True)
    lock = FileLock(study / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockTimeoutError(
            f"another process searches in {output}. Wait for it, or see which it is: fuser -v {study / 'lock'}"
        ) from None
    try:
        source, identity, formats, reference, shape = _open(model, dtype, device, trust, study, tell)
        routes, without = find_routes(device=device, formats=formats, only=backends)
        texts = _texts(source, text, calibration, study)
        own = _recipes(source, formats, shape, given, texts, only=only_recipes)
        plan = Plan(
            source=source,
            identity=identity,
            label=model.source if isinstance(model, Model) else Path(source).name,
            reference=reference,
            shape=shape,
            dtype=dtype,
            device=device,
            trust=trust,
            space=Space(tuple(own), tuple(routes), counts),
            limits=limits,
            objectives=names,
            workload=workload or Workload(),
            text=texts.score,
            calibration=texts.calibration,
            folder=study,
            trial_seconds=trial_seconds,
            memory_bytes=memory_bytes or _most_memory(),
            seed=seed,
        )
        versions = _versions()
        memory = Memory(study, plan.settings(versions, texts.hashes), names, seed)
        search = Search(
            plan,
            memory,
            runner or InProcess(study / "last.log"),
            budget - (time.monotonic() - began),
            tell,
            probe=measure_machine() if limits.token_p50_ms is not None else None,
        )
        search.run()
        return _conclude(plan, search, output, texts, without, versions, began)
    finally:
        lock.release()


def _conclude(
    plan: Plan,
    search: Search,
    output: Path,
    texts: Texts,
    without: Mapping[str, str],
    versions: Mapping[str, str],
    began: float,
) -> TuneResult:
    """Choose, measure the choice once more, publish it, and write the report."""
    chosen = choose(search.trials, plan.limits, plan.objectives)
    facts = machine()
    reasons = list(chosen.reasons)
    remeasured = None
    if chosen.best is not None:
        made = search.publishable(chosen.best)
        publish_copy(made, output / MODEL, chosen.best, measured_record(chosen.best, facts, versions))
        remeasured = search.remeasure(chosen.best)
    result = TuneResult(
        folder=output,
        source=plan.source,
        label=plan.label,
        best=chosen.best,
        pareto=chosen.pareto,
        trials=tuple(search.trials),
        reasons=tuple(reasons),
        constraints=plan.limits,
        objectives=plan.objectives,
        workload=plan.workload,
        remeasured=remeasured,
        machine=facts,
        versions=versions,
        texts=texts.origins,
        without=without,
        dtype=plan.dtype,
        device=plan.device,
        seconds=time.monotonic() - began,
        finished=search.finished,
    )
    if result.deviation is not None:
        held = abs(result.deviation) <= HOLDS
        reasons.append(
            "Measured again in fresh processes after it was chosen, the time of a token differs by "
            f"{result.deviation:+.1%}: the prediction "
            f"{'holds' if held else 'does NOT hold within 10 %; the machine was busy, or changes its speed'}."
        )
        result = replace(result, reasons=tuple(reasons))
    write_json(output / RESULT, result.to_dict())
    write_report(result)
    return result


def _open(
    model: str | Path | Model | Artifact, dtype: str, device: str, trust: bool, study: Path, tell: Progress
) -> tuple[str, str, tuple[str, ...] | None, str | None, ModelShape | None]:
    """Find what every process can open.

    Returns:
        Source, identity, formats and reference engine of an artefact that is run as it is (else `None`), and the shape.
    """
    if not isinstance(model, Model | Artifact) and is_artifact(model):
        model = Artifact.open(model, verify=False)
    if isinstance(model, Artifact):
        stated = model.manifest["formats"].get("safetensors")
        if stated is None or stated.get("library") == "custom":
            checked = [str(one["backend"]) for one in model.manifest["parity"].values() if "backend" in one]
            if not checked:
                raise UnsupportedError(
                    f"{model.path} holds no weights of a transformers model and no format that an engine has "
                    "verified, so there is nothing to hold deployments against. Give the original model"
                )
            return str(model.path), file_hash(model.path / MANIFEST)[0], model.formats, checked[0], None
    try:
        found = resolve(
            model, backend=None, device=device, dtype=dtype, trust=trust, scratch=study, progress=tell
        )
    except UnsupportedError:
        raise UnsupportedError(
            "the model's class is code of yours, which the processes of a search do not have. Export it, and search "
            "for engine and threads: lmopt.tune(lmopt.Exporter('onnx').export(model, 'out').path)"
        ) from None
    try:
        shape: ModelShape | None = read_shape(found.place)
    except (ArtifactError, InputError):
        shape = None  # no safetensors: everything is measured, nothing estimated
    return found.place, found.identity, None, None, shape


def _recipes(
    source: str,
    formats: tuple[str, ...] | None,
    shape: ModelShape | None,
    given: Sequence[Recipe],
    texts: Texts,
    *,
    only: bool,
) -> list[Recipe]:
    if formats is not None:
        if given:
            raise UnsupportedOptionError(
                f"{source} is an exported artefact without weights that could be compressed; give the original "
                "model, or no recipes"
            )
        return [Recipe("as exported", knobs={"method": "float"})]
    quantized = shape is not None and shape.quantized
    a_file = Path(source).is_file()
    usual = default_recipes(
        stored=quantized and a_file, quantized=quantized and not a_file, calibrated=texts.score is not None
    )
    if only:
        if not given:
            raise UnsupportedOptionError("only_recipes=True, but there are no recipes")
        usual = usual[:1]
    if quantized and not a_file and given:
        raise UnsupportedOptionError(
            f"the weights of {source} are quantized already, so recipes would fit rounded numbers; give the "
            "original model"
        )
    return [usual[0], *given, *usual[1:]]


def _texts(source: str, text: Text | None, calibration: Text | None, study: Path) -> Texts:
    path = Path(source)
    speaks = not path.is_dir() or (path / "tokenizer.json").exists()
    if speaks:
        return lay_out(text, calibration, study)
    if text is not None or calibration is not None:
        raise InputError(f"{source} has no tokenizer, so texts cannot be read; leave them out")
    return Texts(None, None, {"quality": "random token ids, because the model has no tokenizer"}, {})


def _most_memory() -> int | None:
    free = memory_available_bytes()
    return None if free is None else int(_MEMORY_SHARE * free)


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
