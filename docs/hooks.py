"""The pages of the site that are made from elsewhere: README.md and its like, and the reference of the library."""

import json
import posixpath
import re
from pathlib import Path

import griffe
from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent

# Pages outside docs/, and what they are called in the site.
OUTSIDE = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changes.md"}


class Equations(Extension):
    """Underscores and brackets are what they look like: m_i is no emphasis, and [A][B] no reference."""

    def extendMarkdown(self, md):
        md.inlinePatterns.deregister("mkdocs-autorefs", strict=False)
        md.inlinePatterns.register(SimpleTextInlineProcessor(r"(_+)"), "underscore", 65)  # before emphasis


class Fields(griffe.Extension):
    """`@part` makes a dataclass. It and a named tuple are shown with the arguments that they are made with."""

    def on_class_instance(self, *, cls, **kwargs):
        made_by = [decorator.value for decorator in cls.decorators] + cls.bases
        if {"jaxattn.core.part.part", "typing.NamedTuple"} & {getattr(x, "canonical_path", None) for x in made_by}:
            dataclass = griffe.ExprName("dataclass", parent=griffe.ExprName("dataclasses"))
            cls.decorators.append(griffe.Decorator(dataclass, lineno=cls.lineno, endlineno=cls.lineno))


@event_priority(-100)  # after the plugins, which bring brackets as references
def on_config(config):
    config.markdown_extensions.append(Equations())


def on_files(files, config):
    """Adds the pages: the reference has one for each package that the menu in mkdocs.yml names."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    loader.load("jaxattn")
    loader.resolve_aliases()
    packages = re.findall(r"api/([\w.]+)\.md", str(config.nav))
    for package in packages:
        content = reference(loader.modules_collection, package, packages)
        files.append(File.generated(config, f"api/{package}.md", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns what is written for GitHub into what the site needs."""
    outside = {name: source for source, name in OUTSIDE.items()}
    return links_in_site(plain_pipes(markdown), outside.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def plain_pipes(markdown):
    """A pipe in the code of a table needs a backslash on GitHub, and in the site it would show."""
    code = re.compile(r"`[^`\n]*`")
    return re.sub(r"(?m)^\|.*", lambda row: code.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)


def links_in_site(markdown, source):
    """The links of a page of the repository, `source`, lead to where the site has what they lead to."""

    def place(path):
        return OUTSIDE.get(path) or path.removeprefix("docs/")

    def link(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[0]))
        if path not in OUTSIDE and not path.startswith("docs/"):
            return match[0]  # not in the site, which --strict refuses
        return posixpath.relpath(place(path), posixpath.dirname(place(source)) or ".")

    return re.sub(r"(?<=\]\()[\w./-]+(?=(#[^)]*)?\))", link, markdown)


def reference(library, package, packages):
    """The page of a package: its docstring, then by module the docstrings of the module and of what is exported.

    What another page has, because its package exports it too, is named with a link.
    """
    lines = [f"# {package}", "", f"::: {package}", *options(members=False), ""]
    here, elsewhere = {}, {}
    for name in library[package].exports:
        found = library[f"{package}.{name}"]
        found = found.final_target if found.is_alias else found
        module = found.path if found.is_module else found.parent.path
        home = max((each for each in packages if module.startswith(f"{each}.")), key=len)
        if home == package:
            here.setdefault(module, []).append(found)
        else:
            elsewhere.setdefault(home, []).append(f"[`{name}`]({home}.md#{found.path})")
    for home, links in sorted(elsewhere.items()):
        lines += [f"From [`{home}`]({home}.md): {', '.join(links)}.", ""]
    for module, found in sorted(here.items()):
        members = None if found[0].is_module else [each.name for each in found]  # a module may be exported whole
        lines += [f"## {module.removeprefix(f'{package}.')}", "", f"::: {module}", *options(members=members), ""]
    return "\n".join(lines)


def options(**given):
    return ["    options:", *(f"      {name}: {json.dumps(value)}" for name, value in given.items())]
