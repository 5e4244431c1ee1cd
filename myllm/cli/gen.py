"""`myllm gen`: options → one request → its events on stdout. Many prompts are `batch.py`'s.

Owns what the options of `gen` mean together. Must not know how a request is answered. On the path of
every warm command: nothing slow is imported here.
"""

from __future__ import annotations

from typing import Any

import click

from myllm.cli import options
from myllm.cli.console import Streams
from myllm.cli.one_answer import answer, in_session
from myllm.errors import UsageError
from myllm.settings import DEFAULT_MODEL

EPILOG = """\b
Examples:
  echo 'Why do Unix pipes matter?' | myllm gen -t
  cat report.txt | myllm gen 'Summarise this in one sentence.'
  git diff | myllm gen 'Write a commit message for {} and nothing else.'
  myllm gen -n --seed 7 --temperature 0 'Say hello.' | jq -r 'select(.done).full_text'
  myllm gen --batch --resume out.jsonl < prompts.jsonl >> out.jsonl
  myllm gen --map 'Classify as spam or ham: {}' --max-tokens 3 < mails.txt

\b
Exit status: 0 answered; 1 some records failed, or the command before; 2 usage;
65 bad data; 66 no such model; 67 the prompt does not fit the window; 69 the
model's process is gone; 74 I/O; 78 configuration; 124 deadline. See `man myllm`.
"""


@click.command("gen", epilog=EPILOG, short_help="Generate text from a prompt, or from many.")
@click.argument("prompt", required=False)
@options.model_option(DEFAULT_MODEL)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("-n", "--no-stdin", is_flag=True, help="Do not read stdin.")
@options.input_options(
    "What stdin is. auto: text, unless it is MyLLM's own stream or lines of role and content; "
    "with --batch and --map: lines, or JSONL if the first is a JSON object."
)
@options.output_options
@options.sampling_options
@click.option(
    "--logprobs",
    type=click.INT,
    metavar="N",
    help="Log-probabilities of each token and of the N (at most 20) likeliest; in JSONL.",
)
@options.session_option("Take a turn in this session: what was said there goes along, the answer is kept.")
@options.files_option
@options.template_option
@click.option("--raw", is_flag=True, help="No chat template: the model goes on with the text.")
@click.option("--count", is_flag=True, help="Count the prompt's tokens and run nothing.")
@options.overflow_option
@options.deadline_option
@click.option(
    "--batch",
    is_flag=True,
    help="Answer every record of stdin, a line each; records may carry sampling parameters.",
)
@click.option("--map", "map", metavar="PROMPT", help="Answer PROMPT for every record, with its text at {}.")
@click.option(
    "--resume", metavar="FILE", help="Skip the records that FILE has answers to; append with >> FILE."
)
@click.option("--unordered", is_flag=True, help="Print records as they end, not in the order of input.")
@click.option("--stream", is_flag=True, help="With --batch and --map: print token events, too.")
@options.loading_options
@options.nice_option("0; 1 with --batch and --map")
@options.daemon_option
@options.progress_option
@click.option("-v", "--verbose", is_flag=True, help="A line of statistics on stderr.")
@click.pass_obj
def gen(streams: Streams, /, prompt: str | None, **values: Any) -> int:
    """Generate text from PROMPT, from stdin, or from both.

    Text on stdin comes first, then a blank line and PROMPT; {} in PROMPT places it elsewhere, and
    {{}} is a literal {}. The newline at the end of stdin is not part of the text.

    On a terminal the answer is text, elsewhere JSONL: token events and a last one with "done": true.
    As text it ends in exactly one newline. --batch and --map print one record an answer, with the
    input's own keys, its index (from 0, blank lines not counted) and input_hash; a bad record becomes
    an error record, and the exit status is 1.
    """
    configured = options.configured(values)
    as_text = options.as_text(streams, values["output"] or configured.output)
    model = options.model_part(values["model"] or configured.default_model, configured, values)
    request = _request(values) | model
    if values["batch"] or values["map"] is not None:
        from myllm.cli.batch import run_batch

        _check_batch(streams, prompt, values)
        return run_batch(streams, configured, request, values, as_text=as_text)
    for name in ("resume", "unordered", "stream"):
        if values[name]:
            raise UsageError(f"--{name}: it goes with --batch or --map")
    for name in ("raw", "count"):
        if values["session"] is not None and values[name]:
            raise UsageError(f"--{name}: it does not go with --session")
    reads_stdin = not values["no_stdin"] and not streams.stdin_is_terminal
    if prompt is None and not reads_stdin and not values["files"]:
        raise UsageError("no prompt: type `myllm gen 'your prompt'`, or pipe text in")
    if values["session"] is not None:
        request = in_session(request, values, configured)
    return answer(streams, configured, request, prompt, values, as_text=as_text, reads_stdin=reads_stdin)


def _request(values: dict[str, Any]) -> dict[str, Any]:
    """The request without its model and what it is to answer; what is out of range, the Runtime refuses."""
    request: dict[str, Any] = {"op": "count" if values["count"] else "gen"}
    request |= options.sampling_parameters(values)
    request |= {name: values[name] for name in ("system", "template", "logprobs") if values[name] is not None}
    if values["raw"]:
        request["raw"] = True
    if values["on_overflow"] != "error":
        request["on_overflow"] = values["on_overflow"]
    if values["nice"] is not None:
        request["priority"] = values["nice"]
    if values["deadline"] is not None:
        request["deadline_ms"] = values["deadline"] * 1000
    return request


def _check_batch(streams: Streams, prompt: str | None, values: dict[str, Any]) -> None:
    """Raises UsageError for options that make no sense with many prompts."""
    if prompt is not None:
        raise UsageError(
            f"PROMPT does not go with --batch or --map; --map {prompt + ' {}'!r} asks it of every record"
        )
    if values["batch"] and values["map"] is not None:
        raise UsageError("--batch and --map: give one of them")
    if values["input_mode"] == "text":
        raise UsageError("--input text: --batch and --map take lines or jsonl")
    if values["no_stdin"] or streams.stdin_is_terminal:
        raise UsageError("stdin: --batch and --map read records from it; give < FILE, or pipe them in")
