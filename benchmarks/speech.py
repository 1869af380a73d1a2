"""Time speech recognition of lmopt beside faster-whisper, in one run.

    python benchmarks/make_peers.py WHISPER --only ctranslate2      # once: its environment and its copy of the model
    python benchmarks/speech.py WHISPER CLIPS --ours NAME=FOLDER[,option=value] ... [--num-beams 1] [--json FILE]

WHISPER is a Hugging Face folder, CLIPS a folder of WAV files with `fileids` and `transcription` as CMU Sphinx writes
them. Each program runs in a process of its own, gets the clips one after the other, and is stopped while another is
timed; a figure is the time of all clips, files read and features computed. Words that are wrong are counted against
the transcription.
"""

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from harness.candidates import PEERS_FOLDER, Candidate, given_candidate, model_key, our_candidate
from harness.worker import Worker, WorkerError, in_turn

from lmopt.evaluation import Figure
from lmopt.interop.references import word_errors
from lmopt.platform import machine, usable_cpus
from lmopt.speech import read_audio

_OURS = "lmopt_applications_peer.py"


def candidates(asked: argparse.Namespace) -> list[Candidate]:
    """What can be timed: the model in eager mode, what was given, and the peer."""
    found = [our_candidate("lmopt torch fp32", asked.model, "float32", script=_OURS, backend="torch")]
    found += [given_candidate(words, script=_OURS) for words in asked.ours]
    converted = asked.peers / "models" / model_key(asked.model) / "ctranslate2-fp32"
    found += [
        Candidate(
            f"faster-whisper {kind}",
            "faster_whisper_peer.py",
            asked.peers / "venvs/ctranslate2/bin/python",
            converted,
            kind,
            options={"compute_type": kind},
        )
        for kind in ("float32", "int8")
    ]
    return found


def wrong(said: str, heard: str) -> tuple[int, int]:
    """Count wrong words, and words."""
    counts = word_errors([said], [heard.replace("Mr.", "mister")]).counts
    return counts["wrong_words"], counts["words"]


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--peers", type=Path, default=PEERS_FOLDER.expanduser())
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    files = [asked.clips / f"{name}.wav" for name in (asked.clips / "fileids").read_text().split()]
    said = re.sub(r"\(.*|</?s>", "", (asked.clips / "transcription").read_text(), flags=re.MULTILINE)
    sound_s = sum(len(read_audio(file, 16000)) for file in files) / 16000
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {}
    texts: dict[str, str] = {}
    busy: list[float] = []
    try:
        for one in candidates(asked):
            if one.missing:
                print(f"missing: {one.name}: {one.missing}")
                continue
            try:
                workers[one.name] = worker = Worker(one, {"threads": asked.threads}, asked.log)
                worker.ask("transcribe", files=[str(files[0])], num_beams=asked.num_beams)
                worker.pause()
            except WorkerError as error:
                print(f"missing: {one.name}: {error}")
                workers.pop(one.name, None)
        for _, name, worker in in_turn(workers, asked.rounds):
            found, share = worker.timed(
                "transcribe", files=[str(file) for file in files], num_beams=asked.num_beams
            )
            busy.append(share)
            times.setdefault(name, []).append(found["seconds"])
            texts[name] = " ".join(found["texts"])
        peaks = {name: worker.peak_bytes for name, worker in workers.items()}
        versions = {key: value for worker in workers.values() for key, value in worker.versions.items()}
    finally:
        for worker in workers.values():
            worker.close()
    result = {
        "machine": machine(),
        "versions": versions,
        "model": asked.model.name,
        "num_beams": asked.num_beams,
        "threads": asked.threads,
        "sound_s": sound_s,
        "others": max(busy),
        "programs": {
            name: {"seconds": asdict(Figure.of(several)), "wrong": wrong(said, texts[name]), "text": texts[name],
                   "peak_bytes": peaks[name]}
            for name, several in times.items()
        },
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "programs"}))
    print(
        "\n| program | seconds | of the sound's time | wrong words | peak memory, MB |\n|---|---:|---:|---:|---:|"
    )
    for name, one in result["programs"].items():
        s = one["seconds"]
        print(
            f"| {name} | {s['median']:.2f} ({s['least']:.2f} .. {s['most']:.2f}) | {s['median'] / sound_s:.1%} | "
            f"{one['wrong'][0]} of {one['wrong'][1]} | {one['peak_bytes'] / 1e6:.0f} |"
        )
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
