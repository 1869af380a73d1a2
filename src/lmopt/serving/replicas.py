"""The same application under Ray Serve: several copies of a model behind one address."""

import os
from typing import TYPE_CHECKING, Any

from lmopt.errors import NotInstalledError
from lmopt.registry import pip_line
from lmopt.serving.app import create_app, require
from lmopt.serving.limits import ServeLimits
from lmopt.spec import Requirement

if TYPE_CHECKING:
    from fastapi import FastAPI


def deployment(
    source: str | os.PathLike[str],
    *,
    replicas: int = 2,
    name: str | None = None,
    limits: ServeLimits | None = None,
    api_key: str | None = None,
    threads: int = 1,
    gpus: float = 0,
    **options: Any,
) -> Any:
    """Make an application of Ray Serve that opens a model in each of its replicas.

    Ray spreads requests over them; each replica has a batch of its own that its requests share. Hand the result to
    `ray.serve.run`.

    Args:
        source: As for `lmopt.Runtime`; must be there on each machine that may run a replica.
        replicas: How many.
        name: As for `create_app`.
        limits: As for `create_app`; of each replica.
        api_key: As for `create_app`.
        threads: Processors of a replica, which are also the threads of its engine.
        gpus: GPUs of a replica.
        **options: Further arguments of `lmopt.Runtime`.

    Returns:
        A `ray.serve.Application`.

    Raises:
        NotInstalledError: Ray Serve or FastAPI is missing.

    Example:
        >>> from ray import serve  # doctest: +SKIP
        >>> serve.run(deployment("smollm2-onnx", replicas=2), route_prefix="/")  # doctest: +SKIP
    """
    require("fastapi")
    serve = _serve()
    limits = limits or ServeLimits()
    most = options.get("max_num_seqs", 32) + limits.max_queue
    where = os.fspath(source)

    def build() -> "FastAPI":
        """Open the model and make the application, in a replica."""
        from lmopt.runtime import Runtime

        return create_app(
            Runtime(where, threads=threads, **options), name=name, limits=limits, api_key=api_key
        )

    # What is beyond the limits is to be refused by lmopt, with its own words.
    made = serve.deployment(
        serve.ingress(build)(),
        name="lmopt",
        num_replicas=replicas,
        max_ongoing_requests=2 * most,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
        graceful_shutdown_timeout_s=limits.stop_timeout_s,
    )
    return made.bind()


def _serve() -> Any:
    """Import Ray Serve with everything off that reports home."""
    missing = [one for one in ("ray", "grpc", "aiohttp") if not Requirement(one, "").is_met()]
    if missing:
        line = pip_line('"ray[serve]" "lmopt[serve]"')
        raise NotInstalledError(f"replicas need Ray Serve, of which this Python lacks {missing[0]}: {line}")
    # Read when Ray is first imported.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray import serve

    return serve
