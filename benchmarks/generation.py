"""Time lmopt and every peer that is installed on one model, in one run.

    python benchmarks/make_peers.py MODEL          # once: environments and models of the peers
    python benchmarks/generation.py MODEL [--suite] [--ours NAME=FOLDER ...] [--json FILE] [--write]

MODEL is a Hugging Face folder (default: SmolLM2-135M, fetched as by `lmopt demo`). Each program runs in a
process of its own, in its own environment, and takes the same orders (`peers/protocol.py`): prompts as
ids, greedy, no end token. First each peer's settings are swept, threads above all; then all programs run
in turn, round by round, each on the same new piece of text, and the times of their tokens are summarised
by `lmopt.evaluation.Speed.of`, as `lmopt bench` does. The tokens must be those of the reference (`torch`
in float32) where the weights are float32; a row where they are not is marked.

`--prompt 512 --new 2` measures reading prompts, `--batch 8` eight prompts of unequal length;
`--suite` does the default, these two, and all in one report.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.bandwidth import read_bandwidth
from harness.candidates import PEERS_FOLDER, Candidate, given_candidate, ours, peers
from harness.measure import Conditions, Lock, Measured, measure
from harness.quality import qualities
from harness.table import markdown
from harness.texts import Workload
from harness.weights import bytes_a_token
from harness.worker import Worker, WorkerError, real_time

from lmopt import Model, Tokenizer
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.cli.trial import sample_text
from lmopt.evaluation import Figure, folder_size_bytes
from lmopt.platform import machine, usable_cpus
from lmopt.types import ModelFacts

RESULTS = Path(__file__).parents[1] / "docs/results"
REFERENCE = "lmopt torch fp32"


class Benchmark:
    """One run.

    Args:
        asked: Arguments of the command line.
        model: Hugging Face folder.
        facts: Of the model.
        ids: The text as ids.
    """

    def __init__(self, asked: argparse.Namespace, model: Path, facts: ModelFacts, ids: list[int]) -> None:
        self.asked, self.model, self.facts, self.ids = asked, model, facts, ids
        self.conditions = Conditions(asked.rounds, asked.quiet, asked.retries, Lock(asked.lock))
        self.log = Path(asked.log)
        self.priority = real_time if asked.real_time else None
        self.missing: dict[str, str] = {}
        self.sweeps: dict[str, list[dict[str, Any]]] = {}
        self.versions: dict[str, str] = {}
        self.open: dict[tuple[Any, ...], Worker] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.result: dict[str, Any] = {}
        self.known = json.loads(asked.settings.read_text())["sweep"] if asked.settings else {}
        # Last of the text: prompts of rounds are cut from its start.
        self.warm = ids[-16:]

    def tell(self, text: str) -> None:
        """Say what is going on, on one line of the terminal."""
        print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)

    def start(self, candidate: Candidate, setting: dict[str, Any]) -> Worker:
        """Run a program."""
        worker = Worker(candidate, setting, self.log, before_start=self.priority)
        self.versions.update({**worker.versions, **worker.settings.get("versions", {})})
        return worker

    def candidates(self) -> dict[str, Candidate]:
        """What can run and was asked for."""
        mine = ours(self.model) if self.asked.builtin else [ours(self.model)[0]]
        mine += [given_candidate(one) for one in self.asked.ours]
        found = {}
        for one in [*mine, *peers(self.asked.peers, self.model)]:
            chosen = one.name == REFERENCE or not self.asked.only
            if not chosen and not any(word.lower() in one.name.lower() for word in self.asked.only):
                continue
            if one.missing:
                self.missing[one.name] = f"{one.missing}; `python benchmarks/make_peers.py` makes it"
            else:
                found[one.name] = one
        return found

    def sweep(self, candidate: Candidate) -> dict[str, dict[str, Any]]:
        """Find the settings that are best for a peer; ours take what a user gets.

        Returns:
            Setting by what it is best at, `"decode"` and `"prefill"`; empty where none works.
        """
        if candidate.ours:
            return {"decode": {}, "prefill": {}}
        if candidate.name in self.known:
            self.sweeps[candidate.name] = self.known[candidate.name]
            return best_settings(self.known[candidate.name])
        short = Workload("sweep", self.asked.prompt, max(8, self.asked.new // 4))
        long = Workload("sweep", 4 * self.asked.prompt, 2)
        # A sweep only ranks settings, and takes most of the time.
        careful = Conditions(2, self.conditions.quiet, min(1, self.conditions.retries), self.conditions.lock)
        tried: list[dict[str, Any]] = []
        best_threads: int | None = None
        for variant in candidate.variants:
            # All thread counts with the peer's own options; the other options with the best count.
            counts = [None, *thread_counts()] if not tried else [best_threads]
            for threads in counts:
                one: dict[str, Any] = {"setting": {**({"threads": threads} if threads else {}), **variant}}
                tried.append(one)
                self.tell(f"sweep {candidate.name}: {one['setting']}")
                try:
                    with self.start(candidate, one["setting"]) as worker:
                        decode = measure({"": worker}, short, self.ids, careful)[""]
                        prefill = measure({"": worker}, long, self.ids, careful)[""]
                        if problem := decode.problem or prefill.problem:
                            raise WorkerError(problem)
                        assert decode.speed is not None
                        assert prefill.speed is not None
                        one["decode"] = vars_of(decode.speed.decode_tokens_per_s)
                        one["prefill"] = vars_of(prefill.speed.prefill_tokens_per_s)
                except (WorkerError, OSError) as error:
                    one["problem"] = str(error)
            working = [one for one in tried if "decode" in one]
            if working:
                best = max(working, key=lambda one: one["decode"]["median"])
                best_threads = best["setting"].get("threads")
        self.sweeps[candidate.name] = tried
        if not working:
            self.missing[candidate.name] = tried[0].get("problem", "no setting works")
        return best_settings(tried)

    def starts(self, candidates: dict[str, Candidate], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Time how long each takes to its first token, in turn; drop what does not get there."""
        laps: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
        for number in range(self.asked.load_rounds):
            for name, candidate in list(candidates.items()):
                self.tell(f"start {number + 1}/{self.asked.load_rounds}: {name}")
                try:
                    self.conditions.lock.hold()
                    with self.start(candidate, settings[name]["decode"]) as worker:
                        laps[name].append(worker.first_token(self.warm))
                except WorkerError as error:
                    self.missing[name] = str(error)
                    del candidates[name]
        return {
            name: {
                key: vars_of(Figure.of([lap[key] for lap in found])) for key in (found[0] if found else ())
            }
            for name, found in laps.items()
            if name in candidates
        }

    def workers(
        self,
        candidates: Mapping[str, Candidate],
        settings: Mapping[str, Any],
        workload: Workload,
        stack: ExitStack,
    ) -> dict[str, Worker]:
        """Open what a workload needs, each with its best setting for it; what is open already is used again."""
        found = {}
        for name, candidate in candidates.items():
            setting = dict(settings[name][workload.judged_by])
            if workload.batch > 1 and candidate.batch_option:
                setting[candidate.batch_option] = workload.batch
            key = (name, *sorted(setting.items()))
            if key not in self.open:
                self.tell(f"open {name}")
                worker = stack.enter_context(self.start(candidate, setting))
                self.open[key] = worker
                loaded = worker.peak_bytes
                worker.lap([self.warm], 2)
                peak = max(loaded, worker.peak_bytes)
                if worker.reset_peak():
                    self.memory.setdefault(
                        name, {"imported_bytes": worker.imported_bytes, "start_peak_bytes": peak}
                    )
                worker.pause()
            found[name] = self.open[key]
        return found

    def run(self, workloads: Sequence[Workload]) -> dict[str, Any]:
        """Do everything and give plain values; `--json` has what is known so far at any time."""
        self.result = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "model": self.model.name,
            "text": self.asked.text.name if self.asked.text else "Python's own reference (pydoc_data.topics)",
            "context": 512,
            "reference": REFERENCE,
            "machine": machine(),
            "load_average": os.getloadavg(),
            "versions": self.versions,
            "conditions": {
                "rounds": self.conditions.rounds,
                "quiet": self.conditions.quiet,
                "retries": self.conditions.retries,
                "real_time": self.asked.real_time,
                "settings": None if self.asked.settings is None else self.asked.settings.name,
            },
            "roofline": None,
            "sweep": self.sweeps,
            "workloads": {},
            "programs": {},
            "quality": {},
            "missing": self.missing,
        }
        if self.asked.roofline:
            self.tell("read bandwidth")
            self.conditions.lock.hold()
            self.result["roofline"] = read_bandwidth(thread_counts(), self.priority)
        candidates, settings = self.candidates(), {}
        for name, candidate in list(candidates.items()):
            settings[name] = self.sweep(candidate)
            self.save()
            if not settings[name]:
                del candidates[name]
        starts = self.starts(candidates, settings)
        self.result["programs"] = {
            name: {
                "ours": one.ours,
                "precision": one.precision,
                "size_bytes": model_size(one.path),
                "bytes_a_token": bytes_a_token(one.path, one.precision),
                "start": starts[name],
                "memory": None,
            }
            for name, one in candidates.items()
        }
        self.save()
        with ExitStack() as stack:
            for workload in workloads:
                self.conditions.lock.release()
                workers = self.workers(candidates, settings, workload, stack)
                laps = measure(workers, workload, self.ids, self.conditions, self.tell)
                self.result["workloads"][workload.name] = self._report(candidates, workers, laps)
                for name, worker in workers.items():
                    # The first workload's: later ones may hold other rows.
                    if name in self.memory and self.result["programs"][name]["memory"] is None:
                        self.memory[name]["decode_peak_bytes"] = worker.peak_bytes
                        self.result["programs"][name]["memory"] = self.memory[name]
                self.save()
            self.conditions.lock.release()
            if self.asked.quality:
                workers = self.workers(candidates, settings, workloads[0], stack)
                for worker in workers.values():
                    worker.relax()
                text = self.ids[: self.asked.quality]
                self.result["quality"] = qualities(workers, REFERENCE, text, self.facts, progress=self.tell)
        self.tell("")
        self.save()
        return self.result

    def save(self) -> None:
        """Write what is known so far: a long run may be cut short."""
        if self.asked.json:
            self.asked.json.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")

    def _report(
        self, candidates: Mapping[str, Candidate], workers: Mapping[str, Worker], laps: Mapping[str, Measured]
    ) -> dict[str, Any]:
        expected = laps[REFERENCE].tokens if REFERENCE in laps else {}
        return {
            name: {
                "ours": candidates[name].ours,
                "setting": {"threads": workers[name].settings.get("threads"), **workers[name].setting},
                "said": workers[name].settings,
                "speed": one.speed.to_dict() if one.speed else None,
                "disturbed": one.disturbed,
                "agreement": agreement(expected, one.tokens, exact=candidates[name].precision == "float32"),
                "problem": one.problem,
            }
            for name, one in laps.items()
        }


