"""`myllm embed`: options → texts → vectors on stdout, or the texts nearest to one.

Owns what the options of `embed` mean together. Must not know how a text becomes a vector.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import click

from myllm.cli import options
from myllm.cli.console import CHUNK, Streams, visible_json
from myllm.cli.vectors import FORMATS, writer
from myllm.errors import IOFailureError, NotFoundError, UsageError
from myllm.protocol import EMBED_OVERFLOW, POOLS, PURPOSES
from myllm.requests import Request
from myllm.settings import DEFAULT_EMBED_MODEL

if TYPE_CHECKING:
    from myllm.cli.documents import Input
    from myllm.cli.in_flight import Connected
    from myllm.cli.vector_records import VectorRecords
    from myllm.settings import Settings

AWAITED: Final = "text on stdin; end it with Ctrl-D"
EPILOG = """\b
Examples:
  myllm embed < report.txt > vectors.jsonl
  myllm embed --pool mean *.md > documents.jsonl
  myllm embed --input lines --format npy --out vectors.npy < sentences.txt > ids.jsonl
  myllm embed --similar-to 'pipes' -k 3 < vectors.jsonl

\b
Exit status: 0 done; 1 some texts failed; 2 usage; 65 bad data; 66 no such
model or file; 67 a text does not fit the window; 69 the model's process is
gone, and no text has a vector; 74 I/O; 78 configuration. See `man myllm`.
"""


@click.command("embed", epilog=EPILOG, short_help="Turn text into vectors.")
@click.argument("files", nargs=-1, type=click.Path())
@options.model_option(DEFAULT_EMBED_MODEL, "MYLLM_EMBED_MODEL")
@options.input_options("What is read. auto: JSONL if the first line is a JSON object, else one document.")
@click.option(
    "--window", type=click.INT, metavar="N", help="Tokens a vector, at most.  [default: the model's]"
)
@click.option("--overlap", type=click.INT, default=0, metavar="N", help="Tokens that windows share.")
@click.option(
    "--pool",
    type=click.Choice(POOLS),
    default="none",
    show_default=True,
    help="mean: one vector a text, of all its windows.",
)
@click.option(
    "--as", "purpose", type=click.Choice(PURPOSES), help="Put the prefix in front that the model wants."
)
@click.option(
    "--on-overflow",
    type=click.Choice(EMBED_OVERFLOW),
    default="split",
    show_default=True,
    help="A text over the window: cut it into windows, or refuse it (exit 67).",
)
@click.option(
    "--format", "notation", type=click.Choice(FORMATS), default="json", show_default=True, help="Of vectors."
)
@click.option(
    "--out", type=click.Path(), metavar="FILE", help="Where --format npy goes; stdout gets the records."
)
@click.option(
    "--dimensions", type=click.IntRange(1), metavar="N", help="Cut vectors to N numbers, then of norm 1."
)
@click.option("--no-cache", is_flag=True, help="Look nothing up, and keep nothing.")
@click.option(
    "--similar-to", metavar="TEXT", help="Write the records nearest to TEXT, best first, with score."
)
@click.option(
    "-k", "nearest", type=click.IntRange(1), default=10, show_default=True, help="How many of them."
)
@options.loading_options
@options.nice_option(str(options.PATIENT))
@options.daemon_option
@options.progress_option
@click.option("-v", "--verbose", is_flag=True, help="A line of statistics on stderr.")
@click.pass_obj
def embed(streams: Streams, /, files: tuple[str, ...], **values: Any) -> int:
    """Turn FILES, or stdin, into vectors: one record a text, or a window of a longer one.

    A text over the model's window is cut, never truncated; start and end say where in it a window is, in
    characters. Records keep their own keys. --similar-to reads texts, or records that embed has written.
    """
    configured = options.configured(values)
    model = values["model"] or configured.default_embed_model or DEFAULT_EMBED_MODEL
    request = _request(values) | options.model_part(model, configured, values)
    if not files and streams.stdin_is_terminal:
        raise UsageError("nothing to embed: give FILES, or pipe text in")
    inputs = _inputs(streams, files)
    if values["similar_to"] is not None:
        return _similar(streams, configured, request, inputs, values)
    shaped = writer(values["notation"], values["out"], values["dimensions"])
    started = time.monotonic()

    def record(event: dict[str, Any]) -> bytes:
        if "embedding" in event:
            event.setdefault("model", model)  # as it was asked for, where the Runtime does not say its name
        return shaped.record(event)

    try:
        with _connected(streams, configured, values["progress"]) as side:
            records = _embed(streams, side, request, inputs, values, record, shaped.in_order)
    finally:
        shaped.close()
    if values["verbose"]:
        streams.note(_statistics(records, model, time.monotonic() - started))
    return _conclude(streams, records)


def _connected(
    streams: Streams, configured: Settings, bars: bool | None
) -> AbstractContextManager[Connected]:
    from myllm.cli.in_flight import connected
    from myllm.paths import cache_dir
    from myllm.storage.embedding_cache import cache_file

    # Where there is a cache, perhaps no worker is needed; else it starts before anything else.
    return connected(streams, configured, bars, spare=not cache_file(cache_dir()).exists())


def _embed(
    streams: Streams,
    side: Connected,
    request: dict[str, Any],
    inputs: list[Input],
    values: dict[str, Any],
    record: Callable[[dict[str, Any]], bytes],
    in_order: Callable[[bytes], bytes] = bytes,
) -> VectorRecords:
    """Embeds all texts of `inputs`, their records going to stdout."""
    from myllm.cli.documents import all_texts
    from myllm.cli.in_flight import InFlight
    from myllm.cli.ordering import InOrder
    from myllm.cli.vector_records import VectorRecords, asking, jobs

    escapes = streams.stdout_is_terminal
    sizes = [size for _, _, _, size in inputs if size is not None]
    total = sum(sizes) if len(sizes) == len(inputs) else None

    def write(data: bytes) -> None:
        data = in_order(data)
        streams.write(visible_json(data) if escapes else data)

    records = VectorRecords(record, write)

    def advanced() -> None:
        side.progress.texts(records.tally.n_ended, records.n_bytes, total)

    InFlight(side, asking(request), records, InOrder(), advanced).run(
        lambda idle: jobs(all_texts(inputs, values["input_mode"], values["field"], idle))
    )
    return records


def _request(values: dict[str, Any]) -> dict[str, Any]:
    """The request without its model and texts. Raises UsageError for a value out of range."""
    priority = options.PATIENT if values["nice"] is None else values["nice"]
    request: dict[str, Any] = {"op": "embed", "priority": priority}
    for name in ("window", "purpose"):
        if values[name] is not None:
            request[name] = values[name]
    request |= {name: values[name] for name in ("overlap", "pool", "on_overflow")}
    if values["no_cache"]:
        request["cache"] = False
    Request.parse(request | {"texts": [""]})
    return request


def _inputs(streams: Streams, files: tuple[str, ...]) -> list[Input]:
    """All files, their records each with its `path`, or stdin; nothing is opened yet."""
    from myllm.cli.documents import Input

    if not files:
        return [Input("stdin", {}, streams.chunks(AWAITED), _size(streams.stdin))]
    return [Input(file, {"path": file}, _chunks(file), _size(file)) for file in files]


def _size(file: str | int) -> int | None:
    """Bytes that a regular file, or what stdin is of one, still has; None for all else."""
    try:
        status = os.stat(file)  # noqa: PTH116 — a descriptor, too
        read = os.lseek(file, 0, os.SEEK_CUR) if isinstance(file, int) else 0
    except OSError:
        return None
    return status.st_size - read if stat.S_ISREG(status.st_mode) else None


def _chunks(file: str) -> Iterator[bytes]:
    try:
        with open(file, "rb") as opened:
            while data := opened.read(CHUNK):
                yield data
    except FileNotFoundError as error:
        raise NotFoundError(f"{file}: no such file") from error
    except OSError as error:
        raise IOFailureError(f"{file}: cannot be read: {error.strerror}") from error


def _similar(
    streams: Streams,
    configured: Settings,
    request: dict[str, Any],
    inputs: list[Input],
    values: dict[str, Any],
) -> int:
    from myllm.cli.similar import run_similar
    from myllm.cli.vector_records import embed_one

    with _connected(streams, configured, values["progress"]) as side:
        found = embed_one(side, request, values["similar_to"])
        side.progress.close()

        def embed_inputs(inputs: list[Input], record: Callable[[dict[str, Any]], bytes]) -> int:
            tally = _embed(streams, side, request, inputs, values, record).tally
            if tally.stopped:
                raise tally.stopped
            return tally.n_failed

        return run_similar(streams, found, embed_inputs, inputs, values)


def _conclude(streams: Streams, records: VectorRecords) -> int:
    """Notes on stderr and the exit status. Raises the error of a lone text, and what `conclude` raises."""
    tally = records.tally
    if records.n_empty:
        texts = "an empty text" if records.n_empty == 1 else f"{records.n_empty:,} empty texts"
        streams.note(f"{texts}: the vector is what the model makes of no words")
    if tally.n_ended == 1 and not tally.stopped:
        for error in tally.errors.values():
            raise error
    return tally.conclude(streams, "texts")


def _statistics(records: VectorRecords, model: str, seconds: float) -> str:
    """`-v`'s one line."""
    tally = records.tally
    return (
        f"{records.model or model}: {tally.n_ended:,} texts ({records.n_cached:,} cached, "
        f"{tally.n_failed:,} failed), {records.n_vectors:,} vectors, {records.n_tokens:,} tokens "
        f"in {seconds:.1f} s, {tally.n_ended / seconds:.1f} texts/s"
    )