def best_settings(tried: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Choose from a sweep.

    Args:
        tried: For each setting `setting`, and `decode` and `prefill` as plain figures where it works.

    Returns:
        Setting by what it is best at, `"decode"` and `"prefill"`; empty where none works.
    """
    working = [one for one in tried if "decode" in one]
    if not working:
        return {}
    return {key: max(working, key=lambda one: one[key]["median"])["setting"] for key in ("decode", "prefill")}


def agreement(
    expected: Mapping[int, list[list[int]]], found: Mapping[int, list[list[int]]], *, exact: bool
) -> str:
    """Say how many new tokens are the reference's before the first that differs.

    Args:
        expected: Tokens of each row by number of the prompt.
        found: Likewise.
        exact: Whether they must be the same; `DIFFER` marks it where they are not.
    """
    pairs = [
        (mine, theirs)
        for number in expected.keys() & found.keys()
        for mine, theirs in zip(expected[number], found[number], strict=True)
    ]
    if not pairs:
        return "not compared"
    same = sum(
        next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in pairs
    )
    total = sum(len(pair[0]) for pair in pairs)
    if same == total:
        return "all"
    return f"{'DIFFER: ' if exact else ''}{same} of {total}"


def thread_counts() -> list[int]:
    """Thread counts to sweep: one, powers of two, and all."""
    every = usable_cpus()
    return sorted({1, every, *(1 << power for power in range(every.bit_length()) if 1 << power < every)})


def model_size(path: Path) -> int:
    """Bytes of weights and graphs: what a tokenizer takes is not a matter of engines."""
    if path.is_file():
        return folder_size_bytes(path)
    suffixes = (".safetensors", ".bin", ".xml", ".onnx", ".data", ".gguf", ".pt2")
    files = [one for one in path.iterdir() if one.name.endswith(suffixes) and "tokenizer" not in one.name]
    return sum(folder_size_bytes(one) for one in files)


def vars_of(figure: Figure) -> dict[str, float]:
    """Plain values of a figure."""
    return {"median": figure.median, "least": figure.least, "most": figure.most}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="Hugging Face folder; default: SmolLM2-135M")
    parser.add_argument(
        "--peers", type=Path, default=PEERS_FOLDER.expanduser(), help="folder of make_peers.py"
    )
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=FOLDER", help="an artefact of lmopt"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="programs with it in the name"
    )
    parser.add_argument(
        "--no-builtin", dest="builtin", action="store_false", help="of ours the reference and --ours"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate, at least 2")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once, of unequal lengths")
    parser.add_argument(
        "--suite", action="store_true", help="generation, 512-token prompts, and a batch of 8"
    )
    parser.add_argument("--settings", type=Path, help="take the sweep from this file, which --json wrote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="text file for prompts and perplexity")
    parser.add_argument(
        "--quality", type=int, default=0, metavar="TOKENS", help="perplexity on so many; 0 is off"
    )
    parser.add_argument("--no-roofline", dest="roofline", action="store_false")
    parser.add_argument("--quiet", type=float, default=0.05, help="CPU share that others may take in a lap")
    parser.add_argument("--retries", type=int, default=4, help="how often a disturbed lap is repeated")
    parser.add_argument("--real-time", action="store_true", help="run programs before all other work (root)")
    parser.add_argument("--lock", type=Path, help="file to lock while laps run, minutes at a time")
    parser.add_argument("--log", default=os.devnull, help="file for what the programs print")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--write", action="store_true", help=f"also write {RESULTS.name}/<date>-generation.md"
    )
    return parser.parse_args()


def main() -> None:
    """Run, print, and write."""
    # Programs that are stopped while another is timed would outlive this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))
    asked = arguments()
    model = (asked.model or Path(fetch_smollm2(cache_folder()))).resolve()
    facts = Model.from_pretrained(model).facts
    text = asked.text.read_text(encoding="utf-8") if asked.text else sample_text()
    ids = Tokenizer.from_folder(model).encode(text[:400_000], add_special_tokens=False)
    if asked.suite:
        workloads = [
            Workload(f"Prompt {asked.prompt}, {asked.new} new tokens", asked.prompt, asked.new),
            Workload(f"Prompt {4 * asked.prompt}", 4 * asked.prompt, 2, judged_by="prefill"),
            Workload("Batch of 8 unequal prompts", asked.prompt, asked.new // 2, batch=8),
        ]
    else:
        name = f"Prompt {asked.prompt}, {asked.new} new tokens, batch {asked.batch}"
        judged = "decode" if asked.new > 8 else "prefill"
        workloads = [Workload(name, asked.prompt, asked.new, asked.batch, judged)]
    result = Benchmark(asked, model, facts, ids).run(workloads)
    shown = markdown(result)
    print(shown)
    if asked.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{result['date']}-generation.md").write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
